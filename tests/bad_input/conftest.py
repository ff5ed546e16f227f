import pytest
from bad_input.table import Bench
from transformers import CLIPModel


@pytest.fixture(scope="session")
def shared_model(clip_folder):
    return CLIPModel.from_pretrained(clip_folder)


@pytest.fixture
def bench(tmp_path, clip_folder, shared_model, processor):
    return Bench(tmp_path, clip_folder, shared_model, processor)
