"""Robustness measured while training: its metrics choose checkpoints and stop runs, and a resume repeats them."""

import json

import pytest
import transformers
from packaging.version import Version
from samples import CLASSES, PROMPTS, StopAt, logged, make_labelled, make_preferences
from transformers import CLIPModel, EarlyStoppingCallback, TrainerCallback

from clip_po.data.attacks.attack import TypographicAttack
from clip_po.data.typographic_preferences import TypographicPreferences
from clip_po.evaluation.drift import DriftEvaluator
from clip_po.evaluation.evaluator import RobustnessEvaluator, ZeroShotEvaluator, trade_off
from clip_po.evaluation.retention import RetentionEvaluator, RetentionSet
from clip_po.evaluation.robustness import RobustnessImages, evaluate_robustness, robustness_report
from clip_po.evaluation.zero_shot import zero_shot_accuracy
from clip_po.training.callbacks import EvaluatorCallback

TEMPLATES = ["a photo of a {}"]
SHARES = {"clean_accuracy", "typographic_accuracy", "occluded_accuracy", "fooled", "reading_effect"}


def attack(words=CLASSES):
    return TypographicAttack(words=words, min_side=32, size=(0.3, 0.5))


RUN = {
    "train_dataset": TypographicPreferences(make_labelled(16), attack()),
    "eval_dataset": make_preferences(4),
    "learning_rate": 2e-3,
    "max_steps": 8,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
}


@pytest.fixture
def images(processor):
    return RobustnessImages(make_labelled(16), attack(), processor)


def with_robustness(trainer, images, **arguments):
    trainer.add_callback(EvaluatorCallback(trainer, RobustnessEvaluator(images, TEMPLATES, **arguments)))
    return trainer


class Evaluations(TrainerCallback):
    """Keeps the metrics that Trainer goes on with."""

    def __init__(self):
        self.metrics = []

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.metrics.append(metrics)


def test_the_metrics_are_those_of_the_report_against_the_initial_policy(make_trainer, images, clip_folder):
    trainer = with_robustness(make_trainer(learning_rate=0.05), images, max_clean_cost=1.0)
    trainer.train()
    result = trainer.evaluate()
    models = {"base": CLIPModel.from_pretrained(clip_folder), "policy": trainer.model}
    answers = evaluate_robustness(models, images, TEMPLATES, disable_tqdm=True)
    expected = {name: e.value for name, e in robustness_report(answers, "policy", "base").items()}
    expected["trade_off"] = trade_off(expected["typographic_accuracy"], expected["clean_cost"], 1.0)
    assert {*SHARES, "clean_cost", "trade_off"} <= set(expected)
    changed = answers.predictions_of("policy")["clean"] != answers.predictions_of("base")["clean"]
    assert changed.any()
    found = {name: result[f"eval_{name}"] for name in expected if f"eval_{name}" in result}
    assert found == pytest.approx({name: value for name, value in expected.items() if value == value})
    assert len(logged(trainer, "eval_clean_cost")) == 5
    assert logged(trainer, "eval_clean_cost")[-1] == result["eval_clean_cost"]


@pytest.mark.parametrize("first", [True, False])
def test_early_stopping_goes_by_them_whichever_callback_was_added_first(make_trainer, images, first):
    """Nothing is learned, so that no evaluation after the first is better."""
    settings = {"learning_rate": 0.0, "metric_for_best_model": "typographic_accuracy"}
    stopping = EarlyStoppingCallback(early_stopping_patience=2)
    trainer = make_trainer(callbacks=[stopping], **settings) if first else make_trainer(**settings)
    with_robustness(trainer, images)
    if not first:
        trainer.add_callback(stopping)
    trainer.train()
    assert trainer.state.global_step == 6
    assert len(logged(trainer, "eval_typographic_accuracy")) == 3


@pytest.mark.parametrize("metric", ["typographic_accuracy", "trade_off"])
def test_the_best_model_is_the_best_by_them(make_trainer, images, metric):
    settings = {"load_best_model_at_end": True, "metric_for_best_model": metric, "save_total_limit": 1}
    trainer = with_robustness(make_trainer(**settings), images, max_clean_cost=0.0)
    trainer.train()
    values = logged(trainer, f"eval_{metric}")
    assert len(set(values)) > 1
    assert trainer.state.best_metric == max(values)
    assert trainer.state.best_global_step == 2 * (1 + values.index(max(values)))
    assert trainer.evaluate()[f"eval_{metric}"] == max(values)


