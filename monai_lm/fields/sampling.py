"""Sampling images and fields at displaced voxel positions.

The gather works on flat indices, corner by corner, so that a compiler can fuse it with whatever consumes the samples
and no coordinate grid is stored. Autograd through it gives the exact derivatives of the (bi/tri)linear interpolant.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

__all__ = ["sample_points", "warp"]

_FEW = 4
"""Channels that a compiler is shown one by one."""

_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def _along(values: Tensor, axis: int, n: int) -> Tensor:
    """Shape a 1D tensor so that it broadcasts along spatial ``axis`` of a ``(B, *S)`` tensor."""
    return values.view([1] + [-1 if a == axis else 1 for a in range(n)])


def warp(
    image: Tensor,
    ddf: Tensor,
    mode: str = "bilinear",
    padding_mode: str = "border",
    origin: Sequence[Tensor] = (),
) -> Tensor:
    """Sample an image at displaced positions, ``warped(x) = image(x + ddf(x))``.

    The image may live on another grid than the field, as long as both count voxels from the same corner.

    Args:
        image: ``(B, C, *M)``, every axis at least 2 voxels long; floating point, or any type for ``"nearest"``.
        ddf: ``(B, n, *S)`` displacement in voxels of ``image``, ``n = len(M) = len(S)``.
        mode: ``"bilinear"`` (trilinear in 3D) or ``"nearest"`` (for label maps).
        padding_mode: what lies outside the image: ``"border"`` extends the edge voxels, ``"zeros"`` is zero.
        origin: where ``ddf`` holds a window of its grid only, the index of its first voxel along the first axes, each a
            tensor of one number, float32 or the dtype of ``ddf`` if that is wider; 0 along the others.

    Returns:
        ``(B, C, *S)`` samples, in the dtype of the image for ``"nearest"``, else in the wider of the two dtypes.

    Raises:
        ValueError: unknown mode or padding, or image and field that do not fit; from ``monai_lm.fields`` also a field
            that is not finite. That is not looked at, and what comes out is anything, while autograd records the
            call or a compiler traces it.
    """
    if mode not in ("bilinear", "nearest"):
        raise ValueError(f"mode must be 'bilinear' or 'nearest', got {mode!r}")
    if padding_mode not in ("border", "zeros"):
        raise ValueError(f"padding_mode must be 'border' or 'zeros', got {padding_mode!r}")
    n = ddf.dim() - 2
    sizes = image.shape[2:]
    if ddf.shape[1] != n or len(sizes) != n or min(sizes) < 2:
        raise ValueError(
            "image must be (B, C, *M) with at least 2 voxels along every axis and ddf (B, n, *S) with n = len(M) = "
            f"len(S), got shapes {tuple(image.shape)} and {tuple(ddf.shape)}"
        )
    wide = torch.promote_types(ddf.dtype, torch.float32)  # half precision cannot hold positions
    voxels = [torch.arange(length, device=ddf.device, dtype=wide) for length in ddf.shape[2:]]
    for axis, first in enumerate(origin):
        voxels[axis] = voxels[axis] + first
    position = [ddf[:, a] + _along(voxels[a], a, n) for a in range(n)]
    flat = image.reshape(image.shape[0], image.shape[1], -1)
    # channel by channel, a compiler computes indices and weights once for all, in one loop; many take it minutes
    one_by_one = torch.compiler.is_compiling() and flat.shape[1] <= _FEW
    blocks = list(flat.split(1, 1)) if one_by_one else [flat]
    if mode == "nearest":
        kind = _SIGNED.get(image.dtype)  # torch cannot gather unsigned numbers, but what has as many bits
        blocks = blocks if kind is None else [block.view(kind) for block in blocks]
        out = torch.cat(_nearest(blocks, position, sizes, padding_mode), 1)
        return out if kind is None else out.view(image.dtype)  # a view, of any type, is not differentiable
    sample = _zero_padded if padding_mode == "zeros" else _border
    return torch.cat(sample(blocks, position, sizes), 1).to(torch.promote_types(image.dtype, ddf.dtype))


def sample_points(ddf: Tensor, points: Tensor) -> Tensor:
    """Displacement of a field at points between its voxels, linear in between, extended by its border value.

    Args:
        ddf: ``(B, n, *S)`` in voxels.
        points: ``(B, N, n)`` in voxels of its grid; NaN points give NaN.

    Returns:
        ``(B, N, n)`` displacement in voxels.

    Raises:
        ValueError: from ``monai_lm.fields``, a field that is not finite; see :func:`warp`.
    """
    (displacement,) = _border([ddf.flatten(2)], list(points.nan_to_num().unbind(2)), ddf.shape[2:])
    return torch.where(points.isnan(), torch.nan, displacement.transpose(1, 2))


def _border(blocks: list[Tensor], position: list[Tensor], sizes: torch.Size) -> list[Tensor]:
    """Linear interpolation of the image continued by its edge voxels."""
    clamped = [p.clamp(0, s - 1) for p, s in zip(position, sizes, strict=True)]
    lower = [p.detach().floor().clamp(max=s - 2) for p, s in zip(clamped, sizes, strict=True)]
    weight = [p - low for p, low in zip(clamped, lower, strict=True)]
    base, strides = _flat_index(lower, sizes)
    out: list[Tensor] = []
    for corner in product((0, 1), repeat=len(sizes)):
        index = base + sum(c * s for c, s in zip(corner, strides, strict=True))
        w = _product([wa if c else 1 - wa for c, wa in zip(corner, weight, strict=True)])
        terms = [_take(block, index) * w.unsqueeze(1) for block in blocks]
        out = [o + t for o, t in zip(out, terms, strict=True)] if out else terms
    return out


def _zero_padded(blocks: list[Tensor], position: list[Tensor], sizes: torch.Size) -> list[Tensor]:
    """Linear interpolation of the image continued by zeros: corners outside the grid contribute nothing."""
    lower = [p.detach().floor() for p in position]
    out: list[Tensor] = []
    for corner in product((0, 1), repeat=len(sizes)):
        at = [low + c for low, c in zip(lower, corner, strict=True)]
        inside = _product([((a >= 0) & (a <= s - 1)).to(position[0].dtype) for a, s in zip(at, sizes, strict=True)])
        w = _product([1 - (p - a).abs() for p, a in zip(position, at, strict=True)])
        index, _ = _flat_index([a.clamp(0, s - 1) for a, s in zip(at, sizes, strict=True)], sizes)
        terms = [_take(block, index) * (w * inside).unsqueeze(1) for block in blocks]
        out = [o + t for o, t in zip(out, terms, strict=True)] if out else terms
    return out


def _nearest(blocks: list[Tensor], position: list[Tensor], sizes: torch.Size, padding_mode: str) -> list[Tensor]:
    nearest = [(p + 0.5).floor() for p in position]
    index, _ = _flat_index([p.clamp(0, s - 1) for p, s in zip(nearest, sizes, strict=True)], sizes)
    out = [_take(block, index) for block in blocks]
    if padding_mode == "zeros":
        inside = _product([(p >= 0) & (p <= s - 1) for p, s in zip(nearest, sizes, strict=True)])
        out = [o.masked_fill(~inside.unsqueeze(1), 0) for o in out]
    return out


def _product(factors: list[Tensor]) -> Tensor:
    out = factors[0]
    for factor in factors[1:]:
        out = out * factor
    return out


def _flat_index(lower: list[Tensor], sizes: torch.Size) -> tuple[Tensor, list[int]]:
    """Flat index of integer-valued positions in an array of ``sizes``, and the stride of each axis."""
    strides = [1] * len(sizes)
    for a in range(len(sizes) - 2, -1, -1):
        strides[a] = strides[a + 1] * sizes[a + 1]
    index = lower[-1].long()
    for a in range(len(sizes) - 1):
        index = index + lower[a].long() * strides[a]
    return index, strides


def _take(flat: Tensor, index: Tensor) -> Tensor:
    """Gather ``flat`` ``(B, C, N)`` at ``index`` ``(B, *S)`` (or a batch-broadcast of it) for every channel."""
    batch, channels = flat.shape[:2]
    index = index.expand(batch, *index.shape[1:])
    picked = flat.gather(2, index.reshape(batch, 1, -1).expand(batch, channels, -1))
    return picked.reshape(batch, channels, *index.shape[1:])
