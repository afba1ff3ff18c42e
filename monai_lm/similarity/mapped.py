"""LNCC across contrasts: the fixed image's intensities are first mapped to the moving one's, as the images teach it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from monai_lm.kernels.devices import widest_float
from monai_lm.kernels.reference import over_voxels, spatial_gradient
from monai_lm.similarity.base import Range, Similarity, standard_range
from monai_lm.similarity.lncc import LNCC
from monai_lm.similarity.mi import MI
from monai_lm.similarity.mind import MIND

__all__ = ["IntensityMap", "MappedLNCC", "intensity_map", "monotony"]

_FLAT = 40.0
"""A voxel counts half where this many times its squared gradient is the usual one at borders."""

_NARROW, _WIDE, _LITTLE = 1.0, 6.0, 1e-3
"""Standard deviations in bins that a joint histogram is smoothed by: always, and, so much weaker, where it is empty."""

_CHANCE = 1e-9
"""Probability by chance of a cell of the joint histogram, at least."""

_SLAB = 2**20  # voxels that are looked at together


class MappedLNCC(LNCC):
    """LNCC of the moving image and the fixed one in the moving one's contrast, for images of any two contrasts.

    An :func:`intensity_map` is learned at the start of every level, from the images on the finest grid as they lie on
    each other by then, and held until the next; the iterations are those of :class:`~monai_lm.similarity.LNCC`. Coarser
    than half the resolution, before anything is known of the contrasts, :class:`~monai_lm.similarity.MIND` and
    :class:`~monai_lm.similarity.MI` lead, each on its own; the refinement goes on from where the images are less unlike
    by MIND, and has no history of what was before. As a loss on its own it learns the map from the two images that it
    is given, and the derivative is that of both.

    The map is one function of intensity: tissues that are alike in the fixed image, and not in the moving one, become
    their mean.

    Args:
        radius: as for LNCC.
        epsilon: as for LNCC.
        bins: of each image in the joint histogram, 8 to 256.
    """

    learns = True
    standardized = False  # the map has a part in the derivative

    def __init__(self, radius: int = 2, epsilon: float = 2e-3, bins: int = 48) -> None:
        super().__init__(radius, epsilon)
        if isinstance(bins, bool) or not isinstance(bins, int) or not 8 <= bins <= 256:
            raise ValueError(f"bins must be a whole number from 8 to 256, got {bins!r}")
        self.bins = bins

    @property
    @override
    def unaligned(self) -> Similarity:
        return MIND()

    @property
    @override
    def starts(self) -> tuple[Similarity, ...]:
        return MIND(), MI()

    @override
    def matched(self, fixed: Tensor, warped: Tensor, weight: Tensor | None = None) -> tuple[Similarity, Tensor]:
        return LNCC(self.radius, self.epsilon), self._mapped(fixed, warped, weight)

    @override
    def described(self, fixed: Tensor, moving: Tensor) -> tuple[Tensor, Tensor]:
        return self._mapped(fixed, moving), moving

    def _mapped(self, fixed: Tensor, warped: Tensor, weight: Tensor | None = None) -> Tensor:
        return intensity_map(fixed, warped, weight, self.bins)[0](fixed)

    @override
    def ranges(self, fixed: Tensor, moving: Tensor) -> tuple[Range, Range]:
        return standard_range(fixed), standard_range(moving)

    @override
    def loss_and_derivative(self, warped: Tensor, fixed: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = warped.detach().requires_grad_()
            mapped = self._mapped(fixed, leaf)
        lncc, image = LNCC(self.radius, self.epsilon), mapped.detach()
        loss, derivative = lncc.loss_and_derivative(warped, image)
        if mapped.requires_grad:
            _, of_map = lncc.loss_and_derivative(image, warped)  # either image may be the fixed one
            derivative = derivative + torch.autograd.grad(mapped, leaf, of_map)[0]
        return loss, derivative


@dataclass(frozen=True)
class IntensityMap:
    """A piecewise linear function of intensity for every image and channel.

    Attributes:
        low: ``(B, C)`` where the first piece starts.
        width: ``(B, C)`` from there to the end of the last one; beyond, the function is constant.
        values: ``(B, C, bins)`` at the ends of the pieces, in [0, 1]: 0 is the least intensity of the other image.
    """

    low: Tensor
    width: Tensor
    values: Tensor

    def __call__(self, image: Tensor) -> Tensor:
        """The image ``(B, C, *S)``, mapped, in its precision."""
        bins, mapped = self.values.shape[2], []
        for first, count in _slabs(image):
            slab = image.narrow(2, first, count)
            cell, beyond = _cells(slab, self.low, self.width, bins)
            lower, upper = (self.values.gather(2, cell + k) for k in (0, 1))
            mapped.append((lower + beyond * (upper - lower)).to(image.dtype).view(slab.shape))
        return torch.cat(mapped, 2)


def intensity_map(
    fixed: Tensor, warped: Tensor, weight: Tensor | None = None, bins: int = 48
) -> tuple[IntensityMap, Tensor]:
    """Which intensity of the warped image an intensity of the fixed one corresponds to.

    It is the mean of the warped intensities in the joint histogram ``p`` at the intensity ``f``, each with the weight
    ``max(0, p(f, w) - p(f) p(w))² / (p(f) p(w))``, its part of χ²: so what comes together by chance, since the images
    do not lie on each other yet, does not draw the map to the mean, and rare intensities count like common ones.
    Voxels count where both images are flat: there, a small misalignment changes nothing.

    Args:
        fixed: ``(B, C, *S)``.
        warped: ``(B, C, *S)``; the map may be differentiated with respect to it.
        weight: ``(B, 1, *S)``, at least 0, of voxels; ``None``: one.
        bins: of each image.

    Returns:
        The map, and the share ``(B, C, bins)`` of the counted voxels that lie at its ends of pieces.
    """
    (low, width), (other_low, other_width) = (_extent(image) for image in (fixed, warped))
    flat = _flatness(fixed) * _flatness(warped)
    flat = flat if weight is None else flat * weight
    exact = widest_float(fixed.device)
    joint = torch.zeros(low.numel() * bins * bins, dtype=exact, device=fixed.device)
    table = (torch.arange(low.numel(), device=fixed.device) * bins * bins).view(*low.shape, 1)
    for first, count in _slabs(fixed):
        f, w, share = (image.narrow(2, first, count) for image in (fixed, warped, flat))
        (row, s), (column, t) = _cells(f, low, width, bins), _cells(w, other_low, other_width, bins)
        cell, share = table + row * bins + column, share.flatten(2).to(exact)
        for down, along_rows in enumerate((1 - s, s)):
            for right, along_columns in enumerate((1 - t, t)):
                part = share * along_rows * along_columns
                joint = joint.index_add(0, (cell + down * bins + right).flatten(), part.flatten())
    joint = joint.view(*low.shape, bins, bins)
    shares = joint.detach().sum(3)
    shares = shares / shares.sum(2, keepdim=True).clamp(min=torch.finfo(exact).tiny)
    return IntensityMap(low, width, _expected(joint)), shares


def monotony(fixed: Tensor, warped: Tensor, weight: Tensor | None = None, bins: int = 48) -> Tensor:
    """Rise of the :func:`intensity_map` over all its ups and downs, 1 if it only rises or only falls, ``(B, C)``.

    A piece of the map counts with the root of the share of voxels that it is of, or the commonest tissue alone would
    decide. The arguments are those of the map.
    """
    known, shares = intensity_map(fixed, warped, weight, bins)
    rises = known.values.diff(dim=2) * (shares[..., 1:] + shares[..., :-1]).sqrt()
    return rises.sum(2).abs() / rises.abs().sum(2).clamp(min=torch.finfo(rises.dtype).tiny)


def _expected(joint: Tensor) -> Tensor:
    """Where in [0, 1] the columns of a joint histogram ``(B, C, bins, bins)`` lie that belong to a row."""
    bins = joint.shape[2]
    at = torch.arange(bins, dtype=joint.dtype, device=joint.device)
    narrow, wide = (torch.exp(-0.5 * ((at[:, None] - at) / sigma).square()) for sigma in (_NARROW, _WIDE))
    tiny = torch.finfo(joint.dtype).tiny
    p = narrow @ joint @ (narrow / narrow.sum(0))
    p = p / p.sum((2, 3), keepdim=True).clamp(min=tiny)
    chance = p.sum(3, keepdim=True) * p.sum(2, keepdim=True)
    beyond = (p - chance).clamp(min=0).square() / (chance + _CHANCE)
    total, moment = beyond.sum(3), beyond @ at / (bins - 1)
    total, moment = (values + _LITTLE * (values @ wide) for values in (total, moment))
    return moment / total.clamp(min=tiny)


def _extent(image: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest intensity and range of every image and channel, ``(B, C)`` each."""
    values = image.flatten(2)
    low = values.amin(2)
    return low, values.amax(2) - low


