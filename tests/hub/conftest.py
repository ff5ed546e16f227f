"""A Hub on 127.0.0.1 for the real client of huggingface_hub, in this process."""

import huggingface_hub
import pytest
import transformers.utils.hub
from fake_hub import FakeHub
from huggingface_hub import constants

from clip_po.hub import retries


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that the client calls. Waits take no time; `hub.waits` lists their seconds."""
    with FakeHub() as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
        hub.waits = []
        monkeypatch.setattr(retries.time, "sleep", hub.waits.append)
        yield hub
