"""Features of the boxes in a frame, as multi-object trackers ask for them.

Trackers are known by what they call alone; none is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dhcl.data.images import upright
from dhcl.inference.reid import ReID

__all__ = ["Embedder"]

Pixels = NDArray[np.uint8]
D = TypeVar("D")


class Embedder:
    """A model as the appearance part of a tracker.

    - boxmot: ``BotSort(reid_model=embedder)``, which calls :meth:`get_features`.
    - supervision: ``embedder.describe(detections, frame)``.
    - deep-sort-realtime: ``tracker = DeepSort(embedder=None)``, then
      ``tracker.embedder = embedder``, which calls :meth:`predict`.
    - Others: ``embedder.get_features(boxes, frame)``, a row per box.

    Corners are rounded to whole pixels and boxes are cut at the border of the frame. Trackers stop
    at features that are missing, zero or not finite, so a box that has no pixels (outside of the
    frame, without width or height, not finite) gets the features of an image in one colour, the
    mean that the model subtracts. Such boxes look alike and like nobody.

    Args:
        model: whose features.
        camera: which of the training's cameras took the frames, an index from 0, for models with
            statistics per camera; None or -1 is an unknown one.
        batch_size: boxes at a time.

    Attributes:
        without_pixels: how many boxes there have been that had no pixels.

    Example::

        embedder = Embedder(ReID.load("runs/market1501-dhcl-seed0"))
        tracker = boxmot.BotSort(reid_model=embedder)
    """

    def __init__(self, model: ReID, *, camera: int | None = None, batch_size: int = 128) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: must be at least 1 (got {batch_size})")
        self.model, self.batch_size = model, batch_size
        self.camera = -1 if camera is None else camera
        self.without_pixels = 0
        mean = (255 * np.array(model.model.mean)).round().astype(np.uint8)
        self._nothing = np.tile(mean, (2, 2, 1))

    def get_features(self, xyxys: Any, img: Any) -> NDArray[np.float32]:
        """Features of the boxes of one frame.

        Args:
            xyxys: (N, 4) left, top, right, bottom in pixels, floating or whole; none at all in any
                shape; (4,) is one box.
            img: (H, W, 3) uint8, BGR as OpenCV reads it; or a PIL image.

        Returns:
            (N, d) float32, rows of length 1.

        Raises:
            ValueError, TypeError: boxes or a frame of another form; rotated boxes.
        """
        frame = _rgb("img", img)
        return self._features([self._crop(frame, box) for box in _checked_boxes(xyxys)])

    def describe(self, detections: D, frame: Any) -> D:
        """Add features to the detections of one frame.

        Args:
            detections: has ``xyxy`` (N, 4) and a dictionary ``data``, as ``supervision.Detections``
                have.
            frame: as of :meth:`get_features`.

        Returns:
            The same object, with ``data["features"]`` (N, d) float32.

        Raises:
            TypeError: something else than detections. ValueError: as :meth:`get_features`.
        """
        boxes, data = getattr(detections, "xyxy", None), getattr(detections, "data", None)
        if boxes is None or not isinstance(data, dict):
            raise TypeError(
                "detections: must have boxes xyxy and a dictionary data, as supervision.Detections "
                f"have (got {type(detections).__name__})"
            )
        data["features"] = self.get_features(boxes, frame)
        return detections

    def predict(self, crops: Sequence[Any]) -> list[NDArray[np.float32]]:
        """Features of crops that a tracker has cut out itself.

        Args:
            crops: N images as ``img`` of :meth:`get_features`; one may have no pixels.

        Returns:
            N rows (d,) float32 of length 1.
        """
        images = [_rgb(f"crops[{i}]", crop) for i, crop in enumerate(crops)]
        return list(self._features([self._whole(image) for image in images]))

    def _features(self, crops: list[Pixels]) -> NDArray[np.float32]:
        if not crops:
            return np.zeros((0, self.model.dim), np.float32)
        cameras = [self.camera] * len(crops)
        features: torch.Tensor = self.model.features(crops, cameras, batch_size=self.batch_size)
        return features.numpy()

    def _crop(self, frame: Pixels, box: NDArray[np.float64]) -> Pixels:
        if not np.isfinite(box).all():
            return self._whole(frame[:0])
        height, width = frame.shape[:2]
        left, top, right, bottom = np.rint(box).clip(0, [width, height, width, height]).astype(int)
        return self._whole(frame[top:bottom, left:right])

    def _whole(self, crop: Pixels) -> Pixels:
        """The crop, or what stands for one that has no pixels."""
        if crop.size:
            return np.ascontiguousarray(crop)
        self.without_pixels += 1
        return self._nothing


def _checked_boxes(boxes: Any) -> NDArray[np.float64]:
    """Boxes as (N, 4)."""
    array = np.asarray(boxes)
    if array.size == 0:
        return np.zeros((0, 4))
    if array.shape == (4,):
        array = array[None]
    if array.ndim != 2 or array.shape[1] != 4 or array.dtype.kind not in "fiu":
        rotated = "; rotated boxes have no upright crop" if array.shape[1:] == (5,) else ""
        raise ValueError(
            "boxes: must be (N, 4) numbers, left, top, right, bottom "
            f"(got {array.shape} {array.dtype}{rotated})"
        )
    return array.astype(np.float64)


def _rgb(name: str, image: Any) -> Pixels:
    """(H, W, 3) uint8, RGB, of a BGR array or a PIL image."""
    if isinstance(image, Image.Image):
        return np.array(upright(image))
    if not isinstance(image, np.ndarray):
        raise TypeError(f"{name}: must be a BGR array or a PIL image (got {type(image).__name__})")
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"{name}: must be (H, W, 3) uint8, BGR (got {image.shape} {image.dtype})")
    return image[:, :, ::-1]
