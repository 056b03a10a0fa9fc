import os
import shutil
import subprocess
import sys
from pathlib import Path

import dhcl
import numpy as np
import pytest
import torch
from dhcl import ReID
from dhcl.config import ConfigError, read_run, with_changes
from dhcl.data import DataError, image_files, path_reader, training_cameras
from dhcl.models import build_model
from dhcl.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from dhcl.training.engine import Engine
from dhcl.training.evaluation import Evaluator
from dhcl.training.labels import pseudo_labels
from dhcl.training.runs import open_data
from PIL import Image

from dhcl_ops import cluster, knn, rerank
from tests.dhcl.data.pictures import encoded


@pytest.fixture(scope="module")
def files(pictures):
    return image_files(pictures / "query")


def test_features_are_those_of_evaluation(model, run, pictures):
    """Equal to what the trainer's own evaluation extracts, cameras and all."""
    config = read_run(run)
    engine = Engine(config)
    data = open_data(config.data, engine, quiet=True)
    expected = engine.extract(model.model, engine.images(data.query, model.model), "query")
    got = model.features(data.query.paths, data.query.cameras)
    assert torch.allclose(got, expected, atol=1e-6)
    assert Evaluator(engine, data, model.model)(model.model)["queries"] == len(data.query)
    assert got.dtype == torch.float32
    assert got.shape == (16, model.dim)
    assert torch.allclose(got.norm(dim=1), torch.ones(16))


def test_every_form_of_an_image_gives_the_same(model, files, pictures):
    expected = model.features(files)
    arrays = np.stack([np.array(Image.open(file)) for file in files])
    for form in (
        pictures / "query",
        str(pictures / "query"),
        [str(file) for file in files],
        [Image.open(file) for file in files],
        list(arrays),
        arrays,
        torch.from_numpy(arrays),
    ):
        assert torch.equal(model.features(form), expected)
    assert torch.allclose(model.features(files[0]), expected[:1], atol=1e-6)
    assert torch.allclose(model.features(Image.open(files[0])), expected[:1], atol=1e-6)


def test_a_picture_is_turned_upright_from_a_file_and_from_pillow(model, files, tmp_path):
    upright = Image.open(files[0])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    turned = tmp_path / "turned.png"
    upright.transpose(Image.Transpose.ROTATE_90).save(turned, exif=exif)
    assert torch.equal(model.features(turned), model.features([files[0]]))
    assert torch.equal(model.features(Image.open(turned)), model.features([files[0]]))


def test_batches_and_workers_do_not_show(model, files):
    expected = model.features(files)
    assert torch.allclose(model.features(files, batch_size=3), expected, atol=1e-6)
    assert torch.equal(
        model.features(files, workers=2, batch_size=8), model.features(files, batch_size=8)
    )


def test_cameras_choose_statistics_and_unknown_ones_fall_back(model, files):
    assert model.num_cameras == 2
    general = model.features(files)
    assert torch.equal(model.features(files, [-1] * len(files)), general)
    assert torch.equal(model.features(files, [7] * len(files)), general)
    first = model.features(files, torch.zeros(len(files), dtype=torch.int64))
    assert not torch.allclose(first, general, atol=1e-3)
    mixed = model.features(files, [0] * 8 + [-1] * 8)
    assert torch.allclose(mixed[:8], first[:8], atol=1e-6)
    assert torch.allclose(mixed[8:], general[8:], atol=1e-6)
    for wrong in ([0], torch.zeros(len(files))):
        with pytest.raises(ValueError, match="cameras: must be 16 whole numbers"):
            model.features(files, wrong)


def test_camera_names_of_the_training(model, pictures, tmp_path):
    assert model.camera_indices([1, 2, 9, "x", -1]) == [0, 1, 8, -1, -1]
    assert model.camera_indices(["1", "02", " 9 ", np.int64(3), ""]) == [0, 1, 8, 2, -1]
    folder = tmp_path / "folder"
    for camera in ("north", "03", "12"):
        (folder / camera).mkdir(parents=True)
        (folder / camera / "1.png").touch()
    table = training_cameras("folder", folder, r"^(?P<camera>\w+)/")
    assert table == {3: 0, 12: 1, "north": 2}
    with pytest.raises(DataError, match="cameras: those of the training are unknown"):
        training_cameras("folder", folder, None)
    assert training_cameras("personx", "/none", None)[10] == 3


