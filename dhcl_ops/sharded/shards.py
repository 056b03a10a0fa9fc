"""Rows of one table by owner, and the ways they travel: to owners, from owners, around a half ring.

Every rank holds some consecutive rows of the table, in the order of the ranks; shares may be uneven
or empty. What is sent is counted by stage, in bytes. Tensors travel as bytes, since not every
backend of torch.distributed knows every dtype.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from dhcl_ops._version import __version__
from dhcl_ops.sharded.peers import PeerError, is_lost_peer

__all__ = ["Shards", "Visit", "agreed_width", "piece_rows"]

# Bytes of visiting rows that a rank holds at once, beside the piece that is on its way. A GPU has
# more memory, and products that are too small keep it waiting for the host.
PIECE_BYTES = 4 << 20
_PIECES = {"cuda": 64}


def piece_rows(row_bytes: int, device: torch.device) -> int:
    """How many rows of so many bytes are handled at once."""
    return max(PIECE_BYTES * _PIECES.get(device.type, 1) // max(row_bytes, 1), 1)


def agreed_width(features: Any, **settings: Any) -> dict[str, Any]:
    """What ranks must agree on, the rows' width and kind of device among it."""
    if isinstance(features, torch.Tensor):
        settings["the features' width"] = tuple(features.shape[1:])
        settings["the features' device"] = features.device.type
    return settings


class Visit(NamedTuple):
    """A piece of another rank's rows on a visit."""

    tables: list[torch.Tensor]  # the piece's rows of each table
    first: int  # its first row in the whole table
    mine: slice  # own rows that are to meet it
    owner: int  # whose rows they are
    found: list[torch.Tensor]  # takes what goes home to the owner: as many tensors on every visit


class _Statement(NamedTuple):
    """What a rank is about to do."""

    settings: dict[str, Any]
    error: str | None


