"""How smooth a field must be, place by place: two halves of an image that know nothing of each other must agree on it.

Where images are noisy, show textures that do not correspond, or have little in common, a field follows what happens to
look alike, and that differs from voxel to voxel. So the grid of every level is divided like a chequerboard, and either
colour is refined on its own. Where both fields lead to about the same place, the images tell where it is. Where they do
not, smoother fields are tried; and where no field holds, the refinement leaves what it began with. Of several ways to
begin, the one is taken on which the halves agree best.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from monai_lm.fields import gaussian_smooth
from monai_lm.fields.topology import repair_in_place
from monai_lm.similarity import Similarity
from monai_lm.similarity.weighted import Weighted
from monai_lm.solver.chequerboard import BLOCK, divided
from monai_lm.solver.choice import led, ways
from monai_lm.solver.pyramid import Level, make_level, move_field, shrink
from monai_lm.solver.result import Record
from monai_lm.solver.run import Problem, Settings
from monai_lm.solver.schedule import Stage
from monai_lm.solver.smoothing import Adaptive, Elastic, Smoothing
from monai_lm.solver.symmetric import swapped
from monai_lm.solver.trust import per_voxel

__all__ = ["SMOOTHER", "Halves", "compared"]

Bound = TypeVar("Bound", float, tuple[float, float])

SMOOTHER = 2.4
"""``sigma`` of :class:`Elastic` that is tried where halves do not agree with the usual one."""

_REDUCTION = 2
"""Of the images that are divided; what holds there is taken for all levels."""

_MOST, _LAST = 20, 10
"""Iterations of a level, and of one that takes the time after others, at most: more of them tell no more."""

_TRIED = 0.2
"""Share of a time budget for each degree of smoothness and each way; where it does not suffice nothing is asked."""

_TOGETHER = {2: (1.4, 2.4, 4.0), 3: (1.2, 1.3, 4.0)}
"""Distance, a root mean square in voxels of the reduced images, up to which both halves lead to the same place, after
one level, two, and more, which reach further; for grids of which two or three axes are divided. Blocks of planes have
fewer voxels to tell where to, and so have those of a few thick slices."""

_ALIKE = {2: ((2.3, 0.6), (math.inf, 0.6)), 3: ((2.3, 0.6), (math.inf, 0.77))}
"""Distance up to which, and correlation above which both halves mean the same though they lead to two places: after one
level, which leads neither to the end, but not far either, and after more. The correlation is the mean of that of usual
and of smoother fields; of these alone where motion is longer, in the root mean square, than blocks are wide, so that
neither half can know what happens in the other's."""

_AROUND, _MEANT = 1.5, 0.6
"""Mean squared distance up to which they do around a place, and the correlation that smooth fields must have there, or
they may be near because neither moves."""

_NEIGHBOURHOOD = 6.0
"""Standard deviation in voxels of the Gaussian over which a place asks."""

_WINDOW = 1.5
"""Standard deviation in voxels of the Gaussian under which an image shows something."""


@dataclass(frozen=True)
class Halves:
    """What two halves of the fixed image say of a refinement.

    Attributes:
        way: ``(B,)`` number of the one of :func:`~monai_lm.solver.choice.ways` on which they agree best.
        smoothing: of the residual.
        apart: ``(B,)`` root mean squared distance, in lengths of the finest voxel edge, between the fields that either
            half leads to with the usual smoothness.
        held: ``(B,)`` share of what the fixed image shows where the field is kept smoother than usual, or left alone.
    """

    way: Tensor
    smoothing: Smoothing
    apart: Tensor
    held: Tensor


