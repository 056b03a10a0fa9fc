"""Reports of runs: one HTML file that needs no network, of a run or of several compared."""

from dhcl.report.several import write_comparison
from dhcl.report.single import report_training, write_report

__all__ = ["report_training", "write_comparison", "write_report"]
