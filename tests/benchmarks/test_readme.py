from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from benchmarks import readme
from benchmarks.results import Results, Row
from tests.benchmarks.test_harness import make_results, make_row

FACTS = {"threads": 2, "torch": "2.11.0", "git_commit": "0123456789", "git_dirty": False}
FACTS |= {"date": "2026-01-02T03:04:05"}


def folder_of(**families: Results) -> dict[str, dict[str, Results]]:
    return {"a-machine": families}


def case(variant: str, seconds: float, **changes: Any) -> Row:
    found = {"op": "loss both", "params": {"B": 256, "K": 13_000, "d": 2048}, "device": "cpu"}
    return dataclasses.replace(make_row(variant, seconds), **(found | changes))


def epoch(part: str, variant: str, seconds: float, **more: Any) -> Row:
    params = {"data": "MSMT17", "N": 32_621, "backbone": "small", **more}
    params |= {"image": "64x32", "precision": "fp32"}
    return case(variant, seconds, op=f"epoch: {part}", params=params)


def cells(text: str, start: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_readme_holds_the_figures_of_the_committed_results() -> None:
    assert readme.main(["--check"]) == 0


def test_a_line_shows_ours_beside_the_others_and_over_the_floor() -> None:
    rows = [
        case("products alone", 0.080, peak_extra_bytes=0),
        case("pytorch", 0.200, peak_extra_bytes=50 << 20),
        case("dhcl", 0.100, peak_extra_bytes=10 << 20),
    ]
    text = readme.section(folder_of(contrastive=make_results(*rows, **FACTS)))
    what, ours, beside, faster, floor, memory = cells(
        text, "loss and its gradient, B = 256, K = 13"
    )
    assert what.endswith("K = 13,000")
    assert (ours, beside, faster) == ("100 ms", "pytorch 200 ms", "2")
    assert (floor, memory) == ("1.25", "10.0 MiB; 50.0 MiB")
    assert "| CMC" not in text  # not measured there


def test_without_a_competitor_the_floor_is_that_of_the_ceilings() -> None:
    row = case("dhcl", 0.100, floor_seconds=0.05, peak_extra_bytes=None)
    text = readme.section(folder_of(contrastive=make_results(row, **FACTS)))
    assert cells(text, "loss and")[2:] == [readme.NONE, readme.NONE, "2", readme.NONE]


def test_an_epoch_names_what_is_not_the_backbone() -> None:
    batch = {"B": 64, "steps": 400}
    rows = [
        epoch("extract", "backbone", 4.0),
        epoch("jaccard", "pytorch reference", 7.0),
        epoch("jaccard", "dhcl", 0.5),
        epoch("forward-backward", "backbone", 6.0, **batch),
        epoch("loss", "pytorch reference", 3.0, **batch),
        epoch("loss", "dhcl", 0.6, **batch),
        epoch("loss", "dhcl", 9.0, B=256, steps=400),  # of another total
        epoch("total", "pytorch reference", 20.0, **batch),
        epoch("total", "dhcl", 11.1, **batch),
    ]
    text = readme.section(folder_of(end_to_end=make_results(*rows, **FACTS)))
    found = cells(text, "MSMT17")
    assert found[1:] == ["11.1 s; 20 s", "1.1 s; 10 s", "9.9 %; 50 %"]


def test_scaling_says_how_far_and_why_no_further() -> None:
    rows = [
        case(
            "dhcl",
            n / 1000,
            op="scaling knn",
            params={"N": n, "d": 256, "data": "identities"},
            peak_extra_bytes=n,
        )
        for n in (1000, 10_000)
    ]
    results = make_results(*rows, **FACTS)
    results.skipped.append("neighbours: stops before N=20,000, time: 400 s expected")
    text = readme.section(folder_of(scaling=results))
    assert cells(text, "knn, identities")[1:] == [
        "N = 10,000", "10 s", "N^1.00", "9.8 KiB", "N^1.00"
    ]  # fmt: skip
    assert "- neighbours: stops before N=20,000" in text


def test_what_no_gpu_has_run_is_said() -> None:
    on_cpu = make_results(case("dhcl", 0.1), **FACTS)
    assert "None of this has been measured on a GPU" in readme.section(
        folder_of(contrastive=on_cpu)
    )
    on_gpu = make_results(case("dhcl", 0.001, device="cuda"), gpu="NVIDIA H200", **FACTS)
    text = readme.section({"cpu": {"contrastive": on_cpu}, "h200": {"contrastive": on_gpu}})
    missing = text.split("Never measured on a GPU: ")[1]
    assert "CMC" in missing
    assert "end_to_end" in missing
    assert "K = 13,000" not in missing
    assert "**NVIDIA H200**" in text


def test_markers_must_be_there_once() -> None:
    text = f"a\n{readme.BEGIN}\nold\n{readme.END}\nb\n"
    assert readme.replaced(text, f"{readme.BEGIN}\nnew\n{readme.END}") == text.replace("old", "new")
    for bad in ("nothing", text + text, f"{readme.END}{readme.BEGIN}"):
        with pytest.raises(ValueError, match="once each"):
            readme.replaced(bad, "")


def test_the_digest_has_a_pair_of_columns_for_each_machine() -> None:
    on_cpu = make_results(
        case("torch.compile", 0.150), case("pytorch", 0.200), case("dhcl", 0.100), **FACTS
    )
    batch = {"data": "Market-1501", "N": 12_936, "B": 64, "steps": 400}
    parts = (("forward-backward", "backbone", 9.0), ("loss", "dhcl", 1.0), ("total", "dhcl", 10.0))
    on_gpu = make_results(
        *(
            dataclasses.replace(epoch(part, name, seconds, **batch), device="cuda")
            for part, name, seconds in parts
        ),
        gpu="NVIDIA H200",
        **FACTS,
    )
    text = readme.digest({"cpu": {"contrastive": on_cpu}, "h200": {"end_to_end": on_gpu}})
    assert len(text.splitlines()) == 2 + 10 + 4  # ten rows, a head, a rule, two empty lines
    assert cells(text, "loss and its gradient, B = 256, K = 13")[1:] == [
        "100 ms", "150 ms, torch.compile: 1.5 times", readme.NONE, readme.NONE
    ]  # fmt: skip
    assert cells(text, "share of an epoch")[1:] == [readme.NONE, readme.NONE, "10 %", readme.NONE]
    assert "NVIDIA H200 | beside it" in text


def test_write_and_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs").mkdir()
    files = [tmp_path / name for name in readme.FILES]
    for file in files:
        file.write_text(f"a\n{readme.BEGIN}\n1 ms\n{readme.END}\n")
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    assert readme.main(["--check"]) == 1
    assert readme.main(["--write"]) == 0
    assert readme.main(["--check"]) == 0
    for file in files:
        assert "\n1 ms\n" not in file.read_text()
    files[1].write_text(files[1].read_text().replace("1.97 ms", "1.79 ms"))
    assert readme.main(["--check"]) == 1


def test_every_line_was_measured_on_some_machine() -> None:
    folders = readme.load_folders()
    missing = [ln.what for ln in readme.LINES if not any(ln.rows(f) for f in folders.values())]
    assert not missing
