"""Where the memory bank of a training lies: whole on every process, or spread over them.

What a training does with its memory differs between the two in what each process extracts, clusters
and is told, and in how a checkpoint holds it; the training itself is the same.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list

from dhcl.config import ConfigError, TrainConfig, can_be_sharded
from dhcl.data import EvalImages, ImageList
from dhcl.data.tracks import Tracklets
from dhcl.errors import CheckpointError
from dhcl.models import ReIDModel
from dhcl.training.engine import Engine
from dhcl.training.labels import PseudoLabels, pseudo_labels, sharded_pseudo_labels
from dhcl.training.lists import lists_to_save, own_lists, read_lists
from dhcl.words import first_line, show
from dhcl_ops import DHCLLoss, FalseNegatives, MemoryBank, sharded

__all__ = ["SHARDED_FROM", "Replicated", "Sharded", "is_sharded", "layout_of", "remove_memories"]

# Folders that hold a memory in parts are numbered, and have this before them until they are whole.
_MEMORY, _PART = "memory", ".part-"

SHARDED_FROM = 500_000
"""Training images from which ``memory_layout: auto`` spreads the memory over several processes."""


class Replicated:
    """The whole memory on every process; the first one clusters.

    Args:
        config: of the run.
        engine: processes and device.
        images: N training images.
        dim: width of features.
    """

    loss_class: type[DHCLLoss] = DHCLLoss
    """Of the loss over such a memory."""

    def __init__(self, config: TrainConfig, engine: Engine, images: ImageList, dim: int) -> None:
        self._config, self._engine, self._images, self._dim = config, engine, images, dim
        self._part = range(len(images))  # those whose features this process clusters

    def new_bank(self, rows: int) -> Any:
        """A memory of this many rows in all."""
        momentum, device = self._config.memory.momentum, self._engine.device
        return MemoryBank(rows, self._dim, momentum=momentum, device=device)

    def own(self, values: torch.Tensor) -> torch.Tensor:
        """Of values (N, ...) of all images those that this process gives to the memory."""
        return values

    def extract(self, model: ReIDModel, images: EvalImages) -> torch.Tensor:
        """Features of the training images, as far as this process clusters them."""
        return self._engine.extract(model, images, "extract")

    def cluster(
        self,
        features: torch.Tensor,
        tracklets: Tracklets | None,
        *,
        loose: bool,
        threshold: float | None,
        progress: Callable[..., None],
        graph_eps: float | None = None,
    ) -> PseudoLabels:
        """The pseudo-labels (N,) of :meth:`extract`'s features, the same on every process."""
        return self._engine.by_first(
            lambda: pseudo_labels(
                features,
                torch.from_numpy(self._images.cameras),
                self._config.labels,
                loose=loose,
                threshold=threshold,
                progress=progress,
                tracklets=tracklets,
                graph_eps=graph_eps,
            )
        )

    def classes(self, bank: Any) -> int:
        """The number of prototypes."""
        return len(bank.prototypes)

    def update(self, bank: Any, features: torch.Tensor, rows: torch.Tensor) -> None:
        """Move rows towards the features (b, d) of this process's batch, and those of all others.

        In the order of the processes, so that every one makes the same memory.
        """
        if self._engine.world_size > 1:
            features, rows = self._engine.accelerator.gather((features, rows))
        bank.update_(features, rows)

    def skipped(self, bank: Any) -> int:
        """How many updates were left out."""
        return int(bank.skipped)

    def keep(self, bank: Any, found: FalseNegatives | None, folder: Path) -> dict[str, Any]:
        """What a checkpoint in this folder holds of the memory; every process calls it.

        Where it lies in a folder of its own, so do the lists of false negatives.
        """
        return dict(bank.state_dict())

    def load(self, state: dict[str, Any], folder: Path) -> Any:
        """The memory that :meth:`keep` of either layout gave, to the bit."""
        if "folder" in state:
            found = _read_whole(_place(state, folder), len(self._images), self._dim)
            bank = self.new_bank(len(self._images))
            bank.features.copy_(found["features"])
            bank.skipped.copy_(found["skipped"])
            if found["labelled"]:
                # Prototypes are a function of the rows, to the bit.
                bank.set_labels(found["labels"].to(bank.features.device))
            return bank
        bank = self.new_bank(len(state["features"]))
        bank.load_state_dict(state)
        return bank

    def load_lists(self, state: dict[str, Any], folder: Path) -> FalseNegatives | None:
        """The lists of false negatives of a checkpoint in this folder, by either layout.

        They are those of the images whose features this process clusters.
        """
        part = self._part
        if "folder" not in state["bank"]:
            saved = state.get("false_negatives")  # checkpoints before have none
            return own_lists(FalseNegatives(*saved), part) if saved else None
        place = _place(state["bank"], folder)
        try:
            return read_lists(place, part)
        except Exception as error:  # damaged files raise nearly anything
            raise _unreadable(place, error) from error


