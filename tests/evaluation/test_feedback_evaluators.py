"""Agreement with preferences and labels of right and wrong, against transformers, scikit-learn and plain loops."""

import json

import datasets
import numpy as np
import pytest
import torch
from dual_encoders import POSITIONS, SUPPORTED, tiny_dual_encoder
from PIL import Image
from samples import logged, make_preferences, make_trainer
from sklearn.metrics import roc_auc_score
from transformers import CLIPModel, CLIPProcessor

from clip_po.dual_encoder import as_dual_encoder
from clip_po.evaluation import PreferenceEvaluator, UnpairedEvaluator
from clip_po.evaluation.calibration import bins_of, reliability
from clip_po.evaluation.preferences import PreferenceMargins, preference_report
from clip_po.evaluation.unpaired import UnpairedScores, unpaired_report
from clip_po.training.callbacks import EvaluatorCallback
from clip_po.validation import UnreadableImage

TEXTS = [f"a {name}" for name in ("cat", "dog", "car", "tree", "house", "bird")]
BROKEN = {"bytes": b"no image", "path": None}


def image(number):
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (20, 28, 3), dtype=np.uint8))


def stored(number):
    return datasets.Image().encode_example(image(number))


def logits_of(model, processor, images, texts, padding=True):
    """Logits Tensor[I, T] by transformers' own forward pass."""
    length = {"max_length": POSITIONS, "truncation": True} if padding == "max_length" else {}
    tokens = processor.tokenizer(texts, return_tensors="pt", padding=padding, **length)
    with torch.no_grad():
        return model.eval()(
            **tokens, **processor.image_processor(images, return_tensors="pt")
        ).logits_per_image.double()


