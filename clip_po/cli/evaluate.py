"""clip-po evaluate: what the columns of a dataset call for; with --suite and --fairness, other evaluations."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from accelerate import Accelerator, PartialState
from datasets import Dataset

from clip_po.cli.arguments import Task
from clip_po.cli.evaluate_arguments import EvaluateArguments
from clip_po.cli.evaluate_common import Measurement, Models, default_folder, load_models, measurable_rows
from clip_po.cli.evaluate_fairness import attribute_suite, measure_fairness
from clip_po.cli.evaluate_feedback import FOUND, kind_of_rows, measure_captions, measure_feedback
from clip_po.cli.evaluate_retention import RetentionMeasurement, measure_retention
from clip_po.cli.evaluate_suite import chosen_suite, measure_suite
from clip_po.cli.flags import FlagParser, parse_flags
from clip_po.cli.retention_sets import LoadedSet, load_retention_sets
from clip_po.data.attacks.fonts import unseen_fonts
from clip_po.data.vocabulary import open_vocabulary
from clip_po.evaluation.evaluator import RobustnessEvaluator
from clip_po.evaluation.report.before_after import before_after_grid, changes_line, choose_examples
from clip_po.evaluation.report.page import report_page, write_page
from clip_po.evaluation.report.plots import trade_off_plot
from clip_po.evaluation.report.report_file import read_report
from clip_po.evaluation.report.summary import markdown_summary
from clip_po.evaluation.robustness import Answers, RobustnessImages, robustness_table
from clip_po.hub.card import update_card
from clip_po.validation import check_writable


def main(argv: Sequence[str]) -> None:
    """Measure a checkpoint, write report.json, without a suite also report.html and a picture, and print the table."""
    args, start = parse(argv), time.time()
    accelerator = Accelerator()
    # Never a folder with the name of a Hub id: from_pretrained would look for the model in it.
    beside = Path(str(args.model_name_or_path)) if Path(str(args.model_name_or_path)).is_dir() else Path()
    if accelerator.is_main_process:
        check_writable(args.output_dir or beside, "--output_dir")
    measure = load(args)
    measurement = measure(load_models(args, accelerator))
    if accelerator.is_main_process:
        now = time.strftime("%Y-%m-%d_%H-%M-%S")
        folder = Path(args.output_dir) if args.output_dir else default_folder(beside, measurement.name, now)
        files = measurement.write(folder, time.time() - start)
        lines = [measurement.table] if measurement.table else []
        print("\n".join([*lines, *(f"{what}: {path}" for what, path in files.items())]))
    accelerator.end_training()  # a process that exits with its group open may abort
    if measurement.failure:
        raise ValueError(measurement.failure)


def parse(argv: Sequence[str]) -> EvaluateArguments:
    """Return the arguments.

    Raises:
        ValueError: If --model_name_or_path is missing, or another argument is not valid.
    """
    (args,) = parse_flags(FlagParser([EvaluateArguments], "evaluate"), argv)
    if args.model_name_or_path is None:
        raise ValueError(
            "--model_name_or_path is missing. Give the Hub id or folder of a model, such as CLIP or SigLIP."
        )
    return args


def load(args: EvaluateArguments) -> Callable[[Models], Measurement]:
    """Load what is measured, before any model, and return its measurement as a function of the models."""
    if args.fairness is None and args.suite is None:
        return load_data(args)
    suite = chosen_suite(args) if args.fairness is None else attribute_suite(args)
    return partial(measure_fairness if suite.measures == "fairness" else measure_suite, args, suite)


def load_data(args: EvaluateArguments) -> Callable[[Models], Measurement]:
    """Load a dataset, and return the measurement that its columns call for as a function of the models."""
    task = Task.load(str(args.model_name_or_path))
    dataset = args.read(args.dataset_test_split)
    kind = kind_of_rows(dataset, args)
    if kind == "labelled":
        dataset = args.labelled(dataset, args.dataset_test_split, args.seed)
        templates = args.templates(task)
        sets = load_retention_sets(args.retention or [], templates, args.suite_folder)
        return partial(measure_robustness, args, dataset, args.names(dataset, task), templates, sets)
    if args.retention is not None:
        raise ValueError(
            f"--retention has no effect: {args.dataset_name!r} holds {FOUND[kind]}. Leave it out, and measure the "
            "sets with --suite retention."
        )
    PartialState().print(f"{args.dataset_name} holds {FOUND[kind]}.", file=sys.stderr)
    measure = measure_captions if kind == "captions" else partial(measure_feedback, kind)
    return partial(measure, args, args.sample(dataset, args.seed))


@dataclass(frozen=True, kw_only=True)
class RobustnessMeasurement(Measurement):
    """A measurement of robustness, with the images and answers that its page shows.

    Attributes:
        images: The images.
        card_folder: Folder whose model card gets the table, if it has a card.
        base: Name of the model before alignment; None if there is none.
        seed: Seed that chooses the examples.
        others: What the models keep of other tasks; None if none were measured.
    """

    images: RobustnessImages
    card_folder: Path
    base: str | None
    seed: int
    others: RetentionMeasurement | None

    def write(self, folder: Path, seconds: float) -> dict[str, Path]:
        """Write report.json, the answers, the model card, report.html and the pictures."""
        files = super().write(folder, seconds)
        pictures = {} if self.others is None else self.others.write(folder)
        galleries = [] if self.others is None else [*self.others.galleries.values()]
        report = read_report(files["Report"])
        update_card(self.card_folder, markdown_summary(report))
        (answers,) = self.answers.values()
        examples, changes, figures = [], "", {}
        if self.base is not None:
            examples = choose_examples(answers, self.base, "aligned", seed=self.seed)
            changes = changes_line(answers, self.base, "aligned")
            accuracies = {name: (m["clean_accuracy"], m["typographic_accuracy"]) for name, m in self.metrics.items()}
            plot = trade_off_plot(accuracies, base=self.base)
            figures["Clean against typographic accuracy, with 95% intervals"] = plot
        picture = self.images.picture
        page = report_page(
            report, examples=examples, picture=picture, changes=changes, figures=figures, galleries=galleries
        )
        files["Page"] = write_page(folder / "report.html", page)
        if examples:
            files["Picture"] = folder / "before_after.png"
            before_after_grid(examples, files["Picture"], picture=picture, subtitle=changes)
        return files | pictures


def measure_robustness(
    args: EvaluateArguments,
    dataset: Dataset,
    names: Sequence[str],
    templates: Sequence[str],
    sets: Mapping[str, LoadedSet],
    models: Models,
) -> RobustnessMeasurement:
    """Measure the robustness of models to attacks with fonts that no training uses, and what they keep of other tasks.

    Args:
        args: Arguments of the command.
        dataset: The images.
        names: Their class names, in the order of the labels.
        templates: Prompts with one `{}`. The embeddings of several are averaged.
        sets: Images of other tasks by name; empty to measure none.
        models: The models.

    Returns:
        The measurement.

    Raises:
        ValueError: As for `RobustnessImages` and `evaluate_robustness`.
    """
    attack = args.attack(names, unseen_fonts(), models.processor, args.seed)
    rows = measurable_rows(args, dataset, args.image_column, models.accelerator)
    images = RobustnessImages(
        rows,
        attack,
        models.processor,
        names,
        image_column=args.image_column,
        label_column=args.label_column,
        renderings=args.renderings,
    )
    evaluator = RobustnessEvaluator(images, templates, batch_size=args.batch_size, num_workers=args.num_workers)
    measured = evaluator.measure(models.by_name, accelerator=models.accelerator)
    metrics = models.report(evaluator, measured)
    others = measure_retention(args, sets, open_vocabulary(templates[0], names), models) if sets else None
    prompts = templates[0] if len(templates) == 1 else templates
    return RobustnessMeasurement(
        metrics=metrics,
        table="\n\n".join([robustness_table(metrics), *([] if others is None else [others.table])]),
        data={
            "name": args.dataset_name,
            "split": args.dataset_test_split,
            "rows": len(rows),
            "skipped_rows": len(dataset) - len(rows),
            "class_names": names,
        },
        settings={**asdict(args), "attack": asdict(attack), "prompt_template": prompts},
        name=f"{Path(str(args.dataset_name)).name}-{args.dataset_test_split}",
        answers={"": Answers.about(images, measured)},
        images=images,
        card_folder=Path(args.output_dir or str(args.model_name_or_path)),
        base=models.base,
        seed=args.seed,
        others=others,
        retention=None if others is None else others.section,
    )
