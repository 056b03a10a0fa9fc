"""Clustering, memory, loss and evaluation of rows that lie on several ranks of torch.distributed.

The names and arguments are those of :mod:`dhcl_ops`, plus a process group. Each rank passes its own
rows; row numbers go on from rank to rank.
"""

from dhcl_ops.sharded.bank import MemoryBank
from dhcl_ops.sharded.camera_neighbours import camera_neighbours
from dhcl_ops.sharded.clustering import cluster, knn
from dhcl_ops.sharded.contrastive import debiased_contrastive_loss
from dhcl_ops.sharded.false_negatives import graph_false_negatives
from dhcl_ops.sharded.hybrid import (
    DHCLLoss,
    hybrid_contrastive_loss,
    suspected_false_negatives,
)
from dhcl_ops.sharded.memory import momentum_update_
from dhcl_ops.sharded.peers import PeerError, is_lost_peer
from dhcl_ops.sharded.ranking import evaluate_ranking
from dhcl_ops.sharded.reranking import rerank

__all__ = [
    "DHCLLoss",
    "MemoryBank",
    "PeerError",
    "camera_neighbours",
    "cluster",
    "debiased_contrastive_loss",
    "evaluate_ranking",
    "graph_false_negatives",
    "hybrid_contrastive_loss",
    "is_lost_peer",
    "knn",
    "momentum_update_",
    "rerank",
    "suspected_false_negatives",
]
