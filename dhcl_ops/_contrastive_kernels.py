"""The kernels of the contrastive loss: three small ops and their references in PyTorch.

``csrc/contrastive.h`` says what they compute and has the same names. Of each chunk of proxies
``stream`` adds the products with the features to the rows' running sums and turns them into
gradient weights; ``finish`` makes losses of the sums; ``slopes``, for a second pass over the
proxies, turns products into derivatives.

A schema is a flat list. Here what belongs together is a named tuple, taken apart where an op is
called and put together again by :func:`grouped` where one begins.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from dhcl_ops._ops import define

# Columns of a row's state, counts and coefficients, as in csrc/contrastive.h.
MAX, MASS, NORM, SQUARES, POSITIVE_MAX, POSITIVE_MASS = range(6)
NEGATIVES, POSITIVES, HARDEST = range(3)
ALPHA, GAMMA, SLOPE, POSITIVE, LOG_MASS, LOG_KAPPA, LOG_KEEP, FLOOR, CLAMPED = range(9)

# How the losses of several positives become one.
EACH, SUM, MEAN = range(3)


# ---- what the ops take --------------------------------------------------------------------------


class Roles(NamedTuple):
    """Which proxies are positive to a row, which are negative and which are neither.

    A row's positive is column ``labels[i]`` or, with ``proxy_labels``, every column of that label.
    Columns of the row's group (>= 0) and listed ones are neither, unless they are positive.
    """

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


class Sums(NamedTuple):
    """The rows' running sums over the chunks of proxies so far."""

    state: torch.Tensor  # (B, 6) float64
    counts: torch.Tensor  # (B, 3) int64
    positives: torch.Tensor | None  # (B, P) float64, the positives' logits; for EACH only


class Chunk(NamedTuple):
    """The products of one chunk of n proxies, and what is made of them."""

    products: torch.Tensor  # (B, n) in: similarities; overwritten
    weights: torch.Tensor | None  # (B, n) <- gradient weights
    factors: torch.Tensor | None  # (B,) <- what earlier read-outs shrink by


class Settings(NamedTuple):
    """Which loss it is."""

    kappa: torch.Tensor  # (B,) float64, expected false negatives; with prior their share
    prior: bool
    aggregation: int  # EACH, SUM or MEAN
    temperature: float
    beta: float
    through: bool  # differentiate the hardness weights


def grouped(flat: Sequence[Any], *kinds: type[Any]) -> list[Any]:
    """The leading arguments of an op, flat as in its schema, as named tuples of these kinds."""
    fields = iter(flat)
    return [kind(*itertools.islice(fields, len(kind._fields))) for kind in kinds]


def new_sums(rows: int, slots: int | None, device: torch.device) -> Sums:
    """Sums over no proxies, with room for the logits of this many positives per row."""
    state = torch.zeros(rows, 6, dtype=torch.float64, device=device)
    state[:, MAX] = -math.inf
    state[:, POSITIVE_MAX] = -math.inf
    counts = torch.zeros(rows, 3, dtype=torch.int64, device=device)
    counts[:, HARDEST] = -1
    positives = None
    if slots is not None:
        positives = torch.zeros(rows, slots, dtype=torch.float64, device=device)
    return Sums(state, counts, positives)


# ---- stream -------------------------------------------------------------------------------------


def _stream_reference(*flat: Any) -> None:
    sums, chunk, roles = grouped(flat, Sums, Chunk, Roles)
    start, scale, beta, weight_scale = flat[-4:]
    products = chunk.products
    if products.numel() == 0:
        if chunk.factors is not None:
            chunk.factors.fill_(1.0)
        return
    positive, negative = roles.masks(start, start + products.shape[1])
    products.mul_(scale)
    negative &= products != -math.inf  # a weight of zero
    _add_positives(sums, products, positive)
    products.masked_fill_(~negative, -math.inf)
    mass, factor = _add_negatives(sums, products, negative, start, beta)
    if chunk.weights is not None:
        chunk.weights.copy_(mass * weight_scale)
    if chunk.factors is not None:
        chunk.factors.copy_(factor)


