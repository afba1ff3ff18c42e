"""Slices that a report shows: which ones, and how they lie on the page."""

from __future__ import annotations

from dataclasses import dataclass, replace

import nibabel as nib
import numpy as np

from monai_lm.report.case import Case
from monai_lm.report.rivals import centre_of_mass

__all__ = ["View", "further_slices", "views_of"]

_SLICES = 5
"""Slices of every axis that the page shows, the central one included."""


@dataclass(frozen=True)
class View:
    """A slice of a grid and how it lies on the page.

    Attributes:
        name: of the plane.
        normal: array axis across the slice, None in 2D.
        index: voxel along it.
        axes: array axes shown to the right and upwards.
        flips: whether each of them runs the other way on the page.
        spacing: voxel edges in millimetres of these two axes.
        letters: patient directions at the left, right, top and bottom edge; None where unknown.
    """

    name: str
    normal: int | None
    index: int
    axes: tuple[int, int]
    flips: tuple[bool, bool]
    spacing: tuple[float, float]
    letters: tuple[str, str, str, str] | None

    def cut(self, volume: np.ndarray) -> np.ndarray:
        """Slice of a volume ``(*S)``, rows upwards and columns to the right."""
        plane = volume if self.normal is None else np.take(volume, self.index, axis=self.normal)
        plane = plane if self.axes[0] > self.axes[1] else plane.T
        return plane[:: -1 if self.flips[1] else 1, :: -1 if self.flips[0] else 1]


def views_of(case: Case) -> list[View]:
    """One view in 2D, three orthogonal ones through the fixed image's centre of mass in 3D.

    With an affine the views are those of radiology: the patient's right (or front) at the left, front (or head) up.
    """
    size = case.fixed.shape[2:]
    n = len(size)
    centre = [min(max(round(c), 0), s - 1) for c, s in zip(centre_of_mass(case.fixed[0, 0]), size, strict=True)]
    if case.affine is None:
        pairs = [(None, 0, 1)] if n == 2 else [(2, 0, 1), (1, 0, 2), (0, 1, 2)]
        return [
            View(
                "slice" if k is None else f"axis {k}, voxel {centre[k]}",
                k,
                0 if k is None else centre[k],
                (a, b),
                (False, False),
                (case.spacing[a], case.spacing[b]),
                None,
            )
            for k, a, b in pairs
        ]
    orientation = nib.io_orientation(np.asarray(case.affine))
    axis_of = {int(world): axis for axis, (world, _) in enumerate(orientation[:n])}
    sign = orientation[:, 1]
    planes = [("axial", 2, 0, 1), ("coronal", 1, 0, 2), ("sagittal", 0, 1, 2)]
    planes = planes if n == 3 else [plane for plane in planes if plane[1] not in axis_of]
    views = []
    for name, normal, right, up in planes:
        k = axis_of.get(normal)
        a, b = axis_of[right], axis_of[up]
        letters = ("RA"[right], "LP"[right], "RAS"[up], "LPI"[up])
        index = 0 if k is None else centre[k]
        title = name if k is None else f"{name}, voxel {index}"
        flips = (bool(sign[a] > 0), bool(sign[b] < 0))
        views.append(View(title, k, index, (a, b), flips, (case.spacing[a], case.spacing[b]), letters))
    return views


def further_slices(case: Case, view: View) -> list[View]:
    """Views parallel to one, spread over the part of the fixed image that is above its mean; none in 2D."""
    if view.normal is None:
        return []
    image = case.fixed[0, 0]
    inside = (image > image.mean()).nonzero()[:, view.normal].tolist() or range(image.shape[view.normal])
    first, last = min(inside), max(inside)
    found = {first + round((last - first) * (i + 1) / (_SLICES + 1)) for i in range(_SLICES)}
    nearest = min(found, key=lambda index: abs(index - view.index))
    name = view.name.split(", voxel")[0]
    return [replace(view, name=f"{name}, voxel {index}", index=index) for index in sorted(found - {nearest})]
