"""Functions under the names and signatures that re-identification code imports today.

Change the import, keep the script. Numbers are the originals' up to rounding; what differs is said
in each docstring. There is a module for each project, and every name can be imported from here.
"""

from dhcl_ops.compat.clustercontrast import ClusterMemory
from dhcl_ops.compat.spcl import HybridMemory, compute_jaccard_distance
from dhcl_ops.compat.torchreid import evaluate_rank, re_ranking

__all__ = [
    "ClusterMemory",
    "HybridMemory",
    "compute_jaccard_distance",
    "evaluate_rank",
    "re_ranking",
]
