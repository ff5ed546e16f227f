"""Arguments, columns and data that would have no effect are refused or named."""

import re

import pytest
from samples import CLASSES, PROMPTS, make_labelled, make_preferences, make_trainer, run_config

from clip_po.cli.main import main
from clip_po.data.attacks.attack import TypographicAttack
from clip_po.data.typographic_preferences import TypographicPreferences, TypographicStream

FEW = "runs over the texts of each row of train_dataset, which are two"
NO_EFFECT = "has no effect"


@pytest.fixture
def made(clip_folder, tmp_path, caplog):
    """Make a trainer, and return what it warned of."""

    def make(dataset=None, **arguments):
        arguments = {"candidate_texts": None, **arguments}
        make_trainer(
            clip_folder, tmp_path, train_dataset=make_preferences(8) if dataset is None else dataset, **arguments
        )
        return caplog.text

    return make


# ---- Arguments


@pytest.mark.parametrize(
    ("arguments", "readers"),
    [
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, "sigmoid"),
        ({"label_smoothing": 0.1, "loss_type": ["sft", "distillation"]}, "sigmoid"),
        ({"desirable_weight": 2.0}, "kto_pair"),
        ({"undesirable_weight": 0.0, "loss_type": "ipo"}, "kto_pair"),
        ({"reference_free": True, "loss_type": "sft"}, "sigmoid"),
    ],
)
def test_an_argument_that_no_loss_reads_is_refused(arguments, readers, tmp_path):
    name = next(iter(arguments))
    with pytest.raises(ValueError, match=rf"^{name}=.* has no effect with loss_type=.*{readers}.* reads it"):
        run_config(tmp_path, **arguments)


def test_losses_that_all_weigh_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"loss_weights=\[0.0, 0.0\] leaves only the regularization"):
        run_config(tmp_path, loss_type=["sigmoid", "sft"], loss_weights=[0.0, 0.0])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            ["--attack_words", "classes", "--attack_other_words", "moon", "sun"],
            "--attack_other_words has no effect without --attack_other_share",
        ),
        (["--name_until", ",", "--class_names", "a", "b"], "--name_until has no effect next to --class_names"),
        (["--class_name_map", "x.yaml", "--class_names", "a"], "--class_name_map has no effect next to --class_names"),
        (["--lora_r", "4"], "--lora_r would have no effect: .*Add --use_peft"),
        (["--label_smoothing", "0.1"], "label_smoothing=0.1 has no effect with loss_type"),
    ],
)
def test_a_flag_without_effect_is_refused(flags, says, clip_folder, tmp_path, capsys):
    command = ["train", "--model_name_or_path", str(clip_folder), "--dataset_name", str(tmp_path)]
    assert main([*command, "--output_dir", str(tmp_path / "out"), *flags]) == 2
    assert re.search(says, capsys.readouterr().err)


@pytest.mark.parametrize(
    "arguments",
    [
        {"label_smoothing": 0.1, "loss_type": ["ipo", "sigmoid"]},
        {"desirable_weight": 2.0, "loss_type": "kto_pair"},
        {"reference_free": True, "loss_type": "ipo"},
        {"label_smoothing": 0.0, "desirable_weight": 1.0, "loss_type": "sft"},
    ],
)
def test_an_argument_that_a_loss_reads_is_taken(arguments, tmp_path):
    run_config(tmp_path, **arguments)


# ---- Columns


@pytest.mark.parametrize(
    ("column", "meant"),
    [
        ("weights", "weight"),
        ("Weight", "weight"),
        ("wieght", "weight"),
        ("sample_weight", "weight"),
        ("candidate", "candidates"),
        ("candidate_texts", "candidates"),
        ("canditates", "candidates"),
        ("clean_images", "clean_image"),
        ("cleanImage", "clean_image"),
        ("clean image", "clean_image"),
    ],
)
@pytest.mark.parametrize("kind", ["numbered", "streamed", "evaluation"])
def test_a_misspelled_column_is_refused(kind, column, meant, made):
    rows = make_preferences(4).remove_columns("clean_image").add_column(column, [1.0] * 4)
    given = {
        "numbered": {"dataset": rows},
        "streamed": {"dataset": rows.to_iterable_dataset()},
        "evaluation": {"eval_dataset": rows},
    }[kind]
    with pytest.raises(ValueError, match=rf"column {column!r}, which nothing reads: .*{meant!r}.*rename_column"):
        made(**given, reg_weight=0.0, max_steps=1)


