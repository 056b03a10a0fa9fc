"""What the losses over several ranks are compared with: one process that has all proxies."""

import torch
import torch.distributed as dist

import dhcl_ops
from dhcl_ops import sharded

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
    "fast": {"precision": "fast"},
    "float64": {"dtype": torch.float64, "beta": 0.3},
    "bfloat16": {"dtype": torch.bfloat16},
}


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
    if options.get("exclude") == "groups":
        options["exclude"] = torch.arange(9) % 4 - 1, torch.arange(K) % 5
    return features, proxies, labels, options


def own_part(options, rows, columns):
    """The options of one rank."""
    own = dict(options)
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
    "suspects counted": {"suspects": True, "suspects_as": "kappa", "instance_weight": 0.5},
}  # fmt: skip


def two_banks(group):
    """A bank of all ranks and the same of one process, with this rank's rows and loose labels."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    own = shares(N, rank, world)
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(-1, 7, (N,), generator=generator)
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
    """DHCLLoss with suspects, which it sets itself."""
    bank, one, loose, own = two_banks(group)
    mine, whole = sharded.DHCLLoss(beta=0.2), dhcl_ops.DHCLLoss(beta=0.2)
    mine.set_suspects(bank, loose[own])
    whole.set_suspects(one, loose)
    indices = torch.arange(4)
    features = unit(6, 4)
    return distance(mine(features, bank, indices), whole(features, one, indices))


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
        "batch": (world - 1) * most * (4 * D + 8 * words),
        "sums of the loss": (world - 1) * 9 * (72 + 8 * slots),
        "gradient": 4 * D * (9 - (rows.stop - rows.start)),
    }


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
}
