"""The two images of a refinement: what of them counts, and how they are kept."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from monai_lm.similarity import Similarity
from monai_lm.similarity.outliers import without_outliers
from monai_lm.similarity.weighted import Weighted, counted, shown, with_moving_weight, with_weight
from monai_lm.solver.checks import check_shown, checked_mask
from monai_lm.solver.memory import halved
from monai_lm.solver.run import Problem, Settings

__all__ = ["Masks", "constant_pairs", "normal", "refined_images", "weighted"]

Masks = tuple[Tensor | None, Tensor | None]
"""Of the fixed and of the moving image, ``(B, 1, *S)``."""

_STEPS = 64
"""Values from the smallest to the largest that an image should have; bfloat16 has 128 from zero."""


def weighted(
    measures: Sequence[Similarity], images: tuple[Tensor, Tensor], masks: Masks, symmetric: bool
) -> tuple[Sequence[Similarity], Masks]:
    """Measures that count what the masks of the fixed and of the moving image show, and the masks; all checked.

    Where both images move, both have a mask then, or none.
    """
    mask = _hiding(masks[0], images[0], "mask", "fixed")
    moving_mask = _hiding(masks[1], images[1], "moving_mask", "moving")
    check_shown("fixed", images[0], mask)
    check_shown("moving", images[1], moving_mask)
    if mask is None and moving_mask is None:
        return measures, (None, None)
    if symmetric:
        both = (
            torch.ones_like(image[:, :1]) if m is None else m
            for image, m in zip(images, (mask, moving_mask), strict=True)
        )
        return [Weighted(measure, moving=True) for measure in measures], (next(both), next(both))
    sides = mask is not None, moving_mask is not None
    return [Weighted(measure, *sides) for measure in measures], (mask, moving_mask)


def _hiding(mask: Tensor | None, image: Tensor, name: str, of: str) -> Tensor | None:
    """A mask, checked; one that hides nothing is left out: warped, it would be one but for rounding."""
    if mask is None:
        return None
    mask = checked_mask(mask, image, name, of)
    return None if bool((mask == 1).all()) else mask


def refined_images(
    problem: Problem, masks: Masks, settings: Settings, measures: Sequence[Similarity]
) -> tuple[Tensor, Tensor]:
    """Fixed and moving image as they are refined: with their weights, in the precision of the memory mode."""
    given = list(zip((problem.fixed, problem.moving), masks, problem.lesions, strict=True))
    seen = [normal(image) if own is None else shown(image, own, hidden) for image, own, hidden in given]
    mask, moving_mask = (None if own is None else counted(own, image, hidden) for image, own, hidden in given)
    fixed, moving = without_outliers(*seen)
    if settings.symmetric:
        fixed, moving = torch.cat([fixed, moving]), torch.cat([moving, fixed])
        mask, moving_mask = _twice(mask, moving_mask), _twice(moving_mask, mask)
    fixed = fixed if mask is None else with_weight(fixed, mask)
    moving = moving if moving_mask is None else with_moving_weight(moving, moving_mask)
    return halved(fixed, moving, measures) if settings.memory == "half" else (fixed, moving)


def _twice(mask: Tensor | None, other: Tensor | None) -> Tensor | None:
    return None if mask is None or other is None else torch.cat([mask, other])


def normal(tensor: Tensor) -> Tensor:
    """Copy of an inference tensor that may take part in autograd; any other tensor itself."""
    return tensor.clone() if tensor.is_inference() else tensor


def constant_pairs(images: tuple[Tensor, Tensor], masks: Masks, kinds: Sequence[torch.dtype]) -> Tensor:
    """Pairs of which an image has one value only, or where its mask leaves it, ``(B,)``, with a warning.

    The moving image is judged on the fixed grid, where the two overlap: it may have been brought there.

    Another one names images of few values, because they lie too far from zero for the types ``kinds`` they came in.
    """
    found = []
    for image, mask, kind in zip(images, masks, kinds, strict=True):
        upper, lower = (image if mask is None else image.masked_fill(mask == 0, s * float("inf")) for s in (-1, 1))
        high, low = upper.flatten(2).amax(2).float(), lower.flatten(2).amin(2).float()
        least = _STEPS * torch.finfo(kind).eps if kind.is_floating_point else 0.0
        far = (high > low) & (high - low < least * torch.maximum(high.abs(), low.abs()))
        found.append((high.amax(1) == low.amin(1), far, low))
    told = torch.stack([row for same, far, _ in found for row in (same, far.any(1))]).tolist()
    for k, (name, mask, kind) in enumerate(zip(("fixed", "moving"), masks, kinds, strict=True)):
        where = "" if mask is None else " where masks and lesions leave it"
        still, coarse = ([number for number, yes in enumerate(row) if yes] for row in told[2 * k : 2 * k + 2])
        if still:
            on = " on the grid of fixed" if name == "moving" else ""
            hint = ". What it shows may lie elsewhere: do the images overlap?" if on else ""
            warnings.warn(
                f"{name} is constant{on}{where} in pairs {still}; their field is returned unchanged{hint}", stacklevel=3
            )
        if coarse:
            offset = float(found[k][2][found[k][1]][0])
            warnings.warn(
                f"{name} has fewer than {_STEPS} values{where} in pairs {coarse}, as {kind} tells no more apart so far "
                f"from zero; subtract the offset, {offset:.9g}, before they become {kind}",
                stacklevel=3,
            )
    return found[0][0] | found[1][0]
