"""Local normalised cross-correlation with its exact derivative in closed form."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from monai_lm import kernels
from monai_lm.fields.finite import check_number
from monai_lm.similarity.base import KernelSimilarity

__all__ = ["LNCC"]


class LNCC(KernelSimilarity):
    """``1 - A² / (B C)`` per voxel, with ``A``, ``B``, ``C`` the covariance and variances in a cubic window.

    Invariant to ``a I + b`` of either image. Windows that reach over the edge use the voxels inside the image only.
    With window means ``M``, ``a = 2 A / (B C)`` and ``b = a A / B``, the derivative of ``Σ A² / (B C)`` is
    ``J Mᵀa - I Mᵀb - Mᵀ(a MJ - b MI)``: three window sums forward, three back, no autograd graph.

    With a weight per voxel, window means are weighted means, and the loss at a voxel counts as much as the voxel.

    Args:
        radius: half width of the window in voxels; a window is ``2 radius + 1`` voxels wide, across thick slices, too:
            windows as wide in millimetres, but at least three slices, lose Dice on hearts (validation). Default 2, and
            three standard deviations of a Gaussian that is given by its own.
        epsilon: added to both variances, as a fraction of the squared :func:`~monai_lm.similarity.base.contrast` of the
            image: windows with less contrast than that count little.
        window: how much the voxels of a window count: ``"box"``, all alike; ``"gaussian"``, by a Gaussian whose
            standard deviation is a third of the window's width, as in MONAI's loss; or that standard deviation, in
            voxels.

    Raises:
        TypeError: ``window`` is neither a name nor a number.
        ValueError: a number out of range, or another name.

    Source:
        Avants et al., "Symmetric diffeomorphic image registration with cross-correlation", Medical Image Analysis 2008.
    """

    standardized = invariant = True

    def __init__(self, radius: int | None = None, epsilon: float = 2e-3, window: str | float = "box") -> None:
        if isinstance(window, str):
            if window not in ("box", "gaussian"):
                raise ValueError(f"window must be 'box', 'gaussian' or a standard deviation in voxels, got {window!r}")
        else:
            check_number("window", window, 0, exclusive=True)
        if radius is None:
            radius = 2 if isinstance(window, str) else math.ceil(3 * window)
        if radius < 1:
            raise ValueError(f"radius must be at least 1 voxel, got {radius}")
        if not epsilon > 0:
            raise ValueError(f"epsilon must be positive, got {epsilon}")
        self.radius = int(radius)
        self.epsilon = float(epsilon)
        self.window = window if isinstance(window, str) else float(window)

    @property
    def sigma(self) -> float:
        """Standard deviation of a Gaussian window in voxels; 0 for a box."""
        if isinstance(self.window, str):
            return (2 * self.radius + 1) / 3 if self.window == "gaussian" else 0.0
        return self.window

    def evaluate_into(self, warped: Tensor, reference: tuple[Any, ...], out: Tensor) -> Tensor:
        """Loss ``(B,)``, and its derivative in ``out`` ``(B, C, *S)``; see :func:`monai_lm.kernels.reference.lncc`."""
        fixed, shift, factor, weight = reference
        return kernels.lncc(warped, fixed, shift, factor, weight, self.radius, self.sigma, self.epsilon, out)
