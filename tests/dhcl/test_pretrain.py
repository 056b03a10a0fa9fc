import dataclasses

import pytest
import torch
from dhcl.config import ConfigError
from dhcl.data import load_data
from dhcl.pretrain import Pretrain, pretrain
from dhcl.training.runs import train

from tests.dhcl.toy import options, write_images


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    out = tmp_path_factory.mktemp("drawn") / "run"
    given = Pretrain(
        out, image_size=(32, 16), ids=8, cameras=2, epochs=2, iterations=2, device="cpu", workers=0
    )
    return given, pretrain(given)


def test_drawn_identities_are_learned(pretrained):
    given, metrics = pretrained
    assert 0 <= metrics["last"]["mAP"] <= 1
    state = torch.load(given.out / "checkpoints" / "last.pt", weights_only=True)
    ids = torch.from_numpy(load_data("market1501", given.out / "data").train.ids)
    same = ids[:, None] == ids[None]
    assert torch.equal(state["labels"][:, None] == state["labels"][None], same)
    assert set(state["labels"].tolist()) == set(range(4))


def test_it_goes_on_where_it_was_stopped(pretrained):
    given, _ = pretrained
    longer = dataclasses.replace(given, epochs=3)
    sheet = given.out / "people.png"
    drawn = sheet.read_bytes()
    sheet.unlink()  # as where the disk was full after the people
    pretrain(longer)
    assert sheet.read_bytes() == drawn
    state = torch.load(given.out / "checkpoints" / "last.pt", weights_only=True)
    assert state["progress"]["epoch"] == 3


def test_it_does_not_go_on_with_other_people(pretrained):
    given, _ = pretrained
    with pytest.raises(ConfigError, match=r"made with other options \(ids 8, not 10\)"):
        pretrain(dataclasses.replace(given, ids=10))


def test_a_training_starts_from_the_weights(pretrained, tmp_path):
    given, _ = pretrained
    weights = given.out / "checkpoints" / "last.pt"
    pictures = write_images(tmp_path / "pictures", people=4)
    config = options(
        pictures, tmp_path / "run", weights=weights, camera_bn=True, epochs=1, iterations=1, lr=1e-9
    )
    train(config)
    old, new = (
        torch.load(file, weights_only=True)["model"]
        for file in (weights, config.run / "checkpoints" / "last.pt")
    )
    filters = [name for name, value in old.items() if value.dim() == 4]
    assert filters
    for name in filters:
        torch.testing.assert_close(old[name], new[name], rtol=0, atol=1e-6)


def test_identities_of_real_images_are_not_learned(tmp_path):
    pictures = write_images(tmp_path / "pictures", people=4)
    config = options(pictures, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"drawn people only, and .* holds no synth\.json"):
        train(config, drawn=True)
