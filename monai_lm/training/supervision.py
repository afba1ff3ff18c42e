"""Training with refinement in the loop: refined fields as targets, and gradients through a refined field."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from monai_lm.fields.finite import check_number
from monai_lm.fields.sampling import warp
from monai_lm.inferers import RegistrationInferer
from monai_lm.kernels.reference import spatial_gradient

__all__ = ["Distillation", "through_refinement"]


class Distillation:
    """Mean squared distance, in voxels², of the network's fields to refined ones; gradients stop at the latter.

    A refinement costs more than a training step, so its cost is spread: every ``every``-th batch is refined and
    remembered, the batches between them learn from a remembered one, drawn at random.

    Args:
        weight: of the distance.
        every: batches per refinement.
        capacity: how many refined batches are remembered, in half precision in the host's memory.
        seed: of the draws.

    Raises:
        ValueError: a negative weight, or ``every`` or ``capacity`` below 1.
    """

    def __init__(self, weight: float = 0.1, every: int = 4, capacity: int = 64, seed: int = 0) -> None:
        check_number("weight", weight, 0)
        check_number("every", every, 1)
        check_number("capacity", capacity, 1)
        self.weight, self.every = weight, every
        self.memory: deque[tuple[Tensor, Tensor]] = deque(maxlen=capacity)
        self._random = random.Random(seed)
        self._seen = 0

    def __call__(self, images: Tensor, ddf: Tensor, inferer: RegistrationInferer, network: nn.Module) -> Tensor:
        """The weighted distance for a batch, or for a remembered one in its place.

        Args:
            images: ``(B, 2, *S)`` moving and fixed.
            ddf: ``(B, n, *S)`` what the network predicts for them, in voxels.
            inferer: refines.
            network: predicts for the remembered batch.
        """
        fresh = self._seen % self.every == 0
        self._seen += 1
        if fresh:
            target = inferer.refined(images, ddf.detach()).ddf
            self.memory.append((images.detach().half().cpu(), target.half().cpu()))
        else:
            images, target = (t.to(ddf) for t in self._random.choice(self.memory))
            ddf = inferer.predict(images, network)
        return self.weight * (ddf - target).square().sum(1).mean()


def through_refinement(images: Tensor, ddf: Tensor, inferer: RegistrationInferer, damping: float = 1.0) -> Tensor:
    """Refine a field so that a gradient at the refined field reaches the predicted one.

    The refined field is taken for the optimum of ``Σ (I(x + u) - J)² / 2 + λ / 2 |u - ddf|²``, whose derivative with
    respect to ``ddf`` is ``λ (∇I ∇Iᵀ + λ)⁻¹`` by the implicit function theorem, with the Gauss-Newton Hessian that the
    factored Levenberg-Marquardt step inverts, too: what the images determine, refinement determines, and only what they
    leave open is the network's to learn. No iteration is differentiated. Exact for such an optimum in an image with a
    constant gradient; for what :func:`monai_lm.refine` returns, an approximation.

    Args:
        images: ``(B, 2, *S)`` moving and fixed.
        ddf: ``(B, n, *S)`` predicted displacement in voxels.
        inferer: refines.
        damping: λ relative to the mean squared gradient of the warped image.

    Returns:
        ``(B, n, *S)`` refined displacement in voxels.

    Source:
        Bai et al., "Deep Equilibrium Models", NeurIPS 2019, for learning through an optimum; arXiv 2603.19371 for the
        linear system.
    """
    refined = inferer.refined(images, ddf.detach()).ddf
    with torch.no_grad():
        gradient = torch.cat(spatial_gradient(warp(images[:, :1], refined)), 1)
        square = gradient.square().sum(1, keepdim=True)
        axes = tuple(range(1, square.dim()))
        scale = damping * square.mean(axes, keepdim=True)
    return implicit(ddf, refined, gradient, scale)


def implicit(ddf: Tensor, refined: Tensor, gradient: Tensor, scale: Tensor) -> Tensor:
    """The refined field, of whose gradient ``q`` ``λ (g gᵀ + λ)⁻¹ q`` reaches ``ddf``; ``g``: gradient, λ: scale."""
    out: Tensor = _Implicit.apply(ddf, refined, gradient, scale)
    return out


class _Implicit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ddf: Tensor, refined: Tensor, gradient: Tensor, scale: Tensor) -> Tensor:  # noqa: ARG004
        ctx.save_for_backward(gradient, scale)
        return refined.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        gradient, scale = ctx.saved_tensors
        along = (gradient * grads[0]).sum(1, keepdim=True)
        square = gradient.square().sum(1, keepdim=True)
        share = torch.where(square + scale > 0, along / (square + scale), torch.zeros_like(along))
        return grads[0] - gradient * share, None, None, None
