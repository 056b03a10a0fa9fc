"""Indexes of format 1 that are not as they were written: a named error or the right answer."""

import json
import os
import random
import shutil
import socket
from dataclasses import replace

import numpy as np
import pytest
import torch
from dhcl.cli import main
from dhcl.errors import DataError
from dhcl.inference.gallery.old import read_old
from dhcl.inference.index import Index
from dhcl.inference.search import nearest
from dhcl.inference.update import convert_index

from tests.dhcl.inference.gallery.made import WIDTH, make_old

pytestmark = pytest.mark.usefixtures("no_waiting")

ROWS = 5
QUERY = torch.eye(WIDTH)[:2]


@pytest.fixture
def index(tmp_path):
    return make_old(tmp_path / "index")


def head(index, **changes):
    """Change ``index.json`` and leave its checksums out, as earlier versions did."""
    file = index / "index.json"
    about = json.loads(file.read_text())
    del about["checksums"]
    file.write_text(json.dumps({**about, **changes}))


def answer(folder):
    """All that is asked of an index, but for what may be edited."""
    old = read_old(folder)
    found = nearest(QUERY, [(np.arange(ROWS), old.features)], ROWS, backend="torch")
    about = replace(old.about, run="", roots=())
    return about, old.records, found.rows.tolist(), found.similarities.tolist()


def refused(folder, match=None):
    with pytest.raises(DataError, match=match) as caught:
        answer(folder)
    text = str(caught.value)
    assert text.startswith(f"index: {folder} ")
    assert "\n" not in text
    assert len(text) < 900


def answer_or_none(folder):
    """None where the index is refused by name."""
    try:
        return answer(folder)
    except DataError:
        refused(folder)
        return None


FILES = ("index.json", "images-1.jsonl", "features-1.npy")


def flipped(data, chance):
    data = bytearray(data)
    for _ in range(chance.choice([1, 1, 1, 2, 8])):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


def cut(data, chance):
    return data[: chance.randrange(len(data))]


def grown(data, chance):
    place = chance.randrange(len(data) + 1)
    return data[:place] + chance.randbytes(chance.randrange(1, 64)) + data[place:]


def doubled(data, chance):
    start, stop = sorted(chance.randrange(len(data)) for _ in range(2))
    return data[:stop] + data[start:stop] + data[stop:]


@pytest.mark.parametrize("damage", [flipped, cut, grown, doubled])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_or_does_no_harm(name, damage, index):
    expected, file = answer(index), index / name
    whole, chance = file.read_bytes(), random.Random(f"{name} {damage.__name__}")
    named = 0
    for _ in range(int(os.environ.get("DHCL_FUZZ", 150))):
        file.write_bytes(damage(whole, chance))
        found = answer_or_none(index)
        named += found is None
        assert found in (None, expected)
    assert named
    file.write_bytes(whole)
    assert answer(index) == expected


def test_every_bit_of_the_features_counts(index):
    file = index / "features-1.npy"
    whole = file.read_bytes()
    for bit in range(128 * 8, len(whole) * 8):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        refused(index, "checksum|length 1")


def _fifo(file):
    os.mkfifo(file)


def _zeros(file):
    file.symlink_to("/dev/zero")


def _loop(file):
    file.symlink_to(file)


