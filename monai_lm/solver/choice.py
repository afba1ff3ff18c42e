"""Where measures that learn from aligned images begin, and which measures suit the images where they choose them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter

import torch
from torch import Tensor
from tqdm.auto import tqdm

from monai_lm import kernels
from monai_lm.kernels.devices import Stopwatch
from monai_lm.similarity import Similarity
from monai_lm.solver.pyramid import make_level, shrink
from monai_lm.solver.residual import Residual
from monai_lm.solver.result import Record
from monai_lm.solver.run import Problem, Settings, descend, engine_of, warped_by
from monai_lm.solver.schedule import Stage
from monai_lm.solver.symmetric import swapped

__all__ = ["begun", "led"]

_APART = 2
"""Images are not asked about their contrasts on coarser levels: they do not lie on each other there yet."""

_SCALE = 2
"""Reduction of the images that are looked at: noise makes the relation of their intensities less clear."""


def begun(
    problem: Problem, stages: Sequence[Stage], finest: Stage, settings: Settings, idle: Tensor
) -> tuple[list[Stage], Residual | None, int]:
    """The stages with measures that are decided, where they begin, and how many of them are done by then.

    A measure that ``learns`` begins after the coarse stages, where the best of its ``starts`` leads, for every pair:
    after which the images are least unlike by the measure ``unaligned``. For any other nothing is done.

    Args:
        problem: what is refined.
        stages: of the refinement, coarse to fine, with the measures as they were asked for.
        finest: stage on the grid of the problem.
        settings: what does not change.
        idle: pairs that stay, ``(B,)``.
    """
    coarse = [stage for stage in stages if stage.level.scale > _APART]
    learning = any(stage.similarity.learns for stage in coarse)
    if not learning and not any(stage.similarity.undecided for stage in stages):
        return list(stages), None, 0
    measure = next(stage.similarity for stage in reversed(stages) if stage.similarity.learns)
    best: Residual | None = None
    lowest = torch.zeros(0)
    for start in measure.starts[: None if learning else 1] if coarse else ():
        leading = [replace(stage, similarity=start) if stage.similarity.learns else stage for stage in coarse]
        residual = led(leading, finest, problem, settings, idle)
        loss = _loss(measure.unaligned, *_seen(problem, residual, finest))
        loss = loss + swapped(loss) if settings.symmetric else loss
        if best is None:
            best, lowest = residual, loss
        else:
            kernels.choose(loss < lowest, residual.field, best.field)
            lowest = torch.minimum(loss, lowest)
    seen = _seen(problem, best, finest)
    decided = [replace(stage, similarity=stage.similarity.decided(*seen)) for stage in stages]
    learns = any(stage.similarity.learns for stage in decided)
    return decided, best if learns else None, len(coarse) if learns else 0


def led(
    stages: Sequence[Stage],
    finest: Stage,
    problem: Problem,
    settings: Settings,
    idle: Tensor,
    residual: Residual | None = None,
) -> Residual:
    """Where stages, one at least unless there is a residual, lead to from a residual, ``None`` for zero."""
    record = Record(len(idle), Stopwatch(problem.fixed.device, perf_counter()))
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


def _loss(measure: Similarity, fixed: Tensor, warped: Tensor) -> Tensor:
    """Of images as they lie, ``(B,)``."""
    reference, image = measure.prepare(fixed, warped)
    return measure.evaluate(image, reference)[0]
