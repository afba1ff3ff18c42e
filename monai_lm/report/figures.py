"""Pictures of a report: slices, contours, deformed grid, Jacobian map, curves; every one a PNG in memory."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from monai_lm.fields import jacobian_determinant, warp
from monai_lm.fields.topology import LOG_FLOOR, folded_cells
from monai_lm.io.outputs import figure_class
from monai_lm.report.case import Case
from monai_lm.report.views import View
from monai_lm.solver.result import Iteration

__all__ = [
    "FIXED_COLOUR",
    "MOVING_COLOUR",
    "Volumes",
    "curves",
    "jacobian_colours",
    "levels_of",
    "pictures_of",
    "summary",
    "volumes_of",
]

_EDGE = 360
"""Longest edge of a slice's picture in pixels."""

_FINE = 2.5
"""How much finer the pictures of outlines are, which are read enlarged."""

_COLOURS = 128
"""So many greys, and colours, has a picture of outlines at most."""

_FEW = 8
"""So many labels of a slice are outlined boldly."""

FIXED_COLOUR, MOVING_COLOUR = "#22d3ee", "#ff9f1c"


def _window_of(image: Tensor) -> tuple[float, float]:
    """Grey values shown black and white: the 1st and 99.5th percentile; a span of 1 for a constant image."""
    low, high = np.percentile(image.numpy(), [1, 99.5])
    return float(low), float(high if high > low else low + 1)


