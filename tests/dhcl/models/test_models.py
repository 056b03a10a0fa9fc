import contextlib
import re
import threading

import huggingface_hub
import pytest
import torch
from dhcl import models
from dhcl.models import (
    MIN_IMAGES,
    CameraBatchNorm,
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    UnavailableWeights,
    build_model,
    calibrate,
    using_cameras,
)
from torch import nn
from torch.nn import functional as F


def images(n, h=32, w=16, *, seed=0):
    return torch.randn(n, 3, h, w, generator=torch.Generator().manual_seed(seed))


def small(**options):
    options = {"image_size": (32, 16), "pretrained": False, "seed": 0} | options
    return build_model("small", **options)


def randomised(norm, seed=0):
    """Parameters and running statistics other than those of a new layer."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in norm.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return norm


# ---- forward ----


@pytest.mark.parametrize(
    ("name", "options", "dim"),
    [
        ("small", {}, 512),
        ("small", {"pooling": "avg"}, 256),
        ("small", {"num_cameras": 3}, 512),
        ("resnet18", {}, 512),
        ("resnet18", {"pooling": "avg-halves", "samples_per_bn": 3}, 1024),
        ("resnet50_ibn_a", {}, 2048),
        ("vit_small", {}, 384),
        ("timm:vit_tiny_patch16_224", {"pooling": "avg-halves"}, 384),
        ("timm:convnext_atto", {}, 320),
        ("timm:swin_tiny_patch4_window7_224", {"image_size": (224, 112)}, 768),
    ],
)
def test_features_have_unit_length(name, options, dim):
    size = options.pop("image_size", (64, 32))
    model = build_model(name, pretrained=False, image_size=size, seed=0, **options)
    cameras = torch.tensor([0, 1, 2, -1, 9])
    for mode in (True, False):
        features = model.train(mode)(images(5, *size), cameras)
        assert features.shape == (5, dim)
        assert model.dim == dim
        torch.testing.assert_close(features.norm(dim=1), torch.ones(5))
    assert f"{dim} features" in model.description
    assert len(model.mean) == len(model.std) == 3


@pytest.mark.parametrize("name", ["resnet50", "resnet18"])
def test_last_stage_keeps_its_size(name):
    model = build_model(name, pretrained=False)
    assert "256 x 128 to 16 x 8" in model.description
    with torch.no_grad():
        assert model.eval().maps(images(1, 256, 128)).shape[2:] == (16, 8)


def test_instance_norm_takes_half_of_the_channels():
    model = build_model("resnet50_ibn_a", pretrained=False, image_size=(32, 16))
    norm = randomised(model.backbone.get_submodule("layer2.1.bn1")).eval()
    x = images(2, 5, 4).repeat(1, 43, 1, 1)[:, :128]
    first, second = x[:, :64], x[:, 64:]
    expected = [
        F.instance_norm(first, weight=norm.IN.weight, bias=norm.IN.bias),
        F.batch_norm(
            second, norm.BN.running_mean, norm.BN.running_var, norm.BN.weight, norm.BN.bias
        ),
    ]
    torch.testing.assert_close(norm(x), torch.cat(expected, 1))
    names = set(model.state_dict())
    assert "backbone.layer3.5.bn1.IN.weight" in names
    assert "backbone.layer4.0.bn1.running_mean" in names
    assert "backbone.bn1.running_mean" in names


def test_pooling_follows_its_formula():
    x = images(4)
    for pooling in ("avg", "gem", "avg-halves", "gem-halves"):
        model = small(pooling=pooling).eval()
        with torch.no_grad():
            maps = model.maps(x)
            parts = [maps[:, :, :2], maps[:, :, 2:]] if "halves" in pooling else [maps]
            if "gem" in pooling:
                means = [p.clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3) for p in parts]
            else:
                means = [p.mean((2, 3)) for p in parts]
            pooled = torch.cat(means, 1)
            torch.testing.assert_close(model(x), F.normalize(model.neck(pooled)))


def test_transformer_uses_class_token_or_patches():
    x = images(3, 64, 32)
    for pooling in ("token", "avg"):
        model = build_model(
            "timm:vit_tiny_patch16_224", pretrained=False, image_size=(64, 32), pooling=pooling
        ).eval()
        with torch.no_grad():
            tokens = model.maps(x)
            assert tokens.shape == (3, 9, 192)
            pooled = tokens[:, 0] if pooling == "token" else tokens[:, 1:].mean(1)
            torch.testing.assert_close(model(x), F.normalize(model.neck(pooled)))


def test_neck_has_no_bias_to_train():
    for options in ({}, {"samples_per_bn": 4}, {"num_cameras": 2}):
        model = small(**options)
        model(images(16), torch.arange(16) % 2).sum().backward()
        assert not model.neck.bias.requires_grad
        assert not model.neck.bias.any()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("options", [{}, {"samples_per_bn": 4}, {"num_cameras": 2}])
def test_batch_split_does_not_show_in_evaluation(options):
    model, x, cameras = small(**options), images(24), torch.arange(24) % 3
    model(x, cameras)
    model.eval()
    with torch.no_grad():
        whole = model(x, cameras)
        for size in (1, 5, 24):
            pieces = zip(x.split(size), cameras.split(size), strict=True)
            torch.testing.assert_close(
                torch.cat([model(*piece) for piece in pieces]), whole, rtol=0, atol=2e-6
            )


def test_autocast_keeps_features_and_statistics_in_fp32():
    x, cameras = images(32), torch.arange(32) % 2
    for options in ({"num_cameras": 2}, {"samples_per_bn": 16}):
        exact, mixed = small(**options), small(**options)
        expected = exact(x, cameras)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = mixed(x, cameras)
        got.sum().backward()
        assert got.dtype == torch.float32
        assert (got * expected).sum(1).min() > 0.99
        buffers = zip(exact.buffers(), mixed.buffers(), strict=True)
        assert all(b.dtype == a.dtype for a, b in buffers)


def test_seed_decides_the_weights_and_leaves_the_random_state():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second, other = small(seed=1), small(seed=1), small(seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(first.backbone[0][0].weight, other.backbone[0][0].weight)
    torch.manual_seed(1)
    drawn = small(seed=None)
    assert torch.equal(first.backbone[0][0].weight, drawn.backbone[0][0].weight)
    assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("options", [{}, {"samples_per_bn": 4}, {"num_cameras": 2}])
def test_state_dict_round_trip(options):
    model, other = small(**options), small(seed=1, **options)
    x, cameras = images(20), torch.arange(20) % 2
    model(x, cameras)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(x, cameras), model.eval()(x, cameras))


# ---- refusals ----


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "resnet5O",
            {},
            "unknown name 'resnet5O', did you mean 'resnet50'.*small.*vit_small.*timm:",
        ),
        ("zzzz", {}, r"unknown name 'zzzz'\. Known are small"),
        ("timm:vit_tiny_patch16_242", {}, "did you mean 'vit_tiny_patch16_224'"),
        ("small", {"pooling": "max"}, "pooling: must be one of gem.*got 'max'"),
        ("small", {"pooling": "token"}, "small has no class token"),
        ("vit_small", {"pooling": "gem"}, "tokens of vit_small have either sign"),
        ("vit_small", {"image_size": (100, 48)}, r"multiples of its patches of 16 x 16 \(got 100"),
        ("small", {"image_size": (8, 8)}, "halves need maps of 2 rows"),
        ("small", {"image_size": (0, 8)}, "image_size"),
        ("small", {"samples_per_bn": 1}, r"samples_per_bn: must be 0 \(off\) or at least 2"),
        ("small", {"num_cameras": -1}, "num_cameras"),
        ("small", {"num_cameras": 2, "samples_per_bn": 16}, "per chunk or per camera"),
        ("timm:levit_128s", {"num_cameras": 2}, "other rows than images"),
    ],
)
def test_impossible_models_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_model(name, pretrained=False, **options)


def test_bad_inputs_are_refused():
    model = small()
    with pytest.raises(ValueError, match=r"images: must be \(B, 3, H, W\)"):
        model(torch.zeros(2, 1, 32, 16))
    with pytest.raises(ValueError, match=r"images: .*uint8"):
        model(torch.zeros(2, 3, 32, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"cameras: must be \(2,\) int64"):
        model(images(2), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"cameras: .*float32"):
        model(images(2), torch.zeros(2))


# ---- ghost batch norm ----


def test_model_with_ghost_batch_norm_equals_four_processes():
    x = images(64).double()
    ghost, plain = small(samples_per_bn=16).double(), small().double()
    got = ghost(x)
    expected = torch.cat([plain(part) for part in x.split(16)])
    torch.testing.assert_close(got, expected)
    got.square().mul(torch.arange(512)).sum().backward()
    expected.square().mul(torch.arange(512)).sum().backward()
    for a, b in zip(ghost.parameters(), plain.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad)
    assert not torch.allclose(got, small().double()(x), atol=1e-2)


@pytest.mark.parametrize("shape", [(3,), (3, 4, 2)])
@pytest.mark.parametrize(
    ("batch", "chunks"), [(12, [4, 4, 4]), (10, [4, 4, 2]), (9, [4, 5]), (5, [5]), (3, [3])]
)
def test_ghost_batch_norm_is_batch_norm_of_chunks(shape, batch, chunks):
    torch.manual_seed(0)
    x = torch.randn(batch, *shape, dtype=torch.float64) * 3 + 1
    kind, plain_kind = (
        (GhostBatchNorm1d, nn.BatchNorm1d)
        if len(shape) == 1
        else (GhostBatchNorm2d, nn.BatchNorm2d)
    )
    ghost = randomised(kind(3, samples_per_bn=4)).double()
    plain = plain_kind(3).double()
    plain.load_state_dict(ghost.state_dict())
    state = {k: v.clone() for k, v in ghost.state_dict().items()}
    parts, statistics = [], []
    for part in x.split(chunks):
        plain.load_state_dict(state)
        parts.append(plain(part))
        statistics.append((plain.running_mean.clone(), plain.running_var.clone()))
    torch.testing.assert_close(ghost(x), torch.cat(parts))
    by_name = zip(*statistics, strict=True)
    for name, values in zip(("running_mean", "running_var"), by_name, strict=True):
        torch.testing.assert_close(getattr(ghost, name), torch.stack(values).mean(0))
    plain.load_state_dict(ghost.state_dict())
    torch.testing.assert_close(ghost.eval()(x), plain.eval()(x))


def test_one_value_per_channel_is_refused():
    for norm in (GhostBatchNorm1d(3, 4), CameraBatchNorm(3, 2)):
        with pytest.raises(ValueError, match="more than one value per channel"):
            norm(torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"input must be \(B, 3\)"):
        CameraBatchNorm(3, 2)(torch.zeros(2, 4))


# ---- batch norm per camera ----

CAMERAS = torch.tensor([0] * 9 + [2] * 8 + [1] * 3 + [-1] * 2 + [7] * 7)


def camera_norm(x, cameras=CAMERAS, *, num=4, norm=None, train=True):
    norm = norm or CameraBatchNorm(x.shape[1], num)
    with using_cameras(cameras, num):
        return norm.to(x.dtype).train(train)(x), norm


def standardised(x, like, eps=1e-5):
    axes = [0, *range(2, x.dim())]
    mean, var = like.mean(axes, keepdim=True), like.var(axes, correction=0, keepdim=True)
    return (x - mean) / (var + eps).sqrt()


def features(shape=(3,), cameras=CAMERAS, seed=0):
    """Values whose location and scale differ from camera to camera."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(cameras), *shape, generator=generator, dtype=torch.float64)
    column = (cameras % 5).double().view(-1, *[1] * len(shape))
    return x * (1 + column) + 3 * column


