"""Metrics of fields: folds, regularity, landmarks, the inverse, labels; as functions and as MONAI's metrics.

The latter are those of :mod:`monai_lm.fields.cumulative`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from monai_lm.fields import fold_count, jacobian_determinant, sample_points
from monai_lm.fields.algebra import compose, lengths
from monai_lm.fields.finite import check_finite
from monai_lm.fields.topology import LOG_FLOOR, inside_of

if TYPE_CHECKING:
    from monai_lm.fields.cumulative import *  # noqa: F403

__all__ = [
    "compare_labels",
    "inverse_consistency",
    "label_overlap",
    "measure",
    "sd_log_jacobian",
    "target_registration_error",
]

# MONAI takes seconds to import, SciPy a part of one: what needs them imports them.


def __getattr__(name: str) -> Any:
    """MONAI's metrics, imported when one is asked for."""
    if not name.endswith("Metric"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from monai_lm.fields import cumulative

    return getattr(cumulative, name)


def sd_log_jacobian(ddf: Tensor, floor: float = LOG_FLOOR, mask: Tensor | None = None) -> Tensor:
    """Standard deviation over all voxels of the logarithm of the Jacobian determinant (central differences).

    Args:
        ddf: ``(B, n, *S)`` in voxels.
        floor: smaller determinants, negative ones included, count as this; how many voxels fold is for
            :func:`monai_lm.fields.fold_count` to say.
        mask: ``(B, 1, *S)``, not zero at the voxels that count; derivatives at its rim see the field outside, too.

    Returns:
        ``(B,)``.

    Raises:
        ValueError: a mask of another shape, one that is not finite, or one that is empty for a pair.

    Source:
        Leow et al., "Statistical properties of Jacobian maps and the realization of unbiased large-deformation
        nonlinear image registration", IEEE Transactions on Medical Imaging 2007.
    """
    logarithm = jacobian_determinant(ddf).flatten(1).clamp(min=floor).log()
    if mask is None:
        return logarithm.std(1, correction=0)
    inside = inside_of(mask, ddf).flatten(1)
    count = inside.sum(1)
    mean = (logarithm * inside).sum(1) / count
    return (((logarithm - mean[:, None]) ** 2 * inside).sum(1) / count).sqrt()


def target_registration_error(ddf: Tensor, fixed_points: Tensor, moving_points: Tensor, spacing: Tensor) -> Tensor:
    """Distance of every fixed landmark, moved by the field, from its counterpart in the moving image.

    Args:
        ddf: ``(B, n, *S)`` in voxels, from the fixed to the moving grid.
        fixed_points: ``(B, N, n)`` in voxels of the fixed grid; NaN points give NaN.
        moving_points: ``(B, N, n)`` in voxels of the moving grid.
        spacing: ``(B, n)`` voxel edges of the moving grid, in millimetres.

    Returns:
        ``(B, N)`` in millimetres.

    Raises:
        ValueError: shapes that do not fit, or a field that is not finite.
    """
    if fixed_points.shape != moving_points.shape or fixed_points.shape[::2] != ddf.shape[:2]:
        raise ValueError(
            f"fixed_points and moving_points must be (B, N, n) for a ddf (B, n, *S), got {tuple(fixed_points.shape)}, "
            f"{tuple(moving_points.shape)} and {tuple(ddf.shape)}"
        )
    error = fixed_points + sample_points(ddf, fixed_points) - moving_points
    return torch.linalg.vector_norm(error * spacing[:, None], dim=2)


def inverse_consistency(ddf: Tensor, inverse: Tensor) -> Tensor:
    """Mean distance in voxels by which a field and the field back miss the identity, from voxels that stay inside.

    Args:
        ddf: ``(B, n, *S)`` in voxels.
        inverse: ``(B, n, *S)`` in voxels, on the same grid: first ``ddf`` is followed, then ``inverse``.

    Returns:
        ``(B,)``; NaN where every voxel is led out of the grid.

    Raises:
        ValueError: fields of different shapes, or one that is not finite.
    """
    if ddf.shape != inverse.shape:
        raise ValueError(f"inverse must have the shape of ddf, {tuple(ddf.shape)}, got {tuple(inverse.shape)}")
    for name, field in (("ddf", ddf), ("inverse", inverse)):
        check_finite(name, field)
    missed = lengths(compose(inverse, ddf))
    inside = torch.ones_like(missed, dtype=torch.bool)
    for axis, size in enumerate(ddf.shape[2:]):
        voxels = torch.arange(size, device=ddf.device, dtype=ddf.dtype)
        target = ddf[:, axis] + voxels.view([-1 if a == axis else 1 for a in range(ddf.dim() - 2)])
        inside &= (target >= 0) & (target <= size - 1)
    return missed.masked_fill(~inside, torch.nan).flatten(1).nanmean(1)


def label_overlap(
    warped: Tensor, fixed: Tensor, spacing: Sequence[float] | None = None
) -> tuple[dict[int, float], dict[int, float]]:
    """Dice and, given a spacing, 95 % Hausdorff distance in millimetres, of every label but 0 of one pair.

    Label maps are ``(*S)``. One label at a time, in the box that holds it in both maps: 138 structures of a brain as
    channels would take gigabytes. A label that only one of the maps has gets a Dice of 0 and a NaN for its distance.

    Raises:
        ValueError: maps of different shapes, with values that are not whole numbers, or with labels so large that their
            floating point type cannot tell them apart.
    """
    if warped.shape != fixed.shape:
        raise ValueError(f"warped and fixed must have one shape, got {tuple(warped.shape)} and {tuple(fixed.shape)}")
    # surfaces are measured on the CPU in any case: two copies instead of some waits for each label
    warped, fixed = warped.cpu(), fixed.cpu()
    for name, labels in (("warped", warped), ("fixed", fixed)):
        if labels.is_floating_point() and float(labels.max()) > (most := 2 / torch.finfo(labels.dtype).eps):
            raise ValueError(
                f"{name} must hold labels up to {most:.0f} in {labels.dtype}, got larger ones; use integers"
            )
    warped, fixed = (labels if labels.is_floating_point() else labels.long() for labels in (warped, fixed))
    dice, hd95 = {}, {}
    values = torch.cat([warped.unique(), fixed.unique()]).unique()
    if bool((values != values.round()).any()):
        raise ValueError(f"label maps must hold whole numbers, got {float(values[values != values.round()][0])}")
    boxes = [_boxes(labels, values) for labels in (warped, fixed)]
    for value, *found in zip(values.tolist(), *boxes, strict=True):
        if value == 0:
            continue
        box = _around([b for b in found if b is not None])
        first, second = ((labels[box] == value).numpy() for labels in (warped, fixed))
        sizes = np.count_nonzero(first), np.count_nonzero(second)
        dice[int(value)] = 2 * np.count_nonzero(first & second) / sum(sizes)
        if spacing is not None:
            hd95[int(value)] = _surface_distance(first, second, spacing) if all(sizes) else float("nan")
    return dice, hd95


def _surface_distance(first: np.ndarray, second: np.ndarray, spacing: Sequence[float]) -> float:
    """95th percentile of the distances from the surface of one mask ``(*S)`` to that of the other, the larger way.

    As MONAI's ``compute_hausdorff_distance`` has it: the surface is what erosion takes away.
    """
    from scipy.ndimage import binary_erosion
    from scipy.spatial import KDTree

    surfaces = [np.argwhere(mask & ~binary_erosion(mask)) * np.asarray(spacing) for mask in (first, second)]
    ways = zip(surfaces, reversed(surfaces), strict=True)
    return max(float(np.percentile(KDTree(there, leafsize=32).query(here)[0], 95)) for here, there in ways)


def _boxes(labels: Tensor, values: Tensor) -> list[tuple[slice, ...] | None]:
    """For each of the sorted values the box of a label map ``(*S)`` that holds it; ``None`` where it is not there."""
    from scipy.ndimage import find_objects

    number = torch.searchsorted(values, labels.contiguous(), out_int32=True) + 1
    boxes: list[tuple[slice, ...] | None] = find_objects(number.numpy(), len(values))
    return boxes


def _around(boxes: list[tuple[slice, ...]]) -> tuple[slice, ...]:
    """The box that holds all of them and, where the map goes on, a voxel more on every side."""
    return tuple(
        slice(max(0, min(s.start for s in a) - 1), max(s.stop for s in a) + 1) for a in zip(*boxes, strict=True)
    )


def compare_labels(
    warped: Tensor, fixed: Tensor, spacings: Sequence[Sequence[float]] | None = None
) -> dict[str, Tensor]:
    """``dice`` of label maps ``(B, 1, *S)``, and, given the spacing of every pair, ``hd95_mm``, ``(B,)``.

    Means over the labels above 0 that either map of the pair has; ``hd95_mm`` over those that both have, so that two
    fields are compared on other labels where one of them loses a structure. NaN where there is no label.
    """
    pairs = [
        label_overlap(w[0], f[0], None if spacings is None else spacings[i])
        for i, (w, f) in enumerate(zip(warped, fixed, strict=True))
    ]
    out = {"dice": [list(dice.values()) for dice, _ in pairs]}
    if spacings is not None:
        out["hd95_mm"] = [list(hd95.values()) for _, hd95 in pairs]
    return {
        name: torch.stack([torch.tensor(v, dtype=torch.float32).nanmean() for v in values]).to(warped.device)
        for name, values in out.items()
    }


def measure(
    ddf: Tensor,
    labels: tuple[Tensor, Tensor] | None = None,
    distances: Tensor | None = None,
    spacings: Sequence[Sequence[float]] | None = None,
    mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """What a field is worth, ``(B,)`` each: one vocabulary for every table, log and file.

    Where two fields are compared, ``_before`` is appended for the one before the refinement, ``_after`` for the other.

    Args:
        ddf: ``(B, n, *S)`` in voxels.
        labels: label maps ``(B, 1, *S)``, the warped one and that of the fixed image.
        distances: ``(B, N)`` of every landmark to its counterpart, in millimetres; NaN where there is none.
        spacings: voxel edges of every pair, for surface distances; ``None`` leaves them out.
        mask: ``(B, 1, *S)``, not zero where ``folds`` and ``sdlogj`` count; default: everywhere.

    Returns:
        ``folds``, folded cells; ``sdlogj``; ``dice`` and ``hd95_mm`` with labels, see :func:`compare_labels`;
        ``tre_mm``, the mean distance, with landmarks.
    """
    out = {"folds": fold_count(ddf, mask).float(), "sdlogj": sd_log_jacobian(ddf, mask=mask)}
    if labels is not None:
        out |= compare_labels(*labels, spacings)
    if distances is not None:
        out["tre_mm"] = distances.nanmean(1)
    return out
