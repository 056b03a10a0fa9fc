"""What the losses over several ranks are compared with: one process that has all proxies."""

import torch
import torch.distributed as dist

import dhcl_ops
from dhcl_ops import sharded
from dhcl_ops._csr import sparse_tensor
from tests.ops.stages import random_graph

K, D = 47, 24

# Options of debiased_contrastive_loss; a function of (batch, proxies) where they depend on these.
OPTIONS = {
    "defaults": {},
    "debiased": {"kappa": 0.7, "beta": 0.4},
    "tau_plus": {"tau_plus": 0.05, "beta": 1.0},
    "kappa by row": {"kappa": "row"},
    "through": {"beta": 0.6, "kappa": 0.3, "hardness_gradient": "through"},
    "each": {"positives": "each", "proxy_labels": True, "kappa": 0.4, "beta": 0.2},
    "sum": {"positives": "sum", "proxy_labels": True},
    "mean": {"positives": "mean", "proxy_labels": True, "beta": 0.5},
    "listed": {"exclude": "columns", "reduction": "sum"},
    "groups": {"exclude": "groups", "kappa": 0.5, "reduction": "none"},
    "chunks": {"chunk_size": 5, "beta": 0.1, "temperature": 0.2},
    "weights": {"weights": "columns", "beta": 0.2},
    "weights, through": {
        "weights": "columns", "beta": 0.5, "hardness_gradient": "through", "reduction": "none",
    },
    "weights of classes": {
        "weights": "classes", "positives": "each", "proxy_labels": True, "chunk_size": 7,
    },
    "fast": {"precision": "fast"},
    "float64": {"dtype": torch.float64, "beta": 0.3},
    "bfloat16": {"dtype": torch.bfloat16},
}  # fmt: skip


def unit(seed, rows, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, D, generator=generator)).to(dtype)


