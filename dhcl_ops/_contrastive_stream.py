"""The contrastive loss and its gradients, streamed over the proxies.

A chunk of proxies at a time, torch's matrix product gives the similarities, a kernel of
:mod:`dhcl_ops._contrastive_kernels` turns them into running sums and gradient weights, and a second
product reads the weighted proxies out. The (B, K) logits never exist as a whole. The loops are one
op each, so that a compiled graph sees neither chunks nor buffers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.nn.functional import normalize

from dhcl_ops import _contrastive_kernels as kernels
from dhcl_ops._contrastive_kernels import Roles, Settings, Sums, grouped
from dhcl_ops._contrastive_listed import NOTHING, Listed, weigh
from dhcl_ops._ops import below_autograd, define
from dhcl_ops._precision import ieee_products
from dhcl_ops._products import (
    TERMS,
    fp32_sums,
    pays_to_split,
    pieces_of,
    split_operand,
    split_product,
)

# The name that errors begin with.
OP = "debiased_contrastive_loss"
# Bytes of the buffers for one chunk, and the fewest and most proxies in it.
WORKSPACE = {"cpu": 24 << 20, "cuda": 256 << 20}
_CHUNK = {"cpu": (256, 4096), "cuda": (4096, 1 << 20)}
# Powers of two that keep operands and weights out of fp16's subnormal numbers.
_OPERAND_SCALE = 2.0**8
WEIGHT_SCALE = 2.0**15
# A temperature that puts the floor of the debiased estimate at -inf.
_NO_FLOOR = 5e-324


class Streaming(NamedTuple):
    """How the loss is computed."""

    one_pass: bool  # the gradient with respect to the features, along with the loss
    fast: bool  # fp32 operands rounded to fp16, on CUDA
    columns: int  # proxies in a chunk; 0: chosen for the workspace


class Results(NamedTuple):
    """What the first pass over the proxies gives."""

    losses: torch.Tensor  # (B,) float64
    gradient: torch.Tensor  # (B, d) of each loss by its feature, or (0, d) without one_pass
    state: torch.Tensor  # (B, 6) float64, the rows' sums
    counts: torch.Tensor  # (B, 3) int64
    rows: torch.Tensor  # (B, 9) float64, coefficients of the slopes


class Rows(NamedTuple):
    """What a second pass needs of the results of the first."""

    state: torch.Tensor
    counts: torch.Tensor
    rows: torch.Tensor


class SecondPass(NamedTuple):
    """How the gradients are computed, and which are wanted."""

    aggregation: int
    temperature: float
    beta: float
    columns: int
    for_features: bool
    for_proxies: bool


# ---- products of chunks -------------------------------------------------------------------------


def _columns(asked: int, per_column: int, proxies: torch.Tensor) -> int:
    """Proxies in a chunk: as asked, or as many as the workspace has room for."""
    columns = asked
    if columns <= 0:
        kind = "cuda" if proxies.is_cuda else "cpu"
        least, most = _CHUNK[kind]
        columns = min(max(WORKSPACE[kind] // max(per_column, 1), least), most)
        columns -= columns % 16
    return max(min(columns, len(proxies)), 1)


class Operands:
    """The two factors of the products, chunk by chunk, in the format they are multiplied in.

    Products are fp32 (fp64 for fp64 operands) and come multiplied by ``scale``; 16-bit operands are
    multiplied as they are on CUDA, with fp32 sums, and as fp32 on the CPU. ``fast`` rounds fp32
    operands to fp16 on CUDA; ``split`` makes fp32 products of fp16 pieces.
    """

    def __init__(
        self,
        features: torch.Tensor,
        proxies: torch.Tensor,
        *,
        fast: bool,
        columns: int,
        weighted: bool = False,
        split: bool = False,
    ) -> None:
        double = torch.float64 in (features.dtype, proxies.dtype)
        self.sums = torch.float64 if double else torch.float32
        self.proxies = proxies
        self.scale = 1.0
        self.format = self.sums
        if features.is_cuda and not double:
            if features.dtype == proxies.dtype and features.dtype != torch.float32:
                self.format = features.dtype
            elif fast:
                self.format = torch.float16
                self.scale = _OPERAND_SCALE
        self.narrow = self.format != self.sums
        self.weight_scale = WEIGHT_SCALE if self.format == torch.float16 else 1.0
        rows, width = features.shape
        if self.scale != 1.0:
            self.left = (features.float() * self.scale).to(self.format)
        else:
            self.left = features.to(self.format).contiguous()
        self.converts = proxies.dtype != self.format or self.scale != 1.0
        device = features.device
        size = torch.empty(0, dtype=self.sums).element_size()
        narrow_size = torch.empty(0, dtype=self.format).element_size()
        per_column = rows * size
        per_column += rows * narrow_size if weighted else 0
        per_column += width * narrow_size if self.converts else 0
        # Pieces of products and proxies, and what making them takes.
        per_column += 24 * (rows + width) if split else 0
        self.columns = _columns(columns, per_column, proxies)
        self._products = None
        if not split:
            self._products = torch.empty(rows * self.columns, dtype=self.sums, device=device)
        self._converted = None
        if self.converts:
            self._converted = torch.empty(self.columns, width, dtype=self.format, device=device)
        self._weights = None
        if weighted:
            self._weights = torch.empty(rows * self.columns, dtype=self.format, device=device)

    def chunks(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """First column, products (B, n) times ``scale`` squared, and the chunk's proxies (n, d)."""
        for start in range(0, len(self.proxies), self.columns):
            chunk = self.proxies[start : start + self.columns]
            if self._converted is not None:
                converted = self._converted[: len(chunk)]
                if self.scale != 1.0:
                    torch.mul(chunk, self.scale, out=converted)
                else:
                    converted.copy_(chunk)
                chunk = converted
            if self._products is None:
                products = split_product(self.left, chunk.t())
            else:
                shape = (len(self.left), len(chunk))
                products = self._products[: shape[0] * shape[1]].view(shape)
                if self.narrow:
                    torch.mm(self.left, chunk.t(), out_dtype=self.sums, out=products)
                else:
                    torch.mm(self.left, chunk.t(), out=products)
            yield start, products, chunk

    def weights(self, columns: int) -> torch.Tensor:
        """The buffer of gradient weights (B, columns)."""
        assert self._weights is not None
        rows = len(self.left)
        return self._weights[: rows * columns].view(rows, columns)

    def read_out(
        self,
        sums: torch.Tensor | None,
        factors: torch.Tensor,
        weights: torch.Tensor,
        chunk: torch.Tensor,
    ) -> torch.Tensor:
        """Running sums (B, d) times their rows' factors, plus weights @ chunk."""
        if self.narrow:
            part = torch.mm(weights, chunk, out_dtype=self.sums)
            return part if sums is None else torch.addcmul(part, sums, factors[:, None], out=sums)
        if sums is None:
            return torch.mm(weights, chunk)
        return sums.mul_(factors[:, None]).addmm_(weights, chunk)


