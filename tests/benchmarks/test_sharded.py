"""The benchmark of several processes: what it measures of two, and what it says."""

from benchmarks import sharded
from benchmarks.results import load_results


def test_two_ranks_beside_one_process(tmp_path, capsys):
    out = tmp_path / "sharded.json"
    words = ["--quick", "--device", "cpu", "--sizes", "300", "--ops", "cluster", "--ranks", "2"]
    sharded.main([*words, "--only", "sharded", "--json", str(out)])
    one, two = load_results(out).rows
    assert (one.variant, two.variant) == ("one process", "2 ranks")
    assert two.max_difference == 0.0
    assert one.note == "rows of a rank 300.0 KiB"
    assert "rows of a rank 150.0 KiB; sends " in two.note
    for stage in ("neighbours", "sets", "pairs", "clusters"):
        assert f"{stage} " in two.note
    assert two.timing == "CPU seconds"
    assert 0 < two.peak_extra_bytes < 64 << 20
    assert "2 ranks" in capsys.readouterr().out
