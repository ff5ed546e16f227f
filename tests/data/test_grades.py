"""Graded preferences: columns to batches, their part in the loss, and grades that would have no effect."""

import math

import datasets
import pytest
import torch
from samples import PROMPTS, make_preferences, make_trainer, same, tiny_processor, weights
from torch.nn import functional as F

from clip_po.data.collator import DataCollatorForContrastivePreference
from clip_po.data.grades import check_grades, grades_of

ROWS = 6


def graded(**columns):
    """Preferences with the same values in each row, or a list of values."""
    rows = make_preferences(ROWS)
    for name, values in columns.items():
        rows = rows.add_column(name, values if isinstance(values, list) else [values] * ROWS)
    return rows


def batch_of(rows):
    collate = DataCollatorForContrastivePreference(tiny_processor(), PROMPTS)
    completed = [{**row, "rejected": [row["rejected"]], "weight": 1.0, "reg_row_weight": 0.0} for row in rows]
    return collate(completed)


def test_rows_without_grades_give_the_batch_that_they_always_gave():
    assert not {"margin", "label_smoothing"} & set(batch_of(make_preferences(3)))


def test_a_margin_is_a_column_or_the_difference_of_two_scores():
    assert batch_of(graded(margin=[0.0, 0.5, 1.0, 2.0, 3.0, 4.0]))["margin"].tolist() == [0.0, 0.5, 1.0, 2.0, 3.0, 4.0]
    rows = graded(chosen_score=[3.0, 4.5, 1.0, 2.0, 0.0, 9.0], rejected_score=[1.0, 4.5, -1.0, 1.5, 0.0, 2.0])
    assert batch_of(rows)["margin"].tolist() == [2.0, 0.0, 2.0, 0.5, 0.0, 7.0]


def test_a_row_without_a_grade_has_margin_and_smoothing_0():
    rows = [{"margin": 2.0}, {}, {"margin": None, "label_smoothing": 0.5}, {"chosen_score": 3, "rejected_score": 1}]
    assert {name: values.tolist() for name, values in grades_of(rows).items()} == {
        "margin": [2.0, 0.0, 0.0, 2.0],
        "label_smoothing": [0.0, 0.0, 0.5, 0.0],
    }


def mean_loss(trainer):
    """The preference loss of all rows in one batch, and their chosen and rejected log-ratios times beta."""
    pairs = trainer.eval_dataset
    batch = trainer.data_collator([pairs[index] for index in range(len(pairs))])
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch).item()
        logps = trainer.policy(trainer.model, trainer.encoder, batch).preference
        reference = trainer.reference(batch).preference
    ratios = trainer.args.beta * (logps - reference)
    chosen = ratios.gather(-1, batch["chosen"].unsqueeze(-1)).squeeze(-1)
    return loss, chosen - ratios.gather(-1, batch["rejected"]).squeeze(-1)


@pytest.mark.parametrize("loss_type", ["sigmoid", "simpo"])
def test_the_loss_of_a_row_has_its_margin_and_its_smoothing(loss_type, clip_folder, tmp_path):
    """Computed from log-probabilities by the formula of Bradley and Terry with a margin."""
    margins, smoothing = [0.0, 0.5, 1.0, 2.0, 3.0, 0.2], [0.0, 0.1, 0.5, 0.3, 0.0, 0.5]
    rows = graded(margin=margins, label_smoothing=smoothing)
    trainer = make_trainer(
        clip_folder, tmp_path, train_dataset=rows, eval_dataset=rows, loss_type=loss_type, beta=2.0, reg_weight=0.0
    )
    with torch.no_grad():
        for parameter in trainer.model.vision_model.parameters():
            parameter.mul_(1.5)
    loss, differences = mean_loss(trainer)
    if loss_type == "simpo":
        with torch.no_grad():
            batch = trainer.data_collator([trainer.eval_dataset[index] for index in range(ROWS)])
            logps = trainer.policy(trainer.model, trainer.encoder, batch).preference
        chosen, rejected = logps.gather(-1, batch["chosen"].unsqueeze(-1)), logps.gather(-1, batch["rejected"])
        differences = 2.0 * (chosen - rejected).squeeze(-1) - 0.5
    assert differences.abs().max() > 0.1
    odds = differences - torch.tensor(margins)
    wrong = torch.tensor(smoothing)
    wanted = -(1 - wrong) * F.logsigmoid(odds) - wrong * F.logsigmoid(-odds)
    assert loss == pytest.approx(wanted.mean().item(), rel=1e-5)


def test_two_scores_train_like_their_difference(clip_folder, tmp_path):
    scores = {"chosen_score": [2.0, 1.0, 4.0, 0.5, 3.0, 0.0], "rejected_score": [1.0, 1.0, 1.0, 0.0, 0.0, -2.0]}
    margins = [first - second for first, second in zip(*scores.values(), strict=True)]
    trained = []
    for name, rows in {"scores": graded(**scores), "margin": graded(margin=margins), "none": graded()}.items():
        trainer = make_trainer(clip_folder, tmp_path / name, train_dataset=rows, max_steps=2, learning_rate=1e-3)
        trainer.train()
        trained.append(weights(trainer.model))
    assert same(trained[0], trained[1])
    assert not same(trained[0], trained[2])


