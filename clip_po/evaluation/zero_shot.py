"""Zero-shot classification by prompts: what a CLIP model answers when asked for the class of an image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from clip_po.data.class_labels import read_labels
from clip_po.data.images import read_image, read_images, to_pixels
from clip_po.evaluation.bootstrap import Estimate, bootstrap_interval
from clip_po.models import check_processor
from clip_po.policy import dual_encoder, encode_texts, evaluating
from clip_po.validation import COUNT, COUNT_OR_NONE, check_class_names, check_number


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
        ValueError: Names are missing or repeated, a template has no or several `{}`, the processor is another
            model's, or the model's weights are not finite.
        TypeError: A template is no text, or as for `clip_po.models.check_processor`.

    Source: Radford et al. 2021, arXiv 2103.00020, Sec. 3.1.4 (prompt ensembling in embedding space).
    """
    check_processor(processor, model)
    check_class_names(class_names)
    if isinstance(templates, str) or not templates:
        raise ValueError(
            f'templates must be a list of at least one prompt, got {templates!r}; give ["a photo of a {{}}"].'
        )
    for template in templates:
        if not isinstance(template, str):
            raise TypeError(f'templates must be texts such as "a photo of a {{}}", got {template!r} among them.')
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

    Raises:
        ValueError: `text_embeds` are of another size than the model's, or a logit is not finite.
    """
    clip = dual_encoder(model)
    if text_embeds.shape[-1] != clip.config.projection_dim:
        raise ValueError(
            f"text_embeds have {text_embeds.shape[-1]} numbers each, but those of the model have "
            f"{clip.config.projection_dim}: they are of another model. Make them by class_embeddings(model, ...)."
        )
    features = clip.get_image_features(pixel_values=pixel_values.to(clip.device, clip.dtype)).pooler_output
    image_embeds = F.normalize(features.float(), dim=-1)
    logits = clip.logit_scale.float().exp() * image_embeds @ text_embeds.to(image_embeds).T
    if not bool(logits.isfinite().all()):  # argmax would answer the first class
        raise ValueError(
            "The logits of the model hold nan or infinity: so do its weights or text_embeds, or its numbers overflow "
            f"in {clip.dtype}. Load an earlier checkpoint, or use float32."
        )
    return logits


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

    images = CleanImages(read_images(dataset, image_column), image_column, processor)
    with evaluating(model):
        predicted = collect_answers(
            images, answers, 1, batch_size, num_workers, accelerator, disable_tqdm, "Zero-shot"
        )[:, 0]
    right = predicted == label

    def share(rows: np.ndarray) -> Estimate:
        return bootstrap_interval(lambda means: means["right"], {"right": rows}, None, 0.95, resamples, seed)

    per_class = {name: share(right[label == position]) for position, name in enumerate(names)}
    return ZeroShotResult(share(right), per_class, label, predicted)


class CleanImages(torch.utils.data.Dataset):
    """The images of a data set as they are, as pixels Tensor[3, H, W] of the name `pixel_values`."""

    def __init__(self, images: Dataset, image_column: str, processor: Any) -> None:
        self.images, self.image_column, self.processor = images, image_column, processor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        image = read_image(self.images, self.image_column, row)
        return {"pixel_values": to_pixels(self.processor, [image])[0]}


def collect_answers(
    items: torch.utils.data.Dataset,
    answers: Callable[[dict[str, Tensor]], Tensor],
    width: int,
    batch_size: int,
    num_workers: int = 0,
    accelerator: Accelerator | None = None,
    disable_tqdm: bool = False,
    title: str | None = None,
    dtype: torch.dtype = torch.long,
) -> np.ndarray:
    """Apply a function to all items in batches, shared out among processes.

    Args:
        items: N items for the default collation.
        answers: Maps a batch of B items to numbers Tensor[B, `width`].
        width: Number K of answers per item.
        batch_size: Items per batch and process, >= 1.
        num_workers: Processes that load items.
        accelerator: As for `zero_shot_accuracy`.
        disable_tqdm: Shows no progress bar.
        title: Words before the progress bar.
        dtype: Type of the numbers.

    Returns:
        Array [N, K] of the numbers in the order of the items, in every process.

    Raises:
        ValueError: There are no items, a number is not finite, or `batch_size` or `num_workers` can't be used.
        TypeError: `batch_size` or `num_workers` is no whole number.
    """
    check_number("batch_size", batch_size, COUNT)
    check_number("num_workers", num_workers, COUNT_OR_NONE)
    total = len(items)  # type: ignore[arg-type]
    if not total:
        raise ValueError("The data set has no rows; give at least one image.")
    # Rows are dealt by number and gathered once, instead of preparing the loader: accelerate would repeat
    # rows to fill the last batch, and would keep this loader among those of a training that is under way.
    rank, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    mine = Subset(items, range(rank, total, processes))
    loader: DataLoader = DataLoader(mine, batch_size=batch_size, num_workers=num_workers)
    parts = [torch.empty(0, width, dtype=dtype)]
    with tqdm(total=total, desc=title, unit="img", disable=disable_tqdm or rank > 0) as bar:
        for batch in loader:
            parts.append(answers(batch).to("cpu", dtype))
            bar.update(min(len(parts[-1]) * processes, total - bar.n))
    dealt = torch.cat(parts)
    if accelerator is not None and processes > 1:
        share = -(-total // processes)
        padded = F.pad(dealt, (0, 0, 0, share - len(dealt))).to(accelerator.device)
        gathered = accelerator.gather(padded).cpu().view(processes, share, width)
        dealt = gathered.transpose(0, 1).reshape(-1, width)[:total]
    spoiled = (~dealt.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if spoiled:
        raise ValueError(
            f"What the model answers to {len(spoiled)} of {total} images holds nan or infinity, first to that of row "
            f"{spoiled[0]}: so do its weights, or its numbers overflow. Load an earlier checkpoint, or use float32."
        )
    return dealt.numpy()
