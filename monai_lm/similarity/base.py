"""What a similarity measure is: prepared once per level, evaluated once per iteration."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from monai_lm import kernels
from monai_lm.kernels.reference import over_voxels, ranged

__all__ = [
    "KernelSimilarity",
    "Matched",
    "Range",
    "Similarity",
    "contrast",
    "normalized",
    "standard_range",
    "standardize",
]

Range = tuple[Tensor, Tensor] | None
"""What is subtracted from an image and what the difference is multiplied by, ``(B, C)`` each; or nothing."""


class Matched(NamedTuple):
    """What a level compares, as two images teach it.

    Attributes:
        measure: of what is compared.
        of_fixed: makes of the fixed image ``(B, C, *S)`` what is compared.
        of_moving: the same of the moving image.
    """

    measure: Similarity
    of_fixed: Callable[[Tensor], Tensor]
    of_moving: Callable[[Tensor], Tensor]


class Similarity(ABC):
    """A dissimilarity to be minimised: a sum over voxels of a per-voxel loss, averaged over channels.

    ``prepare`` sees the two images once; ``evaluate`` is called at every iteration.
    Calling the measure itself gives a loss that autograd can differentiate, with the closed-form derivative.
    """

    standardized = False
    """Whether images are shifted and scaled to zero mean and unit contrast first; the measure must not care."""

    invariant = False
    """Whether ``a I + b`` of either image is all the same to it, so that they may be scaled for another measure."""

    by_channel = False
    """Whether the loss is the mean of what each described channel gives by itself, so that some are seen at a time."""

    weighable = False
    """Whether ``reference`` takes a ``weight`` per voxel, for :class:`monai_lm.similarity.weighted.Weighted`."""

    learns = False
    """Whether a level has what is :meth:`matched`, after one of :attr:`starts` has led through the coarse levels."""

    undecided = False
    """Whether a refinement has to ask :meth:`decided` for its measure."""

    weighs_moving = False
    """Whether the first channel of the moving image is a weight, which ``evaluate_into`` writes no derivative for."""

    @property
    def unaligned(self) -> Similarity:
        """The measure for images that do not lie on each other yet: itself, unless it learns from those that do."""
        return self

    @property
    def starts(self) -> tuple[Similarity, ...]:
        """Measures of which one leads as far as a measure that ``learns`` can begin; else itself."""
        return (self.unaligned,)

    def matched(
        self,
        fixed: Tensor,  # noqa: ARG002
        warped: Tensor,  # noqa: ARG002
        weight: Tensor | None = None,  # noqa: ARG002
    ) -> Matched:
        """What is learned of two images that about lie on each other, for a level.

        The measure itself and the images as they are, unless the measure ``learns``.

        Args:
            fixed: ``(B, C, *S)``.
            warped: ``(B, C, *S)``.
            weight: ``(B, 1, *S)``, at least 0: how much a voxel counts; ``None``: one.
        """
        return Matched(self, _as_it_is, _as_it_is)

    def decided(self, fixed: Tensor, warped: Tensor, weight: Tensor | None = None) -> Similarity:  # noqa: ARG002
        """The measure that suits two images that about lie on each other: itself, unless it is ``undecided``.

        The arguments are those of :meth:`matched`.
        """
        return self

    def prepare(self, fixed: Tensor, moving: Tensor) -> tuple[tuple[Any, ...], Tensor]:
        """Describe both images, shift and scale them if the measure allows it, and do what needs the fixed one only.

        Args:
            fixed: ``(B, C, *S)``.
            moving: ``(B, C, *M)``.

        Returns:
            The tensors that ``evaluate`` takes as ``reference``, and the moving image, described, to warp.
        """
        fixed, moving = self.described(fixed, moving)
        fixed_range, moving_range = self.ranges(fixed, moving)
        return self.ranged_reference(fixed, fixed_range), normalized(moving, moving_range)

    def described(self, fixed: Tensor, moving: Tensor) -> tuple[Tensor, Tensor]:
        """What is compared in the place of the images, ``(B, described_channels(C, n), *S)`` each.

        The images themselves, if a measure does not say otherwise. It is computed once per level, so a moving image is
        described before it is warped. What follows is of described
        images, all but ``loss_and_derivative`` and the call.
        """
        return fixed, moving

    def described_channels(self, channels: int, n: int) -> int:  # noqa: ARG002
        """How many channels :meth:`described` makes of so many, in ``n`` dimensions."""
        return channels

    def ranges(self, fixed: Tensor, moving: Tensor) -> tuple[Range, Range]:
        """How to shift and scale the fixed ``(B, C, *S)`` and the moving image ``(B, C, *M)`` before they are compared.

        A warped image may be shifted and scaled instead of the moving one: the two commute.
        """
        return (standard_range(fixed), standard_range(moving)) if self.standardized else (None, None)

    def image_ranges(self, fixed: Tensor, moving: Tensor) -> tuple[Range, Range]:
        """The same for images that are still to be described, so that half precision can hold them."""
        return self.ranges(fixed, moving)

    def reference(self, fixed: Tensor, weight: Tensor | None = None) -> tuple[Any, ...]:
        """What every evaluation needs of the fixed image, shifted and scaled already.

        Args:
            fixed: ``(B, C, *S)``.
            weight: ``(B, 1, *S)``, at least 0: how much a voxel counts; ``None``: one. Only for ``weighable`` measures.
        """
        return (fixed,) if weight is None else (fixed, weight)

    def ranged_reference(self, fixed: Tensor, range_: Range, weight: Tensor | None = None) -> tuple[Any, ...]:
        """:meth:`reference` of a fixed image that is still to be shifted and scaled."""
        return self.reference(normalized(fixed, range_), *(() if weight is None else (weight,)))

    @abstractmethod
    def evaluate(self, warped: Tensor, reference: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """Value and derivative.

        Args:
            warped: ``(B, C, *S)`` the warped moving image that ``prepare`` returned.
            reference: what ``prepare`` returned.

        Returns:
            The loss ``(B,)``, summed over voxels, and its derivative with respect to ``warped``, ``(B, C, *S)``.
        """

    def evaluate_into(self, warped: Tensor, reference: tuple[Any, ...], out: Tensor) -> Tensor:
        """As :meth:`evaluate`, with the derivative written to ``out`` ``(B, C, *S)``; returns the loss ``(B,)``."""
        loss, derivative = self.evaluate(warped, reference)
        out.copy_(derivative)
        return loss

    def loss_and_derivative(self, warped: Tensor, fixed: Tensor) -> tuple[Tensor, Tensor]:
        """Loss ``(B,)`` and its derivative with respect to ``warped`` as it was passed in, ``(B, C, *S)``."""
        if not self.standardized:
            return self.evaluate(warped, self.reference(fixed))
        slope = _contrast_slope(warped)
        warped, scale = standardize(warped)
        loss, derivative = self.evaluate(warped, self.reference(standardize(fixed)[0]))
        axes = tuple(range(2, warped.dim()))
        along = (derivative * warped).sum(axes, keepdim=True)  # mean and scale depend on the image, too
        return loss, (derivative - derivative.mean(axes, keepdim=True) - along * slope) / scale

    def __call__(self, warped: Tensor, fixed: Tensor) -> Tensor:
        """Loss per pair ``(B,)``, differentiable with respect to ``warped`` (not ``fixed``)."""
        return _ClosedForm.apply(warped, fixed, self)


class KernelSimilarity(Similarity):
    """A measure that a kernel computes: it takes the fixed image as it is, shifts and scales it, and weighs voxels."""

    by_channel = weighable = True

    def reference(self, fixed: Tensor, weight: Tensor | None = None) -> tuple[Any, ...]:
        """The fixed image, its shift, its factor, and the weight; see :class:`Similarity`."""
        return self.ranged_reference(fixed, None, weight)

    def ranged_reference(self, fixed: Tensor, range_: Range, weight: Tensor | None = None) -> tuple[Any, ...]:
        """The same without a copy of the image."""
        return (fixed, *(range_ or (None, None)), weight)

    def evaluate(self, warped: Tensor, reference: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """Loss ``(B,)`` and derivative ``(B, C, *S)``; see :class:`Similarity`."""
        derivative = torch.empty_like(warped, memory_format=torch.contiguous_format)
        return self.evaluate_into(warped.contiguous(), reference, derivative), derivative

    @abstractmethod
    def evaluate_into(self, warped: Tensor, reference: tuple[Any, ...], out: Tensor) -> Tensor:
        """Loss ``(B,)``, and its derivative in ``out``; see :class:`Similarity`."""


def _as_it_is(image: Tensor) -> Tensor:
    return image


def normalized(image: Tensor, range_: Range) -> Tensor:
    """Shift and scale an image ``(B, C, *S)``, in float32 if it is in half precision."""
    return image if range_ is None else ranged(image.to(torch.promote_types(image.dtype, torch.float32)), *range_)


def standard_range(image: Tensor) -> tuple[Tensor, Tensor]:
    """Shift and factor that give every image and channel zero mean and unit :func:`contrast`; a constant becomes zero.

    Args:
        image: ``(B, C, *S)``.

    Returns:
        ``(B, C)`` each, in the widest type of the device.
    """
    low, high, total, squares, sizes = kernels.image_sums(image.contiguous()).unbind(2)
    edges = squares / sizes.clamp(min=torch.finfo(sizes.dtype).tiny)
    largest = torch.maximum(low.abs(), high.abs())
    return total / image[0, 0].numel(), torch.where(edges > 1e-6 * largest, 1 / edges, torch.zeros_like(edges))


def contrast(image: Tensor) -> Tensor:
    """How strong the edges of an image are, ``Σ d² / Σ |d|`` over the differences ``d`` of neighbouring voxels.

    Unlike the standard deviation it does not change when a constant background is added or cut off.

    Args:
        image: ``(B, C, *S)``.

    Returns:
        ``(B, C)``; 0 for a constant channel.
    """
    squares, sizes = kernels.image_sums(image.contiguous())[:, :, 3:].unbind(2)
    return squares / sizes.clamp(min=torch.finfo(sizes.dtype).tiny)


def _contrast_slope(image: Tensor) -> Tensor:
    """Derivative of :func:`contrast` with respect to the image, ``(B, C, *S)``."""
    squares, sizes = kernels.image_sums(image.contiguous())[:, :, 3:].unbind(2)
    size = over_voxels(sizes, image).clamp(min=torch.finfo(image.dtype).tiny)
    edges, slope = over_voxels(squares, image) / size, torch.zeros_like(image)
    for axis in range(2, image.dim()):
        difference = image.diff(dim=axis)
        outside = torch.zeros_like(image.narrow(axis, 0, 1))
        pull = 2 * difference - edges * difference.sign()
        slope = slope - torch.cat([outside, pull, outside], axis).diff(dim=axis)
    return slope / size


def standardize(image: Tensor) -> tuple[Tensor, Tensor]:
    """Zero mean and unit :func:`contrast` for every image and channel; a constant channel becomes zero.

    Args:
        image: ``(B, C, *S)``.

    Returns:
        The standardised image and the divisor ``(B, C, 1, …)``.
    """
    shift, factor = standard_range(image)
    centred = image - over_voxels(shift, image)
    centred = centred - centred.mean(tuple(range(2, image.dim())), keepdim=True)  # a large shift is rounded
    scale = torch.where(factor > 0, 1 / factor, torch.ones_like(factor))
    return centred * over_voxels(factor, image), over_voxels(scale, image)


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