@pytest.mark.parametrize("shape", [(3,), (3, 4, 2)])
def test_training_uses_statistics_of_each_camera(shape):
    x = features(shape)
    got, norm = camera_norm(x)
    for camera in (0, 2):
        mine = camera == CAMERAS
        torch.testing.assert_close(got[mine], standardised(x[mine], x[mine]))
    unseen = (CAMERAS < 0) | (CAMERAS >= 4)  # -1 and 7 together are 9 images
    torch.testing.assert_close(got[unseen], standardised(x[unseen], x[unseen]))
    few = CAMERAS == 1
    torch.testing.assert_close(got[few], standardised(x[few], x))
    assert norm.camera_images.tolist() == [9, 3, 8, 0]


def test_camera_with_few_images_uses_its_running_statistics_once_known():
    x, cameras = features(cameras=torch.tensor([0] * 10 + [1] * 10)), torch.arange(20) // 10
    _, norm = camera_norm(x, cameras)
    mean, var = norm.camera_mean[1].clone(), norm.camera_var[1].clone()
    torch.testing.assert_close(mean, x[10:].mean(0))
    some = torch.tensor([0] * 10 + [1] * 3)
    y = features(cameras=some, seed=1).requires_grad_()
    got, _ = camera_norm(y, some, norm=norm)
    torch.testing.assert_close(got[10:], (y[10:] - mean) / (var + norm.eps).sqrt())
    (grad,) = torch.autograd.grad(got[10:].sum(), y)
    torch.testing.assert_close(grad[10:], (var + norm.eps).rsqrt().expand(3, 3))


