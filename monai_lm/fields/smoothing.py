"""Gaussian smoothing of images and fields."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["gaussian_smooth", "gaussian_taps"]


def gaussian_taps(sigma: float) -> list[float]:
    """One-sided weights ``[w0, w1, …, wr]`` of a normalised sampled Gaussian, cut at three standard deviations.

    Args:
        sigma: standard deviation in voxels, ``>= 0``.

    Returns:
        ``r + 1`` weights with ``w0 + 2 * sum(w1…wr) == 1``; ``[1.0]`` for ``sigma == 0``.
    """
    radius = math.ceil(3 * sigma) if sigma > 0 else 0
    taps = [math.exp(-0.5 * (k / sigma) ** 2) if k else 1.0 for k in range(radius + 1)]
    total = taps[0] + 2 * sum(taps[1:])
    return [t / total for t in taps]


def gaussian_smooth(x: Tensor, sigma: float | Sequence[float]) -> Tensor:
    """Smooth every channel with a separable Gaussian; the edge value continues outside, so constants are preserved.

    Args:
        x: ``(B, C, *S)``, floating point.
        sigma: standard deviation in voxels, one for all axes or one per axis.

    Returns:
        ``(B, C, *S)``.
    """
    n = x.dim() - 2
    sigmas = [float(sigma)] * n if isinstance(sigma, int | float) else [float(s) for s in sigma]
    for axis, s in enumerate(sigmas):
        taps = gaussian_taps(s)
        if len(taps) > 1:
            x = _filter_axis(x, taps, axis + 2)
    return x


def _filter_axis(x: Tensor, taps: list[float], dim: int) -> Tensor:
    """Symmetric filter along one dimension, edge values repeated: shifted slices of one padded tensor are summed."""
    radius, size = len(taps) - 1, x.shape[dim]
    first, last = x.narrow(dim, 0, 1), x.narrow(dim, size - 1, 1)
    reps = [1] * x.dim()
    reps[dim] = radius
    padded = torch.cat([first.repeat(reps), x, last.repeat(reps)], dim)
    out = x * taps[0]
    for k, tap in enumerate(taps[1:], start=1):
        out = out + tap * (padded.narrow(dim, radius - k, size) + padded.narrow(dim, radius + k, size))
    return out
