"""``python -m benchmarks`` from command line to files and plots, and where a line of sizes ends."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # the benchmarks are not part of the installed package
    sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as runner  # noqa: E402
from benchmarks import plots, scaling  # noqa: E402
from benchmarks.results import Ceilings, Results, Row, load_results  # noqa: E402

CEILINGS = Ceilings("cpu", 1, 20e9, 25e9, {"fp32": 1e11})


def make_row(variant="dhcl", seconds=1e-3, op="gather", **changes):
    known = {"params": {"N": 100, "d": 8}, "iqr_seconds": seconds / 50, "runs": 9, "calls": 90}
    known |= {"bytes_moved": 3200, "flop": 800, "floor_seconds": seconds / 2}
    known |= {"peak_extra_bytes": 1 << 20}
    return Row(op, variant, device="cpu", threads=1, seconds=seconds, **(known | changes))


def saved(path, *rows, **machine):
    Results({"cpu": "a", "gpu": None, **machine}, CEILINGS, list(rows)).save(path)
    return path


def run(*words):
    return runner.main([*map(str, words)])


# ---- one family for real ------------------------------------------------------------------------


def test_a_family_leaves_json_table_and_plots(tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--quick", "--only", "memory", "--cases", "momentum_update_", "--seconds", "0.01"]
    assert run(*words, "--device", "cpu", "--threads", "1", "--out", out) == 0
    said = capsys.readouterr().out
    assert "== memory: done" in said
    rows = load_results(out / "memory.json").rows
    assert {row.op for row in rows} == {"momentum_update_"}
    assert {row.params["B"] for row in rows} == {64, 256, 4096}
    assert {"dhcl", "pytorch loop"} <= {row.variant for row in rows}
    table = (out / "memory.txt").read_text()
    assert "pytorch loop (baseline)" in table
    assert table in said
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert "no plots: plots need matplotlib" in said
        return
    drawn = {path.name for path in (out / "plots").iterdir()}
    assert drawn == {"memory-momentum_update-B.svg"}


# ---- families that do what a test needs ---------------------------------------------------------

# Stands in for a family's script: writes its row, or the row of a file beside it, or fails.
SCRIPT = """
import shutil, sys, time
from pathlib import Path
words, name = sys.argv[1:], Path(__file__).stem
given = Path(__file__).with_name(f"{name}.given")
if given.exists():
    shutil.copy(given, words[words.index("--json") + 1])
