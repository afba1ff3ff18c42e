"""What one level keeps in memory, and the passes over it: loss, gradient, step.

In V, the size of one image in float32, an engine keeps beside the two images and a prediction, which are the caller's:
the residual 3, the best residual 3, and 3 more that the warped image and the derivative of the loss share with the
gradient that is made of them and with the residual after the step. With more channels than one, or where a step's
promise needs the images again, those have memory of their own, 2 per channel. Where a measure takes channels one by
one, no more than eight are warped and derived at a time, and their gradients added, for 3 more. A weight of the moving
image takes 1 more when it is warped. In half precision all of it is half as much. What guides or regularises needs
memory for a moment, see :mod:`monai_lm.guidance` and :mod:`monai_lm.solver.regularizer`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from monai_lm import kernels
from monai_lm.guidance.base import Guide
from monai_lm.similarity import Similarity
from monai_lm.similarity.base import Range
from monai_lm.solver.lesion import Lesion
from monai_lm.solver.method import Method
from monai_lm.solver.regularizer import Regularized
from monai_lm.solver.residual import Residual
from monai_lm.solver.trust import Trust, per_voxel

__all__ = ["Engine"]

_AT_ONCE = 8
"""Channels that are warped and derived at a time."""


class Engine:
    """One level at work: images, prediction, residual, and the passes over them.

    Args:
        fixed: ``(B, C, *S)`` on the residual's grid.
        moving: ``(B, C, *S)``; a measure that ``weighs_moving`` has a weight as a further channel before them.
        prediction: ``(B, n, *S)`` or ``None``; read, never written.
        residual: what is refined; its precision is that of all that is kept.
        similarity: what to minimise.
        method: how.
        smooth_gradient: standard deviation of the Gaussian on the gradient, in voxels of the finest axis.
        step: largest displacement per iteration, in voxels of the finest axis.
        guide: what pulls beside the images, or ``None``.
        regularized: what of the residual is minimised beside the dissimilarity, or ``None``.
        lesion: where the residual follows from around, or ``None``.
    """

    def __init__(
        self,
        fixed: Tensor,
        moving: Tensor,
        prediction: Tensor | None,
        residual: Residual,
        similarity: Similarity,
        method: Method,
        smooth_gradient: float,
        step: float,
        guide: Guide | None = None,
        regularized: Regularized | None = None,
        lesion: Lesion | None = None,
    ) -> None:
        fixed, self.moving = (image.contiguous() for image in similarity.described(fixed, moving))
        self.prediction = None if prediction is None else prediction.contiguous()
        self.residual, self.similarity, self.method, self.step = residual, similarity, method, step
        self.guide, self.regularized, self.lesion = guide, regularized, lesion
        self.unit, self.sigma = residual.level.unit, residual.level.in_voxels(smooth_gradient)
        self.descent = method.descent.start()
        weights, apart = int(similarity.weighs_moving), similarity.by_channel and not method.damping.needs_promise
        self.parts = _parts(similarity, fixed, self.moving, _AT_ONCE if apart else self.moving.shape[1])
        self.sampled, self.derivative, self.work = _memory(
            self.parts[0].channels.stop, weights, residual.field, not method.damping.needs_promise
        )
        self.warped = self.sampled[:, weights:]
        self.other = torch.empty_like(self.work) if len(self.parts) > 1 else self.work
        if lesion is not None:
            self.mend()

    @property
    def voxels(self) -> int:
        """Voxels of the level."""
        return self.moving[0, 0].numel()

    def evaluate(self) -> Tensor:
        """Loss ``(B,)`` at the residual; from now on :attr:`gradient` and :meth:`advance` are those of this point."""
        field, work = self.residual.field, self.work
        loss = self._dissimilarity(field, work)
        if self.regularized is not None:
            loss = loss + self.regularized.pull(field, work)
        return self.over_places(loss if self.guide is None else loss + self.guide.pull(field, self.prediction, work))

    def loss(self, residual: Tensor | None) -> Tensor:
        """Loss ``(B,)`` at a residual, ``None`` for zero; call :meth:`evaluate` before the next step."""
        loss = self._dissimilarity(residual)
        if self.regularized is not None and residual is not None:
            loss = loss + self.regularized.loss(residual)
        if self.guide is not None:
            loss = loss + self.guide.loss(residual, self.prediction, self.residual.field)
        return self.over_places(loss)

    def over_places(self, values: Tensor) -> Tensor:
        """Values ``(B,)`` of pairs, each the mean over the places in the batch that a pair has: one."""
        return values

    def _dissimilarity(self, residual: Tensor | None, gradient: Tensor | None = None) -> Tensor:
        """That of the images, ``(B,)``, and its smoothed gradient where there is memory for it, ``(B, n, *S)``."""
        total: Tensor | None = None
        for part in self.parts:
            moving = self.moving[:, part.channels]
            sampled, warped = (image[:, : moving.shape[1]] for image in (self.sampled, self.warped))
            derivative = self.derivative[:, : warped.shape[1]]
            shift, factor = part.moving_range or (None, None)
            kernels.sample(moving, residual, self.prediction, shift, factor, sampled)
            loss = self.similarity.evaluate_into(sampled, part.reference, derivative)
            if gradient is not None:
                own = gradient if total is None else self.other
                kernels.gradient(warped, derivative, self.sigma, own)
                if part.share < 1:
                    own.mul_(part.share)
                if own is not gradient:
                    gradient.add_(own)
            if part.share < 1:
                loss = part.share * loss
            total = loss if total is None else total + loss
        assert total is not None  # for mypy: images have channels
        return total

    @property
    def gradient(self) -> Tensor:
        """The smoothed gradient ``(B, n, *S)`` in voxels, after :meth:`evaluate`."""
        return self.work

    def advance(self, trust: Trust, better: Tensor) -> Tensor:
        """Take a step; before it, note what the method may want to return to.

        Args:
            trust: state of the method.
            better: pairs whose residual is their best so far, ``(B,)``.

        Returns:
            The first-order decrease that the step promises, ``(B,)``, NaN if the damping does not ask for it.
        """
        if not self.method.acceptance.ends_at_best:
            self.residual.note(better)
        if self.method.acceptance.may_reject:
            self.residual.keep()
        field, work = self.residual.field, self.work
        image = (self.warped, self.derivative) if self.method.damping.needs_promise else None
        expected = self.descent.advance(work, field, trust, self.unit, self.step, image, work)
        self.method.smoothing.relax(work, self.unit, trust.length, field)
        if self.lesion is not None:
            self.lesion.follow(field, trust.active)
        return self.over_places(expected)

    def retract(self, accepted: Tensor) -> None:
        """Return the pairs that are not ``accepted`` ``(B,)`` to where they were before the step."""
        if self.method.acceptance.may_reject and self.residual.retract(accepted):
            self.evaluate()

    def mend(self) -> bool:
        """Repair folds; whether there were any, or there is a lesion, which is looked for anew before."""
        if self.lesion is not None:
            self.lesion.settle(self.residual.field)
        return self.residual.mend(self.prediction) or self.lesion is not None

    def displacement(self, better: Tensor) -> Tensor:
        """Field of ``(id + u0) ∘ (id + r)``, for pairs that are not ``better`` ``(B,)`` that of ``r = 0``; float32.

        The field takes the place of the residual, which is given up for it.
        """
        del self.work, self.sampled, self.warped, self.derivative, self.other
        wide = torch.promote_types(self.residual.field.dtype, torch.float32)
        field = self.residual.field = self.residual.field.to(wide)
        field.masked_fill_(per_voxel(~better, field), 0.0)
        if self.prediction is not None:
            kernels.compose(self.prediction, field, field)
        return field


class _Part(NamedTuple):
    """Channels that are seen together.

    Attributes:
        channels: which of the moving image.
        share: of all channels.
        moving_range: how they are shifted and scaled.
        reference: what the measure knows of those of the fixed image.
    """

    channels: slice
    share: float
    moving_range: Range
    reference: tuple[Any, ...]


def _parts(similarity: Similarity, fixed: Tensor, moving: Tensor, most: int) -> list[_Part]:
    """The channels of both described images in parts of about one size, of at most so many."""
    count = moving.shape[1]
    of_fixed, of_moving = similarity.ranges(fixed, moving)
    if count <= most:
        return [_Part(slice(0, count), 1.0, of_moving, similarity.ranged_reference(fixed, of_fixed))]
    each = -(-count // -(-count // most))
    out = []
    for first in range(0, count, each):
        some = slice(first, first + each)
        ranges = [None if r is None else (r[0][:, some], r[1][:, some]) for r in (of_fixed, of_moving)]
        there = fixed[:, some]
        reference = similarity.ranged_reference(there, ranges[0])
        out.append(_Part(some, there.shape[1] / count, ranges[1], reference))
    return out


def _memory(count: int, weights: int, field: Tensor, shared: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What a level works in, in the precision of the field ``(B, n, *S)``; every pair is contiguous.

    Args:
        count: channels of the moving image that are seen together, ``weights + C``.
        weights: how many of them come first and have no derivative.
        field: what is refined.
        shared: whether the warped image and its derivative may give way to the gradient.

    Returns:
        The warped channels ``(B, weights + C, *S)``, the derivative ``(B, C, *S)`` and the gradient ``(B, n, *S)``, of
        which the image and the derivative of one channel are the first two.
    """
    channels, n = count - weights, field.shape[1]
    if shared and channels == 1:
        whole = field.new_empty(len(field), weights + n, *field.shape[2:])
        work = whole[:, weights:]
        return whole[:, : weights + 1], work[:, 1:2], work
    sampled = field.new_empty(len(field), count, *field.shape[2:])
    return sampled, field.new_empty(len(field), channels, *field.shape[2:]), torch.empty_like(field)
