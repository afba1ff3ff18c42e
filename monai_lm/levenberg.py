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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from monai_lm.compilation import piece
from monai_lm.devices import widest_float
from monai_lm.fields.algebra import compose
from monai_lm.fields.smoothing import box_sum, gaussian_smooth, inverse_window_counts

__all__ = [
    "ACCEPTANCES",
    "CONTROLS",
    "Trust",
    "advance",
    "chance",
    "direction",
    "eulerian_gradient",
    "expected_decrease",
    "initial_trust",
    "initial_trust_of",
    "judge",
    "per_voxel",
    "pull_back",
    "relaxed",
    "spatial_gradient",
    "step_length",
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
        decrease: size of the last accepted decrease, the unit of the Metropolis temperature.
    """

    damping: Tensor
    reference: Tensor
    loss: Tensor
    expected: Tensor
    decrease: Tensor

    def state(self) -> dict[str, Tensor]:
        """The fields by name, for a ``state_dict``."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def per_voxel(scalar: Tensor, like: Tensor) -> Tensor:
    """Shape ``(B,)`` to broadcast over ``(B, C, *S)``."""
    return scalar.view(-1, *[1] * (like.dim() - 1))


def spatial_gradient(image: Tensor) -> list[Tensor]:
    """Central differences along every axis, one-sided at the edges: ``n`` tensors ``(B, C, *S)``, per voxel."""
    out = []
    for dim in range(2, image.dim()):
        size = image.shape[dim]
        first = image.narrow(dim, 1, 1) - image.narrow(dim, 0, 1)
        last = image.narrow(dim, size - 1, 1) - image.narrow(dim, size - 2, 1)
        inner = 0.5 * (image.narrow(dim, 2, size - 2) - image.narrow(dim, 0, size - 2))
        out.append(torch.cat([first, inner, last], dim))
    return out


def eulerian_gradient(derivative: Tensor, warped: Tensor) -> Tensor:
    """Gradient for compositional updates, ``g(x) = Σ_c dℓ/dI_c(x) ∇I_c(x)`` with ``I`` the warped image.

    Args:
        derivative: ``(B, C, *S)`` derivative of the loss with respect to the warped image.
        warped: ``(B, C, *S)``.

    Returns:
        ``(B, n, *S)``, loss per voxel of displacement.
    """
    return torch.stack([(derivative * slope).sum(1) for slope in spatial_gradient(warped)], 1)


def pull_back(gradient: Tensor, ddf: Tensor) -> Tensor:
    """Turn a gradient with respect to ``ddf`` into the one for compositional updates, ``(I + ∇u)ᵀ g``.

    Args:
        gradient: ``(B, n, *S)`` derivative of a loss with respect to ``ddf``.
        ddf: ``(B, n, *S)`` in voxels.
    """
    return torch.stack([gradient[:, a] + (slope * gradient).sum(1) for a, slope in enumerate(spatial_gradient(ddf))], 1)


def initial_trust(gradient: Tensor, loss: Tensor, damping: float) -> Trust:
    """Damping at the start of a level, ``λ₀ = δ/2 · (Σ |g|² / Σ |g|)²``.

    Background and padding do not change it. Where ``|g|`` is distributed exponentially, it is ``δ · mean |g|²``.

    Args:
        gradient: ``(B, n, *S)`` smoothed gradient, in the metric of the step.
        loss: ``(B,)``.
        damping: δ, without units.
    """
    return initial_trust_of(lambda: iter((gradient,)), loss, damping)


def initial_trust_of(gradients: Callable[[], Iterable[Tensor]], loss: Tensor, damping: float) -> Trust:
    """:func:`initial_trust` of a gradient that comes in parts.

    Args:
        gradients: called twice; returns tensors ``(B, n, …)`` that make up the gradient.
        loss: ``(B,)``.
        damping: δ, without units.
    """
    info = torch.finfo(loss.dtype)
    largest = torch.stack([part.flatten(1).abs().amax(1) for part in gradients()]).amax(0).clamp(min=info.tiny)
    exact = widest_float(loss.device)  # so exact that it does not matter how the gradient is cut
    squares = lengths = torch.zeros_like(loss, dtype=exact)
    for part in gradients():
        squared = (part / per_voxel(largest, part)).square().sum(1).flatten(1)  # in the range of float32
        squares = squares + squared.sum(1, dtype=exact)
        lengths = lengths + squared.sqrt().sum(1, dtype=exact)
    typical = (squares / lengths.clamp(min=info.tiny)).to(loss.dtype) * largest
    reference = (damping * typical * typical / 2).clamp(max=info.max / _DAMPING_RANGE)
    unknown = torch.full_like(loss, float("nan"))
    # a copy: a compiler would take damping that is the reference for another case than damping that is not
    return Trust(reference.clone(), reference, loss, unknown, torch.zeros_like(loss))


def step_length(trust: Trust) -> Tensor:
    """Trust radius as a fraction of ``step``, ``min(1, √(λ₀ / λ))``, ``(B,)``: rejections shorten the step."""
    ratio = trust.reference / torch.where(trust.damping > 0, trust.damping, 1.0)
    return ratio.clamp(max=1).sqrt()


def direction(gradient: Tensor, trust: Trust, step: float, window: int = 1) -> Tensor:
    """Levenberg-Marquardt step, bounded by ``step`` without looking for a maximum over the volume.

    ``|g| / (|g|² + λ) <= 1 / (2√λ)``, so ``v = -2√λ s g / (|g|² + λ)`` is nowhere longer than the radius ``s``. With a
    window, the inverse of ``mean(g gᵀ) + λ I`` replaces the scalar and every voxel is clipped to ``s``.

    Args:
        gradient: ``(B, n, *S)`` in the metric of the step.
        trust: state of the damping.
        step: largest step in units of the metric; the radius is ``s = step · step_length(trust)``.
        window: width in voxels of the window that the Hessian is averaged over, odd.

    Returns:
        ``(B, n, *S)`` step in the metric; zero for pairs without a gradient.
    """
    radius = per_voxel(step * step_length(trust), gradient)
    damping = per_voxel(trust.damping, gradient)
    moves = damping > 0
    root = torch.where(moves, damping, torch.ones_like(damping)).sqrt()
    g = gradient / root  # λ is 1 for it: no square leaves the range of float32
    if window == 1:
        v = -2 * radius * g / (g.square().sum(1, keepdim=True) + 1)
        return torch.where(moves, v, torch.zeros_like(v)).nan_to_num(0.0, 0.0, 0.0)
    v = -2 * radius * _solve_windowed(g, window // 2)
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


def expected_decrease(gradient: Tensor, v: Tensor) -> Tensor:
    """First-order decrease ``-Σ ⟨g, v⟩`` per pair, ``(B,)``, for the unsmoothed gradient ``g``."""
    return -(gradient * v).flatten(1).sum(1)


def advance(residual: Tensor, v: Tensor, trust: Trust, smooth_residual: Sequence[float], rate: float = 1) -> Tensor:
    """Compose the step into the residual map, ``id + r' = (id + r) ∘ (id + v)``, and smooth it by :func:`relaxed`.

    Args:
        residual: ``(B, n, *S)`` in voxels.
        v: ``(B, n, *S)`` step in voxels.
        trust: state of the damping; pairs without damping stay as they are.
        smooth_residual: standard deviation of the Gaussian per axis, in voxels.
        rate: at most 1, multiplies the weight of the smoothing.
    """
    return relaxed(compose(residual, v), residual, trust, smooth_residual, rate)


def relaxed(moved: Tensor, before: Tensor, trust: Trust, smooth_residual: Sequence[float], rate: float = 1) -> Tensor:
    """Elastic smoothing of a residual that has moved, ``r' + α (G r' - r')`` with ``G`` a Gaussian.

    It is blended in by the trust radius ``α = step_length(trust)``, so that the whole change of the map, not only the
    step, goes to zero when steps are rejected.

    Args:
        moved: ``(B, n, *S)`` residual after the step, in voxels.
        before: ``(B, n, *S)`` residual before it; pairs without damping return to it.
        trust: state of the damping.
        smooth_residual: standard deviation of the Gaussian per axis, in voxels.
        rate: at most 1, multiplies α.
    """
    smooth = gaussian_smooth(moved, smooth_residual) if any(s > 0 for s in smooth_residual) else None
    return piece(_blended, moved, smooth, before, trust, rate)


def _blended(moved: Tensor, smooth: Tensor | None, before: Tensor, trust: Trust, rate: float) -> Tensor:
    """The moved residual, part of the way to the smooth one; that from before where a pair has no damping."""
    if smooth is not None:
        moved = moved + per_voxel(rate * step_length(trust), moved) * (smooth - moved)
    return torch.where(per_voxel(trust.damping, moved) > 0, moved, before)


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
        Which pairs accept ``(B,)`` bool, the gain ratios ``(B,)``, and the new state.
    """
    finite = torch.isfinite(loss)
    decrease = torch.where(finite, trust.loss - loss, float("-inf"))
    decrease = torch.where(finite & ~torch.isfinite(trust.loss), float("inf"), decrease)
    fell = decrease >= 0
    gain = decrease / trust.expected
    if control == "simple":
        factor = torch.where(fell, _FALL, _RISE)
    else:
        factor = torch.where(gain > _GROW_ABOVE, 1 / _RISE, torch.where(gain >= _SHRINK_BELOW, 1.0, _RISE))
        factor = torch.where(fell, factor, _RISE)  # also where the step had promised a rise
    damping = trust.damping * factor.to(trust.damping.dtype)
    damping = damping.clamp(trust.reference / _DAMPING_RANGE, trust.reference * _DAMPING_RANGE)
    if acceptance == "always":
        accepted = torch.ones_like(finite)
    elif acceptance == "descent":
        accepted = fell
    else:
        accepted = fell | (chance < torch.exp(decrease / trust.decrease.clamp(min=torch.finfo(loss.dtype).tiny)))
    new = replace(
        trust,
        damping=damping,
        loss=torch.where(accepted & finite, loss, trust.loss),
        decrease=torch.where(accepted & fell & torch.isfinite(decrease), decrease, trust.decrease),
    )
    return accepted, gain, new


def chance(seed: int, iteration: int) -> float:
    """Uniform random number that depends on the seed and the iteration only: one sequence for every pair and batch."""
    return random.Random(f"{seed}/{iteration}").random()
