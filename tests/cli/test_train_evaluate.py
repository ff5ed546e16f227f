"""clip-po train and clip-po evaluate, end to end on small files of every kind."""

import json
import operator
import shutil

import datasets
import pytest
import torch
import yaml
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from samples import CLASSES, make_labelled, picture, write_parquet
from torch.nn import functional as F
from transformers import CLIPModel, CLIPProcessor, PreTrainedModel

from clip_po.cli import train
from clip_po.cli.arguments import Task
from clip_po.cli.evaluate_common import default_folder
from clip_po.cli.main import main
from clip_po.data.loading import load_split

METRICS = {
    "clean_accuracy",
    "typographic_accuracy",
    "occluded_accuracy",
    "fooled",
    "reading_effect",
    "recovery",
    "clean_cost",
}
QUICK = ["--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", "--per_device_train_batch_size", "4"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    datasets.DatasetDict({"train": make_labelled(16), "test": make_labelled(12)}).save_to_disk(folder)
    return folder


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    return write_parquet(tmp_path_factory.mktemp("parquet"), train=16, test=12)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for split, rows in (("train", 16), ("test", 12)):
        for row in range(rows):
            file = folder / split / CLASSES[row % 4] / f"{row}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture(row).save(file)
    return folder


@pytest.mark.parametrize("kind", ["saved", "parquet", "images"])
def test_data_sets_load_from_folders_of_every_kind(kind, request):
    folder = str(request.getfixturevalue(kind))
    rows = load_split(folder, "test")
    assert len(rows) == 12
    assert sorted(rows.features["label"].names) == sorted(CLASSES)
    with pytest.raises(ValueError, match="'validation'"):
        load_split(folder, "validation")


def evaluation_of(checkpoint):
    (report,) = checkpoint.glob("evaluation/*/*/report.json")
    return report.parent


def test_train_then_evaluate(clip_folder, parquet, tmp_path, capsys):
    out = tmp_path / "out"
    data = ["--dataset_name", str(parquet)]
    settings = ["--prompt_template", "an image of a {}", "--eval_strategy", "epoch", "--max_steps", "4", *QUICK]
    status = main(["train", "--model_name_or_path", str(clip_folder), *data, "--output_dir", str(out), *settings])
    assert status == 0
    assert Task.load(out) == Task(CLASSES, "an image of a {}")
    CLIPModel.from_pretrained(out)
    CLIPProcessor.from_pretrained(out)
    assert "arxiv.org/abs/2411.08923" in (out / "README.md").read_text()

    capsys.readouterr()
    status = main(["evaluate", "--model_name_or_path", str(out), "--base_model_name_or_path", str(clip_folder), *data])
    assert status == 0
    printed = capsys.readouterr().out
    assert "reading effect" in printed
    folder = evaluation_of(out)
    report = json.loads((folder / "report.json").read_text())
    assert report["schema_version"] == 1
    assert report["settings"]["prompt_template"] == "an image of a {}"
    assert set(report["models"]["aligned"]) >= METRICS
    assert METRICS - {"recovery", "clean_cost"} <= set(report["models"]["base"])
    for estimate in report["models"]["aligned"].values():
        assert set(estimate) == {"value", "low", "high"}
    assert (folder / "before_after.png").stat().st_size > 1000
    # The numbers of the report can be computed again from the answers.
    answers = Dataset.from_parquet(str(folder / "answers.parquet"))
    assert len(answers) == 12
    classes = Dataset.from_csv(str(folder / "classes.csv"))
    assert set(classes["label"]) == set(CLASSES)
    assert sum(classes["items"]) == 12
    for model, metrics in report["models"].items():
        for variant in ("clean", "typographic", "occluded"):
            said, truth = answers[f"{model}/{variant}"], answers["label"]
            accuracy = sum(map(operator.eq, said, truth)) / 12
            assert accuracy == pytest.approx(metrics[f"{variant}_accuracy"]["value"])
            by_class = zip(classes[f"{model}/{variant}"], classes["items"], strict=True)
            assert accuracy == pytest.approx(sum(share * items for share, items in by_class) / 12)
        fooled = sum(map(operator.eq, answers[f"{model}/typographic"], answers["word"])) / 12
        assert fooled == pytest.approx(metrics["fooled"]["value"])


def test_adapters_train_are_saved_and_evaluated(clip_folder, saved, tmp_path):
    out = tmp_path / "out"
    lora = ["--use_peft", "--lora_r", "2", "--max_steps", "3"]
    data = ["--dataset_name", str(saved)]
    where = ["--model_name_or_path", str(clip_folder), "--output_dir", str(out)]
    assert main(["train", *where, *data, *lora, *QUICK]) == 0
    names = load_file(out / "adapter_model.safetensors").keys()
    assert names
    assert all("vision_model" in name for name in names)
    merged = PeftModel.from_pretrained(CLIPModel.from_pretrained(clip_folder), out).merge_and_unload()
    assert isinstance(merged, PreTrainedModel)
    assert main(["evaluate", "--model_name_or_path", str(out), *data, "--output_dir", str(tmp_path / "report")]) == 0
    assert (tmp_path / "report" / "report.json").is_file()


def test_a_run_can_be_resumed(clip_folder, images, tmp_path):
    out = tmp_path / "out"
    command = [
        "train",
        "--model_name_or_path",
        str(clip_folder),
        "--dataset_name",
        str(images),
        "--output_dir",
        str(out),
    ]
    settings = [*QUICK, "--num_train_epochs", "2", "--save_strategy", "epoch", "--save_total_limit", "2"]
    assert main([*command, *settings]) == 0
    whole = load_file(out / "model.safetensors")
    first = min(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert main([*command, *settings, "--resume_from_checkpoint", str(first)]) == 0
    again = load_file(out / "model.safetensors")
    assert all(value.equal(again[name]) for name, value in whole.items())


def test_flags_win_over_yaml_over_preset_over_defaults(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"dataset_name": "d", "preset": "ipo", "learning_rate": 3e-5, "seed": 7}))
    _, args, _ = train.parse(["--config", str(file), "--seed", "9", "--output_dir", str(tmp_path)])
    assert args.loss_type == ["ipo"]
    assert (args.beta, args.reg_weight, args.optim) == (0.01, 0.01, "adamax")
    assert (args.learning_rate, args.seed, args.num_train_epochs) == (3e-5, 9, 3)
    assert args.per_device_train_batch_size == 512
    _, plain, _ = train.parse(["--dataset_name", "d", "--output_dir", str(tmp_path)])
    assert plain.loss_type == ["sft", "embedding_distillation"]
    assert (plain.reg_type, plain.reg_weight, plain.reg_share) == ("embedding", 40, 0.5)
    assert plain.learning_rate is None