@pytest.mark.parametrize("shape", [(3,), (3, 4, 2)])
def test_evaluation_uses_the_camera_or_falls_back(shape):
    norm = randomised(CameraBatchNorm(3, 4)).double()
    norm.camera_images.copy_(torch.tensor([MIN_IMAGES, MIN_IMAGES - 1, 100, 0]))
    x = features(shape)
    got, _ = camera_norm(x, norm=norm, train=False)
    for i, camera in enumerate(CAMERAS.tolist()):
        own = camera in (0, 2)
        mean = norm.camera_mean[camera] if own else norm.running_mean
        var = norm.camera_var[camera] if own else norm.running_var
        expected = F.batch_norm(x[i : i + 1], mean, var, norm.weight, norm.bias)
        torch.testing.assert_close(got[i : i + 1], expected)
    outside = norm(x)
    torch.testing.assert_close(
        outside, F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )


def test_one_camera_is_ordinary_batch_norm():
    x = features((3, 4, 2))
    norm, plain = randomised(CameraBatchNorm(3, 1)).double(), nn.BatchNorm2d(3).double()
    plain.load_state_dict(norm.state_dict(), strict=False)
    got, _ = camera_norm(x, torch.zeros(len(x), dtype=torch.int64), num=1, norm=norm)
    torch.testing.assert_close(got, plain(x))
    torch.testing.assert_close(norm.running_mean, plain.running_mean)


