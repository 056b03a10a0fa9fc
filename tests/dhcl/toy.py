"""Small pictures on disk and options that train on them in seconds."""

import numpy as np
from dhcl.config import flat_options, preset, with_changes
from dhcl.training.runs import train
from PIL import Image


def write_images(root, people=8, per_camera=3, cameras=2):
    """A data set in Market-1501's layout: blocks of colour per person, a tint per camera."""
    noise = np.random.default_rng(0)

    def write(folder, person, camera, number):
        blocks = np.random.default_rng(1000 + person).uniform(0, 1, (4, 2, 3))
        tint = np.random.default_rng(50 + camera).uniform(0.6, 1.4, 3)
        picture = blocks.repeat(8, 0).repeat(8, 1) * tint + noise.normal(0, 0.05, (32, 16, 3))
        pixels = (np.clip(picture, 0, 1) * 255).astype(np.uint8)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{person:04d}_c{camera}s1_{number:06d}_00.png")

    for person in range(1, people + 1):
        for camera in range(1, cameras + 1):
            for number in range(per_camera):
                write(root / "bounding_box_train", person, camera, number)
    for person in range(people + 1, 2 * people + 1):
        for camera in range(1, cameras + 1):
            write(root / "query", person, camera, 0)
            write(root / "bounding_box_test", person, camera, 1)
    return root


OPTIONS = {
    "data": "market1501",
    "backbone": "small",
    "image_size": (32, 16),
    "pad": 1,
    "erase": 0.2,
    "cache_gb": 0.05,
    "workers": 0,
    "device": "cpu",
    "calibrate": "start",
    "k1": 8,
    "k2": 3,
    "min_samples": 2,
    "classes_per_batch": 4,
    "images_per_class": 4,
    "iterations": 5,
    "epochs": 3,
    "warmup_epochs": 1,
    "eval_every": 0,
    "rerank": False,
    "report": False,
    "deterministic": True,
}


def options(root, out, name="dhcl", **changes):
    if changes.get("memory") == "clusters":  # has no single images
        changes = {"instance_weight": 0.0, **changes}
    return with_changes(preset(name), {**OPTIONS, "root": root, "out": out, **changes}).resolved()


def make_run(root, out, **changes):
    """A run that has learned next to nothing, with statistics per camera, in a second."""
    small = {"epochs": 1, "iterations": 2, "warmup_epochs": 0, "camera_bn": True}
    train(options(root, out, **{**small, "deterministic": False, **changes}), quiet=True)
    return out


def command_line(config):
    """The options as arguments of ``dhcl train``."""
    arguments = []
    for name, value in flat_options(config).items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(option if value else "--no-" + option[2:])
        else:
            values = value if isinstance(value, tuple) else (value,)
            arguments += [option, *map(str, values)]
    return arguments
