"""LNCC where the contrasts of two images correspond, and the measure for any two contrasts where they do not."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from monai_lm.similarity.base import Similarity
from monai_lm.similarity.lncc import LNCC
from monai_lm.similarity.mapped import MappedLNCC, monotony

__all__ = ["Auto"]

_MONOTONE = 0.8
"""Least :func:`~monai_lm.similarity.mapped.monotony` of images that LNCC is taken for. On pairs of four anatomies it
tells contrasts that are the same or inverted from all others (``python -m benchmarks contrasts``)."""


class Auto(MappedLNCC):
    """LNCC or :class:`MappedLNCC`: :func:`monai_lm.refine` aligns the images coarsely, and looks which one suits them.

    LNCC it is where what is brighter in the fixed image is brighter in the moving one, or darker, all over the range;
    the refinement then starts again, and is that of LNCC. A batch has one measure: LNCC, where that suits all pairs. As
    a loss on its own, which has no such start, it is ``MappedLNCC``.
    """

    undecided = True

    @override
    def decided(self, fixed: Tensor, warped: Tensor, weight: Tensor | None = None) -> Similarity:
        if bool((monotony(fixed, warped, weight, self.bins) >= _MONOTONE).all()):
            return LNCC(self.radius, self.epsilon)
        return MappedLNCC(self.radius, self.epsilon, self.bins)
