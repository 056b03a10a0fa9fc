"""Names from outside reach a terminal and a CSV file as text, whatever is in them.

Names of files are bytes: they may hold escape sequences, which move the cursor or colour what
follows, carriage returns and line breaks, which forge lines, marks that turn the direction of
writing, and the beginnings of formulas.
"""

import ast
import csv
import io
import json
import os
import shutil
import unicodedata
from pathlib import Path

import dhcl.cli
import numpy as np
import pytest
from dhcl.cli import main
from dhcl.data import image_files
from dhcl.words import csv_cell, say, show, show_lines
from hypothesis import example, given
from hypothesis import strategies as st

EVIL = "=cmd|' \x1b[2J\x1b]0;x\x07\x7f\r\nok\u202egpj\u2028\x9b31m"
ANY = st.text(st.characters(exclude_categories=()), max_size=40)


def is_harmless(letter):
    number = ord(letter)
    controls = (range(0x20), range(0x7F, 0xA0), range(0x2028, 0x202F), range(0x2066, 0x206A))
    return not any(number in each for each in (*controls, range(0xD800, 0xE000)))


@given(ANY)
@example(EVIL)
@example("\udcff")
def test_a_shown_name_is_one_line_without_controls(name):
    shown = show(name)
    assert all(map(is_harmless, shown))
    assert len(shown.splitlines()) == bool(shown)
    shown.encode()
    if all(map(is_harmless, name)):
        assert shown == name


def test_what_has_no_picture_is_written_as_in_python():
    assert show(EVIL) == "=cmd|' \\x1b[2J\\x1b]0;x\\x07\\x7f\\r\\nok\\u202egpj\\u2028\\x9b31m"
    assert show("Ü 人 \u3000 é \u200d") == "Ü 人 \u3000 é \u200d"
    assert show_lines("a\x1b\nb\rc\n") == "a\\x1b\nb\\rc\n"


