"""The ops of a memory bank: momentum update of its rows, and the mean of each class.

:class:`dhcl_ops.MemoryBank` keeps both together. Mathematics: method.md in docs, sections "Bank"
and "Prototypes". The update is that of SpCL (Ge et al., NeurIPS 2020): rows move towards new
features and are normalised again, one occurrence after another in batch order.

Two orders of summation are part of the contract, so that the reference below, the C++ code and the
CUDA kernels give the same bits in fp32. ``csrc/memory.h`` states them; :mod:`dhcl_ops._sums`, in
norms, and :func:`_segment_means` are their PyTorch form.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from dhcl_ops import _arrays, _checks, _sums
from dhcl_ops._ops import define, in_place

__all__ = ["least_similar", "momentum_update_", "prototypes"]

# As in csrc/memory.h.
_RUN_LENGTH = 256
_MEAN_EPS = 1e-12


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _norms(rows: torch.Tensor) -> torch.Tensor:
    """Euclidean norms (n, 1) of rows (n, d), in the fixed order of summation."""
    return _square_root(_sums.sum_elements(rows * rows).unsqueeze(1))


def _square_root(x: torch.Tensor) -> torch.Tensor:
    """Square roots rounded correctly, as ``std::sqrt`` and CUDA's ``sqrt.rn`` round them.

    torch's own on the CPU come from a vector library (MKL's VML) that is a unit in the last place
    off at times, in fp32 and in fp64, depending on the processor. NumPy takes the processor's
    square root, which IEEE 754 requires to be correctly rounded.
    """
    if x.device.type == "cpu":
        return torch.from_numpy(np.sqrt(x.numpy(force=True)))
    return x.sqrt()


# ---- momentum update ----------------------------------------------------------------------------


def _momentum_update_reference(
    bank: torch.Tensor,
    features: torch.Tensor,
    indices: torch.Tensor,
    momentum: float,
    eps: float,
    skipped: torch.Tensor | None,
) -> None:
    _checks.indices_in_range("momentum_update_", "indices", indices, len(bank))
    if indices.numel() == 0 or bank.shape[1] == 0:
        return
    # Occurrences of one row must follow each other, different rows need not: all first occurrences
    # are done at once, then all second ones, and so on.
    if features.untyped_storage().data_ptr() == bank.untyped_storage().data_ptr():
        # A view of the bank would change while it is read.
        features = features.clone()
    ordered, order = torch.sort(indices, stable=True)
    position = torch.arange(len(ordered), device=ordered.device)
    start = torch.searchsorted(ordered, ordered)
    occurrence = position - start
    for turn in range(int(occurrence.max()) + 1):
        chosen = order[occurrence == turn]
        rows = indices[chosen]
        old = bank[rows]
        mixed = momentum * old.float() + (1.0 - momentum) * features[chosen].float()
        norm = _norms(mixed)
        divisor = norm.clamp(min=eps)
        usable = norm.isfinite() & (divisor > 0)
        bank[rows] = torch.where(usable, (mixed / divisor).to(bank.dtype), old)
        if skipped is not None:
            skipped += (~usable).sum()


def _momentum_update_sample(device: torch.device) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    bank = nn.functional.normalize(torch.randn(6, 40, generator=generator)).to(device)
    features = torch.randn(5, 40, generator=generator).to(device)
    indices = torch.tensor([4, 1, 4, 0, 4], device=device)
    return bank, features, indices, 0.2, 0.0, torch.zeros(1, dtype=torch.int64, device=device)


_momentum_update: Any = define(
    "momentum_update_(Tensor(a!) bank, Tensor features, Tensor indices, float momentum, "
    "float eps, Tensor(b!)? skipped) -> ()",
    family="memory",
    reference=_momentum_update_reference,
    fake=lambda bank, features, indices, momentum, eps, skipped: None,
    sample=_momentum_update_sample,
)
_move_rows = in_place(_momentum_update)


def _is_plain(
    bank: torch.Tensor, features: torch.Tensor, indices: torch.Tensor, skipped: torch.Tensor | None
) -> bool:
    """A glance that knows what nearly every update is given; the rest is checked word by word."""
    if not type(bank) is type(features) is type(indices) is torch.Tensor:
        return False
    if not bank.layout is features.layout is indices.layout is torch.strided:
        return False
    device = bank.device
    return (
        bank.dtype in _checks.FLOATS
        and features.dtype in _checks.FLOATS
        and indices.dtype is torch.int64
        and bank.dim() == 2
        and indices.dim() == 1
        and features.shape == (indices.shape[0], bank.shape[1])
        and features.device == device
        and indices.device == device
        and bank.is_contiguous()
        and not bank.requires_grad
        and (
            skipped is None
            or (
                type(skipped) is torch.Tensor
                and skipped.layout is torch.strided
                and skipped.dtype is torch.int64
                and skipped.shape == (1,)
                and skipped.device == device
            )
        )
    )


def _check_update(
    op: str,
    bank: torch.Tensor,
    features: torch.Tensor,
    indices: torch.Tensor,
    skipped: torch.Tensor | None,
) -> None:
    for name, value in (("bank", bank), ("features", features), ("indices", indices)):
        _checks.tensor(op, name, value)
    _checks.rank(op, "bank", bank, 2)
    _checks.dtype(op, "bank", bank, _checks.FLOATS)
    _checks.dtype(op, "features", features, _checks.FLOATS)
    _checks.dtype(op, "indices", indices, (torch.int64,))
    _checks.rank(op, "indices", indices, 1)
    wanted = (indices.shape[0], bank.shape[1])
    _checks.shape(op, "features", features, wanted, "one row of the bank's width per index")
    _checks.same_device(op, bank=bank, features=features, indices=indices)
    if not bank.is_contiguous():
        raise ValueError(
            f"{op}: bank is changed in place and must be contiguous (got strides {bank.stride()})"
        )
    if bank.requires_grad:
        raise ValueError(f"{op}: bank is changed in place and must not require a gradient")
    if skipped is not None:
        _checks.tensor(op, "skipped", skipped)
        _checks.dtype(op, "skipped", skipped, (torch.int64,))
        _checks.shape(op, "skipped", skipped, (1,), "one counter")
        _checks.same_device(op, bank=bank, skipped=skipped)


@_arrays.takes_arrays("bank", "features", "indices", "skipped", mutates=("bank", "skipped"))
def momentum_update_(
    bank: torch.Tensor,
    features: torch.Tensor,
    indices: torch.Tensor,
    momentum: float,
    *,
    eps: float = 0.0,
    skipped: torch.Tensor | None = None,
) -> torch.Tensor:
    """Move rows of the bank towards new features, in place, and normalise them.

    For each batch position in order, ``v = momentum * bank[i] + (1 - momentum) * f`` and
    ``bank[i] = v / max(|v|, eps)``: the update of SpCL's hybrid memory (Ge et al. 2020), where a
    row that occurs several times is updated several times. Arithmetic is fp32 whatever the dtypes;
    a 16-bit bank is rounded after each occurrence, so splitting a batch in two changes nothing.

    An occurrence whose ``v`` has a norm of zero (with ``eps=0``) or a norm that is not finite,
    such as one with a NaN feature, leaves its row as it is; pass ``skipped`` to count them.

    Args:
        bank: (N, d) float32, float16 or bfloat16, contiguous. Changed in place. A NumPy or CuPy
            array is changed in place too.
        features: (B, d) new features, any of these dtypes; no gradient flows through.
        indices: (B,) int64, the bank row of each feature, in [0, N).
        momentum: share of the old row, in [0, 1]. SpCL uses 0.2.
        eps: lower bound of the divisor, >= 0.
        skipped: (1,) int64, increased by the number of occurrences left out.

    Returns:
        The bank.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape, device or range.
        IndexError: an index outside [0, N), on the CPU, before anything is changed. On CUDA nothing
            waits for the device, so the kernel reports it as a device-side assert, like PyTorch's
            own indexing.
    """
    op = "momentum_update_"
    compiling = torch.compiler.is_compiling()
    if compiling or not _is_plain(bank, features, indices, skipped):
        _check_update(op, bank, features, indices, skipped)
    if not (type(momentum) is float and (momentum == 0.0 or 1e-30 <= momentum <= 1.0)):
        momentum = _checks.number(op, "momentum", momentum, 0.0, 1.0, rule="in [0, 1]")
    if not (type(eps) is float and (eps == 0.0 or 1e-30 <= eps <= 1e30)):
        eps = _checks.number(op, "eps", eps, 0.0, rule="finite and >= 0")
    if compiling:
        _momentum_update(bank, features.detach(), indices, momentum, eps, skipped)
        return bank
    _checks.indices_in_range(op, "indices", indices, bank.shape[0])
    _move_rows(bank, features, indices, momentum, eps, skipped)
    return bank


def least_similar(
    features: torch.Tensor, indices: torch.Tensor, bank: torch.Tensor
) -> torch.Tensor:
    """Which features are the least similar to their bank row, among those with the same row.

    With these alone, an update of the bank is the "hard" one of Cluster Contrast (Dai et al., ACCV
    2022). Nothing waits for the device.

    Args:
        features: (B, d) float32, float16, bfloat16 or float64.
        indices: (B,) int64, the bank row of each feature, in [0, N).
        bank: (N, d), any of these dtypes.

    Returns:
        (B,) bool, true once per distinct index; of equal similarities the first.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape or device; on the CPU
            also a similarity that is not finite.
        IndexError: an index outside [0, N), on the CPU; on CUDA a device-side assert instead.
    """
    op = "least_similar"
    for name, value in (("features", features), ("bank", bank)):
        _checks.tensor(op, name, value)
        _checks.rank(op, name, value, 2)
        _checks.dtype(op, name, value, _checks.ALL_FLOATS)
    wanted = (features.shape[0], bank.shape[1])
    _checks.shape(op, "features", features, wanted, "rows of the bank's width")
    _checks.integers(op, "indices", indices, features.shape[0], "one per feature")
    _checks.same_device(op, features=features, indices=indices, bank=bank)
    looks = not torch.compiler.is_compiling() and features.device.type == "cpu"
    if looks:
        _checks.indices_in_range(op, "indices", indices, bank.shape[0])
    similarity = (features * bank[indices]).sum(1)
    if looks and not bool(similarity.isfinite().all()):
        row = int((~similarity.isfinite()).nonzero()[0])
        raise ValueError(
            f"{op}: similarities must be finite (got {float(similarity[row])} at batch position "
            f"{row}, with row {int(indices[row])} of the bank)"
        )
    order = similarity.argsort(stable=True)
    order = order[indices[order].argsort(stable=True)]
    first = indices[order].diff(prepend=indices.new_full((1,), -1)) != 0
    return torch.empty_like(first).scatter_(0, order, first)


# ---- class means --------------------------------------------------------------------------------


def _class_csr_by_sorting(
    labels: torch.Tensor, num_classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    # A radix sort takes as many passes as keys have digits.
    narrow = torch.int16 if num_classes < 2**15 else torch.int32
    dtype = narrow if num_classes < 2**31 else torch.int64
    inside = (labels >= 0) & (labels < num_classes)
    ordered, members = torch.sort(torch.where(inside, labels, num_classes).to(dtype), stable=True)
    classes = torch.arange(num_classes + 1, dtype=dtype, device=labels.device)
    return members, torch.searchsorted(ordered, classes)


class_csr = define(
    "class_csr(Tensor labels, int num_classes) -> (Tensor, Tensor)",
    family="memory",
    reference=_class_csr_by_sorting,
    fake=lambda labels, num_classes: (
        torch.empty_like(labels),
        labels.new_empty(num_classes + 1),
    ),
    sample=lambda device: (torch.tensor([1, -1, 0, 1, 3, 1], device=device), 4),
    cuda_library="torch.sort",
)


def _segment_means(
    rows: torch.Tensor,
    members: torch.Tensor,
    offsets: torch.Tensor,
    classes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Means (L, d) of the listed classes' rows, in the fixed order of summation."""
    if classes is None:
        start, end = offsets[:-1], offsets[1:]
    else:
        start, end = offsets[classes], offsets[classes + 1]
    counts = end - start
    dtype = _accumulator(rows.dtype)
    total = torch.zeros(len(counts), rows.shape[1], dtype=dtype, device=rows.device)
    longest = int(counts.max()) if len(counts) else 0
    for run in range(0, longest, _RUN_LENGTH):
        part = torch.zeros_like(total)
        for rank in range(run, min(run + _RUN_LENGTH, longest)):
            live = (counts > rank).nonzero().squeeze(1)
            part[live] = part[live] + rows[members[start[live] + rank]].to(dtype)
        total = total + part
    means = total / counts.clamp(min=1).to(dtype).unsqueeze(1)
    return means.to(rows.dtype)


