"""Interpolation between a base and an aligned model, with alpha chosen under a bound on the clean cost."""

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
from clip_po.models import dual_encoder
from clip_po.weights import check_in_memory

ALPHAS = tuple(tenth / 10 for tenth in range(11))
"""Eleven values from 0, the base, to 1, the aligned model."""

_CHANCE = 0.05  # What 95% confidence leaves open.
_ROUNDING = 1e-9  # Percentage points. Costs are multiples of 100 / N, so they often equal a bound exactly.


@torch.no_grad()
def interpolate(base: nn.Module, aligned: nn.Module, alpha: float) -> CLIPModel:
    """Return a new model with the weights (1 - alpha) * base + alpha * aligned.

    Between 0 and 1, alpha trades the knowledge of the base for the effect of the training. Outside [0, 1] the
    result is an extrapolation: above 1 it continues in the direction of the training, below 0 it goes the opposite
    way. The accuracies at 0 and 1 do not predict the accuracy there. Weights that are equal in both models, such as
    the weights of a frozen tower, stay equal bit for bit.

    Args:
        base: CLIPModel, or PeftModel around one, before alignment. It is not changed.
        aligned: The model trained from `base`, on any device. It is not changed.
        alpha: Any finite number. 0 gives the weights of `base` and 1 the weights of `aligned`, bit for bit.

    Returns:
        A plain CLIPModel on the device of `base`, in evaluation mode, with adapters merged. Weights are computed in
        float32 or wider, and have the wider of the dtypes of both models.

    Raises:
        ValueError: If `alpha` is not finite, the architectures differ, or weights are not in memory.
        TypeError: As in `clip_po.encoding.dual_encoder`.

    Source: Wortsman et al. 2022 (WiSE-FT), arXiv 2109.01903, Sec. 3; Ilharco et al. 2022 (PAINT), arXiv
    2208.05592, Sec. 2.
    """
    if not math.isfinite(alpha):
        raise ValueError(f"alpha must be a finite number, got {alpha!r}. 0 is the base, 1 the aligned model.")
    for model, name in ((base, "base"), (aligned, "aligned")):
        check_in_memory(dual_encoder(model, name), name)
    mixed, target = _plain_copy(base), _plain(aligned)
    _check_same_architecture(mixed, target)
    mixed = mixed.to(torch.promote_types(mixed.dtype, target.dtype)).requires_grad_(True).eval()
    theirs = target.state_dict()
    for name, weight in mixed.state_dict().items():
        wide = torch.promote_types(weight.dtype, torch.float32)
        # lerp keeps weights that are equal in both models; the formula above would round them.
        weight.copy_(torch.lerp(weight.to(wide), theirs[name].to(weight.device, wide), alpha))
    return mixed


def _plain_copy(model: nn.Module) -> CLIPModel:
    copied = copy.deepcopy(model)
    return copied.merge_and_unload() if isinstance(copied, PeftModel) else copied


def _plain(model: nn.Module) -> CLIPModel:
    return _plain_copy(model) if isinstance(model, PeftModel) else dual_encoder(model)


