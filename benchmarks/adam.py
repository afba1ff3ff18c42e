"""Adam in the same engine: same similarity, gradient, composition, smoothing, levels and repair."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from monai_lm import levenberg, refinement
from monai_lm.fields import repair
from monai_lm.level import Iterate, LevelRun, Settings
from monai_lm.levenberg import Trust
from monai_lm.pyramid import make_level
from monai_lm.result import Record
from monai_lm.similarity import Similarity, get_similarity


class _AdamRun(LevelRun):
    """A level whose step is Adam's: ``-step · m / (√s + ε)`` with bias correction, on the smoothed gradient."""

    first: Tensor | None = None
    second: Tensor
    count = 0

    def step(self, at: Iterate, trust: Trust, mend: bool) -> tuple[Iterate, Trust]:
        self.count += 1
        if self.first is None:
            self.first, self.second = torch.zeros_like(at.smooth), torch.zeros_like(at.smooth)
        self.first = self.first.lerp(at.smooth, 0.1)
        self.second = self.second.lerp(at.smooth.square(), 0.001)
        m, s = self.first / (1 - 0.9**self.count), self.second / (1 - 0.999**self.count)
        scale = at.smooth.square().flatten(1).amax(1).sqrt().view(-1, *[1] * (at.smooth.dim() - 1))
        v = -self.settings.step * m / (s.sqrt() + 1e-8 * scale)
        still = replace(trust, damping=torch.ones_like(trust.damping), reference=torch.ones_like(trust.damping))
        residual = levenberg.advance(at.residual, v, still, self.smooth_residual)
        if mend:
            residual = repair(residual, self.prediction)
        return self.evaluate(residual, self.displacement(residual)), trust


def refine_with_adam(
    fixed: Tensor,
    moving: Tensor,
    ddf: Tensor | None,
    scales: Sequence[float],
    iterations: Sequence[int],
    smooth_gradient: Sequence[float],
    step: float,
    compile: bool,  # noqa: A002 (as refine calls it)
    tolerance: float,
    similarity: str | Similarity,
) -> Tensor:
    """Refined field ``(B, n, *S)``; the arguments are those of :func:`monai_lm.refine`."""
    started = time.perf_counter()
    settings = Settings(
        get_similarity(similarity), step, "simple", "always", 1, 0.5, tolerance, 0, compile, float("inf")
    )
    record = Record(fixed.shape[0], started)
    with torch.no_grad(), tqdm(disable=True) as bar:
        prediction = None if ddf is None else repair(ddf)
        residual = refinement._identity(fixed)
        for scale, count, sigma in zip(scales, iterations, smooth_gradient[-len(scales) :], strict=True):
            level = make_level(fixed.shape[2:], [1.0] * (fixed.dim() - 2), scale)
            run = _AdamRun(level, fixed, moving, prediction, settings, sigma, count)
            residual, loss = run.iterate(run.start(residual), 1.0, count, record, bar)
        no_constant = torch.zeros(fixed.shape[0], dtype=torch.bool)
        return refinement._finish(run, residual, loss, ddf, no_constant, record, started).ddf