class SplitOperands:
    """The same with fp32 products made of fp16 pieces (:class:`dhcl_ops._products.SplitProducts`).

    A chunk is (n, t d), the pieces that the products' t terms take, of which the first, one or two,
    are all there are and the high one comes last. Its rows are in units of their own, so a weight
    is taken in the largest of these over its row's, and split too; it loses 2^-40 of the largest.
    """

    def __init__(
        self, features: torch.Tensor, proxies: torch.Tensor, columns: int, *, weighted: bool
    ) -> None:
        pieces = pieces_of(features.dtype), pieces_of(proxies.dtype)
        left, self.terms = TERMS[pieces]
        self.pieces = pieces[1]
        self.sums, self.scale, self.weight_scale = torch.float32, 1.0, WEIGHT_SCALE
        self.proxies = proxies
        self.left, self.row_units = split_operand(features, pieces[0], left)
        rows, width = features.shape
        # Products in fp32, their weights in two pieces, the chunk's pieces and units.
        per_column = (8 if weighted else 4) * rows + 2 * width * len(self.terms) + 4
        self.columns = _columns(columns, per_column, proxies)
        self.units = self.row_units
        self._weights = features.new_empty(
            rows * self.columns if weighted else 0, dtype=torch.float32
        )

    def chunks(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """First column, products (B, n), and the chunk's pieces."""
        for start in range(0, len(self.proxies), self.columns):
            rows = self.proxies[start : start + self.columns]
            chunk, self.units = split_operand(rows, self.pieces, self.terms)
            products = fp32_sums(self.left, chunk.t())
            yield start, products.mul_(self.units).mul_(self.row_units[:, None]), chunk

    def weights(self, columns: int) -> torch.Tensor:
        """The buffer of gradient weights (B, columns)."""
        rows = len(self.left)
        return self._weights[: rows * columns].view(rows, columns)

    def read_out(
        self,
        sums: torch.Tensor | None,
        factors: torch.Tensor,
        weights: torch.Tensor,
        chunk: torch.Tensor,
    ) -> torch.Tensor:
        """Running sums (B, d) times their rows' factors, plus weights @ the chunk's proxies."""
        width = chunk.shape[1] // len(self.terms)
        largest = self.units.max()
        rest = weights.mul_(self.units / largest)
        high = rest.to(torch.float16)
        low = (rest - high.float()).to(torch.float16)
        parts = fp32_sums(high, chunk[:, : self.pieces * width]).split(width, dim=1)
        part = parts[0] if self.pieces == 1 else parts[0] + parts[1]
        part = part + fp32_sums(low, chunk[:, (self.pieces - 1) * width : self.pieces * width])
        part = part * largest
        return part if sums is None else torch.addcmul(part, sums, factors[:, None], out=sums)


def _operands(
    features: torch.Tensor, proxies: torch.Tensor, streaming: Streaming
) -> Operands | SplitOperands:
    """fp32 products are made of pieces where that pays; 16-bit ones are made as they are."""
    same = features.dtype == proxies.dtype and features.dtype != torch.float32
    if pays_to_split(features, proxies) and not (same or streaming.fast):
        return SplitOperands(features, proxies, streaming.columns, weighted=streaming.one_pass)
    one_pass, fast, columns = streaming
    return Operands(features, proxies, fast=fast, columns=columns, weighted=one_pass)


# ---- the loss -----------------------------------------------------------------------------------


class Partial(NamedTuple):
    """What a pass over some of the proxies gives, from which those over others can be added."""

    sums: Sums
    read_out: torch.Tensor | None  # (B, d) of the proxies, weighted with e^((1+beta)(s - max))
    unit: float  # by which the read-out is too large


def stream_sums(
    features: torch.Tensor,
    proxies: torch.Tensor,
    roles: Roles,
    settings: Settings,
    streaming: Streaming,
    listed: Listed = NOTHING,
) -> Partial:
    """The sums of each row over these proxies and, with ``one_pass``, what is read out of them."""
    with ieee_products(), torch.autocast(features.device.type, enabled=False):
        one_pass = streaming.one_pass
        operands = _operands(features, proxies, streaming)
        sums = kernels.new_sums(len(features), _slots(roles, settings), features.device)
        weights = factors = read_out = None
        if one_pass:
            factors = torch.empty(len(features), dtype=operands.sums, device=features.device)
        scale = 1.0 / settings.temperature / operands.scale**2
        for start, products, chunk in operands.chunks():
            if one_pass:
                weights = operands.weights(len(chunk))
            _weigh(products, roles, listed, start, scale)
            kernels.stream(
                *sums, products, weights, factors, *roles,
                start, scale, settings.beta, operands.weight_scale,
            )  # fmt: skip
            if factors is not None and weights is not None:
                read_out = operands.read_out(read_out, factors, weights, chunk)
        return Partial(sums, read_out, operands.weight_scale * operands.scale)


def stream_loss(
    features: torch.Tensor,
    proxies: torch.Tensor,
    roles: Roles,
    settings: Settings,
    streaming: Streaming,
    listed: Listed = NOTHING,
) -> Results:
    """The loss of each row and, with ``one_pass``, its gradient with respect to the feature."""
    with torch.autocast(features.device.type, enabled=False):
        sums, read_out, unit = stream_sums(features, proxies, roles, settings, streaming, listed)
        _refuse(sums, settings, proxies)
        losses, rows = finished(sums, settings, listed)
        if read_out is None:
            gradient = features.new_empty(0, features.shape[1])
        else:
            unit *= settings.temperature
            gradient = read_out.mul_((rows[:, kernels.ALPHA, None] / unit).to(read_out.dtype))
            pull = (rows[:, kernels.SLOPE, None] / -settings.temperature).to(gradient.dtype)
            positives = proxies.index_select(0, roles.labels).to(gradient.dtype)
            gradient.addcmul_(positives, pull)
        return Results(losses, gradient, sums.state, sums.counts, rows)


def finished(
    sums: Sums, settings: Settings, listed: Listed = NOTHING
) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses (B,) of these sums, and the coefficients (B, 9) of their slopes."""
    # The kernel takes the temperature for the floor alone, which weights may lie below.
    floored = settings if listed.rows is None else settings._replace(temperature=_NO_FLOOR)
    losses, rows = kernels.finish(*sums, *floored)
    return losses, rows


def _weigh(products: torch.Tensor, roles: Roles, listed: Listed, start: int, scale: float) -> None:
    """Add the logarithms of listed weights to the products of a chunk."""
    if listed.rows is not None:
        weigh(products, roles.labels, roles.proxy_labels, *listed, start, scale)


def _slots(roles: Roles, settings: Settings) -> int | None:
    """Most positives that a row can have, where their logits are needed one by one."""
    if settings.aggregation != kernels.EACH:
        return None
    assert roles.proxy_labels is not None
    if len(roles.proxy_labels) == 0:
        return 0
    return int(torch.unique(roles.proxy_labels, return_counts=True)[1].max())


def _refuse(sums: Sums, settings: Settings, proxies: torch.Tensor) -> None:
    """Raise on the CPU for what shows only in the sums; on CUDA the kernel asserts."""
    state, counts, _ = sums
    if state.is_cuda or len(state) == 0:
        return
    # An infinite logit shows as the maximum, one that is NaN in the sums.
    total = float(state[:, kernels.MASS].sum() + state[:, kernels.POSITIVE_MASS].sum())
    top = float(state[:, kernels.MAX].max().maximum(state[:, kernels.POSITIVE_MAX].max()))
    if not (math.isfinite(total) and top < math.inf):
        wrong = (~proxies.isfinite().all(1)).nonzero()
        if len(wrong):
            where = f"proxies must be finite (got one that is not at row {int(wrong[0])})"
            raise ValueError(f"{OP}: {where}")
        raise ValueError(f"{OP}: similarities overflow float32")
    if int(counts[:, kernels.POSITIVES].min()) == 0:
        without = (counts[:, kernels.POSITIVES] == 0).nonzero()
        raise ValueError(
            f"{OP}: every row needs a positive proxy (got none for batch position "
            f"{int(without[0])})"
        )
    if not settings.prior:
        kappa, negatives = settings.kappa, counts[:, kernels.NEGATIVES]
        wrong = (kappa >= negatives) & (negatives > 0)
        if bool(wrong.any()):
            wrong = wrong.nonzero()
            row = int(wrong[0])
            raise ValueError(
                f"{OP}: kappa must be smaller than the number of negatives (got "
                f"{float(kappa[row]):g} and {int(negatives[row])} at batch position {row})"
            )


def stream_gradients(
    grad: torch.Tensor,
    features: torch.Tensor,
    proxies: torch.Tensor,
    roles: Roles,
    first: Rows,
    options: SecondPass,
    listed: Listed = NOTHING,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients with respect to features and proxies by a second pass; empty if not wanted.

    ``grad`` (B,) float64 is that of the losses.
    """
    with ieee_products(), torch.autocast(features.device.type, enabled=False):
        double = torch.float64 in (features.dtype, proxies.dtype)
        left = features.to(torch.float64 if double else torch.float32)
        # These products are fp32 whatever the formats of the operands.
        split = pays_to_split(features, proxies)
        operands = Operands(left, proxies, fast=False, columns=options.columns, split=split)
        temperature = options.temperature
        multiply = split_product if split else torch.mm
        by_feature = torch.zeros_like(left) if options.for_features else left.new_empty(0)
        by_proxy = torch.empty_like(proxies) if options.for_proxies else proxies.new_empty(0)
        for start, products, chunk in operands.chunks():
            _weigh(products, roles, listed, start, 1.0 / temperature)
            kernels.slopes(
                products, first.rows, first.state, first.counts, grad, *roles,
                start, 1.0 / temperature, options.beta, options.aggregation,
            )  # fmt: skip
            if options.for_features:
                if split:
                    by_feature.add_(split_product(products, chunk))
                else:
                    by_feature.addmm_(products, chunk)
            if options.for_proxies:
                part = multiply(products.t(), left).div_(temperature)
                by_proxy[start : start + len(chunk)] = part
        return by_feature.div_(temperature).to(features.dtype), by_proxy


# ---- ops ----------------------------------------------------------------------------------------


def _second_pass(settings: Settings, streaming: Streaming) -> SecondPass:
    """A second pass for both gradients."""
    aggregation, temperature, beta = settings.aggregation, settings.temperature, settings.beta
    return SecondPass(aggregation, temperature, beta, streaming.columns, True, True)


def _keep(
    ctx: Any,
    features: torch.Tensor,
    proxies: torch.Tensor,
    roles: Roles,
    settings: Settings,
    streaming: Streaming,
    listed: Listed,
    results: Results,
) -> None:
    """Keep for backward what it needs."""
    ctx.options = _second_pass(settings, streaming)
    ctx.one_pass = streaming.one_pass
    ctx.format = features.dtype
    if ctx.one_pass and not ctx.needs_input_grad[1]:
        # The proxies are not kept, so they may change before backward.
        ctx.save_for_backward(results.gradient)
    else:
        gradient = results.gradient if ctx.one_pass else None
        first = (results.state, results.counts, results.rows)
        ctx.save_for_backward(gradient, features, proxies, *roles, *first, *listed)
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, grad: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients with respect to features and proxies, given that of the losses."""
    if grad is None:
        return None, None
    by_feature = by_proxy = None
    gradient, *saved = ctx.saved_tensors
    for_features, for_proxies = ctx.needs_input_grad[:2]
    if ctx.one_pass and for_features:
        # The op refuses a second derivative, and costs several times what it does.
        scaled = scale_rows if torch.is_grad_enabled() else _scale_rows
        by_feature = scaled(gradient, grad).to(ctx.format)
        for_features = False
    if for_features or for_proxies:
        options = ctx.options._replace(for_features=for_features, for_proxies=for_proxies)
        count = len(Listed._fields)
        parts = contrastive_backward(grad, *saved[:-count], *options, *saved[-count:])
        by_feature = parts[0] if for_features else by_feature
        by_proxy = parts[1] if for_proxies else None
    return by_feature, by_proxy


def _reduced(losses: torch.Tensor, dtype: torch.dtype, divisor: int | None) -> torch.Tensor:
    """Losses (B,) in this dtype or, with a divisor, their sum divided by it."""
    losses = losses.to(dtype)
    return losses if divisor is None else losses.sum() / divisor


class _Differentiable(torch.autograd.Function):
    """The loss with its gradients; for calls outside of a compiled graph.

    It does what the op's registered gradient does, which costs a call 80 us more, and the
    reduction, whose three operations would each be a node of autograd's graph.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: torch.Tensor,
        proxies: torch.Tensor,
        roles: Roles,
        settings: Settings,
        streaming: Streaming,
        listed: Listed,
        dtype: torch.dtype,
        divisor: int | None,
    ) -> tuple[torch.Tensor, ...]:
        results = Results(*_loss_alone(features, proxies, roles, settings, streaming, listed))
        _keep(ctx, features, proxies, roles, settings, streaming, listed, results)
        ctx.rows, ctx.divisor = len(features), divisor
        # The gradient counts as differentiable, so that a second derivative is refused, not zero.
        return (_reduced(results.losses, dtype, divisor), *results[1:])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, *others: Any) -> tuple[Any, ...]:  # type: ignore[override]
        if grad is not None:
            if ctx.divisor is not None:
                grad = (grad / ctx.divisor).expand(ctx.rows)
            grad = grad.double()
        # The ops refuse a second derivative, for which they have to be recorded.
        with contextlib.nullcontext() if torch.is_grad_enabled() else below_autograd():
            return (*_gradients(ctx, grad), *(None,) * (len(ctx.needs_input_grad) - 2))