def test_of_several_data_sets_the_first_one_has_them(make_trainer, images):
    sets = {"near": make_preferences(4), "near_too": make_preferences(5)}
    seen = Evaluations()
    settings = {"learning_rate": 0.0, "metric_for_best_model": "typographic_accuracy"}
    trainer = with_robustness(
        make_trainer(callbacks=[seen, EarlyStoppingCallback(2)], eval_dataset=sets, **settings), images
    )
    trainer.train()
    assert trainer.state.global_step == 6
    assert len(logged(trainer, "eval_typographic_accuracy")) == 3
    assert ["eval_typographic_accuracy" in metrics for metrics in seen.metrics] == [True, False] * 3
    assert "eval_typographic_accuracy" in trainer.evaluate()


def test_any_evaluator_plugs_in_and_the_reference_is_measured_once(make_trainer, processor, clip_folder):
    rows = make_labelled(16)
    evaluator = ZeroShotEvaluator(rows, processor, TEMPLATES)
    measure, measured = evaluator.measure, []
    evaluator.measure = lambda models, **arguments: measured.append([*models]) or measure(models, **arguments)
    trainer = make_trainer(metric_for_best_model=evaluator.primary_metric, load_best_model_at_end=True)
    trainer.add_callback(EvaluatorCallback(trainer, evaluator))
    trainer.train()
    assert measured == [["reference"], *[["policy"]] * 4]
    assert trainer.state.best_metric == max(logged(trainer, "eval_accuracy"))
    models = {"reference": CLIPModel.from_pretrained(clip_folder), "policy": trainer.model}
    before, after = (
        zero_shot_accuracy(model, processor, rows, TEMPLATES, disable_tqdm=True).accuracy.value
        for model in models.values()
    )
    result = trainer.evaluate()
    assert result["eval_accuracy"] == after
    assert result["eval_difference"] == pytest.approx(100 * (after - before))


def drift_callback(trainer, processor, **arguments):
    return EvaluatorCallback(trainer, DriftEvaluator(make_labelled(16), processor, PROMPTS), **arguments)


def test_drift_chooses_the_checkpoint_that_has_moved_least(make_trainer, processor, clip_folder):
    trainer = make_trainer(
        metric_for_best_model="drift/kl",
        greater_is_better=DriftEvaluator.greater_is_better,
        load_best_model_at_end=True,
    )
    trainer.add_callback(drift_callback(trainer, processor, name="drift"))
    trainer.train()
    drifts = logged(trainer, "eval_drift/kl")
    assert len(drifts) == 4
    assert trainer.state.best_metric == min(drifts) > 0
    assert trainer.state.best_global_step == 2 * (1 + drifts.index(min(drifts)))
    assert max(drifts) > min(drifts)
    models = {"reference": CLIPModel.from_pretrained(clip_folder), "policy": trainer.model}
    evaluator = DriftEvaluator(make_labelled(16), processor, PROMPTS)
    loaded = evaluator(models, "reference", disable_tqdm=True)["policy"]
    assert loaded["kl"].value == pytest.approx(min(drifts), abs=1e-5)
    assert len(logged(trainer, "eval_kl")) == 4  # of the trainer, over the candidates
    assert {"eval_drift/agreement", "eval_drift/cosine"} <= trainer.evaluate().keys()


def test_retention_chooses_the_checkpoint_that_has_lost_least(make_trainer, processor):
    trainer = make_trainer(
        learning_rate=0.05,
        metric_for_best_model=RetentionEvaluator.primary_metric,
        greater_is_better=RetentionEvaluator.greater_is_better,
        load_best_model_at_end=True,
    )
    evaluator = RetentionEvaluator({"things": RetentionSet(make_labelled(16))}, processor)
    trainer.add_callback(EvaluatorCallback(trainer, evaluator))
    trainer.train()
    costs = logged(trainer, "eval_retention_cost")
    assert costs == logged(trainer, "eval_things: retention_cost")
    assert len(set(costs)) > 1
    assert trainer.state.best_metric == min(costs)
    assert trainer.evaluate()["eval_retention_cost"] == min(costs)