def _normalized(means: torch.Tensor) -> torch.Tensor:
    wide = means.to(_accumulator(means.dtype))
    return (wide / _norms(wide).clamp(min=_MEAN_EPS)).to(means.dtype)


def _update_segment_mean_reference(
    means: torch.Tensor,
    rows: torch.Tensor,
    members: torch.Tensor,
    offsets: torch.Tensor,
    classes: torch.Tensor | None,
    normalize: bool,
    class_of: torch.Tensor | None = None,
) -> None:
    op = "update_segment_mean_"
    if classes is not None and class_of is not None:
        _checks.indices_in_range(op, "rows", classes, len(class_of))
        classes = class_of[classes]
    if classes is not None:
        _checks.indices_in_range(op, "classes", classes, len(means))
    if means.numel() == 0 or (classes is not None and classes.numel() == 0):
        return
    touched = None if classes is None else classes.unique()
    fresh = _segment_means(rows, members, offsets, touched)
    means[slice(None) if touched is None else touched] = _normalized(fresh) if normalize else fresh


def _segment_mean_backward_reference(
    grad: torch.Tensor, members: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    counts = offsets.diff().clamp(min=1).to(_accumulator(grad.dtype)).unsqueeze(1)
    shares = (grad.to(counts.dtype) / counts).to(grad.dtype)
    # Positions beyond the last class belong to none; they read one more row, of zeros.
    shares = torch.cat([shares, shares.new_zeros(1, shares.shape[1])])
    position = torch.arange(len(members), device=members.device)
    class_of_position = torch.searchsorted(offsets[1:].contiguous(), position, right=True)
    out = grad.new_empty(len(members), grad.shape[1])
    out[members] = shares[class_of_position]
    return out


def _segments_sample(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 40, generator=generator).to(device)
    members, offsets = _class_csr_by_sorting(torch.tensor([1, -1, 0, 1, 3, 1], device=device), 4)
    return rows, members, offsets


def _save_segments(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, members, offsets = inputs
    ctx.save_for_backward(members, offsets)


_segment_mean: Any = define(
    "segment_mean(Tensor rows, Tensor members, Tensor offsets) -> Tensor",
    family="memory",
    reference=_segment_means,
    fake=lambda rows, members, offsets: rows.new_empty(offsets.shape[0] - 1, rows.shape[1]),
    sample=_segments_sample,
    setup_context=_save_segments,
    backward=lambda ctx, grad: (_segment_mean_backward(grad, *ctx.saved_tensors), None, None),
)

# Linear in its first argument, so its own backward is the mean again and double backward is right.
_segment_mean_backward: Any = define(
    "segment_mean_backward(Tensor grad, Tensor members, Tensor offsets) -> Tensor",
    family="memory",
    reference=_segment_mean_backward_reference,
    fake=lambda grad, members, offsets: grad.new_empty(members.shape[0], grad.shape[1]),
    sample=lambda device: (
        _segments_sample(device)[0][:4],
        *_segments_sample(device)[1:],
    ),
    setup_context=_save_segments,
    backward=lambda ctx, grad: (_segment_mean(grad, *ctx.saved_tensors), None, None),
)

_update_segment_mean: Any = define(
    # classes: those to refresh, all where there is no list; with class_of, rows of these classes.
    "update_segment_mean_(Tensor(a!) means, Tensor rows, Tensor members, Tensor offsets, "
    "Tensor? classes, bool normalize, Tensor? class_of=None) -> ()",
    family="memory",
    reference=_update_segment_mean_reference,
    fake=lambda means, rows, members, offsets, classes, normalize, class_of=None: None,
    sample=lambda device: (
        torch.zeros(4, 40, device=device),
        *_segments_sample(device),
        torch.tensor([3, 1, 1, 2], device=device),
        True,
    ),
)
update_segment_mean_ = in_place(_update_segment_mean)


def _count_classes(op: str, labels: torch.Tensor, num_classes: int | None) -> int:
    """Check labels against [-1, num_classes) and return the number of classes."""
    if num_classes is None:
        if torch.compiler.is_compiling():
            raise ValueError(f"{op}: pass num_classes under torch.compile (got None)")
        num_classes = int(labels.max()) + 1 if labels.numel() else 0
        num_classes = max(num_classes, 0)
        if labels.numel() and num_classes > 2**40:
            raise ValueError(f"{op}: labels must be class numbers (got {num_classes - 1})")
    elif isinstance(num_classes, bool) or not isinstance(num_classes, (int, torch.SymInt)):
        raise TypeError(f"{op}: num_classes must be an integer (got {type(num_classes).__name__})")
    elif num_classes < 0:
        raise ValueError(f"{op}: num_classes must be >= 0 (got {num_classes})")
    elif isinstance(num_classes, int):
        _checks.integer(op, "num_classes", num_classes, 0, 2**40)
    if torch.compiler.is_compiling() or labels.numel() == 0:
        return num_classes
    wrong = (labels < -1) | (labels >= num_classes)
    if labels.is_cuda:
        torch._assert_async(~wrong.any(), f"{op}: labels must be in [-1, {num_classes})")
    elif bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"{op}: labels must be in [-1, {num_classes}) (got {int(labels[row])} at row {row})"
        )
    return num_classes


@_arrays.takes_arrays("bank", "labels")
def prototypes(
    bank: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int | None = None,
    *,
    normalize: bool = False,
) -> torch.Tensor:
    """Mean of the bank rows of each class.

    ``out[k]`` is the mean of ``bank[i]`` over all ``i`` with ``labels[i] == k``, as in SpCL (Ge et
    al. 2020), where it is not normalised again. Sums are fp32 (fp64 for a float64 bank) in a fixed
    order: the same bits every time, for any number of threads, on the CPU and on CUDA.

    Args:
        bank: (N, d) float32, float16, bfloat16 or float64.
        labels: (N,) int64 class of each row in [0, K), or -1 for rows that belong to none.
        num_classes: K. By default the largest label plus one, which on CUDA waits for the device;
            under ``torch.compile`` it must be given.
        normalize: divide each mean by its norm (a mean of zeros stays zero).

    A row with a value that is not finite makes its class's mean not finite, and no other.

    Returns:
        (K, d) in the bank's dtype; zeros for a class without rows. Differentiable, also twice, with
        respect to the bank.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape or device; a label
            outside [-1, K). On CUDA with ``num_classes`` given, the latter is a device-side assert.
    """
    op = "prototypes"
    for name, value in (("bank", bank), ("labels", labels)):
        _checks.tensor(op, name, value)
    _checks.rank(op, "bank", bank, 2)
    _checks.dtype(op, "bank", bank, _checks.ALL_FLOATS)
    _checks.dtype(op, "labels", labels, (torch.int64,))
    _checks.shape(op, "labels", labels, (bank.shape[0],), "one per row of the bank")
    _checks.same_device(op, bank=bank, labels=labels)
    num_classes = _count_classes(op, labels, num_classes)
    if not torch.compiler.is_compiling() and num_classes > len(labels):
        size = (num_classes, bank.shape[1] + 1)  # a row and an offset for each
        instead = "number the classes without gaps"
        _checks.fits_in_memory(op, size, bank.device, instead, max(bank.element_size(), 4))
    members, offsets = class_csr(labels, num_classes)
    means: torch.Tensor = _segment_mean(bank, members, offsets)
    if not normalize:
        return means
    wide = means.to(_accumulator(means.dtype))
    # Squares of large numbers overflow; a power of two changes the result in no bit.
    if wide.dtype == torch.float32 and wide.numel():
        large = wide.detach().abs().amax(1, keepdim=True) > 2.0**60
        wide = torch.where(large, wide * 2.0**-70, wide)
    return nn.functional.normalize(wide, dim=1, eps=_MEAN_EPS).to(means.dtype)
