"""Conversion of checkpoints between open_clip and transformers, for the architectures that CLIPModel can express."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
