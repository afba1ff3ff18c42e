"""Where a field is not to be trusted: the way back, found on its own, does not lead where the way there came from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from monai_lm.fields import compose, gaussian_smooth, invert
from monai_lm.solver.checks import check_field, check_images, check_spacing, plain
from monai_lm.solver.refinement import refine
from monai_lm.solver.smoothing import Elastic

__all__ = ["uncertainty"]

_REACH = 2.0
"""Standard deviation of the Gaussian over which disagreement is averaged, in voxels of the finest axis: one voxel by
itself is right by chance. On known warps of four anatomies (validation) 1 to 3 rank errors alike, 0 and 4 worse."""


def uncertainty(
    fixed: Tensor,
    moving: Tensor,
    ddf: Tensor,
    prediction: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    moving_mask: Tensor | None = None,
    spacing: Sequence[float] | None = None,
    **settings: Any,
) -> Tensor:
    """How far a refined field may be off at every voxel, by a second refinement, from the fixed to the moving image.

    What the images tell, both find; what they do not, noise and smoothness fill in, each time differently. The map is
    the root mean square, over a Gaussian of two voxels, of where there and back again ends beside its start.

    Args:
        fixed: ``(B, C, *S)``, as it was given to :func:`monai_lm.refine`.
        moving: ``(B, C, *S)``, likewise.
        ddf: ``(B, n, *S)`` refined field, in voxels on the fixed grid.
        prediction: ``(B, n, *S)`` that the refinement began with, or ``None``; its inverse starts the second one.
        mask: as for the refinement.
        moving_mask: as for the refinement.
        spacing: voxel edge per axis, in millimetres. Default: 1.
        settings: of :func:`monai_lm.refine`; not ``guidance`` nor ``symmetric``. ``smooth_residual="auto"``, the
            default, is the usual smoothness here.

    Returns:
        ``(B, 1, *S)`` in millimetres, float32 on the fixed grid. It ranks errors better than it measures them; see
        ``python -m benchmarks uncertainty`` for how well.

    Raises:
        TypeError: as :func:`monai_lm.refine`.
        ValueError: as :func:`monai_lm.refine`, or with those two.
    """
    if settings.get("guidance"):
        raise ValueError("guidance must not be given: it belongs to the fixed image, and the way back has none")
    if settings.get("symmetric"):
        raise ValueError("symmetric must not be set: there and back again would end where it starts by construction")
    fixed, moving = (plain(name, image) for name, image in (("fixed", fixed), ("moving", moving)))
    check_images(fixed, moving)
    size, n = fixed.shape[2:], fixed.dim() - 2
    ddf = plain("ddf", ddf)
    check_field("ddf", ddf, len(fixed), size, fixed.device)
    edges = check_spacing(spacing, n)
    if settings.get("smooth_residual", "auto") == "auto":  # a way back that is held would say that nothing is missed
        settings["smooth_residual"] = Elastic()
    back = None if prediction is None else invert(plain("prediction", prediction))[0]
    there = refine(moving, fixed, back, moving_mask, moving_mask=mask, spacing=spacing, **settings).ddf
    with torch.no_grad():
        missed = compose(there, ddf.float())
        square = sum((missed[:, a : a + 1] * edge).square_() for a, edge in enumerate(edges))
        assert isinstance(square, Tensor)  # for mypy: there are axes
        return gaussian_smooth(square, [_REACH * min(edges) / edge for edge in edges]).clamp_(min=0).sqrt_()
