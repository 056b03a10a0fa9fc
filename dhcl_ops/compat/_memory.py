"""What the memories of several projects share: a loss over classes, and a bank that moves.

A memory's loss is one autograd function, :class:`Loss`. Its backward moves rows of the bank towards
the features that went through, as in the memories of SpCL (Ge et al., NeurIPS 2020) and of Cluster
Contrast (Dai et al., ACCV 2022). The logits exist as a whole, as in their code: at the sizes of a
script's batch what counts is the number of small operations, and here there are few, without
autograd between them. For larger ones there is :func:`dhcl_ops.debiased_contrastive_loss`.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import nn

from dhcl_ops import _checks
from dhcl_ops._precision import ieee_products
from dhcl_ops.memory import class_csr, least_similar, momentum_update_

_INDICES = (torch.int64, torch.int32, torch.int16, torch.int8)
_EPSILON = torch.tensor(1e-6).log()  # also for CUDA, which takes a number from the CPU
_SHORTEST = 1e-12  # what torch.nn.functional.normalize divides by at least
_NO_TARGET = -(2**62)  # of nll_loss, which would pass over -100
# To read or write a bank row once costs about as much as to multiply it with this many features.
_ROW_COST = 16


# ---- classes ------------------------------------------------------------------------------------


class Classes(Protocol):
    """What features are compared with: K classes made of a bank's rows."""

    def logits(self, inputs: torch.Tensor, bank: torch.Tensor, divisor: Any) -> torch.Tensor:
        """Dot products (B, K) of inputs (B, d) with the classes, over a number or (B, 1)."""

    def pull(self, slopes: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
        """The gradient (B, d) of the inputs from that of their dot products (B, K)."""


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The matrix product in float32, under autocast too: it lets calls with ``out`` alone."""
    return torch.mm(left, right, out=left.new_empty(left.shape[0], right.shape[1]))


class RowClasses:
    """Each row of the bank is a class."""

    def logits(self, inputs: torch.Tensor, bank: torch.Tensor, divisor: Any) -> torch.Tensor:
        return _product(inputs, bank.float().T).div_(divisor)

    def pull(self, slopes: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
        return _product(slopes, bank.float())


class Groups:
    """The rows of each label, and what is added to the labels' logits.

    A label without rows is no class: its logit is -inf. One more label, without rows too, holds the
    1e-6 that SpCL adds to the sum of the exponentials.
    """

    def __init__(self, labels: torch.Tensor, count: int) -> None:
        self.labels = labels.clone()
        self.count = count + 1
        self.members, self.offsets = class_csr(labels, self.count)
        missing = self.offsets[1:] == self.offsets[:-1]
        self.added = torch.zeros(self.count, device=labels.device).masked_fill_(missing, -math.inf)
        self.added[-1] = _EPSILON

    def are_those_of(self, labels: torch.Tensor) -> bool:
        """Whether they were made from labels like these."""
        same = self.labels.device == labels.device and self.labels.dtype == labels.dtype
        return same and torch.equal(self.labels, labels)

    def means(self, rows: torch.Tensor) -> torch.Tensor:
        """The mean of the rows (N, m) of each label, zeros for those without."""
        means: torch.Tensor = torch.ops.dhcl.segment_mean(rows, self.members, self.offsets)
        return means

    def spread(self, slopes: torch.Tensor) -> torch.Tensor:
        """The gradient (N, m) of the rows from that of their means."""
        mean_backward = torch.ops.dhcl.segment_mean_backward
        rows: torch.Tensor = mean_backward(slopes, self.members, self.offsets)
        return rows


class MeanClasses:
    """A class is the mean of the rows with its label, as the bank is when this is made."""

    def __init__(self, bank: torch.Tensor, groups: Groups) -> None:
        self.means, self.added = groups.means(bank.float()), groups.added

    def logits(self, inputs: torch.Tensor, bank: torch.Tensor, divisor: Any) -> torch.Tensor:
        out = inputs.new_empty(inputs.shape[0], self.means.shape[0])
        return torch.addmm(self.added, inputs, self.means.T, alpha=1.0 / divisor, out=out)

    def pull(self, slopes: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
        return _product(slopes, self.means)


class MeanProducts:
    """The same classes, with the mean taken of the products in place of the rows.

    That is less work where most classes have few rows: their means are then as large as the bank.
    """

    def __init__(self, groups: Groups) -> None:
        self.groups = groups

    def logits(self, inputs: torch.Tensor, bank: torch.Tensor, divisor: Any) -> torch.Tensor:
        bank = bank.float()
        # Either form of the product is slow where the other one is not.
        few = inputs.shape[0] < 16
        each = _product(inputs, bank.T).T if few else _product(bank, inputs.T)
        return torch.add(self.groups.added, self.groups.means(each).T, alpha=1.0 / divisor)

    def pull(self, slopes: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
        return _product(self.groups.spread(slopes.T).T, bank.float())


def mean_classes(bank: torch.Tensor, groups: Groups, batch: int) -> Classes:
    """The mean of the rows of each label, in the form that is less work."""
    rows, count = bank.shape[0], groups.count
    if (rows + count) * _ROW_COST + count * batch < rows * batch:
        return MeanClasses(bank, groups)
    return MeanProducts(groups)


# ---- losses of logits ---------------------------------------------------------------------------

Kept = tuple[torch.Tensor, ...]


class Criterion(Protocol):
    """A mean loss of logits (B, K) and targets (B,)."""

    def value(self, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, Kept]:
        """The loss (), and what :meth:`slopes` needs; IndexError for a target outside [0, K)."""

    def slopes(self, targets: torch.Tensor, *kept: torch.Tensor) -> torch.Tensor:
        """B times the gradient (B, K) of the logits."""


class CrossEntropy:
    """``-log p`` of the target's softmax."""

    def value(self, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, Kept]:
        log_p = logits.log_softmax(1)
        return nn.functional.nll_loss(log_p, targets, ignore_index=_NO_TARGET), (log_p,)

    def slopes(self, targets: torch.Tensor, *kept: torch.Tensor) -> torch.Tensor:
        (log_p,) = kept
        return _less_at(log_p.exp(), targets, log_p.new_ones(len(targets)))


class SmoothedCrossEntropy:
    """Cross-entropy with a share of the target spread over the K // 50 likeliest classes.

    It is spread over all classes where K // 50 is less than 2.
    """

    def __init__(self, share: float) -> None:
        self.share = share

    def value(self, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, Kept]:
        log_p = logits.log_softmax(1)
        own = nn.functional.nll_loss(log_p, targets, ignore_index=_NO_TARGET)
        likeliest = log_p.shape[1] // 50
        if likeliest > 1:
            spread, chosen = log_p.topk(likeliest, dim=1)
            kept: Kept = (log_p, chosen)
        else:
            spread, kept = log_p, (log_p,)
        return own.mul_(1.0 - self.share).sub_(spread.mean(), alpha=self.share), kept

    def slopes(self, targets: torch.Tensor, *kept: torch.Tensor) -> torch.Tensor:
        slopes = kept[0].exp()
        if len(kept) == 2:
            portions = torch.full_like(kept[1], self.share / kept[1].shape[1], dtype=slopes.dtype)
            slopes.scatter_add_(1, kept[1], portions.neg_())
        else:
            slopes.sub_(self.share / slopes.shape[1])
        return _less_at(slopes, targets, slopes.new_full((len(targets),), 1.0 - self.share))


class BoundedCrossEntropy:
    """SpCL's ``-log(p + 1e-6)``."""

    def value(self, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, Kept]:
        log_p = logits.log_softmax(1)
        own = log_p.gather(1, targets[:, None])
        bounded = torch.logaddexp(own, _EPSILON)
        return bounded.mean().neg_(), (log_p, own, bounded)

    def slopes(self, targets: torch.Tensor, *kept: torch.Tensor) -> torch.Tensor:
        log_p, own, bounded = kept
        log_weight = own - bounded  # of p over p + 1e-6
        return _less_at((log_p + log_weight).exp_(), targets, log_weight.exp().squeeze(1))


def _less_at(slopes: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The slopes, less each row's weight in its target's column."""
    return slopes.scatter_add_(1, targets[:, None], weights.neg_()[:, None])


# ---- the bank -----------------------------------------------------------------------------------


class Change:
    """Rows of a bank as they were before a move, and the change that came after it.

    Whoever holds a change can tell how the bank was when it was still to come. A memory keeps the
    latest one only, so the others live as long as a loss whose backward is still to come.
    """

    def __init__(self) -> None:
        self.bank: torch.Tensor | None = None
        self.rows: torch.Tensor | None = None
        self.before: torch.Tensor | None = None
        self.next: Change | None = None

    def bank_before(self, bank: torch.Tensor) -> torch.Tensor:
        """The bank as it was; itself if nothing of it has moved since."""
        changes = []
        change: Change = self
        while change.next is not None:
            if change.bank is bank:
                changes.append(change)
            change = change.next
        if not changes:
            return bank
        before = bank.clone()
        for change in reversed(changes):
            assert change.rows is not None
            assert change.before is not None
            before[change.rows] = change.before
        return before


class State:
    """What a memory keeps between calls besides its buffers."""

    def __init__(self) -> None:
        self.change = Change()  # of the bank, the one that is still to come
        self.groups: Groups | None = None
        self._looked = False

    def record(self, bank: torch.Tensor, rows: torch.Tensor) -> None:
        """Keep these rows for those that hold the change that comes now."""
        change = self.change
        change.bank, change.rows, change.before = bank, rows, bank[rows]
        change.next = self.change = Change()

    def look_at_norms(self, op: str, inputs: torch.Tensor) -> None:
        """Warn, at the first call only, of inputs whose norm is not 1."""
        if self._looked:
            return
        self._looked = True
        norms = inputs.detach().norm(dim=1)
        worst = norms[(norms - 1.0).abs().argmax()].item() if len(norms) else 1.0
        if abs(worst - 1.0) > 1e-2:
            warnings.warn(
                f"{op}: inputs are meant to have norm 1 (got a norm of {worst:.4g}); the "
                "temperature assumes it",
                stacklevel=6,
            )

    def groups_of(self, op: str, labels: torch.Tensor) -> Groups:
        """The groups of checked labels, the ones from the last call where these are the same."""
        groups = self.groups
        if groups is None or not groups.are_those_of(labels):
            lowest, highest = (int(x) for x in torch.aminmax(labels))
            if lowest < 0:
                raise ValueError(
                    f"{op}: labels must be >= 0, an un-clustered image having a number of its own "
                    f"(got {lowest})"
                )
            groups = self.groups = Groups(labels, highest + 1)
        return groups


def move(
    bank: torch.Tensor, rows: torch.Tensor, features: torch.Tensor, momentum: float, hard: bool
) -> None:
    """Move rows of the bank towards features; with ``hard`` each once, to the least similar."""
    if hard:
        chosen = least_similar(features, rows, bank)
        # Features that are not finite are left out, without waiting for the device.
        features = torch.where(chosen[:, None], features, math.nan)
    if bank.is_contiguous():
        momentum_update_(bank, features, rows, momentum)
        return
    distinct, places = rows.unique(return_inverse=True)
    moved = bank[distinct]
    momentum_update_(moved, features, places, momentum)
    bank[distinct] = moved


# ---- the loss of a memory -----------------------------------------------------------------------


class Step(NamedTuple):
    """What a memory's loss needs besides the inputs."""

    bank: torch.Tensor  # (N, d)
    classes: Classes
    criterion: Criterion
    targets: torch.Tensor  # (B,) int64, the class of each input
    temperature: float
    normalise: bool  # the inputs first
    rows: torch.Tensor  # (M,) int64, the rows that backward moves
    towards: torch.Tensor | None  # (M, d) what they are moved to; None: the inputs
    momentum: float
    hard: bool
    state: State


class _Once(torch.autograd.Function):
    """A gradient that cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        raise RuntimeError("the loss of a memory is not twice differentiable")


class Loss(torch.autograd.Function):
    """The mean loss () of inputs (B, d) float32; its backward moves the bank."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, step: Step) -> torch.Tensor:
        norms, divisor = None, step.temperature
        if step.normalise:
            norms = torch.linalg.vector_norm(inputs, dim=1, keepdim=True).clamp_(_SHORTEST)
            divisor = norms * divisor
        with ieee_products():
            logits = step.classes.logits(inputs, step.bank, divisor)
        loss, kept = step.criterion.value(logits, step.targets)
        ctx.step, ctx.change = step, step.state.change
        ctx.save_for_backward(inputs, norms, *kept)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        inputs, norms, *kept = ctx.saved_tensors
        features, step = inputs, ctx.step
        with torch.no_grad():
            slopes = step.criterion.slopes(step.targets, *kept)
            scale = grad / (len(step.targets) * step.temperature)
            # Of the bank that the logits were made with, whatever has been moved since.
            with ieee_products():
                gradient = step.classes.pull(slopes, ctx.change.bank_before(step.bank))
            if norms is not None:
                features = features / norms
                along = (gradient * features).sum(1, keepdim=True)
                gradient.addcmul_(features, along, value=-1.0)
                scale = scale / norms
            gradient.mul_(scale)
            step.state.record(step.bank, step.rows)
            towards = features if step.towards is None else step.towards
            move(step.bank, step.rows, towards, step.momentum, step.hard)
        if torch.is_grad_enabled():
            gradient = _Once.apply(inputs, gradient)
        return gradient, None


# ---- arguments ----------------------------------------------------------------------------------


class Given(NamedTuple):
    """A forward's checked arguments."""

    bank: torch.Tensor  # (N, d)
    inputs: torch.Tensor  # (B, d) float32
    rows: torch.Tensor  # (B,) int64
    temperature: float
    momentum: float


def _number(op: str, name: str, value: Any, high: float, rule: str) -> float:
    # The peers put it into a tensor, so one that is a tensor already works with them too.
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    return _checks.number(op, name, value, 0.0, high, rule=rule)


def check(op: str, memory: Any, inputs: torch.Tensor, name: str, rows: torch.Tensor) -> Given:
    """Refuse before the loss what the update in backward would refuse, but for indices."""
    bank: torch.Tensor = memory.features
    _checks.tensor(op, "inputs", inputs)
    _checks.tensor(op, name, rows)
    _checks.rank(op, "inputs", inputs, 2)
    _checks.dtype(op, "inputs", inputs, _checks.FLOATS)
    _checks.rank(op, "features", bank, 2)
    _checks.dtype(op, "features", bank, _checks.FLOATS)
    batch = inputs.shape[0]
    _checks.shape(op, "inputs", inputs, (batch, bank.shape[1]), "as wide as the bank")
    _checks.dtype(op, name, rows, _INDICES)
    _checks.shape(op, name, rows, (batch,), "one per input")
    _checks.same_device(op, features=bank, inputs=inputs, **{name: rows})
    if bank.requires_grad:
        raise ValueError(f"{op}: features are changed in place and must not require a gradient")
    temperature = _number(op, "temp", memory.temp, math.inf, "finite and > 0")
    if temperature == 0.0:
        raise ValueError(f"{op}: temp must be finite and > 0 (got 0.0)")
    momentum = _number(op, "momentum", memory.momentum, 1.0, "in [0, 1]")
    return Given(bank, inputs.float(), rows.long(), temperature, momentum)


def _checked_labels(op: str, labels: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    _checks.tensor(op, "labels", labels)
    _checks.shape(op, "labels", labels, (bank.shape[0],), "one per row of features")
    _checks.dtype(op, "labels", labels, _INDICES)
    _checks.same_device(op, features=bank, labels=labels)
    return labels.long()


def beside_bank(memory: Any, inputs: Any) -> Any:
    """The inputs on the bank's device, where Cluster Contrast moves them to the GPU."""
    device = memory.features.device
    elsewhere = isinstance(inputs, torch.Tensor) and inputs.device != device
    return inputs.to(device) if elsewhere else inputs


def _finite(op: str, loss: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """The loss; on the CPU, inputs that made it something else than a number are refused."""
    if loss.device.type == "cpu" and not math.isfinite(loss.item()):
        wrong = ~inputs.isfinite().all(dim=1)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ValueError(f"{op}: inputs must be finite (got one that is not at row {row})")
    return loss


# ---- memories -----------------------------------------------------------------------------------

_ROWS, _CROSS_ENTROPY, _BOUNDED = RowClasses(), CrossEntropy(), BoundedCrossEntropy()
F = TypeVar("F", bound=Callable[..., Any])


def not_compiled(function: F) -> F:
    """Have torch.compile call this as it is; without it, nothing is in the way."""
    eager = torch.compiler.disable(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        chosen = eager if torch.compiler.is_compiling() else function
        return chosen(*args, **kwargs)

    return call  # type: ignore[return-value]


@not_compiled
def cluster_loss(
    op: str,
    memory: Any,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    *,
    hard: bool,
    normalise: bool = True,
    smooth: float = 0.0,
) -> torch.Tensor:
    """The mean loss over the rows of a memory's ``features``; backward moves those of the targets.

    Args:
        op: what errors call themselves.
        memory: has ``features`` (K, d), ``momentum``, ``temp`` and ``state``.
        inputs: (B, d).
        targets: (B,) integers.
        hard: move each row once, towards the least similar input.
        normalise: divide the inputs by their norms.
        smooth: share of the target that :class:`SmoothedCrossEntropy` spreads.
    """
    given = check(op, memory, inputs, "targets", targets)
    step = Step(
        bank=given.bank,
        classes=_ROWS,
        criterion=SmoothedCrossEntropy(smooth) if smooth else _CROSS_ENTROPY,
        targets=given.rows,
        temperature=given.temperature,
        normalise=normalise,
        rows=given.rows,
        towards=None,
        momentum=given.momentum,
        hard=hard,
        state=memory.state,
    )
    try:
        loss: torch.Tensor = Loss.apply(given.inputs, step)
    except IndexError:
        _checks.indices_in_range(op, "targets", given.rows, given.bank.shape[0])
        raise
    return _finite(op, loss, inputs)


@not_compiled
def hybrid_loss(
    op: str,
    memory: Any,
    inputs: torch.Tensor,
    indexes: torch.Tensor,
    everyone: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """SpCL's loss over the classes of a memory's ``labels``; backward moves the rows ``indexes``.

    Args:
        op: what errors call themselves.
        memory: has ``features`` (N, d), ``labels`` (N,), ``momentum``, ``temp`` and ``state``.
        inputs: (B, d) of norm 1.
        indexes: (B,) integers, their rows.
        everyone: features and rows to move in place of the inputs' own.
    """
    given = check(op, memory, inputs, "indexes", indexes)
    bank = given.bank
    memory.state.look_at_norms(op, given.inputs)
    groups = memory.state.groups_of(op, _checked_labels(op, memory.labels, bank))
    try:
        targets = groups.labels.index_select(0, given.rows)
    except IndexError:
        _checks.indices_in_range(op, "indexes", given.rows, bank.shape[0])
        raise
    towards, rows = (None, given.rows) if everyone is None else everyone
    step = Step(
        bank=bank,
        classes=mean_classes(bank, groups, inputs.shape[0]),
        criterion=_BOUNDED,
        targets=targets,
        temperature=given.temperature,
        normalise=False,
        rows=rows,
        towards=towards,
        momentum=given.momentum,
        hard=False,
        state=memory.state,
    )
    return _finite(op, Loss.apply(given.inputs, step), inputs)