def compared(
    problem: Problem, stages: Sequence[Stage], finest: Stage, settings: Settings, idle: Tensor, record: Record
) -> Halves | None:
    """Refine two halves of the fixed image, and compare where they lead.

    None for measures that cannot weigh voxels, for images too small to be divided, and where there is too little time.

    Args:
        problem: what is refined.
        stages: of the refinement, coarse to fine, with measures that are decided.
        finest: stage on the grid of the problem.
        settings: of the refinement; their smoothing is the usual one, and remains it unless they are ``adaptive``.
        idle: pairs that stay, ``(B,)``.
        record: of the refinement, which has nothing of this.
    """
    if not all(_plain(stage.similarity).weighable for stage in stages):
        return None
    halved, usual = _halved(problem, stages, finest, settings, idle, record), settings.method.smoothing
    if not any(divided(stage.level.size) for stage in halved.ways[0]):
        return None
    way = torch.zeros_like(idle, dtype=torch.long)
    fields: Tensor | None = None
    for number in range(len(halved.ways)):
        others = halved.led(usual, torch.full_like(way, number))
        if others is None:
            return None
        if fields is None:
            fields = others
            continue
        relations = halved.relation(others), halved.relation(fields)
        if settings.symmetric:  # a pair goes one way in both its places
            relations = relations[0].of_both_places(), relations[1].of_both_places()
        better = relations[0].better(relations[1])
        way = torch.where(better, number, way)
        fields = torch.where(per_voxel(better.repeat(2), fields), others, fields)
    assert fields is not None  # for mypy: there is a way
    found = halved.relation(fields)
    apart = _REDUCTION * found.square.sqrt()
    if not settings.adaptive:
        return Halves(way, usual, apart, torch.zeros_like(apart))
    smoothing, held = _smoothing(halved, way, fields, found)
    return Halves(way, smoothing, apart, held)


def _smoothing(halved: _Halved, way: Tensor, fields: Tensor, found: _Relation) -> tuple[Smoothing, Tensor]:
    """With what the halves agree, and :attr:`Halves.held`.

    Args:
        halved: what is asked.
        way: that they take, ``(B,)``.
        fields: where it leads with the usual smoothness, ``(2 B, n, *S)``.
        found: how these lie to each other.
    """
    usual, counts = halved.settings.method.smoothing, halved.counts
    assert isinstance(usual, Elastic)  # for mypy
    near = halved.together(found)
    smoother = None if bool(near.all()) else halved.led(Elastic(SMOOTHER), way)
    if smoother is not None:
        farthest, least = halved.bound(_ALIKE, counts.dim() - 2)
        smooth = halved.relation(smoother).correlation
        alike = torch.where(found.motion > BLOCK**2, smooth, (found.correlation + smooth) / 2)
        near |= (alike > least) & (found.square.sqrt() <= farthest)
    soft = per_voxel(near, counts) | halved.around(fields, -1)
    stiff = torch.zeros_like(soft) if smoother is None else halved.around(smoother, _MEANT)
    held = _mean((~soft).to(counts), counts)
    if bool(soft.all()):
        return usual, held
    share, still = (gaussian_smooth((~one).to(counts), _NEIGHBOURHOOD / 2).clamp(0, 1) for one in (soft, soft | stiff))
    return Adaptive(usual, Elastic(SMOOTHER), share, still), held


class _Relation(NamedTuple):
    """How two fields lie to each other, ``(B,)`` each.

    Attributes:
        square: mean squared distance.
        correlation: of their vectors.
        motion: mean square of both.
    """

    square: Tensor
    correlation: Tensor
    motion: Tensor

    def of_both_places(self) -> _Relation:
        """Means over the places in the batch that a pair has where refinement is symmetric."""
        return _Relation(*((values + swapped(values)) / 2 for values in self))

    def better(self, other: _Relation) -> Tensor:
        """Whether two fields agree better than two others, ``(B,)``.

        By their distance; where motion of all is longer than blocks are wide, of which either half misses some, by
        their correlation.
        """
        far = torch.minimum(self.motion, other.motion) > BLOCK**2
        return torch.where(far, self.correlation > other.correlation, self.square < other.square)


