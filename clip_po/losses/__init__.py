"""Losses: pure functions of log-probabilities, and the table of loss types with what each of them reads."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
