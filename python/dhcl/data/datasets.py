"""Data sets on disk: which files belong to training, query and gallery, who and which camera.

Layouts and counts are those of the releases as their owners and the field's public loaders give
them: Market-1501's readme (Zheng et al. 2015); DukeMTMC-reID's readme (Zheng et al. 2017);
torchreid's and fast-reid's loaders for MSMT17 (Wei et al. 2018), VeRi-776 (Liu et al. 2016) and
VehicleID (Liu et al. 2016); person-re-ranking's ``CUHK03-NP`` readme (Zhong et al. 2017);
Cluster Contrast's and OpenUnReID's loaders for PersonX (Sun and Zheng 2019).

Identities are read for evaluation only. Training gets :attr:`ReIDData.unlabeled`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dhcl.errors import DataError
from dhcl.words import did_you_mean, plain, show

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

Integers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ImageList:
    """Images with what is known of them.

    Attributes:
        paths: N files.
        ids: (N,) int64 identities, -1 for junk or unknown.
        cameras: (N,) int64 cameras from 0 in the order of the data set's own numbers, -1 unknown.
    """

    paths: tuple[Path, ...]
    ids: Integers
    cameras: Integers

    def __post_init__(self) -> None:
        for name in ("ids", "cameras"):
            values = np.asarray(getattr(self, name))
            if values.shape != (len(self.paths),) or values.dtype.kind != "i":
                raise ValueError(
                    f"ImageList: {name} must be {len(self.paths)} integers, one per path "
                    f"(got shape {values.shape}, {values.dtype})"
                )
            object.__setattr__(self, name, values.astype(np.int64))

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def num_ids(self) -> int:
        """How many identities occur, junk and unknown not counted."""
        return len(np.unique(self.ids[self.ids >= 0]))

    @property
    def num_cameras(self) -> int:
        """The highest camera plus one, so that a table of this length has a row for each."""
        return int(np.max(self.cameras, initial=-1)) + 1

    def select(self, indices: Sequence[int] | NDArray[Any]) -> ImageList:
        """The images at these indices (integers, or N booleans), in that order."""
        chosen = np.arange(len(self))[np.asarray(indices, dtype=None if len(indices) else np.int64)]
        return ImageList(
            tuple(self.paths[i] for i in chosen), self.ids[chosen], self.cameras[chosen]
        )


def _image_list(paths: Iterable[Path], ids: Iterable[int], cameras: Iterable[int]) -> ImageList:
    return ImageList(tuple(paths), np.array(list(ids), np.int64), np.array(list(cameras), np.int64))


_NONE = _image_list((), (), ())


@dataclass
class ReIDData:
    """A data set: what to train on, and, where there is any, what to evaluate on.

    Attributes:
        name: as given to :func:`load_data`, with the version found (``msmt17_v1``).
        root: the folder the paths lie in.
        train, query, gallery: images; query and gallery are empty where the data has none.
        description: text for the log, with counts beside the published ones.
    """

    name: str
    root: Path
    train: ImageList
    query: ImageList
    gallery: ImageList
    description: str

    @property
    def has_identities(self) -> bool:
        """Whether identities of training images are known (to look at, never to train with)."""
        return self.train.num_ids > 0

    @property
    def can_evaluate(self) -> bool:
        """Whether some query identity is in the gallery."""
        known = self.query.ids[self.query.ids >= 0]
        return bool(np.isin(known, self.gallery.ids).any())

    @property
    def unlabeled(self) -> ImageList:
        """The training images with every identity -1: all that a trainer may see."""
        return replace(self.train, ids=np.full(len(self.train), -1, np.int64))


# ---- layouts ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    title: str
    homes: tuple[str, ...]  # usual names of the folder
    tree: dict[str, str]  # what lies in it -> what that is
    counts: dict[str, tuple[int, int]]  # split -> published images and identities
    cameras: int  # published number of cameras
    folders: tuple[str, ...] = ("bounding_box_train", "query", "bounding_box_test")
    camera_numbers: tuple[int, ...] = ()  # where they are not 1, 2, ...
    notes: tuple[str, ...] = ()


_SPLITS = ("train", "query", "gallery")


def _folders(train: int, query: int, gallery: int, example: str) -> dict[str, str]:
    return {
        "bounding_box_train/": f"{train:,} images to train on, e.g. {example}",
        "query/": f"{query:,} images",
        "bounding_box_test/": f"{gallery:,} images, the gallery",
    }


def _cuhk03(kind: str, train: int, gallery: int) -> _Layout:
    return _Layout(
        f"CUHK03-NP ({kind})",
        ("cuhk03-np", "cuhk03_np", "cuhk03", kind),
        _folders(train, 1400, gallery, "0003_c1_21.png"),
        {"train": (train, 767), "query": (1400, 700), "gallery": (gallery, 700)},
        2,
    )


def _msmt17(version: str, train: str, test: str) -> _Layout:
    return _Layout(
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
_LAYOUTS = {
    "market1501": _Layout(
        "Market-1501",
        ("market1501", "market-1501-v15.09.15", "market-1501"),
        _folders(12936, 3368, 19732, "0002_c1s1_000451_03.jpg"),
        {"train": (12936, 751), "query": (3368, 750), "gallery": (15913, 751)},
        6,
    ),
    "dukemtmc": _Layout(
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
    "personx": _Layout(
        "PersonX",
        ("personx",),
        _folders(9840, 5136, 30816, "0001_c3_1.jpg"),
        {"train": (9840, 410), "query": (5136, 856), "gallery": (30816, 856)},
        6,
        camera_numbers=(3, 4, 8, 10, 11, 12),
    ),
    "veri776": _Layout(
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


def _vehicleid(size: int, images: int) -> _Layout:
    return _Layout(
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
    _LAYOUTS[f"vehicleid-{_size}"] = _vehicleid(_size, _images)

# A name that leaves a choice -> the layouts it may be, the preferred one first.
_FAMILIES = {
    "msmt17": ("msmt17_v1", "msmt17_v2"),
    "cuhk03-np": ("cuhk03-np-detected", "cuhk03-np-labeled"),
    "vehicleid": ("vehicleid-800", "vehicleid-1600", "vehicleid-2400"),
}

DATASETS = (*sorted((*_LAYOUTS, *_FAMILIES)), "folder")
"""Every name that :func:`load_data` takes."""


def load_data(name: str, root: str | Path, *, pattern: str | None = None) -> ReIDData:
    """Find a data set's files and read identities and cameras off their names or lists.

    No image is opened; :func:`dhcl.data.check_images` does that.

    Args:
        name: one of :data:`DATASETS`; case and punctuation do not matter. ``msmt17`` takes the
            version it finds and says which; ``msmt17_v1`` and ``msmt17_v2`` refuse the other.
            ``cuhk03-np`` takes the detected boxes where both kinds are there. ``vehicleid`` is the
            smallest test list, 800 vehicles. ``market1501`` serves any data in that layout.
        root: the data set's folder, or one that holds it under its usual name.
        pattern: for ``folder`` only, a regular expression with a group named ``id``, or
            ``camera``, or both, searched in each path below the root, written with ``/``:
            ``(?P<camera>cam\\d+)/(?P<id>[^/]+)/``. What the groups hold may be any text. Whole
            numbers keep their value as identity, and -1 is junk; other texts are numbered after
            them in sorted order. Cameras are numbered from 0 in sorted order. Images that do not
            match are unknown (-1). Without a pattern nothing is known.

    A ``folder`` is searched through all levels, in sorted order, without hidden files. Folders
    ``train`` (or ``bounding_box_train``), ``query`` and ``gallery`` (or ``bounding_box_test``)
    directly in it are the splits if there are at least two of them; otherwise everything is to
    train on.

    Raises:
        DataError: no such name (with the nearest), folders or files missing (with the tree that
            is expected), the wrong version, file names or lines that do not fit, no images.
    """
    key = _resolve(name)
    root = Path(os.path.abspath(Path(root).expanduser()))
    if not root.is_dir():
        what = "a file" if root.exists() else "nothing"
        raise DataError(f"{key}: the root must be a folder (got {what} at {show(root)})")
    if key == "folder":
        return _load_folder(root, pattern)
    if pattern is not None:
        raise DataError(f"{key}: a pattern is for 'folder' only (got {pattern!r})")
    if key.startswith("msmt17"):
        return _load_msmt17(key, root)
    if key.startswith("cuhk03"):
        return _load_cuhk03(key, root)
    if key.startswith("vehicleid"):
        return _load_vehicleid(_FAMILIES.get(key, (key,))[0], root)
    home = _find(key, root)
    notes = _veri_lists(home) if key == "veri776" else []
    return _load_named(key, home, _LAYOUTS[key].folders, notes)


def _resolve(name: str) -> str:
    for each in DATASETS:
        if plain(each) == plain(name):
            return each
    hint = did_you_mean(name, DATASETS)
    raise DataError(f"data set: no such name (got {name!r}{hint}) Known: {', '.join(DATASETS)}")


def _child(folder: Path, relative: str) -> Path | None:
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


def _complete(folder: Path, entries: Iterable[str]) -> bool:
    return all(_child(folder, entry) for entry in entries)


def _places(root: Path, homes: tuple[str, ...]) -> list[Path]:
    """The root, folders in it with a usual name, and such folders in those."""
    places, level = [root], [root]
    for _ in range(2):
        inside = (p for f in level for p in sorted(f.glob("*")))
        level = [p for p in inside if p.name.lower() in homes and p.is_dir()]
        places += level
    return places


def _find(key: str, root: Path) -> Path:
    layout = _LAYOUTS[key]
    for place in _places(root, layout.homes):
        if _complete(place, layout.tree):
            return place
    raise _missing(key, root)


def _missing(key: str, root: Path) -> DataError:
    layout = _LAYOUTS[key]
    best = max(
        _places(root, layout.homes), key=lambda p: sum(bool(_child(p, e)) for e in layout.tree)
    )
    absent = [entry for entry in layout.tree if _child(best, entry) is None]
    width = max(map(len, layout.tree)) + 2
    tree = "\n".join(f"    {e:<{width}}{what}".rstrip() for e, what in layout.tree.items())
    return DataError(
        f"{key}: {', '.join(absent)} missing in {show(best)}\nExpected of {layout.title}, in that "
        f"folder or in one named {' or '.join(layout.homes)} within:\n{tree}"
    )


def _files(folder: Path) -> list[Path]:
    """Images below a folder, sorted by path; hidden files and what macOS leaves are skipped."""
    found: list[Path] = []
    seen: set[str] = set()
    for where, inside, names in os.walk(folder, followlinks=True):
        # A link to a folder above would lead round in circles.
        real = os.path.realpath(where)
        if real in seen:
            inside.clear()
            continue
        seen.add(real)
        inside[:] = sorted(d for d in inside if not d.startswith(".") and d != "__MACOSX")
        found += (
            Path(where, name)
            for name in names
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
        )
    return sorted(found, key=Path.as_posix)


_NAME = re.compile(r"(-?\d+)_c(\d+)")


def _named_files(key: str, folder: Path) -> ImageList:
    """Images whose names begin with identity and camera, as in Market-1501."""
    numbers = _LAYOUTS[key].camera_numbers
    paths = _files(folder)
    matches = [_NAME.match(path.name) for path in paths]
    strange = [path for path, match in zip(paths, matches, strict=True) if match is None]
    if strange:
        raise DataError(
            f"{key}: names must begin like 0002_c1 with identity and camera (got {len(strange)} "
            f"that do not, the first {show(strange[0])})"
        )
    ids = [int(match[1]) for match in matches if match]
    cameras = [int(match[2]) for match in matches if match]
    for path, one, camera in zip(paths, ids, cameras, strict=True):
        if one < -1 or camera < 1 or (numbers and camera not in numbers):
            rule = f"one of {numbers}" if numbers else "at least 1"
            raise DataError(
                f"{key}: identities must be at least -1 and cameras {rule} (got {show(path)})"
            )
    return _image_list(paths, ids, (numbers.index(c) if numbers else c - 1 for c in cameras))


def _load_named(
    key: str, home: Path, folders: tuple[str, ...], notes: Sequence[str] = ()
) -> ReIDData:
    splits = [_named_files(key, _child(home, folder) or home) for folder in folders]
    return _data(key, home, splits, list(notes))


def _veri_lists(home: Path) -> list[str]:
    """What VeRi's name lists leave out: public loaders take all images of the folders."""
    notes = []
    for split in ("train", "query", "test"):
        listed = _child(home, f"name_{split}.txt")
        folder = _child(home, f"image_{split}")
        if listed and folder:
            names = {line.strip() for line in _lines(listed)}
            extra = sum(path.name not in names for path in _files(folder))
            if extra:
                notes.append(f"{extra:,} images of image_{split} are not in {listed.name}.")
    return notes


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"list: must be a text file (got {show(path)}: {error})") from error
    return [line for line in text.splitlines() if line.strip()]


