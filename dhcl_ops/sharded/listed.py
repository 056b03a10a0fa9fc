"""Lists of negatives that count by a weight, brought to the ranks of the proxies that they name."""

from __future__ import annotations

import itertools

import torch

from dhcl_ops import _csr
from dhcl_ops.contrastive import NegativeWeights
from dhcl_ops.false_negatives import FalseNegatives
from dhcl_ops.sharded.bank import MemoryBank
from dhcl_ops.sharded.graph import offsets_of_sizes
from dhcl_ops.sharded.shards import Shards

__all__ = ["check_lists", "lists_by_class", "lists_of_all"]

_STAGE = "listed weights"


def check_lists(op: str, weights: NegativeWeights, classes: int | None) -> None:
    """Refuse on the CPU what kernels would refuse on one rank alone, while the others wait.

    Without ``classes`` entries are columns, and those out of range are no negatives.
    """
    if weights.offsets.is_cuda:
        return
    _check_ascending(op, "offsets", weights.offsets, len(weights.entries), "entries")
    if weights.members is not None and weights.member_offsets is not None:
        members = len(weights.members)
        _check_ascending(op, "member_offsets", weights.member_offsets, members, "members")
    _check_range(op, "rows", weights.rows, len(weights.offsets) - 1)
    if classes is not None:
        _check_range(op, "entries", weights.entries, classes)


def _check_ascending(op: str, name: str, offsets: torch.Tensor, count: int, what: str) -> None:
    wrong = len(offsets) == 0 or int(offsets[0]) < 0 or int(offsets[-1]) > count
    if wrong or bool((offsets.diff() < 0).any()):
        raise ValueError(
            f"{op}: weights.{name} must ascend up to the number of {what}, {count} (got "
            f"{offsets[:1].tolist() + offsets[-1:].tolist()} at their ends)"
        )


def _check_range(op: str, name: str, numbers: torch.Tensor, count: int) -> None:
    if len(numbers) == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(numbers))
    if low < 0 or high >= count:
        wrong = low if low < 0 else high
        raise ValueError(f"{op}: weights.{name} must be in [0, {count}) (got {wrong})")


def _entries(rows: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The entries of the lists of these rows: which of the rows, and which entry."""
    begin = offsets[rows]
    row, inner = _csr.places(offsets[rows + 1] - begin)
    return row, begin[row] + inner


def lists_of_all(shards: Shards, own: NegativeWeights, first: int) -> NegativeWeights:
    """The lists of the batches of all ranks, on all; columns count from ``first``.

    Of classes every rank has its own proxies, so that it needs all entries; of columns it takes all
    too, as there are few beside features.
    """
    row, entry = _entries(own.rows, own.offsets)
    sizes = torch.bincount(row, minlength=len(own.rows))
    # A column takes 64 bits, a logarithm 32.
    columns = own.entries[entry].view(torch.int32).view(-1, 2)
    packed = torch.cat([columns, own.logs[entry].view(torch.int32)[:, None]], 1)
    batches = [end - begin for begin, end in itertools.pairwise(shards.starts)]
    with shards.stage(_STAGE):
        lengths = shards.gather_shares(sizes.int(), batches)
        several = torch.stack([part.sum() for part in lengths.split(batches)]).tolist()
        every = shards.gather_shares(packed, several)
    entries = every[:, :2].contiguous().view(torch.int64).squeeze(1)
    members = None if own.members is None else own.members - first
    return NegativeWeights(
        torch.arange(len(lengths), device=lengths.device),
        offsets_of_sizes(lengths),
        entries - first if members is None else entries,
        every[:, 2].contiguous().view(torch.float32),
        members,
        own.member_offsets,
    )


def lists_by_class(
    shards: Shards, memory: MemoryBank, found: FalseNegatives, images: torch.Tensor
) -> NegativeWeights:
    """Of the batches of all ranks, (B,) images, the lists of this rank's classes.

    The rank of an image has its list, and sends each entry to the rank of its class, which numbers
    its own classes from 0.
    """
    begin, end = memory.image_starts[memory.rank : memory.rank + 2]
    here = ((images >= begin) & (images < end)).nonzero().squeeze(1)
    row, entry = _entries(images[here] - begin, found.offsets)
    classes = found.classes[entry]
    columns = [here[row].int(), classes.int(), found.logs[entry].view(torch.int32)]
    ends = torch.tensor(memory.prototype_starts[1:], device=classes.device)
    owners = torch.bucketize(classes, ends, right=True).clamp(max=memory.world - 1)
    with shards.stage(_STAGE):
        (came,) = shards.send(owners, torch.stack(columns, 1))
    first, behind = memory.prototype_starts[memory.rank : memory.rank + 2]
    # Kernels do not look whether there is such a class.
    came = came[(came[:, 1] >= first) & (came[:, 1] < behind)]
    # An image's entries come from one rank, in their order.
    came = came[came[:, 0].argsort(stable=True)]
    sizes = torch.bincount(came[:, 0], minlength=len(images))
    return NegativeWeights(
        torch.arange(len(images), device=images.device),
        offsets_of_sizes(sizes),
        came[:, 1].long() - first,
        came[:, 2].contiguous().view(torch.float32),
    )
