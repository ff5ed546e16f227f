"""The documentation runs: every Python block, every `clip-po` command and every example, on tiny local data.

How a page is run, from top to bottom, in an empty folder:

- A `python` block is executed in the page's one namespace.
- A `yaml` block whose first line is `# some/name.yaml` is written to that file.
- In a `bash` block, each command must be `clip-po` with one of `RUN_HERE`, or `python examples/...`.
- A block that can't be run here is preceded by `<!-- not run: reason -->`.
- Blocks without a language, and those of other languages, are text.
"""

import json
import re
import runpy
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path

import datasets
import pytest
import yaml
from dual_encoders import tiny_dual_encoder
from samples import CLASSES, PROMPTS, make_preferences, picture

from clip_po.cli.main import main
from clip_po.cli.outcome import UNCHANGED
from clip_po.config import ContrastivePOConfig
from clip_po.trainer import ContrastivePOTrainer
from clip_po.training import sharding

ROOT = Path(__file__).parents[1]
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if page.exists()]
EXAMPLES = ROOT / "examples"

# What the pages call it, and the fixture that stands in for it.
STAND_INS = {
    "openai/clip-vit-base-patch32": "clip_folder",
    "openai/clip-vit-large-patch14": "clip_folder",
    "google/siglip2-base-patch16-224": "siglip_folder",
    "path/to/photos": "photos",
    "path/to/images": "unlabelled",
    "path/to/answers": "answers",
    "path/to/pairs": "pairs",
    "path/to/votes": "votes",
    "your/dataset": "photos",
}
# Commands of clip-po that the pages may run.
RUN_HERE = ("train", "evaluate", "compare", "steer", "score", "convert")
# Added to every command of that name; the last flag of a name wins.
OVERRIDES = {
    "clip-po train": "--max_steps 2 --per_device_train_batch_size 4 --gradient_accumulation_steps 1 "
    "--dataloader_num_workers 0",
    "clip-po evaluate": "--batch_size 8 --num_workers 0",
    "clip-po compare": "--seeds 0 --batch_size 8",
    "clip-po steer": "--max_steps 2 --per_device_train_batch_size 4 --per_device_eval_batch_size 8",
    "typographic.py": "--max_steps 2 --per_device_train_batch_size 4",
    "label_free.py": "--max_steps 2 --per_device_train_batch_size 4",
    "per_text.py": "--max_steps 2 --per_device_train_batch_size 4",
    "annotations.py": "--max_steps 2 --per_device_train_batch_size 4",
    "steer.py": "--max_steps 2 --per_device_train_batch_size 4",
    "steer_gender.py": "--max_steps 2 --per_device_train_batch_size 4",
}
# What a recipe of clip-po compare gets besides, by its parts: training of any kind is cut short.
SHORT_TRAINING = {"max_steps": 2, "per_device_train_batch_size": 4}
SHORT_METHODS = {
    "defense_prefix": {"steps": 2, "batch_size": 4},
    "spelling_projection": {"steps": 2, "batch_size": 4},
    "head_ablation": {"max_heads": 1},
}
# How each example is run. A new one needs a line here.
EXAMPLE_COMMANDS = {
    "typographic.py": "python examples/typographic.py --model openai/clip-vit-base-patch32 --dataset path/to/photos "
    "--output_dir aligned",
    "label_free.py": "python examples/label_free.py --model openai/clip-vit-base-patch32 --dataset path/to/images "
    "--class_names cat dog bird ship --output_dir aligned",
    "per_text.py": "python examples/per_text.py --model openai/clip-vit-base-patch32 --dataset path/to/photos "
    "--output_dir aligned",
    "image_pairs.yaml": "clip-po train --config image_pairs.yaml",
    "unpaired.yaml": "clip-po train --config unpaired.yaml",
    "annotations.py": "python examples/annotations.py --model openai/clip-vit-base-patch32 "
    "--answers path/to/answers/answers.csv --text caption_1 caption_2 --output_dir aligned",
    "steer.py": "python examples/steer.py --model openai/clip-vit-base-patch32 --dataset path/to/photos "
    "--output_dir aligned",
    # What is labelled there are kinds of things; faces would be labelled alike.
    "steer_gender.py": "python examples/steer_gender.py --model openai/clip-vit-base-patch32 "
    "--dataset path/to/photos --attribute label --attribute_names bird cat dog ship --reg_dataset path/to/images "
    "--reg_image_column image --top_k 2 --t 0 1 --other_texts 'a car' --output_dir aligned",
    "recipes/fairface_gender.yaml": "python examples/steer_gender.py "
    f"--config {EXAMPLES}/recipes/fairface_gender.yaml --other_texts 'a car' "
    "--model openai/clip-vit-base-patch32 --dataset path/to/photos --train_split train --test_split test "
    "--attribute label --attribute_names bird cat dog ship --reg_dataset path/to/images --reg_image_column image "
    "--top_k 2 --output_dir aligned",
    "train.yaml": "clip-po train --config train.yaml",
    "compare.yaml": "clip-po compare --config compare.yaml",
    # As they stand, on other data: flags win over the file.
    **{
        f"recipes/imagenet100_{method}.yaml": f"clip-po train --config {EXAMPLES}/recipes/imagenet100_{method}.yaml "
        "--model_name_or_path openai/clip-vit-base-patch32 --dataset_name path/to/photos --output_dir aligned"
        for method in ("ce", "dpo", "ipo", "kto")
    },
}
# What each example leaves, where it is not aligned/model.safetensors.
EXAMPLE_RESULTS = {"compare.yaml": "comparison/report.html"}
# What each example prints.
EXAMPLE_PRINTS = {
    "typographic.py": ["clean", "typographic", "recovery", "clean cost"],
    "steer.py": ["right - reading (points)", "| -2   |", "| 0.25 |"],
    "steer_gender.py": ["label named |", "max_skew@2 |", "| 1   |"],
    "per_text.py": ["Pairs in which the photograph of the thing wins: "],
    "image_pairs.yaml": ["Found preferences between images: 7 rows. Training with loss_type sigmoid,"],
    "unpaired.yaml": ["Found unpaired feedback: 8 rows. Training with loss_type kto,"],
    "annotations.py": ["pairwise_accuracy", "| before |", "| after  |"],
    "label_free.py": ["Answers that a word does not change: ", "Clean answers that changed: "],
    "compare.yaml": ["| text removal", "| label-free, soft", "| interpolation of CE", "No method has a recovery"],
}
# What a page leaves in its folder.
PROMISES = {
    "bias.md": ["bias/report.json"],
    "feedback.md": [
        *(f"from-{kind}/model.safetensors" for kind in ("texts", "images", "votes")),
        "mixed/model.safetensors",
    ],
    "quickstart.md": [
        "aligned/model.safetensors",
        "long/README.md",
        "adapter/adapter_config.json",
        "merged/model.safetensors",
        "merged/tokenizer.json",
        "aligned-cli/evaluation/photos*-test/*/report.json",
        "aligned-cli/evaluation/*/*/before_after.png",
        "measured/report.json",
        "aligned-cli/evaluation/*/*/report.html",
        "measured/answers.parquet",
        "measured/classes.csv",
        "unlabelled-cli/model.safetensors",
        "bounded/model.safetensors",
        "stopped/model.safetensors",
        "averaged/model.safetensors",
    ],
    "score.md": ["cats.jsonl", "labels.csv", "scores.parquet"],
    "agreement.md": ["agreement/report.json", "agreement/reliability.csv", "agreement/reliability.png"],
    "steer.md": [
        "steered-photos/concept.safetensors",
        "steered-photos/checkpoint/model.safetensors",
        "steered-photos/report.json",
        "steered-photos/curve.png",
        "swept/report.json",
        "steered-python/concept.safetensors",
        "steered-python/plain/model.safetensors",
    ],
    "models.md": ["aligned-siglip/model.safetensors", "aligned-siglip/evaluation/*/*/report.json"],
    "open_clip.md": ["for-open-clip/open_clip_model.safetensors", "converted/model.safetensors"],
    "compare.md": [
        "comparison/report.json",
        "comparison/report.html",
        "comparison/table.md",
        "comparison/trade_off.png",
        "comparison/CE/seed-0/result.json",
        "comparison/CE/seed-0/answers.npz",
        "comparison/CE/seed-0/checkpoint/model.safetensors",
    ],
}

