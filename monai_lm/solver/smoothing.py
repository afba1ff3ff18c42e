"""Regularisers of the residual: what is done to it after every step.

To add one, derive from :class:`Smoothing`; ``tests/solver/test_smoothing.py`` holds every one there to the same laws.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from monai_lm import kernels

__all__ = ["Elastic", "Smoothing"]


class Smoothing:
    """A regulariser of the residual."""

    def relax(self, moved: Tensor, weight: Tensor, out: Tensor) -> None:
        """Make the next residual of the one that a step led to.

        Args:
            moved: ``(B, n, *S)`` residual after the step, in voxels; must not change.
            weight: ``(B,)``, 0 to 1: how far to go, the trust radius as a fraction of the largest step, so that the
                whole change of the map goes to zero when steps are rejected. Negative for a pair that does not move.
            out: ``(B, n, *S)`` to write to, in a precision of its own: the residual before the step, which pairs that
                do not move keep.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Elastic(Smoothing):
    """Part of the way to a smooth residual, ``r' + α (G r' - r')`` with ``G`` a Gaussian.

    Attributes:
        sigma: standard deviation of the Gaussian, in voxels of every axis.
    """

    sigma: float = 0.5

    @override
    def relax(self, moved: Tensor, weight: Tensor, out: Tensor) -> None:
        kernels.elastic(moved, [self.sigma] * moved.shape[1], weight, out)
