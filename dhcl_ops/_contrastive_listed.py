"""Negatives of the contrastive loss that count by a weight, listed for each row.

A weight w of a negative is log w added to its logit, before anything else is done with it. The
lists are in CSR form, and a step of a training takes those of its batch's rows from those of all
images, so that nothing has to be gathered for it. ``csrc/contrastive.h`` has the same kernel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from dhcl_ops import _csr
from dhcl_ops._ops import define


class Listed(NamedTuple):
    """Which negatives of which row count by a weight; of a row each is listed once at most.

    Without ``members`` an entry is a column. With it an entry is a class, and its columns are those
    of the class's list, members[member_offsets[k]] up to members[member_offsets[k + 1]].
    """

    rows: torch.Tensor | None = None  # (B,) int64, the list of each row; None: there are no lists
    offsets: torch.Tensor | None = None  # (R + 1,) int64
    entries: torch.Tensor | None = None  # (E,) int64
    logs: torch.Tensor | None = None  # (E,) float32, logarithms of the weights, at most 0
    members: torch.Tensor | None = None  # (N,) int64
    member_offsets: torch.Tensor | None = None  # (K + 1,) int64


NOTHING = Listed()


def _weigh_reference(
    products: torch.Tensor,
    labels: torch.Tensor,
    proxy_labels: torch.Tensor | None,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    entries: torch.Tensor,
    logs: torch.Tensor,
    members: torch.Tensor | None,
    member_offsets: torch.Tensor | None,
    start: int,
    scale: float,
) -> None:
    row, inner = _csr.places(offsets[rows + 1] - offsets[rows])
    entry = offsets[rows][row] + inner
    column, log = entries[entry], logs[entry]
    if members is not None and member_offsets is not None:
        owner, inner = _csr.places(member_offsets[column + 1] - member_offsets[column])
        column = members[member_offsets[column[owner]] + inner]
        row, log = row[owner], log[owner]
    inside = (column >= start) & (column < start + products.shape[1])
    row, column, log = row[inside], column[inside], log[inside]
    own = column if proxy_labels is None else proxy_labels[column]
    negative = own != labels[row]
    row, column = row[negative], column[negative] - start
    products[row, column] += (log[negative].double() / scale).to(products.dtype)


def _weigh_sample(device: torch.device) -> tuple[Any, ...]:
    def integers(*values: int) -> torch.Tensor:
        return torch.tensor(values, device=device)

    return (
        torch.zeros(2, 5, device=device),
        integers(0, 2),
        None,
        integers(1, 0),
        integers(0, 2, 3),
        integers(1, 2, 0),
        torch.tensor([-0.5, -torch.inf, -2.0], device=device),
        integers(4, 0, 1, 2, 3),
        integers(0, 1, 3, 5),
        0,
        20.0,
    )


weigh = define(
    "contrastive_weigh_(Tensor(a!) products, Tensor labels, Tensor? proxy_labels, Tensor rows, "
    "Tensor offsets, Tensor entries, Tensor logs, Tensor? members, Tensor? member_offsets, "
    "int start, float scale) -> ()",
    family="contrastive",
    reference=_weigh_reference,
    fake=lambda *args: None,
    sample=_weigh_sample,
)
