"""Secrets are redacted in settings and messages."""

from pathlib import Path

import pytest

from clip_po.hub.redaction import publishable, redacted


@pytest.mark.parametrize(
    "key",
    [
        "token",
        "hub_token",
        "HF_TOKEN",
        "hub_tokens",
        "client_secret",
        "db_password",
        "WANDB_API_KEY",
        "aws_access_key_id",
        "Authorization",
    ],
)
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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("include_num_input_tokens_seen", "all"),
        ("include_tokens_per_second", "no"),
        ("tokenizer_name", "openai/clip-vit-base-patch32"),
        ("eos_token", "<|endoftext|>"),
        ("additional_special_tokens", ["<a>"]),
    ],
)
def test_names_that_only_contain_the_word_token_are_no_secrets(name, value):
    assert redacted({name: value}) == {name: value}


def test_a_login_in_a_url_is_a_secret():
    assert redacted("from https://me:pass@example.org/data") == "from https://<redacted>@example.org/data"


@pytest.mark.parametrize(
    ("text", "published"),
    [
        ("/home/me/photos", "photos"),
        ("/home/me/my photos/", "my photos"),
        ("~/photos", "photos"),
        ("file:///home/me/photos", "photos"),
        (Path("/home/me/photos"), "photos"),
        (r"C:\Users\me\photos", "photos"),
        (r"\\server\share\photos", "photos"),
        ("'/home/me/my photos' is missing: see /home/me/log.txt.", "'my photos' is missing: see log.txt."),
        (r"open('C:\Users\me\my photos') failed", "open('my photos') failed"),
        ("photos/train", "photos/train"),
        ("me/photos", "me/photos"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("hf://datasets/me/photos", "hf://datasets/me/photos"),
        ("a cat/dog, 12/10/2026", "a cat/dog, 12/10/2026"),
        ("/m/01yrx", "/m/01yrx"),
        ("and/or", "and/or"),
    ],
)
def test_folders_of_this_machine_are_not_published(text, published):
    assert publishable({"deep": [{"value": text}]}) == {"deep": [{"value": published}]}
    if isinstance(text, str):
        assert publishable({text: 1}) == {published: 1}
    assert redacted({"value": text})["value"] == str(text)  # messages on the screen keep them