def text_preferences(rows=9):
    """Every third row has two rejected texts."""
    columns = {
        "image": [image(row) for row in range(rows)],
        "chosen": [TEXTS[row % 6] for row in range(rows)],
        "rejected": [[TEXTS[(row + step) % 6] for step in range(1, 3 if row % 3 == 0 else 2)] for row in range(rows)],
    }
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def image_preferences(rows=8, several=True):
    rejected = [[stored(100 + row), stored(200 + row)] if row % 2 else [stored(100 + row)] for row in range(rows)]
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "chosen_image": datasets.Image(),
            "rejected_image": datasets.List(datasets.Image()) if several else datasets.Image(),
        }
    )
    columns = {
        "text": [TEXTS[row % 6] for row in range(rows)],
        "chosen_image": [stored(row) for row in range(rows)],
        "rejected_image": rejected if several else [images[0] for images in rejected],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def margins_of_texts(model, processor, dataset, padding=True):
    found = []
    for row in dataset:
        logits = logits_of(model, processor, [row["image"]], [row["chosen"], *row["rejected"]], padding)[0]
        found += (logits[0] - logits[1:]).tolist()
    return np.array(found)


def margins_of_images(model, processor, dataset):
    found = []
    for row in dataset:
        rejected = row["rejected_image"] if isinstance(row["rejected_image"], list) else [row["rejected_image"]]
        logits = logits_of(model, processor, [row["chosen_image"], *rejected], [row["text"]])[:, 0]
        found += (logits[0] - logits[1:]).tolist()
    return np.array(found)


def plain_calibration(probability, outcome, bins=20):
    """Expected calibration error by a loop over bins."""
    total = 0.0
    for number in range(bins):
        low, high = number / bins, (number + 1) / bins
        own = [i for i, p in enumerate(probability) if low <= p < high or (number == bins - 1 and p == 1)]
        if own:
            total += abs(np.mean([outcome[i] for i in own]) - np.mean([probability[i] for i in own])) * len(own)
    return total / len(probability)


def check(metrics, margins):
    assert metrics["pairwise_accuracy"].value == pytest.approx(np.mean(margins > 0))
    assert metrics["margin"].value == pytest.approx(np.mean(margins), abs=1e-4)
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    assert metrics["calibration_error"].value == pytest.approx(plain_calibration(confidence, margins > 0), abs=1e-4)


@pytest.mark.parametrize("batch_size", [3, 64])
def test_preferences_between_texts(model, other_model, processor, batch_size):
    rows = text_preferences()
    evaluator = PreferenceEvaluator(rows, processor, batch_size=batch_size, resamples=50)
    models = {"base": other_model, "aligned": model}
    found = evaluator(models, "base", disable_tqdm=True)
    margins = {name: margins_of_texts(m, processor, rows) for name, m in models.items()}
    assert len(margins["base"]) == 12
    for name in models:
        check(found[name], margins[name])
    now, before = found["aligned"], found["base"]
    assert "margin_difference" not in before
    for metric, scale in (("pairwise_accuracy", 100), ("margin", 1), ("calibration_error", 100)):
        difference = now[f"{metric}_difference"]
        assert difference.value == pytest.approx(scale * (now[metric].value - before[metric].value))
        assert difference.low <= difference.value <= difference.high or metric == "calibration_error"
    assert (evaluator.primary_metric, evaluator.greater_is_better) == ("pairwise_accuracy", True)


@pytest.mark.parametrize("several", [True, False])
def test_preferences_between_images(model, processor, several):
    rows = image_preferences(several=several)
    found = PreferenceEvaluator(rows, processor, batch_size=5, resamples=2)({"m": model}, disable_tqdm=True)["m"]
    margins = margins_of_images(model, processor, rows)
    assert len(margins) == (12 if several else 8)
    check(found, margins)
    assert not any("image_to_text" in name for name in found)


def test_both_directions_in_one_dataset_are_reported_apart_too(model, processor):
    texts, images = text_preferences(), image_preferences()
    missing = {name: [None] * len(images) for name in ("image", "chosen", "rejected")}
    mixed = {name: [*texts.cast_column("image", datasets.Image(decode=False))[name]] for name in texts.column_names}
    plain = images.cast_column("chosen_image", datasets.Image(decode=False)).cast_column(
        "rejected_image", datasets.List(datasets.Image(decode=False))
    )
    columns = {
        **{name: [*mixed[name], *missing[name]] for name in missing},
        **{name: [*[None] * len(texts), *plain[name]] for name in plain.column_names},
    }
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features({**texts.features, **images.features}))
    found = PreferenceEvaluator(rows, processor, resamples=20)({"m": model}, disable_tqdm=True)["m"]
    of_texts, of_images = margins_of_texts(model, processor, texts), margins_of_images(model, processor, images)
    check(found, np.concatenate([of_texts, of_images]))
    for prefix, margins in (("image_to_text_", of_texts), ("text_to_image_", of_images)):
        check({name.removeprefix(prefix): e for name, e in found.items() if name.startswith(prefix)}, margins)


def test_pick_a_pic_is_read_as_it_is_with_ties(model, processor):
    shares = [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.0, 1.0)]
    columns = {
        "caption": TEXTS[:4],
        "jpg_0": [stored(number) for number in range(4)],
        "jpg_1": [stored(100 + number) for number in range(4)],
        "label_0": [first for first, _ in shares],
        "label_1": [second for _, second in shares],
    }
    rows = datasets.Dataset.from_dict(columns)
    rows = rows.cast_column("jpg_0", datasets.Image()).cast_column("jpg_1", datasets.Image())
    found = PreferenceEvaluator(rows, processor, resamples=2)({"m": model}, disable_tqdm=True)["m"]
    margins = []
    for row in rows:
        logits = logits_of(model, processor, [row["jpg_0"], row["jpg_1"]], [row["caption"]])[:, 0]
        margins.append((logits[0] - logits[1]).item() * (1 if row["label_0"] >= row["label_1"] else -1))
    agreement = [0.5 if number == 2 else float(margin > 0) for number, margin in enumerate(margins)]
    assert found["margin"].value == pytest.approx(np.mean(margins), abs=1e-4)
    assert found["pairwise_accuracy"].value == pytest.approx(np.mean(agreement))


def margins_by_hand(margin, doubt=None, weight=None, row=None):
    size = len(margin)
    row = np.arange(size) if row is None else np.array(row)
    return PreferenceMargins(
        margin=np.array(margin, float),
        row=row,
        direction=np.array(["image_to_text"] * size),
        doubt=np.zeros(size) if doubt is None else np.array(doubt),
        weight=np.ones(size) if weight is None else np.array(weight, float),
        cluster=row,
    )


