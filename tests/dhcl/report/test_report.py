import itertools
import json
import math
import re
import shutil
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from dhcl.cli import main
from dhcl.config import ConfigError, load_config, with_changes
from dhcl.data import ImageList, ReIDData, load_data
from dhcl.inference import ranked as found_lists
from dhcl.inference.ranked import Listed, Shown
from dhcl.report import charts, report_training, write_comparison, write_report
from dhcl.report.gather import (
    Findings,
    Limits,
    Map,
    RankedList,
    Retrieval,
    camera_matrix,
    choose_clusters,
    choose_queries,
    draw_map,
    look,
    rank_lists,
    similarities,
)
from dhcl.report.pictures import Pictures
from dhcl.report.ranked import ranked_page
from dhcl.report.several import comparison_page, labels_of
from dhcl.report.single import run_page
from dhcl.training.checkpoint import load_checkpoint, save_checkpoint
from dhcl.training.record import Record, measured, read_record
from dhcl.training.results import Results, collect
from dhcl.training.runs import train
from dhcl.training.trainer import fingerprint
from PIL import Image

from dhcl_ops import evaluate_ranking
from tests.dhcl.browser import chromium
from tests.dhcl.toy import command_line, options, write_images


def images(ids, cameras):
    paths = tuple(Path(f"{i}.png") for i in range(len(ids)))
    return ImageList(paths, np.array(ids), np.array(cameras))


# ---- gathering ----------------------------------------------------------------------------------


def test_clusters_are_described_and_chosen():
    #       cluster 0: one person, two cameras | 1: two people, one camera | 2: unknown | outlier
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, -1])
    people = images([5, 5, 5, 5, 6, 6, 7, -1, -1, 5], [0, 0, 1, 1, 2, 2, 2, -1, -1, 0])
    found = {c.label: c for c in choose_clusters(labels, people, Limits(members=3))}
    assert (found[0].size, found[0].cameras, found[0].ids, found[0].purity) == (4, 2, 1, 1.0)
    assert (found[1].size, found[1].cameras, found[1].ids) == (3, 1, 2)
    assert found[1].purity == pytest.approx(2 / 3)
    assert found[1].main_id == 6
    assert math.isnan(found[2].purity)
    assert found[2].main_id == -1
    assert set(found[0].kinds) == {"largest", "purest", "most cross-camera", "any size"}
    assert set(found[1].kinds) == {"largest", "purest", "most mixed", "any size"}
    assert found[0].shown == (0, 2, 3)  # evenly over the four, in the order of the cameras
    few = choose_clusters(labels, people, Limits(clusters=1))
    assert {c.label for c in few if "largest" in c.kinds} == {0}
    assert {c.label for c in few if "most mixed" in c.kinds} == {1}


