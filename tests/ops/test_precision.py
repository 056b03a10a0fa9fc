"""Products that are stated in fp32 are fp32, whatever the process allows for others."""

import contextlib
import threading

import pytest
import torch
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from dhcl_ops import (
    _ops,
    _precision,
    camera_neighbours,
    debiased_contrastive_loss,
    evaluate_ranking,
    jaccard_graph,
    knn,
    rerank,
)
from dhcl_ops.compat import spcl
from dhcl_ops.compat._jaccard import squares

MATMUL = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm"}


def rows(n, d, seed):
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(n, d, generator=generator))


def settings():
    return [backend.fp32_precision for backend in MATMUL]


@pytest.fixture(autouse=True)
def as_before():
    """Each test leaves the process as it found it."""
    legacy, each = torch.get_float32_matmul_precision(), settings()
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision(legacy)
    for backend, precision in zip(MATMUL, each, strict=True):
        backend.fp32_precision = precision


def loss_of(device, **options):
    features = rows(40, 256, 0).to(device).requires_grad_()
    proxies = rows(300, 256, 1).to(device)
    proxies.requires_grad_(options.pop("learned", False))
    labels = torch.arange(40, device=device)
    loss = debiased_contrastive_loss(features, proxies, labels, **options)
    loss.backward()
    return [loss, features.grad, proxies.grad]


def second_pass(device):
    return loss_of(device, learned=True, beta=0.5, hardness_gradient="through")


def both_gradients(device):
    return loss_of(device, learned=True)


def class_positives(device):
    features = rows(40, 256, 0).to(device).requires_grad_()
    classes = (torch.arange(300) % 75).to(device)
    loss = debiased_contrastive_loss(
        features, rows(300, 256, 1).to(device), classes[:40], proxy_labels=classes
    )
    loss.backward()
    return [loss, features.grad]


def memory(device):
    bank = spcl.HybridMemory(256, 300, temp=0.05, momentum=0.2).to(device)
    bank.features.copy_(rows(300, 256, 1))
    bank.labels.copy_(torch.arange(300) % 75)
    inputs = rows(40, 256, 0).to(device).requires_grad_()
    loss = bank(inputs, torch.arange(40, device=device))
    loss.backward()
    return [loss, inputs.grad, bank.features]


def metrics(device):
    ids = torch.arange(300) % 60
    pair = (rows(64, 256, 0).to(device), rows(300, 256, 1).to(device))
    found = evaluate_ranking(pair, ids[:64], ids, per_query=True)
    return [found.cmc, found.average_precision]


def reranked(device):
    return [rerank(rows(60, 256, 0).to(device), rows(200, 256, 1).to(device))]


def lists(device):
    cameras = (torch.arange(300) % 3).to(device)
    return list(camera_neighbours(rows(300, 256, 0).to(device), cameras, 9, 3)[:2])


CALLS = {
    "loss": loss_of,
    "loss, both gradients": both_gradients,
    "loss, second pass": second_pass,
    "loss over classes of rows": class_positives,
    "memory of another project": memory,
    "distances of another project": lambda device: [
        squares(rows(64, 256, 0).to(device), rows(300, 256, 1).to(device))
    ],
    "neighbours": lambda device: list(knn(rows(300, 256, 0).to(device), 9)[:2]),
    "neighbours by camera": lists,
    "graph": lambda device: [jaccard_graph(rows(300, 256, 0).to(device), 9, 3, 0.6).to_dense()],
    "metrics": metrics,
    "re-ranking": reranked,
}


