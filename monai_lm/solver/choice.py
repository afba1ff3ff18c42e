"""Which measures suit the images of a refinement, where that is left to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor
from tqdm.auto import tqdm

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
) -> list[Stage]:
    """Stages with the measures that suit the images, after the coarse ones across contrasts; all else is undone.

    Args:
        problem: what is refined.
        stages: of the refinement, coarse to fine, with measures that may be ``undecided``.
        finest: stage on the grid of the problem.
        settings: what does not change.
        record: a new one, which is not of the result.
        idle: pairs that stay, ``(B,)``.
    """
    if not any(stage.similarity.undecided for stage in stages):
        return list(stages)
    residual: Residual | None = None
    with tqdm(disable=True) as bar:
        for stage in stages:
            if stage.level.scale > APART:
                rough = replace(stage, similarity=stage.similarity.unaligned)
                engine = engine_of(rough, finest, problem, residual, settings)
                residual = engine.residual
                descend(engine, rough, settings, record, bar, idle)
    level = make_level(finest.level.size, problem.edges, _SCALE)
    fixed, warped = (shrink(image, level) for image in (problem.fixed, warped_by(residual, finest, problem)))
    return [replace(stage, similarity=stage.similarity.decided(fixed, warped)) for stage in stages]
