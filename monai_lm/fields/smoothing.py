"""Gaussian and box filters for images and fields."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from monai_lm.compilation import piece

__all__ = ["box_sum", "gaussian_smooth", "gaussian_taps", "inverse_window_counts"]


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

    Raises:
        ValueError: another number of standard deviations than axes.
    """
    n = x.dim() - 2
    sigmas = [float(sigma)] * n if isinstance(sigma, int | float) else [float(s) for s in sigma]
    if len(sigmas) != n:
        raise ValueError(f"sigma must be one number or one per axis ({n}), got {len(sigmas)}")
    for axis, s in enumerate(sigmas):
        taps = gaussian_taps(s)
        if len(taps) > 1:
            x = piece(_filter_axis, x, taps, axis + 2, True)
    return x


def _filter_axis(x: Tensor, taps: list[float], dim: int, extend: bool) -> Tensor:
    """Symmetric filter along one dimension; outside, edge values are repeated (``extend``) or zero."""
    radius, size = len(taps) - 1, x.shape[dim]
    if not torch.compiler.is_compiling():
        first, last = x.narrow(dim, 0, 1), x.narrow(dim, size - 1, 1)
        if not extend:
            first, last = torch.zeros_like(first), torch.zeros_like(last)
        reps = [1] * x.dim()
        reps[dim] = radius
        return _shifted_sum(torch.cat([first.repeat(reps), x, last.repeat(reps)], dim), taps, dim, radius, size)
    # compiled: a loop over the inner rows and one for every row near an end, instead of a loop that pads
    near = min(radius, size)
    parts = [_end_row(x, taps, dim, i, extend) for i in range(near)]
    if size > 2 * radius:
        parts.append(_shifted_sum(x, taps, dim, radius, size - 2 * radius))
    parts += [_end_row(x, taps, dim, i, extend) for i in range(max(size - radius, near), size)]
    return torch.cat(parts, dim)


def _shifted_sum(x: Tensor, taps: list[float], dim: int, first: int, count: int) -> Tensor:
    """Filtered rows ``first … first + count``, which have neighbours enough."""
    out = _times(x.narrow(dim, first, count), taps[0])
    for k, tap in enumerate(taps[1:], start=1):
        out = out + _times(x.narrow(dim, first - k, count) + x.narrow(dim, first + k, count), tap)
    return out


def _end_row(x: Tensor, taps: list[float], dim: int, row: int, extend: bool) -> Tensor:
    """One filtered row near an end."""
    out, size = _times(x.narrow(dim, row, 1), taps[0]), x.shape[dim]
    for k, tap in enumerate(taps[1:], start=1):
        for at in (row - k, row + k):
            if extend or 0 <= at < size:
                out = out + _times(x.narrow(dim, min(max(at, 0), size - 1), 1), tap)
    return out


def _times(x: Tensor, tap: float) -> Tensor:
    return x if tap == 1 else x * tap


def box_sum(x: Tensor, radius: int) -> Tensor:
    """Sum over cubic windows ``2 radius + 1`` wide, zero outside; separable, its own adjoint.

    Args:
        x: ``(B, C, *S)``.
        radius: half width in voxels.
    """
    for dim in range(2, x.dim()):
        x = piece(_filter_axis, x, [1.0] * (radius + 1), dim, False)
    return x


def inverse_window_counts(x: Tensor, radius: int) -> Tensor:
    """One over the number of voxels that each window of :func:`box_sum` has inside the image.

    Args:
        x: ``(B, C, *S)``; only its shape, device and dtype matter.
        radius: half width in voxels.

    Returns:
        ``(1, 1, *S)``; times :func:`box_sum` it gives window means.
    """
    n = x.dim() - 2
    out = x.new_ones(1)
    for axis, size in enumerate(x.shape[2:]):
        i = torch.arange(size, device=x.device)
        count = (i + radius).clamp(max=size - 1) - (i - radius).clamp(min=0) + 1
        out = out / count.to(x.dtype).view([1, 1] + [-1 if a == axis else 1 for a in range(n)])
    return out
