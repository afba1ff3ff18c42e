"""Checks at the public edge: every message names the argument, what was expected and what came."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from monai_lm.fields.finite import check_finite
from monai_lm.guidance import Guidance

__all__ = [
    "check_field",
    "check_finite",
    "check_guidance",
    "check_images",
    "check_shown",
    "check_spacing",
    "check_together",
    "checked_mask",
    "plain",
]

_FINER, _COUNT = (torch.int32, torch.int64, torch.float64), torch.int32
"""Types that hold what float32 does not."""

_DIGITS = 256
"""How many times its range an image may lie from zero: float32 resolves 1/65,000 of the range then."""


def plain(name: str, value: Any, half: bool = False) -> Tensor:
    """Detached float32 (or, where allowed, half precision) tensor without metadata; TypeError for no real tensor.

    Every pair is contiguous, as the kernels want it and files in Fortran's order are not.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.is_complex():
        raise TypeError(f"{name} must be real, got dtype {value.dtype}")
    if hasattr(value, "as_tensor"):  # a MetaTensor; MONAI takes seconds to import, and need not be here
        value = value.as_tensor()
    keep = half and value.dtype in (torch.float16, torch.bfloat16)
    value = value.detach() if keep else value.detach().to(torch.float32)
    return value if value.dim() == 0 or not len(value) or value[0].is_contiguous() else value.contiguous()


def plain_images(fixed: Any, moving: Any, half: bool = False) -> tuple[Tensor, Tensor]:
    """:func:`plain` of both; an offset that leaves float32 too few digits for the rest is subtracted before.

    It is one for both images where their intensities overlap, so that differences stay what they are.
    """
    given = [plain(name, image, half) for name, image in (("fixed", fixed), ("moving", moving))]
    if fixed.shape == moving.shape and fixed.dim() > 2 and any(x.dtype in _FINER for x in (fixed, moving)):
        lows, highs = zip(*(_extremes(image) for image in (fixed, moving)), strict=True)
        sizes = [torch.maximum(low.abs(), high.abs()) for low, high in zip(lows, highs, strict=True)]
        wanting = [bool((size > _DIGITS * (h - low)).any()) for size, h, low in zip(sizes, highs, lows, strict=True)]
        if any(wanting):
            common = (lows[0] <= highs[1]) & (lows[1] <= highs[0])
            for k, image in enumerate((fixed, moving)):
                shift = torch.where(common, torch.minimum(*lows), lows[k]).to(torch.promote_types(image.dtype, _COUNT))
                given[k] = plain("image", image - shift.view(*shift.shape, *[1] * (image.dim() - 2)))
    return given[0], given[1]