def test_classes_may_have_grades_too(clip_folder, tmp_path):
    features = {"image": datasets.Image(), **dict.fromkeys(("label", "rejected_label"), datasets.Value("int64"))}
    images = make_preferences(2)["clean_image"][:]
    columns = {"image": images, "label": [0, 1], "rejected_label": [2, 3], "margin": [0.5, 1.5]}
    rows = datasets.Dataset.from_dict(columns, datasets.Features({**features, "margin": datasets.Value("float32")}))
    trainer = make_trainer(clip_folder, tmp_path, train_dataset=rows, reg_weight=0.0)
    assert trainer.data_collator([trainer.train_dataset[n] for n in (0, 1)])["margin"].tolist() == [0.5, 1.5]


WITHOUT_EFFECT = {
    "ipo": ({"margin": 1.0}, {"loss_type": "ipo"}, "column 'margin', which only"),
    "one-of-two-losses": ({"margin": 1.0}, {"loss_type": ["sigmoid", "hinge"]}, "column 'margin', which only"),
    "no-comparison": ({"label_smoothing": 0.5}, {"loss_type": "sft"}, "column 'label_smoothing', which only"),
    "scores": ({"chosen_score": 2.0, "rejected_score": 1.0}, {"loss_type": "robust"}, "column 'chosen_score', which"),
    "one-score": ({"chosen_score": 2.0}, {}, "the difference of the two columns"),
    "margin-and-scores": ({"margin": 1.0, "chosen_score": 2.0, "rejected_score": 1.0}, {}, "both set the margin"),
    "smoothing-twice": ({"label_smoothing": 0.5}, {"label_smoothing": 0.1}, "sets it for all"),
    "misspelled": ({"margins": 1.0}, {}, "must be called 'margin'"),
}


@pytest.mark.parametrize("kind", ["numbered", "streamed", "evaluation"])
@pytest.mark.parametrize("case", WITHOUT_EFFECT.values(), ids=WITHOUT_EFFECT)
def test_grades_without_effect_are_refused(case, kind, clip_folder, tmp_path):
    columns, arguments, says = case
    rows = graded(**columns)
    given = {
        "numbered": {"train_dataset": rows},
        "streamed": {"train_dataset": rows.to_iterable_dataset(), "max_steps": 1},
        "evaluation": {"train_dataset": graded(), "eval_dataset": rows},
    }[kind]
    with pytest.raises(ValueError, match=says):
        make_trainer(clip_folder, tmp_path, **given, **arguments)


def test_losses_that_compare_nothing_may_stand_beside_one_that_reads_the_grade(clip_folder, tmp_path):
    rows = graded(margin=1.0)
    make_trainer(clip_folder, tmp_path, train_dataset=rows, loss_type=["sigmoid", "sft", "distillation"])


WRONG_VALUES = {
    "negative-margin": ({"margin": -0.1}, ValueError, "row 4: column 'margin' must be a finite number >= 0"),
    "nan": ({"margin": math.nan}, ValueError, "row 4: column 'margin' must be a finite number >= 0, got nan"),
    "text": ({"margin": "1"}, TypeError, "row 4: column 'margin' must be a finite number"),
    "surely-wrong": ({"label_smoothing": 0.6}, ValueError, "must lie in"),
    "rejected-is-better": ({"chosen_score": 1.0, "rejected_score": 2.0}, ValueError, "Exchange the two texts"),
    "one-score": ({"chosen_score": 1.0, "rejected_score": None}, ValueError, "rejected_score is None"),
}


@pytest.mark.parametrize("case", WRONG_VALUES.values(), ids=WRONG_VALUES)
def test_a_grade_that_can_not_be_used_is_named_with_its_row(case):
    row, error, says = case
    with pytest.raises(error, match=says):
        check_grades(row, "row 4")


def test_grades_of_a_dataset_and_of_a_stream_are_checked(clip_folder, tmp_path):
    rows = graded(margin=[1.0, 1.0, -1.0, 1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="train_dataset row 2: column 'margin'"):
        make_trainer(clip_folder, tmp_path, train_dataset=rows)
    trainer = make_trainer(clip_folder, tmp_path, train_dataset=rows.to_iterable_dataset(), max_steps=1)
    with pytest.raises(ValueError, match="train_dataset row 2 of the stream: column 'margin'"):
        trainer.train()


def test_a_run_is_resumed_with_its_grades(clip_folder, tmp_path):
    run = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(clip_folder, tmp_path, train_dataset=graded(margin=1.0), **run).train()
    other = make_trainer(clip_folder, tmp_path, train_dataset=graded(margin=2.0), **run)
    with pytest.raises(ValueError, match="texts of its rows differ"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
