"""The contrastive model as a policy: from embeddings to log-probabilities over candidate texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPModel, ProcessorMixin

from clip_po.candidates import CandidateTexts, embeds_of_all, share_of_texts
from clip_po.encoding import CachedTextEmbeddings, tokenize, unit_norm
from clip_po.losses import PreferenceLogps, kl_regularization


def candidate_logps(
    image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor | float, candidates: Tensor | None = None
) -> Tensor:
    """Compute log pi(y | x), the log-softmax over the candidate texts of logit_scale * cos(image, text).

    Args:
        image_embeds: Tensor[B, D], unit-norm.
        text_embeds: Tensor[M, D], unit-norm.
        logit_scale: CLIP's inverse temperature, after exp; > 0.
        candidates: Tensor[B, N] of positions among the M texts, -1 for none; None for all M texts.

    Returns:
        Tensor[B, N] (or [B, M]) in nats, at least float32; -inf for an absent candidate.

    Raises:
        ValueError: If image and text embeddings differ in size.

    Source: Radford et al. 2021, arXiv 2103.00020, Sec. 2.3; as a policy: Afzali et al. 2025, arXiv 2411.08923.
    """
    if image_embeds.shape[-1] != text_embeds.shape[-1]:
        raise ValueError(
            f"image_embeds have {image_embeds.shape[-1]} dimensions, text_embeds {text_embeds.shape[-1]}. Embed "
            "images and texts with the same model."
        )
    dtype = torch.promote_types(image_embeds.dtype, torch.float32)
    with torch.autocast(image_embeds.device.type, enabled=False):
        logits = logit_scale * image_embeds.to(dtype) @ text_embeds.to(dtype).T
    if candidates is not None:
        logits = logits.gather(-1, candidates.clamp(min=0)).masked_fill(candidates < 0, -torch.inf)
    return logits.log_softmax(dim=-1)


@dataclass(frozen=True)
class CandidateLogps:
    """Log-probabilities of a batch over its candidate texts, in nats.

    Attributes:
        preference: Tensor[B, N], on the images of the preferences.
        regularization: Tensor[B, N], on the regularization images paired with them; None if there are none.
        target: Tensor[B, N], on the clean images of the preferences, if the regularization images are other images.
    """

    preference: Tensor
    regularization: Tensor | None
    target: Tensor | None = None


def preference_logps(policy: CandidateLogps, reference: CandidateLogps, batch: Mapping[str, Any]) -> PreferenceLogps:
    """Pick the log-probabilities that the losses read.

    Args:
        policy: Log-probabilities under the policy.
        reference: Log-probabilities under the reference.
        batch: `chosen` (Tensor[B]) and `rejected` (Tensor[B, R], -1 for none): positions among the candidates.

    Returns:
        Log-probabilities of the chosen [B] and rejected [B, R] texts under both, and log-probabilities over all
        candidates [B, N] under the policy, and under the reference on the clean images.
    """
    chosen, rejected = batch["chosen"].unsqueeze(-1), batch["rejected"]
    absent = rejected < 0

    def pick(logps: Tensor) -> tuple[Tensor, Tensor]:
        rejected_logps = logps.gather(-1, rejected.clamp(min=0)).masked_fill(absent, -torch.inf)
        return logps.gather(-1, chosen).squeeze(-1), rejected_logps

    target = reference.regularization if reference.target is None else reference.target
    return PreferenceLogps(*pick(policy.preference), *pick(reference.preference), policy.preference, target)


def regularization_kl(policy: CandidateLogps, reference: CandidateLogps) -> Tensor:
    """Compute KL(reference || policy) on the regularization image of each row.

    Args:
        policy: Log-probabilities under the policy.
        reference: Log-probabilities under the reference, over the same candidates.

    Returns:
        Tensor[B], in nats, >= 0; all 0 if one of the two has no regularization images.
    """
    if policy.regularization is None or reference.regularization is None:
        return policy.preference.new_zeros(len(policy.preference))
    return kl_regularization(reference.regularization, policy.regularization)


def known_image_embeds(batch: Mapping[str, Any]) -> list[Tensor]:
    """Return the embeddings of preference and regularization images that a batch carries.

    Args:
        batch: Batch of `DataCollatorForContrastivePreference`, or of `ReferencePolicy.embedded`.

    Returns:
        Tensor[B, D] for each kind of image, unit-norm.
    """
    return [batch[name] for name in ("ref_image_embeds", "ref_reg_image_embeds") if name in batch]


class Policy:
    """pi(y | x) of the model in training, with one forward pass a step for all images.

    A batch without `pixel_values` carries the embeddings of a frozen vision tower, as `ReferencePolicy.embedded`
    returns it.

    Args:
        processor: Processor of the model.
        candidates: The candidate texts.
        text_embeddings: Cached embeddings if the text tower is frozen; None if it trains.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        candidates: CandidateTexts,
        text_embeddings: CachedTextEmbeddings | None,
    ) -> None:
        self.processor = processor
        self.candidates = candidates
        self.text_embeddings = text_embeddings
        self._shortest_text: dict[str, Tensor] | None = None
        self._blank_image: Tensor | None = None

    def __call__(self, model: nn.Module, encoder: CLIPModel, batch: Mapping[str, Any]) -> CandidateLogps:
        """Compute log-probabilities over the candidate texts.

        Args:
            model: The model as wrapped for training. Gradients synchronize only through a call of this object.
            encoder: The CLIPModel inside it.
            batch: Batch of `DataCollatorForContrastivePreference`.

        Returns:
            Tensor[B, N] for the preference images, and for the regularization images if there are any.
        """
        embedded = "pixel_values" not in batch
        pixels = [batch[name] for name in ("pixel_values", "reg_pixel_values") if name in batch]
        texts = self.candidates.of_batch(batch)
        shared = "candidates" not in batch  # every process has the same texts
        if self.text_embeddings:
            tokens = self._unused_text(encoder)
        else:
            tokens = tokenize(encoder, self.processor, share_of_texts(texts) if shared else texts)
        outputs = model(**tokens, pixel_values=self._unused_image(encoder) if embedded else torch.cat(pixels))
        if embedded:
            image_embeds = known_image_embeds(batch)
        else:
            image_embeds = [*unit_norm(outputs.vision_model_output.pooler_output).chunk(len(pixels))]
        if self.text_embeddings:
            text_embeds = self.text_embeddings(texts)
        else:
            own = unit_norm(outputs.text_model_output.pooler_output)
            text_embeds = embeds_of_all(own, len(texts)) if shared else own
        logps = [
            candidate_logps(embeds, text_embeds, encoder.logit_scale.exp(), batch.get("candidates"))
            for embeds in image_embeds
        ]
        return CandidateLogps(logps[0], logps[1] if len(logps) > 1 else None)

    def _unused_text(self, encoder: CLIPModel) -> dict[str, Tensor]:
        """Return the tokens that CLIPModel, which always runs both towers, gets if the text embeddings are known."""
        if self._shortest_text is None:  # kept, because a copy to a GPU waits for the step before
            self._shortest_text = tokenize(encoder, self.processor, [""])
        return self._shortest_text

    def _unused_image(self, encoder: CLIPModel) -> Tensor:
        """Return the pixels that CLIPModel gets if the image embeddings are known."""
        if self._blank_image is None:
            config = encoder.config.vision_config
            shape = (1, config.num_channels, config.image_size, config.image_size)
            self._blank_image = torch.zeros(shape, device=encoder.device)
        return self._blank_image
