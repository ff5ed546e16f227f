"""clip-po evaluate --suite: the field's sets by name, each measured on what could be loaded of it."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from datasets import Dataset
from transformers import CLIPProcessor

from clip_po.cli.arguments import DEFAULT_TEMPLATE
from clip_po.cli.evaluate_fairness import load_together
from clip_po.data.attacks.fonts import unseen_fonts
from clip_po.evaluation.bootstrap import Estimate
from clip_po.evaluation.report.report_file import write_report
from clip_po.evaluation.retrieval import KS, evaluate_retrieval, retrieval_report
from clip_po.evaluation.robustness import Answers, RobustnessImages, evaluate_robustness, robustness_report
from clip_po.evaluation.suites.layouts import LAYOUTS
from clip_po.evaluation.suites.photographs import accuracy_report, ask_photographs, candidate_sets, mean_report
from clip_po.evaluation.suites.suite import Entry, Suite, entry_source, load_entry, load_suite
from clip_po.evaluation.tables import format_table

if TYPE_CHECKING:
    from clip_po.cli.evaluate import EvaluateArguments

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
"""By what a suite measures: the metrics of its table, and what heads their columns."""


@dataclass
class SuiteRun:
    """A suite being measured.

    Attributes:
        args: Arguments of the command.
        processor: Of the models.
        models: "aligned", and "base" where there is one.
        accelerator: Of this process.
        suite: What is measured.
        rows: Data set, candidate set, number of images, and by model the metrics.
        clean: Answers of the data sets whose mean a retention suite reports.
        entries: What report.json says about each data set.
        missing: By data set, why it could not be loaded.
    """

    args: EvaluateArguments
    processor: CLIPProcessor
    models: Mapping[str, Any]
    accelerator: Accelerator
    suite: Suite
    rows: list[tuple[str, str, int, dict[str, dict[str, Estimate]]]] = field(default_factory=list)
    clean: list[Answers] = field(default_factory=list)
    entries: list[dict[str, Any]] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    def measure(self, entry: Entry) -> None:
        """Load a data set and measure it, or note why it is missing."""
        about: dict[str, Any] = asdict(entry)
        self.entries.append(about)
        dataset, reason = self._load(entry)
        if dataset is None:
            self.missing[entry.name] = about["missing"] = reason
            return
        about["loaded_from"], about["rows_there"] = entry_source(entry, self.args.suite_folder), len(dataset)
        if entry.layout in LAYOUTS:
            self._measure_photographs(entry, dataset, about)
        elif entry.layout == "captioned":
            self._measure_retrieval(entry, self._part(dataset, about), about)
        elif self.suite.measures == "typographic":
            self._measure_attack(entry, self._part(dataset, about), about)
        else:
            self._measure_clean(entry, self._part(dataset, about), about)

    def _load(self, entry: Entry) -> tuple[Dataset | None, str]:
        """The data of an entry, or why no process measures it: one that lacks it would leave the others waiting."""

        def load() -> Dataset:
            dataset = load_entry(entry, self.args.suite_folder)
            if not len(dataset):
                raise ValueError(f"the split {entry.split!r} is empty")
            return dataset

        return load_together(load, self.accelerator)

    def _part(self, dataset: Dataset, about: dict[str, Any]) -> Dataset:
        """The rows that are measured: all, or as many as --max_samples says."""
        if self.args.max_samples is not None and self.args.max_samples < len(dataset):
            dataset = dataset.shuffle(seed=self.args.seed).select(range(self.args.max_samples))
        about["rows_measured"] = len(dataset)
        return dataset

    def _measure_photographs(self, entry: Entry, dataset: Dataset, about: dict[str, Any]) -> None:
        # Of all rows: a part of them may lack candidates.
        candidates = candidate_sets(dataset, entry.candidates)
        about["candidates"] = [_described(kind, names) for kind, names in candidates.items()]
        if entry.variant == "typographic":
            written = [row for row, word in enumerate(dataset["word"]) if word]
            about["rows_without_word"] = len(dataset) - len(written)
            dataset = dataset.select(written)
        dataset = self._part(dataset, about)
        by_kind = ask_photographs(
            self.models,
            self.processor,
            dataset,
            candidates,
            entry.templates,
            variant=entry.variant,
            title=entry.name,
            **self._loading,
        )
        for kind, answers in by_kind.items():
            by_model = {name: accuracy_report(answers, name, self._base, entry.variant) for name in self.models}
            self.rows.append((entry.name, _label(kind, candidates[kind]), len(dataset), by_model))

    def _measure_attack(self, entry: Entry, dataset: Dataset, about: dict[str, Any]) -> None:
        names = dataset.features["label"].names
        about["candidates"] = [_described("all", names)]
        attack = self.args.attack(names, unseen_fonts(), self.processor, self.args.seed)
        about["attack"] = asdict(attack)
        images = RobustnessImages(dataset, attack, self.processor, names, renderings=self.args.renderings)
        answers = evaluate_robustness(self.models, images, entry.templates, **self._loading)
        by_model = {
            name: {**robustness_report(answers, name, self._base), **accuracy_report(answers, name, self._base)}
            for name in self.models
        }
        self.rows.append((entry.name, _label("all", names), len(dataset), by_model))

    def _measure_clean(self, entry: Entry, dataset: Dataset, about: dict[str, Any]) -> None:
        names = dataset.features["label"].names
        about["candidates"] = [_described("all", names)]
        answers = ask_photographs(
            self.models,
            self.processor,
            dataset,
            {"all": names},
            entry.templates,
            variant="clean",
            title=entry.name,
            **self._loading,
        )["all"]
        by_model = {name: accuracy_report(answers, name, self._base, "clean") for name in self.models}
        self.rows.append((entry.name, _label("all", names), len(dataset), by_model))
        self.clean.append(answers)

    def _measure_retrieval(self, entry: Entry, dataset: Dataset, about: dict[str, Any]) -> None:
        hits = evaluate_retrieval(
            self.models, self.processor, dataset, entry.templates, title=entry.name, **self._loading
        )
        texts = len(next(iter(hits.values())).image_of_text)
        about["candidates"] = [{"kind": "all texts", "count": texts}, {"kind": "all images", "count": len(dataset)}]
        by_model = {
            name: retrieval_report(found, hits["base"] if self._base not in (None, name) else None)
            for name, found in hits.items()
        }
        self.rows.append((entry.name, f"all ({texts:,} texts)", len(dataset), by_model))

    @property
    def _base(self) -> str | None:
        return "base" if "base" in self.models else None

    @property
    def _loading(self) -> dict[str, Any]:
        return {
            "batch_size": self.args.batch_size,
            "num_workers": self.args.num_workers,
            "accelerator": self.accelerator,
        }

    def found(self) -> dict[str, dict[str, Estimate]]:
        """Metrics by model, under names such as "rta-100/pair/fooled"; and the mean of a retention suite."""
        flat: dict[str, dict[str, Estimate]] = {name: {} for name in self.models}
        for data, candidates, _, by_model in self.rows:
            for name, metrics in by_model.items():
                flat[name] |= {f"{data}/{candidates.split(' ')[0]}/{metric}": e for metric, e in metrics.items()}
        if self.clean:
            for name in self.models:
                flat[name] |= mean_report(self.clean, name, self._base)
        return flat

    def table(self, found: Mapping[str, Mapping[str, Estimate]]) -> str:
        """A row for each data set, candidate set and model; the mean of `found`; and what is missing, and why."""
        columns = COLUMNS[self.suite.measures]
        published = {entry.name: entry.rows for entry in self.suite.entries}
        lines: list[list[Estimate | str | float | None]] = []
        for data, candidates, images, by_model in self.rows:
            there = published[data]
            note = f"{images:,} of {there:,} images" if there is not None and images != there else ""
            for model, metrics in by_model.items():
                lines.append([data, candidates, images, model, *(metrics.get(metric) for metric in columns), note])
        for model, means in found.items():
            if "mean_accuracy" in means:
                mean = [means["mean_accuracy"], means.get("mean_difference")]
                lines.append([f"mean of {len(self.clean)}", None, None, model, *mean, ""])
        for data, reason in self.missing.items():
            told = textwrap.shorten(reason, 80, placeholder=" ...")
            lines.append([data, None, None, None, *[None] * len(columns), f"missing: {told}"])
        return format_table(["data", "candidates", "images", "model", *columns.values(), "note"], lines)


def _described(kind: str, names: Sequence[str]) -> dict[str, Any]:
    return {"kind": kind, "count": 2 if kind == "pair" else len(names), "names": list(names)}


def _label(kind: str, names: Sequence[str]) -> str:
    return kind if kind == "pair" else f"{kind} ({len(names):,})"


def chosen_suite(args: EvaluateArguments) -> Suite:
    """The suite that the arguments name; with --dataset_name, its measurement on that data set alone.

    Raises:
        ValueError: As for `load_suite`; --suite_folder is no folder.
    """
    suite = load_suite(str(args.suite))
    if args.suite_folder is not None and not Path(args.suite_folder).is_dir():
        raise ValueError(
            f"--suite_folder {args.suite_folder!r} is no folder; give the one with a folder for each set."
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
        entries = tuple(replace(entry, templates=[args.prompt_template]) for entry in suite.entries)
        suite = replace(suite, entries=entries)
    return suite


def run_suite(
    args: EvaluateArguments,
    suite: Suite,
    processor: CLIPProcessor,
    models: Mapping[str, Any],
    accelerator: Accelerator,
    beside: Path,
) -> None:
    """Measure a suite, print its table and write report.json.

    Args:
        args: Arguments of the command.
        suite: From `chosen_suite`.
        processor: Of the models.
        models: "aligned", and "base" where there is one.
        accelerator: Of this process.
        beside: Where the report goes without --output_dir: into a folder of it that is named like the suite, as
            a checkpoint's own report.json is of the plain evaluation.

    Raises:
        ValueError: No data set could be loaded.
    """
    start = time.time()
    run = SuiteRun(args, processor, models, accelerator, suite)
    for entry in suite.entries:
        run.measure(entry)
    if accelerator.is_main_process:
        found = run.found()
        print(run.table(found))
        folder = Path(args.output_dir) if args.output_dir is not None else beside / suite.name
        path = write_report(
            folder / "report.json",
            command="evaluate",
            models=found,
            settings=asdict(args),
            data={"suite": suite.name, "measures": suite.measures, "entries": run.entries},
            seconds=time.time() - start,
        )
        print(f"Report: {path}")
    if not run.rows:
        raise ValueError(
            f"None of the {len(suite.entries)} data sets could be loaded; the report says why. Give local copies by "
            "--suite_folder DIR, each in a folder named like its entry (docs/suites.md)."
        )
