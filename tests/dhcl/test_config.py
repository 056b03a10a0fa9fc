import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from dhcl.cli.commands import train_options
from dhcl.config import PRESETS, ConfigError, TrainConfig, preset, with_changes
from dhcl.training.trainer import learning_rate


def test_every_option_is_documented(capsys):
    with pytest.raises(SystemExit):
        train_options(["--help"])
    shown = capsys.readouterr().out
    for field in dataclasses.fields(TrainConfig):
        assert "--" + field.name.replace("_", "-") in shown


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
    file.write_text("preset: spcl\nmomentum: 0.5\nlr: 1e-4\nimage_size: [64, 32]\nflip: 0\n")
    config, _ = train_options(["--config", str(file), "--momentum", "0.7", "--no-pretrained"])
    assert config.self_paced
    assert config.preset == "spcl"
    assert (config.momentum, config.lr, config.image_size) == (0.7, 1e-4, (64, 32))
    assert not config.pretrained
    other, _ = train_options(["--config", str(file), "--preset", "cluster-contrast"])
    assert other.memory == "clusters"
    assert not other.self_paced


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
        ("update: no", "update: must be 'all' or 'hard'.*got False"),
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
    ({"update": "hard"}, "update and memory"),
    ({"outliers": "drop"}, "outliers and memory"),
    ({"prototype_weight": 0.0, "instance_weight": 0.0}, "prototype_weight and instance_weight"),
    ({"suspects": "kappa", "kappa": 0.25}, "suspects and kappa"),
    ({"eps": 0.99, "self_paced": True}, "eps and eps_gap"),
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
    with pytest.raises(ConfigError, match=r"(?s)lr: .*kappa: "):
        with_changes(TrainConfig(), {"lr": -1.0, "kappa": -1.0}).resolved()


def test_hardness_is_beta_over_the_temperature_given_last(tmp_path):
    config, _ = train_options(["--hardness", "4", "--temperature", "0.1"])
    assert config.beta == pytest.approx(0.4)
    with pytest.raises(ConfigError, match="beta and hardness"):
        train_options(["--hardness", "4", "--beta", "0.3"])
    file = tmp_path / "config.yaml"
    file.write_text("hardness: 4")
    config, _ = train_options(["--config", str(file), "--beta", "0.3"])
    assert config.beta == 0.3
    assert yaml.safe_load(config.to_yaml())["hardness"] is None


def test_learning_rates_of_the_schedules():
    config = TrainConfig(lr=1.0, lr_step=2, epochs=6)
    assert [learning_rate(config, e) for e in range(5)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    warm = TrainConfig(lr=1.0, lr_warmup=3, schedule="constant")
    assert [learning_rate(warm, e) for e in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    cosine = TrainConfig(lr=1.0, schedule="cosine", epochs=4)
    assert [learning_rate(cosine, e) for e in (0, 2)] == pytest.approx([1.0, 0.5])


def test_paths_may_be_strings():
    config = with_changes(TrainConfig(), {"root": "some/where", "out": "run", "weights": None})
    assert (config.root, config.out, config.weights) == (Path("some/where"), Path("run"), None)


def test_options_are_read_without_torch_or_a_command_line():
    code = "import sys, dhcl.config; print({'torch', 'tyro', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
