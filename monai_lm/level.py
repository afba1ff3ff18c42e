"""One level of a refinement: its images, its kernels, and the loop over its iterations."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from monai_lm import levenberg
from monai_lm.compilation import compiled, pays
from monai_lm.fields import compose, gaussian_smooth, repair, resample, warp
from monai_lm.levenberg import Trust, per_voxel
from monai_lm.pyramid import Level, shrink
from monai_lm.result import Record
from monai_lm.similarity import Similarity

__all__ = ["Iterate", "LevelRun", "Settings", "pick"]

_LOOK = 10  # iterations between two looks at the plateau, each a host synchronisation
_MEND = 50  # iterations between two repairs; a level's end is repaired in any case, and this is for long levels only


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
    compile: str | bool
    deadline: float


class LevelRun:
    """One level: its images and prediction, its kernels, and the loop over its iterations."""

    def __init__(
        self,
        level: Level,
        fixed: Tensor,
        moving: Tensor,
        prediction: Tensor | None,
        settings: Settings,
        smooth_gradient: float,
        iterations: int,
    ) -> None:
        self.level = level
        self.settings = settings
        self.reference, self.moving = settings.similarity.prepare(shrink(fixed, level.size), shrink(moving, level.size))
        self.prediction = prediction
        if prediction is not None and prediction.shape[2:] != level.size:
            self.prediction = repair(resample(prediction, level.size))
        self.smooth_gradient = level.in_voxels(smooth_gradient)
        self.smooth_residual = level.in_voxels(settings.smooth_residual)
        self.unit = fixed.new_tensor(level.unit).view(1, -1, *[1] * len(level.size))
        voxels = fixed.shape[0] * self.moving[0, 0].numel()
        fuse = settings.compile is True or (settings.compile == "auto" and pays(fixed.device, voxels, iterations))
        self._advance = compiled(_advance) if fuse else _advance
        self._evaluate = compiled(_evaluate) if fuse and settings.similarity.closed_form else _evaluate

    def start(self, residual: Tensor) -> Tensor:
        """Bring the residual of the level before to this one's grid; folds that this makes are repaired."""
        if tuple(residual.shape[2:]) == self.level.size:
            return residual
        return repair(resample(residual, self.level.size), self.prediction)

    def displacement(self, residual: Tensor) -> Tensor:
        """Field of ``(id + u0) ∘ (id + r)``."""
        return residual if self.prediction is None else compose(self.prediction, residual)

    def evaluate(self, residual: Tensor, ddf: Tensor) -> Iterate:
        """Loss and gradient at a residual and its field."""
        keep = self.settings.control == "trust_region"
        values = self._evaluate(self.moving, self.reference, ddf, self.settings.similarity, self.smooth_gradient, keep)
        return Iterate(residual, *values)

    def loss(self, residual: Tensor) -> Tensor:
        """Loss ``(B,)`` at a residual."""
        return self.evaluate(residual, self.displacement(residual)).loss

    def step(self, at: Iterate, trust: Trust, mend: bool) -> tuple[Iterate, Trust]:
        """Candidate after one step, and the state that knows what the step promised; ``mend`` repairs folds."""
        residual, ddf, expected = self._advance(
            at.residual, at.gradient, at.smooth, self.prediction, trust, self.unit, self.settings.step,
            self.settings.window, self.smooth_residual,
        )  # fmt: skip
        if mend and (mended := repair(residual, self.prediction)) is not residual:
            residual, ddf = mended, self.displacement(mended)
        return self.evaluate(residual, ddf), replace(trust, expected=expected)

    def iterate(self, residual: Tensor, delta: float, count: int, record: Record, bar: tqdm) -> tuple[Tensor, Tensor]:
        """Iterate from ``residual``; return the best one, without folds, and its loss ``(B,)``."""
        settings, voxels, scale = self.settings, self.moving[0, 0].numel(), self.level.scale
        at = self.evaluate(residual, self.displacement(residual))
        trust = levenberg.initial_trust(at.smooth * self.unit, at.loss, delta)
        first = looked_at = best_loss = at.loss
        best, active = residual, trust.damping > 0
        record.add(scale, at.loss / voxels, _relative(trust, delta), trust.expected, active, torch.ones_like(active))
        for k in range(1, count + 1):
            if self._out_of_time():
                break
            look = k % _LOOK == 0
            candidate, trust = self.step(at, trust, mend=k % _MEND == 0)
            used = _relative(trust, delta)
            chance = levenberg.chance(settings.seed, k) if settings.acceptance == "metropolis" else 0.0
            accepted, gain, trust = levenberg.judge(
                trust, candidate.loss, settings.control, settings.acceptance, chance
            )
            record.add(scale, candidate.loss / voxels, used, gain, accepted, active)
            better = candidate.loss < best_loss
            best_loss = torch.where(better, candidate.loss, best_loss)
            at = candidate if settings.acceptance == "always" else candidate.where(accepted, at)
            best = at.residual if settings.acceptance == "descent" else pick(better, candidate.residual, best)
            bar.update()
            if look:
                bar.set_postfix(scale=scale, loss=f"{float(best_loss.mean()) / voxels:.4f}")
                if settings.tolerance > 0:
                    active = active & (looked_at - best_loss > settings.tolerance * (first - best_loss))
                    trust, looked_at = _freeze(trust, active), best_loss
                if not bool(active.any()):
                    bar.update(count - k)
                    break
        mended = repair(best, self.prediction)
        return mended, best_loss if mended is best else self.loss(mended)

    def _out_of_time(self) -> bool:
        """Whether the time budget is spent; with one, the device is waited for, or the clock would tell nothing."""
        if self.settings.deadline == float("inf"):
            return False
        if self.moving.is_cuda:
            torch.cuda.synchronize(self.moving.device)
        return time.perf_counter() > self.settings.deadline


