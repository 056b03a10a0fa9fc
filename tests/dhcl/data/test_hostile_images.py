"""Files of images that would end the process, fill the memory or be waited for without end."""

import os
import random
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import dhcl.data.images
import dhcl.data.limits
import pytest
from dhcl.data import DataError, check_images, read_image
from dhcl.data.images import thumbnail
from PIL import Image

from tests.dhcl.data.pictures import encoded, images_in, list_of, picture

KINDS = ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"]

# Every file is read as training, indexing and reports read it, and is pixels or a named error.
CHILD = """
import sys
import warnings
from pathlib import Path
from dhcl.data import DataError, check_images, read_image
from dhcl.data.images import thumbnail
from tests.dhcl.data.pictures import list_of

warnings.simplefilter("ignore")  # Pillow's, of damaged metadata
files = sorted(Path(sys.argv[1]).iterdir())
read = set()
for path in files:
    try:
        assert read_image(path).shape[0] == 3
        read.add(path)
    except DataError as error:
        assert path.name in str(error)
    try:
        thumbnail(path, 16)
    except Exception:
        pass
good, _ = check_images({"train": list_of(files)}, on_bad="skip")
assert set(good["train"].paths) == read
print(len(files), len(read))
"""


def whole_chunks(png):
    """The PNG with every CRC as its chunk's bytes now want it."""
    data, at = bytearray(png), 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        data[end : end + 4] = zlib.crc32(data[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(data)


def mutants(kind, count=120):
    """Files with flipped bits, and every fourth cut short; of PNG also some with right CRCs."""
    draw = random.Random(kind)
    shapes = [{}, {"progressive": True} if kind == "JPEG" else {"lossless": kind == "WEBP"}]
    good = [encoded(picture(i, 96, 48), kind, **options) for i, options in enumerate(shapes)]
    for index in range(count):
        data = bytearray(good[index % 2])
        if index % 4 == 3:
            del data[draw.randrange(1, len(data)) :]
        for _ in range(draw.choice([0, 1, 8]) if index % 4 == 3 else draw.choice([1, 1, 8])):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        if index == 0:
            data = bytearray(good[0])
            data[len(data) // 2] ^= 1
        # In the compressed data, which then is what is damaged, and not the chunk.
        if kind == "PNG" and index % 4 == 1:
            data = bytearray(good[1])
            data[draw.randrange(43, len(data) - 20)] ^= 1 << draw.randrange(8)
            data = whole_chunks(data)
        yield bytes(data)


def test_damaged_images_are_bad_files_and_end_no_process(tmp_path):
    """Of every format 120 files, in a process of its own, which must end as others do."""
    for kind in KINDS:
        for index, data in enumerate(mutants(kind)):
            (tmp_path / f"{kind} {index:03}.{kind.lower()}").write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    total, read = map(int, done.stdout.split())
    assert total == 120 * len(KINDS)
    assert 0 < read < total


# ---- sizes ---------------------------------------------------------------------------------------


def bomb(kind, side, **options):
    """A small file whose header claims ``side`` rows and columns."""
    data = bytearray(encoded(picture(), kind, **options))
    if kind == "PNG":
        data[16:24] = struct.pack(">II", side, side)
        return whole_chunks(data)
    if kind == "JPEG":
        at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
        data[at + 5 : at + 9] = struct.pack(">HH", side, side)
    elif kind == "BMP":
        data[18:26] = struct.pack("<ii", side, side)
    elif kind == "GIF":
        data[6:10] = struct.pack("<HH", side, side)
    elif data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little") >> 28 << 28
        data[21:25] = (bits | (side - 1) << 14 | side - 1).to_bytes(4, "little")
    elif data[12:16] == b"VP8X":
        data[24:30] = (side - 1).to_bytes(3, "little") * 2
    elif kind == "WEBP":
        data[26:30] = struct.pack("<HH", side, side)
    else:
        (start,) = struct.unpack_from("<I", data, 4)
        (count,) = struct.unpack_from("<H", data, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            if struct.unpack_from("<H", data, entry)[0] in (256, 257):  # columns, rows
                struct.pack_into("<HII", data, entry + 2, 4, 1, side)
    return bytes(data)


EXIF = b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0"
SORTS = [(kind, {}) for kind in KINDS]
SORTS += [("JPEG", {"progressive": True}), ("WEBP", {"lossless": True}), ("WEBP", {"exif": EXIF})]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9000, 16000])
@pytest.mark.parametrize(("kind", "options"), SORTS)
def test_an_image_of_too_many_pixels_is_refused_by_its_header(
    tmp_path, monkeypatch, kind, options, side
):
    path = tmp_path / f"a.{kind.lower()}"
    path.write_bytes(bomb(kind, side, **options))
    words = f"at most 67,108,864 pixels .got {side:,} x {side:,}; DHCL_MAX_PIXELS"
    if side == 16000 and kind in ("BMP", "TIFF", "GIF"):
        words = "exceeds limit of 178956970 pixels"  # Pillow's own comes first

    def decoded(*_, **__):
        raise AssertionError("it was decoded")

    with monkeypatch.context() as patch:
        if dhcl.data.images.decode_image is not None:
            patch.setattr("dhcl.data.images.decode_image", decoded)
        patch.setattr("PIL.ImageFile.ImageFile.load", decoded)
        for read in (read_image, lambda path: thumbnail(path, 16)):
            with pytest.raises((DataError, Image.DecompressionBombError), match=words):
                read(path)
    good = images_in(tmp_path / "good", 1).paths
    _, report = check_images({"train": list_of([*good, path])}, on_bad="skip")
    assert [bad.path for bad in report.bad] == [path]


@pytest.mark.parametrize(("kind", "options"), SORTS)
def test_the_limit_of_pixels_is_the_environments(tmp_path, monkeypatch, kind, options):
    path = tmp_path / f"a.{kind.lower()}"
    path.write_bytes(encoded(picture(height=40, width=20), kind, **options))
    monkeypatch.setenv("DHCL_MAX_PIXELS", "800")
    assert read_image(path).shape == (3, 40, 20)
    with Image.open(path) as opened:
        assert dhcl.data.images.as_pixels(opened).shape == (3, 40, 20)
    monkeypatch.setenv("DHCL_MAX_PIXELS", "799")
    with pytest.raises(DataError, match=r"at most 799 pixels .got 40 x 20; DHCL_MAX_PIXELS"):
        read_image(path)
    with (
        Image.open(path) as opened,
        pytest.raises(DataError, match=r"at most 799 pixels .got 40 x 20; DHCL_MAX_PIXELS"),
    ):
        dhcl.data.images.as_pixels(opened)
    monkeypatch.setenv("DHCL_MAX_PIXELS", "many")
    with pytest.raises(DataError, match="DHCL_MAX_PIXELS: must be a whole number of at least 1"):
        read_image(path)


@pytest.mark.parametrize(
    "before",
    [
        *(b"\xff\xfe\x00\x04ab", b"\xff\xff\xff\xfe\x00\x02", b"junk", b"\xff\x00\xff\x01"),
        *(b"\xff\xe1\x00\x0a\xff\xc0\x00\x0b\x08\x00\x01\x00", b"\xff\xfe\x00\x00"),
    ],
    ids=["comment", "filled", "junk", "stuffed", "a frame within metadata", "no length"],
)
def test_the_size_of_a_jpeg_is_the_one_that_is_decoded(before):
    data = encoded(picture(height=40, width=20))
    assert dhcl.data.limits._size_of_jpeg(data[:2] + before + data[2:]) == (20, 40)
    for cut in range(data.find(b"\xff\xc0") + 9):
        assert dhcl.data.limits._size_of_jpeg(data[:cut]) is None


# ---- what is no file of an image -----------------------------------------------------------------


@pytest.fixture
def odd(tmp_path):
    """Names of images that are something else, with the words of their reasons."""
    root = tmp_path / "odd"
    root.mkdir()
    (root / "zero.jpg").symlink_to("/dev/zero")
    os.mkfifo(root / "fifo.jpg")
    (root / "folder.jpg").mkdir()
    (root / "gone.jpg").symlink_to(root / "nowhere.jpg")
    with (root / "long.jpg").open("wb") as file:
        file.truncate((1 << 28) + 1)  # takes no room on the disk
    here = os.open(".", os.O_RDONLY)
    try:
        os.chdir(root)  # a socket's path must be short
        socket.socket(socket.AF_UNIX).bind("socket.jpg")
    finally:
        os.chdir(here)
        os.close(here)
    return {
        root / "zero.jpg": "not a regular file",
        root / "fifo.jpg": "not a regular file",
        root / "folder.jpg": "Is a directory",
        root / "gone.jpg": "No such file or directory",
        root / "socket.jpg": "No such device or address",
        root / "long.jpg": "at most 268,435,456 bytes (got 268,435,457; DHCL_MAX_IMAGE_BYTES",
    }


def test_what_is_no_regular_file_is_a_bad_file(tmp_path, odd):
    for path, words in odd.items():
        with pytest.raises(DataError) as error:
            read_image(path)
        assert path.name in str(error.value)
        assert words in str(error.value)
        with pytest.raises((DataError, OSError)):
            thumbnail(path, 16)
    good = images_in(tmp_path / "good", 2).paths
    lists, report = check_images({"train": list_of([*good, *odd])}, on_bad="skip")
    assert lists["train"].paths == tuple(good)
    assert {bad.path for bad in report.bad} == set(odd)
    for bad in report.bad:
        assert odd[bad.path] in bad.reason


def test_the_limit_of_bytes_is_the_environments(tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(picture()))
    size = path.stat().st_size
    monkeypatch.setenv("DHCL_MAX_IMAGE_BYTES", str(size))
    assert read_image(path).shape == (3, 40, 20)
    monkeypatch.setenv("DHCL_MAX_IMAGE_BYTES", str(size - 1))
    with pytest.raises(DataError, match=rf"at most {size - 1:,} bytes .got {size:,}"):
        read_image(Path(path))


@pytest.mark.parametrize("kind", ["EPS", "PDF", "SGI", "ICO"])
def test_other_formats_of_pillow_are_no_images(tmp_path, kind):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png", kind)
    with pytest.raises(DataError, match="not an image"):
        read_image(tmp_path / "a.png")