@given(ANY)
@example(EVIL)
def test_a_message_keeps_its_lines_and_can_be_printed_anywhere(text):
    for encoding in ("utf-8", "ascii", "latin-1"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
        say(text, stream)
        stream.flush()
        printed = stream.buffer.getvalue().decode(encoding)
        assert printed.count("\n") == text.count("\n") + 1
        assert all(is_harmless(letter) for letter in printed if letter != "\n")


@given(
    st.one_of(
        ANY,
        st.sampled_from("=+-@\uff1d\uff0b\uff0d\uff20\t\r ").flatmap(lambda c: ANY.map(c.__add__)),
    )
)
@example(EVIL)
@example("-1_c1s1_000001_00.jpg")
def test_a_cell_is_no_formula_and_the_same_path(name):
    cell = csv_cell(name)
    assert not unicodedata.normalize("NFKC", cell.lstrip()[:1]).startswith(("=", "+", "-", "@"))
    assert all(map(is_harmless, cell))
    assert cell.removeprefix("./") == show(name).removeprefix("./")
    if "\0" not in cell:
        assert os.path.normpath(cell) == os.path.normpath(show(name))
    line = io.StringIO()
    csv.writer(line).writerow([cell, csv_cell(-1)])
    assert next(csv.reader(line.getvalue().splitlines())) == [cell, "-1"]


def test_numbers_are_cells_as_they_are():
    assert [csv_cell(value) for value in (-1, -0.5, None, True)] == [-1, -0.5, None, True]


def test_commands_print_by_say_alone():
    """The doctor tells versions, and needs nothing of the package to do so."""
    for file in Path(dhcl.cli.__file__).parent.glob("*.py"):
        names = {node.id for node in ast.walk(ast.parse(file.read_text())) if is_name(node)}
        assert "print" not in names or file.stem == "doctor", file.name


def is_name(node):
    return isinstance(node, ast.Name)


# ---- commands -----------------------------------------------------------------------------------


@pytest.fixture
def crops(pictures, tmp_path):
    """A folder of hostile name with images of hostile names; one of them can't be read."""
    folder = tmp_path / f"{EVIL} folder"
    folder.mkdir()
    for number, file in enumerate(image_files(pictures / "query")):
        shutil.copy(file, folder / f"{EVIL}{number:02d}.png")
    (folder / f"{EVIL}bad.png").write_bytes(b"no image")
    return folder


@pytest.fixture
def evil_run(run, tmp_path):
    return shutil.copytree(run, tmp_path / f"{EVIL} run")


@pytest.fixture
def told(capsys):
    """Runs a command, and gives what it told; nothing of it moves a cursor or forges a line."""

    def call(*words, status=0):
        assert main([str(word) for word in words]) == status
        captured = capsys.readouterr()
        text = captured.out + captured.err
        strange = {letter for letter in text if letter != "\n" and not is_harmless(letter)}
        assert not strange, text
        # The line break in the name is not one in the text.
        assert not any(line.startswith("ok") for line in text.splitlines()), text
        return text

    return call


SHOWN = show(EVIL)
SKIP = ("--on-bad", "skip", "--workers", "0")


def test_cluster_of_a_folder_and_its_csv(told, crops, evil_run, tmp_path):
    out = tmp_path / f"{EVIL}.csv"
    given = ("cluster", crops, "--run", evil_run, "--out", out, "--workers", "0")
    assert f"{SHOWN}bad.png" in told(*given, status=2)
    text = told(*given, "--on-bad", "skip")
    assert f"{SHOWN}bad.png" in text
    assert f"{SHOWN}.csv: 16 images" in text
    head, *rows = csv.reader(out.open(newline=""))
    assert head == ["path", "label"]
    assert [name for name, _ in rows] == [f"./{SHOWN}{number:02d}.png" for number in range(16)]
    assert len(out.read_text().splitlines()) == 17


def test_index_search_and_its_pictures(told, crops, evil_run, tmp_path):
    index = tmp_path / f"{EVIL} index"
    assert f"{SHOWN}bad.png" in told("index", crops, "--run", evil_run, "--out", index, *SKIP)
    pattern = r"(?s)^(?P<id>.*)(?P<camera>\d)\.png"
    other = tmp_path / "other"
    told("index", crops, "--run", evil_run, "--out", other, "--pattern", pattern, *SKIP)
    for each in (index, other):
        text = told("search", each, crops, *SKIP)
        assert f"{SHOWN}07.png" in text
        pages = ("--html", tmp_path / f"{EVIL}.html", "--png", tmp_path / f"{EVIL}.png")
        assert f"written: {tmp_path}/{SHOWN}.png" in told("search", each, crops, *pages, *SKIP)
        printed = told("search", each, crops, "--json", *SKIP)
        found = json.loads(printed[printed.index("{\n") : printed.rindex("}") + 1])
        assert found["queries"][7]["path"] == str(crops / f"{EVIL}07.png")
    camera = ("--camera", f"{EVIL}")
    assert f"there is no {SHOWN}" in told("search", other, crops, *camera, *SKIP, status=2)
    told("search", crops, crops, *SKIP, status=2)


def test_export_eval_and_reports_of_a_run_of_such_a_name(told, crops, evil_run, pictures, tmp_path):
    out = tmp_path / f"{EVIL}.npz"
    text = told("export", evil_run, "--features", crops, "--out", out, *SKIP)
    assert f"{SHOWN}.npz: features of 16 images" in text
    told("export", evil_run, "--weights", tmp_path / f"{EVIL}.pt")
    assert f"{SHOWN} root" in told("eval", evil_run, "--root", tmp_path / f"{EVIL} root", status=2)
    assert f"{SHOWN} run" in told("report", evil_run, "--workers", "0")
    compared = tmp_path / f"{EVIL}.html"
    told("compare", evil_run, evil_run, "--out", compared, "--no-retrieval")
    told("cluster", out, "--out", tmp_path / "labels.csv", "--k1", "4", "--k2", "2")
    for name in ("report", "eval", "export", "compare"):
        missing = [tmp_path / f"{EVIL}none"] * (2 if name == "compare" else 1)
        more = ("--weights", tmp_path / "weights.pt") if name == "export" else ()
        assert SHOWN in told(name, *missing, *more, status=2)


def test_saved_features(told, tmp_path):
    features = np.eye(6, dtype=np.float32)
    evil = tmp_path / f"{EVIL}.npz"
    np.savez(evil, **{"features": features, EVIL: np.array([EVIL] * 6)})
    pair = ("--query", evil, "--gallery", evil)
    assert SHOWN in told("metrics", *pair, status=2)
    assert SHOWN in told("metrics", *pair, "--key", f"{EVIL}k", status=2)
    assert SHOWN in told("rerank", *pair, "--out", tmp_path / f"{EVIL}.txt", status=2)
    assert SHOWN in told("rerank", *pair, "--out", tmp_path / f"{EVIL}-lists.npz")
    np.savez(evil, features=features[:, :5], ids=np.arange(6))
    assert SHOWN in told("metrics", *pair, status=2), "a row of zeros"
    evil.write_bytes(b"damaged")
    assert SHOWN in told("metrics", *pair, status=2)
    evil.unlink()
    assert SHOWN in told("metrics", *pair, status=2)


def test_training(told, pictures, tmp_path):
    root = shutil.copytree(pictures, tmp_path / f"{EVIL} data")
    small = ["--backbone", "small", "--no-pretrained", "--image-size", "32", "16", "--epochs", "1"]
    small += ["--iterations", "1", "--min-samples", "2", "--k1", "8", "--k2", "3", "--workers", "0"]
    small += ["--device", "cpu", "--no-report", "--classes-per-batch", "4", "--warmup-epochs", "0"]
    given = ("train", "--data", "market1501", "--root", root, "--out", tmp_path / f"{EVIL} run")
    first = next((root / "bounding_box_train").iterdir())
    bad = first.with_name(f"0001_c1s1_{EVIL}000009_00.png")
    bad.write_bytes(b"no image")
    assert SHOWN in told(*given, *small, status=2)
    bad.unlink()
    assert f"run: {tmp_path}/{SHOWN} run" in told(*given, *small)
    assert SHOWN in told(*given, *small, status=2), "there is a run already"
    assert SHOWN in told("train", "--resume", tmp_path / f"{EVIL}none", status=2)
    assert SHOWN in told("train", "--config", tmp_path / f"{EVIL}.yaml", status=2)
    weights = ("--weights", tmp_path / f"{EVIL}.pth", "--out", tmp_path / "other")
    assert SHOWN in told(*given[:5], *weights, *small, status=2)
    told(f"{EVIL}", status=2)


def test_drawn_people(told, tmp_path):
    out = tmp_path / f"{EVIL} people"
    sizes = ("--ids", "4", "--cameras", "2", "--images-per-camera", "2", "--workers", "1")
    text = told("synth", out, *sizes, "--image-size", "32", "16")
    assert f"--root {tmp_path}/{SHOWN} people" in text
    assert SHOWN in told("synth", out, *sizes, status=2)
