"""``dhcl report``: everything about one run on one page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dhcl.config import PRESETS, ConfigError, flat_options, preset
from dhcl.data import ImageList, ReIDData
from dhcl.files import write_atomic
from dhcl.report import charts
from dhcl.report.charts import Chart, Series
from dhcl.report.gather import Cluster, Findings, Limits, RankedList, look
from dhcl.report.page import chart_grid, escape, missing, numbers, page, picture, table
from dhcl.report.pictures import Pictures
from dhcl.training.logs import duration, flat
from dhcl.training.record import Record
from dhcl.training.results import Results, results_of
from dhcl.training.runs import Trained
from dhcl.words import show

__all__ = [
    "EPOCH_CHARTS",
    "check_file",
    "epoch_series",
    "percent",
    "report_training",
    "subtitle",
    "write_report",
]

_KINDS = ("largest", "purest", "most mixed", "most cross-camera", "any size")
# Options that change no method.
_OWN = ("data", "root", "out", "preset", "seed", "workers", "cache_gb", "device", "report")
_MAP_HEIGHT = 72  # pixels of a thumbnail that only the map shows
# Key, title, text, unit, and the lines: name and key in the log.
EPOCH_CHARTS: tuple[tuple[str, str, str, str, dict[str, str]], ...] = (
    (
        "ranking",
        "mAP and rank-1",
        "On the test images. Evaluations along the way are looked at, not used; the last epoch is "
        "the result.",
        "%",
        {"mAP": "observed.mAP", "rank-1": "observed.rank1"},
    ),
    (
        "clusters",
        "Clusters and outliers",
        "Pseudo-labels of each epoch. Outliers are images in no cluster.",
        "",
        {"clusters": "clusters", "outliers": "outliers"},
    ),
    (
        "agreement",
        "Clusters against identities",
        "Adjusted Rand index and normalised mutual information, 100 % where they agree. Outliers "
        "count as clusters of one.",
        "%",
        {"ARI": "observed.ari", "NMI": "observed.nmi"},
    ),
    (
        "loss",
        "Loss",
        "Mean over the steps of an epoch: the whole, and its parts before their weights; a part "
        "without weight is 0.",
        "",
        {"loss": "loss", "over prototypes": "prototype_loss", "over instances": "instance_loss"},
    ),
    (
        "clamp",
        "Clamped rows",
        "Share of rows whose debiased negative mass came out below its lower bound; without "
        "debiasing (kappa 0) there are none. Near 100 % for good: kappa is too large.",
        "%",
        {"over prototypes": "clamped", "over instances": "instance_clamped"},
    ),
)


def write_report(
    results: Results, *, out: Path | None = None, limits: Limits | None = None
) -> Path:
    """Write the report of a run and return its file.

    Args:
        results: of the run, finished or not.
        out: file; ``report.html`` in the run by default.
        limits: how much to show.

    Raises:
        ConfigError: Plotly is not installed, or no file can be written there. OSError: it could not
            be written.
    """
    out = out or results.record.run / "report.html"
    check_file(out)
    write_atomic(out, render(look(results, limits)))
    return out


def report_training(trained: Trained) -> None:
    """Write the report of a training that has just ended, which it can't make fail any more.

    One line says where it is, or why there is none. To be called on every process.
    """
    engine = trained.engine
    if not trained.config.evaluation.report or not engine.is_main:
        return
    try:
        path = write_report(results_of(trained))
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        engine.say(f"warning: no report of the run: {reason}")
    else:
        engine.say(f"report: {show(path)}")


def check_file(out: Path) -> None:
    """Raise :class:`ConfigError` if no page can be written there, before there is one to write."""
    if not out.parent.is_dir():
        raise ConfigError(f"out: there is no folder {show(out.parent)} to write {out.name} in")
    if out.is_dir():
        raise ConfigError(f"out: must be a file (got the folder {show(out)})")


def render(found: Findings) -> bytes:
    """The page of what was found."""
    pictures = Pictures()
    record = found.record
    drawn: list[Chart] = []

    def grid(parts: list[Chart], extra: Mapping[str, str] | None = None) -> str:
        drawn.extend(parts)
        return chart_grid(parts, extra) if parts else ""

    sheets = _clusters(found, pictures)
    lists = _lists(found, pictures)
    points = _points(found, pictures)
    sections = [
        ("overview", "Overview", numbers(_key_figures(found)) + missing(_missing(found, pictures))),
        ("epochs", "Over the epochs", _over_epochs(record, grid)),
        ("clusters", "Clusters", _sizes(found, grid) + sheets),
        ("retrieval", "Retrieval", _retrieval(found, grid) + lists),
        ("bank", "Map", _map(found, points, grid)),
        ("configuration", "Configuration", _configuration(record)),
    ]
    height, width = _image_size(record)
    return page(
        f"Run {record.name}",
        subtitle(record),
        sections,
        drawn,
        pictures.uris,
        points,
        int(np.clip(round(128 * width / height), 40, 200)),
    )


# ---- overview -----------------------------------------------------------------------------------


def percent(value: float | None, digits: int = 1) -> str:
    """A share as text, a dash for none."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{100 * value:.{digits}f} %"


