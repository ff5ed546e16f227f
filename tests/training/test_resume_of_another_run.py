"""A checkpoint is resumed with the data, classes, reference and settings of its run, or the differences are named."""

import json
import shutil
from pathlib import Path

import datasets
import pytest
import samples
import torch
from samples import CLASSES, PROMPTS, make_labelled, make_preferences, same, weights
from transformers import CLIPModel

from clip_po.concept.transform import ConceptTransform
from clip_po.data.attacks.attack import TypographicAttack
from clip_po.data.typographic_preferences import TypographicPreferences, TypographicStream

RUN = {
    "learning_rate": 1e-3,
    "max_steps": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "reg_dataset": make_labelled(5),
    "eval_dataset": make_preferences(3),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, clip_folder):
    """The first of two steps of a run on preferences."""
    folder = tmp_path_factory.mktemp("written")
    samples.make_trainer(clip_folder, folder, **RUN).train()
    return folder / "checkpoint-1"


@pytest.fixture
def resume(checkpoint, clip_folder, tmp_path):
    def run(model=clip_folder, **arguments):
        shutil.copytree(checkpoint, tmp_path / "checkpoint-1")
        trainer = samples.make_trainer(model, tmp_path, **{**RUN, **arguments})
        trainer.train(resume_from_checkpoint=True)
        return trainer

    return run


def with_other(column, values, rows=13):
    return make_preferences(rows).remove_columns(column).add_column(column, values)


def mirrored(rows):
    return rows.map(lambda row: {"image": row["image"].rotate(90)})


def perturbed(model):
    with torch.no_grad():
        model.visual_projection.weight += 0.1
    return model


DIFFERENT = {
    "another beta": ({"beta": 0.5}, "beta was 0.1 and is 0.5"),
    "another loss": (
        {"loss_type": ["sigmoid", "sft"]},
        "loss_type: entry 1 was absent and is 'sft'",
    ),
    "another weight of the KL": ({"reg_weight": 0.5}, "reg_weight was 1.0 and is 0.5"),
    "another seed": ({"seed": 1}, "seed was 42 and is 1"),
    "another learning rate": ({"learning_rate": 1e-4}, "learning_rate was 0.001 and is 0.0001"),
    "another batch": ({"per_device_train_batch_size": 2}, "rows in a step was 4 and is 2"),
    "dropout": ({"disable_dropout": False}, "disable_dropout was True and is False"),
    "more rows": ({"train_dataset": make_preferences(14)}, "train_dataset: number of rows was 13 and is 14"),
    "other images": ({"train_dataset": mirrored(make_preferences(13))}, "train_dataset: images of its rows differ"),
    "another order": ({"train_dataset": make_preferences(13).select(range(12, -1, -1))}, "texts of its rows differ"),
    "weights": ({"train_dataset": make_preferences(13).add_column("weight", [2.0] * 13)}, "train_dataset: columns"),
    "a text": (
        {"train_dataset": with_other("rejected", [PROMPTS[2], *make_preferences(13)["rejected"][1:]])},
        "train_dataset: texts of its rows differ",
    ),
    "other classes": (
        {"train_dataset": make_preferences(13), "candidate_texts": [*PROMPTS, "a car"]},
        "candidate_texts",
    ),
    "other regularization images": ({"reg_dataset": mirrored(make_labelled(5))}, "regularization images differ"),
    "fewer regularization images": ({"reg_dataset": make_labelled(4)}, "regularization images was 5 and is 4"),
}


@pytest.mark.parametrize(("arguments", "said"), DIFFERENT.values(), ids=DIFFERENT)
def test_a_difference_is_named_and_refused(resume, arguments, said):
    with pytest.raises(ValueError, match="belongs to another run") as error:
        resume(**arguments)
    assert said in str(error.value)
    assert "ignore_run_differences=True" in str(error.value)


def test_so_is_another_reference(resume, clip_folder):
    """Such as the trained model itself: the run would be held to what it has become."""
    with pytest.raises(ValueError, match="reference model differ"):
        resume(ref_model=perturbed(CLIPModel.from_pretrained(clip_folder)))


def test_a_trained_model_given_as_the_start_is_another_reference(resume, checkpoint):
    with pytest.raises(ValueError, match="reference model differ"):
        resume(model=checkpoint)


