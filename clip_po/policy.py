"""The contrastive model as a policy: from a batch to the log-probabilities that the losses read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

from clip_po.candidate_logps import batch_logps, candidate_logps
from clip_po.candidates import CandidateTexts, embeds_of_all, share_of_texts
from clip_po.chunked_towers import in_chunks
from clip_po.data.images import blank_image, to_pixels
from clip_po.dual_encoder import as_dual_encoder
from clip_po.encoding import CachedTextEmbeddings, tokenize, unit_norm
from clip_po.families import DualEncoder, PolicyKind
from clip_po.losses import PreferenceLogps, bernoulli_kl, embedding_distillation_loss, kl_regularization

PIXELS = {"image": "pixel_values", "reg_image": "reg_pixel_values"}
"""Keys of a batch with the pixels of preference and regularization images, by name of the images."""


DIVERGENCES: Mapping[PolicyKind, Callable[[Tensor, Tensor], Tensor]] = {
    "softmax": kl_regularization,
    "sigmoid": bernoulli_kl,
}
"""KL(reference || policy) of log-probabilities, by kind of the policy."""


@dataclass(frozen=True)
class CandidateLogps:
    """Log-probabilities of a batch over its candidates, in nats, and the embeddings that they come from.

    Attributes:
        preference: Tensor[B, N], of the preferences.
        regularization: Tensor[B, N], on the regularization images paired with them; None if there are none.
        target: Tensor[B, N], on the clean images of the preferences, if the regularization images are other images.
        embeds: Tensor[P, D], unit-norm, by name of the images in `clip_po.reference.ROW_IMAGES`. Empty if the
            embeddings of policy and reference can't be compared.
        open_regularization: Tensor[B, V], on the regularization images over `reg_candidate_texts`; None without these.
        divergence: KL(reference || policy) of two such log-probabilities, Tensor[B, N] each -> Tensor[B].
    """

    preference: Tensor
    regularization: Tensor | None
    target: Tensor | None = None
    embeds: Mapping[str, Tensor] = field(default_factory=dict)
    open_regularization: Tensor | None = None
    divergence: Callable[[Tensor, Tensor], Tensor] = kl_regularization


def preference_logps(
    policy: CandidateLogps,
    reference: CandidateLogps,
    batch: Mapping[str, Any],
    mismatched_kl: Tensor | None = None,
) -> PreferenceLogps:
    """Pick the log-probabilities that the losses read.

    Args:
        policy: Log-probabilities under the policy.
        reference: Log-probabilities under the reference.
        batch: `chosen` (Tensor[B], -1 for a row without a label) and `rejected` (Tensor[B, R], -1 for none): positions
            among the candidates. Optionally `weight`, `margin`, `label_smoothing` and `desirable`, Tensor[B] each.
        mismatched_kl: Tensor[], the reference point of `kto`; None without this loss.

    Returns:
        Log-probabilities of the chosen [B] and rejected [B, R] texts under both, log-probabilities over all candidates
        [B, N] under the policy, and under the reference on the clean images, and the embeddings of both. A row without
        a label has the log-probabilities of the first candidate in their place, which are finite. Unpaired feedback is
        not `labelled`: `chosen` is its only text.
    """
    desirable = batch.get("desirable")
    labelled = batch["chosen"] >= 0 if desirable is None else (batch["chosen"] >= 0) & (desirable < 0)
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
        desirable,
        mismatched_kl,
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
    return policy.divergence(reference.regularization, policy.regularization)


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
        return policy.divergence(reference.open_regularization, policy.open_regularization)
    return regularization_kl(policy, reference)


def policy_bias(encoder: DualEncoder, kind: PolicyKind) -> Tensor | None:
    """Return the `logit_bias` of `candidate_logps`.

    Args:
        encoder: The model.
        kind: As for `Policy`.

    Returns:
        The bias of the model, Tensor[], for "sigmoid"; None for "softmax".
    """
    return encoder.bias if kind == "sigmoid" else None


def known_image_embeds(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the embeddings of preference and regularization images that a batch carries.

    Args:
        batch: Batch of `DataCollatorForContrastivePreference`, or of `ReferencePolicy.embedded`.

    Returns:
        Tensor[P, D] by name of the images, unit-norm.
    """
    return {name: batch[f"ref_{name}_embeds"] for name in PIXELS if f"ref_{name}_embeds" in batch}


