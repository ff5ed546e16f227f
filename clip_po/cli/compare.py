"""clip-po compare: several methods and seeds on one model and data set, in one table, going on where it stopped."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CLIPProcessor
from transformers.utils import logging
from trl import TrlParser

from clip_po.cli.arguments import DEFAULT_TEMPLATE, TaskArguments, flag_value, read_recipe
from clip_po.cli.compare_methods import METHODS, WITHOUT_SEED, Contest, Contestant, make
from clip_po.data.attacks.fonts import training_fonts, unseen_fonts
from clip_po.evaluation.bootstrap import Estimate
from clip_po.evaluation.comparison import Results, comparison_table, pooled
from clip_po.evaluation.report.before_after import changes_line, choose_examples
from clip_po.evaluation.report.figures import save_figure
from clip_po.evaluation.report.page import report_page, write_page
from clip_po.evaluation.report.plots import cost_plot, format_seconds, trade_off_plot
from clip_po.evaluation.report.report_file import read_report, write_report
from clip_po.evaluation.robustness import (
    BLANK,
    VARIANTS,
    RobustnessImages,
    evaluate_robustness,
    robustness_report,
)
from clip_po.validation import check_writable

BASE = "before"
PARTS = ("methods", "attacks", "training")
"""What a recipe says beside flags: settings by method, settings by attack, settings of all that is trained."""

DEFAULT_ATTACKS: Mapping[str, Mapping[str, Any]] = {"class words": {}}


@dataclass
class CompareArguments(TaskArguments):
    """Arguments of `clip-po compare`; what is compared stands in the recipe."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "The model before alignment."})
    output_dir: str | None = field(default=None, metadata={"help": "Where results, report, table and plots go."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Each method runs with each of them."})
    dataset_validation_split: str | None = field(
        default=None, metadata={"help": "Split to choose on, none of whose rows are trained on."}
    )
    max_test_samples: int | None = field(default=None, metadata={"help": "Measure on that many test images."})
    max_clean_cost: float = field(
        default=0.5, metadata={"help": "Points of clean accuracy that the best method may cost."}
    )
    renderings: int = field(default=1, metadata={"help": "How often each test image is attacked."})
    batch_size: int = field(default=256, metadata={"help": "Images a forward."})
    test_seed: int = field(default=1000, metadata={"help": "Seed of the attacks on test images."})


@dataclass(frozen=True)
class Recipe:
    """What is compared: settings by name."""

    methods: Mapping[str, Mapping[str, Any]]
    attacks: Mapping[str, Mapping[str, Any]]
    training: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Refuse what can't run before the first method does."""
        for part, settings in (("methods", self.methods), ("attacks", self.attacks)):
            if not isinstance(settings, Mapping) or not all(isinstance(s, Mapping) for s in settings.values()):
                raise ValueError(
                    f"{part} must name settings by name, such as DPO: {{loss_type: sigmoid}}, or {{}} for none; got "
                    f"{settings!r}."
                )
        if not isinstance(self.training, Mapping):
            raise ValueError(f"training must hold flags of clip-po train and their values, got {self.training!r}.")
        if not self.methods:
            raise ValueError("The recipe names no methods; give at least one under methods:, such as DPO: {}.")
        names = list(self.methods)
        for name, settings in self.methods.items():
            method, of = settings.get("method", "train"), settings.get("of")
            if method not in METHODS:
                raise ValueError(f"methods: {name!r} has method {method!r}; there are {sorted(METHODS)}.")
            if method == "interpolation" and of not in names[: names.index(name)]:
                raise ValueError(
                    f"methods: {name!r} interpolates towards {of!r}, which is no method above it. Name one by of:."
                )


def parse(argv: Sequence[str]) -> tuple[CompareArguments, Recipe]:
    """The arguments and the recipe: flags over the YAML file."""
    file = flag_value("config", argv)
    if file is None:
        raise ValueError("--config is missing: a YAML recipe with methods; examples/compare.yaml is one.")
    found = read_recipe(file)
    recipe = Recipe(
        **{"attacks": DEFAULT_ATTACKS, "methods": {}, "training": {}, **{k: found.pop(k) for k in PARTS if k in found}}
    )
    parser = TrlParser([CompareArguments], prog="clip-po compare")
    if unknown := set(found) - {action.dest for action in parser._actions}:
        raise ValueError(f"{file} has the keys {sorted(unknown)}, which are neither flags nor one of {PARTS}.")
    parser.set_defaults(**found)
    position = next(i for i, word in enumerate(argv) if word.startswith("--config"))
    rest = [*argv[:position], *argv[position + (1 if "=" in argv[position] else 2) :]]
    (args,) = parser.parse_args_into_dataclasses(rest)
    return args, recipe


def runs(args: CompareArguments, recipe: Recipe) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    """Every method with every seed, a seed at a time; what draws nothing once."""
    for seed in args.seeds:
        for name, settings in recipe.methods.items():
            if settings.get("method") not in WITHOUT_SEED or seed == args.seeds[0]:
                yield name, seed, settings


def contest_of(args: CompareArguments, recipe: Recipe) -> Contest:
    """Model and data that all methods start from."""
    processor = CLIPProcessor.from_pretrained(args.model_name_or_path, trust_remote_code=False)
    dataset = args.load(args.dataset_train_split, 0)
    names = args.names(dataset)
    template = args.prompt_template or DEFAULT_TEMPLATE
    shared = {name: getattr(args, name) for name in SHARED}
    quiet = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    own = {"model_name_or_path": args.model_name_or_path, "class_names": names, "prompt_template": template}
    return Contest(
        str(args.model_name_or_path),
        processor,
        dataset,
        args.load(str(args.dataset_validation_split), 0),
        names,
        template,
        args.image_column,
        args.label_column,
        lambda seed: args.attack(names, training_fonts(), processor, seed),
        {**shared, **own, **quiet, **recipe.training},
        Path(str(args.output_dir)),
        args.batch_size,
    )


SHARED = (
    "dataset_name",
    "dataset_config",
    "dataset_train_split",
    "dataset_validation_split",
    "image_column",
    "label_column",
    "max_samples",
    "attack_words",
    "attack_other_words",
    "attack_other_share",
    "attack_count",
    "name_until",
    "attack_size",
    "attack_places",
    "attack_rotation",
    "attack_sticker",
)
"""Flags that the methods share with `clip-po train`."""


def test_images(args: CompareArguments, recipe: Recipe, contest: Contest) -> dict[str, RobustnessImages]:
    """The test images by attack, in fonts that no training saw; the first attack with a blank box too."""
    test = replace(args, max_samples=args.max_test_samples).load(args.dataset_test_split, 0)
    attack = args.attack(contest.class_names, unseen_fonts(), contest.processor, args.test_seed)
    images: dict[str, RobustnessImages] = {}
    for name, settings in recipe.attacks.items():
        images[name] = RobustnessImages(
            test,
            replace(attack, **settings),
            contest.processor,
            contest.class_names,
            image_column=args.image_column,
            label_column=args.label_column,
            renderings=args.renderings,
            variants=VARIANTS if images else (*VARIANTS, BLANK),
            keep_bytes=2**30,
        )
    return images


def judge(
    contest: Contest, contestant: Contestant, images: Mapping[str, RobustnessImages]
) -> dict[str, dict[str, np.ndarray]]:
    """What a contestant answers, by attack and variant."""
    answers = {}
    for attack, seen in images.items():
        if contestant.processor is not seen.processor:
            seen = seen.with_processor(contestant.processor)
        embeds = None if contestant.class_embeds is None else {"it": contestant.class_embeds}
        found = evaluate_robustness(
            {"it": contestant.model},
            seen,
            [contest.template],
            class_embeds=embeds,
            batch_size=contest.batch_size,
            disable_tqdm=True,
        )
        answers[attack] = dict(found.predictions_of("it"))
    return answers


def main(argv: Sequence[str]) -> None:
    """Run what has not run yet, print the table, and write report.json, report.html, table.md and plots."""
    args, recipe = parse(argv)
    if args.attack_fonts is not None:
        raise ValueError(
            "--attack_fonts would be those of training and of the test images alike. Leave it out, or give "
            "fonts under attacks: in the recipe."
        )
    for name in ("model_name_or_path", "output_dir", "dataset_validation_split"):
        if getattr(args, name) is None:
            raise ValueError(f"--{name} is missing: give it as a flag or in the recipe.")
    start, folder = time.time(), Path(str(args.output_dir))
    check_writable(folder, "--output_dir")
    logging.disable_progress_bar()  # of loading and saving models, which would stand between the lines
    contest = contest_of(args, recipe)
    images = test_images(args, recipe, contest)
    settings = {"training": recipe.training, "attacks": recipe.attacks, **_of_all(args)}
    results = Results(folder, settings)
    if results.find(BASE, 0, {}) is None:
        results.add(BASE, 0, {}, judge(contest, Contestant(contest.base(), contest.processor), images), 0.0, {})
    everything = list(runs(args, recipe))
    for number, (name, seed, method) in enumerate(everything, 1):
        if results.find(name, seed, method) is not None:
            continue
        print(f"[{number}/{len(everything)}] {name}, seed {seed} ... ", end="", flush=True)
        began = time.time()
        torch.manual_seed(seed)
        log = results.path(name, seed) / "log.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as stream, contextlib.redirect_stdout(stream):
            contestant = make(contest, name, seed, **method)
        seconds = time.time() - began
        results.add(name, seed, method, judge(contest, contestant, images), seconds, contestant.details)
        print(format_seconds(seconds), flush=True)
    show(args, recipe, results, images, time.time() - start)


def _of_all(args: CompareArguments) -> dict[str, Any]:
    """The arguments that every result depends on."""
    free = ("output_dir", "seeds", "max_clean_cost", "batch_size")
    return {name: value for name, value in asdict(args).items() if name not in free}


def show(
    args: CompareArguments,
    recipe: Recipe,
    results: Results,
    images: Mapping[str, RobustnessImages],
    seconds: float,
) -> None:
    """Print the table; write it with report, plots and page."""
    first = next(iter(images))
    seeds = {name: [s for n, s, _ in runs(args, recipe) if n == name] for name in recipe.methods}
    took = {
        name: float(np.mean([(results.find(name, s, recipe.methods[name]) or {})["seconds"] for s in seeds[name]]))
        for name in recipe.methods
    }
    found: dict[str, dict[str, Estimate]] = {BASE: {}, **{name: {} for name in recipe.methods}}
    for attack, seen in images.items():
        said = {name: [results.answers(name, s, attack) for s in seeds[name]] for name in recipe.methods}
        base = [results.answers(BASE, 0, attack)]
        for name in found:
            answers = pooled(seen, {BASE: base, **({name: said[name]} if name != BASE else {})})
            metrics = robustness_report(answers, name, BASE)
            if name != BASE and len(seeds[name]) > 1 and attack == first:
                each = [
                    robustness_report(pooled(seen, {BASE: base, name: [one]}), name, BASE, resamples=1)
                    for one in said[name]
                ]
                metrics["recovery_sd"] = Estimate(float(np.std([r["recovery"].value for r in each], ddof=1)))
            prefix = "" if attack == first else f"{attack}: "
            found[name] |= {f"{prefix}{metric}": estimate for metric, estimate in metrics.items()}
    table = comparison_table(found, took, list(images))
    best = max(
        recipe.methods,
        key=lambda n: (found[n]["clean_cost"].value <= args.max_clean_cost, found[n]["recovery"].value),
    )
    print(f"\n{table}\n\n{len(images[first])} test images, {len(args.seeds)} seeds; in brackets 95% intervals.")
    print(f"Highest recovery at no more than {args.max_clean_cost:g} points of clean accuracy: {best}")

    folder = Path(str(args.output_dir))
    (folder / "table.md").write_text(table + "\n")
    report = write_report(
        folder / "report.json",
        command="compare",
        models=found,
        settings={**asdict(args), **asdict(recipe)},
        data={
            "name": args.dataset_name,
            "split": args.dataset_test_split,
            "rows": len(images[first]),
            "class_names": images[first].class_names,
            "seconds": took,
        },
        seconds=seconds,
    )
    accuracies = {name: (m["clean_accuracy"], m["typographic_accuracy"]) for name, m in found.items()}
    figures = {
        "Clean against typographic accuracy, with 95% intervals": trade_off_plot(
            accuracies, base=BASE, allowed_cost=args.max_clean_cost
        ),
    }
    recoveries = {
        name: m["recovery"] for name in recipe.methods if math.isfinite((m := found[name])["recovery"].value)
    }
    if recoveries:
        seconds_of = {name: took[name] for name in recoveries}
        figures["Recovery against what each method takes"] = cost_plot(seconds_of, recoveries)
    for file, figure in zip(("trade_off", "seconds"), figures.values(), strict=False):
        save_figure(figure, folder / f"{file}.png")
    answers = pooled(
        images[first],
        {BASE: [results.answers(BASE, 0, first)], best: [results.answers(best, seeds[best][0], first)]},
    )
    page = report_page(
        read_report(report),
        examples=choose_examples(answers, BASE, best),
        picture=images[first].picture,
        changes=changes_line(answers, BASE, best),
        figures=figures,
    )
    print(f"Report: {report}\nPage:   {write_page(folder / 'report.html', page)}")