def test_rates_and_epochs_fit_model_and_data():
    small, large = train.fit_to_size(128, 4000, adapters=False), train.fit_to_size(768, 1_000_000, adapters=False)
    assert small["learning_rate"] > 10 * large["learning_rate"]
    assert small["num_train_epochs"] >= large["num_train_epochs"] >= 1
    assert train.fit_to_size(128, 4000, adapters=True)["learning_rate"] > small["learning_rate"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--label_column", "class"], "class"),
        (["--image_column", "photo"], "photo"),
        (["--dataset_train_split", "valid"], "valid"),
        (["--class_names", "a", "b"], "4 classes"),
        (["--prompt_template", "a photo"], "{}"),
        (["--attack_places", "moon"], "moon"),
        (["--beta", "0"], "beta"),
        (["--loss_type", "dpo"], "sigmoid"),
        (["--dataset_streaming"], "streaming"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(clip_folder, parquet, tmp_path, capsys, arguments, said):
    command = ["train", "--model_name_or_path", str(clip_folder), "--dataset_name", str(parquet)]
    assert main([*command, "--output_dir", str(tmp_path), *QUICK, *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_single_saved_data_set_is_its_train_split_and_no_test_split(tmp_path):
    make_labelled(8).save_to_disk(tmp_path)
    assert len(load_split(str(tmp_path), "train")) == 8
    with pytest.raises(ValueError, match=r"no split 'test'; it has \['train'\], and no slices"):
        load_split(str(tmp_path), "test")


def test_the_checkpoints_own_names_and_template_win_also_in_a_checkpoint_folder(tmp_path):
    task = Task(["a", "b", "c", "d"], "an image of a {}", CLASSES)
    (tmp_path / "checkpoint-3").mkdir()
    task.save(tmp_path)
    assert Task.load(tmp_path / "checkpoint-3") == task
    arguments = train.TrainArguments(dataset_name="d")
    assert arguments.names(make_labelled(4), task) == ["a", "b", "c", "d"]
    assert arguments.names(make_labelled(4), Task(["a", "b"], "{}")) == CLASSES
    assert train.TrainArguments(dataset_name="d", class_names=["x"]).names(make_labelled(4), task) == ["x"]


def test_attack_words_need_not_be_classes_and_the_card_says_what_was_measured(clip_folder, parquet, tmp_path):
    out = tmp_path / "out"
    data = ["--dataset_name", str(parquet)]
    where = ["--model_name_or_path", str(clip_folder), "--output_dir", str(out)]
    words = ["--attack_words", "hello", "world", "dog"]
    assert main(["train", *where, *data, *words, "--max_steps", "2", *QUICK]) == 0
    assert "Nothing was measured yet." in (out / "README.md").read_text()
    assert main(["evaluate", "--model_name_or_path", str(out), *data, *words]) == 0
    card = (out / "README.md").read_text()
    assert "Nothing was measured yet." not in card
    assert "| aligned" in card
    assert "## Settings" in card


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--max_samples", "0"], "--max_samples"),
        (["--attack_size", "0.3"], "two numbers"),
        (["--loss_type", "ipo", "--rejected", "others"], "S-DPO"),
        (["--load_in_4bit", "true"], "load_in_4bit"),
    ],
)
def test_numbers_that_cannot_work_are_refused_at_the_start(clip_folder, parquet, tmp_path, capsys, arguments, said):
    command = ["train", "--model_name_or_path", str(clip_folder), "--dataset_name", str(parquet)]
    assert main([*command, "--output_dir", str(tmp_path), *QUICK, *arguments]) == 2
    assert said in capsys.readouterr().err


def test_an_untouched_model_is_not_listed_as_aligned(clip_folder, parquet, tmp_path, capsys):
    data = ["evaluate", "--model_name_or_path", str(clip_folder), "--dataset_name", str(parquet)]
    assert main([*data, "--output_dir", str(tmp_path)]) == 0
    assert "aligned" not in capsys.readouterr().out
    assert list(json.loads((tmp_path / "report.json").read_text())["models"]) == ["model"]


def test_a_model_that_equals_its_base_is_said(clip_folder, parquet, tmp_path, caplog):
    data = ["evaluate", "--model_name_or_path", str(clip_folder), "--dataset_name", str(parquet)]
    assert main([*data, "--base_model_name_or_path", str(clip_folder), "--output_dir", str(tmp_path)]) == 0
    assert "has the weights of the base" in caplog.text


def test_a_second_evaluation_replaces_no_report_and_nothing_of_the_checkpoint(clip_folder, parquet, tmp_path):
    model = shutil.copytree(clip_folder, tmp_path / "model")
    for name in ("report.json", "report.html"):  # of the model's own
        (model / name).write_text("mine")
    before = {path: path.read_bytes() for path in model.rglob("*") if path.is_file()}
    command = ["evaluate", "--model_name_or_path", str(model), "--dataset_name", str(parquet)]
    for _ in range(3):  # within a second or two
        assert main(command) == 0
    assert len(list(model.glob("evaluation/*-test/*/report.json"))) == 3
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize("name", ["../../x", "cifar/100", "a b:c", "..", "d[:10%]"])
def test_a_report_goes_below_the_checkpoint_whatever_the_data_are_called(name, tmp_path):
    folder = default_folder(tmp_path, name, "2026-01-01_00-00-00")
    assert folder.resolve().is_relative_to(tmp_path / "evaluation")
    folder.mkdir(parents=True)
    assert default_folder(tmp_path, name, "2026-01-01_00-00-00").name == "2026-01-01_00-00-00-2"


# ---- Several prompts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("repeated", [False, True])
def test_several_prompts_are_an_ensemble(clip_folder, parquet, tmp_path, repeated):
    prompts = ["a photo of a {}", "a drawing of the {}", "{}"]
    flags = [word for prompt in prompts for word in ("--prompt_template", prompt)]
    command = ["evaluate", "--model_name_or_path", str(clip_folder), "--dataset_name", str(parquet)]
    command += flags if repeated else ["--prompt_template", *prompts]
    assert main([*command, "--output_dir", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "report.json").read_text())["settings"]["prompt_template"] == prompts
    # As CLIP's notebooks: embeddings of unit norm are averaged, and the average is normalized.
    model, processor = CLIPModel.from_pretrained(clip_folder).eval(), CLIPProcessor.from_pretrained(clip_folder)
    answers = Dataset.from_parquet(str(tmp_path / "answers.parquet"))
    rows = load_split(str(parquet), "test")
    with torch.no_grad():
        texts = [[prompt.format(name) for prompt in prompts] for name in CLASSES]
        each = [model.get_text_features(**processor(text=t, return_tensors="pt", padding=True)) for t in texts]
        mean = F.normalize(torch.stack([F.normalize(e.pooler_output, dim=-1).mean(0) for e in each]), dim=-1)
        pixels = processor(images=[image.convert("RGB") for image in rows["image"]], return_tensors="pt")
        images = F.normalize(model.get_image_features(**pixels).pooler_output, dim=-1)
    expected = [CLASSES[number] for number in (images @ mean.T).argmax(dim=1)]
    (said,) = [name for name in answers.column_names if name.endswith("/clean")]
    agree = sum(map(operator.eq, answers[said], expected))
    assert agree >= 11  # of 12: the command enlarges images before the processor sees them


@pytest.mark.parametrize("command", ["train", "steer"])
def test_training_takes_one_prompt(command, clip_folder, parquet, tmp_path, capsys):
    data = ["--model_name_or_path", str(clip_folder), "--dataset_name", str(parquet), "--output_dir", str(tmp_path)]
    assert main([command, *data, "--prompt_template", "a {}", "--prompt_template", "the {}"]) == 2
    assert "--prompt_template has 2 prompts, but training uses one" in capsys.readouterr().err
