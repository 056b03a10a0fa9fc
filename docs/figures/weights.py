"""Draw beta.svg and kappa.svg: what the two parameters of the loss do (docs/method.md).

``PYTHONPATH=. python docs/figures/weights.py`` takes seconds and needs matplotlib. Every number
comes from the loss itself and its gradient, for one row and a given similarity of each prototype.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from dhcl_ops import debiased_contrastive_loss
from docs.figures import style

TEMPERATURE = 0.05
NEGATIVES = 700
BETAS = (0.0, 0.1, 0.5, 1.0)
KAPPAS = (0.0, 0.25, 1.0, 70.0)


class Slopes(NamedTuple):
    """Derivatives of one row's loss by its logits."""

    positive: torch.Tensor  # ()
    negatives: torch.Tensor  # (M,)
    clamped: bool


def negative_similarities(count: int = NEGATIVES) -> torch.Tensor:
    """Cosines (count,) of negatives, descending: the quantiles of a normal law, 0.2 +- 0.1."""
    shares = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return (0.2 + 0.1 * torch.special.ndtri(shares)).flip(0)


def slopes(positive: float, negatives: torch.Tensor, **settings: Any) -> Slopes:
    """Of a row whose positive and negatives have these cosines."""
    cosines = torch.cat([negatives.new_tensor([positive]), negatives])
    feature = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    proxies = torch.stack([cosines, (1 - cosines.square()).sqrt()], dim=1).requires_grad_()
    loss, stats = debiased_contrastive_loss(
        feature,
        proxies,
        torch.zeros(1, dtype=torch.int64),
        temperature=TEMPERATURE,
        return_stats=True,
        **settings,
    )
    loss.backward()
    # A prototype's gradient is (derivative by its logit) feature / temperature.
    by_logit = proxies.grad @ feature[0] * TEMPERATURE
    return Slopes(by_logit[0], by_logit[1:], bool(stats.clamped_fraction > 0))


def posterior(positive: float, negatives: torch.Tensor) -> float:
    """Softmax of the positive among all prototypes."""
    logits = torch.cat([negatives.new_tensor([positive]), negatives]) / TEMPERATURE
    return float(logits.softmax(0)[0])


def weights(beta: float, negatives: torch.Tensor) -> torch.Tensor:
    """Share (M,) of each negative in their gradient."""
    by_logit = slopes(0.4, negatives, beta=beta).negatives
    return by_logit / by_logit.sum()


def draw_beta(path: Path) -> None:
    """Weight against similarity, and how few negatives hold most of the gradient."""
    import matplotlib.pyplot as plt

    style.apply("beta")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.9))
    negatives = negative_similarities()
    hardest = 100 * (torch.arange(len(negatives)) + 1) / len(negatives)
    for beta, colour in zip(BETAS, (style.INK, *style.COLOURS[2::-1]), strict=True):
        share = weights(beta, negatives)
        line = {"color": colour, "linewidth": 2.0, "linestyle": "-" if beta else "--"}
        left.plot(negatives, share * len(negatives), label=f"β = {beta:g}", **line)
        right.plot(hardest, share.cumsum(0), **line)
    left.set(xlabel="cosine of the negative", ylabel="weight over the mean weight")
    left.set(yscale="log", ylim=(1e-6, 1e3))
    right.set(xlabel="hardest negatives, % of all", ylabel="their share of the gradient")
    right.set(xscale="log", ylim=(-0.03, 1.03), xticks=[0.2, 1, 10, 100])
    right.set_xticklabels(["0.2", "1", "10", "100"])
    _finish(figure, (left, right), path)


def draw_kappa(path: Path) -> None:
    """The gradient's scale against the positive's posterior and against its cosine."""
    import matplotlib.pyplot as plt

    style.apply("kappa")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.9))
    negatives = negative_similarities()
    cosines = torch.linspace(0.1, 0.95, 1701, dtype=torch.float64).tolist()
    shares = [posterior(cosine, negatives) for cosine in cosines]
    for kappa, colour in zip(KAPPAS, (style.INK, *style.COLOURS[2::-1]), strict=True):
        rows = [slopes(cosine, negatives, kappa=kappa) for cosine in cosines]
        scale = [float(-row.positive) for row in rows]
        line = {"color": colour, "linewidth": 2.0, "linestyle": "-" if kappa else "--"}
        name = f"κ = {kappa:g}" + (" (τ⁺ = 0.1)" if kappa == 70 else "")
        left.plot(shares, scale, label=name, **line)
        right.plot(cosines, scale, **line)
        if any(row.clamped for row in rows):
            first = next(i for i, row in enumerate(rows) if row.clamped)
            for axes, x in ((left, shares), (right, cosines)):
                axes.plot(x[first - 1], scale[first - 1], "o", color=colour, markersize=6)
    left.set(xlabel="posterior of the positive", ylabel="scale g of the gradient")
    left.set(xlim=(0, 1), ylim=(-0.05, 2.05))
    right.set(xlabel="cosine of the positive", yscale="log", ylim=(1e-4, 200), xlim=(0.1, 0.95))
    _finish(figure, (left, right), path)


def _finish(figure: Any, both: tuple[Any, Any], path: Path) -> None:
    for axes in both:
        style.frame(axes)
    figure.legend(*both[0].get_legend_handles_labels(), loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.savefig(path, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    torch.set_num_threads(1)
    here = Path(__file__).parent
    draw_beta(here / "beta.svg")
    draw_kappa(here / "kappa.svg")
