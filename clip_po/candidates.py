"""The candidates among which a policy chooses: the same for every row, each row's own, or the global batch's."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor, distributed

from clip_po.candidate_images import OwnCandidates, gather_objects, in_batch_images
from clip_po.losses.global_batch import of_all_processes, processes
from clip_po.text_identity import TextTokens
from clip_po.validation import check_candidates


class CandidateTexts:
    """The candidate texts of every row, or none where each row names its own.

    Args:
        texts: M different texts, at least two; None where each row names its own.
        tokens: The token ids that the text tower reads, which tell texts apart; None to compare the texts themselves.

    Attributes:
        texts: The texts as a tuple, or None.
        tokens: The argument.

    Raises:
        ValueError: If there are fewer than two texts, one is empty, or the model can't tell two of them apart.
        TypeError: If `texts` is not a list, or an entry is not a string.
    """

    def __init__(self, texts: Sequence[str] | None = None, tokens: TextTokens | None = None) -> None:
        check_candidates(texts)
        self.texts = None if texts is None else tuple(texts)
        self.tokens = tokens
        if tokens is not None and self.texts is not None:
            tokens.warn_of_cut(tokens.learn(self.texts), "candidate_texts")
            tokens.check_differ(self.texts, "candidate_texts", "Give each candidate once.")
        self._positions = {text: position for position, text in enumerate(self.texts or ())}

    def __bool__(self) -> bool:
        """Whether texts were given for every row."""
        return self.texts is not None

    def position(self, text: str) -> int:
        """Return the position of a text among those given for every row.

        Args:
            text: One of `texts`.

        Returns:
            Its position, 0..M-1.

        Raises:
            KeyError: If `text` is not among them, or no texts were given for every row.
        """
        return self._positions[text]

    def identity(self, text: str) -> Hashable:
        """Return what is the same for two texts if, and only if, the model can't tell them apart.

        Args:
            text: Any text.

        Returns:
            Its token ids; without a tokenizer, the text itself.
        """
        return text if self.tokens is None else self.tokens(text)

    def of_batch(self, batch: Mapping[str, Any]) -> Sequence[str]:
        """Return the texts that positions in a batch refer to: those given for every row, else `batch["texts"]`.

        Args:
            batch: Batch of `DataCollatorForContrastivePreference`. Its `texts` are read only if there are none for
                every row.

        Returns:
            The texts, in the order of the positions.
        """
        return self.texts if self.texts is not None else batch["texts"]

    def are_shared(self, batch: Mapping[str, Any]) -> bool:
        """Return whether the texts of a batch are the same in every process.

        Args:
            batch: Batch of `DataCollatorForContrastivePreference`, or of `in_batch_candidates`.

        Returns:
            False if they are those of the rows of this process. The answer is the same in every process.
        """
        return bool(self) or "candidates" not in batch or "images_of_processes" in batch


def in_batch_candidates(batch: Mapping[str, Any], identity: Callable[[str], Hashable] = str) -> dict[str, Any]:
    """Make every text of the global batch a candidate of each row, and every image of each row anchored at its text.

    Texts with one identity are one candidate, and so are images with one number in `image_ids`. Rows that do not count
    add no candidates. All processes must call this function together. Under gradient accumulation, a global batch is
    one micro-batch of all processes.

    Args:
        batch: The rows of this process, as `DataCollatorForContrastivePreference` makes them without
            `candidate_texts`.
        identity: What is the same for two texts that the model can't tell apart, as `CandidateTexts.identity`.

    Returns:
        The batch without `candidates`. Its `texts` are the texts of all processes, each once and in the order of the
        rows; `chosen` [B] and `rejected` [B, R] are positions in them. If a row of any process is anchored at its
        text, as `in_batch_images` returns it.
    """
    everyone = gather_objects((batch["texts"], OwnCandidates.of(batch)))
    every = [text for texts, _ in everyone for text in texts]
    counted = [text for texts, own in everyone for n, text in enumerate(texts) if n in own.texts]
    first: dict[Hashable, str] = {}
    for text in counted or every:
        first.setdefault(identity(text), text)
    place = {known: position for position, known in enumerate(first)}
    moved = batch["chosen"].new_tensor([place.get(identity(text), 0) for text in batch["texts"]])
    candidates = moved[batch["candidates"].clamp(min=0)]
    chosen, rejected = batch["chosen"].unsqueeze(-1), batch["rejected"]
    shared = {
        **{name: value for name, value in batch.items() if name != "candidates"},
        "texts": list(first.values()),
        "chosen": candidates.gather(-1, chosen.clamp(min=0)).masked_fill(chosen < 0, -1).squeeze(-1),
        "rejected": candidates.gather(-1, rejected.clamp(min=0)).masked_fill(rejected < 0, -1),
    }
    images = [own for _, own in everyone]
    if not any(own.anchored for own in images):
        return shared
    return in_batch_images(batch, shared, candidates, images)


def share_of_texts(texts: Sequence[str]) -> list[str]:
    """Return the share of the candidate texts that this process encodes. All shares have the same size.

    Args:
        texts: M texts, the same in every process.

    Returns:
        ceil(M / processes) texts, padded with empty ones; all of them with a single process.
    """
    each = -(-len(texts) // processes())
    start = each * (distributed.get_rank() if processes() > 1 else 0)
    own = list(texts[start : start + each])
    return [*own, *[""] * (each - len(own))]


def embeds_of_all(embeds: Tensor, count: int) -> Tensor:
    """Gather the embeddings of all candidate texts from the shares that the processes encoded.

    The gradient of a text is summed over processes and reaches the process that encoded it.

    Args:
        embeds: Tensor[ceil(M / processes), D], the embeddings of `share_of_texts`.
        count: M, the number of texts.

    Returns:
        Tensor[M, D], the same in every process.
    """
    return of_all_processes(embeds)[:count]