def _extremes(image: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest finite value of every channel, ``(B, C)`` each, float64."""
    wide = image.as_tensor() if hasattr(image, "as_tensor") else image
    flat = wide.detach().flatten(2).double()
    finite = torch.isfinite(flat)
    low, high = flat.masked_fill(~finite, math.inf).amin(2), flat.masked_fill(~finite, -math.inf).amax(2)
    return low.nan_to_num(0, 0, 0), high.nan_to_num(0, 0, 0)


def check_images(fixed: Tensor, moving: Tensor) -> None:
    """Two ``(B, C, *S)`` images, 2D or 3D, of the same shape and device, every axis at least 2 voxels."""
    for name, image in (("fixed", fixed), ("moving", moving)):
        if image.dim() not in (4, 5):
            raise ValueError(f"{name} must be (B, C, H, W) or (B, C, H, W, D), got shape {tuple(image.shape)}")
        if image.numel() == 0:
            raise ValueError(f"{name} must not be empty, got shape {tuple(image.shape)}")
        if min(image.shape[2:]) < 2:
            raise ValueError(f"{name} must have at least 2 voxels along every axis, got shape {tuple(image.shape)}")
    if fixed.shape[2:] != moving.shape[2:] or fixed.shape[0] != moving.shape[0]:
        raise ValueError(
            "fixed and moving must have the same batch size and grid, got shapes "
            f"{tuple(fixed.shape)} and {tuple(moving.shape)}; resample one onto the other first"
        )
    if fixed.shape[1] != moving.shape[1]:
        raise ValueError(f"fixed and moving must have the same channels, got {fixed.shape[1]} and {moving.shape[1]}")
    if fixed.device != moving.device:
        raise ValueError(f"fixed and moving must be on one device, got {fixed.device} and {moving.device}")
    if fixed.dim() == 4 and fixed.shape[0] == 1 and fixed.shape[1] > 16:
        warnings.warn(
            f"fixed is taken for {fixed.shape[1]} channels in 2D, got shape {tuple(fixed.shape)}; one image in 3D is "
            "(1, 1, H, W, D)",
            stacklevel=3,
        )


def check_field(name: str, ddf: Tensor, batch: int, size: Sequence[int], device: torch.device) -> None:
    """A finite ``(B, n, *S)`` field on the grid of the fixed image."""
    expected = (batch, len(size), *size)
    if tuple(ddf.shape) != expected:
        raise ValueError(f"{name} must be (B, n, *S) = {expected} on the grid of fixed, got shape {tuple(ddf.shape)}")
    if ddf.device != device:
        raise ValueError(f"{name} must be on the device of fixed, {device}, got {ddf.device}")
    check_finite(name, ddf)


def check_shown(name: str, image: Tensor, mask: Tensor | None) -> None:
    """An image ``(B, C, *S)`` that is finite where its mask ``(B, 1, *S)`` is not zero."""
    if mask is None:
        hint = f"; a background of NaN becomes one of zeros by {name}.nan_to_num(0), and a mask keeps it from counting"
        check_finite(name, image, hint)
    else:
        check_finite(name, image.masked_fill(mask == 0, 0), " where neither mask nor lesion hides it")


def checked_mask(mask: Any, image: Tensor, name: str = "mask", of: str = "fixed") -> Tensor:
    """Weights ``(B, 1, *S)`` in [0, 1] on the grid of the image ``of``, not all zero for any pair, float32.

    A mask of zeros and one other positive value, as 255, means zeros and ones.
    """
    mask = plain(name, mask)
    expected = (image.shape[0], 1, *image.shape[2:])
    if tuple(mask.shape) != expected:
        raise ValueError(f"{name} must be (B, 1, *S) = {expected} on the grid of {of}, got shape {tuple(mask.shape)}")
    if mask.device != image.device:
        raise ValueError(f"{name} must be on the device of {of}, {image.device}, got {mask.device}")
    check_finite(name, mask)
    low, high = float(mask.min()), float(mask.max())
    if high > 1:
        largest = mask.flatten(1).amax(1).view(-1, *[1] * (mask.dim() - 1))
        if bool(((mask == 0) | (mask == largest)).all()):
            mask = (mask > 0).to(mask.dtype)
            high = 1.0
    if low < 0 or high > 1:
        raise ValueError(
            f"{name} must be weights in [0, 1], or zeros and one other positive value, got values from {low:g} to "
            f"{high:g}"
        )
    if empty := (mask.flatten(1).amax(1) == 0).nonzero().flatten().tolist():
        raise ValueError(f"{name} must not be zero everywhere, got that for pairs {empty}")
    return mask


def guides_of(guidance: Any) -> tuple[Guidance, ...]:
    """What guides, as a tuple; TypeError for anything else."""
    if guidance is None:
        return ()
    guides = (guidance,) if isinstance(guidance, Guidance) else guidance
    if not isinstance(guides, Sequence) or not all(isinstance(one, Guidance) for one in guides):
        raise TypeError(f"guidance must be a Guidance, a sequence of them, or None, got {guidance!r}")
    return tuple(guides)


def check_guidance(guidance: Any, fixed: Tensor) -> tuple[Guidance, ...]:
    """:func:`guides_of`, each fit for the images."""
    guides = guides_of(guidance)
    for one in guides:
        one.check(fixed)
    return guides


def check_together(symmetric: bool, promised: bool, guided: bool, lesions: bool, regularized: bool) -> None:
    """ValueError for what excludes each other of the arguments of :func:`monai_lm.refine`.

    Args:
        symmetric: whether both images move.
        promised: whether the damping asks what a step promises, which guidance and regulariser are no part of.
        guided: whether something guides.
        lesions: whether there are lesions.
        regularized: whether there is a regulariser.
    """
    if symmetric and guided:
        raise ValueError("guidance must be None with symmetric=True: it is of the fixed image's points")
    if symmetric and lesions:
        raise ValueError("lesion and moving_lesion must be None with symmetric=True, whose two fields both give way")
    for name, given in (("guidance", guided), ("regularizer", regularized)):
        if promised and given:
            raise ValueError(
                f"{name} must be None with a control that compares what a step promised, as 'trust_region'"
            )


def check_spacing(spacing: Sequence[float] | None, n: int) -> tuple[float, ...]:
    """``n`` positive edge lengths; ones if ``None``."""
    if spacing is None:
        return (1.0,) * n
    message = f"spacing must be {n} positive numbers, one per axis, got {spacing}"
    try:
        values = () if isinstance(spacing, str) else tuple(float(s) for s in spacing)
    except (TypeError, ValueError) as error:
        raise ValueError(message) from error
    if len(values) != n or not all(0 < s < math.inf for s in values):
        raise ValueError(message)
    if max(values) > 1e6 * min(values):
        raise ValueError(f"spacing must not differ by more than a factor of a million between axes, got {spacing}")
    return values
