"""What the method knows of every pair: its damping, the loss it stands at, and whether it still moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from monai_lm import kernels

__all__ = ["DAMPING_RANGE", "Outcome", "Trust", "initial_trust", "per_voxel"]

DAMPING_RANGE = 1e6
"""λ stays within λ₀ / range and λ₀ · range."""


@dataclass(frozen=True)
class Trust:
    """State of the method, one value per pair; every field is a ``(B,)`` tensor.

    Attributes:
        damping: λ, in units of ``|g|²``; 0 for a pair that does not move, which is how kernels know it.
        reference: λ₀, the damping at the start of the level.
        loss: loss of the last accepted iterate.
        expected: first-order decrease that the pending step promises, NaN if not computed.
        memory: what the acceptance remembers; see :mod:`monai_lm.solver.acceptance`.
        active: whether the pair moves: it has a gradient, and has not stopped.
    """

    damping: Tensor
    reference: Tensor
    loss: Tensor
    expected: Tensor
    memory: Tensor
    active: Tensor

    def state(self) -> dict[str, Tensor]:
        """The numbers by name, for a ``state_dict``; see :meth:`of`."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "active"}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Trust:
        """The trust of a :meth:`state`, which may hold other things too; pairs move that had a gradient."""
        numbers = {f.name: state[f.name] for f in fields(cls) if f.name != "active"}
        return cls(**numbers, active=state["reference"] > 0)

    @cached_property
    def length(self) -> Tensor:
        """Trust radius as a fraction of the largest step, ``min(1, √(λ₀ / λ))``; -1 for a pair that does not move.

        Rejections shorten the step. It is computed once, for the step and for the smoothing that follows it.
        """
        ratio = (self.reference / self.damping).clamp(max=1).sqrt()
        return torch.where(self.active, ratio, -1.0)

    def stopped(self, active: Tensor) -> Trust:
        """The state in which only ``active`` pairs ``(B,)`` move."""
        return replace(self, active=active, damping=self.damping * active, reference=self.reference * active)


@dataclass(frozen=True)
class Outcome:
    """What a step led to, for the rules to judge; ``(B,)`` each. What nobody asks for is not computed.

    Attributes:
        loss: after the step; NaN or inf counts as a rise.
        before: loss of the last accepted iterate.
        expected: first-order decrease that the step promised, NaN if not computed.
        iteration: counts from 1, the same for every pair and batch.
    """

    loss: Tensor
    before: Tensor
    expected: Tensor
    iteration: int

    @cached_property
    def finite(self) -> Tensor:
        """Whether the loss is finite."""
        return self.loss.abs() < float("inf")

    @cached_property
    def fell(self) -> Tensor:
        """Whether the loss is not above the one before; any finite loss is better than one that is not."""
        return self.finite & ~(self.loss > self.before)

    @cached_property
    def decrease(self) -> Tensor:
        """By how much the loss fell: -inf where it is not finite, inf where it was not before."""
        decrease = torch.where(self.finite, self.before - self.loss, float("-inf"))
        return torch.where(self.finite & ~torch.isfinite(self.before), float("inf"), decrease)

    @cached_property
    def gain(self) -> Tensor:
        """Gain ratio ρ, the actual over the expected decrease."""
        return self.decrease / self.expected


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
    reference = (damping * typical * typical / 2).clamp(max=info.max / DAMPING_RANGE).to(loss.dtype)
    unknown = torch.full_like(loss, float("nan"))
    return Trust(reference, reference, loss, unknown, torch.zeros_like(loss), reference > 0)


def per_voxel(scalar: Tensor, like: Tensor) -> Tensor:
    """Shape ``(B,)`` to broadcast over ``(B, C, *S)``."""
    return scalar.view(-1, *[1] * (like.dim() - 1))
