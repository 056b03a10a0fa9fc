"""A step of the training waits for no device, and what it was worth is looked at seldom."""

import json
import math

import dhcl.training.trainer
import pytest
import torch
from dhcl.config import with_changes
from dhcl.training.checkpoint import load_checkpoint
from dhcl.training.engine import Engine
from dhcl.training.runs import train
from dhcl.training.steps import StepValues
from dhcl.training.trainer import Diverged, GraphedStep, Trainer

import dhcl_ops.contrastive
from tests.conftest import needs_cuda
from tests.dhcl.toy import options
from tests.dhcl.training.test_trainer import make_trainer
from tests.unread import UnreadDevice, backward


def at_first_step(config):
    """A trainer and the batches of its first epoch."""
    trainer = make_trainer(config)
    features = trainer.recall()
    trainer.remember(features, trainer.cluster(features))
    return trainer, list(trainer.batches())


RECIPES = {
    "dhcl": {},
    "dhcl-hnm": {"name": "dhcl-hnm", "camera_bn": True},
    "cluster-contrast": {"name": "cluster-contrast", "images_per_class": 4},
    "suspects counted": {"suspects": "kappa", "samples_per_bn": 8},
    "suspects excluded": {"suspects": "exclude", "accumulate": 2, "iterations": 6},
    "positives of the class": {
        "prototype_weight": 0.0,
        "instance_weight": 1.0,
        "instance_positives": "class",
    },
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_reads_nothing_from_a_cuda_device(recipe, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(dhcl_ops.contrastive, "_norm_seen", True)
    changes = {"deterministic": False, "warmup_epochs": 0, **RECIPES[recipe]}
    trainer, batches = at_first_step(options(pictures, tmp_path / "run", **changes))
    trainer.log.close()
    there = UnreadDevice()
    for module in (trainer.model, trainer.bank):
        there.move(module)
    trainer.rows = there.of(trainer.rows)
    if trainer._cameras is not None:
        trainer._cameras = there.of(trainer._cameras)
    if (known := trainer.loss._false_negatives) is not None:
        trainer.loss._false_negatives = type(known)(*map(there.of, known))
    if (suspects := trainer.loss._suspects) is not None:
        trainer.loss._suspects = suspects._replace(
            groups=there.of(suspects.groups), others=there.of(suspects.others)
        )
    accelerator = trainer.engine.accelerator
    # Adam counts its steps on the host, which a reading of values can't be told from.
    learned = [p for p in trainer.model.parameters() if p.requires_grad]
    trainer.optimizer = accelerator.prepare(torch.optim.SGD(learned, 0.1, momentum=0.9))
    monkeypatch.setattr(accelerator, "backward", backward)
    trainer._values = StepValues(torch.device("cpu"))
    trainer._values._zero = there.of(torch.zeros(()))
    trainer._looked_at_features = True
    before = learned[0]._version
    moved = [tuple(map(there.of, batch)) for batch in batches[:2]]
    with there.unread():
        for batch in moved:
            trainer.step(*batch)
            trainer.at.iteration += 1
            trainer._save_if_due()
    assert len(trainer._values) == 2
    assert learned[0]._version > before
    iterations, values = trainer._values.take()
    assert iterations == [0, 1]
    assert values.device.type == "cuda"


def test_values_are_looked_at_seldom_and_make_the_same_averages(pictures, tmp_path, monkeypatch):
    config = options(pictures, tmp_path / "run", name="dhcl-hnm", epochs=1, iterations=7)
    entries = []
    for unseen in (1, 3, 32):
        monkeypatch.setattr(dhcl.training.trainer, "_STEPS_UNSEEN", unseen)
        torch.manual_seed(0)
        trainer = make_trainer(config)
        looks = []
        take = trainer._values.take

        def watched(take=take, looks=looks):
            taken = take()
            looks.append(taken[0])
            return taken

        trainer._values.take = watched
        trainer.fit()
        trainer.log.close()
        expected = [list(range(k, min(k + unseen, 7))) for k in range(0, 7, unseen)]
        assert looks == expected
        line = (config.run / "log.jsonl").read_text().splitlines()[-1]
        entries.append({k: v for k, v in json.loads(line).items() if k != "seconds"})
    assert entries[0] == entries[1] == entries[2]
    assert entries[0]["loss"] > 0
    assert entries[0]["instance_loss"] > 0


@pytest.mark.parametrize("checkpoint_minutes", [0.0, 1e-9])
def test_a_loss_that_is_not_finite_is_named_before_a_checkpoint(
    checkpoint_minutes, pictures, tmp_path
):
    """Of the step where it was, although it is looked at steps later."""
    config = options(
        pictures,
        tmp_path / "run",
        epochs=2,
        iterations=9,
        lr=1e-30,
        checkpoint_minutes=checkpoint_minutes,
    )
    trainer = make_trainer(config)
    remember = trainer.remember

    def remember_and_poison(features, found):
        remember(features, found)
        loss = trainer.loss

        def poisoned(*arguments, **settings):
            value, stats = loss(*arguments, **settings)
            if (trainer.at.epoch, trainer.at.iteration) == (1, 4):
                value = value.detach() * math.nan  # as an overflow would, without a gradient
                value = value + 0 * arguments[0].sum().clamp(max=0.0)
            return value, stats

        trainer.loss = poisoned
        poisoned.settings = loss.settings

    trainer.remember = remember_and_poison
    with pytest.raises(Diverged, match="the loss is not finite in epoch 2, iteration 5 "):
        trainer.fit()
    trainer.log.close()
    state = load_checkpoint(trainer.checkpoint)
    at = state["progress"]
    assert (at["epoch"], at["iteration"]) == (1, 4 if checkpoint_minutes else 0)
    assert all(value.isfinite().all() for value in state["model"].values())
    assert all(map(math.isfinite, at["totals"]))


def test_a_run_whose_adam_was_not_fused_goes_on_with_one_that_is(pictures, tmp_path):
    """As runs in fp16 were, before the scaler could skip a step without a look."""
    config = options(pictures, tmp_path / "run", epochs=1)
    trainer = make_trainer(config)
    trainer.fit()
    state = load_checkpoint(trainer.checkpoint)
    assert not state["optimizer"]["param_groups"][0]["fused"]
    learned = [p for p in trainer.model.parameters() if p.requires_grad]
    fused = torch.optim.Adam(learned, 1e-3, fused=True)
    trainer.optimizer = trainer.engine.accelerator.prepare(fused)
    trainer._restore(state)
    trainer.log.close()
    # What the scaler of fp16 hands over, which other forms of Adam refuse.
    fused.grad_scale, fused.found_inf = torch.ones(()), torch.ones(())
    before = [p.detach().clone() for p in learned]
    for parameter in learned:
        parameter.grad = torch.ones_like(parameter)
    fused.step()
    assert all(torch.equal(a, b) for a, b in zip(before, learned, strict=True))
    fused.found_inf = torch.zeros(())
    fused.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, learned, strict=True))


