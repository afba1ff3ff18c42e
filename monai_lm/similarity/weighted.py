"""A measure that counts some voxels and not others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from monai_lm.similarity.base import Range, Similarity

__all__ = ["Weighted", "with_weight"]


class Weighted(Similarity):
    """Another measure, with a weight for every voxel: the last channel of the fixed image, see :func:`with_weight`.

    Args:
        measure: a measure that is ``weighable``.

    Raises:
        ValueError: it is not.
    """

    def __init__(self, measure: Similarity) -> None:
        if not measure.weighable:
            raise ValueError(
                f"mask must be None for a similarity that cannot weigh voxels, got one with {type(measure).__name__}; "
                "LNCC, MI, MIND, MSE, NCC and their combinations can"
            )
        self.measure = measure

    def described(self, fixed: Tensor, moving: Tensor) -> tuple[Tensor, Tensor]:
        """As the measure describes the images; the weight stays as it is."""
        of_fixed, of_moving = self.measure.described(fixed[:, :-1], moving)
        return torch.cat([of_fixed, fixed[:, -1:]], 1), of_moving

    def ranges(self, fixed: Tensor, moving: Tensor) -> tuple[Range, Range]:
        """As the measure shifts and scales the images; the weight stays as it is."""
        return self.measure.ranges(fixed[:, :-1], moving)

    def reference(self, fixed: Tensor, weight: Tensor | None = None) -> tuple[Any, ...]:
        """The measure's reference."""
        return self.ranged_reference(fixed, None, weight)

    def ranged_reference(self, fixed: Tensor, range_: Range, weight: Tensor | None = None) -> tuple[Any, ...]:
        """The same of an image that is still to be shifted and scaled; its weight is not."""
        own = fixed[:, -1:]
        return self.measure.ranged_reference(fixed[:, :-1], range_, own if weight is None else own * weight)

    def evaluate(self, warped: Tensor, reference: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """Loss ``(B,)`` and derivative ``(B, C, *S)``; see :class:`Similarity`."""
        return self.measure.evaluate(warped, reference)

    def evaluate_into(self, warped: Tensor, reference: tuple[Any, ...], out: Tensor) -> Tensor:
        """Loss ``(B,)``, and its derivative in ``out`` ``(B, C, *S)``; see :class:`Similarity`."""
        return self.measure.evaluate_into(warped, reference, out)


def with_weight(fixed: Tensor, mask: Tensor) -> Tensor:
    """The fixed image ``(B, C, *S)`` with a weight as its last channel: the mask ``(B, 1, *S)``, brought to mean 1.

    Where the mask is zero the image becomes its mean over the mask, so that nothing there is seen by anyone: not by
    what shrinks the image, nor by what scales its intensities.
    """
    axes = tuple(range(2, mask.dim()))
    weight = mask / mask.mean(axes, keepdim=True)
    level = (fixed * weight).mean(axes, keepdim=True).to(fixed.dtype)
    return torch.cat([torch.where(mask > 0, fixed, level), weight.to(fixed.dtype)], 1)