def same(left, right):
    return all(
        (a is None and b is None) or torch.equal(a, b) for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize("name", CALLS)
def test_lower_precision_elsewhere_does_not_change_a_bit(name, precision, device):
    expected = CALLS[name](device)
    torch.set_float32_matmul_precision(precision)
    before = settings()
    assert "ieee" not in before
    found = CALLS[name](device)
    assert same(found, expected)
    assert settings() == before
    assert torch.get_float32_matmul_precision() == precision


def test_a_processor_that_can_multiply_in_bf16_would_have_shown_it():
    """What the tests above guard against is real: a plain product does change."""
    left, right = rows(64, 512, 0), rows(512, 512, 1)
    plain = left @ right.T
    torch.set_float32_matmul_precision("medium")
    if torch.equal(left @ right.T, plain):
        pytest.skip("this processor multiplies in fp32 whatever is allowed")
    with _precision.ieee_products():
        assert torch.equal(left @ right.T, plain)


class Products(TorchDispatchMode):
    """Notes what is set when a matrix product is made."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name in PRODUCTS:
            self.seen.append(tuple(settings()))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CALLS)
def test_every_product_in_python_is_made_under_the_guard(name, device, monkeypatch):
    """With the loss's loop in PyTorch, so that its products are seen."""
    from dhcl_ops import _contrastive_stream as streaming

    monkeypatch.setattr(streaming, "contrastive", _ops.OPS["contrastive"].reference)
    torch.set_float32_matmul_precision("medium")
    with Products() as products:
        CALLS[name](device)
    assert products.seen
    assert set(products.seen) == {("ieee", "ieee")}


def test_the_loop_in_cpp_is_under_the_guard(device, monkeypatch):
    if not _ops.OPS["contrastive"].compiled(device.type):
        pytest.skip("the reference runs here, which the test above looks at")
    seen = []
    guard = _precision._guard

    class Spy:
        def enter(self):
            entered = guard.enter()
            seen.append(("enter", *settings()))
            return entered

        def leave(self):
            seen.append(("leave", *settings()))
            guard.leave()

    monkeypatch.setattr(_precision, "_guard", Spy())
    torch.set_float32_matmul_precision("high")
    compiled = torch.compile(debiased_contrastive_loss, fullgraph=True, backend="aot_eager")
    for call in (debiased_contrastive_loss, compiled):
        seen.clear()
        call(rows(8, 64, 0).to(device), rows(30, 64, 1).to(device), torch.arange(8).to(device))
        assert seen == [("enter", "ieee", "ieee"), ("leave", "ieee", "ieee")]
    assert settings() == ["tf32", "tf32"]


def test_settings_come_back_after_an_error():
    torch.set_float32_matmul_precision("medium")
    proxies = rows(30, 64, 1)
    proxies[3] = torch.nan
    with pytest.raises(ValueError, match="proxies must be finite"):
        debiased_contrastive_loss(rows(8, 64, 0), proxies, torch.arange(8))
    assert settings() == ["tf32", "bf16"]


def test_sums_in_fp16_are_not_allowed_inside():
    torch.backends.cuda.matmul.allow_fp16_accumulation = True
    try:
        with _precision.ieee_products():
            assert not torch.backends.cuda.matmul.allow_fp16_accumulation
        assert torch.backends.cuda.matmul.allow_fp16_accumulation
    finally:
        torch.backends.cuda.matmul.allow_fp16_accumulation = False


def test_what_was_set_for_all_backends_is_still_inherited():
    for backend in MATMUL:
        backend.fp32_precision = "none"  # torch's older switches set each backend on its own
    torch.backends.fp32_precision = "tf32"
    assert settings() == ["tf32", "tf32"]
    with _precision.ieee_products():
        assert settings() == ["ieee", "ieee"]
    assert settings() == ["tf32", "tf32"]
    torch.backends.fp32_precision = "ieee"
    assert settings() == ["ieee", "ieee"]


def test_the_first_thread_to_leave_does_not_unguard_the_others():
    torch.set_float32_matmul_precision("high")
    inside, done = threading.Event(), threading.Event()
    later = []

    def other():
        with _precision.ieee_products():
            inside.set()
            done.wait(10)
            later.append(settings())

    thread = threading.Thread(target=other)
    with _precision.ieee_products():
        thread.start()
        inside.wait(10)
    done.set()
    thread.join()
    assert later == [["ieee", "ieee"]]
    assert settings() == ["tf32", "tf32"]


def test_guards_nest_and_outlive_errors_inside():
    torch.set_float32_matmul_precision("high")
    with contextlib.suppress(RuntimeError), _precision.ieee_products():
        with _precision.ieee_products():
            assert settings() == ["ieee", "ieee"]
        assert settings() == ["ieee", "ieee"]
        raise RuntimeError
    assert settings() == ["tf32", "tf32"]
