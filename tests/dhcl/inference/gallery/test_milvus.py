"""What a server alone has: it goes away, refuses, and knows neither locks nor transactions."""

import contextlib
import json
import logging
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from dhcl.cli import main
from dhcl.data import image_files
from dhcl.errors import ConfigError, DataError
from dhcl.inference.gallery.places import creating, open_store
from dhcl.inference.gallery.schema import Record, arrow_batch
from dhcl.inference.index import Index
from dhcl.inference.update import add_images, create_index, remove_images

from tests.dhcl.inference.gallery.lite import milvus_lite
from tests.dhcl.inference.gallery.made import ABOUT, MODEL, batch, make, records, unit_rows

PATTERN = r"(?P<id>-?\d+)_c(?P<camera>\d+)"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with milvus_lite(tmp_path_factory.mktemp("lite")) as server:
        yield server


@contextlib.contextmanager
def impatient(monkeypatch):
    """No long wait for a server that is known to be gone; in less than a few seconds it is said."""
    began = time.monotonic()
    with monkeypatch.context() as patched:
        patched.setattr("dhcl.inference.gallery.remote._PATIENCE", 1.0)
        yield
    assert time.monotonic() - began < 20


@pytest.fixture
def address(server, request):
    return server.address("i" + os.urandom(4).hex())


def images(address):
    """Path to number of each image; there must be no path twice."""
    index = Index.open(address)
    found = {str(index.path_of(record)): number for number, record in index.images()}
    assert len(found) == len(index)
    return found


def test_the_commands_are_those_of_a_folder(address, pictures, run, tmp_path, capsys):
    gallery, query = str(pictures / "bounding_box_test"), str(pictures / "query")
    reading = ("--workers", "0", "--device", "cpu")
    make = ("--run", str(run), "--pattern", PATTERN, *reading)
    for place in (("--store", address), ("--out", str(tmp_path / "index"))):
        assert main(["index", gallery, *place, *make]) == 0
        assert "16 added; 16 images in the index" in capsys.readouterr().out
        assert main(["index", query, *place, "--add", *reading]) == 0
        assert main(["index", query, *place, "--remove"]) == 0
        assert "16 removed; 16 images in the index" in capsys.readouterr().out
    found = []
    for place in (address, str(tmp_path / "index")):
        words = ("--topk", "3", "--camera", "2", "--backend", "torch", "--json", *reading)
        assert main(["search", place, query, *words]) == 0
        plain = json.loads(capsys.readouterr().out)["queries"]
        assert main(["search", place, query, "--rerank", *words]) == 0
        found.append((plain, json.loads(capsys.readouterr().out)["queries"]))
    assert found[0] == found[1]


def test_an_insert_that_the_server_left_goes_on_without_doubles(
    server, address, pictures, model, monkeypatch
):
    files = image_files(pictures / "bounding_box_test")
    real, seen = model.batches, []

    def batches(images, *arguments, **options):
        for number, each in enumerate(real(images, *arguments, **options)):
            if number == 2 and not seen:
                server.end(kill=True)
            yield each
        seen.append(len(images))

    monkeypatch.setattr(model, "batches", batches)
    gone = r"index: milvus://.* does not answer; is the server running"
    with impatient(monkeypatch), pytest.raises(DataError, match=gone):
        create_index(address, files, model, pattern=PATTERN, batch_size=4)
    server.start()
    with pytest.raises(DataError, match="is not whole, as making it was interrupted"):
        open_store(address)
    seen.append(0)
    done = create_index(address, files, model, pattern=PATTERN, batch_size=4)
    assert done.total == len(files)
    assert 0 < done.unchanged == len(files) - seen[-1]
    assert {*images(address)} == {*map(str, files)}
    index = Index.open(address)
    expected = model.features([index.path_of(record) for record in index.records])
    assert torch.allclose(torch.from_numpy(index.features), expected, atol=1e-6)