def shares(rows, rank, world):
    """Uneven shares, of which the second rank has none."""
    parts = world * (world + 1) // 2
    sizes = [rows * (place + 1) // parts for place in range(world)]
    sizes[1] = 0
    sizes[0] += rows - sum(sizes)
    begin = sum(sizes[:rank])
    return slice(begin, begin + sizes[rank])


def arguments(name, dtype):
    """A batch (9, d) and proxies (K, d) of one process, with all options."""
    options = {key: value for key, value in OPTIONS[name].items() if key != "dtype"}
    generator = torch.Generator().manual_seed(3)
    features, proxies = unit(1, 9, dtype), unit(2, K, dtype)
    # Logits that debiasing does not clamp.
    features = torch.nn.functional.normalize(features + proxies[:9].roll(1, 0)).to(dtype)
    labels = torch.randint(0, K, (9,), generator=generator)
    # Of equal proxies the first one counts as the hardest, wherever they lie.
    proxies[40] = proxies[3]
    if options.get("kappa") == "row":
        options["kappa"] = torch.rand(9, generator=generator) * 2
    if options.get("proxy_labels"):
        options["proxy_labels"] = torch.arange(K) % 6
        labels = labels % 6
    if options.get("exclude") == "columns":
        options["exclude"] = torch.randint(-1, K, (9, 4), generator=generator)
    if "weights" in options:
        options["weights"] = lists(generator, options["weights"] == "classes")
    if options.get("exclude") == "groups":
        options["exclude"] = torch.arange(9) % 4 - 1, torch.arange(K) % 5
    return features, proxies, labels, options


def lists(generator, of_classes):
    """Six lists, one of them empty, of columns or of eight classes of the proxies."""
    entries = 8 if of_classes else K
    sizes = [0, 3, entries, 1, 5, 7]
    chosen = [torch.randperm(entries, generator=generator)[:size] for size in sizes]
    logs = -3 * torch.rand(sum(sizes), generator=generator)
    logs[::4] = -torch.inf
    members = torch.arange(K) * 5 % K
    ends = torch.arange(entries + 1) * K // entries
    found = dhcl_ops.NegativeWeights(
        torch.randint(0, 6, (9,), generator=generator), torch.tensor([0, *sizes]).cumsum(0),
        torch.cat(chosen), logs,
    )  # fmt: skip
    return found._replace(members=members, member_offsets=ends) if of_classes else found


def own_lists(weights, rows, columns):
    """The lists of own rows, and of classes the members among own columns."""
    own = weights._replace(rows=weights.rows[rows])
    if weights.members is None or columns == slice(None):
        return own
    here = (weights.members >= columns.start) & (weights.members < columns.stop)
    ends = torch.nn.functional.pad(here.cumsum(0), (1, 0))[weights.member_offsets]
    return own._replace(members=weights.members[here], member_offsets=ends)


def own_part(options, rows, columns):
    """The options of one rank."""
    own = dict(options)
    if "weights" in own:
        own["weights"] = own_lists(own["weights"], rows, columns)
    if isinstance(own.get("kappa"), torch.Tensor):
        own["kappa"] = own["kappa"][rows]
    if "proxy_labels" in own:
        own["proxy_labels"] = own["proxy_labels"][columns]
    if isinstance(own.get("exclude"), tuple):
        own["exclude"] = own["exclude"][0][rows], own["exclude"][1][columns]
    elif "exclude" in own:
        own["exclude"] = own["exclude"][rows]
    return own


def distance(got, wanted):
    """The largest difference, over the largest wanted value where that is above 1."""
    if got.numel() == 0:
        return 0.0
    finite = wanted.isfinite()
    if not torch.equal(got[~finite], wanted[~finite]):
        return torch.inf
    largest = max(float(wanted[finite].abs().max()) if finite.any() else 0.0, 1.0)
    return float((got[finite] - wanted[finite]).abs().max()) / largest if finite.any() else 0.0


def compared(mine, one, features):
    """Differences of loss, gradient and stats of two calls, each (loss, stats)."""
    found = {}
    gradients = []
    for loss, _ in (mine, one):
        weights = torch.arange(1.0, loss.numel() + 1, dtype=loss.dtype).reshape(loss.shape)
        gradients.append(torch.autograd.grad((loss * weights).sum(), features)[0].double())
    found["loss"] = distance(mine[0].detach(), one[0].detach())
    found["gradient"] = distance(*(gradient for gradient in gradients))
    same = mine[0].dtype == one[0].dtype and mine[0].shape == one[0].shape
    found["kind"] = 0.0 if same else torch.inf
    return found


def of_stats(mine, one):
    found = {name: distance(getattr(mine, name), getattr(one, name)) for name in mine._fields}
    for name in ("hardest_index", "num_negatives"):
        same = torch.equal(getattr(mine, name), getattr(one, name))
        found[name] = 0.0 if same else torch.inf
    return found


def debiased(name, group):
    """Differences of debiased_contrastive_loss from one process, of this rank's rows."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    dtype = OPTIONS[name].get("dtype", torch.float32)
    features, proxies, labels, options = arguments(name, dtype)
    rows = shares(9, world - 1 - rank, world)
    columns = shares(K, rank, world)
    own = features[rows].clone().requires_grad_()
    mine = sharded.debiased_contrastive_loss(
        own, proxies[columns], labels[rows], return_stats=True, group=group,
        **own_part(options, rows, columns),
    )  # fmt: skip
    one = dhcl_ops.debiased_contrastive_loss(
        own, proxies, labels[rows], return_stats=True, **own_part(options, rows, slice(None))
    )
    with torch.no_grad():
        without = sharded.debiased_contrastive_loss(
            own, proxies[columns], labels[rows], group=group, **own_part(options, rows, columns)
        )
    found = compared(mine, one, own) | of_stats(mine[1], one[1])
    found["without gradient"] = distance(without, mine[0].detach())
    return found


# ---- over a bank --------------------------------------------------------------------------------

N = 53

# Options of hybrid_contrastive_loss.
HYBRIDS = {
    "H0": {"instance_weight": 0.0},
    "H1": {"kappa": 0.25, "beta": 0.1},
    "H2": {"prototype_weight": 0.0, "instance_weight": 1.0, "instance_positives": "class"},
    "both, through": {
        "instance_positives": "class", "beta": 0.5, "hardness_gradient": "through",
        "tau_plus": 0.02, "reduction": "none",
    },
    "hardest": {"instance_positives": "hardest", "beta": 0.2},
    "cross-camera": {"instance_positives": "cross-camera", "cameras": True, "kappa": 0.2},
    "suspects out": {"suspects": True, "instance_positives": "class", "kappa": 0.3},
    "graph": {"false_negatives": True, "beta": 0.1, "instance_weight": 0.5},
    "graph, through, suspects out": {
        "false_negatives": True, "suspects": True, "beta": 0.4, "hardness_gradient": "through",
        "instance_positives": "hardest", "reduction": "none",
    },
    "graph, of a class": {
        "false_negatives": True, "instance_positives": "class", "instance_weight": 1.0,
    },
    "suspects counted": {"suspects": True, "suspects_as": "kappa", "instance_weight": 0.5},
}  # fmt: skip


def labels_of_images():
    return torch.randint(-1, 7, (N,), generator=torch.Generator().manual_seed(5))


def false_negatives_of_both(group, labels=None, entries=400):
    """Lists of own images over several ranks and in one process, and those of all images."""
    own = shares(N, dist.get_rank(group), dist.get_world_size(group))
    labels = labels_of_images() if labels is None else labels
    offsets, columns, values = random_graph(N, entries, 3)
    lines = offsets[own.start : own.stop + 1]
    part = slice(int(lines[0]), int(lines[-1]))
    graph = sparse_tensor(lines - lines[0], columns[part], values[part], N)
    traffic = {}
    mine = sharded.graph_false_negatives(labels[own], graph, 0.3, group=group, traffic=traffic)
    world = dist.get_world_size(group)
    most = max(len(labels[shares(N, rank, world)]) for rank in range(world))
    assert traffic["labels"] == (world - 1) * (16 + 4 * most)
    one = dhcl_ops.graph_false_negatives(labels, sparse_tensor(offsets, columns, values), 0.3)
    first, last = (int(one.offsets[place]) for place in (own.start, own.stop))
    wanted = dhcl_ops.FalseNegatives(
        one.offsets[own.start : own.stop + 1] - first, one.classes[first:last], one.logs[first:last]
    )
    return mine, wanted, one


def unlike_lists(group):
    """What is not as in one process of the lists of own images, by the labels' kind."""
    labels = labels_of_images()
    kinds = {
        "plain": (labels, 400), "all outliers": (torch.full_like(labels, -1), 400),
        "gaps": (torch.where(labels < 0, labels, labels * 3 + 2), 400), "no pairs": (labels, 0),
    }  # fmt: skip
    wrong = []
    for name, given in kinds.items():
        mine, wanted, _ = false_negatives_of_both(group, *given)
        pairs = zip(mine._fields, mine, wanted, strict=True)
        wrong += [
            f"{name} {field}"
            for field, a, b in pairs
            if a.dtype != b.dtype or not torch.equal(a, b)
        ]
    return wrong


def two_banks(group):
    """A bank of all ranks and the same of one process, with this rank's rows and loose labels."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    own = shares(N, rank, world)
    labels = labels_of_images()
    loose = torch.where(labels < 0, labels, labels // 2)
    bank = sharded.MemoryBank(own.stop - own.start, D, group=group)
    one = dhcl_ops.MemoryBank(N, D)
    for each, part in ((bank, own), (one, slice(None))):
        each.init(unit(4, N)[part])
        each.set_labels(labels[part])
    return bank, one, loose, own


def suspects_of_both(group):
    """Whether suspects are those of one process; also where loose labels have gaps, or are none."""
    bank, one, loose, own = two_banks(group)
    wrong = []
    for name, given in (
        ("plain", loose),
        ("gaps", torch.where(loose < 0, loose, loose * 10**12)),
        ("none", torch.full_like(loose, -1)),
    ):
        mine = sharded.suspected_false_negatives(bank, given[own])
        whole = dhcl_ops.suspected_false_negatives(one, given)
        wrong += [
            f"{name} {field}"
            for field in mine._fields
            if not torch.equal(getattr(mine, field), getattr(whole, field))
        ]
    return wrong


def hybrid(name, group):
    """Differences of hybrid_contrastive_loss from one process, of this rank's rows."""
    bank, one, loose, own = two_banks(group)
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    options = dict(HYBRIDS[name])
    mine_only, one_only = {}, {}
    if options.pop("suspects", False):
        mine_only["suspects"] = sharded.suspected_false_negatives(bank, loose[own])
        one_only["suspects"] = dhcl_ops.suspected_false_negatives(one, loose)
    if options.pop("false_negatives", False):
        mine_only["false_negatives"], _, one_only["false_negatives"] = false_negatives_of_both(
            group
        )
    if options.get("cameras"):
        options["cameras"] = torch.arange(N) * 5 % 3
    rows = shares(11, world - 1 - rank, world)
    indices = (torch.arange(11) * 17 % N)[rows]
    features = torch.nn.functional.normalize(unit(6, 11)[rows] + one.features[indices])
    features.requires_grad_()
    mine = sharded.hybrid_contrastive_loss(
        features, bank, indices, return_stats=True, **options, **mine_only
    )
    whole = dhcl_ops.hybrid_contrastive_loss(
        features, one, indices, return_stats=True, **options, **one_only
    )
    found = compared(mine, whole, features)
    apart = options.get("cameras")
    positives = bank.hardest_positives(features, indices, apart)
    same = torch.equal(positives, one.hardest_positives(features, indices, apart))
    found["hardest positives"] = 0.0 if same else torch.inf
    for part in ("prototypes", "instances"):
        stats = getattr(mine[1], part), getattr(whole[1], part)
        if stats[1] is not None:
            found |= {f"{part} {key}": value for key, value in of_stats(*stats).items()}
            found[f"{part} share clamped"] = -float(stats[1].clamped_fraction)
    return found


def as_a_module(group):
    """DHCLLoss with suspects, which it sets itself, and with false negatives by a graph."""
    bank, one, loose, own = two_banks(group)
    found = []
    for kappa in (0.25, 0.0):
        mine, whole = sharded.DHCLLoss(kappa=kappa), dhcl_ops.DHCLLoss(kappa=kappa)
        mine.set_suspects(bank, loose[own])
        whole.set_suspects(one, loose)
        if not kappa:
            lists, _, lists_of_one = false_negatives_of_both(group)
            mine.set_false_negatives(lists)
            whole.set_false_negatives(lists_of_one)
        indices = torch.arange(4)
        features = unit(6, 4)
        found.append(distance(mine(features, bank, indices), whole(features, one, indices)))
    return max(found)


# ---- what is sent, and refused ------------------------------------------------------------------


def traffic_of(name, group):
    """Bytes sent by this rank in a call, and what they should be."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    features, proxies, labels, options = arguments(name, torch.float32)
    rows, columns = shares(9, world - 1 - rank, world), shares(K, rank, world)
    sent = {}
    sharded.debiased_contrastive_loss(
        features[rows].requires_grad_(), proxies[columns], labels[rows], group=group, traffic=sent,
        **own_part(options, rows, columns),
    )  # fmt: skip
    most = max(len(features[shares(9, place, world)]) for place in range(world))
    words = 2 + 4 * (options.get("exclude") is not None)
    each = options.get("positives") == "each"
    slots = 0
    if each:
        classes = [options["proxy_labels"][shares(K, place, world)] for place in range(world)]
        slots = max(int((part == label).sum()) for part in classes for label in labels)
    return sent, {
        "agreement": 32 * (world - 1),
        "listed weights": listed_bytes(options.get("weights"), world),
        "batch": (world - 1) * most * (4 * D + 8 * words),
        "sums of the loss": (world - 1) * 9 * (72 + 8 * slots),
        "gradient": 4 * D * (9 - (rows.stop - rows.start)),
    }


def listed_bytes(weights, world):
    """What lists of batches send: their lengths, and the entries of the longest batch's."""
    if weights is None:
        return 0
    batches = [weights.rows[shares(9, place, world)] for place in range(world)]
    entries = max(int(weights.offsets.diff()[rows].sum()) for rows in batches)
    return (world - 1) * (4 * max(map(len, batches)) + 12 * entries)


def traffic_of_lists(group):
    """Bytes that this rank sends for false negatives by a graph, and what they should be."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    bank, _, _, own = two_banks(group)
    lists, _, whole = false_negatives_of_both(group)
    indices = torch.arange(11) * 17 % N
    rows = indices[shares(11, world - 1 - rank, world)]
    sharded.hybrid_contrastive_loss(unit(6, len(rows)), bank, rows, false_negatives=lists)
    here = indices[(indices >= own.start) & (indices < own.stop)]
    named = torch.cat(
        [whole.classes[whole.offsets[i] : whole.offsets[i + 1]] for i in here] or [here]
    )
    first, behind = bank.prototype_starts[rank : rank + 2]
    away = int(((named < first) | (named >= behind)).sum())
    return bank.traffic["listed weights"], 12 * away + 8 * (world - 1)


def backward_alone(group):
    """The gradient of one rank that goes backward while the others do not, and its bank moves."""
    rank = dist.get_rank(group)
    bank, _, _, _ = two_banks(group)
    indices = torch.arange(5)
    features = unit(6, 5).requires_grad_()
    losses = [sharded.hybrid_contrastive_loss(features, bank, indices) for _ in range(2)]
    (before,) = torch.autograd.grad(losses[0], features)
    bank.update_(unit(7, 5), indices)
    after = before
    twice = None
    if rank == 0:
        (after,) = torch.autograd.grad(losses[1], features, create_graph=True)
        try:
            (after.sum() + features.sum()).backward()
        except RuntimeError as error:
            twice = str(error)
    dist.barrier(group)
    return torch.equal(before, after), twice


def refused_calls(group):
    """Wrong calls by name."""
    rank = dist.get_rank(group)
    bank, one, _, _ = two_banks(group)
    unlabelled = sharded.MemoryBank(3, D, group=group)
    x, proxies, labels = unit(1, 4), unit(2, 10), torch.arange(4)
    broken, far, images = x.clone(), proxies.clone(), torch.arange(4)
    if rank == 1:
        broken[2, 1] = torch.nan
        far[7, 0] = torch.inf

    def loss(features=x, columns=proxies, positive=labels, **options):
        return sharded.debiased_contrastive_loss(
            features, columns, positive, group=group, **options
        )

    def over(features=x, memory=bank, indices=images, **options):
        return sharded.hybrid_contrastive_loss(features, memory, indices, **options)

    return {
        "a rank's features": lambda: loss(broken),
        "a rank's proxies": lambda: loss(x, far),
        "temperature": lambda: loss(temperature=0.05 + 0.01 * rank),
        "width": lambda: loss(unit(1, 4)[:, : D - rank], unit(2, 10)[:, : D - rank]),
        "dtype": lambda: loss(x.half() if rank else x),
        "gradient": lambda: loss(x.clone().requires_grad_(rank == 1)),
        "proxies' gradient": lambda: loss(x, proxies.clone().requires_grad_()),
        "label": lambda: loss(positive=labels + 17 * rank),
        "excluded": lambda: loss(exclude=torch.full((4, 2), 20 * rank)),
        "excluded widths": lambda: loss(exclude=torch.full((4, 2 + rank), -1)),
        "no positive": lambda: loss(positive=labels + 2 * rank, proxy_labels=torch.arange(10) % 5),
        "kappa": lambda: loss(kappa=torch.full((4,), 25.0 * rank)),
        "no proxies": lambda: loss(columns=proxies[:0]),
        "chunk": lambda: loss(chunk_size=0),
        "index": lambda: over(indices=images + N * rank),
        "cameras": lambda: over(instance_positives="cross-camera", cameras=labels),
        "no cameras": lambda: over(instance_positives="cross-camera"),
        "hardest": lambda: bank.hardest_positives(unit(1, 4), images + N * rank),
        "weights": lambda: over(instance_weight=0.0, prototype_weight=float(rank)),
        "kappa over a bank": lambda: over(kappa=1000.0),
        "a bank of one process": lambda: over(memory=one),
        "no labels": lambda: over(memory=unlabelled),
        "loose labels": lambda: sharded.suspected_false_negatives(bank, labels),
    }


def refused_lists(group):
    """Wrong calls with lists, by name."""
    rank = dist.get_rank(group)
    bank, _, _, _ = two_banks(group)
    x, proxies, labels = unit(1, 4), unit(2, 10), torch.arange(4)
    found, _, whole = false_negatives_of_both(group)
    ends, columns, logs = torch.arange(5) * 2, torch.arange(8), torch.zeros(8)
    weights = dhcl_ops.NegativeWeights(labels, ends, columns, logs)
    classes = weights._replace(members=columns, member_offsets=torch.arange(9))
    fewer = classes._replace(entries=columns % 4, member_offsets=ends)

    def lines(columns):
        return sparse_tensor(ends.new_zeros(5), ends[:0], logs[:0], columns)

    def loss(**options):
        return sharded.debiased_contrastive_loss(x, proxies, labels, group=group, **options)

    def over(**options):
        return sharded.hybrid_contrastive_loss(x, bank, labels, **options)

    return {
        "a rank's list": lambda: loss(weights=weights._replace(rows=labels + 3 * rank)),
        "a rank's class": lambda: loss(weights=classes._replace(entries=columns + rank)),
        "a rank's offsets": lambda: loss(weights=weights._replace(offsets=ends * (1 + rank))),
        "a rank without lists": lambda: loss(weights=weights if rank else None),
        "other classes": lambda: loss(weights=classes if rank else fewer),
        "weights and kappa": lambda: loss(weights=weights, kappa=0.1),
        "lists of classes": lambda: over(
            false_negatives=found._replace(classes=found.classes + 100 * (1 - rank))
        ),
        "lists of a rank": lambda: over(false_negatives=found if rank else None),
        "lists of others": lambda: over(false_negatives=whole),
        "lists and kappa": lambda: over(false_negatives=found, kappa=0.2),
        "lists and suspects": lambda: over(false_negatives=found, suspects_as="kappa"),
        "a graph's width": lambda: sharded.graph_false_negatives(
            labels, lines(7 + rank), group=group
        ),
        "a graph of others": lambda: sharded.graph_false_negatives(labels, lines(9), group=group),
        "labels of a graph": lambda: sharded.graph_false_negatives(
            labels + 8 * rank, lines(8), group=group
        ),
        "scale": lambda: sharded.graph_false_negatives(labels, lines(8), 0.0, group=group),
    }


REFUSED = {
    "a rank's features": "features must be finite (got one that is not at row 2)",
    "a rank's proxies": "proxies must be finite, and similarities in float32 (got some that are "
    "not on rank 1)",
    "temperature": "temperature must be equal on all ranks (got 0.05 on rank 0",
    "width": "the features' width, dtype and device must be equal on all ranks",
    "dtype": "the features' width, dtype and device must be equal on all ranks",
    "gradient": "whether features need a gradient must be equal on all ranks (got False on rank 0",
    "proxies' gradient": "proxies must not require a gradient",
    "label": "labels must be in [0, 20) (got 20 at batch position 3) on rank 1",
    "excluded": "exclude must be in [-1, 20) (got 20 at batch position 0) on rank 1",
    "excluded widths": "exclude must be equal on all ranks (got '(2,) columns a row' on rank 0",
    "no positive": "every row needs a positive proxy (got none for batch position 3 of rank 1)",
    "kappa": "kappa must be smaller than the number of negatives (got 25 and 19 for batch position "
    "0 of rank 1)",
    "no proxies": "at least one proxy is needed (got none on any rank)",
    "chunk": "chunk_size must be >= 1 (got 0)",
    "index": "indices must be in [0, 53) (got 53 at batch position 0)",
    "cameras": "cameras must have shape (53,), one per image of all ranks",
    "no cameras": 'instance_positives="cross-camera" needs cameras (got None)',
    "hardest": "indices must be in [0, 53) (got 53 at batch position 0)",
    "weights": "prototype_weight and instance_weight must not both be 0",
    "kappa over a bank": "kappa must be smaller than the number of other prototypes (got 1000 and",
    "a bank of one process": "memory must be a sharded.MemoryBank (got MemoryBank)",
    "no labels": "call set_labels(labels) first",
    "loose labels": "loose_labels must have shape",
    "a rank's list": "weights.rows must be in [0, 4) (got 6)",
    "a rank's class": "weights.entries must be in [0, 8) (got 8)",
    "a rank's offsets": "weights.offsets must ascend up to the number of entries, 8 (got [0, 16]",
    "a rank without lists": "weights must be equal on all ranks (got 'none' on rank 0 and "
    "'columns' on rank 1)",
    "other classes": "weights must be equal on all ranks (got '4 classes' on rank 0 and '8 classes'"
    " on rank 1)",
    "weights and kappa": "weights stand in place of kappa and tau_plus (got both)",
    "lists of classes": "weights.entries must be in [0, ",
    "lists of a rank": "false_negatives must be equal on all ranks (got False on rank 0 and True",
    "lists of others": "false_negatives.offsets must have shape (",
    "lists and kappa": "weights stand in place of kappa and tau_plus (got both)",
    "lists and suspects": 'false_negatives stand in place of suspects_as="kappa" (got both)',
    "a graph's width": "the graph's width must be equal on all ranks (got (7,) on rank 0 and (8,)",
    "a graph of others": "graph must have a column for each image of all ranks (got 9 for 8 images",
    "labels of a graph": "labels must be in [-1, 8) (got 11)",
    "scale": "scale must be finite and > 0 (got 0.0)",
}
