"""Sampling images and fields at displaced voxel positions.

What autograd records is computed in plain PyTorch, which gives the exact derivatives of the (bi/tri)linear interpolant;
anything else by the kernels.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor
from torch.autograd import forward_ad

from monai_lm import kernels
from monai_lm.kernels.reference import flat_index, interpolate, positions, take

__all__ = ["recorded", "sample_points", "warp"]

_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def recorded(*tensors: Tensor) -> bool:
    """Whether autograd records what is computed of these tensors, backward or forward, or a compiler traces it."""
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return True
    return any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def warp(
    image: Tensor,
    ddf: Tensor,
    mode: str = "bilinear",
    padding_mode: str = "border",
) -> Tensor:
    """Sample an image at displaced positions, ``warped(x) = image(x + ddf(x))``.

    The image may live on another grid than the field, as long as both count voxels from the same corner.

    Args:
        image: ``(B, C, *M)``, every axis at least 2 voxels long; floating point, or any type for ``"nearest"``.
        ddf: ``(B, n, *S)`` displacement in voxels of ``image``, ``n = len(M) = len(S)``.
        mode: ``"bilinear"`` (trilinear in 3D) or ``"nearest"`` (for label maps).
        padding_mode: what lies outside the image: ``"border"`` extends the edge voxels, ``"zeros"`` is zero.

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
    if mode == "bilinear":
        dtype = torch.promote_types(image.dtype, ddf.dtype)
        if padding_mode == "border" and not recorded(image, ddf):
            out = torch.empty(*image.shape[:2], *ddf.shape[2:], dtype=dtype, device=ddf.device)
            ddf = ddf.expand(len(image), *ddf.shape[1:]).contiguous()
            kernels.sample(image.contiguous(), ddf, None, None, None, out)
            return out
        sample = _zero_padded if padding_mode == "zeros" else interpolate
        return sample(image, positions(ddf.to(wide))).to(dtype)
    flat = image.flatten(2)
    kind = _SIGNED.get(image.dtype)  # torch cannot gather unsigned numbers, but what has as many bits
    out = _nearest(flat if kind is None else flat.view(kind), positions(ddf.to(wide)), sizes, padding_mode)
    return out if kind is None else out.view(image.dtype)  # a view, of any type, is not differentiable


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
    displacement = interpolate(ddf, list(points.unbind(2)))
    return torch.where(points.isnan(), torch.nan, displacement.transpose(1, 2))


def _zero_padded(image: Tensor, position: list[Tensor]) -> Tensor:
    """Linear interpolation of an image continued by zeros: corners outside the grid contribute nothing."""
    sizes, flat = image.shape[2:], image.flatten(2)
    lower = [p.detach().floor() for p in position]
    out: Tensor | None = None
    for corner in product((0, 1), repeat=len(sizes)):
        at = [low + c for low, c in zip(lower, corner, strict=True)]
        inside = _product([((a >= 0) & (a <= s - 1)).to(position[0].dtype) for a, s in zip(at, sizes, strict=True)])
        w = _product([1 - (p - a).abs() for p, a in zip(position, at, strict=True)])
        index, _ = flat_index([a.clamp(0, s - 1) for a, s in zip(at, sizes, strict=True)], sizes)
        term = take(flat, index) * (w * inside).unsqueeze(1)
        out = term if out is None else out + term
    assert out is not None  # for mypy
    return out


def _nearest(flat: Tensor, position: list[Tensor], sizes: torch.Size, padding_mode: str) -> Tensor:
    nearest = [(p + 0.5).floor() for p in position]
    index, _ = flat_index([p.clamp(0, s - 1) for p, s in zip(nearest, sizes, strict=True)], sizes)
    out = take(flat, index)
    if padding_mode == "zeros":
        inside = _product([(p >= 0) & (p <= s - 1) for p, s in zip(nearest, sizes, strict=True)])
        out = out.masked_fill(~inside.unsqueeze(1), 0)
    return out


def _product(factors: list[Tensor]) -> Tensor:
    out = factors[0]
    for factor in factors[1:]:
        out = out * factor
    return out
