import dataclasses
import json

import dhcl.training.runs
import numpy as np
import pytest
import torch
from dhcl.config import ConfigError
from dhcl.data import ImageList, load_data
from dhcl.metrics import table
from dhcl.report import write_report
from dhcl.training.engine import Engine
from dhcl.training.evaluation import Evaluator, IdentityObserver
from dhcl.training.network import make_model
from dhcl.training.record import read_record
from dhcl.training.results import collect
from dhcl.training.runs import evaluate_run, open_data, train
from dhcl.training.trainer import PATIENCE, WEIGHT_DECAY, Diverged, NoClusters, Trainer

from dhcl_ops import evaluate_ranking, hybrid_contrastive_loss, momentum_update_
from tests.checks import same_bits
from tests.dhcl.toy import options, write_images


def weights(run, name="last"):
    return torch.load(run / "checkpoints" / f"{name}.pt", weights_only=True)["model"]


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def make_trainer(config):
    engine = Engine(config)
    data = load_data(config.data.data, config.data.root)
    model = make_model(config.model, data.train.num_cameras, config.seed)
    return Trainer(config, engine, model, data.unlabeled)


def entries(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


VARIANTS = {
    "dhcl": {},
    "spcl": {"name": "spcl"},
    "cluster-contrast": {"name": "cluster-contrast", "images_per_class": 4},
    "clusters with outliers": {
        "name": "cluster-contrast",
        "images_per_class": 4,
        "outliers": "keep",
        "eps": 0.3,
    },
    "suspects excluded": {"suspects": "exclude", "kappa": 0.25},
    "suspects counted": {"suspects": "kappa"},
    "extracted": {"cluster_on": "extracted", "calibrate": "epoch"},
    "H1": {"name": "dhcl-hnm"},
    "H2": {"prototype_weight": 0.0, "instance_weight": 1.0, "instance_positives": "class"},
    "cross-camera positives": {"instance_weight": 1.0, "instance_positives": "cross-camera"},
    "false negatives by the graph": {"debias": "graph", "warmup_epochs": 1, "beta": 0.1},
    "camera_bn": {"camera_bn": True},
    "neighbours by camera": {"k1_own": 3},
    "ghost, accumulated": {"samples_per_bn": 8, "accumulate": 2, "iterations": 6},
    "hard negatives": {"beta": 0.5},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_trains_and_is_logged(variant, pictures, tmp_path):
    config = options(pictures, tmp_path / "run", **VARIANTS[variant])
    results = train(config).metrics
    assert results["last"]["queries"] == 16
    assert 0.0 < results["last"]["mAP"] <= 1.0
    logged = entries(config.run)
    assert [entry["epoch"] for entry in logged] == [0, 1, 2]
    for entry in logged:
        assert np.isfinite(entry["loss"])
        assert {"neighbours", "jaccard", "dbscan", "train"} <= entry["seconds"].keys()
        assert entry["observed"]["observed_only"] is True
        assert -1 <= entry["observed"]["ari"] <= 1
    assert ("extract" in logged[2]["seconds"]) == (config.labels.cluster_on == "extracted")
    table_lines = (config.run / "log.csv").read_text().splitlines()
    assert len(table_lines) == 4
    assert "seconds.dbscan" in table_lines[0]
    assert list((config.run / "tensorboard").iterdir())


def test_training_learns(tmp_path):
    root = write_images(tmp_path / "pictures", people=16, cameras=3)
    config = options(root, tmp_path / "run", epochs=6, iterations=15, lr=1e-3, eval_every=1)
    train(config)
    losses = [entry["prototype_loss"] for entry in entries(config.run)]
    assert losses[-1] < losses[1]
    first = make_model(config.model, 2, config.seed).state_dict()
    assert not torch.equal(first["backbone.0.0.weight"], weights(config.run)["backbone.0.0.weight"])


def test_a_step_is_the_loss_a_gradient_step_and_the_update(pictures, tmp_path):
    """The whole step again, from its parts, in double-checked plain form."""
    once = {"epochs": 1, "iterations": 1, "warmup_epochs": 0}
    method = {"instance_weight": 0.25, "instance_positives": "self", "kappa": 0.25, "beta": 0.1}
    config = options(pictures, tmp_path / "run", **method, **once)
    trainer = make_trainer(config)
    features = trainer.recall()
    trainer.remember(features, trainer.cluster(features))
    bank, parameter = trainer.bank.features.clone(), trainer.model.backbone[0][0].weight
    before = parameter.detach().clone()
    images, indices, cameras = next(trainer.batches())
    twin = make_model(config.model, 2, config.seed)
    twin.load_state_dict(trainer.model.state_dict())
    twin.train()
    out = twin(images, cameras)
    loss = hybrid_contrastive_loss(out, trainer.bank, indices, **method)
    loss.backward()
    trainer.step(images, indices, cameras)
    assert trainer.at.totals[0] == pytest.approx(loss.item(), rel=1e-5)
    gradient = twin.backbone[0][0].weight.grad + WEIGHT_DECAY * before
    # Adam's first step has the length of the learning rate against the gradient's sign.
    torch.testing.assert_close(
        parameter.detach(), before - config.optimiser.lr * gradient / (gradient.abs() + 1e-8)
    )
    momentum_update_(bank, out.detach(), indices, 0.2)
    torch.testing.assert_close(trainer.bank.features, bank)
    trainer.log.close()


def test_identities_never_reach_the_training(pictures, tmp_path, monkeypatch):
    def shuffled(name, root, **more):
        data = load_data(name, root, **more)
        ids = np.random.default_rng(1).permutation(data.train.ids)
        assert (ids != data.train.ids).any()
        return dataclasses.replace(data, train=ImageList(data.train.paths, ids, data.train.cameras))

    changes = {"eval_every": 1, "camera_bn": True}
    train(options(pictures, tmp_path / "a", **changes))
    monkeypatch.setattr(dhcl.training.runs, "load_data", shuffled)
    train(options(pictures, tmp_path / "b", **changes))
    assert_same_weights(weights(tmp_path / "a"), weights(tmp_path / "b"))
    seen = [[entry["observed"]["ari"] for entry in entries(tmp_path / run)] for run in "ab"]
    assert seen[0] != seen[1]  # the observer did look


def test_looking_at_metrics_or_more_workers_changes_no_bit(pictures, tmp_path):
    train(options(pictures, tmp_path / "a"))
    train(options(pictures, tmp_path / "b", eval_every=1, workers=2, cache_gb=0.0, rerank=True))
    assert_same_weights(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_another_seed_gives_another_model(pictures, tmp_path):
    train(options(pictures, tmp_path / "a", epochs=1))
    train(options(pictures, tmp_path / "b", epochs=1, seed=1))
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert not torch.equal(a["backbone.0.0.weight"], b["backbone.0.0.weight"])


def test_accumulated_batches_make_one_step(pictures, tmp_path):
    config = options(pictures, tmp_path / "run", accumulate=2, iterations=6)
    trainer = make_trainer(config)
    features = trainer.recall()
    trainer.remember(features, trainer.cluster(features))
    parameter = trainer.model.backbone[0][0].weight
    changed = []
    for images, indices, cameras in trainer.batches():
        before = parameter.detach().clone()
        trainer.step(images, indices, cameras)
        changed.append(not torch.equal(before, parameter))
    assert changed == [False, True] * 3
    trainer.log.close()


def test_last_is_reported_and_best_beside_it_by_name(pictures, tmp_path):
    config = options(pictures, tmp_path / "run", eval_every=1, rerank=True, lr=0.05)
    results = train(config).metrics
    stored = json.loads((config.run / "metrics.json").read_text())
    assert stored == results
    assert results["last"]["epoch"] == 2
    assert {"mAP", "mINP", "rank1", "rank5", "rank10"} <= results["last"]["reranked"].keys()
    assert "not a fair result" in results["best"]["chosen_by"]
    looked_at = [e["observed"]["mAP"] for e in entries(config.run) if "mAP" in e["observed"]]
    assert len(looked_at) == 2
    assert results["best"]["mAP"] == max(*looked_at, results["last"]["mAP"])
    again = evaluate_run(config, config.run)
    assert again["mAP"] == pytest.approx(results["last"]["mAP"])
    best = evaluate_run(config, config.run, which="best")
    assert best["mAP"] == pytest.approx(max(looked_at))


def test_other_data_are_evaluated_without_statistics_per_camera(pictures, tmp_path):
    config = options(pictures, tmp_path / "run", camera_bn=True)
    engine = Engine(config)
    data = open_data(config.data, engine)
    model = make_model(config.model, 2, config.seed)
    told = []
    model.register_forward_pre_hook(lambda module, inputs: told.append(inputs[1]))
    for same, expected in ((True, {0, 1}), (False, {-1})):
        told.clear()
        metrics = Evaluator(engine, data, model, same_cameras=same)(model)
        assert set(torch.cat(told).tolist()) == expected
        assert metrics["queries"] == 16  # ranking knows the cameras all the same


def test_images_without_identities_and_cameras_train(pictures, tmp_path, capsys):
    """The loss over single images, whose positives are of another camera, is left out and said."""
    config = options(pictures / "bounding_box_train", tmp_path / "run", data="folder")
    assert train(config).metrics == {}
    assert "no loss over single images" in capsys.readouterr().out
    assert [entry["instance_loss"] for entry in entries(config.run)] == [0.0] * 3
    assert "ari" not in entries(config.run)[0]["observed"]
    assert (config.run / "checkpoints" / "last.pt").exists()


def test_nothing_but_positives_of_other_cameras_needs_two(pictures, tmp_path):
    options_of_it = {"data": "folder", "prototype_weight": 0.0}
    config = options(pictures / "bounding_box_train", tmp_path / "run", **options_of_it)
    with pytest.raises(ConfigError, match=r"two known cameras at least \(got 0\)"):
        train(config)


def test_unknown_cameras_are_not_one_camera(pictures, tmp_path):
    config = options(pictures, tmp_path / "run")
    engine = Engine(config)
    data = open_data(config.data, engine)
    model = make_model(config.model, 2, config.seed)
    unknown = [
        ImageList(part.paths, part.ids, np.full(len(part), -1))
        for part in (data.query, data.gallery)
    ]
    blind = dataclasses.replace(data, query=unknown[0], gallery=unknown[1])
    assert Evaluator(engine, blind, model)(model)["queries"] == 16


def test_pseudo_labels_are_compared_with_known_identities_only():
    data = load_data_stub(np.array([0, 0, 1, 1, -1]))
    observer = IdentityObserver(data, None)
    assert observer.clustering(torch.tensor([4, 4, 2, 2, 2]))["ari"] == 1.0
    assert observer.clustering(torch.tensor([0, 0, -1, -1, 0]))["ari"] < 1.0
    assert observer.clustering(torch.tensor([-1] * 5))["ari"] == 0.0


def load_data_stub(ids):
    @dataclasses.dataclass
    class Data:
        train: ImageList

    return Data(ImageList(tuple("abcde"), ids, np.zeros(5, np.int64)))


def test_no_clusters_is_a_warning_and_outliers_train(pictures, tmp_path, capsys):
    config = options(pictures, tmp_path / "run", min_samples=49)
    train(config)
    assert "no clusters, all 48 images are outliers" in capsys.readouterr().out
    last = entries(config.run)[-1]
    assert (last["clusters"], last["outliers"]) == (0, 48)
    assert last["loss"] > 0


def test_no_clusters_stops_where_outliers_are_dropped(pictures, tmp_path):
    changes = {"images_per_class": 4, "min_samples": 49, "epochs": PATIENCE + 2}
    config = options(pictures, tmp_path / "run", "cluster-contrast", **changes)
    with pytest.raises(NoClusters, match=rf"epoch {PATIENCE}: no clusters.*min_samples than 49"):
        train(config)
    assert len(entries(config.run)) == PATIENCE - 1


def test_one_cluster_of_everything_trains(pictures, tmp_path):
    config = options(pictures, tmp_path / "run", eps=0.99, min_samples=1, k1=48, kappa=1.0)
    train(config)
    assert entries(config.run)[0]["clusters"] < 3


def test_a_run_that_diverges_stops_and_keeps_the_checkpoint_before(pictures, tmp_path):
    config = options(pictures, tmp_path / "run", lr=1e30, epochs=4)
    with pytest.raises(Diverged, match=r"not finite in epoch \d, iteration \d+ \(lr 1e\+30\)"):
        train(config)
    if (config.run / "checkpoints" / "last.pt").exists():
        assert all(v.isfinite().all() for v in weights(config.run).values())


def test_a_nan_after_the_first_epoch_leaves_a_sound_checkpoint(pictures, tmp_path):
    config = options(pictures, tmp_path / "run", epochs=3)
    trainer = make_trainer(config)
    step = trainer.step

    def poisoned(images, indices, cameras):
        if trainer.at.epoch == 1 and trainer.at.iteration == 3:
            images = images * float("nan")
        step(images, indices, cameras)

    trainer.step = poisoned
    with pytest.raises(Diverged, match=r"epoch 2, iteration 4.*checkpoint is from before"):
        trainer.fit()
    assert all(v.isfinite().all() for v in weights(config.run).values())
    state = torch.load(trainer.checkpoint, weights_only=True)
    assert (state["progress"]["epoch"], state["progress"]["iteration"]) == (1, 0)
    trainer.log.close()


def test_neighbours_by_camera_need_two_cameras(tmp_path):
    root = write_images(tmp_path / "one camera", people=3, cameras=1)
    with pytest.raises(ConfigError, match=r"k1_own: .* two at least \(got 1\)"):
        train(options(root, tmp_path / "run", k1_own=3))
    assert not (tmp_path / "run").exists()


def test_warm_up_epochs_have_no_kappa_and_beta(pictures, tmp_path):
    config = options(pictures, tmp_path / "run", warmup_epochs=2, kappa=0.25, beta=0.1)
    train(config)
    assert [e["kappa"] > 0 for e in entries(config.run)] == [False, False, True]
    assert [e["beta"] > 0 for e in entries(config.run)] == [False, False, True]


def test_same_bits_twice(pictures, tmp_path):
    train(options(pictures, tmp_path / "a"))
    train(options(pictures, tmp_path / "b"))
    a, b = (torch.load(tmp_path / r / "checkpoints/last.pt", weights_only=True) for r in "ab")
    assert_same_weights(a["model"], b["model"])
    assert same_bits(a["bank"]["features"], b["bank"]["features"])


def test_tables_are_in_percent():
    row = {"mAP": 0.123, "rank1": 1.0, "rank5": 1.0, "rank10": 1.0, "mINP": 0.05}
    assert "|   12.3 |  100.0 |" in table({"x": row})


# ---- one camera ---------------------------------------------------------------------------------


def each_in_one_camera(root, names):
    """Keep of each tested person the images that one camera took."""
    for folder in ("query", "bounding_box_test"):
        for file in (root / folder).iterdir():
            person, camera = int(file.name[:4]), int(file.name[6])
            if camera != names[person % len(names)]:
                file.unlink()
    return root


ONE_CAMERA = {
    "a single camera": lambda root: write_images(root, people=6, cameras=1),
    "each person in one": lambda root: each_in_one_camera(write_images(root, people=6), (1, 2)),
}


@pytest.mark.parametrize("kind", ONE_CAMERA)
def test_matches_within_the_camera_count_where_there_are_no_others(kind, tmp_path, capsys):
    root = ONE_CAMERA[kind](tmp_path / "people")
    config = options(root, tmp_path / "run", eval_every=1, epochs=2, iterations=2, rerank=True)
    trained = train(config)
    said = capsys.readouterr().out
    assert "no query has a right match in another camera" in said.split("epoch 1/2")[0]
    written = json.loads((config.run / "metrics.json").read_text())
    assert written["last"]["queries"] == len(trained.data.query) == 6
    assert written["protocol"].startswith("within the camera")
    assert "reranked" in written["last"]
    assert entries(config.run)[0]["observed"]["queries"] == 6
    # The same as when nothing is known of cameras.
    unknown = dataclasses.replace(
        trained.data,
        query=dataclasses.replace(trained.data.query, cameras=np.full(6, -1)),
        gallery=dataclasses.replace(trained.data.gallery, cameras=np.full(6, -1)),
    )
    model = make_model(config.model, trained.data.train.num_cameras, config.seed)
    plain = Evaluator(trained.engine, unknown, model).metrics(*trained.features)
    assert {k: written["last"][k] for k in plain} == plain
    again = evaluate_run(config, config.run)
    assert "no query has a right match in another camera" in capsys.readouterr().out
    assert again["mAP"] == pytest.approx(written["last"]["mAP"])
    page = write_report(collect(read_record(config.run)), out=tmp_path / "r.html").read_text()
    assert "no query has a right match in another camera" in page


def test_matches_within_the_camera_do_not_count_where_there_are_others(tmp_path):
    data = load_data("market1501", write_images(tmp_path))
    assert data.across_cameras
    assert data.compared() == (data.query, data.gallery)
    # One query with a match elsewhere, or in an unknown camera, is enough.
    one = each_in_one_camera(write_images(tmp_path / "one"), (1, 2))
    same = load_data("market1501", one)
    assert not same.across_cameras
    assert all((images.cameras == -1).all() for images in same.compared())
    for known, camera in ((True, 5), (True, -1), (False, 5)):
        cameras = same.gallery.cameras.copy()
        cameras[-1] = camera
        ids = same.gallery.ids.copy()
        ids[-1] = ids[-1] if known else -1
        gallery = dataclasses.replace(same.gallery, cameras=cameras, ids=ids)
        assert dataclasses.replace(same, gallery=gallery).across_cameras == known


def test_an_evaluation_at_other_ranks_and_with_the_older_average_precision(pictures, tmp_path):
    config = options(pictures, tmp_path / "run")
    engine = Engine(config)
    data = load_data("market1501", pictures)
    model = make_model(config.model, data.train.num_cameras, 0)
    random = torch.Generator().manual_seed(0)
    pair = [torch.randn(len(side), 8, generator=random) for side in (data.query, data.gallery)]
    pair = [torch.nn.functional.normalize(side) for side in pair]
    found = Evaluator(engine, data, model, ranks=(2, 20), ap="trapezoid").metrics(*pair)
    ids = data.query.ids, data.gallery.ids, data.query.cameras, data.gallery.cameras
    expected = evaluate_ranking(tuple(pair), *map(torch.from_numpy, ids), ap="trapezoid")
    assert [*found] == ["mAP", "rank2", "rank20", "mINP", "queries"]
    assert (found["mAP"], found["rank2"]) == (expected.mAP, expected.cmc[1])
    assert found["mAP"] != Evaluator(engine, data, model).metrics(*pair)["mAP"]