class Shards:
    """Which rank owns which rows of a table, seen from one rank.

    Attributes:
        own: this rank's rows, as its check returned them.
        rank, world: this rank and their number, in the group.
        starts: (world + 1) first row of every rank; the last is ``total``.
        total: rows of the whole table.
        second_starts: the same of a second table, whose shares are others.
        traffic: bytes this rank has sent to others, by stage.
    """

    def __init__(
        self,
        op: str,
        group: dist.ProcessGroup | None,
        check: Callable[[], torch.Tensor],
        settings: dict[str, Any],
        traffic: dict[str, int] | None = None,
        second: Any = None,
    ) -> None:
        """Agree with the other ranks on what is to be done, before anything is.

        Args:
            op: whose name errors begin with.
            group: the process group; None for all processes.
            check: checks this rank's part and returns its rows; what it raises is raised on all.
            settings: what must be equal on all ranks, by the argument's name.
            traffic: takes the bytes sent by this rank, by stage.
            second: this rank's rows of a second table, which ``check`` looks at too.
        """
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                f"{op}: torch.distributed.init_process_group must have been called "
                "(torchrun starts the processes)"
            )
        self.op, self.group = op, group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self.traffic: dict[str, int] = {} if traffic is None else traffic
        self._stage = "agreement"
        failed: Exception | None = None
        try:
            self.own = check()
        # Whatever it is, the others would wait for this rank.
        except Exception as error:
            failed = error
        rows = [0, 0]
        if failed is None:
            rows = [len(self.own), 0 if second is None else len(second)]
        mine = _Statement(
            {"torch": torch.__version__, "dhcl_ops": __version__, "op": op, **settings},
            str(failed) if failed is not None else None,
        )
        with self.stage("agreement"):
            every = self._agree(mine, rows, failed)
        self.device = self.own.device
        self.starts: list[int] = [0, *itertools.accumulate(every[:, 0].tolist())]
        self.second_starts: list[int] = [0, *itertools.accumulate(every[:, 1].tolist())]
        self.total = self.starts[-1]
        if self.total > 2**31 - 1:
            raise ValueError(f"{op}: at most 2147483647 rows in all (got {self.total})")

    def _agree(self, mine: _Statement, rows: list[int], failed: Exception | None) -> torch.Tensor:
        """The numbers of rows of every rank (world, 2), once all ranks have said the same.

        A digest of what is said is enough as long as that holds, since a loss agrees in each step.
        """
        said = repr(sorted(mine.settings.items())).encode()
        digest = int.from_bytes(hashlib.sha256(said).digest()[:8], "little", signed=True)
        words = torch.tensor([digest, failed is not None, *rows], device=self._messenger())
        parts = [torch.empty_like(words) for _ in range(self.world)]
        dist.all_gather(parts, words, group=self.group)
        self.count((self.world - 1) * words.numel() * words.element_size())
        heard = torch.stack(parts).cpu()
        if bool(heard[:, 1].any()) or len(heard[:, 0].unique()) > 1:
            every: list[Any] = [None] * self.world
            dist.all_gather_object(every, mine, group=self.group)
            if failed is not None:
                raise failed
            self._compare(every)
        return heard[:, 2:]

    def _messenger(self) -> torch.device:
        """Where words are exchanged: on the CPU if a backend of the group can, else beside it."""
        if "cpu" in dist.get_backend_config(self.group):
            return torch.device("cpu")
        return torch.accelerator.current_accelerator() or torch.device("cpu")

    def _compare(self, every: list[_Statement]) -> None:
        for rank, statement in enumerate(every):
            if statement.error is not None:
                raise ValueError(f"{self.op}: refused on rank {rank} ({statement.error})")
            for name, value in every[0].settings.items():
                other = statement.settings.get(name)
                if other != value:
                    raise ValueError(
                        f"{self.op}: {name} must be equal on all ranks "
                        f"(got {value!r} on rank 0 and {other!r} on rank {rank})"
                    )

    # -- whose a row is --

    @property
    def begin(self) -> int:
        """The first own row."""
        return self.starts[self.rank]

    @property
    def end(self) -> int:
        """The row behind the last own one."""
        return self.starts[self.rank + 1]

    @property
    def rows(self) -> int:
        """How many rows this rank owns."""
        return self.end - self.begin

    def owners(self, ids: torch.Tensor) -> torch.Tensor:
        """The rank that owns each row."""
        ends = torch.tensor(self.starts[1:], device=ids.device)
        return torch.bucketize(ids.long(), ends, right=True)

    def foreign(self, ids: torch.Tensor) -> torch.Tensor:
        """The distinct rows among these which others own, ascending."""
        marks = self.marked(ids)
        marks[self.begin : self.end] = False
        return marks.nonzero().squeeze(1).to(ids.dtype)

    def marked(self, *ids: torch.Tensor) -> torch.Tensor:
        """Of all rows (total,) bool whether they are among these.

        A byte for each row of all ranks takes less memory than sorting what names many of them.
        """
        marks = torch.zeros(self.total, dtype=torch.bool, device=self.device)
        for each in ids:
            marks[each] = True
        return marks

    # -- stages --

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What is sent inside counts for this stage, and a lost peer is named with it."""
        before, self._stage = self._stage, name
        try:
            yield
        except PeerError:
            raise
        except RuntimeError as error:
            if not is_lost_peer(error):
                raise
            raise self._lost(error) from error
        finally:
            self._stage = before

    def _lost(self, error: Exception) -> PeerError:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return PeerError(
            f"{self.op}: rank {self.rank} of {self.world} lost another rank in the stage "
            f'"{self._stage}" ({first})'
        )

    def count(self, size: int) -> None:
        """Note so many bytes as sent to others."""
        self.traffic[self._stage] = self.traffic.get(self._stage, 0) + size

    # -- all to all --

    def _bytes(self, tensor: torch.Tensor) -> torch.Tensor:
        size = tensor.element_size() * tensor.shape[1:].numel()
        # A single element counts as contiguous with any stride, but only one of 1 can be viewed.
        dense = tensor.contiguous()
        flat = dense.as_strided((dense.numel(),), (1,), dense.storage_offset()).view(torch.uint8)
        return flat.view(-1, size) if size else flat.view(len(tensor), 0)

    def exchange(self, flat: torch.Tensor, give: list[int], take: list[int]) -> torch.Tensor:
        """Send ``give[r]`` consecutive rows to each rank r, and get ``take[r]`` from it."""
        got = flat.new_empty(sum(take), *flat.shape[1:])
        if got.shape[1:].numel() == 0:
            return got
        send, receive = self._bytes(flat), self._bytes(got)
        dist.all_to_all_single(receive, send, take, give, group=self.group)
        self.count((sum(give) - give[self.rank]) * send.shape[1])
        return got

    def _counts(self, counts: torch.Tensor) -> tuple[list[int], list[int]]:
        other = torch.empty_like(counts)
        dist.all_to_all_single(other, counts, group=self.group)
        self.count((self.world - 1) * 8)
        return counts.tolist(), other.tolist()

    def route(self, ids: torch.Tensor, *columns: torch.Tensor) -> list[torch.Tensor]:
        """Send each entry to the owner of its row; entries of one sender keep their order."""
        return self.send(self.owners(ids), ids, *columns)

    def send(self, ranks: torch.Tensor, *columns: torch.Tensor) -> list[torch.Tensor]:
        """Send each entry to a rank; they come in the order of the senders, and of each one's."""
        order = ranks.argsort(stable=True)
        give, take = self._counts(torch.bincount(ranks, minlength=self.world))
        return [self.exchange(column[order], give, take) for column in columns]

    def fetch(self, ids: torch.Tensor, *tables: torch.Tensor) -> list[torch.Tensor]:
        """These rows, ascending, of tables whose own rows every rank gives."""
        give, take, asked = self._ask(ids)
        return [self.exchange(table[asked], give, take) for table in tables]

    def fetch_lines(
        self, ids: torch.Tensor, offsets: torch.Tensor, *entries: torch.Tensor
    ) -> list[torch.Tensor]:
        """These lines, ascending, of a matrix in CSR form: their lengths, and their entries."""
        give, take, asked = self._ask(ids)
        sizes = offsets.diff()[asked]
        lengths = self.exchange(sizes, give, take)
        owner = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
        place = torch.arange(len(owner), device=sizes.device) - (sizes.cumsum(0) - sizes)[owner]
        place += offsets[asked][owner]
        out = [int(part.sum()) for part in sizes.split(give)]
        into = [int(part.sum()) for part in lengths.split(take)]
        return [lengths, *(self.exchange(entry[place], out, into) for entry in entries)]

    def _ask(self, ids: torch.Tensor) -> tuple[list[int], list[int], torch.Tensor]:
        """Tell every owner which of its rows are wanted: rows to give and take, and own places."""
        counts = torch.bincount(self.owners(ids), minlength=self.world)
        take, give = self._counts(counts)
        asked = self.exchange(ids.int(), take, give).long() - self.begin
        return give, take, asked

    # -- all gather --

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        """The rows of all ranks, one after another; shares may differ in length."""
        rows = torch.tensor([len(own)], device=own.device)
        lengths = [torch.empty_like(rows) for _ in range(self.world)]
        dist.all_gather(lengths, rows, group=self.group)
        self.count((self.world - 1) * 8)
        return self.gather_shares(own, [int(length) for length in lengths])

    def gather_shares(self, own: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        """The same where every rank knows how many rows each one gives."""
        padded = own.new_zeros(max(sizes), *own.shape[1:])
        padded[: len(own)] = own
        sent = self._bytes(padded)
        every = [torch.empty_like(sent) for _ in range(self.world)]
        dist.all_gather(every, sent, group=self.group)
        self.count((self.world - 1) * sent.numel())
        parts = [part[:size] for part, size in zip(every, sizes, strict=True)]
        return torch.cat(parts).reshape(-1).view(own.dtype).view(sum(sizes), *own.shape[1:])

    # -- half ring --

    def half(self, rank: int) -> int:
        """Rows in the first half of a rank's share."""
        return (self.starts[rank + 1] - self.starts[rank]) // 2

    def pieces(self, rank: int, size: int) -> list[tuple[int, int]]:
        """A rank's rows in pieces of at most ``size``, none of which lies in both its halves."""
        rows, middle = self.starts[rank + 1] - self.starts[rank], self.half(rank)
        cuts = [*range(0, middle, size), *range(middle, rows, size), rows]
        return list(itertools.pairwise(cuts))

    def visits(
        self,
        size: int,
        outline: Callable[[int, int, int], list[Sequence[int]]],
        give: Callable[[int, int], list[torch.Tensor]],
        take: Callable[[slice, list[torch.Tensor]], object],
    ) -> Iterator[Visit]:
        """Pieces of other ranks' rows, so that each pair of rows of two ranks meets once.

        In step s, rank r visits rank r - s, for s up to half the number of ranks. If that is even,
        the last step would have two ranks meet at both: there the lower one's first half of the
        rows receives, and its second half visits. While a piece is here the next one is under way,
        and so is what the two before it have found.

        Args:
            size: most rows of a piece, the same on every rank.
            outline: of a piece (rank, begin, end), the shape of each table's part.
            give: of a piece (begin, end) of own rows, the parts themselves.
            take: gets a slice of own rows and what they found on their visit, which comes home at
                some time before the iteration ends.
        """
        plan = list(self._plan(size))
        home = _WayHome(self, take)
        coming = self._start(plan[0], outline, give) if plan else None
        for place, step in enumerate(plan):
            assert coming is not None
            tables, works, kept = coming
            for work in works:
                work.wait()
            del kept
            after = plan[place + 1] if place + 1 < len(plan) else None
            coming = None if after is None else self._start(after, outline, give)
            visit = Visit(tables, step.first, step.mine, step.owner, [])
            yield visit
            home.leave(step, visit.found)
            del tables, visit
        home.end()

    def _given(self, rank: int, step: int) -> int:
        """The first of a rank's rows that goes on a visit in this step: all, or the second half."""
        last = 2 * step == self.world
        return self.half(rank) if last and rank < self.world // 2 else 0

    def _plan(self, size: int) -> Iterator[_Step]:
        for step in range(1, self.world // 2 + 1):
            host, owner = (self.rank - step) % self.world, (self.rank + step) % self.world
            meets_all = not (2 * step == self.world and self.rank < owner)
            mine = slice(0, self.rows if meets_all else self.half(self.rank))
            several = [
                [piece for piece in self.pieces(rank, size) if piece[0] >= self._given(rank, step)]
                for rank in range(self.world)
            ]
            away, here = several[self.rank], several[owner]
            # As many swaps on every rank as the one with the most pieces needs.
            for place in range(max(len(pieces) for pieces in several)):
                out = away[place] if place < len(away) else (0, 0)
                into = here[place] if place < len(here) else (0, 0)
                first = self.starts[owner] + into[0]
                yield _Step(mine, out, into, owner, host, first, slice(*out))

    def _start(
        self,
        step: _Step,
        outline: Callable[[int, int, int], list[Sequence[int]]],
        give: Callable[[int, int], list[torch.Tensor]],
    ) -> tuple[list[torch.Tensor], list[Any], list[torch.Tensor]]:
        mine = give(*step.out)
        shapes = outline(step.owner, *step.into)
        tables = [table.new_empty(tuple(shape)) for table, shape in zip(mine, shapes, strict=True)]
        send = [part for part in mine if part.numel()]
        works = self.post(step.host, send, step.owner, [part for part in tables if part.numel()])
        return tables, works, send

    def post(
        self, to: int, send: list[torch.Tensor], of: int, receive: list[torch.Tensor]
    ) -> list[Any]:
        """Begin to send to one rank and to receive from another."""
        sent = [self._bytes(part).reshape(-1) for part in send]
        taken = [self._bytes(part).reshape(-1) for part in receive]
        ops = [dist.P2POp(dist.isend, part, self._peer(to), self.group) for part in sent]
        ops += [dist.P2POp(dist.irecv, part, self._peer(of), self.group) for part in taken]
        self.count(sum(part.numel() for part in sent))
        return list(dist.batch_isend_irecv(ops)) if ops else []

    def _peer(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


class _Step(NamedTuple):
    mine: slice
    out: tuple[int, int]
    into: tuple[int, int]
    owner: int
    host: int
    first: int
    away: slice


class _Parcel(NamedTuple):
    """What is under way from one visit, until its works are done."""

    step: _Step
    send: list[torch.Tensor]
    receive: list[torch.Tensor]
    works: list[Any]


class _WayHome:
    """What visitors found, on its way to their owner while other visitors are met.

    Nothing can be received before its length is known, so lengths go first. Each visit announces
    the lengths of what it leaves, sends off what the one before has announced, and takes what the
    one before that has sent: so much is under way, and no rank waits for another one's products
    that were begun after its own.
    """

    def __init__(self, shards: Shards, take: Callable[[slice, list[torch.Tensor]], object]) -> None:
        self._shards, self._take = shards, take
        self._announced: tuple[_Parcel, list[torch.Tensor]] | None = None
        self._sent: _Parcel | None = None

    def leave(self, step: _Step, found: list[torch.Tensor]) -> None:
        """Begin to send what a visitor found, and go on with what is under way."""
        self._arrive()
        self._send()
        lengths = torch.tensor([len(tensor) for tensor in found], device=self._shards.device)
        theirs = torch.empty_like(lengths)
        works = self._shards.post(step.owner, [lengths], step.host, [theirs])
        self._announced = _Parcel(step, [lengths], [theirs], works), found

    def end(self) -> None:
        """Wait for all that is under way."""
        self._arrive()
        self._send()
        self._arrive()

    def _send(self) -> None:
        if self._announced is None:
            return
        (step, _, (lengths,), works), found = self._announced
        self._announced = None
        for work in works:
            work.wait()
        out = [
            tensor.new_empty(length, *tensor.shape[1:])
            for tensor, length in zip(found, lengths.tolist(), strict=True)
        ]
        send = [tensor.contiguous() for tensor in found if tensor.numel()]
        receive = [part for part in out if part.numel()]
        works = self._shards.post(step.owner, send, step.host, receive)
        self._sent = _Parcel(step, send, out, works)

    def _arrive(self) -> None:
        if self._sent is None:
            return
        parcel, self._sent = self._sent, None
        for work in parcel.works:
            work.wait()
        self._take(parcel.step.away, parcel.receive)
