"""Regularisers of the residual: what is done to it after every step.

To add one, derive from :class:`Smoothing`; ``tests/solver/test_smoothing.py`` holds every one there to the same laws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from monai_lm import kernels

__all__ = ["Adaptive", "Elastic", "Smoothing"]

_ACROSS = 0.15
"""How the Gaussian follows thick slices, between 0, in voxels of every axis, and 1, in millimetres. Validation, slices
of 10 and 7.7 mm: in voxels it costs Dice, in millimetres slices fold against each other."""


class Smoothing:
    """A regulariser of the residual."""

    def relax(self, moved: Tensor, unit: Sequence[float], weight: Tensor, out: Tensor) -> None:
        """Make the next residual of the one that a step led to.

        Args:
            moved: ``(B, n, *S)`` residual after the step, in voxels; must not change.
            unit: length of the finest voxel edge in voxels of each axis, 1 or less.
            weight: ``(B,)``, 0 to 1: how far to go, the trust radius as a fraction of the largest step, so that the
                whole change of the map goes to zero when steps are rejected. Negative for a pair that does not move.
            out: ``(B, n, *S)`` to write to, in a precision of its own: the residual before the step, which pairs that
                do not move keep.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Elastic(Smoothing):
    """Part of the way that an elastic solid takes back to rest, ``r' + α (G r' - r' + ½ σ² ∇ div r')``.

    With ``G`` a Gaussian, ``G r - r`` is ``½ σ² Δ r`` to first order, and the sum is the Navier-Cauchy operator of a
    solid of Poisson's ratio 0 (Broit 1981): changes of volume are resisted twice as much as shear.

    Attributes:
        sigma: ``σ``, standard deviation of the Gaussian, in voxels of the finest axis. Across slices ``k`` times as
            thick it is ``σ / k^0.15`` of their voxels.
    """

    sigma: float = 0.6

    @override
    def relax(self, moved: Tensor, unit: Sequence[float], weight: Tensor, out: Tensor) -> None:
        along = [self.sigma * u**_ACROSS for u in unit]
        kernels.elastic(moved, along, [0.5 * (self.sigma * u) ** 2 for u in unit], weight, out)


@dataclass(frozen=True, eq=False)
class Adaptive(Smoothing):
    """An elastic solid that is stiffer in some places than in others, and held fast in some: a weighted mean of two.

    Attributes:
        low: the softest.
        high: the stiffest.
        share: ``(B, 1, *S)`` in [0, 1], how much of ``high``, on a grid over the same space as the levels'.
        still: ``(B, 1, *S)`` in [0, 1], how far the residual is held at zero.
    """

    low: Elastic
    high: Elastic
    share: Tensor = field(repr=False)
    still: Tensor = field(repr=False)
    _on: dict[tuple[int, ...], list[Tensor]] = field(default_factory=dict, repr=False)

    @override
    def relax(self, moved: Tensor, unit: Sequence[float], weight: Tensor, out: Tensor) -> None:
        stiff = out.clone()
        self.low.relax(moved, unit, weight, out)
        self.high.relax(moved, unit, weight, stiff)
        share, still = (one[: len(out)].to(out) for one in self._on_grid(tuple(moved.shape[2:])))
        far = weight.clamp(min=0).to(out).view(-1, *[1] * (out.dim() - 1))
        out.lerp_(stiff, share).mul_(1 - far * still)

    def _on_grid(self, size: tuple[int, ...]) -> list[Tensor]:
        if size not in self._on:
            self._on.clear()  # of the level before
            mode = "trilinear" if len(size) == 3 else "bilinear"
            weights = self.share, self.still
            self._on[size] = [F.interpolate(one, size=size, mode=mode, align_corners=False) for one in weights]
        return self._on[size]