def _listed(key: str, path: Path) -> list[tuple[str, int]]:
    """Lines of a name and an identity."""
    pairs = []
    for number, line in enumerate(_lines(path), 1):
        name, _, one = line.strip().rpartition(" ")
        if not name or not re.fullmatch(r"\d{1,18}", one):
            raise DataError(
                f"{key}: a line must be a name, a blank and an identity "
                f"(got {line!r} in line {number} of {show(path)})"
            )
        pairs.append((name.strip(), int(one)))
    return pairs


def _load_msmt17(key: str, root: Path) -> ReIDData:
    homes = ("msmt17", "msmt17_v1", "msmt17_v2")
    market = _LAYOUTS["market1501"].folders
    found: dict[str, Path] = {}
    for place in _places(root, homes):
        for version in _FAMILIES["msmt17"]:
            if _complete(place, _LAYOUTS[version].tree):
                found.setdefault(version, place)
        # Repacked in Market-1501's layout, only the folder's name tells the version.
        if place.name.lower() in _FAMILIES["msmt17"] and _complete(place, market):
            found.setdefault(place.name.lower(), place)
    if key == "msmt17" and len(found) == 2:
        places = " and ".join(show(place) for place in found.values())
        raise DataError(f"msmt17: both versions are there; name msmt17_v1 or msmt17_v2 ({places})")
    version = next(iter(found), "msmt17_v1") if key == "msmt17" else key
    if version not in found:
        for other, place in found.items():
            raise DataError(
                f"{key}: must be {_LAYOUTS[key].title} (got {_LAYOUTS[other].title} in "
                f"{show(place)}); results on the two differ, since V2 has blurred faces"
            )
        raise _missing(version, root)
    home = found[version]
    if not _complete(home, _LAYOUTS[version].tree):
        return _load_named(version, home, market, ["Repacked in Market-1501's layout."])
    train, test = (_child(home, folder) or home for folder in _LAYOUTS[version].folders)
    splits = [_msmt17_list(version, home, f"list_{s}.txt", test) for s in ("query", "gallery")]
    training = _msmt17_list(version, home, "list_train.txt", train)
    notes = []
    if _child(home, "list_val.txt"):
        training = _joined(training, _msmt17_list(version, home, "list_val.txt", train))
        notes.append("Training images are those of list_train.txt and list_val.txt.")
    return _data(version, home, [training, *splits], notes)