def _loss_alone(*grouped_arguments: Any) -> tuple[torch.Tensor, ...]:
    """The op's results, without what torch puts around an op that has a gradient."""
    features, proxies, *groups = grouped_arguments
    with below_autograd():
        results: tuple[torch.Tensor, ...] = contrastive(
            features, proxies, *(each for group in groups for each in group)
        )
    return results


def loss_of(
    features: torch.Tensor,
    proxies: torch.Tensor,
    roles: Roles,
    settings: Settings,
    streaming: Streaming,
    dtype: torch.dtype,
    divisor: int | None,
    listed: Listed = NOTHING,
) -> Results:
    """The results of :func:`stream_loss`, the losses reduced and differentiable once.

    They are of this dtype: one for each row or, with a divisor, () their sum divided by it.
    """
    if torch.compiler.is_compiling():
        flat = (*roles, *settings, *streaming, *listed)
        results = Results(*contrastive(features, proxies, *flat))
        return results._replace(losses=_reduced(results.losses, dtype, divisor))
    differentiated = torch.is_grad_enabled() and (features.requires_grad or proxies.requires_grad)
    grouped_arguments = (features, proxies, roles, settings, streaming, listed)
    try:
        if differentiated:
            return Results(*_Differentiable.apply(*grouped_arguments, dtype, divisor))
        results = Results(*_loss_alone(*grouped_arguments))
        return results._replace(losses=_reduced(results.losses, dtype, divisor))
    except RuntimeError as error:
        # C++ can raise nothing but RuntimeError.
        message = str(error)
        if message.startswith(f"{OP}: "):
            raise ValueError(message) from None
        if "out of memory" in message and not isinstance(error, torch.OutOfMemoryError):
            raise torch.OutOfMemoryError(message) from error
        raise


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    features, proxies, roles, settings, streaming, listed = _of_loss(inputs)
    _keep(ctx, features, proxies, roles, settings, streaming, listed, Results(*output))


