"""The evaluation of a ranked gallery as a metric of TorchMetrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat, rank_zero_warn

from dhcl.metrics import RANKS, by_name, cameras_apart
from dhcl_ops import NoValidQuery, evaluate_ranking

__all__ = ["ReIDMetric"]

# Of an image whose number in its set is not told.
_NO_INDEX = -1


class ReIDMetric(Metric):
    """mAP, CMC and mINP of queries in a gallery, as :func:`dhcl_ops.evaluate_ranking` has them.

    Queries and gallery come in batches and in any order, on any process; everything is kept until
    :meth:`compute`, 4 d + 32 bytes for an image. Between processes it is gathered, so that each
    one computes the metrics of all images.

    Example::

        metric = ReIDMetric()
        for images, identities, cameras in query_loader:
            metric.update(model(images), identities, cameras, is_query=True)
        for images, identities, cameras in gallery_loader:
            metric.update(model(images), identities, cameras, is_query=False)
        print(metric.compute()["mAP"])

    Args:
        metric: distance between features, ``"cosine"`` or ``"euclidean"``.
        ap: ``"hits"`` or ``"trapezoid"``, as of :func:`dhcl_ops.evaluate_ranking`.
        ranks: the k of which CMC(k) is given.
        junk_id: identity of gallery images that count nowhere, None for no such images.
        kwargs: of ``torchmetrics.Metric``, as ``compute_on_cpu``.

    Raises:
        ValueError: no ranks, or one below 1.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    # What update was given, laid out in one dimension: lists, or tensors once they are synced. The
    # second holds identity, camera, whether it is a query, and index of each image.
    features: Any
    about: Any
    width: torch.Tensor  # () int64, of the features; 0 before the first

    def __init__(
        self,
        *,
        metric: Literal["cosine", "euclidean"] = "cosine",
        ap: Literal["hits", "trapezoid"] = "hits",
        ranks: Sequence[int] = RANKS,
        junk_id: int | None = -1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not ranks or min(ranks) < 1:
            raise ValueError(f"ReIDMetric: ranks must be numbers from 1 (got {ranks!r})")
        self.metric, self.ap, self.ranks, self.junk_id = metric, ap, tuple(ranks), junk_id
        self.add_state("features", [], dist_reduce_fx="cat")
        self.add_state("about", [], dist_reduce_fx="cat")
        self.add_state("width", torch.tensor(0), dist_reduce_fx="max")

    def update(
        self,
        features: torch.Tensor,
        identities: torch.Tensor,
        cameras: torch.Tensor | None = None,
        is_query: torch.Tensor | bool = False,
        indices: torch.Tensor | None = None,
    ) -> None:
        """Add images.

        Args:
            features: (B, d) floating, kept in float32.
            identities: (B,) integers.
            cameras: (B,) integers, negative for unknown; None where none is known.
            is_query: (B,) bool, or one for all of them: whether an image is a query or of the
                gallery.
            indices: (B,) the number of each image among the queries, or in the gallery. With it an
                image that is given twice counts once, as samplers that give each process the same
                number of images need it, and equal distances go by it, so that metrics do not
                depend on the number of processes.

        Raises:
            ValueError: shapes that do not fit, or another width than before.
        """
        if features.ndim != 2 or not features.is_floating_point():
            raise ValueError(
                f"ReIDMetric: features must be (B, d) floating (got {tuple(features.shape)} "
                f"{features.dtype})"
            )
        count, width = features.shape
        if self.width not in (0, width):
            raise ValueError(
                f"ReIDMetric: features must have one width (got {width} after {int(self.width)})"
            )
        device = features.device
        if isinstance(is_query, bool):
            is_query = torch.full((count,), is_query)
        unknown = torch.full((count,), -1)
        columns = {
            "identities": identities,
            "cameras": unknown if cameras is None else cameras,
            "is_query": is_query,
            "indices": unknown if indices is None else indices,
        }
        for name, column in columns.items():
            if column.shape != (count,) or column.is_floating_point():
                raise ValueError(
                    f"ReIDMetric: {name} must be {count} whole numbers, one per feature (got shape "
                    f"{tuple(column.shape)}, {column.dtype})"
                )
        table = torch.stack([column.to(device, torch.int64) for column in columns.values()], 1)
        self.features.append(features.detach().float().flatten())
        self.about.append(table.flatten())
        self.width = self.width.new_tensor(width)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """As of ``torchmetrics.Metric``."""
        # A process without any image takes part too, with tensors of the same kind.
        self._fill_empty()
        super().sync(*args, **kwargs)

    def _fill_empty(self) -> None:
        if isinstance(self.about, list) and not self.about:
            self.features = [torch.zeros(0, device=self.device)]
            self.about = [torch.zeros(0, dtype=torch.int64, device=self.device)]

    def compute(self) -> dict[str, torch.Tensor]:
        """``mAP``, ``rank1``, ``rank5``, ``rank10`` (or those asked for) and ``mINP``.

        Returns:
            Each a () float64 tensor in [0, 1]. All are NaN, with a warning, where no query has a
            right match in the gallery: so it is for most single batches, of which ``forward``
            gives the metrics.

        Raises:
            ValueError: a feature that is not finite; some images with an index and some without.
        """
        names = ("mAP", *(f"rank{k}" for k in self.ranks), "mINP")
        try:
            found = by_name(self._ranking(), self.ranks)
        except NoValidQuery as error:
            rank_zero_warn(f"ReIDMetric: {error}; all metrics are NaN", UserWarning)
            found = dict.fromkeys(names, float("nan"))
        # A device without float64 is one of Apple's.
        kind = torch.float32 if self.device.type == "mps" else torch.float64
        return {name: torch.tensor(found[name], dtype=kind, device=self.device) for name in names}

    def _ranking(self) -> Any:
        self._fill_empty()
        about = dim_zero_cat(self.about).view(-1, 4)
        features = dim_zero_cat(self.features).view(len(about), int(self.width))
        indices = about[:, 3]
        if bool((indices != _NO_INDEX).any()):
            if bool((indices == _NO_INDEX).any()):
                raise ValueError("ReIDMetric: indices must be given of all images or of none")
            rows = _first_of_each(about[:, 2:])
            about, features = about[rows], features[rows]
        query = about[:, 2] > 0
        one, other = about[query], about[~query]
        return evaluate_ranking(
            (features[query], features[~query]),
            one[:, 0],
            other[:, 0],
            *cameras_apart(one[:, 1], other[:, 1]),
            metric=self.metric,
            ap=self.ap,
            max_rank=max(self.ranks),
            junk_id=self.junk_id,
        )


def _first_of_each(keys: torch.Tensor) -> torch.Tensor:
    """Where each different row of keys (N, c) stands first, in ascending order of the rows."""
    different, group = keys.unique(dim=0, return_inverse=True)
    places = torch.arange(len(keys), device=keys.device)
    first = places.new_full((len(different),), len(keys))
    return first.scatter_reduce_(0, group, places, "amin")
