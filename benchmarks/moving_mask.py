"""A lesion that only the moving image has: masked, told, neither, and what the weight's own derivative would do."""

from __future__ import annotations

from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from monai_lm import kernels, refine
from monai_lm.fields import gaussian_smooth, warp
from monai_lm.fields.algebra import lengths
from monai_lm.similarity import Similarity, get_similarity
from monai_lm.similarity.base import Range
from monai_lm.similarity.weighted import Weighted, shown, with_moving_weight

__all__ = ["Exact", "moving_mask"]

WAYS = ("no lesion", "no mask", "mask", "lesion", "mask, exact")


def moving_mask(
    similarities: tuple[str, ...] = ("lncc", "mse", "ncc", "mi"),
    size: tuple[int, ...] = (64, 60),
    pairs: int = 24,
) -> None:
    """Warp textures with known fields, put a bright ball into the moving one, and tell the end-point errors in voxels.

    They are told where the mask leads, within four voxels of where it does not, and under it.

    Args:
        similarities: names of measures.
        size: voxels per axis.
        pairs: how many, each with a texture, field and place of the ball of its own.
    """
    print("| similarity | | visible | beside the lesion | under it |\n|---|---|---|---|---|")
    for similarity in similarities:
        errors: dict[str, list[list[float]]] = {way: [] for way in WAYS}
        for seed in range(pairs):
            fixed, healthy, truth, mask = _case(size, seed)
            moving = torch.where(mask > 0, healthy, 6.0)
            exact = Exact(get_similarity(similarity))
            fields = [
                refine(fixed, healthy, similarity=similarity),
                refine(fixed, moving, similarity=similarity),
                refine(fixed, moving, similarity=similarity, moving_mask=mask),
                refine(fixed, moving, similarity=similarity, moving_lesion=1 - mask),
                refine(
                    torch.cat([torch.ones_like(mask), fixed], 1),
                    with_moving_weight(shown(moving, mask), mask),
                    similarity=exact,
                ),
            ]
            for way, result in zip(WAYS, fields, strict=True):
                errors[way].append(_errors(result.ddf, truth, mask))
        for way, rows in errors.items():
            print(f"| {similarity} | {way} | {' | '.join(f'{fmean(row):.3f}' for row in zip(*rows, strict=True))} |")
        both = [zip(*errors[way], strict=True) for way in ("mask, exact", "mask")]
        apart = [[a - b for a, b in zip(*columns, strict=True)] for columns in zip(*both, strict=True)]
        told = [f"{fmean(d):+.3f} (s.e. {stdev(d) / len(d) ** 0.5:.3f})" for d in apart]
        print(f"| {similarity} | exact less mask | {' | '.join(told)} |")


class Exact(Similarity):
    """A measure that counts with a warped weight, and differentiates it, too; by autograd.

    The weight is the first channel of the moving image; the first channel of the fixed image is not looked at.

    Args:
        measure: a measure that is ``weighable``.
    """

    def __init__(self, measure: Similarity) -> None:
        self.weighted = Weighted(measure, fixed=False, moving=True)

    def ranges(self, fixed: Tensor, moving: Tensor) -> tuple[Range, Range]:
        """As the measure shifts and scales the images; the weight stays as it is."""
        return self.weighted.ranges(fixed[:, 1:], moving)

    def reference(self, fixed: Tensor, weight: Tensor | None = None) -> tuple[Any, ...]:
        """What the measure's reference is made of."""
        return self.ranged_reference(fixed, None, weight)

    def ranged_reference(self, fixed: Tensor, range_: Range, weight: Tensor | None = None) -> tuple[Any, ...]:
        """The same of an image that is still to be shifted and scaled."""
        return self.weighted.ranged_reference(fixed[:, 1:], range_, weight)

    def evaluate(self, warped: Tensor, reference: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """Loss ``(B,)`` and derivative ``(B, C, *S)``, of the weight, too; see :class:`Similarity`."""
        fixed, range_, _ = reference
        with torch.enable_grad(), kernels.using("reference"):
            both = warped.detach().clone().requires_grad_()
            mean = both[:, :1].mean(tuple(range(1, both.dim())), keepdim=True)
            counts = self.weighted.measure.ranged_reference(fixed, range_, both[:, :1] / mean)
            loss = self.weighted.measure.evaluate(both[:, 1:], counts)[0]
            (derivative,) = torch.autograd.grad(loss.sum(), both)
        return loss.detach(), derivative


def _case(size: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fixed and moving image, the field between them, and a mask of all but a ball of the moving image."""
    generator = torch.Generator().manual_seed(seed)

    def smooth(channels: int, sigma: float) -> Tensor:
        return gaussian_smooth(torch.randn(1, channels, *size, generator=generator), sigma)

    fine, coarse, truth = smooth(1, 1.5), smooth(1, 4.0), smooth(len(size), 6.0)
    moving = fine / fine.std() + coarse / coarse.std()
    truth = truth * (3 / truth.abs().max())
    centre = (torch.rand(len(size), generator=generator) - 0.5) * 0.8
    axes = [torch.linspace(-1, 1, s) - c for s, c in zip(size, centre.tolist(), strict=True)]
    distance = torch.stack(torch.meshgrid(*axes, indexing="ij")).square().sum(0).sqrt()[None, None]
    return warp(moving, truth), moving, truth, (distance > 0.25).float()


def _errors(ddf: Tensor, truth: Tensor, mask: Tensor) -> list[float]:
    """Mean end-point errors, in voxels, where the mask leads, beside, and under where it is zero."""
    leads = warp(mask, truth)
    hidden = (leads < 0.5).float()
    pool = torch.nn.functional.max_pool2d if ddf.dim() == 4 else torch.nn.functional.max_pool3d
    visible = leads > 0.99
    miss = lengths(ddf - truth)[:, None]
    return [float(miss[where].mean()) for where in (visible, visible & (pool(hidden, 9, 1, 4) > 0), hidden > 0)]
