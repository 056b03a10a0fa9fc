"""A memory over two processes: as good as one on each, killed, started again, and gone on with."""

import json
import subprocess
import sys

import pytest
import torch
from dhcl.training.checkpoint import load_checkpoint
from dhcl.training.runs import train
from dhcl.training.trainer import Trainer

from tests.dhcl.toy import command_line, options

# Each process leaves what it has in memory at the end of each run, and one may kill itself.
_SCRIPT = """
import os, signal, sys, torch
from pathlib import Path
from dhcl.cli.train import train_options
from dhcl.training.trainer import Trainer
import dhcl.training.runs
folder, words = Path(sys.argv[1]), sys.argv[2:]
fit, step = Trainer.fit, Trainer.step
def watched(self):
    fit(self)
    bank = self.bank
    torch.save({
        "features": bank.features, "rows": len(getattr(bank, "rows", bank.features)),
        "labels": self.labels, "layout": type(self.layout).__name__,
    }, folder / f"{self.config.run.name}-rank{self.engine.rank}.pt")
def killed(self, *batch):
    fatal = folder / "kill"
    if self.at.epoch == 1 and self.at.iteration == 2 and self.engine.rank == 1 and fatal.exists():
        fatal.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    step(self, *batch)
Trainer.fit, Trainer.step = watched, killed
for part in " ".join(words).split(" -- "):
    config, resume = train_options(part.split())
    dhcl.training.runs.train(config, resume=resume)
"""


def torchrun(folder, *runs, restarts=0):
    """Run trainings one after another on two processes; what they print."""
    script = folder / "script.py"
    script.write_text(_SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = [word for run in runs for word in (*run, "--")][:-1]
    done = subprocess.run(
        [*launch, f"--max-restarts={restarts}", str(script), str(folder), *words],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def entries(config):
    return [json.loads(line) for line in (config.run / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    """The same training with the whole memory on each process, and with half of it."""
    folder = tmp_path_factory.mktemp("sharded")
    changes = {"epochs": 2, "preset": "dhcl-hnm", "suspects": "exclude", "eval_every": 1}
    configs = [
        options(pictures, folder / kind, "dhcl-hnm", **{**changes, "memory_layout": kind})
        for kind in ("replicated", "sharded")
    ]
    (folder / "kill").touch()
    said = torchrun(folder, command_line(configs[1]), command_line(configs[0]), restarts=1)
    return folder, configs, said


def test_quality_is_that_of_a_replicated_memory(trained):
    folder, (whole, parted), _said = trained
    parts = [torch.load(folder / f"sharded-rank{rank}.pt") for rank in range(2)]
    assert [part["layout"] for part in parts] == ["Sharded", "Sharded"]
    assert [len(part["features"]) for part in parts] == [24, 24]
    assert sum(part["rows"] for part in parts) == 48
    assert torch.equal(parts[0]["labels"], parts[1]["labels"])
    one, other = entries(whole), entries(parted)
    for name in ("clusters", "outliers"):
        assert [e[name] for e in one] == [e[name] for e in other]
    assert other[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-4)
    assert other[1]["loss"] == pytest.approx(one[1]["loss"], rel=0.05)
    last = [json.loads((c.run / "metrics.json").read_text())["last"] for c in (whole, parted)]
    assert last[1]["mAP"] == pytest.approx(last[0]["mAP"], abs=0.05)


def test_a_killed_process_is_started_again_and_goes_on(trained):
    folder, (_, parted), said = trained
    assert not (folder / "kill").exists()
    assert "goes on in epoch 2 after 0 iterations" in said
    assert len(entries(parted)) == 2


def test_it_goes_on_with_one_process(trained, tmp_path, capsys, monkeypatch):
    folder, (_, parted), _ = trained
    features = torch.cat(
        [torch.load(folder / f"sharded-rank{rank}.pt")["features"] for rank in range(2)]
    )
    state = load_checkpoint(parted.run / "checkpoints" / "last.pt")
    memories = [path.name for path in (parted.run / "checkpoints").iterdir()]
    assert memories.count(state["bank"]["folder"]) == 1
    assert sorted(memories) == sorted(["best.pt", "last.pt", state["bank"]["folder"]])
    seen = {}
    restore = Trainer._restore

    def watched(self, state):
        restore(self, state)
        seen.update(features=self.bank.features.clone(), labels=self.labels.clone())
        seen["prototypes"] = self.bank.prototypes.clone()
        seen["again"] = self.bank
        self.bank.set_labels(self.bank.labels)

    monkeypatch.setattr(Trainer, "_restore", watched)
    from dhcl.config import with_changes

    train(with_changes(parted, {"epochs": 3}), resume=True)
    assert torch.equal(seen["features"], features)
    assert torch.equal(seen["labels"], state["labels"])
    assert "the run had 2 processes and goes on with 1" in capsys.readouterr().out
    assert len(entries(parted)) == 3
