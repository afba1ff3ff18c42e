"""LNCC across contrasts: the one image is first brought into the other one's contrast, as the images teach it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from monai_lm.kernels.devices import widest_float
from monai_lm.kernels.reference import over_voxels, spatial_gradient
from monai_lm.similarity.base import Matched, Range, Similarity, standard_range
from monai_lm.similarity.lncc import LNCC
from monai_lm.similarity.mind import MIND

__all__ = ["IntensityMap", "MappedLNCC", "intensity_maps", "monotony"]

_FLAT = 40.0
"""A voxel counts half where this many times its squared gradient is the usual one at borders."""

_NARROW, _WIDE, _LITTLE = 1.0, 6.0, 1e-3
"""Standard deviations in bins that a joint histogram is smoothed by: always, and, so much weaker, where it is empty."""

_CHANCE = 1e-9
"""Probability by chance of a cell of the joint histogram, at least."""

_SLAB = 2**20  # voxels that are looked at together


class MappedLNCC(LNCC):
    """LNCC of two images of any two contrasts, of which one is brought into the other one's contrast.

    The better of two :func:`intensity_maps`, of the fixed image's intensities and of the moving one's, is learned at
    the start of every level, from the images on the finest grid as they lie on each other by then, and held until
    the next; the iterations are those of :class:`~monai_lm.similarity.LNCC`. Coarser
    than half the resolution, where little is known of the contrasts, :class:`~monai_lm.similarity.MIND` leads, and
    apart from it this measure itself; the refinement begins where either half of the fixed image comes to the more
    alike fields, see :mod:`monai_lm.solver.halves`. As a loss on its own it learns the map from the two images that it
    is given, and the derivative is that of both.

    The map is one function of intensity: tissues that are alike in the image that is mapped, and not in the other one,
    become their mean. So it is the image that tells more tissues apart that is mapped.

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
        return MIND(), self

    @override
    def matched(self, fixed: Tensor, warped: Tensor, weight: Tensor | None = None) -> Matched:
        of_fixed, of_moving = intensity_maps(fixed, warped, weight, self.bins)
        return Matched(LNCC(self.radius, self.epsilon), of_fixed, of_moving)

    @override
    def described(self, fixed: Tensor, moving: Tensor) -> tuple[Tensor, Tensor]:
        of_fixed, of_moving = intensity_maps(fixed, moving, None, self.bins)
        return of_fixed(fixed), of_moving(moving)

    @override
    def ranges(self, fixed: Tensor, moving: Tensor) -> tuple[Range, Range]:
        return standard_range(fixed), standard_range(moving)

    @override
    def loss_and_derivative(self, warped: Tensor, fixed: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = warped.detach().requires_grad_()
            mapped = self.described(fixed, leaf)
        lncc, (reference, image) = LNCC(self.radius, self.epsilon), (one.detach() for one in mapped)
        loss, of_image = lncc.loss_and_derivative(image, reference)
        _, of_reference = lncc.loss_and_derivative(reference, image)  # either image may be the fixed one
        learned = [(one, d) for one, d in zip(mapped, (of_reference, of_image), strict=True) if one.requires_grad]
        (derivative,) = torch.autograd.grad([one for one, _ in learned], leaf, [d for _, d in learned])
        return loss, derivative


@dataclass(frozen=True)
class IntensityMap:
    """A piecewise linear function of intensity for every image and channel.

    Attributes:
        low: ``(B, C)`` where the first piece starts.
        width: ``(B, C)`` from there to the end of the last one; beyond, the function is constant.
        values: ``(B, C, bins)`` at the ends of the pieces, in [0, 1]: 0 is the least intensity of the other image.
        shares: ``(B, C, bins)`` of the voxels that it was learned from at the ends of the pieces.
        better: ``(B, C)``, images that it is for: it explains more of the other one than that one's map of it does.
    """

    low: Tensor
    width: Tensor
    values: Tensor
    shares: Tensor
    better: Tensor

    @property
    def monotony(self) -> Tensor:
        """Rise over all its ups and downs, 1 if it only rises or only falls, ``(B, C)``.

        A piece counts with the root of the share of voxels that it is of, or the commonest tissue alone would decide.
        """
        rises = self.values.diff(dim=2) * (self.shares[..., 1:] + self.shares[..., :-1]).sqrt()
        return rises.sum(2).abs() / rises.abs().sum(2).clamp(min=torch.finfo(rises.dtype).tiny)

    def __call__(self, image: Tensor) -> Tensor:
        """The image ``(B, C, *S)`` in its precision, mapped where the map is the better one."""
        if not bool(self.better.any()):
            return image
        bins, mapped = self.values.shape[2], []
        better = self.better.view(*self.better.shape, *(1 for _ in image.shape[2:]))
        for first, count in _slabs(image):
            slab = image.narrow(2, first, count)
            cell, beyond = _cells(slab, self.low, self.width, bins)
            lower, upper = (self.values.gather(2, cell + k) for k in (0, 1))
            found = (lower + beyond * (upper - lower)).to(image.dtype).view(slab.shape)
            mapped.append(torch.where(better, found, slab))
        return torch.cat(mapped, 2)


def intensity_maps(
    fixed: Tensor, warped: Tensor, weight: Tensor | None = None, bins: int = 48
) -> tuple[IntensityMap, IntensityMap]:
    """Which intensity of the warped image an intensity of the fixed one corresponds to, and the other way round.

    It is the mean of the warped intensities in the joint histogram ``p`` at the intensity ``f``, each with the weight
    ``max(0, p(f, w) - p(f) p(w))² / (p(f) p(w))``, its part of χ²: so what comes together by chance, since the images
    do not lie on each other yet, does not draw the map to the mean, and rare intensities count like common ones.
    Voxels count where both images are flat: there, a small misalignment changes nothing. The better of the two maps
    explains more of the variance of what it leads to, with the same weights.

    Args:
        fixed: ``(B, C, *S)``.
        warped: ``(B, C, *S)``; the maps may be differentiated with respect to it.
        weight: ``(B, 1, *S)``, at least 0, of voxels; ``None``: one.
        bins: of each image.

    Returns:
        The map of the fixed image and that of the moving one.
    """
    weights = [None] * len(fixed) if weight is None else weight.split(1)
    pairs = [_maps(*pair, bins) for pair in zip(fixed.split(1), warped.split(1), weights, strict=True)]
    of_fixed, of_moving = zip(*pairs, strict=True)
    return _joined(of_fixed), _joined(of_moving)


def _joined(maps: Sequence[IntensityMap]) -> IntensityMap:
    """The maps of the pairs of a batch as one."""
    return IntensityMap(*(torch.cat(parts) for parts in zip(*(vars(one).values() for one in maps), strict=True)))


def monotony(fixed: Tensor, warped: Tensor, weight: Tensor | None = None, bins: int = 48) -> Tensor:
    """That of the better of the :func:`intensity_maps`, ``(B, C)``; the arguments are theirs."""
    of_fixed, of_moving = intensity_maps(fixed, warped, weight, bins)
    return torch.where(of_fixed.better, of_fixed.monotony, of_moving.monotony)


def _maps(fixed: Tensor, warped: Tensor, weight: Tensor | None, bins: int) -> tuple[IntensityMap, IntensityMap]:
    """The maps of one pair: sums must not depend on what else is in a batch."""
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
    beyond = _beyond_chance(joint)
    values, other_values = (_expected(one) for one in (beyond, beyond.mT))
    better = _explained(beyond.detach(), values.detach()) >= _explained(beyond.detach().mT, other_values.detach())
    shares, other_shares = (_share(joint.detach().sum(axis)) for axis in (3, 2))
    return (
        IntensityMap(low, width, values, shares, better),
        IntensityMap(other_low, other_width, other_values, other_shares, ~better),
    )


def _beyond_chance(joint: Tensor) -> Tensor:
    """What comes together more often than by chance: each cell's part of χ², ``(B, C, bins, bins)``."""
    narrow = _gaussian(joint, _NARROW)
    narrow = narrow / narrow.sum(0)
    p = narrow @ joint @ narrow.mT
    p = p / p.sum((2, 3), keepdim=True).clamp(min=torch.finfo(joint.dtype).tiny)
    chance = p.sum(3, keepdim=True) * p.sum(2, keepdim=True)
    return (p - chance).clamp(min=0).square() / (chance + _CHANCE)


def _expected(beyond: Tensor) -> Tensor:
    """Where in [0, 1] the columns that belong to a row lie, ``(B, C, bins)``."""
    at = torch.linspace(0, 1, beyond.shape[2], dtype=beyond.dtype, device=beyond.device)
    wide = _gaussian(beyond, _WIDE)
    total, moment = (values + _LITTLE * (values @ wide) for values in (beyond.sum(3), beyond @ at))
    return moment / total.clamp(min=torch.finfo(beyond.dtype).tiny)


def _explained(beyond: Tensor, values: Tensor) -> Tensor:
    """The part of the columns' variance that ``values`` of the rows explain, at most 1, ``(B, C)``."""
    at = torch.linspace(0, 1, beyond.shape[2], dtype=beyond.dtype, device=beyond.device)
    share = _share(beyond.flatten(2)).view_as(beyond)
    mean = (share.sum(2) @ at)[..., None, None]
    left, whole = ((share * (at - center).square()).sum((2, 3)) for center in (values[..., None], mean))
    return 1 - left * _inverse(whole)


def _gaussian(histogram: Tensor, sigma: float) -> Tensor:
    """Of the distances of two bins, ``(bins, bins)``."""
    at = torch.arange(histogram.shape[2], dtype=histogram.dtype, device=histogram.device)
    return torch.exp(-0.5 * ((at[:, None] - at) / sigma).square())


def _share(counts: Tensor) -> Tensor:
    """Of their sum over the last axis."""
    return counts / counts.sum(-1, keepdim=True).clamp(min=torch.finfo(counts.dtype).tiny)


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
