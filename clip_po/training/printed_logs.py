"""Logs for outputs that are not a terminal: one line each, with numbers as numbers."""

from __future__ import annotations

from typing import Any

from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class NumbersCallback(TrainerCallback):
    """Prints logs as dictionaries of numbers. `PrinterCallback`, which is for the same outputs, prints texts."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print the numbers, with four digits.

        Args:
            args: Not used.
            state: Tells the process that prints.
            control: Not used.
            logs: The numbers by name.
            **kwargs: Not used.
        """
        if state.is_world_process_zero and logs:
            shown = {name: float(f"{v:.4g}") if isinstance(v, float) else v for name, v in logs.items()}
            shown.pop("total_flos", None)
            print(shown, flush=True)


def print_numbers(trainer: Trainer) -> None:
    """Let a trainer without progress bars print its logs as numbers.

    Args:
        trainer: The trainer.
    """
    if trainer.args.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(NumbersCallback())
