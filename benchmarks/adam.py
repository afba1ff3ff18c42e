"""Adam in the same engine: same similarity, gradient, composition, smoothing, levels and repair."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from monai_lm import levenberg, refinement
from monai_lm.compilation import compiled
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
        move = compiled(_adam_step) if self.fuse else _adam_step

        def kernel(window: Window) -> Tensor:
            self._note(window, better, keep)
            return move(
                self.residual, window.of(self.residual), window.of(self.first), window.of(self.second), corrections,
                floor, window.first_row(self.unit), still, self.step, self.elastic,
            )  # fmt: skip

        overwrite(self.residual, windows(self.residual, 3, self.step_halo), kernel)
        return torch.full_like(largest, float("nan"))


def _adam_step(
    whole: Tensor,
    residual: Tensor,
    first: Tensor,
    second: Tensor,
    corrections: list[Tensor],
    floor: Tensor,
    first_row: Tensor,
    still: Trust,
    step: float,
    elastic: Sequence[float],
) -> Tensor:
    v = -step * (first / corrections[0]) / ((second / corrections[1]).sqrt() + floor)
    return levenberg.relaxed(compose(whole, v, first_row), residual, still, elastic)


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
            fixed, moving, ddf, stages, finest, settings, bar, time.perf_counter(), _AdamRun
        ).ddf
