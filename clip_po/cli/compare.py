"""clip-po compare: run several methods and seeds on one model and data set, and compare them in one table."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from transformers.utils import logging

from clip_po.cli.compare_arguments import parse
from clip_po.cli.compare_methods import MethodResult, run_method
from clip_po.cli.comparison_setup import BASE, Comparison, load
from clip_po.evaluation.bootstrap import Estimate
from clip_po.evaluation.comparison import (
    best_method,
    cheapest_method,
    comparison_table,
    describe_best,
    pool_seeds,
)
from clip_po.evaluation.report.before_after import changes_line, choose_examples
from clip_po.evaluation.report.figures import save_figure
from clip_po.evaluation.report.page import report_page, write_page
from clip_po.evaluation.report.plots import cost_plot, format_seconds, retention_plot, trade_off_plot
from clip_po.evaluation.report.report_file import read_report, write_report
from clip_po.evaluation.robustness import (
    evaluate_robustness,
    robustness_report,
)
from clip_po.validation import check_writable

CAPTIONS: Mapping[str, str] = {
    "trade_off": "Clean against typographic accuracy, with 95% intervals",
    "seconds": "Recovery against what each method takes",
    "retention": "Recovery against what other tasks lose, with 95% intervals",
}
"""Caption of each plot, by the name of its file."""


@dataclass(frozen=True)
class Summary:
    """The outcome of a comparison.

    Attributes:
        metrics: Estimates by method and metric, the base first.
        seconds: Mean duration of each method over its seeds.
        best: As from `best_method`.
        table: The comparison as a Markdown table.
        kept: Estimates of what is kept of other tasks, by method; empty without retention sets.
    """

    metrics: Mapping[str, Mapping[str, Estimate]]
    seconds: Mapping[str, float]
    best: str | None
    table: str
    kept: Mapping[str, Mapping[str, Estimate]]

    @property
    def methods(self) -> dict[str, Mapping[str, Estimate]]:
        """The metrics without those of the base."""
        return {name: found for name, found in self.metrics.items() if name != BASE}

    @property
    def shown(self) -> str:
        """The method that examples and headline are about: the best, else the cheapest."""
        return self.best or cheapest_method(self.methods)


def main(argv: Sequence[str]) -> None:
    """Run the methods without a stored result, print the table, and write report, page, table and plots.

    Args:
        argv: Command line after `clip-po compare`.
    """
    args, recipe = parse(argv)
    check_writable(str(args.output_dir), "--output_dir")
    logging.disable_progress_bar()  # Progress bars would break up the printed lines.
    start = time.time()
    comparison = load(args, recipe)
    measure(comparison)
    summary = summarize(comparison)
    seconds = time.time() - start
    report, page = write(comparison, summary, seconds)
    print_summary(comparison, summary)
    print(f"Report: {report}\nPage:   {page}")


def measure(comparison: Comparison) -> None:
    """Run and evaluate the base and every method without a stored result.

    Args:
        comparison: The comparison. Its results are complete afterwards.
    """
    setup, results = comparison.setup, comparison.results
    if results.find(BASE, 0, {}) is None:
        answers = _predict(comparison, MethodResult(setup.load_base(), setup.processor))
        results.add(BASE, 0, {}, answers, 0.0, {}, comparison.tasks.measure_base())
    runs = list(comparison.runs())
    for number, (name, seed, settings) in enumerate(runs, 1):
        if results.find(name, seed, settings) is None:
            print(f"[{number}/{len(runs)}] {name}, seed {seed} ... ", end="", flush=True)
            print(format_seconds(_run_and_store(comparison, name, seed, settings)), flush=True)


def _run_and_store(comparison: Comparison, name: str, seed: int, settings: Mapping[str, Any]) -> float:
    """Run one method with one seed, store its answers, and return the seconds that the method took."""
    start = time.time()
    torch.manual_seed(seed)
    log = comparison.results.path(name, seed) / "log.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as stream, contextlib.redirect_stdout(stream):
        result = run_method(comparison.setup, name, seed, **settings)
    seconds = time.time() - start
    answers, tasks = _predict(comparison, result), comparison.tasks.measure(result)
    comparison.results.add(name, seed, settings, answers, seconds, result.details, tasks)
    return seconds


def _predict(comparison: Comparison, result: MethodResult) -> dict[str, dict[str, np.ndarray]]:
    """Return the predicted classes of a model on the test images, by attack and variant."""
    setup = comparison.setup
    answers: dict[str, dict[str, np.ndarray]] = {}
    embeds = None if result.class_embeds is None else {"model": result.class_embeds}
    for attack, images in comparison.images.items():
        if result.processor is not images.processor:
            images = images.with_processor(result.processor)
        found = evaluate_robustness(
            {"model": result.model},
            images,
            [setup.template],
            class_embeds=embeds,
            batch_size=setup.batch_size,
            disable_tqdm=True,
        )
        answers[attack] = dict(found.predicted["model"])
    return answers


def summarize(comparison: Comparison) -> Summary:
    """Compute the metrics of all methods from the stored answers, and choose the best method.

    Args:
        comparison: The comparison, with complete results.

    Returns:
        Metrics, seconds, best method and table.
    """
    methods, results = comparison.recipe.methods, comparison.results
    metrics: dict[str, dict[str, Estimate]] = {name: {} for name in (BASE, *methods)}
    for attack in comparison.images:
        prefix = "" if attack == comparison.main_attack else f"{attack}: "
        for name, found in metrics.items():
            measured = _metrics_under(comparison, attack, name)
            found.update({f"{prefix}{metric}": estimate for metric, estimate in measured.items()})
    kept = _kept(comparison)
    for name, found in kept.items():
        metrics[name] |= {metric: found[metric] for metric in ("retention_cost", "kl") if metric in found}
    seconds = {
        name: float(np.mean([(results.find(name, s, methods[name]) or {})["seconds"] for s in comparison.seeds(name)]))
        for name in methods
    }
    best = best_method({name: metrics[name] for name in methods}, comparison.args.max_clean_cost)
    return Summary(metrics, seconds, best, comparison_table(metrics, seconds, list(comparison.images)), kept)


def _kept(comparison: Comparison) -> dict[str, dict[str, Estimate]]:
    """Return what each method keeps of other tasks; empty without retention sets."""
    if not comparison.tasks.sets:
        return {}
    (base,) = comparison.other_tasks(BASE)
    kept = {BASE: comparison.tasks.metrics([base], None)}
    return kept | {
        name: comparison.tasks.metrics(comparison.other_tasks(name), base) for name in comparison.recipe.methods
    }


def _metrics_under(comparison: Comparison, attack: str, name: str) -> dict[str, Estimate]:
    """Return the metrics of one method under one attack, over all seeds and against the base."""
    images = comparison.images[attack]
    base, answers = comparison.answers(BASE, attack), comparison.answers(name, attack)
    metrics = robustness_report(pool_seeds(images, {BASE: base, name: answers}), name, BASE)
    if len(answers) > 1 and attack == comparison.main_attack:
        pooled = [pool_seeds(images, {BASE: base, name: [each]}) for each in answers]
        recoveries = [robustness_report(each, name, BASE, resamples=1)["recovery"].value for each in pooled]
        metrics["recovery_sd"] = Estimate(float(np.std(recoveries, ddof=1)))
    return metrics


def print_summary(comparison: Comparison, summary: Summary) -> None:
    """Print the table and the best method, or that there is none.

    Args:
        comparison: The comparison.
        summary: Its outcome.
    """
    args, images = comparison.args, comparison.images[comparison.main_attack]
    print(f"\n{summary.table}\n\n{len(images)} test images, {len(args.seeds)} seeds; in brackets 95% intervals.")
    if comparison.tasks.sets:
        print(f"Retention cost (points) and drift (nats): mean over {comparison.tasks.describe()}.")
    print(describe_best(summary.methods, args.max_clean_cost))


def write(comparison: Comparison, summary: Summary, seconds: float) -> tuple[Path, Path]:
    """Write table.md, report.json, report.html and the plots.

    Args:
        comparison: The comparison.
        summary: Its outcome.
        seconds: Duration of the command.

    Returns:
        Paths of report.json and report.html.
    """
    args, folder, attack = comparison.args, comparison.setup.folder, comparison.main_attack
    shown = summary.shown
    images = comparison.images[attack]
    (folder / "table.md").write_text(summary.table + "\n")
    runs = {name: comparison.other_tasks(name)[0] for name in (BASE, shown)} if summary.kept else {}
    kept = comparison.tasks.answers(runs) if runs else {}
    report = write_report(
        folder / "report.json",
        command="compare",
        models=summary.metrics,
        settings={**asdict(args), **asdict(comparison.recipe), "best": summary.best, "chosen": shown},
        data={
            "name": args.dataset_name,
            "split": args.dataset_test_split,
            "rows": len(images),
            "class_names": images.class_names,
            "seconds": summary.seconds,
        },
        retention=comparison.tasks.section(summary.kept, kept, BASE, shown) if runs else None,
        seconds=seconds,
    )
    figures = _draw_plots(summary, args.max_clean_cost)
    for name, figure in figures.items():
        save_figure(figure, folder / f"{name}.png")
    single = {BASE: comparison.answers(BASE, attack), shown: comparison.answers(shown, attack)[:1]}
    answers = pool_seeds(images, single)
    page = report_page(
        read_report(report),
        examples=choose_examples(answers, BASE, shown),
        picture=images.picture,
        changes=changes_line(answers, BASE, shown),
        figures={CAPTIONS[name]: figure for name, figure in figures.items()},
        galleries=comparison.tasks.galleries(kept, BASE, shown),
    )
    return report, write_page(folder / "report.html", page)


def _draw_plots(summary: Summary, max_clean_cost: float) -> dict[str, Figure]:
    """Draw the plots, by the name of their file; those of recovery only if a method has a defined one."""
    metrics, seconds = summary.metrics, summary.seconds
    accuracies = {name: (found["clean_accuracy"], found["typographic_accuracy"]) for name, found in metrics.items()}
    figures = {"trade_off": trade_off_plot(accuracies, base=BASE, allowed_cost=max_clean_cost)}
    recoveries = {name: metrics[name]["recovery"] for name in seconds}
    if defined := {name: recovery for name, recovery in recoveries.items() if math.isfinite(recovery.value)}:
        figures["seconds"] = cost_plot({name: seconds[name] for name in defined}, defined)
    if costs := {name: metrics[name]["retention_cost"] for name in defined if "retention_cost" in metrics[name]}:
        figures["retention"] = retention_plot(costs, defined)
    return figures
