"""open_clip itself, without torchvision, which it imports for the transforms of images alone."""

import importlib.metadata
import importlib.util
import sys
import types
from unittest import mock

import pytest
import transformers  # noqa: F401  looks for torchvision, and must not find the stand-ins

TORCHVISION = (
    *("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.ops"),
    "torchvision.ops.misc",
)


class StandIn(types.ModuleType):
    """A module in which every name is a class whose instances do nothing."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        known = sys.modules.get(f"{self.__name__}.{name}")
        return known or type(name, (mock.MagicMock,), {"BICUBIC": "bicubic", "BILINEAR": "bilinear"})


@pytest.fixture(scope="session")
def open_clip():
    """The package open_clip."""
    if not list(importlib.metadata.Distribution.discover(name="open_clip_torch")):  # a module would be this folder
        pytest.skip("open_clip_torch is not installed: make installs it, without its dependencies")
    with pytest.MonkeyPatch.context() as patch:
        for name in TORCHVISION if importlib.util.find_spec("torchvision") is None else ():
            patch.setitem(sys.modules, name, StandIn(name))
        return importlib.import_module("open_clip")
