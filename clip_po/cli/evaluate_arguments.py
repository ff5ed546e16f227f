"""Arguments of `clip-po evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from clip_po.cli.arguments import TaskArguments
from clip_po.evaluation.fairness.report import RESAMPLES
from clip_po.validation import COUNT, COUNT_OR_NONE, check_number


@dataclass
class FairnessArguments:
    """Arguments of `clip-po evaluate --fairness`."""

    fairness: str | None = field(
        default=None,
        metadata={"help": "Measure bias instead: which groups of images are ranked first; the column of the groups."},
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
        metadata={"help": "For --fairness: numbers of top-ranked images, or shares of all images below 1."},
    )
    desired_share: str = field(
        default="dataset",
        metadata={"help": "For --fairness: the desired share of each group.", "choices": ["dataset", "uniform"]},
    )
    zero_count: float = field(
        default=1.0, metadata={"help": "For --fairness: the smallest count of a group, so that it has a logarithm."}
    )
    cluster_column: str | None = field(
        default=None,
        metadata={
            "help": "For --fairness and preferences: column that identifies related images, such as the person."
        },
    )
    resamples: int = field(
        default=RESAMPLES, metadata={"help": "For --fairness: number of resamples for the intervals."}
    )


@dataclass
class EvaluateArguments(FairnessArguments, TaskArguments):
    """Arguments of `clip-po evaluate`."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "The checkpoint: a folder or a Hub id."})
    base_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The model before alignment, which the checkpoint is compared with."}
    )
    output_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder for the report, the picture and the answer to each image. Default: "
            "evaluation/<dataset>-<split>/<time> in the checkpoint's folder."
        },
    )
    renderings: int = field(default=1, metadata={"help": "Number of attacks per image."})
    batch_size: int = field(default=128, metadata={"help": "Images per batch."})
    num_workers: int = field(default=0, metadata={"help": "Worker processes that read and draw images."})
    on_bad_image: Literal["raise", "skip"] = field(
        default="raise",
        metadata={"help": "What to do with an unreadable image: raise, or skip its row and count it in the report."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the attacks."})
    suite: str | None = field(
        default=None,
        metadata={
            "help": "Measure a suite instead: typographic, retention, retrieval, fairness or a YAML file; with "
            "--dataset_name, run its measurement on that dataset."
        },
    )
    suite_folder: str | None = field(
        default=None,
        metadata={"help": "Folder of local copies of a suite's datasets, each in a folder of its name."},
    )
    retention: list[str] | None = field(
        default=None,
        metadata={
            "help": "Also measure what the model keeps of other tasks, in another table: sets of images, each a "
            "folder, a file or a Hub id with an optional :split, a name of the suite retention, or a YAML file of a "
            "suite. Labelled sets give accuracy, all sets give drift."
        },
    )
    caption_column: str = field(
        default="caption", metadata={"help": "Column of captions, for datasets without classes and --suite retrieval."}
    )

    def __post_init__(self) -> None:
        """Check the arguments; a suite brings its own datasets."""
        for name in ("renderings", "batch_size"):
            check_number(f"--{name}", getattr(self, name), COUNT)
        for name in ("resamples", "num_workers"):
            check_number(f"--{name}", getattr(self, name), COUNT_OR_NONE)
        if self.retention is not None and (self.suite is not None or self.fairness is not None):
            other = "--suite" if self.suite is not None else "--fairness"
            raise ValueError(
                f"--retention has no effect next to {other}, which is another measurement. Leave one of them out. "
                "--suite retention measures the suite's sets alone."
            )
        if self.suite is None:
            super().__post_init__()
        else:
            self.check()
