"""Interpolation between a base and an aligned model, with alpha chosen under bounds on what the model loses."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from clip_po.dual_encoder import dual_encoder
from clip_po.evaluation.bootstrap import Estimate
from clip_po.evaluation.bounds import COSTS, Bounds, Cost, describe_broken, describe_cost
from clip_po.evaluation.evaluator import Metrics
from clip_po.evaluation.robustness import Answers, RobustnessImages, evaluate_robustness, robustness_report
from clip_po.evaluation.tables import format_estimate, format_number, format_table
from clip_po.weights import check_in_memory

ALPHAS = tuple(tenth / 10 for tenth in range(11))
"""Eleven values from 0, the base, to 1, the aligned model."""

_ONE_SIDED = 0.9  # A two-sided 90 % interval leaves out 5 % above its upper end, as a one-sided 95 % interval does.


@torch.no_grad()
def interpolate(base: nn.Module, aligned: nn.Module, alpha: float) -> PreTrainedModel:
    """Return a new model with the weights (1 - alpha) * base + alpha * aligned.

    Between 0 and 1, alpha trades the knowledge of the base for the effect of the training. Outside [0, 1] the
    result is an extrapolation: above 1 it continues in the direction of the training, below 0 it goes the opposite
    way. The accuracies at 0 and 1 do not predict the accuracy there. Weights that are equal in both models, such as
    the weights of a frozen tower, stay equal bit for bit.

    Args:
        base: Two-tower model, or PeftModel around one, before alignment. It is not changed.
        aligned: The model trained from `base`, on any device. It is not changed.
        alpha: Any finite number. 0 gives the weights of `base` and 1 the weights of `aligned`, bit for bit.

    Returns:
        A plain model on the device of `base`, in evaluation mode, with adapters merged. Weights are computed in
        float32 or wider, and have the wider of the dtypes of both models.

    Raises:
        ValueError: If `alpha` is not finite, the architectures differ, or weights are not in memory.
        TypeError: As in `clip_po.dual_encoder.dual_encoder`.

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


def _plain_copy(model: nn.Module) -> PreTrainedModel:
    copied = copy.deepcopy(model)
    return copied.merge_and_unload() if isinstance(copied, PeftModel) else copied


def _plain(model: nn.Module) -> PreTrainedModel:
    return _plain_copy(model) if isinstance(model, PeftModel) else dual_encoder(model)


