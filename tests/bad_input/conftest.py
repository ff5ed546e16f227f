import pytest
from bad_input.table import Bench
from transformers import CLIPModel


@pytest.fixture(scope="session")
def shared_model(clip_folder):
    return CLIPModel.from_pretrained(clip_folder)


@pytest.fixture(autouse=True)
def without_collecting(monkeypatch):
    """Before each training accelerate collects garbage, which takes longer here than the training."""
    monkeypatch.setattr("accelerate.utils.memory.clear_device_cache", lambda *args, **kwargs: None)


@pytest.fixture
def bench(tmp_path, clip_folder, shared_model, processor):
    return Bench(tmp_path, clip_folder, shared_model, processor)