# ---- replayed steps -----------------------------------------------------------------------------


def left_by(config):
    """Model, memory, optimiser and log of a run, without times."""
    state = load_checkpoint(config.run / "checkpoints" / "last.pt")
    lines = (config.run / "log.jsonl").read_text().splitlines()
    log = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]
    optimizer = state["optimizer"]["state"].values()
    moments = [value for each in optimizer for value in each.values()]
    return [*state["model"].values(), *state["bank"].values(), *moments], log


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_of_replayed_steps_has_the_bits_of_a_plain_one(
    recipe, pictures, tmp_path, monkeypatch
):
    """Without a GPU what is replayed is called, from the graphs' own inputs."""
    changes = {"epochs": 2, "warmup_epochs": 1, **RECIPES[recipe]}
    plain = options(pictures, tmp_path / "plain", **changes)
    train(plain, quiet=True)
    monkeypatch.setattr(Engine, "replays", True)
    built = []
    monkeypatch.setattr(
        "dhcl.training.trainer.GraphedStep",
        lambda *a, **k: built.append(a[2].shape) or GraphedStep(*a, **k),
    )
    replayed = options(pictures, tmp_path / "replayed", **changes)
    train(replayed, quiet=True)
    assert len(built) == 2  # one an epoch, as labels and settings are the epoch's
    (expected, log), (got, replayed_log) = left_by(plain), left_by(replayed)
    assert log == replayed_log
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_replayed_run_goes_on_in_mid_epoch_to_the_same_bits(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(Engine, "replays", True)
    changes = {"epochs": 2, "iterations": 6, "checkpoint_minutes": 1e-9}
    whole = options(pictures, tmp_path / "whole", **changes)
    train(whole, quiet=True)
    config = options(pictures, tmp_path / "run", **changes)
    step = Trainer.step

    def stopping(self, *batch):
        if (self.at.epoch, self.at.iteration) == (1, 3):
            raise KeyboardInterrupt
        step(self, *batch)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(config, quiet=True)
    assert load_checkpoint(config.run / "checkpoints" / "last.pt")["progress"]["iteration"] == 3
    train(with_changes(config, {"out": config.run}), quiet=True, resume=True)
    (expected, log), (got, resumed_log) = left_by(whole), left_by(config)
    assert log == resumed_log
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_without_a_capture_training_goes_on_and_says_so_once(
    pictures, tmp_path, monkeypatch, capsys
):
    def refused(*arguments, **options):
        raise RuntimeError("operation not permitted when stream is capturing\nat some line")

    config = options(pictures, tmp_path / "plain", epochs=2)
    train(config, quiet=True)
    expected, _ = left_by(config)
    monkeypatch.setattr(Engine, "replays", True)
    monkeypatch.setattr("dhcl.training.trainer.GraphedStep", refused)
    config = options(pictures, tmp_path / "refused", epochs=2)
    capsys.readouterr()
    train(config, quiet=True)
    said = capsys.readouterr().out
    assert said.count("can't be captured in a CUDA graph (operation not permitted") == 1
    assert "at some line" not in said
    got, _ = left_by(config)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@needs_cuda
def test_a_run_on_a_gpu_has_the_same_bits_with_and_without_graphs(pictures, tmp_path, monkeypatch):
    left = []
    for name, replays in (("graphs", True), ("plain", False)):
        monkeypatch.setattr(Engine, "replays", replays)
        config = options(pictures, tmp_path / name, "dhcl-hnm", device="auto", epochs=2, workers=1)
        train(config, quiet=True)
        left.append(left_by(config))
    assert left[0][1] == left[1][1]
    assert all(torch.equal(a, b) for a, b in zip(left[0][0], left[1][0], strict=True))


@needs_cuda
def test_the_loss_of_a_run_on_a_gpu_is_captured(pictures, tmp_path, capsys):
    config = options(pictures, tmp_path / "run", device="auto", epochs=1, workers=1)
    trainer = make_trainer(config)
    trainer.fit()
    trainer.log.close()
    assert trainer._graphed is not None
    assert "can't be captured" not in capsys.readouterr().out