def _check_same_architecture(base: PreTrainedModel, aligned: PreTrainedModel) -> None:
    shapes = [{name: tuple(weight.shape) for name, weight in m.state_dict().items()} for m in (base, aligned)]
    names = sorted(name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
    found = [f"{name} ({shapes[0].get(name)} and {shapes[1].get(name)})" for name in names]
    # These settings change what the weights compute, but not their shapes.
    for tower in ("text_config", "vision_config"):
        for setting in ("hidden_act", "num_attention_heads"):
            values = [getattr(getattr(model.config, tower), setting, None) for model in (base, aligned)]
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
        costs: What the model loses against the base, by name in `COSTS`: `clean_cost`, paired on the same images, and
            the costs of the measures of the sweep.
    """

    alpha: float
    clean_accuracy: Estimate
    typographic_accuracy: Estimate
    costs: Mapping[str, Cost]


@dataclass(frozen=True)
class Choice:
    """The point chosen under bounds, which bound keeps a better point out, and a better point that is uncertain.

    Attributes:
        point: The point with the highest typographic accuracy that keeps all bounds with 95 % confidence.
        bounds: The bounds.
        next_better: Of the points with a higher typographic accuracy, the one with the lowest; None if there is none.
        unproven: The point with the highest typographic accuracy whose estimated costs are below the bounds, but
            the upper ends of their intervals are not; None if no such point is better than `point`.
        images_needed: Approximate number of images at which the upper ends for `unproven` meet the bounds, if the
            estimated costs stay the same, by name of the costs that are uncertain. Empty without `unproven`.
    """

    point: SweepPoint
    bounds: Bounds
    next_better: SweepPoint | None = None
    unproven: SweepPoint | None = None
    images_needed: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_base(self) -> bool:
        """Whether the chosen point is the base itself, so that nothing changes."""
        return self.point.alpha == 0

    @property
    def binding(self) -> list[str]:
        """Names of the costs whose bound `next_better` breaks; empty if no bound keeps a better point out."""
        return [] if self.next_better is None else self.bounds.broken_by(self.next_better.costs)

    def describe(self) -> str:
        """Describe the choice.

        Returns:
            One line; another if the point is the base; with several bounds, another that says which one binds; another
            if there is an unproven better point.
        """
        costs = [
            f"{describe_cost(name, cost := self.point.costs[name])} with 95 % confidence (bound {bound:g}, "
            f"{cost.images:,} images)"
            for name, bound in self.bounds.given.items()
        ]
        accuracy = f"typographic accuracy {format_estimate(self.point.typographic_accuracy)}"
        lines = [f"alpha {self.point.alpha:g}: {', '.join([accuracy, *costs])}."]
        if self.is_base:
            lines.append("Nothing was changed: alpha 0 is the base.")
        if len(self.bounds.given) > 1:
            lines.append(self._describe_binding())
        if self.unproven is not None:
            lines.append(self._describe_unproven(self.unproven))
        return "\n".join(lines)

    def _describe_binding(self) -> str:
        better = self.next_better
        if better is None:
            return "No bound binds: no other interpolation has a higher typographic accuracy."
        bounds = " and ".join(f"max_{name}" for name in self.binding)
        costs = " and a ".join(describe_broken(name, better.costs[name]) for name in self.binding)
        accuracy = format_number(better.typographic_accuracy.value)
        return f"What binds is {bounds}: the next better, alpha {better.alpha:g} ({accuracy}), has a {costs}."

    def _describe_unproven(self, point: SweepPoint) -> str:
        better = format_number(point.typographic_accuracy.value)
        costs = " and a ".join(describe_cost(name, point.costs[name]) for name in self.images_needed)
        if len(self.images_needed) == 1:
            (needed,) = self.images_needed.values()
            proof = f"it is within the bound takes about {needed:,} images"
        else:
            needs = " and ".join(f"{needed:,} ({COSTS[name].label})" for name, needed in self.images_needed.items())
            proof = f"it is within the bounds takes about this many images: {needs}"
        return f"alpha {point.alpha:g} would be better ({better}) at a {costs}. Proving that {proof}."

    def __str__(self) -> str:
        return self.describe()


class CostEvaluator(Protocol):
    """An evaluator whose report takes the confidence of its intervals, such as those of drift and retention."""

    def measure(
        self, models: Mapping[str, Any], *, accelerator: Accelerator | None = None, disable_tqdm: bool = False
    ) -> Mapping[str, Any]:
        """Run the models, as `Evaluator.measure` does."""

    def report(
        self, measured: Mapping[str, Any], base: str | None, resamples: int, confidence: float = 0.95
    ) -> Metrics:
        """Compute the metrics of measured models, as `Evaluator.report` does, with intervals of a confidence."""


@dataclass(frozen=True)
class Measure:
    """How a sweep measures one of `COSTS` beside the clean cost.

    Attributes:
        evaluator: The evaluator, which compares models with a base.
        metric: The metric of its report that is the cost.
        images: Number of images that it measures.
    """

    evaluator: CostEvaluator
    metric: str
    images: int

    def cost(self, base: Any, model: Any, resamples: int) -> Cost:
        """Return what a model loses against its base.

        Args:
            base: The result of the base, from `measure` of the evaluator.
            model: The result of the model.
            resamples: As in `bootstrap_interval`.

        Returns:
            The cost, in the unit of the metric.
        """
        report = partial(self.evaluator.report, {"base": base, "model": model}, "base", resamples)
        upper = report(confidence=_ONE_SIDED)["model"][self.metric].high
        return Cost(report()["model"][self.metric], upper, self.images)


def sweep_interpolation(
    base: nn.Module,
    aligned: nn.Module,
    images: RobustnessImages,
    templates: Sequence[str],
    alphas: Sequence[float] = ALPHAS,
    *,
    measures: Mapping[str, Measure] | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    accelerator: Accelerator | None = None,
    disable_tqdm: bool = False,
    resamples: int = 1000,
    seed: int = 0,
) -> list[SweepPoint]:
    """Measure the interpolations of two models against the base, on the same images.

    Args:
        base: Two-tower model, or PeftModel around one, before alignment.
        aligned: The model trained from `base`.
        images: Validation images. Measure the chosen model again on other images, because the best of several
            points is partly best by chance.
        templates: As in `evaluate_robustness`.
        alphas: Shares of the aligned model, as in `interpolate`.
        measures: What to measure beside the clean cost, by name in `COSTS`.
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
            no interval; also as in `interpolate`, `evaluate_robustness` and the evaluators of the measures.
        TypeError: As in `interpolate`.

    Source: Wortsman et al. 2022 (WiSE-FT), arXiv 2109.01903, Sec. 4; Ilharco et al. 2022 (PAINT), arXiv
    2208.05592, Sec. 2.
    """
    if not alphas or not all(math.isfinite(alpha) for alpha in alphas):
        raise ValueError(f"alphas must be finite numbers, at least one, got {alphas!r}. Pass for example [0, 0.5, 1].")
    if len(np.unique(images.cluster)) < 2:
        raise ValueError("images have a single cluster, but the interval of the clean cost needs at least two.")
    kinds = dict(measures or {})

    def measure(model: nn.Module) -> tuple[Answers, dict[str, Any]]:
        shared: dict[str, Any] = {"accelerator": accelerator, "disable_tqdm": disable_tqdm}
        answers = evaluate_robustness(
            {"interpolated": model}, images, templates, batch_size=batch_size, num_workers=num_workers, **shared
        )
        found = {
            name: kind.evaluator.measure({"interpolated": model}, **shared)["interpolated"]
            for name, kind in kinds.items()
        }
        return answers, found

    of_base, base_found = measure(base)
    points = []
    for alpha in alphas:
        answers, found = (of_base, base_found) if alpha == 0 else measure(interpolate(base, aligned, alpha))
        both = replace(answers, predicted={**answers.predicted, "base": of_base.predictions_of("interpolated")})
        report = partial(robustness_report, both, "interpolated", "base", resamples=resamples, seed=seed)
        metrics = report()
        costs = {
            "clean_cost": Cost(metrics["clean_cost"], report(confidence=_ONE_SIDED)["clean_cost"].high, images.rows)
        }
        for name, kind in kinds.items():
            costs[name] = kind.cost(base_found[name], found[name], resamples)
        points.append(SweepPoint(alpha, metrics["clean_accuracy"], metrics["typographic_accuracy"], costs))
    return points


def choose_alpha(points: Sequence[SweepPoint], bounds: Bounds) -> Choice:
    """Choose the point with the highest typographic accuracy that keeps all bounds.

    A point keeps a bound if its one-sided 95 % interval ends at or below the bound, each point and each bound by
    itself. The base (alpha 0) keeps all. The intervals are percentile bootstraps, which cannot account for answers
    that did not change on these images, so they end too low below about 200 images. If a better point is below the
    bounds by its estimates alone, the choice names it together with the number of images that could settle the
    question. This number assumes that the width of the interval falls with 1 / sqrt(images), which holds if clusters
    grow with images.

    Args:
        points: From `sweep_interpolation`, including alpha 0, with measures of everything that is bounded.
        bounds: The bounds.

    Returns:
        The choice. Ties in typographic accuracy go to the point with the lowest upper end of the clean cost.

    Raises:
        ValueError: If a bounded cost was not measured, or no point keeps the bounds and alpha 0 was not measured.
    """
    proven = [point for point in points if point.alpha == 0 or not bounds.broken_by(point.costs)]
    if not proven:
        limits = " and ".join(f"{COSTS[name].label} of at most {bound:g}" for name, bound in bounds.given.items())
        raise ValueError(
            f"None of the {len(points)} interpolations has a {limits} with 95 % confidence. Measure alpha 0 too: it "
            "is the base, which costs nothing."
        )
    best = max(proven, key=_rank)
    better = [point for point in points if point.typographic_accuracy.value > best.typographic_accuracy.value]
    if not better:
        return Choice(best, bounds)
    next_better = min(better, key=lambda point: point.typographic_accuracy.value)
    unproven = [point for point in better if bounds.may_be_kept_by(point.costs)]
    if not unproven:
        return Choice(best, bounds, next_better)
    top = max(unproven, key=_rank)
    needed = {name: top.costs[name].images_needed(bounds.given[name]) for name in bounds.broken_by(top.costs)}
    return Choice(best, bounds, next_better, top, needed)


def _rank(point: SweepPoint) -> tuple[float, float]:
    return point.typographic_accuracy.value, -point.costs["clean_cost"].upper


def interpolation_table(points: Sequence[SweepPoint]) -> str:
    """Format a sweep as a Markdown table, with intervals in brackets.

    Args:
        points: From `sweep_interpolation`.

    Returns:
        The table, one row per point.
    """
    names = list(points[0].costs) if points else ["clean_cost"]
    columns = ["alpha", "clean", "typographic"]
    for kind in (COSTS[name] for name in names):
        columns += [f"{kind.label} ({kind.unit})", "at most (95 %)"]
    return format_table(columns, [_table_row(point, names) for point in points])


def _table_row(point: SweepPoint, names: Sequence[str]) -> list[Estimate | str | float | None]:
    row: list[Estimate | str | float | None] = [f"{point.alpha:g}", point.clean_accuracy, point.typographic_accuracy]
    for name in names:
        row += [point.costs[name].estimate, point.costs[name].upper]
    return row