def _check_same_architecture(base: CLIPModel, aligned: CLIPModel) -> None:
    shapes = [{name: tuple(weight.shape) for name, weight in m.state_dict().items()} for m in (base, aligned)]
    names = sorted(name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
    found = [f"{name} ({shapes[0].get(name)} and {shapes[1].get(name)})" for name in names]
    # These settings change what the weights compute, but not their shapes.
    for tower in ("text_config", "vision_config"):
        for setting in ("hidden_act", "num_attention_heads"):
            values = [getattr(getattr(model.config, tower), setting) for model in (base, aligned)]
            if values[0] != values[1]:
                found.append(f"{tower}.{setting} ({values[0]!r} and {values[1]!r})")
    if found:
        rest = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise ValueError(
            f"base and aligned have different architectures: {', '.join(found[:5])}{rest}. Interpolate a model with "
            "the model it was trained from."
        )


@dataclass(frozen=True)
class SweepPoint:
    """The metrics of one interpolation. Intervals are 95 % intervals.

    Attributes:
        alpha: Share of the aligned model, as in `interpolate`.
        clean_accuracy: Accuracy on clean images, 0..1.
        typographic_accuracy: Accuracy on typographic images, 0..1.
        clean_cost: Clean accuracy lost against the base on the same images, in percentage points.
        clean_cost_upper: Upper end of the one-sided 95 % interval of the clean cost, in percentage points.
        images: Number of dataset rows measured.
    """

    alpha: float
    clean_accuracy: Estimate
    typographic_accuracy: Estimate
    clean_cost: Estimate
    clean_cost_upper: float
    images: int


@dataclass(frozen=True)
class Choice:
    """The point chosen under a bound on the clean cost, and a better point whose clean cost is uncertain.

    Attributes:
        point: The point with the highest typographic accuracy whose clean cost is within the bound with 95 %
            confidence.
        max_clean_cost: The bound, in percentage points.
        unproven: The point with the highest typographic accuracy whose estimated clean cost is below the bound, but
            the upper end of its interval is not; None if no such point is better than `point`.
        images_needed: Approximate number of images at which the upper end for `unproven` meets the bound, if its
            estimated clean cost stays the same; None without `unproven`.
    """

    point: SweepPoint
    max_clean_cost: float
    unproven: SweepPoint | None = None
    images_needed: int | None = None

    @property
    def is_base(self) -> bool:
        """Whether the chosen point is the base itself, so that nothing changes."""
        return self.point.alpha == 0

    def describe(self) -> str:
        """Describe the choice.

        Returns:
            One line; another if the point is the base; another if there is an unproven better point.
        """
        lines = [
            f"alpha {self.point.alpha:g}: typographic accuracy {format_estimate(self.point.typographic_accuracy)}, "
            f"{_cost(self.point)} with 95 % confidence (bound {self.max_clean_cost:g}, {self.point.images:,} images)."
        ]
        if self.is_base:
            lines.append("Nothing was changed: alpha 0 is the base.")
        if self.unproven is not None:
            better = format_number(self.unproven.typographic_accuracy.value)
            lines.append(
                f"alpha {self.unproven.alpha:g} would be better ({better}) at a {_cost(self.unproven)}. Proving that "
                f"it is within the bound takes about {self.images_needed:,} images."
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.describe()


def _cost(point: SweepPoint) -> str:
    value, upper = (format_number(number, 2) for number in (point.clean_cost.value, point.clean_cost_upper))
    return f"clean cost of {value} points, at most {upper}"


def within(clean_cost: float, max_clean_cost: float) -> bool:
    """Return whether a clean cost is within a bound, up to rounding.

    Args:
        clean_cost: Clean cost, in percentage points.
        max_clean_cost: The bound, in percentage points.

    Returns:
        True if it is.
    """
    return clean_cost <= max_clean_cost + _ROUNDING


def check_bound(max_clean_cost: float) -> None:
    """Raise if a bound on the clean cost is invalid.

    Args:
        max_clean_cost: The bound, in percentage points.

    Raises:
        ValueError: If the bound is negative or not finite.
    """
    if not 0 <= max_clean_cost < math.inf:
        raise ValueError(
            f"max_clean_cost must be a finite number of percentage points >= 0, got {max_clean_cost!r}. The base "
            "itself costs 0. One point is 1.0."
        )


def describe_promise(max_clean_cost: float, images: int) -> str:
    """Describe how many validation images a bound on the clean cost takes, before any is measured.

    If a share p of all answers got worse, n images show none of them with probability (1 - p)^n. The bound therefore
    takes at least log(0.05) / log(1 - p) images, about 300 divided by the percentage points.

    Args:
        max_clean_cost: The bound, in percentage points, >= 0.
        images: Number of validation images, >= 1.

    Returns:
        One line.

    Source: Hanley and Lippman-Hand 1983, JAMA 249(13), "If nothing goes wrong, is everything all right?".
    """
    possible = 100 * (1 - _CHANCE ** (1 / images))
    given = f"There are {images:,}: even if no answer gets worse on them, the cost may be {possible:.2g} points."
    if max_clean_cost == 0:
        return f"No number of validation images proves a clean cost of 0 points with 95% confidence. {given}"
    needed = 1 if max_clean_cost >= 100 else math.ceil(math.log(_CHANCE) / math.log1p(-max_clean_cost / 100))
    takes = (
        f"A clean cost of at most {max_clean_cost:g} points, with 95% confidence, takes at least {needed:,} "
        "validation images, and more if answers get worse."
    )
    return f"{takes} {given}" if images < needed else f"{takes} There are {images:,}."


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
    """Measure the interpolations of two models against the base, on the same images.

    Args:
        base: CLIPModel, or PeftModel around one, before alignment.
        aligned: The model trained from `base`.
        images: Validation images. Measure the chosen model again on other images, because the best of several
            points is partly best by chance.
        templates: As in `evaluate_robustness`.
        alphas: Shares of the aligned model, as in `interpolate`.
        batch_size: As in `evaluate_robustness`.
        num_workers: As in `evaluate_robustness`. Workers draw the images again for each model.
        accelerator: As in `evaluate_robustness`.
        disable_tqdm: Whether to hide progress bars.
        resamples: As in `bootstrap_interval`.
        seed: As in `bootstrap_interval`.

    Returns:
        One point per alpha, in the same order.

    Raises:
        ValueError: If there are no alphas, an alpha is not finite, or `images` have a single cluster, which allows
            no interval; also as in `interpolate` and `evaluate_robustness`.
        TypeError: As in `interpolate`.

    Source: Wortsman et al. 2022 (WiSE-FT), arXiv 2109.01903, Sec. 4; Ilharco et al. 2022 (PAINT), arXiv
    2208.05592, Sec. 2.
    """
    if not alphas or not all(math.isfinite(alpha) for alpha in alphas):
        raise ValueError(f"alphas must be finite numbers, at least one, got {alphas!r}. Pass for example [0, 0.5, 1].")
    if len(np.unique(images.cluster)) < 2:
        raise ValueError("images have a single cluster, but the interval of the clean cost needs at least two.")

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
        # A two-sided 90 % interval leaves out 5 % above its upper end, as a one-sided 95 % interval does.
        one_sided = robustness_report(both, "interpolated", "base", confidence=0.9, resamples=resamples, seed=seed)
        points.append(
            SweepPoint(
                alpha,
                report["clean_accuracy"],
                report["typographic_accuracy"],
                report["clean_cost"],
                one_sided["clean_cost"].high,
                images.rows,
            )
        )
    return points


def choose_alpha(points: Sequence[SweepPoint], max_clean_cost: float) -> Choice:
    """Choose the point with the highest typographic accuracy whose clean cost is within a bound.

    A point is within the bound if its one-sided 95 % interval ends at or below the bound, each point by itself.
    The base (alpha 0) always is. The interval is a percentile bootstrap, which cannot account for answers that did
    not change on these images, so it ends too low below about 200 images. If a better point is below the bound by
    its estimate alone, the choice names it together with the number of images that could settle the question. This
    number assumes that the width of the interval falls with 1 / sqrt(images), which holds if clusters grow with
    images.

    Args:
        points: From `sweep_interpolation`, including alpha 0.
        max_clean_cost: Largest allowed loss of clean accuracy, in percentage points, >= 0.

    Returns:
        The choice. Ties in typographic accuracy go to the point with the lowest upper end of the clean cost.

    Raises:
        ValueError: If the bound is negative or not finite, or no point is within it and alpha 0 was not measured.
    """
    check_bound(max_clean_cost)
    proven = [point for point in points if point.alpha == 0 or within(point.clean_cost_upper, max_clean_cost)]
    if not proven:
        raise ValueError(
            f"None of the {len(points)} interpolations costs at most {max_clean_cost!r} points of clean accuracy with "
            "95 % confidence. Measure alpha 0 too: it is the base, which costs nothing."
        )
    best = max(proven, key=_rank)
    unproven = [
        point
        for point in points
        if point not in proven
        and max_clean_cost - point.clean_cost.value > _ROUNDING
        and point.typographic_accuracy.value > best.typographic_accuracy.value
    ]
    if not unproven:
        return Choice(best, max_clean_cost)
    better = max(unproven, key=_rank)
    width = better.clean_cost_upper - better.clean_cost.value
    needed = better.images * (width / (max_clean_cost - better.clean_cost.value)) ** 2
    return Choice(best, max_clean_cost, better, math.ceil(needed))


def _rank(point: SweepPoint) -> tuple[float, float]:
    return point.typographic_accuracy.value, -point.clean_cost_upper


def interpolation_table(points: Sequence[SweepPoint]) -> str:
    """Format a sweep as a Markdown table, with intervals in brackets.

    Args:
        points: From `sweep_interpolation`.

    Returns:
        The table, one row per point.
    """
    rows: list[list[Estimate | str | float | None]] = [
        [f"{p.alpha:g}", p.clean_accuracy, p.typographic_accuracy, p.clean_cost, p.clean_cost_upper] for p in points
    ]
    return format_table(["alpha", "clean", "typographic", "clean cost (points)", "at most (95 %)"], rows)
