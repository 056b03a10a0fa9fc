"""The memory bank as a module: one feature per training image, and a prototype per class.

Mathematics: method.md in docs, sections "Bank" and "Prototypes"; the ops are those of
:mod:`dhcl_ops.memory`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dhcl_ops import _arrays, _checks
from dhcl_ops.memory import class_csr, momentum_update_, update_segment_mean_
from dhcl_ops.positives import hardest_positives

__all__ = ["MemoryBank"]


def check_storage(
    op: str,
    num_samples: int,
    num_features: int,
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> None:
    """Raise unless a bank of this size and dtype can be held on the device."""
    for name, size in (("num_samples", num_samples), ("num_features", num_features)):
        _checks.integer(op, name, size, 0, 2**40)
    if dtype not in _checks.FLOATS:
        raise TypeError(f"{op}: dtype must be float32, float16 or bfloat16 (got {dtype})")
    place = torch.get_default_device() if device is None else torch.device(device)
    if place.type != "meta":
        shape, instead = (num_samples, num_features), "float16 takes half of float32"
        _checks.fits_in_memory(op, shape, place, instead, dtype.itemsize)


def unit_features(op: str, features: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Features (N, d) divided by their norms, as rows of a bank of this dtype.

    Raises ``ValueError`` naming the first row that is zero or not finite.
    """
    fresh = features.new_zeros(features.shape, dtype=dtype)
    left_out = torch.zeros(1, dtype=torch.int64, device=fresh.device)
    every_row = torch.arange(len(fresh), device=fresh.device)
    single = features.to(torch.float32) if features.dtype == torch.float64 else features
    momentum_update_(fresh, single, every_row, 0.0, skipped=left_out)
    if int(left_out):
        # The update leaves such rows alone, so they are the ones that are still zero.
        row = int((fresh == 0).all(dim=1).nonzero()[0])
        raise ValueError(
            f"{op}: every feature must be finite and not zero "
            f"(got {int(left_out)} that are not, the first at row {row})"
        )
    return fresh


