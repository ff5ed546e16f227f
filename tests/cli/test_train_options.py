"""clip-po train: labels of its own, validation, early stopping, averaged weights, a bound of clean cost."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from samples import CLASSES, make_labelled, picture, write_parquet
from tolerances import LOGPS
from transformers import CLIPModel

from clip_po import BetaMovingAverageCallback, ContrastivePOTrainer, interpolate
from clip_po.cli import promise, train, train_model
from clip_po.cli.main import main
from clip_po.cli.outcome import UNCHANGED
from clip_po.cli.train_arguments import parse
from clip_po.data.attacks.words import EVERYDAY_WORDS
from clip_po.data.loading import load_split
from clip_po.evaluation.interpolation import Choice
from clip_po.evaluation.zero_shot import class_embeddings, classify
from clip_po.losses import LOSSES
from clip_po.models import load_any

QUICK = ["--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", "--save_strategy", "no"]
QUICK += ["--per_device_train_batch_size", "8"]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Parquet files of 24 rows to train on and 12 to validate on."""
    folder = tmp_path_factory.mktemp("labelled")
    for split, rows in (("train", range(24)), ("validation", range(24, 36))):
        make_labelled(36).select(rows).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory):
    """A folder of twelve images and nothing else."""
    folder = tmp_path_factory.mktemp("unlabelled")
    for row in range(12):
        picture(row).save(folder / f"{row:02}.png")
    return folder


@pytest.fixture
def command(clip_folder, labelled, tmp_path):
    """The flags of a quick run, with more of them after."""

    def flags(*more, data=labelled, out="out", steps=3):
        where = ["--model_name_or_path", str(clip_folder), "--output_dir", str(tmp_path / out)]
        return [*where, "--dataset_name", str(data), "--max_steps", str(steps), *QUICK, *more]

    return flags


def aligned(argv):
    trainer, _ = train.align(*train.parse(argv))
    return trainer


def weights(folder):
    return load_file(folder / "model.safetensors")


def images(rows):
    """The rows' images as bytes, to tell rows by."""
    return {np.asarray(row["image"]).tobytes() for row in rows}


# ---- Labels of the model's own --------------------------------------------------------------------------


