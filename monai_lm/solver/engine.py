"""What one level keeps in memory, and the passes over it: loss, gradient, step.

In V, the size of one image in float32, an engine keeps beside the two images and a prediction, which are the caller's:
the residual 3, the best residual 3, and 3 more that the warped image and the derivative of the loss share with the
gradient that is made of them and with the residual after the step. With more channels than one, or where a step's
promise needs the images again, those have memory of their own. In half precision all of it is half as much.
"""

from __future__ import annotations

import torch
from torch import Tensor

from monai_lm import kernels
from monai_lm.fields.topology import repair_in_place
from monai_lm.similarity import Similarity
from monai_lm.solver import levenberg
from monai_lm.solver.levenberg import Trust, per_voxel
from monai_lm.solver.pyramid import Level

__all__ = ["Engine"]


class Engine:
    """One level at work: images, prediction, residual, and the passes over them.

    Args:
        level: its grid and units.
        fixed: ``(B, C, *S)`` on the level's grid.
        moving: ``(B, C, *S)``.
        prediction: ``(B, n, *S)`` or ``None``; read, never written.
        residual: ``(B, n, *S)`` to start from; it is overwritten. Its precision is that of all that is kept.
        similarity: what to minimise.
        smooth_gradient: standard deviation of the Gaussian on the gradient, in voxels of the finest axis.
        smooth_residual: the same of the elastic smoothing, in voxels of every axis.
        step: largest displacement per iteration, in voxels of the finest axis.
        window: width of the window of the Hessian.
        keep_gradient: compute the expected decrease of every step.
    """

    def __init__(
        self,
        level: Level,
        fixed: Tensor,
        moving: Tensor,
        prediction: Tensor | None,
        residual: Tensor,
        similarity: Similarity,
        smooth_gradient: float,
        smooth_residual: float,
        step: float,
        window: int,
        keep_gradient: bool,
    ) -> None:
        fixed, self.moving = fixed.contiguous(), moving.contiguous()
        self.prediction = None if prediction is None else prediction.contiguous()
        self.residual, self.similarity, self.unit = residual, similarity, level.unit
        self.sigma, self.elastic = level.in_voxels(smooth_gradient), [smooth_residual] * len(level.size)
        self.step, self.window, self.keep_gradient = step, window, keep_gradient
        fixed_range, self.moving_range = similarity.ranges(fixed, self.moving)
        self.reference = similarity.ranged_reference(fixed, fixed_range)
        self.best: Tensor | None = None
        self.kept: Tensor | None = None
        self.work = torch.empty_like(residual)
        if moving.shape[1] == 1 and not keep_gradient:
            self.warped, self.derivative = self.work[:, :1], self.work[:, 1:2]
        else:
            self.warped, self.derivative = (torch.empty_like(moving, dtype=residual.dtype) for _ in range(2))

    @property
    def voxels(self) -> int:
        """Voxels of the level."""
        return self.moving[0, 0].numel()

    def evaluate(self) -> Tensor:
        """Loss ``(B,)`` at the residual; from now on :attr:`gradient` and :meth:`advance` are those of this point."""
        loss = self.loss(self.residual)
        kernels.gradient(self.warped, self.derivative, self.sigma, self.work)
        return loss

    def loss(self, residual: Tensor | None) -> Tensor:
        """Loss ``(B,)`` at a residual, ``None`` for zero; call :meth:`evaluate` before the next step."""
        shift, factor = self.moving_range or (None, None)
        kernels.sample(self.moving, residual, self.prediction, shift, factor, self.warped)
        return self.similarity.evaluate_into(self.warped, self.reference, self.derivative)

    @property
    def gradient(self) -> Tensor:
        """The smoothed gradient ``(B, n, *S)`` in voxels, after :meth:`evaluate`."""
        return self.work

    def advance(self, trust: Trust, better: Tensor | None, keep: bool) -> Tensor:
        """Take a step; before it, note the residual of pairs that are ``better`` ``(B,)`` as their best.

        Args:
            trust: state of the damping.
            better: pairs whose residual is their best so far; ``None``: note nothing.
            keep: keep the residual so that :meth:`retract` can return to it.

        Returns:
            The first-order decrease that the step promises, ``(B,)``, NaN if not asked for.
        """
        self.note(better, keep)
        image = (self.warped, self.derivative) if self.keep_gradient else None
        expected = levenberg.take_step(
            self.work, self.residual, trust, self.unit, self.step, self.window, image, self.work
        )
        levenberg.relax(self.work, trust, self.elastic, self.residual)
        return expected

    def note(self, better: Tensor | None, keep: bool) -> None:
        """Copy the residual to the best one, where better, and to the kept one; see :meth:`advance`."""
        if better is not None:
            if self.best is None:
                self.best = self.residual.clone()
            else:
                kernels.choose(better, self.residual, self.best)
        if keep:
            self.kept = self.residual.clone() if self.kept is None else self.kept.copy_(self.residual)

    def retract(self, accepted: Tensor) -> None:
        """Return the pairs that are not ``accepted`` ``(B,)`` to the residual that :meth:`advance` kept."""
        if self.kept is not None and not bool(accepted.all()):
            kernels.choose(~accepted, self.kept, self.residual)
            self.evaluate()

    def settle(self, better: Tensor) -> None:
        """Return the pairs whose residual is not ``better`` ``(B,)`` to the best one noted, and give that up."""
        if self.best is not None:
            kernels.choose(~better, self.best, self.residual)
            self.best = None

    def mend(self) -> bool:
        """Repair folds; whether there were any."""
        return repair_in_place(self.residual, self.prediction)

    def displacement(self, better: Tensor) -> Tensor:
        """Field of ``(id + u0) ∘ (id + r)``, for pairs that are not ``better`` ``(B,)`` that of ``r = 0``; float32.

        The field takes the place of the residual, which is given up for it.
        """
        del self.work, self.warped, self.derivative
        wide = torch.promote_types(self.residual.dtype, torch.float32)
        field = self.residual = self.residual.to(wide)
        field.masked_fill_(per_voxel(~better, field), 0.0)
        if self.prediction is not None:
            kernels.compose(self.prediction, field, field)
        return field
