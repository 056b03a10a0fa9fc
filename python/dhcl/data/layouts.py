"""How published data sets lie on disk: folders, file names, counts, and where to find them.

Layouts and counts are those of the releases as their owners and the field's public loaders give
them: Market-1501's readme (Zheng et al. 2015); DukeMTMC-reID's readme (Zheng et al. 2017);
torchreid's and fast-reid's loaders for MSMT17 (Wei et al. 2018), VeRi-776 (Liu et al. 2016) and
VehicleID (Liu et al. 2016); person-re-ranking's ``CUHK03-NP`` readme (Zhong et al. 2017);
Cluster Contrast's and OpenUnReID's loaders for PersonX (Sun and Zheng 2019).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dhcl.errors import DataError
from dhcl.words import did_you_mean, first_ones, plain, show

__all__ = [
    "DATASETS",
    "FAMILIES",
    "LAYOUTS",
    "SPLITS",
    "Layout",
    "child",
    "find_layout",
    "has_all",
    "missing_layout",
    "needed",
    "resolve",
    "usual_places",
]


@dataclass(frozen=True)
class Layout:
    """What a published data set's folder looks like, and what it is known to hold."""

    title: str
    homes: tuple[str, ...]  # usual names of the folder
    tree: dict[str, str]  # what lies in it -> what that is
    counts: dict[str, tuple[int, int]]  # split -> published images and identities
    cameras: int  # published number of cameras
    folders: tuple[str, ...] = ("bounding_box_train", "query", "bounding_box_test")
    camera_numbers: tuple[int, ...] = ()  # where they are not 1, 2, ...
    notes: tuple[str, ...] = ()


SPLITS = ("train", "query", "gallery")


def _folders(train: int, query: int, gallery: int, example: str) -> dict[str, str]:
    return {
        "bounding_box_train/": f"{train:,} images to train on, e.g. {example}",
        "query/": f"{query:,} images",
        "bounding_box_test/": f"{gallery:,} images, the gallery",
    }


def _cuhk03(kind: str, train: int, gallery: int) -> Layout:
    return Layout(
        f"CUHK03-NP ({kind})",
        ("cuhk03-np", "cuhk03_np", "cuhk03", kind),
        _folders(train, 1400, gallery, "0003_c1_21.png"),
        {"train": (train, 767), "query": (1400, 700), "gallery": (gallery, 700)},
        2,
    )


def _msmt17(version: str, train: str, test: str) -> Layout:
    return Layout(
        f"MSMT17 {version}",
        ("msmt17", f"msmt17_{version.lower()}"),
        {
            f"{train}/": "0000/0000_000_01_0303morning_0008_0.jpg …",
            f"{test}/": "V1 has train/ and test/, V2 mask_train_v2/ and mask_test_v2/",
            "list_train.txt": "a line is a path below the folder and an identity",
            "list_query.txt": "",
            "list_gallery.txt": "",
        },
        # 32,621 are list_train.txt and list_val.txt together, as unsupervised methods train.
        {"train": (32621, 1041), "query": (11659, 3060), "gallery": (82161, 3060)},
        15,
        (train, test),
    )


# The gallery of Market-1501 has 3,819 further junk boxes (id -1); id 0 are its distractors.
LAYOUTS = {
    "market1501": Layout(
        "Market-1501",
        ("market1501", "market-1501-v15.09.15", "market-1501"),
        _folders(12936, 3368, 19732, "0002_c1s1_000451_03.jpg"),
        {"train": (12936, 751), "query": (3368, 750), "gallery": (15913, 751)},
        6,
    ),
    "dukemtmc": Layout(
        "DukeMTMC-reID",
        ("dukemtmc", "dukemtmc-reid", "dukemtmcreid"),
        _folders(16522, 2228, 17661, "0005_c2_f0046985.jpg"),
        {"train": (16522, 702), "query": (2228, 702), "gallery": (17661, 1110)},
        8,
        notes=("DukeMTMC was withdrawn by its owners.",),
    ),
    "msmt17_v1": _msmt17("V1", "train", "test"),
    "msmt17_v2": _msmt17("V2", "mask_train_v2", "mask_test_v2"),
    "cuhk03-np-labeled": _cuhk03("labeled", 7368, 5328),
    "cuhk03-np-detected": _cuhk03("detected", 7365, 5332),
    "personx": Layout(
        "PersonX",
        ("personx",),
        _folders(9840, 5136, 30816, "0001_c3_1.jpg"),
        {"train": (9840, 410), "query": (5136, 856), "gallery": (30816, 856)},
        6,
        camera_numbers=(3, 4, 8, 10, 11, 12),
    ),
    "veri776": Layout(
        "VeRi-776",
        ("veri776", "veri-776", "veri"),
        {
            "image_train/": "37,778 images to train on, e.g. 0001_c001_00016450_0.jpg",
            "image_query/": "1,678 images",
            "image_test/": "11,579 images, the gallery",
        },
        {"train": (37778, 576), "query": (1678, 200), "gallery": (11579, 200)},
        20,
        ("image_train", "image_query", "image_test"),
    ),
}


