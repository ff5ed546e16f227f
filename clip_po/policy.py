"""The contrastive model as a policy: from embeddings to log-probabilities over candidate texts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel, ProcessorMixin

from clip_po.candidates import CandidateTexts, embeds_of_all, share_of_texts
from clip_po.losses import PreferenceLogps, kl_regularization


def dual_encoder(model: nn.Module, name: str = "model") -> CLIPModel:
    """Return the CLIPModel inside a plain model or a PeftModel. Its LoRA layers stay active.

    Args:
        model: The model.
        name: Name of the argument, for messages.

    Raises:
        TypeError: If the model is not a CLIPModel with two towers.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, CLIPModel):
        raise TypeError(
            f"{name} must be a transformers.CLIPModel (or a PeftModel around one), got {type(inner).__name__}. "
            "Preferences between texts need both towers, which a vision or text model alone does not have. Convert an "
            "open_clip checkpoint to the Hugging Face layout first."
        )
    return inner


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
    """Return KL(reference || policy) on the regularization image of each row, Tensor[B]; 0 if there are none."""
    if policy.regularization is None or reference.regularization is None:
        return policy.preference.new_zeros(len(policy.preference))
    return kl_regularization(reference.regularization, policy.regularization)


@contextlib.contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """Put models into evaluation mode without gradients, and restore the mode of each module afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        # Not inference_mode: its tensors cannot be part of a later backward pass.
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def encode_texts(model: nn.Module, processor: ProcessorMixin, texts: Sequence[str], batch_size: int = 256) -> Tensor:
    """Embed texts in evaluation mode and full precision, without gradients.

    Args:
        model: CLIPModel or PeftModel.
        processor: Processor of the model.
        texts: M texts, at least one. Longer texts than the text tower reads are truncated.
        batch_size: Texts in a forward pass.

    Returns:
        Tensor[M, D], unit-norm, at least float32, on the device of the model.

    Raises:
        ValueError: If `texts` is a single string or empty, or an embedding is not finite.
    """
    with torch.autocast(dual_encoder(model).device.type, enabled=False):
        return encode_texts_autocast(model, processor, texts, batch_size)


def encode_texts_autocast(
    model: nn.Module, processor: ProcessorMixin, texts: Sequence[str], batch_size: int = 256
) -> Tensor:
    """Embed texts as `encode_texts` does, but in the precision of the autocast around the call."""
    if isinstance(texts, str) or not texts:
        raise ValueError(f"texts must be a list of at least one text, got {texts!r}.")
    encoder = dual_encoder(model)
    embeds = []
    with evaluating(encoder):
        for start in range(0, len(texts), batch_size):
            tokens = tokenize(encoder, processor, texts[start : start + batch_size])
            features = encoder.get_text_features(**tokens).pooler_output
            embeds.append(F.normalize(_at_least_float32(features), dim=-1))
    found = torch.cat(embeds)
    broken = (~found.isfinite().all(dim=-1)).nonzero().flatten().tolist()
    if broken:
        raise ValueError(
            f"The embeddings of {len(broken)} of {len(texts)} texts, such as {texts[broken[0]]!r}, hold nan or "
            "infinity: the weights of the text tower are not finite, or its activations overflow. Load an earlier "
            "checkpoint, or use float32."
        )
    return found


def encode_images(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """Embed images outside training. The call takes no part in gradient synchronization.

    Args:
        model: CLIPModel or PeftModel.
        pixel_values: Tensor[B, C, H, W].

    Returns:
        Tensor[B, D], unit-norm, at least float32.
    """
    features = dual_encoder(model).get_image_features(pixel_values).pooler_output
    return F.normalize(_at_least_float32(features), dim=-1)


def tokenize(encoder: CLIPModel, processor: ProcessorMixin, texts: Sequence[str]) -> Any:
    """Tokenize texts, padded to the longest: `input_ids` and `attention_mask`, Tensor[M, L] on the model's device."""
    # A tokenizer may have no length limit, and a longer text has no position embeddings.
    longest = encoder.text_model.config.max_position_embeddings
    tokens = processor.tokenizer(
        list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt"
    ).to(encoder.device)
    return {name: tokens[name] for name in ("input_ids", "attention_mask")}


