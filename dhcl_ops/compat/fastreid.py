"""fast-reid (He et al., 2020): ``fastreid.evaluation.rerank``, whose code is torchreid's."""

from dhcl_ops.compat.torchreid import re_ranking

__all__ = ["re_ranking"]