class Sharded(Replicated):
    """Each process holds, extracts and clusters its own share of the images.

    Shares are consecutive and even, as those of extraction are, so that features are the same. The
    labels of all images are known to all.
    """

    loss_class = sharded.DHCLLoss

    def __init__(self, config: TrainConfig, engine: Engine, images: ImageList, dim: int) -> None:
        super().__init__(config, engine, images, dim)
        self._part = engine.share(len(images))

    def new_bank(self, rows: int) -> Any:
        """A memory of which this process holds its images' rows."""
        momentum, device = self._config.memory.momentum, self._engine.device
        return sharded.MemoryBank(len(self._part), self._dim, momentum=momentum, device=device)

    def own(self, values: torch.Tensor) -> torch.Tensor:
        """Those of own images."""
        return values[self._part.start : self._part.stop]

    def extract(self, model: ReIDModel, images: EvalImages) -> torch.Tensor:
        """Features (n, d) of own images; those of others never come here."""
        return self._engine.extract_own(model, images, "extract")

    def cluster(
        self,
        features: torch.Tensor,
        tracklets: Tracklets | None,
        *,
        loose: bool,
        threshold: float | None,
        progress: Callable[..., None],
        graph_eps: float | None = None,
    ) -> PseudoLabels:
        """The pseudo-labels (N,) of all images, which all processes find together."""
        return sharded_pseudo_labels(
            features,
            self.own(torch.from_numpy(self._images.cameras)),
            self._config.labels,
            self._engine.gather_shares,
            len(self._images),
            loose=loose,
            threshold=threshold,
            progress=progress,
            graph_eps=graph_eps,
        )

    def classes(self, bank: Any) -> int:
        """The number of prototypes of all processes."""
        return int(bank.num_prototypes)

    def update(self, bank: Any, features: torch.Tensor, rows: torch.Tensor) -> None:
        """Send each feature to the process that holds its row."""
        bank.update_(features, rows)

    def skipped(self, bank: Any) -> int:
        """How many updates all processes left out."""
        return int(self._engine.accelerator.reduce(bank.skipped.clone(), "sum"))

    def keep(self, bank: Any, found: FalseNegatives | None, folder: Path) -> dict[str, Any]:
        """Write the rows of all processes to a folder of their own beside the checkpoint.

        It gets its name when all processes are done, and counts once the checkpoint names it:
        what the one before names is left as it is.
        """
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.state_dict_saver import save

        names = [""]
        if self._engine.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            last = max([0, *(int(path.suffix[1:]) for path in _memories(folder))])
            names = [f"{_MEMORY}.{last + 1}"]
        broadcast_object_list(names)
        beside, name = folder / f"{_PART}{names[0]}", names[0]
        if self._engine.is_main:
            shutil.rmtree(beside, ignore_errors=True)
        dist.barrier()
        try:
            lists = lists_to_save(found, self._part.start)
            save({"bank": bank, **lists}, checkpoint_id=beside)
        except CheckpointException as error:
            raise CheckpointError(
                f"checkpoint: {show(beside)} not written ({first_line(error)}); the one before, "
                "if there is one, is whole"
            ) from error
        if self._engine.is_main:
            os.replace(beside, folder / name)
        dist.barrier()
        return {"folder": name}

    def load(self, state: dict[str, Any], folder: Path) -> Any:
        """This process's part of the memory."""
        bank = self.new_bank(len(self._images))
        if "folder" not in state:
            part = bank.state_dict()
            begin = self._engine.share(len(self._images)).start
            for key in ("features", "labels"):
                local = part[key].to_local()
                local.copy_(state[key][begin : begin + len(local)])
            labelled = torch.tensor([len(state["_proto_of"]) > 0])
            part.update(skipped=state["skipped"], labelled=labelled)
            bank.load_state_dict(part)
            return bank
        from dhcl.training.parts import load_parts

        place = _place(state, folder)
        try:
            load_parts({"bank": bank}, place)
        except Exception as error:  # damaged files raise nearly anything
            raise _unreadable(place, error) from error
        return bank


