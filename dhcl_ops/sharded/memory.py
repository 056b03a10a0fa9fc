"""The momentum update of a bank whose rows lie on several ranks, by number."""

from __future__ import annotations

import torch
import torch.distributed as dist

from dhcl_ops import _checks
from dhcl_ops import memory as ops
from dhcl_ops.sharded.shards import Shards, agreed_width

__all__ = ["momentum_update_"]


@torch.no_grad()
def momentum_update_(
    bank: torch.Tensor,
    features: torch.Tensor,
    indices: torch.Tensor,
    momentum: float,
    *,
    eps: float = 0.0,
    skipped: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    traffic: dict[str, int] | None = None,
) -> torch.Tensor:
    """:func:`dhcl_ops.momentum_update_` of rows that lie on several ranks, to the bit.

    Every rank calls it with its own rows of the bank and its own batch. Each feature goes to the
    rank that owns its row; rows that occur several times are moved several times, in the order of
    the ranks and of each one's batch.

    Args:
        bank: (n, d) this rank's rows, any number of them; row numbers go on from rank to rank.
            Changed in place.
        features: (b, d) of this rank's batch, any number of them.
        indices: (b,) int64 their rows, among those of all ranks.
        momentum, eps: as in :func:`dhcl_ops.momentum_update_`, equal on all ranks; so are dtypes.
        skipped: (1,) int64, increased by the number of this rank's updates that are left out.
        group, traffic: as in :func:`knn`.

    Returns:
        The bank.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError, PeerError: as
            :func:`dhcl_ops.momentum_update_` and :class:`MemoryBank`, on all ranks, before anything
            is changed.
    """
    op = "sharded.momentum_update_"

    def check() -> torch.Tensor:
        _checks.tensor(op, "features", features)
        _checks.rank(op, "features", features, 2)
        _checks.integers(op, "indices", indices, features.shape[0], "one per feature")
        # Without a batch it changes nothing, and looks at all else.
        none = (features[:0], indices[:0])
        ops.momentum_update_(bank, *none, momentum, eps=eps, skipped=skipped)
        return bank

    kinds = [getattr(value, "dtype", None) for value in (bank, features)]
    settings = agreed_width(bank, momentum=momentum, eps=eps, dtypes=kinds)
    shards = Shards(op, group, check, settings, traffic)

    def in_range() -> torch.Tensor:
        _checks.indices_in_range(op, "indices", indices, shards.total)
        return indices

    Shards(op, group, in_range, {}, shards.traffic)
    with shards.stage("update"):
        rows, given = shards.send(shards.owners(indices), indices.int(), features.detach())
    places = rows.long() - shards.begin
    return ops.momentum_update_(bank, given, places, momentum, eps=eps, skipped=skipped)
