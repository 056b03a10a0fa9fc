"""Rendered pedestrians: a data set for those who have none, made on the spot.

:func:`render_dataset` writes it in the layout of Market-1501, :func:`contact_sheet` shows it.
"""

from __future__ import annotations

from dhcl.synth.crops import render_crop
from dhcl.synth.dataset import SynthSummary, render_dataset
from dhcl.synth.sheet import contact_sheet

__all__ = ["SynthSummary", "contact_sheet", "render_crop", "render_dataset"]
