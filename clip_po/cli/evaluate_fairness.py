"""clip-po evaluate --fairness: which groups of images a model ranks first for queries that name no group."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from clip_po.cli.arguments import DEFAULT_TEMPLATE
from clip_po.cli.evaluate_arguments import EvaluateArguments
from clip_po.cli.evaluate_common import Measurement, Models, load_together, measurable_rows
from clip_po.data.class_labels import column_texts, read_labels
from clip_po.data.images import read_images
from clip_po.evaluation.bootstrap import Estimate
from clip_po.evaluation.evaluator import Metrics
from clip_po.evaluation.fairness.evaluator import FairnessEvaluator
from clip_po.evaluation.fairness.metrics import skew_at_k, top_k
from clip_po.evaluation.fairness.queries import Queries, load_queries
from clip_po.evaluation.fairness.report import chance_level
from clip_po.evaluation.fairness.scores import read_attribute
from clip_po.evaluation.suites.suite import Entry, Suite, load_faces
from clip_po.evaluation.tables import format_table
from clip_po.evaluation.zero_shot import CleanImages

MOST_SKEWED = 5
"""Number of queries that the second table lists."""


@dataclass(frozen=True)
class Faces:
    """Images with an attribute.

    Attributes:
        dataset: One split.
        groups: Array [N], the group of each image.
        clusters: Array [N] that identifies related images; None if images are independent.
        ks: Numbers of top-ranked images.
    """

    dataset: Dataset
    groups: np.ndarray
    clusters: np.ndarray | None
    ks: list[int]


@dataclass
class FairnessResult:
    """The result of one dataset.

    Attributes:
        about: The dataset as report.json describes it; "missing" gives the reason if it could not be loaded.
        metrics: Estimates by model and metric; empty if the dataset is missing, and in other processes than the main.
        skewed: Dataset, query, and for each model the most over-represented group and its skew.
    """

    about: dict[str, Any]
    metrics: Metrics = field(default_factory=dict)
    skewed: list[list[str | float]] = field(default_factory=list)


def attribute_suite(args: EvaluateArguments) -> Suite:
    """Return the dataset of the arguments as a suite with one entry.

    Raises:
        ValueError: If --dataset_name is missing.
    """
    if args.dataset_name is None:
        raise ValueError("--dataset_name is missing. Give a Hub id or a folder of images with a column of groups.")
    columns = {"image": args.image_column, "attribute": str(args.fairness)}
    if args.cluster_column is not None:
        columns["cluster"] = args.cluster_column
    entry = Entry(
        name=Path(args.dataset_name).name,
        path=args.dataset_name,
        layout="attributes",
        templates=args.prompt_template or ["{}"],
        class_names=None,
        source="--dataset_name",
        license=None,
        config=args.dataset_config,
        split=args.dataset_test_split,
        columns=columns,
    )
    return Suite("fairness", "fairness", (entry,))


def measure_fairness(args: EvaluateArguments, suite: Suite, models: Models) -> Measurement:
    """Measure the bias of models on all datasets with attribute labels that can be loaded.

    Args:
        args: Arguments of the command.
        suite: From `attribute_suite`, or a suite that measures fairness.
        models: The models.

    Returns:
        The measurement. It failed if no dataset could be loaded.

    Raises:
        ValueError: As for `fairness_report`.
    """
    results = [measure_entry(args, entry, models) for entry in suite.entries]
    reasons = [f"{result.about['name']}: {result.about['missing']}" for result in results if "missing" in result.about]
    failed = len(reasons) == len(suite.entries)
    measured = any(result.metrics for result in results)
    return Measurement(
        metrics=fairness_metrics(results, models.by_name),
        table=f"{fairness_table(results)}\n\n{skewed_table(results, models.by_name)}" if measured else "",
        data={"suite": suite.name, "measures": suite.measures, "entries": [result.about for result in results]},
        settings=asdict(args),
        name=suite.name,
        failure=f"No dataset could be loaded. {'; '.join(reasons)}" if failed else "",
    )


def measure_entry(args: EvaluateArguments, entry: Entry, models: Models) -> FairnessResult:
    """Load and measure one dataset, or return the reason why it is missing."""
    result = FairnessResult(asdict(entry))
    dataset, reason = load_together(lambda: _load(args, entry), models.accelerator)
    if dataset is None:
        result.about["missing"] = reason
        return result
    image_column = entry.columns.get("image", "image")
    rows = measurable_rows(args, dataset, image_column, models.accelerator)
    result.about["skipped_rows"] = len(dataset) - len(rows)
    faces = _faces(args, entry, rows)
    queries, labels = _queries(args, entry, faces.dataset)
    evaluator = FairnessEvaluator(
        CleanImages(read_images(faces.dataset, image_column), image_column, models.processor),
        faces.groups,
        queries.words,
        queries.templates,
        faces.ks,
        labels=labels,
        clusters=faces.clusters,
        desired=args.desired_share,
        zero_count=args.zero_count,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        resamples=args.resamples,
        seed=args.seed,
        title=entry.name,
    )
    scores = evaluator.measure(models.by_name, accelerator=models.accelerator)
    result.metrics = models.report(evaluator, scores)
    if result.metrics:
        _describe(args, faces, queries, scores, result)
    return result


def _load(args: EvaluateArguments, entry: Entry) -> Dataset:
    """Load and check the data of an entry, so that problems show before a model runs."""
    dataset = load_faces(entry, args.suite_folder)
    if args.max_samples is not None and args.max_samples < len(dataset):
        dataset = dataset.shuffle(seed=args.seed).select(range(args.max_samples))
    _faces(args, entry, dataset)
    return dataset


def _faces(args: EvaluateArguments, entry: Entry, dataset: Dataset) -> Faces:
    """Return the rows with their groups and clusters, and the numbers of top-ranked images."""
    groups = read_attribute(dataset, entry.columns.get("attribute", "attribute"))
    ks = [top_k(k, len(groups), args.desired_share) for k in args.top_k]
    return Faces(dataset, groups, _clusters(dataset, entry.columns.get("cluster")), ks)


def _clusters(dataset: Dataset, column: str | None) -> np.ndarray | None:
    if column is None:
        return None
    if column not in dataset.column_names:
        raise ValueError(
            f"cluster_column={column!r} is not a column of the dataset, which has {dataset.column_names}."
        )
    return np.array(column_texts(dataset, column))


def _queries(args: EvaluateArguments, entry: Entry, dataset: Dataset) -> tuple[Queries, np.ndarray | None]:
    """Return the queries and, if they are classes, the right one for each image."""
    templates = None if list(entry.templates) == ["{}"] else entry.templates
    if args.queries != "classes":
        return load_queries(args.queries, templates), None
    names, labels = read_labels(dataset, args.label_column, args.names(dataset))
    return Queries("classes", names, tuple(templates or [DEFAULT_TEMPLATE])), labels


def _describe(
    args: EvaluateArguments, faces: Faces, queries: Queries, scores: Mapping[str, np.ndarray], result: FairnessResult
) -> None:
    """Add groups, queries, the level of chance and the skew of every query to the result."""
    share: dict[str, Any] = {"desired": args.desired_share, "zero_count": args.zero_count}
    k = faces.ks[0]
    names, sizes = np.unique(faces.groups, return_counts=True)
    by_query = {name: skew_at_k(table, faces.groups, k, **share) for name, table in scores.items()}
    result.about |= {
        "rows_measured": len(faces.groups),
        "groups": dict(zip(names.tolist(), sizes.tolist(), strict=True)),
        "queries": asdict(queries),
        "chance": chance_level(faces.groups, faces.ks, seed=args.seed, **share),
        f"skew@{k}": {
            model: {group: dict(zip(queries.words, row, strict=True)) for group, row in found.items()}
            for model, found in by_query.items()
        },
    }
    result.skewed = _most_skewed(result.about["name"], queries, by_query)


def _most_skewed(
    data: str, queries: Queries, by_query: Mapping[str, Mapping[str, np.ndarray]]
) -> list[list[str | float]]:
    """Return the queries with the largest skew of the first model."""
    first = next(iter(by_query.values()))
    worst = np.argsort(-np.max(list(first.values()), axis=0), kind="stable")[:MOST_SKEWED]
    rows = []
    for query in worst:
        row: list[str | float] = [data, queries.words[query]]
        for skew in by_query.values():
            values = [float(by_group[query]) for by_group in skew.values()]
            row += [list(skew)[int(np.argmax(values))], max(values)]
        rows.append(row)
    return rows


def fairness_metrics(results: Sequence[FairnessResult], models: Iterable[str]) -> Metrics:
    """Return metrics by model under names such as "fairface-gender/max_skew@1000".

    Args:
        results: One result per dataset.
        models: Names of the models.
    """
    return {
        model: {
            f"{result.about['name']}/{metric}": estimate
            for result in results
            if result.metrics
            for metric, estimate in result.metrics[model].items()
        }
        for model in models
    }


def fairness_table(results: Sequence[FairnessResult]) -> str:
    """Format a row for the random order and each model on each dataset, and missing datasets.

    Args:
        results: One result per dataset.

    Returns:
        A Markdown table.
    """
    lines: list[list[Estimate | str | float | None]] = []
    shown: list[str] = []
    for result in results:
        if not result.metrics:
            continue
        about = result.about
        *_, last = result.metrics.values()
        shown = shown or [metric for metric in last if not metric.endswith(("_difference", "_reduction"))]
        head = [about["name"], about["columns"]["attribute"], about["rows_measured"]]
        lines.append([*head, "random order", *(about["chance"].get(metric) for metric in shown), None])
        for model, estimates in result.metrics.items():
            drop = estimates.get(f"{shown[0]}_reduction")
            lines.append([*head, model, *(estimates.get(metric) for metric in shown), drop])
    for result in results:
        if "missing" in result.about:
            reason = f"missing: {textwrap.shorten(result.about['missing'], 80, placeholder=' ...')}"
            lines.append([result.about["name"], reason, None, None, *[None] * len(shown), None])
    columns = ["data", "groups", "images", "model", *shown, f"{shown[0]} less (%)" if shown else "less (%)"]
    return format_table(columns, lines)


def skewed_table(results: Sequence[FairnessResult], models: Iterable[str]) -> str:
    """Format the queries with the largest skew: the most over-represented group and its skew for each model.

    Args:
        results: One result per dataset.
        models: Names of the models.

    Returns:
        A Markdown table.
    """
    heads = [head for model in models for head in (f"{model} shows more of", f"{model} skew")]
    return format_table(["data", "query", *heads], [row for result in results for row in result.skewed])
