"""Small data sets in the layouts of the releases."""

from PIL import Image


def jpeg(path, colour=(10, 200, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 8), colour).save(path)
    return path


def market(home, suffix=".jpg", cameras=(1, 2), *, folders=None):
    """Two identities to train on, two others to find, one distractor and one junk box."""
    train, query, gallery = folders or ("bounding_box_train", "query", "bounding_box_test")
    for camera in cameras:
        for one in ("0002", "0007"):
            jpeg(home / train / f"{one}_c{camera}s1_000451_03{suffix}")
        for one in ("0001", "0003"):
            jpeg(home / query / f"{one}_c{camera}s1_000001_00{suffix}")
            jpeg(home / gallery / f"{one}_c{camera}s1_000002_00{suffix}")
    jpeg(home / gallery / f"0000_c{cameras[0]}s1_000002_00{suffix}")
    jpeg(home / gallery / f"-1_c{cameras[0]}s1_000003_00{suffix}")
    (home / train / "Thumbs.db").write_bytes(b"\0")
    return home


def msmt(home, version=1):
    train, test = ("train", "test") if version == 1 else ("mask_train_v2", "mask_test_v2")
    lists = {"train": [], "val": [], "query": [], "gallery": []}
    for one in range(2):
        for camera in (1, 15):
            name = f"{one:04}/{one:04}_00{one}_{camera:02}_0303morning_0008_{camera}.jpg"
            jpeg(home / train / name)
            jpeg(home / test / name)
            lists["train" if camera == 1 else "val"].append((name, one))
            lists["query" if camera == 1 else "gallery"].append((name, one))
    for name, pairs in lists.items():
        (home / f"list_{name}.txt").write_text("".join(f"{p} {i}\n" for p, i in pairs))
    return home


def vehicleid(home, lines=("0000001 5", "0000002 5", "0000003 9", "0000004 5")):
    (home / "train_test_split").mkdir(parents=True, exist_ok=True)
    for line in lines:
        jpeg(home / "image" / f"{line.split()[0]}.jpg")
    for name in ("train_list", "test_list_800", "test_list_1600", "test_list_2400"):
        (home / "train_test_split" / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return home


def names(images):
    return [path.name for path in images.paths]


FOLDER = [
    "cam10/Ärger/b 1.JPG",
    "cam2/007/a.png",
    "cam2/7/x.webp",
    "cam2/12/c.jpeg",
    "cam2/-1/junk.bmp",
    "somewhere/张伟.tif",
]


def folder(root):
    for name in FOLDER:
        jpeg(root / name)
    jpeg(root / ".hidden" / "d.jpg")
    jpeg(root / "cam2" / ".e.jpg")
    (root / "notes.txt").write_text("not an image")
    return root


def as_tuple(images):
    return images.paths, images.ids.tolist(), images.cameras.tolist()