FENCE = re.compile(
    r"(?P<skip>^ *<!-- *not run(?P<reason>.*?)-->\n+)?^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    code: str
    line: int
    skipped: bool = False
    reason: str = ""


def blocks_of(text):
    found = []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("code"))
        reason = (match["reason"] or "").strip().removeprefix(":").strip()
        code = textwrap.dedent(match["code"])
        found.append(Block(match["language"], code, line, match["skip"] is not None, reason))
    return found


def commands_of(code):
    joined = code.replace("\\\n", " ").splitlines()
    return [words for line in joined if (words := shlex.split(line.removeprefix("$ "), comments=True))]


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of pictures, as in the pages: train/<class>/*.png, and validation and test likewise."""
    folder = tmp_path_factory.mktemp("photos")
    for split, count in (("train", 12), ("validation", 4), ("test", 8)):
        for number in range(count):
            file = folder / split / CLASSES[number % len(CLASSES)] / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture(number).save(file)
    return folder


@pytest.fixture(scope="session")
def unlabelled(tmp_path_factory):
    """A folder of 24 pictures without classes: train/*.png."""
    folder = tmp_path_factory.mktemp("unlabelled")
    (folder / "train").mkdir()
    for number in range(24):
        picture(number).save(folder / "train" / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def answers(tmp_path_factory):
    """A folder of 20 pictures with a table of answers, two for each picture."""
    folder = tmp_path_factory.mktemp("answers")
    lines = ["image,caption_1,caption_2,annotator,answer"]
    for number in range(20):
        picture(number).save(folder / f"{number}.png")
        question = f"{number}.png,{PROMPTS[number % 4]},{PROMPTS[(number + 1) % 4]}"
        lines += [f"{question},ann,caption_1", f"{question},bob,{'tie' if number % 3 == 0 else 'caption_1'}"]
    (folder / "answers.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def siglip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-siglip")
    tiny_dual_encoder("siglip", folder)
    return folder


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """A folder of pictures with a table of preferences between them."""
    folder = tmp_path_factory.mktemp("pairs")
    for number in range(16):
        picture(number).save(folder / f"{number}.png")
    rows = [{"text": PROMPTS[n % 4], "chosen_image": f"{n}.png", "rejected_image": f"{n + 8}.png"} for n in range(8)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def votes(tmp_path_factory):
    """A folder of pictures with a table of texts that are right or wrong."""
    folder = tmp_path_factory.mktemp("votes")
    lines = ["image,text,label"]
    for number in range(8):
        picture(number).save(folder / f"{number}.png")
        lines.append(f"{number}.png,{PROMPTS[number % 4]},{number % 2 == 0}")
    (folder / "train.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def localized(request, tmp_path, tmp_path_factory, monkeypatch):
    """An empty current folder, and a function that puts local folders for the names in a text."""
    cache = tmp_path_factory.getbasetemp() / "datasets-cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    folders = {fixture: request.getfixturevalue(fixture) for fixture in STAND_INS.values()}

    def localize(text):
        for name, fixture in STAND_INS.items():
            text = text.replace(name, str(folders[fixture]))
        return text

    return localize


def shorten(recipe):
    """Cut the training of a recipe of `clip-po compare` short."""
    found = yaml.safe_load(recipe.read_text())
    found["training"] = {**found.get("training", {}), **SHORT_TRAINING}
    for settings in found["methods"].values():
        settings.update(SHORT_METHODS.get(settings.get("method"), {}))
    recipe.write_text(yaml.safe_dump(found, sort_keys=False))


def run_command(words, localize, monkeypatch):
    words = [localize(word) for word in words]
    if words[0] == "clip-po" and words[1] in RUN_HERE:
        if words[1] == "compare":
            shorten(Path(words[words.index("--config") + 1]))
        assert main([*words[1:], *OVERRIDES.get(" ".join(words[:2]), "").split()]) in (0, UNCHANGED), " ".join(words)
    elif words[0] == "python" and words[1].startswith("examples/"):
        script = ROOT / words[1]
        with monkeypatch.context() as patch:
            patch.setattr("sys.argv", [str(script), *words[2:], *OVERRIDES.get(script.name, "").split()])
            runpy.run_path(str(script), run_name="__main__")
    else:
        pytest.fail(f"{' '.join(words)!r} can't be run here; write '<!-- not run: reason -->' before its block.")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_runs(page, localized, monkeypatch):
    monkeypatch.setattr(sharding, "SHARDING_IS_EXACT", True)  # the page on several processes shards nothing
    namespace = {"__name__": f"docs_{page.stem}"}
    for block in blocks_of(page.read_text()):
        where = f"{page.name}:{block.line}"
        if block.skipped:
            assert len(block.reason.split()) >= 2, f"{where}: say why in '<!-- not run: reason -->'."
            if block.language == "python":
                compile(block.code, where, "exec")
        elif block.language == "python":
            # Empty lines before it, so that a traceback names the line of the page.
            exec(compile("\n" * block.line + localized(block.code), str(page), "exec"), namespace)
        elif block.language == "yaml" and (name := re.match(r"# (\S+\.ya?ml)\n", block.code)):
            Path(name[1]).write_text(localized(block.code))
        elif block.language in ("bash", "sh", "shell", "console"):
            for words in commands_of(block.code):
                run_command(words, localized, monkeypatch)
    assert [file for file in PROMISES.get(page.name, ()) if not any(Path().glob(file))] == []


@pytest.mark.parametrize("page", [*PAGES, EXAMPLES / "README.md"], ids=lambda page: f"{page.parent.name}-{page.name}")
def test_links_lead_somewhere(page):
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if re.match(r"\w+:", target):
            continue
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor and file.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", file.read_text(), flags=re.MULTILINE)
            known = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in known, f"{page.name} links to {target}"


@pytest.mark.parametrize(
    "example",
    sorted(
        str(p.relative_to(EXAMPLES))
        for p in EXAMPLES.rglob("*")
        if p.suffix in (".py", ".yaml") and p.parent.name != "accelerate_configs"  # by tests/test_sharding.py
    ),
)
def test_example_runs(example, localized, monkeypatch, capsys):
    assert example in EXAMPLE_COMMANDS, f"Say in EXAMPLE_COMMANDS how examples/{example} is run."
    words = shlex.split(EXAMPLE_COMMANDS[example])
    if example in words:
        Path(example).write_text(localized((EXAMPLES / example).read_text()))
    run_command(words, localized, monkeypatch)
    assert Path(EXAMPLE_RESULTS.get(example, "aligned/model.safetensors")).is_file()
    printed = capsys.readouterr().out
    assert [text for text in EXAMPLE_PRINTS.get(example, ()) if text not in printed] == []


def table_under(page, heading):
    """The code spans in the first column of the first table under a heading."""
    section = page.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [
        span for row in re.findall(r"^\| (`[^|]*) \|", section, re.MULTILINE) for span in re.findall(r"`(.+?)`", row)
    ]


def test_every_logged_metric_is_explained_and_no_other(clip_folder, tmp_path):
    args = ContrastivePOConfig(str(tmp_path), max_steps=1, logging_steps=1, save_strategy="no", report_to="none")
    trainer = ContrastivePOTrainer(
        str(clip_folder), args=args, train_dataset=make_preferences(4), candidate_texts=PROMPTS
    )
    trainer.train()
    logged = set(trainer.state.log_history[0]) - {"step"}
    assert set(table_under(ROOT / "docs" / "quickstart.md", "What is logged")) == logged


def test_every_quoted_message_is_one_of_the_package():
    source = "\n".join(path.read_text() for path in (ROOT / "clip_po").rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", source)
    quoted = table_under(ROOT / "docs" / "quickstart.md", "Common errors")
    assert len(quoted) > 10
    assert [part for message in quoted for part in message.split("...") if part.strip() not in joined] == []


def test_a_block_that_is_not_run_is_found_with_its_reason():
    page = (
        "<!-- not run: needs a network -->\n```bash\npip install x\n```\n\n"
        "```python\na = 1\n```\n<!-- not run -->\n```sh\nb\n```\n"
    )
    first, second, third = blocks_of(page)
    assert (first.skipped, first.reason, second.skipped) == (True, "needs a network", False)
    assert (third.skipped, third.reason) == (True, "")
    assert (second.code, second.line) == ("a = 1\n", 6)


def test_commands_are_joined_at_backslashes_and_lose_their_comments():
    assert commands_of("$ clip-po train \\\n  --beta 1.0  # DPO\n# nothing\nmake test\n") == [
        ["clip-po", "train", "--beta", "1.0"],
        ["make", "test"],
    ]
