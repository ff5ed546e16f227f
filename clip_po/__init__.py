"""Align contrastive vision-language models by preference optimization.

Public names are listed in `__init__.pyi` and loaded when first used, so that `clip-po --help` is fast.
"""

from importlib.metadata import version

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = version("clip_po")
