import inspect
import re
import subprocess
import sys
from pathlib import Path

import dhcl.demo
import dhcl.pretrain
import pytest
import yaml
from dhcl.cli.train import train_options
from dhcl.config import (
    OPTIONS,
    PRESETS,
    REMOVED,
    SECTIONS,
    ConfigError,
    OptimiserOptions,
    TrainConfig,
    flat_options,
    load_config,
    preset,
    with_changes,
)
from dhcl.training.trainer import learning_rate

from dhcl_ops.defaults import SPCL

ROOT = Path(__file__).resolve().parents[2]


def test_every_option_is_documented(capsys):
    with pytest.raises(SystemExit):
        train_options(["--help"])
    shown = capsys.readouterr().out
    for name in OPTIONS:
        # Each has one flag, without its section, in a line of its own.
        assert len(re.findall(rf"--{name.replace('_', '-')}[ ,]", shown)) == 1, name
    assert "--loss." not in shown


def test_the_clustering_is_spcl_s_by_default():
    """The options are read without torch, so they can't take these numbers from the ops."""
    labels = TrainConfig().labels
    for name in set(SPCL._fields) & set(vars(labels)):
        assert getattr(labels, name) == getattr(SPCL, name), name
    assert {"k1", "k2", "eps", "min_samples"} <= set(vars(labels))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_survive_yaml(name, tmp_path):
    config = preset(name).resolved()
    assert config.preset == name
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    again, resume = train_options(["--config", str(file)])
    assert again == config
    assert not resume


def test_the_command_line_goes_before_the_file_and_the_file_before_the_preset(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("preset: spcl\nmomentum: 0.5\nlr: 1e-4\nimage_size: [64, 32]\nerase: 0\n")
    config, _ = train_options(["--config", str(file), "--momentum", "0.7", "--no-pretrained"])
    assert config.labels.self_paced
    assert config.preset == "spcl"
    assert (config.memory.momentum, config.optimiser.lr) == (0.7, 1e-4)
    assert (config.model.image_size, config.batches.erase) == ((64, 32), 0.0)
    assert not config.model.pretrained
    other, _ = train_options(["--config", str(file), "--preset", "cluster-contrast"])
    assert other.memory.memory == "clusters"
    assert not other.labels.self_paced


def test_unknown_names_are_refused_with_the_nearest(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train_options(["--kapa", "1"])
    assert stop.value.code == 2
    assert "--kappa" in capsys.readouterr().err
    file = tmp_path / "config.yaml"
    file.write_text("temprature: 0.1\n")
    with pytest.raises(ConfigError, match=r"temprature.*did you mean 'temperature'"):
        train_options(["--config", str(file)])
    with pytest.raises(ConfigError, match=r"spc.*did you mean 'spcl'"):
        train_options(["--preset", "spc"])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("kappa: abc", "kappa: must be a valid number.*got abc"),
        ("suspects: no", "suspects: must be 'off', 'exclude' or 'kappa'.*got False"),
        ("k1: true", "k1: must be a number.*got True"),
        ("lr: .inf", "lr: must be a finite number.*got inf"),
        ("loss:\n  kappa: -1", "kappa: must be greater than or equal to 0.*got -1"),
        ("loss: 3", r"loss: must hold `option: value` lines.*got 3"),
        ("loss:\n  lr: 1.0", "lr: is an option of section optimiser.*got it in loss"),
        ("loss:\n  seed: 1", "seed: is an option of no section.*got it in loss"),
        ("loss:\n  kapa: 1", "option: .*'kapa'; did you mean 'kappa'"),
        ("kappa: 1\nloss:\n  kappa: 2", "kappa: is given twice.*got 1 and 2"),
        ("image_size: [1, 2, 77]", r"image_size: must .*2 items.*got \[1, 2, 77\]"),
    ],
)
def test_wrong_values_in_a_file_name_the_file_and_the_option(text, shown, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=rf"config\.yaml: {shown}"):
        train_options(["--config", str(file)])


