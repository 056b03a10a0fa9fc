"""Every family of timm trains or is refused by name; camera batch norm and strides in its networks.

The smallest member of each family is built at a tiny size. ``DHCL_TIMM=all`` builds every network
of timm, which takes hours and, for the largest, tens of gigabytes.
"""

import os

import pytest
import timm
import torch
from dhcl.inference.export import plain_model
from dhcl.models import CameraBatchNorm, build_model, using_cameras
from dhcl.models.conversion import camera_batch_norm, ghost_batch_norm
from timm.layers import BatchNormAct2d
from torch import nn

SIZE = (64, 32)

# A small member by module of timm.
FAMILIES = {
    "byoanet": "halonet_h1",
    "byobnet": "test_byobnet",
    "cait": "cait_xxs24_224",
    "coat": "coat_tiny",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32",
    "convnext": "test_convnext",
    "cpubone": "cpubone_nano",
    "crossvit": "crossvit_tiny_240",
    "csatv2": "csatv2",
    "cspnet": "cs3darknet_focus_s",
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "deit": "deit_tiny_patch16_224",
    "densenet": "densenet121",
    "dla": "dla46x_c",
    "dpn": "dpn48b",
    "edgenext": "edgenext_xx_small",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "test_efficientnet",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "eva": "eva02_tiny_patch14_224",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny",
    "ghostnet": "ghostnet_050",
    "hardcorenas": "hardcorenas_b",
    "hgnet": "hgnetv2_b0",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "sam2_hiera_tiny",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_v3": "inception_v3",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s",
    "lowformer": "lowformer_b0",
    "mambaout": "test_mambaout",
    "maxxvit": "test_coatnet",
    "metaformer": "caformer_s18",
    "mlp_mixer": "gmlp_ti16_224",
    "mobilenetv3": "lcnet_035",
    "mobilevit": "mobilevit_xxs",
    "mvitv2": "mvitv2_tiny",
    "nest": "nest_tiny",
    "nfnet": "test_nfnet",
    "pit": "pit_xs_224",
    "pvt_v2": "pvt_v2_b0",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_004_tv",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m1",
    "res2net": "res2net50_26w_4s",
    "resnest": "resnest26d",
    "resnet": "test_resnet",
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100",
    "senet": "legacy_seresnet18",
    "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window16_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_legacy_patch16_224",
    "twins": "twins_svt_small",
    "visformer": "visformer_tiny",
    "vision_transformer": "test_vit",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_relpos": "test_vit_relpos",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw",
    "xception": "legacy_xception",
    "xception_aligned": "xception41",
    "xcit": "xcit_nano_12_p8_224",
}
# Families whose smallest member has more than 30 million parameters.
LARGE = {
    "beit": "beit_base_patch16_224",
    "deepseek_vit": "deepseek_vit_412m",
    "gemma4_vit": "gemma4_vit_167m",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v4": "inception_v4",
    "mobilenetv5": "mobilenetv5_base",
    "naflexvit": "naflexvit_base_patch16_siglip",
    "nasnet": "nasnetalarge",
    "nextvit": "nextvit_small",
    "pnasnet": "pnasnet5large",
    "qwen3_vit": "qwen3_vit_88m",
    "selecsls": "selecsls42",
    "tresnet": "tresnet_l",
    "vgg": "vgg11",
    "vision_transformer_sam": "samvit_base_patch16",
}
# Of those above, what can't be at this size: too many halvings, or made for one size of a square.
TOO_SMALL = {
    *("convit_tiny", "csatv2", "efficientformer_l1", "eva02_tiny_patch14_224", "halonet_h1"),
    *("inception_v3", "nest_tiny"),
}
# And what can't be at any: features at several scales.
NO_MAPS = {"coat_tiny", "crossvit_tiny_240", "efficientvim_m1"}


def modules():
    """Names of timm's networks by the module that has them."""
    found = {}
    for name in timm.list_models():
        module = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
        found.setdefault(module, []).append(name)
    return found


def swept():
    """A network of each module; of modules that timm has since then, the shortest name."""
    if os.environ.get("DHCL_TIMM") == "all":
        return timm.list_models()
    chosen = {**FAMILIES, **dict.fromkeys(LARGE, "")}
    names = [chosen.get(module, min(there, key=len)) for module, there in modules().items()]
    return [name for name in names if name and timm.is_model(name)]


def images(count=4):
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(0))


def built(name, **options):
    return build_model(f"timm:{name}", pretrained=False, image_size=SIZE, seed=0, **options)


