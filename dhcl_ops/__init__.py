"""Ops for unsupervised person re-identification, in CUDA, C++ and pure PyTorch.

Importing compiles nothing. The first call of an op loads the compiled kernels, building them once
if need be; without a compiler the same ops run in PyTorch. ``python -m dhcl_ops`` reports which.
"""

from dhcl_ops._library import Status, status
from dhcl_ops._version import __version__
from dhcl_ops.knn import Neighbours, knn
from dhcl_ops.memory import MemoryBank, momentum_update_, prototypes
from dhcl_ops.ranking import RankingMetrics, evaluate_ranking

__all__ = [
    "MemoryBank",
    "Neighbours",
    "RankingMetrics",
    "Status",
    "__version__",
    "evaluate_ranking",
    "knn",
    "momentum_update_",
    "prototypes",
    "status",
]