def open_logps(
    image_embeds: Tensor | None,
    text_embeddings: CachedTextEmbeddings | None,
    texts: Sequence[str],
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
) -> Tensor | None:
    """Compute log pi(y | x) over the texts of an open vocabulary.

    Args:
        image_embeds: Tensor[B, D], unit-norm; None for no images.
        text_embeddings: Cached embeddings of a frozen text tower; None if the tower trains.
        texts: V texts, in the same list at each call; none for no vocabulary.
        logit_scale: As for `candidate_logps`.
        logit_bias: As for `candidate_logps`.

    Returns:
        Tensor[B, V] in nats; None without images, texts or a frozen text tower.
    """
    if image_embeds is None or text_embeddings is None or not texts:
        return None
    return candidate_logps(image_embeds, text_embeddings(texts), logit_scale, logit_bias=logit_bias)


class Policy:
    """pi(y | x) of the model in training, with one forward pass a step for all images.

    A batch without `pixel_values` carries the embeddings of a frozen vision tower, as `ReferencePolicy.embedded`
    returns it.

    Args:
        processor: Processor of the model.
        candidates: The candidate texts.
        text_embeddings: Cached embeddings if the text tower is frozen; None if it trains.
        reg_texts: Texts over which the regularization images are compared too. They need a frozen text tower.
        chunk_size: Largest number of images or texts that a tower encodes at a time, as for `in_chunks`.
        kind: "softmax" or "sigmoid", as `policy` in `ContrastivePOConfig`.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        candidates: CandidateTexts,
        text_embeddings: CachedTextEmbeddings | None,
        reg_texts: Sequence[str] = (),
        chunk_size: int | None = None,
        kind: PolicyKind = "softmax",
    ) -> None:
        self.chunk_size, self.kind = chunk_size, kind
        self.processor = processor
        self.reg_texts = reg_texts
        self.candidates = candidates
        self.text_embeddings = text_embeddings
        self._shortest_text: dict[str, Tensor] | None = None
        self._blank_image: Tensor | None = None

    def __call__(self, model: nn.Module, encoder: PreTrainedModel, batch: Mapping[str, Any]) -> CandidateLogps:
        """Compute log-probabilities over the candidates.

        Args:
            model: The model as wrapped for training. Gradients synchronize only through a call of this object.
            encoder: The two-tower model inside it.
            batch: Batch of `DataCollatorForContrastivePreference`.

        Returns:
            Tensor[B, N] for the preferences, and for the regularization images if there are any.
        """
        towers = as_dual_encoder(encoder)
        pixels = {name: batch[key] for name, key in PIXELS.items() if key in batch}
        texts, reg_texts = self.candidates.of_batch(batch), batch.get("reg_texts", [])
        shared = self.candidates.are_shared(batch)  # every process has the same texts
        if self.text_embeddings:
            tokens = self._unused_text(towers)
        else:
            tokens = tokenize(towers, self.processor, [*(share_of_texts(texts) if shared else texts), *reg_texts])
        shown = torch.cat([*pixels.values()]) if pixels else self._unused_image(towers)
        with in_chunks(towers, self.chunk_size):
            image_features, text_features = towers.features_of(model(**towers.inputs(shown, tokens)))
        if pixels:
            sizes = [*map(len, pixels.values())]
            image_embeds = dict(zip(pixels, unit_norm(image_features).split(sizes), strict=True))
        else:
            image_embeds = known_image_embeds(batch)
        if self.text_embeddings:
            text_embeds = self.text_embeddings(texts)
            reg_embeds = self.text_embeddings(reg_texts) if reg_texts else None
        else:
            own = unit_norm(text_features)
            own, reg_embeds = own.split([len(own) - len(reg_texts), len(reg_texts)])
            text_embeds = embeds_of_all(own, len(texts)) if shared else own
        scale, bias = towers.scale, policy_bias(towers, self.kind)
        logps = batch_logps(image_embeds, text_embeds, reg_embeds, scale, batch, shared, bias)
        return CandidateLogps(
            logps["image"],
            logps.get("reg_image"),
            embeds=image_embeds,
            open_regularization=open_logps(
                image_embeds.get("reg_image"), self.text_embeddings, self.reg_texts, scale, bias
            ),
            divergence=DIVERGENCES[self.kind],
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