def _read_whole(folder: Path, rows: int, dim: int) -> dict[str, torch.Tensor]:
    """The memory that several processes wrote, all of it, on the CPU.

    Raises:
        CheckpointError: it can't be read.
    """
    from dhcl.training.parts import load_parts

    found = {
        "features": torch.empty(rows, dim),
        "labels": torch.empty(rows, dtype=torch.int64),
        "skipped": torch.empty(1, dtype=torch.int64),
        "labelled": torch.empty(1, dtype=torch.bool),
    }
    try:
        load_parts({"bank": found}, folder, alone=True)
    except Exception as error:  # damaged files raise nearly anything
        raise _unreadable(folder, error) from error
    return found


def _place(state: Mapping[str, Any], folder: Path) -> Path:
    """The folder in this one that a checkpoint names as its memory.

    Raises:
        CheckpointError: it names another place.
    """
    name = state["folder"]
    if not (isinstance(name, str) and re.fullmatch(rf"{_MEMORY}\.\d+", name)):
        raise CheckpointError(
            f"checkpoint: the memory must be a folder {_MEMORY}.N in {show(folder)} "
            f"(got {show(str(name))})"
        )
    return folder / name


def _memories(folder: Path) -> list[Path]:
    """Folders of memories that a run's checkpoints named."""
    return [path for path in folder.glob(f"{_MEMORY}.*") if path.suffix[1:].isdecimal()]


def remove_memories(folder: Path, bank: Mapping[str, Any]) -> None:
    """Remove the memories of earlier checkpoints from their folder, once another one is there.

    Args:
        bank: what :meth:`Replicated.keep` of either layout returned for it.
    """
    for path in (*_memories(folder), *folder.glob(f"{_PART}*")):
        if path.name != bank.get("folder"):
            shutil.rmtree(path, ignore_errors=True)


def _unreadable(folder: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(f"checkpoint: {show(folder)} can't be read ({first_line(error)})")


def is_sharded(engine: Engine, images: int) -> bool:
    """Whether features of so many images are to lie on several processes, as the options say."""
    kind = engine.config.memory.memory_layout
    wanted = kind == "sharded" or (kind == "auto" and images >= SHARDED_FROM)
    return wanted and engine.world_size > 1


def layout_of(config: TrainConfig, engine: Engine, images: ImageList, dim: int) -> Replicated:
    """The layout that the options ask for, or that fits the number of images and processes.

    Raises:
        ConfigError: a sharded memory of images with tracklets.
    """
    asked, tracked = config.memory.memory_layout, Tracklets.of_list(images) is not None
    if asked == "sharded" and tracked:
        raise ConfigError("memory_layout: a sharded memory has no tracklets yet (got sharded)")
    fits = can_be_sharded(config) and not tracked
    kind = Sharded if fits and is_sharded(engine, len(images)) else Replicated
    return kind(config, engine, images, dim)
