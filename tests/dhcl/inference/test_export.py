import csv
import shutil
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from dhcl import ReID
from dhcl.cli import main
from dhcl.config import ConfigError, TrainConfig, with_changes
from dhcl.data import image_files
from dhcl.inference.export import export_features, export_onnx, export_weights, plain_model
from dhcl.inference.features import read_features
from dhcl.models import build_model
from dhcl.training.checkpoint import load_checkpoint, save_checkpoint
from PIL import Image
from torchvision.transforms import v2

PATTERN = r"(?P<id>-?\d+)_c(?P<camera>\d+)"


def untrained(backbone, tmp_path, size=(64, 32)):
    """A model of another backbone whose batch norms are not what they begin as."""
    network = build_model(backbone, pretrained=False, image_size=size, seed=0)
    for name, buffer in network.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.add_(0.1 * torch.rand_like(buffer))
    changes = {"backbone": backbone, "image_size": size, "pretrained": False}
    config = with_changes(TrainConfig(), changes)
    return ReID(network, config, tmp_path)


def resized(model, files):
    """(N, 3, H, W) RGB in [0, 1], without dhcl."""
    resize = v2.Resize(model.image_size, v2.InterpolationMode.BICUBIC, antialias=True)
    images = [torch.from_numpy(np.array(Image.open(file).convert("RGB"))) for file in files]
    return torch.stack([resize(image.permute(2, 0, 1)) for image in images]).float() / 255


# ---- features -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [".npz", ".parquet"])
def test_features_of_a_folder(kind, model, pictures, tmp_path):
    folder = tmp_path / "crops of ä 人"
    shutil.copytree(pictures / "query", folder / "a b")
    shutil.copy(image_files(folder)[0], folder / "else.png")
    out = tmp_path / f"f{kind}"
    rows, left_out = export_features(model, folder, out, pattern=PATTERN, batch_size=5)
    assert (rows, left_out) == (17, [])
    found = read_features(out)
    files = image_files(folder)
    assert list(found.paths) == [file.relative_to(folder).as_posix() for file in files]
    assert torch.allclose(found.values, model.features(files), atol=1e-6)
    assert found.model == model.id
    for path, identity, camera in zip(found.paths, found.ids, found.cameras, strict=True):
        known = path != "else.png"
        assert identity == (int(path.split("/")[1][:4]) if known else -1)
        assert camera == (int(path.split("_c")[1][0]) if known else -1)


def test_without_a_pattern_there_are_paths_alone(model, pictures, tmp_path):
    export_features(model, pictures / "query", tmp_path / "f.npz")
    assert set(read_features(tmp_path / "f.npz").keys) == {"features", "paths", "model"}
    with pytest.raises(ConfigError, match="pattern: must match some path"):
        export_features(model, pictures / "query", tmp_path / "g.npz", pattern="(?P<id>zebra)")
    assert not (tmp_path / "g.npz").exists()


def test_statistics_of_the_cameras(model, pictures, tmp_path):
    files = image_files(pictures / "query")
    cameras = [int(file.name.split("_c")[1][0]) - 1 for file in files]
    options = {"pattern": PATTERN, "trained_cameras": True}
    export_features(model, pictures / "query", tmp_path / "f.npz", **options)
    got = read_features(tmp_path / "f.npz").values
    assert torch.allclose(got, model.features(files, cameras), atol=1e-6)


def test_exported_features_measure_as_the_run_did(run, pictures, tmp_path, capsys):
    import json

    for side in ("query", "bounding_box_test"):
        given = ["export", str(run), "--features", str(pictures / side), "--workers", "0"]
        given += ["--out", str(tmp_path / f"{side}.npz"), "--pattern", PATTERN, "--trained-cameras"]
        assert main(given) == 0
    capsys.readouterr()
    pair = ["--query", str(tmp_path / "query.npz")]
    pair += ["--gallery", str(tmp_path / "bounding_box_test.npz")]
    assert main(["metrics", *pair, "--json"]) == 0
    got = json.loads(capsys.readouterr().out)["features"]
    stored = json.loads((run / "metrics.json").read_text())["last"]
    assert got["mAP"] == pytest.approx(stored["mAP"], abs=1e-6)
    assert got["rank1"] == stored["rank1"]


