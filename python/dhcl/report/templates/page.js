"use strict";
(() => {
  const read = (id) => {
    const element = document.getElementById(id);
    return element ? JSON.parse(element.textContent) : null;
  };
  const figures = read("figures") || {};
  const pictures = read("pictures") || [];
  const points = read("points");

  // ---- pictures ----
  for (const image of document.querySelectorAll("img[data-picture]")) {
    image.decoding = "async";
    image.src = pictures[image.dataset.picture];
  }

  // ---- light and dark ----
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () =>
    root.dataset.theme ? root.dataset.theme === "dark" : system.matches;

  // What a custom property comes to: only a real property resolves light-dark().
  const probe = document.createElement("span");
  probe.hidden = true;
  document.body.append(probe);
  const colour = (name) => {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  };
  const palette = () => {
    const names = ["text", "muted", "grid", "page"];
    const found = Object.fromEntries(names.map((name) => ["@" + name, colour(name)]));
    for (let i = 0; i < 8; i++) found["@" + i] = colour("c" + i);
    found["@scale"] = [[0, colour("low")], [0.5, colour("middle")], [1, colour("high")]];
    return found;
  };
  const painted = (value, colours) => {
    if (typeof value === "string") return colours[value] || value;
    if (Array.isArray(value)) return value.map((each) => painted(each, colours));
    if (value && typeof value === "object") {
      const entries = Object.entries(value);
      return Object.fromEntries(entries.map(([k, v]) => [k, painted(v, colours)]));
    }
    return value;
  };

  // ---- charts ----
  const settings = {
    responsive: true,
    displaylogo: false,
    modeBarButtons: [["toImage", "resetScale2d"]],
    scrollZoom: false,
  };
  let scheme = "cluster";
  const colourPoints = (figure) => {
    const marks = points[scheme].map((value) => (value < 0 ? "@muted" : "@" + (value % 8)));
    figure.data[0].marker.color = marks;
    figure.data[0].marker.line.color = marks;
  };
  const draw = (key, colours) => {
    const figure = figures[key];
    if (key === "map") colourPoints(figure);
    const { data, layout } = painted(figure, colours);
    return Plotly.react(document.getElementById("chart-" + key), data, layout, settings);
  };
  const drawAll = async () => {
    const colours = palette();
    for (const key of Object.keys(figures)) {
      await draw(key, colours);
      await new Promise((next) => setTimeout(next)); // the page stays usable meanwhile
    }
    if (points) watchMap();
    root.dataset.drawn = Object.keys(figures).length;
  };
  const nameButton = () => {
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", `Use the ${isDark() ? "light" : "dark"} look`);
  };
  const repaint = () => {
    nameButton();
    drawAll();
  };
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    repaint();
  });
  system.addEventListener("change", repaint);

  // ---- map ----
  const tip = document.getElementById("tip");
  let watched = false;
  let current = -1;
  const showPoint = (index, x, y) => {
    current = index;
    tip.replaceChildren();
    if (points.picture[index] >= 0) {
      const image = document.createElement("img");
      image.src = pictures[points.picture[index]];
      image.alt = "";
      tip.append(image);
    }
    tip.append(points.text[index]);
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(4, Math.min(x + 16, innerWidth - box.width - 8)) + "px";
    tip.style.top = Math.max(4, Math.min(y + 16, innerHeight - box.height - 8)) + "px";
  };
  const watchMap = () => {
    if (watched) return;
    watched = true;
    const chart = document.getElementById("chart-map");
    const hide = () => { tip.hidden = true; };
    chart.on("plotly_hover", ({ event, points: hit }) => {
      showPoint(hit[0].pointIndex, event.clientX, event.clientY);
    });
    chart.on("plotly_unhover", hide);
    addEventListener("scroll", hide, { passive: true });
    chart.addEventListener("blur", hide);
    // By keyboard: from point to point in the order of the clusters.
    const order = points.cluster.map((_, i) => i);
    order.sort((a, b) => points.cluster[a] - points.cluster[b] || a - b);
    chart.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") hide();
      if (!step) return;
      event.preventDefault();
      const place = order.indexOf(current);
      const from = place < 0 ? (step > 0 ? -1 : 0) : place;
      const index = order[(from + step + order.length) % order.length];
      const { xaxis, yaxis } = chart._fullLayout;
      const { x, y } = figures.map.data[0];
      const box = chart.getBoundingClientRect();
      const left = box.left + xaxis._offset + xaxis.d2p(x[index]);
      showPoint(index, left, box.top + yaxis._offset + yaxis.d2p(y[index]));
      document.getElementById("map-said").textContent = points.text[index];
    });
    document.getElementById("map-colours").addEventListener("change", (event) => {
      scheme = event.target.value;
      draw("map", palette());
    });
  };

  // ---- filters ----
  const filter = (name, keeps) => {
    const form = document.getElementById(name + "-filter");
    if (!form) return;
    const cards = [...document.querySelectorAll(`[data-in="${name}"]`)];
    const apply = () => {
      const chosen = Object.fromEntries(new FormData(form));
      let shown = 0;
      for (const card of cards) {
        card.hidden = !keeps(card.dataset, chosen);
        shown += !card.hidden;
      }
      form.querySelector("output").textContent = `${shown} of ${cards.length} shown`;
    };
    form.addEventListener("input", apply);
    form.addEventListener("submit", (event) => event.preventDefault());
    apply();
  };
  filter("clusters", (card, chosen) => {
    const size = Number(card.size);
    return (chosen.kind === "all" || card.kinds.split("|").includes(chosen.kind)) &&
      (!chosen.from || size >= Number(chosen.from)) && (!chosen.to || size <= Number(chosen.to));
  });
  filter("lists", (card, chosen) =>
    (chosen.kind === "all" || card.kind === chosen.kind) &&
    (!chosen.camera || card.camera === chosen.camera) &&
    (!chosen.person || card.person === chosen.person.trim()));

  nameButton();
  drawAll();
})();
