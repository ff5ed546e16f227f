"""Images per second and core of attack and processor, compared with Pillow alone on the same images.

    python benchmarks/input_pipeline.py --dataset_name path/to/photographs --json input_pipeline.json

Pillow alone decodes a file, resizes it to the model's input size and writes a word on it. clip_po reads a row of a
dataset, draws its attack and computes the model's pixels. They take turns on the same files, on one thread, measured
in processor time. Two drawings are compared: upright words only, and the default attack (turned, outlined, half of the
words on stickers), which Pillow then draws too. A further column relates all to Pillow's upright words, the least
drawing possible. Loaders with workers are timed by wall clock, on whole batches.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from inputs import class_names, clip_config, letter_processor
from PIL import Image, ImageDraw, ImageFont
from timing import parser, ratio, report
from torch import set_num_threads
from torch.utils.data import DataLoader

from clip_po.data.attacks.attack import TypographicAttack
from clip_po.data.attacks.drawing import SMALLEST_TEXT, TextStyle
from clip_po.data.attacks.fonts import load_font
from clip_po.data.collator import DataCollatorForContrastivePreference
from clip_po.data.images import to_pixels
from clip_po.data.loading import load_split
from clip_po.data.pairs import PreferencePairs
from clip_po.data.sampler import EpochSampler
from clip_po.data.typographic_preferences import TypographicPreferences
from clip_po.evaluation.tables import format_table

GOAL = 0.8
BATCH = 32
SIDES = (500, 375)
CLASSES = 100
BICUBIC = Image.Resampling.BICUBIC
UPRIGHT, TURNED = "upright words", "turned, outlined, half on stickers"


def made_up_photographs(rows: int) -> Dataset:
    """Create JPEG files of ordinary size with made-up classes, in memory."""
    files = []
    for row in range(rows):
        blocks = np.random.default_rng(row).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(blocks).resize(SIDES, BICUBIC).save(file, "JPEG", quality=90)
        files.append({"bytes": file.getvalue(), "path": None})
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=class_names(CLASSES))})
    return Dataset.from_dict({"image": files, "label": [row % CLASSES for row in range(rows)]}, features=features)


@dataclass
class PillowAlone:
    """A simple attack with Pillow alone: one line, at any position, in a colour that may not be legible."""

    files: list[bytes]
    words: list[str]
    styles: list[TextStyle]
    side: int

    def resized(self, row: int) -> Image.Image:
        """Decode the image and resize its short side to the model's input size."""
        image = Image.open(io.BytesIO(self.files[row])).convert("RGB")
        scale = self.side / min(image.size)
        return image.resize((round(image.width * scale), round(image.height * scale)), BICUBIC)

    def upright(self, row: int) -> Image.Image:
        """Draw an upright word in one call."""
        image, style = self.resized(row), self.styles[row]
        place = (style.place[0] * 0.5 * image.width, style.place[1] * 0.5 * image.height)
        ImageDraw.Draw(image).text(place, self.words[row], fill=style.colours[0], font=self._font(row))
        return image

    def turned(self, row: int) -> Image.Image:
        """Draw a word that is turned, outlined and on a sticker, as the style says."""
        image, style, word, font = self.resized(row), self.styles[row], self.words[row], self._font(row)
        stroke = round(style.outline * font.size)
        left, top, right, bottom = font.getbbox(word, stroke_width=stroke)
        padding = round(0.04 * self.side) if style.sticker else 0
        size = (round(right - left) + 2 * padding, round(bottom - top) + 2 * padding)
        layer = Image.new("RGBA", size, (*(style.sticker or style.colours[0]), 255 if style.sticker else 0))
        ImageDraw.Draw(layer).text(
            (padding - left, padding - top),
            word,
            fill=style.colours[0],
            font=font,
            stroke_width=stroke,
            stroke_fill=style.colours[1],
        )
        layer = layer.rotate(style.rotation, BICUBIC, expand=True)
        x, y = (
            round(share * max(0, whole - part))
            for share, whole, part in zip(style.place, image.size, layer.size, strict=True)
        )
        image.paste(layer, (x, y), layer)
        return image

    def _font(self, row: int) -> ImageFont.FreeTypeFont:
        style = self.styles[row]
        wanted = round(style.size * self.side)
        length = load_font(style.font, wanted).getlength(self.words[row])
        return load_font(style.font, max(SMALLEST_TEXT, min(wanted, int(wanted * self.side / length))))


def processor_seconds(make: Callable[[int], object], rows: int) -> float:
    start = time.process_time()
    for row in range(rows):
        make(row)
    return time.process_time() - start


