"""Other descents for the same engine, passed as ``refine(descent=…, control="constant")``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from monai_lm import kernels
from monai_lm.solver.descent import Descent, Stateless, longest
from monai_lm.solver.trust import Trust, per_voxel

__all__ = ["DESCENTS", "STEPS", "Adam", "Lion", "Momentum", "keywords"]


class Adam(Descent):
    """Adam's step, ``-step · m / (√s + ε)`` with bias correction, on the smoothed gradient; 6 V of state."""

    count = 0
    first: Tensor
    second: Tensor

    @override
    def start(self) -> Adam:
        return Adam()

    @override
    def direction(self, gradient: Tensor, trust: Trust, unit: Sequence[float], step: float) -> Tensor:
        if self.count == 0:
            self.first, self.second = torch.zeros_like(gradient), torch.zeros_like(gradient)
        self.count += 1
        largest = kernels.gradient_sums(gradient, [1.0] * len(unit))[:, 0].clamp(min=1e-30).to(gradient.dtype)
        self.first.lerp_(gradient, 0.1)
        self.second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        torch.sqrt(self.second, out=gradient)
        scale = (1 - 0.999**self.count) ** 0.5
        gradient.div_(scale).add_(per_voxel(1e-8 * largest, gradient))
        torch.div(self.first, gradient, out=gradient)
        return gradient.mul_(-step / (1 - 0.9**self.count))


class Momentum(Descent):
    """``-step · m / max|m|`` of the running sum ``m ← .9 m + g``; 3 V of state."""

    sum: Tensor | None = None

    @override
    def start(self) -> Momentum:
        return Momentum()

    @override
    def direction(self, gradient: Tensor, trust: Trust, unit: Sequence[float], step: float) -> Tensor:
        self.sum = gradient.clone() if self.sum is None else self.sum.mul_(0.9).add_(gradient)
        return longest(gradient.copy_(self.sum), unit, step * trust.length.clamp(min=0))


class Lion(Descent):
    """The sign of a running mean, ``-step · sign(.9 m + .1 g)``, ``m ← .99 m + .01 g`` (Chen 2023); 3 V of state."""

    mean: Tensor | None = None

    @override
    def start(self) -> Lion:
        return Lion()

    @override
    def direction(self, gradient: Tensor, trust: Trust, unit: Sequence[float], step: float) -> Tensor:
        if self.mean is None:
            self.mean = torch.zeros_like(gradient)
        now = torch.lerp(self.mean, gradient, 0.1)
        self.mean.lerp_(gradient, 0.01)
        return torch.sign(now, out=gradient).mul_(-step)


DESCENTS: dict[str, Descent] = {"adam": Adam(), "lion": Lion(), "momentum": Momentum(), "stateless": Stateless()}


STEPS = {"adam": 0.2, "lion": 0.2, "momentum": 1.0, "stateless": 1.0}
"""Largest step in voxels, one for all images: the best of two to four on two validation pairs each of three sets."""


def keywords(descent: str, step: float | None = None) -> dict[str, Any]:
    """The arguments of :func:`monai_lm.refine` that put a descent in the place of LM; its own step if none is given."""
    return {"descent": DESCENTS[descent], "control": "constant", "step": STEPS[descent] if step is None else step}
