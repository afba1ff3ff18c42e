"""Lesions: where images are not compared, and the map follows from around it.

What of a map ``u`` lies in a lesion of the fixed image, or is led into one of the moving image, is the harmonic
extension of what is around, after every step: as smooth as can be, and affine where that is around it. Nothing else of
the method changes. In V, the size of one image in float32, it takes 1 for the lesion of either image, 1 for that of the
moving image as it is led, for a moment, and some ten volumes of the box that holds the lesion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from monai_lm import kernels
from monai_lm.fields.extension import extend_in_place
from monai_lm.fields.finite import check_finite
from monai_lm.solver.checks import plain

__all__ = ["Lesion", "Lesions", "checked_lesion", "outside"]

_EACH, _SETTLED = 1, 6
"""V-cycles after a step, which changes little, and from time to time, where the place is looked for anew."""

Lesions = tuple[Tensor | None, Tensor | None]
"""Of the fixed and of the moving image, ``(B, 1, *S)`` of zeros and ones."""


class Lesion:
    """The lesions of pairs on the grid of a level.

    Args:
        lesions: there; what is above a half is one.
        prediction: ``(B, n, *S)`` that the fields below are composed into, or ``None``.
        unit: length of the finest voxel edge in voxels of each axis.
    """

    def __init__(self, lesions: Lesions, prediction: Tensor | None, unit: Sequence[float]) -> None:
        self.fixed, self.moving = lesions
        self.prediction, self.edges = prediction, [1 / u for u in unit]
        self.places: list[tuple[tuple[slice, ...], Tensor] | None] = []

    def settle(self, field: Tensor) -> None:
        """Look where the lesions are in a field ``(B, n, *S)``, and let it follow there from around."""
        place = None if self.fixed is None else self.fixed > 0.5
        if self.moving is not None:
            led = torch.empty_like(self.moving)
            kernels.sample(self.moving, field, self.prediction, None, None, led)
            place = led > 0.5 if place is None else place | (led > 0.5)
        assert place is not None  # for mypy
        self.places = [_boxed(one) for one in place[:, 0]]
        self._follow(field, _SETTLED, None)

    def follow(self, field: Tensor, moved: Tensor) -> None:
        """Let a field ``(B, n, *S)`` follow, where it was settled, in the pairs that ``moved``, ``(B,)``."""
        self._follow(field, _EACH, moved)

    def _follow(self, field: Tensor, cycles: int, moved: Tensor | None) -> None:
        for pair, found in enumerate(self.places):
            if found is None:
                continue
            box, inside = found
            where = (slice(pair, pair + 1), slice(None), *box)
            part = field[where]
            new = part.to(torch.promote_types(field.dtype, torch.float32), copy=True)
            extend_in_place(new, inside.to(new.dtype), self.edges, cycles)
            part.copy_(new if moved is None else torch.where(moved[pair], new, part))


def _boxed(place: Tensor) -> tuple[tuple[slice, ...], Tensor] | None:
    """The box around all of a mask ``(*S)``, a voxel wider, and the mask in it, ``(1, 1, *box)``; ``None``: empty."""
    box = []
    for axis, size in enumerate(place.shape):
        others = [a for a in range(place.dim()) if a != axis]
        found = place.sum(others).nonzero().flatten().tolist()
        if not found:
            return None
        box.append(slice(max(0, found[0] - 1), min(size, found[-1] + 2)))
    return tuple(box), place[tuple(box)][None, None]


def checked_lesion(lesion: Any, image: Tensor, name: str, of: str) -> Tensor | None:
    """Zeros and ones ``(B, 1, *S)`` on the grid of the image ``of``, float32; ``None`` for ``None`` and for zeros.

    Raises:
        TypeError: no tensor.
        ValueError: another shape or device, values below zero or not finite, or a lesion that leaves nothing.
    """
    if lesion is None:
        return None
    lesion = plain(name, lesion)
    expected = (image.shape[0], 1, *image.shape[2:])
    if tuple(lesion.shape) != expected:
        raise ValueError(f"{name} must be (B, 1, *S) = {expected} on the grid of {of}, got shape {tuple(lesion.shape)}")
    if lesion.device != image.device:
        raise ValueError(f"{name} must be on the device of {of}, {image.device}, got {lesion.device}")
    check_finite(name, lesion)
    if float(lesion.min()) < 0:
        raise ValueError(f"{name} must be zero where there is none and positive where there is, got {lesion.min():g}")
    lesion = (lesion > 0).to(torch.float32)
    if whole := (lesion.flatten(1).amin(1) > 0).nonzero().flatten().tolist():
        raise ValueError(f"{name} must leave something of {of}, got all of it for pairs {whole}")
    return lesion if bool(lesion.any()) else None


def outside(mask: Any, lesion: Tensor | None, name: str) -> Any:
    """A mask, given as to :func:`monai_lm.refine`, without a lesion ``(B, 1, *S)``; ValueError if nothing is left."""
    if lesion is None or mask is None:
        return mask if lesion is None else 1 - lesion
    mask = plain(name, mask)
    if mask.shape != lesion.shape or mask.device != lesion.device:
        return mask  # is refused as it is
    left = mask * (1 - lesion)
    if gone := (mask.flatten(1).any(1) & ~left.flatten(1).any(1)).nonzero().flatten().tolist():
        raise ValueError(f"{name} must leave something outside of the lesion, got nothing for pairs {gone}")
    return left
