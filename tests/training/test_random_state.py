"""What only observes a training leaves its random state alone; dropout is off unless it is asked for."""

import contextlib
import random

import numpy as np
import pytest
import samples
import torch
from peft import LoHaConfig, LoraConfig
from samples import CLASSES, logged, make_labelled, make_preferences, tiny_config, tiny_processor
from transformers import CLIPModel, TrainerCallback

from clip_po.data.attacks.attack import TypographicAttack
from clip_po.evaluation.evaluator import Evaluator, RobustnessEvaluator
from clip_po.evaluation.robustness import RobustnessImages
from clip_po.evaluation.zero_shot import zero_shot_accuracy
from clip_po.models import dual_encoder
from clip_po.training.callbacks import EvaluatorCallback
from clip_po.training.random_state import unchanged_random_state

RUN = {"learning_rate": 1e-3, "max_steps": 5, "logging_steps": 1, "disable_dropout": False}
VISION_LAYERS = r".*vision_model.*\.(q_proj|v_proj)"


@pytest.fixture(scope="module")
def dropout_folder(tmp_path_factory):
    """A model whose losses tell the random state: 30% of its attention is dropped."""
    folder = tmp_path_factory.mktemp("dropout")
    torch.manual_seed(0)
    CLIPModel(tiny_config({"attention_dropout": 0.3})).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


@pytest.fixture
def losses(make_trainer, dropout_folder):
    def run(observe=lambda trainer: None, **arguments):
        trainer = make_trainer(make_preferences(13), model=dropout_folder, **arguments)
        observe(trainer)
        trainer.train()
        return logged(trainer, "loss")

    return run


def draw_from_all():
    random.random(), np.random.random(), torch.rand(1)


class Drawing(Evaluator):
    """An evaluator that draws from every global generator."""

    primary_metric = "nothing"
    resamples = 1

    def measure(self, models, *, accelerator=None, disable_tqdm=False):
        draw_from_all()
        return dict.fromkeys(models)

    def report(self, measured, base, resamples):
        draw_from_all()
        return {name: {} for name in measured}


class ZeroShot(TrainerCallback):
    """A user's own look at the model after each step, with workers."""

    def __init__(self, workers):
        self.workers = workers

    def on_step_end(self, args, state, control, model=None, **kwargs):
        zero_shot_accuracy(model, tiny_processor(), make_labelled(8), ["a {}"], num_workers=self.workers, resamples=1)


def evaluator(processor, workers=0):
    attack = TypographicAttack(words=CLASSES, min_side=32, size=(0.3, 0.5), redraw="never")
    images = RobustnessImages(make_labelled(8), attack, processor)
    return RobustnessEvaluator(images, ["a photo of a {}"], resamples=1, num_workers=workers)


def drawing_metrics(prediction, compute_result):
    draw_from_all()
    return {"metric": 0.0} if compute_result else {}


def random_pixels(rows):
    """Evaluation rows under a transform of the user that draws from the global generators."""

    def transform(batch):
        draw_from_all()
        return batch

    return make_preferences(rows).with_transform(transform)


EVALUATION = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": make_preferences(5)}
OBSERVERS = {
    "the reference embeds each step": {"precompute_ref_log_probs": False},
    "the reference embeds before": {"precompute_ref_log_probs": True},
    "evaluation": EVALUATION,
    "evaluation at the start": {**EVALUATION, "eval_on_start": True},
    "evaluation with embeddings": {**EVALUATION, "precompute_ref_log_probs": True},
    "a random transform": {**EVALUATION, "eval_dataset": random_pixels(5)},
    "random metrics": {**EVALUATION, "compute_metrics": drawing_metrics, "batch_eval_metrics": True},
    "saving": {"save_strategy": "steps", "save_steps": 1},
    "zero-shot accuracy": {"callbacks": [ZeroShot(0)]},
}


@pytest.fixture
def plain(losses):
    return losses()


@pytest.mark.parametrize("arguments", OBSERVERS.values(), ids=OBSERVERS)
def test_what_only_observes_changes_no_loss(losses, plain, arguments):
    assert losses(**arguments) == pytest.approx(plain, abs=1e-5)