def toy_features():
    """A query of person 1 in camera 0; similarities 0.9, 0.8, ... down the gallery."""
    angles = np.arccos([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    gallery = torch.tensor(np.stack([np.cos(angles), np.sin(angles)], 1)).float()
    query = torch.tensor([[1.0, 0.0]])
    #  same camera (junk), wrong, right, junk box, wrong, right
    return query, gallery, images([1], [0]), images([1, 2, 1, -1, 3, 1], [0, 1, 1, 1, 2, 2])


def test_ranked_list_and_average_precision_by_hand():
    query, gallery, queries, shown = toy_features()
    metrics = evaluate_ranking(
        (query, gallery),
        *(torch.from_numpy(x) for x in (queries.ids, shown.ids, queries.cameras, shown.cameras)),
        per_query=True,
    )
    ap, first = metrics.average_precision.numpy(), metrics.first_match.numpy()
    (found,) = rank_lists(query, gallery, queries, shown, ap, first, {0: "best"}, 10)
    assert found.gallery == (1, 2, 4, 5)
    assert found.right == (False, True, False, True)
    assert found.similarity == pytest.approx((0.8, 0.7, 0.5, 0.4), abs=1e-5)
    assert found.ap == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert found.first == 2


def test_queries_are_best_median_and_worst():
    ap = np.array([0.5, np.nan, 0.9, 0.1, 0.7, 0.3, 0.2])
    chosen = choose_queries(ap, 2)
    assert chosen == {2: "best", 4: "best", 0: "median", 5: "median", 6: "worst", 3: "worst"}
    assert choose_queries(np.array([0.5, 0.2]), 10) == {0: "best", 1: "worst"}


def test_camera_matrix_by_hand():
    turn = np.deg2rad([0, 10, 20, 30])
    rows = torch.tensor(np.stack([np.cos(turn), np.sin(turn)], 1)).float()
    queries, shown = images([1, 1], [0, 1]), images([1, 2, 2, 1], [1, 1, 0, 0])
    # From camera 0 in camera 1 the right one is first; from camera 1 in camera 0 it is second.
    cameras, matrix = camera_matrix(rows[[0, 0]], rows, queries, shown)
    assert cameras.tolist() == [0, 1]
    assert np.isnan(np.diag(matrix)).all()
    assert matrix[0, 1] == pytest.approx(1.0)
    assert matrix[1, 0] == pytest.approx(0.5)
    unknown, none = camera_matrix(rows[[0]], rows, images([1], [-1]), images([1] * 4, [-1] * 4))
    assert len(unknown) == 0
    assert none.shape == (0, 0)


def test_similarities_count_pairs_across_cameras():
    query, gallery, queries, shown = toy_features()
    found = similarities(query, gallery, queries, shown, bins=20)
    assert found.across
    assert (found.positive.sum(), found.negative.sum()) == (2, 2)  # neither junk nor own camera
    assert found.mean_positive == pytest.approx((0.7 + 0.4) / 2, abs=1e-5)
    assert found.mean_negative == pytest.approx((0.8 + 0.5) / 2, abs=1e-5)
    strangers = images([8, 9, 8, 9, 8, 9], shown.cameras)
    assert similarities(query, gallery, queries, strangers) is None


def test_map_keeps_groups_apart_and_takes_equal_rows():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.eye(3, 16) * 5, 15, axis=0) + rng.normal(0, 0.1, (45, 16))
    xy = draw_map(groups.astype(np.float32))
    centres = xy.reshape(3, 15, 2).mean(1)
    within = np.linalg.norm(xy.reshape(3, 15, 2) - centres[:, None], axis=2).max()
    between = min(np.linalg.norm(centres[i] - centres[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert within < between
    assert np.isfinite(draw_map(np.ones((9, 4), np.float32))).all()
    assert draw_map(np.ones((4, 4), np.float32)) is None


def test_pictures_are_bounded_and_kept_once(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (300, 150, 3)).astype(np.uint8)
    for i in range(4):
        Image.fromarray(noise + i).save(tmp_path / f"{i}.png")
    one = Pictures()
    assert one.add(tmp_path / "0.png") == one.add(tmp_path / "0.png") == 0
    size = len(one.uris[0])
    few = Pictures(budget=int(2.5 * size))
    assert [few.add(tmp_path / f"{i}.png") for i in range(4)] == [0, 1, -1, -1]
    assert len(few.left_out) == 2
    (tmp_path / "no.png").write_text("no image")
    assert few.add(tmp_path / "no.png") == few.add(tmp_path / "gone.png") == -1
    assert len(few.unreadable) == 2


def test_runs_of_one_name_are_told_apart(tmp_path):
    for name in ("a/run", "b/run", "c"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "log.jsonl").write_text("")
    records = [read_record(tmp_path / n) for n in ("a/run", "b/run", "c", "c")]
    assert labels_of(records)[:2] == ["a/run", "b/run"]
    assert len(set(labels_of(records))) == 4


# ---- charts and page ----------------------------------------------------------------------------


def test_charts_are_plotly_figures():
    go = pytest.importorskip("plotly.graph_objects")
    query, gallery, queries, shown = toy_features()
    found = similarities(query, gallery, queries, shown)
    drawn = [
        charts.lines("a", "t", "", [charts.Series("x <b>", {1: 0.5, 2: 0.6})], unit="%"),
        charts.stages({1: {"train": 2.0, "extract": 1.0}}),
        charts.stages_of_runs(["a", "b"], [{"train": 2.0}, {"extract": 1.0}]),
        charts.cluster_sizes([("", np.array([4, 5, 5, 90]))]),
        charts.cluster_sizes([("a", np.array([4])), ("b", np.array([5, 7]))]),
        charts.similarity(found),
    ]
    for chart in drawn:
        text = json.dumps(chart.figure)
        for name in ("text", "muted", "grid", "page", *range(8)):
            text = text.replace(f'"@{name}"', '"#123456"')
        go.Figure(json.loads(text))  # which refuses unknown attributes
        assert chart.alt
    assert drawn[0].figure["data"][0]["name"] == "x &lt;b&gt;"
    assert sum(drawn[3].figure["data"][0]["y"]) == 4
    assert [each["name"] for each in drawn[1].figure["data"]] == ["extract", "train"]


# Would break out of text, an attribute, a script's JSON, a comment, a template.
HOSTILE = (
    "</script><x-evil>alert(1)</x-evil>",
    '"><x-evil onclick="alert(1)">',
    "' onclick='alert(1)",
    "--><!--<x-evil>",
    "{{ 7 * 191 }}{% x %}",
)


class Tags(HTMLParser):
    """Elements of a page with their attributes, and its text outside of scripts and styles."""

    def __init__(self, page):
        super().__init__()
        self.found, self.text = [], ""
        self.feed(page.decode())

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, tuple(sorted(name for name, _ in attributes))))

    def handle_data(self, data):
        if self.found and self.found[-1][0] not in ("script", "style"):
            self.text += data


def in_files(name):
    return name.replace("/", "|")


def some_run(folder, name):
    """A run that has every part of a page, with this name wherever one comes from outside."""
    paths = tuple(folder / f"{in_files(name)} {i}" for i in range(6))
    people = ImageList(paths, np.arange(6) % 2, np.arange(6) // 3)
    data = ReIDData(name, folder, people, people, people, name)
    options = {"epochs": 1, "preset": name, "data": name, name: [name]}
    entry = {"epoch": 0, "loss": 1.0, name: 1.0, "seconds": {"train": 1.0, name: 1.0}}
    labels = np.array([0, 0, 0, 0, 1, -1])
    run = folder / in_files(name)
    record = Record(run, options, None, [entry], labels=labels, missing={name: name})
    found = Findings(record, data, record.sizes, missing={name: name})
    found.clusters = choose_clusters(labels, people, Limits())
    found.outliers = np.array([5])
    found.map = Map(np.arange(6), np.zeros((6, 2)), 6, False)
    ranked = RankedList(0, "best", 1.0, 1, (0, 1), (0.9, 0.8), (True, False))
    matrix = np.array([[np.nan, 0.5], [0.5, np.nan]])
    found.retrieval = Retrieval(np.ones(6), 1.0, 1.0, (ranked,), None, np.array([0, 1]), matrix)
    return found


def page_of(template, folder, name):
    if template == "report.html":
        return run_page(some_run(folder, name))
    if template == "comparison.html":
        return comparison_page([some_run(folder, name), some_run(folder / "other", name)])
    image, gone = folder / f"{in_files(name)}.png", folder / "gone" / in_files(name)
    Image.new("RGB", (4, 8)).save(image)
    place = Listed(Shown(image, name, name), 0.9, None, True)
    places = (place, Listed(Shown(gone, name, name), 0.9, 0.5, False))
    return ranked_page([found_lists.RankedList(Shown(image, name, name), places)], name, name)


PAGES = ("report.html", "comparison.html", "ranked.html")


@pytest.mark.parametrize("template", PAGES)
@pytest.mark.parametrize("name", HOSTILE)
def test_names_from_outside_stay_names(template, name, tmp_path):
    harmless = Tags(page_of(template, tmp_path, "harmless"))
    page = page_of(template, tmp_path, name)
    hostile = Tags(page)
    assert hostile.found == harmless.found  # no element and no attribute more
    shown = hostile.text.replace(name, "harmless").replace(in_files(name), "harmless")
    assert shown == harmless.text
    assert shown.count("harmless") > 10
    for values in re.findall(rb'<script type="application/json"[^>]*>(.*)</script>', page):
        json.loads(values)
        assert b"<" not in values


def test_every_template_is_tried_with_names_from_outside():
    folder = resources.files("dhcl.report") / "templates"
    names = {file.name for file in folder.iterdir() if file.name.endswith(".html")}
    assert names == {*PAGES, "page.html", "parts.html"}  # these two are parts of the others
    for name in names:
        text = (folder / name).read_text()
        assert not re.search(r"=\{\{", text), f"{name}: an attribute without quotes"
        assert not re.search(r"\bsafe\b", text), f"{name}: something is not escaped"


# ---- runs ---------------------------------------------------------------------------------------

ODD = "röt <b>\"&'x"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / ODD)


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    """A finished run with a report, in a folder with a name that needs escaping."""
    out = tmp_path_factory.mktemp("runs") / 'run <i>"&é'
    given = command_line(options(pictures, out, report=True, eval_every=1))
    assert main(["train", *given]) == 0
    return out


@pytest.fixture
def copy(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "copy"))


def test_training_ends_with_a_report(run):
    text = (run / "report.html").read_text()
    metrics = json.loads((run / "metrics.json").read_text())["last"]
    assert f"{100 * metrics['mAP']:.1f} %" in text
    assert "Run run &lt;i&gt;&#34;&amp;é" in text
    assert "<i>" not in text.split("<script>")[0]
    assert "What this report does not have" not in text
    assert len(text) < 20e6


def test_report_that_fails_is_one_warning(pictures, tmp_path, capsys, monkeypatch):
    def broken(*args, **kwargs):
        raise ConfigError("first line\nsecond line")

    monkeypatch.setattr("dhcl.report.single.write_report", broken)
    given = command_line(options(pictures, tmp_path / "run", report=True, epochs=1))
    assert main(["train", *given]) == 0
    out = capsys.readouterr().out
    assert "warning: no report of the run: first line" in out
    assert "second line" not in out
    assert (tmp_path / "run" / "metrics.json").exists()


def test_look_agrees_with_the_evaluation(run):
    record = read_record(run)
    found = look(collect(record))
    assert not found.missing
    assert found.retrieval.mAP == pytest.approx(record.last["mAP"], abs=1e-6)
    assert found.retrieval.rank1 == pytest.approx(record.last["rank1"], abs=1e-6)
    assert found.sizes.sum() + (record.labels < 0).sum() == len(found.data.train)
    assert len(found.map.images) == len(found.data.train)


def test_command_says_what_is_wrong(run, tmp_path, capsys):
    wrong = {
        "there is no folder": [str(tmp_path / "none")],
        "is not the folder of a run": [str(tmp_path)],
        "queries: must be at least 1": [str(run), "--queries", "0"],
        "out: there is no folder": [str(run), "--out", str(tmp_path / "a" / "b.html")],
    }
    for message, arguments in wrong.items():
        assert main(["report", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert main(["compare", str(run)]) == 2
    assert "at least two" in capsys.readouterr().err


def report_of(run, **more):
    return write_report(collect(read_record(run)), **more)


WRONG_LINES = [
    {"seconds": -1e300}, {"seconds": [1]}, {"seconds": {"train": 1e308}}, {"clusters": None},
    {"loss": "\x1b[31m"}, {"loss": 10**30}, {"observed": {"ari": [1]}}, {"epoch": 1e400},
]  # fmt: skip
WRONG_METRICS = [
    [], {"last": 1}, {"last": {"mAP": 0.5}}, {"last": {"epoch": 2, "mAP": "x"}},
    {"last": {"epoch": 2, "mAP": [1]}}, {"last": {"epoch": 2, "reranked": 0.5}},
    {"best": {"epoch": 2, "rank1": None}},
]  # fmt: skip


def test_a_log_and_metrics_that_hold_something_else_are_said_to(copy):
    log, metrics = copy / "log.jsonl", copy / "metrics.json"
    first = json.loads(log.read_text().splitlines()[0])
    for change in WRONG_LINES:
        log.write_text(json.dumps(first) + "\n" + json.dumps({**first, **change}))
        record = read_record(copy)
        assert record.missing["log"] == "1 of 2 lines of log.jsonl can't be read", change
        assert record.log == [first]
    for stored in WRONG_METRICS:
        metrics.write_text(json.dumps(stored))
        record = read_record(copy)
        assert "metrics.json can't be read" in record.missing["metrics"], stored
        assert record.last == {}
        assert measured(copy, "last") == {}


def test_half_written_run(copy, tmp_path):
    shutil.rmtree(copy / "checkpoints")
    (copy / "metrics.json").unlink()
    first = (copy / "log.jsonl").read_text().splitlines()[0]
    (copy / "log.jsonl").write_text(first + "\n" + first[:40])
    text = report_of(copy, out=tmp_path / "half.html").read_text()
    assert "there is no checkpoints/last.pt" in text
    assert "1 of 2 lines of log.jsonl can&#39;t be read" in text
    assert "the log has 1 of 3 epochs" in text
    assert 'id="chart-loss"' in text
    (copy / "log.jsonl").unlink()
    assert "nothing over epochs" in report_of(copy).read_text()


def test_options_that_are_no_options(copy):
    (copy / "config.yaml").write_text("kappa: [")
    text = report_of(copy).read_text()
    assert "config.yaml can&#39;t be used" in text
    assert 'id="chart-sizes"' in text  # of the checkpoint
    save_checkpoint(copy / "checkpoints" / "last.pt", {"model": {}})
    assert "last.pt can&#39;t be used" in report_of(copy).read_text()


def change_options(run, **changes):
    file = run / "config.yaml"
    file.write_text(with_changes(load_config(file), changes).to_yaml())


def test_images_that_are_gone_or_others(copy, pictures, tmp_path):
    change_options(copy, root=str(tmp_path / "moved"))
    text = report_of(copy).read_text()
    assert "the images are needed" in text
    assert 'id="chart-sizes"' in text
    moved = shutil.copytree(pictures, tmp_path / "elsewhere")
    assert main(["report", str(copy), "--root", str(moved), "--workers", "0"]) == 0
    assert "What this report does not have" not in (copy / "report.html").read_text()
    next((moved / "bounding_box_train").iterdir()).unlink()
    next((moved / "query").iterdir()).write_bytes(b"no image")
    found = look(collect(replaced(copy, moved)))
    assert "are not those of the run, which had 48 (got 47)" in found.missing["clusters"]
    assert "1 of 32 images can't be read" in found.missing["test images"]
    assert found.retrieval is not None


def replaced(run, root):
    record = read_record(run)
    record.change(root=root, workers=0)
    return record


def test_no_identities_and_no_cameras(copy, pictures, tmp_path):
    """The same images as a plain folder: nothing to evaluate, but clusters and a map."""
    names = sorted(p for p in (pictures / "bounding_box_train").iterdir())
    folder = tmp_path / "crops"
    folder.mkdir()
    for path in names:
        shutil.copy(path, folder)
    config = options(folder, tmp_path / "plain", data="folder", epochs=1, report=True)
    trained = train(config, quiet=True)
    assert trained.metrics == {}
    report_training(trained)
    text = (tmp_path / "plain" / "report.html").read_text()
    assert "the data set has no queries or no gallery" in text
    assert "they need images with identities" in text
    assert 'id="chart-map"' in text
    assert 'value="purest"' not in text


def test_memory_of_clusters_has_a_map_of_features(pictures, tmp_path):
    config = options(pictures, tmp_path / "cc", "cluster-contrast", epochs=1, report=True)
    train(config, quiet=True)
    found = look(collect(read_record(tmp_path / "cc")))
    if len(found.sizes):
        assert found.map.extracted
    assert found.record.bank is None


def test_compare(run, copy, tmp_path, capsys):
    lines = (copy / "log.jsonl").read_text().splitlines()
    (copy / "log.jsonl").write_text("\n".join(lines[:2]) + "\n")
    change_options(copy, kappa=0.5)
    out = tmp_path / "compare.html"
    assert main(["compare", str(run), str(copy), "--out", str(out)]) == 0
    text = out.read_text()
    assert '<th scope="row">kappa</th><td>0.0</td><td>0.5</td>' in text
    assert '<th scope="row">k1</th>' not in text
    assert "2 of 3" in text
    assert text.count('id="chart-cameras-') == 2
    write_comparison([Results(read_record(r)) for r in (run, copy)], out=out, retrieval=False)
    assert "chart-cameras" not in out.read_text()


def test_size_is_bounded_at_20_000_images(run, pictures, tmp_path):
    """A checkpoint of 20,000 images, hard links of a few that compress badly."""
    count, root = 20_000, tmp_path / "many"
    folder = root / "bounding_box_train"
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 255, (40, 128, 64, 3)).astype(np.uint8)
    for i in range(count):
        path = folder / f"{i % 700:04d}_c{i % 6 + 1}s1_{i:06d}_00.jpg"
        if i < 40:
            Image.fromarray(noise[i]).save(path, quality=95)
        else:
            path.hardlink_to(folder / f"{i % 40 % 700:04d}_c{i % 40 % 6 + 1}s1_{i % 40:06d}_00.jpg")
    for name in ("query", "bounding_box_test"):
        shutil.copytree(pictures / name, root / name)
    many = shutil.copytree(run, tmp_path / "run")
    state = load_checkpoint(many / "checkpoints" / "last.pt")
    train_images = load_data("market1501", root).train
    rng = np.random.default_rng(1)
    state["labels"] = torch.from_numpy(np.where(rng.random(count) < 0.2, -1, train_images.ids))
    state["bank"] = {"features": torch.randn(count, 16)}
    state["images"] = fingerprint(train_images)
    save_checkpoint(many / "checkpoints" / "last.pt", state)
    record = replaced(many, root)
    path = write_report(collect(record, points=400))
    assert path.stat().st_size < 20e6
    text = path.read_text()
    assert "20,000" in text
    assert 'id="chart-map"' in text


# ---- in a browser -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened:
        yield opened


@pytest.fixture
def open_page(browser):
    """Opens a file; at the end there must have been neither errors nor requests."""
    opened, troubles = [], []

    def load(path, **context):
        tab = browser.new_context(**context).new_page()
        opened.append(tab)
        tab.on("console", lambda m: troubles.append(m.text) if m.type != "log" else None)
        tab.on("pageerror", lambda error: troubles.append(str(error)))
        inside = ("data:", "blob:", path.as_uri())
        tab.on("request", lambda r: None if r.url.startswith(inside) else troubles.append(r.url))
        tab.goto(path.as_uri())
        tab.wait_for_selector("html[data-drawn]", state="attached")
        return tab

    yield load
    for tab in opened:
        tab.context.close()
    assert not troubles


def shown(tab, name):
    return tab.locator(f'[data-in="{name}"]:visible').count()


def test_report_in_a_browser(run, open_page):
    tab = open_page(run / "report.html", viewport={"width": 1200, "height": 900})
    boxes = tab.locator(".chart")
    assert boxes.count() == 10
    for i in range(boxes.count()):
        assert boxes.nth(i).locator("svg.main-svg").count() > 0
        assert boxes.nth(i).get_attribute("aria-label").startswith("Chart: ")
    loaded = "all => all.every(i => i.complete && i.naturalWidth > 0 && i.alt)"
    assert tab.eval_on_selector_all("img[data-picture]", loaded)
    assert tab.locator("img[data-picture]").count() > 50
    levels = tab.eval_on_selector_all("h1, h2, h3", "all => all.map(h => +h.tagName[1])")
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))


