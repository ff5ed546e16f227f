"""The contrastive model as a policy: embeddings to log-probabilities over candidate texts."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel, ProcessorMixin

from clip_po.candidates import embeds_of_all, share_of_texts
from clip_po.losses import PreferenceLogps, kl_regularization


def dual_encoder(model: nn.Module, name: str = "model") -> CLIPModel:
    """The CLIPModel inside a plain model or a PeftModel, its LoRA layers active as they are.

    Args:
        model: The model.
        name: What messages call it.

    Raises:
        TypeError: The model has no two towers of CLIP's layout.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, CLIPModel):
        raise TypeError(
            f"{name} must be a transformers.CLIPModel (or a PeftModel around one), got {type(inner).__name__}. "
            "Preferences between texts need both towers: a vision or text model alone has no policy, and an "
            "open_clip checkpoint has to be converted to the Hugging Face layout first."
        )
    return inner


def candidate_logps(
    image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor | float, candidates: Tensor | None = None
) -> Tensor:
    """log pi(y | x) = log softmax over the candidate texts of logit_scale * cos(image, text).

    Args:
        image_embeds: Tensor[B, D], unit-norm.
        text_embeds: Tensor[M, D], unit-norm.
        logit_scale: CLIP's inverse temperature, after exp; > 0.
        candidates: Tensor[B, N] of positions in the M texts, -1 for none; all M texts where it is None.

    Returns:
        Tensor[B, N] (or [B, M]) in nats, at least float32; -inf for an absent candidate.

    Raises:
        ValueError: The embeddings are of different sizes.

    Source: Radford et al. 2021, arXiv 2103.00020, Sec. 2.3; as a policy: Afzali et al. 2025, arXiv 2411.08923.
    """
    if image_embeds.shape[-1] != text_embeds.shape[-1]:
        raise ValueError(
            f"image_embeds have {image_embeds.shape[-1]} numbers each, text_embeds {text_embeds.shape[-1]}: they are "
            "of different models. Embed images and texts by one model."
        )
    dtype = torch.promote_types(image_embeds.dtype, torch.float32)
    with torch.autocast(image_embeds.device.type, enabled=False):
        logits = logit_scale * image_embeds.to(dtype) @ text_embeds.to(dtype).T
    if candidates is not None:
        logits = logits.gather(-1, candidates.clamp(min=0)).masked_fill(candidates < 0, -torch.inf)
    return logits.log_softmax(dim=-1)


@dataclass(frozen=True)
class BatchLogps:
    """Log-probabilities of a batch over its candidate texts.

    Attributes:
        preference: Tensor[B, N], on the images of the preferences.
        regularization: Tensor[B, N], on the ordinary images paired with them; None where there are none.
        target: Tensor[B, N], on the preferences' own clean images, where the ordinary images are others.
    """

    preference: Tensor
    regularization: Tensor | None
    target: Tensor | None = None


def preference_logps(policy: BatchLogps, reference: BatchLogps, batch: Mapping[str, Any]) -> PreferenceLogps:
    """The log-probabilities of a batch as losses take them.

    Args:
        policy: The policy's log-probabilities.
        reference: The reference's.
        batch: `chosen` (Tensor[B]) and `rejected` (Tensor[B, R], -1 for none): positions in the candidates.

    Returns:
        Chosen [B] and rejected [B, R] of both; the policy's over all candidates and the reference's on the clean
        images, both [B, N].
    """
    chosen, rejected = batch["chosen"].unsqueeze(-1), batch["rejected"]
    absent = rejected < 0

    def pick(logps: Tensor) -> tuple[Tensor, Tensor]:
        rejected_logps = logps.gather(-1, rejected.clamp(min=0)).masked_fill(absent, -torch.inf)
        return logps.gather(-1, chosen).squeeze(-1), rejected_logps

    target = reference.regularization if reference.target is None else reference.target
    return PreferenceLogps(*pick(policy.preference), *pick(reference.preference), policy.preference, target)


def regularization_kl(policy: BatchLogps, reference: BatchLogps) -> Tensor:
    """KL(reference || policy) on the ordinary image of each row, Tensor[B]; 0 where there are none."""
    if policy.regularization is None or reference.regularization is None:
        return policy.preference.new_zeros(len(policy.preference))
    return kl_regularization(reference.regularization, policy.regularization)


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


def encode_texts(model: nn.Module, processor: ProcessorMixin, texts: Sequence[str], batch_size: int = 256) -> Tensor:
    """Unit-norm embeddings of texts, in evaluation mode and full precision, without gradients.

    Args:
        model: CLIPModel or PeftModel.
        processor: Its processor.
        texts: M texts, at least one; what is longer than the text tower reads is cut.
        batch_size: Texts a forward.

    Returns:
        Tensor[M, D], at least float32, on the model's device.

    Raises:
        ValueError: `texts` is a single string or empty, or an embedding is not finite.
    """
    with torch.autocast(dual_encoder(model).device.type, enabled=False):
        return encode_texts_autocast(model, processor, texts, batch_size)


def encode_texts_autocast(
    model: nn.Module, processor: ProcessorMixin, texts: Sequence[str], batch_size: int = 256
) -> Tensor:
    """As `encode_texts`, but in the precision of the autocast around the call."""
    if isinstance(texts, str) or not texts:
        raise ValueError(f"texts must be a list of at least one text, got {texts!r}.")
    encoder = dual_encoder(model)
    embeds = []
    with evaluating(encoder):
        for start in range(0, len(texts), batch_size):
            tokens = tokenize(encoder, processor, texts[start : start + batch_size])
            features = encoder.get_text_features(**tokens).pooler_output
            embeds.append(F.normalize(_wide(features), dim=-1))
    found = torch.cat(embeds)
    spoiled = (~found.isfinite().all(dim=-1)).nonzero().flatten().tolist()
    if spoiled:
        raise ValueError(
            f"The embeddings of {len(spoiled)} of {len(texts)} texts, such as {texts[spoiled[0]]!r}, hold nan or "
            "infinity: so do weights of the text tower, or its numbers overflow. Load an earlier checkpoint, or use "
            "float32."
        )
    return found