def _png(figure: Any, palette: bool = False) -> bytes:
    """A figure as PNG, without alpha, grey where all of it is, with a palette if that is asked for.

    A palette makes fine outlines half as large. Harder compression takes many times as long for some percent.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image  # matplotlib needs it, too

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    red, green, blue = np.moveaxis(pixels, -1, 0)
    grey = (red == green) & (green == blue)
    if grey.all():
        picture = Image.fromarray(np.ascontiguousarray(red))
    else:
        picture = Image.fromarray(np.ascontiguousarray(pixels))
        picture = _with_palette(picture, grey) if palette else picture
    buffer = io.BytesIO()
    picture.save(buffer, "png", compress_level=4)
    return buffer.getvalue()


def _with_palette(picture: Any, grey: np.ndarray) -> Any:
    """A picture in every second grey, and as many colours where it is not ``grey``, ``(H, W)``.

    To look for the colours there alone keeps nearer to them, and takes a tenth of the time.
    """
    from PIL import Image

    pixels = np.asarray(picture)
    coloured: Any = Image.fromarray(pixels[~grey][None]).quantize(_COLOURS, Image.Quantize.MAXCOVERAGE)
    numbers = pixels[..., 0] // 2
    numbers[~grey] = _COLOURS + np.asarray(coloured)[0]
    greys = np.linspace(0, 255, _COLOURS).round().astype(np.uint8)
    out = Image.fromarray(numbers)
    out.putpalette(greys.repeat(3).tobytes() + bytes(coloured.getpalette()))
    return out


class _Panel:
    """A figure that one slice after the other fills to the edge, in the proportions of the patient.

    Axes take longer to make than a slice takes to draw.
    """

    def __init__(self) -> None:
        self.figure = figure_class()(facecolor="black")
        self.axis = self.figure.add_axes((0, 0, 1, 1))
        self.axis.set_axis_off()

    def frame(self, view: View, shape: tuple[int, int]) -> None:
        """Take the place of a slice, empty."""
        _remove(self.axis.texts)
        width, height = shape[1] * view.spacing[0], shape[0] * view.spacing[1]
        scale = _EDGE / max(width, height) / 100
        self.figure.set_size_inches(max(width * scale, 0.4), max(height * scale, 0.4))
        _draw_frame(self.axis, view, shape)

    def png(self, case: Case, volumes: Volumes, kind: str, view: View) -> bytes:
        """One kind of picture in the frame."""
        outlines = kind.startswith("labels")
        self.figure.set_dpi(100 * (_FINE if outlines else 1))
        _paint(case, volumes, kind, view, self.axis)
        drawn = _png(self.figure, outlines)
        _remove([*self.axis.images, *self.axis.collections])
        return drawn


def _remove(artists: Iterable[Any]) -> None:
    for artist in list(artists):
        artist.remove()


def _draw_frame(axis: Any, view: View, shape: tuple[int, int], size: float = 16) -> None:
    """Limits in millimetres on the page, and the letters of orientation at the edges."""
    axis.set_xlim(-0.5 * view.spacing[0], (shape[1] - 0.5) * view.spacing[0])
    axis.set_ylim(-0.5 * view.spacing[1], (shape[0] - 0.5) * view.spacing[1])
    axis.set_aspect("auto")
    if view.letters is None:
        return
    places = [(0.02, 0.5, "left", "center"), (0.98, 0.5, "right", "center")]
    places += [(0.5, 0.98, "center", "top"), (0.5, 0.02, "center", "bottom")]
    box = {"facecolor": "black", "alpha": 0.5, "pad": 1, "linewidth": 0}
    for letter, (x, y, across, along) in zip(view.letters, places, strict=True):
        axis.text(
            x,
            y,
            letter,
            transform=axis.transAxes,
            ha=across,
            va=along,
            color="white",
            fontsize=size,
            bbox=box,
            zorder=9,
        )


def _draw_image(axis: Any, view: View, plane: np.ndarray, colours: str, low: float, high: float) -> None:
    """A slice under the frame."""
    x, y = view.spacing
    extent = (-0.5 * x, (plane.shape[1] - 0.5) * x, -0.5 * y, (plane.shape[0] - 0.5) * y)
    smooth = "bilinear" if colours == "gray" else "nearest"
    axis.imshow(
        plane, cmap=colours, vmin=low, vmax=high, origin="lower", extent=extent, aspect="auto", interpolation=smooth
    )


def _draw_contours(axis: Any, view: View, labels: np.ndarray, colour: str) -> None:
    """Outlines of every label of a slice: the paths of ``axis.contour``, which takes several times as long for them."""
    from contourpy import contour_generator
    from matplotlib.collections import PathCollection
    from matplotlib.path import Path

    rows, columns = labels.shape
    x, y = np.arange(columns) * view.spacing[0], np.arange(rows) * view.spacing[1]
    values = np.unique(labels[labels != 0])
    outlines = []
    for label in values:
        inside = labels == label
        box = tuple(
            slice(max(0, places[0] - 1), places[-1] + 2)
            for places in (np.flatnonzero(inside.any(1 - a)) for a in (0, 1))
        )
        grid = x[box[1]], y[box[0]], inside[box].astype(float)
        lines = contour_generator(*grid, name="mpl2014", line_type="SeparateCode").lines(0.5)
        outlines.append(Path.make_compound_path(*(Path(*line) for line in zip(*lines, strict=True))))
    width = 1.3 if len(values) <= _FEW else 0.5
    shown = PathCollection(outlines, facecolors="none", edgecolors=colour, linewidths=width)
    axis.add_collection(shown, autolim=False)


def _draw_grid(axis: Any, view: View, ddf: np.ndarray) -> None:
    """Where every few voxels' lines of the fixed grid come to lie in the moving image, seen in the plane."""
    from matplotlib.collections import LineCollection

    right, up = (view.cut(ddf[a]) * (-1 if flip else 1) for a, flip in zip(view.axes, view.flips, strict=True))
    rows, columns = right.shape
    x = (np.arange(columns)[None] + right) * view.spacing[0]
    y = (np.arange(rows)[:, None] + up) * view.spacing[1]
    step = max(1, round(max(rows, columns) / 24))
    lines = [np.stack([x[row], y[row]], 1) for row in range(0, rows, step)]
    lines += [np.stack([x[:, column], y[:, column]], 1) for column in range(0, columns, step)]
    shown = LineCollection(lines, colors="#7dd3fc", linewidths=1.0, capstyle="projecting", joinstyle="round")
    axis.add_collection(shown, autolim=False)


def _draw_folds(axis: Any, view: View, cells: np.ndarray) -> None:
    """A cross on every folded cell ``(*(S + 1))`` that touches the slice."""
    if view.normal is not None:
        cells = np.asarray(np.take(cells, [view.index, view.index + 1], axis=view.normal).any(view.normal))
    plane = cells if view.axes[0] > view.axes[1] else cells.T
    plane = plane[:: -1 if view.flips[1] else 1, :: -1 if view.flips[0] else 1]
    rows, columns = plane.nonzero()
    if len(rows):
        axis.scatter((columns - 0.5) * view.spacing[0], (rows - 0.5) * view.spacing[1], s=14, c="#d400d4", marker="x")


def jacobian_colours() -> list[str]:
    """Stops of the Jacobian map's colours, from shrinking to growing, as CSS colours."""
    figure_class()
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["RdBu_r"](i / 8)) for i in range(9)]


