"""Image files of every kind, good and bad."""

import io

import numpy as np
from dhcl.data import (
    ImageList,
    load_data,
)
from PIL import Image

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
