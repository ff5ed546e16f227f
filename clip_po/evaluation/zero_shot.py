"""Zero-shot classification by prompts: what a CLIP model answers when asked for the class of an image."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from datasets import ClassLabel, Dataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from clip_po.evaluation.bootstrap import Estimate, bootstrap_interval
from clip_po.policy import dual_encoder


@dataclass(frozen=True)
class ZeroShotResult:
    """Answers of one model and their accuracy.

    Attributes:
        accuracy: Share of the images whose answer is their label, 0..1.
        per_class: The same for the images of each class, by its name; nan for a class without images.
        label: Array [N] of true classes.
        predicted: Array [N] of answers.
    """

    accuracy: Estimate
    per_class: Mapping[str, Estimate]
    label: np.ndarray
    predicted: np.ndarray


@contextlib.contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """Models in evaluation mode and no gradients; afterwards each module is in its own mode again."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        # Not inference_mode: its tensors could never take part in a later backward pass.
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def encode_texts(model: Any, processor: Any, texts: Sequence[str], batch_size: int = 256) -> Tensor:
    """Unit-norm embeddings of texts.

    Args:
        model: CLIPModel, or PeftModel around one.
        processor: Its CLIPProcessor.
        texts: N texts; one longer than the model's context is cut to it.
        batch_size: Texts encoded together, >= 1.

    Returns:
        Tensor[N, D], float32, unit-norm, on the model's device, without gradients.

    Raises:
        ValueError: `texts` is a single string or empty.
        TypeError: As for `clip_po.policy.dual_encoder`.
    """
    if isinstance(texts, str) or not texts:
        raise ValueError(f"texts must be a list of at least one text, got {texts!r}.")
    clip = dual_encoder(model)
    # A CLIP tokenizer may know no length limit, and a longer text has no position embeddings.
    context = clip.text_model.config.max_position_embeddings
    parts = []
    with evaluating(clip):
        for start in range(0, len(texts), batch_size):
            tokens = processor.tokenizer(
                list(texts[start : start + batch_size]),
                padding=True,
                truncation=True,
                max_length=context,
                return_tensors="pt",
            ).to(clip.device)
            features = clip.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
            parts.append(F.normalize(features.pooler_output.float(), dim=-1))
    return torch.cat(parts)


