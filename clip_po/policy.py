"""The contrastive model as a policy: from embeddings to log-probabilities over candidate texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

from clip_po.candidates import CandidateTexts, embeds_of_all, share_of_texts
from clip_po.data.images import blank_image, to_pixels
from clip_po.dual_encoder import DualEncoder, as_dual_encoder
from clip_po.encoding import CachedTextEmbeddings, tokenize, unit_norm
from clip_po.losses import PreferenceLogps, embedding_distillation_loss, kl_regularization


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
    """Log-probabilities of a batch over its candidate texts, in nats, and the embeddings that they come from.

    Attributes:
        preference: Tensor[B, N], on the images of the preferences.
        regularization: Tensor[B, N], on the regularization images paired with them; None if there are none.
        target: Tensor[B, N], on the clean images of the preferences, if the regularization images are other images.
        embeds: Tensor[B, D], unit-norm, by name of the images in `clip_po.reference.ROW_IMAGES`. Empty if the
            embeddings of policy and reference can't be compared.
        open_regularization: Tensor[B, V], on the regularization images over `reg_candidate_texts`; None without these.
    """

    preference: Tensor
    regularization: Tensor | None
    target: Tensor | None = None
    embeds: Mapping[str, Tensor] = field(default_factory=dict)
    open_regularization: Tensor | None = None


def preference_logps(policy: CandidateLogps, reference: CandidateLogps, batch: Mapping[str, Any]) -> PreferenceLogps:
    """Pick the log-probabilities that the losses read.

    Args:
        policy: Log-probabilities under the policy.
        reference: Log-probabilities under the reference.
        batch: `chosen` (Tensor[B], -1 for a row without a label) and `rejected` (Tensor[B, R], -1 for none): positions
            among the candidates. Optionally `weight`, `margin` and `label_smoothing`, Tensor[B] each.

    Returns:
        Log-probabilities of the chosen [B] and rejected [B, R] texts under both, log-probabilities over all candidates
        [B, N] under the policy, and under the reference on the clean images, and the embeddings of both. A row without
        a label has the log-probabilities of the first candidate in their place, which are finite.
    """
    labelled = batch["chosen"] >= 0
    chosen, rejected = batch["chosen"].clamp(min=0).unsqueeze(-1), batch["rejected"]
    absent = (rejected < 0) & labelled.unsqueeze(-1)

    def pick(logps: Tensor) -> tuple[Tensor, Tensor]:
        rejected_logps = logps.gather(-1, rejected.clamp(min=0)).masked_fill(absent, -torch.inf)
        return logps.gather(-1, chosen).squeeze(-1), rejected_logps

    target = reference.regularization if reference.target is None else reference.target
    return PreferenceLogps(
        *pick(policy.preference),
        *pick(reference.preference),
        policy.preference,
        target,
        policy.embeds.get("image"),
        reference.embeds.get("target_image", reference.embeds.get("reg_image")),
        labelled,
        batch["weight"] > 0 if "weight" in batch else None,
        batch.get("margin"),
        batch.get("label_smoothing"),
    )


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


def regularization_loss(policy: CandidateLogps, reference: CandidateLogps, reg_type: str) -> Tensor:
    """Compute the divergence of the policy from the reference on the regularization image of each row.

    Args:
        policy: Log-probabilities and embeddings under the policy.
        reference: Log-probabilities and embeddings under the reference.
        reg_type: As in `ContrastivePOConfig`: "kl" for KL(reference || policy) over the candidate texts, "kl_open" for
            the same over `reg_candidate_texts`, "embedding" for 1 - cosine of the two embeddings.

    Returns:
        Tensor[B], >= 0; all 0 if one of the two has no regularization images.
    """
    if reg_type == "embedding" and "reg_image" in policy.embeds:
        return embedding_distillation_loss(reference.embeds["reg_image"], policy.embeds["reg_image"])
    if policy.open_regularization is not None and reference.open_regularization is not None:
        return kl_regularization(reference.open_regularization, policy.open_regularization)
    return regularization_kl(policy, reference)


def known_image_embeds(batch: Mapping[str, Any]) -> list[Tensor]:
    """Return the embeddings of preference and regularization images that a batch carries.

    Args:
        batch: Batch of `DataCollatorForContrastivePreference`, or of `ReferencePolicy.embedded`.

    Returns:
        Tensor[B, D] for each kind of image, unit-norm.
    """
    return [batch[name] for name in ("ref_image_embeds", "ref_reg_image_embeds") if name in batch]


def open_logps(
    image_embeds: Tensor | None,
    text_embeddings: CachedTextEmbeddings | None,
    texts: Sequence[str],
    logit_scale: Tensor | float,
) -> Tensor | None:
    """Compute log pi(y | x) over the texts of an open vocabulary.

    Args:
        image_embeds: Tensor[B, D], unit-norm; None for no images.
        text_embeddings: Cached embeddings of a frozen text tower; None if the tower trains.
        texts: V texts, in the same list at each call; none for no vocabulary.
        logit_scale: As for `candidate_logps`.

    Returns:
        Tensor[B, V] in nats; None without images, texts or a frozen text tower.
    """
    if image_embeds is None or text_embeddings is None or not texts:
        return None
    return candidate_logps(image_embeds, text_embeddings(texts), logit_scale)


class Policy:
    """pi(y | x) of the model in training, with one forward pass a step for all images.

    A batch without `pixel_values` carries the embeddings of a frozen vision tower, as `ReferencePolicy.embedded`
    returns it.

    Args:
        processor: Processor of the model.
        candidates: The candidate texts.
        text_embeddings: Cached embeddings if the text tower is frozen; None if it trains.
        reg_texts: Texts over which the regularization images are compared too. They need a frozen text tower.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        candidates: CandidateTexts,
        text_embeddings: CachedTextEmbeddings | None,
        reg_texts: Sequence[str] = (),
    ) -> None:
        self.processor = processor
        self.reg_texts = reg_texts
        self.candidates = candidates
        self.text_embeddings = text_embeddings
        self._shortest_text: dict[str, Tensor] | None = None
        self._blank_image: Tensor | None = None

    def __call__(self, model: nn.Module, encoder: PreTrainedModel, batch: Mapping[str, Any]) -> CandidateLogps:
        """Compute log-probabilities over the candidate texts.

        Args:
            model: The model as wrapped for training. Gradients synchronize only through a call of this object.
            encoder: The two-tower model inside it.
            batch: Batch of `DataCollatorForContrastivePreference`.

        Returns:
            Tensor[B, N] for the preference images, and for the regularization images if there are any.
        """
        embedded = "pixel_values" not in batch
        towers = as_dual_encoder(encoder)
        pixels = [batch[name] for name in ("pixel_values", "reg_pixel_values") if name in batch]
        texts = self.candidates.of_batch(batch)
        shared = "candidates" not in batch  # every process has the same texts
        if self.text_embeddings:
            tokens = self._unused_text(towers)
        else:
            tokens = tokenize(towers, self.processor, share_of_texts(texts) if shared else texts)
        shown = self._unused_image(towers) if embedded else torch.cat(pixels)
        image_features, text_features = towers.features_of(model(**towers.inputs(shown, tokens)))
        image_embeds = known_image_embeds(batch) if embedded else [*unit_norm(image_features).chunk(len(pixels))]
        if self.text_embeddings:
            text_embeds = self.text_embeddings(texts)
        else:
            own = unit_norm(text_features)
            text_embeds = embeds_of_all(own, len(texts)) if shared else own
        logit_scale = towers.scale
        logps = [candidate_logps(embeds, text_embeds, logit_scale, batch.get("candidates")) for embeds in image_embeds]
        found = dict(zip(("image", "reg_image"), image_embeds, strict=False))
        known = self.text_embeddings
        return CandidateLogps(
            logps[0],
            logps[1] if len(logps) > 1 else None,
            embeds=found,
            open_regularization=open_logps(found.get("reg_image"), known, self.reg_texts, logit_scale),
        )

    def _unused_text(self, encoder: DualEncoder) -> dict[str, Tensor]:
        """Return the tokens that the model, which always runs both towers, gets if the text embeddings are known."""
        if self._shortest_text is None:  # kept, because a copy to a GPU waits for the step before
            self._shortest_text = tokenize(encoder, self.processor, [""])
        return self._shortest_text

    def _unused_image(self, encoder: DualEncoder) -> Tensor:
        """Return the pixels that the model gets if the image embeddings are known."""
        if self._blank_image is None:
            self._blank_image = to_pixels(self.processor, [blank_image()]).to(encoder.model.device)
        return self._blank_image