def _msmt17_list(key: str, home: Path, name: str, folder: Path) -> ImageList:
    pairs = _listed(key, _child(home, name) or home / name)
    cameras = []
    for relative, _ in pairs:
        # 0000/0000_000_01_0303morning_0008_0.jpg is of camera 01
        camera = re.fullmatch(r"[^_]+_[^_]+_(\d{1,2})_.*", relative.rsplit("/", 1)[-1])
        if camera is None or int(camera[1]) < 1:
            raise DataError(f"{key}: names must be like 0000_000_01_… (got {relative!r} in {name})")
        cameras.append(int(camera[1]) - 1)
    return _image_list((folder / p for p, _ in pairs), (i for _, i in pairs), cameras)


def _joined(first: ImageList, second: ImageList) -> ImageList:
    return ImageList(
        first.paths + second.paths,
        np.concatenate((first.ids, second.ids)),
        np.concatenate((first.cameras, second.cameras)),
    )


def _load_cuhk03(key: str, root: Path) -> ReIDData:
    kinds = _FAMILIES.get(key, (key,))
    for kind in kinds:
        boxes = kind.rsplit("-", 1)[-1]
        other = "labeled" if boxes == "detected" else "detected"
        for place in _places(root, _LAYOUTS[kind].homes):
            # A folder of another name may hold either kind: it is taken for the one asked for.
            fits = place.name.lower() == boxes or (kind == key and place.name.lower() != other)
            if fits and _complete(place, _LAYOUTS[kind].tree):
                both = kind != key and _child(place.parent, other)
                notes = [f"The {other} boxes are here too: cuhk03-np-{other}."] if both else []
                return _load_named(kind, place, _LAYOUTS[kind].folders, notes)
    raise _missing(kinds[0], root)


