"""Other descents in the same engine: same similarity, gradient, composition, smoothing, levels and repair."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from monai_lm import RefinementResult, kernels
from monai_lm.similarity import Similarity, get_similarity
from monai_lm.solver import levenberg, refinement
from monai_lm.solver.engine import Engine
from monai_lm.solver.levenberg import Trust, per_voxel
from monai_lm.solver.pyramid import make_level
from monai_lm.solver.run import LevelRun, Settings


class _OtherEngine(Engine):
    """A level whose step is not LM's; the damping does nothing."""

    def advance(self, trust: Trust, better: Tensor | None, keep: bool) -> Tensor:
        self.note(better, keep)
        still = replace(trust, damping=torch.ones_like(trust.damping), reference=torch.ones_like(trust.damping))
        self.make_step()
        kernels.compose(self.residual, self.work, self.work)
        levenberg.relax(self.work, still, self.elastic, self.residual)
        return torch.full_like(trust.damping, float("nan"))

    def make_step(self) -> None:
        """Put the step, in voxels, into the place of the gradient."""
        raise NotImplementedError


class _AdamEngine(_OtherEngine):
    """Adam's step, ``-step · m / (√s + ε)`` with bias correction, on the smoothed gradient."""

    count = 0

    def make_step(self) -> None:
        if self.count == 0:
            self.first, self.second = torch.zeros_like(self.work), torch.zeros_like(self.work)
        self.count += 1
        largest = kernels.gradient_sums(self.work, [1.0] * len(self.unit))[:, 0].to(self.work.dtype)
        self.first.lerp_(self.work, 0.1)
        self.second.mul_(0.999).addcmul_(self.work, self.work, value=0.001)
        torch.sqrt(self.second, out=self.work)
        scale = (1 - 0.999**self.count) ** 0.5
        self.work.div_(scale).add_(per_voxel(1e-8 * largest, self.work))
        torch.div(self.first, self.work, out=self.work)
        self.work.mul_(-self.step / (1 - 0.9**self.count))


class _StatelessEngine(_OtherEngine):
    """Gradient descent that keeps nothing: ``-step · g / max|g|``."""

    def make_step(self) -> None:
        largest = kernels.gradient_sums(self.work, self.unit)[:, 0].clamp(min=1e-30).to(self.work.dtype)
        for axis, unit in enumerate(self.unit):
            self.work[:, axis].mul_(per_voxel(-self.step * unit**2 / largest, self.work[:, axis]))


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
    tolerance: float = 0.005,
    similarity: str | Similarity = "lncc",
) -> RefinementResult:
    """Refine as :func:`monai_lm.refine` does, whose arguments these are, with ``"adam"`` or ``"stateless"`` steps."""
    settings = Settings(
        get_similarity(similarity), step, "simple", "always", 1, 0.5, tolerance, 0, "full", float("inf")
    )
    size, edges = fixed.shape[2:], [1.0] * (fixed.dim() - 2)
    levels = [make_level(size, edges, scale) for scale in scales]
    stages = list(zip(levels, iterations, [1.0] * len(scales), smooth_gradient[-len(scales) :], strict=True))
    finest = make_level(size, edges, 1)
    with torch.no_grad(), tqdm(disable=True) as bar:
        return refinement._coarse_to_fine(
            fixed, moving, None, ddf, stages, finest, settings, bar, time.perf_counter(), DESCENTS[descent]
        )