def test_paths_say_who_and_where():
    read = path_reader(r"(?P<id>-?\w+)_c(?P<camera>\d+)")
    assert read("0007_c02.jpg") == (7, 2)
    assert read("-1_c02.jpg") == (-1, 2)
    assert read("bob_c1.jpg") == ("bob", 1)
    assert read("else.jpg") == (-1, -1)
    assert path_reader(r"c(?P<camera>\d+)")("0007_c02.jpg") == (-1, 2)
    assert path_reader(None)("0007_c02.jpg") == (-1, -1)
    with pytest.raises(DataError, match="must have a group"):
        path_reader("x")


@pytest.fixture
def mixed(files, tmp_path):
    """Two good files, one damaged, one that is no image, with names that are not plain."""
    folder = tmp_path / "crops of ä 人"
    folder.mkdir()
    shutil.copy(files[0], folder / "1 göod.png")
    (folder / "2 cut.png").write_bytes(files[1].read_bytes()[:60])
    shutil.copy(files[2], folder / "3 人.png")
    (folder / "4.jpg").write_text("no image")
    return folder


def test_bad_images_are_refused_by_name_or_skipped(model, files, mixed):
    with pytest.raises(DataError) as error:
        model.features(mixed)
    assert "images: 2 can't be read" in str(error.value)
    assert "2 cut.png" in str(error.value)
    assert "4.jpg" in str(error.value)
    features, kept = model.features(mixed, on_bad="skip")
    assert kept.tolist() == [0, 2]
    assert torch.allclose(features, model.features([files[0], files[2]]), atol=1e-6)
    features, kept = model.features(mixed, [0, 0, 1, 1], on_bad="skip", batch_size=1)
    expected = model.features([files[0], files[2]], [0, 1])
    assert torch.allclose(features, expected, atol=1e-6)
    with pytest.raises(DataError, match="none of 2 can be read"):
        model.features([mixed / "4.jpg", mixed / "5.jpg"], on_bad="skip")


def test_missing_files_are_all_named_before_anything_is_opened(model, mixed):
    missing = [mixed / "5.jpg", mixed / "4.jpg", mixed / "6.jpg"]
    with pytest.raises(DataError) as error:
        model.features(missing)
    assert "images: 2 can't be read" in str(error.value)
    assert "5.jpg: no such file" in str(error.value)
    assert "6.jpg: no such file" in str(error.value)
    cut = Image.open(mixed / "2 cut.png")
    with pytest.raises(DataError, match="images: 1 can't be read"):
        model.features([cut])


def test_what_is_no_file_of_an_image_is_skipped_and_not_waited_for(model, files, tmp_path):
    os.mkfifo(tmp_path / "0.jpg")
    (tmp_path / "1.jpg").symlink_to("/dev/zero")
    (tmp_path / "2.jpg").symlink_to("nowhere")
    damaged = bytearray(encoded(Image.open(files[0]), "PNG"))
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "3.png").write_bytes(damaged)
    shutil.copy(files[0], tmp_path / "4.jpg")
    features, kept = model.features(tmp_path, on_bad="skip")
    assert kept.tolist() == [4]
    assert torch.allclose(features, model.features([files[0]]), atol=1e-6)
    with pytest.raises(DataError) as error:
        model.features(tmp_path / "0.jpg")
    assert "not a regular file" in str(error.value)


