"""Zero-shot classification with prompts: class embeddings, logits, accuracy."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from datasets import Dataset
from datasets.utils import tqdm
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from clip_po.data.class_labels import read_labels
from clip_po.data.images import read_image, read_images, to_pixels
from clip_po.data.killed_workers import killed_workers_explained
from clip_po.dual_encoder import as_dual_encoder
from clip_po.encoding import encode_texts, evaluating
from clip_po.evaluation.bootstrap import Estimate, Statistic, bootstrap_interval
from clip_po.evaluation.class_doubles import first_alike, say_doubles, unique_keys
from clip_po.models import check_processor
from clip_po.text_identity import TextTokens
from clip_po.validation import COUNT, COUNT_OR_NONE, check_class_names, check_number, check_templates


@dataclass(frozen=True)
class ZeroShotResult:
    """Predicted classes of one model and their accuracy.

    Attributes:
        accuracy: Share of images whose predicted class is their label, 0..1.
        per_class: Accuracy by class name; nan for a class without images. A name that occurs again has the number of
            its class, as in "missile (class 744)".
        label: Array [N] of true classes.
        predicted: Array [N] of predicted classes.
    """

    accuracy: Estimate
    per_class: Mapping[str, Estimate]
    label: np.ndarray
    predicted: np.ndarray


def class_embeddings(model: Any, processor: Any, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Compute one unit-norm embedding per class: the mean over the templates, normalized again.

    Args:
        model: Two-tower model, or PeftModel around one.
        processor: Its processor.
        class_names: C names. Classes whose prompts the model can't tell apart get the same embedding, which is said
            once.
        templates: Prompts, each with exactly one `{}` for the name, such as "a photo of a {}".

    Returns:
        Tensor[C, D], float32, unit-norm, on the model's device, without gradients.

    Raises:
        ValueError: If a name is missing, a template does not contain exactly one `{}`, the processor
            belongs to another model, or the model's weights are not finite.
        TypeError: If a template is not a string, or as for `clip_po.models.check_processor`.

    Source: Radford et al. 2021, arXiv 2103.00020, Sec. 3.1.4 (prompt ensembling in embedding space).
    """
    return embed_classes({"model": model}, processor, class_names, templates)["model"]


def embed_classes(
    models: Mapping[str, Any], processor: Any, class_names: Sequence[str], templates: Sequence[str]
) -> dict[str, Tensor]:
    """Compute the class embeddings of several models, and say once which prompts are cut or stand for two classes.

    Args:
        models: Two-tower models, or PeftModels around one, by name. They share the processor.
        processor: As for `class_embeddings`.
        class_names: As for `class_embeddings`.
        templates: As for `class_embeddings`.

    Returns:
        Tensor[C, D] by model.

    Raises:
        ValueError, TypeError: As for `class_embeddings`.
    """
    check_class_names(class_names)
    check_templates(templates)
    prompts = [[template.replace("{}", name) for template in templates] for name in class_names]
    found: dict[str, Tensor] = {}
    for name, model in models.items():
        check_processor(processor, model)
        tokens = TextTokens.of(processor, model)
        cut = tokens.learn(text for texts in prompts for text in texts)
        read = [tuple(tokens(text) for text in texts) for texts in prompts]
        if not found:
            tokens.warn_of_cut(cut, "the class prompts")
            say_doubles(class_names, read)
        different: dict[Hashable, list[str]] = {}
        for known, texts in zip(read, prompts, strict=True):
            different.setdefault(known, texts)
        place = {known: number for number, known in enumerate(different)}
        embeds = encode_texts(model, processor, [text for texts in different.values() for text in texts])
        embeds = F.normalize(embeds.view(len(place), len(templates), -1).mean(dim=1), dim=-1)
        found[name] = embeds[[place[known] for known in read]]
    return found