@dataclass(frozen=True)
class _Halved:
    """Two halves of reduced images, ready to be refined.

    Attributes:
        problem: each pair once for either half.
        ways: of the refinement, stages on the reduced grids.
        finest: stage on the grid of the problem.
        settings: of the refinement.
        idle: pairs that stay, ``(B,)``.
        record: of the refinement.
        counts: how far each place shows something, ``(B, 1, *S)``.
    """

    problem: Problem
    ways: list[list[Stage]]
    finest: Stage
    settings: Settings
    idle: Tensor
    record: Record
    counts: Tensor

    def led(self, smoothing: Smoothing, way: Tensor) -> Tensor | None:
        """Fields of the halves, ``(2 B, n, *S)``, beside the prediction, in lengths of the finest edge.

        ``None`` if the time budget does not allow it.

        Args:
            smoothing: of the residual.
            way: number of each pair's, ``(B,)``.
        """
        settings, unit = self.settings, self.counts.new_tensor(self.finest.level.unit)
        tried = min(settings.deadline, time.perf_counter() + _TRIED * (settings.deadline - time.perf_counter()))
        method = replace(settings.method, smoothing=smoothing)
        how = replace(settings, method=method, deadline=tried, symmetric=False)
        fields: Tensor | None = None
        for number in way.unique().tolist() if len(self.ways) > 1 else [0]:
            taken = (way == number).repeat(2)
            idle, own = self.idle.repeat(2) | ~taken, self.record.again(2)
            residual = led(self.ways[number], self.finest, self.problem, how, idle, None, own)
            there = move_field(residual.field.float(), residual.level, self.finest.level)
            del residual  # and all that it has noted
            fields = there if fields is None else torch.where(per_voxel(taken, there), there, fields)
        if time.perf_counter() > tried:
            return None
        assert fields is not None  # for mypy: there are pairs
        return fields.div_(unit.view(1, -1, *[1] * (fields.dim() - 2)))

    def relation(self, fields: Tensor) -> _Relation:
        """Of the fields of the halves, ``(2 B, n, *S)``."""
        one, other = fields.chunk(2)
        both, first, second = (
            _mean((a * b).sum(1, keepdim=True), self.counts) for a, b in ((one, other), (one, one), (other, other))
        )
        square = (first + second - 2 * both).clamp(min=0)
        return _Relation(square, both / (first * second).sqrt().clamp(min=1e-12), (first + second) / 2)

    def bound(self, of: Mapping[int, Sequence[Bound]], axes: int) -> Bound:
        """That for as many axes and for the levels; the last one is for more levels, too."""
        bounds = of[axes]
        return bounds[min(len(self.ways[0]), len(bounds)) - 1]

    def together(self, found: _Relation) -> Tensor:
        """Whether fields that lie to each other like this lead to the same place, ``(B,)``."""
        return found.square.sqrt() <= self.bound(_TOGETHER, max(2, divided(self.counts.shape[2:])))

    def around(self, fields: Tensor, least: float) -> Tensor:
        """Where they do around a place, with a correlation of at least so much there, ``(B, 1, *S)``."""
        one, other = fields.chunk(2)
        total = gaussian_smooth(self.counts, _NEIGHBOURHOOD).clamp(min=1e-6)
        away, along = (
            gaussian_smooth(self.counts * values.sum(1, keepdim=True), _NEIGHBOURHOOD) / total
            for values in ((one - other).square(), one * other)
        )
        return (away <= _AROUND) & (along >= least * (along + away / 2))


def _halved(
    problem: Problem, stages: Sequence[Stage], finest: Stage, settings: Settings, idle: Tensor, record: Record
) -> _Halved:
    """What :func:`compared` is given, on reduced images."""
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
    halves = Problem(torch.cat([fixed, fixed]), torch.cat([moving, moving]), prediction, edges, halved=True)
    reduced = [_reduced(way, level, edges) for way in ways(stages)]
    last = replace(reduced[0][-1], level=replace(make_level(level.size, edges, 1), scale=_REDUCTION))
    return _Halved(halves, reduced, last, settings, idle, record, _structure(fixed.float()))


def _reduced(stages: Sequence[Stage], level: Level, edges: Sequence[float]) -> list[Stage]:
    """The stages that run on the reduced images, or the last one; scales are kept."""
    own, kept = [], [stage for stage in stages if stage.level.scale >= _REDUCTION] or [*stages[-1:]]
    for stage in kept:
        grid = make_level(level.size, edges, max(1.0, stage.level.scale / _REDUCTION))
        most = min(stage.iterations, _LAST if grid.scale == 1 and len(kept) > 1 else _MOST)
        grid = replace(grid, scale=stage.level.scale)
        own.append(replace(stage, level=grid, iterations=most, similarity=_weighing(stage.similarity)))
    return own


def _plain(measure: Similarity) -> Similarity:
    return measure.measure if isinstance(measure, Weighted) else measure


def _weighing(measure: Similarity) -> Weighted:
    """The measure with a weight for every voxel of the fixed image."""
    return Weighted(_plain(measure), True, isinstance(measure, Weighted) and measure.weighs_moving)


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