@pytest.mark.parametrize(
    "view",
    [
        lambda crop: crop[..., ::-1],
        lambda crop: crop[::-1, ::2],
        np.rot90,
        lambda crop: crop.transpose(1, 0, 2),
        np.asfortranarray,
        lambda crop: np.broadcast_to(crop[:1], crop.shape),
        lambda crop: np.frombuffer(crop.tobytes(), np.uint8).reshape(crop.shape),
        lambda crop: np.lib.stride_tricks.as_strided(crop, crop.shape, (48, 3, 0), writeable=False),
        lambda crop: torch.from_numpy(crop).flip(2).transpose(0, 1),
    ],
    ids=[
        *("bgr", "mirrored", "turned", "transposed", "fortran"),
        *("broadcast", "read-only", "strided", "tensor"),
    ],
)
def test_arrays_of_any_strides_are_their_pixels(model, files, view):
    crop = np.array(Image.open(files[0]))
    before = crop.copy()
    shown = view(crop)
    expected = model.features([Image.fromarray(np.stack([*map(np.asarray, shown)]))])
    assert torch.equal(model.features([shown]), expected)
    whole = np.stack([shown]) if isinstance(shown, np.ndarray) else shown[None]
    assert torch.equal(model.features(whole), expected)
    assert np.array_equal(crop, before)


@pytest.mark.parametrize(
    "turn", [lambda rows: rows[::-1], lambda rows: rows.astype(">f4"), np.asfortranarray]
)
def test_features_of_any_strides_and_byte_order_are_searched(model, files, turn):
    rows = model.features(files).numpy()
    expected = model.search(torch.from_numpy(np.array(turn(rows), np.float32)), rows, topk=3)
    assert torch.equal(model.search(turn(rows), turn(rows)[:0], topk=1).indices, torch.empty(16, 0))
    assert torch.equal(model.search(turn(rows), rows, topk=3).indices, expected.indices)


@pytest.mark.parametrize(
    "empty",
    [
        np.zeros((0, 16, 3), np.uint8)[:, ::-1],
        np.zeros((32, 0, 3), np.uint8),
        torch.zeros(0, 16, 3, dtype=torch.uint8),
        Image.new("RGB", (0, 32)),
    ],
    ids=["rows", "columns", "tensor", "pillow"],
)
def test_crops_without_pixels_are_named_or_skipped(model, files, empty):
    crop = np.array(Image.open(files[0]))
    with pytest.raises(DataError, match=r"1 can't be read\n  1: there are no pixels in it"):
        model.features([crop, empty])
    features, kept = model.features([empty, crop, empty, crop], on_bad="skip", batch_size=2)
    assert kept.tolist() == [1, 3]
    assert torch.allclose(features, model.features([crop, crop]), atol=1e-6)
    # All of a frame's boxes may lie outside; files of which none can be read are a mistake.
    assert model.features([empty, empty], on_bad="skip")[0].shape == (0, model.dim)
    with pytest.raises(DataError, match="none of 2 can be read"):
        model.features([empty, files[0].with_name("gone.png")], on_bad="skip")


@pytest.mark.parametrize(
    "nothing",
    [[], (), iter([]), np.array([]), np.zeros((0, 8, 8, 3), np.uint8), torch.zeros(0)],
    ids=["list", "tuple", "generator", "array", "images", "tensor"],
)
def test_no_crops_have_no_features(model, files, nothing):
    assert model.features(nothing).shape == (0, model.dim)
    features, kept = model.features([], [], on_bad="skip")
    assert features.shape == (0, model.dim)
    assert (kept.shape, kept.dtype) == ((0,), torch.int64)
    for reranked in (False, True):
        assert model.search([], files, rerank=reranked).indices.shape == (0, 16)
        assert model.search(files, [], rerank=reranked).indices.shape == (16, 0)
    assert model.cluster([]).num_clusters == 0


def test_generators_and_arrays_of_files_and_images(model, files):
    expected = model.features(files[:3])
    for form in (
        (Image.open(file) for file in files[:3]),
        map(str, files[:3]),
        np.array([str(file) for file in files[:3]]),
        np.array(files[:3], dtype=object),
    ):
        assert torch.equal(model.features(form), expected)


