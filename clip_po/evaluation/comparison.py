"""Answers of several methods and seeds: kept in files as they come, pooled, and set side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clip_po.evaluation.bootstrap import Estimate
from clip_po.evaluation.report.report_file import write_json
from clip_po.evaluation.robustness import Answers, RobustnessImages
from clip_po.evaluation.tables import format_table
from clip_po.hub.redaction import redacted

RESULT, ANSWERS = "result.json", "answers.npz"


class Results:
    """What each method and seed answered, kept in files, so that a stopped comparison goes on."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder, self.settings = folder, json.loads(json.dumps(settings, default=str))

    def path(self, name: str, seed: int) -> Path:
        """Folder of a method and seed."""
        return self.folder / name / f"seed-{seed}"

    def find(self, name: str, seed: int, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """What is known of a method and seed; None where it did not run to its end.

        Raises:
            ValueError: It ran with other settings.
        """
        file = self.path(name, seed) / RESULT
        if not file.is_file():
            return None
        result: dict[str, Any] = json.loads(file.read_text())
        # Without secrets, as they were written.
        now = redacted({**self.settings, "method": json.loads(json.dumps(settings, default=str))})
        if differ := sorted(k for k in now if result["settings"].get(k) != now[k]):
            raise ValueError(
                f"{file.parent} holds {name!r}, seed {seed}, with other settings ({', '.join(differ)}). Remove the "
                "folder to run it again, or give another --output_dir."
            )
        return result

    def add(
        self,
        name: str,
        seed: int,
        settings: Mapping[str, Any],
        answers: Mapping[str, Mapping[str, np.ndarray]],
        seconds: float,
        details: Mapping[str, Any],
    ) -> None:
        """Keep the answers by attack and variant; the mark that they are whole is written last."""
        folder = self.path(name, seed)
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {f"{attack}/{v}": said for attack, by_variant in answers.items() for v, said in by_variant.items()}
        with (folder / ANSWERS).open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        kept = {**self.settings, "method": settings}
        write_json(folder / RESULT, {"settings": kept, "seconds": seconds, "details": details})

    def answers(self, name: str, seed: int, attack: str) -> dict[str, np.ndarray]:
        """Answers by variant."""
        with np.load(self.path(name, seed) / ANSWERS, allow_pickle=False) as arrays:
            return {key.rpartition("/")[2]: arrays[key] for key in arrays if key.rpartition("/")[0] == attack}


def pooled(images: RobustnessImages, said: Mapping[str, Sequence[Mapping[str, np.ndarray]]]) -> Answers:
    """Answers of several seeds as of one data set: the same images again for each seed, clustered by image.

    Args:
        images: What was asked about.
        said: By model, one mapping a seed; a model with a single one is the same for all.
    """
    seeds = max(len(each) for each in said.values())

    def together(each: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        every = list(each) * (seeds if len(each) == 1 else 1)
        return {variant: np.concatenate([one[variant] for one in every]) for variant in images.variants}

    label, word, written, cluster = (
        np.tile(a, seeds) for a in (images.label, images.word, images.written, images.cluster)
    )
    return Answers(
        images.class_names, label, word, written, cluster, {name: together(each) for name, each in said.items()}
    )


def comparison_table(
    found: Mapping[str, Mapping[str, Estimate]], seconds: Mapping[str, float], attacks: Sequence[str]
) -> str:
    """One row a method, with what each attack does to it."""
    first, *others = attacks
    columns = {
        "clean cost": "clean_cost",
        f"recovery, {first}": "recovery",
        "sd": "recovery_sd",
        f"reading, {first}": "reading_effect",
        "fooled": "fooled",
        "blank sticker": "blank_accuracy",
    }
    for attack in others:
        columns |= {
            f"reading, {attack}": f"{attack}: reading_effect",
            f"kept, {attack}": f"{attack}: kept_answers",
        }
    rows = [
        [
            name,
            *(metrics.get(metric) for metric in columns.values()),
            f"{seconds[name]:.0f}" if name in seconds else "",
        ]
        for name, metrics in found.items()
    ]
    return format_table(["method", *columns, "seconds"], rows)
