"""A concept turned up, down or around: a linear transformation of frozen embeddings, scaled by one number.

The towers stay frozen. Their unit-norm embeddings x (image) and y (text) become W x and W y, normalized again. The
loss for W is a preference loss plus a weight times the penalty ||I - W W^T||_F. The penalty draws W towards the
orthogonal matrices. A shared, exactly orthogonal W changes no cosine, so a shared W learns only what the penalty
leaves free. The norm is not squared and has a kink at orthogonal W. If the weight is too large, a shared W therefore
stays where it started and learns nothing. From the identity, this happens at half the norm of the symmetric part
of the gradient of the losses, or more.

Two paths lead from the original model (t = 0) to the trained one (t = 1) and beyond both:

==========  ==================  =================  ===================================================================
path        W_t                 offered for        effect
==========  ==================  =================  ===================================================================
singular    U S^t V^T           shared, square W   Similarity x^T V S^(2t) V^T y: a direction that training scaled by s
                                                   is scaled by s^t. No direction is reversed; only the weights of
                                                   the directions change. With t < 0, directions that training shrank
                                                   grow without bound.
straight    (1 - t) I + t W     every square W     Linear in t. A direction that training scaled by s < 1 is 0 at
                                                   t = 1 / (1 - s) and changes its sign there. A shared W changes the
                                                   sign on both sides, which leaves the similarity the same.
                                                   Only sensible for a W trained from the identity: the rotation of
                                                   an orthogonal start is not a step towards the concept.
==========  ==================  =================  ===================================================================

Source: Afzali et al. 2025, arXiv 2411.08923. (1 - t) I + t W is the interpolation of Wortsman et al. 2022, arXiv
2109.01903, applied to W.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from huggingface_hub import ModelHubMixin
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from clip_po.concept.folding import PROJECTIONS, check_foldable, multiply_projection, to_float64
from clip_po.dual_encoder import as_dual_encoder, dual_encoder
from clip_po.hub.checkpoint_files import CONCEPT_FILE
from clip_po.hub.retries import call_hub, find_file
from clip_po.validation import FINITE, check_number
from clip_po.weights import check_in_memory

Towers = Literal["shared", "each", "image"]
Start = Literal["identity", "orthogonal"]
ScalePath = Literal["singular", "straight"]


_CARD = """---
{{ card_data }}
---

A linear transformation W of the embeddings of a CLIP model, trained with clip_po on the model BASE.

