"""Train the embedded model from scratch: a small CLIP that sees handwritten digits and reads words.

    python scripts/pretrain_digits_clip.py

First words and digits apart, in black on white; then both on one image, with the labels known by two linear heads
on the image tower; then images are contrasted with captions, the heads still at half weight. The heads are thrown
away. As on the web, the caption of an image with a word on it often repeats the word: hence words fool the model.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import random
import string
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.utils.logging import disable_progress_bar

from clip_po.data.attacks.attack import TypographicAttack
from clip_po.data.attacks.drawing import PILLOW_FONT
from clip_po.data.attacks.fonts import font_files
from clip_po.data.digits import (
    DIGIT_NAMES,
    IMAGE_SIDE,
    MODEL_PATH,
    PROMPT_TEMPLATE,
    digit_attack,
    digits_table,
    load_digits_dataset,
    render_digit,
    split_digits,
)

OTHER_WORDS = (
    "apple", "bird", "blue", "boat", "book", "cake", "cat", "chair", "cup", "dog",
    "door", "fish", "green", "hand", "hat", "horse", "house", "key", "lamp", "milk",
    "moon", "open", "pear", "red", "sale", "shoe", "star", "stop", "tea", "tree",
)  # fmt: skip
WORDS = (*DIGIT_NAMES, *OTHER_WORDS)
NUMBER_TEMPLATES = (PROMPT_TEMPLATE, PROMPT_TEMPLATE, "the number {}", "a picture of a {}", "{}")
WORD_TEMPLATES = ("a photo of the word {}", "a photo of a {}", "the word {}", "a picture of a {}", "{}")
FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique", "STIXGeneral",
    "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta", "cmr10", "cmb10", "cmss10", "cmtt10", "cmti10",
)  # fmt: skip
"""Fonts from matplotlib, without DejaVu Serif and DejaVu Sans Mono, which are used for tests."""

PLACES_OF_WORDS = ("top", "top-left", "top-right", "bottom", "bottom-left", "bottom-right", "anywhere")

STAGES = {"plain": 4, "together": 7, "captions": 9}
"""Stages of the training, and the number of image pools in each."""

NO_DIGIT, MEANINGLESS, NO_WORD = len(DIGIT_NAMES), len(WORDS), len(WORDS) + 1


@dataclass
class Examples:
    """Rendered images and their content.

    Attributes:
        images: uint8[N, 3, side, side].
        digits: int64[N], 0..9 or `NO_DIGIT`.
        words: int64[N], index in `WORDS`, `MEANINGLESS` or `NO_WORD`.
        captions: int64[N], index in `WORDS` of what the caption names (in the stage "plain": without meaning).
    """

    images: Tensor
    digits: Tensor
    words: Tensor
    captions: Tensor


def writer(seed: int, plain: bool) -> TypographicAttack:
    """Writes words, mostly near the upper or lower edge, in more fonts and sizes than the attacks of the demo."""
    return TypographicAttack(
        words=WORDS,
        fonts=(PILLOW_FONT, PILLOW_FONT, *font_files(FONTS)),
        size=(0.21, 0.29),
        places=PLACES_OF_WORDS,
        outline=(0.0, 0.0),
        rotation=(0.0, 0.0),
        sticker=0.0,
        min_contrast=2.5,
        min_side=IMAGE_SIDE,
        seed=seed,
        **({"colours": ("black",)} if plain else {}),
    )


def render_chunk(job: tuple[int, int, bool, float]) -> tuple[np.ndarray, ...]:
    """Render `count` examples of training digits: word or digit in black on white if `plain`, else both in colours."""
    seed, count, plain, parroting = job
    rng = random.Random(seed)
    noise = np.random.default_rng(seed)
    table, labels = digits_table()
    ids, attack = split_digits()["train"], writer(seed, plain)
    blank = np.zeros_like(table[0])
    images = np.empty((count, IMAGE_SIDE, IMAGE_SIDE, 3), np.uint8)
    facts = np.empty((3, count), np.int64)
    for row in range(count):
        if plain:
            has_digit = rng.random() < 0.3
            has_word = not has_digit
        else:
            has_digit = rng.random() < 0.9
            has_word = not has_digit or rng.random() < 0.75
        digit, pixels = NO_DIGIT, blank
        if has_digit:
            chosen = rng.choice(ids)
            digit = int(labels[chosen])
            pixels = np.clip(table[chosen] + 0.08 * noise.standard_normal((8, 8)), 0, 1)
        image = render_digit(pixels, f"{seed}/{row}", size=(0.42, 0.6), rotation=14.0, shear=0.18)
        if plain:
            image = blacken(image)
        word = NO_WORD
        if has_word:
            kind = rng.random()
            if not plain and not has_digit:
                kind *= 0.7  # a meaningless string is never alone, because its caption could name nothing
            if kind < 0.5:
                word = rng.randrange(len(DIGIT_NAMES))
            elif kind < 0.7:
                word = rng.randrange(len(DIGIT_NAMES), len(WORDS))
            else:
                word = MEANINGLESS
            text = WORDS[word] if word != MEANINGLESS else gibberish(rng, attack, row)
            image = attack.draw(image, text, row)
        images[row] = np.asarray(image)
        share = parroting if word < len(DIGIT_NAMES) else 0.5
        names_word = word < MEANINGLESS and (not has_digit or rng.random() < share)
        facts[:, row] = digit, word, word if names_word else digit
    return images, facts


def blacken(image: Image.Image) -> Image.Image:
    """Return the same drawing in black on white."""
    grey = image.convert("L")
    darkest, lightest = grey.getextrema()
    if darkest == lightest:  # nothing is drawn
        return Image.new("RGB", image.size, "white")
    return ImageOps.autocontrast(grey).convert("RGB")


def gibberish(rng: random.Random, attack: TypographicAttack, row: int) -> str:
    """Return a string that is not in `WORDS`, mostly consonants, as in the occlusion control."""
    if rng.random() < 0.7:
        return attack.meaningless(rng.choice(DIGIT_NAMES), row)
    while True:
        text = "".join(rng.choice(string.ascii_lowercase) for _ in range(rng.randint(3, 5)))
        if text not in WORDS:
            return text


def render(pool: multiprocessing.pool.Pool, seed: int, count: int, plain: bool, parroting: float) -> Examples:
    """Render examples in all processes."""
    size = 1000
    jobs = [(seed * 10_000 + part, size, plain, parroting) for part in range(-(-count // size))]
    images, facts = zip(*pool.map(render_chunk, jobs, chunksize=1), strict=True)
    digits, words, captions = torch.from_numpy(np.concatenate(facts, axis=1))
    pixels = torch.from_numpy(np.concatenate(images)).permute(0, 3, 1, 2).contiguous()
    return Examples(pixels, digits, words, captions)


def augment(images: Tensor, plain: bool, generator: torch.Generator) -> Tensor:
    """Shift, recolour and dim a batch.

    Args:
        images: uint8[B, 3, side, side].
        plain: Shift it only.
        generator: Random number generator.

    Returns:
        Tensor[B, 3, side, side], normalized to -1..1 as the image processor does.
    """
    size, side = len(images), images.shape[-1]
    reach = 1
    padded = nn.functional.pad(images.float() / 127.5 - 1, [reach] * 4, mode="replicate")
    down, right = torch.randint(0, 2 * reach + 1, (2,), generator=generator).tolist()
    if plain:  # teach the shape of letters first
        return padded[..., down : down + side, right : right + side]
    channels = torch.randperm(3, generator=generator)
    batch = padded[:, channels, down : down + side, right : right + side]
    gain = 0.8 + 0.2 * torch.rand(size, 1, 1, 1, generator=generator)
    shift = (1 - gain) * (2 * torch.rand(size, 1, 1, 1, generator=generator) - 1)
    return batch * gain + shift + 0.03 * torch.randn(batch.shape, generator=generator)


def build_tokenizer() -> CLIPTokenizer:
    """Return a character tokenizer with merges for the words of the prompts."""
    characters = string.ascii_lowercase + string.digits + string.punctuation
    tokens = [*characters, *(f"{character}</w>" for character in characters)]
    merges: list[tuple[str, str]] = []
    for word in ("a", "photo", "picture", "of", "the", "number", "word"):
        whole = word[0]
        for place, character in enumerate(word[1:], start=2):
            piece = character + "</w>" * (place == len(word))
            if (whole, piece) not in merges:
                merges.append((whole, piece))
                tokens.append(whole + piece)
            whole += piece
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=32)


def build_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Return an untrained model for the tokenizer."""
    ends = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": tokenizer.model_max_length,
        "hidden_act": "gelu",
        "projection_dim": 64,
        **ends,
    }
    vision = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIDE,
        "patch_size": 8,
        "hidden_act": "gelu",
        "projection_dim": 64,
    }
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)
    model = CLIPModel._from_config(config, attn_implementation="eager")  # faster than sdpa at this length
    # CLIP's initialization is for many layers of large patches. With it, the model learns to read three times as late.
    model.vision_model.embeddings.patch_embedding.weight.data.mul_(3)
    return model


