"""Ops for unsupervised person re-identification, in CUDA, C++ and pure PyTorch.

Importing compiles nothing. The first call of an op loads the compiled kernels, building them once
if need be; without a compiler the same ops run in PyTorch. ``python -m dhcl_ops`` reports which.
"""

from dhcl_ops._library import Status, status
from dhcl_ops._version import __version__
from dhcl_ops.clustering import Clustering, SelfPaced, cluster, dbscan, self_paced_labels
from dhcl_ops.jaccard import jaccard_distance, jaccard_graph
from dhcl_ops.memory import MemoryBank, momentum_update_, prototypes
from dhcl_ops.reranking import RankedLists, rerank, rerank_distances

__all__ = [
    "Clustering",
    "MemoryBank",
    "RankedLists",
    "SelfPaced",
    "Status",
    "__version__",
    "cluster",
    "dbscan",
    "jaccard_distance",
    "jaccard_graph",
    "momentum_update_",
    "prototypes",
    "rerank",
    "rerank_distances",
    "self_paced_labels",
    "status",
]
