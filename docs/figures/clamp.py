"""Draw clamp.svg: how training stops on the floor of the debiased estimate (docs/method.md).

``PYTHONPATH=. python docs/figures/clamp.py`` takes a few seconds on one core and needs matplotlib.

Generated images of identities share a common direction, as features of an untrained model do, and
differ within an identity in eight directions. A linear encoder has to turn these down. Labels are
the true identities, so that only the loss differs. Quality is the mAP of identities never seen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import normalize

from dhcl_ops import MemoryBank, debiased_contrastive_loss, evaluate_ranking
from docs.figures import style

WIDTH, VARIATIONS = 64, 8
# Shares of an image's squared length; what is left is variation within the identity.
COMMON, IDENTITY, NOISE = 0.20, 0.30, 0.02

SETTINGS: dict[str, dict[str, float]] = {
    "carried over: τ = 0.05, τ⁺ = 0.1, β = 1": {"temperature": 0.05, "tau_plus": 0.1, "beta": 1.0},
    "τ = 0.05, κ = 1, β = 0.1": {"temperature": 0.05, "kappa": 1.0, "beta": 0.1},
    "τ = 0.05, κ = 0.25, β = 0.1": {"temperature": 0.05, "kappa": 0.25, "beta": 0.1},
    "as published: τ = 0.5, τ⁺ = 0.1, β = 1": {"temperature": 0.5, "tau_plus": 0.1, "beta": 1.0},
}


class Curves(NamedTuple):
    """One training: the share of clamped rows at each step, and the mAP at some."""

    clamped: torch.Tensor  # (steps,)
    steps: list[int]
    quality: list[float]


def generated_images(identities: int, each: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (identities * each, WIDTH) and their identities."""
    generator = torch.Generator().manual_seed(seed)
    rest = WIDTH - 1 - VARIATIONS
    variation = 1.0 - COMMON - IDENTITY - NOISE
    count = identities * each
    who = torch.randn(identities, rest, generator=generator).repeat_interleave(each, 0)
    how = torch.randn(count, VARIATIONS, generator=generator)
    images = torch.cat(
        [
            torch.full((count, 1), COMMON**0.5),
            who * (IDENTITY / rest) ** 0.5,
            how * (variation / VARIATIONS) ** 0.5,
        ],
        dim=1,
    )
    noise = torch.randn(count, WIDTH, generator=generator) * (NOISE / WIDTH) ** 0.5
    return images + noise, torch.arange(identities).repeat_interleave(each)


def mean_average_precision(features: torch.Tensor, identities: torch.Tensor) -> float:
    """The mAP of every image against all others."""
    itself = torch.arange(len(identities))
    return evaluate_ranking((features, features), identities, identities, itself, itself).mAP


def train(settings: dict[str, Any], *, steps: int, every: int, identities: int = 300) -> Curves:
    """Train a linear encoder over a memory bank with these settings of the loss."""
    images, labels = generated_images(identities, 32, seed=1)
    unseen, unseen_labels = generated_images(200, 4, seed=2)
    encoder = nn.Linear(WIDTH, WIDTH, bias=False)
    nn.init.eye_(encoder.weight)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=1.5e-3)
    bank = MemoryBank(len(images), WIDTH)
    bank.init(images)
    bank.set_labels(labels)
    generator = torch.Generator().manual_seed(3)
    clamped, measured, quality = [], [], []
    for step in range(steps + 1):
        if step % every == 0:
            with torch.no_grad():
                features = normalize(encoder(unseen))
            measured.append(step)
            quality.append(mean_average_precision(features, unseen_labels))
        indices = torch.randint(0, len(images), (64,), generator=generator)
        features = normalize(encoder(images[indices]))
        loss, stats = debiased_contrastive_loss(
            features, bank.prototypes, bank.proto_of[indices], return_stats=True, **settings
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bank.update_(features.detach(), indices)
        clamped.append(stats.clamped_fraction)
    return Curves(torch.stack(clamped), measured, quality)


def draw(path: Path) -> None:
    """Train with each of the settings and draw both curves."""
    import matplotlib.pyplot as plt

    style.apply("clamp")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.9))
    looks = [*((colour, "-") for colour in style.COLOURS[:3]), (style.INK, "--")]
    for (name, settings), (colour, dashes) in zip(SETTINGS.items(), looks, strict=True):
        curves = train(settings, steps=300, every=10)
        blocks = curves.clamped[:300].view(-1, 10).mean(1)
        line = {"color": colour, "linestyle": dashes, "linewidth": 2.0}
        left.plot(torch.arange(5, 300, 10), blocks, **line)
        right.plot(curves.steps, curves.quality, label=name, **line)
    left.set_ylabel("share of clamped rows")
    right.set_ylabel("mAP, unseen identities")
    for axes in (left, right):
        axes.set(xlabel="training step", xlim=(0, 300), ylim=(-0.03, 1.03))
        style.frame(axes)
    figure.legend(*right.get_legend_handles_labels(), loc="lower center", ncols=2, frameon=False)
    figure.tight_layout(rect=(0, 0.15, 1, 1))
    figure.savefig(path, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    torch.set_num_threads(1)
    draw(Path(__file__).with_suffix(".svg"))