@pytest.mark.parametrize("text", ["- a\n- b", "a: [", "just words"])
def test_files_that_are_no_options_are_refused(text, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match="config"):
        train_options(["--config", str(file)])
    with pytest.raises(ConfigError, match="can't be read"):
        train_options(["--config", str(tmp_path / "none.yaml")])


CONTRADICTIONS = [
    ({"samples_per_bn": 16, "camera_bn": True}, "samples_per_bn and camera_bn"),
    ({"k1_own": 31}, r"k1_own and k1: .*got 31 and 30"),
    ({"pattern": "x", "data": "market1501"}, "pattern and data"),
    ({"memory": "clusters", "instance_weight": 0.0}, "memory and cluster_on"),
    (
        {"memory": "clusters", "cluster_on": "extracted", "instance_weight": 0.1},
        "memory and instance_weight",
    ),
    ({"outliers": "drop"}, "outliers and memory"),
    (
        {"memory": "clusters", "cluster_on": "extracted", "memory_layout": "sharded"},
        r"memory_layout: a sharded memory is one of instances \(got memory clusters\)",
    ),
    ({"prototype_weight": 0.0, "instance_weight": 0.0}, "prototype_weight and instance_weight"),
    ({"suspects": "kappa", "kappa": 0.25}, "suspects and kappa"),
    ({"debias": "graph", "kappa": 0.25}, "debias and kappa"),
    ({"debias": "graph", "suspects": "kappa"}, "debias and suspects"),
    ({"debias": "graph", "debias_eps": 0.5}, "debias_eps and eps"),
    ({"eps": 0.99, "self_paced": True}, r"self_paced and eps: .*got eps 0\.99"),
    ({"eps": 0.01, "suspects": "exclude"}, r"suspects and eps: .*got eps 0\.01"),
    ({"classes_per_batch": 1, "images_per_class": 1}, "classes_per_batch and images_per_class"),
    ({"iterations": 10, "accumulate": 4}, "iterations and accumulate"),
    ({"precision": "fp16", "device": "cpu"}, "precision and device"),
    ({"k1": 4, "k2": 6}, "k2 and k1"),
]


@pytest.mark.parametrize(("changes", "message"), CONTRADICTIONS)
def test_contradictions_name_both_options(changes, message):
    with pytest.raises(ConfigError, match=message):
        with_changes(TrainConfig(), changes).resolved()


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", 0.0), ("kappa", -1.0), ("momentum", 1.5), ("eps", 1.0), ("epochs", 0), ("seed", -1)],
)
def test_values_out_of_range_are_named(name, value):
    with pytest.raises(ConfigError, match=f"{name}: must be .*got {value}"):
        with_changes(TrainConfig(), {name: value}).resolved()


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(ConfigError, match=r"(?s)kappa: .*lr: "):
        with_changes(TrainConfig(), {"lr": -1.0, "kappa": -1.0}).resolved()


def test_hardness_is_beta_over_the_temperature_given_last(tmp_path):
    config, _ = train_options(["--hardness", "4", "--temperature", "0.1"])
    assert config.loss.beta == pytest.approx(0.4)
    with pytest.raises(ConfigError, match="beta and hardness"):
        train_options(["--hardness", "4", "--beta", "0.3"])
    file = tmp_path / "config.yaml"
    file.write_text("hardness: 4")
    config, _ = train_options(["--config", str(file), "--beta", "0.3"])
    assert config.loss.beta == 0.3
    assert yaml.safe_load(config.to_yaml())["loss"]["hardness"] is None


def test_the_learning_rate_falls_to_a_tenth():
    options = OptimiserOptions(lr=1.0, lr_step=2)
    assert [learning_rate(options, e) for e in range(5)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])