@dataclass(frozen=True)
class Iterate:
    """A residual with the loss ``(B,)``, the smoothed gradient and, if kept, the gradient there ``(B, n, *S)``."""

    residual: Tensor
    loss: Tensor
    smooth: Tensor
    gradient: Tensor | None

    def where(self, chosen: Tensor, old: Iterate) -> Iterate:
        """This iterate for the chosen pairs ``(B,)``, ``old`` for the others."""
        if bool(chosen.all()):
            return self
        gradient = None
        if self.gradient is not None and old.gradient is not None:
            gradient = pick(chosen, self.gradient, old.gradient)
        return Iterate(
            pick(chosen, self.residual, old.residual),
            torch.where(chosen, self.loss, old.loss),
            pick(chosen, self.smooth, old.smooth),
            gradient,
        )


def _evaluate(
    moving: Tensor,
    reference: tuple[Tensor, ...],
    ddf: Tensor,
    similarity: Similarity,
    sigma: Sequence[float],
    keep_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    warped = warp(moving, ddf)
    loss, derivative = similarity.evaluate(warped, reference)
    gradient = levenberg.eulerian_gradient(derivative, warped)
    return loss, gaussian_smooth(gradient, sigma), gradient if keep_gradient else None


def _advance(
    residual: Tensor,
    gradient: Tensor | None,
    smooth: Tensor,
    prediction: Tensor | None,
    trust: Trust,
    unit: Tensor,
    step: float,
    window: int,
    smooth_residual: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    v = levenberg.direction(smooth * unit, trust, step, window) * unit
    expected = (
        torch.full_like(trust.loss, float("nan")) if gradient is None else levenberg.expected_decrease(gradient, v)
    )
    residual = levenberg.advance(residual, v, trust, smooth_residual)
    return residual, residual if prediction is None else compose(prediction, residual), expected


def pick(chosen: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """``new`` for the chosen pairs ``(B,)``, ``old`` for the others."""
    return torch.where(per_voxel(chosen, new), new, old)


def _freeze(trust: Trust, active: Tensor) -> Trust:
    """Stop the pairs that are not active: without damping a pair does not move."""
    return replace(trust, damping=trust.damping * active, reference=trust.reference * active)


def _relative(trust: Trust, delta: float) -> Tensor:
    """Damping relative to the mean squared gradient at the start of the level, ``(B,)``."""
    return delta * trust.damping / torch.where(trust.reference > 0, trust.reference, 1.0)
