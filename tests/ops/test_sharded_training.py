"""The memory bank and its losses over several processes: what one process gives, for any shares.

Four processes do everything; two and three of them are groups of their own.
"""

import datetime
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed import checkpoint

import dhcl_ops
from dhcl_ops import sharded
from dhcl_ops.sharded import shards as shards_module
from tests.ops import sharded_losses
from tests.ops.ranks import on_ranks, own_slice

WORLDS = (2, 3, 4)
N, D = 61, 20
OPTIONS = {
    "defaults": {},
    "float16": {"dtype": torch.float16},
    "options": {"momentum": 0.5, "eps": 0.01, "normalize_prototypes": True},
}
# Three ranks do all cases of the losses, two and four some of each kind.
SOME = (
    "debiased", "through", "each", "groups", "weights, through", "weights of classes",
    "H1", "H2", "both, through", "cross-camera", "graph", "graph, of a class",
)  # fmt: skip
LOSSES = [
    (world, name)
    for world in WORLDS
    for name in (*sharded_losses.OPTIONS, *sharded_losses.HYBRIDS)
    if world == 3 or name in SOME
]
LIVES = (
    ("even", "defaults"),
    ("one", "defaults"),
    ("uneven", "float16"),
    ("uneven", "options"),
)


def features_of(seed, rows=N):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, D, generator=generator))


def labels_of(seed):
    """Clusters of unlike sizes without gaps, and some outliers."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(N, generator=generator) ** 2 * 9).long() - 1
    numbers = labels[labels >= 0].unique()
    return torch.where(labels < 0, -1, torch.searchsorted(numbers, labels))


def batches(seed, world):
    """What each rank gives to an update: images that occur twice, and a feature that is NaN."""
    generator = torch.Generator().manual_seed(seed)
    given = []
    for rank in range(world):
        size = 5 + 3 * rank if rank else 0
        indices = torch.randint(0, N, (size,), generator=generator)
        indices[: size // 3] = 7
        features = torch.randn(size, D, generator=generator)
        if rank == 1:
            features[2, 3] = torch.nan
        given.append((features, indices))
    return given


def new_bank(kind, group, **options):
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    own = own_slice(kind, N, rank, world)
    return sharded.MemoryBank(own.stop - own.start, D, group=group, **options), own


def unlike(bank, one, own):
    """What is not as in one process, of what this rank holds."""
    pairs = {
        "rows by image": (bank.features, one.features[own]),
        "labels": (bank.labels, one.labels[own]),
        "rows": (bank.rows, one.features[bank.images]),
    }
    wrong = []
    if len(one._proto_of):
        first, behind = bank.prototype_starts[bank.rank : bank.rank + 2]
        pairs |= {
            "prototypes": (bank.prototypes, one.prototypes[first:behind]),
            "proto_of": (bank.proto_of.long(), one.proto_of),
            "class_sizes": (bank.class_sizes.long(), one.class_sizes),
        }
        if (bank.num_prototypes, bank.num_clusters) != (len(one.prototypes), one.num_clusters):
            wrong.append("numbers")
    return wrong + [name for name, (got, wanted) in pairs.items() if not torch.equal(got, wanted)]


def life_of_a_bank(kind, group, options):
    """Everything that a training does to a bank."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    bank, own = new_bank(kind, group, **options)
    one = dhcl_ops.MemoryBank(N, D, **options)
    wrong = []

    def look(when):
        wrong.extend(f"{when}: {what}" for what in unlike(bank, one, own))

    def update(seed):
        given = batches(seed, world)
        bank.update_(*given[rank])
        one.update_(*(torch.cat(parts) for parts in zip(*given, strict=True)))

    for each, part in ((bank, own), (one, slice(None))):
        each.init(features_of(1)[part])
    look("init")
    update(2)
    look("update without labels")
    for seed in (3, 4):
        labels = labels_of(seed)
        bank.set_labels(labels[own])
        one.set_labels(labels)
        look("labels")
        update(seed)
        update(seed + 10)
        look("update")
    for each, part in ((bank, own), (one, slice(None))):
        each.init(features_of(5)[part])
    look("init with labels")
    skipped = bank.skipped.clone()
    dist.all_reduce(skipped, group=group)
    if not torch.equal(skipped, one.skipped):
        wrong.append("skipped")
    return wrong


