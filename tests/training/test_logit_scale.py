"""A trained logit scale has CLIP's upper bound: 100 after exp."""

import math

import pytest
import torch
from samples import make_preferences
from transformers import TrainerCallback

RUN = {"optim": "sgd", "max_steps": 4, "lr_scheduler_type": "constant", "per_device_train_batch_size": 2}


class Pushes(TrainerCallback):
    """Makes every step raise the logit scale by the learning rate, and keeps it as the step leaves it."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if model.logit_scale.requires_grad:
            model.logit_scale.grad.fill_(-1.0)

    def on_step_end(self, args, state, control, model, **kwargs):
        self.seen.append(model.logit_scale.item())


def scales(make_trainer, model, start, **arguments):
    with torch.no_grad():
        model.logit_scale.fill_(start)
    pushes = Pushes()
    make_trainer(make_preferences(8), model=model, callbacks=[pushes], **arguments).train()
    return pushes.seen


@pytest.mark.parametrize("arguments", [{}, {"gradient_accumulation_steps": 2}, {"train_vision_model": False}])
def test_a_trained_scale_never_passes_100(make_trainer, model, arguments):
    found = scales(make_trainer, model, 4.0, train_logit_scale=True, learning_rate=0.4, **arguments)
    assert found == pytest.approx([4.4, *[math.log(100)] * 3])


@pytest.mark.parametrize("asked", [False, True])
def test_a_frozen_scale_is_left_as_it_is(make_trainer, model, asked):
    model.logit_scale.requires_grad_(not asked)
    assert scales(make_trainer, model, 5.0, learning_rate=1e-4, train_logit_scale=asked) == [5.0] * 4
