"""clip-po evaluate --suite: the field's datasets by name, each measured on what could be loaded of it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from clip_po.cli.arguments import DEFAULT_TEMPLATE
from clip_po.cli.evaluate_arguments import EvaluateArguments
from clip_po.cli.evaluate_common import Measurement, Models, load_together, measurable_rows
from clip_po.data.attacks.fonts import unseen_fonts
from clip_po.evaluation.bootstrap import Estimate
from clip_po.evaluation.evaluator import Metrics, RetrievalEvaluator, RobustnessEvaluator
from clip_po.evaluation.retrieval import KS
from clip_po.evaluation.robustness import Answers, RobustnessImages
from clip_po.evaluation.suites.layouts import LAYOUTS
from clip_po.evaluation.suites.photographs import (
    accuracy_report,
    ask_photographs,
    attacked_rows,
    candidate_sets,
    mean_report,
)
from clip_po.evaluation.suites.suite import Entry, Suite, entry_source, load_entry, load_suite
from clip_po.evaluation.tables import format_table

_RECALLS = {
    f"{way}_recall@{k}": f"{short}@{k}"
    for way, short in (("image_to_text", "image to text"), ("text_to_image", "text to image"))
    for k in KS
}
COLUMNS: Mapping[str, Mapping[str, str]] = {
    "typographic": {
        "clean_accuracy": "clean",
        "typographic_accuracy": "typographic",
        "fooled": "fooled",
        "difference": "against base (points)",
    },
    "retention": {"clean_accuracy": "clean", "difference": "against base (points)"},
    "retrieval": {**_RECALLS, "mean_recall_difference": "against base (points)"},
}
"""Metrics of the table by kind of suite, with the headers of their columns."""


@dataclass
class SuiteResult:
    """The result of one dataset of a suite.

    Attributes:
        about: The dataset as report.json describes it; "missing" gives the reason if it could not be loaded.
        rows: Candidate set, number of images and metrics by model, one row per candidate set.
        clean: Answers on clean images, if the mean of a retention suite includes them.
        answers: Answers of the models, by dataset and candidate set, as the names of their files begin.
    """

    about: dict[str, Any]
    rows: list[tuple[str, int, Metrics]] = field(default_factory=list)
    clean: Answers | None = None
    answers: dict[str, Answers] = field(default_factory=dict)


def chosen_suite(args: EvaluateArguments) -> Suite:
    """Return the suite that the arguments name; with --dataset_name, its measurement on that dataset only.

    Raises:
        ValueError: As for `load_suite`, or if --suite_folder is not a folder.
    """
    suite = load_suite(str(args.suite))
    if args.suite_folder is not None and not Path(args.suite_folder).is_dir():
        raise ValueError(
            f"--suite_folder {args.suite_folder!r} is not a folder. Give the one with a folder for each dataset."
        )
    if args.dataset_name is not None:
        captioned = suite.measures == "retrieval"
        own = Entry(
            name=Path(args.dataset_name).name,
            path=args.dataset_name,
            layout="captioned" if captioned else "labelled",
            templates=["{}" if captioned else DEFAULT_TEMPLATE],
            class_names=args.class_names,
            source="--dataset_name",
            license=None,
            config=args.dataset_config,
            split=args.dataset_test_split,
            columns={"image": args.image_column, "label": args.label_column, "caption": args.caption_column},
        )
        suite = replace(suite, entries=(own,))
    if args.prompt_template is not None:
        entries = tuple(replace(entry, templates=args.prompt_template) for entry in suite.entries)
        suite = replace(suite, entries=entries)
    return suite


def measure_suite(args: EvaluateArguments, suite: Suite, models: Models) -> Measurement:
    """Measure all datasets of a suite that can be loaded.

    Args:
        args: Arguments of the command.
        suite: From `chosen_suite`.
        models: The models.

    Returns:
        The measurement. It failed if no dataset could be loaded.
    """
    results = [measure_entry(args, suite, entry, models) for entry in suite.entries]
    metrics = suite_metrics(results, models)
    failure = (
        f"None of the {len(suite.entries)} datasets could be loaded. The report gives the reasons. Give local copies "
        "with --suite_folder DIR, each in a folder with the name of its entry (docs/suites.md)."
    )
    return Measurement(
        metrics=metrics,
        table=suite_table(suite, results, metrics),
        data={"suite": suite.name, "measures": suite.measures, "entries": [result.about for result in results]},
        settings=asdict(args),
        name=suite.name,
        answers={prefix: answers for result in results for prefix, answers in result.answers.items()},
        failure="" if any(result.rows for result in results) else failure,
    )


def measure_entry(args: EvaluateArguments, suite: Suite, entry: Entry, models: Models) -> SuiteResult:
    """Load and measure one dataset, or return the reason why it is missing."""
    result = SuiteResult(asdict(entry))
    dataset, reason = load_together(lambda: _load(args, entry), models.accelerator)
    if dataset is None:
        result.about["missing"] = reason
        return result
    result.about["loaded_from"], result.about["rows_there"] = entry_source(entry, args.suite_folder), len(dataset)
    if entry.layout in LAYOUTS:
        _measure_photographs(args, entry, dataset, models, result)
        return result
    dataset = _part(args, dataset, models, result)
    if entry.layout == "captioned":
        _measure_retrieval(args, entry, dataset, models, result)
    elif suite.measures == "typographic":
        _measure_attack(args, entry, dataset, models, result)
    else:
        _measure_clean(args, entry, dataset, models, result)
    return result


def _load(args: EvaluateArguments, entry: Entry) -> Dataset:
    dataset = load_entry(entry, args.suite_folder)
    if not len(dataset):
        raise ValueError(f"The split {entry.split!r} is empty.")
    return dataset


def _part(args: EvaluateArguments, dataset: Dataset, models: Models, result: SuiteResult) -> Dataset:
    """Return the rows to measure: all, or a sample of --max_samples; under --on_bad_image skip the readable ones."""
    if args.max_samples is not None and args.max_samples < len(dataset):
        dataset = dataset.shuffle(seed=args.seed).select(range(args.max_samples))
    rows = measurable_rows(args, dataset, "image", models.accelerator)
    result.about["rows_measured"], result.about["skipped_rows"] = len(rows), len(dataset) - len(rows)
    return rows


def _measure_photographs(
    args: EvaluateArguments, entry: Entry, dataset: Dataset, models: Models, result: SuiteResult
) -> None:
    # From all rows: a sample may lack candidates.
    candidates = candidate_sets(dataset, entry.candidates)
    described = {kind: _described(kind, names) for kind, names in candidates.items()}
    result.about["candidates"] = list(described.values())
    if entry.variant == "typographic":
        written = [row for row, word in enumerate(dataset["word"]) if word]
        result.about["rows_without_word"] = len(dataset) - len(written)
        dataset = dataset.select(written)
    dataset = _part(args, dataset, models, result)
    for kind, answers in _ask(args, entry, dataset, candidates, entry.variant, models).items():
        metrics = {name: accuracy_report(answers, name, models.base, entry.variant) for name in models.by_name}
        described[kind]["attacked"] = int(attacked_rows(answers).sum())
        result.rows.append((_label(kind, candidates[kind]), len(dataset), metrics))
        result.answers[f"{entry.name}-{kind}-"] = answers


def _measure_clean(
    args: EvaluateArguments, entry: Entry, dataset: Dataset, models: Models, result: SuiteResult
) -> None:
    names = dataset.features["label"].names
    result.about["candidates"] = [_described("all", names)]
    result.clean = _ask(args, entry, dataset, {"all": names}, "clean", models)["all"]
    result.answers[f"{entry.name}-"] = result.clean
    metrics = {name: accuracy_report(result.clean, name, models.base, "clean") for name in models.by_name}
    result.rows.append((_label("all", names), len(dataset), metrics))


def _ask(
    args: EvaluateArguments,
    entry: Entry,
    dataset: Dataset,
    candidates: Mapping[str, Sequence[str]],
    variant: str,
    models: Models,
) -> dict[str, Answers]:
    return ask_photographs(
        models.by_name,
        models.processor,
        dataset,
        candidates,
        entry.templates,
        variant=variant,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        accelerator=models.accelerator,
        title=entry.name,
    )


def _measure_attack(
    args: EvaluateArguments, entry: Entry, dataset: Dataset, models: Models, result: SuiteResult
) -> None:
    names = dataset.features["label"].names
    result.about["candidates"] = [_described("all", names)]
    attack = args.attack(names, unseen_fonts(), models.processor, args.seed)
    result.about["attack"] = asdict(attack)
    images = RobustnessImages(dataset, attack, models.processor, names, renderings=args.renderings)
    evaluator = RobustnessEvaluator(images, entry.templates, batch_size=args.batch_size, num_workers=args.num_workers)
    measured = evaluator.measure(models.by_name, accelerator=models.accelerator)
    answers, metrics = Answers.about(images, measured), models.report(evaluator, measured)
    result.answers[f"{entry.name}-"] = answers
    by_model = {name: {**metrics[name], **accuracy_report(answers, name, models.base)} for name in metrics}
    result.rows.append((_label("all", names), len(dataset), by_model))


def _measure_retrieval(
    args: EvaluateArguments, entry: Entry, dataset: Dataset, models: Models, result: SuiteResult
) -> None:
    evaluator = RetrievalEvaluator(
        dataset,
        models.processor,
        entry.templates,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        title=entry.name,
    )
    hits = evaluator.measure(models.by_name, accelerator=models.accelerator)
    texts = len(next(iter(hits.values())).image_of_text)
    result.about["candidates"] = [{"kind": "all texts", "count": texts}, {"kind": "all images", "count": len(dataset)}]
    metrics = models.report(evaluator, hits)
    result.rows.append((f"all ({texts:,} texts)", len(dataset), metrics))


def suite_metrics(results: Sequence[SuiteResult], models: Models) -> Metrics:
    """Return metrics by model under names such as "rta-100/pair/fooled", with the mean of a retention suite."""
    flat: Metrics = {name: {} for name in models.by_name}
    for result in results:
        for candidates, _, metrics in result.rows:
            place = f"{result.about['name']}/{candidates.split(' ')[0]}"
            for model, estimates in metrics.items():
                flat[model] |= {f"{place}/{metric}": estimate for metric, estimate in estimates.items()}
    clean = [result.clean for result in results if result.clean is not None]
    if clean:
        for model in models.by_name:
            flat[model] |= mean_report(clean, model, models.base)
    return flat


def suite_table(suite: Suite, results: Sequence[SuiteResult], metrics: Metrics) -> str:
    """Format a row for each dataset, candidate set and model, the mean of a retention suite, and missing datasets.

    Args:
        suite: The suite.
        results: One result per dataset.
        metrics: From `suite_metrics`.

    Returns:
        A Markdown table.
    """
    columns = COLUMNS[suite.measures]
    lines: list[list[Estimate | str | float | None]] = []
    for result in results:
        published, skipped = result.about["rows"], result.about.get("skipped_rows")
        for candidates, images, by_model in result.rows:
            part = f"{images:,} of {published:,} images" if published is not None and images != published else ""
            # Where none of a few images is fooled, the interval is [0, 0]: only the number shows how little is known.
            words = _attacked(result, candidates.split(" ")[0])
            few = f"fooled of {words:,}" if words is not None and words < images else ""
            note = ", ".join(filter(None, [part, few, f"{skipped:,} unreadable skipped" if skipped else ""]))
            for model, estimates in by_model.items():
                numbers = (estimates.get(metric) for metric in columns)
                lines.append([result.about["name"], candidates, images, model, *numbers, note])
    means = sum(result.clean is not None for result in results)
    for model, estimates in metrics.items():
        if "mean_accuracy" in estimates:
            mean = [estimates["mean_accuracy"], estimates.get("mean_difference")]
            lines.append([f"mean of {means}", None, None, model, *mean, ""])
    for result in results:
        if "missing" in result.about:
            reason = textwrap.shorten(result.about["missing"], 80, placeholder=" ...")
            lines.append([result.about["name"], None, None, None, *[None] * len(columns), f"missing: {reason}"])
    return format_table(["data", "candidates", "images", "model", *columns.values(), "note"], lines)


def _attacked(result: SuiteResult, kind: str) -> int | None:
    """Return the number of images that `fooled` is a share of; None if it is not measured on photographs."""
    if result.about["variant"] != "typographic":
        return None
    return next((found.get("attacked") for found in result.about["candidates"] if found["kind"] == kind), None)


def _described(kind: str, names: Sequence[str]) -> dict[str, Any]:
    return {"kind": kind, "count": 2 if kind == "pair" else len(names), "names": list(names)}


def _label(kind: str, names: Sequence[str]) -> str:
    return kind if kind == "pair" else f"{kind} ({len(names):,})"