def test_own_answers_stand_in_for_labels(command, unlabelled, clip_folder, processor):
    names = ["--class_names", *CLASSES]
    trainer = aligned(command("--labels", "reference", *names, "--loss_type", "sft", "distillation", data=unlabelled))
    preferences = trainer.train_dataset.preferences
    base = CLIPModel.from_pretrained(clip_folder)
    texts = class_embeddings(base, processor, CLASSES, ["a photo of a {}"])
    pixels = processor(images=[picture(row) for row in range(12)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        weight, label = classify(base, pixels, texts).softmax(dim=1).max(dim=1)
    assert preferences.labels == label.tolist()
    assert preferences.weights == pytest.approx((weight / weight.mean()).tolist(), abs=LOGPS)
    assert trainer.state.global_step == 3


def test_own_answers_go_with_validation_and_half_precision(command, unlabelled):
    more = ["--labels", "reference", "--class_names", *CLASSES, "--bf16", "true", "--eval_strategy", "steps"]
    trainer = aligned(command(*more, "--eval_steps", "3", data=unlabelled))
    (measured,) = [log for log in trainer.state.log_history if "eval_typographic_accuracy" in log]
    assert 0 <= measured["eval_typographic_accuracy"] <= 1
    assert len(trainer.train_dataset.preferences.task) == 10
    assert len(trainer.eval_dataset) == 2


def test_own_answers_need_class_names(command, unlabelled, capsys):
    assert main(["train", *command("--labels", "reference", data=unlabelled)]) == 2
    assert "--class_names" in capsys.readouterr().err


# ---- Validation rows ------------------------------------------------------------------------------------


def test_a_tenth_of_the_rows_is_kept_out_for_validation(command, labelled):
    trainer = aligned(command("--eval_strategy", "steps", "--eval_steps", "3"))
    kept, trained = (
        images(rows.dataset) for rows in (trainer.eval_dataset.preferences, trainer.train_dataset.preferences.task)
    )
    assert (len(kept), len(trained)) == (3, 21)
    assert kept.isdisjoint(trained)
    assert kept | trained == images(load_split(str(labelled), "train"))


def test_a_validation_split_leaves_all_rows_to_training(command, labelled):
    more = ["--eval_strategy", "steps", "--eval_steps", "3", "--dataset_validation_split", "validation"]
    trainer = aligned(command(*more))
    assert images(trainer.eval_dataset.preferences.dataset) == images(load_split(str(labelled), "validation"))
    assert len(trainer.train_dataset.preferences.task) == 24


def test_without_anything_to_validate_all_rows_train(command):
    trainer = aligned(command())
    assert len(trainer.train_dataset.preferences.task) == 24
    assert trainer.eval_dataset is None


# ---- A bound of clean cost ------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [[], ["--use_peft", "--lora_r", "4"]], ids=["full", "lora"])
def test_the_bound_saves_the_interpolation_that_was_printed(command, clip_folder, tmp_path, capsys, monkeypatch, lora):
    # On a model that knows nothing chance would choose; choose has tests of its own.
    monkeypatch.setattr(promise, "choose_alpha", lambda points, bound: Choice(points[3], bound))
    out = tmp_path / "out"
    more = ["--dataset_validation_split", "validation", "--learning_rate", "0.003", *lora]
    assert main(["train", *command(*more)]) == 0
    whole = interpolate(load_any(str(clip_folder)), load_any(str(out)), 1)
    assert (out / "adapter_config.json").exists() == bool(lora)

    capsys.readouterr()
    assert main(["train", *command(*more, "--max_clean_cost", "1.5", "--overwrite_output_dir")]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^alpha 0\.3: typographic accuracy .*\(bound 1\.5, 12 images\)", printed, re.MULTILINE)
    assert all(f"| {alpha} " in printed for alpha in ("0", "0.1", "0.9", "1"))
    assert ("adapters are merged" in printed) == bool(lora)

    # Plain, also where adapters lay in the folder before.
    assert not (out / "adapter_config.json").exists()
    card = (out / "README.md").read_text()
    assert "CLIPModel.from_pretrained" in card
    assert "PeftModel" not in card
    base = CLIPModel.from_pretrained(clip_folder)
    expected, before = interpolate(base, whole, 0.3).state_dict(), base.state_dict()
    saved = CLIPModel.from_pretrained(out).state_dict()
    assert any(not weight.equal(before[name]) for name, weight in saved.items())
    for name, weight in saved.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)


def test_what_is_reported_last_is_measured_on_what_is_saved(command, monkeypatch):
    points = []

    def half_way(found, bound):
        points.append(found[5])
        return Choice(found[5], bound)

    monkeypatch.setattr(promise, "choose_alpha", half_way)
    more = ["--eval_strategy", "steps", "--eval_steps", "3", "--learning_rate", "0.01", "--max_clean_cost", "1"]
    trainer = aligned(command(*more, "--dataset_validation_split", "validation"))
    logs = [log for log in trainer.state.log_history if "eval_clean_cost" in log]
    assert logs[-1]["eval_clean_cost"] == pytest.approx(points[0].costs["clean_cost"].estimate.value)
    assert logs[-1]["eval_typographic_accuracy"] == pytest.approx(points[0].typographic_accuracy.value)
    kl = [log["eval_kl"] for log in trainer.state.log_history if "eval_kl" in log]
    assert 0 < kl[-1] < kl[-2]


def test_a_bound_that_nothing_can_hold_is_refused_before_anything_is_loaded(command, capsys):
    assert main(["train", *command("--max_clean_cost", "-1")]) == 2
    assert "max_clean_cost" in capsys.readouterr().err


def test_too_few_rows_to_validate_on_are_refused(command, tmp_path, capsys):
    write_parquet(tmp_path / "few", train=9)
    assert main(["train", *command("--max_clean_cost", "1", data=tmp_path / "few")]) == 2
    assert "--dataset_validation_split" in capsys.readouterr().err


def test_a_single_row_to_validate_on_is_refused_before_training(command, tmp_path, capsys, monkeypatch):
    write_parquet(tmp_path / "few", train=10)
    monkeypatch.setattr(ContrastivePOTrainer, "train", lambda *args, **kwargs: pytest.fail("it trained"))
    assert main(["train", *command("--max_clean_cost", "1", data=tmp_path / "few")]) == 2
    assert "--dataset_validation_split" in capsys.readouterr().err


# ---- Averaged weights -----------------------------------------------------------------------------------


def test_the_moving_average_is_that_of_the_callback(command, tmp_path):
    for out, more in (("plain", []), ("out", ["--moving_average", "0.7"])):
        assert main(["train", *command("--learning_rate", "0.01", *more, out=out)]) == 0
    averaged, plain = weights(tmp_path / "out"), weights(tmp_path / "plain")
    assert any(not weight.equal(plain[name]) for name, weight in averaged.items())

    trainer = aligned_again(command("--learning_rate", "0.01", out="again"), BetaMovingAverageCallback(0.7))
    for name, weight in trainer.model.state_dict().items():
        torch.testing.assert_close(averaged[name], weight, rtol=0, atol=0)


def aligned_again(argv, callback):
    """The same training once more by the trainer itself, with a callback."""
    once = aligned(argv)
    preferences = once.train_dataset.preferences.task
    trainer = ContrastivePOTrainer(
        argv[argv.index("--model_name_or_path") + 1],
        args=once.args,
        train_dataset=preferences,
        candidate_texts=preferences.all_texts,
        callbacks=[callback],
    )
    trainer.train()
    return trainer


# ---- Early stopping -------------------------------------------------------------------------------------

EARLY = ["--eval_strategy", "epoch", "--save_strategy", "epoch", "--early_stopping_patience", "1"]


@pytest.fixture
def by_epochs(command):
    def flags(*more):
        found = command(*more)
        where = found.index("--max_steps")
        return [*found[:where], "--num_train_epochs", "6", *found[where + 2 :]]

    return flags


@pytest.mark.parametrize(("bound", "metric"), [([], "typographic_accuracy"), (["--max_clean_cost", "0"], "trade_off")])
def test_the_best_checkpoint_is_kept(by_epochs, tmp_path, monkeypatch, bound, metric):
    kept = []
    monkeypatch.setattr(train, "keep_bounds", lambda trainer, *args: kept.append(trainer))
    more = ["--dataset_validation_split", "validation", "--learning_rate", "0.003", "--save_total_limit", "9"]
    trainer = aligned(by_epochs(*EARLY, *more, *bound))
    assert kept == ([trainer] if bound else [])

    last = max((tmp_path / "out").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    state = json.loads((last / "trainer_state.json").read_text())
    found = {log["step"]: log[f"eval_{metric}"] for log in state["log_history"] if f"eval_{metric}" in log}
    best = max(found.values())
    step = next(step for step, value in found.items() if value == best)
    assert trainer.state.best_metric == pytest.approx(best)
    assert trainer.state.best_global_step == step
    # One evaluation in vain, and no more.
    steps = list(found)
    assert trainer.state.epoch == 6 or steps.index(step) == len(steps) - 2
    logs = [log[f"eval_{metric}"] for log in trainer.state.log_history if f"eval_{metric}" in log]
    assert logs[-1] == pytest.approx(best)  # what the card says is of what is kept
    checkpoint = weights(tmp_path / "out" / f"checkpoint-{step}")
    for name, weight in trainer.model.state_dict().items():
        assert weight.equal(checkpoint[name])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--early_stopping_patience", "1"], "--eval_strategy epoch --save_strategy epoch"),
        ([*EARLY, "--save_strategy", "steps"], "--eval_strategy epoch --save_strategy epoch"),
        (
            [*EARLY, "--eval_strategy", "steps", "--save_strategy", "steps", "--eval_steps", "2"],
            "--save_steps",
        ),
        ([*EARLY, "--moving_average", "0.7"], "not with both"),
        ([*EARLY, "--early_stopping_patience", "0"], "--early_stopping_patience"),
        (["--moving_average", "0"], "beta"),
    ],
)
def test_what_cannot_stop_early_is_refused_before_training(command, capsys, monkeypatch, more, said):
    monkeypatch.setattr(ContrastivePOTrainer, "train", lambda *args, **kwargs: pytest.fail("it trained"))
    assert main(["train", *command(*more)]) == 2
    assert said in capsys.readouterr().err


# ---- What is written ------------------------------------------------------------------------------------


def test_other_words_and_several_words_reach_training_and_validation(command):
    more = ["--attack_other_share", "0.5", "--attack_count", "1", "2", "--eval_strategy", "steps", "--eval_steps", "3"]
    trainer = aligned(command(*more))
    task = trainer.train_dataset.preferences.task
    for preferences in (task, trainer.eval_dataset.preferences):
        attack = preferences.attack
        assert (attack.other_share, tuple(attack.count)) == (0.5, (1, 2))
        assert set(attack.vocabulary) > {*CLASSES, *EVERYDAY_WORDS[:3]}
    rows = [task.row(index, 0) for index in range(21)]
    rejected = [text.removeprefix("a photo of a ") for row in rows for text in row["rejected"]]
    assert {len(row["rejected"]) for row in rows} == {1, 2}
    assert set(rejected) & set(CLASSES)
    assert set(rejected) & set(EVERYDAY_WORDS)
    assert list(trainer.candidates.texts) == task.all_texts


@pytest.mark.parametrize(
    ("more", "vocabulary", "share"),
    [
        ([], {*CLASSES, *EVERYDAY_WORDS}, 0.5),
        (["--attack_words", "everyday", "--attack_other_share", "0.9"], {*CLASSES, *EVERYDAY_WORDS}, 0.9),
        (["--attack_words", "classes"], {*CLASSES}, 0.0),
        (["--attack_words", "fog", "moon"], {"fog", "moon"}, 0.0),
        (["--loss_type", "sigmoid"], {*CLASSES}, 0.0),
        (["--preset", "dpo"], {*CLASSES}, 0.0),
    ],
)
def test_words_by_name(tmp_path, more, vocabulary, share):
    task_args, _, _ = parse(["--dataset_name", "d", "--output_dir", str(tmp_path), *more])
    attack = task_args._attack(CLASSES, ["pillow"])
    assert set(attack.vocabulary) == vocabulary
    assert attack.other_share == share


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ([], (["sft", "embedding_distillation"], [3.0, 40.0], "embedding", 40.0, 0.5)),
        (["--labels", "reference"], (["embedding_distillation"], [40.0], "embedding", 40.0, 0.5)),
        (["--reg_type", "kl_open"], (["sft", "embedding_distillation"], [3.0, 40.0], "kl_open", 1.0, 0.5)),
        (["--train_text_model", "true"], (["sft", "distillation"], None, "kl", 1.0, 0.0)),
        (
            ["--train_vision_model", "false", "--train_logit_scale", "true"],
            (["sft", "distillation"], None, "kl", 1.0, 0.0),
        ),
        (["--loss_type", "sigmoid"], (["sigmoid"], None, "kl", 1.0, 0.0)),
        (["--preset", "ipo"], (["ipo"], None, "kl", 0.01, 0.0)),
    ],
)
def test_the_method_follows_from_what_is_asked_for(tmp_path, more, expected):
    _, args, _ = parse(["--dataset_name", "d", "--output_dir", str(tmp_path), *more])
    assert (args.loss_type, args.loss_weights, args.reg_type, args.reg_weight, args.reg_share) == expected


