"""clip-po evaluate --fairness: which groups of images a model ranks first for queries that name none."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import CLIPProcessor

from clip_po.cli.arguments import DEFAULT_TEMPLATE
from clip_po.data.class_labels import read_labels
from clip_po.data.images import read_images
from clip_po.data.loading import load_split
from clip_po.evaluation.bootstrap import Estimate
from clip_po.evaluation.fairness.metrics import skew_at_k, top_k
from clip_po.evaluation.fairness.queries import Queries, load_queries
from clip_po.evaluation.fairness.report import RESAMPLES, chance_level, fairness_report, query_scores, read_attribute
from clip_po.evaluation.report.report_file import write_report
from clip_po.evaluation.suites.layouts import column_texts
from clip_po.evaluation.suites.suite import Entry, Suite, entry_source
from clip_po.evaluation.tables import format_table
from clip_po.evaluation.zero_shot import CleanImages

if TYPE_CHECKING:
    from clip_po.cli.evaluate import EvaluateArguments

Loaded = TypeVar("Loaded")

MOST_SKEWED = 5
"""Queries that are printed by name."""


@dataclass
class FairnessArguments:
    """Arguments of `clip-po evaluate --fairness`."""

    fairness: str | None = field(
        default=None,
        metadata={"help": "Measure bias instead: which groups of images are found first; the column of the groups."},
    )
    queries: str = field(
        default="occupations",
        metadata={
            "help": "For --fairness: occupations, adjectives, activities, classes (those of --label_column), or a "
            "file of your own."
        },
    )
    top_k: list[float] = field(
        default_factory=lambda: [1000],
        metadata={"help": "For --fairness: numbers of images that are looked at, or shares of them below 1."},
    )
    desired_share: str = field(
        default="dataset",
        metadata={
            "help": "For --fairness: the share that each group ought to have.",
            "choices": ["dataset", "uniform"],
        },
    )
    zero_count: float = field(
        default=1.0, metadata={"help": "For --fairness: what a count of no image becomes, so that it has a logarithm."}
    )
    cluster_column: str | None = field(
        default=None, metadata={"help": "For --fairness: column of what images have in common, such as the person."}
    )
    resamples: int = field(default=RESAMPLES, metadata={"help": "For --fairness: resamples for the intervals."})


def attribute_suite(args: EvaluateArguments) -> Suite:
    """The data set of the arguments as a suite of its own.

    Raises:
        ValueError: --dataset_name is missing.
    """
    if args.dataset_name is None:
        raise ValueError("--dataset_name is missing: a Hub id or a folder of images with a column for --fairness.")
    columns = {"image": args.image_column, "attribute": str(args.fairness)}
    if args.cluster_column is not None:
        columns["cluster"] = args.cluster_column
    entry = Entry(
        name=Path(args.dataset_name).name,
        path=args.dataset_name,
        layout="attributes",
        templates=["{}" if args.prompt_template is None else args.prompt_template],
        class_names=None,
        source="--dataset_name",
        license=None,
        config=args.dataset_config,
        split=args.dataset_test_split,
        columns=columns,
    )
    return Suite("fairness", "fairness", (entry,))


def load_together(load: Callable[[], Loaded], accelerator: Accelerator) -> tuple[Loaded | None, str]:
    """Data, or why no process has them: one that lacks them would leave the others waiting.

    Args:
        load: Called without arguments.
        accelerator: Of this process.

    Returns:
        The data and "", or None and the reason.
    """
    loaded, reason = None, ""
    # The first process downloads, the others find it in the cache.
    with accelerator.main_process_first():
        try:
            loaded = load()
        except Exception as error:  # what the Hub, its cache and decoders raise has no common class
            reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    reasons = [other for other in gather_object([reason]) if other]
    return (None, reasons[0]) if reasons else (loaded, "")


@dataclass(frozen=True)
class Faces:
    """Images with an attribute.

    Attributes:
        dataset: One split.
        groups: Array [N], the group of each image.
        clusters: Array [N], what images have in common; None for nothing.
        ks: Numbers of images that are looked at.
    """

    dataset: Dataset
    groups: np.ndarray
    clusters: np.ndarray | None
    ks: list[int]


@dataclass
class FairnessRun:
    """Bias being measured.

    Attributes:
        args: Arguments of the command.
        processor: Of the models.
        models: "aligned", and "base" where there is one.
        accelerator: Of this process.
        found: By data set the metrics by model.
        entries: What report.json says about each data set.
        missing: By data set, why it could not be loaded.
        skewed: Data set, query, and by model the group that is shown too often and its skew.
    """

    args: EvaluateArguments
    processor: CLIPProcessor
    models: Mapping[str, Any]
    accelerator: Accelerator
    found: dict[str, dict[str, dict[str, Estimate]]] = field(default_factory=dict)
    entries: list[dict[str, Any]] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    skewed: list[list[str | float]] = field(default_factory=list)

    def measure(self, entry: Entry) -> None:
        """Load a data set and measure it, or note why it is missing."""
        about: dict[str, Any] = asdict(entry)
        self.entries.append(about)
        faces, reason = load_together(lambda: self._load(entry), self.accelerator)
        if faces is None:
            self.missing[entry.name] = about["missing"] = reason
        else:
            self._measure(entry, faces, about)

    def _load(self, entry: Entry) -> Faces:
        """The data of an entry, checked: what does not fit is known before a model runs."""
        args = self.args
        dataset = load_split(entry_source(entry, args.suite_folder), entry.split, entry.config)
        if args.max_samples is not None and args.max_samples < len(dataset):
            dataset = dataset.shuffle(seed=args.seed).select(range(args.max_samples))
        groups = read_attribute(dataset, entry.columns.get("attribute", "attribute"))
        ks = [top_k(k, len(groups), args.desired_share) for k in args.top_k]
        return Faces(dataset, groups, _clusters(dataset, entry.columns.get("cluster")), ks)

    def _measure(self, entry: Entry, faces: Faces, about: dict[str, Any]) -> None:
        args, groups, ks = self.args, faces.groups, faces.ks
        queries, labels = self._queries(entry, faces.dataset)
        image_column = entry.columns.get("image", "image")
        scores = query_scores(
            self.models,
            self.processor,
            CleanImages(read_images(faces.dataset, image_column), image_column, self.processor),
            queries.words,
            queries.templates,
            batch_size=args.batch_size,
            num_workers=args.num_workers,
            accelerator=self.accelerator,
            title=entry.name,
        )
        if not self.accelerator.is_main_process:
            return
        share: dict[str, Any] = {"desired": args.desired_share, "zero_count": args.zero_count}
        self.found[entry.name] = fairness_report(
            scores,
            groups,
            ks,
            base="base" if "base" in scores else None,
            labels=labels,
            clusters=faces.clusters,
            resamples=args.resamples,
            seed=args.seed,
            **share,
        )
        names, sizes = np.unique(groups, return_counts=True)
        by_query = {name: skew_at_k(table, groups, ks[0], **share) for name, table in scores.items()}
        about |= {
            "rows_measured": len(groups),
            "groups": dict(zip(names.tolist(), sizes.tolist(), strict=True)),
            "queries": asdict(queries),
            "chance": chance_level(groups, ks, seed=args.seed, **share),
            f"skew@{ks[0]}": {
                model: {group: dict(zip(queries.words, row, strict=True)) for group, row in found.items()}
                for model, found in by_query.items()
            },
        }
        self._note_skewed(entry.name, queries, by_query)

    def _queries(self, entry: Entry, dataset: Dataset) -> tuple[Queries, np.ndarray | None]:
        """The queries, and for each image the one that is right, where the queries are classes."""
        templates = None if list(entry.templates) == ["{}"] else entry.templates
        if self.args.queries != "classes":
            return load_queries(self.args.queries, templates), None
        names, labels = read_labels(dataset, self.args.label_column, self.args.names(dataset))
        return Queries("classes", names, tuple(templates or [DEFAULT_TEMPLATE])), labels

    def _note_skewed(self, data: str, queries: Queries, by_query: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        first = next(iter(by_query.values()))
        worst = np.argsort(-np.max(list(first.values()), axis=0), kind="stable")[:MOST_SKEWED]
        for query in worst:
            row: list[str | float] = [data, queries.words[query]]
            for skew in by_query.values():
                values = [float(rows[query]) for rows in skew.values()]
                row += [list(skew)[int(np.argmax(values))], max(values)]
            self.skewed.append(row)

    def table(self) -> str:
        """A row for each data set and model, after what a random order of the images gives; and what is missing."""
        lines: list[list[Estimate | str | float | None]] = []
        shown: list[str] = []
        for about in self.entries:
            if about["name"] not in self.found:
                continue
            by_model = self.found[about["name"]]
            shown = shown or [name for name in by_model["aligned"] if not name.endswith(("_difference", "_reduction"))]
            head = [about["name"], about["columns"]["attribute"], about["rows_measured"]]
            lines.append([*head, "random order", *(about["chance"].get(metric) for metric in shown), None])
            for model, metrics in by_model.items():
                drop = metrics.get(f"{shown[0]}_reduction")
                lines.append([*head, model, *(metrics.get(metric) for metric in shown), drop])
        columns = ["data", "groups", "images", "model", *shown, f"{shown[0]} less (%)" if shown else "less (%)"]
        for data, reason in self.missing.items():
            told = f"missing: {textwrap.shorten(reason, 80, placeholder=' ...')}"
            lines.append([data, told, None, None, *[None] * len(shown), None])
        return format_table(columns, lines)

    def skewed_table(self) -> str:
        """The queries with the largest skew of the first model: the group, and its skew by each model."""
        heads = [head for model in self.models for head in (f"{model} shows more of", f"{model} skew")]
        return format_table(["data", "query", *heads], self.skewed)


def _clusters(dataset: Dataset, column: str | None) -> np.ndarray | None:
    if column is None:
        return None
    if column not in dataset.column_names:
        raise ValueError(f"cluster_column={column!r} is no column of the data set; it has {dataset.column_names}.")
    return np.array(column_texts(dataset, column))


def run_fairness(
    args: EvaluateArguments,
    suite: Suite,
    processor: CLIPProcessor,
    models: Mapping[str, Any],
    accelerator: Accelerator,
    beside: Path,
) -> None:
    """Measure the bias of models on data with attribute labels, print tables and write report.json.

    Args:
        args: Arguments of the command.
        suite: From `attribute_suite`, or one that measures fairness.
        processor: Of the models.
        models: "aligned", and "base" where there is one.
        accelerator: Of this process.
        beside: Where the report goes without --output_dir: into its folder "fairness".

    Raises:
        ValueError: No data set could be loaded, or as for `fairness_report`.
    """
    start = time.time()
    run = FairnessRun(args, processor, models, accelerator)
    for entry in suite.entries:
        run.measure(entry)
    if accelerator.is_main_process:
        if run.found:
            print(f"{run.table()}\n\n{run.skewed_table()}")
        folder = Path(args.output_dir) if args.output_dir is not None else beside / suite.name
        path = write_report(
            folder / "report.json",
            command="evaluate",
            models=_flat(run.found, models),
            settings=asdict(args),
            data={"suite": suite.name, "measures": suite.measures, "entries": run.entries},
            seconds=time.time() - start,
        )
        print(f"Report: {path}")
    if len(run.missing) == len(suite.entries):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in run.missing.items())
        raise ValueError(f"No data set could be loaded. {reasons}")


def _flat(
    found: Mapping[str, Mapping[str, Mapping[str, Estimate]]], models: Iterable[str]
) -> dict[str, dict[str, Estimate]]:
    """Metrics by model, under names such as "fairface-gender/max_skew@1000"."""
    return {
        model: {f"{data}/{metric}": e for data, by_model in found.items() for metric, e in by_model[model].items()}
        for model in models
    }