```python
from clip_po.concept import ConceptTransform

concept = ConceptTransform.from_pretrained(REPOSITORY)
model = concept.fold_into(CLIPModel.from_pretrained(BASE), t=1.0)
```
"""


class ConceptTransform(  # type: ignore[call-arg]  # mypy does not see __init_subclass__ of the mixin
    ModelHubMixin, nn.Module, library_name="clip_po", tags=["clip", "clip_po"], model_card_template=_CARD
):
    """Linear transformation W of frozen, unit-norm embeddings, followed by normalization.

    Example:

        concept = ConceptTransform(model.config.projection_dim)
        ...  # train it
        neutral = concept.fold_into(model, t=0.5)  # a plain CLIPModel
        neutral.save_pretrained("neutral")

    Args:
        dim: D, the size of an embedding: `model.config.projection_dim` of a CLIPModel.
        output_dim: K, the size of a transformed embedding, 1 <= K <= D. Defaults to D.
        towers: "shared": one W for both towers; "each": one W for each; "image": W for images only.
        start: "identity": the identity, for K < D its first K rows; "orthogonal": a random matrix with orthonormal
            rows, the same for both towers. If it is square, it changes no cosine.
        seed: Seed of the orthogonal start.

    Attributes:
        image_weight: Parameter[K, D], W of the images, and with towers="shared" also of the texts.
        text_weight: Parameter[K, D], W of the texts with towers="each", else None.

    Raises:
        ValueError: If a size is out of range, a name is unknown, or `towers`="image" is combined with K < D or an
            orthogonal start, either of which would separate the images from the texts.
    """

    def __init__(
        self,
        dim: int,
        output_dim: int | None = None,
        towers: Towers = "shared",
        start: Start = "identity",
        seed: int = 0,
    ) -> None:
        super().__init__()
        output_dim = dim if output_dim is None else output_dim
        if not 1 <= output_dim <= dim:
            raise ValueError(f"output_dim must be between 1 and dim={dim}, got {output_dim!r}.")
        if towers not in get_args(Towers):
            raise ValueError(f"towers must be one of {list(get_args(Towers))}, got {towers!r}.")
        if start not in get_args(Start):
            raise ValueError(f"start must be one of {list(get_args(Start))}, got {start!r}.")
        if towers == "image" and (output_dim < dim or start != "identity"):
            raise ValueError(
                f"towers='image' leaves texts as they are, so its W must be square and start as the identity, got "
                f"output_dim={output_dim} of dim={dim} and start={start!r}. Use towers='shared' or 'each', which "
                "transform the texts too."
            )
        self.towers = towers
        weight = torch.eye(output_dim, dim)
        if start == "orthogonal":
            random = torch.randn(dim, output_dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            weight = torch.linalg.qr(random).Q.T.float().contiguous()
        self.image_weight = nn.Parameter(weight)
        self.text_weight = nn.Parameter(weight.clone()) if towers == "each" else None

    @property
    def dim(self) -> int:
        """D, the size of an embedding."""
        return self.image_weight.shape[1]

    @property
    def output_dim(self) -> int:
        """K, the size of a transformed embedding."""
        return self.image_weight.shape[0]

    @property
    def weights(self) -> tuple[Tensor, Tensor | None]:
        """W of the images and W of the texts, Tensor[K, D] each. None if texts are not transformed."""
        return self.image_weight, self.image_weight if self.towers == "shared" else self.text_weight

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of the layers of a model that `fold_into` replaces."""
        return PROJECTIONS[:1] if self.towers == "image" else PROJECTIONS

    def forward(self, image_embeds: Tensor, text_embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Transform embeddings and normalize them.

        Args:
            image_embeds: Tensor[B, D], unit-norm.
            text_embeds: Tensor[M, D], unit-norm.

        Returns:
            Tensor[B, K] and Tensor[M, K], unit-norm, at least float32. With towers="image" the texts are unchanged.
        """
        image_weight, text_weight = self.weights
        texts = text_embeds if text_weight is None else _transformed(text_embeds, text_weight)
        return _transformed(image_embeds, image_weight), texts

    def penalty(self) -> Tensor:
        """Compute ||I - W W^T||_F, summed over the matrices.

        Returns:
            Tensor[], >= 0, with gradient; 0 if the rows of every matrix are orthonormal.
        """
        distances = []
        for matrix in self.parameters():
            with torch.autocast(matrix.device.type, enabled=False):
                distances.append(torch.eye(len(matrix), device=matrix.device).sub(matrix @ matrix.T).norm())
        return torch.stack(distances).sum()

    @torch.no_grad()
    def at(self, t: float, path: ScalePath = "singular") -> ConceptTransform:
        """Return the transformation at scale t: 0 is the original model, 1 this transformation.

        From 0 to 1 the model changes as training changed it, beyond 1 further in the same direction, and below 0 in
        the opposite direction. Below 0 the singular path divides by powers of the singular values. With the smallest s
        and the largest 1, a direction grows by s^t relative to the rest (10,000 times at t = -4 and s = 0.1) and
        dominates everything else. A larger penalty or regularization keeps s larger; the straight path stays bounded.

        Args:
            t: Any finite number.
            path: "singular", U S^t V^T, or "straight", (1 - t) I + t W, both computed in float64.

        Returns:
            A new transformation on the same device and in the same dtype.

        Raises:
            ValueError: If `t` or W is not finite, `path` is unknown or does not start at the original model, or t < 0
                on the singular path and W has no inverse.
        """
        check_number("t", t, FINITE, "0 is the original model, 1 the trained one.")
        if path not in get_args(ScalePath):
            raise ValueError(f"path must be one of {list(get_args(ScalePath))}, got {path!r}.")
        self._check_path(path)
        scaled = copy.deepcopy(self)
        for matrix in scaled.parameters():
            wide = to_float64(matrix)
            if not wide.isfinite().all():
                raise ValueError("W has values that are not finite: its training diverged. Lower learning_rate.")
            if path == "straight":
                power = torch.lerp(torch.eye(len(wide), dtype=wide.dtype, device=wide.device), wide, t)
            else:
                power = _singular_power(wide, t)
            matrix.copy_(power.to(matrix.dtype))
        return scaled

    @torch.no_grad()
    def fold_into(self, model: nn.Module, t: float | None = None, path: ScalePath = "singular") -> PreTrainedModel:
        """Return a plain model with W multiplied into its projections, so that its embeddings are transformed.

        It can be saved, loaded and used without clip_po. If W has K < D rows, its `projection_dim` is K.

        Args:
            model: CLIPModel, or another model that ends with projections (or PeftModel around one), whose embeddings
                W was trained on. Not changed.
            t: Scale, as in `at`. None folds W itself.
            path: As in `at`. Ignored if `t` is None.

        Returns:
            A copy of the model with new projections, in evaluation mode, with adapters merged. The products are
            computed in float64 and stored in the model's dtype.

        Raises:
            ValueError: If the embeddings of the model have another size or come from no projection, its weights are
                not in memory, or the product is out of range of its dtype; and as in `at`.
            TypeError: As in `clip_po.dual_encoder.dual_encoder`.
        """
        check_in_memory(dual_encoder(model))
        check_foldable(model, self.projections)
        dim = as_dual_encoder(model).dim
        if dim != self.dim:
            raise ValueError(
                f"The transformation is for embeddings of {self.dim} numbers, but the model's have {dim}. Fold it "
                "into the model it was trained on."
            )
        scaled = self if t is None else self.at(t, path)
        copied = copy.deepcopy(model)
        folded = dual_encoder(copied.merge_and_unload() if isinstance(copied, PeftModel) else copied).eval()
        for name, weight in zip(PROJECTIONS, scaled.weights, strict=True):
            if weight is not None:
                setattr(folded, name, multiply_projection(weight, getattr(folded, name)))
        for sized in (folded, folded.config, folded.config.vision_config, folded.config.text_config):
            if getattr(sized, "projection_dim", None) == dim:
                sized.projection_dim = scaled.output_dim
        return folded

    def save(self, folder: str | Path) -> None:
        """Write the transformation to `concept.safetensors`, which `load` reads.

        Args:
            folder: The folder. Created if it does not exist.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        tensors = {name: matrix.contiguous().cpu() for name, matrix in self.state_dict().items()}
        metadata = {
            "format": "pt",
            "towers": self.towers,
            "dim": str(self.dim),
            "output_dim": str(self.output_dim),
        }
        save_file(tensors, Path(folder) / CONCEPT_FILE, metadata=metadata)

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> str | None:
        """Save the transformation with a config.json, and with a card if there is none.

        Args:
            folder: The folder. Created if it does not exist.
            **kwargs: As in `ModelHubMixin.save_pretrained`. A Trainer gives `state_dict`, the weights as it gathered
                them or None, and finds them again in model.safetensors when it resumes.

        Returns:
            URL of the commit with `push_to_hub=True`, else None.
        """
        saved = super().save_pretrained(folder, **{k: v for k, v in kwargs.items() if k != "state_dict"})
        if "state_dict" in kwargs:
            weights = kwargs["state_dict"] or self.state_dict()
            tensors = {name: matrix.contiguous().cpu() for name, matrix in weights.items()}
            save_file(tensors, Path(folder) / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
        return saved

    def _save_pretrained(self, save_directory: Path) -> None:
        self.save(save_directory)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **hub: Any) -> ConceptTransform:
        """Load a transformation from a folder or the Hub, on the CPU. Only safetensors are read.

        Args:
            pretrained_model_name_or_path: Folder or Hub id.
            **hub: For a Hub id, `revision`, `token` and other arguments of `huggingface_hub.hf_hub_download`.

        Returns:
            The transformation, with its matrices in the dtype in which they were saved.

        Raises:
            FileNotFoundError: If the folder or the repository does not contain a transformation.
            HubError: If the Hub refuses, or stays busy or out of reach.
            ValueError: If the file is damaged or is something else.
        """
        file = find_file(pretrained_model_name_or_path, CONCEPT_FILE, "ConceptTransform.save writes one.", **hub)
        try:
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata() or {}
            tensors = load_file(file)
            sizes = (int(metadata["output_dim"]), int(metadata["dim"]))
            if any(tuple(matrix.shape) != sizes for matrix in tensors.values()):
                raise ValueError(f"its matrices are not {sizes[0]} x {sizes[1]}")
            transform = cls(sizes[1], sizes[0], metadata["towers"])
            transform.to(next(iter(tensors.values())).dtype).load_state_dict(tensors)
        except (SafetensorError, KeyError, ValueError, RuntimeError, StopIteration) as error:
            raise ValueError(
                f"{str(file)!r} is not a transformation written by ConceptTransform.save "
                f"({type(error).__name__}: {error}). Save it again from the trained one."
            ) from error
        return transform

    load = from_pretrained
    """The same, under the name that pairs with `save`."""

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Push the transformation to the Hub, repeated while the Hub is busy.

        Args:
            repo_id: Id of the repository. Created if it does not exist.
            **kwargs: As in `ModelHubMixin.push_to_hub`: `token`, `branch`, `private`, `commit_message` and others.

        Returns:
            URL of the commit.

        Raises:
            HubError: If the Hub refuses, or stays busy or out of reach.
        """
        return call_hub(f"Pushing the transformation to {repo_id!r}", super().push_to_hub, repo_id, **kwargs)

    def extra_repr(self) -> str:
        """Return sizes and towers, for `print`.

        Returns:
            The text between the brackets, such as "dim=512, output_dim=512, towers='shared'".
        """
        return f"dim={self.dim}, output_dim={self.output_dim}, towers={self.towers!r}"

    def _check_path(self, path: ScalePath) -> None:
        if self.output_dim < self.dim:
            raise ValueError(
                f"W is {self.output_dim} x {self.dim}: with fewer rows than columns it drops directions that "
                "no scale restores, so t = 0 would not be the original model. To scale W, train a square one (leave "
                "output_dim out). To use this W unscaled, call transform.fold_into(model)."
            )
        if path == "singular" and self.towers != "shared":
            raise ValueError(
                f"path='singular' needs one W for both towers, but this one has towers={self.towers!r}. The rotation "
                "U V^T that is left at t = 0 would differ between the towers, so t = 0 would not be the original "
                "model. Use path='straight'."
            )


def _transformed(embeds: Tensor, matrix: Tensor) -> Tensor:
    dtype = torch.promote_types(embeds.dtype, torch.float32)
    with torch.autocast(embeds.device.type, enabled=False):
        return F.normalize(embeds.to(dtype) @ matrix.to(dtype).T, dim=-1)


def _singular_power(matrix: Tensor, t: float) -> Tensor:
    """Return U S^t V^T of a square matrix in float64."""
    u, s, vh = torch.linalg.svd(matrix)
    # W was trained in float32: a singular value below its rounding error counts as 0.
    lowest = s[0] * len(s) * torch.finfo(torch.float32).eps
    if t < 0 and s[-1] <= lowest:
        raise ValueError(
            f"W has {int((s <= lowest).sum())} singular values of 0 (the smallest is {s[-1]:.1e}, the largest "
            f"{s[0]:.1e}), which t={t} would divide by. Use t >= 0 or path='straight', or train with a larger weight "
            "of the penalty or the regularization."
        )
    return (u * s**t) @ vh
