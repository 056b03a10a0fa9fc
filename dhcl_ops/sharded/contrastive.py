"""The debiased contrastive loss over proxies that lie on several ranks.

Every rank takes the batches of all ranks past its own proxies, as vocabulary-parallel cross-entropy
does. The rows' sums over some of the proxies are what :mod:`dhcl_ops._contrastive_stream` has
anyway between two chunks; those of all ranks are merged, and what each rank has read out of its
proxies goes home as gradient, along with the loss: backward sends nothing.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from dhcl_ops import _contrastive_kernels as kernels
from dhcl_ops import _contrastive_stream as stream
from dhcl_ops._contrastive_kernels import Roles, Settings, Sums
from dhcl_ops._contrastive_listed import Listed
from dhcl_ops.contrastive import (
    Arguments,
    NegativeWeights,
    check_arguments,
    check_weights,
    divisor_of,
    look_at_columns,
    loss_dtype,
    stats_of,
)
from dhcl_ops.sharded.listed import check_lists, lists_of_all
from dhcl_ops.sharded.shards import Shards

__all__ = ["debiased_contrastive_loss"]

# How the instance term combines several positives.
MEAN = kernels.MEAN


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
    weights: NegativeWeights | None = None,
    hardness_gradient: str = "stop",
    reduction: str = "mean",
    return_stats: bool = False,
    precision: str = "exact",
    chunk_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    traffic: dict[str, int] | None = None,
) -> Any:
    """:func:`dhcl_ops.debiased_contrastive_loss` of own rows over the proxies of all ranks.

    Every rank calls it with its own batch and its own proxies. The loss is that of one process
    which has all proxies and this rank's batch: data parallel training averages its gradients over
    the ranks as ever. It agrees with one process to rounding, since each rank sums over its own
    proxies: losses to 2e-6 and gradients to 2e-6 of their largest element in fp32.

    Nothing is sent in backward: the gradient is computed along with the loss, and the proxies may
    change before backward.

    Args:
        features: (b, d) this rank's batch, any number of rows.
        proxies: (K_r, d) this rank's proxies, any number of them; columns are numbered on from rank
            to rank. They must not require a gradient.
        labels: (b,) int64 the column of each row's positive among the proxies of all ranks, or with
            ``proxy_labels`` its class.
        proxy_labels: (K_r,) int64 classes of own proxies.
        exclude: (b, E) int64 columns among those of all ranks, padded with -1, E equal on all
            ranks; or a pair of group numbers, (b,) of own rows and (K_r,) of own proxies.
        weights: as there, on all ranks or none: lists of own rows, their entries columns among
            those of all ranks. With ``members`` an entry is a class, of which each rank lists its
            own proxies, again by column; all have offsets for all classes.
        temperature, kappa, tau_plus, beta, positives: as in
            :func:`dhcl_ops.debiased_contrastive_loss`, equal on all ranks; kappa may be one value
            per own row.
        hardness_gradient, reduction, precision, chunk_size: as there, equal on all ranks.
        return_stats: also return :class:`dhcl_ops.ContrastiveStats` of own rows.
        group, traffic: as in :func:`knn`.

    Returns:
        The loss of this rank's rows, () or (b,), or with ``return_stats`` the pair (loss, stats).
        Differentiable, once, with respect to the features.

    Raises:
        TypeError, ValueError, IndexError: as :func:`dhcl_ops.debiased_contrastive_loss`, on all
            ranks, also where one rank's arguments are wrong or do not agree with another's.
        RuntimeError: without an initialised process group.
        PeerError: another rank was lost or did not answer in the group's time.
    """
    op = "sharded.debiased_contrastive_loss"
    given: Arguments

    def check() -> torch.Tensor:
        nonlocal given
        given = check_arguments(
            op, features, proxies, labels, temperature=temperature, kappa=kappa, tau_plus=tau_plus,
            beta=beta, proxy_labels=proxy_labels, positives=positives, exclude=exclude,
            hardness_gradient=hardness_gradient, reduction=reduction, precision=precision,
            chunk_size=chunk_size, whole=False,
        )  # fmt: skip
        check_weights(op, weights, features, kappa, tau_plus)
        if weights is not None:
            check_lists(op, weights, _classes_in(weights))
        if proxies.requires_grad:
            raise ValueError(f"{op}: proxies must not require a gradient: it would be a rank's own")
        return features.detach()

    settings = agreed_settings(
        features, proxies, temperature=temperature, tau_plus=tau_plus, beta=beta,
        positives=positives, hardness_gradient=hardness_gradient, precision=precision,
        reduction=reduction, proxy_labels=proxy_labels is not None,
        kappa="one a row" if isinstance(kappa, torch.Tensor) else kappa,
        exclude=_kind_of(exclude), weights=_kind_of_lists(weights),
    )  # fmt: skip
    shards = Shards(op, group, check, settings, traffic, second=proxies)
    problem = _problem(shards, given, proxies.detach(), precision == "fast")
    if weights is not None:
        listed = lists_of_all(shards, weights, problem.first)
        problem = problem._replace(listed=listed)
    results = loss_over(shards, problem, features)
    losses = results.losses.to(loss_dtype(features, proxies))
    divisor = divisor_of(reduction, len(features))
    loss = losses if divisor is None else losses.sum() / divisor
    return (loss, stats_of(results, given.settings.aggregation)) if return_stats else loss


def _problem(shards: Shards, given: Arguments, proxies: torch.Tensor, fast: bool) -> Problem:
    """The batches of all ranks before own proxies."""
    count = shards.second_starts[-1]
    if count == 0:
        raise ValueError(f"{shards.op}: at least one proxy is needed (got none on any rank)")
    with shards.stage("batch"):
        batch = gathered(shards, shards.own)
        roles, kappa = _gathered_roles(shards, given)
    _look_at_columns(shards, roles, count)
    first = shards.second_starts[shards.rank]
    # Columns count from this rank's first proxy; others are in no range, and so no columns of it.
    if roles.proxy_labels is None:
        roles = roles._replace(labels=roles.labels - first)
    if roles.excluded is not None:
        roles = roles._replace(excluded=roles.excluded - first)
    settings = given.settings._replace(kappa=kappa)
    return Problem(batch, proxies, roles, settings, fast, given.columns, None, first)


def agreed_settings(features: Any, proxies: Any, **settings: Any) -> dict[str, Any]:
    """What ranks must agree on: the settings, and widths, dtypes and devices."""
    for name, value in (("features", features), ("proxies", proxies)):
        if isinstance(value, torch.Tensor):
            kind = (*value.shape[1:], value.dtype, value.device.type)
            settings[f"the {name}' width, dtype and device"] = kind
    wanted = isinstance(features, torch.Tensor) and features.requires_grad
    settings["whether features need a gradient"] = wanted and torch.is_grad_enabled()
    return settings


def _kind_of(exclude: Any) -> str:
    if isinstance(exclude, torch.Tensor):
        return f"{tuple(exclude.shape[1:])} columns a row"
    return "none" if exclude is None else "groups"


def _classes_in(weights: NegativeWeights) -> int | None:
    """How many classes lists are of, None for lists of columns."""
    return None if weights.member_offsets is None else len(weights.member_offsets) - 1


def _kind_of_lists(weights: Any) -> str:
    if not isinstance(weights, NegativeWeights):
        return "none"
    classes = weights.member_offsets
    return "columns" if not isinstance(classes, torch.Tensor) else f"{len(classes) - 1} classes"


def gathered(shards: Shards, own: torch.Tensor) -> torch.Tensor:
    """Rows (B, ...) of the batches of all ranks, of which this rank gives its own."""
    return shards.gather_shares(own, _sizes(shards.starts))


def _sizes(starts: list[int]) -> list[int]:
    return [end - begin for begin, end in itertools.pairwise(starts)]


def _gathered_roles(shards: Shards, given: Arguments) -> tuple[Roles, torch.Tensor]:
    """Roles of the rows of all ranks, and their kappa; what belongs to proxies stays."""
    roles = given.roles
    columns = [roles.labels, given.settings.kappa.view(torch.int64)]
    if roles.row_groups is not None:
        columns.append(roles.row_groups)
    if roles.excluded is not None:
        columns.extend(roles.excluded.unbind(1))
    every = gathered(shards, torch.stack(columns, 1)).unbind(1)
    listed = 3 if roles.row_groups is not None else 2
    return roles._replace(
        labels=every[0].contiguous(),
        row_groups=None if roles.row_groups is None else every[2].contiguous(),
        excluded=None
        if roles.excluded is None
        else torch.stack(every[listed:], 1)
        if len(every) > listed
        else roles.excluded.new_empty(len(every[0]), 0),
    ), every[1].contiguous().view(torch.float64)


def _look_at_columns(shards: Shards, roles: Roles, count: int) -> None:
    """Refuse on the CPU columns out of range, of any rank, on all."""
    try:
        look_at_columns(shards.op, roles, count)
    except IndexError:
        excluded = roles.excluded
        for rank, (begin, end) in enumerate(itertools.pairwise(shards.starts)):
            listed = None if excluded is None else excluded[begin:end]
            part = roles._replace(labels=roles.labels[begin:end], excluded=listed)
            try:
                look_at_columns(shards.op, part, count)
            except IndexError as error:
                raise IndexError(f"{error} on rank {rank}") from None


# ---- the loss over own proxies, merged ----------------------------------------------------------


class Problem(NamedTuple):
    """The batches of all ranks, of B rows, before this rank's proxies."""

    features: torch.Tensor  # (B, d)
    proxies: torch.Tensor  # (K_r, d)
    roles: Roles  # of B rows and own columns, which count from 0
    settings: Settings  # kappa (B,)
    fast: bool
    columns: int
    ids: torch.Tensor | None  # (K_r,) ascending numbers of own proxies among all, or None:
    first: int  # they are consecutive, from this one on
    listed: NegativeWeights | None = None  # of B rows; what they name counts from 0, as columns do