def test_filters_in_a_browser(run, open_page):
    tab = open_page(run / "report.html")
    lists = tab.locator("#lists-filter")
    first = shown(tab, "lists")
    lists.get_by_label("all").check(force=True)
    everything = shown(tab, "lists")
    assert everything > first > 0
    lists.get_by_label("worst").check(force=True)
    kinds = "all => all.filter(e => !e.hidden).map(e => e.dataset.kind)"
    assert set(tab.eval_on_selector_all('[data-in="lists"]', kinds)) == {"worst"}
    lists.get_by_label("all").check(force=True)
    person = tab.locator('[data-in="lists"]').first.get_attribute("data-person")
    lists.get_by_label("identity").fill(person)
    assert 0 < shown(tab, "lists") < everything
    lists.get_by_label("identity").fill("")
    lists.get_by_label("query camera").select_option("2")
    cameras = "all => all.filter(e => !e.hidden).map(e => e.dataset.camera)"
    assert set(tab.eval_on_selector_all('[data-in="lists"]', cameras)) == {"2"}
    clusters = tab.locator("#clusters-filter")
    clusters.get_by_label("all").check(force=True)
    total = shown(tab, "clusters")
    sizes = tab.eval_on_selector_all('[data-in="clusters"]', "all => all.map(e => +e.dataset.size)")
    clusters.get_by_label("images from").fill(str(max(sizes)))
    assert shown(tab, "clusters") == sizes.count(max(sizes))
    assert f"{sizes.count(max(sizes))} of {total} shown" in clusters.inner_text()


