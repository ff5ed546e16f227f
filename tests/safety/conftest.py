"""A program that must not run, and a data set for commands."""

import pytest
from samples import write_parquet


@pytest.fixture
def marker(tmp_path):
    """A file that is there at the end only where a program ran."""
    file = tmp_path / "a program ran"
    yield file
    assert not file.exists()


@pytest.fixture(scope="session")
def parquet(tmp_path_factory):
    return write_parquet(tmp_path_factory.mktemp("parquet"), train=12, validation=4, test=8)