def test_disagreement_ties_and_weights_count_as_they_say():
    found = preference_report(margins_by_hand([2, -1, 0, -3], [0.25, 0.25, 0.0, 0.5], [1, 2, 1, 0]), resamples=2)
    assert found["pairwise_accuracy"].value == pytest.approx((0.75 + 2 * 0.25 + 0.5) / 4)
    assert found["margin"].value == pytest.approx((2 - 2 * 1 + 0) / 4)


def test_pairs_of_one_row_are_resampled_together():
    margin = np.sign(np.random.default_rng(0).normal(size=40))
    repeated = preference_report(margins_by_hand(np.repeat(margin, 5), row=np.repeat(np.arange(40), 5)))
    once, alone = preference_report(margins_by_hand(margin)), preference_report(margins_by_hand(np.repeat(margin, 5)))
    assert repeated["pairwise_accuracy"] == once["pairwise_accuracy"]
    width = {name: e["margin"].high - e["margin"].low for name, e in (("rows", repeated), ("pairs", alone))}
    assert width["pairs"] < 0.7 * width["rows"]


def test_related_rows_are_resampled_together(model, processor):
    rows = text_preferences().add_column("photo", [f"photo {row // 3}" for row in range(9)])
    evaluator = PreferenceEvaluator(rows, processor, "photo")
    measured = evaluator.measure({"m": model}, disable_tqdm=True)["m"]
    assert sorted(set(measured.cluster)) == ["photo 0", "photo 1", "photo 2"]
    with pytest.raises(ValueError, match="cluster_column='foto' is not a column"):
        PreferenceEvaluator(rows, processor, "foto")({"m": model}, disable_tqdm=True)


# ---- Right and wrong texts


def unpaired(rows=14):
    columns = {
        "image": [image(row) for row in range(rows)],
        "text": [TEXTS[row % 4] for row in range(rows)],
        "label": [row % 3 != 0 for row in range(rows)],
    }
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def test_right_and_wrong_texts(model, other_model, processor):
    rows, models = unpaired(), {"base": other_model, "aligned": model}
    found = UnpairedEvaluator(rows, processor, batch_size=4, resamples=50)(models, "base", disable_tqdm=True)
    label = np.array(rows["label"])
    for name, one in models.items():
        logits = logits_of(one, processor, rows["image"][:], TEXTS[:4])
        own = torch.arange(14)[:, None] % 4
        logit = logits.gather(1, own)[:, 0].numpy()
        probability = logits.softmax(1).gather(1, own)[:, 0].numpy()
        assert found[name]["pairwise_accuracy"].value == pytest.approx(roc_auc_score(label, logit))
        assert found[name]["margin"].value == pytest.approx(logit[label].mean() - logit[~label].mean(), abs=1e-4)
        assert found[name]["calibration_error"].value == pytest.approx(plain_calibration(probability, label), abs=1e-4)
    difference = 100 * (found["aligned"]["pairwise_accuracy"].value - found["base"]["pairwise_accuracy"].value)
    assert found["aligned"]["pairwise_accuracy_difference"].value == pytest.approx(difference)


def scores_by_hand(logit, label, weight=None):
    size = len(logit)
    return UnpairedScores(
        logit=np.array(logit, float),
        probability=np.linspace(0, 1, size),
        label=np.array(label, bool),
        weight=np.ones(size) if weight is None else np.array(weight, float),
        row=np.arange(size),
        cluster=np.arange(size),
        texts=2,
    )


def test_the_area_is_that_of_scikit_learn_with_ties_and_weights():
    rng = np.random.default_rng(0)
    logit, label, weight = rng.integers(0, 6, 200), rng.random(200) < 0.4, rng.random(200)
    found = unpaired_report(scores_by_hand(logit, label, weight), resamples=2)["pairwise_accuracy"]
    assert found.value == pytest.approx(roc_auc_score(label, logit, sample_weight=weight))


