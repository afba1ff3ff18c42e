"""Which measure suits the images of a refinement, where that is left to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor
from tqdm.auto import tqdm

from monai_lm.similarity import Similarity
from monai_lm.solver.pyramid import make_level, shrink
from monai_lm.solver.residual import Residual
from monai_lm.solver.result import Record
from monai_lm.solver.run import APART, Problem, Settings, descend, engine_of, warped_by
from monai_lm.solver.schedule import Stage

__all__ = ["decided"]

_SCALE = 2
"""Reduction of the images that are looked at: noise makes the relation of their intensities less clear."""


def decided(
    problem: Problem, stages: Sequence[Stage], finest: Stage, settings: Settings, record: Record, idle: Tensor
) -> Similarity:
    """The measure that suits the images, after the coarse stages of a refinement across contrasts; all else is undone.

    Args:
        problem: what is refined.
        stages: of the refinement, coarse to fine.
        finest: stage on the grid of the problem.
        settings: with a measure that may be ``undecided``; any other one is returned.
        record: a new one, which is not of the result.
        idle: pairs that stay, ``(B,)``.
    """
    measure = settings.similarity
    if not measure.undecided:
        return measure
    rough = replace(settings, similarity=measure.unaligned)
    residual: Residual | None = None
    with tqdm(disable=True) as bar:
        for stage in stages:
            if stage.level.scale > APART:
                engine = engine_of(stage, finest, problem, residual, rough)
                residual = engine.residual
                descend(engine, stage, rough, record, bar, idle)
    level = make_level(finest.level.size, problem.edges, _SCALE)
    fixed, warped = (shrink(image, level) for image in (problem.fixed, warped_by(residual, finest, problem)))
    return measure.decided(fixed, warped)
