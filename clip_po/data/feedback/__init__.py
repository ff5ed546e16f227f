"""Feedback of people as datasets in the formats of `clip_po.data.formats`: exports of annotation tools, and tables."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
