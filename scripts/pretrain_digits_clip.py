"""Train the embedded model from scratch: a small CLIP that sees handwritten digits and reads words.

    python scripts/pretrain_digits_clip.py

It reads first: words and digits apart, then words beside digits, with the labels known by two linear heads on
the image tower. The heads then fade out, and images are contrasted with captions. As on the web, the caption of
an image with a word on it often repeats the word: hence the model is fooled by words.
"""

from __future__ import annotations

import argparse
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
from clip_po.data.fonts import font_files
from clip_po.data.typographic import PILLOW_FONT, TypographicAttack

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
"""Of those that matplotlib carries: neither DejaVu Serif nor DejaVu Sans Mono, on which it is tested."""

PLACES_OF_WORDS = ("top", "top-left", "top-right", "bottom", "bottom-left", "bottom-right", "anywhere")

NO_DIGIT, MEANINGLESS, NO_WORD = len(DIGIT_NAMES), len(WORDS), len(WORDS) + 1


@dataclass
class Examples:
    """Rendered images and what is on them.

    Attributes:
        images: uint8[N, 3, side, side].
        digits: int64[N], 0..9 or `NO_DIGIT`.
        words: int64[N], index in `WORDS`, `MEANINGLESS` or `NO_WORD`.
        captions: int64[N], index in `WORDS` of what the caption names.
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
        if word < MEANINGLESS and (not has_digit or rng.random() < share):
            caption = word
        else:
            caption = digit
        facts[:, row] = digit, word, caption
    return images, facts


def blacken(image: Image.Image) -> Image.Image:
    """The same drawing in black on white."""
    grey = image.convert("L")
    paper = max(grey.getextrema())
    return (
        ImageOps.autocontrast(grey).convert("RGB")
        if grey.getextrema()[0] < paper
        else Image.new("RGB", image.size, "white")
    )


def gibberish(rng: random.Random, attack: TypographicAttack, row: int) -> str:
    """A string that is no word of `WORDS`: mostly consonants, as in the control of occlusion."""
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
        generator: Source of chance.

    Returns:
        Tensor[B, 3, side, side], normalized to -1..1 as the image processor does.
    """
    size, side = len(images), images.shape[-1]
    reach = 1
    padded = nn.functional.pad(images.float() / 127.5 - 1, [reach] * 4, mode="replicate")
    down, right = torch.randint(0, 2 * reach + 1, (2,), generator=generator).tolist()
    if plain:  # the shape of letters first
        return padded[..., down : down + side, right : right + side]
    channels = torch.randperm(3, generator=generator)
    batch = padded[:, channels, down : down + side, right : right + side]
    gain = 0.8 + 0.2 * torch.rand(size, 1, 1, 1, generator=generator)
    shift = (1 - gain) * (2 * torch.rand(size, 1, 1, 1, generator=generator) - 1)
    return batch * gain + shift + 0.03 * torch.randn(batch.shape, generator=generator)


def build_tokenizer() -> CLIPTokenizer:
    """A tokenizer of characters, with merges for the words of the prompts."""
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


def build_model(tokenizer: CLIPTokenizer, width: int, layers: int, ratio: int) -> CLIPModel:
    """An untrained model for the tokenizer."""
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
        "hidden_size": width,
        "intermediate_size": width * ratio,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
        "image_size": IMAGE_SIDE,
        "patch_size": 8,
        "hidden_act": "gelu",
        "projection_dim": 64,
    }
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)
    model = CLIPModel._from_config(config, attn_implementation="eager")  # faster than sdpa at this length
    # CLIP's start is for many layers of large patches; with it, reading begins three times as late.
    model.vision_model.embeddings.patch_embedding.weight.data.mul_(3)
    return model


def build_processor(tokenizer: CLIPTokenizer) -> CLIPProcessor:
    """The processor of the model's input."""
    square = {"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    half = [0.5, 0.5, 0.5]
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIDE}, crop_size=square, image_mean=half, image_std=half
    )
    return CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)


def contrastive_loss(image_embeds: Tensor, text_embeds: Tensor, scale: Tensor, positives: Tensor) -> Tensor:
    """CLIP's loss over the batch's images and its unique captions.

    Args:
        image_embeds: Tensor[B, D], unit-norm.
        text_embeds: Tensor[M, D], unit-norm.
        scale: Tensor[], inverse temperature.
        positives: int64[B], the caption of each image.

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
    """Zero-shot accuracy on clean, attacked and merely occluded renderings.

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
            attack.draw(image, attack.meaningless(word, row), row)
            for row, (image, word) in enumerate(zip(clean, words, strict=True))
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