def _socket(file):
    here = os.getcwd()
    os.chdir(file.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(file.name)
    finally:
        os.chdir(here)


KINDS = {
    "none": lambda file: None,
    "folder": lambda file: file.mkdir(),
    "empty": lambda file: file.touch(),
    "dangling": lambda file: file.symlink_to("nowhere"),
    "fifo": _fifo,
    "device": _zeros,
    "loop": _loop,
    "socket": _socket,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_is_named_at_once(name, kind, index):
    (index / name).unlink()
    KINDS[kind](index / name)
    refused(index)


@pytest.mark.parametrize("name", FILES[1:])
@pytest.mark.parametrize("changed", [False, True])
def test_files_of_another_index_are_not_taken(name, changed, index, tmp_path):
    other = make_old(tmp_path / "other", generation=2)
    file = other / name.replace("1", "2")
    if changed and name == "images-1.jsonl":
        file.write_text(file.read_text().replace("_c1.png", "_c9.png"))
    same = file.read_bytes() == (index / name).read_bytes()
    shutil.copy(file, index / name)
    if same:
        answer(index)
    else:
        refused(index, "checksum")


def test_files_that_change_places(index):
    images, features = (index / name for name in FILES[1:])
    images.rename(index / "a")
    features.rename(images)
    (index / "a").rename(features)
    refused(index, "damaged")


RECORD = {"root": 0, "path": "0_c0.png", "id": 0, "camera": 0, "size": 100, "mtime_ns": 10**18}
LINES = {
    "above its root": {"path": "../../x"},
    "above, later": {"path": "a/../../x"},
    "absolute": {"path": "/etc/passwd"},
    "nothing": {"path": ""},
    "the root itself": {"path": "."},
    "zero byte": {"path": "a\0b"},
    "no text": {"path": ["a"]},
    "another root": {"root": 1},
    "root below zero": {"root": -1},
    "root in words": {"root": "0"},
    "truth for a number": {"root": False},
    "fraction": {"size": 1.5},
    "negative": {"size": -1},
    "beyond 64 bits": {"id": 2**63},
    "nothing for a camera": {"camera": None},
    "a list for an id": {"id": [1]},
    "NaN": {"mtime_ns": float("nan")},
    "one more": {"more": 1},
}


@pytest.mark.parametrize("case", LINES)
def test_records_have_a_schema(case, index):
    head(index)
    file = index / "images-1.jsonl"
    rest = file.read_text().splitlines()[1:]
    file.write_text("\n".join([json.dumps({**RECORD, **LINES[case]}), *rest]))
    refused(index, "damaged")


TEXTS = {
    "deep": "[" * 100_000,
    "digits": '{"root": ' + "1" * 6000 + "}",
    "list": "[]",
    "number": "3",
    "null": "null",
    "no JSON": "{",
    "surrogate half": '"\ud800"'.encode("utf-8", "surrogatepass").decode("latin1"),
}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", FILES[:2])
def test_texts_that_are_no_records(name, text, index):
    head(index)
    file = index / name
    lines = file.read_text().splitlines() if name != "index.json" else [""]
    file.write_text("\n".join([TEXTS[text], *lines[1:]]))
    refused(index)


HEADS = {
    "generation in words": {"generation": "1"},
    "generation elsewhere": {"generation": "../1"},
    "generation below zero": {"generation": -1},
    "endless generation": {"generation": 10**200},
    "truth": {"generation": True},
    "fewer images": {"images": ROWS - 1},
    "other width": {"dim": WIDTH + 1},
    "which": {"which": "third"},
    "pattern": {"pattern": 3},
    "run": {"run": 3},
    "model": {"model": None},
    "roots": {"roots": "/pictures"},
    "a root": {"roots": [1]},
    "no roots": {"roots": []},
    "cameras": {"trained_cameras": "no"},
    "unknown": {"unknown": 1},
    "checksums": {"checksums": {"head": 1}},
    "format": {"format": [[1]] * 1000},
}


@pytest.mark.parametrize("case", HEADS)
def test_the_head_has_a_schema(case, index):
    head(index, **HEADS[case])
    refused(index)


@pytest.mark.parametrize("missing", ["generation", "images", "dim", "model", "run", "roots"])
def test_the_head_is_complete(missing, index):
    about = json.loads((index / "index.json").read_text())
    del about[missing]
    (index / "index.json").write_text(json.dumps(about))
    refused(index, f"damaged .{missing}")


def _with(value):
    rows = np.eye(ROWS, WIDTH, dtype="f4")
    rows[3, 3] = value
    return rows


ARRAYS = {
    "nan": _with(np.nan),
    "infinite": _with(np.inf),
    "huge": _with(-3.4e38),
    "zeros": _with(0),
    "float64": np.eye(ROWS, WIDTH),
    "big-endian": np.eye(ROWS, WIDTH, dtype=">f4"),
    "row short": np.eye(ROWS - 1, WIDTH, dtype="f4"),
    "one dimension": np.ones(ROWS * WIDTH, "f4"),
    "scalar": np.float32(1),
    "nothing": np.zeros((0, WIDTH), "f4"),
    "objects": np.array([[{}] * WIDTH] * ROWS, dtype=object),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_features_are_as_the_head_says_and_of_length_one(case, index):
    head(index)
    np.save(index / "features-1.npy", ARRAYS[case], allow_pickle=True)
    refused(index, "damaged")


SHAPES = [(2**42, 8), (2**63, 2**63), (-1, 8), (5, -8), (10**400, 1), (5, 9), (5, 7)]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_header_that_claims_more_than_the_file_has(shape, index):
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
    length = (len(text) + 1).to_bytes(2, "little")
    header = b"\x93NUMPY\x01\x00" + length + text.encode() + b"\n"
    (index / "features-1.npy").write_bytes(header + bytes(ROWS * WIDTH * 4))
    refused(index, "damaged")


def test_indexes_are_converted_in_their_place(index, capsys):
    expected = answer(index)
    with pytest.raises(DataError, match=rf"format 1, .* `dhcl index --convert --out {index}`"):
        Index.open(index)
    assert answer(index) == expected
    assert main(["index", "--convert", "--out", str(index)]) == 0
    assert f"{ROWS} unchanged; {ROWS} images in the index" in capsys.readouterr().out
    opened = Index.open(index)
    assert tuple(opened.records) == expected[1]
    assert replace(opened.store.about, run="", roots=()) == expected[0]
    found = opened.search(QUERY, ROWS, backend="torch")
    assert [one.indices.tolist() for one in found] == expected[2]
    assert [one.similarities.tolist() for one in found] == expected[3]
    assert {file.name for file in index.iterdir()} == {"index.json", ".lock", "rows.lance"}
    assert main(["index", "--convert", "--out", str(index)]) == 2
    assert "is of the present format already" in capsys.readouterr().err


def test_a_conversion_that_fails_leaves_the_old_index(index, monkeypatch):
    expected = answer(index)

    def full(path, data):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("dhcl.inference.gallery.head.write_atomic", full)
        with pytest.raises(OSError, match="No space"):
            convert_index(index)
    assert answer(index) == expected
    assert not (index / "rows.lance").exists()
    convert_index(index)
    assert tuple(Index.open(index).records) == expected[1]


def test_indexes_without_checksums_are_converted(index):
    expected = answer(index)
    head(index)
    assert answer(index) == expected
    assert convert_index(index).total == ROWS
    assert tuple(Index.open(index).records) == expected[1]


def test_what_may_be_edited_and_names_of_any_bytes(index):
    about = json.loads((index / "index.json").read_text())
    changed = {**about, "run": "/moved", "roots": ["/mov\udcffed"]}
    (index / "index.json").write_text(json.dumps(changed))
    assert read_old(index).about.roots == ("/mov\udcffed",)
    (index / "index.json").write_text(json.dumps({**changed, "pattern": None}))
    refused(index, "beyond run and roots")


def test_a_command_says_it_in_one_line(index, capsys):
    head(index)
    np.save(index / "features-1.npy", ARRAYS["nan"])
    assert main(["index", "--convert", "--out", str(index)]) == 2
    error = capsys.readouterr().err
    assert "is damaged (features must have length 1 (got nan in row 3))" in error
    assert "Traceback" not in error
