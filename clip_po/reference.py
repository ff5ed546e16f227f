"""The reference policy: where training starts from, or a model of the user's."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import ProcessorMixin

from clip_po.data.embedding_cache import EmbeddingCache, fingerprint, model_digest, processor_digest
from clip_po.data.images import blank_image, to_pixels
from clip_po.data.pairs import PreferencePairs
from clip_po.policy import (
    BatchLogps,
    FrozenTexts,
    batch_texts,
    candidate_logps,
    dual_encoder,
    encode_images,
)

SEES = ("image", "reg_image", "target_image")
"""The images of a row: of the preference, the ordinary one, and the clean one whose answer is a target."""


class ReferencePolicy:
    """log ref(y | x): frozen, without gradients.

    Image embeddings that a batch carries (`ref_image_embeds`, `ref_reg_image_embeds`, `ref_target_image_embeds`, as
    `PreferencePairs.attach_reference` adds them) are taken as they are; others are computed.

    Args:
        model: The frozen reference model: `ref_model`, or a `frozen_copy` of the initial policy.
        processor: The processor of the policy, which makes the pixels of both.
        candidate_texts: The candidate texts of every row, or None where each row names its own.
        frozen_texts: Embeddings of texts that the policy shares with its reference, where its text tower is
            frozen; None encodes with the reference's own text tower.
        sees: The images that it is asked about, of `SEES`; where "image" is not among them, the log-probabilities of
            preferences are 0.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: ProcessorMixin,
        candidate_texts: Sequence[str] | None,
        frozen_texts: FrozenTexts | None = None,
        sees: Sequence[str] = SEES,
    ) -> None:
        self.model = model
        self.sees = tuple(sees)
        self.candidate_texts = candidate_texts
        self.frozen_texts = frozen_texts or FrozenTexts(model, processor)
        self.logit_scale = dual_encoder(model).logit_scale.detach().exp().item()

    @torch.no_grad()
    def image_embeds(self, pixel_values: Tensor) -> Tensor:
        """Unit-norm embeddings of images, Tensor[B, D]."""
        return encode_images(self.model, pixel_values)

    @torch.no_grad()
    def embeds_of(self, batch: Mapping[str, Any], images: Sequence[str]) -> dict[str, Tensor]:
        """Unit-norm embeddings of a batch's images, those that it carries or else computed in one forward.

        Args:
            batch: As `DataCollatorForContrastivePreference` makes it.
            images: Names of `SEES`; those that the batch has nothing of are left out.

        Returns:
            Tensor[B, D] by name.
        """
        pixels = {name: name.replace("image", "pixel_values") for name in images}
        known = {name: batch[f"ref_{name}_embeds"] for name in images if f"ref_{name}_embeds" in batch}
        unknown = [name for name in images if name not in known and pixels[name] in batch]
        if unknown:
            embeds = self.image_embeds(torch.cat([batch[pixels[name]] for name in unknown]))
            known.update(zip(unknown, embeds.chunk(len(unknown)), strict=True))
        return known

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any]) -> BatchLogps:
        """Log-probabilities over the candidate texts of a batch.

        Args:
            batch: As `DataCollatorForContrastivePreference` makes it.

        Returns:
            Tensor[B, N] for the preference images, and for the regularization images and targets where there are
            any.
        """
        text_embeds = self.frozen_texts(batch_texts(self.candidate_texts, batch))
        logps = {
            name: candidate_logps(embeds, text_embeds, self.logit_scale, batch.get("candidates"))
            for name, embeds in self.embeds_of(batch, self.sees).items()
        }
        candidates = batch["candidates"].shape[1] if "candidates" in batch else len(text_embeds)
        unasked = text_embeds.new_zeros(len(batch["weight"]), candidates)
        return BatchLogps(logps.get("image", unasked), logps.get("reg_image"), logps.get("target_image"))


class _Images(torch.utils.data.Dataset[Any]):
    """The fixed images of preference pairs, one column of them."""

    def __init__(self, pairs: PreferencePairs, column: str) -> None:
        self.pairs = pairs
        self.column = column

    def __len__(self) -> int:
        return self.pairs.image_count(self.column)

    def __getitem__(self, index: int) -> Any:
        return self.pairs.fixed_image(self.column, index)


def _batch(processor: ProcessorMixin, images: Sequence[Image.Image | None]) -> tuple[Tensor, Tensor]:
    """Pixels, blank for images that can't be read, and which can."""
    pixels = to_pixels(processor, [image or blank_image() for image in images])
    return pixels, torch.tensor([image is not None for image in images])


def embed_fixed_images(
    reference: ReferencePolicy,
    pairs: PreferencePairs,
    processor: ProcessorMixin,
    accelerator: Accelerator,
    batch_size: int,
    num_workers: int = 0,
    disable_tqdm: bool = False,
    cache: EmbeddingCache | None = None,
    images: Sequence[str] = SEES,
) -> None:
    """Let the reference see each image that is the same in every epoch once, and give rows its embeddings.

    Images come in the order of the data set, so that an embedding's last bits depend on neither the training
    order nor a resume. The processes share the work.

    Args:
        reference: The reference policy.
        pairs: The rows; nothing is done where they have their embeddings already.
        processor: Makes the pixels.
        accelerator: Of the trainer.
        batch_size: Images a forward and process.
        num_workers: Processes that read images.
        disable_tqdm: Shows no progress bar.
        cache: Keeps embeddings between runs, by a fingerprint of image tower, processor and images; None for none.
        images: Those of `SEES` that are wanted.
    """
    if pairs.reference:
        return
    embeds: dict[str, Tensor] = {}
    readable: dict[str, Tensor] = {}
    maker = None if cache is None else _maker(reference, processor, accelerator.mixed_precision)
    dim = dual_encoder(reference.model).config.projection_dim
    for column in pairs.fixed_images:
        if column not in images:
            continue
        source = None if maker is None else pairs.digest(column)
        name = None if maker is None or source is None else fingerprint(maker, source)
        known = None if cache is None or name is None else cache.get(name, pairs.image_count(column), dim)
        # Where processes have disks of their own, all compute unless all have found.
        hits = accelerator.reduce(torch.tensor(float(known is not None), device=accelerator.device), "sum")
        if known is not None and hits.item() == accelerator.num_processes:
            embeds[column] = known
            continue
        loader = accelerator.prepare(
            DataLoader(
                _Images(pairs, column),
                batch_size=batch_size,
                num_workers=num_workers,
                collate_fn=functools.partial(_batch, processor),
            )
        )
        batches = tqdm(
            loader,
            desc=f"Reference on {column}",
            disable=disable_tqdm or not accelerator.is_local_main_process,
            leave=False,
        )
        found, able = [], []
        for pixels, can_be_read in batches:
            found.append(accelerator.gather(reference.image_embeds(pixels)).float().cpu())
            able.append(accelerator.gather(can_be_read).cpu())
        embeds[column] = torch.cat(found)[: pairs.image_count(column)]
        readable[column] = torch.cat(able)[: pairs.image_count(column)]
        whole = bool(readable[column].all())  # an image that can't be read now may be mended later
        if cache is not None and name is not None and whole and accelerator.is_local_main_process:
            cache.put(name, embeds[column])
    pairs.attach_reference(embeds, readable)


def _maker(reference: ReferencePolicy, processor: ProcessorMixin, precision: str) -> str:
    """A name of all that embeddings depend on but the images."""
    encoder = dual_encoder(reference.model)
    tower = [model_digest(part) for part in (encoder.vision_model, encoder.visual_projection)]
    return fingerprint(*tower, processor_digest(processor), precision)