def _cells(image: Tensor, low: Tensor, width: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """The piece that an intensity lies in, and how far, ``(B, C, voxels)`` each."""
    exact = widest_float(image.device)
    factor = (bins - 1) * _inverse(width.to(exact))
    at = ((image.flatten(2).to(exact) - low.to(exact)[..., None]) * factor[..., None]).clamp(0, bins - 1)
    cell = at.detach().long().clamp(max=bins - 2)
    return cell, at - cell


def _flatness(image: Tensor) -> Tensor:
    """A weight in (0, 1] for every voxel, of which background that is cut off changes nothing, ``(B, C, *S)``."""
    image = image.to(torch.promote_types(image.dtype, torch.float32))
    low, width = _extent(image)
    image = (image - over_voxels(low, image)) * over_voxels(_inverse(width), image)
    square = torch.stack([slope.square() for slope in spatial_gradient(image)]).sum(0)
    sums, squares = (values.flatten(2).sum(2) for values in (square, square.square()))
    return 1 / (1 + _FLAT * square * over_voxels(sums * _inverse(squares), image))


def _inverse(values: Tensor) -> Tensor:
    """``1 / values``, of zero zero."""
    there = values > 0
    return torch.where(there, 1 / torch.where(there, values, 1.0), 0.0)


def _slabs(image: Tensor) -> list[tuple[int, int]]:
    """First row and number of rows of parts of an image that are not too large."""
    rows = max(1, _SLAB // max(1, image[:, :, :1].numel()))
    return [(first, min(rows, image.shape[2] - first)) for first in range(0, image.shape[2], rows)]
