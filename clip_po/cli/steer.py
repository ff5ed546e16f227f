"""clip-po steer: train a transformation whose scale t turns a model from the written word to the image."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from accelerate import Accelerator

from clip_po.cli.outcome import NothingChanged
from clip_po.cli.steer_arguments import DEFAULTS, SteerArguments, parse
from clip_po.cli.steer_data import Case, digits_case, labelled_case
from clip_po.concept.folding import check_foldable
from clip_po.concept.sweep import (
    ScalePoint,
    VariantEmbeddings,
    choose_neutral,
    choose_within,
    embed_variants,
    scale_table,
    sweep_scales,
)
from clip_po.concept.trainer import ConceptConfig, ConceptTrainer
from clip_po.concept.transform import CONCEPT_FILE, ConceptTransform, ScalePath
from clip_po.dual_encoder import as_dual_encoder
from clip_po.evaluation.bounds import describe_promise
from clip_po.evaluation.report.figures import save_figure
from clip_po.evaluation.report.plots import sweep_plot
from clip_po.evaluation.report.report_file import write_report
from clip_po.evaluation.robustness import RobustnessImages
from clip_po.evaluation.tables import format_estimate
from clip_po.training.output_folder import check_unused
from clip_po.training.printed_logs import print_numbers
from clip_po.validation import check_writable

SAVED_FILES = (CONCEPT_FILE, "checkpoint/model*.safetensors")
"""Patterns of the files of a transformation and of its folded checkpoint."""


UNCHANGED_REMEDY = (
    "With --choose at_most, give more validation images, or allow a higher --max_clean_cost. Otherwise, give a wider "
    "range of --t."
)
"""What to do if the chosen t leaves the model as it was."""


def main(argv: Sequence[str]) -> None:
    """Train, choose t and measure; write report, curve, transformation and folded checkpoint; print the table.

    Args:
        argv: Command line after `clip-po steer`.

    Raises:
        NothingChanged: If t = 0, the original model, was chosen.
    """
    args, config = parse(argv)
    if config.should_save:
        check_writable(config.output_dir, "--output_dir")
        check_unused(config, config.resume_from_checkpoint, SAVED_FILES)
    start = time.time()
    loaded = None if args.transform is None else ConceptTransform.from_pretrained(args.transform)
    case = (digits_case if args.dataset_name is None else labelled_case)(args, config.seed)
    if args.choose == "at_most":
        print(describe_promise(args.max_clean_cost, case.validation.rows), flush=True)
    transform, accelerator = trained_transform(case, loaded, args, config)
    result = measure(case, transform, args, config, accelerator)
    if accelerator.is_main_process:
        seconds = time.time() - start
        write(case, transform, result, args, config, seconds)
        print_result(case, result, args, Path(str(config.output_dir)), seconds)
    if result.chosen == 0:
        raise NothingChanged(
            f"nothing was changed: t = 0 was chosen, which answers as the original model does. {UNCHANGED_REMEDY}"
        )


@dataclass(frozen=True)
class SteerResult:
    """The chosen scale and the measured points.

    Attributes:
        path: Path from the original model to W.
        chosen: The t chosen on validation images.
        points: One point for each --t and the chosen t, in ascending order of t.
        unseen_points: The same on images with unseen fonts. Empty if the case has none.
        meeting: The neutral point on the measured images. None if there is none or choose=at_most.
    """

    path: ScalePath
    chosen: float
    points: Sequence[ScalePoint]
    unseen_points: Sequence[ScalePoint]
    meeting: ScalePoint | None


def trained_transform(
    case: Case, loaded: ConceptTransform | None, args: SteerArguments, config: ConceptConfig
) -> tuple[ConceptTransform, Accelerator]:
    """Train W unless it was loaded, and save it to the output folder.

    Returns:
        W on the CPU, and the accelerator that the model is on.
    """
    transform = loaded or ConceptTransform(as_dual_encoder(case.model).dim, towers=args.towers)
    check_foldable(case.model, transform.projections)  # as `write` does in the end
    if loaded is not None:
        accelerator = Accelerator(cpu=config.use_cpu)
        case.model.to(accelerator.device)
    else:
        trainer = concept_trainer(case, transform, config)
        print_numbers(trainer)
        trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
        accelerator = trainer.accelerator
    if accelerator.is_main_process:
        transform.save(str(config.output_dir))
    return transform.cpu(), accelerator


def concept_trainer(case: Case, transform: ConceptTransform, config: ConceptConfig) -> ConceptTrainer:
    """Return the trainer of W."""
    return ConceptTrainer(
        case.model,
        transform,
        args=config,
        train_dataset=case.train,
        processing_class=case.processor,
        candidate_texts=case.train.all_texts,
    )


def measure(
    case: Case, transform: ConceptTransform, args: SteerArguments, config: ConceptConfig, accelerator: Accelerator
) -> SteerResult:
    """Choose t on validation images and measure all scales on test images."""

    def embedded(images: RobustnessImages) -> VariantEmbeddings:
        return embed_variants(
            case.model,
            images,
            [case.task.prompt_template],
            batch_size=config.per_device_eval_batch_size,
            num_workers=config.dataloader_num_workers,
            accelerator=accelerator,
            disable_tqdm=bool(config.disable_tqdm),
        )

    path: ScalePath = args.path or ("singular" if transform.towers == "shared" else "straight")
    chosen = choose_scale(args, embedded(case.validation), transform, path).t
    ts = sorted({*args.t, chosen})
    test = embedded(case.test)
    return SteerResult(
        path,
        chosen,
        sweep_scales(test, transform, ts, path),
        [] if case.unseen is None else sweep_scales(embedded(case.unseen), transform, ts, path),
        meeting_point(args, test, transform, path) if args.choose == "neutral" else None,
    )


def choose_scale(
    args: SteerArguments, validation: VariantEmbeddings, transform: ConceptTransform, path: ScalePath
) -> ScalePoint:
    """Choose t as the arguments ask, on a grid of tenths between the lowest and the highest --t.

    The neutral t is then refined to hundredths, because accuracy changes by points between tenths.

    Raises:
        ValueError: If no t on the grid qualifies, as in `choose_within` and `choose_neutral`.
    """
    tenths = range(math.ceil(10 * min(args.t)), math.floor(10 * max(args.t)) + 1)
    grid = sorted({*args.t, *(tenth / 10 for tenth in tenths)})
    if args.choose == "at_most":
        return choose_within(sweep_scales(validation, transform, grid, path), args.max_clean_cost)
    # The crossing depends on the values only, so the intervals are not computed.
    near = choose_neutral(sweep_scales(validation, transform, grid, path, resamples=1)).t
    hundredths = [round(near + hundredth / 100, 4) for hundredth in range(-10, 11)]
    inside = [t for t in hundredths if grid[0] <= t <= grid[-1]]
    return choose_neutral(sweep_scales(validation, transform, inside, path, resamples=1))


def meeting_point(
    args: SteerArguments, test: VariantEmbeddings, transform: ConceptTransform, path: ScalePath
) -> ScalePoint | None:
    """Return the neutral point on the measured images, or None if there is none.

    It is reported to show how far off the t chosen on validation images is. It is not used as a choice.
    """
    try:
        return choose_scale(args, test, transform, path)
    except ValueError:  # no neutral point on these images
        return None


def write(
    case: Case,
    transform: ConceptTransform,
    result: SteerResult,
    args: SteerArguments,
    config: ConceptConfig,
    seconds: float,
) -> None:
    """Write checkpoint, curve.png and report.json to the output folder."""
    folder = Path(str(config.output_dir))
    checkpoint = folder / "checkpoint"
    shutil.rmtree(checkpoint, ignore_errors=True)
    transform.fold_into(case.model, result.chosen, result.path).save_pretrained(checkpoint)
    case.processor.save_pretrained(checkpoint)
    case.task.save(checkpoint)
    curves = {
        "right": [point.right for point in result.points],
        "reading": [point.reading for point in result.points],
        "clean": [point.clean_accuracy for point in result.points],
    }
    ts = [point.t for point in result.points]
    save_figure(sweep_plot(ts, curves, xlabel="scale t", chosen=result.chosen), folder / "curve.png")
    write_report(
        folder / "report.json",
        command="steer",
        models={
            **{f"t={point.t:g}": point.metrics() for point in result.points},
            **{f"t={point.t:g}, unseen fonts": point.metrics() for point in result.unseen_points},
        },
        settings={
            **asdict(args),
            "path": result.path,
            "towers": transform.towers,
            "chosen": result.chosen,
            "meets_at": None if result.meeting is None else result.meeting.t,
            "training": {name: getattr(config, name) for name in (*DEFAULTS, "seed")},
        },
        data=case.about,
        seconds=seconds,
    )


def print_result(case: Case, result: SteerResult, args: SteerArguments, folder: Path, seconds: float) -> None:
    """Print the table, the choice and where the files are."""
    chosen, meeting = result.chosen, result.meeting
    print(f"{len(case.test)} typographic images; in brackets 95% intervals:\n")
    print(scale_table({f"{point.t:g}": point for point in result.points}))
    print(f"\nChosen on {len(case.validation)} validation images ({args.choose}): t = {chosen:g}. {seconds:.0f} s.")
    if meeting is not None:
        apart = f"{meeting.difference.value:.1f} points apart"
        print(f"On the images measured themselves the two answers meet at t = {meeting.t:g}, {apart}.")
    for point in (point for point in result.unseen_points if point.t == chosen):
        found = f"reading {format_estimate(point.reading)}, right {format_estimate(point.right)}"
        print(f"The same t on the words of an attack that training did not see: {found}.")
    print(f"W:          {folder / CONCEPT_FILE}\nCheckpoint: {folder / 'checkpoint'}")
    print(f"Report:     {folder / 'report.json'}\nCurve:      {folder / 'curve.png'}")
