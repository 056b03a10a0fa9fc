"""The debiased, hard-negative-weighted contrastive loss, streamed over its proxies.

Mathematics: method.md in docs, section "Loss". It is InfoNCE (van den Oord et al. 2018) with the
debiased negatives of Chuang et al. (NeurIPS 2020) and the hard-negative weights of Robinson et al.
(ICLR 2021), in log space.

The proxies are streamed in chunks: torch's matrix product gives a chunk of similarities, one fused
kernel (``csrc/contrastive.h``) turns it into running sums and gradient weights, and a second
product reads the weighted proxies out. The (B, K) logits never exist as a whole.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from dhcl_ops import _checks
from dhcl_ops._ops import define

__all__ = ["ContrastiveStats", "debiased_contrastive_loss"]

# Columns of a row's state and coefficients, as in csrc/contrastive.h.
_MAX, _MASS, _NORM, _SQUARES, _POSITIVE_MAX, _POSITIVE_MASS = range(6)
_NEGATIVES, _POSITIVES, _HARDEST = range(3)
_ALPHA, _GAMMA, _SLOPE, _POSITIVE, _LOG_MASS, _LOG_KAPPA, _LOG_KEEP, _FLOOR, _CLAMPED = range(9)
_EACH, _SUM, _MEAN = range(3)
_AGGREGATIONS = {"each": _EACH, "sum": _SUM, "mean": _MEAN}

# Bytes of the buffers for one chunk, and the fewest and most proxies in it.
_WORKSPACE = {"cpu": 24 << 20, "cuda": 256 << 20}
_CHUNK = {"cpu": (256, 4096), "cuda": (4096, 1 << 20)}
# Powers of two that keep operands and weights out of fp16's subnormal numbers.
_OPERAND_SCALE = 2.0**8
_WEIGHT_SCALE = 2.0**15

_FLOATS = (*_checks.FLOATS, torch.float64)


# ---- what a column is to a row ------------------------------------------------------------------


class _Columns(NamedTuple):
    """Which proxies are positive to a row, which are negative and which are neither."""

    labels: torch.Tensor  # (B,)
    proxy_labels: torch.Tensor | None  # (K,); None: labels are column numbers
    row_groups: torch.Tensor | None  # (B,)
    column_groups: torch.Tensor | None  # (K,)
    excluded: torch.Tensor | None  # (B, E), padded with -1

    def masks(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Positives and negatives (B, stop - start) among these columns."""
        columns = torch.arange(start, stop, device=self.labels.device)
        if self.proxy_labels is None:
            positive = self.labels[:, None] == columns
        else:
            positive = self.labels[:, None] == self.proxy_labels[None, start:stop]
        negative = ~positive
        if self.row_groups is not None and self.column_groups is not None:
            groups = self.row_groups[:, None]
            negative &= ~((groups == self.column_groups[None, start:stop]) & (groups >= 0))
        if self.excluded is not None:
            for listed in self.excluded.unbind(1):
                negative &= listed[:, None] != columns
        return positive, negative


# ---- the three kernels --------------------------------------------------------------------------


def _stream_reference(
    state: torch.Tensor,
    counts: torch.Tensor,
    positives: torch.Tensor | None,
    products: torch.Tensor,
    weights: torch.Tensor | None,
    factors: torch.Tensor | None,
    labels: torch.Tensor,
    proxy_labels: torch.Tensor | None,
    row_groups: torch.Tensor | None,
    column_groups: torch.Tensor | None,
    excluded: torch.Tensor | None,
    start: int,
    scale: float,
    beta: float,
    weight_scale: float,
) -> None:
    if products.numel() == 0:
        if factors is not None:
            factors.fill_(1.0)
        return
    columns = _Columns(labels, proxy_labels, row_groups, column_groups, excluded)
    positive, negative = columns.masks(start, start + products.shape[1])
    infinity = math.inf
    products.mul_(scale)
    chosen = products.masked_fill(~positive, -infinity)
    if positives is not None:
        # Fill the slots in ascending order of columns.
        slot = counts[:, _POSITIVES, None] + positive.cumsum(1) - 1
        row, column = positive.nonzero(as_tuple=True)
        positives[row, slot[row, column]] = products[row, column].double()
    counts[:, _POSITIVES] += positive.sum(1)
    top = chosen.amax(1).double().maximum(state[:, _POSITIVE_MAX])
    shift = torch.where(top > -infinity, top, 0.0)
    state[:, _POSITIVE_MASS] *= (state[:, _POSITIVE_MAX] - shift).exp()
    state[:, _POSITIVE_MASS] += (chosen - shift[:, None].to(chosen)).exp().double().sum(1)
    state[:, _POSITIVE_MAX] = top

    products.masked_fill_(~negative, -infinity)
    counts[:, _NEGATIVES] += negative.sum(1)
    largest, where = products.max(1)
    larger = largest.double() > state[:, _MAX]
    counts[:, _HARDEST] = torch.where(larger, where + start, counts[:, _HARDEST])
    top = largest.double().maximum(state[:, _MAX])
    shift = torch.where(top > -infinity, top, 0.0)
    falling = state[:, _MAX] - shift
    distance = products - shift[:, None].to(products)
    mass = ((1.0 + beta) * distance).exp()
    norm = (beta * distance).exp() if beta > 0 else negative.to(mass.dtype)
    factor = ((1.0 + beta) * falling).exp()
    state[:, _MASS] = state[:, _MASS] * factor + mass.double().sum(1)
    state[:, _SQUARES] = state[:, _SQUARES] * factor * factor + (mass * mass).double().sum(1)
    shrunk = (beta * falling).exp() if beta > 0 else 1.0
    state[:, _NORM] = state[:, _NORM] * shrunk + norm.double().sum(1)
    state[:, _MAX] = top
    if weights is not None:
        weights.copy_(mass * weight_scale)
    if factors is not None:
        factors.copy_(factor)


