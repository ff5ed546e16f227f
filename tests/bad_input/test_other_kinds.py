"""Data and models of other kinds, and values in another argument's place: the remedy is the one that works."""

import datasets
import pandas as pd
import pytest
import torch
from bad_input.table import case, check
from samples import CLASSES, PROMPTS, make_labelled, make_preferences, picture, run_config, tiny_config
from transformers import (
    CLIPForImageClassification,
    CLIPSegConfig,
    CLIPSegModel,
    CLIPTextModel,
    CLIPVisionModelWithProjection,
)

from clip_po.data.attacks.attack import TypographicAttack
from clip_po.data.formats import check_regularization
from clip_po.data.typographic_preferences import TypographicPreferences
from clip_po.evaluation.zero_shot import zero_shot_accuracy
from clip_po.models import load_model
from clip_po.trainer import ContrastivePOTrainer


class MapStyle(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return make_preferences(4)[index]


class Streaming(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(make_preferences(4))


def frame():
    return pd.DataFrame({"image": ["a.png"], "chosen": ["a cat"], "rejected": ["a dog"]})


DATA = {
    "dict-of-splits": (lambda: datasets.DatasetDict({"fit": make_preferences(2)}), "['fit']", "=dataset['fit']"),
    "data-frame": (frame, "Dataset.from_pandas", "cast_column('image'"),
    "torch-dataset": (MapStyle, "from_list([dataset[i]", "PreferenceRows"),
    "torch-stream": (Streaming, "IterableDataset.from_generator", "max_steps"),
    "loader": (lambda: torch.utils.data.DataLoader(MapStyle()), "the dataset of the loader"),
    "list": (lambda: [{"image": 1}], "Dataset.from_list(rows)"),
    "dict-of-columns": (lambda: {"image": []}, "Dataset.from_dict(columns)"),
    "several-datasets": (lambda: [make_preferences(2)] * 2, "datasets.concatenate_datasets"),
    "path": (lambda: "path/to/data", "load_dataset('path/to/data', split='train')"),
    "arrow-table": (lambda: make_preferences(2).with_format("arrow")[:], "Dataset(table)"),
}


@pytest.mark.parametrize("kind", DATA)
def test_other_data_says_how_to_convert_it(kind, bench):
    make, *says = DATA[kind]
    check(case(lambda b: b.trainer(make()), TypeError, "train_dataset must be", *says), bench)


@pytest.mark.parametrize("kind", ["dict-of-splits", "data-frame", "torch-dataset", "path"])
def test_other_labelled_images_say_how_to_convert_them(kind, bench):
    make, *says = DATA[kind]
    says = [says[0]]
    attack = TypographicAttack(words=CLASSES, min_side=32)
    uses = [
        lambda b: TypographicPreferences(make(), attack),
        lambda b: zero_shot_accuracy(b.model, b.processor, make(), ["a {}"]),
        lambda b: check_regularization(make()),
    ]
    for use in uses:
        check(case(use, TypeError, *says), bench)


MODELS = {
    "clipseg": (
        lambda b: CLIPSegModel(CLIPSegConfig(vision_config={"num_hidden_layers": 9}, text_config={"vocab_size": 8})),
        "got CLIPSegModel",
        "segments images",
        "two towers",
    ),
    "vision-tower": (
        lambda b: CLIPVisionModelWithProjection(tiny_config().vision_config),
        "both towers",
        "the whole checkpoint with AutoModel.from_pretrained",
    ),
    "text-tower": (lambda b: CLIPTextModel(tiny_config().text_config), "both towers", "the whole checkpoint"),
    "classifier": (
        lambda b: CLIPForImageClassification(tiny_config()),
        "got CLIPForImageClassification",
        "the same checkpoint with CLIPModel.from_pretrained",
    ),
    "compiled": (lambda b: torch.compile(b.model), "torch_compile=True"),
    "parallel": (lambda b: torch.nn.DataParallel(b.model), "Pass model.module"),
    "module": (lambda b: torch.nn.Linear(2, 2), "open_clip checkpoint"),
    "number": (lambda b: 5, "got int", "CLIPModel.from_pretrained"),
}


@pytest.mark.parametrize("argument", ["model", "ref_model"])
@pytest.mark.parametrize("kind", MODELS)
def test_another_model_says_what_to_pass(kind, argument, bench, monkeypatch):
    make, *says = MODELS[kind]
    check(case(lambda b: b.trainer(**{argument: make(b)}), TypeError, f"{argument} must be", *says), bench)


def test_a_reference_by_name_is_loaded_first(bench):
    says = ("ref_model must be", "got str", "CLIPModel.from_pretrained('path/to/clip')")
    check(case(lambda b: b.trainer(ref_model="path/to/clip"), TypeError, *says), bench)


@pytest.mark.parametrize(
    ("kind", "says"), [("blip-2", "several queries"), ("siglip_vision_model", "the whole checkpoint")]
)
def test_a_folder_of_another_model_says_what_to_load(kind, says, bench):
    (bench.folder / "config.json").write_text(f'{{"model_type": "{kind}"}}')
    check(case(lambda b: load_model(str(b.folder)), TypeError, f"is a {kind!r} model", says), bench)


# ---- Places


def placed(bench, *arguments, **named):
    return ContrastivePOTrainer(str(bench.clip), *arguments, **named)


PLACES = {
    "dataset-as-collator": (
        lambda b: placed(b, None, b.config(), make_preferences(4)),
        "data_collator is a Dataset, which belongs to train_dataset",
        "Pass train_dataset=...",
    ),
    "preferences-as-collator": (
        lambda b: placed(
            b,
            None,
            b.config(),
            TypographicPreferences(make_labelled(4), TypographicAttack(words=CLASSES, min_side=32)),
        ),
        "data_collator is a TypographicPreferences",
        "Pass train_dataset=...",
    ),
    "processor-as-collator": (
        lambda b: placed(b, None, b.config(), b.processor),
        "data_collator is a CLIPProcessor",
        "Pass processing_class=...",
    ),
    "arguments-as-reference": (
        lambda b: placed(b, b.config()),
        "ref_model is a ContrastivePOConfig, which belongs to args",
        "Pass args=...",
    ),
    "dataset-as-reference": (lambda b: placed(b, make_preferences(4)), "ref_model is a Dataset", "train_dataset=..."),
    "text-as-collator": (lambda b: placed(b, None, b.config(), "default"), "data_collator must be a function"),
    "model-as-init": (lambda b: ContrastivePOTrainer(model_init=b.model, args=b.config()), "Pass model=..."),
}


@pytest.mark.parametrize("kind", [kind for kind in PLACES if kind != "model-as-init"])
def test_a_value_in_another_arguments_place_is_refused(kind, bench):
    call, *says = PLACES[kind]
    check(case(call, TypeError, *says), bench)


def test_a_model_comes_in_one_way(bench):
    init = lambda: bench.model  # noqa: E731
    check(case(lambda b: ContrastivePOTrainer(args=b.config()), ValueError, "model or model_init", "neither"), bench)
    check(case(lambda b: b.trainer(model_init=init), ValueError, "model or model_init", "both"), bench)
    optimizer = torch.optim.SGD(bench.model.parameters())
    two = {"model_init": init, "optimizers": (optimizer, None)}
    check(case(lambda b: ContrastivePOTrainer(args=b.config(), **two), ValueError, "Leave optimizers out"), bench)
    check(case(lambda b: ContrastivePOTrainer(args=b.config(), model_init="clip"), TypeError, "Pass model=..."), bench)


# ---- Rows of other formats


def table(**columns):
    rows = [{"image": picture(i), **{name: values[i] for name, values in columns.items()}} for i in range(2)]
    return datasets.Dataset.from_list(rows)


def image_pairs():
    image = datasets.Image()
    columns = {"chosen": [picture(0)], "rejected": [picture(1)], "text": ["a cat"], "image": [picture(2)]}
    features = {"chosen": image, "rejected": image, "text": datasets.Value("string"), "image": image}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def messages(text):
    return [{"role": "assistant", "content": text}]


FORMATS = {
    "unpaired": (
        lambda: table(text=["a cat", "a dog"], label=[True, False]),
        "unpaired feedback",
    ),
    "unpaired-completions": (
        lambda: table(completion=["a cat", "a dog"], label=[1, 0]),
        "unpaired",
        "image, text and label",
        "rename_column",
    ),
    "image-pairs": (image_pairs, "text, chosen_image and rejected_image", "rename_column"),
    "columns-of-image-pairs": (
        lambda: table(chosen_image=["a.png"] * 2, rejected_image=["b.png"] * 2, prompt=["a cat"] * 2),
        "text, chosen_image and rejected_image",
    ),
    "numbered-images": (
        lambda: table(jpg_0=[b""] * 2, jpg_1=[b""] * 2, label_0=[1.0] * 2, caption=["a cat"] * 2),
        "caption, jpg_0, jpg_1, label_0 and label_1",
    ),
    "labels-alone": (
        lambda: make_labelled(4),
        "has no column 'rejected_label'",
        "TypographicPreferences(dataset, attack)",
    ),
    "conversations": (
        lambda: table(chosen=[messages("a cat")] * 2, rejected=[messages("a dog")] * 2),
        "messages of a conversation",
        "row[c][-1]['content']",
    ),
    "lists-of-images": (
        lambda: table(images=[["a.png"]] * 2, chosen=["a cat"] * 2, rejected=["a dog"] * 2).remove_columns("image"),
        "row['images'][0]",
    ),
}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("streamed", [False, True], ids=["numbered", "streamed"])
def test_rows_of_another_format_say_how_to_convert_them(streamed, kind, bench):
    make, *says = FORMATS[kind]
    rows = make().to_iterable_dataset() if streamed else make()
    check(case(lambda b: b.trainer(rows, candidate_texts=None), ValueError, "train_dataset", *says), bench)


def test_the_remedies_for_rows_work(clip_folder, tmp_path):
    rows = table(chosen=[messages("a cat")] * 2, rejected=[messages("a dog")] * 2)
    rows = rows.map(lambda row: {c: row[c][-1]["content"] for c in ("chosen", "rejected")})
    args = run_config(tmp_path, reg_weight=0.0, max_steps=1)
    ContrastivePOTrainer(str(clip_folder), args=args, train_dataset=rows)
    unpaired = table(text=["a photo of a cat", "a photo of a dog"], label=[True, False])
    right = unpaired.filter(lambda row: row["label"]).rename_column("text", "chosen").remove_columns("label")
    args = run_config(tmp_path, reg_weight=0.0, loss_type="sft", max_steps=1)
    ContrastivePOTrainer(str(clip_folder), args=args, train_dataset=right, candidate_texts=PROMPTS)
