"""Write the report of one refinement: a single HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import platform
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import monai
import torch
from monai.data import MetaTensor
from torch import Tensor

import monai_lm
from monai_lm.fileio.files import replacing
from monai_lm.report import figures
from monai_lm.report.findings import Case, FieldMetrics, measure_field, verdict, warnings_of
from monai_lm.report.style import SCRIPT, STYLE
from monai_lm.result import RefinementResult
from monai_lm.space import check_affine, spacing_of
from monai_lm.validation import check_field, check_images, check_number, plain

__all__ = ["write_report"]

_WORST = 10
"""Labels that the table lists one by one."""


def write_report(
    path: str | Path,
    fixed: Tensor,
    moving: Tensor,
    result: RefinementResult,
    *,
    prediction: Tensor | None = None,
    affine: Any = None,
    labels: tuple[Tensor, Tensor] | None = None,
    landmarks: tuple[Tensor, Tensor] | None = None,
    settings: Mapping[str, Any] | None = None,
    title: str = "Registration report",
    png: str | Path | None = None,
) -> Path:
    """Write what a refinement brought as one self-contained HTML file, and on request as one picture.

    Args:
        path: of the HTML file; ends in ``.html`` or ``.htm``; its folder is made if missing.
        fixed: ``(1, C, *S)``, 2D or 3D; the first channel is shown.
        moving: ``(1, C, *S)`` on the same grid.
        result: of :func:`monai_lm.refine` on this pair.
        prediction: ``(1, n, *S)`` in voxels, the field that came in; default: none, the start is the identity.
        affine: ``(4, 4)`` voxel-to-RAS affine of the grid, for millimetres and orientation; default: that of ``fixed``
            if it is a ``MetaTensor`` with one, else voxels count as 1 mm and no orientation is shown.
        labels: fixed and moving label map, ``(1, 1, *S)`` whole numbers, 0 is background.
        landmarks: fixed and moving points, ``(1, N, n)`` or ``(N, n)`` in voxels; pairs with NaN are left out.
        settings: what the refinement was called with, shown as a table; ``seconds`` is the time budget.
        title: of the page.
        png: also write a summary picture to this ``.png`` file.

    Returns:
        The path of the HTML file.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes, grids or a file's suffix that do not fit; the message names the argument.
        ImportError: matplotlib (extra ``demo``) is not installed.
    """
    path = _checked_path("path", path, (".html", ".htm"))
    picture = None if png is None else _checked_path("png", png, (".png",))
    if not isinstance(title, str):
        raise TypeError(f"title must be a string, got {type(title).__name__}")
    figures.figure_class()
    case = _checked_case(fixed, moving, result, prediction, affine, labels, landmarks, settings)
    before, after = measure_field(case, case.start), measure_field(case, case.ddf)
    identity = before if prediction is None else measure_field(case, torch.zeros_like(case.ddf))
    warnings = warnings_of(case, before, after)
    state, headline = verdict(case, warnings)
    volumes, views = figures.volumes_of(case), figures.views_of(case)
    columns = {"not registered": identity, "prediction": before, "refined": after}
    if prediction is None:
        del columns["prediction"]
    parts = [
        _verdict_box(state, headline, warnings),
        _image_sections(case, volumes, views),
        _metrics_table(columns, case),
        _curve_section(case),
        _facts(case),
    ]
    html = _page(title, "\n".join(parts))
    if picture is not None:
        drawn = figures.summary(case, volumes, views, (title, headline), _summary_lines(before, after))
        with replacing(picture) as temporary:
            temporary.write_bytes(drawn)
    with replacing(path) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return path


def _checked_path(name: str, path: Any, suffixes: tuple[str, ...]) -> Path:
    if not isinstance(path, str | Path):
        raise TypeError(f"{name} must be a path, got {type(path).__name__}")
    if Path(path).suffix.lower() not in suffixes:
        raise ValueError(f"{name} must end in {' or '.join(suffixes)}, got {Path(path).name!r}")
    return Path(path)


def _checked_case(
    fixed: Tensor,
    moving: Tensor,
    result: RefinementResult,
    prediction: Tensor | None,
    affine: Any,
    labels: Any,
    landmarks: Any,
    settings: Mapping[str, Any] | None,
) -> Case:
    """Everything checked once, on the CPU in float32."""
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
        landmarks=None if landmarks is None else _checked_landmarks(landmarks, n),
        settings=dict(settings or {}),
        device=fixed.device,
    )


def _fields(result: RefinementResult, prediction: Tensor | None) -> list[tuple[str, Tensor | None]]:
    return [("result.ddf", result.ddf), ("prediction", prediction)]


def _affine_of(affine: Any, fixed: Tensor) -> Any:
    """The affine given, or that of the fixed image; an identity that nobody gave says nothing."""
    if affine is not None:
        return check_affine("affine", affine)
    if not isinstance(fixed, MetaTensor):
        return None
    own = fixed.affine if fixed.affine.dim() == 2 else fixed.affine[0]
    if tuple(own.shape) != (4, 4) or torch.equal(own.cpu().double(), torch.eye(4, dtype=torch.float64)):
        return None
    return check_affine("affine of fixed", own)


def _two(name: str, value: Any) -> list[Tensor]:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"{name} must be two tensors, (fixed, moving), got {type(value).__name__}")
    return [plain(f"{name}[{i}]", item).cpu() for i, item in enumerate(value)]


def _checked_labels(labels: Any, size: torch.Size) -> tuple[Tensor, Tensor]:
    maps = [_exact(given, read) for given, read in zip(labels, _two("labels", labels), strict=True)]
    for i, labelled in enumerate(maps):
        if tuple(labelled.shape) != (1, 1, *size):
            raise ValueError(f"labels[{i}] must be {(1, 1, *size)} on the grid of fixed, got {tuple(labelled.shape)}")
        if not torch.equal(labelled, labelled.round()):
            raise ValueError(f"labels[{i}] must hold whole numbers, got others")
    return maps[0], maps[1]


def _exact(given: Tensor, read: Tensor) -> Tensor:
    """Labels as int64 if they are of an integer type, in which all keep their values; else as they were ``read``."""
    if given.is_floating_point():
        return read
    return (given.as_tensor() if isinstance(given, MetaTensor) else given).detach().cpu().long()


def _checked_landmarks(landmarks: Any, n: int) -> tuple[Tensor, Tensor]:
    points = [p[None] if p.dim() == 2 else p for p in _two("landmarks", landmarks)]
    for i, p in enumerate(points):
        if p.dim() != 3 or p.shape[0] != 1 or p.shape[2] != n or p.shape[1] == 0 or p.shape != points[0].shape:
            shapes = [tuple(q.shape) for q in points]
            raise ValueError(f"landmarks[{i}] must be (N, {n}) voxels, as many in both, got shapes {shapes}")
    return points[0], points[1]


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None or value != value else f"{value:.{digits}f}"


def _summary_lines(before: FieldMetrics, after: FieldMetrics) -> list[str]:
    lines = []
    if after.mean_dice is not None:
        lines.append(f"mean Dice {_number(before.mean_dice, 3)} → {_number(after.mean_dice, 3)}")
    if after.tre is not None:
        lines.append(f"TRE {_number(before.tre, 2)} → {_number(after.tre, 2)} mm")
    lines.append(f"SDlogJ {after.sdlogj:.3f}")
    lines.append(f"folds {before.folds} → {after.folds}")
    lines.append(f"mean |u| {after.displacement:.2f} mm")
    return lines


def _verdict_box(state: str, headline: str, warnings: Mapping[str, str]) -> str:
    items = "".join(f'<li data-warning="{escape(k)}">{escape(text)}</li>' for k, text in warnings.items())
    remarks = f"<ul>{items}</ul>" if warnings else "<p>No remarks.</p>"
    return f'<section class="verdict {state}"><p class="headline">{escape(headline)}</p>{remarks}</section>'


def _img(picture: bytes, alt: str, css: str = "") -> str:
    data = base64.b64encode(picture).decode("ascii")
    return f'<img class="{css}" src="data:image/png;base64,{data}" alt="{escape(alt)}">'


def _gallery(pictures: Mapping[str, list[bytes]], views: Sequence[figures.View], names: Mapping[str, str]) -> str:
    """One row of figures per view, one figure per kind."""
    rows = []
    for number, view in enumerate(views):
        cells = "".join(
            f"<figure>{_img(pictures[kind][number], f'{name}, {view.name}')}"
            f"<figcaption>{escape(name)}</figcaption></figure>"
            for kind, name in names.items()
        )
        row = f'<div class="row" style="--n:{len(names)}">{cells}</div>'
        rows.append(f"<div><h3>{escape(view.name)}</h3>{row}</div>")
    return f'<div class="{"views narrow" if len(names) == 2 else "views"}">{"".join(rows)}</div>'


def _image_sections(case: Case, volumes: figures.Volumes, views: Sequence[figures.View]) -> str:
    start = "moving" if case.prediction is None else "moving, as predicted"
    images = {"fixed": "fixed", "moving": "moving"}
    images |= {} if case.prediction is None else {"start": start}
    images |= {"warped": "moving, refined"}
    changes = {"difference before": "difference before", "difference after": "difference after"}
    outlines = {} if case.labels is None else {"labels before": "labels before", "labels after": "labels after"}
    field = {"grid": "deformed grid"}
    field |= {} if case.prediction is None else {"jacobian before": "Jacobian, prediction"}
    field |= {"jacobian after": "Jacobian, refined"}
    drawn = figures.pictures_of(case, volumes, views, [*images, *changes, *outlines, *field])
    flickers = "".join(
        f'<figure class="flicker">{_img(drawn["fixed"][i], f"fixed image, {view.name}")}'
        f"{_img(drawn['warped'][i], f'refined moving image, {view.name}', 'over')}"
        f"<figcaption>{escape(view.name)}: <span>fixed</span></figcaption></figure>"
        for i, view in enumerate(views)
    )
    parts = [
        f"<section><h2>Images</h2>{_gallery(drawn, views, images)}</section>",
        "<section><h2>Fixed ↔ refined</h2><p>Structures that jump are not aligned. "
        '<button type="button" id="flick" aria-pressed="false">Flicker</button></p>'
        f'<div class="row single" style="--n:3">{flickers}</div></section>',
        f"<section><h2>Difference</h2><p>Fixed minus {escape(start)}, and fixed minus refined; white is none, "
        "violet where the fixed image is brighter, orange where it is darker. "
        f"Images of different contrast differ even where they are aligned.</p>"
        f"{_gallery(drawn, views, changes)}</section>",
    ]
    if outlines:
        parts.append(
            "<section><h2>Labels</h2><p>On the fixed image: outlines of "
            f'<span class="swatch" style="background:{figures.FIXED_COLOUR}"></span> the fixed and '
            f'<span class="swatch" style="background:{figures.MOVING_COLOUR}"></span> the moving labels.</p>'
            f"{_gallery(drawn, views, outlines)}</section>"
        )
    parts.append(f"<section><h2>Field</h2>{_field_legend(volumes.limit)}{_gallery(drawn, views, field)}</section>")
    return "\n".join(parts)


def _field_legend(limit: float) -> str:
    stops = ", ".join(figures.jacobian_colours())
    ends = [f"×{2**exponent:.2g}" for exponent in (-limit, 0, limit)]
    return (
        "<p>The grid shows where lines of the fixed image come to lie in the moving one. The Jacobian determinant says "
        "how much a voxel's volume (in 2D: area) changes on the way there; the scale is logarithmic. Crosses mark "
        "folded cells that touch the slice.</p>"
        f'<div class="scale" style="background:linear-gradient(to right, {stops})"></div>'
        f'<div class="ticks"><span>{ends[0]} shrinks</span><span>{ends[1]}</span><span>{ends[2]} grows</span></div>'
    )


def _metrics_table(columns: Mapping[str, FieldMetrics], case: Case) -> str:
    rows = []
    losses = {"prediction" if case.prediction is not None else "not registered": case.result.initial_loss[0]}
    losses["refined"] = case.result.final_loss[0]
    loss = [f"{float(losses[name]):.4g}" if name in losses else "–" for name in columns]
    rows.append(("dissimilarity per voxel", loss))
    fields = list(columns.values())
    if case.labels is not None:
        rows.append(("mean Dice", [_number(m.mean_dice, 3) for m in fields]))
        shared = set.intersection(*(m.surfaces for m in fields))  # every column of the same labels
        rows.append(("mean HD95, mm", [_number(m.mean_hd95(shared), 2) for m in fields]))
        last = fields[-1].dice or {}
        worst = sorted(last, key=lambda key: (last[key], key))[:_WORST]
        rows += [(f"Dice of label {key}", [_number((m.dice or {}).get(key), 3) for m in fields]) for key in worst]
    if case.landmarks is not None:
        rows.append(("TRE, mm", [_number(m.tre, 2) for m in fields]))
    rows.append(("SD of log Jacobian", [_number(m.sdlogj, 3) for m in fields]))
    rows.append(("folded cells", [str(m.folds) for m in fields]))
    rows.append(("mean |u|, mm", [_number(m.displacement, 2) for m in fields]))
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(v)}</td>" for v in values)}</tr>'
        for name, values in rows
    )
    notes = [f"Labels: the {_WORST} with the lowest Dice."] if len(fields[-1].dice or {}) > _WORST else []
    notes += ["The voxel size is not known: voxels count as 1 mm."] if case.affine is None else []
    note = f"<p>{' '.join(notes)}</p>" if notes else ""
    table = f'<table class="metrics"><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f"<section><h2>Before and after</h2>{table}{note}</section>"


def _curve_section(case: Case) -> str:
    history = case.result.history[0] if case.result.history else []
    if not history:
        return "<section><h2>Course</h2><p>No iterations were made.</p></section>"
    shares = "; ".join(text for _, text in figures.levels_of(history))
    note = f"{shares}. Levels go from coarse to fine images; values of different levels do not compare."
    picture = _img(figures.curves(history), "Dissimilarity, damping and accepted steps over the iterations", "chart")
    return f"<section><h2>Course</h2><p>{escape(note[0].upper() + note[1:])}</p>{picture}</section>"


def _facts(case: Case) -> str:
    device = str(case.device)
    if case.device.type == "cuda":
        device += f" ({torch.cuda.get_device_name(case.device)})"
    facts = {
        "seconds": f"{case.result.seconds:.2f}",
        "grid": " × ".join(str(s) for s in case.fixed.shape[2:]),
        "voxel, mm": "unknown" if case.affine is None else " × ".join(f"{s:.3g}" for s in case.spacing),
        "device": device,
        "monai_lm": monai_lm.__version__,
        "torch": torch.__version__,
        "monai": monai.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    settings = _pairs(case.settings) if case.settings else "<p>Not recorded.</p>"
    return f"<section><h2>Settings</h2>{settings}</section><section><h2>Run</h2>{_pairs(facts)}</section>"


def _pairs(values: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(str(k))}</th><td>{escape(str(v))}</td></tr>' for k, v in values.items()
    )
    return f"<table>{rows}</table>"


def _page(title: str, body: str) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main><h1>{escape(title)}</h1>\n{body}\n</main><script>{SCRIPT}</script></body></html>\n"
    )
