"""Functions under the names and signatures that re-identification code imports today.

Change the import, keep the script. There is a module for each project, with the names, defaults and
return values of that project; numbers are the originals' up to rounding, and what differs is said
in each docstring. Five names can be imported from here: SpCL's, Cluster Contrast's and torchreid's.
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
