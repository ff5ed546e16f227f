"""Calls of the Hub: repeated while it is busy, explained where it refuses. The client is the real one."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from huggingface_hub import constants

from clip_po.hub.retries import TRIES, HubError
from clip_po.models import load_any, load_model
from clip_po.training.checkpoints import MARK

TOKEN = "hf_" + "s3cret" * 6
CREATION, COMMIT, PREUPLOAD, UPLOAD = "/api/repos/create", "/commit/main", "/preupload/", "/info/lfs/objects/batch"
BUSY = (412, 429, 500, 502, 503, 504)


@pytest.fixture
def make_pushing(make_trainer, hub):
    def make(**arguments):
        given = {"push_to_hub": True, "hub_model_id": "me/mine", "hub_token": TOKEN, **arguments}
        return make_trainer(max_steps=1, **given)

    return make


@pytest.mark.parametrize("status", BUSY)
@pytest.mark.parametrize("call", [CREATION, COMMIT])
def test_a_busy_hub_is_asked_again(call, status, hub, make_pushing):
    hub.failures = {call: [(status, {}), (status, {})]}
    make_pushing().push_to_hub()
    assert hub.commits["me/mine"] == ["End of training"]
    assert "model.safetensors" in hub.files["me/mine"]
    assert 1.0 in hub.waits or 2.0 in hub.waits  # of clip_po, or of huggingface_hub itself


def test_a_retried_push_is_saved_once(hub, make_pushing, monkeypatch):
    trainer, saved = make_pushing(), []
    monkeypatch.setattr(trainer, "save_model", lambda **_: saved.append(1))
    hub.failures = {PREUPLOAD: [(429, {})], UPLOAD: [(503, {})], COMMIT: [(412, {})]}
    trainer.push_to_hub()
    assert len(saved) == 1
    assert len(hub.commits["me/mine"]) == 1


@pytest.mark.parametrize(
    ("headers", "low", "high"),
    [
        ({"Retry-After": "7"}, 7, 7),
        ({"Retry-After": timedelta(seconds=200)}, 60, 200),
        ({"RateLimit": '"api";r=0;t=55'}, 55, 55),
        ({"Retry-After": "soon"}, 1, 1),
    ],
)
def test_the_wait_that_the_hub_asks_for_is_kept(headers, low, high, hub, make_pushing):
    if isinstance(delay := headers.get("Retry-After"), timedelta):
        headers = {"Retry-After": format_datetime(datetime.now(UTC) + delay, usegmt=True)}
    trainer = make_pushing()
    hub.failures = {COMMIT: [(429, headers)]}
    trainer.push_to_hub()
    assert len(hub.waits) == 1
    assert low <= hub.waits[0] <= high


def test_a_wait_of_hours_ends_the_push_with_its_length(hub, make_pushing):
    trainer = make_pushing()
    hub.failures = {COMMIT: [(429, {"Retry-After": "7200"})]}
    with pytest.raises(HubError, match=r"busy .*429.*in 7200 seconds"):
        trainer.push_to_hub()
    assert not hub.waits


def test_a_hub_that_stays_busy_is_given_up(hub, make_pushing):
    trainer = make_pushing()
    hub.failures = {COMMIT: [(503, {})] * 100}
    with pytest.raises(HubError, match=r"Pushing .* to 'me/mine' failed. The Hub is busy .*503"):
        trainer.push_to_hub()
    assert len([path for _, path, _ in hub.requests if COMMIT in path]) >= TRIES


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        (401, "hf auth login"),
        (403, "Use a token with write access"),
        (404, "Check hub_model_id"),
        (400, "The Hub refuses"),
    ],
)
@pytest.mark.parametrize("call", [CREATION, COMMIT])
def test_a_refusal_says_what_to_do_and_is_not_repeated(call, status, remedy, hub, make_pushing):
    hub.failures = {call: [(status, {"X-Error-Message": f"not for {TOKEN}"})]}
    if call == CREATION:  # the client looks whether the repository exists
        hub.failures["/api/models/me/mine"] = [(404, {"X-Error-Message": f"not for {TOKEN}"})]
    with pytest.raises(HubError, match=remedy) as error:
        make_pushing().push_to_hub()
    assert str(status) in str(error.value)
    assert "me/mine" in str(error.value)
    assert TOKEN not in str(error.value)
    assert not hub.waits


def test_no_network_is_said(hub, make_pushing, monkeypatch):
    trainer = make_pushing()
    hub.server.shutdown()
    hub.server.server_close()
    with pytest.raises(HubError, match=r"The Hub is not reachable .*Check the network"):
        trainer.push_to_hub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="HF_HUB_OFFLINE"):
        trainer.push_to_hub()


@pytest.mark.parametrize("status", [403, 503])
def test_a_training_goes_on_when_its_push_fails(status, hub, make_pushing, tmp_path):
    trainer = make_pushing(save_strategy="steps", save_steps=1, hub_strategy="every_save")
    hub.failures = {COMMIT: [(status, {})] * 100}
    trainer.train()
    assert (tmp_path / "run" / "checkpoint-1" / MARK).exists()


def test_a_push_in_the_background_is_repeated_too(hub, make_pushing):
    trainer = make_pushing()
    hub.failures = {COMMIT: [(412, {})]}
    trainer.push_to_hub(blocking=False).result(timeout=60)
    assert hub.commits["me/mine"] == ["End of training"]


@pytest.mark.parametrize(("status", "said"), [(401, "hf auth login"), (403, "may not"), (404, "no such repository")])
def test_a_model_that_the_hub_refuses_says_why(status, said, hub):
    hub.failures = {"/me/secret/": [(status, {})] * 30}
    for load in (load_model, load_any):
        with pytest.raises(HubError, match=said):
            load("me/secret")