def _load_vehicleid(key: str, root: Path) -> ReIDData:
    home = _find(key, root)
    images = _child(home, "image") or home
    lists = [entry for entry in _LAYOUTS[key].tree if entry.endswith(".txt")]
    train, test = (_listed(key, _child(home, entry) or home / entry) for entry in lists)
    gallery: dict[int, tuple[str, int]] = {}
    for pair in test:
        gallery.setdefault(pair[1], pair)
    query = [pair for pair in test if gallery[pair[1]] is not pair]
    splits = [
        _image_list(
            (images / f"{n}.jpg" for n, _ in pairs), (i for _, i in pairs), [-1] * len(pairs)
        )
        for pairs in (train, query, list(gallery.values()))
    ]
    return _data(key, home, splits, [])


# ---- any folder ---------------------------------------------------------------------------------

_FOLDER_SPLITS = (
    ("train", "bounding_box_train"),
    ("query",),
    ("gallery", "bounding_box_test"),
)


def _load_folder(root: Path, pattern: str | None) -> ReIDData:
    folders = [
        next((root / name for name in names if (root / name).is_dir()), None)
        for names in _FOLDER_SPLITS
    ]
    if sum(folder is not None for folder in folders) < 2:
        folders = [root, None, None]
    files = [_files(folder) if folder else [] for folder in folders]
    every = [path for split in files for path in split]
    if not every:
        raise DataError(
            f"folder: no images in {show(root)} (looked for {' '.join(IMAGE_SUFFIXES)} "
            "on all levels)"
        )
    notes: list[str] = []
    ids = cameras = [-1] * len(every)
    if pattern is not None:
        texts = _matched(pattern, root, every, notes)
        ids = _numbered(texts["id"], keep_numbers=True)
        cameras = _numbered(texts["camera"], keep_numbers=False)
    splits, start = [], 0
    for split in files:
        part = slice(start, start := start + len(split))
        splits.append(_image_list(split, ids[part], cameras[part]))
    return _data("folder", root, splits, notes)


