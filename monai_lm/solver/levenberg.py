"""The factored Levenberg-Marquardt iteration on fields: tensors in, tensors out.

One iteration has three parts. *Direction*: every voxel's gradient ``g`` is scaled by a damped inverse of its own
rank-one Hessian, ``g / (|g|² + λ)`` (Sherman-Morrison), or of the mean of ``g gᵀ`` in a window. *Advance*: the step is
composed into the map, ``(id + u) ← (id + u) ∘ (id + v)``, and the map smoothed. *Judge*: the damping λ, one scalar per
pair, rises where the loss rose and falls where it fell.

Everything here serves both :class:`monai_lm.FactoredLM` and :func:`monai_lm.refine`.

Source: Jena, Chaudhari, Gee, "Factored Levenberg-Marquardt for Diffeomorphic Image Registration", arXiv 2603.19371.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import Tensor

from monai_lm import kernels
from monai_lm.kernels.reference import (
    box_sum,
    eulerian_gradient,
    in_units,
    inverse_window_counts,
    lm_direction,
    spatial_gradient,
)

__all__ = [
    "ACCEPTANCES",
    "CONTROLS",
    "Trust",
    "chance",
    "direction",
    "expected_decrease",
    "initial_trust",
    "judge",
    "per_voxel",
    "pull_back",
    "relax",
    "take_step",
]

CONTROLS = ("simple", "trust_region")
ACCEPTANCES = ("always", "descent", "metropolis")

_RISE, _FALL = 1.5, 0.975  # the published damping factors
_SHRINK_BELOW, _GROW_ABOVE = 0.1, 0.5  # gain ratios; the minimum along a parabola has 1/2
_DAMPING_RANGE = 1e6  # λ stays within λ₀ / range and λ₀ · range


@dataclass(frozen=True)
class Trust:
    """State of the damping, one value per pair; every field is a ``(B,)`` tensor.

    Attributes:
        damping: λ, in units of ``|g|²``; 0 where a pair had no gradient and does not move.
        reference: λ₀, the damping at the start of the level.
        loss: loss of the last accepted iterate.
        expected: first-order decrease that the pending step promises, NaN if not computed.
        decrease: with ``"metropolis"``, size of the last accepted decrease, the unit of the temperature.
    """

    damping: Tensor
    reference: Tensor
    loss: Tensor
    expected: Tensor
    decrease: Tensor

    def state(self) -> dict[str, Tensor]:
        """The fields by name, for a ``state_dict``."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @cached_property
    def length(self) -> Tensor:
        """Trust radius as a fraction of the largest step, ``min(1, √(λ₀ / λ))``; -1 for a pair that does not move.

        Rejections shorten the step. It is computed once, for the step and for the smoothing that follows it.
        """
        ratio = (self.reference / self.damping).clamp(max=1).sqrt()
        return torch.where(self.damping > 0, ratio, -1.0)


def per_voxel(scalar: Tensor, like: Tensor) -> Tensor:
    """Shape ``(B,)`` to broadcast over ``(B, C, *S)``."""
    return scalar.view(-1, *[1] * (like.dim() - 1))


def pull_back(gradient: Tensor, ddf: Tensor) -> Tensor:
    """Turn a gradient with respect to ``ddf`` into the one for compositional updates, ``(I + ∇u)ᵀ g``.

    Args:
        gradient: ``(B, n, *S)`` derivative of a loss with respect to ``ddf``.
        ddf: ``(B, n, *S)`` in voxels.
    """
    return torch.stack([gradient[:, a] + (slope * gradient).sum(1) for a, slope in enumerate(spatial_gradient(ddf))], 1)


