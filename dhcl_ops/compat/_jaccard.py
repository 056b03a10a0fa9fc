"""The Jaccard distance and neighbour lists under the names of several projects.

OpenUnReID, fast-reid and PPLR take rows of any length, and the distance between them is Euclidean:
``|x|^2 + |y|^2 - 2 <x, y>``, which for rows of norm 1 is what :mod:`dhcl_ops.reciprocal` computes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from dhcl_ops import _checks, _csr
from dhcl_ops._csr import Rows
from dhcl_ops._products import full_precision, upper_norms
from dhcl_ops._progress import slices
from dhcl_ops.compat import _calls
from dhcl_ops.jaccard import dense_rows, jaccard_distance
from dhcl_ops.knn import knn
from dhcl_ops.reciprocal import Lists, expanded_sets, expanded_weights, list_width, softmax_rows
from dhcl_ops.reranking import smallest

# Rows whose norms are 1 to this are taken to have been normalised in float32.
_UNIT = 1e-5
_ROWS = 256


@contextlib.contextmanager
def timed(said: bool, before: str, after: str) -> Iterator[None]:
    """Say that something begins and how long it took, as these functions do."""
    start = time.time()
    if said:
        print(before)
    yield
    if said:
        print(f"{after}: {time.time() - start}")


def checked(op: str, name: str, features: Any) -> torch.Tensor:
    """Features (N, d) as float32; raise naming the rule otherwise."""
    rows = _calls.tensor(op, name, features)
    _checks.rank(op, name, rows, 2)
    _checks.dtype(op, name, rows, _checks.ALL_FLOATS)
    rows = rows.float()
    upper_norms(op, name, rows)
    return rows


def are_unit(rows: torch.Tensor) -> bool:
    """Whether all rows have norm 1 to float32's rounding."""
    return bool(((rows.norm(dim=1) - 1.0).abs() <= _UNIT).all())


def squares(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Squared Euclidean distances of rows and others, by a matrix product."""
    with full_precision(rows.device):
        products = rows @ others.T
    own, other = (each.square().sum(1) for each in (rows, others))
    return products.mul_(-2.0).add_(own[:, None]).add_(other)


def nearest(rows: torch.Tensor, k: int) -> torch.Tensor:
    """The k nearest rows (N, k) of each, itself first; ties go to the lower index."""
    if are_unit(rows):
        return knn(rows, k).indices
    found = torch.empty(len(rows), k, dtype=torch.int64, device=rows.device)
    for begin, end in slices(len(rows), "neighbours", None, _ROWS):
        block = squares(rows[begin:end], rows)
        own = torch.arange(end - begin, device=rows.device)
        block[own, begin + own] = -torch.inf
        found[begin:end] = smallest(block, k)[1]
    return found


def _pair_squares(rows: torch.Tensor, offsets: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Squared distances of each row and the columns listed for it."""
    owner = _csr.row_ids(offsets)
    out = rows.new_empty(len(columns))
    step = max(1, _csr.CHUNK // max(rows.shape[1], 1))
    for start in range(0, len(columns), step):
        part = slice(start, start + step)
        out[part] = (rows[owner[part]] - rows[columns[part].long()]).square().sum(1)
    return out


def _any_rows(op: str, rows: torch.Tensor, k1: int, k2: int) -> torch.Tensor:
    """The dense distance of rows of any length, with SpCL's number of neighbours."""
    k, half, k2 = list_width(op, len(rows), k1, k2, "spcl")
    instead = "dhcl_ops.jaccard_graph gives the pairs within eps without it"
    _checks.fits_in_memory(op, (len(rows), len(rows)), rows.device, instead)
    lists = Lists(nearest(rows, k).int(), k, half, k2)
    offsets, columns = expanded_sets(lists, None)
    logits = -_pair_squares(rows, offsets, columns)
    weights = Rows(offsets, columns, softmax_rows(offsets, logits))
    out = torch.empty(len(rows), len(rows), device=rows.device)
    for begin, end, distances in dense_rows(expanded_weights(lists, weights, None), None):
        out[begin:end] = distances
    return out


def distances(
    op: str, features: Any, k1: int, k2: int, float16: bool
) -> np.ndarray[Any, np.dtype[Any]]:
    """The dense (N, N) matrix of a function whose argument is called ``features``."""
    with torch.no_grad():
        rows = checked(op, "features", features)
        if are_unit(rows):
            with _calls.as_called(op, "jaccard_distance"):
                result = jaccard_distance(rows, k1, k2)
        else:
            result = _any_rows(op, rows, k1, k2)
    array = result.numpy(force=True)
    return array.astype(np.float16) if float16 else array


def unit_distances(
    op: str, target_features: Any, k1: int, k2: int, float16: bool
) -> np.ndarray[Any, np.dtype[Any]]:
    """The dense (N, N) matrix of a function that assumes ``target_features`` of norm 1."""
    rows = _calls.tensor(op, "target_features", target_features)
    with _calls.as_called(op, "jaccard_distance", features="target_features"):
        result = jaccard_distance(rows, k1, k2)
    array = result.numpy(force=True)
    return array.astype(np.float16) if float16 else array
