"""A registration network that knows what it looks at: MONAI networks, put together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["SemanticRegistrationNet"]


class SemanticRegistrationNet(nn.Module):
    """Segment both images, then predict a field from the images and their soft labels.

    Both networks work on a grid coarser by ``factor``: a block of voxels becomes channels and no detail is lost, but a
    convolution costs ``factor ** n`` times less. The soft labels also serve the refinement, as ``features`` of
    :class:`monai_lm.RegistrationInferer`: a field trained on labels is then not pulled off by intensities alone.

    Args:
        segmenter: maps ``(B, factor ** n, *S / factor)`` to ``(B, labels · factor ** n, *S / factor)``.
        registration: maps ``(B, 2 · labels · factor ** n, *S / factor)`` to a velocity or a displacement
            ``(B, n, *S / factor)`` in voxels of its own grid. ``labels`` includes the background, whose place the
            image takes.
        factor: 1 or more; the grid must be divisible by it, and by what the two networks need on theirs.
    """

    def __init__(self, segmenter: nn.Module, registration: nn.Module, factor: int = 2) -> None:
        super().__init__()
        if isinstance(factor, bool) or not isinstance(factor, int) or factor < 1:
            raise ValueError(f"factor must be a whole number of at least 1, got {factor!r}")
        self.segmenter = segmenter
        self.registration = registration
        self.factor = factor

    def logits(self, image: Tensor) -> Tensor:
        """Logits ``(B, labels, *S)`` of an image ``(B, 1, *S)``."""
        if not torch.jit.is_scripting() and any(s % self.factor for s in image.shape[2:]):
            raise ValueError(f"image must have a grid divisible by {self.factor}, got shape {tuple(image.shape)}")
        return _to_voxels(self.segmenter(_to_channels(image, self.factor)), self.factor)

    def features(self, image: Tensor) -> Tensor:
        """Probability of every label but the background, ``(B, labels - 1, *S)``, of an image ``(B, 1, *S)``."""
        return self.logits(image).float().softmax(1)[:, 1:]

    def forward(self, images: Tensor) -> Tensor:
        """Prediction ``(B, n, *S / factor)`` for images ``(B, 2, *S)``, channel 0 moving and channel 1 fixed."""
        if not torch.jit.is_scripting() and (images.dim() not in (4, 5) or images.shape[1] != 2):
            raise ValueError(
                f"images must be (B, 2, *S), channel 0 moving and 1 fixed, got shape {tuple(images.shape)}"
            )
        moving, fixed = images[:, :1], images[:, 1:]
        labels = self.features(torch.cat([moving, fixed]))
        channels = torch.cat([moving, fixed, labels[: len(images)], labels[len(images) :]], 1)
        return self.registration(_to_channels(channels, self.factor))


# MONAI's pixelunshuffle and pixelshuffle, as TorchScript understands them


def _to_channels(x: Tensor, factor: int) -> Tensor:
    """Blocks of ``factor`` voxels per axis become channels: ``(B, C · factor ** n, *S / factor)``."""
    n = x.dim() - 2
    split, small, order = [x.shape[0], x.shape[1]], [x.shape[0], x.shape[1] * int(factor**n)], [0, 1]
    for axis in range(n):
        split += [x.shape[axis + 2] // factor, factor]
        small.append(x.shape[axis + 2] // factor)
    order += [2 * axis + 3 for axis in range(n)]
    order += [2 * axis + 2 for axis in range(n)]
    return x.reshape(split).permute(order).reshape(small)


def _to_voxels(x: Tensor, factor: int) -> Tensor:
    """The inverse of :func:`_to_channels`."""
    n = x.dim() - 2
    channels = x.shape[1] // int(factor**n)
    split, large, order = [x.shape[0], channels], [x.shape[0], channels], [0, 1]
    split += [factor for _ in range(n)]
    for axis in range(n):
        split.append(x.shape[axis + 2])
        large.append(x.shape[axis + 2] * factor)
        order += [axis + 2 + n, axis + 2]
    return x.reshape(split).permute(order).reshape(large)
