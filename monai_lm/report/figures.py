"""The pictures of a report, as PNG."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
from torch import Tensor

from monai_lm.fields import jacobian_determinant, warp
from monai_lm.fields.topology import folded_cells
from monai_lm.result import Iteration
from monai_lm.space import spacing_of

__all__ = ["Views", "contrast", "course", "deformation", "differences", "flicker", "images"]

_OPPOSITE = dict(zip("LRAPSI", "RLPAIS", strict=True))


@dataclass(frozen=True)
class Plane:
    """A slice: its axes, and where it cuts the third."""

    across: int
    up: int
    cut: int | None
    position: int


class Views:
    """How to look at volumes of one grid: planes through the middle of what is bright in the fixed image.

    Args:
        fixed: ``(*S)``, 2D or 3D.
        affine: ``(4, 4)`` voxel-to-RAS affine, or ``None`` where it is not known.
    """

    def __init__(self, fixed: np.ndarray, affine: np.ndarray | None) -> None:
        self.spacing = (1.0,) * fixed.ndim if affine is None else spacing_of(affine, fixed.ndim)
        self.letters = None if affine is None or fixed.ndim == 2 else nib.aff2axcodes(affine)
        weight = fixed - fixed.min() + 1e-6
        grids = np.meshgrid(*[np.arange(s) for s in fixed.shape], indexing="ij")
        centre = [round(float((weight * g).sum() / weight.sum())) for g in grids]
        axes = [(0, 1, 2), (0, 2, 1), (1, 2, 0)] if fixed.ndim == 3 else [(0, 1, None)]
        self.planes = [Plane(a, b, c, 0 if c is None else centre[c]) for a, b, c in axes]

    def slice(self, volume: np.ndarray, plane: Plane) -> np.ndarray:
        """What the plane cuts out of ``(*S)``, rows going up."""
        flat = volume if plane.cut is None else volume.take(plane.position, plane.cut)
        return flat.T

    def show(self, axis: Any, volume: np.ndarray, plane: Plane, title: str = "", **kwargs: Any) -> Any:
        """Draw a slice with the right proportions, and letters for the directions where they are known."""
        aspect = self.spacing[plane.up] / self.spacing[plane.across]
        shown = axis.imshow(self.slice(volume, plane), origin="lower", aspect=aspect, **kwargs)
        axis.set_axis_off()
        axis.set_title(title, fontsize=10)
        if self.letters is not None:
            right, top = self.letters[plane.across], self.letters[plane.up]
            style = {"transform": axis.transAxes, "color": "#ffb000", "fontsize": 8, "ha": "center", "va": "center"}
            for x, y, letter in ((0.96, 0.5, right), (0.04, 0.5, _OPPOSITE[right]), (0.5, 0.96, top)):
                axis.text(x, y, letter, **style)
        return shown


def contrast(image: np.ndarray) -> np.ndarray:
    """Scale between the 0.5 and 99.5 percentiles to [0, 1]."""
    low, high = np.percentile(image, [0.5, 99.5])
    return ((image - low) / max(high - low, 1e-12)).clip(0, 1)


def images(
    views: Views, columns: dict[str, np.ndarray], contours: dict[str, np.ndarray] | None, outline: np.ndarray | None
) -> str:
    """Images side by side, a row per plane; the outline of the fixed labels on all, those of ``contours`` on theirs."""
    figure, axes = _grid(len(views.planes), len(columns))
    for row, plane in zip(axes, views.planes, strict=True):
        for axis, (name, volume) in zip(row, columns.items(), strict=True):
            views.show(axis, volume, plane, name if plane is views.planes[0] else "", cmap="gray", vmin=0, vmax=1)
            for labels, colour in ((outline, "#38bdf8"), ((contours or {}).get(name), "#f97316")):
                if labels is not None:
                    _outline(axis, views.slice(labels, plane), colour)
    return png(figure)


def differences(views: Views, columns: dict[str, np.ndarray]) -> str:
    """Signed differences of images in [0, 1] side by side, a row per plane."""
    figure, axes = _grid(len(views.planes), len(columns))
    for row, plane in zip(axes, views.planes, strict=True):
        for axis, (name, volume) in zip(row, columns.items(), strict=True):
            title = name if plane is views.planes[0] else ""
            shown = views.show(axis, volume, plane, title, cmap="RdBu_r", vmin=-0.6, vmax=0.6)
    figure.colorbar(shown, ax=axes, shrink=0.6, label="fixed − moving")
    return png(figure)


def deformation(views: Views, warped: np.ndarray, ddf: Tensor) -> str:
    """The deformed grid over the warped image, and the Jacobian determinant with folded cells marked."""
    figure, axes = _grid(len(views.planes), 2)
    field = ddf[0].numpy()
    determinant = jacobian_determinant(ddf)[0].numpy()
    folded = folded_cells(ddf)[0].numpy()
    for row, plane in zip(axes, views.planes, strict=True):
        first = plane is views.planes[0]
        views.show(row[0], warped, plane, "deformed grid" if first else "", cmap="gray", vmin=0, vmax=1, alpha=0.6)
        _lines(row[0], views, field, plane)
        logarithm = np.log2(np.clip(determinant, 2.0**-4, 2.0**4))
        title = "log2 of the Jacobian determinant" if first else ""
        shown = views.show(row[1], logarithm, plane, title, cmap="PuOr_r", vmin=-2, vmax=2)
        marks = np.argwhere(
            views.slice(folded, plane) if plane.cut is None or folded.ndim == 2 else _cells(folded, plane)
        )
        row[1].plot(marks[:, 1] + 0.5, marks[:, 0] + 0.5, "x", color="#e11d48", markersize=5)
    figure.colorbar(shown, ax=axes[:, 1], shrink=0.6, label="shrinks ← → grows")
    return png(figure)


def course(history: Sequence[Iteration]) -> str:
    """Loss and damping over the iterations, level by level, with rejected steps marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots(1, 2)
    for level in dict.fromkeys(i.level for i in history):
        own = [(n, i) for n, i in enumerate(history) if i.level == level]
        numbers = [n for n, _ in own]
        axes[0].plot(
            numbers, [i.loss for _, i in own], label=f"1/{level:g} resolution" if level > 1 else "full resolution"
        )
        axes[1].semilogy(numbers[1:], [i.damping for _, i in own[1:]])
        rejected = [(n, i.loss) for n, i in own if not i.accepted]
        axes[0].plot(*zip(*rejected, strict=True) if rejected else ([], []), "x", color="#e11d48")
    for axis, name in zip(axes, ("dissimilarity per voxel", "damping, relative"), strict=True):
        axis.set_xlabel("iteration")
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    return png(figure)


