"""csrc/contrastive.cu run on the host, one fiber per CUDA thread, against the PyTorch reference."""

import pytest
import torch

from dhcl_ops import _contrastive_kernels, _contrastive_stream, _ops, debiased_contrastive_loss
from dhcl_ops._contrastive_kernels import ALPHA, MASS, MEAN, SLOPE
from dhcl_ops._contrastive_stream import WEIGHT_SCALE, SplitOperands
from dhcl_ops._products import LOW, TERMS, fp32_sums, split_operand
from tests.checks import call, clones, same_bits
from tests.ops.test_contrastive import assert_kernels_agree, case, kernel_inputs, leaf
from tests.ops.test_false_negatives import weights_of

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]

KERNELS = ("contrastive_stream_", "contrastive_finish", "contrastive_slopes_")


def array(t):
    if not isinstance(t, torch.Tensor):
        return t
    assert t.is_contiguous()
    return (t.view(torch.int16) if t.element_size() == 2 else t).numpy()


class Glue:
    """The kernels under the names and signatures of the ops, as the CUDA glue calls them."""

    def __init__(self, host):
        self.host = host

    def contrastive_stream_(self, *args, fresh=False, pieces=(None,) * 4):
        state, counts, positives, products, weights, factors, *roles = args[:11]
        weight_dtype = products.dtype if weights is None else weights.dtype
        self.host.stream(
            *map(array, (state, counts, positives, products, weights, factors)),
            tuple(map(array, roles)), *args[11:],
            DTYPES.index(products.dtype), DTYPES.index(weight_dtype), fresh,
            tuple(map(array, pieces)),
        )  # fmt: skip

    def split(self, rows, pieces, terms):
        """As :func:`dhcl_ops._products.split_operand`."""
        operand = torch.full((len(rows), len(terms) * rows.shape[1]), 7.0, dtype=torch.float16)
        units = torch.full((len(rows),), 7.0)
        low = sum(1 << place for place, term in enumerate(terms) if term == LOW)
        self.host.split(
            *map(array, (operand, units, rows)), len(terms), low, DTYPES.index(rows.dtype)
        )
        return operand, units

    def contrastive_finish(self, state, counts, positives, kappa, *options):
        loss = torch.full((len(state),), 7.0, dtype=torch.float64)
        rows = torch.full((len(state), 9), 7.0, dtype=torch.float64)
        self.host.finish(*map(array, (loss, rows, state, counts, positives, kappa)), *options)
        return loss, rows

    def contrastive_slopes_(self, products, rows, state, counts, grad, *rest):
        roles, options = rest[:5], rest[5:]
        self.host.slopes(
            *map(array, (products, rows, state, counts, grad.contiguous())),
            tuple(map(array, roles)), *options, DTYPES.index(products.dtype),
        )  # fmt: skip