def _backward(ctx: Any, grad: torch.Tensor | None, *others: Any) -> tuple[Any, ...]:
    return (*_gradients(ctx, grad), *(None,) * (len(ctx.needs_input_grad) - 2))


def _no_double_backward(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(f"{OP}: it is not twice differentiable")


def _loss_sample(device: torch.device) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    features = normalize(torch.randn(3, 24, generator=generator)).to(device)
    proxies = normalize(torch.randn(5, 24, generator=generator)).to(device)
    kappa = torch.full((3,), 0.2, dtype=torch.float64, device=device)
    settings = Settings(kappa, False, kernels.SUM, 0.05, 0.5, False)
    streaming = Streaming(one_pass=True, fast=False, columns=2)
    return (features, proxies, *kernels.sample_roles(device), *settings, *streaming)


def _of_loss(flat: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of :func:`stream_loss` from those of its op."""
    return (*flat[:2], *grouped(flat[2:], Roles, Settings, Streaming, Listed))


def _loss_fake(*flat: Any) -> tuple[torch.Tensor, ...]:
    features, proxies, _, _, streaming, _ = _of_loss(flat)
    batch, width = features.shape
    double = torch.float64 in (features.dtype, proxies.dtype)
    dtype = torch.float64 if double else torch.float32
    state = features.new_empty(batch, 6, dtype=torch.float64)
    gradient = features.new_empty(batch, width, dtype=dtype)
    return (
        state.new_empty(batch),
        gradient if streaming.one_pass else features.new_empty(0, width),
        state,
        features.new_empty(batch, 3, dtype=torch.int64),
        state.new_empty(batch, 9),
    )


contrastive: Any = define(
    "contrastive(Tensor features, Tensor proxies, Tensor labels, Tensor? proxy_labels, "
    "Tensor? row_groups, Tensor? column_groups, Tensor? excluded, Tensor kappa, bool prior, "
    "int aggregation, float temperature, float beta, bool through, bool one_pass, bool fast, "
    "int columns, Tensor? listed_rows=None, Tensor? listed_offsets=None, "
    "Tensor? listed_entries=None, Tensor? listed_logs=None, Tensor? members=None, "
    "Tensor? member_offsets=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    family="contrastive",
    reference=lambda *flat: tuple(stream_loss(*_of_loss(flat))),
    fake=_loss_fake,
    sample=_loss_sample,
    backward=_backward,
    setup_context=_setup_context,
)


def _of_gradients(flat: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of :func:`stream_gradients` from those of its op."""
    return (*flat[:3], *grouped(flat[3:], Roles, Rows, SecondPass, Listed))


def _gradients_fake(*flat: Any) -> tuple[torch.Tensor, torch.Tensor]:
    _, features, proxies, _, _, options, _ = _of_gradients(flat)
    return (
        torch.empty_like(features) if options.for_features else features.new_empty(0),
        torch.empty_like(proxies) if options.for_proxies else proxies.new_empty(0),
    )


def _gradients_sample(device: torch.device) -> tuple[Any, ...]:
    features, proxies, roles, settings, streaming, _ = _of_loss(_loss_sample(device))
    results = stream_loss(features, proxies, roles, settings, streaming)
    grad = torch.ones(3, dtype=torch.float64, device=device)
    options = _second_pass(settings, streaming)
    return (grad, features, proxies, *roles, *results[2:], *options)


contrastive_backward: Any = define(
    "contrastive_backward(Tensor grad, Tensor features, Tensor proxies, Tensor labels, "
    "Tensor? proxy_labels, Tensor? row_groups, Tensor? column_groups, Tensor? excluded, "
    "Tensor state, Tensor counts, Tensor rows, int aggregation, "
    "float temperature, float beta, int columns, bool for_features, bool for_proxies, "
    "Tensor? listed_rows=None, Tensor? listed_offsets=None, Tensor? listed_entries=None, "
    "Tensor? listed_logs=None, Tensor? members=None, Tensor? member_offsets=None) "
    "-> (Tensor, Tensor)",
    family="contrastive",
    reference=lambda *flat: stream_gradients(*_of_gradients(flat)),
    fake=_gradients_fake,
    sample=_gradients_sample,
    backward=_no_double_backward,
    composed="torch.mm around contrastive_slopes_",
)


def _scale_rows(gradient: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """Each row of a gradient (B, d) times its number (B,)."""
    return gradient * grad.to(gradient.dtype)[:, None]


scale_rows: Any = define(
    "contrastive_scale_rows(Tensor gradient, Tensor grad) -> Tensor",
    family="contrastive",
    reference=_scale_rows,
    fake=lambda gradient, grad: torch.empty_like(gradient),
    sample=lambda device: (torch.ones(2, 3, device=device), torch.ones(2, device=device)),
    backward=_no_double_backward,
    composed="torch.mul",
)
