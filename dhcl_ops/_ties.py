"""Jaccard distances that many pairs of rows have exactly, so that rounding decides about them.

After the query expansion a row's weights are the mean of those of its first k2 neighbours, each of
which sums to one. Two rows that share m of these k2 share the weight m / k2, and no more if their
other neighbours' sets have no row in common, as those of two clusters have. Their distance
1 - t / (2 - t) is then 1 - m / (2 k2 - m), whatever the features are.
"""

from __future__ import annotations

import functools
import warnings

# Computed distances of such pairs differ by less than this.
_ROUNDING = 1e-6


def tied_distances(k2: int) -> dict[int, float]:
    """The distance in (0, 1) of rows that share m of the k2 neighbours, by m."""
    return {m: 1.0 - m / (2 * k2 - m) for m in range(1, k2)}


@functools.cache
def warn_of_tie(op: str, eps: float, k2: int) -> None:
    """Warn, once for each op, eps and k2, where eps is such a distance."""
    for shared, distance in tied_distances(k2).items():
        if abs(eps - distance) < _ROUNDING:
            warnings.warn(
                f"{op}: eps={eps:g} is exactly the distance of rows that share {shared} of the "
                f"k2={k2} neighbours they are expanded with and nothing else, so rounding decides "
                f"about them; take {eps - 0.01:.2f} or {eps + 0.01:.2f}",
                stacklevel=4,
            )