def test_map_in_a_browser(run, open_page):
    tab = open_page(run / "report.html", viewport={"width": 1000, "height": 900})
    tab.locator("#chart-map").scroll_into_view_if_needed()
    tip = tab.locator("#tip")
    assert tip.is_hidden()
    point = tab.locator("#chart-map .points path").first.bounding_box()
    tab.mouse.move(point["x"] + 60, point["y"] + 60)
    tab.mouse.move(point["x"] + point["width"] / 2, point["y"] + point["height"] / 2)
    tip.wait_for(state="visible")
    assert "cluster" in tip.inner_text() or "outlier" in tip.inner_text()
    assert tip.locator("img").evaluate("i => i.naturalWidth") > 0
    tab.mouse.move(2, 2)
    tab.locator("#chart-map").focus()
    tab.keyboard.press("ArrowRight")
    first = tab.locator("#map-said").inner_text()
    tab.keyboard.press("ArrowRight")
    assert first
    assert tab.locator("#map-said").inner_text() != first
    fill = "() => [...document.querySelectorAll('#chart-map .points path')].map(p => p.style.fill)"
    by_cluster = tab.evaluate(fill)
    tab.locator("#map-colours").get_by_label("camera").check(force=True)
    tab.wait_for_timeout(300)
    assert tab.evaluate(fill) != by_cluster