def test_running_statistics_mix_sets_of_values():
    norm = CameraBatchNorm(3, 4, momentum=0.25).double()
    seen = []
    for step in range(12):
        x = features((3, 2, 2), seed=step)
        camera_norm(x, norm=norm)
        seen.append(x[CAMERAS == 0])
    # Until the share of 9 new images falls below the momentum, all values count alike.
    weights = torch.tensor([1.0, 1.0, 1.0, 1.0], dtype=torch.float64) / 4
    for _ in range(8):
        weights = torch.cat([0.75 * weights, torch.tensor([0.25], dtype=torch.float64)])
    means = torch.stack([x.mean((0, 2, 3)) for x in seen])
    squares = torch.stack([x.square().mean((0, 2, 3)) for x in seen])
    mean = weights @ means
    torch.testing.assert_close(norm.camera_mean[0], mean)
    torch.testing.assert_close(norm.camera_var[0], weights @ squares - mean.square())
    assert norm.camera_mean[3].tolist() == [0, 0, 0]
    assert norm.camera_images.tolist() == [108, 36, 96, 0]


@pytest.mark.parametrize("shape", [(2,), (2, 2, 3)])
@pytest.mark.parametrize("train", [True, False])
def test_gradients_of_camera_batch_norm(shape, train):
    cameras = torch.tensor([0] * 8 + [1] * 8 + [2] * 2 + [-1])
    norm = randomised(CameraBatchNorm(2, 3)).double().train(train)
    norm.camera_images.fill_(100)
    state = {k: v.clone() for k, v in norm.state_dict().items()}
    x = features(shape, cameras).requires_grad_()

    def apply(x, weight, bias):
        norm.load_state_dict(state)
        with using_cameras(cameras, 3):
            return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, x)

    affine = (norm.weight.detach().clone(), norm.bias.detach().clone())
    assert torch.autograd.gradcheck(apply, (x, *(p.requires_grad_() for p in affine)))


