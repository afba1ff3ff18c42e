"""How smooth a field must be, place by place: two halves of an image that know nothing of each other must agree on it.

Where images are noisy, show textures that do not correspond, or have little in common, a field follows what happens to
look alike, and that differs from voxel to voxel. So the grid of every level is divided like a chequerboard, and either
colour is refined on its own. Where both fields lead to about the same place, the images tell where it is. Where they do
not, smoother fields are tried; and where no field holds, the refinement leaves what it began with.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from monai_lm.fields import gaussian_smooth
from monai_lm.fields.topology import repair_in_place
from monai_lm.similarity import Similarity
from monai_lm.similarity.weighted import Weighted
from monai_lm.solver.chequerboard import BLOCK
from monai_lm.solver.choice import begun, led
from monai_lm.solver.pyramid import Level, make_level, move_field, shrink
from monai_lm.solver.result import Record
from monai_lm.solver.run import Problem, Settings
from monai_lm.solver.schedule import Stage
from monai_lm.solver.smoothing import Adaptive, Elastic, Smoothing
from monai_lm.solver.trust import per_voxel

__all__ = ["SMOOTHER", "Halves", "compared"]

SMOOTHER = (1.2, 2.4)
"""Degrees of smoothness that are tried beside the usual one, ``sigma`` of :class:`Elastic`."""

_REDUCTION = 2
"""Of the images that are divided; what holds there is taken for all levels."""

_MOST, _LAST = 20, 10
"""Iterations of a level, and of one that takes the time after others, at most: more of them tell no more."""

_TRIED = 0.1
"""Share of a time budget for each degree of smoothness."""

_TOGETHER = 1.2, 1.8, 2.2
"""Distance, a root mean square in voxels of the reduced images, up to which both halves lead to the same place, after
one level, two, and more, which reach further."""

_AROUND = 1.5
"""Mean squared distance up to which they do around a place."""

_ALIKE, _BEYOND = 0.65, 0.5
"""Correlation of both fields above which both halves mean the same, far apart as they are; and where motion is longer,
in the root mean square, than the blocks are wide, so that neither half can know what happens in the other's."""

_NEIGHBOURHOOD = 6.0
"""Standard deviation in voxels of the Gaussian over which a place asks."""

_WINDOW = 1.5
"""Standard deviation in voxels of the Gaussian under which an image shows something."""


@dataclass(frozen=True)
class Halves:
    """What two halves of the fixed image say of a refinement.

    Attributes:
        smoothing: of the residual.
        apart: ``(B,)`` root mean squared distance, in lengths of the finest voxel edge, between the fields that either
            half leads to with the usual smoothness.
        held: ``(B,)`` share of what the fixed image shows where the field is kept smoother than usual, or left alone.
    """

    smoothing: Smoothing
    apart: Tensor
    held: Tensor


def compared(
    problem: Problem, stages: Sequence[Stage], finest: Stage, settings: Settings, idle: Tensor, record: Record
) -> Halves | None:
    """Refine two halves of the fixed image, and compare where they lead; None for measures that cannot weigh voxels.

    Args:
        problem: what is refined.
        stages: of the refinement, coarse to fine.
        finest: stage on the grid of the problem.
        settings: of the refinement; their smoothing is the usual one.
        idle: pairs that stay, ``(B,)``.
        record: of the refinement, which has nothing of this.
    """
    usual = settings.method.smoothing
    assert isinstance(usual, Elastic)  # for mypy
    if not all(_plain(stage.similarity).weighable for stage in stages):
        return None
    halved, level = _halved(problem, stages, finest)
    stages, finest = _reduced(stages, level, halved.edges)
    counts = _structure(halved.fixed[: len(idle)].float())
    total = gaussian_smooth(counts, _NEIGHBOURHOOD).clamp(min=1e-6)
    degrees = [usual.sigma, *(sigma for sigma in SMOOTHER if sigma > usual.sigma)]
    nothing = len(degrees)
    best = torch.full_like(counts, nothing, dtype=torch.long)
    apart = torch.zeros(len(idle), device=idle.device)
    unit = torch.tensor(finest.level.unit, device=idle.device).view(1, -1, *[1] * (counts.dim() - 2))
    for number, sigma in enumerate(degrees):
        tried = min(settings.deadline, time.perf_counter() + _TRIED * (settings.deadline - time.perf_counter()))
        how = replace(settings, method=replace(settings.method, smoothing=Elastic(sigma)), deadline=tried)
        fields = _refined(halved, stages, finest, how, idle.repeat(2), record.again(2))
        one, other = (fields / unit).chunk(2)
        away = (one - other).square().sum(1, keepdim=True)
        holds = gaussian_smooth(counts * away, _NEIGHBOURHOOD) / total <= _AROUND
        if number == 0:
            square = _mean(away, counts)
            apart = _REDUCTION * square.sqrt()
            together = square.sqrt() <= _TOGETHER[min(len(stages), len(_TOGETHER)) - 1]
            holds |= per_voxel(together | _alike(one, other, counts), holds)
        best = torch.where(holds & (best == nothing), number, best)
        if bool((best < nothing).all()):
            break
    held = _mean((best > 0).to(counts), counts)
    if not bool(best.any()):
        return Halves(usual, apart, held)
    squares = torch.tensor([*degrees, degrees[-1]], device=idle.device).square()
    share = ((squares - squares[0]) / (squares[-1] - squares[0]).clamp(min=1e-6))[best]
    still = (best == nothing).to(share)
    share, still = (gaussian_smooth(values, _NEIGHBOURHOOD / 2).clamp(0, 1) for values in (share, still))
    return Halves(Adaptive(usual, Elastic(degrees[-1]), share, still), apart, held)


