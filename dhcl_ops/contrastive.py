"""The debiased, hard-negative-weighted contrastive loss.

Mathematics: method.md in docs, section "Loss". It is InfoNCE (van den Oord et al. 2018) with the
debiased negatives of Chuang et al. (NeurIPS 2020) and the hard-negative weights of Robinson et al.
(ICLR 2021), in log space. How it is streamed over the proxies is in
:mod:`dhcl_ops._contrastive_stream`.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch

from dhcl_ops import _checks
from dhcl_ops import _contrastive_kernels as kernels
from dhcl_ops import _contrastive_stream as stream
from dhcl_ops._contrastive_kernels import Roles, Settings
from dhcl_ops._contrastive_listed import Listed

__all__ = ["ContrastiveStats", "NegativeWeights", "debiased_contrastive_loss"]

_AGGREGATIONS = {"each": kernels.EACH, "sum": kernels.SUM, "mean": kernels.MEAN}


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


class NegativeWeights(NamedTuple):
    """Negatives that count by a weight in [0, 1], others counting once; lists in CSR form.

    Row i of a batch has list ``rows[i]``: entries ``offsets[l]`` up to ``offsets[l + 1]``. An entry
    is a proxy or, with ``members``, a class of proxies, which all get its weight: class k has
    ``members[member_offsets[k]]`` up to ``members[member_offsets[k + 1]]``. A list names a proxy
    once at most.
    """

    rows: torch.Tensor  # (B,) int64
    offsets: torch.Tensor  # (R + 1,) int64
    entries: torch.Tensor  # (E,) int64
    logs: torch.Tensor  # (E,) float32, logarithms of the weights; -inf is no negative at all
    members: torch.Tensor | None = None  # (N,) int64
    member_offsets: torch.Tensor | None = None  # (K + 1,) int64


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
    norms = torch.linalg.vector_norm(features.detach().float(), dim=1)
    shortest, longest = (bound.item() for bound in torch.aminmax(norms))
    if not (math.isfinite(shortest) and math.isfinite(longest)):
        row = int((~norms.isfinite()).nonzero()[0])
        if bool(features[row].isfinite().all()):
            raise ValueError(
                f"{op}: norms of features must be finite in float32 (got one that overflows at row "
                f"{row})"
            )
        raise ValueError(f"{op}: features must be finite (got one that is not at row {row})")
    worst = max(shortest, longest, key=lambda norm: abs(norm - 1.0))
    if abs(worst - 1.0) > 1e-2 and not _norm_seen:
        _norm_seen = True
        warnings.warn(
            f"{op}: features are meant to have norm 1 (got a norm of {worst:.4g}); the temperature "
            "and the floor of the debiased estimate assume it",
            stacklevel=4,
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
    weights: NegativeWeights | None = None,
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

    fp32 products are fp32 whatever the process allows for others (TF32). On CUDA large ones, from
    128 rows and 2^30 multiplications, are made of three fp16 products (two or one where an operand
    has 16 bits) of operands split into high and low pieces: a similarity f.c is then off by at most
    2^-21 |f| |c| beside the rounding of its fp32 sum; and the gradient's weighted sum of proxies by
    2^-21 of its terms and K 2^-39 of their largest element. Of a chunk, 6 bytes for each element
    of a proxy go to the pieces; a gradient takes three more (B, d) buffers. A second pass, for
    gradients of proxies, several positives and ``"through"``, splits its products too.

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
        weights: negatives that count by a weight w: log w is added to their logits, and they have
            no floor to be clamped at. In place of kappa and tau_plus. With ``beta = 0`` the mass is
            ``sum w_j e^(s_j)``. A row's positives keep their logits.
        hardness_gradient: ``"stop"`` treats the weights e^(beta s) as constants; ``"through"``
            differentiates them, as the authors' code does.
        reduction: ``"mean"`` (0 for B = 0), ``"sum"`` or ``"none"``.
        return_stats: also return :class:`ContrastiveStats`.
        precision: ``"exact"``, or ``"fast"``, which rounds fp32 operands on CUDA to fp16, scaled by
            a power of two: logits are then off by up to about 1e-3 at temperature 0.05. Elsewhere
            it is "exact".
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
    given = check_arguments(
        op, features, proxies, labels, temperature=temperature, kappa=kappa, tau_plus=tau_plus,
        beta=beta, proxy_labels=proxy_labels, positives=positives, exclude=exclude,
        hardness_gradient=hardness_gradient, reduction=reduction, precision=precision,
        chunk_size=chunk_size,
    )  # fmt: skip
    listed = check_weights(op, weights, features, kappa, tau_plus)
    differentiated = features.requires_grad and torch.is_grad_enabled()
    streaming = stream.Streaming(
        differentiated and given.one_pass, precision == "fast", given.columns
    )
    results = stream.loss_of(
        features,
        proxies,
        given.roles,
        given.settings,
        streaming,
        loss_dtype(features, proxies),
        divisor_of(reduction, len(features)),
        listed,
    )
    loss = results.losses
    return (loss, stats_of(results, given.settings.aggregation)) if return_stats else loss


def loss_dtype(features: torch.Tensor, proxies: torch.Tensor) -> torch.dtype:
    """What the loss is given in: float32, or float64 if one of the two is."""
    return torch.float64 if torch.float64 in (features.dtype, proxies.dtype) else torch.float32


def divisor_of(reduction: str, batch: int) -> int | None:
    """What the sum of the losses is divided by; None leaves them as they are."""
    return {"mean": max(batch, 1), "sum": 1, "none": None}[reduction]


class Arguments(NamedTuple):
    """What a call of the loss was given, checked."""

    roles: Roles
    settings: Settings
    columns: int

    @property
    def one_pass(self) -> bool:
        """Whether the gradient with respect to the features comes along with the loss."""
        return self.roles.proxy_labels is None and not self.settings.through


def check_arguments(
    op: str,
    features: torch.Tensor,
    proxies: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float,
    kappa: float | torch.Tensor,
    tau_plus: float | None,
    beta: float,
    proxy_labels: torch.Tensor | None,
    positives: str,
    exclude: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None,
    hardness_gradient: str,
    reduction: str,
    precision: str,
    chunk_size: int | None,
    whole: bool = True,
) -> Arguments:
    """Check the arguments of :func:`debiased_contrastive_loss`.

    With ``whole=False`` the proxies are some of more, so that their number bounds nothing.
    """
    _check_rows(op, features, proxies, 1 if whole else 0)
    batch, count = features.shape[0], proxies.shape[0]
    roles = _roles(op, batch, count, labels, proxy_labels, exclude)
    temperature = _checks.number(op, "temperature", temperature, 0.0, rule="finite and > 0")
    if temperature == 0.0:
        raise ValueError(f"{op}: temperature must be finite and > 0 (got 0.0)")
    beta = _checks.number(op, "beta", beta, 0.0, rule="finite and >= 0")
    single = proxy_labels is None
    negatives = count - 1 if single and whole else None
    expected = _false_negatives(op, features, kappa, tau_plus, negatives)
    _same_device(op, features, proxies, roles, kappa)
    _checks.one_of(op, "positives", positives, _AGGREGATIONS)
    _checks.one_of(op, "hardness_gradient", hardness_gradient, ("stop", "through"))
    _checks.one_of(op, "reduction", reduction, ("mean", "sum", "none"))
    _checks.one_of(op, "precision", precision, ("exact", "fast"))
    columns = 0 if chunk_size is None else _checks.integer(op, "chunk_size", chunk_size, 1)
    if not torch.compiler.is_compiling():
        if whole:
            look_at_columns(op, roles, count)
        _look_at_kappa(op, kappa)
        _look_at_norms(op, features)
    aggregation = kernels.SUM if single else _AGGREGATIONS[positives]
    through = hardness_gradient == "through" and beta > 0
    settings = Settings(expected, tau_plus is not None, aggregation, temperature, beta, through)
    return Arguments(roles, settings, columns)


def _check_rows(op: str, features: torch.Tensor, proxies: torch.Tensor, fewest: int) -> None:
    for name, value in (("features", features), ("proxies", proxies)):
        _checks.tensor(op, name, value)
        _checks.rank(op, name, value, 2)
        _checks.dtype(op, name, value, _checks.ALL_FLOATS)
    if proxies.shape[1] != features.shape[1]:
        raise ValueError(
            f"{op}: features and proxies must have one width "
            f"(got {features.shape[1]} and {proxies.shape[1]})"
        )
    if proxies.shape[0] < fewest:
        raise ValueError(f"{op}: at least one proxy is needed (got none)")


def _roles(
    op: str,
    batch: int,
    count: int,
    labels: torch.Tensor,
    proxy_labels: torch.Tensor | None,
    exclude: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None,
) -> Roles:
    """The checked labels and exclusions of a batch with this many proxies."""
    labels = _checks.integers(op, "labels", labels, batch, "one per feature")
    if proxy_labels is not None:
        proxy_labels = _checks.integers(op, "proxy_labels", proxy_labels, count, "one per proxy")
    row_groups = column_groups = excluded = None
    if isinstance(exclude, tuple):
        if len(exclude) != 2:
            raise ValueError(f"{op}: exclude must be a pair of groups (got {len(exclude)} tensors)")
        row_groups = _checks.integers(op, "exclude[0]", exclude[0], batch, "one group per feature")
        column_groups = _checks.integers(op, "exclude[1]", exclude[1], count, "one group per proxy")
    elif exclude is not None:
        _checks.tensor(op, "exclude", exclude)
        _checks.dtype(op, "exclude", exclude, (torch.int64,))
        _checks.rank(op, "exclude", exclude, 2)
        wanted = (batch, exclude.shape[1])
        _checks.shape(op, "exclude", exclude, wanted, "a list of columns per feature")
        excluded = exclude
    return Roles(labels, proxy_labels, row_groups, column_groups, excluded)


def _false_negatives(
    op: str,
    features: torch.Tensor,
    kappa: float | torch.Tensor,
    tau_plus: float | None,
    negatives: int | None,
) -> torch.Tensor:
    """kappa of each row (B,) float64 or, where it is given, tau_plus.

    ``negatives`` is their number where it is known beforehand.
    """
    if isinstance(kappa, torch.Tensor):
        _checks.tensor(op, "kappa", kappa)
        _checks.dtype(op, "kappa", kappa, _checks.ALL_FLOATS)
        _checks.shape(op, "kappa", kappa, (len(features),), "one per feature")
        if tau_plus is not None:
            raise ValueError(
                f"{op}: give kappa or tau_plus, not both (got a tensor and {tau_plus})"
            )
        return kappa.detach().double().contiguous()
    share = _checks.number(op, "kappa", kappa, 0.0, rule="finite and >= 0")
    if negatives and share >= negatives:
        raise ValueError(
            f"{op}: kappa must be smaller than the number of negatives "
            f"(got {share:g} and {negatives})"
        )
    if tau_plus is not None:
        if share:
            raise ValueError(
                f"{op}: give kappa or tau_plus, not both (got {share:g} and {tau_plus})"
            )
        share = _checks.number(op, "tau_plus", tau_plus, 0.0, 1.0, rule="in [0, 1)")
        if share == 1.0:
            raise ValueError(f"{op}: tau_plus must be in [0, 1) (got 1.0)")
    return torch.full((len(features),), share, dtype=torch.float64, device=features.device)


def check_weights(
    op: str,
    weights: NegativeWeights | None,
    features: torch.Tensor,
    kappa: float | torch.Tensor,
    tau_plus: float | None,
) -> Listed:
    """The checked lists of weights; what the entries are, the kernels look at."""
    if weights is None:
        return Listed()
    if isinstance(kappa, torch.Tensor) or kappa or tau_plus:
        raise ValueError(f"{op}: weights stand in place of kappa and tau_plus (got both)")
    if not isinstance(weights, NegativeWeights):
        raise TypeError(f"{op}: weights must be NegativeWeights (got {type(weights).__name__})")
    _checks.integers(op, "weights.rows", weights.rows, len(features), "a list per feature")
    there = {name: t for name, t in weights._asdict().items() if t is not None}
    for name, value in there.items():
        _checks.tensor(op, f"weights.{name}", value)
        _checks.rank(op, f"weights.{name}", value, 1)
        kind = torch.float32 if name == "logs" else torch.int64
        _checks.dtype(op, f"weights.{name}", value, (kind,))
    wanted = tuple(weights.entries.shape)
    _checks.shape(op, "weights.logs", weights.logs, wanted, "one per entry")
    if (weights.members is None) != (weights.member_offsets is None):
        raise ValueError(f"{op}: weights.members and weights.member_offsets go together (got one)")
    named = {f"weights.{name}": value for name, value in there.items()}
    _checks.same_device(op, features=features, **named)
    return Listed(*weights)


def _same_device(
    op: str,
    features: torch.Tensor,
    proxies: torch.Tensor,
    roles: Roles,
    kappa: float | torch.Tensor,
) -> None:
    names = ("labels", "proxy_labels", "exclude[0]", "exclude[1]", "exclude")
    tensors = {"features": features, "proxies": proxies}
    tensors |= {name: t for name, t in zip(names, roles, strict=True) if t is not None}
    if isinstance(kappa, torch.Tensor):
        tensors["kappa"] = kappa
    _checks.same_device(op, **tensors)


def look_at_columns(op: str, roles: Roles, count: int) -> None:
    """Refuse on the CPU columns out of the range of this many proxies."""
    if roles.proxy_labels is None:
        _checks.indices_in_range(op, "labels", roles.labels, count)
    if roles.excluded is not None:
        _checks.indices_in_range(op, "exclude", roles.excluded, count, -1)


def _look_at_kappa(op: str, kappa: float | torch.Tensor) -> None:
    """Refuse on the CPU a kappa that is none."""
    if isinstance(kappa, torch.Tensor) and not kappa.is_cuda:
        wrong = ~((kappa >= 0) & kappa.isfinite())
        if bool(wrong.any()):
            got = float(kappa[wrong][0])
            rule = ">= 0" if got < 0 else "finite"
            where = int(wrong.nonzero()[0])
            raise ValueError(f"{op}: kappa must be {rule} (got {got:g} at batch position {where})")


def stats_of(results: stream.Results, aggregation: int) -> ContrastiveStats:
    """What the rows of these results saw."""
    state, counts, rows = results.state.detach(), results.counts, results.rows.detach()
    clamped = rows[:, kernels.CLAMPED]
    positive = state[:, kernels.POSITIVE_MAX] + state[:, kernels.POSITIVE_MASS].log()
    if aggregation != kernels.SUM:
        positive = positive - counts[:, kernels.POSITIVES].double().log()
    squares = state[:, kernels.SQUARES]
    effective = torch.where(squares > 0, state[:, kernels.MASS] ** 2 / squares, 0.0)
    return ContrastiveStats(
        clamped.sum() / max(len(clamped), 1),
        clamped,
        positive,
        state[:, kernels.MAX],
        counts[:, kernels.HARDEST],
        effective,
        counts[:, kernels.NEGATIVES],
    )
