"""How far training moved a model: one line for people, numbers for trackers, and a file beside the model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clip_po.atomic_write import atomic_write
from clip_po.evaluation.bootstrap import Estimate
from clip_po.evaluation.tables import format_estimate, format_number

DRIFT_FILE = "drift.json"


@dataclass(frozen=True)
class TrainingDrift:
    """The drift of a trained model from its reference on clean training images, over an open vocabulary.

    Attributes:
        images: Number of images.
        texts: Number of texts of the vocabulary.
        kl: KL(reference || model), in nats, mean over images.
        agreement: Share of the images with the same most probable text, 0..1.
        cosine: Cosine of the image embeddings of both models, mean over images.
    """

    images: int
    texts: int
    kl: Estimate
    agreement: Estimate
    cosine: Estimate

    @classmethod
    def logged(cls, log_history: Sequence[Mapping[str, Any]]) -> TrainingDrift | None:
        """Return the last drift in the log of a trainer.

        Args:
            log_history: `log_history` of the trainer's state.

        Returns:
            The drift, of whose intervals only that of the KL is logged; None if no drift was logged.
        """
        logs = [log for log in log_history if "drift/kl" in log]
        if not logs:
            return None
        found = {name.removeprefix("drift/"): value for name, value in logs[-1].items()}
        kl = Estimate(found["kl"], found["kl_low"], found["kl_high"])
        agreement, cosine = Estimate(found["agreement"]), Estimate(found["cosine"])
        return cls(int(found["images"]), int(found["texts"]), kl, agreement, cosine)

    def logs(self) -> dict[str, float]:
        """Return the numbers that a trainer logs.

        Returns:
            Numbers by name with the prefix "drift/".
        """
        numbers = {
            "kl": self.kl.value,
            "kl_low": self.kl.low,
            "kl_high": self.kl.high,
            "agreement": self.agreement.value,
            "cosine": self.cosine.value,
            "images": self.images,
            "texts": self.texts,
        }
        return {f"drift/{name}": number for name, number in numbers.items()}

    def describe(self) -> str:
        """Describe the drift.

        Returns:
            One line, with the 95% interval of the KL.
        """
        agreement, cosine = (format_number(mean.value) for mean in (self.agreement, self.cosine))
        return (
            f"Drift on {self.images:,} clean training images over {self.texts:,} texts: "
            f"KL {format_estimate(self.kl)}, same answer {agreement}, cosine {cosine}."
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the drift to `DRIFT_FILE`, whole or not at all.

        Args:
            folder: Folder of the model.

        Raises:
            OSError: If the file can't be written.
        """
        with atomic_write(Path(folder, DRIFT_FILE)) as partial:
            partial.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
