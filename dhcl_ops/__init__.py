"""Ops for unsupervised person re-identification, in CUDA, C++ and pure PyTorch.

Importing compiles nothing. The first call of an op loads the compiled kernels, building them once
if need be; without a compiler the same ops run in PyTorch. ``python -m dhcl_ops`` reports which.
"""

from dhcl_ops._library import Status, status
from dhcl_ops._version import __version__
from dhcl_ops.bank import MemoryBank
from dhcl_ops.camera_neighbours import camera_neighbours
from dhcl_ops.clustering import Clustering, SelfPaced, cluster, self_paced_labels
from dhcl_ops.constrained import constrained_dbscan
from dhcl_ops.contrastive import ContrastiveStats, NegativeWeights, debiased_contrastive_loss
from dhcl_ops.dbscan import dbscan
from dhcl_ops.false_negatives import FalseNegatives, graph_false_negatives
from dhcl_ops.graphed import GraphedStep
from dhcl_ops.hybrid import (
    DHCLLoss,
    HybridStats,
    Suspects,
    hybrid_contrastive_loss,
    suspected_false_negatives,
)
from dhcl_ops.jaccard import jaccard_distance, jaccard_graph
from dhcl_ops.knn import Neighbours, knn
from dhcl_ops.memory import least_similar, momentum_update_, prototypes
from dhcl_ops.ranking import NoValidQuery, RankingMetrics, evaluate_ranking
from dhcl_ops.reranking import RankedLists, rerank, rerank_distances

__all__ = [
    "Clustering",
    "ContrastiveStats",
    "DHCLLoss",
    "FalseNegatives",
    "GraphedStep",
    "HybridStats",
    "MemoryBank",
    "NegativeWeights",
    "Neighbours",
    "NoValidQuery",
    "RankedLists",
    "RankingMetrics",
    "SelfPaced",
    "Status",
    "Suspects",
    "__version__",
    "camera_neighbours",
    "cluster",
    "constrained_dbscan",
    "dbscan",
    "debiased_contrastive_loss",
    "evaluate_ranking",
    "graph_false_negatives",
    "hybrid_contrastive_loss",
    "jaccard_distance",
    "jaccard_graph",
    "knn",
    "least_similar",
    "momentum_update_",
    "prototypes",
    "rerank",
    "rerank_distances",
    "self_paced_labels",
    "status",
    "suspected_false_negatives",
]
