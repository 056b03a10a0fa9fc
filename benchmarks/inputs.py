"""Inputs that several benchmarks share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.nn import functional

from dhcl_ops import Neighbours
from dhcl_ops.defaults import SPCL

Call = Callable[[], object]
Sizes = tuple[int, int, int]  # rows N, width d, batch B
Watched = Callable[[Sizes, torch.device], Iterator[tuple[str, Call]]]

PER_IDENTITY = 16


def identity_rows(n: int, d: int, device: torch.device) -> torch.Tensor:
    """Unit rows around one centre per identity."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(-(-n // PER_IDENTITY), d, generator=generator)
    noise = torch.randn(n, d, generator=generator)
    return functional.normalize(centres.repeat_interleave(PER_IDENTITY, 0)[:n] + noise).to(device)


def labels_of(n: int, device: torch.device) -> torch.Tensor:
    """The identities of :func:`identity_rows`, every eleventh row without one."""
    labels = torch.arange(n) // PER_IDENTITY
    labels[::11] = -1
    return labels.to(device)


def identities(n: int, d: int, per: float, seed: int = 0, *, crowded: bool = False) -> torch.Tensor:
    """Unit rows (n, d) of about n / per identities, in random order.

    Crowded identities overlap, as those of an untrained model do: expanded sets are longer, and
    many more pairs lie within eps.
    """
    r = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    sizes = r.lognormal(np.log(per) - 0.32, 0.8, int(2 * n / per) + 10).astype(int) + 1
    identity = torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)[:n])
    identity = identity[torch.randperm(n, generator=generator)]
    rank, within = (16, 0.8) if crowded else (48, 0.45)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    centres, basis = normal(len(sizes), rank), normal(rank, d) / d**0.5
    mean = functional.normalize(normal(d), dim=0)
    cameras = 0.3 * normal(6, d) / d**0.5
    out = torch.empty(n, d)
    for begin in range(0, n, 8192):
        own = identity[begin : begin + 8192]
        codes = (centres[own] + within * normal(len(own), rank)) / rank**0.5
        rows = codes @ basis + mean + 0.3 * normal(len(own), d) / d**0.5
        rows += cameras[torch.randint(0, 6, (len(own),), generator=generator)]
        out[begin : begin + 8192] = functional.normalize(rows)
    return out


def with_hub(found: Neighbours) -> Neighbours:
    """The lists with one row forged into the head of every one of them."""
    indices = found.indices.clone()
    missing = ~(indices[:, : SPCL.k2] == 0).any(1)
    indices[missing, SPCL.k2 - 1] = 0
    return found._replace(indices=indices)


def similarities(features: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Similarity of each row to the rows in its list, (N, k)."""
    blocks = zip(features.split(1024), indices.split(1024), strict=True)
    return torch.cat([torch.einsum("nd,nkd->nk", x, features[i]) for x, i in blocks])