def test_options_are_written_by_section_and_read_with_or_without():
    config = with_changes(preset("dhcl-hnm"), {"data": "market1501", "root": "x", "eps": 0.5})
    written = yaml.safe_load(config.to_yaml())
    assert list(written)[-len(SECTIONS) :] == list(SECTIONS)
    assert written["loss"]["debias"] == "graph"
    assert written["data"]["data"] == "market1501"
    assert with_changes(TrainConfig(), written) == config
    assert with_changes(TrainConfig(), {**written, "loss": {}, **written["loss"]}) == config
    assert with_changes(TrainConfig(), flat_options(config)) == config
    assert flat_options(config)["data"] == "market1501"


# What a run of version 0.1 wrote.
OLD = """
{data: market1501, root: people, pattern: null, on_bad: refuse, cache_gb: 0.25, workers: 4,
out: null, preset: spcl, seed: 0, device: auto, precision: fp32, deterministic: false,
backbone: small, pretrained: false, weights: null, pooling: null, image_size: [64, 32],
samples_per_bn: 0, camera_bn: true, calibrate: epoch, cluster_on: extracted, k1: 20, k1_own: 0,
k2: 6, eps: 0.45, min_samples: 4, eps_gap: 0.02, self_paced: true, outliers: keep, patience: 5,
memory: instances, momentum: 0.2, update: all, temperature: 0.05, prototype_weight: 1.0,
instance_weight: 0.0, instance_positives: self, kappa: 0.0, beta: 0.0, hardness: null,
hardness_gradient: stop, suspects: 'off', warmup_epochs: 0, classes_per_batch: 16,
images_per_class: 4, accumulate: 1, iterations: 20, epochs: 18, flip: 0.5, pad: 3, erase: 0.5,
color_jitter: 0.0, lr: 0.0007, weight_decay: 0.0005, schedule: step, lr_step: 13, lr_gamma: 0.1,
lr_warmup: 0, eval_every: 10, eval_batch: 128, rerank: true, report: true,
checkpoint_minutes: 10.0, checkpoint_iterations: 0}
"""


def test_files_of_earlier_versions_are_read(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(OLD)
    config = load_config(file)
    since = {"log_with", "memory_layout", "timeout_minutes", "debias", "debias_eps"}
    assert set(yaml.safe_load(OLD)) == {*OPTIONS, *REMOVED} - since
    assert (config.preset, config.labels.eps, config.model.calibrate) == ("spcl", 0.45, "epoch")
    assert config.data.data == "market1501"


@pytest.mark.parametrize("name", REMOVED)
def test_options_that_are_gone_are_accepted_with_the_value_that_is_left(name):
    assert name not in OPTIONS
    assert with_changes(TrainConfig(), {name: REMOVED[name]}) == TrainConfig()
    with pytest.raises(ConfigError, match=rf"{name}: this option is gone.*{REMOVED[name]}.*got 7"):
        with_changes(TrainConfig(), {name: 7})


def test_each_option_is_one_that_a_preset_a_command_or_a_page_uses():
    """The table of all options, which is generated, is not such a page."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    text = "\n".join(page.read_text() for page in pages)
    own = "\n".join(inspect.getsource(module) for module in (dhcl.demo, dhcl.pretrain))
    used = {name for changes in PRESETS.values() for name in changes}
    for name in OPTIONS:
        flag = name.replace("_", "-")
        told = re.search(rf"--(no-)?{flag}\b|`{name}`|\"{name}\"|^{name}: ", text, re.MULTILINE)
        assert name in used or f'"{name}"' in own or told, name


def test_paths_may_be_strings():
    config = with_changes(TrainConfig(), {"root": "some/where", "out": "run", "weights": None})
    assert (config.data.root, config.out, config.model.weights) == (
        Path("some/where"),
        Path("run"),
        None,
    )


def test_options_are_read_without_torch_or_a_command_line():
    code = "import sys, dhcl.config; print({'torch', 'tyro', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