def _halved(problem: Problem, stages: Sequence[Stage], finest: Stage) -> tuple[Problem, Level]:
    """The problem on reduced images, each pair once for every half, and their level."""
    level = make_level(finest.level.size, problem.edges, _REDUCTION)
    fixed, moving = (shrink(image, level) for image in (problem.fixed, problem.moving))
    measure = stages[-1].similarity
    if not (isinstance(measure, Weighted) and measure.weighs_fixed):
        fixed = torch.cat([fixed, torch.ones_like(fixed[:, :1])], 1)
    prediction = problem.prediction
    if prediction is not None:
        prediction = move_field(prediction, finest.level, level)
        repair_in_place(prediction)
        prediction = torch.cat([prediction, prediction])
    edges = tuple(edge * factor for edge, factor in zip(problem.edges, level.factor, strict=True))
    return Problem(torch.cat([fixed, fixed]), torch.cat([moving, moving]), prediction, edges, halved=True), level


def _reduced(stages: Sequence[Stage], level: Level, edges: Sequence[float]) -> tuple[list[Stage], Stage]:
    """The stages that run on the reduced images, or the last one, and that on their grid; scales are kept."""
    own, kept = [], [stage for stage in stages if stage.level.scale >= _REDUCTION] or [*stages[-1:]]
    for stage in kept:
        grid = make_level(level.size, edges, max(1.0, stage.level.scale / _REDUCTION))
        most = min(stage.iterations, _LAST if grid.scale == 1 and len(kept) > 1 else _MOST)
        grid = replace(grid, scale=stage.level.scale)
        own.append(replace(stage, level=grid, iterations=most, similarity=_weighing(stage.similarity)))
    return own, replace(own[-1], level=replace(make_level(level.size, edges, 1), scale=_REDUCTION))


def _refined(
    problem: Problem, stages: Sequence[Stage], finest: Stage, settings: Settings, idle: Tensor, record: Record
) -> Tensor:
    """Fields of the halves, ``(2 B, n, *S)``, beside the prediction."""
    stages, residual, done = begun(problem, stages, finest, settings, idle, record)
    residual = led(stages[done:], finest, problem, settings, idle, residual, record)
    return move_field(residual.field.float(), residual.level, finest.level)


def _plain(measure: Similarity) -> Similarity:
    return measure.measure if isinstance(measure, Weighted) else measure


def _weighing(measure: Similarity) -> Weighted:
    """The measure with a weight for every voxel of the fixed image."""
    return Weighted(_plain(measure), True, isinstance(measure, Weighted) and measure.weighs_moving)


def _alike(one: Tensor, other: Tensor, counts: Tensor) -> Tensor:
    """Whether two fields ``(B, n, *S)`` mean the same, far apart as they may be, ``(B,)``."""
    both, first, second = (
        _mean((a * b).sum(1, keepdim=True), counts) for a, b in ((one, other), (one, one), (other, other))
    )
    least = torch.where(0.5 * (first + second) > BLOCK**2, _BEYOND, _ALIKE)
    return both > least * (first * second).sqrt()


def _structure(fixed: Tensor) -> Tensor:
    """How far each place of images with weights shows something, ``(B, 1, *S)`` in [0, weight]."""
    image, weight, axes = fixed[:, :-1], fixed[:, -1:], tuple(range(2, fixed.dim()))
    image = image / image.abs().amax(axes, keepdim=True).clamp(min=torch.finfo(image.dtype).tiny)
    mean, square = (gaussian_smooth(values, _WINDOW) for values in (image, image.square()))
    variance = (square - mean.square()).clamp(min=0)
    variance = variance / variance.mean(axes, keepdim=True).clamp(min=1e-12)
    variance = variance.mean(1, keepdim=True)
    return weight * variance / (variance + 0.1)


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    """Weighted, of every pair, ``(B,)``."""
    return (values * weight).flatten(1).sum(1) / weight.flatten(1).sum(1).clamp(min=1e-12)
