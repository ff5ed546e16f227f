"""Align contrastive vision-language models by preference optimization."""

from importlib.metadata import version as _version

__version__ = _version("clip_po")