def class_embeddings(model: Any, processor: Any, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """One unit-norm embedding per class: the mean over the templates, normalized again.

    Args:
        model: CLIPModel, or PeftModel around one.
        processor: Its CLIPProcessor.
        class_names: C different names.
        templates: Prompts, each with exactly one `{}` for the name, such as "a photo of a {}".

    Returns:
        Tensor[C, D], float32, unit-norm, on the model's device, without gradients.

    Raises:
        ValueError: Names are missing or repeated, or a template has no or several `{}`.

    Source: Radford et al. 2021, arXiv 2103.00020, Sec. 3.1.4 (prompt ensembling in embedding space).
    """
    check_class_names(class_names)
    if isinstance(templates, str) or not templates:
        raise ValueError(
            f'templates must be a list of at least one prompt, got {templates!r}; give ["a photo of a {{}}"].'
        )
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(
                f"Template {template!r} has {template.count('{}')} places for the class name; write exactly "
                'one {}, as in "a photo of a {}".'
            )
    prompts = [template.replace("{}", name) for name in class_names for template in templates]
    embeds = encode_texts(model, processor, prompts).view(len(class_names), len(templates), -1)
    return F.normalize(embeds.mean(dim=1), dim=-1)


def classify(model: Any, pixel_values: Tensor, text_embeds: Tensor) -> Tensor:
    """Logits of images against texts: logit_scale.exp() times the cosine, in float32.

    Gradients and the model's mode are the caller's; `evaluating` sets both.

    Args:
        model: CLIPModel, or PeftModel around one.
        pixel_values: Tensor[B, 3, H, W] from the processor, on any device.
        text_embeds: Tensor[C, D], unit-norm, as from `class_embeddings`.

    Returns:
        Tensor[B, C], float32, on the model's device.
    """
    clip = dual_encoder(model)
    features = clip.get_image_features(pixel_values=pixel_values.to(clip.device, clip.dtype)).pooler_output
    image_embeds = F.normalize(features.float(), dim=-1)
    return clip.logit_scale.float().exp() * image_embeds @ text_embeds.to(image_embeds).T


def zero_shot_accuracy(
    model: Any,
    processor: Any,
    dataset: Dataset,
    templates: Sequence[str],
    class_names: Sequence[str] | None = None,
    *,
    image_column: str = "image",
    label_column: str = "label",
    batch_size: int = 64,
    num_workers: int = 0,
    accelerator: Accelerator | None = None,
    disable_tqdm: bool = False,
    resamples: int = 1000,
    seed: int = 0,
) -> ZeroShotResult:
    """Accuracy of a model that picks the class whose prompt is nearest to the image.

    Args:
        model: CLIPModel, or PeftModel around one.
        processor: Its CLIPProcessor.
        dataset: One split with images and labels.
        templates: As for `class_embeddings`.
        class_names: Names in the order of the labels; None for those of the ClassLabel column.
        image_column: Column of images.
        label_column: Column of ClassLabel or integers.
        batch_size: Images classified together, >= 1.
        num_workers: Processes that read images, 0 for none besides this one.
        accelerator: Shares the rows out among its processes; every process gets the whole result, the same
            for any number of them. None for this process alone.
        disable_tqdm: Shows no progress bar.
        resamples: As for `bootstrap_interval`.
        seed: As for `bootstrap_interval`.

    Returns:
        Accuracy and accuracy per class, each with its 95 % interval, and the answers.

    Raises:
        ValueError: A column is missing, a label is out of range, an image can't be read (the message names
            the row), or as for `class_embeddings`.
        TypeError: `dataset` is no single split, or as for `clip_po.policy.dual_encoder`.
    """
    names, label = read_labels(dataset, label_column, class_names)
    text_embeds = class_embeddings(model, processor, names, templates)

    def answers(batch: dict[str, Tensor]) -> Tensor:
        return classify(model, batch["pixel_values"], text_embeds).argmax(dim=1, keepdim=True)

    images = _CleanImages(read_images(dataset, image_column), image_column, processor)
    with evaluating(model):
        predicted = collect_answers(
            images, answers, 1, batch_size, num_workers, accelerator, disable_tqdm, "Zero-shot"
        )[:, 0]
    right = predicted == label

    def share(rows: np.ndarray) -> Estimate:
        return bootstrap_interval(lambda means: means["right"], {"right": rows}, None, 0.95, resamples, seed)

    per_class = {name: share(right[label == position]) for position, name in enumerate(names)}
    return ZeroShotResult(share(right), per_class, label, predicted)


class _CleanImages(torch.utils.data.Dataset):
    def __init__(self, images: Dataset, image_column: str, processor: Any) -> None:
        self.images, self.image_column, self.processor = images, image_column, processor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        image = read_image(self.images, self.image_column, row)
        return {"pixel_values": self.processor.image_processor(image, return_tensors="pt")["pixel_values"][0]}


def collect_answers(
    items: torch.utils.data.Dataset,
    answers: Callable[[dict[str, Tensor]], Tensor],
    width: int,
    batch_size: int,
    num_workers: int = 0,
    accelerator: Accelerator | None = None,
    disable_tqdm: bool = False,
    title: str | None = None,
) -> np.ndarray:
    """Apply a function to all items in batches, shared out among processes.

    Args:
        items: N items for the default collation.
        answers: Maps a batch of B items to integers Tensor[B, `width`].
        width: Number K of answers per item.
        batch_size: Items per batch and process, >= 1.
        num_workers: Processes that load items.
        accelerator: As for `zero_shot_accuracy`.
        disable_tqdm: Shows no progress bar.
        title: Words before the progress bar.

    Returns:
        Array [N, K] of integers in the order of the items, in every process.

    Raises:
        ValueError: There are no items.
    """
    total = len(items)  # type: ignore[arg-type]
    if not total:
        raise ValueError("The data set has no rows; give at least one image.")
    # Rows are dealt by number and gathered once, instead of preparing the loader: accelerate would repeat
    # rows to fill the last batch, and would keep this loader among those of a training that is under way.
    rank, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    mine = Subset(items, range(rank, total, processes))
    loader: DataLoader = DataLoader(mine, batch_size=batch_size, num_workers=num_workers)
    parts = [torch.empty(0, width, dtype=torch.long)]
    with tqdm(total=total, desc=title, unit="img", disable=disable_tqdm or rank > 0) as bar:
        for batch in loader:
            parts.append(answers(batch).cpu())
            bar.update(min(len(parts[-1]) * processes, total - bar.n))
    dealt = torch.cat(parts)
    if accelerator is not None and processes > 1:
        share = -(-total // processes)
        padded = F.pad(dealt, (0, 0, 0, share - len(dealt))).to(accelerator.device)
        gathered = accelerator.gather(padded).cpu().view(processes, share, width)
        dealt = gathered.transpose(0, 1).reshape(-1, width)[:total]
    return dealt.numpy()


def check_class_names(class_names: Sequence[str]) -> None:
    """Refuse class names that are no list, empty or repeated.

    Raises:
        ValueError: Says which name is wrong.
    """
    if isinstance(class_names, str) or not class_names:
        raise ValueError(f"class_names must be a list of at least one name, got {class_names!r}.")
    repeated = [name for name, count in Counter(class_names).items() if count > 1]
    if repeated:
        raise ValueError(
            f"class_names has {repeated} more than once; no prompt can tell such classes apart: rename them."
        )


def read_labels(
    dataset: Dataset, label_column: str, class_names: Sequence[str] | None
) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names and labels of a data set, checked.

    Args:
        dataset: One split.
        label_column: Column of ClassLabel or integers.
        class_names: C names in the order of the labels; None for those of the ClassLabel column.

    Returns:
        The names, and the labels as an array [N] of integers in 0..C-1.

    Raises:
        ValueError: The column is missing or holds no classes, the names don't match it, or a label is out of
            range; the message names the row.
        TypeError: `dataset` is no single split.
    """
    feature = _column(dataset, label_column, "label_column")
    known: list[str] | None = feature.names if isinstance(feature, ClassLabel) else None
    chosen = known if class_names is None else class_names
    if chosen is None:
        raise ValueError(
            f"Column {label_column!r} is {feature}, without names; pass class_names, or turn strings into "
            f"classes by dataset.class_encode_column({label_column!r})."
        )
    check_class_names(chosen)
    names = tuple(chosen)
    if known is not None and len(known) != len(names):
        raise ValueError(
            f"Column {label_column!r} has {len(known)} classes, class_names has {len(names)} names; give one "
            f"name for each of {known[:5]}{'...' if len(known) > 5 else ''}, in this order."
        )
    if known is not None and sorted(known) == sorted(names) and tuple(known) != names:
        raise ValueError(f"class_names are those of column {label_column!r} in another order; leave class_names out.")
    values = list(dataset.with_format(None)[label_column])
    for row, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(names):
            raise ValueError(
                f"Row {row}: {label_column!r} is {value!r}, expected a class number in 0..{len(names) - 1}. "
                "Filter such rows out, or mend class_names."
            )
    return names, np.array(values, dtype=np.int64)


def read_images(dataset: Dataset, image_column: str) -> Dataset:
    """The image column of a data set alone, unformatted, so that reading a row decodes one image only.

    Raises:
        ValueError: The column is missing.
        TypeError: `dataset` is no single split.
    """
    _column(dataset, image_column, "image_column")
    return dataset.with_format(None).select_columns([image_column])


def read_image(images: Dataset, image_column: str, row: int) -> Image.Image:
    """The image of a row, in RGB.

    Raises:
        ValueError: It can't be read, or is no image; the message names row and column.
    """
    try:
        image = images[row][image_column]
        if isinstance(image, Image.Image):
            return image.convert("RGB")
    except Exception as error:  # decoders of broken files raise anything from OSError to SyntaxError
        raise ValueError(
            f"Row {row}: the image in column {image_column!r} can't be read "
            f"({type(error).__name__}: {error}). Mend the file, or filter the row out."
        ) from error
    raise ValueError(
        f"Row {row}: column {image_column!r} holds {type(image).__name__}, expected an image. Filter the row "
        f"out; paths become images by dataset.cast_column({image_column!r}, datasets.Image())."
    )


def _column(dataset: Any, column: str, argument: str) -> Any:
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"Expected one split, a datasets.Dataset, got {type(dataset).__name__}; choose one, as in "
            'load_dataset(..., split="test").'
        )
    if column not in dataset.column_names:
        raise ValueError(f"{argument}={column!r} is no column of the data set; it has {dataset.column_names}.")
    return dataset.features[column]