def test_gradients_of_ghost_batch_norm():
    norm = randomised(GhostBatchNorm2d(2, 3)).double()
    x = torch.randn(8, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, (x,))


def test_cameras_hold_for_the_context_alone():
    model = small(num_cameras=2).eval()
    norm = randomised(model.neck)
    norm.camera_images.fill_(100)
    x = torch.randn(4, 512)
    outside = norm(x)
    cameras = torch.tensor([0, 1, 0, 1])

    def failing(module, args):
        raise RuntimeError("in the middle")

    hook = model.backbone[2].register_forward_pre_hook(failing)
    with pytest.raises(RuntimeError, match="in the middle"):
        model(images(4), cameras)
    hook.remove()
    assert torch.equal(norm(x), outside)
    with using_cameras(cameras, 2):
        inside = norm(x)
        with using_cameras(1 - cameras, 2):
            assert not torch.equal(norm(x), inside)
        assert torch.equal(norm(x), inside)
        found = []
        thread = threading.Thread(target=lambda: found.append(norm(x)))
        thread.start()
        thread.join()
        assert torch.equal(found[0], outside)
        with pytest.raises(ValueError, match="3 images and 2 cameras must match"):
            norm(x[:3])
    assert not torch.equal(inside, outside)


def test_cameras_reach_the_layers_of_a_wrapped_model(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model, alone = small(num_cameras=2), small(num_cameras=2)
        wrapped = nn.parallel.DistributedDataParallel(model)
        x, cameras = images(20), torch.arange(20) % 2
        got = wrapped(x, cameras)
        assert torch.equal(got, alone(x, cameras))
        got.sum().backward()
        assert model.neck.camera_images.tolist() == [10, 10]
    finally:
        torch.distributed.destroy_process_group()


def test_model_gives_each_camera_its_own_statistics():
    model, plain = small(num_cameras=2), small()
    x, cameras = images(32), torch.arange(32) % 2
    x[cameras == 1] = 0.3 * x[cameras == 1] + 2  # another exposure
    got = model(x, cameras)
    for camera in (0, 1):
        torch.testing.assert_close(
            got[cameras == camera], plain(x[cameras == camera]), rtol=0, atol=1e-5
        )
    everyone = small()(x)
    torch.testing.assert_close(small(num_cameras=2)(x), everyone, rtol=0, atol=1e-5)
    assert not torch.allclose(got, everyone, atol=1e-2)


# ---- calibrate ----


def test_calibrated_statistics_are_those_of_all_values():
    model = small(num_cameras=3)
    x, cameras = images(40), torch.arange(40) % 2
    inputs = []
    first = model.backbone[0][1]
    first.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    weights = [p.clone() for p in model.parameters()]
    random_state = torch.get_rng_state()
    model.backbone[1].eval()
    assert calibrate(model, [(x[:24], cameras[:24]), (x[24:], cameras[24:])]) == 40
    values = torch.cat(inputs)
    for camera in (0, 1):
        mine = values[cameras == camera]
        torch.testing.assert_close(first.camera_mean[camera], mine.mean((0, 2, 3)))
        torch.testing.assert_close(first.camera_var[camera], mine.var((0, 2, 3), correction=0))
    torch.testing.assert_close(first.running_var, values.var((0, 2, 3), correction=0))
    assert first.camera_images.tolist() == [20, 20, 0]
    assert first.momentum == 0.1
    assert model.training
    assert not model.backbone[1].training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


@pytest.mark.parametrize("options", [{}, {"samples_per_bn": 32}, {"num_cameras": 2}])
def test_one_calibration_batch_makes_evaluation_equal_training(options):
    model, x, cameras = small(**options), images(32, 64, 32), torch.arange(32) % 2
    expected = model(x, cameras)
    calibrate(model, [(x, cameras)])
    got = model.eval()(x, cameras)
    # Ordinary batch norm keeps the unbiased variance, so they differ by 1/64 in the neck.
    assert (got * expected).sum(1).min() > 1 - 1e-3


def test_calibration_averages_batches_of_ordinary_batch_norm():
    model = small()
    values = []
    model.backbone[0][1].register_forward_pre_hook(lambda module, args: values.append(args[0]))
    calibrate(model, [(images(8, seed=i), None) for i in range(3)])
    means = torch.stack([v.mean((0, 2, 3)) for v in values])
    torch.testing.assert_close(model.backbone[0][1].running_mean, means.mean(0))


def test_failed_calibration_puts_the_statistics_back():
    model = small(num_cameras=2)
    model(images(20), torch.arange(20) % 2)
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def batches():
        yield images(20), torch.arange(20) % 2
        raise OSError("unreadable image")

    with pytest.raises(OSError, match="unreadable"):
        calibrate(model, batches())
    with pytest.raises(ValueError, match="at least one batch"):
        calibrate(model, [])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training
    assert model.neck.momentum == 0.1


# ---- weights ----


@pytest.fixture
def donor():
    return small(seed=9)


def loaded(path, **options):
    return small(pretrained=True, weights=path, **options)


def backbone_equals(model, donor):
    return all(
        torch.equal(tensor, model.backbone.state_dict()[name])
        for name, tensor in donor.backbone.state_dict().items()
        if not name.endswith("num_batches_tracked")
    )


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "base.", "module.backbone."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_weights_load_under_common_names(tmp_path, donor, prefix, wrapper):
    state = {prefix + k: v for k, v in donor.backbone.state_dict().items()}
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "w.pth")
    model = loaded(tmp_path / "w.pth")
    assert backbone_equals(model, donor)
    assert model.weights.missing == model.weights.unused == ()
    assert "w.pth" in model.description


