"""The position in a streamed training data set: kept with every checkpoint, and the same in every process."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from clip_po.data.stream_reader import StreamMark
from clip_po.training.checkpoints import checkpoint_folder, saving


class StreamPositionCallback(TrainerCallback):
    """Saves the position in the stream with every checkpoint, so that a resumed run reads the rows that follow."""

    def __init__(self) -> None:
        self.mark: StreamMark | None = None

    def follow(self, mark: StreamMark, accelerator: Accelerator) -> None:
        """Keep the position after a batch.

        Args:
            mark: Position of the stream.
            accelerator: Accelerator of the trainer; every process must call the method.

        Raises:
            ValueError: If the processes read different rows: some would be used twice, others never.
        """
        self.mark = mark
        if accelerator.num_processes == 1:
            return
        digests = accelerator.gather(torch.tensor([mark.agreed], device=accelerator.device)).tolist()
        if len(set(digests)) > 1:
            raise ValueError(
                f"The processes read different rows from train_dataset (in pass {mark.epoch}), so some rows would be "
                "counted twice. Give its shuffling a seed, stream.shuffle(seed=0), and make a generator return the "
                "same rows in every process."
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the position into the checkpoint.

        Args:
            args: `output_dir`. Processes that do not save do nothing.
            state: The step, which names the checkpoint.
            control: Not used.
            **kwargs: Not used.

        Raises:
            SavingError: If the file can't be written.
        """
        if self.mark is not None and args.should_save:
            folder = checkpoint_folder(args, state)
            with saving(folder, str(args.output_dir)):
                self.mark.save(folder)