def test_the_interval_of_the_area_is_that_of_resampling_rows():
    rng = np.random.default_rng(1)
    label = rng.random(300) < 0.5
    logit = rng.normal(size=300) + label
    found = unpaired_report(scores_by_hand(logit, label))["pairwise_accuracy"]
    areas = []
    for _ in range(1000):
        drawn = rng.integers(0, 300, 300)
        areas.append(roc_auc_score(label[drawn], logit[drawn]))
    low, high = np.quantile(areas, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.01)


def test_a_dataset_of_one_kind_has_no_accuracy_and_a_single_text_no_calibration(model, processor):
    rows = unpaired().map(lambda row: {"text": "a cat", "label": True})
    found = UnpairedEvaluator(rows, processor, resamples=2)({"m": model}, disable_tqdm=True)["m"]
    assert np.isnan(found["pairwise_accuracy"].value)
    assert "calibration_error" not in found


@pytest.mark.parametrize("kind", SUPPORTED)
def test_every_architecture_agrees_as_its_logits_in_transformers(kind):
    model, processor = tiny_dual_encoder(kind)
    rows = unpaired()
    logits = logits_of(model, processor, rows["image"][:], TEXTS[:4], "max_length")
    own = torch.arange(14)[:, None] % 4
    logit = logits.gather(1, own)[:, 0].numpy()
    pairwise = as_dual_encoder(model).pairwise
    probability = (logits.sigmoid() if pairwise else logits.softmax(1)).gather(1, own)[:, 0].numpy()
    label = np.array(rows["label"])
    found = UnpairedEvaluator(rows, processor, resamples=2)({"m": model}, disable_tqdm=True)["m"]
    assert found["pairwise_accuracy"].value == pytest.approx(roc_auc_score(label, logit))
    assert found["calibration_error"].value == pytest.approx(plain_calibration(probability, label), abs=1e-4)
    pairs = PreferenceEvaluator(make_preferences(8), processor, resamples=2)({"m": model}, disable_tqdm=True)["m"]
    margins = margins_of_texts(
        model, processor, [{**row, "rejected": [row["rejected"]]} for row in make_preferences(8)], "max_length"
    )
    check(pairs, margins)


# ---- Calibration


def test_reliability_is_the_mean_of_each_bin():
    probability, outcome = np.array([0.51, 0.54, 0.97, 1.0]), np.array([1.0, 0.0, 1.0, 1.0])
    assert bins_of(probability).tolist() == [10, 10, 19, 19]
    low, high = reliability(probability, outcome, np.array([1.0, 3.0, 1.0, 0.0]))
    assert (low.low, low.high, low.rows) == (0.5, 0.55, 2)
    assert (low.probability, low.frequency) == pytest.approx((0.5325, 0.25))
    assert (high.probability, high.frequency, high.rows) == pytest.approx((0.97, 1, 1))


def test_a_calibrated_model_has_no_error_and_an_overconfident_one_has_its_excess():
    rng = np.random.default_rng(0)
    margin = rng.normal(size=20_000)
    right = rng.random(20_000) < 1 / (1 + np.exp(-margin))
    margin = np.where(right, margin, -margin)
    calibrated = preference_report(margins_by_hand(margin), resamples=2)["calibration_error"].value
    confident = preference_report(margins_by_hand(10 * margin), resamples=2)
    assert calibrated < 0.01
    excess = np.mean(1 / (1 + np.exp(-10 * np.abs(margin)))) - confident["pairwise_accuracy"].value
    assert confident["calibration_error"].value == pytest.approx(excess, abs=0.01)


# ---- Images that can't be read, wrong rows, and the protocol