def _sample_columns(device: torch.device) -> tuple[Any, ...]:
    labels = torch.tensor([2, 0, 1], device=device)
    groups = torch.tensor([3, -1, 4], device=device)
    column_groups = torch.tensor([3, 3, 4, 4, 5], device=device)
    return labels, None, groups, column_groups, None


def _sample_products(device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(3, 5, generator=generator) * 2 - 1).to(device)


def _new_state(rows: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    state = torch.zeros(rows, 6, dtype=torch.float64, device=device)
    state[:, _MAX] = -math.inf
    state[:, _POSITIVE_MAX] = -math.inf
    counts = torch.zeros(rows, 3, dtype=torch.int64, device=device)
    counts[:, _HARDEST] = -1
    return state, counts


_stream = define(
    "contrastive_stream_(Tensor(a!) state, Tensor(b!) counts, Tensor(c!)? positives, "
    "Tensor(d!) products, Tensor(e!)? weights, Tensor(f!)? factors, Tensor labels, "
    "Tensor? proxy_labels, Tensor? row_groups, Tensor? column_groups, Tensor? excluded, "
    "int start, float scale, float beta, float weight_scale) -> ()",
    family="contrastive",
    reference=_stream_reference,
    fake=lambda *args: None,
    sample=lambda device: (
        *_new_state(3, device),
        None,
        _sample_products(device),
        torch.empty(3, 5, device=device),
        torch.empty(3, device=device),
        *_sample_columns(device),
        0,
        20.0,
        0.5,
        1.0,
    ),
)


def _evaluate(
    positive: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, its scale g, -d loss / d positive and whether clamped, for positive logits (B, P)."""
    log_mass, log_kappa, log_keep, floor = rows[:, _LOG_MASS : _FLOOR + 1].unbind(1)
    gap = log_kappa[:, None] + positive - log_mass[:, None]
    debiased = log_mass[:, None] + (-torch.expm1(gap.clamp(max=0.0))).log() - log_keep[:, None]
    clamped = debiased <= floor[:, None]
    negative = debiased.maximum(floor[:, None])
    loss = nn.functional.softplus(negative - positive, threshold=1e6)
    scale = (log_mass[:, None] - log_keep[:, None] - positive - loss).exp()
    scale = torch.where(clamped, 0.0, scale)
    slope = torch.where(clamped, (negative - positive).sigmoid(), scale)
    return loss, scale, slope, clamped


def _finish_reference(
    state: torch.Tensor,
    counts: torch.Tensor,
    positives: torch.Tensor | None,
    kappa: torch.Tensor,
    prior: bool,
    aggregation: int,
    temperature: float,
    beta: float,
    through: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.zeros(len(state), 9, dtype=torch.float64, device=state.device)
    negatives = counts[:, _NEGATIVES].double()
    some = counts[:, _NEGATIVES] > 0
    kappa = kappa * negatives if prior else kappa
    rows[:, _LOG_MASS] = (
        negatives.log() + state[:, _MAX] + (state[:, _MASS] / state[:, _NORM]).log()
    )
    rows[:, _LOG_KAPPA] = kappa.log()
    rows[:, _LOG_KEEP] = torch.log1p(-kappa / negatives)
    rows[:, _FLOOR] = negatives.log() - 1.0 / temperature
    rows[:, _POSITIVE] = state[:, _POSITIVE_MAX] + state[:, _POSITIVE_MASS].log()
    if aggregation == _EACH:
        assert positives is not None
        held = torch.arange(positives.shape[1], device=positives.device) < counts[:, 1:2]
        portion = held.double() / counts[:, 1:2]
        parts = _evaluate(torch.where(held, positives, 0.0), rows)
        loss, scale, slope, clamped = ((part * portion).sum(1) for part in parts)
    else:
        total = rows[:, _POSITIVE]
        if aggregation == _MEAN:
            total = total - counts[:, _POSITIVES].double().log()
        loss, scale, slope, clamped = (part.squeeze(1) for part in _evaluate(total[:, None], rows))
    rows[:, _ALPHA] = scale * (1.0 + beta if through else 1.0) / state[:, _MASS]
    rows[:, _GAMMA] = (-beta if through else 0.0) * scale / state[:, _NORM]
    rows[:, _SLOPE] = slope
    rows[:, _CLAMPED] = clamped.double()
    rows[~some] = 0.0
    return torch.where(some, loss, 0.0), rows


def _finish_sample(device: torch.device) -> tuple[Any, ...]:
    state = torch.tensor([[9.0, 3.0, 2.0, 1.0, 8.0, 1.0], [2.0, 1.5, 1.4, 1.0, 7.0, 1.0]])
    counts = torch.tensor([[4, 1, 2], [3, 1, 0]])
    kappa = torch.tensor([0.5, 0.1], dtype=torch.float64)
    moved = (state.double().to(device), counts.to(device), None, kappa.to(device))
    return (*moved, False, _SUM, 0.05, 0.5, True)


_finish = define(
    "contrastive_finish(Tensor state, Tensor counts, Tensor? positives, Tensor kappa, bool prior, "
    "int aggregation, float temperature, float beta, bool through) -> (Tensor, Tensor)",
    family="contrastive",
    reference=_finish_reference,
    fake=lambda state, *args: (
        state.new_empty(state.shape[0]),
        state.new_empty(state.shape[0], 9),
    ),
    sample=_finish_sample,
)


def _slopes_reference(
    products: torch.Tensor,
    rows: torch.Tensor,
    state: torch.Tensor,
    counts: torch.Tensor,
    grad: torch.Tensor,
    labels: torch.Tensor,
    proxy_labels: torch.Tensor | None,
    row_groups: torch.Tensor | None,
    column_groups: torch.Tensor | None,
    excluded: torch.Tensor | None,
    start: int,
    scale: float,
    beta: float,
    aggregation: int,
) -> None:
    columns = _Columns(labels, proxy_labels, row_groups, column_groups, excluded)
    positive, negative = columns.masks(start, start + products.shape[1])
    logits = (products * scale).double()
    distance = (logits - state[:, _MAX, None]).masked_fill(~negative, 0.0)
    slopes = rows[:, _ALPHA, None] * ((1.0 + beta) * distance).exp()
    slopes += rows[:, _GAMMA, None] * (beta * distance).exp()
    if aggregation == _EACH:
        pull = _evaluate(logits, rows)[2] / counts[:, _POSITIVES, None]
    else:
        pull = rows[:, _SLOPE, None] * (logits - rows[:, _POSITIVE, None]).exp()
    slopes = torch.where(negative, slopes, torch.where(positive, -pull, 0.0))
    some = counts[:, _NEGATIVES, None] > 0
    products.copy_(torch.where(some, slopes * grad[:, None], 0.0))


_slopes = define(
    "contrastive_slopes_(Tensor(a!) products, Tensor rows, Tensor state, Tensor counts, "
    "Tensor grad, Tensor labels, Tensor? proxy_labels, Tensor? row_groups, "
    "Tensor? column_groups, Tensor? excluded, int start, float scale, float beta, "
    "int aggregation) -> ()",
    family="contrastive",
    reference=_slopes_reference,
    fake=lambda *args: None,
    sample=lambda device: (
        _sample_products(device)[:2],
        _finish_reference(*_finish_sample(device))[1],
        *_finish_sample(device)[:2],
        torch.ones(2, dtype=torch.float64, device=device),
        *(t if t is None or t.shape[0] == 5 else t[:2] for t in _sample_columns(device)),
        0,
        20.0,
        0.5,
        _SUM,
    ),
)


# ---- streaming ----------------------------------------------------------------------------------


class _Operands:
    """The two factors of the products, chunk by chunk, in the format they are multiplied in.

    Products are fp32 (fp64 for fp64 operands) and come multiplied by ``scale``; 16-bit operands are
    multiplied as they are on CUDA, with fp32 sums, and as fp32 on the CPU. ``fast`` rounds fp32
    operands to fp16 on CUDA.
    """

    def __init__(
        self,
        features: torch.Tensor,
        proxies: torch.Tensor,
        *,
        fast: bool,
        columns: int,
        weighted: bool = False,
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
        self.weight_scale = _WEIGHT_SCALE if self.format == torch.float16 else 1.0
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
        if columns <= 0:
            kind = "cuda" if features.is_cuda else "cpu"
            least, most = _CHUNK[kind]
            columns = min(max(_WORKSPACE[kind] // max(per_column, 1), least), most)
            columns -= columns % 16
        self.columns = max(min(columns, len(proxies)), 1)
        if self.narrow:
            self._products = None
        else:
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
                products = torch.mm(self.left, chunk.t(), out_dtype=self.sums)
            else:
                shape = (len(self.left), len(chunk))
                products = self._products[: shape[0] * shape[1]].view(shape)
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


def _forward_reference(
    features: torch.Tensor,
    proxies: torch.Tensor,
    labels: torch.Tensor,
    proxy_labels: torch.Tensor | None,
    row_groups: torch.Tensor | None,
    column_groups: torch.Tensor | None,
    excluded: torch.Tensor | None,
    kappa: torch.Tensor,
    prior: bool,
    aggregation: int,
    temperature: float,
    beta: float,
    through: bool,
    one_pass: bool,
    fast: bool,
    columns: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.autocast(features.device.type, enabled=False):
        operands = _Operands(features, proxies, fast=fast, columns=columns, weighted=one_pass)
        batch, width = features.shape
        device = features.device
        roles = _Columns(labels, proxy_labels, row_groups, column_groups, excluded)
        state, counts = _new_state(batch, device)
        positives = None
        if aggregation == _EACH:
            assert proxy_labels is not None
            most = int(torch.unique(proxy_labels, return_counts=True)[1].max())
            positives = torch.zeros(batch, most, dtype=torch.float64, device=device)
        sums = factors = weights = None
        if one_pass:
            factors = torch.empty(batch, dtype=operands.sums, device=device)
        scale = 1.0 / temperature / operands.scale**2
        for start, products, chunk in operands.chunks():
            if one_pass:
                weights = operands.weights(len(chunk))
            _stream(
                state, counts, positives, products, weights, factors,
                *roles, start, scale, beta, operands.weight_scale,
            )  # fmt: skip
            if factors is not None and weights is not None:
                sums = operands.read_out(sums, factors, weights, chunk)
        _refuse(state, counts, kappa, prior, proxies)
        loss, rows = _finish(
            state, counts, positives, kappa, prior, aggregation, temperature, beta, through
        )
        if sums is None:
            gradient = features.new_empty(0, width)
        else:
            unit = operands.weight_scale * operands.scale * temperature
            sums *= (rows[:, _ALPHA, None] / unit).to(sums.dtype)
            pull = (rows[:, _SLOPE, None] / -temperature).to(sums.dtype)
            sums.addcmul_(proxies.index_select(0, labels).to(sums.dtype), pull)
            gradient = sums
        return loss, gradient, state, counts, rows


def _refuse(
    state: torch.Tensor,
    counts: torch.Tensor,
    kappa: torch.Tensor,
    prior: bool,
    proxies: torch.Tensor,
) -> None:
    """Raise on the CPU for what shows only in the sums; on CUDA the kernel asserts."""
    if state.is_cuda or len(state) == 0:
        return
    op = "debiased_contrastive_loss"
    # An infinite logit shows as the maximum, one that is NaN in the sums.
    total = float(state[:, _MASS].sum() + state[:, _POSITIVE_MASS].sum())
    top = float(state[:, _MAX].max().maximum(state[:, _POSITIVE_MAX].max()))
    if not (math.isfinite(total) and top < math.inf):
        wrong = (~proxies.isfinite().all(1)).nonzero()
        where = f"proxies must be finite (got one that is not at row {int(wrong[0])})"
        raise ValueError(f"{op}: {where if len(wrong) else 'similarities overflow float32'}")
    if int(counts[:, _POSITIVES].min()) == 0:
        without = (counts[:, _POSITIVES] == 0).nonzero()
        raise ValueError(
            f"{op}: every row needs a positive proxy (got none for batch position "
            f"{int(without[0])})"
        )
    if not prior:
        negatives = counts[:, _NEGATIVES]
        wrong = (kappa >= negatives) & (negatives > 0)
        if bool(wrong.any()):
            wrong = wrong.nonzero()
            row = int(wrong[0])
            raise ValueError(
                f"{op}: kappa must be smaller than the number of negatives (got "
                f"{float(kappa[row]):g} and {int(negatives[row])} at batch position {row})"
            )


def _backward_reference(
    grad: torch.Tensor,
    features: torch.Tensor,
    proxies: torch.Tensor,
    labels: torch.Tensor,
    proxy_labels: torch.Tensor | None,
    row_groups: torch.Tensor | None,
    column_groups: torch.Tensor | None,
    excluded: torch.Tensor | None,
    state: torch.Tensor,
    counts: torch.Tensor,
    rows: torch.Tensor,
    aggregation: int,
    temperature: float,
    beta: float,
    columns: int,
    for_features: bool,
    for_proxies: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.autocast(features.device.type, enabled=False):
        double = torch.float64 in (features.dtype, proxies.dtype)
        left = features.to(torch.float64 if double else torch.float32)
        operands = _Operands(left, proxies, fast=False, columns=columns)
        roles = _Columns(labels, proxy_labels, row_groups, column_groups, excluded)
        sums = torch.zeros_like(left) if for_features else left.new_empty(0)
        by_proxy = torch.empty_like(proxies) if for_proxies else proxies.new_empty(0)
        for start, products, chunk in operands.chunks():
            _slopes(
                products, rows, state, counts, grad, *roles,
                start, 1.0 / temperature, beta, aggregation,
            )  # fmt: skip
            if for_features:
                sums.addmm_(products, chunk)
            if for_proxies:
                part = torch.mm(products.t(), left).div_(temperature)
                by_proxy[start : start + len(chunk)] = part
        return sums.div_(temperature).to(features.dtype), by_proxy


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    features, proxies, *roles = inputs[:7]
    aggregation, temperature, beta, _, one_pass, _, columns = inputs[9:]
    _, gradient, *sums = output
    ctx.settings = (aggregation, temperature, beta, columns)
    ctx.one_pass = one_pass
    ctx.format = features.dtype
    if one_pass and not ctx.needs_input_grad[1]:
        # The proxies are not kept, so they may change before backward.
        ctx.save_for_backward(gradient)
    else:
        ctx.save_for_backward(gradient if one_pass else None, features, proxies, *roles, *sums)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: torch.Tensor | None, *others: Any) -> tuple[Any, ...]:
    by_feature = by_proxy = None
    if grad is not None:
        gradient, *saved = ctx.saved_tensors
        for_features, for_proxies = ctx.needs_input_grad[:2]
        if ctx.one_pass and for_features:
            by_feature = _scale_rows(gradient, grad).to(ctx.format)
            for_features = False
        if for_features or for_proxies:
            parts = _contrastive_backward(grad, *saved, *ctx.settings, for_features, for_proxies)
            by_feature = parts[0] if for_features else by_feature
            by_proxy = parts[1] if for_proxies else None
    return (by_feature, by_proxy, *(None,) * 14)


def _no_double_backward(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError("debiased_contrastive_loss: it is not twice differentiable")


def _loss_sample(device: torch.device) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    features = nn.functional.normalize(torch.randn(3, 24, generator=generator)).to(device)
    proxies = nn.functional.normalize(torch.randn(5, 24, generator=generator)).to(device)
    kappa = torch.full((3,), 0.2, dtype=torch.float64, device=device)
    options = (False, _SUM, 0.05, 0.5, False, True, False, 2)
    return (features, proxies, *_sample_columns(device), kappa, *options)


def _forward_fake(features: torch.Tensor, proxies: torch.Tensor, *args: Any) -> tuple[Any, ...]:
    batch, width = features.shape
    one_pass = args[11]
    double = torch.float64 in (features.dtype, proxies.dtype)
    dtype = torch.float64 if double else torch.float32
    state = features.new_empty(batch, 6, dtype=torch.float64)
    gradient = features.new_empty(batch, width, dtype=dtype)
    return (
        state.new_empty(batch),
        gradient if one_pass else features.new_empty(0, width),
        state,
        features.new_empty(batch, 3, dtype=torch.int64),
        state.new_empty(batch, 9),
    )


_contrastive: Any = define(
    "contrastive(Tensor features, Tensor proxies, Tensor labels, Tensor? proxy_labels, "
    "Tensor? row_groups, Tensor? column_groups, Tensor? excluded, Tensor kappa, bool prior, "
    "int aggregation, float temperature, float beta, bool through, bool one_pass, bool fast, "
    "int columns) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    family="contrastive",
    reference=_forward_reference,
    fake=_forward_fake,
    sample=_loss_sample,
    backward=_backward,
    setup_context=_setup_context,
    composed="torch.mm around contrastive_stream_ and contrastive_finish",
)


def _backward_sample(device: torch.device) -> tuple[Any, ...]:
    sample = _loss_sample(device)
    _, _, state, counts, rows = _forward_reference(*sample)
    grad = torch.ones(3, dtype=torch.float64, device=device)
    return (grad, *sample[:7], state, counts, rows, _SUM, 0.05, 0.5, 2, True, True)


_contrastive_backward: Any = define(
    "contrastive_backward(Tensor grad, Tensor features, Tensor proxies, Tensor labels, "
    "Tensor? proxy_labels, Tensor? row_groups, Tensor? column_groups, Tensor? excluded, "
    "Tensor state, Tensor counts, Tensor rows, int aggregation, "
    "float temperature, float beta, int columns, bool for_features, bool for_proxies) "
    "-> (Tensor, Tensor)",
    family="contrastive",
    reference=_backward_reference,
    fake=lambda *args: (
        torch.empty_like(args[1]) if args[15] else args[1].new_empty(0),
        torch.empty_like(args[2]) if args[16] else args[2].new_empty(0),
    ),
    sample=_backward_sample,
    backward=_no_double_backward,
    composed="torch.mm around contrastive_slopes_",
)

_scale_rows: Any = define(
    "contrastive_scale_rows(Tensor gradient, Tensor grad) -> Tensor",
    family="contrastive",
    reference=lambda gradient, grad: gradient * grad.to(gradient.dtype)[:, None],
    fake=lambda gradient, grad: torch.empty_like(gradient),
    sample=lambda device: (torch.ones(2, 3, device=device), torch.ones(2, device=device)),
    backward=_no_double_backward,
    composed="torch.mul",
)


# ---- the loss -----------------------------------------------------------------------------------


class ContrastiveStats(NamedTuple):
    """What a loss saw, per row of the batch; none of it carries a gradient.

    ``clamped_fraction`` is the share of rows whose negative mass lay on the floor of the debiased
    estimate, where the negatives have no gradient: near 1, training has stopped.
    """

    clamped_fraction: torch.Tensor  # ()
    clamped: torch.Tensor  # (B,) in [0, 1]: for positives="each" the share of its positives
    positive_logit: torch.Tensor  # (B,) r: log of the sum (mean: of the mean) of e^(s/tau)
    hardest_negative: torch.Tensor  # (B,) largest negative logit, -inf without negatives
    hardest_index: torch.Tensor  # (B,) its column, -1 without negatives
    effective_negatives: torch.Tensor  # (B,) (sum p)^2 / sum p^2 of the negatives' softmax weights
    num_negatives: torch.Tensor  # (B,)


_norm_seen = False


def _look_at_norms(op: str, features: torch.Tensor) -> None:
    """Refuse features that are not finite and warn, once, about norms that are not 1.

    On CUDA only the first call waits for the device, and none under graph capture.
    """
    global _norm_seen
    if len(features) == 0 or (features.is_cuda and _norm_seen):
        return
    if features.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    norms = features.detach().float().norm(dim=1)
    if not bool(norms.isfinite().all()):
        row = int((~norms.isfinite()).nonzero()[0])
        raise ValueError(f"{op}: features must be finite (got one that is not at row {row})")
    worst = norms[(norms - 1.0).abs().argmax()].item()
    if abs(worst - 1.0) > 1e-2 and not _norm_seen:
        _norm_seen = True
        warnings.warn(
            f"{op}: features are meant to have norm 1 (got a norm of {worst:.4g}); the temperature "
            "and the floor of the debiased estimate assume it",
            stacklevel=3,
        )
    _norm_seen = _norm_seen or features.is_cuda


def debiased_contrastive_loss(
    features: torch.Tensor,
    proxies: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float = 0.05,
    kappa: float | torch.Tensor = 0.0,
    tau_plus: float | None = None,
    beta: float = 0.0,
    proxy_labels: torch.Tensor | None = None,
    positives: str = "each",
    exclude: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
    hardness_gradient: str = "stop",
    reduction: str = "mean",
    return_stats: bool = False,
    precision: str = "exact",
    chunk_size: int | None = None,
) -> Any:
    """InfoNCE over a memory of proxies, with debiased and hardness-weighted negatives.

    With logits ``s_j = f . c_j / temperature``, positive logit ``r`` and M negatives,
    ``R = M sum e^((1+beta) s_j) / sum e^(beta s_j)`` is the negatives' mass, weighted towards the
    hard ones as in Robinson et al. (ICLR 2021), and

        ``N = max((R - kappa e^r) / (1 - kappa / M), M e^(-1/temperature))``,
        ``loss = log(1 + N e^(-r))``

    takes out the ``kappa`` negatives expected to be false ones, as in Chuang et al. (NeurIPS 2020),
    where ``tau_plus = kappa / M``. With ``kappa = beta = 0`` it is cross-entropy over the proxies.
    ``beta`` multiplies s / temperature: the hardness on the similarity itself is beta/temperature.

    The (B, K) logits are streamed in chunks. Beyond inputs and gradients it takes one chunk, at
    most 24 MiB on the CPU and 256 MiB on CUDA unless 256 (4096) proxies need more, and with a
    gradient a (B, d) fp32 buffer. Sums are fp32 or wider; the same bits every time.

    Args:
        features: (B, d) float32, float16, bfloat16 or float64, rows of norm 1.
        proxies: (K, d) class prototypes or bank rows, any of these dtypes, K >= 1.
        labels: (B,) int64: the column of each row's positive, or with ``proxy_labels`` its class.
        temperature: > 0.
        kappa: expected number of false negatives among a row's negatives, >= 0 and smaller than
            their number; or one value per row, (B,).
        tau_plus: the class prior kappa / M in [0, 1), in place of kappa.
        beta: hardness, >= 0.
        proxy_labels: (K,) int64: all proxies of a row's class are its positives.
        positives: how several are combined: the mean of their losses (``"each"``), or one loss
            with ``e^r`` the ``"sum"`` or ``"mean"`` of their exponentials. On CUDA ``"each"`` with
            ``proxy_labels`` waits for the device once.
        exclude: proxies that are not negatives of a row although they are no positives: (B, E)
            int64 column numbers padded with -1, or a pair of group numbers (B,) and (K,), where
            equal groups >= 0 exclude each other.
        hardness_gradient: ``"stop"`` treats the weights e^(beta s) as constants; ``"through"``
            differentiates them, as the authors' code does.
        reduction: ``"mean"`` (0 for B = 0), ``"sum"`` or ``"none"``.
        return_stats: also return :class:`ContrastiveStats`.
        precision: ``"fast"`` rounds fp32 operands on CUDA to fp16, scaled by a power of two:
            logits are then off by up to about 1e-3 at temperature 0.05. Elsewhere it is "exact".
        chunk_size: proxies per chunk, by default chosen for the workspace.

    Returns:
        The loss, () or (B,) float32 (float64 for float64 inputs), or with ``return_stats`` the pair
        (loss, stats). A row without negatives has loss 0. Differentiable, once, with respect to
        features and proxies; where only the features need a gradient, and ``hardness_gradient`` is
        ``"stop"`` or ``beta`` 0, it is computed along with the loss and the proxies may change
        before backward.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape, device or range; on the
            CPU also for a row without a positive, and for features or proxies that are not finite.
        IndexError: a label outside [0, K), on the CPU; on CUDA a device-side assert instead. On the
            CPU also an excluded column outside [-1, K), which on CUDA excludes nothing.
    """
    op = "debiased_contrastive_loss"
    for name, value in (("features", features), ("proxies", proxies)):
        _checks.tensor(op, name, value)
        _checks.rank(op, name, value, 2)
        _checks.dtype(op, name, value, _FLOATS)
    batch, count = features.shape[0], proxies.shape[0]
    if proxies.shape[1] != features.shape[1]:
        raise ValueError(
            f"{op}: features and proxies must have one width "
            f"(got {features.shape[1]} and {proxies.shape[1]})"
        )
    if count == 0:
        raise ValueError(f"{op}: at least one proxy is needed (got none)")
    labels = _checks.integers(op, "labels", labels, batch, "one per feature")
    tensors = {"features": features, "proxies": proxies, "labels": labels}
    if proxy_labels is not None:
        proxy_labels = _checks.integers(op, "proxy_labels", proxy_labels, count, "one per proxy")
        tensors["proxy_labels"] = proxy_labels
    row_groups = column_groups = excluded = None
    if isinstance(exclude, tuple):
        if len(exclude) != 2:
            raise ValueError(f"{op}: exclude must be a pair of groups (got {len(exclude)} tensors)")
        row_groups = _checks.integers(op, "exclude[0]", exclude[0], batch, "one group per feature")
        column_groups = _checks.integers(op, "exclude[1]", exclude[1], count, "one group per proxy")
        tensors.update({"exclude[0]": row_groups, "exclude[1]": column_groups})
    elif exclude is not None:
        _checks.tensor(op, "exclude", exclude)
        _checks.dtype(op, "exclude", exclude, (torch.int64,))
        _checks.rank(op, "exclude", exclude, 2)
        wanted = (batch, exclude.shape[1])
        _checks.shape(op, "exclude", exclude, wanted, "a list of columns per feature")
        tensors["exclude"] = excluded = exclude
    temperature = _checks.number(op, "temperature", temperature, 0.0, rule="finite and > 0")
    if temperature == 0.0:
        raise ValueError(f"{op}: temperature must be finite and > 0 (got 0.0)")
    beta = _checks.number(op, "beta", beta, 0.0, rule="finite and >= 0")
    prior = tau_plus is not None
    if isinstance(kappa, torch.Tensor):
        _checks.dtype(op, "kappa", kappa, _FLOATS)
        _checks.shape(op, "kappa", kappa, (batch,), "one per feature")
        tensors["kappa"] = kappa
        expected = kappa.detach().double().contiguous()
    else:
        share = _checks.number(op, "kappa", kappa, 0.0, rule="finite and >= 0")
        if proxy_labels is None and count > 1 and share >= count - 1:
            raise ValueError(
                f"{op}: kappa must be smaller than the number of negatives "
                f"(got {share:g} and {count - 1})"
            )
        if tau_plus is not None:
            if share:
                raise ValueError(
                    f"{op}: give kappa or tau_plus, not both (got {share:g} and {tau_plus})"
                )
            share = _checks.number(op, "tau_plus", tau_plus, 0.0, 1.0, rule="in [0, 1)")
            if share == 1.0:
                raise ValueError(f"{op}: tau_plus must be in [0, 1) (got 1.0)")
        expected = torch.full((batch,), share, dtype=torch.float64, device=features.device)
    if prior and isinstance(kappa, torch.Tensor):
        raise ValueError(f"{op}: give kappa or tau_plus, not both (got a tensor and {tau_plus})")
    _checks.same_device(op, **tensors)
    _checks.one_of(op, "positives", positives, _AGGREGATIONS)
    _checks.one_of(op, "hardness_gradient", hardness_gradient, ("stop", "through"))
    _checks.one_of(op, "reduction", reduction, ("mean", "sum", "none"))
    _checks.one_of(op, "precision", precision, ("exact", "fast"))
    columns = 0 if chunk_size is None else _checks.integer(op, "chunk_size", chunk_size, 1)
    if not torch.compiler.is_compiling():
        if proxy_labels is None:
            _checks.indices_in_range(op, "labels", labels, count)
        if excluded is not None:
            _checks.indices_in_range(op, "exclude", excluded, count, -1)
        if isinstance(kappa, torch.Tensor) and not kappa.is_cuda and bool((expected < 0).any()):
            raise ValueError(f"{op}: kappa must be >= 0 (got {float(expected.min()):g})")
        _look_at_norms(op, features)

    aggregation = _SUM if proxy_labels is None else _AGGREGATIONS[positives]
    through = hardness_gradient == "through" and beta > 0
    differentiated = features.requires_grad and torch.is_grad_enabled()
    one_pass = differentiated and proxy_labels is None and not through
    losses, _, state, counts, rows = _contrastive(
        features, proxies, labels, proxy_labels, row_groups, column_groups, excluded, expected,
        prior, aggregation, temperature, beta, through, one_pass, precision == "fast", columns,
    )  # fmt: skip
    if torch.float64 not in (features.dtype, proxies.dtype):
        losses = losses.float()
    loss = losses
    if reduction != "none":
        loss = losses.sum() / (max(batch, 1) if reduction == "mean" else 1)
    if not return_stats:
        return loss
    return loss, _stats(state.detach(), counts, rows.detach(), aggregation)


def _stats(
    state: torch.Tensor, counts: torch.Tensor, rows: torch.Tensor, aggregation: int
) -> ContrastiveStats:
    clamped = rows[:, _CLAMPED]
    positive = state[:, _POSITIVE_MAX] + state[:, _POSITIVE_MASS].log()
    if aggregation != _SUM:
        positive = positive - counts[:, _POSITIVES].double().log()
    squares = state[:, _SQUARES]
    effective = torch.where(squares > 0, state[:, _MASS] ** 2 / squares, 0.0)
    return ContrastiveStats(
        clamped.sum() / max(len(clamped), 1),
        clamped,
        positive,
        state[:, _MAX],
        counts[:, _HARDEST],
        effective,
        counts[:, _NEGATIVES],
    )
