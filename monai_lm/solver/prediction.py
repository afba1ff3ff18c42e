"""Whether a predicted field is one at all: what is folded nearly everywhere, or worse than none, does not count."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from monai_lm.fields.sampling import warp
from monai_lm.fields.topology import folded_cells
from monai_lm.similarity import Similarity
from monai_lm.solver.pyramid import Level, make_level, move_field, shrink
from monai_lm.solver.trust import per_voxel

__all__ = ["believed"]

_FOLDED = 0.5
"""Part of the cells: a mirrored axis folds nearly all; what published networks predict, some thousandths, and a network
that was trained for some minutes, a twentieth."""

_WORSE = 0.02
"""Of the dissimilarity without a field; below, a field is as good as none, and may be what a training starts with."""


def believed(
    ddf: Tensor, fixed: Tensor, moving: Tensor, similarity: Similarity, finest: Level, spacing: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """The predicted field, zero for pairs whose prediction cannot be meant; looked at on half the resolution.

    Args:
        ddf: ``(B, n, *S)`` displacement in voxels.
        fixed: ``(B, C, *S)``.
        moving: ``(B, C, *S)``.
        similarity: by which images are alike.
        finest: grid of field and images.
        spacing: voxel edge per axis.

    Returns:
        ``ddf`` itself where every pair is believed, else a copy; and which pairs are, ``(B,)`` bool.

    Warns:
        UserWarning: a field is replaced by zero, with the likely reason.
    """
    level = make_level(finest.size, spacing, 2)
    field = move_field(ddf, finest, level)
    folded = folded_cells(field).flatten(1).float().mean(1)
    images = [shrink(image.to(torch.promote_types(image.dtype, torch.float32)), level) for image in (fixed, moving)]
    measure = similarity.unaligned
    reference, source = measure.prepare(*images)
    without, with_it = (measure.evaluate(x, reference)[0] for x in (source, warp(source, field)))
    worse = with_it > without + _WORSE * without.abs()
    wrong = (folded > _FOLDED) | worse
    if not bool(wrong.any()):
        return ddf, ~wrong
    for pair in wrong.nonzero().flatten().tolist():
        told = f"folds in {float(folded[pair]):.0%} of its cells" if float(folded[pair]) > _FOLDED else ""
        if bool(worse[pair]):
            told += " and " * bool(told) + "makes the images less alike than no field does"
        warnings.warn(
            f"ddf of pair {pair} {told}, so it is not used: the pair starts from the identity. Likely reasons: "
            "its channels are not in the order of the array axes, an axis is mirrored, it is not in voxels (but in "
            "millimetres, or normalised), or it leads from the moving to the fixed image",
            stacklevel=6,
        )
    return ddf.masked_fill(per_voxel(wrong, ddf), 0.0), ~wrong
