import dhcl.data.images
import numpy as np
import pytest
import torch
from dhcl.data import (
    DataError,
    check_images,
    read_image,
)
from dhcl.data.images import as_pixels, thumbnail, upright
from PIL import Image

from tests.dhcl.data.pictures import images_in, list_of, picture, spoil

# ---- decoding ------------------------------------------------------------------------------------


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


def of_mode(mode):
    """A picture that is not symmetric, in a mode of Pillow."""
    deep = np.random.default_rng(0).integers(0, 1 << 16, (40, 20), dtype=np.uint16)
    if mode == "I;16B":
        return Image.frombytes(mode, (20, 40), deep.astype(">u2").tobytes())
    if mode in ("I;16", "I"):
        return Image.fromarray(deep if mode == "I;16" else deep.astype(np.int32))
    if mode == "F":
        return Image.fromarray((deep / 256).astype(np.float32))
    if mode == "P with transparency":
        image = picture().quantize(8)
        image.info["transparency"] = 3
        return image
    if mode in ("LAB", "PA"):
        return Image.merge("LAB", picture().split()) if mode == "LAB" else picture().convert("PA")
    return picture().convert(mode)


MODES = ["1", "L", "P", "LA", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"]
MODES += ["P with transparency", "I", "I;16", "I;16B", "F"]


@pytest.mark.parametrize("orientation", [1, 2, 6])
@pytest.mark.parametrize("mode", MODES)
def test_an_opened_file_has_the_pixels_of_the_file(tmp_path, mode, orientation, decoder):
    exif = Image.Exif()
    exif[0x0112] = orientation
    written = []
    for kind in ("PNG", "TIFF", "JPEG", "WEBP", "BMP", "GIF", "PPM", "AVIF"):
        path = tmp_path / f"a.{kind.lower()}"
        try:
            of_mode(mode).save(path, exif=exif)
        except (OSError, KeyError, ValueError):
            continue  # this format has no such mode
        written.append(kind)
        pixels = read_image(path)
        with Image.open(path) as opened:
            assert torch.equal(as_pixels(opened), pixels), kind
        with Image.open(path) as opened:
            assert torch.equal(as_pixels(upright(opened)), pixels), kind
        if kind in ("PNG", "TIFF", "WEBP"):
            assert pixels.shape[1:] == ((20, 40) if orientation == 6 else (40, 20)), kind
    assert len(written) >= 2


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_sixteen_bits_of_pillow_become_eight(mode):
    deep = np.array(of_mode("I;16")).astype(np.int64)
    expected = torch.from_numpy((deep >> 8).astype(np.uint8)).expand(3, -1, -1)
    assert torch.equal(as_pixels(of_mode(mode)), expected)
    beyond = Image.fromarray(np.array([[-5, 1 << 20]], np.int32))
    assert as_pixels(beyond)[0].tolist() == [[0, 255]]


def test_bad_images_raise_with_path_and_reason(tmp_path, decoder):
    for name, words in spoil(tmp_path / "bad").items():
        with pytest.raises(DataError) as caught:
            read_image(tmp_path / "bad" / name)
        assert name in str(caught.value)
        assert words in str(caught.value).lower()
        assert "0x" not in str(caught.value)


# ---- checking ------------------------------------------------------------------------------------


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
