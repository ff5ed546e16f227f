"""Arguments of `clip-po score`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from clip_po.data.row_files import check_suffix
from clip_po.validation import COUNT, check_number

TEXTS, IMAGES = "texts", "images"
"""Values of --rank: what is ranked."""


@dataclass
class ScoreArguments:
    """Arguments of `clip-po score`."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The checkpoint: a folder or a Hub id of a model or of adapters."}
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "What to score: a folder of images, or a JSON lines, CSV, TSV or Parquet file whose rows hold "
            "images (paths relative to the file, or bytes) and texts."
        },
    )
    image_column: str = field(
        default="image", metadata={"help": "Column of the image, or of a list of images, of each row."}
    )
    text_column: str = field(
        default="text", metadata={"help": "Column of the text, or of a list of texts, of each row."}
    )
    text: list[str] | None = field(
        default=None, metadata={"help": "Texts to score every image against, in place of the column."}
    )
    texts: str | None = field(
        default=None, metadata={"help": "File with one text a line, in place of the column and of --text."}
    )
    rank: str | None = field(
        default=None,
        metadata={
            "help": "With --text or --texts: rank the texts for each image, or all images for each text. Default: "
            "images for a single text, else texts.",
            "choices": [TEXTS, IMAGES],
        },
    )
    top_k: int | None = field(
        default=None, metadata={"help": "Number of candidates to write, the best first. Default: all."}
    )
    output_file: str | None = field(
        default=None,
        metadata={"help": "JSON lines, CSV, TSV or Parquet file to write. Default: JSON lines on standard output."},
    )
    batch_size: int = field(default=64, metadata={"help": "Images per batch and process."})
    num_workers: int = field(default=4, metadata={"help": "Threads of each process that read images."})
    bf16: bool | None = field(
        default=None,
        metadata={"help": "Run the towers in bfloat16. Default: where the machine computes in it natively."},
    )

    def __post_init__(self) -> None:
        """Raise if arguments can't work, before anything is loaded.

        Raises:
            ValueError: If a required argument is missing, or arguments don't fit together.
        """
        if isinstance(self.text, str):  # in a recipe
            self.text = [self.text]
        if self.model_name_or_path is None:
            raise ValueError("--model_name_or_path is missing. Give a Hub id or the folder of a checkpoint.")
        if self.dataset_name is None or not Path(self.dataset_name).exists():
            given = "missing" if self.dataset_name is None else f"{self.dataset_name!r}, which does not exist"
            raise ValueError(f"--dataset_name is {given}. Give a folder of images or a table.")
        if self.text is not None and self.texts is not None:
            raise ValueError("--text and --texts both give the texts. Leave one of them out.")
        if Path(self.dataset_name).is_file():
            check_suffix(self.dataset_name, "--dataset_name")
        elif not self._shares_texts:
            raise ValueError(
                "--dataset_name is a folder, whose images have no texts. Give the texts with --text or --texts."
            )
        if self.rank is not None and self.rank not in (TEXTS, IMAGES):
            raise ValueError(f"--rank is {self.rank!r}. Choose {TEXTS} or {IMAGES}.")
        self._check_effects()
        if self.output_file is not None:
            check_suffix(self.output_file, "--output_file")
        if self.top_k is not None:
            check_number("--top_k", self.top_k, COUNT)
        check_number("--batch_size", self.batch_size, COUNT)
        check_number("--num_workers", self.num_workers, COUNT)

    @property
    def _shares_texts(self) -> bool:
        return self.text is not None or self.texts is not None

    def _check_effects(self) -> None:
        """Raise if a flag would have no effect."""
        if self.rank is not None and not self._shares_texts:
            raise ValueError(
                "--rank has no effect without --text or --texts: each row of a table ranks its own candidates. Leave "
                "it out."
            )
        if self.text_column != ScoreArguments.text_column and self._shares_texts:
            raise ValueError("--text_column has no effect next to --text and --texts. Leave one of them out.")
        if self.image_column != ScoreArguments.image_column and Path(str(self.dataset_name)).is_dir():
            raise ValueError(
                "--image_column has no effect for a folder of images, which has no columns. Leave it out."
            )

    def shared_texts(self) -> list[str] | None:
        """Return the texts that every image is scored against, each once; None if each row has its own.

        Raises:
            ValueError: If there are none, or one is empty.
            OSError: If the file can't be read.
        """
        if self.text is None and self.texts is None:
            return None
        given = self.text if self.texts is None else Path(self.texts).read_text(encoding="utf-8-sig").splitlines()
        found = list(dict.fromkeys(text for text in given or () if text.strip()))
        if not found:
            raise ValueError(f"{'--text' if self.texts is None else f'--texts {self.texts!r}'} has no text. Give one.")
        return found
