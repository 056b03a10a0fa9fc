"""The memory bank of :class:`dhcl_ops.MemoryBank`, its rows and prototypes spread over ranks.

Rows lie by image until there are labels, and then by prototype: a class lies whole on one rank, so
that its mean is summed there in the order of one process, and an update meets a row beside its
prototype. Between the two, rows travel once, some columns at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from dhcl_ops import _checks
from dhcl_ops import memory as ops
from dhcl_ops.bank import check_storage, unit_features
from dhcl_ops.positives import hardest_positives
from dhcl_ops.sharded.classes import classes_of_all, clusters_and_outliers
from dhcl_ops.sharded.shards import PIECE_BYTES, Shards

__all__ = ["MemoryBank"]

# Fewest columns of rows that travel at once: reading fewer takes as many cache lines.
_COLUMNS = 16


class _Layout:
    """Which rank holds the row of which image."""

    def __init__(self, held: torch.Tensor, owners: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.held = held  # (m,) int64, the images of this rank's rows, ascending
        self.owners = owners  # of images, the ranks


class _Classes(NamedTuple):
    """What labels make of a bank."""

    proto_of: torch.Tensor  # (N,) int32
    sizes: torch.Tensor  # (K,) int32
    clusters: int
    starts: list[int]  # (world + 1) the first prototype of every rank
    layout: _Layout


def _by_image(starts: list[int], rank: int, device: torch.device) -> _Layout:
    """Consecutive images on each rank."""
    ends = torch.tensor(starts[1:], device=device)
    held = torch.arange(starts[rank], starts[rank + 1], device=device)
    return _Layout(held, lambda images: torch.bucketize(images, ends, right=True))


def _even(total: int, world: int) -> list[int]:
    """Starts of shares as torch.chunk and DTensor cut them."""
    share = -(-total // world)
    return [min(rank * share, total) for rank in range(world + 1)]


class MemoryBank:
    """:class:`dhcl_ops.MemoryBank` whose rows lie on several ranks: the bits of one process.

    Every rank makes it with the number of its own images, and calls every method together with the
    others. Images are numbered on from rank to rank; so are prototypes, clusters first, then one
    for each un-clustered image in ascending number. After :meth:`set_labels` a rank holds the
    classes ``prototype_starts[rank]`` to ``prototype_starts[rank + 1]`` and all their rows, so many
    that rows and prototypes together are about as many on every rank. Of all N images a rank holds
    the numbers of their prototypes, and nothing else.

    It is what ``torch.distributed.checkpoint`` calls stateful: ``save({"bank": bank})``, and
    ``load({"bank": bank})`` into a bank on any number of ranks, with any shares. A restored bank
    goes on bit for bit.

    Args:
        num_samples: n, the number of this rank's images, 0 and more; N is that of all ranks.
        num_features, momentum, eps, normalize_prototypes, dtype: equal on all ranks, and as in
            :class:`dhcl_ops.MemoryBank`.
        device: where this rank's rows live.
        group: process group; by default all processes.

    Attributes:
        skipped: (1,) int64, how many updates of this rank's rows were left out because their
            feature was not finite.
        traffic: bytes that this rank has sent to others, by stage.

    Raises:
        TypeError, ValueError: here and in the methods, as :class:`dhcl_ops.MemoryBank` and on all
            ranks, also where one rank's arguments are wrong, or do not agree with another's.
        RuntimeError: without an initialised process group.
        PeerError: another rank was lost or did not answer in the group's time.
    """

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
        group: dist.ProcessGroup | None = None,
    ) -> None:
        op = "sharded.MemoryBank"
        self.group = group
        self.traffic: dict[str, int] = {}

        def check() -> torch.Tensor:
            _checks.integer(op, "num_features", num_features, 1)
            check_storage(op, num_samples, num_features, dtype, device)
            self.momentum = _checks.number(op, "momentum", momentum, 0.0, 1.0, rule="in [0, 1]")
            self.eps = _checks.number(op, "eps", eps, 0.0, rule="finite and >= 0")
            return torch.zeros(num_samples, num_features, dtype=dtype, device=device)

        settings = {
            "num_features": num_features, "momentum": momentum, "eps": eps,
            "normalize_prototypes": normalize_prototypes, "dtype": dtype,
            "device": str(torch.get_default_device() if device is None else device).split(":")[0],
        }  # fmt: skip
        shards = Shards(op, group, check, settings, self.traffic)
        if shards.total == 0:
            raise ValueError(f"{op}: num_samples must be positive on some rank (got 0 on all)")
        self.normalize_prototypes = bool(normalize_prototypes)
        self.rank, self.world = shards.rank, shards.world
        self.image_starts: list[int] = shards.starts
        self._rows = shards.own
        self._layout = _by_image(self.image_starts, self.rank, self.device)
        self.skipped = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._forget_labels()

    def _forget_labels(self) -> None:
        self._proto_of: torch.Tensor | None = None
        self.prototype_starts: list[int] = [0] * (self.world + 1)
        self.num_clusters = 0
        self._class_of = self._members = torch.zeros(0, dtype=torch.int64, device=self.device)
        self._offsets = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._prototypes = self._rows[:0].clone()
        self._sizes = torch.zeros(0, dtype=torch.int32, device=self.device)

    # -- what a rank holds --

    @property
    def device(self) -> torch.device:
        """Where this rank's rows live."""
        return self._rows.device

    @property
    def num_samples(self) -> int:
        """N, the number of images of all ranks."""
        return self.image_starts[-1]

    @property
    def num_prototypes(self) -> int:
        """K, the number of prototypes of all ranks."""
        return self.prototype_starts[-1]

    @property
    def rows(self) -> torch.Tensor:
        """(m, d) the bank rows that lie on this rank, those of :attr:`images`."""
        return self._rows

    @property
    def images(self) -> torch.Tensor:
        """(m,) int64 the images whose rows lie on this rank, ascending."""
        return self._layout.held

    @property
    def prototypes(self) -> torch.Tensor:
        """(K_r, d) this rank's prototypes, the first of which is ``prototype_starts[rank]``."""
        self._of_all("prototypes")
        return self._prototypes

    @property
    def proto_of(self) -> torch.Tensor:
        """(N,) int32, the prototype that each image of all ranks belongs to."""
        return self._of_all("proto_of")

    @property
    def labels(self) -> torch.Tensor:
        """(n,) int64 of this rank's images, as last given to :meth:`set_labels`."""
        begin, end = self.image_starts[self.rank : self.rank + 2]
        if self._proto_of is None:
            return torch.full((end - begin,), -1, device=self.device)
        own = self._proto_of[begin:end].long()
        return torch.where(own < self.num_clusters, own, -1)

    @property
    def class_sizes(self) -> torch.Tensor:
        """(K,) int32, how many images each prototype of all ranks is the mean of."""
        self._of_all("class_sizes")
        return self._sizes

    @property
    def class_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Members (m,) int64, places of own rows by own class, ascending in each, and offsets.

        Class ``prototype_starts[rank] + k`` has the members from ``offsets[k]`` up to
        ``offsets[k + 1]``.
        """
        self._of_all("class_rows")
        return self._members, self._offsets

    def _of_all(self, what: str) -> torch.Tensor:
        if self._proto_of is None:
            raise RuntimeError(f"sharded.MemoryBank.{what}: call set_labels(labels) first")
        return self._proto_of

    @property
    def features(self) -> torch.Tensor:
        """(n, d) the bank rows of this rank's images, in their order.

        All ranks have to ask for it together: with labels, the rows travel home.
        """
        shards = self._agreed("features", lambda: self._rows)
        return self._moved(shards, self._rows, _by_image(self.image_starts, self.rank, self.device))

    def __repr__(self) -> str:
        """Sizes and momentum, for ``print``."""
        classes = f", {self.num_clusters} clusters, {self.num_prototypes} prototypes"
        return (
            f"MemoryBank({len(self._rows)} of {self.num_samples} x {self._rows.shape[1]} on rank "
            f"{self.rank} of {self.world}, momentum={self.momentum}"
            f"{'' if self._proto_of is None else classes})"
        )

    # -- rows change their place --

    def _agreed(self, method: str, check: Callable[[], torch.Tensor], **settings: Any) -> Shards:
        op = f"sharded.MemoryBank.{method}"
        return Shards(op, self.group, check, settings, self.traffic)

    def _moved(
        self, shards: Shards, table: torch.Tensor, layout: _Layout, of: _Layout | None = None
    ) -> torch.Tensor:
        """A table (m, c) whose rows lie as those of a layout, by default the bank's, in another."""
        before = self._layout if of is None else of
        to, come = layout.owners(before.held), before.owners(layout.held)
        order, arrival = to.argsort(stable=True), come.argsort(stable=True)
        give = torch.bincount(to, minlength=self.world).tolist()
        take = torch.bincount(come, minlength=self.world).tolist()
        moved = table.new_empty(len(layout.held), table.shape[1])
        mean = max(self.num_samples // self.world, 1) * table.element_size()
        size = max(PIECE_BYTES // mean, _COLUMNS)
        with shards.stage("rows of the bank"):
            for begin in range(0, table.shape[1], size):
                columns = slice(begin, begin + size)
                part = shards.exchange(table[:, columns].index_select(0, order), give, take)
                moved[:, columns].index_copy_(0, arrival, part)
        return moved

    def beside_rows(self, shards: Shards, values: torch.Tensor) -> torch.Tensor:
        """Values (n, c) of this rank's images, moved to the ranks of their rows: (m, c)."""
        home = _by_image(self.image_starts, self.rank, self.device)
        return self._moved(shards, values, self._layout, of=home)

    @torch.no_grad()
    def init(self, features: torch.Tensor) -> None:
        """Fill the bank with features (n, d) of this rank's images, each divided by its norm."""
        op = "sharded.MemoryBank.init"
        begin, end = self.image_starts[self.rank : self.rank + 2]

        def check() -> torch.Tensor:
            self._check_place(op, "features", features)
            wanted = (end - begin, self._rows.shape[1])
            _checks.shape(op, "features", features, wanted, "one row per image of this rank")
            _checks.dtype(op, "features", features, _checks.ALL_FLOATS)
            return unit_features(op, features, self._rows.dtype)

        shards = self._agreed("init", check)
        if self._proto_of is None:
            self._rows = shards.own
            return
        self._rows = self.beside_rows(shards, shards.own)
        self._refresh()

    @torch.no_grad()
    def set_labels(self, labels: torch.Tensor) -> None:
        """Take labels (n,) of this rank's images, move rows to their class, compute prototypes.

        Labels are integers, -1 for un-clustered images; the clusters of all ranks are ``0 .. C-1``
        without gaps, as :func:`cluster` numbers them. What is wrong raises, changing nothing.
        """
        op = "sharded.MemoryBank.set_labels"
        begin, end = self.image_starts[self.rank : self.rank + 2]

        def check() -> torch.Tensor:
            self._check_place(op, "labels", labels)
            _checks.dtype(op, "labels", labels, (torch.int64, torch.int32))
            _checks.shape(op, "labels", labels, (end - begin,), "one per image of this rank")
            if len(labels) and int(labels.min()) < -1:
                raise ValueError(f"{op}: labels must be >= -1 (got {int(labels.min())})")
            return labels.long()

        shards = self._agreed("set_labels", check)
        classes = self._classes_of(op, shards, shards.own)
        rows = self._moved(shards, self._rows, classes.layout)
        self._take(classes, rows)

    def _classes_of(self, op: str, shards: Shards, labels: torch.Tensor) -> _Classes:
        """Prototypes and their ranks from labels (n,) of this rank's images."""
        clusters, before = clusters_and_outliers(shards, labels)
        if clusters > self.num_samples:
            raise ValueError(
                f"{op}: clusters must be numbered without gaps "
                f"(got label {clusters - 1} for {self.num_samples} images)"
            )
        lengths = [end - begin for begin, end in itertools.pairwise(self.image_starts)]
        proto_of = classes_of_all(shards, labels, clusters, before, lengths)
        sizes = torch.bincount(proto_of, minlength=clusters)
        gaps = (sizes[:clusters] == 0).nonzero()
        if len(gaps):
            raise ValueError(
                f"{op}: clusters must be numbered without gaps (got none with label "
                f"{int(gaps[0])}, and the highest is {clusters - 1})"
            )
        starts = self._shares(sizes)
        ends = torch.tensor(starts[1:], device=self.device)
        first, behind = starts[self.rank : self.rank + 2]
        held = ((proto_of >= first) & (proto_of < behind)).nonzero().squeeze(1)
        layout = _Layout(
            held, lambda images: torch.bucketize(proto_of[images].long(), ends, right=True)
        )
        return _Classes(proto_of, sizes.int(), clusters, starts, layout)

    def _take(self, classes: _Classes, rows: torch.Tensor) -> None:
        """Hold these classes, whose rows have come, and compute their prototypes."""
        first, behind = classes.starts[self.rank : self.rank + 2]
        self._rows, self._layout, self._proto_of = rows, classes.layout, classes.proto_of
        self.num_clusters, self.prototype_starts = classes.clusters, classes.starts
        self._sizes = classes.sizes
        self._class_of = classes.proto_of[classes.layout.held].long() - first
        self._members, self._offsets = ops.class_csr(self._class_of, behind - first)
        self._prototypes = rows.new_empty(behind - first, rows.shape[1])
        self._refresh()

    def _shares(self, sizes: torch.Tensor) -> list[int]:
        """The first prototype of every rank: rows and prototypes are what a rank has to hold."""
        ends = (sizes + 1).cumsum(0)
        whole = int(ends[-1])
        cuts = [whole * rank // self.world for rank in range(1, self.world)]
        places = torch.searchsorted(ends, torch.tensor(cuts, device=ends.device), right=True)
        return [0, *places.tolist(), len(sizes)]

    def _refresh(self) -> None:
        ops.update_segment_mean_(
            self._prototypes, self._rows, self._members, self._offsets, None,
            self.normalize_prototypes,
        )  # fmt: skip

    # -- training --

    @torch.no_grad()
    def update_(self, features: torch.Tensor, indices: torch.Tensor) -> None:
        """Move the rows of these images towards new features and refresh their prototypes.

        Each feature goes to the rank that holds its image's row. Images that occur several times
        are moved several times, in the order of the ranks and of each one's batch: as one process
        that is given all batches, one after another.

        Args:
            features: (b, d) of this rank's batch, any number of them, equal dtypes on all ranks.
            indices: (b,) int64 numbers of their images, among those of all ranks.
        """
        op = "sharded.MemoryBank.update_"

        def check() -> torch.Tensor:
            self._check_batch(op, features, indices, _checks.FLOATS)
            return features.detach()

        kind = features.dtype if isinstance(features, torch.Tensor) else None
        settings = {"the features' dtype": kind}
        shards = self._agreed("update_", check, **settings)
        with shards.stage("update"):
            owners = self._layout.owners(indices)
            images, given = shards.send(owners, indices.int(), shards.own)
        places = torch.searchsorted(self._layout.held, images.long())
        ops.momentum_update_(
            self._rows, given, places, self.momentum, eps=self.eps, skipped=self.skipped
        )
        if self._proto_of is not None:
            ops.update_segment_mean_(
                self._prototypes, self._rows, self._members, self._offsets, places,
                self.normalize_prototypes, self._class_of,
            )  # fmt: skip

    @torch.no_grad()
    def hardest_positives(
        self, features: torch.Tensor, indices: torch.Tensor, cameras: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Of the rows of each image's class, the one that is least similar to its feature.

        Args:
            features: (b, d) of this rank's batch, any number of them, equal dtypes on all ranks.
            indices: (b,) int64 numbers of their images, among those of all ranks.
            cameras: (N,) int64 of the images of all ranks: only rows of another camera than the
                image's own count. Either all ranks give it or none.

        Returns:
            (b,) int64 numbers of images, as :meth:`dhcl_ops.MemoryBank.hardest_positives`.
        """
        op = "sharded.MemoryBank.hardest_positives"

        def check() -> torch.Tensor:
            self._of_all("hardest_positives")
            self._check_batch(op, features, indices, _checks.ALL_FLOATS)
            self.check_cameras(op, cameras)
            return features.detach()

        kind = features.dtype if isinstance(features, torch.Tensor) else None
        settings = {"the features' dtype": kind, "cameras": cameras is not None}
        shards = self._agreed("hardest_positives", check, **settings)
        sizes = [end - begin for begin, end in itertools.pairwise(shards.starts)]
        with shards.stage("batch"):
            every = shards.gather_shares(shards.own, sizes)
            images = shards.gather_shares(indices, sizes)
        return self.hardest_of_all(shards, every, images, cameras)[shards.begin : shards.end]

    def hardest_of_all(
        self,
        shards: Shards,
        features: torch.Tensor,
        indices: torch.Tensor,
        cameras: torch.Tensor | None,
    ) -> torch.Tensor:
        """The same (B,) for the batches of all ranks, which every rank has: each asks its rows."""
        held = self._layout.held
        here = (self._layout.owners(indices) == self.rank).nonzero().squeeze(1)
        found = torch.zeros_like(indices)
        if len(held):
            own = None if cameras is None else cameras[held]
            rows = hardest_positives(
                features[here], self._rows, torch.searchsorted(held, indices[here]),
                self._class_of, self._members, self._offsets, own, op=shards.op,
            )  # fmt: skip
            found[here] = held[rows]
        with shards.stage("hardest positives"):
            every = shards.gather_shares(found, [len(indices)] * self.world)
        return every.view(self.world, -1).sum(0)

    def check_cameras(self, op: str, cameras: torch.Tensor | None) -> None:
        """Raise unless these are none, or cameras of the images of all ranks."""
        if cameras is not None:
            self._check_place(op, "cameras", cameras)
            why = "one per image of all ranks"
            _checks.integers(op, "cameras", cameras, self.num_samples, why)

    def _check_batch(self, op: str, features: Any, indices: Any, dtypes: Any) -> None:
        self._check_place(op, "features", features)
        _checks.dtype(op, "features", features, dtypes)
        _checks.rank(op, "features", features, 2)
        wanted = (features.shape[0], self._rows.shape[1])
        _checks.shape(op, "features", features, wanted, "rows of the bank's width")
        self._check_place(op, "indices", indices)
        _checks.integers(op, "indices", indices, features.shape[0], "one per feature")
        _checks.indices_in_range(op, "indices", indices, self.num_samples)

    def _check_place(self, op: str, name: str, value: Any) -> None:
        _checks.tensor(op, name, value)
        if value.device != self.device:
            raise ValueError(
                f"{op}: {name} must be on the bank's device {self.device} (got {value.device})"
            )

    # -- state --

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """The state of all ranks, for ``torch.distributed.checkpoint``.

        ``features`` (N, d) and ``labels`` (N,) are DTensors by image, in even shares; ``skipped``
        counts those of all ranks; ``labelled`` says whether there are labels. Prototypes are not
        part of it: their bits follow from these.
        """
        shards = self._agreed("state_dict", lambda: self._rows)
        even = _by_image(_even(self.num_samples, self.world), self.rank, self.device)
        home = _by_image(self.image_starts, self.rank, self.device)
        rows = self._moved(shards, self._rows, even)
        labels = self._moved(shards, self.labels[:, None], even, of=home).squeeze(1)
        with shards.stage("state"):
            skipped = shards.gather_shares(self.skipped, [1] * self.world).sum(0, keepdim=True)
        return {
            "features": self._as_dtensor(rows),
            "labels": self._as_dtensor(labels),
            "skipped": skipped,
            "labelled": torch.tensor([self._proto_of is not None]),
        }

    def _as_dtensor(self, own: torch.Tensor) -> Any:
        # Half a second, for those who need no checkpoint.
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor, Shard

        group = dist.group.WORLD if self.group is None else self.group
        assert group is not None
        mesh = DeviceMesh.from_group(group, own.device.type)
        shape = torch.Size([self.num_samples, *own.shape[1:]])
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            own, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride
        )

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state of this many images, as :meth:`state_dict` gives it, on all ranks."""
        op = "sharded.MemoryBank.load_state_dict"
        starts = _even(self.num_samples, self.world)
        share = starts[self.rank + 1] - starts[self.rank]
        local: dict[str, torch.Tensor] = {}

        def check() -> torch.Tensor:
            width = self._rows.shape[1]
            for name, wanted in (("features", (width,)), ("labels", ())):
                value = state_dict.get(name)
                shape = (self.num_samples, *wanted)
                if value is None or not hasattr(value, "to_local") or value.shape != shape:
                    got = (
                        "none" if value is None else f"{type(value).__name__} {tuple(value.shape)}"
                    )
                    raise ValueError(f"{op}: {name} must be a DTensor {shape} (got {got})")
                local[name] = value.to_local().to(self.device)
                _checks.shape(op, name, local[name], (share, *wanted), "an even share")
            for name in ("skipped", "labelled"):
                if name not in state_dict:
                    raise ValueError(f"{op}: {name} is missing")
            return local["features"].to(self._rows.dtype)

        labelled = bool(state_dict.get("labelled", False))
        shards = self._agreed("load_state_dict", check, labelled=labelled)
        even = _by_image(starts, self.rank, self.device)
        home = _by_image(self.image_starts, self.rank, self.device)
        classes = None
        if labelled:
            labels = self._moved(shards, local["labels"][:, None], home, of=even).squeeze(1)
            classes = self._classes_of(op, shards, labels)
        layout = home if classes is None else classes.layout
        rows = self._moved(shards, shards.own, layout, of=even)
        if classes is None:
            self._rows, self._layout = rows, home
            self._forget_labels()
        else:
            self._take(classes, rows)
        # Counted once, as updates are: by one of the ranks.
        whole = state_dict["skipped"].to(self.device)
        self.skipped = whole.clone() if self.rank == 0 else torch.zeros_like(whole)