def _matched(
    pattern: str, root: Path, paths: list[Path], notes: list[str]
) -> dict[str, list[str | None]]:
    """What the groups ``id`` and ``camera`` hold for each path, None where there is nothing."""
    expression = _compiled(pattern)
    matches = [expression.search(path.relative_to(root).as_posix()) for path in paths]
    unmatched = [path for path, match in zip(paths, matches, strict=True) if match is None]
    if len(unmatched) == len(paths):
        raise DataError(
            f"pattern: must match some path below the root (got {pattern!r}, which does not match "
            f"{show(paths[0].relative_to(root).as_posix())!r})"
        )
    if unmatched:
        first = show(unmatched[0].relative_to(root).as_posix())
        notes.append(f"{len(unmatched):,} images do not match the pattern, the first {first!r}.")
    texts: dict[str, list[str | None]] = {"id": [None] * len(paths), "camera": [None] * len(paths)}
    for group in expression.groupindex.keys() & texts:
        texts[group] = [match[group] if match else None for match in matches]
    return texts


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise DataError(
            f"pattern: must be a regular expression (got {pattern!r}: {error})"
        ) from error
    if not expression.groupindex.keys() & {"id", "camera"}:
        raise DataError(
            f"pattern: must have a group (?P<id>...) or (?P<camera>...) (got {pattern!r})"
        )
    return expression


def _value(text: str | None) -> int | str:
    """A whole number for its digits (``7`` for ``007``), other texts as they are, -1 for none."""
    if not text:
        return -1
    return int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else text


def _numbered(texts: Sequence[str | None], *, keep_numbers: bool) -> list[int]:
    """A number for each text: equal for equal texts (``7`` equals ``007``), -1 for nothing."""
    values = [_value(text) for text in texts]
    numbers = sorted({v for v in values if isinstance(v, int) and v != -1})
    words = sorted({v for v in values if isinstance(v, str)})
    if keep_numbers and numbers and numbers[0] < -1:
        raise DataError(f"pattern: identities must be at least -1 (got {numbers[0]})")
    table: dict[int | str, int] = {-1: -1}
    table |= {v: v for v in numbers} if keep_numbers else {v: i for i, v in enumerate(numbers)}
    first = max(table.values(), default=-1) + 1
    table |= {word: first + i for i, word in enumerate(words)}
    return [table[v] for v in values]


