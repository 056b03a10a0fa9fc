from collections import Counter

import numpy as np
import pytest
import torch
from dhcl.data import PKSampler
from hypothesis import given, settings
from hypothesis import strategies as st


def make(labels, cameras=None, *, p=4, k=4, iterations=10, seed=0, **options):
    labels = np.asarray(labels, dtype=np.int64)
    cameras = np.full(len(labels), -1) if cameras is None else np.asarray(cameras, dtype=np.int64)
    return PKSampler(
        labels,
        cameras,
        classes_per_batch=p,
        images_per_class=k,
        iterations=iterations,
        seed=seed,
        **options,
    )


def batches(sampler, epoch=0, start=0):
    sampler.set_epoch(epoch)
    sampler.start(start)
    return list(sampler)


def indices(batch):
    return [index for index, _ in batch]


def clusters(count, size):
    return np.repeat(np.arange(count), size)


# ---- one batch ----


def test_slots_are_whole_classes_side_by_side():
    labels = np.random.default_rng(0).permutation(clusters(20, 7))
    for batch in batches(make(labels, p=16)):
        slots = labels[indices(batch)].reshape(16, 4)
        assert (slots == slots[:, :1]).all()
        assert len(set(slots[:, 0])) == 16
        assert len(set(indices(batch))) == 64


def test_others_come_from_other_cameras_first():
    labels, cameras = clusters(6, 8), np.tile([0, 0, 0, 0, 0, 1, 2, 3], 6)
    anchors = Counter()
    for batch in batches(make(labels, cameras, iterations=50)):
        for slot in np.array(indices(batch)).reshape(4, 4):
            seen = cameras[slot]
            anchors[int(seen[0])] += 1
            if seen[0] == 0:
                assert sorted(seen[1:]) == [1, 2, 3]
            else:
                assert (seen[1:] != seen[0]).all()
            assert len(set(slot)) == 4
    assert set(anchors) == {0, 1, 2, 3}


def test_same_camera_fills_up_before_an_image_repeats():
    labels, cameras = clusters(4, 5), np.tile([0, 0, 0, 0, 1], 4)
    for batch in batches(make(labels, cameras, iterations=30)):
        for slot in np.array(indices(batch)).reshape(4, 4):
            assert len(set(slot)) == 4
            assert 1 in cameras[slot][:2]


def test_an_unknown_camera_is_not_another_camera():
    """Were it one, the image of camera -1 would always follow the anchor."""
    labels, cameras = np.zeros(9, np.int64), np.array([0] * 8 + [-1])
    seconds = [indices(batch)[1] for batch in batches(make(labels, cameras, p=1, iterations=200))]
    assert 0 < seconds.count(8) < 60


@pytest.mark.parametrize("size", [1, 2, 3])
def test_small_classes_repeat_evenly(size):
    for batch in batches(make(clusters(4, size), k=4)):
        for slot in np.array(indices(batch)).reshape(4, 4):
            counts = Counter(slot.tolist())
            assert len(counts) == size
            assert max(counts.values()) - min(counts.values()) <= 1


def test_every_image_is_reached():
    labels = clusters(3, 50)
    seen = {i for batch in batches(make(labels, iterations=200)) for i in indices(batch)}
    assert seen == set(range(150))


