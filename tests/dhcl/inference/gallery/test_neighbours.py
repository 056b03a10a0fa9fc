"""Lists of nearest rows that an index keeps: after any change as if made anew, and re-ranking."""

import numpy as np
import pytest
import torch
from dhcl.cli import main
from dhcl.inference.gallery.schema import arrow_batch
from dhcl.inference.gallery.store import Neighbours
from dhcl.inference.index import Index
from dhcl.inference.neighbours import WIDTH, Lists, missing_lists
from dhcl.inference.update import find_neighbours

from dhcl_ops import knn, rerank
from tests.dhcl.inference.gallery.made import MODEL, make, records
from tests.dhcl.inference.gallery.made import WIDTH as DIM


def people(count, seed, spread=0.3):
    """Features of people with some ten images each, a few of them equal."""
    noise = np.random.default_rng(seed)
    rows = np.random.default_rng(9).normal(size=(count // 10 + 3, DIM))
    rows = rows[noise.integers(len(rows), size=count)] + spread * noise.normal(size=(count, DIM))
    rows[5] = rows[3]
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype("f4")


def insert(folder, features):
    with Index.open(folder).store.writing() as writer:
        start = writer.now.next_row
        rows = np.arange(start, start + len(features))
        images = records(len(features), start)
        writer.insert(iter([arrow_batch(rows, features, images, MODEL)]))


def delete(folder, numbers):
    with Index.open(folder).store.writing() as writer:
        writer.delete(np.array(numbers))


@pytest.fixture
def index(tmp_path):
    """400 images and their lists."""
    make(tmp_path / "index", 1)
    insert(tmp_path / "index", people(400, 1))
    delete(tmp_path / "index", [0])
    assert find_neighbours(tmp_path / "index") == 400
    return tmp_path / "index"


def check_lists(folder):
    """They are those that all of the index give."""
    index = Index.open(folder)
    lists = Lists.of(index)
    features = torch.from_numpy(index.features)
    expected = knn(features, WIDTH)
    assert np.array_equal(lists.ranks, expected.indices.numpy())
    assert np.array_equal(lists.similarities, expected.similarities.numpy())
    assert np.allclose(lists.least, (features @ features.T).min(1).values, atol=1e-6)
    return index


def check_search(folder, query, topk=30):
    """What is found is what re-ranking all of the index finds, in order."""
    index = check_lists(folder)
    expected = rerank(query, torch.from_numpy(index.features), topk=topk)
    for number, found in enumerate(index.search(query, topk, rerank=True)):
        assert torch.allclose(found.distances, expected.distances[number], atol=2e-6)
        other = found.indices != expected.indices[number]
        gaps = expected.distances[number].diff()
        # Rows change places only where their distances are the same to rounding.
        close = torch.cat([gaps, gaps[-1:] + 1]) < 4e-6
        close[1:] |= close[:-1].clone()
        assert bool(close[other].all())
        rows = torch.from_numpy(index.features)[found.indices]
        assert torch.allclose(found.similarities, rows @ query[number], atol=1e-6)


@pytest.mark.parametrize("count", [1, 7, 40])
def test_reranked_by_lists_is_reranked_by_all(index, count):
    query = torch.from_numpy(people(max(count, 6), 2)[:count])
    check_search(index, query)
    features = torch.from_numpy(Index.open(index).features)
    check_search(index, features[[3, 5, 3]], topk=400)


def test_lists_stay_true_when_rows_come_and_go(index):
    insert(index, people(12, 3))
    assert Lists.of(Index.open(index)) is None
    assert find_neighbours(index) >= 12
    assert find_neighbours(index) == 0
    check_search(index, torch.from_numpy(people(6, 4)[:2]))
    gone = Index.open(index)
    worst = np.bincount(np.searchsorted(gone.numbers, gone.store.neighbours().farthest)).argmax()
    delete(index, [*gone.numbers[[3, 9, 70, worst]], gone.numbers[-1]])
    assert Lists.of(Index.open(index)) is None
    assert 0 < find_neighbours(index) < 400
    check_lists(index)
    delete(index, Index.open(index).numbers[:5])
    insert(index, people(300, 5, spread=1.0))
    assert find_neighbours(index) == 702
    check_search(index, torch.from_numpy(people(6, 6)[:2]))


def test_without_true_lists_all_is_computed(index):
    insert(index, people(6, 3))
    opened = Index.open(index)
    query = torch.from_numpy(people(6, 4))
    expected = rerank(query, torch.from_numpy(opened.features), topk=9)
    found = opened.search(query, 9, rerank=True)
    assert all(torch.equal(f.indices, e) for f, e in zip(found, expected.indices, strict=True))
    assert all(torch.equal(f.distances, e) for f, e in zip(found, expected.distances, strict=True))


def test_some_of_the_rows_are_reranked_among_themselves(index):
    opened = Index.open(index)
    query = torch.from_numpy(people(6, 4)[:2])
    two = np.flatnonzero([record.camera == 2 for record in opened.records])
    expected = rerank(query, torch.from_numpy(opened.features[two]), topk=9)
    for found, rows in zip(
        opened.search(query, 9, cameras=[2], rerank=True), expected.indices, strict=True
    ):
        assert torch.equal(found.indices, torch.from_numpy(two)[rows])


def test_lists_of_another_index_are_not_believed(index):
    """A row that is in no list of its own, or a list of a number that is not there."""
    opened = Index.open(index)
    old = opened.store.neighbours()
    wrong = old.lists.copy()
    wrong[7, 3] = 10**6
    with opened.store.writing() as writer:
        writer.put_neighbours(Neighbours(*(column[7:8] for column in old._replace(lists=wrong))))
    assert Lists.of(Index.open(index)) is None
    lists, all_of_them = missing_lists(Index.open(index))
    assert (all_of_them, lists.rows.tolist()) == (False, [old.rows[7]])
    assert find_neighbours(index) == 1
    check_lists(index)


def test_few_images_need_none(tmp_path, capsys):
    make(tmp_path / "index", WIDTH)
    assert main(["index", "--neighbours", "--out", str(tmp_path / "index")]) == 0
    assert "nearest images of 0 images were found" in capsys.readouterr().out
    assert Index.open(tmp_path / "index").store.neighbours() is None