class MemoryBank(nn.Module):
    """One feature per training image, and one prototype per class, kept current together.

    Classes are the clusters ``0 .. C-1`` of :meth:`set_labels`, followed by one class for each
    un-clustered image (label -1) in ascending image index. A prototype is the mean of its members'
    rows; after every :meth:`update_` the prototypes of the touched classes are computed again from
    their members, so ``bank.prototypes`` always equals ``prototypes(bank.features,
    bank.proto_of)`` to the bit and never drifts.

    All of it is in ``state_dict``: a restored bank goes on bit for bit. Nothing here takes part in
    autograd, and :meth:`update_` does not wait for the device.

    Args:
        num_samples: N, the number of training images.
        num_features: d, the width of a feature.
        momentum: share of the old row in an update, in [0, 1].
        eps: see :func:`momentum_update_`.
        normalize_prototypes: divide prototypes by their norm. SpCL does not.
        dtype: float32, float16 or bfloat16.
        device: where the bank lives.

    Attributes:
        features: (N, d) the instance bank.
        labels: (N,) int64 as last given to :meth:`set_labels`.
        skipped: (1,) int64, how many updates were left out because their feature was not finite.
    """

    features: torch.Tensor
    labels: torch.Tensor
    skipped: torch.Tensor
    _prototypes: torch.Tensor
    _proto_of: torch.Tensor
    _members: torch.Tensor
    _offsets: torch.Tensor

    def __init__(
        self,
        num_samples: int,
        num_features: int,
        *,
        momentum: float = 0.2,
        eps: float = 0.0,
        normalize_prototypes: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        op = "MemoryBank"
        for name, size in (("num_samples", num_samples), ("num_features", num_features)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{op}: {name} must be a positive integer (got {size!r})")
        check_storage(op, num_samples, num_features, dtype, device)
        self.momentum = _checks.number(op, "momentum", momentum, 0.0, 1.0, rule="in [0, 1]")
        self.eps = _checks.number(op, "eps", eps, 0.0, rule="finite and >= 0")
        self.normalize_prototypes = bool(normalize_prototypes)

        def integers(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        features = torch.zeros(num_samples, num_features, dtype=dtype, device=device)
        self.register_buffer("features", features)
        self.register_buffer("labels", integers(num_samples) - 1)
        self.register_buffer("skipped", integers(1))
        # Empty until set_labels; their lengths are part of the state.
        self.register_buffer("_prototypes", features[:0].clone())
        self.register_buffer("_proto_of", integers(0))
        self.register_buffer("_members", integers(0), persistent=False)
        self.register_buffer("_offsets", integers(1), persistent=False)
        self._num_clusters = 0

    @property
    def num_clusters(self) -> int:
        """C, the number of clusters; prototypes from C on are single images."""
        return self._num_clusters

    @property
    def prototypes(self) -> torch.Tensor:
        """(K, d) one row per cluster, then one per un-clustered image."""
        self._require_labels("prototypes")
        return self._prototypes

    @property
    def proto_of(self) -> torch.Tensor:
        """(N,) int64, the prototype each image belongs to."""
        self._require_labels("proto_of")
        return self._proto_of

    @property
    def class_sizes(self) -> torch.Tensor:
        """(K,) int64, how many images each prototype is the mean of."""
        self._require_labels("class_sizes")
        return self._offsets.diff()

    @property
    def class_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Members (N,) int64, the rows by class and ascending in each, and offsets (K + 1,) int64.

        Class k has the members from ``offsets[k]`` up to ``offsets[k + 1]``.
        """
        self._require_labels("class_rows")
        return self._members, self._offsets

    def _require_labels(self, what: str) -> None:
        if self._proto_of.shape[0] == 0:
            raise RuntimeError(f"MemoryBank.{what}: call set_labels(labels) first")

    @torch.no_grad()
    def init(self, features: torch.Tensor) -> None:
        """Fill the bank with these features (N, d), each divided by its norm.

        Raises ``ValueError`` naming the first row that is zero or not finite, and then changes
        nothing.
        """
        op = "MemoryBank.init"
        features = self._as_tensor(op, "features", features)
        wanted = tuple(self.features.shape)
        _checks.shape(op, "features", features, wanted, "one row per training image")
        _checks.dtype(op, "features", features, _checks.ALL_FLOATS)
        self.features.copy_(unit_features(op, features, self.features.dtype))
        if self._proto_of.shape[0]:
            self._refresh_all()

    @torch.no_grad()
    def set_labels(self, labels: torch.Tensor) -> None:
        """Take new cluster labels (N,) and compute all prototypes.

        Labels are integers, -1 for un-clustered images, and clusters are ``0 .. C-1`` without
        gaps, as DBSCAN numbers them; an array is accepted. Raises ``ValueError`` otherwise,
        changing nothing.
        """
        op = "MemoryBank.set_labels"
        labels = self._as_tensor(op, "labels", labels)
        _checks.dtype(op, "labels", labels, (torch.int64, torch.int32))
        _checks.shape(op, "labels", labels, tuple(self.labels.shape), "one per training image")
        labels = labels.to(torch.int64)
        count = labels.numel()
        outlier = labels < 0
        # Which clusters occur, behind a place for the outliers.
        occurs = torch.zeros(count + 1, dtype=torch.bool, device=labels.device)
        occurs.scatter_(0, labels.clamp(-1, count - 1) + 1, True)
        facts = [*torch.aminmax(labels), outlier.sum(), occurs[1:].sum()]
        # The one place where this waits for the device.
        lowest, highest, outliers, distinct = torch.stack(facts).tolist()
        if lowest < -1:
            raise ValueError(f"{op}: labels must be >= -1 (got {lowest})")
        clusters = highest + 1
        if clusters > count:
            raise ValueError(
                f"{op}: clusters must be numbered without gaps "
                f"(got label {highest} for {count} images)"
            )
        if distinct < clusters:
            gap = int((~occurs[1:]).nonzero()[0])
            raise ValueError(
                f"{op}: clusters must be numbered without gaps (got none with label {gap}, "
                f"and the highest is {highest})"
            )
        self.labels.copy_(labels)
        self._proto_of = torch.where(outlier, highest + outlier.cumsum(0), labels)
        self._num_clusters = clusters
        self._members, self._offsets = class_csr(self._proto_of, clusters + outliers)
        # Every class is written, also one without rows.
        self._prototypes = self.features.new_empty(clusters + outliers, self.features.shape[1])
        self._refresh_all()

    def update_(self, features: torch.Tensor, indices: torch.Tensor) -> None:
        """Move the rows of these images towards new features and refresh their prototypes.

        Args:
            features: (B, d) of the batch.
            indices: (B,) int64 image indices; repeats are applied one after another.
        """
        given = features, indices
        # Not attribute by attribute, which a module looks up by name each time.
        state: dict[str, Any] = self._buffers
        bank, proto_of = state["features"], state["_proto_of"]
        device = bank.device
        if not self._is_plain(features, device):
            features = self._as_tensor("MemoryBank.update_", "features", features)
        if not self._is_plain(indices, device):
            indices = self._as_tensor("MemoryBank.update_", "indices", indices)
        momentum_update_(
            bank, features, indices, self.momentum, eps=self.eps, skipped=state["skipped"]
        )
        if proto_of.shape[0]:
            update_segment_mean_(
                state["_prototypes"],
                bank,
                state["_members"],
                state["_offsets"],
                indices,
                self.normalize_prototypes,
                proto_of,
            )
        if features is not given[0] or indices is not given[1]:
            _arrays.caller_waits(zip(given, (features, indices), strict=True))

    @torch.no_grad()
    def hardest_positives(
        self, features: torch.Tensor, indices: torch.Tensor, cameras: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Of the rows of each image's class, the one that is least similar to its feature.

        With ``cameras``, (N,) int64 numbers of the training images' cameras, only rows of another
        camera than the image's own count; where its class has none, it is the image's own row. It
        reads the rows of the batch's classes once and does not wait for the device.

        Args:
            features: (B, d) of the batch, any floating dtype.
            indices: (B,) int64 image indices.
            cameras: as said; by default rows of all cameras count, the own row among them.

        Returns:
            (B,) int64 rows of the bank; of equal similarities the lowest, the same on every device.

        Raises:
            TypeError, ValueError, IndexError: as :meth:`update_`; RuntimeError without labels.
        """
        op = "MemoryBank.hardest_positives"
        self._require_labels("hardest_positives")
        features = self._as_tensor(op, "features", features)
        indices = self._as_tensor(op, "indices", indices)
        if cameras is not None:
            cameras = self._as_tensor(op, "cameras", cameras)
        lists = (self._proto_of, self._members, self._offsets)
        return hardest_positives(features, self.features, indices, *lists, cameras, op=op)

    def extra_repr(self) -> str:
        """Sizes and momentum, for ``print``."""
        n, d = self.features.shape
        classes = f", {self._num_clusters} clusters, {self._prototypes.shape[0]} prototypes"
        return f"{n} x {d}, momentum={self.momentum}{classes if self._proto_of.shape[0] else ''}"

    @staticmethod
    def _is_plain(value: object, device: torch.device) -> bool:
        return (
            type(value) is torch.Tensor and value.layout == torch.strided and value.device == device
        )

    def _as_tensor(self, op: str, name: str, value: Any) -> torch.Tensor:
        if not torch.compiler.is_compiling() and _arrays.is_array(value):
            return _arrays.to_tensor(op, name, value).to(self.features.device)
        _checks.tensor(op, name, value)
        tensor: torch.Tensor = value
        if tensor.device != self.features.device:
            raise ValueError(
                f"{op}: {name} must be on the bank's device {self.features.device} "
                f"(got {tensor.device})"
            )
        return tensor

    def _refresh_all(self) -> None:
        update_segment_mean_(
            self._prototypes,
            self.features,
            self._members,
            self._offsets,
            None,
            self.normalize_prototypes,
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # The number of prototypes is part of the state: make room for what is coming.
        for name in ("_prototypes", "_proto_of"):
            stored = state_dict.get(prefix + name)
            if stored is not None:
                setattr(self, name, getattr(self, name).new_empty(stored.shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self._proto_of.shape[0]:
            facts = torch.stack([self.labels.max(), (self.labels < 0).sum()])
            highest, outliers = facts.tolist()
            self._num_clusters = highest + 1
            self._members, self._offsets = class_csr(self._proto_of, highest + 1 + outliers)
        else:
            self._num_clusters = 0
