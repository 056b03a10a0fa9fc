"""``scripts/gpu_day.sh``: its parts, how they fail, and what is read from the tools they call."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # the benchmarks are not part of the installed package
    sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as runner  # noqa: E402
from benchmarks import families, gpu_day, kernels, ncu, together  # noqa: E402

SCRIPT = ROOT / "scripts" / "gpu_day.sh"
FOUND = {"gpu": "", "modules": ["hypothesis", "pytest"]}


def script(*words, cwd=None):
    variables = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(
        [str(SCRIPT), *words], capture_output=True, text=True, cwd=cwd, env=variables
    )


@pytest.fixture
def without_cuda(monkeypatch):
    monkeypatch.setattr(gpu_day, "probe", lambda python: FOUND)


@pytest.fixture
def with_cuda(monkeypatch):
    monkeypatch.setattr(gpu_day, "probe", lambda python: {**FOUND, "gpu": "NVIDIA H200"})


def make_day(folder, cuda=False, **changes):
    found = {**FOUND, "gpu": "NVIDIA H200" if cuda else ""}
    folder.mkdir(exist_ok=True)
    deadline = time.monotonic() + 60
    return gpu_day.Day(folder, sys.executable, found, False, folder, deadline, **changes)


def outcome(out, part):
    return json.loads((out / part / "outcome.json").read_text())


# ---- the command line ---------------------------------------------------------------------------


def test_the_script_lists_the_parts():
    done = script("--list")
    assert done.returncode == 0, done.stderr
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert names == ["facts", "build", "end_to_end", "benchmarks", "tests", "compiled", "scaling",
                     "ncu", "sanitizer"]  # fmt: skip


def test_the_parts_together_take_less_than_nine_minutes():
    assert sum(part.limit for part in gpu_day.PARTS) < 540


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--part", "facts", "nosuch"], "invalid choice: 'nosuch'"),
        (["--limit", "0"], "--limit must be positive (got 0.0)"),
        (["--limit", "nan"], "--limit must be positive (got nan)"),
        (["--out", __file__], "is not a folder"),
        (["--archive", "nosuch/day.tgz"], "--archive nosuch/day.tgz is in no folder"),
        (["--python", "nosuch-python"], "--python nosuch-python: there is no such program"),
        (["--speed"], "unrecognized arguments: --speed"),
    ],
)
def test_wrong_options(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        gpu_day.main(words)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    if "nosuch" in words:
        assert "end_to_end" in said, "it does not say what there is"


def test_a_python_without_torch(tmp_path, capsys):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'No module named torch' >&2\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(SystemExit) as ended:
        gpu_day.main(["--python", str(python), "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert "has no working torch: No module named torch" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- parts --------------------------------------------------------------------------------------


def test_facts_for_real(tmp_path):
    done = script("--part", "facts", "--out", "made", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "made" / "facts"  # relative to where it was called
    found = json.loads((folder / "facts.json").read_text())
    assert found["torch"] in done.stdout
    assert {"cpu", "gpu", "git_commit", "nvidia-smi", "nvcc", "ncu"} <= found.keys()
    assert (found["nvcc"] is None) == (gpu_day.find_tool("nvcc") is None)
    assert "compilers" in (folder / "facts.txt").read_text()  # the doctor's report
    assert outcome(tmp_path / "made", "facts")["status"] == "passed"
    assert (tmp_path / "made" / "parts.txt").read_text() in done.stdout


def test_a_failure_does_not_keep_other_parts_from_running(
    without_cuda, tmp_path, monkeypatch, capsys
):
    def part(name, run):
        return gpu_day.Part(name, "for a test", 10, run)

    def fails(day):
        raise gpu_day.Failed("it was to fail")

    def mistaken(day):
        return {}["gone"]

    parts = (part("one", fails), part("two", mistaken), part("three", lambda day: "all is well"))
    monkeypatch.setattr(gpu_day, "PARTS", parts)
    stale = tmp_path / "three" / "old.txt"
    stale.parent.mkdir()
    stale.touch()
    assert gpu_day.main(["--out", str(tmp_path)]) == 1
    assert [outcome(tmp_path, p.name)["status"] for p in parts] == ["failed", "failed", "passed"]
    assert outcome(tmp_path, "one")["note"] == "it was to fail"
    assert outcome(tmp_path, "two")["note"] == "KeyError: 'gone'"
    assert not stale.exists(), "an earlier run's results are still there"
    last = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split()[:2] for line in last] == [
        ["one", "failed"], ["two", "failed"], ["three", "passed"],
    ]  # fmt: skip
    assert last[2].endswith("all is well")
    assert gpu_day.main(["--out", str(tmp_path), "--part", "three"]) == 0


def test_without_cuda_its_parts_are_skipped_by_name(without_cuda, tmp_path, capsys):
    words = ["--part", "sanitizer", "--part", "ncu", "--out", str(tmp_path)]
    assert gpu_day.main(words) == 0
    for name in ("sanitizer", "ncu"):
        made = outcome(tmp_path, name)
        assert (made["status"], made["note"]) == ("skipped", "no CUDA device")
    assert "sanitizer  skipped" in capsys.readouterr().out


def test_without_their_tools_parts_are_skipped_by_name(with_cuda, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_day, "find_tool", lambda name: None)
    assert gpu_day.main(["--part", "sanitizer", "ncu", "--out", str(tmp_path)]) == 0
    for name, tool in (("sanitizer", "compute-sanitizer"), ("ncu", "ncu")):
        assert outcome(tmp_path, name)["note"].startswith(f"no {tool} on PATH")


def test_without_their_modules_parts_say_so(without_cuda, tmp_path):
    assert gpu_day.main(["--part", "end_to_end", "--out", str(tmp_path)]) == 0
    made = outcome(tmp_path, "end_to_end")
    assert made["status"] == "skipped"
    assert made["note"].startswith("no timm, torchvision in ")
    day = make_day(tmp_path)
    day.found["modules"] = []
    with pytest.raises(gpu_day.Failed, match="no pytest, hypothesis in "):
        gpu_day.tests("compile", day)


def test_the_limits_in_the_documentation():
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    for part in gpu_day.PARTS:
        [row] = [line for line in text.splitlines() if line.startswith(f"| `{part.name}` | ")][-1:]
        assert row.endswith(f"| {part.limit} s |")


def ends(process):
    """Whether a killed process is gone in ten seconds; nobody may have waited for it yet."""
    status = Path(f"/proc/{process}/status")
    for _ in range(100):
        try:
            if "State:\tZ" in status.read_text():
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def test_limits_are_kept_and_children_end(tmp_path):
    day = make_day(tmp_path)
    with pytest.raises(gpu_day.Failed, match="sh ended after 1 s"):
        day.call("sh", "-c", "sleep 60 & echo $!; wait", seconds=1)
    child = int((tmp_path / "log.txt").read_text().splitlines()[-1])
    assert ends(child)
    day.deadline = time.monotonic() - 1
    with pytest.raises(gpu_day.Failed, match="ended after 0 s"):
        day.call("sleep", "60")
    with pytest.raises(gpu_day.Failed, match=r"ended with status 3, see .*log\.txt"):
        make_day(tmp_path).call("sh", "-c", "exit 3")


def test_killed_it_kills_what_runs(tmp_path):
    code = (
        "import sys; from benchmarks import gpu_day as g; import signal; from pathlib import Path\n"
        "signal.signal(signal.SIGTERM, g._stop)\n"
        "with open(sys.argv[1], 'w') as file:\n"
        "    g.run(['sh', '-c', 'echo $$; sleep 60'], file, 60, {})\n"
    )
    log = tmp_path / "log"
    process = subprocess.Popen([sys.executable, "-c", code, str(log)], cwd=ROOT)
    while not (log.is_file() and log.read_text().strip()):
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()
    assert process.wait(10) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)  # it was waited for


def recorded(monkeypatch, write=lambda words, path: None, fail=()):
    """Have commands do nothing but be written down; returns their list."""
    calls = []

    def call(self, *words, log="log.txt", seconds=0.0, **variables):
        calls.append((words, variables))
        path = self.folder / log
        path.touch()
        write(words, path)
        if fail and fail in words:
            raise gpu_day.Failed("status 86")
        return path

    monkeypatch.setattr(gpu_day.Day, "call", call)
    return calls


def test_build_without_cuda_kernels_fails_where_there_is_a_gpu(tmp_path, monkeypatch):
    report = {"library": {"line": "dhcl_ops: C++ kernels, no CUDA kernels", "cuda": False}}
    text = f"$ python\ndhcl_ops: building\n{json.dumps(report, indent=1)}\na warning\n"
    recorded(monkeypatch, lambda words, path: path.write_text(text))
    assert gpu_day.build(make_day(tmp_path)) == "C++ kernels, no CUDA kernels"
    assert json.loads((tmp_path / "doctor.json").read_text()) == report
    with pytest.raises(gpu_day.Failed, match="no CUDA kernels: dhcl_ops"):
        gpu_day.build(make_day(tmp_path, cuda=True))


def test_tests_may_not_skip_cuda_where_there_is_a_gpu(tmp_path, monkeypatch):
    calls = recorded(monkeypatch, lambda words, path: path.write_text("==== 5 passed ====\n"))
    assert gpu_day.tests("not compile", make_day(tmp_path, cuda=True)) == "5 passed"
    assert gpu_day.tests("not compile", make_day(tmp_path)) == "5 passed"
    assert [variables.get("DHCL_REQUIRE_CUDA") for _, variables in calls] == ["1", None]
    assert all("tests/ops" in words for words, _ in calls)
    chosen = [words[words.index("-k") + 1] for words, _ in calls]
    assert chosen == ["cuda and not compile", "not compile and not cuda and not thread"]


def test_programs_are_found_in_their_usual_homes(tmp_path, monkeypatch):
    for version in ("2024.1", "2025.3"):
        program = tmp_path / version / "ncu"
        program.parent.mkdir()
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    monkeypatch.setattr(gpu_day, "TOOL_HOMES", (str(tmp_path / "*"),))
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert gpu_day.find_tool("ncu") == str(program)
    assert gpu_day.find_tool("compute-sanitizer") is None


def test_everything_is_packed_after_each_part(without_cuda, tmp_path, monkeypatch):
    archive = tmp_path / "packed" / "day.tgz"
    archive.parent.mkdir()
    seen = []

    def look(day):
        with tarfile.open(archive) as file:
            seen.append(sorted(file.getnames()))
        return "it is there"

    def cache(day):
        (day.out / "cache").mkdir()
        (day.out / "cache" / "library.so").touch()
        return day.environment()["DHCL_COMMIT"]

    parts = [gpu_day.Part(n, "for a test", 10, r) for n, r in (("one", cache), ("two", look))]
    monkeypatch.setattr(gpu_day, "PARTS", parts)
    words = ["--out", str(tmp_path / "out"), "--archive", str(archive), "--commit", "0123abc"]
    assert gpu_day.main(words) == 0
    assert seen == [["day/one", "day/one/outcome.json", "day/parts.txt"]]
    assert outcome(tmp_path / "out", "one")["note"] == "0123abc"
    assert [path.name for path in archive.parent.iterdir()] == ["day.tgz"]


def test_the_environment_of_commands(tmp_path, monkeypatch):
    monkeypatch.delenv("DHCL_CACHE", raising=False)
    day = make_day(tmp_path)
    assert day.environment()["DHCL_CACHE"] == str(tmp_path / "cache")
    assert day.environment()["PYTHONPATH"].startswith(f"{ROOT}{os.pathsep}{ROOT / 'python'}")
    monkeypatch.setenv("DHCL_CACHE", "elsewhere")
    assert day.environment()["DHCL_CACHE"] == "elsewhere"


SUMMARY = {
    "memcheck": "========= ERROR SUMMARY: 0 errors\n",
    "racecheck": "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n",
}


def test_sanitizer_reports_what_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_day, "find_tool", lambda name: f"/cuda/bin/{name}")

    def write(words, path):
        path.write_text(SUMMARY[words[2]])

    calls = recorded(monkeypatch, write)
    said = gpu_day.sanitizer(make_day(tmp_path, cuda=True))
    assert said == "ERROR SUMMARY: 0 errors; " + SUMMARY["racecheck"].strip("= \n")
    assert [words[2] for words, _ in calls] == ["memcheck", "racecheck"]
    for words, _ in calls:
        assert words[3:5] == ("--error-exitcode", "86")
    recorded(monkeypatch, write, fail="racecheck")
    with pytest.raises(gpu_day.Failed, match=r"^racecheck: status 86$"):
        gpu_day.sanitizer(make_day(tmp_path, cuda=True))
    recorded(monkeypatch)
    with pytest.raises(gpu_day.Failed, match="memcheck: it ended without a summary; racecheck"):
        gpu_day.sanitizer(make_day(tmp_path / "silent", cuda=True))


def test_benchmarks_say_which_family_failed(tmp_path, monkeypatch):
    def write(words, path):
        path.write_text("== memory: done, 2 s\nfailed: knn: ValueError: no\n")

    calls = recorded(monkeypatch, write, fail="knn")
    with pytest.raises(gpu_day.Failed, match=r"^knn: ValueError: no$"):
        gpu_day.measure(("memory", "knn"), make_day(tmp_path))
    assert gpu_day.measure(("scaling",), make_day(tmp_path)).startswith("scaling on cpu")
    for words, _ in calls:  # the module knows these options
        with pytest.raises(SystemExit) as ended:
            together.main([*words[words.index("benchmarks.together") + 1 :], "--help"])
        assert ended.value.code == 0


def test_benchmarks_in_one_process_share_what_is_measured_once(tmp_path, monkeypatch, capsys):
    ceilings = []

    def family(name, fails=False):
        def main(words, known):
            ceilings.append(known)
            if fails:
                raise SystemExit("it differs")
            print("table of", name, *words[2:])
            return SimpleNamespace(ceilings=f"measured by {name}")

        monkeypatch.setattr(f"benchmarks.{name}.main", main)

    family("memory")
    family("knn", fails=True)
    family("ranking")
    (tmp_path / "knn.json").write_text("an earlier run's")
    words = ["memory", "knn", "ranking", "--out", str(tmp_path), "--device", "cpu", "--quick"]
    assert together.main(words) == 1
    assert ceilings == [None, "measured by memory", "measured by memory"]
    said = capsys.readouterr().out
    assert "failed: knn: SystemExit: it differs" in said
    assert "== ranking: done" in said
    assert not (tmp_path / "knn.json").exists()
    table = (tmp_path / "ranking.txt").read_text()
    assert table == "table of ranking --device cpu --seconds 0.2 --quick\n"


# ---- calls that tools watch ---------------------------------------------------------------------


def test_the_watched_calls_run(capsys):
    kernels.main(["memory", "ranking", "--check", "--device", "cpu"])
    said = capsys.readouterr().out.splitlines()
    assert "memory: update_segment_mean_" in said
    assert "memory: means and gradient (257, 130, 67)" in said
    assert "ranking: metrics (40, 8, 4097)" in said
    for wrong in (["nosuch", "--check"], ["memory"]):
        with pytest.raises(SystemExit):
            kernels.main(wrong)
    assert "no family nosuch: expected one of contrastive, dbscan" in capsys.readouterr().err


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_is_watched_and_measured(family):
    module = importlib.import_module(f"benchmarks.{family}")
    calls = list(module.watched((33, 7, 5), torch.device("cpu")))
    assert calls
    assert all(callable(call) for _, call in calls)
    assert callable(module.main)


def test_every_family_has_its_row_on_the_page():
    from dhcl_ops import _build

    assert list(families.FAMILIES) == _build.families()
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    table = page[page.index("| family | cases |") :].split("\n\n")[0]
    named = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert sorted(named) == sorted(runner.BENCHMARKS)


def test_shares_name_the_ops_that_take_the_time(capsys):
    kernels.shares(["memory"], torch.device("cpu"), kernels.ODD[2])
    out = capsys.readouterr().out
    assert "memory: means and gradient" in out
    shares = [float(line.split("%")[0]) for line in out.splitlines() if line.startswith("  ")]
    assert min(shares) >= 1.0
    assert sum(shares) <= 100.1 * out.count("memory: ")
    assert "dhcl::segment_mean" in out


@pytest.mark.parametrize("family", families.FAMILIES)
def test_all_kernels_of_a_family_are_profiled(family):
    source = (ROOT / "csrc" / f"{family}.cu").read_text()
    names = families.kernels(family)
    assert len(names) == len(set(names)) == source.count("__global__")
    words = ncu.command("ncu", family, Path("log"), ["python"])
    assert words[words.index("--kernel-name") + 1] == f"regex:{'|'.join(names)}"
    assert all(name.endswith("_kernel") for name in names)


# ---- Nsight Compute -----------------------------------------------------------------------------

STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
COLUMNS = {
    "gpu__time_duration.sum": "nsecond",
    "dram__bytes.sum.per_second": "byte/second",
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": "%",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "%",
    "launch__registers_per_thread": "register/thread",
    STALLED.format("long_scoreboard"): "inst",
    STALLED.format("barrier"): "inst",
    STALLED.format("selected"): "inst",
}
PLACE = ["ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream",
         "Block Size", "Grid Size", "Device", "CC"]  # fmt: skip


def raw_page(*launches, columns=COLUMNS):
    """What ``ncu --csv --page raw`` writes: messages, names, units, one line per launch."""

    def line(cells):
        return ",".join(f'"{cell}"' for cell in cells)

    lines = ["==PROF== Connected to process 7 (python3)", "dhcl_ops: C++ and CUDA kernels"]
    lines += [line([*PLACE, *columns]), line([""] * len(PLACE) + list(columns.values()))]
    for number, (kernel, *values) in enumerate(launches):
        own = [number, 7, "python3", "127.0.0.1", kernel, 1, 7, "(256, 1, 1)", "(64, 1, 1)", 0, 9.0]
        lines.append(line([*own, *values]))
    return "\n".join([*lines, "==PROF== Disconnected from process 7", ""])


UPDATE = ("momentum_update_kernel", "12,500", "2,400,000,000,000", "50.5", "81.25", "40",
          "6.0", "2.0", "1.0")  # fmt: skip
MEAN = ("segment_mean_kernel", "250,000", "3,900,000,000,000", "n/a", "60", "32",
        "0", "9.0", "1.0")  # fmt: skip


def test_launches_are_read():
    first, second = ncu.read(raw_page(UPDATE, MEAN))
    assert (first.kernel, first.grid) == ("momentum_update_kernel", "(64, 1, 1)")
    assert first.seconds == pytest.approx(12.5e-6)
    assert first.bandwidth == pytest.approx(2.4e12)
    assert (first.dram, first.occupancy, first.registers) == (50.5, 81.25, 40)
    assert first.compute is None  # not in this file
    assert first.stall == "long scoreboard 75 %"  # a selected warp does not wait
    assert second.dram is None
    assert second.stall == "barrier 100 %"
    assert ncu.read(raw_page()) == []


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [
        ("1,234.5", "nsecond", 1234.5e-9),
        ("2", "us", 2e-6),
        ("2", "second", 2),
        ("3", "Gbyte/second", 3e9),
        ("3", "Tbyte/s", 3e12),
        ("4", "%", 4),
        ("4", "inst", 4),
        ("n/a", "%", None),
        ("", "", None),
    ],
)
def test_units(text, unit, value):
    assert ncu.number(text, unit) == (None if value is None else pytest.approx(value))


def test_names_with_templates_are_shortened():
    for name in ("void dhcl::<unnamed>::knn_kernel<float, 4>(P)", "knn_kernel(Params)"):
        [one] = ncu.read(raw_page((name, *UPDATE[1:])))
        assert one.kernel == "knn_kernel"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "nothing said"),
        ("x\n==ERROR== ERR_NVGPUCTRPERM\n", "no table of ncu's raw page: ==ERROR== ERR_NVG"),
        ('"ID","Kernel Name","Metric Name","Metric Value"\n', "not ncu's raw page"),
    ],
)
def test_other_files_are_refused(text, message):
    with pytest.raises(ncu.CsvError, match=message):
        ncu.read(text)


def test_the_table_has_the_longest_launch_of_each_kernel(tmp_path, capsys):
    path = tmp_path / "memory.csv"
    path.write_text(raw_page(UPDATE, MEAN, ("momentum_update_kernel", "25,000", *UPDATE[2:])))
    assert ncu.main([str(path)]) == 0
    head, update, mean = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["kernel", "grid", "us"]
    assert update.split() == ["momentum_update", "(64,1,1)", "25", "2400", "50.5", "-", "81.25",
                              "40", "long", "scoreboard", "75", "%"]  # fmt: skip
    assert mean.split()[:5] == ["segment_mean", "(64,1,1)", "250", "3900", "-"]
    assert ncu.main([str(path), "--all"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    with pytest.raises(SystemExit):
        ncu.main([str(tmp_path / "gone.csv")])
    assert "gone.csv" in capsys.readouterr().err


def test_ncu_leaves_the_clocks_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_day, "find_tool", lambda name: f"/cuda/bin/{name}")

    def write(words, path):
        if "memory" in words:
            Path(words[words.index("--log-file") + 1]).write_text(raw_page(UPDATE))

    calls = recorded(monkeypatch, write)
    with pytest.raises(gpu_day.Failed, match=r"^contrastive: .*contrastive\.csv.*; dbscan: "):
        gpu_day.nsight(make_day(tmp_path, cuda=True))
    assert "momentum_update" in (tmp_path / "table.txt").read_text()  # what there is, is kept
    assert "momentum_update" in capsys.readouterr().out
    for words, _ in calls:
        assert words[words.index("--clock-control") + 1] == "none"
        assert words[words.index("--profile-from-start") + 1] == "off"
        assert words.index("--launch-count") < words.index(sys.executable)
