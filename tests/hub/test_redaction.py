"""Secrets are redacted in settings and messages."""

import pytest

from clip_po.hub.redaction import redacted


@pytest.mark.parametrize("key", ["token", "hub_token", "HF_TOKEN", "client_secret", "db_password"])
def test_secrets_are_replaced_at_any_depth(key):
    settings = {key: "hf_abc", "model_init_kwargs": {"deep": [{key: "hf_abc"}, ({key: ["hf_abc"]},)]}}
    assert "hf_abc" not in repr(redacted(settings))
    assert redacted(settings)["model_init_kwargs"]["deep"][0] == {key: "<redacted>"}


def test_other_settings_do_not_change():
    settings = {
        "beta": 0.1,
        "hub_token": None,
        "use_token": True,
        "max_tokens": 77,
        "loss_type": ["ipo"],
        "a": {"b": 1},
    }
    assert redacted(settings) == settings


def test_the_original_settings_do_not_change():
    settings = {"nested": {"token": "hf_abc"}}
    redacted(settings)
    assert settings == {"nested": {"token": "hf_abc"}}


def test_a_hub_token_is_replaced_in_any_text():
    assert redacted({"note": "by hf_" + "a1" * 12 + "."}) == {"note": "by <redacted>."}