@pytest.mark.parametrize(
    ("old", "new", "meant"),
    [("chosen", "Chosen", "chosen"), ("rejected", "rejeted", "rejected"), ("image", "Images", "image")],
)
def test_a_misspelled_column_of_the_format_is_named(old, new, meant, made):
    with pytest.raises(ValueError, match=rf"column {new!r}, which nothing reads: .*{meant!r}"):
        made(make_preferences(4).rename_column(old, new))


@pytest.mark.parametrize(
    "columns",
    [
        {
            "height": 32,
            "width": 32,
            "id": 1,
            "caption": "a cat",
            "labels": 3,
            "source": "x",
            "eight": 8,
            "rejected_id": 4,
        },
        {"weight": 1.0, "weights": 2.0},
    ],
)
def test_other_columns_are_left_alone(columns, made):
    rows = make_preferences(4)
    for name, value in columns.items():
        rows = rows.add_column(name, [value] * 4)
    made(rows)


def test_a_misspelled_column_of_classes_is_refused(made):
    rows = make_labelled(4).add_column("rejected_labels", [1, 2, 3, 0])
    with pytest.raises(ValueError, match=r"column 'rejected_labels', which nothing reads: .*'rejected_label'"):
        made(rows, candidate_texts=PROMPTS, reg_weight=0.0)


# ---- Data


def test_candidates_of_rows_under_candidate_texts_are_named(made):
    rows = make_preferences(4).add_column("candidates", [PROMPTS] * 4)
    assert "column 'candidates' of train_dataset has no effect" in made(rows, candidate_texts=PROMPTS)


def test_a_regularization_that_weighs_nothing_is_named(made):
    images = make_preferences(4).select_columns("image")
    assert "reg_dataset has no effect" in made(reg_dataset=images, reg_weight=0.0)


def test_a_cache_that_nothing_fills_is_named(made, tmp_path):
    said = made(embeddings_cache=str(tmp_path / "cache"), precompute_ref_log_probs=False)
    assert "embeddings_cache has no effect" in said


@pytest.mark.parametrize("column", ["weight", "weights", "sample_weight"])
@pytest.mark.parametrize("kind", [TypographicPreferences, TypographicStream])
def test_weights_of_images_that_are_not_asked_for_are_named(kind, column, made):
    rows = make_labelled(4).add_column(column, [0.5] * 4)
    rows = rows if kind is TypographicPreferences else rows.to_iterable_dataset()
    attack = TypographicAttack(words=CLASSES, min_side=32)
    assert f"Pass weight_column={column!r} to {kind.__name__}" in made(kind(rows, attack), max_steps=1)


def test_weights_of_regularization_images_are_named(made):
    images = make_preferences(4).select_columns("image").add_column("weight", [0.5] * 4)
    assert "column 'weight' of reg_dataset has no effect" in made(reg_dataset=images)


def test_weights_that_are_asked_for_are_not(made):
    rows = make_labelled(4).add_column("weight", [0.5] * 4)
    attack = TypographicAttack(words=CLASSES, min_side=32)
    assert NO_EFFECT not in made(TypographicPreferences(rows, attack, weight_column="weight"))


# ---- Regularization over two texts


def with_candidates(texts):
    return make_preferences(8).add_column("candidates", [texts] * 8)


def attacked(**arguments):
    return TypographicPreferences(make_labelled(8), TypographicAttack(words=CLASSES, min_side=32), **arguments)


TWO_TEXTS = {
    "own-texts": lambda: {},
    "streamed": lambda: {"dataset": make_preferences(8).to_iterable_dataset(), "max_steps": 1},
    "attacked": lambda: {"dataset": attacked()},
    "attacked-stream": lambda: {
        "dataset": TypographicStream(
            make_labelled(8).to_iterable_dataset(), TypographicAttack(words=CLASSES, min_side=32)
        ),
        "max_steps": 1,
    },
    "reg-dataset": lambda: {
        "dataset": make_preferences(8).remove_columns("clean_image"),
        "reg_dataset": make_labelled(4).select_columns("image"),
    },
}

MORE_TEXTS = {
    "candidate-texts": lambda: {"candidate_texts": PROMPTS},
    "in-batch": lambda: {"in_batch_candidates": True},
    "own-candidates": lambda: {"dataset": with_candidates(PROMPTS)},
    "several-rejected": lambda: {"dataset": attacked(rejected="others")},
    "no-regularization": lambda: {"reg_weight": 0.0},
}


@pytest.mark.parametrize("name", TWO_TEXTS)
def test_regularization_over_two_texts_is_warned_of(name, made):
    assert made(**TWO_TEXTS[name]()).count(FEW) == 1


@pytest.mark.parametrize("name", MORE_TEXTS)
def test_regularization_over_more_texts_is_not(name, made):
    assert FEW not in made(**MORE_TEXTS[name]())