@dataclass(frozen=True)
class Volumes:
    """What the pictures are cut from, ``(*S)`` arrays, and the ends of their scales; see :func:`volumes_of`.

    Attributes:
        fixed: first channel of the fixed image.
        moving: that of the moving image.
        start: that under the field that the refinement started from.
        warped: that under the refined field.
        windows: grey values shown black and white, of the fixed and of the moving image.
        labels: of the fixed image, of the moving one at the start and refined; or None.
        jacobians: binary logarithm of the Jacobian determinant at the start and refined.
        folds: folded cells likewise, ``(*(S + 1))``.
        limit: end of the scale of ``jacobians``, either way.
        worst: end of the scale of uncertainty, in millimetres; NaN without one.
    """

    fixed: np.ndarray
    moving: np.ndarray
    start: np.ndarray
    warped: np.ndarray
    windows: tuple[tuple[float, float], tuple[float, float]]
    labels: tuple[np.ndarray, np.ndarray, np.ndarray] | None
    jacobians: tuple[np.ndarray, np.ndarray]
    folds: tuple[np.ndarray, np.ndarray]
    limit: float
    worst: float

    def difference(self, image: np.ndarray, view: View) -> np.ndarray:
        """Fixed minus another, both in parts of their windows, on a slice."""
        fixed, other = (
            np.clip((view.cut(shown) - low) / (high - low), 0, 1)
            for shown, (low, high) in zip((self.fixed, image), self.windows, strict=True)
        )
        return np.asarray(fixed - other)


def volumes_of(case: Case) -> Volumes:
    """First channels, warped by the first and the last field; labels, log Jacobian and folded cells likewise."""
    labels = None
    if case.labels is not None:
        moved = [case.warped_label(ddf) for ddf in (case.start, case.ddf)]
        labels = tuple(m[0, 0].numpy() for m in (case.labels[0], *moved) if m is not None)
    jacobians = _log2_jacobian(case.start), _log2_jacobian(case.ddf)
    limit = max(float(np.percentile(np.abs(values), 99.5)) for values in jacobians)
    return Volumes(
        case.fixed[0, 0].numpy(),
        case.moving[0, 0].numpy(),
        warp(case.moving, case.start)[0, 0].numpy(),
        warp(case.moving, case.ddf)[0, 0].numpy(),
        (_window_of(case.fixed[0, 0]), _window_of(case.moving[0, 0])),
        labels,  # type: ignore[arg-type]
        jacobians,
        (folded_cells(case.start)[0].numpy(), folded_cells(case.ddf)[0].numpy()),
        min(max(float(np.ceil(limit * 2) / 2), 0.5), 3.0),
        float("nan") if case.uncertainty is None else max(float(np.percentile(case.uncertainty.numpy(), 99)), 1e-3),
    )


def _log2_jacobian(ddf: Tensor) -> np.ndarray:
    return np.asarray(jacobian_determinant(ddf)[0].clamp(min=LOG_FLOOR).log2().numpy())


def _paint(case: Case, volumes: Volumes, kind: str, view: View, axis: Any) -> None:
    """Draw one kind of picture into axes that have their frame."""
    grey, other = volumes.windows
    plain = {"fixed": (volumes.fixed, grey), "moving": (volumes.moving, other)}
    plain |= {"start": (volumes.start, other), "warped": (volumes.warped, other)}
    if kind in plain:
        image, window = plain[kind]
        _draw_image(axis, view, view.cut(image), "gray", *window)
    elif kind.startswith("difference"):
        image = volumes.start if kind.endswith("before") else volumes.warped
        _draw_image(axis, view, volumes.difference(image, view), "PuOr", -1, 1)
    elif kind.startswith("labels"):
        assert volumes.labels is not None  # for mypy
        _draw_image(axis, view, view.cut(volumes.fixed), "gray", *grey)
        _draw_contours(axis, view, view.cut(volumes.labels[0]), FIXED_COLOUR)
        _draw_contours(axis, view, view.cut(volumes.labels[1 if kind.endswith("before") else 2]), MOVING_COLOUR)
    elif kind == "grid":
        _draw_grid(axis, view, case.ddf[0].numpy())
    elif kind == "uncertainty":
        assert case.uncertainty is not None  # for mypy
        _draw_image(axis, view, view.cut(case.uncertainty[0, 0].numpy()), "magma", 0, volumes.worst)
    else:
        which = 0 if kind.endswith("before") else 1
        _draw_image(axis, view, view.cut(volumes.jacobians[which]), "RdBu_r", -volumes.limit, volumes.limit)
        _draw_folds(axis, view, volumes.folds[which])


