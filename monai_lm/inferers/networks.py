"""Networks that know what they look at: MONAI networks, put together."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["SemanticRegistrationNet", "StructureCodes"]


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


class StructureCodes(nn.Module):
    """Codes of the structures that a segmenter sees, beside the image: few channels that tell many structures apart.

    A hundred soft labels are too many channels to register. Here every structure has a code, one of the points that are
    spread over the unit sphere (the background's is 0), and a voxel has the mean of the codes, weighted by the
    probabilities that the segmenter gives there. Two codes differ as the soft labels do, nearly. The segmenter sees the
    blocks of ``factor`` voxels per axis as channels, and where they lie, from the centre of the box around the content.

    Args:
        segmenter: maps ``(B, factor ** n + n, *S / factor)`` to logits ``(B, labels, *S / factor)``, background first.
        labels: how many, the background included.
        codes: channels of a code.
        factor: 1 or more; the grid must be divisible by it, and by what the segmenter needs on its own.
        background: values up to this are none of the image's content, which is in [0, 1].
    """

    def __init__(
        self, segmenter: nn.Module, labels: int, codes: int = 8, factor: int = 2, background: float = 0.05
    ) -> None:
        super().__init__()
        for name, value, least in (("labels", labels, 2), ("codes", codes, 2), ("factor", factor, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        self.segmenter = segmenter
        self.factor = factor
        self.background = background
        self.codes: Tensor
        self.register_buffer("codes", torch.cat([torch.zeros(1, codes), _spread(labels - 1, codes)]))

    def logits(self, image: Tensor, centre: Tensor | None = None) -> Tensor:
        """Logits ``(B, labels, *S / factor)`` of an image ``(B, 1, *S)``.

        Args:
            image: values in [0, 1].
            centre: of the grid ``(B, n)`` in voxels from the centre of the box around the content, where that is not to
                be seen, as in a patch.
        """
        if not torch.jit.is_scripting() and any(s % self.factor for s in image.shape[2:]):
            raise ValueError(f"image must have a grid divisible by {self.factor}, got shape {tuple(image.shape)}")
        if centre is None:
            centre = torch.stack([_grid_centre(one[0], self.background) for one in image])
        return self.segmenter(torch.cat([_to_channels(image, self.factor), _positions(image, centre, self.factor)], 1))

    def forward(self, images: Tensor) -> Tensor:
        """Of images ``(B, C, *S)``, one channel after the other: block means, then codes.

        Returns:
            ``(B, C · (1 + codes), *S / factor)``.
        """
        out = []
        for image in images.split(1, 1):
            codes = self.coded(image)  # looks at the grid first
            out += [_to_channels(image, self.factor).mean(1, keepdim=True), codes]
        return torch.cat(out, 1)

    @torch.jit.export
    def features(self, image: Tensor) -> Tensor:
        """Codes ``(B, codes, *S)`` on the grid of an image ``(B, 1, *S)``, for the refinement to match beside it."""
        size = image.shape[2:]
        mode = "trilinear" if len(size) == 3 else "bilinear"
        return F.interpolate(self.coded(image), size=size, mode=mode, align_corners=False)

    def coded(self, image: Tensor) -> Tensor:
        """Codes ``(B, codes, *S / factor)`` of an image ``(B, 1, *S)``."""
        codes = [  # probabilities of the whole would take as much memory as the logits
            torch.movedim(slab.float().softmax(1), 1, -1) @ self.codes.float()
            for slab in self.logits(image).split(8, 2)
        ]
        return torch.movedim(torch.cat(codes, 1), -1, 1)


def _spread(count: int, dimensions: int) -> Tensor:
    """Points on the unit sphere that repel one another, the same at every call."""
    points = F.normalize(torch.randn(count, dimensions, generator=torch.Generator().manual_seed(0)), dim=1)
    for _ in range(200):
        force = torch.exp(8 * (points @ points.T - 1)).fill_diagonal_(0)
        points = F.normalize(points - 0.5 * force @ points, dim=1)
    return points


def _grid_centre(image: Tensor, background: float) -> Tensor:
    """Centre of the grid ``(n,)`` of an image ``(*S)``, in voxels from the centre of the box around its content."""
    centre = []
    content = image > background
    for axis in range(image.dim()):
        here = content.movedim(axis, 0).flatten(1).any(1)
        voxels = torch.arange(image.shape[axis], device=image.device)
        first = torch.where(here, voxels, image.shape[axis]).amin()
        last = torch.where(here, voxels, -1).amax()  # without content first + last is the grid's, and the centre 0
        centre.append((image.shape[axis] - 1) / 2 - (first + last) / 2)
    return torch.stack(centre)


def _positions(image: Tensor, centre: Tensor, factor: int) -> Tensor:
    """Where the centres of the blocks lie, ``(B, n, *S / factor)``, in units of 50 voxels."""
    n = image.dim() - 2
    small = [s // factor for s in image.shape[2:]]
    axes = []
    for axis in range(n):
        at = (
            torch.arange(small[axis], device=image.device) * factor + (factor - 1) / 2 - (image.shape[axis + 2] - 1) / 2
        )
        shape = [1 for _ in range(n + 1)]
        shape[axis + 1] = small[axis]
        offset = centre[:, axis].view([-1] + [1 for _ in range(n)])
        axes.append(((at.view(shape) + offset) / 50).expand([len(image)] + small))  # noqa: RUF005 (TorchScript)
    return torch.stack(axes, 1).to(image.dtype)


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
