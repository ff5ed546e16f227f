"""Runs of the commands in float32, so that they are the same on every processor."""

import pytest

from clip_po.cli import precision


@pytest.fixture(autouse=True)
def in_float32(request, monkeypatch):
    """Let `clip-po train` find no processor that computes in bfloat16."""
    if request.module.__name__ != "test_precision":
        monkeypatch.setattr(precision, "processor_features", frozenset)
