import io
import multiprocessing
import pickle

import dhcl.data.images
import numpy as np
import pytest
import torch
from dhcl.data import (
    DataError,
    EvalImages,
    ImageList,
    PKSampler,
    TrainImages,
    check_images,
    eval_loader,
    eval_transform,
    load_data,
    read_image,
    train_loader,
    train_transform,
)
from dhcl.data.images import as_pixels, thumbnail
from PIL import Image
from torchvision.transforms import v2

SIZE = (32, 16)


def picture(seed=0, height=40, width=20):
    """Smooth colours, so that JPEG changes little."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 3, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height))


def encoded(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def images_in(root, count=12, cameras=3):
    for i in range(count):
        path = root / f"cam {i % cameras}" / f"Ölbild {i:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path, quality=95)
    return load_data("folder", root, pattern=r"cam (?P<camera>\d+)").train


def spoil(root):
    """Every kind of bad file, with the words its report must hold."""
    good, png = encoded(picture(1)), encoded(picture(1), "PNG")
    flawed = {
        "empty.jpg": (b"", "the file is empty"),
        "truncated.jpg": (good[: len(good) // 2], "truncated"),
        "last bytes missing.jpg": (good[:-2], "truncated"),
        "zeros at the end.jpg": (good[: len(good) // 2] + bytes(len(good)), ""),
        "text 文字.jpg": (b"<html>404</html>", "not an image"),
        "header only.png": (png[:60], ""),
        "truncated.png": (png[: len(png) // 2], "truncated"),
        "truncated.bmp": (encoded(picture(1), "BMP")[:500], "truncated"),
        "truncated.webp": (encoded(picture(1), "WEBP")[:-100], ""),
        "truncated.tif": (encoded(picture(1), "TIFF")[:500], ""),
    }
    root.mkdir(exist_ok=True)
    for name, (data, _) in flawed.items():
        (root / name).write_bytes(data)
    (root / "folder.jpg").mkdir()
    return {name: words for name, (_, words) in flawed.items()} | {
        "gone.jpg": "no such file",
        "folder.jpg": "is a directory",
    }


def list_of(paths):
    paths = tuple(paths)
    return ImageList(paths, np.arange(len(paths)), np.arange(len(paths)) % 2)


# ---- decoding ----


@pytest.fixture(params=["torchvision", "pillow alone"])
def decoder(request, monkeypatch):
    if request.param == "pillow alone":
        monkeypatch.setattr("dhcl.data.images.decode_image", None)
    elif dhcl.data.images.decode_image is None:
        pytest.skip("this torchvision has no decoders")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1", "LA"])
def test_formats_and_modes_decode_as_pillow_does(tmp_path, kind, mode):
    image = picture().convert(mode)
    path = tmp_path / f"a b ü.{kind.lower()}"
    try:
        image.save(path, kind, **({"lossless": True} if kind == "WEBP" else {}))
    except (OSError, KeyError):
        return  # this format has no such mode
    got = read_image(path)
    expected = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
    assert got.dtype == torch.uint8
    assert got.shape == (3, 40, 20)
    assert (got.int() - expected.int()).abs().max() <= 2


def test_sixteen_bits_become_eight(tmp_path, decoder):
    values = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "a.png")
    got = read_image(tmp_path / "a.png")
    assert got.dtype == torch.uint8
    assert (got[0].flatten().int() - torch.arange(256)).abs().max() <= 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_exif_orientation_is_applied(tmp_path, kind, decoder):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / f"a.{kind.lower()}"
    picture().save(path, kind, exif=exif)
    assert read_image(path).shape == (3, 20, 40)


@pytest.mark.parametrize("deep", [False, True])
def test_files_open_pictures_and_arrays_have_the_same_pixels(deep, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.png"
    wide = np.arange(0, 65536, 256, dtype=np.uint16).reshape(8, 32)
    (Image.fromarray(wide) if deep else picture()).save(path, exif=exif)
    pixels = read_image(path)
    assert torch.equal(as_pixels(str(path)), pixels)
    with Image.open(path) as opened:
        assert torch.equal(as_pixels(opened), pixels)
    assert torch.equal(as_pixels(pixels.permute(1, 2, 0)), pixels)
    assert torch.equal(as_pixels(pixels.permute(1, 2, 0).numpy()), pixels)
    small = thumbnail(path, 8)
    assert small.mode == "RGB"
    assert max(small.height, small.width / 2) <= 8
    assert (small.height > small.width) == (pixels.shape[1] > pixels.shape[2])


def test_bad_images_raise_with_path_and_reason(tmp_path, decoder):
    for name, words in spoil(tmp_path / "bad").items():
        with pytest.raises(DataError) as caught:
            read_image(tmp_path / "bad" / name)
        assert name in str(caught.value)
        assert words in str(caught.value).lower()
        assert "0x" not in str(caught.value)


# ---- checking ----


def test_good_images_pass(tmp_path):
    images = images_in(tmp_path)
    calls = []
    lists, report = check_images(
        {"train": images, "query": images.select([])}, progress=lambda *done: calls.append(done)
    )
    assert lists["train"].paths == images.paths
    assert lists["train"].cameras.tolist() == images.cameras.tolist()
    assert len(lists["query"]) == 0
    assert (report.checked, report.bad) == (12, ())
    assert str(report) == "All 12 images can be read."
    assert calls[-1] == (12, 12)


def mixed(tmp_path):
    good = images_in(tmp_path / "good").paths
    flaws = spoil(tmp_path / "bad")
    paths = [*good[:5], *(tmp_path / "bad" / name for name in flaws), *good[5:]]
    return list_of(paths), set(good), flaws


@pytest.mark.parametrize("workers", [1, 3])
def test_bad_images_are_skipped_by_choice(tmp_path, workers):
    images, good, flaws = mixed(tmp_path)
    lists, report = check_images({"train": images}, on_bad="skip", workers=workers)
    left = lists["train"]
    assert set(left.paths) == good
    assert left.ids.tolist() == [i for i, path in enumerate(images.paths) if path in good]
    assert report.checked == len(images)
    assert {bad.path.name for bad in report.bad} == set(flaws)
    for bad in report.bad:
        assert bad.split == "train"
        assert flaws[bad.path.name] in bad.reason.lower()
        assert bad.reason


def test_bad_images_are_refused_by_default(tmp_path):
    images, _, flaws = mixed(tmp_path)
    with pytest.raises(DataError) as caught:
        check_images({"query": images})
    text = str(caught.value)
    assert f"{len(flaws)} of {len(images)} images can't be read" in text
    assert sum(name in text for name in flaws) == 10
    assert "and 2 more" in text
    assert "on_bad: skip" in text
    assert "query: " in text


def test_nothing_usable_is_an_error(tmp_path):
    good = images_in(tmp_path / "good")
    bad = list_of([tmp_path / "gone.jpg"])
    with pytest.raises(DataError, match=r"at least one that can be read in query"):
        check_images({"train": good, "query": bad}, on_bad="skip")
    with pytest.raises(DataError, match="at least one"):
        check_images({"train": good.select([])})


def test_check_arguments(tmp_path):
    images = images_in(tmp_path, 1)
    with pytest.raises(ValueError, match="on_bad must be 'refuse' or 'skip'"):
        check_images({"train": images}, on_bad="ignore")
    with pytest.raises(ValueError, match="workers must be at least 1"):
        check_images({"train": images}, workers=0)


# ---- transforms ----


def test_eval_transform_is_resize_and_normalisation():
    pixels = torch.from_numpy(np.array(picture(3, 64, 33))).permute(2, 0, 1)
    got = eval_transform(SIZE)(pixels)
    resized = picture(3, 64, 33).resize(SIZE[::-1], Image.Resampling.BICUBIC)
    plain = torch.from_numpy(np.array(resized)).permute(2, 0, 1).double() / 255
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    assert got.dtype == torch.float32
    assert got.shape == (3, *SIZE)
    # Pillow and torchvision may differ by one step in 255 after the resize.
    torch.testing.assert_close(got.double(), (plain - mean) / std, rtol=0, atol=1.1 / 255 / 0.22)


def test_normalisation_of_an_image_of_the_right_size_is_exact():
    pixels = torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8)
    got = eval_transform(SIZE, (0.1, 0.2, 0.3), (0.5, 1.0, 2.0))(pixels)
    mean = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64).view(3, 1, 1)
    torch.testing.assert_close(got.double(), (pixels / 255.0 - mean) / std, rtol=1e-5, atol=1e-5)


def random_part(**options):
    """A transform with one kind of augmentation, undoing nothing else."""
    off = {"flip": 0.0, "pad": 0, "erase": 0.0, "color_jitter": 0.0}
    return train_transform(SIZE, **{**off, **options}, mean=(0, 0, 0), std=(1, 1, 1))


def test_each_augmentation_does_what_it_says():
    torch.manual_seed(0)
    pixels = torch.randint(1, 256, (3, *SIZE), dtype=torch.uint8)
    plain = pixels / 255.0
    assert torch.equal(random_part()(pixels), plain)
    assert torch.equal(random_part(flip=1.0)(pixels), plain.flip(-1))

    flips = sum(torch.equal(random_part(flip=0.5)(pixels), plain) for _ in range(200))
    assert 60 < flips < 140

    padded = torch.nn.functional.pad(plain, (4, 4, 4, 4))
    places = set()
    for _ in range(50):
        got = random_part(pad=4)(pixels)
        found = [
            (y, x)
            for y in range(9)
            for x in range(9)
            if torch.equal(padded[:, y : y + SIZE[0], x : x + SIZE[1]], got)
        ]
        assert len(found) == 1
        places.add(found[0])
    assert len(places) > 20

    for _ in range(20):
        gone = (random_part(erase=1.0)(pixels) == 0).all(dim=0)
        rows, columns = gone.any(dim=1).nonzero(), gone.any(dim=0).nonzero()
        box = gone[rows[0, 0] : rows[-1, 0] + 1, columns[0, 0] : columns[-1, 0] + 1]
        assert box.all()
        assert 0.005 < gone.float().mean() < 0.45

    assert not torch.equal(random_part(color_jitter=0.5)(pixels), plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flip": 1.5}, r"flip must be in \[0, 1\]"),
        ({"erase": -0.1}, "erase must be in"),
        ({"color_jitter": 2}, "color_jitter must be in"),
        ({"pad": -1}, "pad must be at least 0"),
        ({"std": (0.0, 1.0, 1.0)}, "std positive"),
    ],
)
def test_bad_augmentations(options, message):
    with pytest.raises(ValueError, match=message):
        train_transform(SIZE, **options)


def test_bad_sizes():
    with pytest.raises(ValueError, match="height and width"):
        train_transform((0, 5))
    with pytest.raises(ValueError, match="height and width"):
        eval_transform((5,))


# ---- data sets and loaders ----


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


# ---- cache ----

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
