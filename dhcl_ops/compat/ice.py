"""ICE (Chen et al., ICCV 2021; chenhao2345/ICE).

The names are SpCL's, under ``ice`` in place of ``spcl``: ``compute_jaccard_distance`` and
``re_ranking`` of ``ice.utils``, ``cmc`` and ``mean_ap`` of ``ice.evaluation_metrics``. ICE has no
memory module; its camera proxies are part of its trainer.
"""

from dhcl_ops.compat.spcl import cmc, compute_jaccard_distance, mean_ap, re_ranking

__all__ = ["cmc", "compute_jaccard_distance", "mean_ap", "re_ranking"]
