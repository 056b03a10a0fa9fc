"""Indexes in tables of Lance that are not as they were written: a named error, or no harm."""

import json
import os
import random
import shutil
import sys

import numpy as np
import pytest
import torch
from dhcl.cli import main
from dhcl.errors import ConfigError, DataError
from dhcl.files import NotPlainFile
from dhcl.inference.gallery.lance import compact
from dhcl.inference.index import Index
from dhcl.inference.update import approximate_index, remove_images

from tests.dhcl.inference.gallery.made import WIDTH, batch, make

pytestmark = pytest.mark.usefixtures("no_waiting")

ROWS = 40
QUERY = torch.eye(WIDTH)[:2]


@pytest.fixture
def index(tmp_path):
    make(tmp_path / "index", ROWS)
    with Index.open(tmp_path / "index").store.writing() as writer:
        writer.delete(np.array([3, 5]))
    return tmp_path / "index"


def answer(folder):
    """All that is asked of an index."""
    opened = Index.open(folder)
    found = opened.search(QUERY, ROWS, backend="torch")
    return list(opened.images()), [(f.indices.tolist(), f.similarities.tolist()) for f in found]


def refused(folder, match=None):
    with pytest.raises(DataError, match=match) as caught:
        answer(folder)
    text = str(caught.value)
    assert text.startswith(f"index: {folder} ")
    assert "\n" not in text
    assert len(text) < 900


def files(index):
    """Of each kind of file that counts, one."""
    head = json.loads((index / "index.json").read_text())
    kinds = {name.split("/")[1]: index / name for name in head["files"]}
    assert set(kinds) == {"_versions", "_deletions", "data"}
    return {"index.json": index / "index.json", **kinds}


KINDS = ("index.json", "_versions", "_deletions", "data")


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


@pytest.mark.parametrize("name", KINDS)
def test_damage_is_named(name, index):
    expected, file = answer(index), files(index)[name]
    whole, chance = file.read_bytes(), random.Random(name)
    for damage in (flipped, cut, grown) * int(os.environ.get("DHCL_FUZZ", 10)):
        changed = damage(whole, chance)
        file.write_bytes(changed)
        if name != "index.json":
            refused(index, "checksum|version")
            continue
        try:  # blanks between words do no harm
            assert answer(index) == expected
        except DataError:
            refused(index)
    file.write_bytes(whole)
    assert answer(index) == expected


def test_damage_within_a_large_file_is_found_where_it_is_read(tmp_path):
    """Beyond the end of a file, which is looked at when an index is opened."""
    index = make(tmp_path / "index", 4000)
    file = files_of_data(index)
    whole = file.read_bytes()
    feature = Index.open(index).features[7].tobytes()
    place = whole.index(feature)
    file.write_bytes(whole[: place + 9] + bytes([whole[place + 9] ^ 4]) + whole[place + 10 :])
    opened = Index.open(index)
    with pytest.raises(DataError, match=r"damaged .the feature of row 7 is not as it was written"):
        opened.search(QUERY, 3)
    with pytest.raises(DataError, match="row 7"):
        opened.search(QUERY, 3, rerank=True)
    file.write_bytes(whole)
    assert len(opened.search(QUERY, 3)) == 2


def files_of_data(index):
    [file] = (index / "rows.lance" / "data").iterdir()
    return file


def plants():
    return {
        "none": lambda file: None,
        "folder": lambda file: file.mkdir(),
        "empty": lambda file: file.touch(),
        "dangling": lambda file: file.symlink_to("nowhere"),
        "fifo": os.mkfifo,
        "device": lambda file: file.symlink_to("/dev/zero"),
        "loop": lambda file: file.symlink_to(file),
    }


@pytest.mark.parametrize("kind", plants())
@pytest.mark.parametrize("name", KINDS)
def test_what_is_no_file_is_named_at_once(name, kind, index):
    file = files(index)[name]
    file.unlink()
    plants()[kind](file)
    refused(index)


def test_files_of_another_index_are_not_taken(index, tmp_path):
    make(tmp_path / "other", ROWS, seed=1)
    other = files_of_data(tmp_path / "other")
    shutil.copy(other, files_of_data(index))
    refused(index, "checksum")


@pytest.mark.parametrize("place", ["rows.lance", "rows.lance/data", "rows.lance/data/x.lance"])
def test_nothing_is_changed_through_a_planted_link(place, index, tmp_path):
    victim = tmp_path / "victim"
    if (index / place).exists():
        shutil.move(index / place, victim)
    else:
        victim.mkdir()
    (index / place).symlink_to(victim)
    before = sorted(file.name for file in victim.rglob("*"))
    with pytest.raises(NotPlainFile, match=r"must be a plain file .got a link"):
        remove_images(index, ["/pictures/d0/0_c0.png"])
    assert sorted(file.name for file in victim.rglob("*")) == before


