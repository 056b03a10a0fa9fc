"""Re-ranking over a gallery that lies on several ranks.

The first rank holds the queries before its part of the gallery, so that rows are numbered as in one
process, and the stages of clustering make their sets. Only the queries' sets go to every rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from dhcl_ops import _checks
from dhcl_ops._csr import Rows
from dhcl_ops._products import full_precision
from dhcl_ops._progress import Progress
from dhcl_ops.clustering import Stages
from dhcl_ops.defaults import ZHONG
from dhcl_ops.jaccard import dense_rows
from dhcl_ops.reciprocal import list_width
from dhcl_ops.sharded import graph
from dhcl_ops.sharded.clustering import encoded
from dhcl_ops.sharded.shards import Shards

__all__ = ["rerank"]

# Queries at a time: what is dense is this many rows by own ones.
_QUERIES = 256


@torch.no_grad()
def rerank(
    query: torch.Tensor,
    gallery: torch.Tensor,
    k1: int = ZHONG.k1,
    k2: int = ZHONG.k2,
    lambda_value: float = ZHONG.lambda_value,
    *,
    group: dist.ProcessGroup | None = None,
    progress: Progress | None = None,
    traffic: dict[str, int] | None = None,
) -> torch.Tensor:
    """:func:`dhcl_ops.rerank` of a gallery that lies on several ranks.

    Every rank gives all queries and its own gallery rows, and gets its own columns of the matrix.
    Neighbours and sets are those of one process to the bit; distances are divided by the largest
    one of each row, which is as exact as a matrix product, and agree to 1e-6.

    Args:
        query: (Q, d) rows of norm 1, equal on all ranks.
        gallery: (g, d) this rank's rows of norm 1, any number of them.
        k1, k2, lambda_value: as in :func:`dhcl_ops.rerank`, equal on all ranks.
        group, progress, traffic: as in :func:`knn`.

    Returns:
        (Q, g) float32 distances, which :func:`evaluate_ranking` takes.

    Raises:
        TypeError, ValueError: as :func:`dhcl_ops.rerank`, on all ranks, also where one rank's rows
            are wrong or arguments do not agree.
        MemoryError: the (Q, g) matrix does not fit into the free memory of some rank; on all.
        RuntimeError, PeerError: as :func:`knn`.
    """
    op = "sharded.rerank"
    queries: torch.Tensor
    rows: torch.Tensor

    def check() -> torch.Tensor:
        nonlocal queries, rows
        _checks.number(op, "lambda_value", lambda_value, 0.0, 1.0, rule="in [0, 1]")
        queries = _checks.unit_rows(op, "query", query)
        rows = _checks.unit_rows(op, "gallery", gallery)
        _checks.same_device(op, query=queries, gallery=rows)
        if queries.shape[1] != rows.shape[1]:
            raise ValueError(
                f"{op}: query and gallery must have one width (got {queries.shape[1]} and "
                f"{rows.shape[1]})"
            )
        list_width(op, len(queries) + len(rows), k1, k2, "zhong")
        return rows if dist.get_rank(group) else torch.cat([queries, rows])

    settings = {
        "the shape of queries": tuple(getattr(query, "shape", ())),
        "k1": k1, "k2": k2, "lambda_value": lambda_value,
    }  # fmt: skip
    shards = Shards(op, group, check, settings, traffic)
    _refuse_too_large(shards, len(queries), len(rows))
    widths = list_width(op, shards.total, k1, k2, "zhong")
    sets, scale, _ = encoded(shards, None, widths, True, progress, Stages(shards.device))
    assert scale is not None
    first = torch.arange(len(queries), dtype=torch.int32, device=shards.device)
    with shards.stage("queries"):
        (scale,) = shards.fetch(first, scale)
        sizes, columns, values = shards.fetch_lines(first, *sets)
    lines = Rows(graph.offsets_of_sizes(sizes), columns, values)
    own = graph.cut(sets, shards.rows - len(rows), shards.rows)
    both = graph.stacked(lines, own, shards)
    out = torch.empty(len(queries), len(rows), device=shards.device)
    part = slice(len(queries), len(queries) + len(rows))
    for begin, end, jaccard in dense_rows(both, progress, stop=len(queries), size=_QUERIES):
        with full_precision(shards.device):
            products = queries[begin:end] @ rows.T
        squares = products.mul_(-2.0).add_(2.0).clamp_(min=0.0).div_(scale[begin:end, None])
        out[begin:end] = squares.mul_(lambda_value)
        out[begin:end] += jaccard[:, part].mul_(1.0 - lambda_value)
    return out


def _refuse_too_large(shards: Shards, queries: int, rows: int) -> None:
    """Raise on all ranks where the matrix of one does not fit: the others would wait for it."""
    refused: MemoryError | None = None
    try:
        instead = "more ranks have less each"
        _checks.fits_in_memory(shards.op, (queries, rows), shards.device, instead)
    except MemoryError as error:
        refused = error
    with shards.stage("agreement"):
        every = shards.gather(torch.tensor([refused is not None], device=shards.device))
    if refused is not None:
        raise refused
    if bool(every.any()):
        ranks = every.nonzero().squeeze(1).tolist()
        raise MemoryError(f"{shards.op}: the matrix does not fit into the memory of ranks {ranks}")
