"""Identity of texts: two texts are the same to the model if its text tower reads the same token ids.

CLIP's tokenizer converts texts to lower case and folds spaces. The text tower reads a limited number of tokens, and
its embedding is that of the first end-of-text token, so nothing after that token counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from clip_po.dual_encoder import as_dual_encoder
from clip_po.families import HIGHEST_ID

logger = logging.get_logger(__name__)

TokenIds = tuple[int, ...]

MOST_TEXTS = 65_536
"""Number of texts whose token ids are kept, so that a text of its own in every row fills no memory."""


class TextTokens:
    """The token ids that a text tower reads.

    Args:
        tokenizer: Tokenizer of the model.
        longest: Largest number of tokens that the text tower reads.
        end: Id of the token whose embedding is that of the text; `HIGHEST_ID` for the highest id of each text, None
            if all tokens count.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, longest: int, end: int | None) -> None:
        self.tokenizer, self.longest, self.end = tokenizer, longest, end
        self._known: dict[str, TokenIds] = {}

    @classmethod
    def of(cls, processor: Any, model: nn.Module) -> TextTokens:
        """Return the token ids of the text tower of a model.

        Args:
            processor: Processor of the model.
            model: The model.

        Returns:
            The token ids, cut to the length that the text tower reads.
        """
        encoder = as_dual_encoder(model)
        return cls(processor.tokenizer, encoder.token_limit, encoder.end)

    def __call__(self, text: str) -> TokenIds:
        """Return the token ids that the text tower reads of a text, up to the end-of-text token."""
        if text not in self._known:
            self.learn([text])
        return self._known[text]

    def learn(self, texts: Iterable[str]) -> int:
        """Tokenize texts together, which is faster than one by one.

        Args:
            texts: The texts.

        Returns:
            The number of texts not tokenized before that are cut because they have more than `longest` tokens.
        """
        if len(self._known) > MOST_TEXTS:
            self._known.clear()
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if not new:
            return 0
        whole = self.tokenizer(new, verbose=False)["input_ids"]
        read = self.tokenizer(new, truncation=True, max_length=self.longest)["input_ids"]
        self._known.update((text, self._until_end(ids)) for text, ids in zip(new, read, strict=True))
        return sum(len(ids) > self.longest for ids in whole)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": {}}  # worker processes need none of it

    def _until_end(self, ids: Sequence[int]) -> TokenIds:
        end = max(ids) if self.end == HIGHEST_ID else self.end
        return tuple(ids[: ids.index(end) + 1]) if end is not None and end in ids else tuple(ids)

    def check_differ(self, texts: Sequence[str], where: str, remedy: str) -> None:
        """Raise if the model can't tell two texts apart.

        Args:
            texts: The texts.
            where: Name of the texts in messages.
            remedy: A sentence that says what to do.

        Raises:
            ValueError: If the token ids of two texts are the same; the message quotes both texts.
        """
        first: dict[TokenIds, str] = {}
        for text in texts:
            other = first.setdefault(self(text), text)
            if other != text:
                raise ValueError(
                    f"{where}: {other!r} and {text!r} have the same token ids, so the model can't tell them apart. "
                    "The tokenizer ignores case and repeated spaces, and the model reads at most "
                    f"{self.longest} tokens, up to the first end-of-text token. {remedy}"
                )

    def warn_of_cut(self, cut: int, name: str) -> None:
        """Warn if texts are longer than the text tower reads.

        Args:
            cut: Number of such texts.
            name: Name of the texts in messages.
        """
        if cut:
            logger.warning(
                f"{cut} text{'s' * (cut > 1)} of {name} cut to the {self.longest} tokens that the model reads. The "
                "rest has no effect. Shorten texts that differ only there."
            )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> None:
    """Raise if the embeddings of a text tower would not depend on the text alone.

    Args:
        tokenizer: Tokenizer of the processor.
        model: The model.

    Raises:
        ValueError: If the tokenizer pads on the left, or writes no end-of-text token that the model knows.
    """
    encoder = as_dual_encoder(model)
    pads_others = encoder.padding == "longest"  # a text padded to the full length does not depend on its batch
    if pads_others and getattr(tokenizer, "padding_side", "right") != "right":
        raise ValueError(
            f"The tokenizer has padding_side={tokenizer.padding_side!r}, so the embedding of a text would depend on "
            "the other texts of its batch: CLIP numbers the positions from the left. Set "
            "processor.tokenizer.padding_side = 'right'."
        )
    end = encoder.end
    if end is None:
        return
    ids = tokenizer(["a"])["input_ids"][0]
    found = ids.index(max(ids)) == len(ids) - 1 if end == HIGHEST_ID else end in ids[1:]
    if not found:
        own = encoder.model.text_model.eos_token_id
        raise ValueError(
            f"The end-of-text token of the model is {own}, but the tokenizer turns a text into {ids}, which does not "
            "end with it, so texts would get the same embedding. Load the processor of the same checkpoint as the "
            f"model, or set eos_token_id in the text_config of its config.json to {tokenizer.eos_token_id}, the "
            "tokenizer's, and load the model again."
        )
