"""The loss of DHCL-HNM over a memory bank: prototypes and instances in one.

Mathematics: method.md in docs, section "Loss". Both terms are
:func:`dhcl_ops.contrastive.debiased_contrastive_loss`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from dhcl_ops import _checks
from dhcl_ops.bank import MemoryBank
from dhcl_ops.contrastive import ContrastiveStats, NegativeWeights, debiased_contrastive_loss
from dhcl_ops.false_negatives import FalseNegatives

__all__ = [
    "DHCLLoss",
    "HybridStats",
    "Suspects",
    "hybrid_contrastive_loss",
    "suspected_false_negatives",
]


# Which bank row of its class the instance term pulls a feature to.
INSTANCE_POSITIVES = ("self", "hardest", "cross-camera", "class")


class Suspects(NamedTuple):
    """Classes that a looser clustering puts together: suspected to be one identity."""

    groups: torch.Tensor  # (K,) int64, equal for classes of one loose cluster
    others: torch.Tensor  # (K,) int64, number of other classes in the group


def suspected_false_negatives(memory: MemoryBank, loose_labels: torch.Tensor) -> Suspects:
    """Group the classes of a bank by the loose cluster most of their members are in.

    Args:
        memory: a bank with labels.
        loose_labels: (N,) int64 labels of a clustering at a larger eps (-1 un-clustered), such as
            the second of ``dbscan(graph, [eps, eps + 0.02])``.

    Raises:
        TypeError, ValueError: labels of the wrong dtype, shape, device or range.
    """
    op = "suspected_false_negatives"
    proto_of = memory.proto_of
    size, why = len(proto_of), "one per training image"
    loose = _checks.integers(op, "loose_labels", loose_labels, size, why)
    _checks.same_device(op, memory=proto_of, loose_labels=loose)
    classes = len(memory.prototypes)
    lowest, highest = (int(x) for x in torch.aminmax(loose))
    if lowest < -1:
        raise ValueError(f"{op}: loose_labels must be >= -1 (got {lowest})")
    if highest >= size:
        # Numbers with gaps: only which images are together counts.
        numbers = loose.unique(return_inverse=True)[1]
        loose = torch.where(loose < 0, loose, numbers)
        highest = int(loose.max())
    base = highest + 1
    return suspects_of(largest_shares(proto_of, loose, classes, base), base)


def largest_shares(
    proto_of: torch.Tensor, loose: torch.Tensor, classes: int, base: int
) -> torch.Tensor:
    """Of each class (classes,) the loose cluster < base that most members are in, -1 for none.

    Of equal ones it is the first.
    """
    clustered = loose >= 0
    pairs, sizes = (proto_of * max(base, 1) + loose)[clustered].unique(return_counts=True)
    best = torch.full((classes,), -1, dtype=torch.int64, device=loose.device)
    if base > 0:
        score = sizes * base + (base - 1 - pairs % base)
        best.scatter_reduce_(0, pairs // base, score, "amax")
    return torch.where(best >= 0, base - 1 - best % max(base, 1), -1)


def suspects_of(best: torch.Tensor, base: int) -> Suspects:
    """Classes grouped by what :func:`largest_shares` found for each; those without are alone."""
    alone = torch.arange(len(best), device=best.device) + base
    groups = torch.where(best >= 0, best, alone)
    members = torch.bincount(groups, minlength=1)
    return Suspects(groups, members[groups] - 1)


class HybridStats(NamedTuple):
    """Parts of a hybrid loss: the two terms before weighting, and what each saw."""

    prototype_loss: torch.Tensor | None  # ()
    instance_loss: torch.Tensor | None  # ()
    prototypes: ContrastiveStats | None
    instances: ContrastiveStats | None


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
    """The loss of DHCL-HNM over a memory bank: a prototype term plus a weighted instance term.

    The prototype term pulls an image to the prototype of its class and away from all others. The
    instance term pulls it to a bank row of its class and away from the rows of other classes; the
    other rows of its own class are neither. Both are :func:`debiased_contrastive_loss`. Variants,
    in the names of method.md in docs: H1 is the default; H0 is ``instance_weight=0``, SpCL's
    unified loss where ``kappa = beta = 0``; H2 is ``prototype_weight=0, instance_weight=1,
    instance_positives="class"``, where all rows of the class are positives and ``e^r`` is the mean
    over them.

    Args:
        features: (B, d) of norm 1.
        memory: the bank, with labels.
        indices: (B,) int64, the bank row of each feature.
        instance_weight, prototype_weight: in [0, 1e9], not both 0. A term of weight 0 is not
            computed.
        instance_positives: which row of the class the instance term pulls to: the image's own
            (``"self"``), the one that is least similar to the feature (``"hardest"``), the least
            similar one of another camera, or the own where there is none (``"cross-camera"``), or
            all (``"class"``). Which row is hardest is a constant to the gradient.
        cameras: (N,) int64, of which camera each image is, for ``"cross-camera"``; not looked at
            otherwise. Which numbers are equal is all that counts.
        temperature, beta, hardness_gradient, reduction, precision: as in
            :func:`debiased_contrastive_loss`.
        kappa: expected number of false negatives among the K - 1 other prototypes. The instance
            term takes the same share, kappa / (K - 1), of its own negatives.
        tau_plus: that share itself, in place of kappa.
        suspects: of :func:`suspected_false_negatives`.
        suspects_as: ``"exclude"`` leaves suspected classes out of the negatives; ``"kappa"`` counts
            them instead, each row's kappa being the number of other classes in its group, at most
            half of the negatives.
        false_negatives: of :func:`graph_false_negatives`, with the bank's labels. A negative whose
            class is the image's own identity with probability p then counts 1 - p, in both terms,
            in place of kappa, and no row is clamped.
        return_stats: also return :class:`HybridStats`.

    Returns:
        The loss, () or (B,), or with ``return_stats`` the pair (loss, stats).

    Raises:
        TypeError, ValueError, IndexError: as :func:`debiased_contrastive_loss`; RuntimeError for a
            bank without labels.
    """
    op = "hybrid_contrastive_loss"
    if not isinstance(memory, MemoryBank):
        raise TypeError(f"{op}: memory must be a MemoryBank (got {type(memory).__name__})")
    weights = check_terms(
        op, features, indices, len(memory.features), (prototype_weight, instance_weight),
        instance_positives, suspects_as, cameras,
    )  # fmt: skip
    batch = _Batch(features, memory.proto_of[indices], indices)
    images = len(memory.proto_of)
    counted = negative_weights(op, images, indices, false_negatives, suspects_as)
    classes = len(memory.prototypes)
    debias = expected_false_negatives(
        op, classes, batch.labels, kappa, tau_plus, suspects, suspects_as
    )
    settings: dict[str, Any] = {
        "temperature": temperature,
        "beta": beta,
        "hardness_gradient": hardness_gradient,
        "reduction": reduction,
        "precision": precision,
        "return_stats": return_stats,
    }
    terms: list[torch.Tensor | None] = [None, None]
    seen: list[ContrastiveStats | None] = [None, None]
    if weights[0]:
        settings["weights"] = counted
        terms[0], seen[0] = _prototype_term(batch, memory, debias, settings)
    if weights[1]:
        of_class = instance_positives == "class"
        if instance_positives in ("hardest", "cross-camera"):
            apart = cameras if instance_positives == "cross-camera" else None
            batch = batch._replace(positives=memory.hardest_positives(features, indices, apart))
        if counted is not None:
            settings["weights"] = NegativeWeights(*counted[:4], *memory.class_rows)
        terms[1], seen[1] = _instance_term(batch, memory, of_class, debias, settings)
    return combined(weights, terms, seen, return_stats)


def check_terms(
    op: str,
    features: torch.Tensor,
    indices: torch.Tensor,
    rows: int,
    weights: tuple[float, float],
    instance_positives: str,
    suspects_as: str,
    cameras: torch.Tensor | None,
) -> tuple[float, float]:
    """Check what the terms share, for a bank of this many rows; returns their weights."""
    _checks.tensor(op, "features", features)
    _checks.rank(op, "features", features, 2)
    _checks.integers(op, "indices", indices, features.shape[0], "one per feature")
    rule = "finite and >= 0, at most 1e9"
    numbers = (
        _checks.number(op, "prototype_weight", weights[0], 0.0, 1e9, rule=rule),
        _checks.number(op, "instance_weight", weights[1], 0.0, 1e9, rule=rule),
    )
    if not any(numbers):
        raise ValueError(f"{op}: prototype_weight and instance_weight must not both be 0")
    _checks.one_of(op, "instance_positives", instance_positives, INSTANCE_POSITIVES)
    if instance_positives == "cross-camera" and cameras is None:
        raise ValueError(f'{op}: instance_positives="cross-camera" needs cameras (got None)')
    _checks.one_of(op, "suspects_as", suspects_as, ("exclude", "kappa"))
    if not torch.compiler.is_compiling():
        _checks.indices_in_range(op, "indices", indices, rows)
    return numbers


def combined(
    weights: tuple[float, float],
    terms: list[torch.Tensor | None],
    seen: list[ContrastiveStats | None],
    return_stats: bool,
) -> Any:
    """The loss of the two terms and, if asked for, what they saw."""
    # A product with 1 would be two more operations.
    parts = [t if w == 1.0 else w * t for w, t in zip(weights, terms, strict=True) if t is not None]
    loss = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    if not return_stats:
        return loss
    means = [None if term is None else term.detach().mean() for term in terms]
    return loss, HybridStats(means[0], means[1], seen[0], seen[1])


def negative_weights(
    op: str,
    images: int,
    indices: torch.Tensor,
    found: FalseNegatives | None,
    suspects_as: str,
) -> NegativeWeights | None:
    """The weights of the other prototypes, from the classes that so many images have listed."""
    if found is None:
        return None
    if suspects_as == "kappa":
        raise ValueError(f'{op}: false_negatives stand in place of suspects_as="kappa" (got both)')
    wanted = (images + 1,)
    _checks.shape(op, "false_negatives.offsets", found.offsets, wanted, "one more than images")
    return NegativeWeights(indices, *found)


class _Batch(NamedTuple):
    features: torch.Tensor  # (B, d)
    labels: torch.Tensor  # (B,) classes
    positives: torch.Tensor  # (B,) rows of the bank that the instance term pulls to


class Expected(NamedTuple):
    """What is known or expected of false negatives."""

    kappa: float | torch.Tensor  # among the other prototypes; one number, or one per row (B,)
    tau_plus: float | None  # the share itself, in place of kappa
    groups: torch.Tensor | None  # (K,) of suspected classes, which are left out

    def share(self, others: int) -> float | None:
        """The share of the other prototypes; None where it differs by row."""
        if self.tau_plus is not None:
            return self.tau_plus
        return None if isinstance(self.kappa, torch.Tensor) else self.kappa / others


def expected_false_negatives(
    op: str,
    classes: int,
    labels: torch.Tensor,
    kappa: float,
    tau_plus: float | None,
    suspects: Suspects | None,
    suspects_as: str,
) -> Expected:
    """What a batch of these labels is told of false negatives among this many prototypes."""
    if isinstance(kappa, torch.Tensor):
        raise TypeError(f"{op}: kappa must be a number (got a tensor)")
    if kappa and tau_plus is not None:
        raise ValueError(f"{op}: give kappa or tau_plus, not both (got {kappa} and {tau_plus})")
    others = max(classes - 1, 1)
    if tau_plus is None:
        kappa = _checks.number(op, "kappa", kappa, 0.0, rule="finite and >= 0")
        if kappa and kappa >= others:
            raise ValueError(
                f"{op}: kappa must be smaller than the number of other prototypes "
                f"(got {kappa:g} and {others})"
            )
    if suspects is None:
        return Expected(kappa, tau_plus, None)
    wanted = (classes,)
    _checks.shape(op, "suspects.groups", suspects.groups, wanted, "one per prototype")
    if suspects_as == "exclude":
        return Expected(kappa, tau_plus, suspects.groups)
    if kappa or tau_plus:
        raise ValueError(
            f'{op}: suspects_as="kappa" sets kappa itself '
            f"(got kappa={kappa}, tau_plus={tau_plus} too)"
        )
    counted = suspects.others[labels].double().clamp(max=others / 2)
    return Expected(counted, None, None)


def _prototype_term(
    batch: _Batch, memory: MemoryBank, debias: Expected, settings: dict[str, Any]
) -> tuple[torch.Tensor, ContrastiveStats | None]:
    exclude = None
    if debias.groups is not None:
        exclude = (debias.groups[batch.labels], debias.groups)
    term = debiased_contrastive_loss(
        batch.features,
        memory.prototypes,
        batch.labels,
        kappa=debias.kappa,
        tau_plus=debias.tau_plus,
        exclude=exclude,
        **settings,
    )
    return term if settings["return_stats"] else (term, None)


def _instance_term(
    batch: _Batch,
    memory: MemoryBank,
    of_class: bool,
    debias: Expected,
    settings: dict[str, Any],
) -> tuple[torch.Tensor, ContrastiveStats | None]:
    proto_of, labels = memory.proto_of, batch.labels
    row_groups, column_groups = labels, proto_of
    if debias.groups is not None:
        row_groups, column_groups = debias.groups[labels], debias.groups[proto_of]
    # The same share of the negatives as among the prototypes.
    others = max(len(memory.prototypes) - 1, 1)
    share = debias.share(others)
    kappa: float | torch.Tensor = 0.0
    if share is None:
        negatives = len(proto_of) - memory.class_sizes[labels]
        kappa = debias.kappa / others * negatives
    term = debiased_contrastive_loss(
        batch.features,
        memory.features,
        labels if of_class else batch.positives,
        proxy_labels=proto_of if of_class else None,
        positives="mean",
        exclude=None if of_class and debias.groups is None else (row_groups, column_groups),
        kappa=kappa,
        tau_plus=share,
        **settings,
    )
    return term if settings["return_stats"] else (term, None)


class DHCLLoss(nn.Module):
    """:func:`hybrid_contrastive_loss` as a module: settings once, then ``loss(features, memory,
    indices)``.

    ``suspects``, if any, are set once per epoch with :meth:`set_suspects`, and so are false
    negatives with :meth:`set_false_negatives`.
    """

    # A bank over several ranks has its own.
    loss_of: Callable[..., Any] = staticmethod(hybrid_contrastive_loss)
    suspects_of: Callable[..., Suspects] = staticmethod(suspected_false_negatives)

    def __init__(
        self,
        *,
        instance_weight: float = 0.25,
        prototype_weight: float = 1.0,
        instance_positives: str = "self",
        temperature: float = 0.05,
        kappa: float = 0.25,
        beta: float = 0.1,
        suspects_as: str = "exclude",
        hardness_gradient: str = "stop",
        precision: str = "exact",
    ) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {
            "instance_weight": instance_weight,
            "prototype_weight": prototype_weight,
            "instance_positives": instance_positives,
            "temperature": temperature,
            "kappa": kappa,
            "beta": beta,
            "suspects_as": suspects_as,
            "hardness_gradient": hardness_gradient,
            "precision": precision,
        }
        self._suspects: Suspects | None = None
        self._false_negatives: FalseNegatives | None = None

    def set_suspects(self, memory: Any, loose_labels: torch.Tensor | None) -> None:
        """Take the loose labels (N,) of this epoch's clustering, or None for no suspects."""
        self._suspects = None
        if loose_labels is not None:
            self._suspects = self.suspects_of(memory, loose_labels)

    @property
    def suspects(self) -> Suspects | None:
        """What :meth:`set_suspects` made of the labels."""
        return self._suspects

    def set_false_negatives(self, found: FalseNegatives | None) -> None:
        """Take what :func:`graph_false_negatives` made of this epoch's labels, or None."""
        self._false_negatives = found

    @property
    def false_negatives(self) -> FalseNegatives | None:
        """What :meth:`set_false_negatives` was given."""
        return self._false_negatives

    def forward(
        self,
        features: torch.Tensor,
        memory: Any,
        indices: torch.Tensor,
        *,
        cameras: torch.Tensor | None = None,
        return_stats: bool = False,
    ) -> Any:
        """Mean loss over the batch, or (loss, :class:`HybridStats`).

        ``cameras`` (N,) are those of the training images, for
        ``instance_positives="cross-camera"``.
        """
        found = self._false_negatives
        return self.loss_of(
            features,
            memory,
            indices,
            cameras=cameras,
            suspects=self._suspects,
            **({} if found is None else {"false_negatives": found}),
            return_stats=return_stats,
            **self.settings,
        )

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
