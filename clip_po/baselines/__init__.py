"""Other methods against typographic attacks, to compare preference optimization with. One file per method."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
