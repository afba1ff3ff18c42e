"""What a guidance is, and how it pulls beside the images.

A guidance tells how far it is from being satisfied, and pulls: with a field ``u`` whose length, in the metric of the
step, depends on how far it is violated, not on the sizes of images and labels or the numbers of labels and points: at
most 1 for keypoints, some 10 for labels. It goes to zero as the guidance is satisfied. With ``g`` the smoothed gradient
of the images, ``T = Σ |g|² / Σ |g|`` its typical length when a level starts, and ``w`` the weights, the step is made of
``(g + T Σ w u) / (1 + |Σ w u|)``: ``w u`` of length 1 pulls as hard as the images do where they pull, and no weight
makes a voxel's gradient so large that the damping, which is one number, would stop the rest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from monai_lm import kernels
from monai_lm.kernels.reference import over_voxels

__all__ = ["Grid", "Guidance", "Guide", "Term"]


@dataclass(frozen=True)
class Grid:
    """The grid of a level, which shares its centre with that of the images.

    Attributes:
        full: voxels per axis of the images' grid.
        edges: voxel edge per axis of the images' grid, in millimetres.
        size: voxels per axis.
        factor: length of the voxels in voxels of the images, per axis.
        unit: of the metric of the step, in voxels of every axis.
        sigma: of the Gaussian on the gradient, in voxels per axis.
    """

    full: tuple[int, ...]
    edges: tuple[float, ...]
    size: tuple[int, ...]
    factor: tuple[float, ...]
    unit: tuple[float, ...]
    sigma: tuple[float, ...]

    def onto(self, voxel: float, axis: int) -> float:
        """A position along an axis of the images' grid, in voxels of this one."""
        return (voxel - (self.full[axis] - 1) / 2) / self.factor[axis] + (self.size[axis] - 1) / 2

    def back(self, voxel: float, axis: int) -> float:
        """A position along an axis of this grid, in voxels of the images."""
        return (voxel - (self.size[axis] - 1) / 2) * self.factor[axis] + (self.full[axis] - 1) / 2


class Term(ABC):
    """A guidance on the grid of a level."""

    @abstractmethod
    def evaluate(self, ddf: Tensor, pull: Tensor | None, weight: float) -> Tensor:
        """How far the guidance is from being satisfied.

        Args:
            ddf: ``(B, n, *S)`` displacement of the whole map in voxels of the level.
            pull: ``(B, n, *S)`` that ``weight · u`` is added to, in the direction in which the loss rises; ``None``:
                only the loss is asked for.
            weight: of the guidance.

        Returns:
            The loss ``(B,)``, not weighted, which needs no number of voxels.
        """


class Guidance(ABC):
    """What a refinement is guided by; an argument of :func:`monai_lm.refine`.

    Attributes:
        weight: how hard it pulls, relative to the images.
    """

    weight: float

    @abstractmethod
    def check(self, fixed: Tensor) -> None:
        """Whether it fits to images ``(B, C, *S)``; ValueError if not."""

    @abstractmethod
    def at(self, grid: Grid) -> Term:
        """The guidance on the grid of a level."""


class Guide:
    """All that guides one level.

    Args:
        guidance: what guides.
        grid: of the level.
    """

    def __init__(self, guidance: Sequence[Guidance], grid: Grid) -> None:
        self.terms = [(one.at(grid), one.weight) for one in guidance]
        self.unit, self.voxels = grid.unit, torch.Size(grid.size).numel()
        self._typical: Tensor | None = None

    def loss(self, residual: Tensor | None, prediction: Tensor | None, like: Tensor) -> Tensor:
        """What is added to the sum of dissimilarities over voxels, ``(B,)``.

        Args:
            residual: ``(B, n, *S)``, ``None`` for zero.
            prediction: ``(B, n, *S)`` or ``None``.
            like: ``(B, n, *S)`` of the shape of a residual.
        """
        return self._evaluate(self._whole(residual, prediction, like), None)

    def pull(self, residual: Tensor, prediction: Tensor | None, gradient: Tensor) -> Tensor:
        """The loss as :meth:`loss` has it, and its pull in ``gradient`` ``(B, n, *S)``, the images' smoothed one."""
        ddf = self._whole(residual, prediction, gradient)
        pull = torch.zeros_like(ddf)
        loss = self._evaluate(ddf, pull)
        del ddf
        if self._typical is None:
            sums = kernels.gradient_sums(gradient, self.unit)
            typical = (sums[:, 1] / sums[:, 2]).nan_to_num(0.0, 0.0, 0.0)
            self._typical = torch.where(typical > 0, typical, 1.0)
        rest = torch.zeros_like(pull[:, 0])
        for axis, unit in enumerate(self.unit):
            rest.addcmul_(pull[:, axis], pull[:, axis], value=unit**2)
        rest = rest.sqrt_().add_(1).reciprocal_().unsqueeze(1)
        pull.mul_(over_voxels(self._typical, pull)).add_(gradient).mul_(rest)
        gradient.copy_(pull)
        return loss

    def _evaluate(self, ddf: Tensor, pull: Tensor | None) -> Tensor:
        losses = [weight * term.evaluate(ddf, pull, weight) for term, weight in self.terms]
        return self.voxels * torch.stack(losses).sum(0)

    @staticmethod
    def _whole(residual: Tensor | None, prediction: Tensor | None, like: Tensor) -> Tensor:
        """Displacement of ``(id + prediction) ∘ (id + residual)``, in float32 at least."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        if residual is None:
            return torch.zeros_like(like, dtype=dtype) if prediction is None else prediction.to(dtype)
        if prediction is None:
            return residual.to(dtype)
        out = torch.empty_like(residual, dtype=dtype)
        kernels.compose(prediction.to(dtype), residual.to(dtype), out)
        return out