@pytest.mark.parametrize("name", swept())
def test_a_network_trains_or_is_refused_by_name(name):
    refused = None
    try:
        model = built(name)
    except ValueError as error:
        refused = str(error)
    if name in FAMILIES.values():
        assert (refused is not None) == (name in TOO_SMALL | NO_MAPS)
    if refused is not None:
        assert f"timm:{name}" in refused
        return
    features = model(images())
    assert features.shape == (4, model.dim)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(4))
    (features[0] @ features[1]).backward()
    # A parameter without a gradient would stop a training of several processes.
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert model.eval()(images()).shape == (4, model.dim)


def test_networks_that_can_not_be_taken_say_why():
    with pytest.raises(ValueError, match=r"timm:coat_tiny can't be trained here; its features"):
        built("coat_tiny")
    with pytest.raises(ValueError, match=r"timm:halonet_h1 can't take 64 x 32"):
        built("halonet_h1")


@pytest.mark.parametrize(
    "name", ["mobilenetv3_small_050", "lcnet_035", "ghostnet_050", "hgnetv2_b0", "hardcorenas_a"]
)
def test_features_are_the_maps_before_the_head(name):
    """Where the head is made for pooled features; its parameters are left out."""
    model = built(name).eval()
    whole = timm.create_model(name, pretrained=False, num_classes=7).eval()
    state = whole.state_dict()
    own = model.backbone.state_dict()
    model.backbone.load_state_dict({key: state[key] for key in own})
    assert any(key.startswith(("conv_head", "head")) for key in state.keys() - own.keys())
    assert model.dim == whole.num_features
    # But for the last stride, which keeps the size of the maps.
    assert model.maps(images()).shape[:2] == whole.forward_features(images()).shape[:2]


# ---- the last stride ----


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("test_resnet", True),
        ("resnet18d", True),
        ("test_efficientnet", True),
        ("tf_efficientnet_b0", True),
        ("regnetx_002", True),
        ("test_byobnet", True),
        ("densenet121", True),
        ("test_convnext", False),
        ("resnetblur18", False),
    ],
)
def test_the_last_stage_keeps_its_size_where_it_can(name, kept):
    model = built(name).eval()
    plain = timm.create_model(name, pretrained=False, num_classes=0, global_pool="").eval()
    plain.load_state_dict(model.backbone.state_dict())
    assert ("last stride 1" in model.description) == kept
    ours, theirs = model.maps(images()), plain(images())
    if kept:
        assert ours.shape == (*theirs.shape[:2], 2 * theirs.shape[2], 2 * theirs.shape[3])
    else:
        assert torch.equal(ours, theirs)


# ---- batch norms with an activation ----


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, nn.PReLU])
def test_norms_with_an_activation_are_grouped_by_camera(act):
    norm = BatchNormAct2d(6, act_layer=act)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.uniform_(-0.5, 0.5)
    plain = nn.BatchNorm2d(6)
    plain.load_state_dict({k: v for k, v in norm.state_dict().items() if k in plain.state_dict()})
    activation = norm.act
    ours = camera_batch_norm(nn.Sequential(norm), 2)
    theirs = camera_batch_norm(nn.Sequential(plain), 2)
    assert type(ours[0]) is CameraBatchNorm
    assert norm.state_dict().keys() <= ours[0].state_dict().keys()
    x, cameras = torch.randn(20, 6, 4, 3) * 2 + 1, torch.arange(20) % 2
    for mode in (True, False):
        ours.train(mode)
        theirs.train(mode)
        with using_cameras(cameras, 2):
            assert torch.equal(ours(x), activation(theirs(x)))


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet", "regnetx_002", "lcnet_035"])
def test_networks_with_such_norms_have_statistics_per_camera(name):
    plain, grouped = built(name), built(name, num_cameras=2)
    x, cameras = images(20), torch.arange(20) % 2
    assert torch.equal(grouped.eval()(x, cameras), plain.eval()(x))
    assert torch.equal(built(name, samples_per_bn=10).eval()(x), plain.eval()(x))
    features = grouped.train()(x, cameras)
    (features[0] @ features[1]).backward()
    norms = [m for m in grouped.backbone.modules() if isinstance(m, CameraBatchNorm)]
    assert norms
    assert all((norm.camera_images == 10).all() for norm in norms)
    exported = plain_model(grouped.eval())
    assert torch.allclose(exported(x), grouped(x), atol=1e-6)


def test_norms_in_chunks_are_those_of_each_chunk():
    norm = BatchNormAct2d(6, act_layer=nn.SiLU)
    chunked = ghost_batch_norm(nn.Sequential(BatchNormAct2d(6, act_layer=nn.SiLU)), 4)
    x = torch.randn(8, 6, 4, 3)
    expected = torch.cat([norm(part) for part in x.split(4)])
    torch.testing.assert_close(chunked(x), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("options", [{"num_cameras": 2}, {"samples_per_bn": 4}])
def test_norms_over_other_rows_than_images_are_refused(options):
    with pytest.raises(ValueError, match=r"timm:levit_128s has batch norms over other rows than"):
        built("levit_128s", **options)