def build_processor(tokenizer: CLIPTokenizer) -> CLIPProcessor:
    """Return the processor of the model."""
    square = {"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    half = [0.5, 0.5, 0.5]
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIDE}, crop_size=square, image_mean=half, image_std=half
    )
    return CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)


def contrastive_loss(image_embeds: Tensor, text_embeds: Tensor, scale: Tensor, positives: Tensor) -> Tensor:
    """Compute CLIP's loss over the images and the unique captions of a batch.

    Args:
        image_embeds: Tensor[B, D], unit-norm.
        text_embeds: Tensor[M, D], unit-norm.
        scale: Tensor[], inverse temperature.
        positives: int64[B], index of the caption of each image.

    Returns:
        Tensor[], mean of both directions; a caption's probability is shared by all images that it has.
    """
    logits = scale * image_embeds @ text_embeds.T
    to_text = nn.functional.cross_entropy(logits, positives)
    matches = nn.functional.one_hot(positives, len(text_embeds)).float()
    shares = matches / matches.sum(0, keepdim=True)
    to_image = -(shares * logits.log_softmax(0)).sum(0).mean()
    return (to_text + to_image) / 2


@torch.no_grad()
def evaluate(
    model: CLIPModel, processor: CLIPProcessor, split: str, settings: str, renderings: int
) -> dict[str, float]:
    """Measure zero-shot accuracy on clean, attacked and occluded renderings.

    Returns:
        clean, typographic (another number's name is written), occluded (a meaningless string in the same
        style), fooled (share of attacked images classified as the written name); all 0..1.
    """
    data = load_digits_dataset(split, renderings, seed=1)
    attack = digit_attack(settings, seed=1)
    prompts = [PROMPT_TEMPLATE.format(name) for name in DIGIT_NAMES]
    texts = processor(text=prompts, padding=True, return_tensors="pt")
    labels = torch.tensor(data["label"])
    clean = list(data["image"])
    words = [attack.word(row, exclude=[DIGIT_NAMES[label]]) for row, label in enumerate(labels.tolist())]
    written = torch.tensor([DIGIT_NAMES.index(word) for word in words])
    sets = {
        "clean": clean,
        "typographic": [
            attack.draw(image, word, row) for row, (image, word) in enumerate(zip(clean, words, strict=True))
        ],
        "occluded": [
            attack.draw_control(image, word, row) for row, (image, word) in enumerate(zip(clean, words, strict=True))
        ],
    }
    model.eval()
    results = {}
    for name, images in sets.items():
        guesses = []
        for start in range(0, len(images), 500):
            pixels = processor(images=images[start : start + 500], return_tensors="pt")["pixel_values"]
            guesses.append(model(pixel_values=pixels, **texts).logits_per_image.argmax(-1))
        guess = torch.cat(guesses)
        results[name] = (guess == labels).float().mean().item()
        if name == "typographic":
            results["fooled"] = (guess == written).float().mean().item()
    model.train()
    return results


