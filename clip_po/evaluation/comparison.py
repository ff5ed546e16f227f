"""Stored answers of several methods and seeds, and the table that compares them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clip_po.bounded_text import parse_json
from clip_po.evaluation.bootstrap import Estimate
from clip_po.evaluation.bounds import within
from clip_po.evaluation.report.report_file import write_json
from clip_po.evaluation.robustness import Answers, RobustnessImages
from clip_po.evaluation.tables import format_estimate, format_table
from clip_po.hub.redaction import redacted

RESULT, ANSWERS, OTHER_TASKS = "result.json", "answers.npz", "other_tasks.npz"


class ComparisonResults:
    """The answers of each method and seed, stored in files so that a stopped comparison can continue.

    Args:
        folder: Folder with one subfolder per method, and in each one subfolder per seed.
        settings: Settings that every result depends on. Stored with each result and compared when it is found again.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder, self.settings = folder, json.loads(json.dumps(settings, default=str))

    def path(self, name: str, seed: int) -> Path:
        """Return the folder of a method and seed.

        Args:
            name: Name of the method.
            seed: Its seed.

        Returns:
            The folder, which may not exist yet.
        """
        return self.folder / name / f"seed-{seed}"

    def find(self, name: str, seed: int, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the stored result of a method and seed, or None if the method has not finished.

        Args:
            name: Name of the method.
            seed: Its seed.
            settings: Its settings.

        Returns:
            Settings, seconds and details.

        Raises:
            ValueError: If the stored result was measured with other settings.
        """
        file = self.path(name, seed) / RESULT
        if not file.is_file():
            return None
        result: dict[str, Any] = parse_json(file.read_text())
        # Stored settings are redacted, so the comparison must redact the current ones too.
        now = redacted({**self.settings, "method": json.loads(json.dumps(settings, default=str))})
        if differ := sorted(k for k in now if result["settings"].get(k) != now[k]):
            raise ValueError(
                f"{file.parent} holds {name!r}, seed {seed}, with other settings ({', '.join(differ)}). Remove the "
                "folder to run the method again, or choose another --output_dir."
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
        other_tasks: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    ) -> None:
        """Store the result of a method and seed.

        Args:
            name: Name of the method.
            seed: Its seed.
            settings: Its settings.
            answers: By attack and variant, array [N] of predicted classes.
            seconds: Duration of the method.
            details: What the method selected or learned.
            other_tasks: By retention set and name, arrays of one number per image.
        """
        folder = self.path(name, seed)
        folder.mkdir(parents=True, exist_ok=True)
        _save(folder / ANSWERS, answers)
        _save(folder / OTHER_TASKS, other_tasks or {})
        kept = {**self.settings, "method": settings}
        # Written last: a folder with this file is complete.
        write_json(folder / RESULT, {"settings": kept, "seconds": seconds, "details": details})

    def answers(self, name: str, seed: int, attack: str) -> dict[str, np.ndarray]:
        """Return the stored answers of a method and seed under one attack.

        Args:
            name: Name of the method.
            seed: Its seed.
            attack: Name of the attack.

        Returns:
            By variant, array [N] of predicted classes.
        """
        with np.load(self.path(name, seed) / ANSWERS, allow_pickle=False) as arrays:
            return {key.rpartition("/")[2]: arrays[key] for key in arrays if key.rpartition("/")[0] == attack}

    def other_tasks(self, name: str, seed: int) -> dict[str, dict[str, np.ndarray]]:
        """Return what is stored of a method and seed about other tasks.

        Args:
            name: Name of the method.
            seed: Its seed.

        Returns:
            By retention set and name, arrays of one number per image.
        """
        found: dict[str, dict[str, np.ndarray]] = {}
        with np.load(self.path(name, seed) / OTHER_TASKS, allow_pickle=False) as arrays:
            for key in arrays:
                above, _, array = key.rpartition("/")
                found.setdefault(above, {})[array] = arrays[key]
        return found


def _save(path: Path, arrays: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    flat = {f"{above}/{name}": array for above, by_name in arrays.items() for name, array in by_name.items()}
    with path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **flat)


def pool_seeds(images: RobustnessImages, predicted: Mapping[str, Sequence[Mapping[str, np.ndarray]]]) -> Answers:
    """Pool the answers of several seeds: the images repeat once per seed, clustered by image.

    Args:
        images: The images that the models answered, N items.
        predicted: By model, one mapping per seed from variant to array [N] of predicted classes. The answers of a
            model with a single seed are repeated for every seed.

    Returns:
        Answers about S * N items, where S is the number of seeds.
    """
    seeds = max(len(runs) for runs in predicted.values())

    def concatenated(runs: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        repeated = list(runs) * (seeds if len(runs) == 1 else 1)
        return {variant: np.concatenate([run[variant] for run in repeated]) for variant in images.variants}

    label, word, written, cluster = (
        np.tile(array, seeds) for array in (images.label, images.word, images.written, images.cluster)
    )
    by_model = {name: concatenated(runs) for name, runs in predicted.items()}
    return Answers(images.class_names, label, word, written, cluster, by_model)


def best_method(metrics: Mapping[str, Mapping[str, Estimate]], max_clean_cost: float) -> str | None:
    """Return the method with the highest recovery among those within a bound on the clean cost.

    Args:
        metrics: By method, estimates of at least `clean_cost` and `recovery`.
        max_clean_cost: The bound, in percentage points.

    Returns:
        Name of the method; None if no method within the bound has a defined recovery.
    """
    recoveries = {
        name: found["recovery"].value
        for name, found in metrics.items()
        if within(found["clean_cost"].value, max_clean_cost) and math.isfinite(found["recovery"].value)
    }
    return max(recoveries, key=lambda name: recoveries[name]) if recoveries else None


def cheapest_method(metrics: Mapping[str, Mapping[str, Estimate]]) -> str:
    """Return the method with the lowest clean cost.

    Args:
        metrics: By method, at least one, estimates of at least `clean_cost`.

    Returns:
        Name of the method.
    """
    return min(metrics, key=lambda name: metrics[name]["clean_cost"].value)


def describe_best(metrics: Mapping[str, Mapping[str, Estimate]], max_clean_cost: float) -> str:
    """Name the best method within a bound on the clean cost, or say that there is none.

    Args:
        metrics: As for `best_method`, of at least one method.
        max_clean_cost: The bound, in percentage points.

    Returns:
        One line.
    """
    best, cheapest = best_method(metrics, max_clean_cost), cheapest_method(metrics)
    if best is not None:
        recovery = format_estimate(metrics[best]["recovery"])
        return f"Highest recovery at no more than {max_clean_cost:g} points of clean accuracy: {best} ({recovery})"
    cost = metrics[cheapest]["clean_cost"]
    if within(cost.value, max_clean_cost):
        return "No method has a recovery: the words cost the model nothing before alignment."
    return (
        f"No method costs at most {max_clean_cost:g} points of clean accuracy. The cheapest, {cheapest}, costs "
        f"{format_estimate(cost, 1)}. Allow more with --max_clean_cost, or add methods with a higher reg_weight."
    )


def comparison_table(
    metrics: Mapping[str, Mapping[str, Estimate]], seconds: Mapping[str, float], attacks: Sequence[str]
) -> str:
    """Format the metrics of all methods as a Markdown table, one row per method.

    Args:
        metrics: By method, estimates by metric. Metrics of all attacks but the first have the prefix "ATTACK: ".
        seconds: Mean duration of each method; methods without one get an empty cell.
        attacks: Names of the attacks. The first one gives clean cost, recovery, fooled and blank sticker.
            Retention cost and drift have columns if they were measured.

    Returns:
        The table.
    """
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
    kept = {"retention cost": "retention_cost", "drift": "kl"}
    columns |= {header: metric for header, metric in kept.items() if any(metric in m for m in metrics.values())}
    rows = [
        [
            name,
            *(found.get(metric) for metric in columns.values()),
            f"{seconds[name]:.0f}" if name in seconds else "",
        ]
        for name, found in metrics.items()
    ]
    return format_table(["method", *columns, "seconds"], rows)
