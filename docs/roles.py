"""Turns the roles of docstrings, such as ``:func:`knn```, into Markdown for mkdocstrings."""

from __future__ import annotations

import re
from typing import Any

import griffe

import dhcl_ops

_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`~?([\w.]+)`")


def _markdown(match: re.Match[str]) -> str:
    """A link to a public op, else the name as code."""
    name = match[1].rsplit(".", 1)[-1]
    shown = match[1] if "." in match[1] else name
    if (
        name in dhcl_ops.__all__
        and hasattr(dhcl_ops, name)
        and shown.startswith(("dhcl_ops", name))
    ):
        return f"[`{shown}`][dhcl_ops.{name}]"
    return f"`{shown}`"


class Roles(griffe.Extension):
    """Rewrites every docstring as it is loaded."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """One function, class, module or attribute."""
        if obj.docstring:
            obj.docstring.value = _ROLE.sub(_markdown, obj.docstring.value)