def test_a_query_without_a_server_ends_with_a_line(
    server, address, pictures, run, monkeypatch, capsys
):
    query = str(image_files(pictures / "query")[0])
    create = ("--run", str(run), "--workers", "0", "--device", "cpu")
    assert main(["index", query, "--store", address, *create]) == 0
    there = Index.open(address)
    server.end(kill=True)
    try:
        capsys.readouterr()
        with impatient(monkeypatch):
            assert main(["search", address, query, "--device", "cpu", "--workers", "0"]) == 2
            with pytest.raises(DataError, match="does not answer"):
                there.search(torch.from_numpy(unit_rows(1, width=there.width)), 1)
        said = capsys.readouterr()
        assert said.out == ""
        [line] = said.err.splitlines()
        assert line.startswith(f"dhcl: index: {address} does not answer; is the server running?")
        # Its handler was made before this test, and writes past what is looked at here.
        assert not logging.getLogger("pymilvus").isEnabledFor(logging.CRITICAL)
    finally:
        server.start()
    assert len(Index.open(address)) == 1


def test_what_an_ended_writer_left_twice_is_found_by_the_next_one(address):
    make(address, 4)
    newer = Record(0, records(4)[2].path, 2, 2, 999, 999, 2.0)
    with pytest.raises(RuntimeError), open_store(address).writing() as writer:  # noqa: PT012
        writer.insert(iter([arrow_batch(np.array([4]), unit_rows(1, 3), [newer], MODEL)]))
        raise RuntimeError  # before the row that it replaces is removed
    assert len(open_store(address)) == 5
    with open_store(address).writing() as writer:
        assert [part["row"].to_pylist() for part in writer.now.scan(["row"])] == [[0, 1, 3, 4]]
    assert open_store(address).head.holder is None


def test_the_mark_of_a_process_counts_as_long_as_it_lives(address):
    store = open_store(make(address, 2))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()

    def mark(**changes):
        with store.writing() as writer:
            holder = writer.now.head.holder.model_copy(update=changes)
        store.link.write_head(open_store(address).head.model_copy(update={"holder": holder}))

    mark(pid=ended.pid)
    with open_store(address).writing():
        pass
    for changes in ({"pid": os.getppid()}, {"host": "elsewhere.example"}):
        mark(**changes)
        with pytest.raises(ConfigError, match="is changing"), open_store(address).writing():
            pass
        mark_gone = open_store(address).head.model_copy(update={"holder": None})
        store.link.write_head(mark_gone)
    mark(host="elsewhere.example", at=time.time() - 3600)
    with open_store(address).writing():
        pass


def test_a_writer_that_was_taken_for_ended_stops(address):
    store = open_store(make(address, 2))
    other_one = pytest.raises(DataError, match="being changed by another process too")
    with other_one, store.writing() as writer:
        head = store.link.read_head()
        other = head.holder.model_copy(update={"token": "another", "pid": 1})
        store.link.write_head(head.model_copy(update={"holder": other}))
        writer.insert(iter([batch(1, 2)]))
    assert len(open_store(address)) == 2


def test_collections_of_others_are_left_alone(server, address):
    link = open_store(make(address, 1)).link
    name = "other" + os.urandom(4).hex()
    link.create(name, [("key", "INT64", {}), ("vector", "FLOAT_VECTOR", {"dim": 2})])
    refused = pytest.raises(ConfigError, match="is a collection of something else")
    with refused, creating(server.address(name), ABOUT):
        pass
    assert link.has(name)
    with pytest.raises(DataError, match="is not an index"):
        open_store(server.address(name))


def test_an_approximate_index_of_an_operator_is_not_believed(address, monkeypatch):
    store = open_store(make(address, 40))
    query = torch.from_numpy(unit_rows(3, 9))
    expected = store.nearest(query, 5)
    monkeypatch.setattr(store, "_exact", False)
    asked = []
    monkeypatch.setattr(store, "_ask", lambda *given: asked.append(given) or [[]] * 3)
    found = store.nearest(query, 5, backend="torch")
    assert torch.equal(found.rows, expected.rows)
    assert not asked
    assert store.nearest(query, 5, approximate=True).rows.shape == (3, 0)
    assert asked


