"""A checkpoint at work: scores, rankings, rewards and hard candidates."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
