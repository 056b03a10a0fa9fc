"""Lists of images as columns: what they hold, and what they weigh."""

import gc
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from dhcl.data import ImageList, PKSampler, TrainImages, load_data
from dhcl.data.paths import Paths
from dhcl.training.trainer import fingerprint

from tests.dhcl.data.layouts import jpeg

NAMES = ["a.jpg", "cam 1/ä\udcff.png", "/data/b\nc.jpg", "d/", "./e//f.jpg", "0" * 200]


@pytest.mark.parametrize("count", [0, 1, len(NAMES)])
def test_a_column_is_the_sequence_of_its_paths(count):
    wanted = tuple(map(Path, NAMES[:count]))
    found = Paths(NAMES[:count])
    assert (len(found), list(found), found) == (count, list(wanted), wanted)
    assert list(found.names()) == [path.name for path in wanted]
    assert [found[i] for i in range(-count, count)] == [*wanted, *wanted]
    assert found[::-2] == wanted[::-2]
    assert found + found[:1] == wanted + wanted[:1]
    assert pickle.loads(pickle.dumps(found)) == found
    assert found.nbytes == sum(len(str(p).encode("utf-8", "surrogateescape")) for p in wanted) + (
        8 * (count + 1)
    )
    with pytest.raises(IndexError):
        found[count]
    assert found != (*wanted, Path("more"))
    assert (found == Paths([*wanted[:-1], "other"])) is False


def test_taking_goes_by_chunks(monkeypatch):
    monkeypatch.setattr("dhcl.data.paths._CHUNK", 3)
    names = [f"{'x' * (i % 5)}{i}.png" for i in range(11)]
    order = np.random.default_rng(0).permutation(11).repeat(2)
    assert Paths(names).take(order) == tuple(Path(names[i]) for i in order)
    assert list(Paths(names).texts()) == names


def test_a_folder_is_sorted_by_path_wherever_its_images_lie(tmp_path):
    names = [
        "a.jpg",
        "a/x.jpg",
        "a-b/x.jpg",
        "a-b.jpg",
        "b/c/d.jpg",
        "b/c.jpg",
        "b/c0.jpg",
        "z.png",
    ]
    for name in names:
        jpeg(tmp_path / name)
    found = load_data("folder", tmp_path).train.paths
    assert [path.relative_to(tmp_path).as_posix() for path in found] == sorted(names)


def objects_of(make):
    """What `make` returns, and how many objects there are more with it."""
    gc.collect()
    before = sys.getallocatedblocks()
    made = make()
    gc.collect()
    return made, sys.getallocatedblocks() - before


def test_no_object_per_image(monkeypatch, tmp_path):
    """A list, its data set for training and its sampler are the same few objects of any length."""
    rows, fixed = 20_000, 500

    def walk(top, followlinks):
        yield str(top), ["cam1"], []
        yield f"{top}/cam1", [], [f"{i:06d}_person.jpg" for i in range(rows)]

    monkeypatch.setattr("os.walk", walk)
    data, count = objects_of(lambda: load_data("folder", tmp_path, pattern="cam(?P<camera>[0-9])"))
    assert len(data.train) == rows
    assert count < fixed
    text = len(str(tmp_path / "cam1/000000_person.jpg"))
    # Its text, where that begins, and four numbers.
    weight = len(pickle.dumps(data.train, protocol=5)) / rows
    assert weight == pytest.approx(text + 8 + 4 * 8, abs=0.5)
    labels = np.arange(rows) // 16
    labels[::3] = -1

    def training():
        images = data.unlabeled
        sampler = PKSampler(
            labels, images.cameras, classes_per_batch=4, images_per_class=4, iterations=3, seed=0
        )
        return TrainImages(images, lambda pixels: pixels), sampler, next(iter(sampler))

    made, count = objects_of(training)
    assert len(made[2]) == 16
    assert count < fixed
    whole, count = objects_of(lambda: (data.train.select(labels >= 0), fingerprint(data.train)))
    assert isinstance(whole[0], ImageList)
    assert count < fixed
