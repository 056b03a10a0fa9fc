"""From neighbour lists to the eps-graph, sharded by row: the bits of :mod:`dhcl_ops.jaccard`.

Every stage asks the owners for the few rows it lacks, renumbers what it has without changing the
order of the rows' numbers, and calls the op that one process would call. So ties, the order of
columns and the order of every sum are those of one process.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dhcl_ops import _csr
from dhcl_ops._csr import Rows
from dhcl_ops._progress import Progress, slices
from dhcl_ops.jaccard import Index, inverted_index, jaccard_join
from dhcl_ops.knn import pair_scores
from dhcl_ops.reciprocal import k_reciprocal, query_expand, softmax_rows
from dhcl_ops.sharded.shards import Shards, piece_rows

# Entries of sets for which the features of their members are fetched at once.
_FETCHED_BYTES = 16 << 20


def offsets_of_sizes(sizes: torch.Tensor) -> torch.Tensor:
    """Where lines of these lengths (n,) begin, and the last one ends: (n + 1,)."""
    return torch.nn.functional.pad(sizes.cumsum(0), (1, 0))


class _Places:
    """Where a row stands in an own row's list: looked up for many pairs at once."""

    def __init__(self, ranks: torch.Tensor, total: int) -> None:
        self.total, self.width = total, ranks.shape[1]
        row = torch.arange(len(ranks), device=ranks.device)[:, None]
        self.keys, self.order = (row * total + ranks).flatten().sort()

    def of(self, row: torch.Tensor, column: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each pair whether the column is in the own row's list, and at which place."""
        wanted = row.long() * self.total + column
        if len(self.keys) == 0:
            return torch.zeros_like(wanted, dtype=torch.bool), torch.zeros_like(wanted)
        place = torch.searchsorted(self.keys, wanted).clamp(max=len(self.keys) - 1)
        return self.keys[place] == wanted, self.order[place] % self.width


def positions(ranks: torch.Tensor, shards: Shards) -> torch.Tensor:
    """Where each own row stands in the lists of its neighbours, -1 where it does not (int16).

    Every entry of a list is sent to the row that it names, which looks for the sender in its own.
    """
    rows, width = ranks.shape
    device = ranks.device
    own = torch.arange(shards.begin, shards.end, dtype=torch.int32, device=device)
    place = torch.arange(width, dtype=torch.int16, device=device).repeat(rows)
    out = torch.full((rows, width), -1, dtype=torch.int16, device=device)
    named, senders, theirs = shards.route(ranks.reshape(-1), own.repeat_interleave(width), place)
    row = named.long() - shards.begin
    found, at = _Places(ranks, shards.total).of(row, senders)
    out[row[found], at[found]] = theirs[found]
    return out


def expanded_sets(
    ranks: torch.Tensor, back: torch.Tensor, half: int, shards: Shards, progress: Progress | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The expanded mutual neighbours of own rows: offsets and columns.

    They need the close mutual neighbours of the rows' mutual neighbours, which are fetched.
    """
    k = ranks.shape[1]
    near = torch.where((back >= 0) & (back < half), ranks, -1)[:, :half].contiguous()
    mutual = back >= 0
    wanted = shards.foreign(ranks[mutual])
    (theirs,) = shards.fetch(wanted, near)
    own = torch.arange(shards.begin, shards.end, dtype=torch.int32, device=ranks.device)
    ids = torch.cat([own, wanted, near[near >= 0], theirs[theirs >= 0]]).unique()
    begin = int(torch.searchsorted(ids, shards.begin))
    local = ids.new_zeros(len(ids), k)
    local_back = torch.full((len(ids), k), -1, dtype=torch.int16, device=ids.device)
    mine = slice(begin, begin + len(ranks))
    local[mine] = torch.where(mutual, torch.searchsorted(ids, ranks), 0).int()
    local_back[mine] = torch.where(mutual, back, -1)
    rows = torch.searchsorted(ids, wanted)
    local[rows, :half] = torch.searchsorted(ids, theirs.clamp(min=0)).int()
    local_back[rows, :half] = torch.where(theirs >= 0, 0, -1).short()
    parts = [
        k_reciprocal(local, local_back, k, half, begin + start, begin + stop)
        for start, stop in slices(len(ranks), "mutual neighbours", progress)
    ]
    offsets, columns = _csr.joined(parts, local)[:2]
    return offsets, ids[columns.long()]


def feature_weights(
    features: torch.Tensor,
    ranks: torch.Tensor,
    similarities: torch.Tensor | None,
    sets: tuple[torch.Tensor, torch.Tensor],
    scale: torch.Tensor | None,
    shards: Shards,
) -> Rows:
    """softmax(-d2) over own rows' sets, of d2 / scale where a scale is given.

    Similarities of listed neighbours are known; for the others rows are fetched, range by range.
    """
    offsets, columns = sets
    row = _csr.row_ids(offsets)
    dots = features.new_empty(len(columns))
    missing = torch.ones_like(row, dtype=torch.bool)
    if similarities is not None:
        known, at = _Places(ranks, shards.total).of(row, columns)
        dots[known] = similarities[row[known], at[known]]
        missing = ~known
    entries = missing.nonzero().squeeze(1)
    size = max(_FETCHED_BYTES // max(4 * features.shape[1], 1), 1)
    # Every rank takes part in every exchange, also when it has nothing left to ask for.
    rounds = int(shards.gather(torch.tensor([-(-len(entries) // size)], device=row.device)).max())
    for turn in range(rounds):
        part = entries[turn * size : (turn + 1) * size]
        ids = columns[part].unique()
        (others,) = shards.fetch(ids, features)
        if len(part):
            dots[part] = pair_scores(
                features, others, row[part], torch.searchsorted(ids, columns[part])
            )
    squares = 2.0 - 2.0 * dots
    if scale is not None:
        squares = squares / scale.repeat_interleave(offsets.diff())
    return Rows(offsets, columns, softmax_rows(offsets, -squares))


def expanded_weights(
    ranks: torch.Tensor, weights: Rows, k2: int, shards: Shards, progress: Progress | None
) -> Rows:
    """The means of the rows of own rows' first k2 neighbours, which are fetched."""
    if k2 <= 1:
        return weights
    near = ranks[:, :k2].contiguous()
    wanted = shards.foreign(near)
    sizes, columns, values = shards.fetch_lines(wanted, *weights)
    own = torch.arange(shards.begin, shards.end, dtype=torch.int32, device=ranks.device)
    marks = shards.marked(own, wanted, weights.columns, columns)
    # Where each of these rows stands among them.
    place = marks.cumsum(0, dtype=torch.int32) - 1
    ids = marks.nonzero().squeeze(1).int()
    del marks
    begin = int(place[shards.begin]) if shards.rows else 0
    # Own lines stand between those of lower and of higher rows.
    below = int(sizes[: int((wanted < shards.begin).sum())].sum())
    length = sizes.new_zeros(len(ids))
    length[place[wanted].long()] = sizes
    length[begin : begin + len(ranks)] = weights.offsets.diff()
    columns = place[torch.cat([columns[:below], weights.columns, columns[below:]])]
    values = torch.cat([values[:below], weights.values, values[below:]])
    local = ids.new_zeros(len(ids), k2)
    local[begin : begin + len(ranks)] = place[near]
    del place
    lines = Rows(offsets_of_sizes(length), columns, values)
    del columns, values
    parts = [
        query_expand(local, *lines, k2, begin + start, begin + stop)
        for start, stop in slices(len(ranks), "query expansion", progress)
    ]
    offsets, columns, values = _csr.joined(parts, ranks)
    return Rows(offsets, ids[columns.long()], values)


# ---- pairs within eps ---------------------------------------------------------------------------


def cut(rows: Rows, begin: int, end: int) -> Rows:
    """Some consecutive lines."""
    lines = rows.offsets[begin : end + 1]
    first, last = int(lines[0]), int(lines[-1])
    return Rows(lines - lines[0], rows.columns[first:last], rows.values[first:last])


def _without_first(index: Index, rows: int) -> Index:
    """The index without the first rows in its lists, so that they meet the later ones only."""
    keep = index.list_rows >= rows
    kept = torch.nn.functional.pad(keep.cumsum(0), (1, 0))
    return index._replace(
        list_offsets=kept[index.list_offsets],
        list_split=kept[index.list_split],
        list_rows=index.list_rows[keep],
        list_values=index.list_values[keep],
    )


def stacked(own: Rows, visitor: Rows | None, shards: Shards) -> Rows:
    """Lines, and those of a visitor after them, as a square matrix of the columns that occur."""
    lines, columns, values = own
    if visitor is not None:
        lines = torch.cat([lines, visitor.offsets[1:] + lines[-1]])
        columns = torch.cat([columns, visitor.columns])
        values = torch.cat([values, visitor.values])
    place = shards.marked(columns).cumsum(0, dtype=torch.int32)
    count = int(place[-1]) if len(place) else 0
    columns = place[columns] - 1
    # The ops take square matrices: rows without entries make up for columns without rows.
    empty = max(count - (len(lines) - 1), 0)
    return Rows(torch.cat([lines, lines[-1:].expand(empty)]), columns, values)


def _pairs(
    own: Rows, visitor: Rows | None, eps: float, shards: Shards
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pairs within eps: own row, and later own row or row of the visitor, and their distance."""
    rows = len(own.offsets) - 1
    both = stacked(own, visitor, shards)
    index = inverted_index(both, eps)
    if visitor is not None:
        index = _without_first(index, rows)
    parts = [
        jaccard_join(*both, *index, eps, begin, end) for begin, end in slices(rows, "pairs", None)
    ]
    offsets, others, distances = _csr.joined(parts, both.columns)
    row, others = _csr.row_ids(offsets), others.long()
    if visitor is not None:
        # A row always finds itself.
        beside = others >= rows
        row, others, distances = row[beside], others[beside] - rows, distances[beside]
    return row, others, distances


class _Luggage:
    """Own lines as they go on a visit, piece by piece, and how long those of others are."""

    def __init__(self, rows: Rows, shards: Shards) -> None:
        self.rows = rows
        entries = shards.gather(torch.tensor([len(rows.columns)], device=shards.device))
        mean = int(entries.sum()) // max(shards.total, 1) + 1
        self.size = piece_rows(8 * mean, shards.device)
        own = [
            int(rows.offsets[end] - rows.offsets[begin])
            for begin, end in shards.pieces(shards.rank, self.size)
        ]
        lengths = shards.gather(torch.tensor(own, dtype=torch.int64, device=shards.device))
        pieces = [
            (rank, *piece)
            for rank in range(shards.world)
            for piece in shards.pieces(rank, self.size)
        ]
        self.lengths = dict(zip(pieces, lengths.tolist(), strict=True))

    def outline(self, rank: int, begin: int, end: int) -> list[Sequence[int]]:
        """Shapes of a piece: lengths of its lines, columns, values."""
        length = self.lengths.get((rank, begin, end), 0)
        return [(end - begin,), (length,), (length,)]

    def give(self, begin: int, end: int) -> list[torch.Tensor]:
        """A piece of own lines."""
        part = cut(self.rows, begin, end)
        return [part.offsets.diff().int(), part.columns, part.values]


def eps_graph(rows: Rows, eps: float, shards: Shards, progress: Progress | None) -> Rows:
    """Own lines of the graph of all pairs within eps; each pair is looked for by one rank."""
    found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def note(row: torch.Tensor, column: torch.Tensor, distance: torch.Tensor) -> None:
        # There are many pairs and each waits in here: 12 bytes of it, not 20.
        found.append((row.int(), column.int(), distance))

    row, other, distance = _pairs(rows, None, eps, shards)
    beside = row != other
    note(row, other + shards.begin, distance)
    note(other[beside], row[beside] + shards.begin, distance[beside])
    del row, other, distance, beside
    luggage = _Luggage(rows, shards)
    visits = shards.visits(luggage.size, luggage.outline, luggage.give, lambda _, back: note(*back))
    for visit in visits:
        sizes, columns, values = visit.tables
        visitor = Rows(offsets_of_sizes(sizes.long()), columns, values)
        row, other, distance = _pairs(cut(rows, 0, visit.mine.stop), visitor, eps, shards)
        note(row, other + visit.first, distance)
        # What the visitor's rows found here goes home, by its own numbers.
        theirs = other + (visit.first - shards.starts[visit.owner])
        ours = row + shards.begin
        visit.found.extend([theirs.int(), ours.int(), distance])
        if progress is not None:
            progress("pairs", min(visit.first, shards.total), shards.total)
    row, column, distance = (torch.cat(parts) for parts in zip(*found, strict=True))
    found.clear()
    total = max(shards.total, 1)
    key = row.long() * total + column
    del row, column
    key, order = key.sort()
    distance = distance[order]
    del order
    return Rows(_csr.offsets_of(key // total, shards.rows), key % total, distance)
