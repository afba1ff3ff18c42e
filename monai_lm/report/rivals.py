"""Whether the moving image matches better than its rivals: its own mirror images, and itself in the middle of things.

An optimiser deforms noise, another organ or an image the wrong way round until it looks more like the fixed one; it
does as much with their mirror images. Two images of one thing match best as they are. And what was too far away to be
reached matches better once it is brought there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from monai_lm.similarity import Similarity
from monai_lm.similarity.base import contrast
from monai_lm.solver.pyramid import Level, make_level, shrink
from monai_lm.solver.refinement import refine

__all__ = ["Rivals", "centre_of_mass", "rivals_of"]

_VOXELS = 16_000
"""Of the grid that they are compared on, at most; more cost time and tell the same."""

_COARSER, _COARSEST = 1.1, 64.0

_SAME = 0.05
"""A mirror image that differs from the image by less than this share of its variance, middle on middle, is no rival."""


@dataclass(frozen=True)
class Rivals:
    """Dissimilarities that rivals reach, compared with that of the moving image as it is; see :func:`rivals_of`.

    Attributes:
        best: of the mirror image that matches best, minus that of the image, over the latter: below 0 if the mirror
            image matches better; near 0 with the right image, too, where it is symmetric as a head is.
        mean: the same of all mirror images: near 0 if it does not matter which of them is taken.
        centred: the same of the image with its centre of mass on that of the fixed one; below 0 if that is better.
    """

    best: float = float("nan")
    mean: float = float("nan")
    centred: float = float("nan")


def rivals_of(
    fixed: Tensor,
    moving: Tensor,
    similarity: Similarity,
    spacing: Sequence[float] | None = None,
    mask: Tensor | None = None,
) -> Rivals:
    """Refine the moving image, its mirror images and itself in the middle, all from the identity on a coarse grid.

    It is mirrored about the middle of the grid, along every set of axes. Mirror images that are the image itself, as
    those of a ball are, are left out.

    Args:
        fixed: ``(1, 1, *S)``.
        moving: ``(1, 1, *S)`` on the same grid, where the refinement started.
        similarity: what is compared, and optimised.
        spacing: voxel edge per axis, in any unit; default: 1.
        mask: ``(1, 1, *S)`` weights of the fixed image, or None.

    Returns:
        NaN where there is nothing to compare: constant images, and those that are the same in every mirror.
    """
    edges = tuple(spacing or (1.0,) * (fixed.dim() - 2))
    level = _coarse(fixed.shape[2:], edges)
    still, image = shrink(fixed, level), shrink(moving, level)
    if any(bool((contrast(one) == 0).any()) for one in (still, image)):
        return Rivals()
    tried = [image, _moved(image, _offset(image, still)), *_mirrored(image)]
    images = torch.cat(tried)
    weight = None
    if mask is not None and similarity.weighable:
        weight = shrink(mask.to(still), level).clamp(0, 1).expand(len(tried), *[-1] * (still.dim() - 1))
    coarse = [edge * factor for edge, factor in zip(edges, level.factor, strict=True)]
    result = refine(still.expand_as(images), images, mask=weight, similarity=similarity, spacing=coarse)
    own, centred, *others = result.final_loss.tolist()
    if not own > 0:
        return Rivals()
    if not others:
        return Rivals(centred=centred / own - 1)
    return Rivals(min(others) / own - 1, sum(others) / len(others) / own - 1, centred / own - 1)


def centre_of_mass(image: Tensor) -> tuple[float, ...]:
    """Centre, in voxels, of the voxels ``(*S)`` above the image's mean; the grid's centre for a constant image."""
    inside = (image > image.mean()).nonzero().double()
    if len(inside) == 0:
        return tuple((s - 1) / 2 for s in image.shape)
    return tuple(inside.mean(0).tolist())


def _coarse(size: Sequence[int], edges: Sequence[float]) -> Level:
    """The finest level that has few enough voxels."""
    scale = 1.0
    level = make_level(size, edges, scale)
    while torch.Size(level.size).numel() > _VOXELS and scale < _COARSEST:
        scale *= _COARSER
        level = make_level(size, edges, scale)
    return level


def _mirrored(image: Tensor) -> list[Tensor]:
    """Mirror images along every set of axes that differ from the image."""
    axes = range(2, image.dim())
    found = []
    for some in list(product((False, True), repeat=len(axes)))[1:]:
        other = image.flip([axis for axis, chosen in zip(axes, some, strict=True) if chosen])
        away = _moved(other, _offset(other, image)) - image
        if float(away.square().mean()) > _SAME * float(image.var()):
            found.append(other)
    return found


def _offset(image: Tensor, onto: Tensor) -> list[int]:
    """Voxels from the centre of mass of one ``(1, 1, *S)`` to that of the other."""
    centres = centre_of_mass(onto[0, 0]), centre_of_mass(image[0, 0])
    return [round(b - a) for a, b in zip(*centres, strict=True)]


def _moved(image: Tensor, offset: Sequence[int]) -> Tensor:
    """The image read so many voxels further along every axis, continued by its border."""
    for axis, voxels in enumerate(offset, 2):
        if voxels:
            length = image.shape[axis]
            index = (torch.arange(length, device=image.device) + voxels).clamp(0, length - 1)
            image = image.index_select(axis, index)
    return image