def test_photographs_are_mixed_into_the_rows(command, unlabelled, capsys):
    trainer = aligned(command("--reg_dataset_name", str(unlabelled), "--reg_max_samples", "7"))
    assert len(trainer.reg_dataset) == 7
    assert len(trainer.train_dataset) == 48
    assert "Training on 24 images, and 24 crops and collages of 7 photographs without labels, in float32." in (
        capsys.readouterr().out
    )


def test_photographs_that_are_not_there_are_named_with_their_flags(command, capsys):
    assert main(["train", *command("--reg_dataset_name", "no/such-photographs")]) == 2
    said = capsys.readouterr().err
    assert "--reg_dataset_name" in said
    assert "--reg_dataset_split" in said


def test_words_of_the_users_own(command):
    trainer = aligned(command("--attack_other_words", "moon", "sugar", "--attack_other_share", "1"))
    written = {word for index in range(24) for word in trainer.train_dataset.preferences.task.attack.written(index)}
    assert written == {"moon", "sugar"}


# ---- Classes as words ------------------------------------------------------------------------------------


@pytest.fixture
def wordnet(tmp_path):
    """A folder of images whose classes are WordNet ids, with a file that renames two of them, and others."""
    for row in range(12):
        file = tmp_path / "photos" / "train" / ("n02099601", "n01443537", "polar_bear")[row % 3] / f"{row}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(row).save(file)
    (tmp_path / "names.yaml").write_text("n02099601: golden retriever\nn01443537: goldfish\nn00000001: other\n")
    return tmp_path


