"""An open vocabulary: texts about everyday things, over which a regularization or a drift compares two models."""

from __future__ import annotations

from collections.abc import Sequence

from clip_po.data.attacks.words import EVERYDAY_WORDS, spelling
from clip_po.validation import check_templates


def open_vocabulary(template: str, extra: Sequence[str] = ()) -> list[str]:
    """Return prompts for everyday nouns and for words of your own.

    Args:
        template: A prompt with one `{}` for the word, such as "a photo of a {}".
        extra: Words to add, such as class names. Each replaces the everyday noun that is a spelling of it.

    Returns:
        One prompt per word. No two words are spellings of one another.

    Raises:
        ValueError: If the template does not contain exactly one `{}`.
    """
    check_templates([template], "template")
    words = {spelling(word): word for word in (*EVERYDAY_WORDS, *extra)}
    return [template.replace("{}", word) for word in words.values()]