def loss_over(shards: Shards, problem: Problem, features: torch.Tensor) -> stream.Results:
    """The results for this rank's rows; the losses (b,) float64 are differentiable by them."""
    wanted = features.requires_grad and torch.is_grad_enabled()
    one_pass = wanted and problem.roles.proxy_labels is None and not problem.settings.through
    streaming = stream.Streaming(one_pass, problem.fast, problem.columns)
    # What is computed here is recorded as one step, at the end.
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        partial = stream.stream_sums(*problem[:4], streaming, _listed(problem))
        with shards.stage("sums of the loss"):
            sums, factor = _merged(shards, problem, partial.sums)
        losses, rows = stream.finished(sums, problem.settings, _listed(problem))
        gradient = features.new_empty(0)
        if wanted:
            if one_pass:
                share = _first_pass_gradient(problem, partial, rows, factor)
            else:
                share = _second_pass_gradient(problem, sums, rows)
            with shards.stage("gradient"):
                gradient = _own_sum(shards, share)
    own = slice(shards.begin, shards.end)
    losses = losses[own]
    if wanted:
        losses, gradient = _WithGradient.apply(features, (losses, gradient))
    return stream.Results(losses, gradient, sums.state[own], sums.counts[own], rows[own])


def _listed(problem: Problem) -> Listed:
    return Listed() if problem.listed is None else Listed(*problem.listed)