MOST_TEXTS = 65_536
"""Number of embeddings that `CachedTextEmbeddings` keeps, so that a text of its own in every row fills no memory."""


class CachedTextEmbeddings:
    """Embeddings of texts under a frozen text tower. Each text is encoded once.

    Args:
        model: Model with a frozen text tower.
        processor: Processor of the model.
        encode: `encode_texts`, or `encode_texts_autocast`.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: ProcessorMixin,
        encode: Callable[[nn.Module, ProcessorMixin, Sequence[str]], Tensor] = encode_texts,
    ) -> None:
        self._encode = lambda texts: encode(model, processor, texts)
        self._known: dict[str, Tensor] = {}
        self._last: tuple[Sequence[str], Tensor] | None = None

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return the unit-norm embeddings of texts, Tensor[M, D]."""
        if self._last is None or self._last[0] is not texts:
            if len(self._known) > MOST_TEXTS:
                self._known.clear()
            unknown = [text for text in dict.fromkeys(texts) if text not in self._known]
            if unknown:
                self._known.update(zip(unknown, self._encode(unknown), strict=True))
            self._last = (texts, torch.stack([self._known[text] for text in texts]))
        return self._last[1]


class Policy:
    """pi(y | x) of the model in training, with one forward pass a step for all images.

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
        self._stand_in: dict[str, Tensor] | None = None

    def __call__(self, model: nn.Module, encoder: CLIPModel, batch: Mapping[str, Any]) -> CandidateLogps:
        """Compute log-probabilities over the candidate texts.

        Args:
            model: The model as wrapped for training. Gradients synchronize only through a call of this object.
            encoder: The CLIPModel inside it.
            batch: Batch of `DataCollatorForContrastivePreference`.

        Returns:
            Tensor[B, N] for the preference images, and for the regularization images if there are any.
        """
        pixels = [
            batch["pixel_values"],
            *([batch["reg_pixel_values"]] if "reg_pixel_values" in batch else []),
        ]
        texts = self.candidates.of_batch(batch)
        shared = "candidates" not in batch  # every process has the same texts
        if self.text_embeddings:
            tokens = self._shortest_text(encoder)
        else:
            tokens = tokenize(encoder, self.processor, share_of_texts(texts) if shared else texts)
        outputs = model(**tokens, pixel_values=torch.cat(pixels))
        image_embeds = _unit_norm(outputs.vision_model_output.pooler_output)
        if self.text_embeddings:
            text_embeds = self.text_embeddings(texts)
        else:
            own = _unit_norm(outputs.text_model_output.pooler_output)
            text_embeds = embeds_of_all(own, len(texts)) if shared else own
        logps = [
            candidate_logps(embeds, text_embeds, encoder.logit_scale.exp(), batch.get("candidates"))
            for embeds in image_embeds.split(len(pixels[0]))
        ]
        return CandidateLogps(logps[0], logps[1] if len(logps) > 1 else None)

    def _shortest_text(self, encoder: CLIPModel) -> dict[str, Tensor]:
        """Return the tokens that CLIPModel, which always runs both towers, gets if the text embeddings are known."""
        if self._stand_in is None:  # kept, because a copy to a GPU waits for the step before
            self._stand_in = tokenize(encoder, self.processor, [""])
        return self._stand_in


def _at_least_float32(features: Tensor) -> Tensor:
    """Return features in float32, or in their own dtype if it is wider."""
    return features.to(torch.promote_types(features.dtype, torch.float32))


def _unit_norm(features: Tensor) -> Tensor:
    """Normalize bit for bit as CLIPModel does, but never in half precision, which would round once more."""
    features = _at_least_float32(features)
    return features / features.pow(2).sum(dim=-1, keepdim=True).pow(0.5)
