"""Bytes that sharded.cluster sends, counted and as docs/scale.md states them.

``python -m tests.ops.sharded_bytes --ranks 8 --rows 1600`` compares both for any number of ranks.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

import dhcl_ops
from dhcl_ops import sharded
from dhcl_ops._csr import Rows
from dhcl_ops.defaults import SPCL
from dhcl_ops.reciprocal import Lists, expanded_sets, expanded_weights, list_width
from tests.ops.jaccard_data import features_like
from tests.ops.ranks import on_ranks, own_slice


def visits_of(world):
    """How many other ranks a row visits, on average."""
    return (world - 1) / 2 if world % 2 else world / 2 - 1 / 4


def foreign(owner, row, column):
    """Distinct pairs of a rank and a row of another one that its rows name: the rows."""
    beside = owner[row] != owner[column]
    n = len(owner)
    return (owner[row[beside]] * n + column[beside]).unique() % n


def stated(x, world, graph_eps=None):
    """Bytes by stage that all ranks send, from the numbers of one process (docs/scale.md)."""
    n, d = x.shape
    k, half, k2 = list_width("stated", n, 30, 6, "spcl")
    owner = torch.arange(n) // -(-n // world)
    near = dhcl_ops.knn(x, k)
    ranks = near.indices.int()
    back = torch.ops.dhcl.reciprocal_positions(ranks)
    row = torch.arange(n).repeat_interleave(k)
    entries = ranks.flatten().long()
    told = int((owner[row] != owner[entries]).sum())
    mutual = back.flatten() >= 0
    bytes_of = {"neighbours": n * visits_of(world) * (4 * d + 4 + 8 * (k - 1))}
    asked = len(foreign(owner, row[mutual], entries[mutual]))
    bytes_of["sets"] = told * (4 + 4 + 2) + asked * (4 + 4 * half)

    lists = Lists(ranks, k, half, k2)
    offsets, columns = expanded_sets(lists, None)
    lines, columns = torch.arange(n).repeat_interleave(offsets.diff()), columns.long()
    listed = torch.isin(lines * n + columns, row * n + entries)
    bytes_of["weights"] = len(foreign(owner, lines[~listed], columns[~listed])) * (4 + 4 * d)

    first = ranks[:, :k2].flatten().long()
    wanted = foreign(owner, torch.arange(n).repeat_interleave(k2), first)
    sizes = offsets.diff()[wanted]
    bytes_of["query expansion"] = len(wanted) * (4 + 8) + 8 * int(sizes.sum())
    weights = torch.ones(len(columns)) / 30
    rows = expanded_weights(lists, Rows(offsets, columns.int(), weights), None)

    found = dhcl_ops.cluster(x, graph_eps=graph_eps)
    row = torch.arange(n).repeat_interleave(found.graph.crow_indices().diff())
    column = found.graph.col_indices()
    between = int((owner[row] != owner[column]).sum()) // 2
    visiting = visits_of(world) * (4 * n + 8 * len(rows.columns))
    bytes_of["pairs"] = visiting + 12 * between
    # DBSCAN looks at the near pairs of a wide graph alone.
    near = found.graph.values() <= SPCL.eps
    bytes_of["clusters"] = cluster_bytes(found.labels, row[near], column[near], owner, world)
    return bytes_of


def cluster_bytes(labels, row, column, owner, world):
    """What DBSCAN of a graph of pairs (row, column) over some ranks sends."""
    n = len(owner)
    core = torch.bincount(row, minlength=n) >= 4
    total = len(foreign(owner, row, column)) * (4 + 1)
    forests = []
    for rank in range(world):
        edge = (owner[row] == rank) & core[row] & core[column] & (column > row)
        seen = torch.cat([torch.arange(n)[core & (owner == rank)], column[edge]]).unique()
        a, b = (torch.searchsorted(seen, side[edge]).numpy() for side in (row, column))
        pairs = coo_matrix((np.ones(len(a)), (a, b)), shape=(len(seen), len(seen)))
        forests.append(len(seen) - connected_components(pairs, directed=False)[0])
    total += world * (world - 1) * 8 * max(forests)
    members = torch.arange(n)[core]
    root = torch.full((int(labels.max()) + 1,), n).scatter_reduce(0, labels[core], members, "amin")
    total += len(foreign(owner, members, root[labels[core]])) * (4 + 8)
    border = ~core[row] & core[column]
    return total + len(foreign(owner, row[border], column[border])) * (4 + 8)


def query_bytes(x, queries, k1, k2, world):
    """What re-ranking sends to other ranks of the queries' sets, the first rows of x."""
    k, half, k2 = list_width("stated", len(x), k1, k2, "zhong")
    lists = Lists(dhcl_ops.knn(x, k).indices.int(), k, half, k2)
    offsets, columns = expanded_sets(lists, None)
    rows = Rows(offsets, columns.int(), torch.ones(len(columns)))
    entries = int(expanded_weights(lists, rows, None).offsets[queries])
    return (world - 1) * (queries * 20 + 8 * entries)


def counted(rank, world, x, graph_eps):
    """Bytes by stage that this rank sends."""
    traffic = {}
    own = x[own_slice("even", len(x), rank, world)]
    sharded.cluster(own, graph_eps=graph_eps, traffic=traffic)
    return traffic


def compared(x, each, graph_eps=None):
    """Of each stage the bytes that all ranks sent, and those stated.

    The words by which ranks tell each other how much will come are left out, 8 bytes to each other
    rank and time: they are little beside rows by the thousand.
    """
    world = len(each)
    return {
        stage: (sum(one[stage] for one in each), size)
        for stage, size in stated(x, world, graph_eps).items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--rows", type=int, default=2400)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--graph-eps", type=float, default=None)
    options = parser.parse_args()
    x, off = features_like("moderate", options.rows, options.width), 0.0
    for world in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            each = on_ranks(world, Path(folder), counted, x, options.graph_eps, seconds=300)
        for stage, (sent, size) in compared(x, each, options.graph_eps).items():
            off = max(off, abs(sent / size - 1) if size else 0.0)
            print(
                f"{world} ranks, {stage}: {sent / options.rows:,.1f} bytes a row, "
                f"{size / options.rows:,.1f} stated, {sent / max(size, 1) - 1:+.1%}"
            )
    sys.exit(f"a stage is off by {off:.1%}" if off > 0.05 else 0)


if __name__ == "__main__":
    main()
