"""Checkpoints of other projects as weights: any names, harmless things beside them, no code."""

import argparse
import collections
import functools
import os
import types
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import pytest
import torch
from dhcl.models import build_model


@pytest.fixture(scope="module")
def donor():
    return build_model("small", pretrained=False, image_size=(32, 16), seed=9)


def loaded(file):
    return build_model("small", weights=file, image_size=(32, 16), seed=0)


def backbone_equals(model, donor):
    return all(
        torch.equal(tensor, model.backbone.state_dict()[name])
        for name, tensor in donor.backbone.state_dict().items()
        if not name.endswith("num_batches_tracked")
    )


@pytest.fixture(scope="module")
def resnet():
    return build_model("resnet18", pretrained=False, image_size=(32, 16), seed=9)


def under(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def in_sequence(state, stages):
    """As ``nn.Sequential(resnet.conv1, ...)`` names the tensors of these stages."""
    return {
        f"{stages.index(name.partition('.')[0])}.{name.partition('.')[2]}": tensor
        for name, tensor in state.items()
    }


def other(state):
    """Another network of the same shape."""
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


SPCL_STAGES = ["conv1", "bn1", "maxpool", "layer1", "layer2", "layer3", "layer4"]
CLUSTER_CONTRAST_STAGES = [*SPCL_STAGES[:2], "relu", *SPCL_STAGES[2:]]
NECK = {"module.feat_bn.weight": torch.ones(512), "module.classifier.weight": torch.ones(3, 512)}
CHECKPOINTS = {
    "SpCL": lambda s: {
        "state_dict": under("module.base.", in_sequence(s, SPCL_STAGES)) | NECK,
        "epoch": 50,
        "best_mAP": np.float64(0.73),
    },
    "Cluster Contrast": lambda s: {
        "state_dict": under("module.base.", in_sequence(s, CLUSTER_CONTRAST_STAGES)) | NECK,
        "best_mAP": np.float32(0.8),
    },
    "numbered, by another name": lambda s: under("features.", in_sequence(s, SPCL_STAGES)),
    "torchreid": lambda s: {
        "state_dict": under("module.", s) | {"module.classifier.weight": torch.ones(3, 512)},
        "rank1": np.float64(0.9),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
    },
    "fast-reid": lambda s: {
        "model": under("backbone.", s)
        | {"heads.bottleneck.0.weight": torch.ones(512), "pixel_mean": torch.ones(1, 3, 1, 1)},
        "iteration": 9,
    },
    "OpenUnReID": lambda s: {"state_dict": under("module.backbone.base.", s)},
    "MoCo": lambda s: {
        "arch": "resnet18",
        "state_dict": under("module.encoder_k.", other(s))
        | under("module.encoder_q.", s)
        | {"module.queue": torch.ones(128, 9), "module.encoder_q.fc.0.weight": torch.ones(2, 2)},
    },
    "MoCo v3": lambda s: {
        "state_dict": under("module.momentum_encoder.", other(s)) | under("module.base_encoder.", s)
    },
    "DINO": lambda s: {
        "student": under("module.backbone.", other(s)),
        "teacher": under("backbone.", s) | {"head.mlp.0.weight": torch.ones(2, 2)},
        "args": argparse.Namespace(arch="resnet18", out=Path("runs")),
    },
    "EMA of timm": lambda s: {"state_dict": other(s), "state_dict_ema": s, "metric": 0.1},
    "EMA of DeiT": lambda s: {"model": other(s), "model_ema": s, "args": argparse.Namespace()},
    "EMA in one": lambda s: under("backbone.", other(s)) | under("ema.backbone.", s),
    "Lightning": lambda s: {
        "state_dict": under("model.backbone.", s) | {"loss.weight": torch.ones(3)},
        "hyper_parameters": {"lr": 0.1},
        "callbacks": {},
    },
    "net": lambda s: under("net.", s),
    "deep": lambda s: {"checkpoint": {"networks": {"reid": under("encoder.cnn.", s)}}},
    "ordered": lambda s: {"state_dict": collections.OrderedDict(under("module.", s))},
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoints_of_other_projects_load(tmp_path, resnet, kind, zipped):
    file = tmp_path / "w.pth"
    state = resnet.backbone.state_dict()
    torch.save(CHECKPOINTS[kind](state), file, _use_new_zipfile_serialization=zipped)
    model = build_model("resnet18", weights=file, image_size=(32, 16), seed=1)
    assert backbone_equals(model, resnet)
    assert model.weights.missing == ()
    assert len(model.weights.matched) == model.weights.total


def test_where_the_tensors_were_found_is_said(tmp_path, resnet):
    for kind, part in (("DINO", "teacher."), ("MoCo", "state_dict.module.encoder_q.")):
        torch.save(CHECKPOINTS[kind](resnet.backbone.state_dict()), tmp_path / "w.pth")
        model = build_model("resnet18", weights=tmp_path / "w.pth", image_size=(32, 16))
        assert f"w.pth ({part}*): 100 of 100 tensors loaded" in str(model.weights)


def test_a_whole_model_loads_from_within_a_checkpoint(tmp_path):
    donor = build_model("small", pretrained=False, image_size=(32, 16), seed=3)
    donor.neck.weight.data.uniform_()
    torch.save({"state": under("net.module.", donor.state_dict())}, tmp_path / "w.pth")
    model = loaded(tmp_path / "w.pth")
    assert model.weights.missing == model.weights.unused == ()
    assert torch.equal(model.neck.weight, donor.neck.weight)


def test_a_transformer_by_another_name_loads(tmp_path):
    name = "timm:vit_tiny_patch16_224"
    donor = build_model(name, pretrained=False, image_size=(64, 32), seed=1)
    torch.save({"teacher": under("base.vit.", donor.backbone.state_dict())}, tmp_path / "vit.pth")
    model = build_model(name, weights=tmp_path / "vit.pth", image_size=(96, 48))
    assert model.weights.missing == ()
    assert model.backbone.pos_embed.shape == (1, 1 + 6 * 3, 192)


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_a_checkpoint_that_fits_in_part_is_told_or_refused(tmp_path, resnet, share):
    """Under another project's names as under our own."""
    state = resnet.backbone.state_dict()
    part = dict(list(state.items())[: int(share * len(state))])
    torch.save(CHECKPOINTS["SpCL"](part), tmp_path / "part.pth")
    if share < 0.5:
        with pytest.raises(ValueError, match=r"too little of .*part\.pth fits the backbone"):
            build_model("resnet18", weights=tmp_path / "part.pth", image_size=(32, 16))
        return
    model = build_model("resnet18", weights=tmp_path / "part.pth", image_size=(32, 16))
    assert 0 < len(model.weights.missing) < 50
    assert f"; not in the file: {len(model.weights.missing)}" in str(model.weights)


EXTRAS = {
    "NumPy scalars": {"a": np.float64(1), "b": np.int64(2), "c": np.bool_(True), "d": np.str_("x")},
    "NumPy arrays": {"a": np.arange(3), "b": np.array(["x"]), "c": np.zeros(2, [("f", "f4")])},
    "options": {"args": argparse.Namespace(lr=0.1, out=Path("a"), sizes=(1, 2), none=None)},
    "paths": {"a": Path("a/b"), "b": PurePosixPath("c"), "c": PureWindowsPath("c:/d")},
    "containers": {
        "a": collections.OrderedDict(x=1),
        "b": collections.defaultdict(list, {"x": [1]}),
        "c": collections.defaultdict(float, x=1.0),
        "d": collections.Counter("abc"),
        "e": ({1, 2}, frozenset({3}), range(3), slice(2), 1j, bytearray(b"x")),
        "f": types.SimpleNamespace(x=1),
        "g": collections.deque([1, 2], maxlen=3),
    },
    "kinds": {"a": np.dtype("f4"), "b": torch.float16, "c": torch.device("cpu"), "d": None},
}


@pytest.mark.parametrize("kind", EXTRAS)
@pytest.mark.parametrize("zipped", [True, False])
def test_harmless_things_beside_the_tensors_are_passed_over(tmp_path, donor, kind, zipped):
    content = {"state_dict": donor.backbone.state_dict(), **EXTRAS[kind]}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    assert backbone_equals(loaded(tmp_path / "w.pth"), donor)


class Custom:
    pass


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_names_code_is_refused_with_what_to_do(tmp_path, donor, zipped):
    save = functools.partial(torch.save, _use_new_zipfile_serialization=zipped)
    old, new = tmp_path / "old.pth", tmp_path / "weights.pth"
    for content, name in (
        ({"state_dict": donor.backbone.state_dict(), "hooks": Custom()}, f"{__name__}.Custom"),
        ({"state_dict": donor.backbone.state_dict(), "run": os.system}, r"posix\.system"),
    ):
        save(content, old)
        with pytest.raises(ValueError, match=f"more than tensors: {name}; code") as caught:
            loaded(old)
        # What it says to do works.
        steps = [line.strip() for line in str(caught.value).splitlines()[1:]]
        exec("\n".join(steps).replace("weights.pth", str(new)), {"torch": torch})
        assert backbone_equals(loaded(new), donor)
