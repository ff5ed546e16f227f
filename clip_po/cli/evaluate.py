"""clip-po evaluate: what words on images do to a checkpoint, and what its alignment gained and cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import CLIPProcessor
from trl import TrlParser

from clip_po.cli.arguments import DEFAULT_TEMPLATE, Task, TaskArguments, parse_flags
from clip_po.cli.evaluate_fairness import FairnessArguments, attribute_suite, run_fairness
from clip_po.cli.evaluate_suite import chosen_suite, run_suite
from clip_po.data.attacks.fonts import unseen_fonts
from clip_po.evaluation.report.before_after import before_after_grid, changes_line, choose_examples
from clip_po.evaluation.report.page import report_page, write_page
from clip_po.evaluation.report.plots import trade_off_plot
from clip_po.evaluation.report.report_file import read_report, write_report
from clip_po.evaluation.report.summary import markdown_summary
from clip_po.evaluation.robustness import (
    RobustnessImages,
    evaluate_robustness,
    robustness_report,
    robustness_table,
)
from clip_po.hub.model_card import update_card
from clip_po.models import load_any
from clip_po.validation import COUNT, COUNT_OR_NONE, check_number, check_writable


@dataclass
class EvaluateArguments(FairnessArguments, TaskArguments):
    """Arguments of `clip-po evaluate`."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "The checkpoint: a folder or a Hub id."})
    base_model_name_or_path: str | None = field(
        default=None, metadata={"help": "What it is compared with: the model before alignment."}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Where report.json, report.html and before_after.png go."}
    )
    renderings: int = field(default=1, metadata={"help": "How often each image is attacked."})
    batch_size: int = field(default=128, metadata={"help": "Images a forward."})
    num_workers: int = field(default=0, metadata={"help": "Processes that read and draw images."})
    seed: int = field(default=0, metadata={"help": "Seed of the attacks."})
    suite: str | None = field(
        default=None,
        metadata={
            "help": "Measure a suite instead: typographic, retention, retrieval, fairness or a YAML file; with "
            "--dataset_name what the suite measures on that data set."
        },
    )
    suite_folder: str | None = field(
        default=None, metadata={"help": "Folder of local copies of a suite's sets, each in a folder of its name."}
    )
    caption_column: str = field(default="caption", metadata={"help": "Column of captions, for --suite retrieval."})

    def __post_init__(self) -> None:
        """As for every command, but a suite brings its data sets."""
        for name in ("renderings", "batch_size"):
            check_number(f"--{name}", getattr(self, name), COUNT)
        for name in ("resamples", "num_workers"):
            check_number(f"--{name}", getattr(self, name), COUNT_OR_NONE)
        if self.suite is None:
            super().__post_init__()
        else:
            self.check()


def load_models(args: EvaluateArguments, accelerator: Accelerator) -> tuple[CLIPProcessor, dict[str, Any]]:
    """The processor, and "aligned" and (where it was named) "base", on the process's device."""
    processor = CLIPProcessor.from_pretrained(args.model_name_or_path, trust_remote_code=False)
    models = {"aligned": load_any(str(args.model_name_or_path))}
    if args.base_model_name_or_path is not None:
        models = {"base": load_any(args.base_model_name_or_path), **models}
    for model in models.values():
        model.to(accelerator.device)
    return processor, models


def main(argv: Sequence[str]) -> None:
    """Print the table, and write report.json, report.html and the picture beside the checkpoint."""
    parser = TrlParser([EvaluateArguments], prog="clip-po evaluate")
    (args,) = parse_flags(parser, argv)
    if args.model_name_or_path is None:
        raise ValueError("--model_name_or_path is missing: a Hub id or the folder of a CLIPModel.")
    start = time.time()
    accelerator = Accelerator()
    # Never a folder named like a Hub id: from_pretrained would look for the model in it.
    beside = Path(args.model_name_or_path if Path(args.model_name_or_path).is_dir() else "evaluation")
    if accelerator.is_main_process:
        check_writable(args.output_dir or beside, "--output_dir")
    if args.fairness is not None or args.suite is not None:
        suite = chosen_suite(args) if args.fairness is None else attribute_suite(args)
        run = run_fairness if suite.measures == "fairness" else run_suite
        run(args, suite, *load_models(args, accelerator), accelerator, beside)
        return
    task = Task.load(args.model_name_or_path)
    dataset = args.load(args.dataset_test_split, args.seed)
    names = args.names(dataset, task)
    template = args.prompt_template or (task.prompt_template if task else DEFAULT_TEMPLATE)

    processor, models = load_models(args, accelerator)
    attack = args.attack(names, unseen_fonts(), processor, args.seed)
    images = RobustnessImages(
        dataset,
        attack,
        processor,
        names,
        image_column=args.image_column,
        label_column=args.label_column,
        renderings=args.renderings,
    )
    answers = evaluate_robustness(
        models,
        images,
        [template],
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        accelerator=accelerator,
    )
    if not accelerator.is_main_process:
        return
    base = "base" if "base" in models else None
    found = {name: robustness_report(answers, name, None if name == base else base) for name in models}
    print(robustness_table(found))
    folder = Path(args.output_dir or beside)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {**asdict(args), "attack": asdict(attack), "prompt_template": template}
    data = {"name": args.dataset_name, "split": args.dataset_test_split, "rows": len(dataset), "class_names": names}
    path = write_report(
        folder / "report.json",
        command="evaluate",
        models=found,
        settings=settings,
        data=data,
        seconds=time.time() - start,
    )
    print(f"Report: {path}")
    report = read_report(path)
    update_card(folder, markdown_summary(report))
    examples = [] if base is None else choose_examples(answers, "base", "aligned", seed=args.seed)
    changes = changes_line(answers, "base", "aligned") if base else ""
    figures = {}
    if base is not None:
        accuracies = {name: (m["clean_accuracy"], m["typographic_accuracy"]) for name, m in found.items()}
        figures["Clean against typographic accuracy, with 95% intervals"] = trade_off_plot(accuracies, base=base)
    page = report_page(report, examples=examples, picture=images.picture, changes=changes, figures=figures)
    print(f"Page: {write_page(folder / 'report.html', page)}")
    if examples:
        picture = folder / "before_after.png"
        before_after_grid(examples, picture, picture=images.picture, subtitle=changes)
        print(f"Picture: {picture}")
