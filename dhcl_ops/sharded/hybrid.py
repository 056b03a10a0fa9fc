"""The loss of DHCL-HNM over a memory bank whose rows and prototypes lie on several ranks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from dhcl_ops import _checks, hybrid
from dhcl_ops.contrastive import (
    Arguments,
    ContrastiveStats,
    NegativeWeights,
    check_arguments,
    check_weights,
    divisor_of,
    loss_dtype,
    stats_of,
)
from dhcl_ops.false_negatives import FalseNegatives
from dhcl_ops.hybrid import Expected, Suspects
from dhcl_ops.sharded.bank import MemoryBank
from dhcl_ops.sharded.contrastive import MEAN, Problem, agreed_settings, gathered, loss_over
from dhcl_ops.sharded.listed import check_lists, lists_by_class
from dhcl_ops.sharded.shards import Shards

__all__ = ["DHCLLoss", "hybrid_contrastive_loss", "suspected_false_negatives"]


@torch.no_grad()
def suspected_false_negatives(memory: MemoryBank, loose_labels: torch.Tensor) -> Suspects:
    """:func:`dhcl_ops.suspected_false_negatives` of a bank on several ranks, equal on all of them.

    Args:
        memory: a bank with labels.
        loose_labels: (n,) int64 labels of this rank's images at a larger eps.

    Raises:
        TypeError, ValueError, RuntimeError, PeerError: as :class:`MemoryBank`.
    """
    op = "sharded.suspected_false_negatives"
    begin, end = memory.image_starts[memory.rank : memory.rank + 2]

    def check() -> torch.Tensor:
        why = "one per image of this rank"
        loose = _checks.integers(op, "loose_labels", loose_labels, end - begin, why)
        _checks.same_device(op, memory=memory.proto_of, loose_labels=loose)
        if len(loose) and int(loose.min()) < -1:
            raise ValueError(f"{op}: loose_labels must be >= -1 (got {int(loose.min())})")
        return loose

    shards = Shards(op, memory.group, check, {}, memory.traffic)
    loose = shards.own
    with shards.stage("suspects"):
        highest = loose.max()[None] if len(loose) else loose.new_full((1,), -1)
        base = int(shards.gather_shares(highest, [1] * shards.world).max()) + 1
        if base > memory.num_samples:
            # Numbers with gaps: only which images are together counts.
            numbers = shards.gather(loose).unique()
            loose = torch.where(loose < 0, loose, torch.searchsorted(numbers, loose))
            base = len(numbers)
    loose = memory.beside_rows(shards, loose[:, None]).squeeze(1)
    first, behind = memory.prototype_starts[memory.rank : memory.rank + 2]
    classes = memory.proto_of[memory.images].long() - first
    best = hybrid.largest_shares(classes, loose, behind - first, base)
    with shards.stage("suspects"):
        return hybrid.suspects_of(shards.gather(best), base)


def hybrid_contrastive_loss(
    features: torch.Tensor,
    memory: MemoryBank,
    indices: torch.Tensor,
    *,
    instance_weight: float = 0.25,
    prototype_weight: float = 1.0,
    instance_positives: str = "self",
    cameras: torch.Tensor | None = None,
    temperature: float = 0.05,
    kappa: float = 0.0,
    tau_plus: float | None = None,
    beta: float = 0.0,
    suspects: Suspects | None = None,
    suspects_as: str = "exclude",
    false_negatives: FalseNegatives | None = None,
    hardness_gradient: str = "stop",
    reduction: str = "mean",
    return_stats: bool = False,
    precision: str = "exact",
) -> Any:
    """:func:`dhcl_ops.hybrid_contrastive_loss` over a bank on several ranks, whose group it takes.

    Every rank calls it with its own batch. The loss is that of one process which has the whole bank
    and this rank's batch, to rounding: see :func:`debiased_contrastive_loss`. Nothing is sent in
    backward, and the bank may change before it.

    Args:
        features: (b, d) this rank's batch, of norm 1, any number of rows.
        memory: a sharded bank with labels.
        indices: (b,) int64 numbers of their images, among those of all ranks.
        cameras: (N,) int64 of the images of all ranks, for ``"cross-camera"``.
        suspects: of :func:`suspected_false_negatives` of this module.
        false_negatives: lists of this rank's images, of :func:`graph_false_negatives` of this
            module with the bank's labels, on all ranks or none. The entries that a batch needs go
            to the ranks of their classes. On CUDA classes that do not exist weigh nothing.
        instance_weight, prototype_weight, instance_positives, temperature, kappa: as in
            :func:`dhcl_ops.hybrid_contrastive_loss`, equal on all ranks.
        tau_plus, beta, suspects_as, hardness_gradient, reduction, precision: as there, equal on
            all ranks.
        return_stats: also return :class:`dhcl_ops.HybridStats` of own rows; the hardest instances
            are numbered among the images of all ranks.

    Returns:
        The loss, () or (b,), or with ``return_stats`` the pair (loss, stats).

    Raises:
        TypeError, ValueError, IndexError, RuntimeError, PeerError: as
            :func:`debiased_contrastive_loss`; RuntimeError also for a bank without labels.
    """
    op = "sharded.hybrid_contrastive_loss"
    if not isinstance(memory, MemoryBank):
        raise TypeError(f"{op}: memory must be a sharded.MemoryBank (got {type(memory).__name__})")
    options: dict[str, Any] = {
        "instance_weight": instance_weight, "prototype_weight": prototype_weight,
        "instance_positives": instance_positives, "temperature": temperature, "kappa": kappa,
        "tau_plus": tau_plus, "beta": beta, "suspects_as": suspects_as,
        "hardness_gradient": hardness_gradient, "reduction": reduction, "precision": precision,
    }  # fmt: skip
    if instance_positives != "cross-camera":
        cameras = None
    shards, weights, given = _agreed(
        op, features, memory, indices, cameras, suspects, false_negatives, options
    )
    pulled = instance_positives if weights[1] else "self"
    batch = _batch_of(shards, memory, indices, pulled, cameras, false_negatives)
    classes = memory.num_prototypes
    debias = hybrid.expected_false_negatives(
        op, classes, batch.labels, kappa, tau_plus, suspects, suspects_as
    )
    terms: list[torch.Tensor | None] = [None, None]
    seen: list[ContrastiveStats | None] = [None, None]
    divisor = divisor_of(reduction, len(features))
    fast, of_class = precision == "fast", instance_positives == "class"
    for place, weight in enumerate(weights):
        if not weight:
            continue
        if place == 0:
            problem = _prototype_term(batch, memory, debias, given, fast)
        else:
            problem = _instance_term(batch, memory, of_class, debias, given, fast)
        results = loss_over(shards, problem, features)
        losses = results.losses.to(loss_dtype(features, memory.rows))
        terms[place] = losses if divisor is None else losses.sum() / divisor
        seen[place] = stats_of(results, problem.settings.aggregation)
    return hybrid.combined(weights, terms, seen, return_stats)


def _agreed(
    op: str,
    features: torch.Tensor,
    memory: MemoryBank,
    indices: torch.Tensor,
    cameras: torch.Tensor | None,
    suspects: Suspects | None,
    false_negatives: FalseNegatives | None,
    options: dict[str, Any],
) -> tuple[Shards, tuple[float, float], Arguments]:
    """What all ranks are about to do, checked: the terms' weights, and what both terms share."""
    weights: tuple[float, float]
    given: Arguments

    def check() -> torch.Tensor:
        nonlocal weights, given
        both = options["prototype_weight"], options["instance_weight"]
        weights = hybrid.check_terms(
            op, features, indices, memory.num_samples, both, options["instance_positives"],
            options["suspects_as"], cameras,
        )  # fmt: skip
        memory.check_cameras(op, cameras)
        _checks.same_device(op, features=features, memory=memory.rows, indices=indices)
        names = ("temperature", "beta", "hardness_gradient", "reduction", "precision")
        # As a loss over own prototypes; kappa and what is positive differ by term.
        given = check_arguments(
            op, features, memory.prototypes, memory.proto_of[indices].long(), kappa=0.0,
            tau_plus=None, proxy_labels=None, positives="mean", exclude=None, chunk_size=None,
            whole=False, **{name: options[name] for name in names},
        )  # fmt: skip
        own = memory.image_starts[memory.rank + 1] - memory.image_starts[memory.rank]
        listed = hybrid.negative_weights(op, own, indices, false_negatives, options["suspects_as"])
        if listed is not None:
            check_weights(op, listed, features, options["kappa"], options["tau_plus"])
            check_lists(op, listed._replace(rows=indices[:0]), memory.num_prototypes)
        return features.detach()

    settings = agreed_settings(
        features, memory.rows, cameras=cameras is not None, suspects=suspects is not None,
        false_negatives=false_negatives is not None, **options,
    )  # fmt: skip
    shards = Shards(op, memory.group, check, settings, memory.traffic)
    return shards, weights, given


