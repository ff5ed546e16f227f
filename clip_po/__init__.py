"""Align contrastive vision-language models by preference optimization.

Public names are loaded when they are first used, so that what needs none of torch stays quick.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clip_po.config import ContrastivePOConfig
    from clip_po.data.collator import DataCollatorForContrastivePreference
    from clip_po.data.pairs import TypographicPreferences
    from clip_po.data.typographic import TypographicAttack
    from clip_po.evaluation.robustness import (
        RobustnessImages,
        evaluate_robustness,
        robustness_report,
        robustness_table,
    )
    from clip_po.evaluation.zero_shot import zero_shot_accuracy
    from clip_po.trainer import ContrastivePOTrainer

_HOMES = {
    "ContrastivePOConfig": "clip_po.config",
    "ContrastivePOTrainer": "clip_po.trainer",
    "DataCollatorForContrastivePreference": "clip_po.data.collator",
    "RobustnessImages": "clip_po.evaluation.robustness",
    "TypographicAttack": "clip_po.data.typographic",
    "TypographicPreferences": "clip_po.data.pairs",
    "evaluate_robustness": "clip_po.evaluation.robustness",
    "robustness_report": "clip_po.evaluation.robustness",
    "robustness_table": "clip_po.evaluation.robustness",
    "zero_shot_accuracy": "clip_po.evaluation.zero_shot",
}

__all__ = [
    "ContrastivePOConfig",
    "ContrastivePOTrainer",
    "DataCollatorForContrastivePreference",
    "RobustnessImages",
    "TypographicAttack",
    "TypographicPreferences",
    "evaluate_robustness",
    "robustness_report",
    "robustness_table",
    "zero_shot_accuracy",
]

__version__ = version("clip_po")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'clip_po' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
