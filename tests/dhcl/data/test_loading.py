import multiprocessing
import pickle

import numpy as np
import pytest
import torch
from dhcl.data import (
    DataError,
    EvalImages,
    ImageList,
    PKSampler,
    TrainImages,
    eval_loader,
    eval_transform,
    read_image,
    train_loader,
    train_transform,
)
from torchvision.transforms import v2

from tests.dhcl.data.pictures import SIZE, images_in

# ---- data sets and loaders -----------------------------------------------------------------------


def training(images, *, workers=0, start=0, epoch=0, seed=0, cache=0, **options):
    sampler = PKSampler(
        np.arange(len(images)) // 3,
        images.cameras,
        classes_per_batch=2,
        images_per_class=2,
        iterations=6,
        seed=0,
        **options,
    )
    sampler.set_epoch(epoch)
    sampler.start(start)
    dataset = TrainImages(images, train_transform(SIZE), seed, cache_bytes=cache)
    return train_loader(dataset, sampler, workers=workers)


def same(first, second):
    assert len(first) == len(second)
    for ours, theirs in zip(first, second, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)


def test_batches(tmp_path):
    images = images_in(tmp_path)
    loader = training(images)
    assert len(loader) == 6
    for pixels, indices, cameras in loader:
        assert pixels.shape == (4, 3, *SIZE)
        assert pixels.is_contiguous()
        assert (pixels.dtype, indices.dtype, cameras.dtype) == (
            torch.float32,
            torch.int64,
            torch.int64,
        )
        assert cameras.tolist() == images.cameras[indices.numpy()].tolist()


def test_batches_do_not_depend_on_workers(tmp_path):
    images = images_in(tmp_path)
    alone, two = training(images), training(images, workers=2)
    for epoch in range(2):
        for loader in (alone, two):
            loader.batch_sampler.set_epoch(epoch)
        same(list(alone), list(two))


def test_batches_do_not_depend_on_resumption(tmp_path):
    images = images_in(tmp_path)
    whole = list(training(images, epoch=1))
    same(list(training(images, epoch=1, start=4)), whole[4:])
    same(list(training(images, epoch=1, start=4, workers=2)), whole[4:])


def test_ranks_load_the_parts_of_the_whole_batch(tmp_path):
    images = images_in(tmp_path)
    parts = [list(training(images, rank=rank, world_size=2)) for rank in range(2)]
    joined = [
        [torch.cat(pair) for pair in zip(*both, strict=True)] for both in zip(*parts, strict=True)
    ]
    same(joined, list(training(images)))


def test_augmentation_differs_by_position_epoch_and_seed(tmp_path):
    images = images_in(tmp_path, 1)
    transform = train_transform(SIZE)
    dataset = TrainImages(images, transform, 0)
    draws = [dataset[0, 0], dataset[0, 1], dataset[0, 1 << 32]]
    draws.append(TrainImages(images, transform, 1)[0, 0])
    for i, (first, _, _) in enumerate(draws):
        for second, _, _ in draws[i + 1 :]:
            assert not torch.equal(first, second)
    assert torch.equal(dataset[0, 1][0], draws[1][0])


def test_the_random_state_of_the_process_is_left_alone(tmp_path):
    images = images_in(tmp_path)
    for workers in (0, 2):
        torch.manual_seed(5)
        before = torch.get_rng_state()
        list(training(images, workers=workers))
        assert torch.equal(torch.get_rng_state(), before)


def test_identities_do_not_reach_the_batches(tmp_path):
    images = images_in(tmp_path)
    named = ImageList(images.paths, np.arange(12)[::-1].copy(), images.cameras)
    same(list(training(images)), list(training(named)))


def test_evaluation_in_order(tmp_path):
    images = images_in(tmp_path)
    dataset = EvalImages(images, eval_transform(SIZE))
    alone = list(eval_loader(dataset, batch_size=5))
    assert [len(batch[0]) for batch in alone] == [5, 5, 2]
    assert torch.cat([batch[1] for batch in alone]).tolist() == list(range(12))
    assert torch.cat([batch[2] for batch in alone]).tolist() == images.cameras.tolist()
    expected = eval_transform(SIZE)(read_image(images.paths[3]))
    assert torch.equal(alone[0][0][3], expected)
    same(list(eval_loader(dataset, batch_size=5, workers=2)), alone)


# ---- cache ---------------------------------------------------------------------------------------


ROW = 3 * SIZE[0] * SIZE[1] + 1


@pytest.mark.parametrize("cache", [1, ROW, 5 * ROW, 1 << 20])
@pytest.mark.parametrize("workers", [0, 2])
def test_cached_images_are_the_same(tmp_path, cache, workers):
    images = images_in(tmp_path)
    loader = training(images, workers=workers, cache=cache)
    expected = list(training(images))
    same(list(loader), expected)
    same(list(loader), expected)


def test_the_cache_keeps_what_fits_and_is_shared_by_workers(tmp_path):
    images = images_in(tmp_path)
    dataset = EvalImages(images, eval_transform(SIZE), cache_bytes=10 * ROW)
    expected = list(eval_loader(dataset, workers=2, batch_size=3))
    for path in images.paths:
        path.unlink()
    # Filled by workers that are gone, read here.
    for batch in expected[:3]:
        for pixels, index, camera in zip(*batch, strict=True):
            again = dataset[int(index)]
            assert torch.equal(again[0], pixels)
            assert again[2] == camera
    with pytest.raises(DataError, match="No such file"):
        dataset[10]


def test_augmentation_leaves_the_cache_alone(tmp_path):
    images = images_in(tmp_path, 2)
    dataset = TrainImages(images, train_transform(SIZE, color_jitter=0.3), cache_bytes=1 << 20)
    first = dataset[0, 0][0]
    for position in range(1, 30):
        dataset[0, position]
    assert torch.equal(dataset[0, 0][0], first)


def test_the_cache_can_be_sent_to_workers_that_are_not_forked(tmp_path):
    images = images_in(tmp_path, 2)
    dataset = EvalImages(images, eval_transform(SIZE), cache_bytes=1 << 20)
    sent = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(sent[1][0], dataset[1][0])
    moved = images.paths[1].rename(tmp_path / "moved")
    assert torch.equal(sent[1][0], dataset[1][0])
    moved.rename(images.paths[1])
    loader = torch.utils.data.DataLoader(
        dataset, num_workers=1, multiprocessing_context=multiprocessing.get_context("spawn")
    )
    same(list(loader), list(eval_loader(dataset, batch_size=1)))


def test_cache_arguments(tmp_path):
    images = images_in(tmp_path, 1)
    with pytest.raises(ValueError, match="cache_bytes: must be at least 0"):
        EvalImages(images, eval_transform(SIZE), cache_bytes=-1)
    for transform in (v2.Identity(), v2.Compose([v2.Resize(8)])):
        with pytest.raises(ValueError, match="must begin with a resize"):
            EvalImages(images, transform, cache_bytes=5)
    with pytest.raises(ValueError, match="seed must be at least 0"):
        TrainImages(images, eval_transform(SIZE), -1)


def test_a_file_that_vanishes_is_named(tmp_path):
    images = images_in(tmp_path, 3)
    images.paths[2].unlink()
    dataset = EvalImages(images, eval_transform(SIZE))
    with pytest.raises(DataError, match=images.paths[2].name):
        list(dataset)
    with pytest.raises(DataError, match=images.paths[2].name):
        list(eval_loader(dataset))
