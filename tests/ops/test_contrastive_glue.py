"""The CUDA half of csrc/contrastive.cpp run on the host: kernels emulated, products the CPU's.

What it does is done on CPU tensors, so the formats and loops that only CUDA takes are seen here.
"""

import pytest
import torch

from dhcl_ops import _build, _ops
from dhcl_ops import _contrastive_kernels as kernels
from dhcl_ops import _contrastive_stream as streaming
from tests.cuda_host import build
from tests.ops.test_contrastive import case
from tests.ops.test_false_negatives import weights_of

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(scope="module")
def glue():
    """The op ``contrastive`` of the CUDA half, for CPU tensors."""
    if build.missing() is not None or build.SANITIZE:
        pytest.skip(str(build.missing() or "the library of ops is not built with sanitizers"))
    _ops.OPS["contrastive"].overload(*_ops.OPS["contrastive"].sample(torch.device("cpu")))
    folder = _build.source_dir()
    sources = [folder / "contrastive.cu", build.HERE / "contrastive_glue.cpp"]
    ops = torch.library.Library("dhcl_glue", "DEF")
    for op in (
        *("contrastive", "contrastive_weigh_", "contrastive_stream_", "contrastive_finish"),
        "contrastive_slopes_",
    ):
        ops.define(str(_ops.OPS[op].overload._schema).removeprefix("dhcl::"))
    # CUDA's product of 16-bit factors with fp32 sums, which the CPU has none of.
    products = torch.library.Library("aten", "IMPL")
    products.impl(
        "mm.dtype_out",
        lambda a, b, dtype, *, out: out.copy_(torch.mm(a.float(), b.float())),
        "CPU",
    )
    path = build.compile_glue("contrastive_glue", sources, [folder])
    torch.ops.load_library(path)
    yield torch.ops.dhcl_glue.contrastive.default
    products._destroy()
    ops._destroy()


def run(op, features, proxies, labels, how, proxy_labels=None, weights=()):
    roles = kernels.Roles(labels, proxy_labels, None, None, None)
    aggregation = kernels.SUM if proxy_labels is None else kernels.EACH
    kappa = torch.zeros(len(features), dtype=torch.float64)
    settings = kernels.Settings(kappa, False, aggregation, 0.05, 0.2, False)
    return streaming.Results(*op(features, proxies, *roles, *settings, *how, *weights))


def assert_close(found, expected, tolerance):
    assert torch.equal(found.counts, expected.counts)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("chunk", [0, 16, 13])
@pytest.mark.parametrize(
    "dtypes", [(F32, F32), (F16, F16), (BF16, BF16), (BF16, F32), (torch.float64, F32)]
)
@pytest.mark.parametrize("kind", ["one pass", "strided", "classes"])
def test_the_loop_on_cuda(glue, dtypes, chunk, fast, kind):
    features, proxies, labels, proxy_labels, *_ = case(5, 37, 10, several=kind == "classes")
    features, proxies = features.to(dtypes[0]), proxies.to(dtypes[1])
    wide = [features.double(), proxies.double(), labels]
    if kind == "strided":
        features = torch.stack([features, features], 1)[:, 0]
        proxies = proxies.t().contiguous().t()
    one_pass = kind != "classes"
    how = streaming.Streaming(one_pass, fast, chunk)
    # Lists of weights with every other case, which has enough to do without.
    weights = weights_of(5, 37, 0, classes=one_pass) if chunk == 13 else ()
    expected = run(_ops.OPS["contrastive"].overload, *wide, how, proxy_labels, weights)
    found = run(glue, features, proxies, labels, how, proxy_labels, weights)
    # fp16 rounds fp32 operands, and any 16-bit format the gradient's weights.
    rounded = (fast and F32 in dtypes and torch.float64 not in dtypes) or F16 in dtypes
    tolerance = 5e-2 if dtypes == (BF16, BF16) else 2e-2 if rounded else 1e-4
    if not one_pass:
        found = found._replace(gradient=expected.gradient)
    assert_close(found, expected, tolerance)


@pytest.mark.parametrize("dtypes", [(F32, F32), (F32, F16)])
def test_the_loop_on_cuda_over_pieces(glue, monkeypatch, dtypes):
    """As large as it must be for that: 128 rows and 2^30 multiplications, the last chunk odd."""
    width = 1 << 18
    generator = torch.Generator().manual_seed(0)
    proxies = torch.nn.functional.normalize(torch.randn(33, width, generator=generator))
    labels = torch.arange(128) % 33
    noise = torch.randn(128, width, generator=generator)
    features = torch.nn.functional.normalize(proxies[labels] + noise / width**0.5)
    features, proxies = features.to(dtypes[0]), (proxies * 2).to(dtypes[1])
    how = streaming.Streaming(True, False, 24)
    weights = weights_of(128, 33, 0)
    found = run(glue, features, proxies, labels, how, weights=weights)
    monkeypatch.setattr(streaming, "pays_to_split", lambda features, proxies: True)
    expected = run(_ops.OPS["contrastive"].reference, features, proxies, labels, how, None, weights)
    assert_close(found, expected, 1e-4)