def _add_positives(sums: Sums, logits: torch.Tensor, positive: torch.Tensor) -> None:
    """Add the logits (B, n) of the positives to the sums."""
    state, counts, positives = sums
    infinity = math.inf
    chosen = logits.masked_fill(~positive, -infinity)
    if positives is not None:
        # Fill the slots in ascending order of columns.
        slot = counts[:, POSITIVES, None] + positive.cumsum(1) - 1
        row, column = positive.nonzero(as_tuple=True)
        positives[row, slot[row, column]] = logits[row, column].double()
    counts[:, POSITIVES] += positive.sum(1)
    top = chosen.amax(1).double().maximum(state[:, POSITIVE_MAX])
    shift = torch.where(top > -infinity, top, 0.0)
    state[:, POSITIVE_MASS] *= (state[:, POSITIVE_MAX] - shift).exp()
    state[:, POSITIVE_MASS] += (chosen - shift[:, None].to(chosen)).exp().double().sum(1)
    state[:, POSITIVE_MAX] = top


def _add_negatives(
    sums: Sums, logits: torch.Tensor, negative: torch.Tensor, start: int, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add the logits (B, n), -inf where there is no negative, to the sums.

    Returns each entry's e^((1+beta)(s-m)), m being the row's new maximum, and the factor (B,) by
    which what was summed before has shrunk.
    """
    state, counts, _ = sums
    counts[:, NEGATIVES] += negative.sum(1)
    largest, where = logits.max(1)
    larger = largest.double() > state[:, MAX]
    counts[:, HARDEST] = torch.where(larger, where + start, counts[:, HARDEST])
    top = largest.double().maximum(state[:, MAX])
    shift = torch.where(top > -math.inf, top, 0.0)
    falling = state[:, MAX] - shift
    distance = logits - shift[:, None].to(logits)
    mass = ((1.0 + beta) * distance).exp()
    norm = (beta * distance).exp() if beta > 0 else negative.to(mass.dtype)
    factor = ((1.0 + beta) * falling).exp()
    state[:, MASS] = state[:, MASS] * factor + mass.double().sum(1)
    state[:, SQUARES] = state[:, SQUARES] * factor * factor + (mass * mass).double().sum(1)
    shrunk = (beta * falling).exp() if beta > 0 else 1.0
    state[:, NORM] = state[:, NORM] * shrunk + norm.double().sum(1)
    state[:, MAX] = top
    return mass, factor


def sample_roles(device: torch.device) -> Roles:
    """Roles of five columns to three rows."""
    labels = torch.tensor([2, 0, 1], device=device)
    groups = torch.tensor([3, -1, 4], device=device)
    column_groups = torch.tensor([3, 3, 4, 4, 5], device=device)
    return Roles(labels, None, groups, column_groups, None)


def _sample_products(rows: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(3, 5, generator=generator) * 2 - 1)[:rows].to(device)


stream = define(
    "contrastive_stream_(Tensor(a!) state, Tensor(b!) counts, Tensor(c!)? positives, "
    "Tensor(d!) products, Tensor(e!)? weights, Tensor(f!)? factors, Tensor labels, "
    "Tensor? proxy_labels, Tensor? row_groups, Tensor? column_groups, Tensor? excluded, "
    "int start, float scale, float beta, float weight_scale) -> ()",
    family="contrastive",
    reference=_stream_reference,
    fake=lambda *args: None,
    sample=lambda device: (
        *new_sums(3, None, device),
        _sample_products(3, device),
        torch.empty(3, 5, device=device),
        torch.empty(3, device=device),
        *sample_roles(device),
        0,
        20.0,
        0.5,
        1.0,
    ),
)


# ---- finish -------------------------------------------------------------------------------------


def _terms(
    positive: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, its scale g, -d loss / d positive and whether clamped, for positive logits (B, P)."""
    log_mass, log_kappa, log_keep, floor = rows[:, LOG_MASS : FLOOR + 1].unbind(1)
    gap = log_kappa[:, None] + positive - log_mass[:, None]
    debiased = log_mass[:, None] + (-torch.expm1(gap.clamp(max=0.0))).log() - log_keep[:, None]
    clamped = debiased <= floor[:, None]
    negative = debiased.maximum(floor[:, None])
    # Beyond 40 it is its argument to fp64's last bit; beyond 709 e^x is infinite.
    loss = nn.functional.softplus(negative - positive, threshold=40.0)
    scale = (log_mass[:, None] - log_keep[:, None] - positive - loss).exp()
    scale = torch.where(clamped, 0.0, scale)
    slope = torch.where(clamped, (negative - positive).sigmoid(), scale)
    return loss, scale, slope, clamped


def _finish_reference(*flat: Any) -> tuple[torch.Tensor, torch.Tensor]:
    sums, settings = grouped(flat, Sums, Settings)
    state, counts, positives = sums
    kappa, prior, aggregation, temperature, beta, through = settings
    rows = torch.zeros(len(state), 9, dtype=torch.float64, device=state.device)
    negatives = counts[:, NEGATIVES].double()
    some = counts[:, NEGATIVES] > 0
    kappa = kappa * negatives if prior else kappa
    rows[:, LOG_MASS] = negatives.log() + state[:, MAX] + (state[:, MASS] / state[:, NORM]).log()
    rows[:, LOG_KAPPA] = kappa.log()
    rows[:, LOG_KEEP] = torch.log1p(-kappa / negatives)
    rows[:, FLOOR] = negatives.log() - 1.0 / temperature
    rows[:, POSITIVE] = state[:, POSITIVE_MAX] + state[:, POSITIVE_MASS].log()
    if aggregation == EACH:
        assert positives is not None
        held = torch.arange(positives.shape[1], device=positives.device) < counts[:, 1:2]
        portion = held.double() / counts[:, 1:2]
        parts = _terms(torch.where(held, positives, 0.0), rows)
        loss, scale, slope, clamped = ((part * portion).sum(1) for part in parts)
    else:
        total = rows[:, POSITIVE]
        if aggregation == MEAN:
            total = total - counts[:, POSITIVES].double().log()
        loss, scale, slope, clamped = (part.squeeze(1) for part in _terms(total[:, None], rows))
    rows[:, ALPHA] = scale * (1.0 + beta if through else 1.0) / state[:, MASS]
    rows[:, GAMMA] = (-beta if through else 0.0) * scale / state[:, NORM]
    rows[:, SLOPE] = slope
    rows[:, CLAMPED] = clamped.double()
    rows[~some] = 0.0
    return torch.where(some, loss, 0.0), rows


def _finish_sample(device: torch.device) -> tuple[Any, ...]:
    state = torch.tensor([[9.0, 3.0, 2.0, 1.0, 8.0, 1.0], [2.0, 1.5, 1.4, 1.0, 7.0, 1.0]])
    counts = torch.tensor([[4, 1, 2], [3, 1, 0]])
    kappa = torch.tensor([0.5, 0.1], dtype=torch.float64)
    moved = (state.double().to(device), counts.to(device), None, kappa.to(device))
    return (*moved, False, SUM, 0.05, 0.5, True)


finish = define(
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


# ---- slopes -------------------------------------------------------------------------------------


def _slopes_reference(*flat: Any) -> None:
    products, rows, state, counts, grad = flat[:5]
    [roles] = grouped(flat[5:], Roles)
    start, scale, beta, aggregation = flat[-4:]
    positive, negative = roles.masks(start, start + products.shape[1])
    logits = (products * scale).double()
    negative &= logits != -math.inf  # a weight of zero
    distance = (logits - state[:, MAX, None]).masked_fill(~negative, 0.0)
    slope = rows[:, ALPHA, None] * ((1.0 + beta) * distance).exp()
    slope += rows[:, GAMMA, None] * (beta * distance).exp()
    if aggregation == EACH:
        pull = _terms(logits, rows)[2] / counts[:, POSITIVES, None]
    else:
        pull = rows[:, SLOPE, None] * (logits - rows[:, POSITIVE, None]).exp()
    slope = torch.where(negative, slope, torch.where(positive, -pull, 0.0))
    some = counts[:, NEGATIVES, None] > 0
    products.copy_(torch.where(some, slope * grad[:, None], 0.0))


def _slopes_sample(device: torch.device) -> tuple[Any, ...]:
    sample = _finish_sample(device)
    state, counts, *_ = sample
    _, rows = _finish_reference(*sample)
    labels, _, groups, column_groups, _ = sample_roles(device)
    assert groups is not None
    roles = Roles(labels[:2], None, groups[:2], column_groups, None)
    grad = torch.ones(2, dtype=torch.float64, device=device)
    return (_sample_products(2, device), rows, state, counts, grad, *roles, 0, 20.0, 0.5, SUM)


slopes = define(
    "contrastive_slopes_(Tensor(a!) products, Tensor rows, Tensor state, Tensor counts, "
    "Tensor grad, Tensor labels, Tensor? proxy_labels, Tensor? row_groups, "
    "Tensor? column_groups, Tensor? excluded, int start, float scale, float beta, "
    "int aggregation) -> ()",
    family="contrastive",
    reference=_slopes_reference,
    fake=lambda *args: None,
    sample=_slopes_sample,
)