def initial_trust(gradient: Tensor, loss: Tensor, damping: float, unit: Sequence[float] | None = None) -> Trust:
    """Damping at the start of a level, ``λ₀ = δ/2 · (Σ |g|² / Σ |g|)²``.

    Background and padding do not change it. Where ``|g|`` is distributed exponentially, it is ``δ · mean |g|²``.

    Args:
        gradient: ``(B, n, *S)`` smoothed gradient, in voxels.
        loss: ``(B,)``; or ``(1,)`` for all pairs, whose gradients count as one then.
        damping: δ, without units.
        unit: of the metric of the step, in voxels of every axis; default: ones.
    """
    info = torch.finfo(loss.dtype)
    sums = kernels.gradient_sums(gradient, unit or [1.0] * gradient.shape[1])
    squares, lengths = sums[:, 1], sums[:, 2]
    if len(loss) != len(sums):
        squares, lengths = squares.sum(0, keepdim=True), lengths.sum(0, keepdim=True)
    typical = squares / lengths.clamp(min=info.tiny)
    reference = (damping * typical * typical / 2).clamp(max=info.max / _DAMPING_RANGE).to(loss.dtype)
    unknown = torch.full_like(loss, float("nan"))
    return Trust(reference, reference, loss, unknown, torch.zeros_like(loss))


