"""The benchmark of several processes: what it measures of two, and what it says."""

import pytest

from benchmarks import readme, sharded
from benchmarks.results import load_results
from dhcl_ops.defaults import SPCL


def stated(row):
    """Bytes by stage that a rank sends by docs/scale.md, a row or a step of the benchmark's."""
    world, d, n = int(row.variant.split()[0]), row.params["d"], row.params["N"]
    others, share, batch = world - 1, -(-n // world), row.params.get("B", 0)
    visits = others / 2 if world % 2 else world / 2 - 1 / 4
    away = others / world
    lists = {"neighbours": visits * (4 * d + 4 + 8 * (SPCL.k1 - 1))}
    return {
        "sharded knn": lists,
        "sharded cluster": lists,
        "weak scaling": lists,
        "sharded bank": {
            "labels": others * (16 + 4 * share) / share,
            "rows of the bank": away * 4 * d,
        },
        "sharded update": {
            "agreement": 32 * others,
            "update": batch / world * away * (4 + 4 * d) + 8 * others,
        },
        "sharded loss": {
            "agreement": 32 * others,
            "batch": others * -(-batch // world) * (4 * d + 16),
            "sums of the loss": others * batch * 72,
            "gradient": 4 * d * batch * away,
        },
    }[row.op]


def sent(row):
    """Bytes by stage that a row's note says."""
    stages = (part.rsplit(" ", 1) for part in row.note.partition(": ")[2].split(", "))
    return {stage: int(size.replace(",", "")) for stage, size in stages}


def run(tmp_path, *words):
    out = tmp_path / "sharded.json"
    common = ["--quick", "--device", "cpu", "--only", "sharded", "--ranks", "2"]
    sharded.main([*common, *words, "--json", str(out)])
    one, two = load_results(out).rows
    assert (one.variant, two.variant) == ("one process", "2 ranks")
    assert two.timing == "CPU seconds"
    assert 0 < two.peak_extra_bytes < 64 << 20
    return one, two


def test_two_ranks_beside_one_process(tmp_path, capsys):
    one, two = run(tmp_path, "--sizes", "300", "--ops", "cluster")
    assert two.max_difference == 0.0
    assert one.note == "rows of a rank 300.0 KiB"
    assert "rows of a rank 150.0 KiB; sends " in two.note
    for stage in ("neighbours", "sets", "pairs", "clusters"):
        assert f"{stage} " in two.note
    assert "2 ranks" in capsys.readouterr().out


def test_a_step_of_two_ranks(tmp_path):
    _, two = run(tmp_path, "--sizes", "300", "--ops", "loss")
    assert two.max_difference < 1e-5
    assert two.calls == sharded.STEPS
    assert " bytes a step: " in two.note
    assert sent(two) == pytest.approx(stated(two), rel=0.001)


MEASURED = [
    row
    for folder in readme.load_folders().values()
    for family, results in folder.items()
    if family.startswith("sharded")
    for row in results.rows
    if "sends" in row.note
]


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: f"{row.op}, {row.params}, {row.variant}")
def test_measured_bytes_are_those_of_the_formulas(row):
    found = sent(row)
    for stage, size in stated(row).items():
        assert found[stage] == pytest.approx(size, rel=0.05), stage
    if "B" in row.params:
        assert found.keys() == stated(row).keys()