def take_turns(ways: dict[str, tuple[int, Callable[[int], object]]], rows: int, rounds: int) -> dict[str, list[float]]:
    """Return images per second and core of each way in each round, after one warm-up round."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, (images, make) in ways.items():
            found[name].append(images * rows / processor_seconds(make, rows))
    return {name: speeds[1:] for name, speeds in found.items()}


def loader_speeds(
    pairs: PreferencePairs, collator: DataCollatorForContrastivePreference, workers: list[int], rounds: int
) -> dict[int, list[float]]:
    """Return rows per second of whole epochs by wall clock, after one warm-up epoch that starts the workers."""
    sampler = EpochSampler(len(pairs), BATCH, seed=0)
    found: dict[int, list[float]] = {count: [] for count in workers}
    loaders = {
        count: DataLoader(
            pairs, BATCH, sampler=sampler, collate_fn=collator, num_workers=count, persistent_workers=count > 0
        )
        for count in workers
    }
    for _ in range(rounds + 1):
        for count, loader in loaders.items():
            start = time.perf_counter()
            total = sum(len(batch["weight"]) for batch in loader)
            found[count].append(total / (time.perf_counter() - start))
    return {count: speeds[1:] for count, speeds in found.items()}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--dataset_name", help="photographs with classes; default: made-up ones")
    arguments.add_argument("--dataset_split", default="train")
    arguments.add_argument("--rows", type=int, default=400)
    arguments.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    args = arguments.parse_args()
    args.threads = 1
    set_num_threads(1)
    rows = 2 * BATCH if args.quick else args.rows
    named = args.dataset_name is not None
    photographs = load_split(args.dataset_name, args.dataset_split) if named else made_up_photographs(rows)
    rows = min(rows, len(photographs))
    photographs = photographs.select(range(rows))
    processor = letter_processor(clip_config(quick=False))

    side = processor.image_processor.size["shortest_edge"]
    attack = TypographicAttack(photographs.features["label"].names, crop=side)  # as clip-po train draws
    drawn = TypographicPreferences(photographs, attack)
    upright = TypographicPreferences(photographs, replace(attack, rotation=(0, 0), outline=(0, 0), sticker=0))
    pairs = PreferencePairs(drawn, "clean_image")
    collator = DataCollatorForContrastivePreference(processor, drawn.candidate_texts)
    alone = PillowAlone(
        [row["image"]["bytes"] for row in photographs.cast_column("image", ImageFeature(decode=False))],
        [attack.word(row, exclude={drawn.class_names[drawn.labels[row]]}) for row in range(rows)],
        [attack.style(row) for row in range(rows)],
        side,
    )
    ways = {
        f"Pillow, {UPRIGHT}": (1, alone.upright),
        f"attack + processor, {UPRIGHT}": (1, lambda row: to_pixels(processor, [upright.row(row, 0)["image"]])),
        f"Pillow, {TURNED}": (1, alone.turned),
        f"attack + processor, {TURNED}": (1, lambda row: to_pixels(processor, [drawn.row(row, 0)["image"]])),
        "preference and clean image, collated": (2, lambda row: collator([pairs[0, row, row]])),
    }
    speeds = take_turns(ways, rows, 1 if args.quick else args.rounds)
    like = {name: f"Pillow, {UPRIGHT if UPRIGHT in name else TURNED}" for name in ways}
    found = {
        name: {
            "images_per_second_and_core": statistics.median(speed),
            "of_pillow_with_the_same_drawing": ratio(speed, speeds[like[name]]),
            "of_pillow_with_upright_words": ratio(speed, speeds[f"Pillow, {UPRIGHT}"]),
        }
        for name, speed in speeds.items()
    }
    of_same = f"of Pillow, same drawing (goal {GOAL})"
    columns = ["one thread", "images/s and core", of_same, "of Pillow, upright words"]
    print(format_table(columns, [[name, *values.values()] for name, values in found.items()], digits=2), end="\n\n")

    scaled = loader_speeds(pairs, collator, args.workers, 1 if args.quick else args.rounds)
    base = scaled[args.workers[0]]
    workers = {
        count: {"rows_per_second": statistics.median(speed), f"of_{args.workers[0]}_workers": ratio(speed, base)}
        for count, speed in scaled.items()
    }
    columns = ["workers", "rows/s", f"of {args.workers[0]} workers"]
    table = [[str(count), *values.values()] for count, values in workers.items()]
    report(args, columns, table, {"drawing": found, "workers": workers})


if __name__ == "__main__":
    main()
