"""Other descents in the same engine: same similarity, gradient, composition, smoothing, levels and repair."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from monai_lm import RefinementResult, levenberg, refinement
from monai_lm.engine import Engine
from monai_lm.fields import compose
from monai_lm.level import LevelRun, Settings
from monai_lm.levenberg import Trust
from monai_lm.pyramid import make_level
from monai_lm.similarity import Similarity, get_similarity
from monai_lm.streaming import Window, overwrite, windows


class _OtherEngine(Engine):
    """A level whose step is not LM's; the damping does nothing."""

    def advance(self, trust: Trust, better: Tensor | None, keep: bool) -> Tensor:
        self.prepare()
        still = replace(trust, damping=torch.ones_like(trust.damping), reference=torch.ones_like(trust.damping))

        def moved(window: Window) -> Tensor:
            self._note(window, better, keep)
            return self._run(compose, self.residual, self.v(window), window.origin(self.unit))

        overwrite(self.smooth, windows(self.residual, 3, 0), moved)
        for window in windows(self.residual, 3, self.elastic_halo):
            window.right(self.residual).copy_(window.cut(self._relaxed(window, window.of(self.smooth), still)))
        return torch.full_like(trust.damping, float("nan"))

    def prepare(self) -> None:
        """Look at the whole gradient before the step."""
        raise NotImplementedError

    def v(self, window: Window) -> Tensor:
        """The step in a window, in voxels."""
        raise NotImplementedError

    def largest_square(self) -> Tensor:
        """Of a component of the gradient, per pair ``(B,)``."""
        largest = self.smooth.new_zeros(self.smooth.shape[0])
        for window in windows(self.smooth, 3, 0):
            largest = torch.maximum(largest, window.right(self.smooth).square().flatten(1).amax(1))
        return largest


class _AdamEngine(_OtherEngine):
    """Adam's step, ``-step · m / (√s + ε)`` with bias correction, on the smoothed gradient."""

    count = 0

    def prepare(self) -> None:
        if self.count == 0:
            self.first, self.second = torch.zeros_like(self.smooth), torch.zeros_like(self.smooth)
        self.count += 1
        self.first.lerp_(self.smooth, 0.1)
        for window in windows(self.smooth, 3, 0):
            window.right(self.second).lerp_(window.right(self.smooth).square(), 0.001)
        self.corrections = [self.unit.new_full((), 1 - beta**self.count) for beta in (0.9, 0.999)]
        self.floor = 1e-8 * levenberg.per_voxel(self.largest_square().sqrt(), self.smooth)

    def v(self, window: Window) -> Tensor:
        out: Tensor = self._run(
            _adam_step, window.of(self.first), window.of(self.second), self.corrections, self.floor, self.step
        )
        return out


class _StatelessEngine(_OtherEngine):
    """Gradient descent that keeps nothing: ``-step · g / max|g|``."""

    def prepare(self) -> None:
        largest = self.smooth.new_zeros(self.smooth.shape[0])
        for window in windows(self.smooth, 3, 0):
            length = torch.linalg.vector_norm(window.right(self.smooth) * self.unit, dim=1)
            largest = torch.maximum(largest, length.flatten(1).amax(1))
        self.factor = self.step * self.unit**2 / levenberg.per_voxel(largest.clamp(min=1e-30), self.smooth)

    def v(self, window: Window) -> Tensor:
        return -window.of(self.smooth) * self.factor


def _adam_step(first: Tensor, second: Tensor, corrections: list[Tensor], floor: Tensor, step: float) -> Tensor:
    return -step * (first / corrections[0]) / ((second / corrections[1]).sqrt() + floor)


class _AdamRun(LevelRun):
    engine_type = _AdamEngine


class _StatelessRun(LevelRun):
    engine_type = _StatelessEngine


DESCENTS: dict[str, type[LevelRun]] = {"adam": _AdamRun, "stateless": _StatelessRun}


def refine_with(
    descent: str,
    fixed: Tensor,
    moving: Tensor,
    ddf: Tensor | None = None,
    *,
    scales: Sequence[float],
    iterations: Sequence[int],
    step: float,
    smooth_gradient: Sequence[float] = (2.0, 2.0, 2.0, 1.0),
    compile: str | bool = "auto",  # noqa: A002 (as refine calls it)
    tolerance: float = 0.005,
    similarity: str | Similarity = "lncc",
) -> RefinementResult:
    """Refine as :func:`monai_lm.refine` does, whose arguments these are, with ``"adam"`` or ``"stateless"`` steps."""
    settings = Settings(
        get_similarity(similarity), step, "simple", "always", 1, 0.5, tolerance, 0, compile, "full", float("inf")
    )
    size, edges = fixed.shape[2:], [1.0] * (fixed.dim() - 2)
    levels = [make_level(size, edges, scale) for scale in scales]
    stages = list(zip(levels, iterations, [1.0] * len(scales), smooth_gradient[-len(scales) :], strict=True))
    finest = make_level(size, edges, 1)
    with torch.no_grad(), tqdm(disable=True) as bar:
        return refinement._coarse_to_fine(
            fixed, moving, None, ddf, stages, finest, settings, bar, time.perf_counter(), DESCENTS[descent]
        )