def test_rows_with_unreadable_images_are_left_out_and_counted(model, processor):
    columns = {
        name: [*values]
        for name, values in image_preferences()
        .cast_column("chosen_image", datasets.Image(decode=False))
        .cast_column("rejected_image", datasets.List(datasets.Image(decode=False)))
        .to_dict()
        .items()
    }
    columns["chosen_image"][2] = BROKEN
    columns["rejected_image"][5][1] = BROKEN
    broken = datasets.Dataset.from_dict(columns, features=image_preferences().features)
    good = image_preferences().select([0, 1, 3, 4, 6, 7])
    found = PreferenceEvaluator(broken, processor, resamples=9, on_bad_image="skip")
    measured = found.measure({"m": model}, disable_tqdm=True)
    assert measured["m"].skipped_rows == 2
    check(found.report(measured, None, 2)["m"], margins_of_images(model, processor, good))
    with pytest.raises(UnreadableImage, match=r"Row 2.*'chosen_image'"):
        PreferenceEvaluator(broken, processor)({"m": model}, disable_tqdm=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows.remove_columns("rejected"), "preferences need image, chosen and rejected"),
        (
            lambda rows: rows.map(lambda row, i: {"chosen": "" if i == 4 else "a"}, with_indices=True),
            "Row 4.*'chosen'",
        ),
        (lambda rows: rows.add_column("weight", [-1.0] * 9), "Row 0: column 'weight'"),
        (lambda rows: rows.add_column("label_smoothing", [0.7] * 9), "Row 0: column 'label_smoothing' is 0.7"),
        (lambda rows: rows.map(lambda row: {"rejected": []}), "has no preferences"),
    ],
)
def test_rows_that_are_no_preferences_are_named(model, processor, change, said):
    with pytest.raises(ValueError, match=said):
        PreferenceEvaluator(change(text_preferences()), processor)({"m": model}, disable_tqdm=True)


def test_a_base_of_other_rows_is_refused():
    with pytest.raises(ValueError, match="different pairs"):
        preference_report(margins_by_hand([1, 2]), margins_by_hand([1, 2, 3]))
    with pytest.raises(ValueError, match="different rows"):
        unpaired_report(scores_by_hand([1, 2], [0, 1]), scores_by_hand([1, 2], [1, 0]))


def test_a_training_chooses_checkpoints_by_agreement(clip_folder, tmp_path):
    evaluator = PreferenceEvaluator(make_preferences(6), CLIPProcessor.from_pretrained(clip_folder), resamples=2)
    trainer = make_trainer(
        clip_folder, tmp_path, eval_dataset=make_preferences(4), max_steps=2, eval_strategy="steps", eval_steps=1
    )
    trainer.add_callback(EvaluatorCallback(trainer, evaluator))
    trainer.train()
    assert len(logged(trainer, "eval_pairwise_accuracy")) == len(logged(trainer, "eval_margin_difference")) == 2
    last = evaluator({"m": trainer.model}, disable_tqdm=True)["m"]
    assert logged(trainer, "eval_margin")[-1] == pytest.approx(last["margin"].value)
    base = CLIPModel.from_pretrained(clip_folder)
    metrics = evaluator({"base": base, "m": trainer.model}, "base", disable_tqdm=True)["m"]
    assert logged(trainer, "eval_margin_difference")[-1] == pytest.approx(metrics["margin_difference"].value, abs=1e-5)


def test_two_processes_measure_what_one_does(clip_folder, two_processes, tmp_path):
    make_preferences(7).save_to_disk(tmp_path / "rows")
    script = f"""
import json
from pathlib import Path
import datasets
from accelerate import Accelerator
from transformers import CLIPModel, CLIPProcessor
from clip_po.evaluation import PreferenceEvaluator

name, accelerator = {str(clip_folder)!r}, Accelerator(cpu=True)
evaluator = PreferenceEvaluator(
    datasets.load_from_disk({str(tmp_path / "rows")!r}), CLIPProcessor.from_pretrained(name), batch_size=2, resamples=9
)
found = evaluator({{"m": CLIPModel.from_pretrained(name)}}, accelerator=accelerator, disable_tqdm=True)["m"]
file = Path({str(tmp_path)!r}, f"{{accelerator.process_index}}.json")
file.write_text(json.dumps({{metric: estimate.as_dict() for metric, estimate in found.items()}}))
"""
    two_processes.run(script)
    evaluator = PreferenceEvaluator(make_preferences(7), CLIPProcessor.from_pretrained(clip_folder), resamples=9)
    alone = evaluator({"m": CLIPModel.from_pretrained(clip_folder)}, disable_tqdm=True)["m"]
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found.keys() == alone.keys()
        for metric, numbers in found.items():
            assert numbers == pytest.approx(alone[metric].as_dict(), abs=1e-5), metric
