"""The checked pair that a report is about."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from monai_lm.fields import warp
from monai_lm.fields.finite import check_number
from monai_lm.fields.metrics import target_registration_error
from monai_lm.fields.space import check_affine, spacing_of
from monai_lm.similarity.weighted import continued
from monai_lm.solver.checks import check_field, check_images, check_shown, checked_mask, plain
from monai_lm.solver.result import RefinementResult

__all__ = ["Case", "checked_case"]

Warper = Callable[[Tensor], Tensor]
"""From a field ``(1, n, *S)`` in voxels to the moving labels ``(1, 1, *S)`` under it."""


@dataclass(frozen=True)
class Case:
    """A checked pair and what is known of it; tensors on the CPU.

    Attributes:
        fixed: ``(1, C, *S)`` float32.
        moving: ``(1, C, *S)`` float32.
        result: the refinement.
        ddf: ``(1, n, *S)``, the refined field in voxels.
        prediction: ``(1, n, *S)``, or None; also where there was one that was not used.
        affine: ``(4, 4)`` voxel-to-RAS, or None where unknown.
        spacing: voxel edges in millimetres; ones where unknown.
        labels: fixed label map ``(1, 1, *S)``, and the moving one or what warps it by a field; or None.
        landmarks: fixed and moving points, ``(1, N, n)`` in voxels, or what gives a field's mean error in mm; or None.
        settings: what the refinement was called with.
        device: where the images were.
        mask: where the similarity counted, ``(1, 1, *S)``, or None.
        initial: what the moving image is before any field, as a heading.
        aligned: what was found by a linear alignment before, in words, or None.
        uncertainty: how far the refined field may be off, ``(1, 1, *S)`` in millimetres, or None.
        notes: remarks that say nothing against the field, by short names.
    """

    fixed: Tensor
    moving: Tensor
    result: RefinementResult
    ddf: Tensor
    prediction: Tensor | None
    affine: Any
    spacing: tuple[float, ...]
    labels: tuple[Tensor, Tensor | Warper] | None
    landmarks: tuple[Tensor, Tensor] | Callable[[Tensor], float] | None
    settings: Mapping[str, Any]
    device: torch.device
    mask: Tensor | None = None
    initial: str = "not registered"
    aligned: str | None = None
    uncertainty: Tensor | None = None
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def start(self) -> Tensor:
        """The field that the refinement started from: the prediction, or zeros."""
        return torch.zeros_like(self.ddf) if self.prediction is None else self.prediction

    def warped_label(self, ddf: Tensor) -> Tensor | None:
        """The moving labels under a field, ``(1, 1, *S)``, sampled once; None without labels."""
        if self.labels is None:
            return None
        moving = self.labels[1]
        return moving(ddf) if callable(moving) else warp(moving, ddf, mode="nearest")

    def landmark_error(self, ddf: Tensor) -> float | None:
        """Mean distance of the landmarks under a field in millimetres; None without landmarks."""
        if self.landmarks is None:
            return None
        if callable(self.landmarks):
            value = self.landmarks(ddf)
        else:
            errors = target_registration_error(ddf, *self.landmarks, torch.tensor([self.spacing]))
            value = float(errors.nanmean())
        return value if value == value else None


def checked_case(
    fixed: Tensor,
    moving: Tensor,
    result: RefinementResult,
    prediction: Tensor | None = None,
    affine: Any = None,
    labels: Any = None,
    landmarks: Any = None,
    settings: Mapping[str, Any] | None = None,
    mask: Tensor | None = None,
    initial: str = "not registered",
    aligned: str | None = None,
    uncertainty: Tensor | None = None,
    notes: Mapping[str, str] | None = None,
) -> Case:
    """Everything checked once, on the CPU in float32; arguments and errors of :func:`monai_lm.report.write_report`.

    ``notes`` are those of the :class:`Case`.
    """
    images = [plain(name, image).cpu() for name, image in (("fixed", fixed), ("moving", moving))]
    check_images(*images)
    if len(images[0]) != 1:
        raise ValueError(f"fixed must be one pair (1, C, *S), got a batch of {len(images[0])}")
    if not isinstance(result, RefinementResult):
        raise TypeError(f"result must be a RefinementResult, got {type(result).__name__}")
    size, n = images[0].shape[2:], images[0].dim() - 2
    fields = [None if ddf is None else plain(name, ddf).cpu() for name, ddf in _fields(result, prediction)]
    for (name, _), ddf in zip(_fields(result, prediction), fields, strict=True):
        if ddf is not None:
            check_field(name, ddf, 1, size, ddf.device)
    if settings is not None and not isinstance(settings, Mapping):
        raise TypeError(f"settings must be a mapping, got {type(settings).__name__}")
    if settings and settings.get("seconds") is not None:
        check_number("settings['seconds']", settings["seconds"], 0)
    if result.unused:  # the refinement did not start from it
        fields[1] = None
    weight = None if mask is None else checked_mask(mask if not isinstance(mask, Tensor) else mask.cpu(), images[0])
    check_shown("fixed", images[0], weight)
    if weight is not None:
        images[0] = continued(images[0], torch.isfinite(images[0]).all(1, keepdim=True))
    check_shown("moving", images[1], None)
    if uncertainty is not None:
        uncertainty = plain("uncertainty", uncertainty).cpu()
        if uncertainty.shape != images[0][:, :1].shape:
            raise ValueError(
                f"uncertainty must be {(1, 1, *size)} on the grid of fixed, got {tuple(uncertainty.shape)}"
            )
    matrix = _affine_of(affine, fixed)
    return Case(
        fixed=images[0],
        moving=images[1],
        result=result,
        ddf=fields[0],  # type: ignore[arg-type]
        prediction=fields[1],
        affine=matrix,
        spacing=(1.0,) * n if matrix is None else spacing_of(matrix, n),
        labels=None if labels is None else _checked_labels(labels, size),
        landmarks=landmarks if landmarks is None or callable(landmarks) else _checked_landmarks(landmarks, n),
        settings=dict(settings or {}),
        device=fixed.device,
        mask=weight,
        initial=initial,
        aligned=aligned,
        uncertainty=uncertainty,
        notes=dict(notes or {}),
    )


def _fields(result: RefinementResult, prediction: Tensor | None) -> list[tuple[str, Tensor | None]]:
    return [("result.ddf", result.ddf), ("prediction", prediction)]


def _affine_of(affine: Any, fixed: Tensor) -> Any:
    """The affine given, or that of the fixed image; an identity that nobody gave says nothing."""
    if affine is not None:
        return check_affine("affine", affine)
    own = getattr(fixed, "affine", None)  # that of a MetaTensor; MONAI need not be here
    if own is None:
        return None
    own = own if own.dim() == 2 else own[0]
    if tuple(own.shape) != (4, 4) or torch.equal(own.cpu().double(), torch.eye(4, dtype=torch.float64)):
        return None
    return check_affine("affine of fixed", own)


def _two(name: str, value: Any) -> list[Tensor]:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"{name} must be two tensors, (fixed, moving), got {type(value).__name__}")
    return [plain(f"{name}[{i}]", item).cpu() for i, item in enumerate(value)]


def _checked_labels(labels: Any, size: torch.Size) -> tuple[Tensor, Tensor | Warper]:
    warper = labels[1] if isinstance(labels, tuple | list) and len(labels) == 2 and callable(labels[1]) else None
    maps = _two("labels", labels) if warper is None else [plain("labels[0]", labels[0]).cpu()]
    maps = [_exact(given, read) for given, read in zip(labels, maps, strict=False)]
    for i, labelled in enumerate(maps):
        if tuple(labelled.shape) != (1, 1, *size):
            raise ValueError(f"labels[{i}] must be {(1, 1, *size)} on the grid of fixed, got {tuple(labelled.shape)}")
        if not torch.equal(labelled, labelled.round()):
            raise ValueError(f"labels[{i}] must hold whole numbers, got others")
    return maps[0], maps[1] if warper is None else warper


def _exact(given: Tensor, read: Tensor) -> Tensor:
    """Labels as int64 if they are of an integer type, in which all keep their values; else as they were ``read``."""
    if given.is_floating_point():
        return read
    return (given.as_tensor() if hasattr(given, "as_tensor") else given).detach().cpu().long()


def _checked_landmarks(landmarks: Any, n: int) -> tuple[Tensor, Tensor]:
    points = [p[None] if p.dim() == 2 else p for p in _two("landmarks", landmarks)]
    for i, p in enumerate(points):
        if p.dim() != 3 or p.shape[0] != 1 or p.shape[2] != n or p.shape[1] == 0 or p.shape != points[0].shape:
            shapes = [tuple(q.shape) for q in points]
            raise ValueError(f"landmarks[{i}] must be (N, {n}) voxels, as many in both, got shapes {shapes}")
    return points[0], points[1]
