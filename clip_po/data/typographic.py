"""How a labelled image becomes a preference by a typographic attack, whether its rows have numbers or come by."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from clip_po.data.attacks.typographic import TypographicAttack
from clip_po.data.formats import Row


class TypographicRows:
    """What labelled images as preferences have in common: an attack, the classes, and which texts are rejected.

    Args:
        attack: Draws words and styles.
        class_names: The classes by label.
        template: Prompt of a class, with one `{}`.
        rejected: "word" rejects the text of each written word, "others" those of all other classes too.

    Raises:
        ValueError: A template without its one `{}`, or an unknown `rejected`.
        TypeError: No TypographicAttack.
    """

    column_names = ("image", "clean_image", "chosen", "rejected", "weight")

    def __init__(self, attack: TypographicAttack, class_names: Sequence[str], template: str, rejected: str) -> None:
        if rejected not in ("word", "others"):
            raise ValueError(f"rejected must be 'word' or 'others', got {rejected!r}.")
        if not isinstance(attack, TypographicAttack):
            raise TypeError(
                f"attack must be a TypographicAttack, such as TypographicAttack(words=class_names), got {attack!r}."
            )
        if not isinstance(template, str) or template.count("{}") != 1:
            raise ValueError(f"template must hold one '{{}}' where the class name goes, got {template!r}.")
        self.attack = attack
        self.class_names = list(class_names)
        self.template = template
        self.rejected = rejected

    @property
    def candidate_texts(self) -> list[str]:
        """The prompts of the classes: candidate texts for the trainer."""
        return [self.template.replace("{}", name) for name in self.class_names]

    @property
    def texts(self) -> list[str]:
        """Every text that a row may carry."""
        names = dict.fromkeys((*self.class_names, *self.attack.vocabulary))
        return [self.template.replace("{}", name) for name in names]

    @property
    def most_rejected(self) -> int:
        """The largest number of rejected texts of a row."""
        others = len(self.class_names) - 1 if self.rejected == "others" else 0
        return max(self.attack.count[1], others)

    @property
    def redrawn(self) -> bool:
        """Whether the images differ from epoch to epoch."""
        return self.attack.redraw == "every_epoch"

    def attacked(self, clean: Image.Image, label: int, index: int, epoch: int) -> Image.Image:
        """The image of row `index` with its words of `epoch` on it."""
        return self.attack.draw(clean, " ".join(self._written(label, index, epoch)), index, epoch)

    def preference(self, label: int, index: int, epoch: int) -> Row:
        """The chosen text and the rejected ones of row `index` in `epoch`."""
        name, words = self.class_names[label], self._written(label, index, epoch)
        others = [n for n in self.class_names if n != name and n not in words] if self.rejected == "others" else []
        return {
            "chosen": self.template.replace("{}", name),
            "rejected": [self.template.replace("{}", rejected) for rejected in (*words, *others)],
        }

    def _written(self, label: int, index: int, epoch: int) -> Sequence[str]:
        return self.attack.written(index, epoch, exclude={self.class_names[label]})