def test_a_file_renames_the_classes_of_folders(command, wordnet):
    trainer = aligned(command("--class_name_map", str(wordnet / "names.yaml"), data=wordnet / "photos"))
    assert trainer.train_dataset.preferences.task.class_names == ["goldfish", "golden retriever", "polar bear"]


def test_a_table_of_paths_and_words_trains(command, wordnet):
    files = [str(path.relative_to(wordnet)) for path in sorted(wordnet.rglob("*.png"))]
    lines = [f"{file},{'sea_lion' if 'n02' in file else 'cat'}" for file in files]
    (wordnet / "rows.csv").write_text("\n".join(["file_name,label", *lines]))
    trainer = aligned(command("--save_strategy", "no", data=wordnet / "rows.csv"))
    assert trainer.train_dataset.preferences.task.class_names == ["cat", "sea lion"]


# ---- What trains ----------------------------------------------------------------------------------------


def test_the_text_tower_or_the_last_layers_train_from_the_command_line(command):
    trainer = aligned(command("--no_train_vision_model", "--train_text_model", "--trainable_layers", "1"))
    found = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[0] for name in found} == {"text_model", "text_projection"}
    assert not [name for name in found if "layers.0" in name]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ([], {("vision", "0"), ("vision", "1")}),
        (["--trainable_layers", "1"], {("vision", "1")}),
        (["--train_vision_model", "false", "--train_text_model"], {("text", "0"), ("text", "1")}),
        (["--train_text_model", "--trainable_layers", "1"], {("vision", "1"), ("text", "1")}),
    ],
)
def test_adapters_are_by_default_where_training_is(command, more, expected):
    trainer = aligned(command("--use_peft", "--lora_r", "2", *more, steps=1))
    names = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert {re.search(r"(\w+)_model\.encoder\.layers\.(\d)", name).groups() for name in names} == expected


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--early_stopping_patience", "1"], "--eval_strategy epoch --save_strategy epoch"),
        (["--moving_average", "0"], "beta"),
        (["--attack_places", "moon"], "moon"),
        (["--attack_size", "2", "3"], "size"),
        (["--attack_rotation", "10", "-10"], "rotation"),
        (["--attack_count", "0", "0"], "count"),
        (["--attack_sticker", "2"], "sticker"),
        (["--attack_words", "dog"], "two different words"),
        (["--attack_fonts", "nowhere.ttf"], "nowhere.ttf"),
        (["--prompt_template", "a photo"], "{}"),
    ],
)
def test_what_the_command_line_tells_is_said_before_anything_is_loaded(command, capsys, monkeypatch, more, said):
    monkeypatch.setattr("clip_po.cli.arguments.load_split", lambda *_, **__: pytest.fail("it loaded data"))
    monkeypatch.setattr(train_model, "load_model", lambda *_, **__: pytest.fail("it loaded a model"))
    assert main(["train", *command(*more)]) == 2
    assert said in capsys.readouterr().err


