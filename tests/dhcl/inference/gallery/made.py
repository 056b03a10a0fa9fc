"""Indexes of images that are nowhere, for tests of stores."""

import json
import zlib
from dataclasses import asdict

import numpy as np
from dhcl.inference.gallery.places import creating
from dhcl.inference.gallery.schema import About, Record, arrow_batch

WIDTH = 8
MODEL = "ab" * 32
ABOUT = About(
    model=MODEL,
    run="/runs/a",
    which="last",
    pattern=r"(?P<id>\d+)_c(?P<camera>\d)",
    trained_cameras=False,
    roots=("/pictures",),
    width=WIDTH,
)


def unit_rows(count, seed=0, width=WIDTH):
    rows = np.random.default_rng(seed).normal(size=(count, width)).astype("f4")
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def records(count, start=0):
    """Of five people seen by three cameras, a second apart."""
    return [
        Record(0, f"d{n % 2}/{n}_c{n % 3}.png", n % 5, n % 3, 100 + n, 10**18 + n, float(n))
        for n in range(start, start + count)
    ]


def batch(count, start=0, seed=0):
    rows = np.arange(start, start + count)
    return arrow_batch(rows, unit_rows(count, seed), records(count, start), MODEL)


def make(address, count=5, seed=0):
    """An index of so many images."""
    with creating(address, ABOUT) as writer:
        writer.insert(iter([batch(count, seed=seed)]))
    return address


def make_old(folder, count=5, generation=1):
    """An index of format 1, as earlier versions wrote it."""
    folder.mkdir()
    features = unit_rows(count, generation)
    np.save(folder / f"features-{generation}.npy", features)
    lines = [{k: v for k, v in asdict(r).items() if k != "time"} for r in records(count)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / f"images-{generation}.jsonl").write_text(text)
    about = {k: v for k, v in asdict(ABOUT).items() if k != "width"}
    said = {"format": 1, "generation": generation, "images": count, "dim": WIDTH, **about}
    said["roots"] = list(ABOUT.roots)
    fixed = {k: v for k, v in said.items() if k not in ("run", "roots")}
    sums = {
        "head": zlib.crc32(json.dumps(fixed, sort_keys=True).encode()),
        "features": zlib.crc32(features.tobytes()),
        "images": zlib.crc32(text.encode()),
    }
    (folder / "index.json").write_text(json.dumps({**said, "checksums": sums}, indent=1))
    return folder