def test_a_metric_that_would_replace_one_of_the_trainers_is_refused_before_training(make_trainer, processor):
    trainer = make_trainer()
    trainer.add_callback(drift_callback(trainer, processor))
    with pytest.raises(ValueError, match=r"both have a metric kl.*name='drift'.*eval_drift/kl"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_an_evaluation_of_another_prefix_is_left_alone(make_trainer, images):
    trainer = with_robustness(make_trainer(), images)
    assert "eval_clean_accuracy" in trainer.evaluate()
    assert not [name for name in trainer.evaluate(metric_key_prefix="test") if "clean_accuracy" in name]


def test_a_resumed_run_measures_the_same(make_trainer, images):
    whole = with_robustness(make_trainer(folder="whole"), images, max_clean_cost=1.0)
    whole.train()
    with_robustness(make_trainer(callbacks=[StopAt(4)]), images, max_clean_cost=1.0).train()
    resumed = with_robustness(make_trainer(), images, max_clean_cost=1.0)
    resumed.train(resume_from_checkpoint=True)
    for name in (*SHARES, "clean_cost", "trade_off"):
        assert len(logged(resumed, f"eval_{name}")) == 4
        assert logged(resumed, f"eval_{name}") == logged(whole, f"eval_{name}")


def test_what_is_undefined_is_left_out(make_trainer, processor):
    images = RobustnessImages(make_labelled(8), attack(["tree", "house"]), processor)
    result = with_robustness(make_trainer(), images).evaluate()
    assert "eval_clean_accuracy" in result
    assert not {"eval_fooled", "eval_trade_off"} & set(result)


def test_broken_images_show_before_training(make_trainer, images):
    trainer = make_trainer()
    trainer.add_callback(EvaluatorCallback(trainer, RobustnessEvaluator(images, ["no place for a name"])))
    with pytest.raises(ValueError, match="exactly one"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_the_trade_off_puts_the_bound_first():
    assert trade_off(0.6, 1.0, 1.0) == 0.6
    assert trade_off(0.6, 100 * (0.93 - 0.92), 1.0) == 0.6
    assert trade_off(0.9, 3.0, 1.0) == pytest.approx(-0.02)
    assert trade_off(0.0, -5.0, 1.0) == 0.0
    assert trade_off(0.9, 4.0, 1.0) < trade_off(0.1, 2.0, 1.0) < trade_off(0.0, 1.0, 1.0)


def test_a_negative_bound_is_refused(images):
    with pytest.raises(ValueError, match="percentage points >= 0, got -1"):
        RobustnessEvaluator(images, TEMPLATES, max_clean_cost=-1)


WORKER = """
import json
import sys

from samples import CLASSES, make_labelled, make_preferences, make_trainer
from transformers import CLIPProcessor

from clip_po.training.averaging import BetaMovingAverageCallback
from clip_po.training.callbacks import EvaluatorCallback
from clip_po.config import ContrastivePOConfig
from clip_po.data.attacks.attack import TypographicAttack
from clip_po.evaluation.drift import DriftEvaluator
from clip_po.evaluation.evaluator import RobustnessEvaluator
from clip_po.evaluation.retention import RetentionEvaluator, RetentionSet
from clip_po.evaluation.robustness import RobustnessImages

clip, folder, stop = sys.argv[1:]
trainer = make_trainer(clip, folder + "/run", per_device_train_batch_size=2, max_steps=4,
    eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, learning_rate=1e-2,
    train_dataset=make_preferences(8), eval_dataset=make_preferences(3), callbacks=[BetaMovingAverageCallback()])
attack = TypographicAttack(words=CLASSES, min_side=32, size=(0.3, 0.5))
images = RobustnessImages(make_labelled(7), attack, CLIPProcessor.from_pretrained(clip))
trainer.add_callback(EvaluatorCallback(trainer, RobustnessEvaluator(images, ["a photo of a {}"], batch_size=2)))
trainer.train(resume_from_checkpoint=stop or None)
rank = trainer.accelerator.process_index
result = {
    "weights": sum(p.double().abs().sum().item() for p in trainer.model.parameters()),
    "logs": [log for log in trainer.state.log_history if "eval_clean_cost" in log],
    "result": trainer.evaluate()["eval_typographic_accuracy"],
}
trainer.save_model(folder + "/saved")
with open(f"{folder}/{'resumed' if stop else 'whole'}-{rank}.json", "w") as file:
    json.dump(result, file)
trainer.accelerator.end_training()
"""


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"), reason="transformers can't resume on several CPU processes"
)
@pytest.mark.slow
def test_two_processes_agree_on_metrics_and_average_and_resume_exactly(
    clip_folder, processor, two_processes, tmp_path
):
    for resumed in ("", tmp_path / "run" / "checkpoint-2"):
        two_processes.run(WORKER, clip_folder, tmp_path, resumed)
    found = [
        json.loads((tmp_path / f"{run}-{rank}.json").read_text()) for run in ("whole", "resumed") for rank in (0, 1)
    ]
    assert all(one == found[0] for one in found[1:])
    assert len(found[0]["logs"]) == 2
    saved = CLIPModel.from_pretrained(tmp_path / "saved")
    assert sum(p.double().abs().sum().item() for p in saved.parameters()) == found[0]["weights"]
    alone = RobustnessImages(make_labelled(7), attack(), processor)
    answers = evaluate_robustness({"saved": saved}, alone, TEMPLATES, disable_tqdm=True)
    assert robustness_report(answers, "saved")["typographic_accuracy"].value == found[0]["result"]
