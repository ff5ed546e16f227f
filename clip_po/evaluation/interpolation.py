"""How far to go from a base towards an aligned model, if clean accuracy may fall by no more than a bound."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import nn
from transformers import CLIPModel

from clip_po.evaluation.bootstrap import Estimate
from clip_po.evaluation.robustness import Answers, RobustnessImages, evaluate_robustness, robustness_report
from clip_po.evaluation.tables import format_estimate, format_number, format_table
from clip_po.policy import dual_encoder

ALPHAS = tuple(tenth / 10 for tenth in range(11))
"""From the base to the aligned model in ten steps."""

_ROUNDING = 1e-9  # points; costs are multiples of 100 / N, so that they often meet a bound exactly


@torch.no_grad()
def interpolate(base: nn.Module, aligned: nn.Module, alpha: float) -> CLIPModel:
    """A new model with the weights (1 - alpha) * base + alpha * aligned.

    Between a model and what was trained from it, alpha trades what the base knew for what the training taught.
    Beyond [0, 1] it extrapolates: above 1 it goes farther the way that training went, below 0 the opposite way;
    neither end says what to expect there. Weights that are the same in both, such as a frozen tower's, stay so
    bit for bit.

    Args:
        base: CLIPModel (or PeftModel around one) before alignment. It stays as it is.
        aligned: The same after alignment, trained from `base`, on any device. It stays as it is.
        alpha: Any finite number; 0 gives the weights of `base` and 1 those of `aligned`, bit for bit.

    Returns:
        A plain CLIPModel on the device of `base`, in evaluation mode, with adapters merged. It is computed in
        float32 at least and has the wider of both models' dtypes.

    Raises:
        ValueError: `alpha` is not finite, or the models differ in more than their weights.
        TypeError: As for `clip_po.policy.dual_encoder`.

    Source: Wortsman et al. 2022 (WiSE-FT), arXiv 2109.01903, Sec. 3; Ilharco et al. 2022 (PAINT), arXiv
    2208.05592, Sec. 2.
    """
    if not math.isfinite(alpha):
        raise ValueError(f"alpha must be a finite number, got {alpha!r}; 0 is the base, 1 the aligned model.")
    mixed, target = _plain_copy(base, "base"), _plain(aligned, "aligned")
    _check_same_architecture(mixed, target)
    mixed = mixed.to(torch.promote_types(mixed.dtype, target.dtype)).requires_grad_(True).eval()
    theirs = target.state_dict()
    for name, weight in mixed.state_dict().items():
        wide = torch.promote_types(weight.dtype, torch.float32)
        # lerp, and not the formula as it stands: that would round weights which are the same in both.
        weight.copy_(torch.lerp(weight.to(wide), theirs[name].to(weight.device, wide), alpha))
    return mixed


def _plain_copy(model: nn.Module, name: str) -> CLIPModel:
    dual_encoder(model, name)
    copied = copy.deepcopy(model)
    return copied.merge_and_unload() if isinstance(copied, PeftModel) else copied


def _plain(model: nn.Module, name: str) -> CLIPModel:
    return _plain_copy(model, name) if isinstance(model, PeftModel) else dual_encoder(model, name)


def _check_same_architecture(base: CLIPModel, aligned: CLIPModel) -> None:
    shapes = [{name: tuple(weight.shape) for name, weight in m.state_dict().items()} for m in (base, aligned)]
    names = sorted(name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
    found = [f"{name} ({shapes[0].get(name)} and {shapes[1].get(name)})" for name in names]
    # What the weights don't show, and what makes them mean something else.
    for tower in ("text_config", "vision_config"):
        for setting in ("hidden_act", "num_attention_heads"):
            values = [getattr(getattr(model.config, tower), setting) for model in (base, aligned)]
            if values[0] != values[1]:
                found.append(f"{tower}.{setting} ({values[0]!r} and {values[1]!r})")
    if found:
        rest = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise ValueError(
            f"base and aligned are of different architectures: {', '.join(found[:5])}{rest}. Interpolate a model "
            "with the one that it was trained from."
        )


@dataclass(frozen=True)
class SweepPoint:
    """What one interpolation was measured at.

    Attributes:
        alpha: Share of the aligned model, as for `interpolate`.
        clean_accuracy: 0..1, with its 95 % interval, as the others.
        typographic_accuracy: 0..1.
        clean_cost: Clean accuracy lost against the base on the same images, in percentage points.
        clean_cost_upper: Upper end of the one-sided 95 % interval of the clean cost, in percentage points.
        images: Rows of the data set that were measured on.
    """

    alpha: float
    clean_accuracy: Estimate
    typographic_accuracy: Estimate
    clean_cost: Estimate
    clean_cost_upper: float
    images: int


@dataclass(frozen=True)
class Choice:
    """The point to take under a bound of the clean cost, and a better one that is not sure to hold it.

    Attributes:
        point: The point with the highest typographic accuracy among those sure to hold the bound.
        max_clean_cost: The bound, in percentage points.
        unproven: The point with the highest typographic accuracy among those whose clean cost is below the
            bound by its value, but not by its upper end; None where it is no better than `point`.
        images_needed: Images that would make the upper end of `unproven` meet the bound, if its clean cost
            stayed the same; None where there is no such point.
    """

    point: SweepPoint
    max_clean_cost: float
    unproven: SweepPoint | None = None
    images_needed: int | None = None

    def describe(self) -> str:
        """The choice in one or two lines."""
        lines = [
            f"alpha {self.point.alpha:g}: typographic accuracy {format_estimate(self.point.typographic_accuracy)}, "
            f"{_cost(self.point)} with 95 % confidence (bound {self.max_clean_cost:g}, {self.point.images:,} images)."
        ]
        if self.unproven is not None:
            better = format_number(self.unproven.typographic_accuracy.value)
            lines.append(
                f"alpha {self.unproven.alpha:g} would be better ({better}) at a {_cost(self.unproven)}: to promise "
                f"the bound takes about {self.images_needed:,} images."
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.describe()


def _cost(point: SweepPoint) -> str:
    value, upper = (format_number(number, 2) for number in (point.clean_cost.value, point.clean_cost_upper))
    return f"clean cost of {value} points, at most {upper}"


def within(clean_cost: float, max_clean_cost: float) -> bool:
    """Whether a clean cost holds a bound; rounding does not break it. Both in percentage points."""
    return clean_cost <= max_clean_cost + _ROUNDING


def check_bound(max_clean_cost: float) -> None:
    """Refuse a bound that even the base would break.

    Raises:
        ValueError: The bound is negative or not finite.
    """
    if not 0 <= max_clean_cost < math.inf:
        raise ValueError(
            f"max_clean_cost must be a finite number of percentage points >= 0, got {max_clean_cost!r}: the base "
            "itself costs 0. One point is 1.0."
        )


def sweep_interpolation(
    base: nn.Module,
    aligned: nn.Module,
    images: RobustnessImages,
    templates: Sequence[str],
    alphas: Sequence[float] = ALPHAS,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    accelerator: Accelerator | None = None,
    disable_tqdm: bool = False,
    resamples: int = 1000,
    seed: int = 0,
) -> list[SweepPoint]:
    """Measure the interpolations of two models, one after another, each against the base on the same images.

    Args:
        base: CLIPModel (or PeftModel around one) before alignment.
        aligned: The same after alignment.
        images: Validation images. Report the model that was chosen on others: the best of several is best
            partly by luck.
        templates: As for `evaluate_robustness`.
        alphas: Shares of the aligned model, as for `interpolate`.
        batch_size: As for `evaluate_robustness`.
        num_workers: As for `evaluate_robustness`; each model has the images drawn anew.
        accelerator: As for `evaluate_robustness`.
        disable_tqdm: Shows no progress bars.
        resamples: As for `bootstrap_interval`.
        seed: As for `bootstrap_interval`.

    Returns:
        One point per alpha, in their order.

    Raises:
        ValueError: No alphas, or one that is not finite; `images` have a single cluster, so that nothing can
            be said about other images; as for `interpolate` and `evaluate_robustness`.
        TypeError: As for `interpolate`.

    Source: Wortsman et al. 2022 (WiSE-FT), arXiv 2109.01903, Sec. 4; Ilharco et al. 2022 (PAINT), arXiv
    2208.05592, Sec. 2.
    """
    if not alphas or not all(math.isfinite(alpha) for alpha in alphas):
        raise ValueError(f"alphas must be finite numbers, at least one, got {alphas!r}; [0, 0.5, 1] will do.")
    if len(np.unique(images.cluster)) < 2:
        raise ValueError("images have a single cluster: a clean cost needs at least two for its interval.")

    def answers(model: nn.Module) -> Answers:
        return evaluate_robustness(
            {"interpolated": model},
            images,
            templates,
            batch_size=batch_size,
            num_workers=num_workers,
            accelerator=accelerator,
            disable_tqdm=disable_tqdm,
        )

    of_base = answers(base)
    points = []
    for alpha in alphas:
        found = of_base if alpha == 0 else answers(interpolate(base, aligned, alpha))
        both = replace(found, predicted={**found.predicted, "base": of_base.predictions_of("interpolated")})
        report = robustness_report(both, "interpolated", "base", resamples=resamples, seed=seed)
        # Both ends of the 90 % interval leave out 5 %: its upper one is the end of the one-sided 95 % interval.
        one_sided = robustness_report(both, "interpolated", "base", confidence=0.9, resamples=resamples, seed=seed)
        points.append(
            SweepPoint(
                alpha,
                report["clean_accuracy"],
                report["typographic_accuracy"],
                report["clean_cost"],
                one_sided["clean_cost"].high,
                len(images) // images.renderings,
            )
        )
    return points


def choose_alpha(points: Sequence[SweepPoint], max_clean_cost: float) -> Choice:
    """The point with the highest typographic accuracy among those whose clean cost is sure to hold a bound.

    Sure is a point whose one-sided 95 % interval ends at or below the bound, each point by itself; the base
    (alpha 0) always is. The interval is a percentile bootstrap, which knows nothing of answers that happened not
    to change on these images: below about 200 images it ends too low. Where a point would be better whose clean
    cost is below the bound by its value alone, the choice names it, and how many images could settle it: the
    interval's width goes with 1 / sqrt(images), if more images come with as many more clusters.

    Args:
        points: From `sweep_interpolation`, with alpha 0 among them.
        max_clean_cost: Clean accuracy that may be lost, in percentage points, >= 0.

    Returns:
        The choice. Of points with the same typographic accuracy, the one whose clean cost ends lowest.

    Raises:
        ValueError: A negative bound, or no point holds it and alpha 0 was not measured.
    """
    check_bound(max_clean_cost)
    sure = [point for point in points if point.alpha == 0 or within(point.clean_cost_upper, max_clean_cost)]
    if not sure:
        raise ValueError(
            f"None of the {len(points)} points is sure to cost at most {max_clean_cost!r} points of clean accuracy. "
            "Measure alpha 0 too, the base, which costs nothing."
        )
    best = max(sure, key=_rank)
    unsure = [
        point
        for point in points
        if point not in sure
        and max_clean_cost - point.clean_cost.value > _ROUNDING
        and point.typographic_accuracy.value > best.typographic_accuracy.value
    ]
    if not unsure:
        return Choice(best, max_clean_cost)
    better = max(unsure, key=_rank)
    width = better.clean_cost_upper - better.clean_cost.value
    needed = better.images * (width / (max_clean_cost - better.clean_cost.value)) ** 2
    return Choice(best, max_clean_cost, better, math.ceil(needed))


def _rank(point: SweepPoint) -> tuple[float, float]:
    return point.typographic_accuracy.value, -point.clean_cost_upper


def interpolation_table(points: Sequence[SweepPoint]) -> str:
    """The points of a sweep as a Markdown table, with intervals in brackets.

    Args:
        points: From `sweep_interpolation`.

    Returns:
        One row a point.
    """
    rows: list[list[Estimate | str | float | None]] = [
        [f"{p.alpha:g}", p.clean_accuracy, p.typographic_accuracy, p.clean_cost, p.clean_cost_upper] for p in points
    ]
    return format_table(["alpha", "clean", "typographic", "clean cost (points)", "at most (95 %)"], rows)