# ---- Nothing changed ------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [[], ["--use_peft", "--lora_r", "4"]], ids=["full", "lora"])
def test_a_bound_that_ends_at_the_base_aligns_nothing(command, clip_folder, tmp_path, capsys, monkeypatch, lora):
    monkeypatch.setattr(promise, "choose_alpha", lambda points, bound: Choice(points[0], bound))
    more = ["--dataset_validation_split", "validation", "--learning_rate", "0.003", "--max_clean_cost", "0.5", *lora]
    assert main(["train", *command(*more)]) == UNCHANGED
    printed = capsys.readouterr()
    assert "nothing was changed" in printed.err
    assert "Aligned" not in printed.out
    base, saved = CLIPModel.from_pretrained(clip_folder).state_dict(), weights(tmp_path / "out")
    assert all(weight.equal(base[name]) for name, weight in saved.items())


def test_a_training_that_changes_no_weight_is_not_called_aligned(command, capsys):
    assert main(["train", *command("--learning_rate", "0")]) == UNCHANGED
    printed = capsys.readouterr()
    assert "nothing was changed" in printed.err
    assert "Aligned" not in printed.out


def test_what_the_promise_takes_is_said_before_training(command, capsys, monkeypatch):
    monkeypatch.setattr(ContrastivePOTrainer, "train", lambda *args, **kwargs: pytest.fail("it trained"))
    with pytest.raises(pytest.fail.Exception):
        main(["train", *command("--dataset_validation_split", "validation", "--max_clean_cost", "0.5")])
    assert "takes at least 598 validation images" in capsys.readouterr().out


