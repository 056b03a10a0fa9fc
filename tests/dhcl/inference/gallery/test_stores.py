"""What every store does alike: the same calls have the same results, to the bit."""

import itertools
import os

import numpy as np
import pytest
import torch
from dhcl.errors import ConfigError, DataError
from dhcl.inference.gallery import approximate
from dhcl.inference.gallery.lance import compact
from dhcl.inference.gallery.places import creating, open_store
from dhcl.inference.gallery.schema import (
    ABOUT_COLUMNS,
    FEATURE_COLUMNS,
    Record,
    arrow_batch,
    checked_features,
    checked_records,
)
from dhcl.inference.gallery.store import Neighbours, Where
from dhcl.inference.search import nearest
from dhcl.inference.update import approximate_index

from tests.dhcl.inference.gallery.lite import milvus_lite
from tests.dhcl.inference.gallery.made import ABOUT, MODEL, WIDTH, batch, make, records, unit_rows

COUNT = 60
ODD = (
    'x" or row >= 0 or id == "',
    "back\\slash'%_{}",
    "人 ä\n",
    os.fsdecode(b"caf\xe9"),
    "folder",
    "folder0",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with milvus_lite(tmp_path_factory.mktemp("lite")) as server:
        yield server


@pytest.fixture(params=["lance", "milvus"])
def new(request, tmp_path):
    """Makes addresses of stores that are not there."""
    numbers = itertools.count()
    if request.param == "lance":
        pytest.importorskip("lance", reason="the extra index is not installed")
        return lambda: tmp_path / f"index{next(numbers)}"
    server = request.getfixturevalue("server")
    name = f"i{os.urandom(4).hex()}"
    return lambda: server.address(f"{name}_{next(numbers)}")


def odd_records():
    """Images in odd folders, of odd people, some without a time."""
    return [
        Record(n % 2, f"{name}/{n}.png", name, n % 3, n, n, None if n % 2 else float(n))
        for n, name in enumerate(ODD * 2)
    ]


@pytest.fixture
def store(new):
    """60 images of five people, and twelve with odd names, of which one is removed."""
    address = new()
    with creating(address, ABOUT) as writer:
        more = odd_records()
        rows = np.arange(COUNT, COUNT + len(more))
        features = unit_rows(len(more), 5)
        odd = arrow_batch(rows, features, more, MODEL)
        assert writer.insert(iter([batch(COUNT), odd.slice(0, 5), odd.slice(5)])) == 72
        writer.set_about(ABOUT.__class__(**{**vars(ABOUT), "roots": ("/pictures", "/more")}))
    with open_store(address).writing() as writer:
        writer.delete(np.array([7, 9999]))
    opened = open_store(address)
    yield opened
    opened.close()


def kept():
    """Numbers, features and images of the fixture, from what they were made of."""
    numbers = np.delete(np.arange(72), 7)
    features = np.concatenate([unit_rows(COUNT), unit_rows(12, 5)])[numbers]
    images = [*records(COUNT), *odd_records()]
    return numbers, features, [images[number] for number in numbers]


def under(image, root, path):
    below = image.path == path or image.path.startswith(f"{path}/")
    return image.root == root and (below or not path)


WHERE = {
    "all": (Where(), lambda n, i: True),
    "cameras": (Where(cameras=frozenset({1, 2})), lambda n, i: i.camera in (1, 2)),
    "no camera": (Where(cameras=frozenset()), lambda n, i: False),
    "not a camera": (Where(not_camera=1), lambda n, i: i.camera != 1),
    **{
        f"id {name!r}": (Where(ids=frozenset({name})), lambda n, i, name=name: i.id == name)
        for name in ODD
    },
    "ids": (Where(ids=frozenset({3, ODD[0]})), lambda n, i: i.id in (3, ODD[0])),
    "times": (
        Where(since=5.0, until=9.0),
        lambda n, i: i.time is not None and 5 <= i.time <= 9,
    ),
    "any time": (Where(since=-1e300), lambda n, i: i.time is not None),
    "root": (Where(below=((1, ""),)), lambda n, i: i.root == 1),
    **{
        f"below {name!r}": (
            Where(below=((0, name), (1, name))),
            lambda n, i, name=name: under(i, 0, name) or under(i, 1, name),
        )
        for name in ODD
    },
    "below a file": (Where(below=((0, "d1/3_c0.png"),)), lambda n, i: n == 3),
    "below nothing": (Where(below=()), lambda n, i: False),
    "paths": (
        Where(paths=frozenset({(0, "d1/3_c0.png"), (1, f"{ODD[3]}/3.png"), (1, "d0/4_c1.png")})),
        lambda n, i: n in (3, 63),
    ),
    "rows": (Where(rows=np.array([0, 7, 8, 66, 500])), lambda n, i: n in (0, 8, 66)),
    "no rows": (Where(rows=np.empty(0, np.int64)), lambda n, i: False),
    "several": (
        Where(rows=np.arange(40), cameras=frozenset({0}), ids=frozenset({0, 1}), until=20.0),
        lambda n, i: n < 40 and i.camera == 0 and i.id in (0, 1) and i.time <= 20,
    ),
}


def test_rows_come_back_as_they_went_and_by_every_filter(store):
    numbers, features, images = kept()
    assert len(store) == 71
    assert store.next_row == 72
    assert store.about.roots == ("/pictures", "/more")
    for name, (where, meant) in WHERE.items():
        expected = [row for row in range(71) if meant(numbers[row], images[row])]
        found, rows = [], []
        for part in store.scan(ABOUT_COLUMNS, where):
            rows += part["row"].to_pylist()
            found += checked_records(part, MODEL, 2)
        assert rows == numbers[expected].tolist(), name
        assert found == [images[row] for row in expected], name
        blocks = [checked_features(part, WIDTH) for part in store.scan(FEATURE_COLUMNS, where)]
        vectors = np.concatenate([block[1] for block in blocks] or [np.empty((0, WIDTH))])
        assert np.array_equal(vectors, features[expected]), name


def test_the_nearest_are_those_of_a_plain_search_to_the_bit(store):
    numbers, features, images = kept()
    query = torch.from_numpy(unit_rows(4, 9))
    for name, (where, meant) in WHERE.items():
        rows = [row for row in range(71) if meant(numbers[row], images[row])]
        for topk in (1, 5, 100) if name in ("all", "cameras") else (5,):
            found = store.nearest(query, topk, where, backend="torch")
            best = nearest(query, [(numbers[rows], features[rows])], topk, backend="torch")
            assert torch.equal(found.rows, best.rows), name
            assert torch.equal(found.similarities, best.similarities), name
    nothing = store.nearest(query[:0], 3)
    assert nothing.rows.shape[0] == 0


def test_equals_come_by_their_numbers(new):
    address = new()
    equal = np.repeat(unit_rows(1), 50, axis=0)
    with creating(address, ABOUT) as writer:
        writer.insert(iter([arrow_batch(np.arange(50), equal, records(50), MODEL)]))
    found = open_store(address).nearest(torch.from_numpy(unit_rows(2)), 7)
    assert found.rows.tolist() == [[*range(7)]] * 2


def test_rows_are_taken_by_number_in_any_order(store):
    numbers, features, images = kept()
    wanted = np.array([66, 2, 2, 71, 0])
    places = np.searchsorted(numbers, wanted)
    found = store.take(wanted, ABOUT_COLUMNS)
    assert checked_records(found, MODEL, 2) == [images[place] for place in places]
    rows, vectors = checked_features(store.take(wanted, FEATURE_COLUMNS), WIDTH)
    assert rows.tolist() == wanted.tolist()
    assert np.array_equal(vectors, features[places])
    assert store.take(wanted[:0], ["row", "path"]).num_rows == 0
    with pytest.raises(DataError, match=r"index: .* has no row 7"):
        store.take(np.array([2, 7]), ["row"])


def test_cameras_are_those_that_are_there(new):
    address = make(new(), 9)
    assert open_store(address).cameras() == {0, 1, 2}
    with open_store(address).writing() as writer:
        writer.delete(np.array([1, 4, 7]))
        more = [Record(0, "x.png", -1, -1, 0, 0), Record(0, "y.png", -1, ODD[0], 0, 0)]
        writer.insert(iter([arrow_batch(np.array([9, 10]), unit_rows(2), more, MODEL)]))
    assert open_store(address).cameras() == {0, 2, ODD[0]}


def test_versions_and_numbers_go_up(new):
    address = make(new(), 3)
    first = open_store(address)
    with first.writing() as writer:
        assert len(writer.now) == 3
        writer.insert(iter([batch(2, 3)]))
        writer.delete(np.array([4]))
    second = open_store(address)
    assert second.version != first.version
    assert second.next_row >= 5
    assert len(second) == 4


def lists(rows, seed):
    noise = np.random.default_rng(seed)
    values = noise.normal(size=(len(rows), 4)).astype("f4")
    near = noise.integers(0, 9, (len(rows), 4))
    return Neighbours(np.array(rows), near, values, values.min(axis=1), near[:, 0])


def test_lists_of_neighbours_are_kept_row_by_row(new):
    address = make(new(), 6)
    assert open_store(address).neighbours() is None
    whole, part = lists(range(6), 0), lists([1, 4], 1)
    with open_store(address).writing() as writer:
        writer.put_neighbours(whole)
    with open_store(address).writing() as writer:
        writer.delete(np.array([3]))
        writer.put_neighbours(part)
    found = open_store(address).neighbours()
    keep = [0, 1, 2, 4, 5]
    expected = [column[keep].copy() for column in whole]
    for column, new_ones in zip(expected, part, strict=True):
        column[[1, 3]] = new_ones
    assert all(map(np.array_equal, found, expected))
    with open_store(address).writing() as writer:
        writer.insert(iter([batch(1, 6)]))
    # Of the new one there is none, which whoever takes the lists has to see.
    assert all(map(np.array_equal, open_store(address).neighbours(), expected))
    with open_store(address).writing() as writer:
        writer.drop_neighbours()
        writer.delete(np.array([6]))
    assert open_store(address).neighbours() is None


def test_one_writes_at_a_time_and_readers_go_on(new):
    address = make(new(), 4)
    reader = open_store(address)
    with reader.writing():
        with (
            pytest.raises(ConfigError, match=r"index: another process .* is changing"),
            open_store(address).writing(),
        ):
            pass
        assert len(next(iter(reader.scan(["row"])))) == 4
    with reader.writing() as writer:
        writer.delete(np.array([0]))


def test_making_one_that_is_there_or_opening_one_that_is_not_is_refused(new):
    address = make(new(), 2)
    with pytest.raises(ConfigError, match="is an index already"), creating(address, ABOUT):
        pass
    with pytest.raises(DataError, match=r"index: .* is not an index"):
        open_store(new())
    assert len(open_store(address)) == 2


def test_what_fails_while_it_is_made_leaves_none_or_is_gone_on_with(new):
    address = new()

    def batches():
        yield batch(5)
        raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"), creating(address, ABOUT) as writer:
        writer.insert(batches())
    with pytest.raises(DataError):
        open_store(address)
    with creating(address, ABOUT) as writer:
        there = len(writer.now)
        writer.insert(iter([batch(8 - there, there)]))
    opened = open_store(address)
    assert len(opened) == 8
    paths = [path for part in opened.scan(["path"]) for path in part["path"].to_pylist()]
    assert paths == [record.path for record in records(8)]


def test_a_closed_one_is_not_asked_any_more(new):
    opened = open_store(make(new(), 2))
    opened.close()
    with pytest.raises(ConfigError, match="must be opened anew"):
        list(opened.scan(["row"]))


# ---- what a folder has besides ------------------------------------------------------------------

MANY = 1200


@pytest.fixture
def many(tmp_path, monkeypatch):
    """An index in a folder that is ready for approximate search."""
    pytest.importorskip("lance", reason="the extra index is not installed")
    monkeypatch.setattr(approximate, "_QUERIES", 40)
    folder = make(tmp_path / "many", MANY)
    approximate_index(folder)
    return folder


def same(found, expected, share=1.0):
    """The share of rows that was found, with the similarities of exact search, to the bit."""
    hits = 0
    for query, rows in enumerate(expected.rows.tolist()):
        places = {row: place for place, row in enumerate(rows)}
        for row, similarity in zip(found.rows[query], found.similarities[query], strict=True):
            if int(row) in places:
                hits += 1
                assert similarity == expected.similarities[query, places[int(row)]]
        assert (found.similarities[query].diff() <= 0).all()
    assert hits >= share * expected.rows.numel()


def test_what_an_approximate_search_finds_has_exact_similarities(many):
    store = open_store(many)
    assert 0.9 <= store.recall().share <= 1
    query = torch.from_numpy(unit_rows(20, 9))
    for name in ("all", "cameras", "ids", "root", "times", "several", "no camera", "below nothing"):
        where = WHERE[name][0]
        exact = store.nearest(query, 7, where, backend="torch")
        same(store.nearest(query, 7, where, approximate=True, backend="torch"), exact, 0.9)
    few = store.nearest(query, MANY + 1, approximate=True, backend="torch")
    assert torch.equal(few.rows, store.nearest(query, MANY + 1, backend="torch").rows)
    assert store.nearest(query[:0], 7, approximate=True).rows.shape[0] == 0


def test_rows_that_come_later_are_found_and_those_that_went_are_not(many):
    before = open_store(many)
    with before.writing() as writer:
        writer.insert(iter([batch(30, MANY, seed=7)]))
        writer.delete(np.arange(0, 100))
    query = torch.from_numpy(np.concatenate([unit_rows(30, 7), unit_rows(MANY)[:100]]))
    for step in ("change", "compact", "anew"):
        store = open_store(many)
        found = store.nearest(query, 5, approximate=True, backend="torch")
        assert found.rows[:30, 0].tolist() == [*range(MANY, MANY + 30)], step
        assert int(found.rows.min()) >= 100, step
        same(found, store.nearest(query, 5, backend="torch"), 0.9)
        assert store.recall().share >= 0.9
        if step == "change":
            assert store.recall() == before.recall()
            compact(many)
            [described] = open_store(many)._rows.describe_indices()
            assert described.num_rows_indexed == MANY - 70
        elif step == "compact":
            assert approximate_index(many) == open_store(many).recall()


def test_the_recall_is_the_share_of_other_rows_that_were_found(many, monkeypatch):
    """With every third row kept from it, which no index does."""

    def propose(*given, backend):
        best = real(*given, backend=backend)
        return best._make(values[best.rows % 3 != 0] for values in best)

    real = approximate.propose
    monkeypatch.setattr(approximate, "propose", propose)
    recall = approximate_index(many)
    features = torch.from_numpy(unit_rows(MANY))
    nearest_rows = (features @ features.T).fill_diagonal_(-2).topk(20).indices
    chosen = np.linspace(0, MANY - 1, 40).astype(int)
    expected = float((nearest_rows[chosen] % 3 != 0).double().mean())
    assert recall.queries == 40
    assert recall.share == pytest.approx(expected, abs=0.03)
    assert recall == open_store(many).recall()


def test_rows_stay_in_order_whatever_is_put_together(tmp_path, monkeypatch):
    pytest.importorskip("lance", reason="the extra index is not installed")
    for module in ("tables", "lance"):
        monkeypatch.setattr(f"dhcl.inference.gallery.{module}.FILE_BYTES", 4 * WIDTH * 50)
    folder = tmp_path / "index"
    with creating(folder, ABOUT) as writer:
        writer.insert(batch(50, start) for start in range(0, 200, 50))
    left = {*range(200)}
    changes = [range(20), range(110, 140), range(60, 62), range(195, 200), range(21, 40)]
    for number, gone in enumerate(changes):
        with open_store(folder).writing() as writer:
            writer.insert(iter([batch(3, 200 + 3 * number)]))
            writer.delete(np.array(gone))
        left = (left | {*range(200 + 3 * number, 203 + 3 * number)}) - {*gone}
        store = open_store(folder)
        assert store.numbers().tolist() == sorted(left)
        newest = np.array([202 + 3 * number, min(left)])
        assert store.take(newest, ["row"])["row"].to_pylist() == newest.tolist()
        parts = store._rows.get_fragments()
        dead = sum(part.num_deletions for part in parts)
        assert dead <= 0.1 * sum(part.physical_rows for part in parts)
    compact(folder)
    store = open_store(folder)
    assert store.numbers().tolist() == sorted(left)
    assert not any(part.num_deletions for part in store._rows.get_fragments())


def test_many_small_files_become_few(tmp_path):
    pytest.importorskip("lance", reason="the extra index is not installed")
    folder = make(tmp_path / "index", 2)
    for number in range(2, 20):
        with open_store(folder).writing() as writer:
            writer.insert(iter([batch(1, number)]))
    store = open_store(folder)
    assert store.numbers().tolist() == [*range(20)]
    assert len(store._rows.get_fragments()) == 3
