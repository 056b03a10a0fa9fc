"use strict";
// Names come from strangers: they are put into the page as text alone (textContent, append).
(() => {
  const PAGE = 24;
  const at = (id) => document.getElementById(id);
  const options = at("options");
  let about = null;
  let query = null; // {key, name, row} of the gallery, or {key, name, file}
  let offset = 0;
  let searches = 0;
  let listings = 0;
  let saved = true;
  let shown = []; // for each result in the page, what shows its mark
  const marks = new Map();

  const make = (tag, kind, ...content) => {
    const element = document.createElement(tag);
    if (kind) element.className = kind;
    element.append(...content);
    return element;
  };

  // ---- the server ----
  const ask = async (path, settings) => {
    let answer;
    try {
      answer = await fetch(path, { credentials: "omit", ...settings });
    } catch {
      throw new Error("The server does not answer. Is dhcl serve still running?");
    }
    if (answer.ok) return answer;
    const said = await answer.json().catch(() => ({}));
    throw new Error(said.error || `The server answered ${answer.status}.`);
  };
  const trouble = (text) => {
    at("trouble").hidden = !text;
    at("trouble").firstElementChild.textContent = text;
  };

  // ---- pictures ----
  const missing = (row) => {
    const place = make("span", "nopicture", "no picture");
    // Why is said once, by the server; the others are as a rule missing for the same reason.
    if (!at("trouble").hidden) return place;
    ask(`pictures/${row}`).catch((error) => trouble(error.message));
    return place;
  };
  const picture = (row, alt) => {
    const image = make("img");
    image.alt = alt;
    image.loading = "lazy";
    image.decoding = "async";
    image.addEventListener("error", () => image.replaceWith(missing(row)), { once: true });
    image.src = `pictures/${row}`;
    return image;
  };
  const known = (each) => {
    const parts = [];
    if (each.id !== null) parts.push(`id ${each.id}`);
    if (each.camera !== null) parts.push(`camera ${each.camera}`);
    return parts.join(", ");
  };
  const date = (seconds) => new Date(1000 * seconds).toLocaleString();
  const when = (each) => {
    if (each.time === null) return `file of ${date(each.changed)}`;
    return about.times === "dates" ? date(each.time) : `${each.time} s`;
  };
  const lines = (each) =>
    [known(each), when(each), each.path].filter(Boolean).map((text) => make("span", "", text));

  // ---- what is chosen ----
  const filters = () => {
    const chosen = new URLSearchParams();
    const form = new FormData(options);
    for (const camera of form.getAll("camera")) chosen.append("camera", camera);
    if (form.get("id")?.trim()) chosen.set("id", form.get("id").trim());
    for (const name of ["since", "until"]) {
      const text = form.get(name);
      const time = about.times === "dates" ? new Date(text).getTime() / 1000 : Number(text);
      if (text && Number.isFinite(time)) chosen.set(name, time);
    }
    return chosen;
  };

  // ---- the query ----
  const showQuery = (image, name) => {
    at("chosen").hidden = false;
    at("chosen").replaceChildren(image);
    at("hint").textContent = name;
  };
  // What is found may be far from what was chosen, most of all where the page is one column.
  const goToResults = () => {
    const { top } = at("results-heading").getBoundingClientRect();
    if (top < 0 || top > innerHeight / 2) at("results-heading").scrollIntoView();
  };
  const chooseRow = (each) => {
    query = { key: `row ${each.row}`, name: each.path, row: each.row };
    const name = [each.path, known(each)].filter(Boolean).join(" · ");
    showQuery(picture(each.row, `Query: ${each.path}`), name);
    search(true);
  };
  const chooseFile = (file) => {
    if (file.size > about.max_bytes) {
      const most = Math.round(about.max_bytes / 2 ** 20);
      trouble(`${file.name}: the file is too large; at most ${most} MiB are taken.`);
      return;
    }
    query = { key: `file ${file.name} ${file.size} ${file.lastModified}`, name: file.name, file };
    const image = make("img");
    image.alt = `Query: ${file.name}`;
    image.src = URL.createObjectURL(file);
    const free = () => URL.revokeObjectURL(image.src);
    image.addEventListener("load", free, { once: true });
    image.addEventListener("error", () => {
      free();
      image.replaceWith(make("span", "nopicture", "no picture"));
    }, { once: true });
    showQuery(image, file.name);
    search(true);
  };
  const chooseFirst = (files) => { if (files.length) chooseFile(files[0]); };

  // ---- results ----
  const search = async (first) => {
    if (!query || !options.reportValidity()) return;
    const chosen = filters();
    const form = new FormData(options);
    chosen.set("topk", form.get("topk"));
    for (const name of ["rerank", "other_cameras"]) if (form.get(name)) chosen.set(name, "true");
    if (query.file) chosen.set("name", query.name);
    else chosen.set("row", query.row);
    const turn = ++searches;
    const asked = query;
    trouble("");
    at("results").setAttribute("aria-busy", "true");
    at("said").textContent = "Searching …";
    try {
      const answer = await ask(`search?${chosen}`, { method: "POST", body: asked.file });
      const found = await answer.json();
      if (turn !== searches) return;
      showResults(asked, found);
      if (first) goToResults();
    } catch (error) {
      if (turn !== searches) return;
      at("results").replaceChildren();
      at("said").textContent = "";
      trouble(error.message);
    } finally {
      if (turn === searches) at("results").removeAttribute("aria-busy");
    }
  };
  const showResults = (asked, found) => {
    shown = [];
    at("results").replaceChildren(...found.results.map((each) => result(asked, each)));
    const order = found.reranked ? "re-ranked distance" : "similarity";
    const count = found.results.length;
    at("said").textContent = count
      ? `${count} of ${found.images.toLocaleString()} images, by ${order}`
      : "Nothing: no image is of this choice.";
  };
  const result = (asked, each) => {
    const item = make("li");
    const distance = each.distance === null ? "" : ` · ${each.distance.toFixed(3)}`;
    const head = make("b", "", `${each.rank} · ${each.similarity.toFixed(3)}${distance}`);
    const key = `${asked.key} → ${each.row}`;
    const yes = make("button", "yes", "✓");
    const no = make("button", "no", "✗");
    const show = () => {
      const mark = marks.get(key)?.mark;
      item.className = mark || "";
      yes.setAttribute("aria-pressed", mark === "right");
      no.setAttribute("aria-pressed", mark === "wrong");
    };
    for (const [button, mark] of [[yes, "right"], [no, "wrong"]]) {
      button.type = "button";
      button.setAttribute("aria-label", `Rank ${each.rank} is ${mark}`);
      button.addEventListener("click", () => {
        if (marks.get(key)?.mark === mark) marks.delete(key);
        else marks.set(key, { ...place(asked, each), mark });
        saved = !marks.size;
        show();
        showMarks();
      });
    }
    item.append(picture(each.row, `Rank ${each.rank}: ${each.path}`), head, ...lines(each));
    item.append(make("div", "judge", yes, no));
    shown.push(show);
    show();
    return item;
  };
  const place = (asked, { row, rank, similarity, distance }) => ({
    query: asked.file ? null : asked.row,
    name: asked.file ? asked.name : "",
    row, rank, similarity, distance,
  });

  // ---- marks ----
  const showMarks = () => {
    const count = (mark) => [...marks.values()].filter((each) => each.mark === mark).length;
    at("marks").hidden = !marks.size;
    at("counts").textContent = `Marked: ${count("right")} right, ${count("wrong")} wrong`;
  };
  const exported = async (format) => {
    try {
      const body = JSON.stringify({ marks: [...marks.values()] });
      const answer = await ask(`marks?format=${format}`, { method: "POST", body });
      const link = make("a");
      link.href = URL.createObjectURL(await answer.blob());
      link.download = `marks.${format}`;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 60000);
      saved = true;
    } catch (error) {
      trouble(error.message);
    }
  };

  // ---- the gallery ----
  const list = async () => {
    const turn = ++listings;
    const chosen = filters();
    chosen.set("offset", offset);
    chosen.set("limit", PAGE);
    try {
      const { total, rows } = await (await ask(`rows?${chosen}`)).json();
      if (turn !== listings) return;
      at("gallery").replaceChildren(...rows.map((each) => {
        const button = make("button", "pick", picture(each.row, ""), ...lines(each));
        button.type = "button";
        button.setAttribute("aria-label", `Search with ${each.path}`);
        button.addEventListener("click", () => {
          chooseRow(each);
        });
        return make("li", "", button);
      }));
      const last = offset + rows.length;
      at("place").textContent = rows.length
        ? `${(offset + 1).toLocaleString()} to ${last.toLocaleString()} of ${total.toLocaleString()}`
        : "no images";
      at("before").disabled = offset === 0;
      at("after").disabled = last >= total;
    } catch (error) {
      if (turn === listings) trouble(error.message);
    }
  };
  const turnPage = (step) => {
    offset = Math.max(0, offset + step * PAGE);
    list();
  };

  // ---- light and dark ----
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const nameTheme = () => {
    at("theme").textContent = isDark() ? "Light" : "Dark";
    at("theme").setAttribute("aria-label", `Use the ${isDark() ? "light" : "dark"} look`);
  };

  // ---- to begin with ----
  const changed = () => {
    offset = 0;
    list();
    search();
  };
  const listen = () => {
    options.addEventListener("change", changed);
    options.addEventListener("reset", () => setTimeout(changed)); // when the fields are empty
    options.addEventListener("submit", (event) => {
      event.preventDefault();
      search();
    });
    at("file").addEventListener("change", (event) => {
      chooseFirst(event.target.files);
      event.target.value = ""; // so that the same file can be chosen again
    });
    const drop = at("drop");
    for (const name of ["dragover", "dragleave", "drop"]) {
      // On the whole page, since a file that misses its place would be opened in place of it.
      addEventListener(name, (event) => {
        event.preventDefault();
        drop.classList.toggle("over", name === "dragover");
        if (name === "drop") chooseFirst(event.dataTransfer.files);
      });
    }
    addEventListener("paste", (event) => {
      chooseFirst(event.clipboardData.files);
    });
    at("before").addEventListener("click", () => turnPage(-1));
    at("after").addEventListener("click", () => turnPage(1));
    at("forget").addEventListener("click", () => {
      marks.clear();
      saved = true;
      for (const show of shown) show();
      showMarks();
    });
    for (const button of document.querySelectorAll("[data-format]")) {
      button.addEventListener("click", () => exported(button.dataset.format));
    }
    addEventListener("beforeunload", (event) => { if (!saved) event.preventDefault(); });
  };
  const showAbout = () => {
    document.title = `Search ${about.name}`;
    at("title").textContent = `Search ${about.name}`;
    at("about").textContent = `${about.images.toLocaleString()} images; model ${about.model.slice(0, 12)}`;
    at("foot").textContent = `Served by dhcl ${about.version}. The page needs no other server.`;
    at("cameras").hidden = !about.cameras.length;
    at("other").hidden = !about.cameras.length;
    at("identity").hidden = !about.identities;
    for (const label of document.querySelectorAll("[data-time]")) {
      const field = label.querySelector("input");
      label.hidden = !about.times;
      field.type = about.times === "dates" ? "datetime-local" : "number";
      field.step = about.times === "dates" ? "1" : "any";
    }
    at("only").hidden = !about.cameras.length && !about.identities && !about.times;
    about.cameras.forEach((name, number) => {
      const box = make("input");
      box.type = "checkbox";
      box.name = "camera";
      box.value = number;
      at("cameras").append(make("label", "", box, name));
    });
  };
  at("seen").addEventListener("click", () => trouble(""));
  at("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    nameTheme();
  });
  system.addEventListener("change", nameTheme);
  nameTheme();
  ask("about").then(async (answer) => {
    about = await answer.json();
    showAbout();
    listen();
    await list();
    root.dataset.ready = "";
  }).catch((error) => trouble(error.message));
})();
