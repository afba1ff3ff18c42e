"""What a similarity measure is: prepared once per level, evaluated once per iteration."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

__all__ = ["Similarity", "standardize"]


class Similarity(ABC):
    """A dissimilarity to be minimised: a sum over voxels of a per-voxel loss, averaged over channels.

    ``prepare`` sees the two images once; ``evaluate`` is a pure function of tensors, called at every iteration.
    Calling the measure itself gives a loss that autograd can differentiate, with the closed-form derivative.
    """

    closed_form = True
    """Whether ``evaluate`` is made of tensor operations only, so that a compiler can fuse it."""

    standardized = False
    """Whether images are shifted and scaled to zero mean and unit variance first; the measure must not care."""

    def prepare(self, fixed: Tensor, moving: Tensor) -> tuple[tuple[Any, ...], Tensor]:
        """Shift and scale both images if the measure allows it, and compute what depends on the fixed image only.

        Args:
            fixed: ``(B, C, *S)``.
            moving: ``(B, C, *M)``.

        Returns:
            The tensors that ``evaluate`` takes as ``reference``, and the moving image to warp.
        """
        if self.standardized:
            fixed, moving = standardize(fixed)[0], standardize(moving)[0]
        return self.reference(fixed), moving

    def reference(self, fixed: Tensor) -> tuple[Tensor, ...]:
        """Tensors derived from the (shifted and scaled) fixed image that every evaluation needs."""
        return (fixed,)

    @abstractmethod
    def evaluate(self, warped: Tensor, reference: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """Value and derivative.

        Args:
            warped: ``(B, C, *S)`` the warped moving image that ``prepare`` returned.
            reference: what ``prepare`` returned.

        Returns:
            The loss ``(B,)``, summed over voxels, and its derivative with respect to ``warped``, ``(B, C, *S)``.
        """

    def loss_and_derivative(self, warped: Tensor, fixed: Tensor) -> tuple[Tensor, Tensor]:
        """Loss ``(B,)`` and its derivative with respect to ``warped`` as it was passed in, ``(B, C, *S)``."""
        if not self.standardized:
            return self.evaluate(warped, self.reference(fixed))
        warped, scale = standardize(warped)
        loss, derivative = self.evaluate(warped, self.reference(standardize(fixed)[0]))
        axes = tuple(range(2, warped.dim()))
        along = (derivative * warped).mean(axes, keepdim=True)  # mean and scale depend on the image, too
        return loss, (derivative - derivative.mean(axes, keepdim=True) - along * warped) / scale

    def __call__(self, warped: Tensor, fixed: Tensor) -> Tensor:
        """Loss per pair ``(B,)``, differentiable with respect to ``warped`` (not ``fixed``)."""
        return _ClosedForm.apply(warped, fixed, self)


def standardize(image: Tensor) -> tuple[Tensor, Tensor]:
    """Zero mean and unit variance for every image and channel; a constant channel becomes zero.

    Args:
        image: ``(B, C, *S)``.

    Returns:
        The standardised image and the divisor ``(B, C, 1, …)``.
    """
    axes = tuple(range(2, image.dim()))
    largest = image.abs().amax(axes, keepdim=True).clamp(min=torch.finfo(image.dtype).tiny)
    image = image / largest  # squares of very large or small intensities would leave the range of float32
    centred = image - image.mean(axes, keepdim=True)
    centred = centred - centred.mean(axes, keepdim=True)  # once more: the first mean of a large offset is rounded
    scale = centred.square().mean(axes, keepdim=True).sqrt()
    constant = scale <= 1e-6
    scale = torch.where(constant, torch.ones_like(scale), scale)
    return torch.where(constant, torch.zeros_like(centred), centred / scale), scale * largest


class _ClosedForm(torch.autograd.Function):
    """Hand the closed-form derivative to autograd."""

    @staticmethod
    def forward(ctx: Any, warped: Tensor, fixed: Tensor, similarity: Similarity) -> Tensor:
        with torch.autocast(warped.device.type, enabled=False):
            loss, derivative = similarity.loss_and_derivative(warped.detach(), fixed.detach())
        ctx.save_for_backward(derivative)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (derivative,) = ctx.saved_tensors
        return derivative * grads[0].view(-1, *[1] * (derivative.dim() - 1)), None, None