def test_bad_images_are_refused_or_left_out(model, run, pictures, tmp_path, capsys):
    folder = tmp_path / "crops"
    shutil.copytree(pictures / "query", folder)
    bad = image_files(folder)[3]
    bad.write_bytes(b"no image")
    out = tmp_path / "f.npz"
    given = ["export", str(run), "--features", str(folder), "--out", str(out), "--workers", "0"]
    assert main(given) == 2
    assert bad.name in capsys.readouterr().err
    assert not out.exists()
    assert main([*given, "--on-bad", "skip"]) == 0
    captured = capsys.readouterr()
    assert bad.name in captured.err
    assert "features of 15 images" in captured.out
    assert bad.name not in read_features(out).paths


def test_cluster_of_a_folder(model, run, pictures, tmp_path, capsys):
    folder, out = pictures / "bounding_box_train", tmp_path / "labels.csv"
    given = ["cluster", str(folder), "--run", str(run), "--out", str(out), "--workers", "0"]
    assert main(given) == 0
    assert "k1 8, k2 3, eps 0.6, min_samples 2" in capsys.readouterr().out
    rows = list(csv.reader(out.open()))
    assert rows[0] == ["path", "label"]
    assert [name for name, _ in rows[1:]] == [file.name for file in image_files(folder)]
    assert [int(label) for _, label in rows[1:]] == model.cluster(folder).labels.tolist()
    assert main([*given, "--pattern", PATTERN, "--trained-cameras"]) == 0
    cameras = [int(file.name.split("_c")[1][0]) - 1 for file in image_files(folder)]
    labels = model.cluster(model.features(folder, cameras)).labels.tolist()
    rows = list(csv.reader(out.open()))
    assert [int(label) for _, label in rows[1:]] == labels
    assert main([*given, "--pattern", "(?P<id>.)", "--trained-cameras"]) == 2
    assert "in a group named camera" in capsys.readouterr().err


# ---- weights ------------------------------------------------------------------------------------


def test_a_plain_model_has_the_features_of_unseen_cameras_or_of_one(model, pictures):
    images = (
        resized(model, image_files(pictures / "query"))
        - torch.tensor(model.model.mean).view(3, 1, 1)
    ) / torch.tensor(model.model.std).view(3, 1, 1)
    before = model.id
    for camera in (None, 1):
        plain = plain_model(model.model, camera)
        with torch.no_grad():
            seen = None if camera is None else torch.full((len(images),), camera)
            assert torch.allclose(plain(images), model.model(images, seen), atol=1e-5)
    assert ReID(model.model, model.config, model.run).id == before
    with pytest.raises(ConfigError, match=r"cameras 0 to 1 \(got 2\)"):
        plain_model(model.model, 2)


