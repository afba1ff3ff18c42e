"""Where measures that learn from aligned images begin, and which measures suit the images where they choose them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from monai_lm import kernels
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
    problem: Problem, stages: Sequence[Stage], finest: Stage, settings: Settings, idle: Tensor, record: Record
) -> tuple[list[Stage], Residual | None, int]:
    """The stages with measures that are decided, where they begin, and how many of them are done by then.

    Before a measure that ``learns``, each of its ``starts`` leads through the coarse levels, and the measure from there
    to half the resolution. Every pair begins where it then finds the images least unlike. A measure that is
    ``undecided`` learns nothing if one of the starts shows that it need not. For any other measure nothing is done.

    Args:
        problem: what is refined.
        stages: of the refinement, coarse to fine, with the measures as they were asked for.
        finest: stage on the grid of the problem.
        settings: what does not change.
        idle: pairs that stay, ``(B,)``.
        record: of the iterations.
    """
    coarse = [stage for stage in stages if stage.level.scale > _APART]
    learning = any(stage.similarity.learns for stage in coarse)
    if not learning and not any(stage.similarity.undecided for stage in stages):
        return list(stages), None, 0
    measure = next(stage.similarity for stage in reversed(stages) if stage.similarity.learns)
    begins: list[tuple[Residual, Record]] = []
    for start in measure.starts[: None if learning else 1] if coarse else ():
        leading = [replace(stage, similarity=start) if stage.similarity.learns else stage for stage in coarse]
        own = record.again()
        begins.append((led(leading, finest, problem, settings, idle, None, own), own))
    decided = list(stages)
    looks: list[Residual | None] = [one for one, _ in begins]
    for residual in looks or [None]:
        seen = _seen(problem, residual, finest)
        decided = [replace(stage, similarity=stage.similarity.decided(*seen)) for stage in stages]
        if not begins or not any(stage.similarity.learns for stage in decided):
            return decided, None, 0
    further = [stage for stage in decided if 1 < stage.level.scale <= _APART] if len(begins) > 1 else []
    ends = [(led(further, finest, problem, settings, idle, one, own), own) for one, own in begins]
    best, chosen = _best(ends, decided[-1].similarity, problem, finest, settings)
    record.take([own for _, own in ends], chosen)
    return decided, best, len(coarse) + len(further)


def _best(
    ends: Sequence[tuple[Residual, Record]], measure: Similarity, problem: Problem, finest: Stage, settings: Settings
) -> tuple[Residual | None, Tensor]:
    """For every pair the residual under which the images are least unlike, and its number, ``(B,)``."""
    best: Residual | None = None
    lowest, chosen = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    for number, (residual, _) in enumerate(ends):
        loss = _loss(measure, *_seen(problem, residual, finest))
        loss = loss + swapped(loss) if settings.symmetric else loss
        if best is None:
            best, lowest, chosen = residual.copied(), loss, torch.zeros_like(loss, dtype=torch.long)
        else:
            kernels.choose(loss < lowest, residual.field, best.field)
            chosen = torch.where(loss < lowest, number, chosen)
            lowest = torch.minimum(loss, lowest)
    return best, chosen


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


def _loss(measure: Similarity, fixed: Tensor, warped: Tensor) -> Tensor:
    """Of images as they lie, ``(B,)``, by a measure, or by what it learns of them."""
    measure, of_fixed, of_moving = measure.matched(fixed, warped)
    reference, image = measure.prepare(of_fixed(fixed), of_moving(warped))
    return measure.evaluate(image, reference)[0]
