"""Where measures that learn from aligned images begin, and which measures suit the images where they choose them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from monai_lm import kernels
from monai_lm.solver.pyramid import make_level, shrink
from monai_lm.solver.residual import Residual
from monai_lm.solver.result import Record
from monai_lm.solver.run import Problem, Settings, descend, engine_of, warped_by
from monai_lm.solver.schedule import Stage

__all__ = ["Beginning", "beginnings", "begun", "decided", "led", "ways"]

_APART = 2
"""Images are not asked about their contrasts on coarser levels: they do not lie on each other there yet."""

_SCALE = 2
"""Reduction of the images that are looked at: noise makes the relation of their intensities less clear."""


class Beginning(NamedTuple):
    """Where a start leads through the coarse levels.

    Attributes:
        residual: there.
        record: of these levels.
    """

    residual: Residual
    record: Record


def ways(stages: Sequence[Stage]) -> list[list[Stage]]:
    """The stages, once for each of the ``starts`` of a measure that ``learns``, which leads through the coarse levels.

    It is one way where no coarse level's measure learns. The last measure that does says what to start from.

    Args:
        stages: of the refinement, coarse to fine.
    """
    if not any(_leads(stage) for stage in stages):
        return [list(stages)]
    measure = next(stage.similarity for stage in reversed(stages) if stage.similarity.learns)
    return [
        [replace(stage, similarity=start) if _leads(stage) else stage for stage in stages] for start in measure.starts
    ]


def _leads(stage: Stage) -> bool:
    """Whether another measure leads in place of the one of a stage."""
    return stage.level.scale > _APART and stage.similarity.learns


def decided(
    problem: Problem, stages: Sequence[Stage], finest: Stage, settings: Settings, idle: Tensor, record: Record
) -> tuple[list[Stage], list[Beginning]]:
    """The stages with measures that are decided, and where each way leads through the coarse ones, if they need it.

    A measure that is ``undecided`` learns nothing if one of the ways shows that it need not. For measures that neither
    learn nor are undecided nothing is done.

    Args:
        problem: what is refined.
        stages: of the refinement, coarse to fine, with the measures as they were asked for.
        finest: stage on the grid of the problem.
        settings: what does not change.
        idle: pairs that stay, ``(B,)``.
        record: of the iterations.
    """
    if not any(stage.similarity.undecided or _leads(stage) for stage in stages):
        return list(stages), []
    begins = beginnings(problem, stages, finest, settings, idle, record)
    suited = list(stages)
    looks: list[Residual | None] = [begin.residual for begin in begins]
    for residual in looks or [None]:
        asked = torch.ones_like(idle) if bool(idle.all()) else ~idle  # a pair that stays has no say
        seen = [images[asked] for images in _seen(problem, residual, finest)]
        suited = [replace(stage, similarity=stage.similarity.decided(*seen)) for stage in stages]
        if not any(stage.similarity.learns for stage in suited):
            return suited, []
    return suited, begins


def beginnings(
    problem: Problem, stages: Sequence[Stage], finest: Stage, settings: Settings, idle: Tensor, record: Record
) -> list[Beginning]:
    """Where each way leads through the coarse levels, if there are any; arguments as of :func:`decided`."""
    begins = []
    for way in ways(stages):
        if coarse := [stage for stage in way if stage.level.scale > _APART]:
            own = record.again()
            begins.append(Beginning(led(coarse, finest, problem, settings, idle, None, own), own))
    return begins


def begun(
    stages: Sequence[Stage], begins: Sequence[Beginning], chosen: Tensor, record: Record
) -> tuple[list[Stage], Residual | None]:
    """The stages that are left, and where each pair begins: at the residual with its number; ``None`` for zero.

    Args:
        stages: of the refinement, coarse to fine.
        begins: at the end of the coarse ones, if they are done.
        chosen: number of each pair's, ``(B,)``.
        record: of the iterations, which gets those that led there.
    """
    if not begins:
        return list(stages), None
    residual = begins[0].residual
    for number, begin in enumerate(begins[1:], 1):
        kernels.choose(chosen == number, begin.residual.field, residual.field)
    record.take([begin.record for begin in begins], chosen)
    return [stage for stage in stages if stage.level.scale <= _APART], residual


def led(
    stages: Sequence[Stage],
    finest: Stage,
    problem: Problem,
    settings: Settings,
    idle: Tensor,
    residual: Residual | None,
    record: Record,
) -> Residual:
    """Where stages, one at least unless there is a residual, lead to from a residual, ``None`` for zero."""
    with tqdm(disable=True) as bar:
        for stage in stages:
            engine = engine_of(stage, finest, problem, residual, settings)
            residual = engine.residual
            descend(engine, stage, settings, record, bar, idle)
    assert residual is not None  # for mypy: there are stages
    return residual


def _seen(problem: Problem, residual: Residual | None, finest: Stage) -> tuple[Tensor, Tensor]:
    """The fixed and the warped image as they are looked at."""
    level = make_level(finest.level.size, problem.edges, max(1.0, _SCALE / finest.level.scale))
    return shrink(problem.fixed, level), shrink(warped_by(residual, finest, problem), level)
