"""The reference policy: the model that training starts from, or another model, with embeddings computed once."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from datasets.utils import tqdm
from peft import PeftConfig, PeftModel
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import ProcessorMixin

from clip_po.adapters import changes_base
from clip_po.candidate_logps import batch_logps
from clip_po.candidates import CandidateTexts
from clip_po.data.embedding_cache import EmbeddingCache, fingerprint, model_digest, processor_digest
from clip_po.data.images import blank_image, probe_image, to_pixels
from clip_po.data.pairs import PreferencePairs
from clip_po.dual_encoder import as_dual_encoder
from clip_po.encoding import CachedTextEmbeddings, encode_images
from clip_po.families import PolicyKind
from clip_po.policy import DIVERGENCES, CandidateLogps, open_logps, policy_bias

ROW_IMAGES = ("image", "reg_image", "target_image")
"""Images of a row: the image of the preference, the regularization image, and the clean image of a soft target."""


class ReferencePolicy:
    """log ref(y | x): frozen, without gradients.

    Image embeddings that a batch carries (`ref_image_embeds`, `ref_reg_image_embeds`, `ref_target_image_embeds`, added
    by `PreferencePairs.attach_reference`) are used as they are. Others are computed.

    Args:
        model: The frozen reference model: `ref_model`, or a `frozen_copy` of the initial policy.
        processor: Processor of the policy, which makes the pixels of both.
        candidates: The candidate texts.
        text_embeddings: Cached text embeddings that the policy shares if its text tower is frozen; None to encode with
            the text tower of the reference.
        images: Names in `ROW_IMAGES` of the images that the losses ask about. Without "image" the log-probabilities of
            preferences are 0.
        reg_texts: Texts over which the regularization images are compared too.
        kind: "softmax" or "sigmoid", as for `clip_po.policy.Policy`.

    Attributes:
        initial_model: The reference model before training, with which a trained model is compared afterwards. It is
            `model`, unless the reference moves in training.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: ProcessorMixin,
        candidates: CandidateTexts,
        text_embeddings: CachedTextEmbeddings | None = None,
        images: Sequence[str] = ROW_IMAGES,
        reg_texts: Sequence[str] = (),
        kind: PolicyKind = "softmax",
    ) -> None:
        self.kind = kind
        self.model = self.initial_model = model
        self.reg_texts = reg_texts
        self.images = tuple(images)
        self.candidates = candidates
        self.text_embeddings = text_embeddings or CachedTextEmbeddings(model, processor)
        self._read_scale()

    @torch.no_grad()
    def replace_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace parameters. Embeddings that were computed before are those of another model: forget them.

        Args:
            weights: Names in `model.named_parameters()` with their new values, of the same shapes.
        """
        parameters = dict(self.model.named_parameters())
        for name, value in weights:
            parameters[name].copy_(value)
        self._read_scale()

    def _read_scale(self) -> None:
        encoder = as_dual_encoder(self.model)
        bias = policy_bias(encoder, self.kind)
        self.logit_scale, self.logit_bias = encoder.scale.item(), None if bias is None else bias.item()

    @torch.no_grad()
    def image_embeds(self, pixel_values: Tensor) -> Tensor:
        """Embed images with the frozen model.

        Args:
            pixel_values: Tensor[B, C, H, W], on the device of the model.

        Returns:
            Tensor[B, D], unit-norm, at least float32.
        """
        return encode_images(self.model, pixel_values)

    @torch.no_grad()
    def batch_embeds(self, batch: Mapping[str, Any], images: Sequence[str]) -> dict[str, Tensor]:
        """Return the unit-norm embeddings of a batch, those it carries or else computed in one forward pass.

        Args:
            batch: Batch of `DataCollatorForContrastivePreference`.
            images: Names in `ROW_IMAGES`. Names that the batch has nothing of are left out.

        Returns:
            Tensor[B, D] by name.
        """
        pixels = {name: name.replace("image", "pixel_values") for name in images}
        known = {name: batch[f"ref_{name}_embeds"] for name in images if f"ref_{name}_embeds" in batch}
        unknown = [name for name in images if name not in known and pixels[name] in batch]
        if unknown:
            found = [batch[pixels[name]] for name in unknown]
            embeds = self.image_embeds(torch.cat(found)).split([*map(len, found)])
            known.update(zip(unknown, embeds, strict=True))
        return known

    def embedded(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return a batch with the embeddings of its images in the place of their pixels.

        Args:
            batch: Batch of `DataCollatorForContrastivePreference`.

        Returns:
            The batch without pixels. Embeddings that it did not carry are computed in one forward pass.
        """
        embeds = {f"ref_{name}_embeds": found for name, found in self.batch_embeds(batch, ROW_IMAGES).items()}
        return {**{key: value for key, value in batch.items() if not key.endswith("pixel_values")}, **embeds}

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any]) -> CandidateLogps:
        """Compute log-probabilities over the candidates of a batch.

        Args:
            batch: Batch of `DataCollatorForContrastivePreference`.

        Returns:
            Tensor[B, N] for the preferences, and for the regularization images and targets if there are any.
        """
        text_embeds = self.text_embeddings(self.candidates.of_batch(batch))
        reg_embeds = self.text_embeddings(batch["reg_texts"]) if "reg_texts" in batch else None
        found, shared = self.batch_embeds(batch, self.images), self.candidates.are_shared(batch)
        scale, bias = self.logit_scale, self.logit_bias
        logps = batch_logps(found, text_embeds, reg_embeds, scale, batch, shared, bias)
        count = batch["candidates"].shape[1] if "candidates" in batch else len(text_embeds)
        unused = text_embeds.new_zeros(len(batch["weight"]), count)
        return CandidateLogps(
            logps.get("image", unused),
            logps.get("reg_image"),
            logps.get("target_image"),
            found,
            open_logps(found.get("reg_image"), self.text_embeddings, self.reg_texts, scale, bias),
            DIVERGENCES[self.kind],
        )


