"""Write the report of one refinement: a single HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import monai_lm
from monai_lm.io.nifti import replacing
from monai_lm.io.outputs import figure_class
from monai_lm.io.provenance import machine
from monai_lm.report import figures
from monai_lm.report.case import Case, checked_case
from monai_lm.report.evidence import NOISE
from monai_lm.report.findings import Assessment, FieldMetrics, assess, measure_field
from monai_lm.report.style import SCRIPT, STYLE
from monai_lm.report.views import View, further_slices, views_of
from monai_lm.solver.result import RefinementResult

__all__ = ["write_case", "write_report"]

_WORST = 10
"""Labels that the table lists one by one."""

CAUTION = "Similarity alone does not show correctness"


def write_report(
    path: str | Path,
    fixed: Tensor,
    moving: Tensor,
    result: RefinementResult,
    *,
    prediction: Tensor | None = None,
    affine: Any = None,
    labels: tuple[Tensor, Tensor | Callable[[Tensor], Tensor]] | None = None,
    landmarks: tuple[Tensor, Tensor] | Callable[[Tensor], float] | None = None,
    settings: Mapping[str, Any] | None = None,
    mask: Tensor | None = None,
    initial: str = "not registered",
    provenance: Mapping[str, Any] | None = None,
    uncertainty: Tensor | None = None,
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
        labels: fixed and moving label map, ``(1, 1, *S)`` whole numbers, 0 is background. In place of the moving map, a
            function from a field ``(1, n, *S)`` in voxels to the map under it, for labels that lie on another grid.
        landmarks: fixed and moving points, ``(1, N, n)`` or ``(N, n)`` in voxels; pairs with NaN are left out. Or a
            function from a field to their mean error in millimetres.
        settings: what the refinement was called with, shown as a table; ``seconds`` is the time budget.
        mask: ``(1, 1, *S)`` weights in [0, 1], where the images were compared.
        initial: what ``moving`` is without any field, heads a column: ``"affine only"`` where one has been applied.
        provenance: what the result was made of, shown as a table; dictionaries in it as tables of their own.
        uncertainty: ``(1, 1, *S)`` in millimetres, of :func:`monai_lm.uncertainty`.
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
    figure_class()
    given = affine, labels, landmarks, settings, mask, initial
    case = checked_case(fixed, moving, result, prediction, *given, uncertainty=uncertainty)
    return write_case(path, case, assess(case), title, picture, provenance)


def write_case(
    path: Path,
    case: Case,
    found: Assessment,
    title: str,
    picture: Path | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write the page, and the picture, of a case that has been assessed; see :func:`write_report`."""
    volumes, views = figures.volumes_of(case), views_of(case)
    columns = {case.initial: found.before, "refined": found.after}
    if case.prediction is not None:
        still = torch.zeros_like(case.ddf)
        columns = {case.initial: measure_field(case, still), "prediction": found.before, "refined": found.after}
    parts = [
        _verdict_box(found),
        _image_sections(case, volumes, views),
        _metrics_table(columns, case, found),
        _curve_section(case),
        _facts(case, provenance or {}),
    ]
    html = _page(title, "\n".join(parts))
    if picture is not None:
        drawn = figures.summary(case, volumes, views, (title, found.headline), _summary_lines(found))
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


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None or value != value else f"{value:.{digits}f}"


def _summary_lines(found: Assessment) -> list[str]:
    before, after = found.before, found.after
    lines = []
    if after.mean_dice is not None:
        lines.append(f"mean Dice {_number(before.mean_dice, 3)} → {_number(after.mean_dice, 3)}")
    if after.tre is not None:
        lines.append(f"TRE {_number(before.tre, 2)} → {_number(after.tre, 2)} mm")
    lines.append(f"agreement {_number(found.agreement_before, 2)} → {_number(found.evidence.agreement, 2)}")
    lines.append(f"SDlogJ {after.sdlogj:.3f}")
    lines.append(f"folds {before.folds} → {after.folds}")
    lines.append(f"mean |u| {after.displacement:.2f} mm")
    return [*lines, f"{CAUTION}."]