@pytest.mark.parametrize(
    "name", ["contrastive_stream_", "contrastive_finish", "contrastive_slopes_"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", range(3))
def test_kernels_equal_their_reference(kernels, name, dtype, mode):
    beta = 0.0 if mode == MEAN else 0.3
    inputs = kernel_inputs(name, dtype, mode, beta, b=2, k=600)
    ours, expected = clones(inputs), clones(inputs)
    returned = getattr(Glue(kernels), name)(*ours) or ()
    wanted = call("reference", name, *expected) or ()
    assert_kernels_agree(ours + list(returned), expected + list(wanted), dtype)


@pytest.mark.parametrize("classes", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_added_to_their_products(kernels, dtype, classes):
    columns, start = 150, 7
    weights = weights_of(5, columns, 3, classes=classes)
    generator = torch.Generator().manual_seed(1)
    products = torch.randn(5, columns - start - 4, generator=generator).to(dtype)
    labels = torch.randint(0, columns, (5,), generator=generator)
    for proxy_labels in (None, torch.arange(columns) % 9):
        expected = products.clone()
        rest = (labels, proxy_labels, *weights, start, 20.0)
        call("reference", "contrastive_weigh_", expected, *rest)
        got = products.clone()
        roles = (array(labels), array(proxy_labels), None, None, None)
        listed, code = tuple(map(array, weights)), DTYPES.index(dtype)
        kernels.weigh(array(got), roles, listed, start, 20.0, code, (None, None))
        assert same_bits(got, expected)
        # In units, as products of pieces are: powers of two, so nothing is rounded otherwise.
        units = torch.full((5,), 0.5), torch.full((products.shape[1],), 0.25)
        scaled = products * 8
        kernels.weigh(array(scaled), roles, listed, start, 20.0, code, tuple(map(array, units)))
        torch.testing.assert_close(scaled / 8, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", range(3))
def test_the_first_chunk_begins_the_sums(kernels, mode):
    inputs = kernel_inputs("contrastive_stream_", torch.float32, mode, 0.3, b=2, k=600)
    inputs[:2] = _contrastive_kernels.new_sums(2, None, torch.device("cpu"))[:2]
    begun, fresh = clones(inputs), clones(inputs)
    fresh[0].fill_(torch.nan)
    fresh[1].fill_(7)
    Glue(kernels).contrastive_stream_(*begun)
    Glue(kernels).contrastive_stream_(*fresh, fresh=True)
    for a, b in zip(fresh, begun, strict=True):
        assert not isinstance(a, torch.Tensor) or same_bits(a, b)


def read_out(d, dtype, rows=3, seed=0):
    """Sums that were read out of proxies, another part of them, and factors."""
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
    return make(rows, d), make(rows, d), make(rows).abs()


@pytest.mark.parametrize("d", [1, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("with_part", [False, True])
def test_what_was_read_out_shrinks(kernels, d, dtype, with_part):
    sums, part, factors = read_out(d, dtype)
    expected = sums * factors[:, None]
    if with_part:
        expected = expected + part
    kernels.fold(
        array(sums), array(part) if with_part else None, array(factors), DTYPES.index(dtype)
    )
    assert same_bits(sums, expected)


@pytest.mark.parametrize("d", [1, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("proxy_dtype", DTYPES)
@pytest.mark.parametrize("listed", [False, True])
def test_the_gradient_of_what_was_read_out(kernels, d, dtype, proxy_dtype, listed):
    sums, proxies, _ = read_out(d, dtype)
    proxies = proxies.to(proxy_dtype)
    rows = torch.linspace(-1, 1, 27, dtype=torch.float64).view(3, 9)
    labels = torch.tensor([2, 0, 2]) if listed else None
    own = proxies if labels is None else proxies[labels]
    alpha = (rows[:, ALPHA, None] / 40.0).to(dtype)
    pull = (rows[:, SLOPE, None] / -0.05).to(dtype)
    expected = sums * alpha + own.to(dtype) * pull
    kernels.gradient(
        *map(array, (sums, rows, proxies, labels)), 40.0, 0.05,
        DTYPES.index(dtype), DTYPES.index(proxy_dtype),
    )  # fmt: skip
    assert same_bits(sums, expected)


@pytest.mark.parametrize("bad", [-1, 3])
def test_the_gradient_reports_a_label_out_of_range(host, bad):
    sums, proxies, _ = read_out(5, torch.float32)
    rows, labels = torch.zeros(3, 9, dtype=torch.float64), torch.tensor([0, bad, 1])
    with pytest.raises(RuntimeError, match=rf"labels must be in \[0, 3\) \(got {bad}\)"):
        host.gradient(*map(array, (sums, rows, proxies, labels)), 1.0, 0.05, 0, 0)


@pytest.mark.parametrize("weights", [torch.float16, torch.bfloat16])
def test_weights_in_16_bits(host, weights):
    inputs = kernel_inputs("contrastive_stream_", torch.float32, 1, 0.3, b=2, k=70, weights=weights)
    inputs[-1] = WEIGHT_SCALE if weights == torch.float16 else 1.0
    ours, expected = clones(inputs), clones(inputs)
    Glue(host).contrastive_stream_(*ours)
    call("reference", "contrastive_stream_", *expected)
    got, wanted = ours.pop(4).double(), expected.pop(4).double()
    assert wanted.max() > 1e-3
    step = 2.0**-10 if weights == torch.float16 else 2.0**-7
    assert ((got - wanted).abs() <= step * wanted.abs() + 6e-8).all()
    assert_kernels_agree(ours, expected, torch.float32)


@pytest.mark.parametrize("k", [1, 31, 513])
def test_same_bits_in_every_order_of_threads(host, k):
    seen = []
    for schedule in ("forward", "reverse", "shuffle:1", "shuffle:2"):
        host.set_schedule(schedule)
        inputs = kernel_inputs("contrastive_stream_", torch.float32, 0, 0.3, b=2, k=k)
        Glue(host).contrastive_stream_(*inputs)
        seen.append([inputs[0], inputs[2], inputs[4], inputs[5]])
    host.set_schedule("")
    for other in seen[1:]:
        assert all(same_bits(a, b) for a, b in zip(seen[0], other, strict=True))


@pytest.mark.parametrize("mode", ["single", "each", "sum", "mean"])
@pytest.mark.parametrize("gradient", ["stop", "through"])
def test_the_whole_loss_on_these_kernels(host, monkeypatch, mode, gradient):
    several = mode != "single"
    f, c, labels, proxy_labels, *_ = case(5, 37, 10, several=several)
    groups = (torch.arange(5) % 3, torch.arange(37) % 4)

    def run():
        x, y = leaf(f, "cpu"), leaf(c, "cpu")
        loss = debiased_contrastive_loss(
            x, y, labels, proxy_labels=proxy_labels, positives=mode if several else "each",
            kappa=0.4, beta=0.2, hardness_gradient=gradient, exclude=groups, chunk_size=16,
        )  # fmt: skip
        loss.backward()
        return loss.detach(), x.grad, y.grad

    expected = run()
    glue = Glue(host)
    calls = []

    def counted(name):
        def kernel(*args):
            calls.append(name)
            return getattr(glue, name)(*args)

        return kernel

    for attribute, name in (
        ("stream", "contrastive_stream_"),
        ("finish", "contrastive_finish"),
        ("slopes", "contrastive_slopes_"),
    ):
        monkeypatch.setattr(_contrastive_kernels, attribute, counted(name))
    # The streaming in PyTorch, which calls the kernels one by one.
    reference = _ops.OPS["contrastive"].reference
    monkeypatch.setattr(_contrastive_stream, "contrastive", reference)
    got = run()
    assert calls.count("contrastive_stream_") == 3
    assert calls.count("contrastive_slopes_") == 3
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# ---- products made of pieces ---------------------------------------------------------------------


def rows_of_all_sizes(n, d, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=generator)
    rows *= 2.0 ** torch.randint(-9, 3, (n, 1), generator=generator)
    if dtype == torch.float32:
        rows[0] *= 1e-41  # less than fp32's normal numbers
        rows[1] *= 2.0**126 / rows[1].abs().max().clamp(min=1.0)
    rows[2] = 0
    return rows.to(dtype)


@pytest.mark.parametrize("d", [1, 130, 600])
@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("terms", [TERMS[2, 2][1], TERMS[1, 1][0]])
def test_pieces_have_the_bits_of_their_reference(kernels, d, dtype, terms):
    rows = rows_of_all_sizes(5, d, dtype)
    operand, units = Glue(kernels).split(rows, 2, terms)
    expected, expected_units = split_operand(rows, 2, terms)
    assert same_bits(units, expected_units)
    assert same_bits(operand, expected)


def test_pieces_of_what_is_not_finite_are_not_finite(host):
    rows = torch.ones(3, 9)
    rows[0, 4], rows[1, 2] = torch.inf, torch.nan
    operand, _ = Glue(host).split(rows, 2, (0, 1))
    assert operand.isfinite().all(1).tolist() == [False, False, True]


def powers(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return 2.0 ** torch.randint(-9, 9, (n,), generator=generator)


@pytest.mark.parametrize("mode", range(3))
def test_products_in_units_of_their_own(kernels, mode):
    inputs = kernel_inputs("contrastive_stream_", torch.float32, mode, 0.3, b=2, k=600)
    inputs[-1] = WEIGHT_SCALE
    plain, ours = clones(inputs), clones(inputs)
    rows, columns = powers(2, 0), powers(600, 1)
    ours[3].div_(rows[:, None]).div_(columns)
    ours[4] = torch.full((2, 600), 7.0, dtype=torch.float16)
    low, largest = torch.full_like(ours[4], 7.0), torch.zeros(2)
    Glue(kernels).contrastive_stream_(*ours, pieces=(rows, columns, low, largest))
    Glue(kernels).contrastive_stream_(*plain)
    for place in (0, 1, 2, 3, 5):
        assert ours[place] is None or same_bits(ours[place], plain[place])
    assert largest.tolist() == [columns.max()] * 2
    weights = plain[4] * (columns / columns.max())
    assert weights.max() > 1e-3
    high = weights.half()
    assert same_bits(ours[4], high)
    assert same_bits(low, (weights - high.float()).half())


def test_rows_of_products_and_weights_with_room_behind(kernels):
    """Nothing behind the columns is read, and the weights there are zero."""
    inputs = kernel_inputs("contrastive_stream_", torch.float32, 1, 0.3, b=2, k=605)
    inputs[4] = torch.full((2, 605), 7.0, dtype=torch.float16)
    rows, columns = powers(2, 0), powers(605, 1)
    plain, ours = clones(inputs), clones(inputs)
    low, wide_low = (torch.full((2, n), 7.0, dtype=torch.float16) for n in (605, 608))
    largest = torch.zeros(2)
    ours[3] = torch.nn.functional.pad(ours[3], (0, 3), value=torch.nan)
    ours[4] = torch.full((2, 608), 7.0, dtype=torch.float16)
    Glue(kernels).contrastive_stream_(*ours, pieces=(rows, columns, wide_low, largest))
    Glue(kernels).contrastive_stream_(*plain, pieces=(rows, columns, low, largest))
    for place in (0, 1, 5):
        assert same_bits(ours[place], plain[place])
    for wide, narrow in ((ours[4], plain[4]), (wide_low, low)):
        assert same_bits(wide[:, :605].contiguous(), narrow)
        assert not wide[:, 605:].any()


def test_products_in_units_without_weights(host):
    inputs = kernel_inputs("contrastive_stream_", torch.float32, 1, 0.3, b=2, k=70)
    inputs[4] = inputs[5] = None
    plain, ours = clones(inputs), clones(inputs)
    rows, columns = powers(2, 0), powers(70, 1)
    ours[3].div_(rows[:, None]).div_(columns)
    Glue(host).contrastive_stream_(*ours, pieces=(rows, columns, None, None))
    Glue(host).contrastive_stream_(*plain)
    assert all(same_bits(ours[i], plain[i]) for i in (0, 1))


@pytest.mark.parametrize("d", [1, 600])
@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("fresh", [False, True])
def test_what_was_read_out_in_pieces(kernels, d, pieces, fresh):
    sums, low, factors = read_out(d, torch.float32)
    parts = [read_out(d, torch.float32, seed=seed)[0] for seed in range(3, 3 + pieces)]
    units = powers(3, 2)
    expected = (sum(parts[1:], parts[0]) + low) * units[:, None]
    if fresh:
        sums.fill_(torch.nan)
    else:
        expected = expected + sums * factors[:, None]
    kernels.fold_pieces(*map(array, (sums, torch.cat(parts, 1), low, factors, units)), fresh)
    assert same_bits(sums, expected)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32),
                                    (torch.float32, torch.float16)])  # fmt: skip
def test_the_loop_over_pieces_has_the_bits_of_its_pytorch_form(host, monkeypatch, dtypes):
    """The kernels in the order in which csrc/contrastive_split.h calls them."""
    f, c, labels, *_ = case(5, 37, 10)
    f, c = f.to(dtypes[0]), (c * powers(37, 4)[:, None]).to(dtypes[1])
    glue = Glue(host)
    roles = _contrastive_kernels.Roles(labels, None, None, None, None)
    settings = (1 / 0.05, 0.2, WEIGHT_SCALE)
    operands = SplitOperands(f, c, 16, weighted=True)
    theirs = _contrastive_kernels.new_sums(5, None, f.device)
    expected, factors = None, torch.empty(5)
    for start, products, chunk in operands.chunks():
        weights = operands.weights(len(chunk))
        glue.contrastive_stream_(*theirs, products, weights, factors, *roles, start, *settings)
        expected = operands.read_out(expected, factors, weights, chunk)

    pieces = tuple(1 if dtype != torch.float32 else 2 for dtype in dtypes)
    left_terms, right_terms = TERMS[pieces]
    left, row_units = glue.split(f, pieces[0], left_terms)
    ours = _contrastive_kernels.new_sums(5, None, f.device)
    sums, largest = torch.empty(5, 10), torch.empty(5)
    for start in range(0, 37, 16):
        chunk, units = glue.split(c[start : start + 16].contiguous(), pieces[1], right_terms)
        products = fp32_sums(left, chunk.t())
        high, low = (torch.empty(5, len(chunk), dtype=torch.float16) for _ in range(2))
        glue.contrastive_stream_(
            *ours, products, high, factors, *roles, start, *settings,
            fresh=start == 0, pieces=(row_units, units, low, largest),
        )  # fmt: skip
        last = (pieces[1] - 1) * 10
        part = fp32_sums(high, chunk[:, : last + 10])
        low_part = fp32_sums(low, chunk[:, last : last + 10])
        host.fold_pieces(*map(array, (sums, part, low_part, factors, largest)), start == 0)
    assert same_bits(ours.state, theirs.state)
    assert same_bits(ours.counts, theirs.counts)
    # torch's addcmul rounds once on some processors.
    torch.testing.assert_close(sums, expected, rtol=1e-6, atol=1e-6)


def test_what_the_kernels_assert(host):
    glue = Glue(host)
    inputs = kernel_inputs("contrastive_finish", torch.float32, 1, 0.3)
    inputs[3] = inputs[3] + 1e6
    with pytest.raises(RuntimeError, match="kappa must be smaller than the number of negatives"):
        glue.contrastive_finish(*inputs)
    inputs = kernel_inputs("contrastive_finish", torch.float32, 1, 0.3)
    inputs[1][2, 1] = 0
    with pytest.raises(RuntimeError, match="got none for batch position 2"):
        glue.contrastive_finish(*inputs)
    inputs = kernel_inputs("contrastive_stream_", torch.float32, 0, 0.3)
    inputs[2] = inputs[2][:, :3].contiguous()
    with pytest.raises(RuntimeError, match="more positives than 3"):
        glue.contrastive_stream_(*inputs)


def test_nan_is_passed_on(host):
    for mode in range(3):
        inputs = kernel_inputs("contrastive_stream_", torch.float32, mode, 0.3)
        inputs[3][0] = float("nan")
        Glue(host).contrastive_stream_(*inputs)
        state, counts = inputs[:2]
        assert state[0, MASS].isnan()
        kappa = torch.zeros(len(state), dtype=torch.float64)
        counts[:, 1].clamp_(min=1)
        loss, _ = Glue(host).contrastive_finish(
            state, counts, inputs[2], kappa, False, mode, 0.05, 0.3, False
        )
        assert loss[0].isnan()
        assert not loss[1].isnan()


def test_empty_launches(host):
    inputs = kernel_inputs("contrastive_stream_", torch.float32, 1, 0.0)
    empty = [
        t[:0].contiguous() if isinstance(t, torch.Tensor) and len(t) == 7 else t for t in inputs
    ]
    Glue(host).contrastive_stream_(*empty)
    loss, rows = Glue(host).contrastive_finish(
        *empty[:2], None, torch.zeros(0, dtype=torch.float64), False, 1, 0.05, 0.0, False
    )
    assert loss.shape == (0,)
    assert rows.shape == (0, 9)
    for shape in ((0, 5), (3, 0)):
        sums, factors = torch.zeros(shape), torch.ones(shape[0])
        host.fold(array(sums), None, array(factors), 0)
        host.fold_pieces(*map(array, (sums, sums, sums, factors, factors)), True)
        operand = torch.zeros(shape[0], 2 * shape[1], dtype=torch.float16)
        host.split(*map(array, (operand, factors, sums)), 2, 1, 0)
        no_rows = torch.zeros(shape[0], 9, dtype=torch.float64)
        labels = torch.zeros(shape[0], dtype=torch.int64)
        host.gradient(*map(array, (sums, no_rows, sums, labels)), 1.0, 0.05, 0, 0)


def test_every_kernel_here_has_a_host_run():
    ours = {n for n, op in _ops.OPS.items() if op.family == "contrastive" and not op.composed}
    # The loss is these kernels, two more that have tests above, and torch's products.
    assert ours == {
        "contrastive",
        "contrastive_stream_",
        "contrastive_finish",
        "contrastive_slopes_",
        "contrastive_weigh_",
    }
