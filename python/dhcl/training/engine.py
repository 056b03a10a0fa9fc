"""What a run stands on: processes and devices (by Accelerate), signals, progress bars, features."""

from __future__ import annotations

import datetime
import math
import os
import signal
import threading
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from torch.utils.data import Subset
from tqdm import tqdm

from dhcl.config import TrainConfig
from dhcl.data import EvalImages, ImageList, eval_loader, eval_transform
from dhcl.errors import Interrupted, PeerLost
from dhcl.models import ReIDModel
from dhcl.training.checkpoint import how_to_go_on
from dhcl.training.peers import Peers
from dhcl.words import show_lines
from dhcl_ops import status

__all__ = ["Engine", "Interrupted", "Stop"]

# Seconds more for a collective of NCCL, which ends the process without a word when it times out.
_NCCL_MORE = 60
T = TypeVar("T")


class Stop:
    """A context in which the first Ctrl-C or SIGTERM is a request, and the second one raises."""

    def __init__(self) -> None:
        self.requested = 0
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = number

    def check(self) -> None:
        """Raise :class:`Interrupted` if there was a request: where nothing would be lost."""
        if self.requested:
            raise Interrupted(self.requested)


class Engine:
    """Processes, device and precision, and how images become features on them."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.stop = Stop()
        if config.deterministic:
            # Read by cuBLAS when it starts.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        seconds = config.timeout_minutes * 60
        self.peers = Peers.of_environment(seconds, lambda: how_to_go_on(config.run))
        if self.peers.world > 1:
            # Now, since one that builds the library later would keep the others waiting.
            status()
            self.meet()
        on_gpu = config.device != "cpu" and torch.cuda.is_available()
        timeout = datetime.timedelta(seconds=seconds + (_NCCL_MORE if on_gpu else 0))
        self.peers.start_group("nccl" if on_gpu else "gloo", timeout)
        self.accelerator = Accelerator(
            cpu=config.device == "cpu",
            mixed_precision={"fp32": "no"}.get(config.precision, config.precision),
            gradient_accumulation_steps=config.batches.accumulate,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
        )

    @property
    def device(self) -> torch.device:
        """Of this process."""
        device: torch.device = self.accelerator.device
        return device

    @property
    def rank(self) -> int:
        """Number of this process."""
        return int(self.accelerator.process_index)

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return int(self.accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    @property
    def replays(self) -> bool:
        """Whether the loss and the update of the memory are replayed from CUDA graphs.

        Several processes exchange features between them, which a graph here does not.
        """
        return self.device.type == "cuda" and self.world_size == 1

    def meet(self) -> None:
        """Wait for the other processes, however long what they do takes, as long as they live.

        To be called on all of them, after what one does while the others have nothing to do: a
        collective would take that for the silence of one that is lost.

        Raises:
            PeerLost: one of them is.
            Interrupted: one ended, as this process was asked to as well.
        """
        try:
            self.peers.meet()
        except PeerLost:
            self.stop.check()
            raise

    def by_first(self, make: Callable[[], T]) -> T:
        """What the first process makes, on all; plain values and tensors on the CPU.

        Raises:
            PeerLost, Interrupted: as :meth:`meet`.
        """
        made: list[Any] = [make() if self.is_main else None]
        self.meet()
        broadcast_object_list(made)
        result: T = made[0]
        return result

    def say(self, text: str) -> None:
        """Print, once."""
        if self.is_main:
            tqdm.write(show_lines(text))

    def bar(self, items: Iterable[Any], what: str, total: int, done: int = 0) -> Any:
        """The items with a progress bar, if someone looks at it."""
        quiet = None if self.is_main else True
        return tqdm(items, what, total, initial=done, leave=False, disable=quiet)

    def images(self, images: ImageList, model: ReIDModel) -> EvalImages:
        """A data set of images as the model takes them."""
        transform = eval_transform(self.config.model.image_size, model.mean, model.std)  # type: ignore[arg-type]
        return EvalImages(images, transform, cache_bytes=int(self.config.data.cache_gb * 2**30))

    def extract(self, model: ReIDModel, images: EvalImages, what: str) -> torch.Tensor:
        """Features (N, d) float32 of all images, on every process, the model in evaluation mode."""
        return self.gather_shares(self.extract_own(model, images, what), len(images))

    def share(self, count: int) -> range:
        """Which of so many rows are this process's: consecutive ones, as many for each but the
        last."""
        size = math.ceil(count / self.world_size)
        return range(count)[self.rank * size : (self.rank + 1) * size]

    def gather_shares(self, own: torch.Tensor, count: int) -> torch.Tensor:
        """The rows (N, ...) of all processes, of which each gives those of :meth:`share`."""
        size = math.ceil(count / self.world_size)
        padded = own.new_zeros(size, *own.shape[1:])
        padded[: len(own)] = own
        gathered: torch.Tensor = self.accelerator.gather(padded)
        return gathered[:count]

    @torch.no_grad()
    def extract_own(self, model: ReIDModel, images: EvalImages, what: str) -> torch.Tensor:
        """Features (n, d) float32 of this process's share of the images."""
        mine = self.share(len(images))
        loader = eval_loader(
            Subset(images, mine),
            batch_size=self.config.evaluation.eval_batch,
            workers=self.config.data.workers,
            pin_memory=self.device.type == "cuda",
            seconds=60 * self.config.timeout_minutes,
        )
        features = torch.zeros(len(mine), model.dim, device=self.device)
        if self.world_size > 1:
            # Each process has batch-norm statistics of its own images; the first one's count.
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)
        was_training = model.training
        model.eval()
        start = 0
        try:
            for pixels, _, cameras in self.bar(loader, what, len(loader)):
                self.stop.check()
                pixels = pixels.to(self.device, non_blocking=True)
                batch = model(pixels, cameras.to(self.device))
                features[start : start + len(batch)] = batch
                start += len(batch)
        finally:
            model.train(was_training)
        return features
