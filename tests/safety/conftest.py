"""A program that must not run, and a data set for commands."""

import pytest
from samples import make_labelled


@pytest.fixture
def marker(tmp_path):
    """A file that is there at the end only where a program ran."""
    file = tmp_path / "a program ran"
    yield file
    assert not file.exists()


@pytest.fixture(scope="session")
def parquet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parquet")
    for split, rows in (("train", 12), ("validation", 4), ("test", 8)):
        make_labelled(rows).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder
