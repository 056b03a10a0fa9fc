import numpy as np
import pytest
import torch
from dhcl.data import (
    eval_transform,
    train_transform,
)
from PIL import Image

from tests.dhcl.data.pictures import SIZE, picture


def test_eval_transform_is_resize_and_normalisation():
    pixels = torch.from_numpy(np.array(picture(3, 64, 33))).permute(2, 0, 1)
    got = eval_transform(SIZE)(pixels)
    resized = picture(3, 64, 33).resize(SIZE[::-1], Image.Resampling.BICUBIC)
    plain = torch.from_numpy(np.array(resized)).permute(2, 0, 1).double() / 255
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    assert got.dtype == torch.float32
    assert got.shape == (3, *SIZE)
    # Pillow and torchvision may differ by one step in 255 after the resize.
    torch.testing.assert_close(got.double(), (plain - mean) / std, rtol=0, atol=1.1 / 255 / 0.22)


def test_normalisation_of_an_image_of_the_right_size_is_exact():
    pixels = torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8)
    got = eval_transform(SIZE, (0.1, 0.2, 0.3), (0.5, 1.0, 2.0))(pixels)
    mean = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64).view(3, 1, 1)
    torch.testing.assert_close(got.double(), (pixels / 255.0 - mean) / std, rtol=1e-5, atol=1e-5)


def random_part(**options):
    """A transform with one kind of augmentation, undoing nothing else."""
    off = {"flip": 0.0, "pad": 0, "erase": 0.0, "color_jitter": 0.0}
    return train_transform(SIZE, **{**off, **options}, mean=(0, 0, 0), std=(1, 1, 1))


def test_each_augmentation_does_what_it_says():
    torch.manual_seed(0)
    pixels = torch.randint(1, 256, (3, *SIZE), dtype=torch.uint8)
    plain = pixels / 255.0
    assert torch.equal(random_part()(pixels), plain)
    assert torch.equal(random_part(flip=1.0)(pixels), plain.flip(-1))

    flips = sum(torch.equal(random_part(flip=0.5)(pixels), plain) for _ in range(200))
    assert 60 < flips < 140

    padded = torch.nn.functional.pad(plain, (4, 4, 4, 4))
    places = set()
    for _ in range(50):
        got = random_part(pad=4)(pixels)
        found = [
            (y, x)
            for y in range(9)
            for x in range(9)
            if torch.equal(padded[:, y : y + SIZE[0], x : x + SIZE[1]], got)
        ]
        assert len(found) == 1
        places.add(found[0])
    assert len(places) > 20

    for _ in range(20):
        gone = (random_part(erase=1.0)(pixels) == 0).all(dim=0)
        rows, columns = gone.any(dim=1).nonzero(), gone.any(dim=0).nonzero()
        box = gone[rows[0, 0] : rows[-1, 0] + 1, columns[0, 0] : columns[-1, 0] + 1]
        assert box.all()
        assert 0.005 < gone.float().mean() < 0.45

    assert not torch.equal(random_part(color_jitter=0.5)(pixels), plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flip": 1.5}, r"flip must be in \[0, 1\]"),
        ({"erase": -0.1}, "erase must be in"),
        ({"color_jitter": 2}, "color_jitter must be in"),
        ({"pad": -1}, "pad must be at least 0"),
        ({"std": (0.0, 1.0, 1.0)}, "std positive"),
    ],
)
def test_bad_augmentations(options, message):
    with pytest.raises(ValueError, match=message):
        train_transform(SIZE, **options)


def test_bad_sizes():
    with pytest.raises(ValueError, match="height and width"):
        train_transform((0, 5))
    with pytest.raises(ValueError, match="height and width"):
        eval_transform((5,))
