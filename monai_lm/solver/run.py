"""The loop over the iterations of one level."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from tqdm.auto import tqdm

from monai_lm import kernels
from monai_lm.fields.topology import repair_in_place
from monai_lm.guidance.base import Grid, Guidance, Guide
from monai_lm.similarity import Similarity
from monai_lm.solver.chequerboard import in_halves
from monai_lm.solver.engine import Engine
from monai_lm.solver.lesion import Lesion, Lesions
from monai_lm.solver.method import Method
from monai_lm.solver.pyramid import move_field, shrink
from monai_lm.solver.regularizer import Regularized, Regularizer
from monai_lm.solver.residual import Residual
from monai_lm.solver.result import Record
from monai_lm.solver.schedule import Stage
from monai_lm.solver.symmetric import SymmetricEngine
from monai_lm.solver.trust import initial_trust

__all__ = ["Problem", "Settings", "descend", "engine_of", "warped_by"]

_LOOK = 10  # iterations between two looks at the plateau, each a host synchronisation
_MEND = 5
"""Iterations between two repairs: folds that are left to a level's end mislead it, and take back what it gained. On the
validation sets it gains .011 Dice (s.e. .005) on abdomens against 50, on others nothing, for 3 to 8 % of the time."""
_HALF_FROM = 0.25  # levels with fewer voxels than this fraction of the finest grid need no memory to speak of


@dataclass(frozen=True)
class Problem:
    """What is refined, on the finest grid.

    Attributes:
        fixed: ``(B, C, *S)``, with a weight as a last channel where there is a mask.
        moving: ``(B, C, *S)``, with a weight as a first channel where it has a mask.
        prediction: ``(B, n, *S)`` without folds, or ``None``.
            With ``symmetric`` settings all are of ``2 B`` pairs, see :class:`SymmetricEngine`.
        edges: voxel edge per axis, in millimetres; for the guidance and the regulariser.
        guidance: what guides beside the images.
        lesions: of the fixed and of the moving image, ``(B, 1, *S)`` of zeros and ones, or ``None``.
        halved: whether the second half of the batch is the first again, and either sees one colour of every level's
            grid; the fixed image has a weight then.
    """

    fixed: Tensor
    moving: Tensor
    prediction: Tensor | None
    edges: tuple[float, ...] = ()
    guidance: tuple[Guidance, ...] = ()
    lesions: Lesions = (None, None)
    halved: bool = False


@dataclass(frozen=True)
class Settings:
    """What does not change from level to level; see the arguments of :func:`monai_lm.refine`.

    ``adaptive``: whether the smoothing of the method is the usual one, and more is to be looked for.
    """

    method: Method
    step: float
    tolerance: float
    memory: str
    deadline: float
    symmetric: bool = False
    regularizer: Regularizer | None = None
    adaptive: bool = False


def engine_of(stage: Stage, finest: Stage, problem: Problem, residual: Residual | None, settings: Settings) -> Engine:
    """Images, prediction and residual on the grid of a stage, ready to iterate.

    Args:
        stage: where to.
        finest: stage on the grid of the problem.
        problem: what is refined.
        residual: of the stage before, which moves here; ``None`` starts at zero.
        settings: what does not change.
    """
    level, prediction = stage.level, problem.prediction
    small = torch.Size(level.size).numel() < _HALF_FROM * torch.Size(finest.level.size).numel()
    dtype = torch.half if settings.memory == "half" and not small else torch.float32
    if prediction is not None and max(level.factor) > 1:
        prediction = move_field(prediction, finest.level, level)
        repair_in_place(prediction)
    if residual is None:
        residual = Residual(len(problem.fixed), level, problem.fixed.device, dtype)
    measure, fixed, moving = _compared(stage, finest, problem, residual)
    fixed, moving = (shrink(image, level) for image in (fixed, moving))
    if problem.halved:
        fixed = in_halves(fixed)
    residual.move_to(level, dtype, prediction)
    return (SymmetricEngine if settings.symmetric else Engine)(
        fixed=fixed,
        moving=moving,
        prediction=prediction,
        residual=residual,
        similarity=measure,
        method=settings.method,
        smooth_gradient=stage.smooth_gradient,
        step=settings.step,
        guide=_guide(stage, finest, problem),
        regularized=_regularized(stage, problem, settings),
        lesion=_lesion(stage, problem, prediction),
    )


def _lesion(stage: Stage, problem: Problem, prediction: Tensor | None) -> Lesion | None:
    """The lesions on the grid of a stage, with the prediction there."""
    fixed, moving = (None if one is None else shrink(one, stage.level) for one in problem.lesions)
    if fixed is None and moving is None:
        return None
    return Lesion((fixed, moving), prediction, stage.level.unit)


def _compared(stage: Stage, finest: Stage, problem: Problem, residual: Residual) -> tuple[Similarity, Tensor, Tensor]:
    """The measure of a stage to come, and both images on the finest grid as they are compared there."""
    measure, fixed, moving = stage.similarity, problem.fixed, problem.moving
    if not measure.learns:
        return measure, fixed, moving
    measure, of_fixed, of_moving = measure.matched(fixed, warped_by(residual, finest, problem))
    return measure, of_fixed(fixed), of_moving(moving)


def warped_by(residual: Residual | None, finest: Stage, problem: Problem) -> Tensor:
    """The moving image under prediction and residual, on the finest grid."""
    warped = torch.empty_like(problem.moving)
    field = None if residual is None else move_field(residual.field, residual.level, finest.level)
    kernels.sample(problem.moving, field, problem.prediction, None, None, warped)
    return warped


def _regularized(stage: Stage, problem: Problem, settings: Settings) -> Regularized | None:
    """What regularises on the grid of a stage."""
    if settings.regularizer is None:
        return None
    edges = [edge * factor for edge, factor in zip(problem.edges, stage.level.factor, strict=True)]
    return Regularized(settings.regularizer, edges, stage.level.unit, stage.smooth_gradient)


def _guide(stage: Stage, finest: Stage, problem: Problem) -> Guide | None:
    """What guides on the grid of a stage."""
    if not problem.guidance:
        return None
    level = stage.level
    sigma = level.in_voxels(stage.smooth_gradient)
    return Guide(problem.guidance, Grid(finest.level.size, problem.edges, level.size, level.factor, level.unit, sigma))


def descend(
    engine: Engine, stage: Stage, settings: Settings, record: Record, bar: tqdm, idle: Tensor | None = None
) -> Tensor:
    """Iterate, end at the best residual, without folds; returns its loss ``(B,)``. Pairs that are ``idle`` stay."""
    method, scale = settings.method, stage.level.scale
    loss = engine.evaluate()
    trust = initial_trust(engine.gradient, loss, stage.damping, engine.unit)
    trust = trust if idle is None else trust.stopped(trust.active & ~idle)
    first = looked_at = best_loss = loss
    better = torch.ones_like(trust.active)  # whether the residual at hand is the best one so far
    trust = trust if engine.regularized is None else engine.regularized.steadied(trust, engine.step)
    note = partial(record.add, scale, (engine.voxels, stage.damping))
    note(loss, trust.damping, trust.reference, trust.expected, better, trust.active)
    for k in range(1, stage.iterations + 1):
        if _out_of_time(engine, settings.deadline):
            break
        trust = replace(trust, expected=engine.advance(trust, better))
        if k % _MEND == 0 and k < stage.iterations:
            engine.mend()
        loss = engine.evaluate()
        used = trust
        accepted, gain, trust = method.judge(trust, loss, k)
        note(loss, used.damping, used.reference, gain, accepted, used.active)
        engine.retract(accepted)
        better = loss < best_loss
        best_loss = torch.where(better, loss, best_loss)
        bar.update()
        if k % _LOOK == 0:
            record.tell()
            if not bar.disable:  # the host waits for what it shows
                bar.set_postfix(scale=scale, loss=f"{float(best_loss.mean()) / engine.voxels:.4f}")
            if settings.tolerance > 0:
                gained = looked_at - best_loss > settings.tolerance * (first - best_loss)
                trust, looked_at = trust.stopped(trust.active & gained), best_loss
            if not bool(trust.active.any()):
                bar.update(stage.iterations - k)
                break
    record.tell()
    engine.residual.settle(better)
    return engine.loss(engine.residual.field) if engine.mend() else best_loss


def _out_of_time(engine: Engine, deadline: float) -> bool:
    """Whether the time budget is spent; with one, the device is waited for, or the clock would tell nothing."""
    if deadline == float("inf"):
        return False
    if engine.moving.is_cuda:
        torch.cuda.synchronize(engine.moving.device)
    return time.perf_counter() > deadline
