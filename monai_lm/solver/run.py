"""One level of a refinement: the engine that suits it, and the loop over its iterations."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from tqdm.auto import tqdm

from monai_lm.fields.topology import repair_in_place
from monai_lm.similarity import Similarity
from monai_lm.solver import levenberg
from monai_lm.solver.engine import Engine
from monai_lm.solver.levenberg import Trust
from monai_lm.solver.pyramid import Level, move_field, shrink
from monai_lm.solver.result import Record

__all__ = ["LevelRun", "Settings"]

_LOOK = 10  # iterations between two looks at the plateau, each a host synchronisation
_MEND = 50  # iterations between two repairs; a level's end is repaired in any case, and this is for long levels only
_HALF_FROM = 0.25  # levels with fewer voxels than this fraction of the finest grid need no memory to speak of


@dataclass(frozen=True)
class Settings:
    """What does not change from level to level."""

    similarity: Similarity
    step: float
    control: str
    acceptance: str
    window: int
    smooth_residual: float
    tolerance: float
    seed: int
    memory: str
    deadline: float


class LevelRun:
    """One level: its images, prediction and residual in an engine, and the loop over its iterations.

    Args:
        level: its grid and units.
        fixed: ``(B, C, *S)`` on the finest grid.
        moving: ``(B, C, *S)``.
        prediction: ``(B, n, *S)`` without folds on the finest grid, or ``None``.
        given_up: the level before and its residual, taken out of the list; an empty one: zero.
        finest: the grid of images and prediction.
        settings: what does not change from level to level.
        smooth_gradient: standard deviation of the Gaussian on the gradient, in voxels of the level's finest axis.
    """

    engine_type: type[Engine] = Engine

    def __init__(
        self,
        level: Level,
        fixed: Tensor,
        moving: Tensor,
        prediction: Tensor | None,
        given_up: list[tuple[Level, Tensor]],
        finest: Level,
        settings: Settings,
        smooth_gradient: float,
    ) -> None:
        self.level, self.settings = level, settings
        small = torch.Size(level.size).numel() < _HALF_FROM * torch.Size(finest.size).numel()
        half = settings.memory == "half" and not small
        if prediction is not None and max(level.factor) > 1:
            prediction = move_field(prediction, finest, level)
            repair_in_place(prediction)
        self.engine = self.engine_type(
            level=level,
            fixed=shrink(fixed, level),
            moving=shrink(moving, level),
            prediction=prediction,
            residual=_start(fixed.shape[0], level, given_up, prediction, half, fixed.device),
            similarity=settings.similarity,
            smooth_gradient=smooth_gradient,
            smooth_residual=settings.smooth_residual,
            step=settings.step,
            window=settings.window,
            keep_gradient=settings.control == "trust_region",
        )

    def iterate(self, delta: float, count: int, record: Record, bar: tqdm) -> Tensor:
        """Iterate, end at the best residual, without folds; returns its loss ``(B,)``."""
        settings, engine = self.settings, self.engine
        loss = engine.evaluate()
        trust = levenberg.initial_trust(engine.gradient, loss, delta, engine.unit)
        first = looked_at = best_loss = loss
        active = trust.damping > 0
        better = torch.ones_like(active)  # whether the residual at hand is the best one so far
        note = partial(record.add, self.level.scale, (engine.voxels, delta))
        note(loss, trust.damping, trust.reference, trust.expected, better, active)
        for k in range(1, count + 1):
            if self._out_of_time():
                break
            trust = replace(trust, expected=self._step(trust, better, mend=k % _MEND == 0 and k < count))
            loss = engine.evaluate()
            chance = levenberg.chance(settings.seed, k) if settings.acceptance == "metropolis" else 0.0
            used = trust
            accepted, gain, trust = levenberg.judge(trust, loss, settings.control, settings.acceptance, chance)
            note(loss, used.damping, used.reference, gain, accepted, active)
            engine.retract(accepted)
            better = loss < best_loss
            best_loss = torch.where(better, loss, best_loss)
            bar.update()
            if k % _LOOK == 0:
                if not bar.disable:  # the host waits for what it shows
                    bar.set_postfix(scale=self.level.scale, loss=f"{float(best_loss.mean()) / engine.voxels:.4f}")
                if settings.tolerance > 0:
                    active = active & (looked_at - best_loss > settings.tolerance * (first - best_loss))
                    trust, looked_at = _freeze(trust, active), best_loss
                if not bool(active.any()):
                    bar.update(count - k)
                    break
        if settings.acceptance != "descent":
            engine.settle(better)
        return engine.loss(engine.residual) if engine.mend() else best_loss

    def _step(self, trust: Trust, better: Tensor, mend: bool) -> Tensor:
        """Take a step and note what may be needed again; returns the decrease that it promises, ``(B,)``."""
        always, descent = self.settings.acceptance == "always", self.settings.acceptance == "descent"
        expected = self.engine.advance(trust, better=None if descent else better, keep=not always)
        if mend:
            self.engine.mend()
        return expected

    def _out_of_time(self) -> bool:
        """Whether the time budget is spent; with one, the device is waited for, or the clock would tell nothing."""
        if self.settings.deadline == float("inf"):
            return False
        if self.engine.moving.is_cuda:
            torch.cuda.synchronize(self.engine.moving.device)
        return time.perf_counter() > self.settings.deadline


def _start(
    pairs: int,
    level: Level,
    given_up: list[tuple[Level, Tensor]],
    prediction: Tensor | None,
    half: bool,
    device: torch.device,
) -> Tensor:
    """The residual that a level starts from: the one given up on this grid, or zero."""
    before, residual = given_up.pop() if given_up else (level, None)
    dtype = torch.half if half else torch.float32
    if residual is not None and before == level and residual.dtype == dtype:
        return residual
    start = torch.zeros((pairs, len(level.size), *level.size), dtype=dtype, device=device)
    if residual is not None:  # folds that resampling and rounding make are repaired
        move_field(residual, before, level, start)
        repair_in_place(start, prediction)
    return start


def _freeze(trust: Trust, active: Tensor) -> Trust:
    """Stop the pairs that are not active: without damping a pair does not move."""
    return replace(trust, damping=trust.damping * active, reference=trust.reference * active)
