"""The public names: all there, and loaded only when they are used."""

import subprocess
import sys

import pytest

import clip_po


@pytest.mark.parametrize("name", clip_po.__all__)
def test_public_names_resolve(name):
    assert getattr(clip_po, name).__name__ == name
    assert name in dir(clip_po)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"clip_po.*DPOTrainer"):
        clip_po.DPOTrainer  # noqa: B018


def test_the_package_alone_loads_no_torch():
    code = "import sys, clip_po; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