def edges(group):
    """All images in one class, and each in its own."""
    one = dhcl_ops.MemoryBank(N, D)
    one.init(features_of(1))
    wrong = []
    for labels in (torch.zeros(N), torch.full((N,), -1), torch.arange(N)):
        bank, own = new_bank("uneven", group)
        bank.init(features_of(1)[own])
        bank.set_labels(labels.long()[own])
        one.set_labels(labels.long())
        wrong += unlike(bank, one, own)
    return wrong


def update_of_rows(group):
    """momentum_update_ of rows by number."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    own, given = own_slice("uneven", N, rank, world), batches(2, world)
    one, skipped = features_of(1), torch.zeros(2, 1, dtype=torch.int64)
    mine = one[own].clone()
    sharded.momentum_update_(mine, *given[rank], 0.3, skipped=skipped[0], group=group)
    whole = (torch.cat(parts) for parts in zip(*given, strict=True))
    dhcl_ops.momentum_update_(one, *whole, 0.3, skipped=skipped[1])
    dist.all_reduce(skipped[0], group=group)
    return torch.equal(mine, one[own]) and torch.equal(*skipped)


# ---- state --------------------------------------------------------------------------------------


def saved(folder, group, labelled):
    """A trained bank as it is saved, and what its next update gives."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    bank, own = new_bank("uneven", group)
    bank.init(features_of(1)[own])
    if labelled:
        bank.set_labels(labels_of(3)[own])
    bank.update_(*batches(2, world)[rank])
    checkpoint.save({"bank": bank}, checkpoint_id=folder, process_group=group)


def loaded(folder, group, kind, labelled):
    """What differs from one process in a bank that another number of ranks has saved."""
    one = dhcl_ops.MemoryBank(N, D)
    one.init(features_of(1))
    if labelled:
        one.set_labels(labels_of(3))
    one.update_(*(torch.cat(parts) for parts in zip(*batches(2, 4), strict=True)))
    bank, own = new_bank(kind, group)
    # What the bank held before must not show.
    bank.init(features_of(8)[own])
    bank.set_labels(labels_of(9)[own])
    checkpoint.load({"bank": bank}, checkpoint_id=folder, process_group=group)
    wrong = unlike(bank, one, own)
    skipped = bank.skipped.clone()
    dist.all_reduce(skipped, group=group)
    if not torch.equal(skipped, one.skipped):
        wrong.append("skipped")
    # It goes on.
    indices = torch.arange(5) * 3
    rank = dist.get_rank(group)
    bank.update_(
        *((features_of(6)[:5], indices) if rank == 1 else (features_of(6)[:0], indices[:0]))
    )
    one.update_(features_of(6)[:5], indices)
    return wrong + unlike(bank, one, own)


def resharded(folder, groups, rank):
    """A state of four ranks, on two and on three of them."""
    found = {}
    for labelled in (False, True):
        place = folder / f"state {labelled}"
        saved(place, groups[4], labelled)
        for size, kind in ((2, "uneven"), (3, "even"), (4, "one")):
            if rank < size:
                found[size, labelled] = loaded(place, groups[size], kind, labelled)
        dist.barrier()
    return found


# ---- what is refused, and what is sent ----------------------------------------------------------