def test_dark_and_light(run, open_page):
    look_of = "() => getComputedStyle(document.body).backgroundColor"
    ink_of = "() => document.querySelector('#chart-loss .xtick text').style.fill"
    tabs = {s: open_page(run / "report.html", color_scheme=s) for s in ("light", "dark")}
    assert tabs["light"].evaluate(look_of) == "rgb(255, 255, 255)"
    dark, ink = tabs["dark"].evaluate(look_of), tabs["dark"].evaluate(ink_of)
    assert dark == "rgb(21, 24, 29)"
    assert tabs["light"].evaluate(ink_of) != ink
    tabs["light"].locator("#theme").click()
    tabs["light"].wait_for_timeout(1000)
    assert tabs["light"].evaluate(look_of) == dark
    assert tabs["light"].evaluate(ink_of) == ink


def test_narrow_window_does_not_scroll_sideways(run, open_page):
    tab = open_page(run / "report.html", viewport={"width": 380, "height": 700})
    assert tab.evaluate("document.documentElement.scrollWidth") <= 380


def test_comparison_in_a_browser(run, copy, tmp_path, open_page):
    results = (collect(read_record(r), points=0) for r in (run, copy))
    out = write_comparison(results, out=tmp_path / "compare.html")
    tab = open_page(out)
    boxes = tab.locator(".chart")
    assert boxes.count() > 10
    assert all(boxes.nth(i).locator("svg.main-svg").count() for i in range(boxes.count()))
    assert "run <i>" in tab.locator("#chart-loss-0 .legendtext").first.text_content()


def test_half_written_run_in_a_browser(copy, open_page):
    shutil.rmtree(copy / "checkpoints")
    (copy / "metrics.json").unlink()
    tab = open_page(report_of(copy))
    assert tab.locator(".chart svg.main-svg").count() > 0
    assert "there is no checkpoints/last.pt" in tab.locator("#overview").inner_text()