def flicker(views: Views, fixed: np.ndarray, warped: np.ndarray) -> tuple[str, str]:
    """The same plane of both images, without borders, to be shown in turn."""
    out = []
    for volume in (fixed, warped):
        figure, axes = _grid(1, 1)
        views.show(axes[0, 0], volume, views.planes[0], cmap="gray", vmin=0, vmax=1)
        out.append(png(figure))
    return out[0], out[1]


def png(figure: Any) -> str:
    """A figure as base64 PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return base64.b64encode(buffer.getvalue()).decode()


def _grid(rows: int, columns: int) -> tuple[Any, np.ndarray]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.0 * columns, 3.0 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _outline(axis: Any, labels: np.ndarray, colour: str) -> None:
    for value in np.unique(labels)[1:12]:
        axis.contour(labels == value, [0.5], colors=[colour], linewidths=0.8)


def _lines(axis: Any, views: Views, field: np.ndarray, plane: Plane) -> None:
    """Every few rows and columns of the plane, led by the field's part within it."""
    parts = [views.slice(field[a], plane).T for a in (plane.across, plane.up)]
    grids = np.meshgrid(*[np.arange(s) for s in parts[0].shape], indexing="ij")
    x, y = (g + u for g, u in zip(grids, parts, strict=True))
    step = max(1, min(x.shape) // 24)
    for lines in ((x[::step].T, y[::step].T), (x[:, ::step], y[:, ::step])):
        axis.plot(*lines, color="#0ea5e9", linewidth=0.5)


def _cells(folded: np.ndarray, plane: Plane) -> np.ndarray:
    """Folded cells at the plane, rows going up."""
    assert plane.cut is not None
    return folded.take(min(plane.position, folded.shape[plane.cut] - 1), plane.cut).T


def warped_by(image: Tensor, ddf: Tensor, mode: str = "bilinear") -> np.ndarray:
    """First channel of an image ``(1, C, *S)`` after a field, ``(*S)``."""
    out: np.ndarray = warp(image[:, :1], ddf, mode=mode)[0, 0].numpy()
    return out
