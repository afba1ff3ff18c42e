"""Composing, inverting, integrating and resampling fields."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from monai_lm.fields.sampling import sample_points, warp

__all__ = ["compose", "integrate", "invert", "resample"]


def compose(outer: Tensor, inner: Tensor, origin: Sequence[Tensor] = ()) -> Tensor:
    """Compose two fields: the displacement of ``(id + outer) ∘ (id + inner)``, i.e. ``inner(x) + outer(x + inner(x))``.

    Args:
        outer: ``(B, n, *M)`` in voxels; extended by its border value.
        inner: ``(B, n, *S)`` in voxels of the grid of ``outer``.
        origin: index of the first voxel of ``inner`` where it holds a window only; see :func:`warp`.

    Returns:
        ``(B, n, *S)`` displacement in voxels.
    """
    return inner + warp(outer, inner, origin=origin)


def integrate(velocity: Tensor, steps: int = 7) -> Tensor:
    """Integrate a stationary velocity field over unit time by scaling and squaring.

    Args:
        velocity: ``(B, n, *S)`` in voxels per unit time.
        steps: number of squarings; the first step is ``velocity / 2**steps``.

    Returns:
        ``(B, n, *S)`` displacement in voxels, the exponential of the velocity.

    Raises:
        ValueError: a negative number of steps.

    Source:
        Arsigny et al., "A Log-Euclidean Framework for Statistics on Diffeomorphisms", MICCAI 2006.
    """
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
    ddf = velocity / 2**steps
    for _ in range(steps):
        ddf = compose(ddf, ddf)
    return ddf


def resample(ddf: Tensor, size: Sequence[int]) -> Tensor:
    """Resample a field onto another grid that spans the same space (corner voxels coincide), units included.

    A grid twice as fine holds displacements of twice as many voxels: channel ``a`` is multiplied by
    ``(size[a] - 1) / (old_size[a] - 1)``. Linear interpolation, no low-pass filter.

    Args:
        ddf: ``(B, n, *S)`` in voxels of its own grid.
        size: ``n`` voxel counts of the new grid, each at least 2.

    Returns:
        ``(B, n, *size)`` in voxels of the new grid; the same tensor if the size is unchanged.

    Raises:
        ValueError: another number of axes, or an axis, old or new, of fewer than 2 voxels.
    """
    old = ddf.shape[2:]
    if len(size) != len(old) or min(*size, *old) < 2:
        raise ValueError(
            f"size must be {len(old)} voxel counts of at least 2 for a field of {tuple(old)} voxels, got {tuple(size)}"
        )
    if tuple(old) == tuple(size):
        return ddf
    mode = "bilinear" if ddf.shape[1] == 2 else "trilinear"
    out = F.interpolate(ddf, size=tuple(size), mode=mode, align_corners=True)
    factor = [(new - 1) / (previous - 1) for new, previous in zip(size, old, strict=True)]
    return out.mul_(out.new_tensor(factor).view(1, -1, *[1] * len(old)))  # in place: a field is large


def invert(ddf: Tensor, size: Sequence[int] | None = None, iterations: int = 100) -> tuple[Tensor, Tensor]:
    """Invert a field by fixed-point iteration, ``w(y) ← w(y) - a(y) e(y)`` with ``e(y) = w(y) + ddf(y + w(y))``.

    The local relaxation ``a`` starts at 1 and is halved where the residual grew, so that the iteration also converges
    where the field is steeper than a contraction.

    Args:
        ddf: ``(B, n, *S)`` in voxels; it maps the fixed grid into the moving grid.
        size: voxel counts of the moving grid, on which the inverse lives; default: the grid of ``ddf``.
        iterations: most iterations of a voxel; its iteration ends earlier when the residual is below ``1e-4`` voxel.

    Returns:
        The inverse ``(B, n, *size)`` in voxels, and its residual ``|e|`` in voxels ``(B, *size)``: how far the composed
        map is from the identity. It stays large where the moving grid is not covered by the image of the fixed grid.

    Source:
        Chen et al., "A simple fixed-point approach to invert a deformation field", Medical Physics 2008.
    """
    size = tuple(ddf.shape[2:] if size is None else size)
    inverse = ddf.new_zeros(ddf.shape[0], ddf.shape[1], *size)
    residual = ddf.new_zeros(ddf.shape[0], *size)
    at_a_time = _AT_A_TIME * (64 if ddf.is_cuda else 1)
    rows = max(1, at_a_time * size[0] // residual[0].numel())
    for pair in range(len(ddf)):
        for first in range(0, size[0], rows):  # voxels do not depend on one another
            slab = slice(first, first + rows)
            shape = inverse[pair, :, slab].shape
            voxels = torch.stack(
                torch.meshgrid(
                    *[torch.arange(s, device=ddf.device) + o for s, o in zip(shape[1:], (first, 0, 0), strict=False)],
                    indexing="ij",
                ),
                -1,
            )
            points, missed = _inverted(ddf[pair, None], voxels.flatten(0, -2).to(ddf.dtype), iterations)
            inverse[pair, :, slab] = points.T.reshape(shape)
            residual[pair, slab] = missed.reshape(shape[1:])
    return inverse, residual


_AT_A_TIME = 2**18
"""Voxels that are inverted together on a CPU: what they need stays in its cache."""


def _inverted(ddf: Tensor, points: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """The inverse of a field ``(1, n, *S)`` at points ``(N, n)``, ``(N, n)``, and its residual ``(N,)``."""
    inverse = torch.zeros_like(points)
    error = sample_points(ddf, points[None])[0]
    norm = torch.linalg.vector_norm(error, dim=1)
    relaxation = torch.ones_like(norm)
    for _ in range(iterations):
        left = (norm >= 1e-4).nonzero()[:, 0]  # few after some iterations
        if len(left) == 0:
            break
        candidate = inverse[left] - relaxation[left, None] * error[left]
        new_error = candidate + sample_points(ddf, (points[left] + candidate)[None])[0]
        new_norm = torch.linalg.vector_norm(new_error, dim=1)
        better = new_norm < norm[left]
        kept = left[better]
        inverse[kept], error[kept], norm[kept] = candidate[better], new_error[better], new_norm[better]
        relaxation[left] = torch.where(better, (relaxation[left] * 1.5).clamp(max=1.0), relaxation[left] * 0.5)
    return inverse, norm