def test_an_approximate_index_that_gives_too_few_rows_is_not_taken(address, monkeypatch):
    store = open_store(make(address, 40))
    assert store.recall() is None
    query = torch.from_numpy(unit_rows(2, 9))
    expected = store.nearest(query, 5, backend="torch")
    real = store._ask
    monkeypatch.setattr(store, "_ask", lambda *given: [real(*given)[0], real(*given)[1][:2]])
    found = store.nearest(query, 5, approximate=True, backend="torch")
    assert torch.equal(found.rows, expected.rows)
    assert torch.equal(found.similarities, expected.similarities)


def test_more_rows_than_an_answer_takes_are_scanned(address, monkeypatch):
    monkeypatch.setattr("dhcl.inference.gallery.milvus._MAX_ROWS", 20)
    equal = np.repeat(unit_rows(1), 50, axis=0)
    with creating(address, ABOUT) as writer:
        writer.insert(iter([arrow_batch(np.arange(50), equal, records(50), MODEL)]))
    store = open_store(address)
    assert [len(part) for part in store.scan(["row"])] == [20, 20, 10]
    query = torch.from_numpy(unit_rows(1))
    # All are equal, so that no answer tells those of the lowest numbers.
    assert store.nearest(query, 3).rows.tolist() == [[0, 1, 2]]
    assert store.nearest(query, 45).rows.tolist() == [[*range(45)]]


def test_credentials_are_neither_in_addresses_nor_said_nor_stored(address, server, monkeypatch):
    with pytest.raises(ConfigError, match="MILVUS_TOKEN") as error:
        open_store(f"milvus://root:hunter2@127.0.0.1:{server.port}/x")
    assert "hunter2" not in str(error.value)
    monkeypatch.setenv("MILVUS_TOKEN", "root:hunter2")
    store = open_store(make(address, 1))
    head = json.dumps(store.link.read_head().model_dump())
    assert "hunter2" not in head + repr(vars(store)) + store.address

    def refuse(*_, **__):
        from pymilvus import MilvusException

        raise MilvusException(code=1100, message="auth check failure of root:hunter2, hunter2")

    monkeypatch.setattr(store.link._client, "query", refuse)
    with pytest.raises(DataError, match=r"refuses; MILVUS_TOKEN says who one is") as error:
        list(store.scan(["row"]))
    assert "hunter2" not in str(error.value)


def test_changed_bits_are_found(address):
    store = open_store(make(address, 3))
    row = store.link.query(store.link.place.name, "row == 1", ["*"], 1)[0]
    for change, look in (
        ({"feature": [1.0, *[0.0] * 7]}, lambda index: index.features),
        ({"path": "elsewhere.png"}, lambda index: list(index.images())),
    ):
        store.link.call("upsert", store.link.place.name, [{**row, **change}])
        with pytest.raises(DataError, match=r"is damaged \(.*checksum"):
            look(Index.open(address))
        store.link.call("upsert", store.link.place.name, [row])
    assert len(Index.open(address).features) == 3


def test_changes_of_a_gallery(address, pictures, model, tmp_path):
    import shutil

    gallery = shutil.copytree(pictures / "bounding_box_test", tmp_path / "gallery")
    files = image_files(gallery)
    create_index(address, [gallery], model, pattern=PATTERN)
    before = images(address)
    os.utime(files[0], (1, 1))
    files[1].unlink()
    done = add_images(address, [gallery], model, sync=True)
    assert (done.changed, done.removed, done.unchanged, done.total) == (1, 1, 14, 15)
    after = images(address)
    assert after[str(files[0])] > max(before.values())
    assert {p: n for p, n in after.items() if p != str(files[0])} == {
        p: n for p, n in before.items() if p not in (str(files[0]), str(files[1]))
    }
    with pytest.raises(ConfigError, match="would be empty"):
        remove_images(address, [gallery])
    assert len(images(address)) == 15