HEADS = {
    "generation in words": {"generation": "1"},
    "endless generation": {"generation": 10**200},
    "version below zero": {"version": -1},
    "fewer images": {"images": ROWS - 1},
    "other width": {"dim": WIDTH + 1},
    "which": {"which": "third"},
    "pattern": {"pattern": None},
    "run": {"run": 3},
    "model": {"model": "cd" * 32},
    "roots": {"roots": "/pictures"},
    "cameras": {"trained_cameras": "no"},
    "unknown": {"unknown": 1},
    "no files": {"files": {}},
    "recall": {"approximate": {"recall": 1.5, "queries": 1, "files": {}}},
    "format": {"format": [[1]] * 1000},
}


@pytest.mark.parametrize("case", HEADS)
def test_the_head_has_a_schema_and_a_checksum(case, index):
    file = index / "index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **HEADS[case]}))
    refused(index)


def test_a_path_in_the_head_leads_nowhere_else(index):
    with Index.open(index).store.writing() as writer:
        writer.head = writer.head.model_copy(update={"files": {"rows.lance/../../x": 1}})
        writer.head.write(index)
    refused(index, "is no file of a table")


def test_damage_of_an_index_for_approximate_search_is_named_where_it_is_read(index):
    approximate_index(index)
    expected = answer(index)
    for file in index.glob("rows.lance/_indices/*/*"):
        whole = file.read_bytes()
        file.write_bytes(flipped(whole, random.Random(file.name)))
        assert answer(index) == expected  # exact search does not read it
        opened = Index.open(index)
        with pytest.raises(DataError, match=r"is damaged \(.*\.idx is not as it was written"):
            opened.search(QUERY, 3, approximate=True)
        file.unlink()
        with pytest.raises(DataError, match="is damaged"):
            Index.open(index).search(QUERY, 3, approximate=True)
        file.write_bytes(whole)
    opened.search(QUERY, 3, approximate=True)
    with opened.store.writing() as writer:
        known = writer.head.approximate.model_copy(
            update={"files": {"rows.lance/_indices/../x": 1}}
        )
        writer.head.model_copy(update={"approximate": known}).write(index)
    with pytest.raises(DataError, match="is no file of a table's index"):
        Index.open(index).search(QUERY, 3, approximate=True)


def test_what_may_be_edited_and_names_of_any_bytes(index):
    file = index / "index.json"
    about = json.loads(file.read_text())
    file.write_text(json.dumps({**about, "run": "/moved", "roots": ["/mov\udcffed"]}))
    opened = Index.open(index)
    assert str(opened.path(0)) == "/mov\udcffed/d0/0_c0.png"
    assert str(opened.run) == "/moved"
    assert remove_images(index, ["/mov\udcffed/d0/0_c0.png"]).removed == 1
    assert Index.open(index).roots == ("/mov\udcffed",)
    file.write_text(json.dumps({**about, "roots": []}))
    refused(index, "beyond the 0 there are")


def test_a_command_says_it_in_one_line(index, tmp_path, capsys):
    files_of_data(index).write_bytes(b"")
    assert main(["search", str(index), str(tmp_path / "query.png")]) == 2
    error = capsys.readouterr().err
    assert "is damaged (rows.lance/data/" in error.replace("'", "")
    assert "Traceback" not in error


def test_an_open_index_reads_what_it_was_until_that_is_removed(index):
    opened = Index.open(index)
    expected = answer(index)[0]
    with opened.store.writing() as writer:
        writer.insert(iter([batch(5, ROWS, seed=2)]))
        writer.delete(np.array([0, 1]))
    assert list(opened.images()) == expected
    assert len(Index.open(index)) == len(opened) + 3
    compact(index)
    with pytest.raises(DataError, match="was changed since it was opened; open it anew"):
        list(opened.images())
    opened.store.close()
    with pytest.raises(ConfigError, match="must be opened anew"):
        list(opened.images())


def test_without_lance_the_extra_is_named(index, monkeypatch):
    monkeypatch.setitem(sys.modules, "lance", None)
    with pytest.raises(ConfigError, match=r"^index: needs lance: pip install 'dhcl\[index\]'$"):
        Index.open(index)


def test_in_a_forked_process_an_index_is_to_be_opened_anew(index):
    """Threads of Lance do not come along, and whoever waited for one would wait for ever."""
    opened = Index.open(index)
    child = os.fork()
    if not child:
        try:
            list(opened.images())
        except ConfigError:
            os._exit(3)
        os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
