"""A measure that counts some voxels and not others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from monai_lm.similarity.base import Matched, Range, Similarity

__all__ = ["Weighted", "continued", "counted", "filled", "shown", "with_moving_weight", "with_weight"]

COUNTED = 1
"""Voxels beyond the outer border of a mask that count as it does. On validation pairs, masks that end at the border of
what is compared, of the fixed image and of both: Dice .763 and .769 without it, .798 and .791 with it for eight
hippocampi (.794 without masks); .733 and .744, .731 and .776 for four hearts (.732 without)."""
BESIDE = 3
"""Voxels beyond the outer border of a mask that are seen."""


class Weighted(Similarity):
    """Another measure, with a weight for every voxel of the fixed image, of the moving image, or of both.

    The fixed image has its weight as its last channel, see :func:`with_weight`; the moving image as its first, see
    :func:`with_moving_weight`, and that one is warped with it. A voxel counts with the product of the two, and the loss
    is the weighted mean times the number of voxels: none of it is won by leading voxels out of the mask.

    The derivative is that of the loss with the weights held fixed: what a shift of the warped weight would change is
    left out, see ``docs/method.md``.

    Args:
        measure: a measure that is ``weighable``.
        fixed: whether the fixed image has a weight.
        moving: whether the moving image has one.

    Raises:
        ValueError: the measure cannot weigh voxels.
    """

    def __init__(self, measure: Similarity, fixed: bool = True, moving: bool = False) -> None:
        if not measure.weighable:
            name = "mask" if fixed else "moving_mask"
            raise ValueError(
                f"{name} must be None for a similarity that cannot weigh voxels, got one with "
                f"{type(measure).__name__}; LNCC, MappedLNCC, MI, MIND, MSE, NCC and their combinations can"
            )
        self.measure, self.weighs_fixed, self.weighs_moving = measure, fixed, moving
        self.invariant = measure.invariant
        self.learns, self.undecided = measure.learns, measure.undecided

    @property
    @override
    def unaligned(self) -> Similarity:
        return self._of(self.measure.unaligned)

    @property
    @override
    def starts(self) -> tuple[Similarity, ...]:
        return tuple(self._of(measure) for measure in self.measure.starts)

    @override
    def matched(self, fixed: Tensor, warped: Tensor, weight: Tensor | None = None) -> Matched:
        measure, of_fixed, of_moving = self.measure.matched(*self._apart(fixed, warped, weight))
        last, first = int(self.weighs_fixed), int(self.weighs_moving)

        def fixed_beside(image: Tensor) -> Tensor:
            parts = image.split([image.shape[1] - last, last], 1)
            return torch.cat([of_fixed(parts[0]), parts[1]], 1)

        def moving_beside(image: Tensor) -> Tensor:
            return torch.cat([image[:, :first], of_moving(image[:, first:])], 1)

        return Matched(self._of(measure), fixed_beside, moving_beside)

    @override
    def decided(self, fixed: Tensor, warped: Tensor, weight: Tensor | None = None) -> Similarity:
        return self._of(self.measure.decided(*self._apart(fixed, warped, weight)))

    def _of(self, measure: Similarity) -> Weighted:
        return Weighted(measure, self.weighs_fixed, self.weighs_moving)

    def _apart(self, fixed: Tensor, warped: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Both images without their weights, and the product of all weights."""
        channels, first = fixed.shape[1] - int(self.weighs_fixed), int(self.weighs_moving)
        for own in (fixed[:, channels:], warped[:, :first]):
            if own.shape[1]:
                weight = own if weight is None else weight * own
        return fixed[:, :channels], warped[:, first:], weight

    def described(self, fixed: Tensor, moving: Tensor) -> tuple[Tensor, Tensor]:
        """As the measure describes the images; the weights stay as they are."""
        if self.learns:  # what does not count must not teach
            measure, map_fixed, map_moving = self.matched(fixed, moving)
            return measure.described(map_fixed(fixed), map_moving(moving))
        image, own = (fixed[:, :-1], fixed[:, -1:]) if self.weighs_fixed else (fixed, fixed[:, :0])
        first = int(self.weighs_moving)
        shown = moving[:, first:]
        of_fixed, of_moving = self.measure.described(image, shown)
        if of_fixed is image and of_moving is shown:
            return fixed, moving
        return torch.cat([of_fixed, own], 1), torch.cat([moving[:, :first], of_moving], 1)

    def ranges(self, fixed: Tensor, moving: Tensor) -> tuple[Range, Range]:
        """As the measure shifts and scales the images; the weights stay as they are."""
        return self._beside(self.measure.ranges, fixed, moving)

    def image_ranges(self, fixed: Tensor, moving: Tensor) -> tuple[Range, Range]:
        """The same for images that are still to be described."""
        return self._beside(self.measure.image_ranges, fixed, moving)

    def _beside(
        self, ranges: Callable[[Tensor, Tensor], tuple[Range, Range]], fixed: Tensor, moving: Tensor
    ) -> tuple[Range, Range]:
        """Ranges of the images, and of the moving one's weight, which stays as it is."""
        image = fixed[:, :-1] if self.weighs_fixed else fixed
        of_fixed, of_moving = ranges(image, moving[:, int(self.weighs_moving) :])
        if self.weighs_moving and of_moving is not None:
            shift, factor = of_moving
            of_moving = (
                torch.cat([torch.zeros_like(shift[:, :1]), shift], 1),
                torch.cat([torch.ones_like(factor[:, :1]), factor], 1),
            )
        return of_fixed, of_moving

    def reference(self, fixed: Tensor, weight: Tensor | None = None) -> tuple[Any, ...]:
        """The measure's reference, or what it is made of where the moving image has a weight."""
        return self.ranged_reference(fixed, None, weight)

    def ranged_reference(self, fixed: Tensor, range_: Range, weight: Tensor | None = None) -> tuple[Any, ...]:
        """The same of an image that is still to be shifted and scaled; its weight is not."""
        if self.weighs_fixed:
            fixed, own = fixed[:, :-1], fixed[:, -1:]
            weight = own if weight is None else own * weight
        return (fixed, range_, weight) if self.weighs_moving else self.measure.ranged_reference(fixed, range_, weight)

    def evaluate(self, warped: Tensor, reference: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """Loss ``(B,)`` and derivative ``(B, C, *S)``, zero for the warped weight; see :class:`Similarity`."""
        if not self.weighs_moving:
            return self.measure.evaluate(warped, reference)
        given, there = self._counted(warped[:, :1].clone(), reference)
        loss, derivative = self.measure.evaluate(warped[:, 1:], given)
        return _unless_nothing_counts(loss, there), torch.cat([torch.zeros_like(warped[:, :1]), derivative], 1)

    def evaluate_into(self, warped: Tensor, reference: tuple[Any, ...], out: Tensor) -> Tensor:
        """Loss ``(B,)``, and its derivative in ``out`` ``(B, C, *S)``; see :class:`Similarity`.

        ``out`` has no channel for a warped weight, and that one is overwritten by the weights that count.
        """
        if not self.weighs_moving:
            return self.measure.evaluate_into(warped, reference, out)
        given, there = self._counted(warped[:, :1], reference)
        return _unless_nothing_counts(self.measure.evaluate_into(warped[:, 1:], given, out), there)

    def _counted(self, weight: Tensor, reference: tuple[Any, ...]) -> tuple[tuple[Any, ...], Tensor]:
        """The measure's reference for a warped weight ``(B, 1, *S)``, and where it is not zero everywhere, ``(B,)``.

        The weight is overwritten: times that of the fixed image, brought to mean 1.
        """
        fixed, range_, own = reference
        if own is not None:
            weight.mul_(own)
        axes = tuple(range(1, weight.dim()))
        mean = weight.mean(axes, keepdim=True, dtype=torch.promote_types(weight.dtype, torch.float32))
        there = mean > 0
        weight.mul_(torch.where(there, 1 / mean, mean).to(weight.dtype))
        return self.measure.ranged_reference(fixed, range_, weight), there.flatten()


def _unless_nothing_counts(loss: Tensor, there: Tensor) -> Tensor:
    return torch.where(there, loss, float("inf"))


def with_weight(fixed: Tensor, mask: Tensor) -> Tensor:
    """A fixed image ``(B, C, *S)``, :func:`shown` already, with a weight as its last channel, ``(B, C + 1, *S)``.

    The weight is the mask ``(B, 1, *S)``, brought to mean 1.
    """
    weight = mask / mask.mean(tuple(range(2, mask.dim())), keepdim=True)
    return torch.cat([fixed, weight.to(fixed.dtype)], 1)


def with_moving_weight(moving: Tensor, mask: Tensor) -> Tensor:
    """A moving image ``(B, C, *M)``, :func:`shown` already, with its mask as its first channel, ``(B, 1 + C, *M)``."""
    return torch.cat([mask.to(moving.dtype), moving], 1)


def counted(mask: Tensor, image: Tensor, hidden: Tensor | None = None) -> Tensor:
    """A mask ``(B, 1, *S)`` of an image ``(B, C, *S)`` that counts a voxel further, outside of all it shows.

    A border between an organ and what is around lies between two voxels, and only both of them tell it. Where the image
    is not finite, and in what shall be ``hidden`` ``(B, 1, *S)``, nothing counts.
    """
    pool = F.max_pool2d if mask.dim() == 4 else F.max_pool3d
    further = (mask == 0) & _outside(mask > 0) & torch.isfinite(image).all(1, keepdim=True)
    if hidden is not None:
        further &= hidden == 0
    return torch.where(further, pool(mask, 2 * COUNTED + 1, 1, COUNTED), mask)


def shown(image: Tensor, mask: Tensor, hidden: Tensor | None = None) -> Tensor:
    """An image ``(B, C, *S)`` as a mask ``(B, 1, *S)`` shows it: as it is where that is not zero, and next to it.

    Next to it only outside: where a straight line along an axis leads to the grid's border without meeting the mask,
    so not in a hole, which hides a lesion. Elsewhere, in what shall be ``hidden`` ``(B, 1, *S)``, and where it is not
    finite, the image is :func:`continued`, so that nothing there is seen: not by what shrinks the image, nor by what
    scales its intensities. Most voxels next to the mask do not count, but without them an object whose mask ends at its
    border had no border, in one of the images: on coarse levels, whose voxels at the border are partly beyond, a field
    gained from leading the other image's border out of the mask.
    """
    counts = mask > 0
    beside = counts
    for axis in range(2, mask.dim()):
        for _ in range(BESIDE):
            size, before = mask.shape[axis] - 1, beside
            beside = before.clone()
            beside.narrow(axis, 0, size).logical_or_(before.narrow(axis, 1, size))
            beside.narrow(axis, 1, size).logical_or_(before.narrow(axis, 0, size))
    seen = (counts | (beside & _outside(counts))) & torch.isfinite(image).all(1, keepdim=True)
    return continued(image, seen if hidden is None else seen & (hidden == 0))


def filled(image: Tensor, mask: Tensor, hidden: Tensor | None = None) -> Tensor:
    """An image ``(B, C, *S)`` :func:`continued` into the holes of a mask ``(B, 1, *S)``, and as it is outside of it.

    It is continued, too, into what shall be ``hidden`` ``(B, 1, *S)``. For what looks at whole images, and knows what
    is around an organ, as a network does.
    """
    seen = (mask > 0) | _outside(mask > 0)
    return continued(image, seen if hidden is None else seen & (hidden == 0))


def _outside(counts: Tensor) -> Tensor:
    """Where a straight line along an axis leads to the grid's border without meeting a mask ``(B, 1, *S)``."""
    empty, outside = (~counts).to(torch.uint8), torch.zeros_like(counts)
    for axis in range(2, counts.dim()):
        outside |= empty.cumprod(axis, dtype=torch.uint8) > 0
        outside |= empty.flip(axis).cumprod(axis, dtype=torch.uint8).flip(axis) > 0
    return outside


def continued(image: Tensor, mask: Tensor) -> Tensor:
    """An image ``(B, C, *M)`` that goes on smoothly where the mask ``(B, 1, *M)`` is zero, as it is beside the hole.

    A warped image is interpolated between what counts and what does not, and its gradient reaches there, so a step at
    the edge of the mask would be taken for an edge of the image. Holes are filled from half the resolution, and that
    in turn from half of it: means over what counts, which see nothing else.
    """
    if bool((mask > 0).all()):
        return image
    wide = torch.promote_types(image.dtype, torch.float32)
    weight, image = mask.to(wide), image.masked_fill(mask == 0, 0)  # what is there may be NaN
    pool, mode = (F.avg_pool2d, "bilinear") if image.dim() == 4 else (F.avg_pool3d, "trilinear")
    halves = [min(2, size) for size in image.shape[2:]]
    means = pool(weight, halves, ceil_mode=True)
    coarse = pool(image.to(wide) * weight, halves, ceil_mode=True) / means.clamp(min=torch.finfo(wide).tiny)
    if max(means.shape[2:]) > 1:
        coarse = continued(coarse, means)
    filled = F.interpolate(coarse, size=image.shape[2:], mode=mode, align_corners=False)
    return torch.where(mask > 0, image, filled.to(image.dtype))