@pytest.mark.parametrize("options", [{}, {"num_cameras": 2}, {"samples_per_bn": 4}])
def test_safetensors_load_into_any_kind_of_batch_norm(tmp_path, donor, options):
    from safetensors.torch import save_file

    save_file(donor.backbone.state_dict(), tmp_path / "w.safetensors")
    model = loaded(tmp_path / "w.safetensors", **options)
    assert backbone_equals(model, donor)
    assert model.weights.missing == ()
    x = images(6)
    expected = donor.eval()(x)
    torch.testing.assert_close(model.eval()(x), expected, rtol=0, atol=2e-6)


def test_a_whole_model_loads_with_its_neck_and_cameras(tmp_path):
    donor = small(num_cameras=2, seed=9)
    x, cameras = images(20), torch.arange(20) % 2
    donor(x, cameras)
    torch.save({"model": donor.state_dict()}, tmp_path / "w.pt")
    model = loaded(tmp_path / "w.pt", num_cameras=2)
    assert torch.equal(model.eval()(x, cameras), donor.eval()(x, cameras))
    assert model.weights.missing == ()
    other = loaded(tmp_path / "w.pt", num_cameras=3)
    assert "neck.camera_mean" in other.weights.reshaped
    assert not other.neck.camera_images.any()
    assert torch.equal(other.neck.running_mean, donor.neck.running_mean)


def test_a_partial_file_is_told_or_refused(tmp_path, donor, caplog):
    state = donor.backbone.state_dict()
    names = list(state)
    most = {k: state[k] for k in names[:-6]} | {"extra": torch.ones(2), "fc.weight": torch.ones(2)}
    torch.save(most, tmp_path / "most.pth")
    with caplog.at_level("INFO", logger="dhcl.models"):
        model = loaded(tmp_path / "most.pth")
    assert model.weights.unused == ("extra",)
    assert set(model.weights.missing) == {
        f"backbone.{n}" for n in names[-6:] if not n.endswith("num_batches_tracked")
    }
    assert caplog.records[-1].levelname == "WARNING"
    assert re.search(r"35 of 40 tensors loaded; not in the file: 5 .*extra", caplog.text)
    torch.save({k: state[k] for k in names[:10]}, tmp_path / "little.pth")
    with pytest.raises(ValueError, match=r"too little of .*little.pth fits.*of 40 tensors"):
        loaded(tmp_path / "little.pth")


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save(nn.Linear(3, 4).state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"expected names such as 0\.0\.weight.*\(got bias, weig"):
        loaded(tmp_path / "w.pth")
    wide = {k: torch.cat([v, v]) if v.dim() else v for k, v in small().state_dict().items()}
    torch.save(wide, tmp_path / "wide.pth")
    with pytest.raises(ValueError, match="other shape: 4"):
        loaded(tmp_path / "wide.pth")