def _verdict_box(found: Assessment) -> str:
    items = "".join(f'<li data-warning="{escape(k)}">{escape(text)}</li>' for k, text in found.remarks.items())
    remarks = f"<ul>{items}</ul>" if found.remarks else "<p>No remarks.</p>"
    after = found.after
    known = [name for name, value in (("labels", after.mean_dice), ("landmarks", after.tre)) if value is not None]
    advice = (
        f"{CAUTION}: the {' and the '.join(known)} below say more, where they are."
        if known
        else f"{CAUTION}: look at structures you know, or give labels or landmarks."
    )
    return (
        f'<section class="verdict {found.state}"><p class="headline">{escape(found.headline)}</p>{remarks}'
        f"<p>{escape(advice)}</p></section>"
    )


def _img(picture: bytes, alt: str, css: str = "") -> str:
    data = base64.b64encode(picture).decode("ascii")
    return f'<img class="{css}" src="data:image/png;base64,{data}" alt="{escape(alt)}">'


def _gallery(pictures: Mapping[str, list[bytes]], views: Sequence[View], names: Mapping[str, str]) -> str:
    """One row of figures per view, one figure per kind."""
    rows = []
    for number, view in enumerate(views):
        cells = "".join(
            f"<figure>{_img(pictures[kind][number], f'{name}, {view.name}')}"
            f"<figcaption>{escape(name)}</figcaption></figure>"
            for kind, name in names.items()
        )
        row = f'<div class="row" style="--n:{len(names)};--m:{min(len(names), 3)}">{cells}</div>'
        rows.append(f"<div><h3>{escape(view.name)}</h3>{row}</div>")
    return f'<div class="{"views narrow" if len(names) == 2 else "views"}">{"".join(rows)}</div>'


def _image_sections(case: Case, volumes: figures.Volumes, views: Sequence[View]) -> str:
    moving = "moving" if case.initial == "not registered" else f"moving, {case.initial}"
    start = moving if case.prediction is None else "moving, as predicted"
    images = {"fixed": "fixed", "moving": moving}
    if case.prediction is not None:  # the three to compare come first: a small screen shows three side by side
        images = {"fixed": "fixed", "start": start}
    images |= {"warped": "moving, refined"} | ({} if case.prediction is None else {"moving": moving})
    changes = {"difference before": "difference before", "difference after": "difference after"}
    outlines = {} if case.labels is None else {"labels before": "labels before", "labels after": "labels after"}
    field = {"grid": "deformed grid"}
    field |= {} if case.prediction is None else {"jacobian before": "Jacobian, prediction"}
    field |= {"jacobian after": "Jacobian, refined"}
    field |= {} if case.uncertainty is None else {"uncertainty": "uncertainty"}
    drawn = figures.pictures_of(case, volumes, views, [*images, *changes, *outlines, *field])
    flickers = "".join(
        f'<figure class="flicker">{_img(drawn["fixed"][i], f"fixed image, {view.name}")}'
        f"{_img(drawn['warped'][i], f'refined moving image, {view.name}', 'over')}"
        f"<figcaption>{escape(view.name)}: <span>fixed</span></figcaption></figure>"
        for i, view in enumerate(views)
    )
    parts = [
        f"<section><h2>Images</h2><p>Every picture is larger when it is clicked.</p>{_gallery(drawn, views, images)}"
        f"{_more_slices(case, volumes, views)}</section>",
        "<section><h2>Fixed ↔ refined</h2><p>Structures that jump are not aligned. "
        '<button type="button" id="flick" aria-pressed="false">Flicker</button></p>'
        f'<div class="row single" style="--n:3;--m:1">{flickers}</div></section>',
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
    legend = _field_legend(volumes.limit) + _uncertainty_legend(case, volumes.worst)
    parts.append(f"<section><h2>Field</h2>{legend}{_gallery(drawn, views, field)}</section>")
    return "\n".join(parts)


def _more_slices(case: Case, volumes: figures.Volumes, views: Sequence[View]) -> str:
    """Fixed, refined and what tells them apart, on further slices of every axis; nothing in 2D."""
    kinds = {"fixed": "fixed", "warped": "moving, refined"}
    kinds |= {"difference after": "difference after"} if case.labels is None else {"labels after": "labels after"}
    parts = []
    for view in views:
        further = further_slices(case, view)
        if further:
            drawn = figures.pictures_of(case, volumes, further, list(kinds))
            plane = view.name.split(", voxel")[0]
            parts.append(
                f"<details><summary>{len(further)} more slices, {escape(plane)}</summary>"
                f"{_gallery(drawn, further, kinds)}</details>"
            )
    return "".join(parts)


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


def _uncertainty_legend(case: Case, worst: float) -> str:
    if case.uncertainty is None:
        return ""
    return (
        "<p>The uncertainty says where the field may be off: how far a second refinement, from the fixed to the moving "
        f"image, leads beside the start. Black is none, the brightest {worst:.2g} mm and "
        "more. It is large where the images show nothing, and knows no match that is wrong both ways.</p>"
    )


def _metrics_table(columns: Mapping[str, FieldMetrics], case: Case, found: Assessment) -> str:
    fields, unknown = list(columns.values()), ["–"] * (len(columns) - 2)  # not measured before the prediction
    loss = [f"{float(value[0]):.4g}" for value in (case.result.initial_loss, case.result.final_loss)]
    shown = [_number(value, 2) for value in (found.agreement_before, found.evidence.agreement)]
    rows = [("dissimilarity per voxel", [*unknown, *loss]), ("agreement of the images", [*unknown, *shown])]
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
    rows.append(("volume changed > 4×, %", [*unknown, "–", _number(100 * found.evidence.extremes, 1)]))
    rows.append(("folded cells", [str(m.folds) for m in fields]))
    rows.append(("mean |u|, mm", [_number(m.displacement, 2) for m in fields]))
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(v)}</td>" for v in values)}</tr>'
        for name, values in rows
    )
    notes = [f"Labels: the {_WORST} with the lowest Dice."] if len(fields[-1].dice or {}) > _WORST else []
    notes += [] if case.aligned is None else [escape(case.aligned)]
    notes += ["The voxel size is not known: voxels count as 1 mm."] if case.affine is None else []
    notes += [
        "Agreement: the share of the fixed image's local variance that the moving one explains; noise, refined like an "
        f"image, came to {NOISE:g} at most."
    ]
    table = f'<table class="metrics"><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f"<section><h2>Before and after</h2>{table}<p>{' '.join(notes)}</p></section>"