print("table of", name, *words[words.index("--only") + 2:], flush=True)
time.sleep({"knn": 60}.get(name, 0))
sys.exit({"ranking": 3}.get(name, 0))
"""


@pytest.fixture
def families(tmp_path, monkeypatch):
    """A folder of stand-ins; FAMILY.given is the JSON that one of them makes."""
    folder = tmp_path / "root" / "benchmarks"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    for name in runner.BENCHMARKS:
        (folder / f"{name}.py").write_text(SCRIPT)
    monkeypatch.setattr(runner, "ROOT", folder.parent)
    return folder


def test_what_fails_does_not_keep_others_from_running(families, tmp_path, capsys):
    saved(families / "memory.given", make_row())
    saved(families / "knn.given", make_row("partial"))
    out = tmp_path / "out"
    saved(out / "ranking.json", make_row("stale"))
    words = ["--only", "ranking", "knn", "memory", "ranking", "--time-limit", "1", "--no-plots"]
    assert run(*words, "--out", out) == 1
    said = capsys.readouterr().out
    assert "failed: ranking: exit status 3" in said
    assert "failed: knn: ended after 1 s" in said
    assert said.count("table of ranking") == 1  # named twice, run once
    assert not (out / "ranking.json").exists(), "an earlier run's results are still there"
    assert load_results(out / "knn.json").rows[0].variant == "partial"  # what it measured is kept
    assert load_results(out / "memory.json").rows[0].variant == "dhcl"
    assert (out / "ranking.txt").read_text() == "table of ranking\n"


def test_options_are_passed_on(families, tmp_path, capsys):
    saved(families / "scaling.given", make_row())
    out = tmp_path / "out"
    words = ["--only", "scaling", "--no-plots", "--out", out, "--threads", "2", "--seconds", "3"]
    assert run(*words, "--quick", "--", "--limit", "7") == 0
    assert "table of scaling --quick --limit 7 --threads 2 --seconds 3.0" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        run("--only", "memory", "scaling", "--out", out, "--", "--limit", "7")
    assert ended.value.code == 2
    assert "of one family: name it with --only" in capsys.readouterr().err


@pytest.mark.parametrize("whole_folder", [False, True])
def test_compare_finds_what_became_slower(families, tmp_path, capsys, whole_folder):
    old = tmp_path / "old"
    saved(old / "memory.json", make_row(), make_row("other"))
    words = ["--only", "memory", "--no-plots", "--out", tmp_path / "out"]
    words += ["--compare", old if whole_folder else old / "memory.json"]
    saved(families / "memory.given", make_row(), make_row("other", 1.01e-3))
    assert run(*words) == 0
    assert "no difference beyond the noise" in capsys.readouterr().out
    saved(families / "memory.given", make_row(seconds=1.5e-3), make_row("other", 5e-4), cpu="b")
    assert run(*words) == 1
    said = capsys.readouterr().out
    assert "slower: gather [N=100 d=8]: dhcl (cpu, threads=1, calls): 1 ms -> 1.5 ms" in said
    assert "faster: gather [N=100 d=8]: other" in said
    assert "machine differs: cpu: a -> b" in said


def test_compare_with_what_is_not_there(families, tmp_path):
    words = ["--only", "memory", "--out", tmp_path / "out", "--compare"]
    with pytest.raises(SystemExit, match=r"--compare: .*No such file.*gone\.json"):
        run(*words, tmp_path / "gone.json")
    (tmp_path / "memory.json").write_text("{")
    with pytest.raises(SystemExit, match=r"--compare: .*memory\.json: not JSON"):
        run(*words, tmp_path / "memory.json")
    saved(tmp_path / "old" / "knn.json", make_row())
    with pytest.raises(SystemExit, match="no results of memory there"):
        run(*words, tmp_path / "old")
    assert not (tmp_path / "out").exists(), "it ran before it looked"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--only memory nosuch", "invalid choice: 'nosuch'"),
        ("--time-limit 0", "--time-limit must be positive (got 0.0)"),
        ("--time-limit nan", "--time-limit must be positive (got nan)"),
        ("--time-limit soon", "invalid float value: 'soon'"),
        ("--device tpu", "invalid choice: 'tpu'"),
    ],
)
def test_wrong_options(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        run(*words.split())
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


# ---- plots --------------------------------------------------------------------------------------


def test_series_are_rows_that_differ_in_one_parameter():
    rows = [make_row(name, 1e-3 * n, params={"N": n, "d": 8}) for name in "ab" for n in (400, 100)]
    rows.append(make_row("a", params={"N": 100, "d": 16}))  # alone in its group
    rows.append(make_row("a", params={"N": "all", "d": 8}))  # no number
    found = plots.series(rows, "N")
    assert list(found) == ["gather [d=8]"]
    lines = [[(row.variant, row.params["N"]) for row in line] for line in found["gather [d=8]"]]
    assert lines == [[("a", 100), ("a", 400)], [("b", 100), ("b", 400)]]
    assert plots.series(rows, "K") == {}


def test_plots_of_sizes_roofline_and_parts(tmp_path):
    pytest.importorskip("matplotlib")
    sizes = [make_row(params={"N": n, "d": 8}, peak_extra_bytes=None) for n in (100, 400)]
    epoch = {"data": "identities", "N": 100}
    parts = [
        make_row(op="epoch: loss", params={**epoch, "B": 16, "steps": 4}, flop=0),
        make_row(op="epoch: total", params={**epoch, "B": 16, "steps": 4}, seconds=4e-3, flop=0),
    ]
    results = Results({}, CEILINGS, [*sizes, *parts])
    files = plots.draw(results, "made", tmp_path / "plots")
    assert [f.name for f in files] == ["made-gather-N.svg", "made-roofline.svg", "made-parts.svg"]
    for file in files:
        assert file.read_text().rstrip().endswith("</svg>")
    before = files[0].read_bytes()
    plots.draw(results, "made", tmp_path / "plots")
    assert files[0].read_bytes() == before  # the same rows, the same file
    assert plots.draw(Results({}, None, [make_row()]), "one", tmp_path / "none") == []


def test_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(plots.MissingMatplotlib, match=r"pip install 'dhcl\[bench\]'"):
        plots.draw(Results({}, CEILINGS, [make_row()]), "made", tmp_path)


# ---- scaling ------------------------------------------------------------------------------------


def grown(sizes, power=2.0, **changes):
    return [
        make_row(params={"N": n}, seconds=1e-9 * n**power, peak_extra_bytes=100 * n, **changes)
        for n in sizes
    ]


def line(rows=(), limit=1.0):
    bench = SimpleNamespace(device=torch.device("cpu"), results=Results({}))
    made = scaling.Line(bench, "neighbours", "N", limit)
    made.rows = list(rows)
    return made


def test_exponents_are_slopes_over_the_larger_half():
    # Small sizes are bound by overhead, which must not show.
    rows = [make_row(params={"N": 10}, seconds=1.0), *grown([1000, 2000, 4000])]
    time, memory = scaling.exponents(rows[::-1], "N")
    assert time == pytest.approx(2.0, abs=1e-4)
    assert memory == pytest.approx(1.0, abs=1e-4)
    assert scaling.exponents(rows[:1], "N") == (None, None)
    assert scaling.exponents(grown([1000, 2000])[:1], "N") == (None, None)
    unknown = [make_row(params={"N": n}, seconds=n, peak_extra_bytes=None) for n in (10, 20)]
    assert scaling.exponents(unknown, "N") == (pytest.approx(1.0, abs=1e-4), None)


def test_a_line_stops_before_what_takes_too_long(monkeypatch):
    monkeypatch.setattr(scaling, "free_bytes", lambda device: None)
    one = line(grown([10_000, 20_000]))  # 0.1 s, 0.4 s
    assert one.allows(30_000, 0)  # 0.9 s
    assert not one.allows(40_000, 0)  # 1.6 s
    assert one.stopped
    assert one.bench.results.skipped == [
        "neighbours: stops before N=40,000, time: 2 s expected, the limit is 1 s"
    ]
    assert not one.allows(10, 0)  # a line that has ended stays so
    assert len(one.bench.results.skipped) == 1


def test_a_line_stops_before_what_does_not_fit(monkeypatch):
    free = 10 << 30
    monkeypatch.setattr(scaling, "free_bytes", lambda device: free)
    one = line(limit=math.inf)
    assert one.allows(1000, int(0.79 * free))
    assert not one.allows(1000, int(0.81 * free))  # inputs alone, before anything was measured
    [why] = one.bench.results.skipped
    assert why == "neighbours: stops before N=1,000, memory: 8.1 GiB expected, 10.0 GiB free"
    grows = line(grown([10**6, 2 * 10**6]), limit=math.inf)
    assert grows.allows(80 * 10**6, 0)  # 7.5 GiB
    assert not grows.allows(90 * 10**6, 0)


def test_running_out_of_memory_ends_a_line():
    def fails(error):
        one = line()

        def run_case(*_, **__):
            raise error

        one.bench.run_case = run_case
        scaling.measure(one, 500, "knn", {"N": 500}, call=lambda: None)
        return one

    for error in (MemoryError(), RuntimeError("not enough memory: you tried to allocate 8 bytes")):
        one = fails(error)
        assert one.stopped
        assert one.bench.results.skipped == ["neighbours: stops before N=500, out of memory"]
    with pytest.raises(RuntimeError, match="wrong result"):
        fails(RuntimeError("wrong result"))


def test_the_exponents_are_printed(capsys):
    one = line(grown([1000, 2000, 4000]))
    one.finish()
    assert capsys.readouterr().out == ("neighbours: time ~ N^2.00, memory ~ N^1.00 up to N=4,000\n")
    line(grown([1000])).finish()
    assert capsys.readouterr().out == ""