def subtitle(record: Record) -> str:
    """What the run is, in a line."""
    o = record.options
    parts = [f"{o[key]}" for key in ("data", "backbone") if o.get(key)]
    parts += [f"{key} {o[key]}" for key in ("preset", "seed") if o.get(key) is not None]
    if record.config and record.config.data.root:
        parts.append(f"images in {show(record.config.data.root)}")
    return ", ".join(parts)


def _image_size(record: Record) -> tuple[int, int]:
    return record.config.model.image_size if record.config else (256, 128)


def _key_figures(found: Findings) -> list[tuple[str, str]]:
    record = found.record
    last: dict[str, Any] = record.last
    figures = []
    if last:
        figures = [(n, percent(last.get(k))) for n, k in (("mAP", "mAP"), ("rank-1", "rank1"))]
    elif found.retrieval is not None:
        r = found.retrieval
        figures = [("mAP of the checkpoint", percent(r.mAP)), ("rank-1", percent(r.rank1))]
    if "reranked" in last:
        figures.append(("mAP, re-ranked", percent(last["reranked"].get("mAP"))))
    if record.log:
        entry = flat(record.log[-1])
        figures += [(n, f"{entry[n]:,}") for n in ("clusters", "outliers") if n in entry]
        if "observed.ari" in entry:
            figures.append(("ARI", percent(entry["observed.ari"])))
    total = record.options.get("epochs", "?")
    figures.append(("epochs", f"{len(record.log)} of {total}"))
    spent = sum(sum(e.get("seconds", {}).values()) for e in record.log)
    figures.append(("time", duration(spent)))
    return figures


def _missing(found: Findings, pictures: Pictures) -> dict[str, str]:
    reasons = dict(found.missing)
    if pictures.unreadable:
        one = show(min(pictures.unreadable))
        reasons["pictures"] = (
            f"{len(pictures.unreadable):,} images are gone or can't be read, {one} for one"
        )
    if pictures.left_out:
        reasons["some pictures"] = (
            f"{len(pictures.left_out):,} thumbnails more would make the file too large"
        )
    return reasons


# ---- epochs -------------------------------------------------------------------------------------


def epoch_series(record: Record, key: str) -> dict[int, float]:
    """A value of the log by epoch, from 1; test metrics with those of the last epoch."""
    values = {}
    for entry in record.log:
        value = flat(entry).get(key)
        if isinstance(value, (int, float)):
            values[entry["epoch"] + 1] = float(value)
    name = key.removeprefix("observed.")
    if name != key and name in record.last:
        values[int(record.last["epoch"]) + 1] = float(record.last[name])
    return values


