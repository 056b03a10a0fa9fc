"""``dhcl report``: everything about one run, as plain data for the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dhcl.config import PRESETS, flat_options, preset
from dhcl.data import ImageList, ReIDData
from dhcl.files import write_atomic
from dhcl.report import charts, views
from dhcl.report.curves import CURVES, epoch_series, seconds_of
from dhcl.report.gather import Cluster, Findings, Limits, RankedList, Retrieval, look
from dhcl.report.pages import Table, check_file, grouped, percent, render, scripted
from dhcl.report.pictures import Pictures
from dhcl.training.logs import flat
from dhcl.training.record import Record
from dhcl.training.results import Results, results_of
from dhcl.training.runs import Trained
from dhcl.words import duration, first_line, show

__all__ = ["report_training", "run_page", "write_report"]

_KINDS = ("largest", "purest", "most mixed", "most cross-camera", "any size")
# Options that change no method.
_OWN = ("data", "root", "out", "preset", "seed", "workers", "cache_gb", "device", "report")
_MAP_HEIGHT = 72  # pixels of a thumbnail that only the map shows


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
    write_atomic(out, run_page(look(results, limits)))
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
        engine.say(f"warning: no report of the run: {first_line(error)}")
    else:
        engine.say(f"report: {show(path)}")


def run_page(found: Findings) -> bytes:
    """The page of what was found."""
    record, pictures = found.record, Pictures()
    # A thumbnail keeps the height it was first asked for with, and the map's are the smallest.
    clusters = _clusters(found, pictures)
    retrieval = _retrieval(found, pictures)
    points = _points(found, pictures)
    epochs, plane = _over_epochs(record), _map(found, points)
    drawn = [*epochs.charts, clusters.sizes, *retrieval.charts, plane.chart]
    height, width = record.config.model.image_size if record.config else (256, 128)
    return render(
        "report.html",
        title=f"Run {record.name}",
        subtitle=_subtitle(record),
        picture_width=int(np.clip(round(128 * width / height), 40, 200)),
        overview=views.Overview(
            figures=_key_figures(found),
            missing=grouped({**found.missing, **_missing_pictures(pictures)}),
        ),
        epochs=epochs,
        clusters=clusters,
        retrieval=retrieval,
        map=plane,
        configuration=_configuration(record),
        **scripted([chart for chart in drawn if chart is not None], pictures.uris, points),
    )


# ---- overview -----------------------------------------------------------------------------------


def _subtitle(record: Record) -> str:
    """What the run is, in a line."""
    o = record.options
    parts = [f"{o[key]}" for key in ("data", "backbone") if o.get(key)]
    parts += [f"{key} {o[key]}" for key in ("preset", "seed") if o.get(key) is not None]
    if record.config and record.config.data.root:
        parts.append(f"images in {show(record.config.data.root)}")
    return ", ".join(parts)


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
    figures.append(("time", duration(seconds_of(record))))
    return figures


def _missing_pictures(pictures: Pictures) -> dict[str, str]:
    reasons = {}
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


def _over_epochs(record: Record) -> views.Epochs:
    if not record.log:
        return views.Epochs(reason=record.missing.get("log", "the log is empty"))
    drawn = []
    absent = {}
    for key, title, text, unit, names in CURVES:
        series = [charts.Series(n, v) for n, k in names.items() if (v := epoch_series(record, k))]
        if series:
            drawn.append(charts.lines(key, title, text, series, unit=unit))
        else:
            absent[title] = "the log has no values; they need images with identities"
    seconds = {e["epoch"] + 1: e["seconds"] for e in record.log if e.get("seconds")}
    if seconds:
        drawn.append(charts.stages(seconds))
    return views.Epochs(charts=tuple(drawn), missing=grouped(absent), log=_log(record))


def _log(record: Record) -> Table:
    rows = [flat(entry) for entry in record.log]
    hidden = ("epoch", "observed.observed_only", "dropped")
    names = [n for n in dict.fromkeys(n for r in rows for n in r) if n not in hidden]
    head = ["epoch", *(n.replace("observed.", "").replace("seconds.", "s ") for n in names)]
    body = [[str(r["epoch"] + 1), *(_cell(r.get(n)) for n in names)] for r in rows]
    return Table(head, body, caption="The log, one row an epoch; times in seconds")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---- clusters -----------------------------------------------------------------------------------


def _clusters(found: Findings, pictures: Pictures) -> views.Clusters:
    why = found.missing.get("clusters", "")
    if not len(found.sizes):
        why = why or "the clustering found no clusters"
    sizes = charts.cluster_sizes([("", found.sizes)]) if len(found.sizes) else None
    if found.data is None or not (found.clusters or len(found.outliers)):
        return views.Clusters(sizes, reason=why)
    train = found.data.train
    shown = tuple(_cluster(cluster, train, pictures) for cluster in found.clusters)
    there = {kind for cluster in found.clusters for kind in cluster.kinds}
    kinds = [kind for kind in _KINDS if kind in there]
    outliers = None
    if len(found.outliers):
        kinds.append("outliers")
        total = int((found.record.labels < 0).sum()) if found.record.labels is not None else 0
        outliers = views.Sheet(
            name="Outliers",
            about=f"{len(found.outliers)} of {total:,}",
            pictures=tuple(_picture(train, int(i), "", pictures) for i in found.outliers),
        )
    sheets = views.Sheets(_about_clusters(found, train), _choices(kinds), shown, outliers)
    return views.Clusters(sizes, "" if len(found.sizes) else why, sheets)


def _about_clusters(found: Findings, train: ImageList) -> str:
    about = (
        f"Pseudo-labels of epoch {found.record.labels_epoch}; of each cluster at most "
        f"{max((len(c.shown) for c in found.clusters), default=0)} images. "
    )
    if train.num_ids:
        about += (
            "A solid green border and ✓: the identity that most of the cluster have; a dashed red "
            "one and ✗: another. Purity is the share of the former."
        )
    return about


def _choices(kinds: Sequence[str]) -> dict[str, str]:
    """Values of a choice, which are their own names, and all of them."""
    return {kind: kind for kind in (*kinds, "all")}


def _cluster(cluster: Cluster, train: ImageList, pictures: Pictures) -> views.Sheet:
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
        items.append(_picture(train, i, kind, pictures))
    name, about = f"Cluster {cluster.label}", ", ".join(parts)
    return views.Sheet(name, about, tuple(items), cluster.kinds, cluster.size)


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _picture(
    images: ImageList, number: int, kind: str, pictures: Pictures, *more: str, before: str = ""
) -> views.Picture:
    """An image with identity and camera below it."""
    person, camera = int(images.ids[number]), int(images.cameras[number])
    known = [f"id {person}" if person >= 0 else "", f"c{camera + 1}" if camera >= 0 else ""]
    lines = [known[0], " · ".join(part for part in (known[1], *more) if part)]
    path = images.paths[number]
    alt = ", ".join(part for part in (before, kind, *known, show(path.name)) if part)
    return views.Picture(pictures.add(path), kind, alt, tuple(line for line in lines if line))


# ---- retrieval ----------------------------------------------------------------------------------


def _retrieval(found: Findings, pictures: Pictures) -> views.Retrieval:
    r = found.retrieval
    if r is None or found.data is None:
        return views.Retrieval(reason=found.missing["retrieval"])
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
    return views.Retrieval(text=text, charts=tuple(drawn), lists=_lists(r, found.data, pictures))


def _lists(r: Retrieval, data: ReIDData, pictures: Pictures) -> views.Lists:
    cameras = sorted({int(data.query.cameras[each.query]) for each in r.lists})
    each = sum(one.kind == "best" for one in r.lists)
    kinds = [k for k in ("median", "best", "worst") if any(o.kind == k for o in r.lists)]
    left_out = "junk is"
    if data.across_cameras:
        left_out = "images of the query's identity in its own camera, and junk, are"
    about = (
        f"The {each} best, median and worst queries by average precision (AP), the query first. "
        "Green and ✓: the same identity; dashed red and ✗: another. As in evaluation, "
        f"{left_out} not in the lists."
    )
    return views.Lists(
        about=about,
        kinds=_choices(kinds),
        cameras=[camera + 1 for camera in cameras if camera >= 0],
        queries=[_ranked(one, data, pictures) for one in r.lists],
    )


def _ranked(one: RankedList, data: ReIDData, pictures: Pictures) -> views.Query:
    person, camera = int(data.query.ids[one.query]), int(data.query.cameras[one.query])
    items = [_picture(data.query, one.query, "query", pictures, "query")]
    ranked = zip(one.gallery, one.similarity, one.right, strict=True)
    for rank, (number, similarity, right) in enumerate(ranked, 1):
        kind, text = "right" if right else "wrong", f"{similarity:.2f}"
        items.append(_picture(data.gallery, number, kind, pictures, text, before=f"rank {rank}"))
    where = f", camera {camera + 1}" if camera >= 0 else ""
    return views.Query(
        name=f"Identity {person}{where}",
        kind=one.kind,
        about=f"AP {percent(one.ap)}, first right match at rank {one.first:,}",
        camera=str(camera + 1) if camera >= 0 else "",
        person=person,
        pictures=tuple(items),
    )


# ---- map ----------------------------------------------------------------------------------------


def _points(found: Findings, pictures: Pictures) -> dict[str, Any] | None:
    """What the page's script knows of each point of the map."""
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
        "text": texts,
    }


def _map(found: Findings, points: dict[str, Any] | None) -> views.Map:
    if points is None or found.map is None or found.record.labels is None:
        return views.Map(reason=found.missing.get("map", "the images are needed"))
    names = {"cluster": "cluster", "person": "identity", "camera": "camera"}
    colours = {
        value: text
        for value, text in names.items()
        if any(v >= 0 for v in points[value]) or value == "cluster"
    }
    return views.Map(
        chart=charts.plane(found.map, found.record.labels, points["text"]), colours=colours
    )


# ---- configuration ------------------------------------------------------------------------------


def _configuration(record: Record) -> views.Configuration:
    if not record.options:
        return views.Configuration(reason=record.missing["configuration"])
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
    options = Table(head, rows, changed=changed, numeric=False, name="Options of the run")
    return views.Configuration(options=options)


def _option(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return " x ".join(map(str, value))
    return show(str(value))