class _WithGradient(torch.autograd.Function):
    """Losses (b,) whose gradients (b, d) by the features are known."""

    @staticmethod
    def forward(
        ctx: Any, features: torch.Tensor, known: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(known[1])
        ctx.format = features.dtype
        ctx.set_materialize_grads(False)
        # The gradient counts as differentiable, so that a second derivative is refused, not zero.
        return known

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, *others: Any) -> Any:  # type: ignore[override]
        if grad is None:
            return None, None
        return stream.scale_rows(ctx.saved_tensors[0], grad).to(ctx.format), None


def _merged(shards: Shards, problem: Problem, own: Sums) -> tuple[Sums, torch.Tensor]:
    """Sums over the proxies of all ranks, and what own masses (B,) shrink by in them."""
    world, rows = shards.world, len(own.state)
    counts = own.counts.clone()
    hardest = counts[:, kernels.HARDEST]
    if problem.ids is None:
        hardest += torch.where(hardest >= 0, problem.first, 0)
    elif len(problem.ids):
        hardest.copy_(torch.where(hardest >= 0, problem.ids[hardest.clamp(min=0)], -1))
    packed = torch.cat([own.state, counts.view(torch.float64)], 1)
    every = shards.gather_shares(packed, [rows] * world).view(world, rows, 9)
    states, counts = every[:, :, :6], every[:, :, 6:].contiguous().view(torch.int64)
    _refuse(shards, problem, states, counts)
    beta = problem.settings.beta
    top = states[:, :, kernels.MAX].amax(0)
    falling = states[:, :, kernels.MAX] - torch.where(top > -torch.inf, top, 0.0)
    factor = ((1.0 + beta) * falling).exp()
    shrunk = (beta * falling).exp() if beta > 0 else torch.ones_like(falling)
    high = states[:, :, kernels.POSITIVE_MAX].amax(0)
    lower = states[:, :, kernels.POSITIVE_MAX] - torch.where(high > -torch.inf, high, 0.0)
    state = torch.empty_like(own.state)
    state[:, kernels.MAX], state[:, kernels.POSITIVE_MAX] = top, high
    for column, shrinks in (
        (kernels.MASS, factor),
        (kernels.SQUARES, factor * factor),
        (kernels.NORM, shrunk),
        (kernels.POSITIVE_MASS, lower.exp()),
    ):
        state[:, column] = (states[:, :, column] * shrinks).sum(0)
    total = counts.sum(0)
    # Of equal negatives the one with the lowest number.
    among = (states[:, :, kernels.MAX] == top) & (counts[:, :, kernels.HARDEST] >= 0)
    none = torch.iinfo(torch.int64).max
    lowest = torch.where(among, counts[:, :, kernels.HARDEST], none).amin(0)
    total[:, kernels.HARDEST] = torch.where(lowest < none, lowest, -1)
    positives = None
    if own.positives is not None:
        positives = _merged_positives(shards, own.positives, counts[:, :, kernels.POSITIVES])
    return Sums(state, total, positives), factor[shards.rank]


