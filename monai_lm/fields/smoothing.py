"""Gaussian filter for images and fields."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from monai_lm import kernels
from monai_lm.fields.finite import check_number
from monai_lm.fields.sampling import recorded
from monai_lm.kernels.reference import smoothed

__all__ = ["gaussian_smooth"]


def gaussian_smooth(x: Tensor, sigma: float | Sequence[float]) -> Tensor:
    """Smooth every channel with a separable Gaussian; the edge value continues outside, so constants are preserved.

    Args:
        x: ``(B, C, *S)``, floating point.
        sigma: standard deviation in voxels, one for all axes or one per axis.

    Returns:
        ``(B, C, *S)``.

    Raises:
        ValueError: neither 2D nor 3D, or standard deviations that are not one or one per axis, finite and not negative.
    """
    n = x.dim() - 2
    if n not in (2, 3):
        raise ValueError(f"x must be (B, C, *S), 2D or 3D, got shape {tuple(x.shape)}")
    sigmas = [float(sigma)] * n if isinstance(sigma, int | float) else [float(s) for s in sigma]
    if len(sigmas) != n:
        raise ValueError(f"sigma must be one number or one per axis ({n}), got {len(sigmas)}")
    for value in sigmas:
        check_number("sigma", value, 0)
    if recorded(x):
        return smoothed(x, sigmas)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    kernels.smooth(x.contiguous(), sigmas, out)
    return out
