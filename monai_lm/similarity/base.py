"""What a similarity measure is: prepared once per level, evaluated once per iteration."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "LocalSimilarity",
    "Range",
    "Similarity",
    "contrast",
    "line_sums",
    "normalized",
    "standard_range",
    "standardize",
]

_SLAB = 2**20
"""Voxels of an image that are looked at together."""

Range = tuple[Tensor, Tensor] | None
"""What is subtracted from an image and what the difference is multiplied by, ``(B, C, 1, …)`` each; or nothing."""


class Similarity(ABC):
    """A dissimilarity to be minimised: a sum over voxels of a per-voxel loss, averaged over channels.

    ``prepare`` sees the two images once; ``evaluate`` is a pure function of tensors, called at every iteration.
    Calling the measure itself gives a loss that autograd can differentiate, with the closed-form derivative.
    """

    closed_form = True
    """Whether ``evaluate`` is made of tensor operations only, so that a compiler can fuse it."""

    standardized = False
    """Whether images are shifted and scaled to zero mean and unit contrast first; the measure must not care."""

    in_pieces = False
    """Whether ``reference`` and ``evaluate_lines`` are made of pieces that are compiled one by one."""

    weighable = False
    """Whether ``reference`` takes a ``weight`` per voxel, for :class:`monai_lm.similarity.weighted.Weighted`."""

    halo: int | None = None
    """How far away from a voxel its loss and derivative look, in voxels; ``None``: at the whole image."""

    def prepare(self, fixed: Tensor, moving: Tensor) -> tuple[tuple[Any, ...], Tensor]:
        """Shift and scale both images if the measure allows it, and compute what depends on the fixed image only.

        Args:
            fixed: ``(B, C, *S)``.
            moving: ``(B, C, *M)``.

        Returns:
            The tensors that ``evaluate`` takes as ``reference``, and the moving image to warp.
        """
        fixed_range, moving_range = self.ranges(fixed, moving)
        return self.reference(normalized(fixed, fixed_range)), normalized(moving, moving_range)

    def ranges(self, fixed: Tensor, moving: Tensor) -> tuple[Range, Range]:
        """How to shift and scale the fixed ``(B, C, *S)`` and the moving image ``(B, C, *M)`` before they are compared.

        A warped image may be shifted and scaled instead of the moving one: the two commute.
        """
        return (standard_range(fixed), standard_range(moving)) if self.standardized else (None, None)

    @property
    def signature(self) -> str:
        """What its compiled kernels depend on: the name of the class, and settings that are constants in them."""
        return type(self).__name__

    def reference(self, fixed: Tensor, weight: Tensor | None = None) -> tuple[Any, ...]:
        """Tensors derived from the (shifted and scaled) fixed image that every evaluation needs.

        Args:
            fixed: ``(B, C, *S)``.
            weight: ``(B, 1, *S)``, at least 0: how much a voxel counts; ``None``: one. Only for ``weighable`` measures.
        """
        return (fixed,) if weight is None else (fixed, weight)

    @abstractmethod
    def evaluate(self, warped: Tensor, reference: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """Value and derivative.

        Args:
            warped: ``(B, C, *S)`` the warped moving image that ``prepare`` returned.
            reference: what ``prepare`` returned.

        Returns:
            The loss ``(B,)``, summed over voxels, and its derivative with respect to ``warped``, ``(B, C, *S)``.
        """

    def evaluate_lines(self, warped: Tensor, reference: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """As :meth:`evaluate`, with the loss summed over each line only: ``(B, rows, columns)``, the first two axes.

        Measures with a ``halo`` have it; the engine calls it on windows.
        """
        raise NotImplementedError(f"{type(self).__name__} looks at the whole image at once")

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


class LocalSimilarity(Similarity):
    """A measure whose loss and derivative at a voxel depend on nothing farther away than ``halo`` voxels.

    The engine evaluates it window by window, which is faster and needs less memory.
    """

    def evaluate(self, warped: Tensor, reference: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """Loss ``(B,)`` and derivative ``(B, C, *S)``; see :class:`Similarity`."""
        lines, derivative = self.evaluate_lines(warped, reference)
        return lines.sum((1, 2)), derivative


def line_sums(values: Tensor) -> Tensor:
    """Sum ``(B, C, rows, columns, …)`` over everything but pairs, rows and columns."""
    return values.sum((1, *range(4, values.dim())))


def normalized(image: Tensor, range_: Range) -> Tensor:
    """Shift and scale an image ``(B, C, *S)``."""
    return image if range_ is None else (image - range_[0]) * range_[1]


def standard_range(image: Tensor) -> tuple[Tensor, Tensor]:
    """Shift and factor that give every image and channel zero mean and unit :func:`contrast`; a constant becomes zero.

    Args:
        image: ``(B, C, *S)``; half precision is looked at in float32. Slab by slab, without a copy of the image.
    """
    axes, wide = tuple(range(2, image.dim())), torch.promote_types(image.dtype, torch.float32)
    low, high = image.amin(axes, keepdim=True).to(wide), image.amax(axes, keepdim=True).to(wide)
    largest = torch.maximum(low.abs(), high.abs()).clamp(min=torch.finfo(wide).tiny)  # squares stay in range
    mean = torch.zeros_like(largest)
    for _ in range(3):  # the first mean of a large offset is rounded
        sums = [(slab / largest - mean).sum(axes, keepdim=True) for slab in _slabs(image)]
        mean = mean + torch.stack(sums).sum(0) / image[0, 0].numel()
    edges = contrast(image, largest)
    return mean * largest, torch.where(edges > 1e-6, 1 / (edges * largest), torch.zeros_like(edges))


def contrast(image: Tensor, unit: Tensor | float = 1.0) -> Tensor:
    """How strong the edges of an image are, ``Σ d² / Σ |d|`` over the differences ``d`` of neighbouring voxels.

    Unlike the standard deviation it does not change when a constant background is added or cut off.

    Args:
        image: ``(B, C, *S)``.
        unit: what intensities are divided by first, ``(B, C, 1, …)``.

    Returns:
        ``(B, C, 1, …)`` in that unit; 0 for a constant channel.
    """
    axes = tuple(range(2, image.dim()))
    squares, sizes = [], []
    for slab in _slabs(image, overlap=1):
        for axis in axes:
            lines = slab if axis == 2 else slab[:, :, : _rows(image)]
            difference = lines.diff(dim=axis) / unit
            squares.append(difference.square().sum(axes, keepdim=True))
            sizes.append(difference.abs().sum(axes, keepdim=True))
    size = torch.stack(sizes).sum(0)
    return torch.stack(squares).sum(0) / size.clamp(min=torch.finfo(size.dtype).tiny)


def _contrast_slope(image: Tensor) -> Tensor:
    """Derivative of :func:`contrast` with respect to the image, ``(B, C, *S)``."""
    axes, edges, slope = tuple(range(2, image.dim())), contrast(image), torch.zeros_like(image)
    size = torch.zeros_like(edges)
    for axis in axes:
        difference = image.diff(dim=axis)
        size = size + difference.abs().sum(axes, keepdim=True)
        outside = torch.zeros_like(image.narrow(axis, 0, 1))
        pull = 2 * difference - edges * difference.sign()
        slope = slope - torch.cat([outside, pull, outside], axis).diff(dim=axis)
    return slope / size.clamp(min=torch.finfo(size.dtype).tiny)


def _slabs(image: Tensor, overlap: int = 0) -> Iterator[Tensor]:
    """Slabs of an image along its first spatial axis, not in half precision, that reach ``overlap`` into the next."""
    wide, rows = torch.promote_types(image.dtype, torch.float32), _rows(image)
    for start in range(0, image.shape[2], rows):
        yield image[:, :, start : start + rows + overlap].to(wide)


def _rows(image: Tensor) -> int:
    """How many rows of an image are looked at together."""
    return max(1, _SLAB // image[:, :, 0].numel())


def standardize(image: Tensor) -> tuple[Tensor, Tensor]:
    """Zero mean and unit :func:`contrast` for every image and channel; a constant channel becomes zero.

    Args:
        image: ``(B, C, *S)``.

    Returns:
        The standardised image and the divisor ``(B, C, 1, …)``.
    """
    shift, factor = standard_range(image)
    centred = image - shift
    centred = centred - centred.mean(tuple(range(2, image.dim())), keepdim=True)  # a large shift is rounded
    return centred * factor, torch.where(factor > 0, 1 / factor, torch.ones_like(factor))


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
