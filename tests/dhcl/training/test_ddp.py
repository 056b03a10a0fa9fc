"""Two processes over Gloo, started by torchrun, on the CPU."""

import json
import subprocess
import sys

import pytest
import torch
from dhcl.training.checkpoint import load_checkpoint

from tests.dhcl.toy import command_line, options

# A run in which every rank leaves what it has in memory.
_SCRIPT = """
import sys, torch
from pathlib import Path
from dhcl.cli.train import train_options
from dhcl.training.trainer import Trainer
import dhcl.training.runs
fit = Trainer.fit
def watched(self):
    fit(self)
    torch.save({
        "bank": self.bank.state_dict(), "labels": self.labels, "rows": self.rows,
        "model": {k: v for k, v in self.model.named_parameters()},
        "world": self.engine.world_size,
    }, Path(sys.argv[1]) / f"rank{self.engine.rank}.pt")
Trainer.fit = watched
config, resume = train_options(sys.argv[2:])
dhcl.training.runs.train(config, resume=resume)
"""


def torchrun(tmp_path, config, *more):
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, str(script), str(tmp_path), *(more or command_line(config))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", ["dhcl", pytest.param("cluster-contrast", marks=pytest.mark.long)])
def test_both_ranks_hold_the_same_memory_labels_and_weights(name, pictures, tmp_path):
    changes = {"images_per_class": 4, "eval_every": 1, "camera_bn": True}
    config = options(pictures, tmp_path / "run", name, **changes)
    first, second = torchrun(tmp_path, config)
    assert first["world"] == 2
    for part in ("bank", "model"):
        assert first[part].keys() == second[part].keys()
        for key in first[part]:
            assert torch.equal(first[part][key], second[part][key]), key
    assert torch.equal(first["labels"], second["labels"])
    assert torch.equal(first["rows"], second["rows"])
    log = (config.run / "log.jsonl").read_text().splitlines()
    assert len(log) == 3
    assert json.loads((config.run / "metrics.json").read_text())["last"]["queries"] == 16


def test_it_goes_on_to_the_same_bits_on_two_processes(pictures, tmp_path):
    whole = options(pictures, tmp_path / "whole", epochs=2)
    torchrun(tmp_path, whole)
    half = options(pictures, tmp_path / "half", epochs=1)
    torchrun(tmp_path, half)
    torchrun(tmp_path, half, "--resume", str(half.run), "--epochs", "2")
    a, b = (load_checkpoint(c.run / "checkpoints" / "last.pt") for c in (whole, half))
    for key in a["model"]:
        assert torch.equal(a["model"][key], b["model"][key]), key
    assert torch.equal(a["bank"]["features"], b["bank"]["features"])
    assert len(a["random"]) == 2
