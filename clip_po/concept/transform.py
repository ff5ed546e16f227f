"""One concept turned up, off or around: a linear transformation of frozen embeddings, scaled by one number.

The towers stay frozen and their unit-norm embeddings x (image) and y (text) become W x and W y, normalized again.
W is trained with the preference losses plus a weight times ||I - W W^T||_F. That penalty draws W near the orthogonal
matrices and no farther: under a shared, exactly orthogonal W every cosine is what it was, so whatever the shared
transformation learns lives in what the penalty leaves free. The norm is not squared, so it has a kink where W is
orthogonal, and too large a weight holds a shared W there for good, with nothing learned: from the identity, a weight
of half the norm of the symmetric part of the losses' gradient or more.

Two paths lead from the original model (t = 0) to the trained one (t = 1) and beyond both:

==========  ==================  =================  ===================================================================
path        W_t                 offered for        what it does
==========  ==================  =================  ===================================================================
singular    U S^t V^T           shared, square W   Similarity x^T V S^(2t) V^T y: a direction that training shrank by s
                                                   is shrunk by s^t. No direction is turned around: what changes
                                                   is which of them decides. Below 0 it enlarges without bound what
                                                   training shrank.
straight    (1 - t) I + t W     every square W     Linear in t. A direction that training shrank by s passes through
                                                   0 at t = 1 / (1 - s) and comes back beyond it: under a shared W it
                                                   has changed its sign on both sides, which no similarity sees.
                                                   Only sensible for a W trained from the identity: the rotation in
                                                   an orthogonal start is no step towards the concept.
==========  ==================  =================  ===================================================================

Source: Afzali et al. 2025, arXiv 2411.08923; (1 - t) I + t W is the interpolation of Wortsman et al. 2022, arXiv
2109.01903, applied to W.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel
from transformers.utils import SAFE_WEIGHTS_NAME

from clip_po.policy import dual_encoder

CONCEPT_FILE = "concept.safetensors"
"""What `ConceptTransform.save` writes into its folder."""

Towers = Literal["shared", "each", "image"]
Start = Literal["identity", "orthogonal"]
ScalePath = Literal["singular", "straight"]


class ConceptTransform(nn.Module):
    """A linear transformation W of frozen, unit-norm embeddings, which are normalized again afterwards.

    Example:

        concept = ConceptTransform(model.config.projection_dim)
        ...  # train it
        neutral = concept.fold_into(model, t=0.5)  # a plain CLIPModel
        neutral.save_pretrained("neutral")

    Args:
        dim: D, the size of an embedding: `model.config.projection_dim`.
        output_dim: K, the size of a transformed embedding, 1 <= K <= D; D where it is None.
        towers: "shared": one W for both towers; "each": one for each; "image": one for images, texts stay.
        start: "identity": the identity, for K < D its first K rows; "orthogonal": a random matrix with orthonormal
            rows, the same for both towers, under which every cosine of a square W is what it was.
        seed: Seed of the orthogonal start.

    Attributes:
        image_weight: Parameter[K, D], W of the images; with towers="shared" of the texts too.
        text_weight: Parameter[K, D], W of the texts with towers="each", else None.

    Raises:
        ValueError: A size is out of range, a name is unknown, or `towers`="image" comes with K < D or with an
            orthogonal start, either of which would take the images away from the texts.
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
            raise ValueError(f"output_dim must lie between 1 and dim={dim}, got {output_dim!r}.")
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
        """W of the images and W of the texts, Tensor[K, D] each; None for the texts where they stay."""
        return self.image_weight, self.image_weight if self.towers == "shared" else self.text_weight

    def forward(self, image_embeds: Tensor, text_embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Transformed embeddings, unit-norm.

        Args:
            image_embeds: Tensor[B, D], unit-norm.
            text_embeds: Tensor[M, D], unit-norm.

        Returns:
            Tensor[B, K] and Tensor[M, K], at least float32; with towers="image" the texts as they came.
        """
        image_weight, text_weight = self.weights
        texts = text_embeds if text_weight is None else _transformed(text_embeds, text_weight)
        return _transformed(image_embeds, image_weight), texts

    def penalty(self) -> Tensor:
        """||I - W W^T||_F, summed over the towers' own matrices, Tensor[], >= 0; 0 where all are orthogonal."""
        distances = []
        for weight in self.parameters():
            with torch.autocast(weight.device.type, enabled=False):
                distances.append(torch.eye(len(weight), device=weight.device).sub(weight @ weight.T).norm())
        return torch.stack(distances).sum()

    @torch.no_grad()
    def at(self, t: float, path: ScalePath = "singular") -> ConceptTransform:
        """The transformation at scale t: 0 is the original model, 1 this transformation.

        Between 0 and 1 the concept is turned down (or wherever training took it), beyond 1 farther the same way,
        below 0 the opposite way. Below 0 the singular path divides by powers of the singular values: with the
        smallest s and the largest 1, a direction is enlarged by s^t against the rest (at t = -4 and s = 0.1 by
        10,000) and everything else drowns in it. A larger penalty or regularization keeps s up; the straight path
        stays bounded.

        Args:
            t: Any finite number.
            path: "singular", U S^t V^T, or "straight", (1 - t) I + t W, both computed in float64.

        Returns:
            A new transformation on the same device and in the same dtype.

        Raises:
            ValueError: `t` is not finite; `path` is unknown or has no t = 0 that is the original model; W is not
                finite; t < 0 on the singular path and W has no inverse.
        """
        if not math.isfinite(t):
            raise ValueError(f"t must be a finite number, got {t!r}; 0 is the original model, 1 the trained one.")
        if path not in get_args(ScalePath):
            raise ValueError(f"path must be one of {list(get_args(ScalePath))}, got {path!r}.")
        self._check_path(path)
        scaled = copy.deepcopy(self)
        for weight in scaled.parameters():
            wide = weight.double()
            if not wide.isfinite().all():
                raise ValueError("W holds numbers that are not finite: its training diverged. Lower learning_rate.")
            if path == "straight":
                weight.copy_(torch.lerp(torch.eye(len(wide), dtype=wide.dtype, device=wide.device), wide, t))
            else:
                weight.copy_(_singular_power(wide, t))
        return scaled

    @torch.no_grad()
    def fold_into(self, model: nn.Module, t: float | None = None, path: ScalePath = "singular") -> CLIPModel:
        """A plain CLIPModel whose embeddings are the transformed ones: W multiplied into its projections.

        It saves, loads and runs without clip_po. With K < D rows of W its `projection_dim` is K.

        Args:
            model: CLIPModel (or PeftModel around one) whose embeddings W was trained on. It is not changed.
            t: Scale, as for `at`; None folds the transformation as it is.
            path: As for `at`; only read where `t` is given.

        Returns:
            A copy of the model with other projections, in evaluation mode, with adapters merged. The products are
            computed in float64 and have the model's dtype.

        Raises:
            ValueError: W is made for embeddings of another size; the product is beyond the range of the model's
                dtype; as for `at`.
            TypeError: As for `clip_po.policy.dual_encoder`.
        """
        dim = dual_encoder(model).config.projection_dim
        if dim != self.dim:
            raise ValueError(
                f"The transformation is made for embeddings of {self.dim} numbers, the model's have {dim}. Fold it "
                "into the model that it was trained on."
            )
        scaled = self if t is None else self.at(t, path)
        copied = copy.deepcopy(model)
        folded = dual_encoder(copied.merge_and_unload() if isinstance(copied, PeftModel) else copied).eval()
        image_weight, text_weight = scaled.weights
        folded.visual_projection = _product(image_weight, folded.visual_projection)
        if text_weight is not None:
            folded.text_projection = _product(text_weight, folded.text_projection)
        folded.projection_dim = scaled.output_dim
        for config in (folded.config, folded.config.vision_config, folded.config.text_config):
            if config.projection_dim == dim:
                config.projection_dim = scaled.output_dim
        return folded

    def save(self, folder: str | Path) -> None:
        """Write the transformation as `concept.safetensors`; `load` reads it.

        Args:
            folder: Made where it does not exist.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        tensors = {name: weight.contiguous().cpu() for name, weight in self.state_dict().items()}
        metadata = {
            "format": "pt",
            "towers": self.towers,
            "dim": str(self.dim),
            "output_dim": str(self.output_dim),
        }
        save_file(tensors, Path(folder) / CONCEPT_FILE, metadata=metadata)

    def save_pretrained(self, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Write what `load` reads, and the same weights under the name that a Trainer resumes from.

        Args:
            folder: Made where it does not exist.
            state_dict: The weights as a Trainer gathered them; those of the transformation where it is None.
        """
        self.save(folder)
        weights = {name: weight.contiguous().cpu() for name, weight in (state_dict or self.state_dict()).items()}
        save_file(weights, Path(folder) / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})

    @classmethod
    def load(cls, folder: str | Path) -> ConceptTransform:
        """Read what `save` wrote, on the CPU.

        Raises:
            FileNotFoundError: The folder holds no transformation.
            ValueError: The file holds something else.
        """
        file = Path(folder) / CONCEPT_FILE
        if not file.is_file():
            raise FileNotFoundError(f"{str(folder)!r} holds no {CONCEPT_FILE}; ConceptTransform.save writes one.")
        try:
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata() or {}
            tensors = load_file(file)
            transform = cls(int(metadata["dim"]), int(metadata["output_dim"]), metadata["towers"])
            transform.to(next(iter(tensors.values())).dtype).load_state_dict(tensors)
        except (SafetensorError, KeyError, ValueError, RuntimeError, StopIteration) as error:
            raise ValueError(
                f"{str(file)!r} is no transformation that ConceptTransform.save wrote "
                f"({type(error).__name__}: {error}). Save it again from the trained one."
            ) from error
        return transform

    def extra_repr(self) -> str:
        """Sizes and towers, for `print`."""
        return f"dim={self.dim}, output_dim={self.output_dim}, towers={self.towers!r}"

    def _check_path(self, path: ScalePath) -> None:
        if self.output_dim < self.dim:
            raise ValueError(
                f"W is {self.output_dim} x {self.dim}: with fewer rows than columns it has dropped directions that "
                "no scale brings back, so t = 0 would not be the original model. Train a square W (leave output_dim "
                "out) to scale it; transform.fold_into(model) uses this one as it is."
            )
        if path == "singular" and self.towers != "shared":
            raise ValueError(
                f"path='singular' needs one W for both towers, but this one has towers={self.towers!r}: U V^T, left "
                "over at t = 0, turns one side against the other, so t = 0 would not be the original model. Use "
                "path='straight'."
            )