def _over_epochs(record: Record, grid: Any) -> str:
    if not record.log:
        return missing(record.missing.get("log", "the log is empty"))
    drawn = []
    absent = {}
    for key, title, text, unit, names in EPOCH_CHARTS:
        series = [Series(n, v) for n, k in names.items() if (v := epoch_series(record, k))]
        if series:
            drawn.append(charts.lines(key, title, text, series, unit=unit))
        else:
            absent[title] = "the log has no values; they need images with identities"
    seconds = {e["epoch"] + 1: e["seconds"] for e in record.log if e.get("seconds")}
    if seconds:
        drawn.append(charts.stages(seconds))
    return str(grid(drawn)) + missing(absent) + _log_table(record)


def _log_table(record: Record) -> str:
    rows = [flat(entry) for entry in record.log]
    hidden = ("epoch", "observed.observed_only", "dropped")
    names = [n for n in dict.fromkeys(n for r in rows for n in r) if n not in hidden]
    head = ["epoch", *(n.replace("observed.", "").replace("seconds.", "s ") for n in names)]
    body = [[str(r["epoch"] + 1), *(_cell(r.get(n)) for n in names)] for r in rows]
    content = table(head, body, caption="The log, one row an epoch; times in seconds")
    return f"<details><summary>All values as a table</summary>{content}</details>"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---- clusters -----------------------------------------------------------------------------------


def _sizes(found: Findings, grid: Any) -> str:
    if not len(found.sizes):
        return missing(found.missing.get("clusters", "the clustering found no clusters"))
    return str(grid([charts.cluster_sizes([("", found.sizes)])]))


def _clusters(found: Findings, pictures: Pictures) -> str:
    if found.data is None or not (found.clusters or len(found.outliers)):
        return missing(found.missing["clusters"]) if len(found.sizes) else ""
    train, record = found.data.train, found.record
    there = dict.fromkeys(k for c in found.clusters for k in c.kinds)
    kinds = [k for k in _KINDS if k in there]
    if len(found.outliers):
        kinds.append("outliers")
    first = kinds[0]
    boxes = [_radio("kind", kind, kind, kind == first) for kind in [*kinds, "all"]]
    form = (
        f'<form class="filter" id="clusters-filter"><fieldset><legend>Show</legend>'
        f"{''.join(boxes)}</fieldset>"
        '<label>images from <input type="number" name="from" min="1"></label>'
        '<label>to <input type="number" name="to" min="1"></label>'
        '<output aria-live="polite"></output></form>'
    )
    about = (
        f"Pseudo-labels of epoch {record.labels_epoch}; of each cluster at most "
        f"{max((len(c.shown) for c in found.clusters), default=0)} images. "
    )
    if train.num_ids:
        about += (
            "A solid green border and ✓: the identity that most of the cluster have; a dashed red "
            "one and ✗: another. Purity is the share of the former."
        )
    cards = "".join(_cluster(c, train, pictures) for c in found.clusters)
    if len(found.outliers):
        total = int((found.record.labels < 0).sum()) if found.record.labels is not None else 0
        items = "".join(_image(train, int(i), "", pictures) for i in found.outliers)
        cards += (
            f'<div class="sheet" data-in="clusters" data-kinds="outliers" data-size="1">'
            f"<h3>Outliers</h3><p class=about>{len(found.outliers)} of {total:,}</p>"
            f'<ul class="row wrap">{items}</ul></div>'
        )
    return f'<p class="note">{about}</p>{form}{cards}'


def _radio(name: str, value: str, text: str, checked: bool) -> str:
    mark = " checked" if checked else ""
    return (
        f'<label><input type="radio" name="{name}" value="{escape(value)}"{mark}>'
        f"{escape(text)}</label>"
    )


