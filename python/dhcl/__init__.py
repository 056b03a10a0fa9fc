"""Training and evaluation of unsupervised person re-identification, on top of :mod:`dhcl_ops`."""

from dhcl_ops._version import __version__

__all__ = ["__version__"]
