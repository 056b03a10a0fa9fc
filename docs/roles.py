"""Turns docstrings, with roles such as ``:func:`knn```, into Markdown for mkdocstrings."""

from __future__ import annotations

import re
import sys
from typing import Any

import griffe

import dhcl_ops

# Paragraphs of code that are marked as such already, and rules that Markdown takes for quotations.
_FORMULA = re.compile(r"^( {4})``(.*)``([,.]?)$", re.MULTILINE)
_RULE = re.compile(r"^( +[\w, ]+: )>", re.MULTILINE)
# A result's text up to a colon would be taken for its type.
_RESULT = re.compile(r"^(Returns:\n(?:[^:`]|`+[^`]*`+)*?): ", re.MULTILINE)
_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`~?([\w.]+)`")


def _markdown(match: re.Match[str]) -> str:
    """A link to a public op, else the name as code."""
    shown = match[1]
    name = shown.rsplit(".", 1)[-1]
    if name not in dhcl_ops.__all__:
        return f"`{shown}`"
    # Some modules, such as knn, bear the name of their function.
    hidden = f"dhcl_ops.{name}" in sys.modules
    return f"[`{shown}`][dhcl_ops.{name}{f'.{name}' if hidden else ''}]"


class Roles(griffe.Extension):
    """Rewrites every docstring as it is loaded."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """One function, class, module or attribute."""
        if obj.docstring:
            text = _ROLE.sub(_markdown, obj.docstring.value)
            text = _FORMULA.sub(r"\1\2\3", text)
            text = _RESULT.sub(r"\1&#58; ", text)
            obj.docstring.value = _RULE.sub(r"\1\\>", text)