def _vehicleid(size: int, images: int) -> Layout:
    return Layout(
        f"VehicleID (test list of {size:,})",
        ("vehicleid", "vehicleid_v1.0"),
        {
            "image/": "0000001.jpg …",
            "train_test_split/train_list.txt": "a line is the number of an image and a vehicle",
            f"train_test_split/test_list_{size}.txt": "",
        },
        {"train": (113346, 13164), "query": (images - size, size), "gallery": (size, size)},
        0,
        notes=(
            "The gallery is the first image of each vehicle in the list, the queries are all "
            "others. Published figures average over ten random choices.",
        ),
    )


for _size, _images in ((800, 6493), (1600, 13377), (2400, 19777)):
    LAYOUTS[f"vehicleid-{_size}"] = _vehicleid(_size, _images)

# A name that leaves a choice -> the layouts it may be, the preferred one first.
FAMILIES = {
    "msmt17": ("msmt17_v1", "msmt17_v2"),
    "cuhk03-np": ("cuhk03-np-detected", "cuhk03-np-labeled"),
    "vehicleid": ("vehicleid-800", "vehicleid-1600", "vehicleid-2400"),
}

DATASETS = (*sorted((*LAYOUTS, *FAMILIES)), "folder")
"""Every name that :func:`load_data` takes."""


def resolve(name: str) -> str:
    """The name in :data:`DATASETS` that this is, whatever its case and punctuation.

    Raises:
        DataError: there is none; says which one is near.
    """
    for each in DATASETS:
        if plain(each) == plain(name):
            return each
    hint = did_you_mean(name, DATASETS)
    raise DataError(f"data set: no such name (got {name!r}{hint}) Known: {', '.join(DATASETS)}")


def child(folder: Path, relative: str) -> Path | None:
    """The entry at this path, whatever its case (releases write ``mask_train_V2`` too)."""
    for part in relative.rstrip("/").split("/"):
        exact = folder / part
        if not exact.exists():
            same = [p for p in sorted(folder.glob("*")) if p.name.lower() == part.lower()]
            if not same:
                return None
            exact = same[0]
        folder = exact
    return folder


def has_all(folder: Path, entries: Iterable[str]) -> bool:
    """Whether every entry is in the folder."""
    return all(child(folder, entry) for entry in entries)


def needed(layout: Layout, training: bool) -> list[str]:
    """The entries of a layout's tree that must be there, with those to train on or without."""
    return [e for e in layout.tree if training or "train" not in e.rstrip("/").rsplit("/", 1)[-1]]


def usual_places(root: Path, homes: tuple[str, ...]) -> list[Path]:
    """The root, folders in it with a usual name, and such folders in those."""
    places, level = [root], [root]
    for _ in range(2):
        inside = (p for f in level for p in sorted(f.glob("*")))
        level = [p for p in inside if p.name.lower() in homes and p.is_dir()]
        places += level
    return places


def find_layout(key: str, root: Path, training: bool = True) -> Path:
    """The folder in which a layout's whole tree lies: the root, or one in it.

    Folders in it have a usual name, or else are the only one with that tree whose name is not that
    of another data set.

    Args:
        key: name of the layout.
        root: where to look.
        training: what is to train on must be there too.

    Raises:
        DataError: as :func:`missing_layout` puts it.
    """
    layout = LAYOUTS[key]
    entries = needed(layout, training)
    for place in usual_places(root, layout.homes):
        if has_all(place, entries):
            return place
    others = {home for each in LAYOUTS.values() for home in each.homes}
    inside = [p for p in sorted(root.glob("*")) if p.is_dir() and p.name.lower() not in others]
    found = [place for place in inside if has_all(place, entries)]
    if len(found) > 1:
        names = " and ".join(show(place.name) for place in found)
        raise DataError(f"{key}: the root must be one data set (got {names} in {show(root)})")
    if found:
        return found[0]
    raise missing_layout(key, root, training)


def missing_layout(key: str, root: Path, training: bool = True) -> DataError:
    """An error that says what is missing where most of the tree is, and what the tree must be."""
    layout = LAYOUTS[key]
    best = max(
        usual_places(root, layout.homes), key=lambda p: sum(bool(child(p, e)) for e in layout.tree)
    )
    absent = [entry for entry in needed(layout, training) if child(best, entry) is None]
    width = max(map(len, layout.tree)) + 2
    tree = "\n".join(f"    {e:<{width}}{what}".rstrip() for e, what in layout.tree.items())
    there = [p for p in sorted(root.glob("*")) if p.is_dir() and not p.name.startswith(".")]
    folders = ", ".join(first_ones([f"{show(p.name)}/" for p in there])) or "no folders"
    return DataError(
        f"{key}: {', '.join(absent)} missing in {show(best)}\nExpected of {layout.title}, in that "
        f"folder or in one named {' or '.join(layout.homes)} within:\n{tree}\n"
        f"There are {folders}; --data folder reads other layouts of train, query and gallery."
    )
