"""Composing, integrating and resampling fields."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from monai_lm.fields.sampling import warp

__all__ = ["compose", "integrate", "lengths", "resample"]


def compose(outer: Tensor, inner: Tensor) -> Tensor:
    """Compose two fields: the displacement of ``(id + outer) ∘ (id + inner)``, i.e. ``inner(x) + outer(x + inner(x))``.

    Args:
        outer: ``(B, n, *M)`` in voxels; extended by its border value.
        inner: ``(B, n, *S)`` in voxels of the grid of ``outer``.

    Returns:
        ``(B, n, *S)`` displacement in voxels.

    Raises:
        ValueError: fields that do not fit; from ``monai_lm.fields``, one that is not finite, see :func:`warp`.
    """
    return inner + warp(outer, inner)


def integrate(velocity: Tensor, steps: int = 7) -> Tensor:
    """Integrate a stationary velocity field over unit time by scaling and squaring.

    Args:
        velocity: ``(B, n, *S)`` in voxels per unit time.
        steps: number of squarings; the first step is ``velocity / 2**steps``.

    Returns:
        ``(B, n, *S)`` displacement in voxels, the exponential of the velocity.

    Raises:
        ValueError: a negative number of steps; from ``monai_lm.fields``, a velocity that is not finite.

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


def lengths(vectors: Tensor) -> Tensor:
    """Length of the vectors along the second axis, ``(B, n, *S)`` to ``(B, *S)``.

    PyTorch's own norm takes ten times as long over an axis that is not the last one.
    """
    return vectors.square().sum(1).sqrt()