def encode_images(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """Unit-norm embeddings of images outside training: the call takes no part in gradient synchronization.

    Args:
        model: CLIPModel or PeftModel.
        pixel_values: Tensor[B, C, H, W].

    Returns:
        Tensor[B, D], at least float32.
    """
    features = dual_encoder(model).get_image_features(pixel_values).pooler_output
    return F.normalize(_wide(features), dim=-1)


def tokenize(encoder: CLIPModel, processor: ProcessorMixin, texts: Sequence[str]) -> Any:
    """Tokens of texts on the model's device, padded to the longest: `input_ids`, `attention_mask`, Tensor[M, L]."""
    # A tokenizer may know no length limit, and a longer text has no position embeddings.
    longest = encoder.text_model.config.max_position_embeddings
    tokens = processor.tokenizer(
        list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt"
    ).to(encoder.device)
    return {name: tokens[name] for name in ("input_ids", "attention_mask")}


def batch_texts(candidate_texts: Sequence[str] | None, batch: Mapping[str, Any]) -> Sequence[str]:
    """The texts that the positions of a batch refer to: those given once for all, else the batch's own."""
    return candidate_texts if candidate_texts is not None else batch["texts"]


MOST_TEXTS = 65_536
"""Embeddings that `FrozenTexts` keeps; a data set with a text of its own in every row would fill the memory."""


class FrozenTexts:
    """Embeddings of texts under a frozen text tower, each text encoded once.

    Args:
        model: The model whose text tower is frozen.
        processor: Its processor.
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
        """Unit-norm embeddings, Tensor[M, D]."""
        if self._last is None or self._last[0] is not texts:
            if len(self._known) > MOST_TEXTS:
                self._known.clear()
            unknown = [text for text in dict.fromkeys(texts) if text not in self._known]
            if unknown:
                self._known.update(zip(unknown, self._encode(unknown), strict=True))
            self._last = (texts, torch.stack([self._known[text] for text in texts]))
        return self._last[1]


class Policy:
    """pi(y | x) of the model in training: one forward a step for all images, through the model itself.

    Args:
        processor: The model's processor.
        candidate_texts: The candidate texts of every row, or None where each row names its own.
        frozen_texts: Embeddings of texts where the text tower is frozen; None where it trains.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        candidate_texts: Sequence[str] | None,
        frozen_texts: FrozenTexts | None,
    ) -> None:
        self.processor = processor
        self.candidate_texts = candidate_texts
        self.frozen_texts = frozen_texts
        self._stand_in: dict[str, Tensor] | None = None

    def __call__(self, model: nn.Module, encoder: CLIPModel, batch: Mapping[str, Any]) -> BatchLogps:
        """Log-probabilities over the candidate texts.

        Args:
            model: The model as wrapped for training: the call must be its own for gradients to synchronize.
            encoder: The CLIPModel inside it.
            batch: As `DataCollatorForContrastivePreference` makes it.

        Returns:
            Tensor[B, N] for the preference images, and for the regularization images where there are any.
        """
        pixels = [
            batch["pixel_values"],
            *([batch["reg_pixel_values"]] if "reg_pixel_values" in batch else []),
        ]
        texts = batch_texts(self.candidate_texts, batch)
        shared = "candidates" not in batch  # then all processes have the same texts
        if self.frozen_texts:
            tokens = self._shortest_text(encoder)
        else:
            tokens = tokenize(encoder, self.processor, share_of_texts(texts) if shared else texts)
        outputs = model(**tokens, pixel_values=torch.cat(pixels))
        image_embeds = _unit_norm(outputs.vision_model_output.pooler_output)
        if self.frozen_texts:
            text_embeds = self.frozen_texts(texts)
        else:
            own = _unit_norm(outputs.text_model_output.pooler_output)
            text_embeds = embeds_of_all(own, len(texts)) if shared else own
        logps = [
            candidate_logps(embeds, text_embeds, encoder.logit_scale.exp(), batch.get("candidates"))
            for embeds in image_embeds.split(len(pixels[0]))
        ]
        return BatchLogps(logps[0], logps[1] if len(logps) > 1 else None)

    def _shortest_text(self, encoder: CLIPModel) -> dict[str, Tensor]:
        """What stands in where the embeddings are known already, since CLIPModel runs both towers."""
        if self._stand_in is None:  # kept, as a copy to a GPU waits for the step before
            self._stand_in = tokenize(encoder, self.processor, [""])
        return self._stand_in


def _wide(features: Tensor) -> Tensor:
    """In float32 at least."""
    return features.to(torch.promote_types(features.dtype, torch.float32))


def _unit_norm(features: Tensor) -> Tensor:
    """As CLIPModel computes it, bit for bit, but never in half precision: its own embeddings are rounded once more."""
    wide = _wide(features)
    return wide / wide.pow(2).sum(dim=-1, keepdim=True).pow(0.5)


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy that never trains; what is frozen already is shared, so that only the training part is held twice."""
    shared = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
    return copy.deepcopy(model, memo=shared).requires_grad_(False).eval()
