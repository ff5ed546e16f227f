"""clip-po score: rankings in every format and direction, against logits of transformers' own forward pass."""

import csv
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from samples import PROMPTS, picture
from transformers import CLIPModel, CLIPProcessor

from clip_po.cli import score as command
from clip_po.cli.main import main
from clip_po.concept import ConceptTransform
from clip_po.data.candidate_rows import CandidateRow
from clip_po.scoring.ranking import BestImages

COUNT = 7


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of seven pictures, one of them in a subfolder and none of them broken."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "more").mkdir()
    for number in range(COUNT):
        picture(number).save(folder / name_of(number))
    return folder


def name_of(number):
    return f"more/{number}.png" if number == COUNT - 1 else f"{number}.png"


@pytest.fixture(scope="module")
def expected(clip_folder):
    """Cosines and logits of all pictures and prompts, Tensor[7, 4], as transformers computes them."""
    model, processor = CLIPModel.from_pretrained(clip_folder), CLIPProcessor.from_pretrained(clip_folder)
    inputs = processor(text=PROMPTS, images=[picture(n) for n in range(COUNT)], return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = model.eval()(**inputs).logits_per_image
    return logits / model.logit_scale.exp(), logits


@pytest.fixture
def score(clip_folder, capsys):
    def run(*arguments, status=0):
        words = ["score", "--model_name_or_path", str(clip_folder), "--bf16", "false", "--batch_size", "3"]
        assert main([*words, *map(str, arguments)]) == status
        return capsys.readouterr()

    return run


def json_lines(text):
    return [json.loads(line) for line in text.splitlines()]


def check_ranking(lines, cosines, logits, column, names):
    """Lines must hold the candidates by falling cosine, and the softmax of their logits."""
    order = cosines.argsort(descending=True).tolist()
    assert [line[column] for line in lines] == [names[position] for position in order[: len(lines)]]
    assert [line["rank"] for line in lines] == [*range(1, len(lines) + 1)]
    found = torch.tensor([[line["cosine"], line["probability"]] for line in lines])
    torch.testing.assert_close(
        found, torch.stack([cosines, logits.softmax(0)], 1)[order[: len(lines)]], atol=2e-6, rtol=1e-4
    )


def test_texts_are_ranked_for_each_image_of_a_folder(score, images, expected):
    lines = json_lines(score("--dataset_name", images, "--text", *PROMPTS).out)
    assert len(lines) == COUNT * len(PROMPTS)
    for number in range(COUNT):
        own = lines[number * len(PROMPTS) : (number + 1) * len(PROMPTS)]
        assert {(line["row"], line["image"]) for line in own} == {(number, name_of(number))}
        check_ranking(own, expected[0][number], expected[1][number], "text", PROMPTS)


@pytest.mark.parametrize("top_k", [2, None])
def test_images_are_ranked_for_each_text(score, images, expected, top_k):
    cut = [] if top_k is None else ["--top_k", top_k]
    lines = json_lines(score("--dataset_name", images, "--text", *PROMPTS, "--rank", "images", *cut).out)
    assert len(lines) == len(PROMPTS) * (top_k or COUNT)
    for number, text in enumerate(PROMPTS):
        own = [line for line in lines if line["text"] == text]
        check_ranking(own, expected[0][:, number], expected[1][:, number], "image", [*map(name_of, range(COUNT))])


def test_a_single_text_ranks_the_images(score, images, expected, tmp_path):
    (tmp_path / "texts.txt").write_text(f"\n{PROMPTS[2]}\n")
    lines = json_lines(score("--dataset_name", images, "--texts", tmp_path / "texts.txt", "--top_k", 3).out)
    check_ranking(lines, expected[0][:, 2], expected[1][:, 2], "image", [*map(name_of, range(COUNT))])


ROWS = [
    {"image": name_of(0), "text": PROMPTS},
    {"image": [name_of(1), name_of(2), name_of(6)], "text": PROMPTS[1]},
    {"image": name_of(3), "text": PROMPTS[:2]},
    {"image": name_of(4), "text": PROMPTS[3]},
    {"image": name_of(5), "text": PROMPTS[:3]},
]


def check_rows(lines, expected):
    by_row = [[line for line in lines if line["row"] == row] for row in range(len(ROWS))]
    assert [line["row"] for line in lines] == sorted(line["row"] for line in lines)
    cosines, logits = expected
    check_ranking(by_row[0], cosines[0], logits[0], "text", PROMPTS)
    several = [1, 2, 6]
    check_ranking(by_row[1], cosines[several, 1], logits[several, 1], "image", ROWS[1]["image"])
    check_ranking(by_row[2], cosines[3, :2], logits[3, :2], "text", PROMPTS[:2])
    check_ranking(by_row[3], cosines[4, 3:], logits[4, 3:], "text", PROMPTS[3:])
    check_ranking(by_row[4], cosines[5, :3], logits[5, :3], "text", PROMPTS[:3])


def write_jsonl(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_csv(file, rows):
    cells = io.StringIO()
    writer = csv.DictWriter(cells, ["image", "text"])
    writer.writeheader()
    writer.writerows({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows)
    file.write_text(cells.getvalue())


def write_parquet(file, rows):
    listed = [{k: [v] if isinstance(v, str) else v for k, v in row.items()} for row in rows]
    pq.write_table(pa.Table.from_pylist(listed), file)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_each_row_ranks_its_own_candidates_in_every_format(score, images, expected, suffix):
    table, output = images / f"rows.{suffix}", images / f"scores.{suffix}"
    {"jsonl": write_jsonl, "csv": write_csv, "parquet": write_parquet}[suffix](table, ROWS)
    score("--dataset_name", table, "--output_file", output)
    if suffix == "parquet":
        lines = pq.read_table(output).to_pylist()
    elif suffix == "jsonl":
        lines = json_lines(output.read_text())
    else:
        kinds = {"row": int, "rank": int, "cosine": float, "probability": float}
        read = csv.DictReader(io.StringIO(output.read_text()))
        lines = [{name: kinds.get(name, str)(cell) for name, cell in line.items() if name != "error"} for line in read]
    assert not any(line.get("error") for line in lines)
    check_rows(lines, expected)


def test_bytes_of_files_are_images(score, images, tmp_path, expected):
    stored = [(images / name_of(number)).read_bytes() for number in range(2)]
    rows = [{"image": {"bytes": stored[0], "path": "first"}}, {"image": {"bytes": stored[1], "path": None}}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    lines = json_lines(score("--dataset_name", tmp_path / "rows.parquet", "--text", *PROMPTS, "--rank", "texts").out)
    assert [line["image"] for line in lines] == ["first"] * 4 + ["image 0"] * 4
    check_ranking(lines[4:], expected[0][1], expected[1][1], "text", PROMPTS)


def test_what_cannot_be_scored_is_reported_and_the_rest_is_scored(score, images, tmp_path, expected):
    (images / "broken.png").write_bytes(b"no image")
    picture(0).save(tmp_path / "outside.png")
    rows = [
        {"image": ["broken.png", name_of(1), name_of(2)], "text": PROMPTS[0]},
        {"image": "missing.png", "text": PROMPTS},
        {"image": str(tmp_path / "outside.png"), "text": PROMPTS},
        {"image": None, "text": PROMPTS},
        {"image": [name_of(0), name_of(1)], "text": PROMPTS},
        {"image": name_of(0), "text": [" "]},
        {"image": name_of(3), "text": PROMPTS},
    ]
    try:
        write_jsonl(images / "rows.jsonl", rows)
        printed = score("--dataset_name", images / "rows.jsonl")
        ranked = score("--dataset_name", images, "--text", PROMPTS[0])
    finally:
        (images / "broken.png").unlink()
    lines = json_lines(printed.out)
    errors = {line["row"]: line["error"] for line in lines if line["error"]}
    assert {row: next(t for t in ERRORS if t in text) for row, text in errors.items()} == dict(enumerate(ERRORS))
    assert "6 images or rows could not be scored" in printed.err
    several = [1, 2]
    check_ranking(lines[:2], expected[0][several, 0], expected[1][several, 0], "image", rows[0]["image"][1:])
    check_ranking(lines[-4:], expected[0][3], expected[1][3], "text", PROMPTS)
    *found, broken = json_lines(ranked.out)
    check_ranking(found, expected[0][:, 0], expected[1][:, 0], "image", [*map(name_of, range(COUNT))])
    assert (broken["image"], broken["rank"]) == ("broken.png", None)
    assert "can't be read" in broken["error"]


ERRORS = [
    "cannot identify",
    "No such file",
    "outside the dataset folder",
    "no image",
    "2 images and 4 texts",
    "not a text",
]


def test_an_image_cut_off_in_the_middle_is_reported(score, tmp_path):
    picture(0, 64).save(tmp_path / "0.jpg")
    whole = (tmp_path / "0.jpg").read_bytes()
    (tmp_path / "1.jpg").write_bytes(whole[: len(whole) // 2])
    first, second = json_lines(score("--dataset_name", tmp_path, "--text", "a", "--rank", "texts").out)
    assert first["error"] is None
    assert "truncated" in second["error"]


def test_an_image_is_turned_as_a_dataset_turns_it(score, tmp_path):
    upright, exif = Image.effect_noise((40, 20), 90).convert("RGB"), Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    upright.save(tmp_path / "upright.png")
    first, second = json_lines(
        score("--dataset_name", tmp_path, "--text", *PROMPTS[:2], "--rank", "texts", "--top_k", 1).out
    )
    assert first["cosine"] == second["cosine"]


def test_nothing_scored_is_an_error_and_leaves_no_file(score, tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"image": "missing.png", "text": "a"}])
    said = score("--dataset_name", tmp_path / "rows.jsonl", "--output_file", tmp_path / "out.csv", status=2).err
    assert "No such file" in said
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--dataset_name is missing"),
        (["--dataset_name", "nowhere"], "'nowhere', which does not exist"),
        (["--dataset_name", "."], "whose images have no texts"),
        (["--dataset_name", ".", "--text", " "], "--text has no text"),
        (["--dataset_name", ".", "--text", "a", "--texts", "b"], "both give the texts"),
        (["--dataset_name", ".", "--text", "a", "--output_file", "a.xlsx"], "names no format"),
        (["--dataset_name", ".", "--text", "a", "--top_k", "0"], "--top_k must be a whole number >= 1"),
        (["--dataset_name", "rows.jsonl", "--rank", "images"], "--rank has no effect without"),
        (["--dataset_name", "rows.jsonl", "--text", "a", "--text_column", "b"], "--text_column has no effect next to"),
        (["--dataset_name", ".", "--text", "a", "--image_column", "b"], "--image_column has no effect for a folder"),
        (
            ["--dataset_name", ".", "--text", "a", "--config", "recipe.yaml"],
            "--rank is 'best'. Choose texts or images",
        ),
        (["--dataset_name", ".", "--texts", "missing.txt"], "No such file or directory: 'missing.txt'"),
        (["--dataset_name", "rows.jsonl", "--text_column", "b"], "has no column 'b'; its columns are ['image']"),
    ],
)
def test_wrong_arguments_are_named(score, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", [{"image": "1.png"}])
    (tmp_path / "recipe.yaml").write_text("rank: best\n")
    assert said in score(*arguments, status=2).err


def test_rows_are_read_a_share_ahead_and_no_further(score, images, monkeypatch, capsys):
    """Memory does not grow with the table: what was written before the next rows were read."""
    written_before = []

    def rows(args, texts):
        for number in range(20):
            written_before.append(len(json_lines(capsys.readouterr().out)))
            yield CandidateRow(number, [name_of(number % COUNT)], PROMPTS[:1], images)

    monkeypatch.setattr(command, "read_candidates", rows)
    score("--dataset_name", images, "--text", "a", "--rank", "texts")
    written = np.cumsum(written_before)
    assert all(number - done <= 3 * 3 for number, done in enumerate(written))


def test_the_best_images_are_those_of_a_sort_of_all_and_no_other_is_kept():
    rng = np.random.default_rng(0)
    cosines = rng.integers(-9, 9, (50, 4)) / 10  # with ties
    names = [f"image {number}" for number in range(50)]
    whole, halves = BestImages(PROMPTS, 3), [BestImages(PROMPTS, 3), BestImages(PROMPTS, 3)]
    for start in range(0, 50, 5):
        part = range(start, start + 5)
        halves[start // 5 % 2].add(part, names[start : start + 5], cosines[part], 100 * cosines[part])
        assert len(halves[start // 5 % 2]._names) <= 4 * 3
    for half in reversed(halves):
        whole.merge(half)
    found = [(line["text"], line["image"], line["rank"]) for line in whole.lines()]
    ranked = {text: sorted(range(50), key=lambda i: (-cosines[i, t], i))[:3] for t, text in enumerate(PROMPTS)}
    assert found == [(t, names[i], rank) for t, order in ranked.items() for rank, i in enumerate(order, 1)]
    shares = np.exp(100 * cosines) / np.exp(100 * cosines).sum(0)
    wanted = [shares[i, t] for t, order in enumerate(ranked.values()) for i in order]
    assert [line["probability"] for line in whole.lines()] == pytest.approx(wanted, rel=1e-5)


def test_bfloat16_changes_the_last_digits(score, images, expected):
    lines = json_lines(score("--dataset_name", images, "--text", PROMPTS[0], "--bf16", "true").out)
    found = torch.tensor([line["cosine"] for line in sorted(lines, key=lambda line: line["row"])])
    torch.testing.assert_close(found, expected[0][:, 0], atol=0.03, rtol=0)
    assert not torch.allclose(found, expected[0][:, 0], atol=1e-6)


def test_a_concept_without_its_model_is_named(clip_folder, images, tmp_path, capsys):
    ConceptTransform(16).save(tmp_path)
    words = ["score", "--model_name_or_path", str(tmp_path), "--dataset_name", str(images), "--text", "a"]
    assert main(words) == 2
    assert (
        "holds a concept transformation (concept.safetensors) and no model. Give the checkpoint"
        in capsys.readouterr().err
    )


def test_two_processes_write_what_one_does(score, images, clip_folder, two_processes, tmp_path):
    table = images / "rows.jsonl"
    write_jsonl(table, ROWS)
    words = ["score", "--model_name_or_path", clip_folder, "--bf16", "false", "--batch_size"]
    runs = {
        "rows": ["--dataset_name", table],
        "images": ["--dataset_name", images, "--text", *PROMPTS, "--rank", "images", "--top_k", 3],
    }
    for name, arguments in runs.items():
        for processes, size in (("one", 4), ("two", 2)):
            output = ["--output_file", tmp_path / f"{name}-{processes}.jsonl"]
            command = [*map(str, [*words, size, *arguments, *output])]
            if processes == "one":
                assert main(command) == 0
            else:
                two_processes.run(f"from clip_po.cli.main import main\nassert main({command!r}) == 0")
        one, two = (json_lines((tmp_path / f"{name}-{n}.jsonl").read_text()) for n in ("one", "two"))
        assert [(line["row"], line["text"], line["image"]) for line in one] == [
            (line["row"], line["text"], line["image"]) for line in two
        ]
        assert [line["cosine"] for line in one] == pytest.approx([line["cosine"] for line in two], abs=2e-6)
        assert [line["probability"] for line in one] == pytest.approx([x["probability"] for x in two], rel=1e-3)
