"""How smooth a field must be, place by place: what one half of the voxels makes of it must hold for the other half.

Where images are noisy, or show textures that do not correspond, a field follows what happens to look alike. That is no
use to voxels that had no part in it. So the fixed image is divided like a chequerboard, the pair is refined on the
voxels of either colour, with several degrees of smoothness, and the voxels of the other colour tell which of them is
the best around there.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from monai_lm.fields import gaussian_smooth, warp
from monai_lm.similarity import Similarity
from monai_lm.similarity.weighted import continued
from monai_lm.solver.pyramid import make_level, move_field, shrink
from monai_lm.solver.result import RefinementResult
from monai_lm.solver.smoothing import Adaptive, Elastic

__all__ = ["MOST", "REDUCTION", "SMOOTHER", "adapted", "halves_of"]

SMOOTHER = (1.2, 2.4)
"""Degrees of smoothness that are tried beside the usual one, ``sigma`` of :class:`Elastic`; the last one is also that
of places where no refinement holds."""

REDUCTION = 2
"""Of the images that are divided; what holds there is taken for all levels."""

MOST = 20
"""Iterations of a level, at most: more of them decide no better."""

_BLOCK = 6
"""Edge of a block in voxels of the reduced images: wider than the windows of the measures."""

_AROUND = 100
"""Blocks, as many as that, over which a place asks what is best, by a Gaussian."""

_CERTAIN = 2.0
"""Standard errors by which a smoother field, or none, must be the better one."""

_WIDTH, _EPSILON = 5, 2e-3
"""Of the windows in which images are compared, as those of :class:`monai_lm.similarity.LNCC`."""


@torch.no_grad()
def adapted(
    fixed: Tensor,
    moving: Tensor,
    prediction: Tensor | None,
    masks: tuple[Tensor | None, Tensor | None],
    edges: Sequence[float],
    usual: Elastic,
    measure: Similarity,
    refined: Callable[..., RefinementResult],
) -> Adaptive:
    """Find out how smooth the residual must be in which places.

    Args:
        fixed: ``(B, C, *S)``.
        moving: ``(B, C, *S)``.
        prediction: ``(B, n, *S)`` in voxels, or ``None``.
        masks: of the fixed and of the moving image, ``(B, 1, *S)``, or ``None``.
        edges: of a voxel, per axis.
        usual: what the residual is smoothed by where nothing else is better.
        measure: what is minimised on the finest level; of one that learns a map of intensities, images are compared as
            it makes them.
        refined: :func:`monai_lm.refine` with the settings that suit the reduced images, but for their ``spacing``.
    """
    pairs = len(fixed)
    grid, level = (make_level(fixed.shape[2:], edges, scale) for scale in (1, REDUCTION))

    def twice(values: Tensor) -> Tensor:
        """Once for each half."""
        return values.repeat(2, *[1] * (values.dim() - 1))

    images = (
        one if mask is None else continued(one.float(), mask > 0)
        for one, mask in zip((fixed, moving), masks, strict=True)
    )
    still, image = (twice(shrink(one.float(), level)) for one in images)
    start = None if prediction is None else twice(move_field(prediction.float(), grid, level))
    shown, other = (None if mask is None else twice(shrink(mask.float(), level).clamp(0, 1)) for mask in masks)
    fitted, judging, blocks = halves_of(level.size, fixed.device)
    fitted, judging = (half.repeat_interleave(pairs, 0) for half in (fitted, judging))
    if shown is not None:
        fitted, judging = fitted * shown, judging * shown
    empty = ~fitted.flatten(1).any(1).view(-1, *[1] * (fitted.dim() - 1))  # of one colour all is hidden: none judges
    fitted = torch.where(empty, torch.ones_like(fitted) if shown is None else shown, fitted)
    judging = judging * ~empty
    pool = F.avg_pool3d if len(blocks) == 3 else F.avg_pool2d

    def per_block(values: Tensor) -> Tensor:
        halves = pool(values * judging, blocks, blocks, ceil_mode=True)
        return halves[:pairs] + halves[pairs:]

    weight = per_block(torch.ones_like(judging))
    spacing = [edge * factor for edge, factor in zip(edges, level.factor, strict=True)]
    degrees = [usual.sigma, *(sigma for sigma in SMOOTHER if sigma > usual.sigma)]
    with warnings.catch_warnings():  # the refinement that follows gives them
        warnings.simplefilter("ignore")
        fields = [
            refined(still, image, start, fitted, moving_mask=other, spacing=spacing, smooth_residual=sigma).ddf
            for sigma in degrees
        ]
    degrees, fields = [*degrees, degrees[-1]], [*fields, torch.zeros_like(fields[0]) if start is None else start]
    lying = warp(image, fields[0])
    _, of_fixed, of_moving = measure.decided(still, lying, shown).matched(still, lying, shown)
    known, seen = of_fixed(still)[:, :1], of_moving(image)[:, :1]
    fits = [per_block(_alike(known, warp(seen, field), judging)) / weight.clamp(min=1e-6) for field in fields]
    best = _best(fits, weight)
    squares = torch.tensor(degrees, device=fixed.device).square()
    share = ((squares - squares[0]) / (squares[-1] - squares[0]).clamp(min=1e-6))[best]
    for axis, (block, length) in enumerate(zip(blocks, level.size, strict=True), 2):
        share = share.repeat_interleave(block, axis).narrow(axis, 0, length)
    return Adaptive(usual, Elastic(degrees[-1]), gaussian_smooth(share, _BLOCK / 2).clamp(0, 1))


def halves_of(size: Sequence[int], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Divide a grid like a chequerboard; axes with fewer voxels than two blocks are not divided.

    Returns:
        ``(2, 1, *S)``, ones in the blocks of either colour, which a field is fitted to; ``(2, 1, *S)``, ones in those
        of the other colour but for the voxels at their faces, which are seen through the windows; and the edges of a
        block in voxels.
    """
    blocks = tuple(_BLOCK if length >= 2 * _BLOCK else length for length in size)
    colour = torch.zeros(*size, dtype=torch.long, device=device)
    for axis, (length, block) in enumerate(zip(size, blocks, strict=True)):
        number = torch.arange(length, device=device) // block
        colour = colour + number.view(-1, *[1] * (len(size) - axis - 1))
    dark = (colour % 2).float()[None, None]
    fitted = torch.cat([dark, 1 - dark])
    pool = F.max_pool3d if len(size) == 3 else F.max_pool2d
    return fitted, 1 - pool(fitted, 3, 1, 1), blocks


