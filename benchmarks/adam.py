"""Adam in the same engine: same similarity, gradient, composition, smoothing, levels and repair."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from monai_lm import levenberg, refinement
from monai_lm.engine import Engine
from monai_lm.fields import compose
from monai_lm.level import LevelRun, Settings
from monai_lm.levenberg import Trust
from monai_lm.pyramid import make_level
from monai_lm.similarity import Similarity, get_similarity
from monai_lm.streaming import Window, overwrite, windows


class _AdamEngine(Engine):
    """A level whose step is Adam's: ``-step · m / (√s + ε)`` with bias correction, on the smoothed gradient."""

    count = 0

    def advance(self, trust: Trust, better: Tensor | None, keep: bool) -> Tensor:
        if self.count == 0:
            self.first, self.second = torch.zeros_like(self.smooth), torch.zeros_like(self.smooth)
        self.count += 1
        self.first.lerp_(self.smooth, 0.1)
        largest = self.smooth.new_zeros(self.smooth.shape[0])
        for window in windows(self.smooth, 3, 0):
            gradient = window.right(self.smooth)
            window.right(self.second).lerp_(gradient.square(), 0.001)
            largest = torch.maximum(largest, gradient.square().flatten(1).amax(1))
        still = replace(trust, damping=torch.ones_like(trust.damping), reference=torch.ones_like(trust.damping))
        corrections = [self.unit.new_tensor(1 - beta**self.count) for beta in (0.9, 0.999)]
        floor = 1e-8 * levenberg.per_voxel(largest.sqrt(), self.smooth)

        def step(window: Window) -> Tensor:
            self._note(window, better, keep)
            v = self._run(_adam_step, window.of(self.first), window.of(self.second), corrections, floor, self.step)
            return self._run(compose, self.residual, v, window.origin(self.unit))

        overwrite(self.smooth, windows(self.residual, 3, 0), step)
        for window in windows(self.residual, 3, self.elastic_halo):
            window.right(self.residual).copy_(window.cut(self._relaxed(window, window.of(self.smooth), still)))
        return torch.full_like(largest, float("nan"))


def _adam_step(first: Tensor, second: Tensor, corrections: list[Tensor], floor: Tensor, step: float) -> Tensor:
    return -step * (first / corrections[0]) / ((second / corrections[1]).sqrt() + floor)


class _AdamRun(LevelRun):
    engine_type = _AdamEngine


def refine_with_adam(
    fixed: Tensor,
    moving: Tensor,
    ddf: Tensor | None,
    scales: Sequence[float],
    iterations: Sequence[int],
    smooth_gradient: Sequence[float],
    step: float,
    compile: str | bool,  # noqa: A002 (as refine calls it)
    tolerance: float,
    similarity: str | Similarity,
) -> Tensor:
    """Refined field ``(B, n, *S)``; the arguments are those of :func:`monai_lm.refine`."""
    settings = Settings(
        get_similarity(similarity), step, "simple", "always", 1, 0.5, tolerance, 0, compile, "full", float("inf")
    )
    size, edges = fixed.shape[2:], [1.0] * (fixed.dim() - 2)
    levels = [make_level(size, edges, scale) for scale in scales]
    stages = list(zip(levels, iterations, [1.0] * len(scales), smooth_gradient[-len(scales) :], strict=True))
    finest = make_level(size, edges, 1)
    with torch.no_grad(), tqdm(disable=True) as bar:
        return refinement._coarse_to_fine(
            fixed, moving, None, ddf, stages, finest, settings, bar, time.perf_counter(), _AdamRun
        ).ddf