def direction(gradient: Tensor, trust: Trust, step: float, window: int = 1) -> Tensor:
    """Levenberg-Marquardt step, bounded by ``step`` without looking for a maximum over the volume.

    ``|g| / (|g|² + λ) <= 1 / (2√λ)``, so ``v = -2√λ s g / (|g|² + λ)`` is nowhere longer than the radius ``s``. With a
    window, the inverse of ``mean(g gᵀ) + λ I`` replaces the scalar and every voxel is clipped to ``s``.

    Args:
        gradient: ``(B, n, *S)`` in the metric of the step.
        trust: state of the damping.
        step: largest step in units of the metric; the radius is ``s = step · trust.length``.
        window: width in voxels of the window that the Hessian is averaged over, odd.

    Returns:
        ``(B, n, *S)`` step in the metric; zero for pairs without a gradient.
    """
    if window == 1:
        return lm_direction(gradient, step * trust.length, trust.damping)
    radius = per_voxel(step * trust.length, gradient)
    damping = per_voxel(trust.damping, gradient)
    moves = damping > 0
    root = torch.where(moves, damping, torch.ones_like(damping)).sqrt()
    v = -2 * radius * _solve_windowed(gradient / root, window // 2)
    length = torch.linalg.vector_norm(v, dim=1, keepdim=True)
    v = v * (radius / length.clamp(min=torch.finfo(v.dtype).tiny)).clamp(max=1)
    return torch.where(moves, v, torch.zeros_like(v)).nan_to_num(0.0, 0.0, 0.0)


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


def take_step(
    smooth: Tensor,
    residual: Tensor,
    trust: Trust,
    unit: Sequence[float],
    step: float,
    window: int,
    image: tuple[Tensor, Tensor] | None,
    out: Tensor,
) -> Tensor:
    """The step composed into the residual map, ``id + r' = (id + r) ∘ (id + v)``; see :func:`monai_lm.kernels.step`.

    Args:
        smooth: ``(B, n, *S)`` smoothed gradient, in voxels.
        residual: ``(B, n, *S)`` in voxels.
        trust: state of the damping; pairs without damping stay as they are.
        unit: of the metric of the step, in voxels of every axis.
        step: largest step in the metric.
        window: width of the window of the Hessian, 1 for none.
        image: the warped image and the derivative of the loss, ``(B, C, *S)`` each, for what the step promises.
        out: ``(B, n, *S)`` to write to; may be ``smooth``.

    Returns:
        The first-order decrease that the step promises, ``(B,)``; NaN without ``image``.
    """
    warped, derivative = (None, None) if image is None else image
    if window == 1:
        radius = step * trust.length
        return kernels.step(smooth, residual, unit, radius, trust.damping, warped, derivative, out)
    wide = smooth.to(torch.promote_types(smooth.dtype, torch.float32))
    v = in_units(direction(in_units(wide, unit), trust, step, window), unit)
    expected = torch.full_like(trust.damping, float("nan"))
    if warped is not None and derivative is not None:
        expected = expected_decrease(eulerian_gradient(derivative, warped), v)
    kernels.compose(residual, v, out)
    return expected


def expected_decrease(gradient: Tensor, v: Tensor) -> Tensor:
    """First-order decrease ``-Σ ⟨g, v⟩`` per pair, ``(B,)``, for the unsmoothed gradient ``g``."""
    return -(gradient * v).flatten(1).sum(1)


def relax(moved: Tensor, trust: Trust, smooth_residual: Sequence[float], out: Tensor, rate: float = 1) -> None:
    """Elastic smoothing of a residual that has moved, ``r' + α (G r' - r')`` with ``G`` a Gaussian.

    It is blended in by the trust radius ``α = trust.length``, so that the whole change of the map, not only the
    step, goes to zero when steps are rejected.

    Args:
        moved: ``(B, n, *S)`` residual after the step, in voxels.
        trust: state of the damping; ``out`` stays as it is in pairs without damping.
        smooth_residual: standard deviation of the Gaussian per axis, in voxels.
        out: ``(B, n, *S)`` to write to: the residual before the step.
        rate: at most 1, multiplies α.
    """
    kernels.elastic(moved, smooth_residual, trust.length if rate == 1 else rate * trust.length, out)


def judge(trust: Trust, loss: Tensor, control: str, acceptance: str, chance: float) -> tuple[Tensor, Tensor, Trust]:
    """Compare the loss after a step with the one before; accept or reject, and adapt the damping.

    Args:
        trust: state from before the step.
        loss: ``(B,)`` loss after the step; NaN or inf counts as a rise.
        control: ``"simple"``: λ × 1.5 when the loss rose, × 0.975 when it fell. ``"trust_region"``: by the gain ratio
            ρ = actual / expected decrease, λ × 1.5 below 0.1, × 0.667 above 0.5.
        acceptance: ``"always"``, ``"descent"`` (only a loss that did not rise) or ``"metropolis"`` (a worse one with
            probability ``exp(-Δ / T)``, T the last accepted decrease).
        chance: uniform random number in [0, 1) for ``"metropolis"``.

    Returns:
        Which pairs accept ``(B,)`` bool, the gain ratios ``(B,)`` (of ``"simple"``, which needs none, what
        ``trust.expected`` was, NaN), and the new state.
    """
    finite = loss.abs() < float("inf")
    fell = finite & ~(loss > trust.loss)
    gain, decrease = trust.expected, trust.decrease  # every choice computes what it needs, and no more
    if control == "simple":
        factor = torch.where(fell, _FALL, _RISE)
    else:
        gain = _decrease(trust, loss, finite) / trust.expected
        factor = torch.where(gain > _GROW_ABOVE, 1 / _RISE, torch.where(gain >= _SHRINK_BELOW, 1.0, _RISE))
        factor = torch.where(fell, factor, _RISE)  # also where the step had promised a rise
    damping = trust.damping * factor.to(trust.damping.dtype)
    damping = damping.clamp(trust.reference / _DAMPING_RANGE, trust.reference * _DAMPING_RANGE)
    if acceptance == "always":
        accepted = torch.ones_like(fell)
    elif acceptance == "descent":
        accepted = fell
    else:
        change, info = _decrease(trust, loss, finite), torch.finfo(loss.dtype)
        accepted = fell | (chance < torch.exp(change / trust.decrease.clamp(min=info.tiny)))
        decrease = torch.where(fell & (change < float("inf")), change, trust.decrease)
    kept = torch.where(accepted & finite, loss, trust.loss)
    return accepted, gain, replace(trust, damping=damping, loss=kept, decrease=decrease)


def _decrease(trust: Trust, loss: Tensor, finite: Tensor) -> Tensor:
    """By how much the loss fell: -inf where it is not finite, inf where it was not before."""
    decrease = torch.where(finite, trust.loss - loss, float("-inf"))
    return torch.where(finite & ~torch.isfinite(trust.loss), float("inf"), decrease)


def chance(seed: int, iteration: int) -> float:
    """Uniform random number that depends on the seed and the iteration only: one sequence for every pair and batch."""
    return random.Random(f"{seed}/{iteration}").random()
