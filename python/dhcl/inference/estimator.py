"""The clustering of the ops as an estimator of scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.utils.validation import validate_data

from dhcl.inference.features import unit_rows
from dhcl_ops import cluster, dbscan
from dhcl_ops.defaults import SPCL
from dhcl_ops.reciprocal import Convention

__all__ = ["JaccardDBSCAN"]

# Entries of rows that float32 holds together with their squares.
_SMALL, _LARGE = 1e-18, 1e18


class JaccardDBSCAN(ClusterMixin, BaseEstimator):  # type: ignore[misc]
    """DBSCAN over k-reciprocal Jaccard distances, as an estimator of scikit-learn.

    What :func:`dhcl_ops.cluster` computes, of rows that are scaled to length 1 first: labels equal
    those of ``sklearn.cluster.DBSCAN(eps, metric="precomputed")`` on the dense matrix of
    :func:`dhcl_ops.jaccard_distance`, without that matrix. Like ``DBSCAN`` it has no ``predict``: a
    new row changes the neighbours of the others.

    Example::

        from dhcl import JaccardDBSCAN
        labels = JaccardDBSCAN(eps=0.6, min_samples=4).fit_predict(X)

    Args:
        eps: largest distance of neighbours, in (0, 1); or a sequence of them, for which the
            distances are computed once. Not 0.5 for k2 = 6: see :func:`dhcl_ops.jaccard_graph`.
        min_samples: rows within eps, itself included, that make one the core of a cluster.
        k1, k2, convention: as of :func:`dhcl_ops.jaccard_graph`.
        self_paced: leave out clusters and rows by SpCL's criterion; for one eps alone.
        eps_gap: distance of the tight and the loose eps of that criterion from eps.

    Attributes:
        labels_: (N,) int64, clusters numbered from 0, -1 for rows in none; of several eps those at
            the first.
        labels_by_eps_: (E, N) int64, the labels at each eps.
        core_sample_indices_: ascending indices of the core rows at the first eps, without those
            that ``self_paced`` left out.
        n_features_in_: d, the width of the rows.
        feature_names_in_: (d,) names of the columns, where X is a data frame with texts for them.
    """

    labels_: NDArray[np.int64]
    labels_by_eps_: NDArray[np.int64]
    core_sample_indices_: NDArray[np.int64]
    n_features_in_: int

    def __init__(
        self,
        eps: float | Sequence[float] = SPCL.eps,
        *,
        min_samples: int = SPCL.min_samples,
        k1: int = SPCL.k1,
        k2: int = SPCL.k2,
        convention: Convention = "spcl",
        self_paced: bool = False,
        eps_gap: float = SPCL.eps_gap,
    ) -> None:
        # As given, without a look at them: scikit-learn clones by these attributes.
        self.eps = eps
        self.min_samples = min_samples
        self.k1 = k1
        self.k2 = k2
        self.convention = convention
        self.self_paced = self_paced
        self.eps_gap = eps_gap

    def fit(self, X: Any, y: Any = None) -> JaccardDBSCAN:
        """Cluster the rows.

        Args:
            X: (N, d) numbers: an array, a tensor (on a GPU the work is done there), nested lists or
                a data frame. Rows of zeros have no direction and are refused.
            y: not looked at.

        Returns:
            Itself.

        Raises:
            TypeError, ValueError: X is not finite, not a matrix or has a row of zeros; a parameter
                of the wrong kind or range.
        """
        rows = self._rows(X)
        radii = self._radii()
        options: dict[str, Any] = {
            "k1": self.k1,
            "k2": self.k2,
            "min_samples": self.min_samples,
            "convention": self.convention,
            "self_paced": self.self_paced,
            "eps_gap": self.eps_gap,
        }
        try:
            found = cluster(rows, eps=max(radii), **options)
        except (TypeError, ValueError) as error:
            # The op's messages, by the name that the user called.
            text = str(error).removeprefix("cluster: ")
            raise type(error)(f"JaccardDBSCAN: {text}") from error
        if self.self_paced:
            by_eps = found.labels[None]
        else:
            by_eps = dbscan(found.graph, radii, self.min_samples)
        self.labels_by_eps_ = by_eps.numpy(force=True)
        self.labels_ = self.labels_by_eps_[0]
        core = self._core(found.graph, radii[0]) & (self.labels_ >= 0)
        self.core_sample_indices_ = np.flatnonzero(core)
        return self

    def _rows(self, given: Any) -> torch.Tensor:
        """The rows (N, d) float32 of length 1, on the device that they were given on."""
        device = torch.device("cpu")
        if isinstance(given, torch.Tensor):
            device = given.device
            given = (given.float() if given.dtype == torch.bfloat16 else given).numpy(force=True)
        array = validate_data(self, given, dtype=(np.float64, np.float32))
        rows = torch.from_numpy(np.array(array, order="C")).to(device)
        largest = rows.abs().amax(dim=1, keepdim=True)
        extreme = (largest > 0) & ((largest < _SMALL) | (largest > _LARGE))
        unit, wrong = unit_rows(torch.where(extreme, rows / largest, rows).float())
        if len(wrong):
            raise ValueError(
                "JaccardDBSCAN: rows must have a length above 0 (got zeros in row "
                f"{int(wrong[0])}, {len(wrong)} such rows)"
            )
        return unit

    def _radii(self) -> list[float]:
        """One eps or more, as a list."""
        several = isinstance(self.eps, (Sequence, np.ndarray)) and not isinstance(self.eps, str)
        radii: list[Any] = list(self.eps) if several else [self.eps]  # type: ignore[arg-type]
        if not radii:
            raise ValueError("JaccardDBSCAN: eps must be a number or several (got an empty list)")
        if several and self.self_paced:
            raise ValueError(f"JaccardDBSCAN: self_paced goes with one eps (got {len(radii)})")
        for eps in radii:
            if isinstance(eps, bool) or not isinstance(eps, (int, float, np.number)):
                raise TypeError(f"JaccardDBSCAN: eps must be a number (got {type(eps).__name__})")
            if not 0.0 < eps < 1.0:
                raise ValueError(f"JaccardDBSCAN: eps must be in (0, 1) (got {eps!r})")
        return [float(eps) for eps in radii]

    def _core(self, graph: torch.Tensor, eps: float) -> NDArray[np.bool_]:
        """Which rows have enough others within eps, compared in float32 as DBSCAN does."""
        limit = torch.tensor(eps, dtype=torch.float32, device=graph.device)
        near = (graph.values() <= limit).long().cumsum(0)
        ends = torch.nn.functional.pad(near, (1, 0))[graph.crow_indices().long()]
        core: NDArray[np.bool_] = (ends.diff() >= self.min_samples).numpy(force=True)
        return core
