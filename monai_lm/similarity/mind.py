"""Self-similarity of neighbourhoods, for images of any two contrasts."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor
from typing_extensions import override

from monai_lm.kernels.reference import box_sum, inverse_window_counts
from monai_lm.similarity.base import Range, normalized, standard_range
from monai_lm.similarity.mse import MSE

__all__ = ["MIND"]

_SPREAD = 1e-3
"""The local variance lies between the image's mean of it times this and divided by this."""

_FLAT = 1e-12
"""Mean local variance, in squares of the contrast, of an image that has none."""


class MIND(MSE):
    """Mean squared difference of self-similarity contexts (MIND-SSC), whatever the contrast of either image.

    Every voxel is described by how alike the patches around it are: ``exp(-(D - min D) / V)`` for the 12 pairs of its
    six neighbours (in 2D the 4 of its four) that do not lie opposite each other, ``D`` the mean squared difference of
    two patches, ``V`` the mean of ``D - min D`` over the pairs. A border is a border in any contrast, be it bright on
    dark or dark on bright; so nothing is asked of the intensities, not even that one map leads from the one image's to
    the other's. The moving image is described once per level and its description warped.

    It takes 12 volumes of each image and of the derivative, and as much more of the time.

    Args:
        radius: half width of a patch in voxels of a level.
        dilation: distance of a neighbour in voxels of a level.

    Source:
        Heinrich et al., "Towards Realtime Multimodal Fusion for Image-Guided Interventions Using Self-similarities",
        MICCAI 2013.
    """

    invariant = True

    def __init__(self, radius: int = 1, dilation: int = 2) -> None:
        for name, value in (("radius", radius), ("dilation", dilation)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        self.radius, self.dilation = radius, dilation

    @override
    def described_channels(self, channels: int, n: int) -> int:
        return channels * 2 * n * (n - 1)

    @override
    def described(self, fixed: Tensor, moving: Tensor) -> tuple[Tensor, Tensor]:
        return self._contexts(fixed), self._contexts(moving)

    @override
    def ranges(self, fixed: Tensor, moving: Tensor) -> tuple[Range, Range]:
        """Descriptions lie in [0, 1]."""
        return None, None

    @override
    def image_ranges(self, fixed: Tensor, moving: Tensor) -> tuple[Range, Range]:
        """Zero mean and unit contrast: contexts do not depend on it."""
        return standard_range(fixed), standard_range(moving)

    @override
    def loss_and_derivative(self, warped: Tensor, fixed: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = warped.detach().requires_grad_()
            contexts = self._contexts(leaf)
        loss, derivative = self.evaluate(contexts.detach(), self.reference(self._contexts(fixed)))
        return loss, torch.autograd.grad(contexts, leaf, derivative)[0]

    def _contexts(self, image: Tensor) -> Tensor:
        """``(B, C · 2n(n - 1), *S)`` in (0, 1] of ``(B, C, *S)``, the pairs of a channel beside each other."""
        n, dtype = image.dim() - 2, image.dtype
        if min(image.shape[2:]) < (least := 2 + min(self.radius, self.dilation)):  # all have one patch, and neighbours
            raise ValueError(
                f"images must have at least {least} voxels along every axis for MIND, which sees no motion along "
                f"shorter ones, got shape {tuple(image.shape)}"
            )
        image = normalized(image, standard_range(image.detach()))  # of no consequence but for what floats can hold
        neighbours = [_shifted(image, 2 + axis, by) for axis in range(n) for by in (-self.dilation, self.dilation)]
        counts, differences = inverse_window_counts(image, self.radius), []
        for (i, one), (j, other) in combinations(enumerate(neighbours), 2):
            if i // 2 != j // 2:  # not opposite each other
                differences.append(box_sum((one - other).square(), self.radius) * counts)
        distance = torch.stack(differences, 2)
        del differences, neighbours, one, other  # volumes, up to twelve of each
        distance = distance - distance.amin(2, keepdim=True)
        variance = distance.mean(2, keepdim=True)
        usual = variance.mean(tuple(range(2, n + 3)), keepdim=True).clamp(min=_FLAT)
        variance = torch.minimum(torch.maximum(variance, _SPREAD * usual), usual / _SPREAD)
        return (distance / -variance).exp_().flatten(1, 2).to(dtype)


def _shifted(image: Tensor, axis: int, by: int) -> Tensor:
    """The image ``by`` voxels further along an axis; the border continues."""
    size = image.shape[axis]
    return image.index_select(axis, (torch.arange(size, device=image.device) + by).clamp(0, size - 1))