def _merged_positives(shards: Shards, own: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The positives' logits (B, P) of all ranks, in the order of their columns.

    ``own`` (B, S) are this rank's, ``counts`` (world, B) how many there are of each rank.
    """
    world, rows = counts.shape
    slots = int(counts.max()) if counts.numel() else 0
    filled = own.new_zeros(rows, slots)
    width = min(slots, own.shape[1])
    filled[:, :width] = own[:, :width]
    every = shards.gather_shares(filled, [rows] * world).view(world, rows, slots)
    before = counts.cumsum(0) - counts
    most = int(counts.sum(0).max()) if counts.numel() else 0
    merged = own.new_zeros(rows, most)
    for part, start, count in zip(every, before, counts, strict=True):
        row, slot = (torch.arange(slots, device=own.device) < count[:, None]).nonzero(as_tuple=True)
        merged[row, start[row] + slot] = part[row, slot]
    return merged


def _refuse(shards: Shards, problem: Problem, states: torch.Tensor, counts: torch.Tensor) -> None:
    """Raise on the CPU, on all ranks, for what shows only in the sums; on CUDA kernels assert."""
    if states.is_cuda or states.shape[1] == 0:
        return
    op = shards.op
    masses = states[:, :, [kernels.MASS, kernels.POSITIVE_MASS]].sum((1, 2))
    tops = states[:, :, [kernels.MAX, kernels.POSITIVE_MAX]].amax((1, 2))
    wrong = ~(masses.isfinite() & (tops < torch.inf))
    if bool(wrong.any()):
        raise ValueError(
            f"{op}: proxies must be finite, and similarities in float32 (got some that are not on "
            f"rank {int(wrong.nonzero()[0])})"
        )
    total = counts.sum(0)
    without = total[:, kernels.POSITIVES] == 0
    if bool(without.any()):
        raise ValueError(
            f"{op}: every row needs a positive proxy (got none for {_position(shards, without)})"
        )
    negatives, kappa = total[:, kernels.NEGATIVES], problem.settings.kappa
    wrong = (kappa >= negatives) & (negatives > 0)
    if bool(wrong.any()) and not problem.settings.prior:
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"{op}: kappa must be smaller than the number of negatives (got {float(kappa[row]):g} "
            f"and {int(negatives[row])} for {_position(shards, wrong)})"
        )


def _position(shards: Shards, wrong: torch.Tensor) -> str:
    """The first of these rows (B,) in words."""
    row = wrong.nonzero()[0]
    rank = int(shards.owners(row))
    return f"batch position {int(row) - shards.starts[rank]} of rank {rank}"


# ---- gradients ----------------------------------------------------------------------------------


def _first_pass_gradient(
    problem: Problem, partial: stream.Partial, rows: torch.Tensor, factor: torch.Tensor
) -> torch.Tensor:
    """What own proxies add to the gradient (B, d) of each row, from what was read out of them."""
    proxies, temperature = problem.proxies, problem.settings.temperature
    gradient = partial.read_out
    if gradient is None:
        kind = loss_dtype(problem.features, proxies)
        return torch.zeros_like(problem.features, dtype=kind)
    unit = partial.unit * temperature
    gradient = gradient.mul_((rows[:, kernels.ALPHA] * factor / unit).to(gradient.dtype)[:, None])
    labels = problem.roles.labels
    here = (labels >= 0) & (labels < len(proxies))
    pull = torch.where(here, rows[:, kernels.SLOPE] / -temperature, 0.0).to(gradient.dtype)
    positives = proxies.index_select(0, labels.clamp(0, len(proxies) - 1)).to(gradient.dtype)
    return gradient.addcmul_(positives, pull[:, None])


def _second_pass_gradient(problem: Problem, sums: Sums, rows: torch.Tensor) -> torch.Tensor:
    """The same by a second pass over own proxies."""
    kind = loss_dtype(problem.features, problem.proxies)
    left = problem.features.to(kind)
    settings = problem.settings
    ones = torch.ones(len(left), dtype=torch.float64, device=left.device)
    options = stream.SecondPass(
        settings.aggregation, settings.temperature, settings.beta, problem.columns, True, False
    )
    first = stream.Rows(sums.state, sums.counts, rows)
    listed = _listed(problem)
    return stream.stream_gradients(
        ones, left, problem.proxies, problem.roles, first, options, listed
    )[0]


def _own_sum(shards: Shards, shares: torch.Tensor) -> torch.Tensor:
    """The sum over ranks, in their order, of what each has (B, d), for own rows (b, d)."""
    sizes, mine = _sizes(shards.starts), shards.rows
    parts = shards.exchange(shares, sizes, [mine] * shards.world)
    return parts.view(shards.world, mine, shares.shape[1]).sum(0)