def pictures_of(case: Case, volumes: Volumes, views: Sequence[View], kinds: Sequence[str]) -> dict[str, list[bytes]]:
    """Per kind of picture, a PNG of every view.

    Kinds: ``fixed``, ``moving``, ``start``, ``warped``, ``difference before`` and ``after``, ``labels before`` and
    ``after``, ``grid``, ``jacobian before`` and ``after``, ``uncertainty``.
    """
    panel = _Panel()
    out: dict[str, list[bytes]] = {kind: [] for kind in kinds}
    for view in views:
        panel.frame(view, view.cut(volumes.fixed).shape)
        for kind in kinds:
            out[kind].append(panel.png(case, volumes, kind, view))
    return out


def levels_of(history: Sequence[Iteration]) -> list[tuple[slice, str]]:
    """The entries of each level, the first of which is its starting point, and a text on how many were accepted."""
    starts = [i for i, entry in enumerate(history) if i == 0 or entry.level != history[i - 1].level]
    out = []
    for first, last in zip(starts, [*starts[1:], len(history)], strict=True):
        accepted = sum(entry.accepted for entry in history[first + 1 : last])
        text = f"level 1/{history[first].level:g}: {accepted} of {last - first - 1} accepted"
        out.append((slice(first, last), text))
    return out


def curves(history: Sequence[Iteration]) -> bytes:
    """Loss, damping and accepted steps over the iterations, level after level; a PNG."""
    figure = figure_class()(figsize=(7.2, 5.2), dpi=110, facecolor="white", layout="constrained")
    axes = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 1))
    number = list(range(len(history)))
    for part, share in levels_of(history):
        first, last, steps = part.start, part.stop, history[part][1:]
        axes[0].plot(number[part], [h.loss for h in history[part]], ".-", markersize=4, label=share)
        axes[1].semilogy(number[part], [max(h.damping, 1e-12) for h in history[part]], ".-", markersize=4)
        colours = ["#15803d" if h.accepted else "#dc2626" for h in steps]
        axes[2].scatter(number[first + 1 : last], [float(h.accepted) for h in steps], c=colours, s=12)
        for axis in axes:
            axis.axvline(first - 0.5, color="0.85", zorder=0)
    for axis, name in zip(axes, ("dissimilarity", "damping λ", "accepted"), strict=True):
        axis.set_ylabel(name)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=8, frameon=False)
    axes[2].set_yticks([0, 1], ["no", "yes"])
    axes[2].set_ylim(-0.5, 1.5)
    axes[2].set_xlabel("iteration")
    return _png(figure)


def summary(
    case: Case, volumes: Volumes, views: Sequence[View], heading: tuple[str, str], lines: Sequence[str]
) -> bytes:
    """The report in one picture: fixed, moving, warped, differences, Jacobian map; verdict above, numbers below."""
    kinds = {"fixed": "fixed", "moving": "moving", "warped": "warped", "difference before": "difference, before"}
    kinds |= {"difference after": "difference, after", "grid": "deformed grid", "jacobian after": "log Jacobian"}
    if volumes.labels is not None:
        kinds |= {"labels after": "labels, after"}
    shapes = [view.cut(volumes.fixed).shape for view in views]
    heights = [shape[0] * v.spacing[1] / (shape[1] * v.spacing[0]) for shape, v in zip(shapes, views, strict=True)]
    wide = 1.35
    tall = [min(max(h, 0.3), 3.0) * wide for h in heights]
    figure = figure_class()(figsize=(wide * len(kinds), sum(tall) + 1.3), dpi=85, facecolor="white")
    top = 1 - 0.75 / figure.get_figheight()
    bottom = 0.35 / figure.get_figheight()
    axes = figure.subplots(
        len(views), len(kinds), squeeze=False, height_ratios=tall,
        gridspec_kw={"left": 0.005, "right": 0.995, "top": top, "bottom": bottom, "wspace": 0.03, "hspace": 0.03},
    )  # fmt: skip
    for row, (view, shape) in enumerate(zip(views, shapes, strict=True)):
        for axis, (kind, title) in zip(axes[row], kinds.items(), strict=True):
            axis.set(xticks=[], yticks=[], facecolor="black")
            _draw_frame(axis, view, shape, 8)
            _paint(case, volumes, kind, view, axis)
            axis.set_aspect("equal")
            if row == 0:
                axis.set_title(title, fontsize=9)
    for text, down, weight in zip(heading, (0.08, 0.31), ("bold", "normal"), strict=True):
        height = 1 - down / figure.get_figheight()
        figure.text(0.005, height, text, fontsize=10, weight=weight, va="top", parse_math=False)
    figure.text(0.005, 0.08 / figure.get_figheight(), "   ".join(lines), fontsize=9, va="bottom")
    return _png(figure)