def test_what_are_no_images(model, tmp_path):
    (tmp_path / "empty").mkdir()
    for wrong, message in (
        (tmp_path / "empty", "images: none in"),
        (tmp_path / "none", "must be a folder"),
    ):
        with pytest.raises(DataError, match=message):
            model.features(wrong)
    for wrong, message in (
        (np.zeros((2, 3, 8, 8), np.uint8), r"must be \(N, H, W, 3\) uint8"),
        (np.zeros((2, 8, 8, 3)), r"must be \(N, H, W, 3\) uint8"),
        ([np.zeros((8, 8), np.uint8)], r"must be \(H, W, 3\) uint8"),
        ([np.zeros((8, 8), np.uint8)], r"at 0; Pillow's Image\.fromarray"),
        ([np.zeros((8, 8, 4), np.uint8)], r"\(8, 8, 4\) uint8 at 0; Pillow's Image\.fromarray"),
        ([np.zeros((8, 8, 3), np.uint16)], r"uint16 at 0; scale it to 0\.\.255"),
        ([np.zeros((8, 8, 3), bool)], r"bool at 0; scale it to 0\.\.255"),
        ([torch.zeros(8, 8, 3)], r"float32 at 0; scale it to 0\.\.255"),
        ([torch.zeros(3, 8, 8, dtype=torch.uint8)], r"at 0; planes go last: permute"),
    ):
        with pytest.raises(ValueError, match=message):
            model.features(wrong)
    for wrong in (3, [3]):
        with pytest.raises(TypeError, match=r"got int"):
            model.features(wrong)
    with pytest.raises(ValueError, match="on_bad"):
        model.features(["x.jpg"], on_bad="ignore")
    with pytest.raises(ValueError, match="batch_size"):
        model.features(["x.jpg"], batch_size=0)


def test_search_is_knn_and_rerank(model, pictures):
    query = model.features(pictures / "query")
    gallery = model.features(pictures / "bounding_box_test")
    expected = knn(gallery, 5, queries=query)
    for found in (
        model.search(pictures / "query", pictures / "bounding_box_test", topk=5),
        model.search(3 * query, gallery.numpy(), topk=5),
    ):
        assert torch.equal(found.indices, expected.indices)
        assert torch.allclose(found.similarities, expected.similarities, atol=1e-6)
        assert found.distances is None
    lists = rerank(query, gallery, topk=5)
    found = model.search(query, gallery, topk=5, rerank=True)
    assert torch.equal(found.indices, lists.indices)
    assert torch.equal(found.distances, lists.distances)
    cosines = (query[:, None] * gallery[found.indices]).sum(2)
    assert torch.allclose(found.similarities, cosines, atol=1e-5)
    assert model.search(query, gallery, topk=99).indices.shape == (16, 16)
    with pytest.raises(ValueError, match=f"features \\(N, {model.dim}\\)"):
        model.search(query[:, 1:], gallery)
    with pytest.raises(ValueError, match=r"finite and not 0 \(got row 1"):
        model.search(torch.stack([query[0], 0 * query[0]]), gallery)
    with pytest.raises(ValueError, match="topk"):
        model.search(query, gallery, topk=0)


def test_cluster_takes_the_runs_numbers(model, pictures):
    folder = pictures / "bounding_box_train"
    features = model.features(folder)
    own = cluster(features, k1=8, k2=3, eps=0.6, min_samples=2)
    assert torch.equal(model.cluster(folder).labels, own.labels)
    other = cluster(features, k1=8, k2=3, eps=0.3, min_samples=2)
    assert torch.equal(model.cluster(features, eps=0.3).labels, other.labels)


@pytest.mark.parametrize("self_paced", [False, True])
@pytest.mark.parametrize("k1_own", [0, 3])
def test_cluster_is_the_runs_clustering(run, pictures, k1_own, self_paced):
    """With its neighbours by camera and its self-paced choice, as its pseudo-labels are made."""
    model = ReID.load(run, device="cpu")
    model.config = with_changes(model.config, {"k1_own": k1_own, "self_paced": self_paced})
    folder = pictures / "bounding_box_train"
    features = model.features(folder)
    names = [path.name for path in image_files(folder)]
    cameras = torch.tensor([int(name[6]) for name in names])
    expected = pseudo_labels(
        features, cameras, model.config.labels, loose=False, threshold=None, progress=nothing
    )
    found = model.cluster(folder)
    assert torch.equal(found.labels, expected.labels)
    assert found.threshold == expected.threshold
    for written in (cameras.tolist(), [f"{c:02d}" for c in cameras.tolist()]):
        assert torch.equal(model.cluster(features, cameras=written).labels, expected.labels)
    plain = model.cluster(folder, k1_own=0, self_paced=False)
    own = cluster(features, k1=8, k2=3, eps=0.6, min_samples=2)
    assert torch.equal(plain.labels, own.labels)