def _cluster(cluster: Cluster, train: ImageList, pictures: Pictures) -> str:
    parts = [f"{cluster.size} images"]
    if cluster.cameras:
        parts.append(_count(cluster.cameras, "camera", "cameras"))
    if cluster.main_id >= 0:
        parts.append(_count(cluster.ids, "identity", "identities"))
        parts.append(f"purity {percent(cluster.purity, 0)}")
    items = []
    for i in cluster.shown:
        known = cluster.main_id >= 0 and train.ids[i] >= 0
        kind = "" if not known else "right" if train.ids[i] == cluster.main_id else "wrong"
        items.append(_image(train, i, kind, pictures))
    tags = "".join(f'<span class="tag">{escape(kind)}</span>' for kind in cluster.kinds)
    return (
        f'<article class="sheet" data-in="clusters" data-size="{cluster.size}" '
        f'data-kinds="{escape("|".join(cluster.kinds))}"><h3>Cluster {cluster.label}{tags}</h3>'
        f'<p class="about">{escape(", ".join(parts))}</p>'
        f'<ul class="row" tabindex="0" aria-label="Images of cluster {cluster.label}">'
        f"{''.join(items)}</ul></article>"
    )


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _image(
    images: ImageList, number: int, kind: str, pictures: Pictures, *more: str, before: str = ""
) -> str:
    """An image with identity and camera below it, and a mark for right or wrong."""
    person, camera = int(images.ids[number]), int(images.cameras[number])
    mark = {"right": "<b>✓</b> ", "wrong": "<b>✗</b> "}.get(kind, "")
    known = [f"id {person}" if person >= 0 else "", f"c{camera + 1}" if camera >= 0 else ""]
    lines = [mark + escape(known[0]), escape(" · ".join(k for k in (known[1], *more) if k))]
    path = images.paths[number]
    said = ", ".join(s for s in (before, kind, *known, show(path.name)) if s)
    return picture(pictures.add(path), kind, said, [line for line in lines if line])


# ---- retrieval ----------------------------------------------------------------------------------


def _retrieval(found: Findings, grid: Any) -> str:
    r = found.retrieval
    if r is None:
        return missing(found.missing["retrieval"])
    valid = ~np.isnan(r.ap)
    full = int((r.ap[valid] >= 1).sum())
    text = (
        f"{valid.sum():,} of {len(r.ap):,} queries have a right match in the gallery; of these "
        f"{full or 'none'} are ranked without an error (average precision 100 %). "
        f"mAP {percent(r.mAP)}, rank-1 {percent(r.rank1)}, of the last checkpoint."
    )
    drawn = []
    if r.similarities is not None:
        drawn.append(charts.similarity(r.similarities))
    if len(r.cameras) > 1:
        drawn.append(charts.cameras(r))
    return f"<p>{escape(text)}</p>{grid(drawn)}"


def _lists(found: Findings, pictures: Pictures) -> str:
    r = found.retrieval
    if r is None or found.data is None:
        return ""
    query = found.data.query
    there = sorted({int(query.cameras[each.query]) for each in r.lists})
    options = "".join(f'<option value="{c + 1}">camera {c + 1}</option>' for c in there if c >= 0)
    each = sum(one.kind == "best" for one in r.lists)
    kinds = [k for k in ("median", "best", "worst") if any(o.kind == k for o in r.lists)]
    boxes = [_radio("kind", k, k, k == kinds[0]) for k in [*kinds, "all"]]
    camera = f'<label>query camera <select name="camera"><option value="">any</option>{options}'
    form = (
        f'<form class="filter" id="lists-filter"><fieldset><legend>Queries</legend>{"".join(boxes)}'
        f"</fieldset>{camera if options else '<label hidden><select>'}</select></label>"
        '<label>identity <input name="person" inputmode="numeric"></label>'
        '<output aria-live="polite"></output></form>'
    )
    about = (
        f"The {each} best, median and worst queries by average precision (AP), the query first. "
        "Green and ✓: the same identity; dashed red and ✗: another. As in evaluation, images of "
        "the query's identity in its own camera, and junk, are not in the lists."
    )
    cards = "".join(_ranked(one, found.data, pictures) for one in r.lists)
    return f'<h3 class="apart">Ranked lists</h3><p class="note">{about}</p>{form}{cards}'


