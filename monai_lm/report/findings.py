"""What a report says in numbers and words: metrics before and after, warnings, the verdict."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from monai_lm.fields import fold_count, warp
from monai_lm.metrics import label_overlap, sd_log_jacobian, target_registration_error
from monai_lm.result import RefinementResult

__all__ = ["LARGE_MISALIGNMENT", "Case", "FieldMetrics", "centre_of_mass", "measure_field", "verdict", "warnings_of"]

LARGE_MISALIGNMENT = 0.1
"""A start is far off if the two centres of mass are further apart than this part of the longest edge of the grid."""


@dataclass(frozen=True)
class Case:
    """A checked pair and what is known of it; tensors on the CPU.

    Attributes:
        fixed: ``(1, C, *S)`` float32.
        moving: ``(1, C, *S)`` float32.
        result: the refinement.
        ddf: ``(1, n, *S)``, the refined field in voxels.
        prediction: ``(1, n, *S)`` or None.
        affine: ``(4, 4)`` voxel-to-RAS, or None where unknown.
        spacing: voxel edges in millimetres; ones where unknown.
        labels: fixed and moving label map, ``(1, 1, *S)``, or None.
        landmarks: fixed and moving points, ``(1, N, n)`` in voxels, or None.
        settings: what the refinement was called with.
        device: where the images were.
    """

    fixed: Tensor
    moving: Tensor
    result: RefinementResult
    ddf: Tensor
    prediction: Tensor | None
    affine: Any
    spacing: tuple[float, ...]
    labels: tuple[Tensor, Tensor] | None
    landmarks: tuple[Tensor, Tensor] | None
    settings: Mapping[str, Any]
    device: torch.device

    @property
    def start(self) -> Tensor:
        """The field that the refinement started from: the prediction, or zeros."""
        return torch.zeros_like(self.ddf) if self.prediction is None else self.prediction


@dataclass(frozen=True)
class FieldMetrics:
    """Values of one field; None where there is nothing to measure them on.

    Attributes:
        dice: per label of either map, in [0, 1].
        hd95: per label, 95th percentile of the symmetric surface distance in millimetres; NaN if one side is empty.
        tre: mean distance of the landmarks in millimetres.
        sdlogj: standard deviation of the logarithm of the Jacobian determinant.
        folds: folded cells.
        displacement: mean length of the displacement in millimetres.
    """

    dice: dict[int, float] | None
    hd95: dict[int, float] | None
    tre: float | None
    sdlogj: float
    folds: int
    displacement: float

    @property
    def mean_dice(self) -> float | None:
        """Mean over the labels."""
        return sum(self.dice.values()) / len(self.dice) if self.dice else None

    @property
    def surfaces(self) -> set[int]:
        """Labels that have a distance: those that both maps have."""
        return {label for label, value in (self.hd95 or {}).items() if value == value}  # NaN is not itself

    def mean_hd95(self, labels: Collection[int]) -> float | None:
        """Mean over some of the labels."""
        return sum((self.hd95 or {})[label] for label in labels) / len(labels) if labels else None


def centre_of_mass(image: Tensor) -> tuple[float, ...]:
    """Centre, in voxels, of the voxels ``(*S)`` above the image's mean; the grid's centre for a constant image."""
    inside = (image > image.mean()).nonzero().double()
    if len(inside) == 0:
        return tuple((s - 1) / 2 for s in image.shape)
    return tuple(inside.mean(0).tolist())


def measure_field(case: Case, ddf: Tensor) -> FieldMetrics:
    """All values of a field ``(1, n, *S)`` that the case has something for."""
    edges = torch.tensor(case.spacing).view(1, -1, *[1] * len(case.spacing))
    dice, hd95 = None, None
    if case.labels is not None:
        warped = warp(case.labels[1], ddf, mode="nearest")
        dice, hd95 = label_overlap(warped[0, 0], case.labels[0][0, 0], case.spacing)
    return FieldMetrics(
        dice=dice,
        hd95=hd95,
        tre=_tre(case, ddf),
        sdlogj=float(sd_log_jacobian(ddf)),
        folds=int(fold_count(ddf)),
        displacement=float(torch.linalg.vector_norm(ddf * edges, dim=1).mean()),
    )


def _tre(case: Case, ddf: Tensor) -> float | None:
    if case.landmarks is None:
        return None
    error = target_registration_error(ddf, *case.landmarks, torch.tensor([case.spacing]))
    value = float(error.nanmean())
    return value if value == value else None


def _misalignment(case: Case) -> tuple[float, float]:
    """Distance of the centres of mass at the start, and the longest edge of the grid, both in millimetres."""
    start = warp(case.moving, case.start)
    centres = centre_of_mass(case.fixed[0, 0]), centre_of_mass(start[0, 0])
    offsets = [(a - b) * edge for a, b, edge in zip(*centres, case.spacing, strict=True)]
    edges = [s * edge for s, edge in zip(case.fixed.shape[2:], case.spacing, strict=True)]
    return sum(o * o for o in offsets) ** 0.5, max(edges)


def warnings_of(case: Case, before: FieldMetrics, after: FieldMetrics) -> dict[str, str]:
    """What a reader must know before trusting the field: a short name of each condition that holds, and a sentence.

    Args:
        case: the pair.
        before: values of the field that the refinement started from.
        after: values of the refined field.
    """
    found: dict[str, str] = {}
    if after.folds > 0:
        found["folds"] = (
            f"The refined field still folds in {after.folds} cells. This must never happen: do not use the field, and "
            "report it as a defect of monai_lm."
        )
    initial, final = float(case.result.initial_loss[0]), float(case.result.final_loss[0])
    if not final < initial:
        found["similarity"] = (
            f"Similarity did not improve: the dissimilarity was {initial:.4g} before and is {final:.4g} after."
        )
    folds = before.folds
    if case.prediction is not None and folds > 0:
        shift = float(case.result.repair_shift[0])
        found["repaired"] = (
            f"The prediction folded space in {folds} cells; it was repaired first, which moved it by {shift:.3g} "
            "voxels on average."
        )
    distance, longest = _misalignment(case)
    if distance > LARGE_MISALIGNMENT * longest:
        found["misaligned"] = (
            f"Large initial misalignment: at the start the centres of the two images were {distance:.1f} mm apart "
            f"({100 * distance / longest:.0f} % of the longest edge). Align them rigidly or affinely first."
        )
    found.update(_worse(before, after))
    budget = case.settings.get("seconds")
    if budget is not None and case.result.seconds >= float(budget):
        found["budget"] = f"The time budget of {float(budget):g} s was used up; more time may bring a better match."
    return found


def _worse(before: FieldMetrics, after: FieldMetrics) -> dict[str, str]:
    found = {}
    if before.mean_dice is not None and after.mean_dice is not None and after.mean_dice < before.mean_dice:
        found["dice"] = f"The mean Dice of the labels fell from {before.mean_dice:.3f} to {after.mean_dice:.3f}."
    if before.tre is not None and after.tre is not None and after.tre > before.tre:
        found["tre"] = f"The landmarks moved apart: their mean error rose from {before.tre:.2f} to {after.tre:.2f} mm."
    return found


def verdict(case: Case, warnings: Mapping[str, str]) -> tuple[str, str]:
    """The state (``"good"``, ``"check"`` or ``"bad"``) and the first sentence of the report."""
    if "folds" in warnings:
        return "bad", "Do not use this field: it folds space."
    initial, final = float(case.result.initial_loss[0]), float(case.result.final_loss[0])
    free = "The field has no folds"
    if "similarity" in warnings:
        return "check", f"{free}, but the refinement did not make the images more similar."
    worse = [name for key, name in (("dice", "labels"), ("tre", "landmarks")) if key in warnings]
    if worse:
        return (
            "check",
            f"{free} and the images look more alike, but the {' and the '.join(worse)} fit worse than before.",
        )
    change = f"{free} and the images match better than before (dissimilarity {initial:.4g} → {final:.4g})"
    return ("check", f"{change}; see the remarks below.") if warnings else ("good", f"{change}.")
