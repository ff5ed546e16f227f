"""How a trainer gets its batches: by number or from a stream, with what the reference knows, none lost unseen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import ProcessorMixin
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput

from clip_po.concept.transform import ConceptTransform
from clip_po.config import ContrastivePOConfig
from clip_po.data.checking import checked_pairs
from clip_po.data.collator import WithNotes
from clip_po.data.embedding_cache import EmbeddingCache
from clip_po.data.pairs import EvaluationPairs, PreferencePairs
from clip_po.data.sampler import EpochSampler
from clip_po.data.skipped_rows import SkippedRows
from clip_po.data.stream_reader import StreamMark
from clip_po.data.streamed_pairs import StreamedPairs, checked_stream, is_stream
from clip_po.reference import SEES, ReferencePolicy, embed_fixed_images

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class FeedsRows(_Base):
    """What a trainer does to get its batches; the rows that it skips are counted in its logs."""

    args: ContrastivePOConfig
    processing_class: ProcessorMixin
    reference: ReferencePolicy
    concept: ConceptTransform | None
    candidate_texts: list[str] | None
    reg_dataset: Dataset | None
    _sum_over_processes: Callable[[Tensor], Tensor]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stream_mark: StreamMark | None = None
        self._skipped = {True: SkippedRows(), False: SkippedRows()}

    def _training_pairs(
        self, dataset: Any, args: ContrastivePOConfig, concept: ConceptTransform | None
    ) -> PreferencePairs:
        if not is_stream(dataset):
            return checked_pairs(dataset, self.reg_dataset, self.candidate_texts, args, "train_dataset")
        if concept is not None:
            raise ValueError(
                "train_dataset is streamed, but a concept's transformation is trained on embeddings that are computed "
                "once and seen in many steps. Load the data without streaming=True."
            )
        return checked_stream(dataset, self.reg_dataset, self.candidate_texts, args, "train_dataset")

    def _evaluation_pairs(
        self, dataset: Any, args: ContrastivePOConfig, name: str = "eval_dataset"
    ) -> PreferencePairs:
        return checked_pairs(dataset, self.reg_dataset, self.candidate_texts, args, name, EvaluationPairs)

    def _embed_fixed_images(self, pairs: PreferencePairs, pays: bool) -> None:
        """Let the reference see fixed images once, where it pays or the arguments say so."""
        wanted = self.args.precompute_ref_log_probs
        pairs.without_images = self.concept is not None
        if (pays or self.concept is not None) if wanted is None else wanted:
            with self.accelerator.autocast():
                embed_fixed_images(
                    self.reference,
                    pairs,
                    self.processing_class,
                    self.accelerator,
                    self.args.eval_batch_size,
                    self.args.dataloader_num_workers,
                    bool(self.args.disable_tqdm),
                    EmbeddingCache(self.args.embeddings_cache) if self.args.embeddings_cache else None,
                    self.reference.sees if self.concept is None else SEES,
                )

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Rows in the order of `EpochSampler`, with the reference's embeddings of fixed images where that pays."""
        if self.train_dataset is None:
            raise ValueError("Training needs a train_dataset; pass it to the trainer.")
        if isinstance(self.train_dataset, StreamedPairs):
            self.train_dataset.multiple = self._global_batch_size()
            return self._loader(self.train_dataset, self._train_batch_size, seed=None, drop_last=False)
        rows = len(self.train_dataset) * self.args.num_train_epochs
        if self.args.max_steps > 0:
            rows = self.args.max_steps * self.args.gradient_accumulation_steps * self._global_batch_size()
        self._embed_fixed_images(self.train_dataset, pays=rows > len(self.train_dataset))
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        if self.args.train_sampling_strategy == "sequential":
            seed = None
        return self._loader(self.train_dataset, self._train_batch_size, seed, self.args.dataloader_drop_last)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Rows in the order of the data set; a `str` names one of several evaluation data sets."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        if dataset is None:
            raise ValueError("Evaluation needs an eval_dataset; pass it to the trainer or to evaluate().")
        if not isinstance(dataset, PreferencePairs):
            dataset = self._evaluation_pairs(dataset, self.args)
        self._embed_fixed_images(dataset, pays=False)  # embeddings of every row stay only where they are asked for
        return self._loader(dataset, self.args.eval_batch_size, seed=None, drop_last=False)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """As `get_eval_dataloader`."""
        return self.get_eval_dataloader(test_dataset)

    def _global_batch_size(self) -> int:
        return self._train_batch_size * self.accelerator.num_processes

    def _loader(self, dataset: PreferencePairs, batch_size: int, seed: int | None, drop_last: bool) -> DataLoader[Any]:
        # A data set smaller than a batch is one batch, not one filled up with rows of weight 0.
        batch_size = min(batch_size, -(-len(dataset) // self.accelerator.num_processes))
        sampler = EpochSampler(len(dataset), batch_size * self.accelerator.num_processes, seed, drop_last)
        loader = self.accelerator.prepare(
            DataLoader(
                dataset,
                batch_size=batch_size,
                sampler=sampler,
                collate_fn=WithNotes(self.data_collator),
                num_workers=self.args.dataloader_num_workers,
                pin_memory=self.args.dataloader_pin_memory and torch.accelerator.is_available(),
                prefetch_factor=self.args.dataloader_prefetch_factor,
                # An evaluation has a loader of its own: its workers would stay for good.
                persistent_workers=self.args.dataloader_persistent_workers and seed is not None,
                multiprocessing_context=getattr(self.args, "dataloader_multiprocessing_context", None),
            )
        )
        # accelerate passes the epoch on to the sampler only from here; else a resume would replay epoch 0.
        loader.set_sampler(sampler)
        return loader

    # ---- Streams -------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As `Trainer.train`; a stream goes on where the checkpoint says that it stood."""
        self._stream_mark = None
        self._skipped[True] = SkippedRows()
        if isinstance(self.train_dataset, StreamedPairs):
            anew = self.args.ignore_data_skip or not resume_from_checkpoint
            self.train_dataset.start_from(None if anew else StreamMark.load(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The batches of an optimizer step."""
        batches, weights = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and isinstance(self.train_dataset, StreamedPairs):
            self._stream_mark = batches[-1].pop("stream_mark")
            if self.accelerator.num_processes > 1:
                self._check_same_rows(self._stream_mark, device)
        return batches, weights

    def _check_same_rows(self, mark: StreamMark, device: torch.device) -> None:
        """Refuse to deal rows of streams that differ: some would come twice, others never."""
        digests = self.accelerator.gather(torch.tensor([mark.agreed], device=device)).tolist()
        if len(set(digests)) > 1:
            raise ValueError(
                f"The processes read other rows than each other from train_dataset (in its pass {mark.epoch}): some "
                "would be counted twice. Give its shuffling a seed, stream.shuffle(seed=0), and have a generator give "
                "the same rows everywhere."
            )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self._stream_mark is not None and self.args.should_save:
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            self._stream_mark.save(Path(self._get_output_dir(trial=trial), name))

    # ---- Skipped rows --------------------------------------------------------------------------------------

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        self._skipped[self.model.training].add(inputs.pop("skipped", ()))
        return super()._prepare_inputs(inputs)

    def _skipped_rows(self, training: bool, fewest: int) -> dict[str, float]:
        """What the logs say of them, where rows may be skipped."""
        if self.args.on_bad_image == "raise":
            return {}
        count = self._skipped[training].pop(self._sum_over_processes, self.accelerator.device, fewest)
        return {"skipped_rows": count}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the number of rows that were skipped since the last log."""
        if "loss" in logs or "train_loss" in logs:  # Trainer's own of training, which every process writes
            rows = 1 if "train_loss" in logs else len(self.train_dataset)
            logs = {**logs, **self._skipped_rows(training=True, fewest=rows)}
        super().log(logs, start_time)

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate, and count the rows that were skipped."""
        self._skipped[False] = SkippedRows()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        skipped = self._skipped_rows(training=False, fewest=1)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in skipped.items()})
        return output
