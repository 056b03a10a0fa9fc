"""A memory over two processes: as good as one on each, killed, started again, and gone on with.

Its labels are those of a clustering in one process, by camera and with false negatives told by the
graph too.

``DHCL_KILL=1`` kills one of the processes on the way, whereupon torchrun starts them again.
"""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from dhcl.config import with_changes
from dhcl.training.checkpoint import load_checkpoint
from dhcl.training.lists import own_lists
from dhcl.training.memory import Replicated, Sharded
from dhcl.training.runs import train
from dhcl.training.trainer import Trainer

from dhcl_ops import FalseNegatives
from tests.dhcl.toy import command_line, options

KILL = os.environ.get("DHCL_KILL") == "1"

# Each process leaves what it has in memory at the end of each run, and one may kill itself. In an
# epoch with false negatives by the graph a checkpoint is written on the way, and a copy is kept.
_SCRIPT = """
import os, shutil, signal, sys, torch
from pathlib import Path
from dhcl.cli.train import train_options
from dhcl.training.trainer import Trainer
import dhcl.training.runs
folder, words = Path(sys.argv[1]), sys.argv[2:]
fit, step, restore = Trainer.fit, Trainer.step, Trainer._restore
def restored(self, state):
    restore(self, state)
    self.restored = self.bank.features.clone()
def watched(self):
    fit(self)
    bank = self.bank
    torch.save({
        "features": bank.features, "rows": len(getattr(bank, "rows", bank.features)),
        "prototypes": bank.prototypes, "labels": self.labels, "layout": type(self.layout).__name__,
        "restored": getattr(self, "restored", None), "lists": tuple(self.false_negatives or ()),
    }, folder / f"{self.config.run.name}-{self.config.epochs}-rank{self.engine.rank}.pt")
def killed(self, *batch):
    fatal = folder / "kill"
    if self.at.epoch == 1 and self.at.iteration == 2 and self.engine.rank == 1 and fatal.exists():
        fatal.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    graph = self.config.run.name.startswith("graph-")
    if graph and self.false_negatives is not None and self.at.iteration == 1:
        self.save()
        if self.engine.is_main:
            shutil.copytree(self.checkpoint.parent, folder / f"{self.config.run.name}-middle")
    step(self, *batch)
Trainer.fit, Trainer.step, Trainer._restore = watched, killed, restored
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


KINDS = ("replicated", "sharded")


def graph_options(pictures, folder, kind):
    """An epoch of two steps by the graph's false negatives and by cameras."""
    return options(
        pictures, folder / f"graph-{kind}", memory_layout=kind, epochs=1, iterations=2, k1_own=3,
        debias="graph", debias_eps=0.99, suspects="exclude", self_paced=True, warmup_epochs=0,
        instance_weight=0.5, eval_every=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    """The same training with the whole memory on each process, and with half of it."""
    folder = tmp_path_factory.mktemp("sharded")
    changes = {"epochs": 2, "preset": "dhcl-hnm", "suspects": "exclude", "eval_every": 1}
    changes["rerank"] = True
    configs = [
        options(pictures, folder / kind, "dhcl-hnm", **{**changes, "memory_layout": kind})
        for kind in KINDS
    ]
    if KILL:
        (folder / "kill").touch()
    again = ["--resume", str(configs[0].run), "--epochs", "3", "--memory-layout", "sharded"]
    graphs = [command_line(graph_options(pictures, folder, kind)) for kind in KINDS]
    said = torchrun(
        folder, command_line(configs[1]), command_line(configs[0]), again, *graphs,
        restarts=int(KILL),
    )  # fmt: skip
    return folder, configs, said


def parts_of(folder, run):
    """What each process had at the end of a run."""
    return [torch.load(folder / f"{run}-rank{rank}.pt") for rank in range(2)]


def test_quality_is_that_of_a_replicated_memory(trained):
    folder, (whole, parted), _said = trained
    parts = parts_of(folder, "sharded-2")
    assert [part["layout"] for part in parts] == ["Sharded", "Sharded"]
    assert [len(part["features"]) for part in parts] == [24, 24]
    assert sum(part["rows"] for part in parts) == 48
    assert torch.equal(parts[0]["labels"], parts[1]["labels"])
    one, other = entries(whole)[:2], entries(parted)
    for name in ("clusters", "outliers"):
        assert [e[name] for e in one] == [e[name] for e in other]
    assert other[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-4)
    assert other[1]["loss"] == pytest.approx(one[1]["loss"], rel=0.05)
    seen = [run[0]["observed"]["mAP"] for run in (one, other)]
    assert seen[1] == pytest.approx(seen[0], abs=0.02)
    last = json.loads((parted.run / "metrics.json").read_text())["last"]
    assert last["mAP"] > 0.2
    assert last["reranked"]["queries"] == last["queries"]
    assert 0 < last["reranked"]["mAP"] <= 1


def test_labels_and_lists_by_camera_and_graph_are_those_of_one_process(trained, pictures):
    folder, _, _ = trained
    whole, parted = (parts_of(folder, f"graph-{kind}-1") for kind in KINDS)
    assert [part["layout"] for part in parted] == ["Sharded"] * 2
    one = FalseNegatives(*whole[0]["lists"])
    assert len(one.classes) > one.offsets[24] > 24
    for rank, part in enumerate(parted):
        assert torch.equal(part["labels"], whole[0]["labels"])
        wanted = own_lists(one, range(24 * rank, 24 * (rank + 1)))
        assert all(map(torch.equal, part["lists"], wanted))
    logs = [entries(graph_options(pictures, folder, kind))[0] for kind in KINDS]
    assert logs[1]["clusters"] == logs[0]["clusters"] > 1
    assert logs[1]["loss"] == pytest.approx(logs[0]["loss"], rel=1e-4)
    assert logs[1]["skipped_updates"] == logs[0]["skipped_updates"] == 0


def test_lists_are_gone_on_with_by_any_processes_and_layout(trained):
    folder, _, _ = trained
    one = FalseNegatives(*parts_of(folder, "graph-replicated-1")[0]["lists"])
    images = range(48)
    for kind in KINDS:
        middle = folder / f"graph-{kind}-middle"
        state = load_checkpoint(middle / "last.pt")
        assert ("folder" in state["bank"], state["false_negatives"] is None) == (
            (kind == "sharded",) * 2
        )
        found = Replicated(None, None, images, 0).load_lists(state, middle)
        assert all(map(torch.equal, found, one))
        for rank in range(3):
            share = SimpleNamespace(
                share=lambda count, at=rank: range(count)[at * 16 : at * 16 + 16]
            )
            own = Sharded(None, share, images, 0).load_lists(state, middle)
            assert all(map(torch.equal, own, own_lists(one, share.share(48))))


@pytest.mark.skipif(not KILL, reason="twice as many processes; DHCL_KILL=1 kills one")
def test_a_killed_process_is_started_again_and_goes_on(trained):
    folder, (_, parted), said = trained
    assert not (folder / "kill").exists()
    assert "goes on in epoch 2 after 0 iterations" in said
    assert len(entries(parted)) == 2


def test_a_replicated_memory_goes_on_as_a_sharded_one(trained):
    folder, (whole, _), _ = trained
    before, after = parts_of(folder, "replicated-2"), parts_of(folder, "replicated-3")
    assert [part["layout"] for part in (*before, *after)] == ["Replicated"] * 2 + ["Sharded"] * 2
    assert torch.equal(torch.cat([part["restored"] for part in after]), before[0]["features"])
    assert len(entries(whole)) == 3


def test_it_goes_on_with_one_process(trained, tmp_path, capsys, monkeypatch):
    folder, (_, parted), _ = trained
    parts = parts_of(folder, "sharded-2")
    whole = {name: torch.cat([p[name] for p in parts]) for name in ("features", "prototypes")}
    state = load_checkpoint(parted.run / "checkpoints" / "last.pt")
    memories = [path.name for path in (parted.run / "checkpoints").iterdir()]
    assert memories.count(state["bank"]["folder"]) == 1
    assert sorted(memories) == sorted(["best.pt", "last.pt", state["bank"]["folder"]])
    seen = {}
    restore = Trainer._restore

    def watched(self, state):
        restore(self, state)
        bank = self.bank
        seen.update(features=bank.features.clone(), prototypes=bank.prototypes.clone())
        seen["labels"] = self.labels.clone()

    monkeypatch.setattr(Trainer, "_restore", watched)
    train(with_changes(parted, {"epochs": 3}), resume=True)
    for name, wanted in whole.items():
        assert torch.equal(seen[name], wanted), name
    assert torch.equal(seen["labels"], state["labels"])
    assert "the run had 2 processes and goes on with 1" in capsys.readouterr().out
    assert len(entries(parted)) == 3
