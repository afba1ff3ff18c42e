"""Fields of registration networks in this package's convention, and which convention a field is in.

A field here is a displacement ``(B, n, *S)`` on the fixed grid, in voxels, channel ``c`` along array axis ``c``, with
``warped(x) = moving(x + ddf(x))``. VoxelMorph, TransMorph and MONAI's networks return that, and need no conversion.
The functions take what the networks return, and do as ``convert`` of :class:`monai_lm.RegistrationInferer`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral, Real

import torch
import torch.nn.functional as F
from torch import Tensor

from monai_lm.fields import compose, integrate, warp
from monai_lm.fields.topology import folded_cells
from monai_lm.similarity import Similarity, get_similarity
from monai_lm.solver.checks import check_field, check_images, check_spacing, plain
from monai_lm.solver.pyramid import Level, make_level, move_field, shrink

__all__ = [
    "CONVENTIONS",
    "MILLIMETRES",
    "Check",
    "check",
    "from_coarse",
    "from_grid_sample",
    "from_icon",
    "from_lapirn",
    "from_positions",
    "from_symnet",
    "from_symnet_velocities",
]


def from_grid_sample(grid: Tensor, align_corners: bool = True, size: Sequence[int] | None = None) -> Tensor:
    """A map for :func:`torch.nn.functional.grid_sample`.

    Args:
        grid: ``(B, *S, n)``, where the voxels of the fixed grid are led to in the moving image, in [-1, 1], the last
            axis of the array first.
        align_corners: as it is passed to ``grid_sample``: whether -1 and 1 are the centres of the first and last voxel
            or their outer edges.
        size: voxel counts of the moving image; default: those of the grid.

    Returns:
        ``(B, n, *S)`` displacement in voxels.

    Raises:
        ValueError: another shape.
    """
    _check_tensor(grid, "grid")
    n = grid.dim() - 2
    if n not in (2, 3) or grid.shape[-1] != n:
        raise ValueError(f"grid must be (B, *S, n) with n = len(S) = 2 or 3, got shape {tuple(grid.shape)}")
    own = tuple(grid.shape[1:-1])
    length = grid.new_tensor(own if size is None else _voxel_counts(size, n))
    normalised = grid.flip(-1) + 1
    voxels = normalised / 2 * (length - 1) if align_corners else (normalised * length - 1) / 2
    return voxels.movedim(-1, 1) - _identity(own, grid)


def from_lapirn(flow: Tensor) -> Tensor:
    """A displacement ``(B, n, *S)`` in units of which the image is 2 wide, the last axis of the array first.

    That is what LapIRN and Conditional LapIRN return, and what is added to the identity of ``grid_sample`` with
    ``align_corners=True``.

    Raises:
        TypeError: no tensor.
        ValueError: another shape.
    """
    _check(flow, "flow")
    return flow.flip(1) * _per_axis([(s - 1) / 2 for s in flow.shape[2:]], flow)


def from_symnet(flow: Tensor, range_flow: float = 100.0) -> Tensor:
    """A displacement ``(B, n, *S)`` in voxels divided by the ``range_flow`` of SYMNet's scripts, last array axis first.

    That is what its scripts compose of the two velocities that the network itself returns, for which there is
    :func:`from_symnet_velocities`.

    Raises:
        TypeError: no tensor.
        ValueError: another shape.
    """
    _check(flow, "flow")
    return flow.flip(1) * range_flow


def from_symnet_velocities(velocities: Sequence[Tensor], range_flow: float = 100.0, steps: int = 7) -> Tensor:
    """The two velocities ``(B, n, *S)`` that ``SYMNet(fixed, moving)`` returns, integrated and composed to one field.

    Each image goes half the way: the field is that of the second velocity after that of the negative first one.

    Args:
        velocities: of the fixed and of the moving image, as :func:`from_symnet` has them.
        range_flow: as in SYMNet's scripts.
        steps: squarings of the integration, ``time_step`` of its scripts.

    Returns:
        ``(B, n, *S)`` in voxels. Fields are extended by their border value here and by zeros there: to be the same, the
        images need a margin as wide as the displacements.

    Raises:
        TypeError: no tensors.
        ValueError: other shapes, or another number of velocities.
    """
    if isinstance(velocities, Tensor) or len(velocities) != 2:
        got = type(velocities).__name__ if isinstance(velocities, Tensor) else f"{len(velocities)} entries"
        raise ValueError(f"velocities must be the two that the network returns, got {got}")
    fixed, moving = (from_symnet(velocity, range_flow) for velocity in velocities)
    return compose(integrate(moving, steps), integrate(-fixed, steps))


def from_positions(positions: Tensor) -> Tensor:
    """Where voxels of the fixed grid lead, ``(B, n, *S)`` in voxels of the moving one, as VFA's ``results["grid"]``.

    Raises:
        TypeError: no tensor.
        ValueError: another shape.
    """
    _check(positions, "positions")
    return positions - _identity(positions.shape[2:], positions)


def from_icon(phi: Tensor) -> Tensor:
    """ICON's and uniGradICON's map ``(B, n, *S)`` in [0, 1], in the order of the array's axes, ``phi_AB(identity)``.

    0 and 1 are the centres of the first and the last voxel: its units are of one voxel less than an axis has.

    Raises:
        TypeError: no tensor.
        ValueError: another shape.
    """
    _check(phi, "phi")
    return phi * _per_axis([s - 1 for s in phi.shape[2:]], phi) - _identity(phi.shape[2:], phi)


def from_coarse(ddf: Tensor, size: Sequence[int], factor: float | Sequence[float] | None = None) -> Tensor:
    """A displacement on a grid whose voxels are blocks of the image's, as convexAdam's, on the grid of the image.

    So is the grid of an image that :func:`torch.nn.functional.interpolate` resized, as uniGradICON's scripts do, unless
    it was told ``align_corners=True``.

    Args:
        ddf: ``(B, n, *P)`` in voxels of its own grid, channels in the order of the array's axes.
        size: voxel counts of the image.
        factor: voxels of the image along a voxel of the coarse grid, one or one per axis (convexAdam's ``grid_sp``);
            default: ``size / P``.

    Returns:
        ``(B, n, *size)`` in voxels; linear in between, extended by the border value. For grids whose corner *voxels*
        coincide with the image's, see :func:`monai_lm.fields.resample`.

    Raises:
        TypeError: ``ddf`` is no tensor.
        ValueError: another shape; a size that is no voxel count per axis; factors that are no positive number, or one
            per axis, or of which the blocks do not fill the image: ``P * factor`` differs from ``size`` by a block.
    """
    _check(ddf, "ddf")
    n, own = ddf.shape[1], tuple(ddf.shape[2:])
    size = _voxel_counts(size, n)
    factors = [s / p for s, p in zip(size, own, strict=True)] if factor is None else factor
    values: list[float] = list(factors) if isinstance(factors, Sequence) else [factors] * n
    if len(values) != n or not all(isinstance(v, Real) and 0 < float(v) < float("inf") for v in values):
        raise ValueError(f"factor must be a positive number or {n} of them, an axis each, got {factor!r}")
    if any(abs(p * f - s) >= max(f, 1) for p, f, s in zip(own, values, size, strict=True)):
        about = [round(s / p, 2) for s, p in zip(size, own, strict=True)]
        raise ValueError(
            f"factor must be about size / P, {about} for a field of {own} on an image of {size} voxels, got {factor!r}"
        )
    mode = "bilinear" if n == 2 else "trilinear"
    return F.interpolate(ddf, size=size, mode=mode, align_corners=False) * _per_axis(values, ddf)


CONVENTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "voxels": lambda u: u,
    "reversed": lambda u: u.flip(1),
    "normalised": lambda u: u * _per_axis([(s - 1) / 2 for s in u.shape[2:]], u),
    "normalised reversed": from_lapirn,
    "inverse direction": lambda u: -u,
    "positions": from_positions,
    "grid_sample": lambda u: from_grid_sample(u.movedim(1, -1)),
    "icon": from_icon,
}
"""Ways to read ``(B, n, *S)``, each with what makes a displacement in voxels of it. The negated field is near the
inverse of one that leads from the moving to the fixed image; invert such a field, :func:`monai_lm.fields.invert`."""

MILLIMETRES: dict[str, Callable[[Sequence[float], Tensor], Tensor]] = {
    "millimetres": lambda spacing, u: u / _per_axis(spacing, u),
    "millimetres LPS": lambda spacing, u: u / _per_axis([-s if axis < 2 else s for axis, s in enumerate(spacing)], u),
}
"""Further ways, for which the voxel edges must be known: along the axes of the array, which is RAS where they lead to
the right, to the front and up, and LPS on such a grid."""

_FOLDED = 0.5
_GAIN = 0.05
_LEAD = 0.25
_SMALL = 0.1
"""A reading must gain this part of what there is to gain, from no field to the fixed image itself, lead over the next
by this part of its gain, and move voxels by this many (root mean square): the interpolation alone makes images more
alike. ``python -m benchmarks conventions`` counts what these bounds are worth."""


@dataclass(frozen=True)
class Check:
    """What :func:`check` found.

    Attributes:
        losses: dissimilarity of fixed and warped image at half the resolution by reading, see :data:`CONVENTIONS` and,
            with a spacing, :data:`MILLIMETRES`;
            infinite where a field read so folds in most of its cells, and cannot be meant.
        without: the same without a field.
        perfect: the same of the fixed image and itself.
        best: the reading that makes the images clearly more alike than any other; ``None``: cannot tell, for the field
            is small, the images are nearly aligned, or do not correspond.
    """

    losses: dict[str, float]
    without: float
    perfect: float
    best: str | None

    def __str__(self) -> str:
        told = "cannot tell which convention the field is in" if self.best is None else f"the field is {self.best!r}"
        rows = [f"{name:<20}{loss:.4f}" for name, loss in sorted(self.losses.items(), key=lambda item: item[1])]
        return "\n".join([told, *rows, f"{'no field':<20}{self.without:.4f}"])


def check(
    fixed: Tensor,
    moving: Tensor,
    ddf: Tensor,
    given: str = "voxels",
    similarity: str | Similarity = "lncc",
    spacing: Sequence[float] | None = None,
) -> Check:
    """Tell by similarity which convention a field is in.

    Args:
        fixed: ``(B, C, *S)``.
        moving: ``(B, C, *S)``, on the same grid.
        ddf: ``(B, n, *S)``, as the network returned it; a map ``(B, *S, n)`` with its components moved to the front.
        given: the convention that it is meant to be in, one of :data:`CONVENTIONS` or, with a spacing,
            :data:`MILLIMETRES`.
        similarity: a measure that fits the images, see :func:`monai_lm.refine`.
        spacing: voxel edge per axis in millimetres: those are tried, too, unless they are voxels (edges of 1).

    Returns:
        The dissimilarity by convention, and which is the best; over all pairs of the batch.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes that do not fit, values that are not finite, an unknown ``given``, or a spacing that is not.

    Warns:
        UserWarning: another convention fits clearly better than ``given``.
    """
    if given not in CONVENTIONS and given not in MILLIMETRES:
        raise ValueError(f"given must be one of {[*CONVENTIONS, *MILLIMETRES]}, got {given!r}")
    if given in MILLIMETRES and spacing is None:
        raise ValueError(f"spacing must be given for given={given!r}, the edges of a voxel")
    fixed, moving, ddf = (plain(name, x) for name, x in (("fixed", fixed), ("moving", moving), ("ddf", ddf)))
    check_images(fixed, moving)
    check_field("ddf", ddf, len(fixed), fixed.shape[2:], fixed.device)
    readings = CONVENTIONS if spacing is None else CONVENTIONS | _in_millimetres(spacing, ddf, given)
    measure = get_similarity(similarity).unaligned
    ones = (1.0,) * ddf.shape[1]
    finest, level = (make_level(fixed.shape[2:], ones, scale) for scale in (1, 2))
    with torch.no_grad():
        images = shrink(fixed, level), shrink(moving, level)
        voxels = torch.Size(level.size).numel()
        itself, source = measure.prepare(images[0], images[0])
        perfect = float(measure.evaluate(source, itself)[0].mean()) / voxels
        reference, source = measure.prepare(*images)
        without = float(measure.evaluate(source, reference)[0].mean()) / voxels
        losses = {}
        for name, read in readings.items():
            field = _meant(read(ddf), finest, level)
            loss = float("inf") if field is None else float(measure.evaluate(warp(source, field), reference)[0].mean())
            losses[name] = loss / voxels
    best = _best(losses, without, perfect)
    if best is not None and float(readings[best](ddf).square().sum(1).mean().sqrt()) < _SMALL:
        best = None
    out = Check(losses, without, perfect, best)
    if out.best not in (None, given):
        warnings.warn(
            f"ddf fits the images better as {out.best!r} than as {given!r}: dissimilarity {losses[out.best]:.4f} "
            f"to {losses[given]:.4f}, {without:.4f} without a field; see monai_lm.convert",
            stacklevel=2,
        )
    return out


def _in_millimetres(spacing: Sequence[float], ddf: Tensor, given: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """The readings of :data:`MILLIMETRES` for a spacing, without those that others are, too, unless ``given``."""
    edges = check_spacing(spacing, ddf.shape[1])
    same = {"millimetres": "voxels"} | ({"millimetres LPS": "inverse direction"} if len(edges) == 2 else {})
    are_ones = max(abs(edge - 1) for edge in edges) < 1e-3
    return {
        name: partial(read, edges)
        for name, read in MILLIMETRES.items()
        if not (are_ones and name in same and name != given)
    }


def _meant(ddf: Tensor, finest: Level, level: Level) -> Tensor | None:
    """A field in voxels at the resolution that is looked at; none if it folds in most of its cells."""
    field = move_field(ddf, finest, level)
    return None if float(folded_cells(field).float().mean()) > _FOLDED else field


def _best(losses: dict[str, float], without: float, perfect: float) -> str | None:
    (first, least), (_, second), *_ = sorted(losses.items(), key=lambda item: item[1])
    gain = without - least
    clear = gain > _GAIN * (without - perfect) and second - least > _LEAD * gain
    return first if clear else None


def _check_tensor(value: Tensor, name: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def _voxel_counts(size: Sequence[int], n: int) -> tuple[int, ...]:
    """A size as it is; ValueError unless it is ``n`` positive whole numbers."""
    values = tuple(size) if isinstance(size, Sequence) else ()
    if len(values) != n or not all(isinstance(v, Integral) and not isinstance(v, bool) and v > 0 for v in values):
        raise ValueError(f"size must be {n} voxel counts, for the field has {n} components, got {size!r}")
    return tuple(int(v) for v in values)


def _check(field: Tensor, name: str) -> None:
    _check_tensor(field, name)
    if field.dim() not in (4, 5) or field.shape[1] != field.dim() - 2:
        raise ValueError(f"{name} must be (B, n, *S) with n = len(S) = 2 or 3, got shape {tuple(field.shape)}")


def _per_axis(values: Sequence[float], like: Tensor) -> Tensor:
    return like.new_tensor(values).view(-1, *[1] * len(values))


def _identity(size: Sequence[int], like: Tensor) -> Tensor:
    """Voxel positions ``(n, *S)``."""
    axes = [torch.arange(s, dtype=like.dtype, device=like.device) for s in size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))
