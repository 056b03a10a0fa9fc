"""The commands of ``dhcl``: one table, whose functions are imported when they are called."""

from __future__ import annotations

import importlib
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["COMMANDS", "Command", "usage"]


@dataclass(frozen=True)
class Command:
    """A command: the function behind it, and what it does in one line.

    The function has one parameter. Where that is a dataclass, its fields are the options, which are
    read off the command line by tyro; where it is ``list[str]``, the function reads the words
    itself.

    Attributes:
        module: in this package.
        function: in that module.
        what: one line for the list of commands.
        extras: of the package, that have what it needs.
    """

    module: str
    function: str
    what: str
    extras: str = "train"

    def load(self) -> Callable[[Any], int | None]:
        """The function. Its module imports nothing heavy, so that help comes at once."""
        function: Callable[[Any], int | None] = getattr(
            importlib.import_module(f"dhcl.cli.{self.module}"), self.function
        )
        return function

    def __call__(self, name: str, words: list[str]) -> int:
        """Run the command on the words after its name.

        Returns:
            The exit status that the function returned, 0 if it returned nothing.

        Raises:
            SystemExit: by tyro, after the help or a message about the words.
        """
        function = self.load()
        [kind] = [t for n, t in typing.get_type_hints(function).items() if n != "return"]
        if kind == list[str]:
            return function(words) or 0
        import tyro

        return function(tyro.cli(kind, prog=f"dhcl {name}", args=words)) or 0


COMMANDS = {
    "train": Command(
        "train", "train", "train a model on images without labels, or go on with a run"
    ),
    "eval": Command("models", "evaluate", "evaluate a run's model"),
    "export": Command(
        "models", "export", "give a model's features, or the model, to other programs"
    ),
    "index": Command(
        "gallery", "index", "make an index of a folder of images, or change one", "train,index"
    ),
    "search": Command(
        "gallery", "search", "find the people of some images in an index", "train,index"
    ),
    "serve": Command(
        "serve", "serve", "search an index in a browser, on a page of its own", "index,serve"
    ),
    "cluster": Command("features", "cluster", "cluster saved features or a folder of images"),
    "rerank": Command("features", "rerank", "re-rank saved features"),
    "metrics": Command("features", "metrics", "evaluate saved features"),
    "crops": Command("crops", "crops", "cut a tracker's boxes out of a video, with track numbers"),
    "synth": Command("drawn", "synth", "draw pedestrians: a data set of any size, with identities"),
    "demo": Command(
        "drawn", "demo", "draw data, train on it, show scores and a report, in minutes"
    ),
    "pretrain": Command(
        "drawn", "pretrain", "draw pedestrians and learn them, for weights to start from"
    ),
    "report": Command("report", "report", "write what a run did as one HTML file"),
    "compare": Command("report", "compare", "write the charts of several runs as one HTML file"),
    "doctor": Command("doctor", "doctor", "report versions, compilers and what runs each op"),
}


def usage() -> str:
    """The list of commands."""
    lines = [f"  {name:<10}{command.what}" for name, command in COMMANDS.items()]
    more = (
        "`dhcl COMMAND --help` shows the options of a command; with --debug, any command shows the "
        "traceback of an error."
    )
    return "\n".join(["usage: dhcl COMMAND [OPTIONS]", "", *lines, "", more])