def test_a_cold_and_a_warm_cache_give_the_same_losses(losses, plain, tmp_path):
    for _ in range(2):
        assert losses(embeddings_cache=str(tmp_path / "cache")) == pytest.approx(plain, abs=1e-5)


def test_workers_change_no_loss(losses, plain):
    observers = {"dataloader_num_workers": 1, "callbacks": [ZeroShot(1)], **EVALUATION, "eval_steps": 3}
    assert losses(**observers) == pytest.approx(plain, abs=1e-5)


@pytest.mark.parametrize(
    "look",
    [
        lambda trainer: trainer.evaluate(make_preferences(5)),
        lambda trainer: trainer.predict(make_preferences(5)),
        lambda trainer: next(iter(trainer.get_train_dataloader())),
        lambda trainer: trainer.add_callback(EvaluatorCallback(trainer, Drawing())),
        lambda trainer: trainer.add_callback(EvaluatorCallback(trainer, evaluator(trainer.processing_class))),
    ],
    ids=["evaluate", "predict", "a batch", "an evaluator of the user", "robustness"],
)
def test_a_look_before_training_changes_no_loss(losses, plain, look):
    assert losses(look, **EVALUATION) == pytest.approx(plain, abs=1e-5)


def test_every_generator_is_where_it_was():
    states = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
    with contextlib.suppress(ZeroDivisionError), unchanged_random_state(torch.device("cpu")):
        draw_from_all()
        _ = 1 / 0
    assert [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()] == states


def test_random_transforms_in_workers_differ_between_epochs_and_repeat_after_a_resume(make_trainer):
    def randomly_weighted(batch):
        return {**batch, "weight": [random.random() for _ in batch["image"]]}

    def epochs(*numbers):
        rows = make_preferences(4).with_transform(randomly_weighted)
        loader = make_trainer(rows, dataloader_num_workers=1).get_train_dataloader()
        for epoch in numbers:
            loader.set_epoch(epoch)
            yield [batch["weight"].tolist() for batch in loader]

    first, second = epochs(0, 1)
    (again,) = epochs(1)
    assert first != second == again


ADAPTERS = {
    "none": None,
    "lora": LoraConfig(r=4, target_modules=VISION_LAYERS, lora_dropout=0.5),
    "loha": LoHaConfig(r=4, target_modules=VISION_LAYERS, rank_dropout=0.5, module_dropout=0.5),
}


@pytest.mark.parametrize("adapters", ADAPTERS)
def test_without_dropout_two_passes_in_training_are_equal(make_trainer, dropout_folder, adapters):
    trainer = make_trainer(
        make_preferences(4), model=dropout_folder, peft_config=ADAPTERS[adapters], disable_dropout=True
    )
    with torch.no_grad():  # new adapters change nothing, with or without dropout
        for parameter in trainer.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) * parameter.requires_grad)
    pixels = trainer.data_collator([trainer.train_dataset[0]])["pixel_values"]
    for model in (trainer.encoder, dual_encoder(trainer.reference.model)):
        model.train()
        for parameter in model.parameters():  # adapters are 0 at first
            parameter.data += 0.01
        first, second = (model.get_image_features(pixels).pooler_output for _ in range(2))
        assert torch.equal(first, second)


def test_dropout_is_off_by_default_and_said_once(clip_folder, dropout_folder, tmp_path, caplog):
    arguments = {"peft_config": ADAPTERS["lora"], "ref_model": CLIPModel.from_pretrained(dropout_folder)}
    trainer = samples.make_trainer(dropout_folder, tmp_path, **arguments)
    (said,) = [record.message for record in caplog.records if "disable_dropout" in record.message]
    assert "8 dropout probabilities" in said
    assert trainer.encoder.config.vision_config.attention_dropout == 0.3  # what is saved stays as it was


def test_a_model_without_dropout_says_nothing(make_trainer, caplog):
    make_trainer(make_preferences(4), disable_dropout=True)
    assert "disable_dropout" not in caplog.text