def nothing(*_):
    pass


def test_cluster_by_camera_without_cameras(run, pictures):
    model = ReID.load(run, device="cpu")
    features = model.features(pictures / "query")
    with pytest.raises(ValueError, match=r"k1_own: two cameras at least must be known"):
        model.cluster(features, k1_own=3)
    with pytest.raises(ValueError, match=r"cameras: must be 16, one per image \(got 2\)"):
        model.cluster(features, k1_own=3, cameras=[1, 2])
    model.config = with_changes(model.config, {"k1_own": 3})
    with pytest.warns(UserWarning, match="neighbours are taken from all images alike"):
        found = model.cluster(features)
    assert torch.equal(found.labels, model.cluster(features, k1_own=0).labels)


def test_the_fingerprint_of_a_timm_network_is_of_its_strides_too(model, run):
    name = "timm:mobilenetv3_small_050"
    network = build_model(name, image_size=(64, 32), pretrained=False)
    config = with_changes(model.config, {"backbone": name, "image_size": (64, 32)})
    before = ReID(network, config, run, "last", torch.device("cpu")).id
    next(m for m in network.backbone.modules() if isinstance(m, torch.nn.Conv2d)).stride = (1, 1)
    assert ReID(network, config, run, "last", torch.device("cpu")).id != before


def test_the_fingerprint_is_of_weights_and_preprocessing(model, run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    assert ReID.load(copy, device="cpu").id == model.id
    file = copy / "checkpoints" / "last.pt"
    state = load_checkpoint(file)
    name = next(n for n in state["model"] if n.endswith("weight"))
    state["model"][name].view(-1)[0] += 1e-3
    save_checkpoint(file, state)
    assert ReID.load(copy, device="cpu").id != model.id
    other = shutil.copytree(run, tmp_path / "other")
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("[32, 16]", "[40, 16]"))
    assert ReID.load(other, device="cpu").id != model.id


def test_runs_that_are_none_or_half_written(run, tmp_path):
    with pytest.raises(ConfigError, match="must be the folder of a run"):
        ReID.load(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"it has no config\.yaml"):
        ReID.load(tmp_path)
    half = tmp_path / "half"
    half.mkdir()
    shutil.copy(run / "config.yaml", half)
    with pytest.raises(ConfigError, match="before its first one; dhcl train --resume"):
        ReID.load(half)
    with pytest.raises(ConfigError, match="no checkpoint 'best'; it has last"):
        ReID.load(run, "best")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"torch sees no GPU \(got cuda:0\)"):
            ReID.load(run, device="cuda:0")
    with pytest.raises(ConfigError, match="which"):
        ReID.load(run, "first")
    (half / "checkpoints").mkdir()
    (half / "checkpoints" / "last.pt").write_bytes(b"half a checkpoint")
    with pytest.raises(CheckpointError, match="can't be read"):
        ReID.load(half)


def test_importing_dhcl_stays_cheap():
    code = """
import sys
import dhcl
assert "ReID" in dir(dhcl)
assert not {"torchvision", "accelerate", "timm", "tyro"} & set(sys.modules)
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torchvision", "timm", "accelerate", "yaml"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
try:
    dhcl.ReID
except ModuleNotFoundError as error:
    print(error)
try:
    dhcl.REID
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert "pip install 'dhcl[train]'" in first
    assert second == "module 'dhcl' has no attribute 'REID'"
    assert dhcl.ReID is ReID


def test_repr_names_model_and_run(model, run):
    assert str(run) in repr(model)
    assert "batch norm per camera (2)" in repr(model)
    assert Path(model.run) == run