def image_files(folder: str | Path) -> list[Path]:
    """Images on all levels below a folder, in sorted order, without hidden files.

    Raises:
        DataError: no such folder, or no images in it.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        what = "a file" if folder.exists() else "nothing"
        raise DataError(f"images: must be a folder (got {what} at {show(folder)})")
    files = _files(folder)
    if not files:
        raise DataError(
            f"images: none in {show(folder)} (looked for {' '.join(IMAGE_SUFFIXES)} on all levels)"
        )
    return files


def path_reader(pattern: str | None) -> Callable[[str], tuple[int | str, int | str]]:
    """What reads identity and camera off a path: whole numbers or other texts, -1 for unknown.

    Args:
        pattern: as of :func:`load_data`; None knows nothing of any path.

    Raises:
        DataError: not a regular expression, or one without the groups.
    """
    if pattern is None:
        return lambda path: (-1, -1)
    expression = _compiled(pattern)

    def read(path: str) -> tuple[int | str, int | str]:
        match = expression.search(path)
        found = match.groupdict() if match else {}
        return _value(found.get("id")), _value(found.get("camera"))

    return read


def training_cameras(name: str, root: str | Path, pattern: str | None) -> dict[int | str, int]:
    """The camera index of :func:`load_data` for each camera as the paths name it.

    Of a folder, its files are listed again.

    Raises:
        DataError: as :func:`load_data`; a data set whose paths name no cameras.
    """
    key = _resolve(name)
    if key.startswith("vehicleid") or (key == "folder" and pattern is None):
        raise DataError(f"cameras: those of the training are unknown ({key}, pattern {pattern!r})")
    if key != "folder":
        numbers = _LAYOUTS[_FAMILIES.get(key, (key,))[0]].camera_numbers or range(1, 1000)
        return {number: index for index, number in enumerate(numbers)}
    data = load_data(key, root, pattern=pattern)
    read = path_reader(pattern)
    table = {}
    for images in (data.train, data.query, data.gallery):
        for path, camera in zip(images.paths, images.cameras, strict=True):
            table[read(path.relative_to(data.root).as_posix())[1]] = int(camera)
    return {camera: index for camera, index in table.items() if index >= 0}


# ---- description --------------------------------------------------------------------------------


def _data(key: str, home: Path, splits: list[ImageList], notes: list[str]) -> ReIDData:
    layout = _LAYOUTS.get(key)
    if layout and not len(splits[0]):
        raise DataError(f"{key}: no images to train on in {show(home)}")
    text = _describe(layout, key, home, splits, notes)
    return ReIDData(key, home, splits[0], splits[1], splits[2], text)


def _describe(
    layout: _Layout | None, key: str, home: Path, splits: list[ImageList], notes: list[str]
) -> str:
    """A table of what was found, beside what is published."""
    rows = [["", "images", "ids", "cameras"]]
    if layout:
        rows[0] = ["", "images", "published", "ids", "published", "cameras"]
    differs = False
    for split, images in zip(_SPLITS, splits, strict=True):
        if not len(images) and not layout:
            continue
        cameras = len(np.unique(images.cameras[images.cameras >= 0]))
        # Published counts of a gallery leave junk out.
        known = int((images.ids >= 0).sum()) if layout else len(images)
        cells = [split, f"{known:,}", f"{images.num_ids:,}", f"{cameras:,}"]
        if layout:
            published = layout.counts[split]
            off = (known, images.num_ids) != published
            differs |= off
            cells[2:2] = [f"{published[0]:,}"]
            cells[4:4] = [f"{published[1]:,}"]
            cells[0] += " *" if off else ""
        rows.append(cells)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if not i else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    everyone = np.concatenate([images.cameras for images in splits])
    cameras = len(np.unique(everyone[everyone >= 0]))
    title = "Folder of images"
    if layout:
        title = f"{layout.title} ({key})"
        if differs:
            lines.append("* differs from the published count.")
        if cameras != layout.cameras:
            lines.append(f"{cameras} cameras where {layout.cameras} are published.")
        if not differs and cameras == layout.cameras:
            lines.append("All counts are as published.")
        junk = sum(int((images.ids < 0).sum()) for images in splits)
        if junk:
            lines.append(f"{junk:,} junk images (id -1) besides.")
        notes = [*notes, *layout.notes]
    else:
        if not any(images.num_ids for images in splits):
            lines.append("No identities are known: it can be trained on, not evaluated.")
        if not cameras:
            lines.append("No cameras are known.")
    return "\n".join([f"{title} in {show(home)}", *lines, *notes])