def frozen_copy(model: nn.Module) -> nn.Module:
    """Copy a model for inference. Frozen parameters are shared, so that only what trains is held twice.

    Args:
        model: The model. It is not changed.

    Returns:
        The copy, on the same device, in evaluation mode and without gradients. Buffers are copied.
    """
    shared = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
    return copy.deepcopy(model, memo=shared).requires_grad_(False).eval()


def initial_policy(model: nn.Module, peft_config: PeftConfig | None) -> nn.Module:
    """Copy the policy as training starts: without the adapters that `peft_config` has just added.

    Args:
        model: The policy.
        peft_config: Configuration of new adapters; None if the model had its adapters before.

    Returns:
        A `frozen_copy`. If `peft_config` is given, its adapters are disabled; if they changed the base model, merged.
    """
    if peft_config is not None and isinstance(model, PeftModel) and changes_base(model):
        return copy.deepcopy(model).merge_and_unload().requires_grad_(False).eval()
    reference = frozen_copy(model)
    if peft_config is not None and isinstance(reference, PeftModel):
        reference.base_model.disable_adapter_layers()
    return reference


class _Images(torch.utils.data.Dataset[Any]):
    """One column of the fixed images of preference pairs."""

    def __init__(self, pairs: PreferencePairs, column: str) -> None:
        self.pairs = pairs
        self.column = column

    def __len__(self) -> int:
        return self.pairs.image_count(self.column)

    def __getitem__(self, index: int) -> Any:
        return self.pairs.fixed_image(self.column, index)


def _batch(processor: ProcessorMixin, images: Sequence[Image.Image | None]) -> tuple[Tensor, Tensor]:
    """Return the pixels of images, blank for unreadable ones, and which images are readable."""
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
    images: Sequence[str] = ROW_IMAGES,
) -> None:
    """Embed each image that is the same in every epoch once, and attach the embeddings to the rows.

    Images come in the order of the data set, so that the last bits of an embedding do not depend on the training order
    or on a resume. The processes share the work.

    Args:
        reference: The reference policy.
        pairs: The rows. Nothing happens if they have their embeddings already.
        processor: Makes the pixels.
        accelerator: Accelerator of the trainer.
        batch_size: Images in a forward pass of a process.
        num_workers: Processes that read images.
        disable_tqdm: Hide the progress bar.
        cache: Keeps embeddings between runs, by `embedder_digest` and a digest of the images; None to keep none.
        images: Names in `ROW_IMAGES` of the images to embed.
    """
    if pairs.reference:
        return
    embeds: dict[str, Tensor] = {}
    readable: dict[str, Tensor] = {}
    maker = None if cache is None else embedder_digest(reference, processor, accelerator.mixed_precision)
    dim = as_dual_encoder(reference.model).dim
    for column in (column for column in pairs.fixed_images if column in images):
        count = pairs.image_count(column)
        source = None if maker is None else pairs.digest(column)
        name = None if maker is None or source is None else fingerprint(maker, source)
        known = None if cache is None or name is None else cache.get(name, count, dim)
        # If processes have disks of their own, all compute unless all have found the embeddings.
        hits = accelerator.reduce(torch.tensor(float(known is not None), device=accelerator.device), "sum")
        if known is not None and hits.item() == accelerator.num_processes:
            embeds[column] = known
            continue
        loader = accelerator.prepare(
            DataLoader(
                _Images(pairs, column),
                batch_size=batch_size,
                num_workers=num_workers,
                generator=torch.Generator(),  # not torch's global one, which belongs to the training
                collate_fn=functools.partial(_batch, processor),
            )
        )
        bar = tqdm(
            loader,
            desc=f"Reference on {column}",
            disable=disable_tqdm or not accelerator.is_local_main_process,
            leave=False,
        )
        found, is_readable = [], []
        for pixels, readable_rows in bar:
            found.append(accelerator.gather(reference.image_embeds(pixels)).float().cpu())
            is_readable.append(accelerator.gather(readable_rows).cpu())
        embeds[column], readable[column] = torch.cat(found)[:count], torch.cat(is_readable)[:count]
        complete = bool(readable[column].all())  # an unreadable image may be fixed later
        if cache is not None and name is not None and complete and accelerator.is_local_main_process:
            cache.put(name, embeds[column])
    pairs.attach_reference(embeds, readable)


def embedder_digest(reference: ReferencePolicy, processor: ProcessorMixin, precision: str) -> str:
    """Return a digest of everything that image embeddings depend on, except the images.

    Weights do not show the number of attention heads, an activation, the scaling of adapters or a hook. The embedding
    of a probe image, computed on the way that all images take, shows whatever the forward pass reads.

    Args:
        reference: The reference policy. Call the function under the autocast of the other images.
        processor: Makes the pixels.
        precision: Mixed precision of the accelerator.

    Returns:
        The digest, as hexadecimal digits. Another device or number of threads may change it: their embeddings differ
        in the last bits.
    """
    encoder = as_dual_encoder(reference.model)
    tower = [model_digest(encoder.model.get_submodule(part)) for part in encoder.towers["vision"]]
    probe = reference.image_embeds(to_pixels(processor, [probe_image()]).to(encoder.model.device))
    return fingerprint(*tower, processor_digest(processor), precision, str(probe.tolist()))