def classify(model: Any, pixel_values: Tensor, text_embeds: Tensor) -> Tensor:
    """Compute the logits of images against texts, such as logit_scale.exp() times the cosine, in float32.

    The caller controls gradients and the model's mode; `evaluating` sets both.

    Args:
        model: Two-tower model, or PeftModel around one.
        pixel_values: Tensor[B, 3, H, W] from the processor, on any device.
        text_embeds: Tensor[C, D], unit-norm, as from `class_embeddings`.

    Returns:
        Tensor[B, C], float32, on the model's device.

    Raises:
        ValueError: If the size of `text_embeds` is not that of the model, or a logit is not finite.
    """
    encoder = as_dual_encoder(model)
    clip = encoder.model
    if text_embeds.shape[-1] != encoder.dim:
        raise ValueError(
            f"text_embeds have {text_embeds.shape[-1]} dimensions, but the model has {encoder.dim}: "
            "they belong to another model. Compute them with class_embeddings(model, ...)."
        )
    features = encoder.image_features(pixel_values.to(clip.device, clip.dtype))
    image_embeds = F.normalize(features.float(), dim=-1)
    logits = encoder.logits(image_embeds, text_embeds.to(image_embeds))
    if not bool(logits.isfinite().all()):  # argmax would return the first class
        raise ValueError(
            "The logits of the model contain nan or infinity: its weights or text_embeds do, or its activations "
            f"overflow in {clip.dtype}. Load an earlier checkpoint, or use float32."
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
    """Measure the accuracy of a model that predicts the class whose prompt is nearest to the image.

    Args:
        model: Two-tower model, or PeftModel around one.
        processor: Its processor.
        dataset: One split with images and labels.
        templates: As for `class_embeddings`.
        class_names: Names in the order of the labels; None for the names of the ClassLabel column.
        image_column: Name of the image column.
        label_column: Name of the column of ClassLabel or integers.
        batch_size: Images per batch and process, >= 1.
        num_workers: Number of worker processes that read images, >= 0.
        accelerator: Divides the rows among its processes. Every process gets the whole result, and it does not depend
            on the number of processes. None runs in this process alone.
        disable_tqdm: Whether to hide the progress bar.
        resamples: As for `bootstrap_interval`.
        seed: As for `bootstrap_interval`.

    Returns:
        Accuracy and accuracy per class, each with its 95% interval, and the predicted classes.

    Raises:
        ValueError: If a column is missing, a label is out of range, an image is not readable (the message names the
            row), or as for `class_embeddings`.
        TypeError: If `dataset` is not a single split, or as for `clip_po.encoding.dual_encoder`.
    """
    names, label = read_labels(dataset, label_column, class_names)
    predicted = predict_classes(
        {"model": model},
        processor,
        dataset,
        names,
        templates,
        image_column=image_column,
        batch_size=batch_size,
        num_workers=num_workers,
        accelerator=accelerator,
        disable_tqdm=disable_tqdm,
    )["model"]
    right = predicted == label

    def share(rows: np.ndarray) -> Estimate:
        return bootstrap_interval(lambda means: means["right"], {"right": rows}, None, 0.95, resamples, seed)

    per_class = {name: share(right[label == position]) for position, name in enumerate(unique_keys(names))}
    return ZeroShotResult(share(right), per_class, label, predicted)


def predict_classes(
    models: Mapping[str, Any],
    processor: Any,
    dataset: Dataset,
    class_names: Sequence[str],
    templates: Sequence[str],
    *,
    image_column: str = "image",
    batch_size: int = 64,
    num_workers: int = 0,
    accelerator: Accelerator | None = None,
    disable_tqdm: bool = False,
    title: str = "Zero-shot",
) -> dict[str, np.ndarray]:
    """Classify images with several models, in one pass over the images.

    Args:
        models: Two-tower models, or PeftModels around one, by name, each on any device. They share the processor.
        processor: Processor of the models.
        dataset: One split with N images.
        class_names: C names.
        templates: As for `class_embeddings`.
        image_column: Name of the image column.
        batch_size: Images per batch and process, >= 1.
        num_workers: Number of worker processes that read images, >= 0.
        accelerator: As for `zero_shot_accuracy`.
        disable_tqdm: Whether to hide the progress bar.
        title: Label of the progress bar.

    Returns:
        Array [N] of predicted classes by model.

    Raises:
        ValueError: If there are no models, an image is not readable, or as for `class_embeddings`.
        TypeError: If `dataset` is not a single split, or as for `class_embeddings`.
    """
    if not models:
        raise ValueError("models is empty. Give at least one model by name.")
    texts = embed_classes(models, processor, class_names, templates)
    first = {name: first_alike(embeds) for name, embeds in texts.items()}

    def answers(batch: dict[str, Tensor]) -> Tensor:
        nearest = {name: classify(m, batch["pixel_values"], texts[name]).argmax(dim=1) for name, m in models.items()}
        return torch.stack([first[name][number].cpu() for name, number in nearest.items()], dim=1)

    images = CleanImages(read_images(dataset, image_column), image_column, processor)
    with evaluating(*models.values()):
        table = collect_answers(
            images, answers, len(models), batch_size, num_workers, accelerator, disable_tqdm, title
        )
    return dict(zip(models, table.T, strict=True))


def zero_shot_report(
    result: ZeroShotResult,
    base: ZeroShotResult | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Compute the accuracy of one model with its interval; against a base, paired on the same images.

    - accuracy: share of images whose predicted class is their label, 0..1.
    - difference: 100 (accuracy - base accuracy), in percentage points.

    Args:
        result: From `zero_shot_accuracy`.
        base: Result of the model before alignment on the same images; None for the accuracy only.
        confidence: As for `bootstrap_interval`.
        resamples: As for `bootstrap_interval`.
        seed: As for `bootstrap_interval`.

    Returns:
        Estimates by metric, in the order above.

    Raises:
        ValueError: If `base` has other labels.
    """
    if base is not None and not np.array_equal(base.label, result.label):
        raise ValueError("result and base have different labels. Measure both on the same dataset.")
    columns = {"right": result.predicted == result.label}
    metrics: dict[str, Statistic] = {"accuracy": lambda means: means["right"]}
    if base is not None:
        columns["base"] = base.predicted == base.label
        metrics["difference"] = lambda means: 100 * (means["right"] - means["base"])
    return {
        name: bootstrap_interval(statistic, columns, None, confidence, resamples, seed)
        for name, statistic in metrics.items()
    }


class CleanImages(torch.utils.data.Dataset):
    """The unchanged images of a dataset, as pixels Tensor[3, H, W] named `pixel_values`.

    Args:
        images: One split with images, as from `read_images`.
        image_column: Name of the image column.
        processor: Processor of the models.
    """

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
    """Apply a function to all items in batches, divided among processes.

    Args:
        items: N items for the default collation.
        answers: Maps a batch of B items to numbers Tensor[B, `width`].
        width: Number K of answers per item.
        batch_size: Items per batch and process, >= 1.
        num_workers: Number of worker processes that load items, >= 0.
        accelerator: As for `zero_shot_accuracy`.
        disable_tqdm: Whether to hide the progress bar.
        title: Label of the progress bar.
        dtype: Type of the numbers.

    Returns:
        Array [N, K] of the numbers in the order of the items, in every process.

    Raises:
        ValueError: If there are no items, a number is not finite, or `batch_size` or `num_workers` is out of range.
        TypeError: If `batch_size` or `num_workers` is not a whole number.
        ChildProcessError: If a worker process is killed.
    """
    check_number("batch_size", batch_size, COUNT)
    check_number("num_workers", num_workers, COUNT_OR_NONE)
    total = len(items)  # type: ignore[arg-type]
    if not total:
        raise ValueError("The dataset has no rows. Give at least one image.")
    # Rows are dealt by number and gathered once, instead of preparing the loader: accelerate would repeat rows to
    # fill the last batch, and would keep this loader among those of a training in progress.
    rank, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    mine = Subset(items, range(rank, total, processes))
    # Without a generator of its own, a loader would draw from torch's global one, in the middle of a training too.
    loader: DataLoader = DataLoader(mine, batch_size=batch_size, num_workers=num_workers, generator=torch.Generator())
    parts = [torch.empty(0, width, dtype=dtype)]
    bar = tqdm(total=total, desc=title, unit="img", disable=disable_tqdm or rank > 0)
    with bar, killed_workers_explained(num_workers):
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
            f"The model's output for {len(spoiled)} of {total} images contains nan or infinity, first for row "
            f"{spoiled[0]}: its weights do, or its activations overflow. Load an earlier checkpoint, or use float32."
        )
    return dealt.numpy()