# ---- passes ----


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), max_size=12),
    outliers=st.integers(0, 20),
    p=st.integers(1, 8),
    k=st.integers(1, 5),
    seed=st.integers(0, 5),
)
def test_every_class_is_visited_once_before_any_is_visited_again(sizes, outliers, p, k, seed):
    labels = np.concatenate(
        [np.full(size, i) for i, size in enumerate(sizes)] + [np.full(outliers, -1)]
    ).astype(np.int64)
    if not len(labels):
        return
    labels = np.random.default_rng(seed).permutation(labels)
    # Outliers that do not fill a slot share one with a cluster, where there is one.
    slots_of_a_pass = outliers // k + len(sizes) if sizes else -(-outliers // k)
    sampler = make(labels, p=p, k=k, seed=seed, iterations=-(-3 * slots_of_a_pass // p))
    drawn = [i for batch in batches(sampler) for i in indices(batch)]
    assert all(len(batch) == p * k for batch in batches(sampler))
    slots = np.array(drawn).reshape(-1, k)
    for number in range(3):
        part = slots[number * slots_of_a_pass : (number + 1) * slots_of_a_pass]
        visited = Counter()
        for slot in part:
            visited.update({int(labels[i]) for i in slot if labels[i] >= 0})
            visited.update(f"image {i}" for i in set(slot.tolist()) if labels[i] < 0)
        expected = {int(label) for label in labels if label >= 0}
        expected |= {f"image {i}" for i in np.flatnonzero(labels < 0)}
        assert set(visited) == expected
        if sizes:
            assert set(visited.values()) == {1}


def test_outliers_come_with_one_image_each():
    labels = np.concatenate([clusters(10, 6), np.full(30, -1)])
    alone = set(range(60, 90))
    counts = Counter()
    for batch in batches(make(labels, p=8, iterations=40)):
        assert len(batch) == 32
        in_batch = Counter(i for i in indices(batch) if i in alone)
        assert all(count == 1 for count in in_batch.values())
        counts.update(in_batch)
    assert set(counts) == alone
    assert max(counts.values()) - min(counts.values()) <= 1


def test_outliers_can_be_left_out():
    labels = np.concatenate([clusters(10, 6), np.full(30, -1)])
    drawn = {i for b in batches(make(labels, outliers=False, iterations=40)) for i in indices(b)}
    assert drawn <= set(range(60))


def test_only_outliers():
    for batch in batches(make(np.full(50, -1), p=4, k=4)):
        assert len(set(indices(batch))) == 16


def test_too_few_classes_wrap_round():
    labels = clusters(3, 10)
    for batch in batches(make(labels, p=8)):
        visits = Counter(labels[indices(batch)].tolist())
        assert len(batch) == 32
        assert sorted(visits.values()) == [8, 12, 12]


@pytest.mark.parametrize("classes", [8, 9, 13])
def test_no_class_twice_in_a_batch_where_a_pass_ends(classes):
    labels = clusters(classes, 5)
    for batch in batches(make(labels, p=8, iterations=60)):
        assert len(set(labels[indices(batch)])) == 8


def test_no_outlier_twice_in_a_batch_where_a_pass_ends():
    for batch in batches(make(np.full(64, -1), p=10, iterations=60)):
        assert len(set(indices(batch))) == 40


# ---- determinism ----

MIXED = np.concatenate([clusters(30, 5), np.full(23, -1)])
MIXED_CAMERAS = np.arange(len(MIXED)) % 4


@pytest.mark.parametrize("start", [0, 1, 7, 19, 20])
def test_starting_midway_gives_the_same_batches(start):
    whole = batches(make(MIXED, MIXED_CAMERAS, iterations=20), epoch=3)
    sampler = make(MIXED, MIXED_CAMERAS, iterations=20)
    assert batches(sampler, epoch=3, start=start) == whole[start:]
    assert len(sampler) == 20 - start
    sampler.set_epoch(3)
    assert len(sampler) == 20
    assert list(sampler) == whole


def test_epochs_and_seeds_differ_and_positions_do_not_repeat():
    sampler = make(MIXED, MIXED_CAMERAS)
    first, second = batches(sampler, 0), batches(sampler, 1)
    other = batches(make(MIXED, MIXED_CAMERAS, seed=1), 0)
    order = [indices(b) for b in first]
    assert order != [indices(b) for b in second]
    assert order != [indices(b) for b in other]
    positions = [position for batch in first + second for _, position in batch]
    assert len(set(positions)) == len(positions)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_share_the_batch_at_class_boundaries(world_size):
    whole = batches(make(MIXED, MIXED_CAMERAS, p=8), epoch=2)
    parts = [
        batches(make(MIXED, MIXED_CAMERAS, p=8, rank=r, world_size=world_size), epoch=2)
        for r in range(world_size)
    ]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert [key for share in shares for key in share] == batch
        assert {len(share) for share in shares} == {32 // world_size}


def test_tensors_serve_as_well():
    ours = batches(make(MIXED, MIXED_CAMERAS))
    theirs = PKSampler(
        torch.from_numpy(MIXED),
        torch.from_numpy(MIXED_CAMERAS),
        classes_per_batch=4,
        images_per_class=4,
        iterations=10,
        seed=0,
    )
    assert batches(theirs) == ours


def test_keys_are_plain_integers():
    for index, position in batches(make(MIXED))[0]:
        assert type(index) is int
        assert type(position) is int


# ---- errors ----


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([], {}, "no images"),
        ([-1, -1], {"outliers": False}, "no clusters, and outliers are left out"),
        ([0, -2], {}, "labels must be at least -1"),
        ([0, 1], {"p": 0}, "classes_per_batch must be at least 1"),
        ([0, 1], {"k": 0}, "images_per_class must be at least 1"),
        ([0, 1], {"iterations": 0}, "iterations must be at least 1"),
        ([0, 1], {"seed": -1}, "seed must be at least 0"),
        ([0, 1], {"rank": 2, "world_size": 2}, r"rank must be in \[0, 2\)"),
        ([0, 1], {"world_size": 3}, "multiple of world_size"),
        ([0, 1], {"cameras": [0]}, "equal length"),
    ],
)
def test_bad_arguments(labels, options, message):
    with pytest.raises(ValueError, match=message):
        make(labels, **options)


def test_bad_places():
    sampler = make([0, 1])
    with pytest.raises(ValueError, match=r"iteration must be in \[0, 10\]"):
        sampler.start(11)
    with pytest.raises(ValueError, match="epoch must be in"):
        sampler.set_epoch(-1)
    with pytest.raises(ValueError, match="labels must be"):
        PKSampler(
            np.zeros(3), np.zeros(3), classes_per_batch=1, images_per_class=1, iterations=1, seed=0
        )
