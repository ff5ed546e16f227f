import json
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from clip_po.data.attacks.attack import TypographicAttack
from clip_po.data.attacks.drawing import enlarge
from clip_po.evaluation.robustness import (
    BLANK,
    VARIANTS,
    RobustnessImages,
    evaluate_robustness,
    robustness_report,
    robustness_table,
)
from clip_po.evaluation.zero_shot import class_embeddings

NAMES = ("cat", "dog", "car")
TEMPLATES = ["a photo of a {}"]


def ask(models, images, processor, **arguments):
    return evaluate_robustness(models, images, TEMPLATES, disable_tqdm=True, **arguments)


def same(first, second):
    return all(np.array_equal(first[variant], second[variant]) for variant in VARIANTS)


@pytest.fixture
def images(dataset, attack, processor):
    return RobustnessImages(dataset, attack, processor)


def processed(processor, image):
    return processor.image_processor(image, return_tensors="pt")["pixel_values"][0]


def test_an_item_is_drawn_by_its_index(dataset, attack, processor):
    images = RobustnessImages(dataset, attack, processor, renderings=2)
    assert len(images) == 2 * len(dataset)
    photo = dataset[3]["image"]
    word = attack.word(7, exclude={"cat"})
    item = images[7]
    expected = {
        "clean": enlarge(photo, 32),
        "typographic": attack.draw(photo, word, 7),
        "occluded": attack.draw_control(photo, word, 7),
    }
    for variant, picture in expected.items():
        torch.testing.assert_close(item[variant], processed(processor, picture), rtol=0, atol=0)
    assert (item["label"], images.written[7], item["cluster"]) == (0, word, 3)
    assert images.picture(7).tobytes() == expected["typographic"].tobytes()


def test_a_blank_box_is_a_fourth_variant_where_it_is_asked_for(dataset, attack, processor, model):
    images = RobustnessImages(dataset, attack, processor, variants=(*VARIANTS, BLANK))
    covered = attack.draw_blank(dataset[3]["image"], str(images.written[3]), 3)
    torch.testing.assert_close(images[3][BLANK], processed(processor, covered), rtol=0, atol=0)
    answers = ask({"a": model}, images, processor)
    right = (answers.predictions_of("a")[BLANK] == answers.label).mean()
    assert robustness_report(answers, "a")["blank_accuracy"].value == pytest.approx(right)
    with pytest.raises(ValueError, match="variants must be"):
        RobustnessImages(dataset, attack, processor, variants=("clean", BLANK))


def test_items_are_drawn_once_as_far_as_memory_is_given(dataset, attack, processor, monkeypatch):
    item = 3 * 3 * 32 * 32 * 4
    images = RobustnessImages(dataset, attack, processor, keep_bytes=2 * item)
    first = [images[index] for index in range(3)]
    calls = []
    draw = type(images)._draw
    monkeypatch.setattr(type(images), "_draw", lambda self, index: calls.append(index) or draw(self, index))
    for one, again in zip(first, [images[index] for index in range(3)], strict=True):
        assert all(torch.equal(one[variant], again[variant]) for variant in VARIANTS)
    assert calls == [2]


def test_other_embeddings_may_stand_for_the_classes(images, processor, model):
    swapped = class_embeddings(model, processor, NAMES, TEMPLATES)[[1, 0, 2]]
    plain = ask({"a": model}, images, processor).predictions_of("a")["clean"]
    found = ask({"a": model}, images, processor, class_embeds={"a": swapped}).predictions_of("a")["clean"]
    assert (found == np.array([1, 0, 2])[plain]).all()


def test_two_renderings_of_a_row_differ(dataset, attack, processor):
    images = RobustnessImages(dataset, attack, processor, renderings=2)
    assert torch.equal(images[0]["clean"], images[1]["clean"])
    assert not torch.equal(images[0]["typographic"], images[1]["typographic"])


def test_the_written_word_is_never_the_true_class(images):
    assert (images.word != images.label).all()
    named = [NAMES.index(word) if word in NAMES else -1 for word in images.written]
    assert images.word.tolist() == named
    assert -1 in named


def test_a_word_in_another_case_is_the_class(dataset, processor):
    attack = TypographicAttack(words=["CAT", "Dog", "car"], min_side=32)
    images = RobustnessImages(dataset, attack, processor)
    assert (images.word >= 0).all()
    assert (images.word != images.label).all()


def test_classes_that_differ_by_case_keep_their_own_words(dataset, processor):
    attack = TypographicAttack(words=["Car", "car", "cat"], min_side=32)
    plain = dataset.cast_column("label", datasets.Value("int64")).filter(lambda row: row["label"] == 0)
    images = RobustnessImages(plain, attack, processor, ["cat", "Car", "car"], renderings=4)
    expected = [["cat", "Car", "car"].index(word) for word in images.written]
    assert images.word.tolist() == expected
    assert set(expected) == {1, 2}


