"""Regularisers: energies of the residual, in millimetres, that are minimised beside the images' dissimilarity.

What is minimised is the dissimilarity per voxel plus the weight times the mean energy per voxel, so that a weight means
the same at every level, spacing and image size. To add one, derive from :class:`Regularizer` and give it a name in
:data:`REGULARIZERS`, or pass it as ``refine(regularizer=…)``; ``tests/solver/test_regularizer.py`` holds every one
there to the same laws.

In every iteration it takes 10 V for a moment, see :mod:`monai_lm.solver.engine`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from monai_lm import kernels
from monai_lm.fields.finite import check_number
from monai_lm.solver.trust import Trust

__all__ = ["REGULARIZERS", "Bending", "Diffusion", "Regularized", "Regularizer", "Sliding", "make_regularizer"]


class Regularizer(ABC):
    """An energy of the residual.

    Attributes:
        weight: of its mean over voxels, beside the mean dissimilarity.
        order: of the derivatives that it is made of, 1 or 2.
    """

    weight: float
    order: ClassVar[int]

    @abstractmethod
    def evaluate(self, field: Tensor, edges: Sequence[float], out: Tensor | None) -> Tensor:
        """The energy of a field.

        Args:
            field: ``(B, n, *S)`` in voxels, float32 or more.
            edges: voxel edge per axis, in millimetres.
            out: ``(B, n, *S)`` that the derivative with respect to ``field`` is added to; ``None``: only the energy is
                asked for.

        Returns:
            The sum over voxels, ``(B,)``, not weighted.
        """


@dataclass(frozen=True)
class Diffusion(Regularizer):
    """Squared first derivatives, ``Σ |∂_b u_a|²``: nothing for a shift. Differences are those between neighbours.

    Attributes:
        weight: without unit.
    """

    weight: float = 0.1
    order: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_number("weight", self.weight, 0)

    @override
    def evaluate(self, field: Tensor, edges: Sequence[float], out: Tensor | None) -> Tensor:
        total = field.new_zeros(len(field))
        for component, unit in enumerate(edges):
            for axis, edge in enumerate(edges):
                slope = _slope(field[:, component], axis, unit / edge)
                total += slope.square().flatten(1).sum(1)
                if out is not None:
                    out[:, component].add_(_adjoint(slope, axis), alpha=2 * unit / edge)
        return total


@dataclass(frozen=True)
class Bending(Regularizer):
    """Squared second derivatives, ``Σ |∂_b ∂_c u_a|²``: nothing for an affine map.

    Source: Rueckert et al., "Nonrigid registration using free-form deformations", IEEE TMI 1999, eq. 5.

    Attributes:
        weight: in square millimetres.
    """

    weight: float = 0.1
    order: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_number("weight", self.weight, 0)

    @override
    def evaluate(self, field: Tensor, edges: Sequence[float], out: Tensor | None) -> Tensor:
        total = field.new_zeros(len(field))
        for component, unit in enumerate(edges):
            for one, other in combinations_with_replacement(range(len(edges)), 2):
                times, scale = 1 if one == other else 2, unit / (edges[one] * edges[other])
                curved = _slope(_slope(field[:, component], one, scale), other)
                total += times * curved.square().flatten(1).sum(1)
                if out is not None:
                    out[:, component].add_(_adjoint(_adjoint(curved, other), one), alpha=2 * times * scale)
        return total


@dataclass(frozen=True)
class Sliding(Regularizer):
    """Diffusion that lets go where neighbours move apart, ``2 δ² Σ (√(1 + Σ_a |∂_b u_a|² / δ²) - 1)``.

    Well below a strain ``δ`` it is :class:`Diffusion`, well above it the total variation, which a jump costs no more
    than a slope over many voxels: organs may slide along each other. The elastic smoothing does not know that; pass a
    smaller ``smooth_residual`` beside it.

    Source: Charbonnier et al., "Deterministic edge-preserving regularization in computed imaging", IEEE TIP 1997, for
    the function.

    Attributes:
        weight: without unit.
        strain: δ, without unit.
    """

    weight: float = 0.1
    strain: float = 0.1
    order: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_number("weight", self.weight, 0)
        check_number("strain", self.strain, 0, exclusive=True)

    @override
    def evaluate(self, field: Tensor, edges: Sequence[float], out: Tensor | None) -> Tensor:
        total = field.new_zeros(len(field))
        for axis, edge in enumerate(edges):
            square = torch.zeros_like(field.narrow(axis + 2, 1, field.shape[axis + 2] - 1)[:, 0])
            for component, unit in enumerate(edges):
                square.add_(_slope(field[:, component], axis, unit / edge).square_())
            root = square.div_(self.strain**2).add_(1).sqrt_()
            total += 2 * self.strain**2 * (root - 1).flatten(1).sum(1)
            if out is None:
                continue
            for component, unit in enumerate(edges):
                slope = _slope(field[:, component], axis, unit / edge).div_(root)
                out[:, component].add_(_adjoint(slope, axis), alpha=2 * unit / edge)
        return total


class Regularized:
    """A regulariser at work on one level.

    Args:
        regularizer: what regularises.
        edges: voxel edge of the level per axis, in millimetres.
        unit: of the metric of the step, in voxels of every axis.
        sigma: of the Gaussian on the gradient, in voxels of the finest axis.
    """

    def __init__(self, regularizer: Regularizer, edges: Sequence[float], unit: Sequence[float], sigma: float) -> None:
        self.regularizer, self.edges = regularizer, edges
        self.sigma = [sigma * u for u in unit]
        self.stiffness = _stiffness(regularizer, min(edges), sigma, len(edges))

    def loss(self, residual: Tensor) -> Tensor:
        """What is added to the sum of dissimilarities over voxels, ``(B,)``, for a residual ``(B, n, *S)``."""
        return self.regularizer.weight * self.regularizer.evaluate(_wide(residual), self.edges, None)

    def pull(self, residual: Tensor, gradient: Tensor) -> Tensor:
        """The loss as :meth:`loss` has it, and its derivative in ``gradient`` ``(B, n, *S)``, the images' smoothed one.

        Both gradients are for compositional updates, and went through the same Gaussian.
        """
        field = _wide(residual)
        derivative = torch.zeros_like(field)
        loss = self.regularizer.evaluate(field, self.edges, derivative)
        eulerian = derivative.clone()  # (I + ∇r)ᵀ of it
        for axis in range(field.shape[1]):
            for component in range(field.shape[1]):
                (slope,) = torch.gradient(field[:, component], dim=axis + 1)
                eulerian[:, axis].addcmul_(slope, derivative[:, component])
        kernels.smooth(eulerian, self.sigma, derivative)
        gradient.add_(derivative, alpha=self.regularizer.weight)
        return self.regularizer.weight * loss

    def steadied(self, trust: Trust, step: float) -> Trust:
        """The trust at the start of a level, its damping at least so large that no step overshoots the energy's least.

        Where a step is ``-2 s g / √λ``, it must not be longer than the energy's curvature allows, or it would grow from
        iteration to iteration until the control had shortened it.
        """
        least = (2 * step * self.stiffness) ** 2
        reference = torch.where(trust.reference > 0, trust.reference.clamp(min=least), trust.reference)
        return replace(trust, reference=reference, damping=reference.clone())


def _stiffness(regularizer: Regularizer, edge: float, sigma: float, n: int) -> float:
    """Largest second derivative of the smoothed energy, per squared displacement in voxels of the finest axis.

    Of waves of ``k`` radians per voxel it is ``2 w k^2p exp(-k² σ² / 2)`` with ``p`` the order, largest at
    ``k² = 2 p / σ²``; no wave has more than ``4 n`` for ``k²``.
    """
    p = regularizer.order
    square = 4.0 * n if sigma == 0 else min(4.0 * n, 2 * p / sigma**2)
    return 2 * regularizer.weight * edge ** (2 - 2 * p) * square**p * math.exp(-square * sigma**2 / 2)


def _slope(values: Tensor, axis: int, scale: float = 1.0) -> Tensor:
    """Differences of neighbours along an axis of ``(B, *S)``, times ``scale``; one fewer than there are values."""
    return values.diff(dim=axis + 1).mul_(scale)


def _adjoint(slope: Tensor, axis: int) -> Tensor:
    """The transpose of :func:`_slope` without its scale."""
    around = [0, 0] * (slope.dim() - 2 - axis) + [1, 1]
    return pad(slope, around).diff(dim=axis + 1).neg_()


def _wide(residual: Tensor) -> Tensor:
    return residual.to(torch.promote_types(residual.dtype, torch.float32))


REGULARIZERS: dict[str, Callable[..., Regularizer]] = {"diffusion": Diffusion, "bending": Bending, "sliding": Sliding}
"""The ``regularizer`` argument of :func:`monai_lm.refine`; every one may be made with a weight."""


def make_regularizer(value: Any) -> Regularizer | None:
    """A regulariser of its name, or itself; ValueError for anything else but ``None``."""
    if value is None or isinstance(value, Regularizer):
        return value
    if not isinstance(value, str) or value not in REGULARIZERS:
        raise ValueError(f"regularizer must be one of {tuple(REGULARIZERS)}, a Regularizer or None, got {value!r}")
    return REGULARIZERS[value]()