def _ranked(one: RankedList, data: ReIDData, pictures: Pictures) -> str:
    person, camera = int(data.query.ids[one.query]), int(data.query.cameras[one.query])
    items = [_image(data.query, one.query, "query", pictures, "query")]
    ranked = zip(one.gallery, one.similarity, one.right, strict=True)
    for rank, (number, similarity, right) in enumerate(ranked, 1):
        kind = "right" if right else "wrong"
        items.append(
            _image(data.gallery, number, kind, pictures, f"{similarity:.2f}", before=f"rank {rank}")
        )
    where = f", camera {camera + 1}" if camera >= 0 else ""
    shown = camera + 1 if camera >= 0 else ""
    return (
        f'<article class="sheet" data-in="lists" data-kind="{one.kind}" data-camera="{shown}" '
        f'data-person="{person}"><h3>Identity {person}{where}<span class="tag">{one.kind}</span>'
        f'</h3><p class="about">AP {percent(one.ap)}, first right match at rank {one.first:,}</p>'
        f'<ol class="row" tabindex="0" aria-label="Ranked list of a query of identity {person}">'
        f"{''.join(items)}</ol></article>"
    )


# ---- map ----------------------------------------------------------------------------------------


def _points(found: Findings, pictures: Pictures) -> dict[str, Any] | None:
    labels = found.record.labels
    if found.map is None or found.data is None or labels is None:
        return None
    train, chosen = found.data.train, found.map.images
    texts = []
    for i in chosen:
        parts = ["outlier" if labels[i] < 0 else f"cluster {labels[i]}"]
        parts += [f"id {train.ids[i]}"] if train.ids[i] >= 0 else []
        parts += [f"camera {train.cameras[i] + 1}"] if train.cameras[i] >= 0 else []
        texts.append(", ".join([*parts, show(train.paths[i].name)]))
    return {
        "cluster": labels[chosen].tolist(),
        "person": train.ids[chosen].tolist(),
        "camera": train.cameras[chosen].tolist(),
        "picture": [pictures.add(train.paths[i], _MAP_HEIGHT) for i in chosen],
        "text": [t.encode("utf-8", "backslashreplace").decode() for t in texts],
    }


def _map(found: Findings, points: dict[str, Any] | None, grid: Any) -> str:
    if points is None or found.map is None or found.record.labels is None:
        return missing(found.missing.get("map", "the images are needed"))
    names = {"cluster": "cluster", "person": "identity", "camera": "camera"}
    boxes = [
        _radio("colours", value, text, value == "cluster")
        for value, text in names.items()
        if any(v >= 0 for v in points[value]) or value == "cluster"
    ]
    form = (
        '<form class="filter" id="map-colours"><fieldset><legend>Colour by</legend>'
        f'{"".join(boxes)}</fieldset></form><span id="map-said" class="skip" aria-live="polite">'
        "</span>"
    )
    chart = charts.plane(found.map, found.record.labels, points["text"])
    return str(grid([chart], {"map": form}))


# ---- configuration ------------------------------------------------------------------------------


def _configuration(record: Record) -> str:
    if not record.options:
        return missing(record.missing["configuration"])
    base = {}
    if record.options.get("preset") in PRESETS:
        base = flat_options(preset(record.options["preset"]))
    rows, changed = [], []
    for number, (name, value) in enumerate(record.options.items()):
        default = base.get(name)
        default = list(default) if isinstance(default, tuple) else default
        differs = name in base and name not in _OWN and default != value
        rows.append([name, _option(value), _option(default) if differs else ""])
        if differs:
            changed.append(number)
    head = ("option", "value", "the preset's, where it differs")
    return table(head, rows, changed=changed, numeric=False, name="Options of the run")


def _option(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return " x ".join(map(str, value))
    return show(str(value))