def test_clusters_come_from_their_column(dataset, attack, processor):
    images = RobustnessImages(dataset, attack, processor, cluster_column="scene", renderings=2)
    assert images.cluster.tolist() == [row // 4 for row in range(13) for _ in range(2)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"renderings": 0}, "at least 1, got 0"),
        ({"cluster_column": "place"}, "cluster_column='place' is not a column"),
        ({"image_column": "photo"}, "image_column='photo' is not a column"),
        ({"class_names": ["cat", "dog"]}, "has 3 classes, class_names has 2"),
    ],
)
def test_wrong_arguments_are_refused(dataset, attack, processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        RobustnessImages(dataset, attack, processor, **arguments)


def test_an_unreadable_image_names_its_row_not_its_item(dataset, attack, processor):
    rows = [dataset[0]["image"], {"path": None, "bytes": b"no image"}]
    features = dataset.select_columns(["image", "label"]).features
    broken = datasets.Dataset.from_dict({"image": rows, "label": [0, 1]}, features=features)
    images = RobustnessImages(broken, attack, processor, renderings=3)
    images[2]
    with pytest.raises(ValueError, match="Row 1: the image in column 'image'"):
        images[4]


def test_one_pass_serves_several_models_with_the_answers_of_separate_passes(
    images, model, other_model, processor, monkeypatch
):
    apart = {
        name: ask({name: asked}, images, processor).predicted[name]
        for name, asked in {"a": model, "b": other_model}.items()
    }
    read = []
    original = RobustnessImages.__getitem__
    monkeypatch.setattr(
        RobustnessImages, "__getitem__", lambda self, index: read.append(index) or original(self, index)
    )
    together = ask({"a": model, "b": other_model}, images, processor)
    assert read == list(range(len(images)))
    assert same(together.predicted["a"], apart["a"])
    assert same(together.predicted["b"], apart["b"])
    assert not same(apart["a"], apart["b"])


def test_answers_are_those_of_the_whole_model(images, model, processor):
    answers = ask({"a": model}, images, processor)
    texts = processor.tokenizer([TEMPLATES[0].format(n) for n in NAMES], padding=True, return_tensors="pt")
    for variant in VARIANTS:
        with torch.no_grad():
            pixels = torch.stack([images[i][variant] for i in range(len(images))])
            expected = model(pixel_values=pixels, **texts).logits_per_image.argmax(1).numpy()
        np.testing.assert_array_equal(answers.predicted["a"][variant], expected)
    np.testing.assert_array_equal(answers.label, images.label)


def test_answers_depend_neither_on_batch_size_nor_on_workers(images, model, processor):
    whole = ask({"a": model}, images, processor)
    for arguments in ({"batch_size": 1}, {"batch_size": 5, "num_workers": 1}):
        assert same(ask({"a": model}, images, processor, **arguments).predicted["a"], whole.predicted["a"])


def test_a_question_without_models_is_refused(images, processor):
    with pytest.raises(ValueError, match="models is empty"):
        ask({}, images, processor)


BEFORE = ([0, 0, 1, 1, 2], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0])
AFTER = ([0, 0, 1, 2, 2], [0, 1, 1, 1, 0], [0, 0, 1, 1, 2])


@pytest.fixture
def answers(answers_of):
    """Five images worked out by hand: labels cat cat dog dog car, words dog dog cat cat (none)."""
    return answers_of([0, 0, 1, 1, 2], [1, 1, 0, 0, -1], before=BEFORE, after=AFTER)


def test_metrics_of_one_model_by_hand(answers):
    report = {name: estimate.value for name, estimate in robustness_report(answers, "before").items()}
    assert report == pytest.approx(
        {
            "clean_accuracy": 5 / 5,
            "typographic_accuracy": 1 / 5,  # only the third image
            "occluded_accuracy": 3 / 5,
            "fooled": 3 / 4,  # the fifth word names no class
            "reading_effect": 3 / 5 - 1 / 5,
            "kept_answers": 1 / 5,  # only the third image
        }
    )


def test_metrics_against_a_base_by_hand(answers):
    report = {name: estimate.value for name, estimate in robustness_report(answers, "after", "before").items()}
    assert report == pytest.approx(
        {
            "clean_accuracy": 4 / 5,
            "typographic_accuracy": 3 / 5,
            "occluded_accuracy": 5 / 5,
            "fooled": 1 / 4,
            "reading_effect": 2 / 5,
            "kept_answers": 2 / 5,  # the first and the third
            "recovery": (3 / 5 - 1 / 5) / (5 / 5 - 1 / 5),
            "clean_cost": 20.0,
        }
    )


def test_a_base_is_compared_with_others_only(answers):
    assert "recovery" not in robustness_report(answers, "before", "before")
    with pytest.raises(
        ValueError, match=r"No answers of model 'x'\. The models with answers are \['before', 'after'\]"
    ):
        robustness_report(answers, "before", "x")