def test_a_dtype_of_16_bits_is_converted_to_be_trained(command):
    trainer = aligned(command("--dtype", "float16", steps=1))
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


def test_every_loss_is_taken_with_its_settings_and_mixed_with_others(tmp_path):
    flags = ["--dataset_name", "d", "--output_dir", str(tmp_path), "--loss_type", *LOSSES]
    settings = {"label_smoothing": 0.01, "discopop_tau": 0.1, "simpo_gamma": 1.0, "undesirable_weight": 0.5}
    weights = [str(number) for number in range(1, len(LOSSES) + 1)]
    more = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    _, args, _ = parse([*flags, "--loss_weights", *weights, *more])
    assert (args.loss_type, args.weights) == (list(LOSSES), [float(weight) for weight in weights])
    assert {name: getattr(args.loss_settings, name) for name in settings} == settings


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--loss_type", "exo_pair"], "infinite with label_smoothing=0"),
        (["--loss_type", "sft", "--simpo_gamma", "1"], "simpo_gamma=1.0 has no effect"),
        (["--loss_type", "sigmoid", "--f_divergence_type", "kl"], "f_divergence_type must be one of"),
        (
            ["--loss_type", "sigmoid", "apo_zero", "--f_divergence_type", "forward_kl"],
            r"\['apo_zero'\] do not read it",
        ),
        (["--loss_type", "sft", "--f_divergence_type", "forward_kl"], "f_divergence_type='forward_kl' has no effect"),
        (["--loss_type", "sigmoid", "--f_alpha_divergence_coef", "2"], "f_alpha_divergence_coef=2.0 has no effect"),
        (["--loss_type", "discopop", "--discopop_tau", "0"], r"discopop_tau must lie in \(0, 1\]"),
    ],
)
def test_settings_that_do_not_fit_a_loss_are_refused(more, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        parse(["--dataset_name", "d", "--output_dir", str(tmp_path), *more])