def test_a_camera_of_few_images_has_no_statistics(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    state = load_checkpoint(copy / "checkpoints" / "last.pt")
    for name, tensor in state["model"].items():
        if name.endswith("camera_images"):
            tensor[1] = 3
    save_checkpoint(copy / "checkpoints" / "last.pt", state)
    with pytest.raises(ConfigError, match="those of camera 1 rest on 3"):
        export_weights(ReID.load(copy, device="cpu"), tmp_path / "w.pt", camera=1)
    assert not (tmp_path / "w.pt").exists()


def test_weights_load_into_torchvision(tmp_path):
    import torchvision

    model = untrained("resnet18", tmp_path)
    export_weights(model, tmp_path / "w.pt")
    state = torch.load(tmp_path / "w.pt", weights_only=True)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert {name.split(".")[0] for name in state} == {"backbone", "neck", "pool"}
    network = torchvision.models.resnet18()
    backbone = {
        n.removeprefix("backbone."): t for n, t in state.items() if n.startswith("backbone")
    }
    missing, unexpected = network.load_state_dict(backbone, strict=False)
    assert set(missing) == {"fc.weight", "fc.bias"}
    assert not unexpected
    # The whole model, by hand.
    for layer in (network.layer4[0].conv1, network.layer4[0].downsample[0]):
        layer.stride = (1, 1)
    network.eval()
    images = torch.rand(2, 3, 64, 32)
    with torch.no_grad():
        maps = torch.nn.Sequential(*list(network.children())[:-2])(images)
        pooled = maps.clamp(min=1e-6).pow(state["pool.power"]).mean((2, 3))
        pooled = pooled.pow(1 / state["pool.power"])
        names = ("running_mean", "running_var", "weight", "bias")
        neck = torch.nn.functional.batch_norm(pooled, *(state[f"neck.{name}"] for name in names))
        got = torch.nn.functional.normalize(neck)
        assert torch.allclose(got, model.model(images), atol=1e-5)


def test_weights_load_into_timm_and_back_into_dhcl(tmp_path):
    import timm

    model = untrained("vit_small", tmp_path)
    export_weights(model, tmp_path / "w.pt")
    state = torch.load(tmp_path / "w.pt", weights_only=True)
    network = timm.create_model("vit_small_patch16_224", num_classes=0, img_size=(64, 32))
    network.load_state_dict(
        {n.removeprefix("backbone."): t for n, t in state.items() if n.startswith("backbone.")}
    )
    again = build_model("vit_small", weights=tmp_path / "w.pt", image_size=(64, 32)).eval()
    images = torch.rand(2, 3, 64, 32)
    with torch.no_grad():
        assert torch.allclose(again(images), model.model(images), atol=1e-6)


# ---- ONNX ---------------------------------------------------------------------------------------


def test_onnx_gives_the_features_of_images(model, pictures, tmp_path):
    out = tmp_path / "new folder" / "m.onnx"
    assert export_onnx(model, out) < 1e-5
    assert [file.name for file in out.parent.iterdir()] == ["m.onnx"]
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map["dhcl.model"] == model.id
    files = image_files(pictures / "query")
    images = resized(model, files).numpy()
    expected = model.features(files).numpy()
    for count in (1, 7, 16):
        [got] = session.run(["features"], {"images": images[:count]})
        assert np.abs(got - expected[:count]).max() < 1e-5
    export_onnx(model, out, camera=1)
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    [got] = session.run(None, {"images": images})
    assert np.abs(got - model.features(files, [1] * 16).numpy()).max() < 1e-5


@pytest.mark.parametrize("backbone", ["resnet18", "vit_small"])
def test_onnx_of_libraries_networks(backbone, tmp_path):
    assert export_onnx(untrained(backbone, tmp_path), tmp_path / "m.onnx") < 1e-5


def test_onnx_that_differs_is_not_written(model, tmp_path, monkeypatch):
    class Off:
        def __init__(self, *args, **options):
            self.real = real(*args, **options)

        def run(self, names, inputs):
            [features] = self.real.run(names, inputs)
            return [features + (2e-4 if len(features) > 1 else 0)]

    real = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", Off)
    with pytest.raises(ConfigError, match=r"must equal torch's .*got a difference of 0\.0002"):
        export_onnx(model, tmp_path / "m.onnx")
    assert not any(tmp_path.iterdir())


def test_without_the_extra_one_line_says_what_to_install(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main(["export", str(run), "--onnx", str(tmp_path / "m.onnx")]) == 2
    assert "onnx: needs onnxscript: pip install 'dhcl[export]'" in capsys.readouterr().err


# ---- the command --------------------------------------------------------------------------------


def test_the_command_writes_weights_and_onnx(run, tmp_path, capsys):
    weights, onnx = tmp_path / "w.pt", tmp_path / "m.onnx"
    assert main(["export", str(run), "--weights", str(weights), "--onnx", str(onnx)]) == 0
    out = capsys.readouterr().out
    assert "45 tensors, 40 of backbone, 1 of pool, 4 of neck" in out
    assert "images (batch, 3, 32, 16), RGB in [0, 1], to features (batch, 512)" in out
    assert weights.exists()
    assert onnx.exists()


MISTAKES = {
    "nothing": ([], "what must be said"),
    "no out": (["--features", "FOLDER"], "go together"),
    "no features": (["--out", "OUT.npz", "--weights", "OUT.pt"], "go together"),
    "other kind": (["--features", "FOLDER", "--out", "OUT.csv"], "must be written to .npz"),
    "no folder": (["--features", "OUT", "--out", "OUT.npz"], "must be a folder"),
    "no pattern": (["--features", "FOLDER", "--out", "OUT.npz", "--trained-cameras"], "--pattern"),
    "no camera": (["--weights", "OUT.pt", "--camera", "2"], "cameras 0 to 1 (got 2)"),
    "no best": (["--weights", "OUT.pt", "--which", "best"], "no checkpoint 'best'"),
    "no option": (["--wheights", "OUT.pt"], "--weights"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_message_and_status_2(mistake, run, pictures, tmp_path, capsys):
    arguments, message = MISTAKES[mistake]
    arguments = [each.replace("OUT", str(tmp_path / "OUT")) for each in arguments]
    arguments = [each.replace("FOLDER", str(pictures / "query")) for each in arguments]
    assert main(["export", str(run), *arguments]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors
    assert not any(tmp_path.iterdir())