def message_of(call):
    try:
        call()
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def refusals(group):
    """The message of each wrong call on this rank; the bank stays as it was."""
    rank = dist.get_rank(group)
    bank, own = new_bank("even", group)
    bank.init(features_of(1)[own])
    x, labels, none = features_of(1)[own], labels_of(3)[own], torch.zeros(0, dtype=torch.int64)
    zero = x.clone()
    zero[4] = 0.0
    far = torch.full((1,), N)
    gap = torch.where(labels == 2, 3, labels)

    def state_of(rows):
        state = bank.state_dict()
        state["features"] = state["features"][:rows]
        return state

    calls = {
        "momentum": lambda: new_bank("even", group, momentum=0.3 if rank else 0.2),
        "width": lambda: sharded.MemoryBank(3, 4 + rank, group=group),
        "no images": lambda: sharded.MemoryBank(0, 4, group=group),
        "zero": lambda: bank.init(zero if rank else x),
        "shape": lambda: bank.init(x[:3] if rank else x),
        "before labels": lambda: bank.prototypes,
        "gap": lambda: bank.set_labels(gap),
        "too high": lambda: bank.set_labels(labels + 1000),
        "low": lambda: bank.set_labels(labels - 2 * rank),
        "index": lambda: bank.update_(x[:1], far if rank else far - 1),
        "dtype": lambda: bank.update_(x[:0].half() if rank else x[:0], none),
        "double": lambda: bank.update_(x[:0].double(), none),
        "rows": lambda: sharded.momentum_update_(
            x.clone(), x[:1], far if rank else far - 1, 0.2, group=group
        ),
        "rows of one rank": lambda: sharded.momentum_update_(
            x.t() if rank else x[:D].clone(), x[:0], none, 0.2, group=group
        ),
        "other call": lambda: bank.set_labels(labels) if rank else bank.init(x),
        "state": lambda: bank.load_state_dict(state_of(7)),
        "no state": lambda: bank.load_state_dict({}),
    }
    said = {name: message_of(call) for name, call in calls.items()}
    said |= {
        f"loss: {name}": message_of(call)
        for name, call in (
            sharded_losses.refused_calls(group) | sharded_losses.refused_lists(group)
        ).items()
    }
    one = dhcl_ops.MemoryBank(N, D)
    one.init(features_of(1))
    return said, unlike(bank, one, own)


def traffic_of(group):
    """Bytes sent by this rank, and what its share of them should be."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    bank, own = new_bank("even", group)
    bank.init(features_of(1)[own])
    bank.set_labels(labels_of(3)[own])
    ends = torch.tensor(bank.prototype_starts[1:])
    owner = torch.bucketize(bank.proto_of.long(), ends, right=True)
    leaving = int((owner[own] != rank).sum())
    features, indices = batches(2, world)[rank]
    bank.update_(features, indices)
    sent = int((owner[indices] != rank).sum())
    return bank.traffic, {
        "agreement": 4 * 32 * (world - 1),
        "labels": (world - 1) * (16 + 4 * -(-N // world)),
        "rows of the bank": leaving * 4 * D,
        "update": sent * (4 * D + 4) + 8 * (world - 1),
    }


def in_pieces(group):
    """A bank whose rows travel three columns at a time."""
    from dhcl_ops.sharded import bank as module

    whole = module.PIECE_BYTES, module._COLUMNS
    module.PIECE_BYTES, module._COLUMNS = 1, 3
    try:
        return life_of_a_bank("uneven", group, {})
    finally:
        module.PIECE_BYTES, module._COLUMNS = whole


# ---- lost ranks ---------------------------------------------------------------------------------


class _Away(Exception):
    """A rank leaves in the middle of a call."""


def loses_a_rank(group, stage):
    """What a rank is told, and how long it waits, if the last one leaves in this stage."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    whole = shards_module.Shards.stage
    bank, own = new_bank("even", group)
    bank.init(features_of(1)[own])

    def until(self, name):
        if rank == world - 1 and name == stage:
            raise _Away
        return whole(self, name)

    shards_module.Shards.stage = until
    started = time.monotonic()
    try:
        bank.set_labels(labels_of(3)[own])
        given, images = batches(2, world)[rank]
        bank.update_(given, images)
        features = features_of(6)[: len(images)].requires_grad_()
        size = own.stop - own.start
        lists = dhcl_ops.FalseNegatives(
            torch.arange(size + 1), torch.arange(size), -torch.ones(size)
        )
        sharded.hybrid_contrastive_loss(features, bank, images, false_negatives=lists)
        bank.state_dict()
    except sharded.PeerError as error:
        return str(error), time.monotonic() - started
    except _Away:
        return None
    finally:
        shards_module.Shards.stage = whole
    return "nothing", 0.0