def _transformed(embeds: Tensor, weight: Tensor) -> Tensor:
    dtype = torch.promote_types(embeds.dtype, torch.float32)
    with torch.autocast(embeds.device.type, enabled=False):
        return F.normalize(embeds.to(dtype) @ weight.to(dtype).T, dim=-1)


def _singular_power(weight: Tensor, t: float) -> Tensor:
    """U S^t V^T of a square matrix in float64."""
    u, s, vh = torch.linalg.svd(weight)
    # W was trained in float32: a singular value below its rounding is 0 but for noise.
    lowest = s[0] * len(s) * torch.finfo(torch.float32).eps
    if t < 0 and s[-1] <= lowest:
        raise ValueError(
            f"W has {int((s <= lowest).sum())} singular values of 0 (the smallest is {s[-1]:.1e}, the largest "
            f"{s[0]:.1e}), which t={t} would divide by. Use t >= 0 or path='straight', or train with a larger weight "
            "of the penalty or of the regularization."
        )
    return (u * s**t) @ vh


def _product(weight: Tensor, projection: nn.Linear) -> nn.Linear:
    before = projection.weight
    product = (weight.to(before.device, torch.float64) @ before.double()).to(before.dtype)
    if not product.isfinite().all():
        raise ValueError(
            f"A folded projection holds numbers beyond the range of {before.dtype}: W is too large at this t. Use a t "
            "nearer to 0, or fold into the model in float32 (model.float())."
        )
    folded = nn.Linear(product.shape[1], product.shape[0], bias=False, device=before.device, dtype=before.dtype)
    folded.weight = nn.Parameter(product, requires_grad=before.requires_grad)
    return folded
