"""Features like those of a re-identification model, and dense transcriptions of the definitions."""

import numpy as np
import torch

REGIMES = {
    "clean": {"rank": 64, "within": 0.35, "mean": 0.8, "camera": 0.2, "noise": 0.3},
    "moderate": {"rank": 24, "within": 0.6, "mean": 1.0, "camera": 0.3, "noise": 0.3},
    "hard": {"rank": 16, "within": 0.8, "mean": 1.2, "camera": 0.4, "noise": 0.4},
    "hubs": {"rank": 24, "within": 0.6, "mean": 1.0, "camera": 0.3, "noise": 0.3, "hubs": 0.02},
    "duplicates": {"rank": 24, "within": 0.6, "mean": 1.0, "camera": 0.3, "noise": 0.3},
}


def features_like(regime, n, d=64, *, per=20, seed=0):
    """Unit rows (n, d): identities in a low-rank cloud, cameras, noise, and the regime's own."""
    settings = REGIMES[regime]
    r = np.random.default_rng(seed)
    identity = np.arange(n) // per
    basis = r.standard_normal((settings["rank"], d)) / np.sqrt(d)
    mean = r.standard_normal(d)
    mean *= settings["mean"] / np.linalg.norm(mean)
    cameras = settings["camera"] * r.standard_normal((6, d)) / np.sqrt(d)
    centres = r.standard_normal((n // per + 1, settings["rank"]))
    codes = centres[identity] + settings["within"] * r.standard_normal((n, settings["rank"]))
    rows = codes / np.sqrt(settings["rank"]) @ basis + mean + cameras[r.integers(0, 6, n)]
    rows += settings["noise"] * r.standard_normal((n, d)) / np.sqrt(d)
    if "hubs" in settings:
        chosen = r.choice(n, max(1, int(n * settings["hubs"])), replace=False)
        rows[chosen] = mean + 0.1 * r.standard_normal((len(chosen), d)) / np.sqrt(d)
    rows = rows[r.permutation(n)]
    if regime == "duplicates" and n >= 60:
        rows[:45] = rows[0]  # exact, more than k1 = 30
        rows[45:60] = rows[45] + 1e-4 * r.standard_normal((15, d)) / np.sqrt(d)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return torch.from_numpy(rows.astype(np.float32))


# ---- the definitions, row by row ----------------------------------------------------------------


def mutual(ranks, i, width):
    forward = ranks[i, :width]
    return forward[(ranks[forward, :width] == i).any(axis=1)]


def expanded(ranks, i, k, half):
    own = mutual(ranks, i, k)
    members = set(own.tolist())
    for candidate in own:
        theirs = mutual(ranks, candidate, half)
        if len(np.intersect1d(theirs, own)) > 2 / 3 * len(theirs):
            members.update(theirs.tolist())
    return np.array(sorted(members), dtype=np.int64)


def dense_weights(ranks, squares, k1, convention):
    """The weights of every row as a matrix; squares are the squared distances."""
    n = len(ranks)
    k = min(k1 + (convention == "zhong"), n)
    half = min(int(np.around(k1 / 2)) + 1, k)
    if convention == "zhong":
        squares = squares / squares.max(axis=1, keepdims=True)
    weights = np.zeros((n, n), dtype=np.float32)
    for i in range(n):
        members = expanded(ranks, i, k, half)
        e = np.exp(-squares[i, members])
        weights[i, members] = e / e.sum()
    return weights


def dense_expansion(weights, ranks, k2):
    if k2 == 1:
        return weights
    out = np.zeros_like(weights)
    for i in range(len(weights)):
        out[i] = np.mean(weights[ranks[i, :k2]], axis=0)
    return out


def dense_distance(weights):
    """1 - t / (2 - t), t the sum of minima over the columns in ascending order, in float32."""
    n = len(weights)
    out = np.zeros((n, n), dtype=np.float32)
    for i in range(n):
        shared = np.zeros(n, dtype=np.float32)
        for c in np.nonzero(weights[i])[0]:
            shared += np.minimum(weights[i, c], weights[:, c])
        out[i] = 1 - shared / (2 - shared)
    return np.maximum(out, 0)


def dense_ranks(squares):
    """Each row first in its own list, then by distance, ties by index."""
    keys = squares.copy()
    np.fill_diagonal(keys, -np.inf)
    return np.argsort(keys, axis=1, kind="stable")


def jaccard_by_definition(features, k1, k2, convention, ranks=None):
    x = np.asarray(features, dtype=np.float64)
    squares = 2 - 2 * (x @ x.T)
    ranks = dense_ranks(squares) if ranks is None else np.asarray(ranks)
    weights = dense_weights(ranks, squares, k1, convention)
    return dense_distance(dense_expansion(weights, ranks, min(k2, len(x))))


def rerank_by_definition(q_g, q_q, g_g, k1, k2, lambda_value):
    """The published re-ranking of Zhong et al. from distance matrices."""
    full = np.block([[q_q, q_g], [q_g.T, g_g]]).astype(np.float32)
    squares = full**2
    squares = (squares / squares.max(axis=0)).T
    ranks = dense_ranks(squares)
    weights = dense_weights(ranks, squares, k1, "zhong")
    jaccard = dense_distance(dense_expansion(weights, ranks, k2))
    final = jaccard * (1 - lambda_value) + squares * lambda_value
    return final[: len(q_q), len(q_q) :]


def densified(graph):
    """A sparse distance matrix as a dense one, infinite where it has no entry."""
    out = torch.full(graph.shape, torch.inf)
    rows = torch.arange(len(graph)).repeat_interleave(graph.crow_indices().diff().cpu())
    out[rows, graph.col_indices().cpu()] = graph.values().cpu()
    return out