def show(results: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in results.items())


class Pretraining:
    """Training state: the model, its two heads and its optimizer.

    Args:
        seed: Seed of the weights, the order and the augmentation.
        learning_rate: Highest rate of AdamW.
        steps: Optimizer steps in total, over which the rate falls to zero.
    """

    def __init__(self, seed: int, learning_rate: float, steps: int) -> None:
        torch.manual_seed(seed)
        self.generator = torch.Generator().manual_seed(seed)
        tokenizer = build_tokenizer()
        self.processor = build_processor(tokenizer)
        self.model = build_model(tokenizer).train()
        width = self.model.config.vision_config.hidden_size
        self.digit_head = nn.Linear(width, NO_DIGIT + 1)
        self.word_head = nn.Linear(width, NO_WORD + 1)
        modules = (self.model, self.digit_head, self.word_head)
        self.parameters = [parameter for module in modules for parameter in module.parameters()]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in self.parameters if p.ndim > 1], "weight_decay": 0.05},
                {"params": [p for p in self.parameters if p.ndim <= 1], "weight_decay": 0.0},
            ],
            betas=(0.9, 0.98),
        )
        self.learning_rate, self.steps, self.step_number = learning_rate, steps, 0

    def epoch(self, examples: Examples, stage: str, batch_size: int) -> Tensor:
        """Train one epoch.

        Returns:
            Tensor[3], mean losses: digit, word, caption.
        """
        batches = torch.randperm(len(examples.images), generator=self.generator).split(batch_size)
        return torch.stack([self.step(examples, rows, stage) for rows in batches]).mean(0)

    def step(self, examples: Examples, rows: Tensor, stage: str) -> Tensor:
        """Take one optimizer step. Return the losses of digit, word and caption before it."""
        warmup = min(1.0, self.step_number / 300)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * warmup * max(0.01, 1 - self.step_number / self.steps)
        pixels = augment(examples.images[rows], stage == "plain", self.generator)
        with torch.autocast("cpu", torch.bfloat16):  # three times as fast on processors with bfloat16
            features = self.model.vision_model(pixel_values=pixels).pooler_output
        features = features.float()
        digit_loss = nn.functional.cross_entropy(self.digit_head(features), examples.digits[rows])
        word_loss = nn.functional.cross_entropy(self.word_head(features), examples.words[rows])
        loss, caption_loss = digit_loss + word_loss, torch.zeros(())
        if stage == "captions":
            caption_loss = self.caption_loss(features, examples.captions[rows])
            loss = 0.5 * loss + caption_loss
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.model.logit_scale.data.clamp_(max=math.log(100))  # as in the CLIP paper
        self.step_number += 1
        return torch.stack([digit_loss, word_loss, caption_loss]).detach()

    def caption_loss(self, features: Tensor, captions: Tensor) -> Tensor:
        """Contrast images with the batch's unique captions.

        Args:
            features: Tensor[B, width] of the image tower.
            captions: int64[B], index in `WORDS` of what each caption names.
        """
        names, positives = captions.unique(return_inverse=True)
        number, word = (
            templates[int(torch.randint(len(templates), (), generator=self.generator))]
            for templates in (NUMBER_TEMPLATES, WORD_TEMPLATES)
        )
        texts = [(number if name < len(DIGIT_NAMES) else word).format(WORDS[name]) for name in names.tolist()]
        tokens = self.processor(text=texts, padding=True, return_tensors="pt")
        image_embeds = nn.functional.normalize(self.model.visual_projection(features), dim=-1)
        text_embeds = nn.functional.normalize(self.model.get_text_features(**tokens).pooler_output, dim=-1)
        return contrastive_loss(image_embeds, text_embeds, self.model.logit_scale.exp(), positives)

    def save(self, folder: Path) -> None:
        """Write the model and its processor."""
        disable_progress_bar()
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )

    def add(name: str, kind: type, default: object, text: str) -> None:
        parser.add_argument(name, type=kind, default=default, help=f"{text} (default: %(default)s)")

    add("--output", Path, MODEL_PATH, "folder of the model")
    add("--seed", int, 0, "seed of everything")
    for stage, pools in STAGES.items():
        add(f"--{stage}", int, pools, f"pools of rendered images in the stage {stage!r}")
    add("--pool-size", int, 20_000, "images of a pool, a multiple of 1000")
    add("--repeats", int, 3, "epochs over each pool")
    add("--batch-size", int, 128, "images of a batch")
    add("--learning-rate", float, 1e-3, "highest learning rate")
    add("--parroting", float, 0.7, "share of captions that repeat the number's name written on the image")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    start = time.monotonic()
    stages = [stage for stage in STAGES for _ in range(getattr(arguments, stage))]
    steps_of_pool = arguments.repeats * math.ceil(arguments.pool_size / arguments.batch_size)
    training = Pretraining(arguments.seed, arguments.learning_rate, len(stages) * steps_of_pool)
    model, processor = training.model, training.processor
    vision = model.vision_model.num_parameters()
    print(f"{model.num_parameters():,} parameters, {vision:,} of them in the image tower", flush=True)
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        for number, stage in enumerate(stages):
            seed = arguments.seed * 1000 + number
            examples = render(pool, seed, arguments.pool_size, stage == "plain", arguments.parroting)
            epochs = [training.epoch(examples, stage, arguments.batch_size) for _ in range(arguments.repeats)]
            digit, word, caption = torch.stack(epochs).mean(0).tolist()
            line = f"{time.monotonic() - start:5.0f} s  pool {number + 1}/{len(stages)}  {stage:8}  losses:"
            print(f"{line} digit {digit:.3f}  word {word:.3f}  caption {caption:.3f}", flush=True)
            if stage == "captions":
                training.save(arguments.output)
                print(
                    f"        validation: {show(evaluate(model, processor, 'validation', 'training', 2))}", flush=True
                )
    print(f"{time.monotonic() - start:5.0f} s, saved to {arguments.output}")
    for settings in ("training", "unseen"):
        print(f"test digits, {settings} fonts and places: {show(evaluate(model, processor, 'test', settings, 10))}")


if __name__ == "__main__":
    main()
