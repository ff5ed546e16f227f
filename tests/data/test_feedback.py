"""Readers of human feedback: the layouts of the tools' documentation, several annotators, and what is left out."""

import base64
import io
import json

import datasets
import numpy as np
import pytest
from samples import logged, make_trainer, picture, same, weights
from transformers import CLIPModel

from clip_po.data import read_answers, read_argilla, read_label_studio
from clip_po.data.feedback.agreement import share_of_votes
from clip_po.data.feedback.judgements import Words, scores_of

TEXTS = ("caption_1", "caption_2")
PHOTOS = ("photo_1", "photo_2")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "upload").mkdir()
    for number in range(4):
        picture(number).save(tmp_path / f"{number}.png")
        picture(number).save(tmp_path / "upload" / f"{number}.png")
    return tmp_path


def shown(image):
    """The number of the picture that an image shows."""
    return next(n for n in range(4) if np.array_equal(np.asarray(image.convert("RGB")), np.asarray(picture(n))))


def contents(dataset):
    """Rows with pictures as their numbers and floats rounded."""
    return [
        {k: shown(v) if hasattr(v, "convert") else round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
        for row in dataset
    ]


# ---- Answers


@pytest.mark.parametrize(
    ("answer", "scores"),
    [
        ("caption_2", (float("-inf"), 1.0)),
        ("Caption 2", (float("-inf"), 1.0)),
        ("TIE", (0.0, 0.0)),
        (["caption_2", "caption_1"], (-1.0, 0.0)),
        ([{"rank": 1, "value": "caption_2"}, {"rank": 1, "value": "caption_1"}], (-1.0, -1.0)),
        ([{"value": "caption_2"}, {"value": "caption_1"}], (-1.0, 0.0)),
        ({"rank": [2, 1], "value": ["caption_1", "caption_2"]}, (-2.0, -1.0)),
    ],
)
def test_answers_are_scores_of_the_candidates(answer, scores):
    assert tuple(scores_of(answer, Words(TEXTS))) == scores


@pytest.mark.parametrize(
    ("answer", "right"),
    [("Yes", 1), ("thumbs_up", 1), (True, 1), (1, 1), ("thumbs-down", -1), (False, -1), (0.0, -1), ("neither", 0)],
)
def test_answers_about_one_text_say_whether_it_is_right(answer, right):
    assert scores_of(answer, Words(("text",))) == [right]


def test_an_unknown_answer_is_named():
    with pytest.raises(ValueError, match="'maybe' is none of the candidates"):
        scores_of("maybe", Words(TEXTS))
    with pytest.raises(ValueError, match="'maybe' is neither right nor wrong"):
        scores_of("maybe", Words(("text",)))


def test_of_three_candidates_a_choice_compares_the_chosen_one_alone():
    words = Words(("a", "b", "c"))
    votes = [scores_of("b", words), scores_of("b", words), scores_of("c", words)]
    assert share_of_votes(votes, 0, 1) == 0
    assert share_of_votes(votes, 1, 2) == 2 / 3
    assert share_of_votes(votes[:2], 0, 2) is None


# ---- Tables


def write_csv(folder, lines):
    (folder / "answers.csv").write_text("\n".join(lines) + "\n")
    return folder / "answers.csv"


@pytest.fixture
def votes(folder):
    """Two against one for the second caption of 0.png; a tie at 1.png; all agree at 2.png."""
    lines = ["image,caption_1,caption_2,annotator,answer"]
    for image, answers in ((0, "2 1 2"), (1, "1 2"), (2, "1 1")):
        lines += [f"{image}.png,a {image},b {image},ann,caption_{answer}" for answer in answers.split()]
    return write_csv(folder, lines)


def test_annotators_are_joined_by_majority_and_ties_are_kept(votes):
    assert contents(read_answers(votes, text=TEXTS)) == [
        {"image": 0, "chosen": "b 0", "rejected": "a 0", "label_smoothing": 0.0},
        {"image": 1, "chosen": "a 1", "rejected": "b 1", "label_smoothing": 0.5},
        {"image": 2, "chosen": "a 2", "rejected": "b 2", "label_smoothing": 0.0},
    ]


def test_annotators_are_joined_softly(votes):
    found = read_answers(votes, text=TEXTS, agreement="soft")
    assert found["label_smoothing"] == pytest.approx([1 / 3, 0.5, 0])
    assert found["chosen"] == ["b 0", "a 1", "a 2"]


def test_where_all_agree_there_is_no_column_that_not_every_loss_reads(folder):
    file = write_csv(folder, ["image,caption_1,caption_2,answer", "0.png,a,b,caption_1"])
    assert contents(read_answers(file, text=TEXTS)) == [{"image": 0, "chosen": "a", "rejected": "b"}]


def test_two_images_of_a_text(folder):
    file = write_csv(folder, ["text,photo_1,photo_2,answer", "a cat,0.png,1.png,right", "a dog,2.png,3.png,left"])
    found = read_answers(file, image=PHOTOS, answers=("left", "right"))
    assert found.features["chosen_image"] == found.features["rejected_image"] == datasets.Image()
    assert contents(found) == [
        {"text": "a cat", "chosen_image": 1, "rejected_image": 0},
        {"text": "a dog", "chosen_image": 2, "rejected_image": 3},
    ]


def test_thumbs_are_unpaired_rows(folder):
    lines = ["image,text,answer", "0.png,a cat,yes", "1.png,a dog,thumbs down", "2.png,a cat,yes", "2.png,a cat,no"]
    found = read_answers(write_csv(folder, [*lines, "2.png,a cat,yes"]), agreement="soft")
    assert found.features["label"] == datasets.Value("bool")
    assert contents(found) == [
        {"image": 0, "text": "a cat", "label": True, "weight": 1.0},
        {"image": 1, "text": "a dog", "label": False, "weight": 1.0},
        {"image": 2, "text": "a cat", "label": True, "weight": 0.667},
        {"image": 2, "text": "a cat", "label": False, "weight": 0.333},
    ]


def test_thumbs_by_majority(folder):
    lines = ["image,text,answer", *["0.png,a,no"] * 2, "0.png,a,yes", "1.png,b,yes", "1.png,b,no"]
    assert contents(read_answers(write_csv(folder, lines))) == [
        {"image": 0, "text": "a", "label": False, "weight": 1.0},
        {"image": 1, "text": "b", "label": True, "weight": 0.5},
        {"image": 1, "text": "b", "label": False, "weight": 0.5},
    ]


def test_ratings_of_one_text_have_the_meaning_that_is_given(folder):
    file = write_csv(folder, ["image,text,answer", "0.png,a,5", "1.png,b,1", "2.png,c,3"])
    assert read_answers(file, positive=(4, 5), negative=(1, 2))["label"] == [True, False]


def test_rankings_and_ratings_of_each_candidate(folder):
    file = write_csv(folder, ["image,a,b,c,answer", '0.png,x,y,z,"[""c"", ""a"", ""b""]"'])
    found = contents(read_answers(file, text=("a", "b", "c")))
    assert {(row["chosen"], row["rejected"]) for row in found} == {("z", "x"), ("z", "y"), ("x", "y")}
    file = write_csv(folder, ["image,a,b,stars_a,stars_b", "0.png,x,y,2,4.5", "0.png,x,y,3,3", "1.png,x,y,5,"])
    assert contents(read_answers(file, text=("a", "b"), answer=("stars_a", "stars_b"), agreement="soft")) == [
        {"image": 0, "chosen": "y", "rejected": "x", "label_smoothing": 0.25}
    ]


def test_what_cannot_be_used_is_named_by_row(folder, tmp_path_factory, caplog):
    outside = tmp_path_factory.mktemp("outside") / "x.png"
    picture(0).save(outside)
    (folder / "link.png").symlink_to(outside)
    rows = [
        ("0.png", "a", "b", "caption_1"),
        ("1.png", "a", "b", "maybe"),
        ("missing.png", "a", "b", "caption_1"),
        (str(outside), "a", "b", "caption_1"),
        ("link.png", "a", "b", "caption_1"),
        ("2.png", "a", "a", "caption_1"),
        ("3.png", "", "b", "caption_2"),
        ("3.png", "a", "b", ""),
    ]
    file = write_csv(folder, ["image,caption_1,caption_2,answer", *map(",".join, rows)])
    assert len(read_answers(file, text=TEXTS)) == 1
    said = caplog.text
    for part in (
        "7 of 8 rows",
        "row 1: the answer 'maybe'",
        "row 2: there is no file",
        "row 3",
        "row 4",
        "outside",
        "row 5: two",
    ):
        assert part in said, part


def test_nothing_to_use_is_an_error(folder):
    file = write_csv(folder, ["image,text,answer", "0.png,a,perhaps"])
    with pytest.raises(ValueError, match=r"None of the 1 rows can be used. row 0: the answer 'perhaps'"):
        read_answers(file)
    with pytest.raises(ValueError, match="no column 'verdict'; its columns are"):
        read_answers(file, answer="verdict")
    with pytest.raises(ValueError, match="both have several columns"):
        read_answers(file, image=PHOTOS, text=TEXTS)
    with pytest.raises(ValueError, match="agreement must be"):
        read_answers(file, agreement="mean")


# ---- Argilla


def argilla(question, values, statuses=None, users=None):
    """Records with images and two captions, as Argilla 2 exports them."""
    statuses = statuses or [["submitted"] * len(v) for v in values]
    users = users or [[f"user {n}" for n in range(len(v))] for v in values]
    columns = {
        "id": [f"record {n}" for n in range(len(values))],
        "status": ["completed"] * len(values),
        "image": [picture(n) for n in range(len(values))],
        "caption_1": [f"a {n}" for n in range(len(values))],
        "caption_2": [f"b {n}" for n in range(len(values))],
        f"{question}.responses": values,
        f"{question}.responses.users": users,
        f"{question}.responses.status": statuses,
        f"{question}.suggestion": [None] * len(values),
    }
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def test_argilla_2_labels_and_the_status_of_answers():
    records = argilla(
        "better",
        [["caption_1"], ["caption_2", "caption_1"], ["caption_1", "caption_2", "caption_2"]],
        [["submitted"], ["submitted", "draft"], ["submitted", "submitted", "discarded"]],
    )
    assert contents(read_argilla(records, "better", text=TEXTS)) == [
        {"image": 0, "chosen": "a 0", "rejected": "b 0", "label_smoothing": 0.0},
        {"image": 1, "chosen": "b 1", "rejected": "a 1", "label_smoothing": 0.0},
        {"image": 2, "chosen": "a 2", "rejected": "b 2", "label_smoothing": 0.5},
    ]


def test_argilla_2_rankings_of_three_give_each_pair(caplog):
    records = argilla("order", [[["caption_2", "other", "caption_1"]], []]).add_column("other", ["c 0", "c 1"])
    found = contents(read_argilla(records, "order", text=(*TEXTS, "other")))
    assert {(row["chosen"], row["rejected"]) for row in found} == {("b 0", "a 0"), ("c 0", "a 0"), ("b 0", "c 0")}
    assert "row 1: nobody judged it" in caplog.text


def test_argilla_2_ratings_of_each_candidate():
    records = argilla("rating_1", [[5, 2], [1]], users=[["x", "y"], ["x"]])
    second = {
        "rating_2.responses": [[4, 3], [1]],
        "rating_2.responses.users": [["y", "x"], ["x"]],
        "rating_2.responses.status": [["submitted"] * 2, ["submitted"]],
    }
    for name, values in second.items():
        records = records.add_column(name, values)
    assert contents(read_argilla(records, ("rating_1", "rating_2"), text=TEXTS)) == [
        {"image": 0, "chosen": "a 0", "rejected": "b 0", "label_smoothing": 0.5},  # x: 5 > 3, y: 2 < 4
        {"image": 1, "chosen": "a 1", "rejected": "b 1", "label_smoothing": 0.5},
    ]


@pytest.mark.parametrize("stored", ["list of structs", "struct of lists"])
def test_argilla_1_rankings_in_one_column(stored):
    answers = [{"user_id": "x", "status": "submitted", "value": {"rank": [2, 1], "value": ["caption_1", "caption_2"]}}]
    if stored == "struct of lists":
        answers = {name: [answer[name] for answer in answers] for name in answers[0]}
    records = argilla("unused", [[]]).add_column("order", [answers])
    assert contents(read_argilla(records, "order", text=TEXTS)) == [{"image": 0, "chosen": "b 0", "rejected": "a 0"}]


def test_argilla_images_may_be_data_uris(folder):
    stream = io.BytesIO()
    picture(3).save(stream, "PNG")
    uri = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
    records = argilla("ok", [["yes"], ["no"]]).remove_columns("image")
    records = records.add_column("image", [uri, "1.png"]).rename_column("caption_1", "text")
    assert contents(read_argilla(records, "ok", folder=folder)) == [
        {"image": 3, "text": "a 0", "label": True},
        {"image": 1, "text": "a 1", "label": False},
    ]


def test_argilla_columns_are_named():
    with pytest.raises(ValueError, match=r"records has no column 'worse.responses'"):
        read_argilla(argilla("better", [["caption_1"]]), "worse", text=TEXTS)
    with pytest.raises(ValueError, match="image='photo' is not a column"):
        read_argilla(argilla("better", [["caption_1"]]), "better", image="photo", text=TEXTS)
    with pytest.raises(TypeError, match=r"one split, a datasets\.Dataset, got DatasetDict"):
        read_argilla(datasets.DatasetDict({"train": argilla("better", [["caption_1"]])}), "better", text=TEXTS)


# ---- Label Studio


def label_studio(folder, tasks):
    """Write tasks as (data, results of each annotation)."""
    exported = [
        {
            "id": 10 + number,
            "data": data,
            "annotations": [
                {"id": 1, "completed_by": 1, "was_cancelled": result is None, "result": [result] if result else []}
                for result in results
            ],
            "predictions": [],
        }
        for number, (data, results) in enumerate(tasks)
    ]
    (folder / "export.json").write_text(json.dumps(exported))
    return folder / "export.json"


def result(kind, value, name="better"):
    return {"id": "x", "from_name": name, "to_name": "y", "type": kind, "value": value}


def test_label_studio_pairwise(folder):
    left, right = (result("pairwise", {"selected": side}) for side in ("left", "right"))
    pair = {"prompt": "a cat", "photo_1": "/data/local-files/?d=0.png", "photo_2": "/data/upload/1.png"}
    file = label_studio(folder, [(pair, [right, right, left, None]), (pair, [left])])
    assert contents(read_label_studio(file, "better", image=PHOTOS, text="prompt", agreement="soft")) == [
        {"text": "a cat", "chosen_image": 1, "rejected_image": 0, "label_smoothing": 0.333},
        {"text": "a cat", "chosen_image": 0, "rejected_image": 1, "label_smoothing": 0.0},
    ]


@pytest.mark.parametrize(
    "url",
    [
        "/data/local-files/?d=upload/a%20b.png",
        "http://localhost:8080/data/local-files/?d=upload%2Fa%20b.png",
        "/data/upload/a%20b.png",
        "https://labels.example.com/data/upload/a%20b.png",
        "upload/a b.png",
    ],
)
def test_label_studio_files_are_found_below_the_folder(folder, url):
    picture(3).save(folder / "upload" / "a b.png")
    file = label_studio(folder, [({"image": url, "text": "a"}, [result("choices", {"choices": ["yes"]})])])
    assert contents(read_label_studio(file, "better")) == [{"image": 3, "text": "a", "label": True}]


def test_label_studio_choices_between_texts_and_thumbs(folder):
    data = {"image": "2.png", "caption_1": "a", "caption_2": "b"}
    results = [result("choices", {"choices": [choice]}) for choice in ("B is better", "Tie")]
    found = read_label_studio(
        label_studio(folder, [(data, results[:1]), (data, results[1:])]),
        "better",
        text=TEXTS,
        answers=("A is better", "B is better"),
    )
    assert contents(found) == [
        {"image": 2, "chosen": "b", "rejected": "a", "label_smoothing": 0.0},
        {"image": 2, "chosen": "a", "rejected": "b", "label_smoothing": 0.5},
    ]
    thumbs = label_studio(folder, [({"image": "0.png", "text": "a"}, [result("choices", {"choices": ["Bad"]})])])
    assert contents(read_label_studio(thumbs, "better")) == [{"image": 0, "text": "a", "label": False}]


@pytest.mark.parametrize("value", [["two", "zero", "one"], {"rank": ["two", "zero", "one"], "other": []}])
def test_label_studio_ranker_of_a_list(folder, value):
    items = [
        {"id": "zero", "html": "<img src='0.png'/>"},
        {"id": "one", "html": '<img width="9" src="/data/upload/1.png">'},
        {"id": "two", "image": "2.png"},
    ]
    file = label_studio(folder, [({"prompt": "a cat", "images": items}, [result("ranker", {"ranker": value})])])
    found = contents(read_label_studio(file, "better", image="images", text="prompt"))
    assert {(row["chosen_image"], row["rejected_image"]) for row in found} == {(2, 0), (2, 1), (0, 1)}


def test_label_studio_ratings(folder):
    file = label_studio(folder, [({"image": "0.png", "caption_1": "a", "caption_2": "b"}, [])])
    tasks = json.loads(file.read_text())
    rated = [result("rating", {"rating": stars}, f"stars_{n}") for n, stars in ((1, 2), (2, 5))]
    tasks[0]["annotations"] = [{"result": rated, "was_cancelled": False}]
    file.write_text(json.dumps(tasks))
    assert contents(read_label_studio(file, ("stars_1", "stars_2"), text=TEXTS)) == [
        {"image": 0, "chosen": "b", "rejected": "a"}
    ]


def test_label_studio_tasks_that_cannot_be_used_are_named_by_id(folder, caplog):
    good = ({"image": "0.png", "text": "a"}, [result("choices", {"choices": ["yes"]})])
    tasks = [
        good,
        ({"image": "0.png"}, []),
        ({"image": "https://example.com/1.png", "text": "a"}, good[1]),
        ({"image": "0.png", "text": "a"}, [result("ranker", {"ranker": {"x": ["1"], "y": ["2"]}})]),
        ({"image": "0.png", "text": "a"}, [None]),
    ]
    assert len(read_label_studio(label_studio(folder, tasks), "better")) == 1
    for part in (
        "4 of 5",
        "task 11: its data has no 'text'",
        "task 12: the image 'https",
        "task 13: its items",
        "task 14",
    ):
        assert part in caplog.text, part


def test_label_studio_other_exports_are_refused(folder):
    (folder / "mini.json").write_text(json.dumps([{"id": 1, "image": "0.png", "better": "left"}]))
    with pytest.raises(ValueError, match="JSON-MIN and CSV do not have them"):
        read_label_studio(folder / "mini.json", "better")


def test_a_path_needs_a_folder_unless_datasets_would_open_it(folder):
    records = argilla("ok", [["yes"]]).rename_column("caption_1", "text").remove_columns("image")
    with pytest.raises(ValueError, match="Give the folder of the images"):
        read_argilla(records.add_column("image", [str(folder / "1.png")]), "ok")
    images = records.add_column("image", [str(folder / "1.png")]).cast_column("image", datasets.Image())
    assert contents(read_argilla(images, "ok")) == [{"image": 1, "text": "a 0", "label": True}]


# ---- Training


@pytest.mark.parametrize("kind", ["texts", "images", "thumbs"])
def test_what_is_read_trains_as_it_is(folder, clip_folder, tmp_path, kind):
    """Annotators who disagree, so that the columns label_smoothing and weight are there."""
    header, columns, loss = {
        "texts": ("image,caption_1,caption_2", {"text": TEXTS}, "sigmoid"),
        "images": ("text,photo_1,photo_2", {"image": PHOTOS}, "sigmoid"),
        "thumbs": ("image,text", {}, "kto"),
    }[kind]
    questions = {
        "texts": ["0.png,a cat,a dog", "1.png,a bird,a ship", "2.png,a dog,a cat"],
        "images": ["a cat,0.png,1.png", "a dog,1.png,2.png", "a bird,2.png,3.png"],
        "thumbs": ["0.png,a cat", "1.png,a dog", "2.png,a bird"],
    }[kind]
    good, bad = {"texts": TEXTS, "images": PHOTOS, "thumbs": ("yes", "no")}[kind]
    lines = [f"{question},{answer}" for question in questions for answer in (good, good, bad)]
    rows = read_answers(write_csv(folder, [f"{header},answer", *lines]), agreement="soft", **columns)
    run = {"loss_type": loss, "max_steps": 2, "logging_steps": 1, "reg_weight": 0.0}
    trainer = make_trainer(clip_folder, tmp_path / "run", train_dataset=rows, candidate_texts=None, **run)
    trainer.train()
    assert all(np.isfinite(logged(trainer, "loss")))
    assert not same(weights(trainer.model), weights(CLIPModel.from_pretrained(clip_folder)))