class Custom:
    pass


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file: .*none\.pth"):
        loaded(tmp_path / "none.pth")
    for name in ("w.pth", "w.safetensors"):
        (tmp_path / name).write_bytes(b"\x00\x01broken")
        with pytest.raises(ValueError, match=rf"{name} (is damaged|can't be read)"):
            loaded(tmp_path / name)
    torch.save(small().state_dict(), tmp_path / "cut.pth")
    content = (tmp_path / "cut.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cut\.pth"):
        loaded(tmp_path / "cut.pth")
    torch.save({"model": Custom()}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="holds more than tensors"):
        loaded(tmp_path / "code.pth")
    for content, message in ((torch.ones(2), "got Tensor"), ({"epoch": 3}, "no tensors")):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(ValueError, match=message):
            loaded(tmp_path / "other.pth")


def test_transformer_weights_are_resized(tmp_path):
    name = "timm:vit_tiny_patch16_224"
    donor = build_model(name, pretrained=False, image_size=(64, 32))
    torch.save(donor.backbone.state_dict(), tmp_path / "vit.pth")
    model = build_model(name, weights=tmp_path / "vit.pth", image_size=(96, 48))
    assert model.weights.missing == ()
    assert model.backbone.pos_embed.shape == (1, 1 + 6 * 3, 192)
    assert torch.equal(
        model.backbone.blocks[3].mlp.fc1.weight, donor.backbone.blocks[3].mlp.fc1.weight
    )


# ---- pretrained weights ----


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network and empty caches."""

    def refuse(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    folder = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "hub"))
    with contextlib.ExitStack() as stack:
        stack.callback(torch.hub.set_dir, folder)
        yield tmp_path


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("resnet18", "https://download.pytorch.org/models/resnet18-f37072fd.pth"),
        (
            "resnet50_ibn_a",
            "https://github.com/XingangPan/IBN-Net/releases/download/v1.0/"
            "resnet50_ibn_a-d9d0bb7b.pth",
        ),
    ],
)
def test_offline_says_what_to_put_where(offline, name, url):
    with pytest.raises(UnavailableWeights) as caught:
        build_model(name)
    message = str(caught.value)
    place = offline / "hub" / "checkpoints" / url.rpartition("/")[2]
    assert f"{place} is not there and could not be downloaded" in message
    assert f"Put {url}\n  at  {place}\n" in message
    assert "--weights FILE" in message
    assert "--no-pretrained" in message


def test_offline_says_what_to_put_where_for_timm(offline):
    with pytest.raises(UnavailableWeights) as caught:
        build_model("vit_small")
    message = str(caught.value)
    repository = "timm/vit_small_patch16_224.augreg_in21k_ft_in1k"
    assert f"{huggingface_hub.constants.ENDPOINT}/{repository}/resolve/main/model.safe" in message
    assert f"hf download {repository}" in message
    assert str(offline / "hf") in message
    assert "--no-pretrained" in message


def test_cached_pretrained_weights_are_used(offline):
    donor = build_model("resnet18", pretrained=False, seed=4)
    state = donor.backbone.state_dict() | {"fc.weight": torch.ones(2), "fc.bias": torch.ones(2)}
    folder = offline / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    file = folder / "resnet18-f37072fd.pth"
    torch.save(state, file)
    model = build_model("resnet18", num_cameras=2)
    assert backbone_equals(model, donor)
    assert model.weights.missing == model.weights.unused == ()
    assert "IMAGENET1K_V1" in model.description
    file.write_bytes(b"not a model")
    with pytest.raises(UnavailableWeights, match=f"{file.name} is damaged"):
        build_model("resnet18")


def test_networks_without_published_weights_say_so():
    assert "from scratch" in small(pretrained=True).description
    with pytest.raises(ValueError, match="resnetblur18 has no published weights"):
        build_model("timm:resnetblur18")


def test_names_are_listed():
    names = models.backbone_names()
    assert {"small", "resnet50", "resnet50_ibn_a", "vit_small", "vit_base"} <= set(names)
