"""Drawn people who walk through the view of a camera: frames, and boxes as a tracker gives them."""

import numpy as np
from dhcl.synth import render_crop
from PIL import Image

SIZE = (64, 32)


def write_walk(folder, people, camera=1, frames=6, gap=0.0):
    """Frames ``img1/000001.png`` and ``boxes.txt`` of people side by side, each a track.

    The tracks are numbered from 1 in the order of the people. A box lies outside of the frame.
    """
    (folder / "img1").mkdir(parents=True)
    lines = []
    for frame in range(1, frames + 1):
        picture = Image.new("RGB", (40 * len(people) + 20, 90), (110, 120, 115))
        for track, who in enumerate(people, 1):
            left, top = 40 * (track - 1) + frame, 10 + frame
            crop = render_crop(0, who, camera, frame, SIZE, camera_gap=gap)
            picture.paste(crop, (left, top))
            lines.append(f"{frame},{track},{left},{top},{SIZE[1]},{SIZE[0]},1,1,1")
        picture.save(folder / "img1" / f"{frame:06d}.png")
    lines.append(f"1,99,5000,0,{SIZE[1]},{SIZE[0]},1,1,1")
    lines.append(f"2,98,0,0,{SIZE[1]},{SIZE[0]},0,1,1")  # not to be counted
    (folder / "boxes.txt").write_text("\n".join(lines) + "\n")
    return folder


def pixels(path):
    return np.array(Image.open(path))