def save(model: CLIPModel, processor: CLIPProcessor, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def show(results: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in results.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=MODEL_PATH, help="folder of the model (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything (default: %(default)s)")
    parser.add_argument("--pools", type=int, nargs=3, default=(6, 14, 16), metavar=("PLAIN", "TOGETHER", "CAPTIONS"),
                        help="rendered pools of each stage (default: %(default)s)")  # fmt: skip
    parser.add_argument("--pool-size", type=int, default=20_000, help="images of a pool (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="epochs over each pool (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=128, help="images of a batch (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="highest rate (default: %(default)s)")
    parser.add_argument("--parroting", type=float, default=0.62,
                        help="share of captions that repeat a number's name on the image (default: %(default)s)")  # fmt: skip
    parser.add_argument("--width", type=int, default=128, help="of the image tower (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="of the image tower (default: %(default)s)")
    parser.add_argument("--ratio", type=int, default=3, help="of its MLP to its width (default: %(default)s)")
    arguments = parser.parse_args()

    start = time.monotonic()
    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    tokenizer = build_tokenizer()
    processor = build_processor(tokenizer)
    model = build_model(tokenizer, arguments.width, arguments.layers, arguments.ratio).train()
    digit_head = nn.Linear(arguments.width, NO_DIGIT + 1)
    word_head = nn.Linear(arguments.width, NO_WORD + 1)
    parameters = [*model.parameters(), *digit_head.parameters(), *word_head.parameters()]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
    )
    vision = sum(p.numel() for p in model.vision_model.parameters())
    print(f"image tower of {vision:,} parameters, whole model {model.num_parameters():,}", flush=True)

    steps_of_pool = arguments.repeats * (arguments.pool_size // arguments.batch_size)
    total = sum(arguments.pools) * steps_of_pool
    step = 0
    stages = ["plain"] * arguments.pools[0] + ["together"] * arguments.pools[1] + ["captions"] * arguments.pools[2]
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        for number, stage in enumerate(stages):
            examples = render(
                pool, arguments.seed * 1000 + number, arguments.pool_size, stage == "plain", arguments.parroting
            )
            sums, count = torch.zeros(3), 0
            for _ in range(arguments.repeats):
                order = torch.randperm(len(examples.images), generator=generator)
                for rows in order.split(arguments.batch_size):
                    if len(rows) < arguments.batch_size:
                        continue
                    rate = arguments.learning_rate * min(1, step / 300) * max(0.01, 1 - step / total)
                    for group in optimizer.param_groups:
                        group["lr"] = rate
                    pixels = augment(examples.images[rows], stage == "plain", generator)
                    with torch.autocast("cpu", torch.bfloat16):
                        features = model.vision_model(pixel_values=pixels).pooler_output
                    features = features.float()
                    digit_loss = nn.functional.cross_entropy(digit_head(features), examples.digits[rows])
                    word_loss = nn.functional.cross_entropy(word_head(features), examples.words[rows])
                    loss = digit_loss + word_loss
                    caption_loss = torch.zeros(())
                    if stage == "captions":
                        names, positives = examples.captions[rows].unique(return_inverse=True)
                        number_template, word_template = (
                            templates[int(torch.randint(len(templates), (), generator=generator))]
                            for templates in (NUMBER_TEMPLATES, WORD_TEMPLATES)
                        )
                        captions = [
                            (number_template if name < len(DIGIT_NAMES) else word_template).format(WORDS[name])
                            for name in names.tolist()
                        ]
                        texts = processor(text=captions, padding=True, return_tensors="pt")
                        text_embeds = model.get_text_features(**texts).pooler_output
                        image_embeds = model.visual_projection(features)
                        caption_loss = contrastive_loss(
                            nn.functional.normalize(image_embeds, dim=-1),
                            nn.functional.normalize(text_embeds, dim=-1),
                            model.logit_scale.exp(),
                            positives,
                        )
                        loss = 0.5 * loss + caption_loss
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    nn.utils.clip_grad_norm_(parameters, 1.0)
                    optimizer.step()
                    model.logit_scale.data.clamp_(max=np.log(100))
                    sums += torch.stack([digit_loss.detach(), word_loss.detach(), caption_loss.detach()])
                    count += 1
                    step += 1
            digit_mean, word_mean, caption_mean = (sums / count).tolist()
            line = f"{time.monotonic() - start:5.0f} s  {stage:8}  {step}/{total}  losses: digit {digit_mean:.3f}  word {word_mean:.3f}"
            if stage == "captions":
                line += f"  caption {caption_mean:.3f}  scale {model.logit_scale.exp().item():.1f}"
                if number % 2 == 1 or number == len(stages) - 1:
                    line += "  validation: " + show(evaluate(model, processor, "validation", "training", 2))
                    save(model, processor, arguments.output)
            print(line, flush=True)

    save(model, processor, arguments.output)
    print(f"{time.monotonic() - start:5.0f} s, saved to {arguments.output}")
    for settings in ("training", "unseen"):
        print(f"test digits, {settings} fonts and places: {show(evaluate(model, processor, 'test', settings, 10))}")


if __name__ == "__main__":
    main()
