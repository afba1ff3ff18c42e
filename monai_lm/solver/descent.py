"""Descents: which way the residual goes, and how far.

To add one, derive from :class:`Descent`: :meth:`Descent.direction` is all that it needs. Give it a name in
:data:`DESCENTS`, or pass it as ``refine(descent=…)``; ``tests/solver/test_descent.py`` holds every one there to the
same laws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from monai_lm import kernels
from monai_lm.kernels.reference import (
    box_sum,
    eulerian_gradient,
    in_units,
    inverse_window_counts,
    lm_direction,
    spatial_gradient,
)
from monai_lm.solver.trust import Trust, per_voxel

__all__ = ["DESCENTS", "LM", "Descent", "Stateless", "WindowedLM", "expected_decrease", "longest", "pull_back"]


class Descent:
    """A way to make steps of gradients."""

    def start(self) -> Descent:
        """What steps on one level: itself, or, where it has a state, a copy without one."""
        return self

    def direction(self, gradient: Tensor, trust: Trust, unit: Sequence[float], step: float) -> Tensor:
        """The step ``(B, n, *S)`` in voxels; zero for pairs that do not move.

        Args:
            gradient: ``(B, n, *S)`` smoothed gradient, in voxels; may be overwritten.
            trust: state of the method; a step is no longer than ``step · trust.length`` where λ shall have a say.
            unit: of the metric of the step, in voxels of every axis.
            step: largest step in the metric.
        """
        raise NotImplementedError

    def advance(
        self,
        gradient: Tensor,
        residual: Tensor,
        trust: Trust,
        unit: Sequence[float],
        step: float,
        image: tuple[Tensor, Tensor] | None,
        out: Tensor,
    ) -> Tensor:
        """The step composed into the residual map, ``id + r' = (id + r) ∘ (id + v)``.

        Args:
            gradient: as for :meth:`direction`.
            residual: ``(B, n, *S)`` in voxels.
            trust: as for :meth:`direction`.
            unit: as for :meth:`direction`.
            step: as for :meth:`direction`.
            image: the warped image and the derivative of the loss, ``(B, C, *S)`` each, for what the step promises.
            out: ``(B, n, *S)`` to write to; may be ``gradient``.

        Returns:
            The first-order decrease that the step promises, ``(B,)``; NaN without ``image``.
        """
        v = self.direction(gradient, trust, unit, step)
        expected = torch.full_like(trust.damping, float("nan"))
        if image is not None:
            warped, derivative = image
            expected = expected_decrease(eulerian_gradient(derivative, warped), v)
        kernels.compose(residual, v, out)
        return expected


@dataclass(frozen=True)
class LM(Descent):
    """The factored Levenberg-Marquardt step, ``v = -2√λ s g / (|g|² + λ)``: the Hessian is the voxel's own ``g gᵀ``.

    ``|g| / (|g|² + λ) <= 1 / (2√λ)``, so ``v`` is nowhere longer than the radius ``s = step · trust.length``, without
    looking for a maximum over the volume.

    Source: Jena, Chaudhari, Gee, "Factored Levenberg-Marquardt for Diffeomorphic Image Registration", arXiv 2603.19371.
    """

    @override
    def direction(self, gradient: Tensor, trust: Trust, unit: Sequence[float], step: float) -> Tensor:
        return in_units(lm_direction(in_units(gradient, unit), step * trust.length, trust.damping), unit)

    @override
    def advance(
        self,
        gradient: Tensor,
        residual: Tensor,
        trust: Trust,
        unit: Sequence[float],
        step: float,
        image: tuple[Tensor, Tensor] | None,
        out: Tensor,
    ) -> Tensor:
        """One kernel for direction, composition and promise; see :func:`monai_lm.kernels.step`."""
        warped, derivative = (None, None) if image is None else image
        return kernels.step(gradient, residual, unit, step * trust.length, trust.damping, warped, derivative, out)


@dataclass(frozen=True)
class WindowedLM(Descent):
    """Levenberg-Marquardt with the Hessian averaged over a window: the inverse of ``mean(g gᵀ) + λ I``.

    Every voxel is clipped to the radius ``step · trust.length``.

    Attributes:
        window: width in voxels of the window, odd.
    """

    window: int = 3

    @override
    def direction(self, gradient: Tensor, trust: Trust, unit: Sequence[float], step: float) -> Tensor:
        g = in_units(gradient.to(torch.promote_types(gradient.dtype, torch.float32)), unit)
        radius, damping = per_voxel(step * trust.length, g), per_voxel(trust.damping, g)
        moves = damping > 0
        root = torch.where(moves, damping, torch.ones_like(damping)).sqrt()
        v = -2 * radius * _solve_windowed(g / root, self.window // 2)
        length = torch.linalg.vector_norm(v, dim=1, keepdim=True)
        v = v * (radius / length.clamp(min=torch.finfo(v.dtype).tiny)).clamp(max=1)
        return in_units(torch.where(moves, v, torch.zeros_like(v)).nan_to_num(0.0, 0.0, 0.0), unit)


def _solve_windowed(g: Tensor, half: int) -> Tensor:
    """``(mean_w(g gᵀ) + I)⁻¹ g`` by the closed-form ``L D Lᵀ`` of the symmetric 2×2 or 3×3 matrix; ``D >= I``."""
    n = g.shape[1]
    weight = inverse_window_counts(g, half)
    lower: dict[tuple[int, int], Tensor] = {}
    pivots: list[Tensor] = []
    solved: list[Tensor] = []
    for i in range(n):
        for j in range(i + 1):
            entry = box_sum(g[:, i : i + 1] * g[:, j : j + 1], half) * weight
            for k in range(j):
                entry = entry - lower[i, k] * lower[j, k] * pivots[k]
            if j < i:
                lower[i, j] = entry / pivots[j]
            else:
                pivots.append(entry.clamp(min=0) + 1)
        forward = g[:, i : i + 1]
        for k in range(i):
            forward = forward - lower[i, k] * solved[k]
        solved.append(forward)
    solved = [z / pivot for z, pivot in zip(solved, pivots, strict=True)]
    for i in reversed(range(n)):
        for k in range(i + 1, n):
            solved[i] = solved[i] - lower[k, i] * solved[k]
    return torch.cat(solved, 1)


class Stateless(Descent):
    """Gradient descent that keeps nothing, ``-s · g / max ‖g‖`` with ``s`` the largest step times the trust radius."""

    @override
    def direction(self, gradient: Tensor, trust: Trust, unit: Sequence[float], step: float) -> Tensor:
        return longest(gradient, unit, step * trust.length.clamp(min=0))


def longest(direction: Tensor, unit: Sequence[float], step: Tensor) -> Tensor:
    """Go against a direction ``(B, n, *S)``, in place, the longest vector of every pair as long as a step ``(B,)``."""
    largest = kernels.gradient_sums(direction, unit)[:, 0].clamp(min=1e-30).to(direction.dtype)
    for axis, length in enumerate(unit):
        direction[:, axis].mul_(per_voxel(-step * length**2 / largest, direction[:, axis]))
    return direction


def pull_back(gradient: Tensor, ddf: Tensor) -> Tensor:
    """Turn a gradient with respect to ``ddf`` into the one for compositional updates, ``(I + ∇u)ᵀ g``.

    Args:
        gradient: ``(B, n, *S)`` derivative of a loss with respect to ``ddf``.
        ddf: ``(B, n, *S)`` in voxels.
    """
    return torch.stack([gradient[:, a] + (slope * gradient).sum(1) for a, slope in enumerate(spatial_gradient(ddf))], 1)


def expected_decrease(gradient: Tensor, v: Tensor) -> Tensor:
    """First-order decrease ``-Σ ⟨g, v⟩`` per pair, ``(B,)``, for the unsmoothed gradient ``g``."""
    return -(gradient * v).flatten(1).sum(1)


DESCENTS: dict[str, Callable[[int], Descent]] = {
    "lm": lambda window: LM() if window == 1 else WindowedLM(window),
    "stateless": lambda _: Stateless(),
}
"""The ``descent`` argument of :func:`monai_lm.refine`; every one is made of a ``window``."""