def _best(fits: Sequence[Tensor], weight: Tensor) -> Tensor:
    """Number of the candidate ``(B, 1, *blocks)`` that fits best around a block; the first one unless it is certain."""
    divided = sum(length > 1 for length in weight.shape[2:])
    sigma = _AROUND ** (1 / max(divided, 1)) / (4 * math.pi) ** 0.5
    total = gaussian_smooth(weight, sigma).clamp(min=1e-6)
    scores = [torch.zeros_like(weight)]
    for values in fits[1:]:
        gain = values - fits[0]
        mean = gaussian_smooth(weight * gain, sigma) / total
        variance = (gaussian_smooth(weight * gain.square(), sigma) / total - mean.square()).clamp(min=0)
        scores.append(mean - _CERTAIN * (variance / _AROUND).sqrt())
    return torch.cat(scores, 1).argmax(1, keepdim=True)


def _alike(fixed: Tensor, warped: Tensor, weight: Tensor) -> Tensor:
    """Squared local correlation ``(B, 1, *S)``, of the voxels with a weight."""
    pool = F.avg_pool3d if fixed.dim() == 5 else F.avg_pool2d

    def mean(values: Tensor) -> Tensor:
        return pool(values * weight, _WIDTH, 1, _WIDTH // 2) / total

    total = pool(weight, _WIDTH, 1, _WIDTH // 2).clamp(min=1e-6)
    least = [_EPSILON * _variance(image, weight) for image in (fixed, warped)]
    f, w = mean(fixed), mean(warped)
    variances = [(mean(fixed * fixed) - f * f).clamp(min=0), (mean(warped * warped) - w * w).clamp(min=0)]
    covariance = mean(fixed * warped) - f * w
    known, other = (variance + floor for variance, floor in zip(variances, least, strict=True))
    return covariance.square() / (known * other).clamp(min=1e-12)


def _variance(image: Tensor, weight: Tensor) -> Tensor:
    """Of the voxels with a weight, ``(B, 1, *1)``."""
    axes = tuple(range(1, image.dim()))
    total = weight.sum(axes, keepdim=True).clamp(min=1e-6)
    mean = (image * weight).sum(axes, keepdim=True) / total
    return ((image - mean).square() * weight).sum(axes, keepdim=True) / total
