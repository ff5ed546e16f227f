"""Align contrastive vision-language models by preference optimization.

Public names are loaded when they are first used, so that what needs none of torch stays quick.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clip_po.averaging import BetaMovingAverageCallback, interpolate
    from clip_po.callbacks import RobustnessCallback
    from clip_po.concept import ConceptTransform, fold
    from clip_po.config import ContrastivePOConfig
    from clip_po.data.collator import DataCollatorForContrastivePreference
    from clip_po.data.pairs import TypographicPreferences
    from clip_po.data.streamed_pairs import TypographicStream
    from clip_po.data.typographic import TypographicAttack
    from clip_po.evaluation.choice import choose, sweep, sweep_table
    from clip_po.evaluation.robustness import (
        RobustnessImages,
        evaluate_robustness,
        robustness_report,
        robustness_table,
    )
    from clip_po.evaluation.zero_shot import zero_shot_accuracy
    from clip_po.labelling import pseudo_labels
    from clip_po.trainer import ContrastivePOTrainer

_HOMES = {
    "BetaMovingAverageCallback": "clip_po.averaging",
    "ConceptTransform": "clip_po.concept",
    "ContrastivePOConfig": "clip_po.config",
    "ContrastivePOTrainer": "clip_po.trainer",
    "DataCollatorForContrastivePreference": "clip_po.data.collator",
    "RobustnessCallback": "clip_po.callbacks",
    "RobustnessImages": "clip_po.evaluation.robustness",
    "TypographicAttack": "clip_po.data.typographic",
    "TypographicPreferences": "clip_po.data.pairs",
    "TypographicStream": "clip_po.data.streamed_pairs",
    "choose": "clip_po.evaluation.choice",
    "evaluate_robustness": "clip_po.evaluation.robustness",
    "fold": "clip_po.concept",
    "interpolate": "clip_po.averaging",
    "pseudo_labels": "clip_po.labelling",
    "robustness_report": "clip_po.evaluation.robustness",
    "robustness_table": "clip_po.evaluation.robustness",
    "sweep": "clip_po.evaluation.choice",
    "sweep_table": "clip_po.evaluation.choice",
    "zero_shot_accuracy": "clip_po.evaluation.zero_shot",
}

__all__ = [
    "BetaMovingAverageCallback",
    "ConceptTransform",
    "ContrastivePOConfig",
    "ContrastivePOTrainer",
    "DataCollatorForContrastivePreference",
    "RobustnessCallback",
    "RobustnessImages",
    "TypographicAttack",
    "TypographicPreferences",
    "TypographicStream",
    "choose",
    "evaluate_robustness",
    "fold",
    "interpolate",
    "pseudo_labels",
    "robustness_report",
    "robustness_table",
    "sweep",
    "sweep_table",
    "zero_shot_accuracy",
]

__version__ = version("clip_po")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'clip_po' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