class _Batch(NamedTuple):
    """Rows of all ranks."""

    features: torch.Tensor  # (B, d)
    labels: torch.Tensor  # (B,) classes
    positives: torch.Tensor  # (B,) images whose rows the instance term pulls to
    listed: NegativeWeights | None  # of own classes, by number among them


def _batch_of(
    shards: Shards,
    memory: MemoryBank,
    indices: torch.Tensor,
    instance_positives: str,
    cameras: torch.Tensor | None,
    found: FalseNegatives | None,
) -> _Batch:
    """The batches of all ranks."""
    with shards.stage("batch"):
        images = gathered(shards, indices)
        features = gathered(shards, shards.own)
    listed = None if found is None else lists_by_class(shards, memory, found, images)
    batch = _Batch(features, memory.proto_of[images].long(), images, listed)
    if instance_positives in ("hardest", "cross-camera"):
        hardest = memory.hardest_of_all(shards, batch.features, images, cameras)
        batch = batch._replace(positives=hardest)
    return batch


def _with_kappa(
    given: Arguments, kappa: float | torch.Tensor, tau_plus: float | None, batch: _Batch
) -> Any:
    """The settings with these false negatives."""
    if not isinstance(kappa, torch.Tensor):
        share = kappa if tau_plus is None else tau_plus
        rows, device = len(batch.labels), batch.labels.device
        kappa = torch.full((rows,), share, dtype=torch.float64, device=device)
    return given.settings._replace(kappa=kappa.double(), prior=tau_plus is not None)