STAGES = (
    "labels",
    "rows of the bank",
    "update",
    "batch",
    "listed weights",
    "sums of the loss",
    "gradient",
    "state",
)


def outcomes_on(rank, world, folder):
    """Everything that the tests look at, of this rank."""
    groups = {size: dist.new_group(list(range(size))) for size in WORLDS}
    found = {}
    for size, group in groups.items():
        if rank >= size:
            continue
        for kind, name in LIVES:
            found[size, kind, name] = life_of_a_bank(kind, group, OPTIONS[name])
        found[size, "rows"] = update_of_rows(group)
        found[size, "edges"] = edges(group)
        found[size, "traffic"] = traffic_of(group)
        for name in (name for world, name in LOSSES if world == size):
            of_bank = name in sharded_losses.HYBRIDS
            compare = sharded_losses.hybrid if of_bank else sharded_losses.debiased
            found[size, name] = compare(name, group)
        found[size, "suspects"] = sharded_losses.suspects_of_both(group)
        found[size, "module"] = sharded_losses.as_a_module(group)
        found[size, "bytes"] = [
            sharded_losses.traffic_of(name, group)
            for name in ("defaults", "each", "listed", "weights", "weights of classes")
        ]
        found[size, "lists"] = sharded_losses.unlike_lists(group)
        found[size, "bytes of lists"] = sharded_losses.traffic_of_lists(group)
        found[size, "alone"] = sharded_losses.backward_alone(group)
    found["resharded"] = resharded(folder, groups, rank)
    if rank < 2:
        found["refusals"] = refusals(groups[2])
    if rank < 3:
        found["pieces"] = in_pieces(groups[3])
    for stage in STAGES:
        limit = datetime.timedelta(seconds=2)
        group = dist.new_group([0, 1], timeout=limit)
        if rank < 2:
            found["lost", stage] = loses_a_rank(group, stage)
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return on_ranks(4, folder, outcomes_on, folder)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("kind", "options"), LIVES)
def test_bits_are_those_of_one_process(outcomes, world, kind, options):
    for rank in range(world):
        assert outcomes[rank][world, kind, options] == [], f"rank {rank}"


@pytest.mark.parametrize("world", WORLDS)
def test_one_class_and_no_class(outcomes, world):
    for rank in range(world):
        assert outcomes[rank][world, "edges"] == [], f"rank {rank}"


@pytest.mark.parametrize("world", WORLDS)
def test_an_update_of_rows_by_number(outcomes, world):
    assert all(outcomes[rank][world, "rows"] for rank in range(world))


def test_pieces_of_rows_change_no_bit(outcomes):
    for rank in range(3):
        assert outcomes[rank]["pieces"] == []


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("world", WORLDS)
def test_a_state_of_four_ranks_on_others(outcomes, world, labelled):
    for rank in range(world):
        assert outcomes[rank]["resharded"][world, labelled] == [], f"rank {rank}"


@pytest.mark.parametrize("world", WORLDS)
def test_bytes_are_those_of_the_formula(outcomes, world):
    for rank in range(world):
        sent, formula = outcomes[rank][world, "traffic"]
        assert sent == formula
    assert sum(outcomes[rank][world, "traffic"][0]["rows of the bank"] for rank in range(world)) > 0


@pytest.mark.parametrize(("world", "name"), LOSSES)
def test_losses_are_those_of_one_process_to_rounding(outcomes, world, name):
    for rank in range(world):
        for what, difference in outcomes[rank][world, name].items():
            assert difference < 2e-6, f"{what} on rank {rank}"


