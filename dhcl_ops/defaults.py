"""The values that published code uses, once: signatures, options and benchmarks read them here."""

from __future__ import annotations

from typing import NamedTuple


class ClusteringDefaults(NamedTuple):
    """Of :func:`dhcl_ops.cluster` and what it is made of.

    ``k1`` neighbours of a row, itself included; ``k2`` neighbours in the query expansion; ``eps``,
    the largest Jaccard distance of neighbours in DBSCAN, and ``eps_gap``, by which the tight and
    the loose clustering differ from it; ``min_samples`` neighbours that make a row core.
    """

    k1: int
    k2: int
    eps: float
    eps_gap: float
    min_samples: int


class RerankingDefaults(NamedTuple):
    """Of :func:`dhcl_ops.rerank`.

    ``k1`` neighbours of a row, itself not included; ``k2`` neighbours in the query expansion;
    ``lambda_value``, the share of the original distance.
    """

    k1: int
    k2: int
    lambda_value: float


SPCL = ClusteringDefaults(k1=30, k2=6, eps=0.6, eps_gap=0.02, min_samples=4)
"""Clustering of SpCL (Ge et al., NeurIPS 2020) and of the training codes derived from it."""

ZHONG = RerankingDefaults(k1=20, k2=6, lambda_value=0.3)
"""Re-ranking of Zhong et al. (CVPR 2017)."""
