"""Runs that are followed by loggers of other projects: MLflow's file store, and one of our own."""

import json

import dhcl.training.trackers
import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerate.utils import LoggerType
from dhcl.cli import main
from dhcl.cli.train import train_options
from dhcl.config import ConfigError, TrainConfig, with_changes
from dhcl.errors import Interrupted
from dhcl.training.runs import train
from dhcl.training.trainer import Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.dhcl.toy import options

SMALL = {"epochs": 3, "iterations": 2, "warmup_epochs": 0, "eval_every": 1}


def entries(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_the_names_are_accelerates():
    known = {str(each) for each in LoggerType.list()} - {"all"}
    for name in known:
        assert with_changes(TrainConfig(), {"log_with": [name]}).log_with == (name,)
    with pytest.raises(ConfigError, match=r"log_with: must be .aim., .*got board"):
        with_changes(TrainConfig(), {"log_with": ["board"]})


def test_in_a_file_and_on_the_command_line(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("log_with: mlflow\n")
    assert train_options(["--config", str(file)])[0].log_with == ("mlflow",)
    config, _ = train_options(["--log-with", "wandb", "tensorboard"])
    assert config.log_with == ("wandb", "tensorboard")
    file.write_text(config.to_yaml())
    assert train_options(["--config", str(file)])[0] == config


def test_a_package_that_is_missing_is_named_before_anything_is_done(
    pictures, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(dhcl.training.trackers, "get_available_trackers", lambda: ["tensorboard"])
    config = options(pictures, tmp_path / "run", log_with=["tensorboard", "comet_ml"])
    with pytest.raises(ConfigError, match="log_with: comet_ml is not installed: pip install comet"):
        train(config)
    assert not config.run.exists()
    command = ["train", "--root", str(pictures), "--out", str(config.run), "--log-with", "aim"]
    assert main(command) == 2
    assert "dhcl: log_with: aim is not installed: pip install aim" in capsys.readouterr().err
    assert not config.run.exists()


@pytest.fixture
def mlflow(tmp_path, monkeypatch):
    """A client of a store in files."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    return mlflow.MlflowClient()


def interrupted(monkeypatch, epoch):
    """Have training stop after an epoch, as if by Ctrl-C."""
    finish = Trainer.finish_epoch

    def stop(self):
        finish(self)
        if self.at.epoch == epoch:
            raise Interrupted(2)

    monkeypatch.setattr(Trainer, "finish_epoch", stop)


def test_mlflow_has_what_the_log_has_and_a_resumed_run_goes_on_in_it(
    mlflow, pictures, tmp_path, monkeypatch
):
    config = options(pictures, tmp_path / "run", log_with=["mlflow"], **SMALL)
    with monkeypatch.context() as patched:
        interrupted(patched, 1)
        with pytest.raises(Interrupted):
            train(config)
    results = train(config, resume=True).metrics
    [experiment] = mlflow.search_experiments(filter_string="name = 'dhcl'")
    [run] = mlflow.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.info.run_id == json.loads((config.run / "loggers.json").read_text())["mlflow"]
    assert run.data.params["lr"] == str(config.optimiser.lr)
    assert run.data.params["image_size"] == "32 16"
    logged = entries(config.run)
    for name, of_entry in {
        "loss": lambda entry: entry["loss"],
        "clusters": lambda entry: entry["clusters"],
        "observed/ari": lambda entry: entry["observed"]["ari"],
        "seconds/train": lambda entry: entry["seconds"]["train"],
    }.items():
        history = mlflow.get_metric_history(run.info.run_id, name)
        assert [point.step for point in history] == [0, 1, 2]
        assert [point.value for point in history] == pytest.approx([*map(of_entry, logged)])
    assert run.data.metrics["observed/mAP"] == pytest.approx(logged[1]["observed"]["mAP"])
    for name in ("mAP", "rank1", "rank5", "rank10", "mINP"):
        assert run.data.metrics[f"last/{name}"] == pytest.approx(results["last"][name])
    assert "observed/observed_only" not in run.data.metrics


def test_tensorboard_has_the_last_metrics_too(pictures, tmp_path):
    config = options(pictures, tmp_path / "run", log_with=["tensorboard"], **SMALL)
    results = train(config).metrics
    board = EventAccumulator(str(config.run / "tensorboard"))
    board.Reload()
    [last] = board.Scalars("last/mAP")
    assert (last.step, last.value) == (2, pytest.approx(results["last"]["mAP"]))
    assert [point.step for point in board.Scalars("loss")] == [0, 1, 2]
    assert not (config.run / "loggers.json").exists()


class Failing(GeneralTracker):
    """A logger whose server is gone in the second epoch."""

    name = "aim"
    requires_logging_directory = True
    starts = True

    def __init__(self, project, folder):
        super().__init__()
        self.seen, Failing.last = [], self
        self.project, self.folder = project, folder

    @property
    def tracker(self):
        return self

    def start(self):
        if not self.starts:
            raise ConnectionError("no server\nat all")

    def log(self, values, step):
        if step == 1:
            raise ConnectionError("gone")
        self.seen.append((step, values))

    def finish(self):
        raise ConnectionError("still gone")


@pytest.fixture
def failing(monkeypatch):
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "aim", Failing)
    monkeypatch.setattr(dhcl.training.trackers, "get_available_trackers", lambda: ["aim"])
    return Failing


def test_a_logger_that_fails_along_the_way_does_not_end_the_training(
    failing, pictures, tmp_path, capsys
):
    config = options(pictures, tmp_path / "run", log_with=["aim", "aim"], **SMALL)
    results = train(config).metrics
    said = capsys.readouterr()
    assert said.out.count("warning: aim did not take epoch 2 (ConnectionError: gone)") == 1
    assert said.out.count("warning: aim did not finish (ConnectionError: still gone)") == 1
    assert (failing.last.project, failing.last.folder) == ("dhcl", str(config.run))
    assert [step for step, _ in failing.last.seen] == [0, 2, 2]
    assert failing.last.seen[-1][1]["last/mAP"] == results["last"]["mAP"]
    assert len(entries(config.run)) == 3


def test_a_logger_that_cannot_start_is_an_error_before_the_first_epoch(
    failing, pictures, tmp_path, monkeypatch
):
    monkeypatch.setattr(failing, "starts", False)
    config = options(pictures, tmp_path / "run", log_with=["aim"], **SMALL)
    with pytest.raises(ConfigError, match=r"aim can't start \(ConnectionError: no server\)$"):
        train(config)
    assert not (config.run / "log.jsonl").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"mlflow": 3}'])
def test_a_damaged_file_of_loggers_is_named(text, failing, pictures, tmp_path):
    config = options(pictures, tmp_path / "run", log_with=["aim"], **SMALL)
    config.run.mkdir()
    (config.run / "loggers.json").write_text(text)
    with pytest.raises(ConfigError, match=r"log_with: .*loggers\.json"):
        train(config)