def test_the_losses_of_the_cases_are_not_all_clamped(outcomes):
    for name, part in (("H1", "prototypes"), ("H2", "instances"), ("both, through", "instances")):
        shares = [
            -outcomes[rank][4, name][f"{part} share clamped"]
            for rank in range(4)
            if sharded_losses.shares(11, 3 - rank, 4) != slice(0, 0)
        ]
        assert min(shares) < 1, name


@pytest.mark.parametrize("world", WORLDS)
def test_suspects_are_those_of_one_process(outcomes, world):
    for rank in range(world):
        assert outcomes[rank][world, "suspects"] == []
        assert outcomes[rank][world, "module"] < 2e-6


@pytest.mark.parametrize("world", WORLDS)
def test_false_negatives_by_the_graph_are_those_of_one_process(outcomes, world):
    for rank in range(world):
        assert outcomes[rank][world, "lists"] == []
    counted = [outcomes[rank][world, "bytes of lists"] for rank in range(world)]
    assert all(sent == stated for sent, stated in counted)
    assert sum(sent for sent, _ in counted) > 8 * world * (world - 1)


@pytest.mark.parametrize("world", WORLDS)
def test_bytes_of_the_losses_are_those_of_the_formula(outcomes, world):
    for rank in range(world):
        for sent, formula in outcomes[rank][world, "bytes"]:
            assert {key: size for key, size in sent.items() if size} == {
                key: size for key, size in formula.items() if size
            }


@pytest.mark.parametrize("world", WORLDS)
def test_backward_needs_no_other_rank_and_no_bank(outcomes, world):
    same, twice = outcomes[0][world, "alone"]
    assert same
    assert "it is not twice differentiable" in twice


def test_what_is_wrong_on_one_rank_is_refused_on_all(outcomes):
    for rank in range(2):
        said, changed = outcomes[rank]["refusals"]
        assert changed == []
        assert all(said.values()), said
        wanted = {
            "momentum": "momentum must be equal on all ranks (got 0.2 on rank 0 and 0.3 on rank 1)",
            "width": "num_features must be equal on all ranks (got 4 on rank 0 and 5 on rank 1)",
            "no images": "num_samples must be positive on some rank",
            "zero": "every feature must be finite and not zero (got 1 that are not, the first at "
            "row 4)",
            "shape": "features must have shape (30, 20), one row per image of this rank",
            "before labels": "call set_labels(labels) first",
            "gap": "(got none with label 2, and the highest is",
            "too high": "clusters must be numbered without gaps (got label 1007 for 61 images)",
            "low": "labels must be >= -1 (got -3)",
            "index": "indices must be in [0, 61) (got 61 at batch position 0)",
            "dtype": "the features' dtype must be equal on all ranks",
            "double": "features must be float32 or float16 or bfloat16 (got float64)",
            "rows": "indices must be in [0, 61) (got 61 at batch position 0)",
            "rows of one rank": "features must have shape (0, 30), one row of the bank's width",
            "other call": "op must be equal on all ranks (got 'sharded.MemoryBank.init' on rank 0",
            "state": "features must be a DTensor (61, 20) (got DTensor (7, 20))",
            "no state": "features must be a DTensor (61, 20) (got none)",
        }
        wanted |= {f"loss: {name}": words for name, words in sharded_losses.REFUSED.items()}
        for name, words in wanted.items():
            assert words in said[name], name
        if rank == 0:
            assert "refused on rank 1" in said["zero"]
            assert "refused on rank 1" in said["index"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_lost_rank_is_said_with_the_stage(outcomes, stage):
    message, seconds = outcomes[0]["lost", stage]
    assert f'rank 0 of 2 lost another rank in the stage "{stage}"' in message
    assert seconds < 10


def test_without_a_process_group():
    with pytest.raises(RuntimeError, match=r"sharded.MemoryBank: .*init_process_group"):
        sharded.MemoryBank(3, 2)