def test_every_difference_is_named(resume):
    with pytest.raises(ValueError, match=r"beta was 0\.1 and is 0\.2; reg_weight was 1\.0 and is 2\.0"):
        resume(beta=0.2, reg_weight=2.0)


def test_differences_are_ignored_if_the_arguments_say_so(resume, caplog):
    trainer = resume(beta=0.5, ignore_run_differences=True)
    assert trainer.state.global_step == 2
    assert "beta was 0.1 and is 0.5" in caplog.text


SAME = {
    "a longer run": {"max_steps": 4},
    "saving and logging": {"save_steps": 2, "logging_steps": 7, "save_total_limit": 1},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "no evaluation": {"eval_dataset": None},
    "embeddings at each step": {"precompute_ref_log_probs": False},
    "workers": {"dataloader_num_workers": 1},
    "skipping": {"on_bad_image": "skip"},
}


@pytest.mark.parametrize("arguments", SAME.values(), ids=SAME)
def test_what_does_not_define_a_run_may_change(resume, arguments, caplog):
    resume(**arguments)
    assert "differences" not in caplog.text


def test_other_rows_may_follow_if_the_arguments_say_that_rows_are_not_continued(resume):
    resume(train_dataset=make_preferences(8), ignore_data_skip=True)


def test_a_checkpoint_that_says_nothing_of_its_run_is_resumed_with_a_warning(resume, checkpoint, tmp_path, caplog):
    trainer = resume()
    (Path(trainer.args.output_dir) / "checkpoint-1" / "run.json").unlink()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert "has no run.json" in caplog.text


def attacked(kind, names=CLASSES, **attack):
    rows = make_labelled(8).cast_column("label", datasets.ClassLabel(names=list(names)))
    rows = rows.to_iterable_dataset() if kind is TypographicStream else rows
    return kind(rows, TypographicAttack(words=names, min_side=32, size=(0.3, 0.5), **attack))


@pytest.mark.parametrize("kind", [TypographicPreferences, TypographicStream])
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"names": ["cat", "dog", "car", "ship"]}, "train_dataset: class names: entry 2 was 'bird' and is 'car'"),
        ({"redraw": "never"}, "attack differ"),
        ({"seed": 1}, "attack differ"),
    ],
)
def test_other_classes_and_another_attack_are_named(clip_folder, tmp_path, kind, changed, said):
    run = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "candidate_texts": None}

    def trainer(**arguments):
        return samples.make_trainer(clip_folder, tmp_path, train_dataset=attacked(kind, **arguments), **run)

    trainer().train()
    with pytest.raises(ValueError, match="belongs to another run") as error:
        trainer(**changed).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert said in str(error.value)
    trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_the_best_checkpoint_is_chosen_on_the_same_evaluation_rows(clip_folder, tmp_path):
    best = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    samples.make_trainer(clip_folder, tmp_path, **{**RUN, **best}).train()
    other = samples.make_trainer(clip_folder, tmp_path, **{**RUN, **best, "eval_dataset": make_preferences(5)})
    with pytest.raises(ValueError, match="eval_dataset: number of rows was 3 and is 5"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_settings_of_a_subclass_are_compared_too(clip_folder, tmp_path):
    run = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}

    def trainer(**arguments):
        return samples.make_trainer(clip_folder, tmp_path, concept=ConceptTransform(16), **run, **arguments)

    trainer().train()
    with pytest.raises(ValueError, match=r"penalty_weight was 0\.1 and is 0\.3"):
        trainer(penalty_weight=0.3).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_the_file_holds_no_secret_and_no_path_of_this_machine(clip_folder, tmp_path):
    model = CLIPModel.from_pretrained(clip_folder)
    run = {**RUN, "hub_token": "hf_secret", "embeddings_cache": str(tmp_path / "cache")}
    samples.make_trainer(model, tmp_path / "run", **run, model_init_kwargs={"token": "hf_secret"}).train()
    written = (tmp_path / "run" / "checkpoint-1" / "run.json").read_text()
    assert json.loads(written)["beta"] == 0.1
    assert str(tmp_path) not in written
    assert "hf_secret" not in written


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(resume, clip_folder, tmp_path):
    whole = samples.make_trainer(clip_folder, tmp_path / "whole", **RUN)
    whole.train()
    assert same(weights(resume().model), weights(whole.model))
