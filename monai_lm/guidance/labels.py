"""Guidance by label maps of both images, hard or soft: soft Dice of any of their labels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from monai_lm.fields.finite import check_number
from monai_lm.guidance.base import Grid, Guidance, Term
from monai_lm.guidance.overlap import Box, Overlap, Structure

__all__ = ["Labels", "SoftLabels"]

_LEAST = 0.01
"""Probabilities below it count as zero: a softmax is zero nowhere, and its boxes would be the whole image."""


class _Maps(Guidance):
    """Two maps of one shape on the grid of the images, and the structures that both have.

    Args:
        fixed: ``(B, K, *S)``.
        moving: ``(B, K, *S)``.
        weight: how hard they pull, relative to the images.
        sigma: standard deviation of the Gaussian on every structure, in voxels of a level's finest axis.
    """

    def __init__(self, fixed: Tensor, moving: Tensor, weight: float, sigma: float) -> None:
        if fixed.shape != moving.shape:
            raise ValueError(
                f"fixed and moving labels must have one shape, got {tuple(fixed.shape)} and {tuple(moving.shape)}"
            )
        if fixed.device != moving.device:
            raise ValueError(f"fixed and moving labels must be on one device, got {fixed.device} and {moving.device}")
        check_number("weight", weight, 0, exclusive=True)
        check_number("sigma", sigma, 0)
        self.fixed, self.moving, self.weight, self.sigma = fixed, moving, float(weight), float(sigma)

    def structures(self) -> list[Structure]:
        """What shall lie on each other, of all pairs."""
        raise NotImplementedError

    @override
    def check(self, fixed: Tensor) -> None:
        """Maps on the grid and the device of the images ``(B, C, *S)``; ValueError if not."""
        channels = self.fixed.shape[1]
        expected = (len(fixed), channels, *fixed.shape[2:])
        if tuple(self.fixed.shape) != expected:
            raise ValueError(
                f"guidance must have labels (B, {channels}, *S) = {expected} on the grid of fixed, got shape "
                f"{tuple(self.fixed.shape)}"
            )
        if self.fixed.device != fixed.device:
            raise ValueError(f"guidance must be on the device of fixed, {fixed.device}, got {self.fixed.device}")

    @override
    def at(self, grid: Grid) -> Term:
        """The overlap of the structures on the grid of a level."""
        return Overlap(self.structures(), grid, self.sigma)


class Labels(_Maps):
    """Labels that shall lie on each other: the mean over labels of one minus soft Dice, ``2 Σ F W / (Σ F² + Σ W²)``.

    ``F`` is the fixed and ``W`` the warped moving label, both smoothed. Every border pulls with the same strength,
    whatever the size and the number of labels: with a weight of 1 where it is off by its width ten times as hard as
    images do. Labels are handled one by one, in the boxes that hold them, which takes about 1 ms per label and
    iteration on a CPU core for a brain at 2 mm. Extra memory beside what every guidance needs, 6 V and 3 more with a
    prediction, where V is one image in float32: 4 V for a moment, and the boxes, which are .4 to .9 V for a few organs
    and 8.6 V for the 138 structures of a brain.

    Args:
        fixed: ``(B, 1, *S)`` whole numbers, on the grid of the images; 0 is background.
        moving: ``(B, 1, *S)``, the same of the moving image.
        weight: how hard they pull, relative to the images.
        values: the labels that count; ``None``: all but 0 that both maps of a pair have. A pair that lacks one of them
            in either map goes without it.
        sigma: standard deviation of the Gaussian on every label, in voxels of a level's finest axis.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes that do not fit, values that are not whole numbers or that no pair has, a number out of
            range.
    """

    def __init__(
        self,
        fixed: Tensor,
        moving: Tensor,
        weight: float = 1.0,
        values: Sequence[int] | None = None,
        sigma: float = 1.0,
    ) -> None:
        maps = [_labels(name, value) for name, value in (("fixed", fixed), ("moving", moving))]
        super().__init__(maps[0], maps[1], weight, sigma)
        pairs = zip(self.fixed, self.moving, strict=True)
        common = [sorted(set(f.unique().tolist()) & set(m.unique().tolist())) for f, m in pairs]
        self.values = [[v for v in found if (v if values is None else v in values)] for found in common]
        self._fixed_boxes = [_bounds(f, found) for f, found in zip(self.fixed, self.values, strict=True)]
        self._moving_boxes = [_bounds(m, found) for m, found in zip(self.moving, self.values, strict=True)]
        if values is not None and (missing := sorted(set(values) - {v for found in common for v in found})):
            raise ValueError(f"values must be labels that both maps have, got {missing}, which no pair has")
        if empty := [pair for pair, found in enumerate(self.values) if not found]:
            raise ValueError(f"fixed and moving must have a label in common, got none for pairs {empty}")

    @override
    def structures(self) -> list[Structure]:
        """Every label that counts, pair by pair, in the boxes that hold it."""
        out = []
        for pair, values in enumerate(self.values):
            boxes = zip(values, self._fixed_boxes[pair], self._moving_boxes[pair], strict=True)
            for value, here, there in boxes:
                fixed, moving = (partial(_one, x[pair, 0], value) for x in (self.fixed, self.moving))
                out.append(Structure(pair, here, fixed, there, moving))
        return out


class SoftLabels(_Maps):
    """Probabilities that shall lie on each other, as the softmax of a segmentation network, a channel for each label.

    As :class:`Labels`, of which they are the general case: one-hot channels of the same labels guide alike.
    What is uncertain in a map pulls less. Probabilities below .01 count as zero.

    Args:
        fixed: ``(B, K, *S)`` in [0, 1], on the grid of the images.
        moving: ``(B, K, *S)``, the same of the moving image.
        weight: how hard they pull, relative to the images.
        channels: those that count, as ``[1, 2]``; ``None``: all, the background, too, if it is one of them. A pair
            goes without those that are zero in either map.
        sigma: standard deviation of the Gaussian on every channel, in voxels of a level's finest axis.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes that do not fit, values outside [0, 1], channels that are not there, a pair that has none in
            both maps, a number out of range.
    """

    def __init__(
        self,
        fixed: Tensor,
        moving: Tensor,
        weight: float = 1.0,
        channels: Sequence[int] | None = None,
        sigma: float = 1.0,
    ) -> None:
        maps = [_probabilities(name, value) for name, value in (("fixed", fixed), ("moving", moving))]
        super().__init__(maps[0], maps[1], weight, sigma)
        count = self.fixed.shape[1]
        if unknown := [c for c in channels or () if not 0 <= c < count]:
            raise ValueError(f"channels must be among the {count} of fixed and moving, got {unknown}")
        self.channels = list(range(count)) if channels is None else list(channels)
        pairs = range(len(self.fixed))
        self._boxes = [(p, c, _held(self.fixed[p, c]), _held(self.moving[p, c])) for p in pairs for c in self.channels]
        found = {pair for pair, _, here, there in self._boxes if here and there}
        if empty := [pair for pair in pairs if pair not in found]:
            raise ValueError(f"fixed and moving must have a label in common, got none for pairs {empty}")

    @override
    def structures(self) -> list[Structure]:
        """Every channel that counts and that both maps of a pair have, in the boxes that hold it."""
        out = []
        for pair, channel, here, there in self._boxes:
            if here is not None and there is not None:
                fixed, moving = (partial(_part, x[pair, channel]) for x in (self.fixed, self.moving))
                out.append(Structure(pair, here, fixed, there, moving))
        return out


def _one(labels: Tensor, value: int, box: Box) -> Tensor:
    """Where a map ``(*S)`` has a value, in a box."""
    return box.of(labels) == value


def _part(probabilities: Tensor, box: Box) -> Tensor:
    """A map ``(*S)`` in a box, zero where it hardly is anything."""
    part = box.of(probabilities)
    return part.masked_fill(part < _LEAST, 0)


def _held(probabilities: Tensor) -> Box | None:
    """The box that holds all of a map ``(*S)``; ``None`` if it is zero."""
    there = probabilities >= _LEAST
    axes = range(there.dim())
    found = [there.sum([a for a in axes if a != axis]).nonzero().flatten() for axis in axes]
    if not len(found[0]):
        return None
    return Box(tuple(int(k[0]) for k in found), tuple(int(k[-1]) + 1 for k in found))


def _bounds(labels: Tensor, values: Sequence[int]) -> list[Box]:
    """The boxes that hold every one of some values of a map ``(1, *S)``."""
    from scipy.ndimage import find_objects  # SciPy takes a part of a second to import

    found, index = labels[0].unique(return_inverse=True)
    slices = dict(zip(found.tolist(), find_objects(index.cpu().numpy() + 1), strict=True))
    return [Box(tuple(s.start for s in slices[v]), tuple(s.stop for s in slices[v])) for v in values]


def _plain(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    return (value.as_tensor() if hasattr(value, "as_tensor") else value).detach()  # that of a MetaTensor


def _probabilities(name: str, value: Any) -> Tensor:
    """Maps ``(B, K, *S)`` in [0, 1], floating point."""
    value = _plain(name, value)
    if value.dim() not in (4, 5) or not value.numel():
        raise ValueError(f"{name} must be probabilities (B, K, *S), 2D or 3D, got shape {tuple(value.shape)}")
    if value.is_complex() or not bool(((value >= 0) & (value <= 1.001)).all()):  # half precision may round beyond 1
        raise ValueError(f"{name} must hold probabilities in [0, 1], got other values, as logits have, or NaN")
    return value if value.is_floating_point() else value.to(torch.float32)


def _labels(name: str, value: Any) -> Tensor:
    """A label map ``(B, 1, *S)`` of whole numbers, as integers."""
    value = _plain(name, value)
    if value.dim() not in (4, 5) or value.shape[1] != 1 or not value.numel():
        raise ValueError(f"{name} must be labels (B, 1, *S), 2D or 3D, got shape {tuple(value.shape)}")
    whole = value.to(torch.int32)
    if value.is_complex() or not bool((whole == value).all()):
        raise ValueError(f"{name} must hold whole numbers, got other values in labels of {value.dtype}")
    return whole