def _prototype_term(
    batch: _Batch, memory: MemoryBank, debias: Expected, given: Arguments, fast: bool
) -> Problem:
    first, behind = memory.prototype_starts[memory.rank : memory.rank + 2]
    groups = debias.groups
    roles = given.roles._replace(
        labels=batch.labels - first,
        row_groups=None if groups is None else groups[batch.labels],
        column_groups=None if groups is None else groups[first:behind].contiguous(),
    )
    settings = _with_kappa(given, debias.kappa, debias.tau_plus, batch)
    features, listed = batch.features, batch.listed
    return Problem(features, memory.prototypes, roles, settings, fast, 0, None, first, listed)


def _instance_term(
    batch: _Batch,
    memory: MemoryBank,
    of_class: bool,
    debias: Expected,
    given: Arguments,
    fast: bool,
) -> Problem:
    images, labels = memory.images, batch.labels
    classes = memory.proto_of[images].long()
    row_groups, column_groups = labels, classes
    if debias.groups is not None:
        row_groups, column_groups = debias.groups[labels], debias.groups[classes]
    # The same share of the negatives as among the prototypes.
    others = max(memory.num_prototypes - 1, 1)
    share = debias.share(others)
    kappa: float | torch.Tensor = 0.0
    if share is None:
        negatives = memory.num_samples - memory.class_sizes[labels]
        kappa = debias.kappa / others * negatives
    grouped = not of_class or debias.groups is not None
    roles = given.roles._replace(
        labels=labels if of_class else _places(images, batch.positives),
        proxy_labels=classes if of_class else None,
        row_groups=row_groups if grouped else None,
        column_groups=column_groups if grouped else None,
    )
    settings = _with_kappa(given, kappa, share, batch)
    if of_class:
        settings = settings._replace(aggregation=MEAN)
    features, listed = batch.features, batch.listed
    if listed is not None:
        listed = NegativeWeights(*listed[:4], *memory.class_rows)
    return Problem(features, memory.rows, roles, settings, fast, 0, images, 0, listed)


def _places(images: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Where images stand among ascending ones, -1 where they do not."""
    if len(images) == 0:
        return torch.full_like(wanted, -1)
    place = torch.searchsorted(images, wanted).clamp(max=len(images) - 1)
    return torch.where(images[place] == wanted, place, -1)


class DHCLLoss(hybrid.DHCLLoss):
    """:class:`dhcl_ops.DHCLLoss` over a bank on several ranks; every rank calls it together.

    Loose labels are those (n,) of this rank's images, and so are lists of false negatives.
    """

    loss_of = staticmethod(hybrid_contrastive_loss)
    suspects_of = staticmethod(suspected_false_negatives)