def _curve_section(case: Case) -> str:
    history = case.result.history[0] if case.result.history else []
    if not history:
        return "<section><h2>Course</h2><p>No iterations were made.</p></section>"
    shares = "; ".join(text for _, text in figures.levels_of(history))
    note = f"{shares}. Levels go from coarse to fine images; values of different levels do not compare."
    picture = _img(figures.curves(history), "Dissimilarity, damping and accepted steps over the iterations", "chart")
    return f"<section><h2>Course</h2><p>{escape(note[0].upper() + note[1:])}</p>{picture}</section>"


def _facts(case: Case, provenance: Mapping[str, Any]) -> str:
    device = str(case.device)
    if case.device.type == "cuda":
        device += f" ({torch.cuda.get_device_name(case.device)})"
    facts = {
        "seconds": f"{case.result.seconds:.2f}",
        "similarity": case.result.similarity,
        "grid": " × ".join(str(s) for s in case.fixed.shape[2:]),
        "voxel, mm": "unknown" if case.affine is None else " × ".join(f"{s:.3g}" for s in case.spacing),
        "device": device,
        "monai_lm": monai_lm.__version__,
        **machine(),
    }
    settings = _pairs(case.settings) if case.settings else "<p>Not recorded.</p>"
    made_of = f"<section><h2>Provenance</h2>{_pairs(provenance)}</section>" if provenance else ""
    return f"{made_of}<section><h2>Settings</h2>{settings}</section><section><h2>Run</h2>{_pairs(facts)}</section>"


def _pairs(values: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(str(k))}</th>'
        f"<td>{_pairs(v) if isinstance(v, Mapping) else escape(str(v))}</td></tr>"
        for k, v in values.items()
    )
    return f"<table>{rows}</table>"


def _page(title: str, body: str) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main><h1>{escape(title)}</h1>\n{body}\n</main><script>{SCRIPT}</script></body></html>\n"
    )