@pytest.mark.filterwarnings("error")
def test_what_can_not_be_measured_is_nan(answers_of):
    label = [0, 1, 2]
    unharmed = answers_of(label, [-1, -1, -1], base=(label, label, label), model=([0, 0, 0], label, label))
    report = robustness_report(unharmed, "model", "base")
    assert np.isnan(report["fooled"].value)
    assert np.isnan(report["recovery"].value)
    helped = answers_of(label, [1, 0, 0], base=([0, 0, 0], label, label), model=(label, [0, 0, 0], label))
    assert np.isnan(robustness_report(helped, "model", "base")["recovery"].value)


def simulated(answers_of, repeats=1):
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, 300)
    word = (label + 1) % 3
    clean = np.where(rng.random(300) < 0.9, label, word)
    typographic = np.where(rng.random(300) < 0.3, label, word)
    mended = np.where(rng.random(300) < 0.7, label, typographic)
    rows = [np.repeat(x, repeats) for x in (label, word, clean, typographic, mended)]
    label, word, clean, typographic, mended = rows
    return answers_of(
        label,
        word,
        np.repeat(np.arange(300), repeats),
        before=(clean, typographic, clean),
        after=(clean, mended, clean),
    )


def test_intervals_are_paired_with_the_base(answers_of):
    report = robustness_report(simulated(answers_of), "after", "before")
    # The same clean answers, image by image: nothing is left to chance in their difference.
    assert report["clean_cost"].as_dict() == {"value": 0, "low": 0, "high": 0}
    assert report["clean_accuracy"].high - report["clean_accuracy"].low > 0.03
    assert report["recovery"].low < report["recovery"].value < report["recovery"].high
    assert report["recovery"].value == pytest.approx(0.82, abs=0.1)  # (.7 + .3 x .3 - .3) / (.9 - .3)


def test_renderings_that_agree_add_no_certainty(answers_of):
    once, thrice = (robustness_report(simulated(answers_of, n), "after", "before") for n in (1, 3))
    for metric in once:
        assert once[metric].as_dict() == pytest.approx(thrice[metric].as_dict())


TWO_PROCESSES = """
import json, sys
import datasets
from accelerate import Accelerator
from transformers import CLIPModel, CLIPProcessor
from clip_po.data.attacks.attack import TypographicAttack
from clip_po.evaluation.robustness import RobustnessImages, evaluate_robustness
folder = sys.argv[1]
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
processor = CLIPProcessor.from_pretrained(folder)
attack = TypographicAttack(words=["cat", "dog", "car", "tree"], size=(0.3, 0.4), min_side=32)
rows = datasets.load_from_disk(folder + "/rows")
for count in (1, len(rows)):
    images = RobustnessImages(rows.select(range(count)), attack, processor)
    answers = evaluate_robustness({"a": CLIPModel.from_pretrained(folder)}, images,
                     ["a photo of a {}"], batch_size=3, accelerator=accelerator, disable_tqdm=True)
    predicted = {name: said.tolist() for name, said in answers.predicted["a"].items()}
    with open(f"{folder}/{count}-{accelerator.process_index}.json", "w") as file:
        json.dump(predicted, file)
accelerator.end_training()
"""


@pytest.mark.slow
def test_two_processes_give_the_answers_of_one(dataset, images, model, processor, two_processes, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    dataset.save_to_disk(tmp_path / "rows")
    two_processes.run(TWO_PROCESSES, tmp_path)
    alone = ask({"a": model}, images, processor, batch_size=3).predicted["a"]
    for process in range(2):
        for count in (1, len(images)):  # with one row the second process has none
            shared = json.loads((tmp_path / f"{count}-{process}.json").read_text())
            assert shared == {variant: said[:count].tolist() for variant, said in alone.items()}


@pytest.mark.shared
@pytest.mark.slow
def test_a_model_that_reads_is_fooled():
    from transformers import CLIPModel, CLIPProcessor

    folder = Path(os.environ.get("CLIP_PO_SHARED", Path(__file__).parents[3] / "shared"))
    if not folder.exists():
        pytest.skip(f"no folder {folder}")
    name = folder / "models" / "photographs-clip"
    model, processor = CLIPModel.from_pretrained(name), CLIPProcessor.from_pretrained(name)
    (file,) = (folder / "data" / "photographs").glob("test-*.parquet")
    rows = datasets.Dataset.from_parquet(str(file)).shuffle(seed=0).select(range(200))
    attack = TypographicAttack(words=rows.features["label"].names, size=(0.4, 0.5), min_side=48)
    images = RobustnessImages(rows, attack, processor)
    answers = evaluate_robustness({"clip": model}, images, TEMPLATES, disable_tqdm=True)
    report = robustness_report(answers, "clip")
    assert report["clean_accuracy"].low > 0.6
    assert report["fooled"].low > 0.2
    assert report["reading_effect"].low > 0.05


def test_the_table_has_a_row_a_model_and_leaves_out_what_nobody_measured(answers):
    alone = robustness_table({"before": robustness_report(answers, "before")})
    both = robustness_table({n: robustness_report(answers, n, "before") for n in ("before", "after")})
    assert "recovery" not in alone
    assert [line.split("|")[1].strip() for line in both.splitlines()] == ["model", "------", "before", "after"]
    assert "clean cost (points)" in both
