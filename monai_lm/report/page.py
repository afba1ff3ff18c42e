"""The page of a report: words, numbers, pictures, in one file that needs nothing else."""

from __future__ import annotations

import html
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import monai_lm
from monai_lm.evaluation import compare_labels
from monai_lm.fields import fold_count
from monai_lm.fileio.files import replacing
from monai_lm.metrics import sd_log_jacobian
from monai_lm.report import figures
from monai_lm.result import RefinementResult
from monai_lm.space import spacing_of

__all__ = ["write_report"]

FAR = 10.0
"""Mean displacement in millimetres above which the page says that the images were far apart."""

DICE, HD95, TRE = "Dice, mean of labels", "95 % Hausdorff distance, mm", "target registration error, mm"
"""Names of rows of the table."""

_STYLE = """
:root { color-scheme: light dark; --ink: #1e293b; --paper: #ffffff; --soft: #f1f5f9; --good: #15803d; --bad: #b91c1c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e2e8f0; --paper: #0f172a; --soft: #1e293b; --good: #4ade80;
--bad: #f87171; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem;
margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin-top: 2rem; }
img { max-width: 100%; height: auto; background: #fff; border-radius: .4rem; }
.verdict { background: var(--soft); border-left: .4rem solid var(--good); padding: .6rem 1rem; border-radius: .4rem; }
.verdict.warned { border-color: var(--bad); } .warning { color: var(--bad); }
table { border-collapse: collapse; width: 100%; } td, th { padding: .3rem .5rem; text-align: right;
border-bottom: 1px solid var(--soft); overflow-wrap: anywhere; } td:first-child, th:first-child { text-align: left; }
.flicker { position: relative; max-width: 24rem; } .flicker img + img { position: absolute; inset: 0; }
.flicker.on img + img { visibility: hidden; } button { font: inherit; padding: .4rem 1rem; }
"""

_SCRIPT = """
const box = document.querySelector('.flicker'); let timer = null;
document.querySelector('button').onclick = e => { timer = timer ? clearInterval(timer) : setInterval(
() => box.classList.toggle('on'), 600); e.target.textContent = timer ? 'Stop' : 'Flicker'; };
box.onclick = () => box.classList.toggle('on');
"""


def write_report(
    path: str | Path,
    fixed: Tensor,
    moving: Tensor,
    result: RefinementResult,
    *,
    prediction: Tensor | None = None,
    affine: np.ndarray | None = None,
    labels: tuple[Tensor, Tensor] | None = None,
    measured: Mapping[str, tuple[float, float]] | None = None,
    settings: Mapping[str, Any] | None = None,
    title: str = "Refinement",
) -> None:
    """Write a page about one pair: what got better, what to be wary of, pictures, course, settings and versions.

    Args:
        path: ``.html`` file; its folder is made if missing. Nothing else is needed to look at it.
        fixed: ``(1, C, *S)`` image, 2D or 3D; the first channel is shown.
        moving: ``(1, C, *S)`` image on the same grid.
        result: what :func:`monai_lm.refine` returned for them.
        prediction: ``(1, n, *S)`` field that was refined; ``None``: the identity.
        affine: ``(4, 4)`` voxel-to-RAS affine of the grid, for proportions, millimetres and directions.
        labels: label maps ``(1, 1, *S)`` of fixed and moving image, to show and to measure.
        measured: rows of the table, name to values before and after, which add to or replace what is measured here.
        settings: keyword arguments of the refinement, to be listed; ``seconds`` tells a time limit.
        title: heading.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: shapes that do not fit, or a path that is not ``.html``.
    """
    path = Path(path)
    if path.suffix != ".html":
        raise ValueError(f"path must end in .html, got {path.name!r}")
    size = tuple(fixed.shape[2:])
    given = {"fixed": fixed, "moving": moving, "result.ddf": result.ddf}
    given |= {} if prediction is None else {"prediction": prediction}
    given |= {} if labels is None else {"fixed label": labels[0], "moving label": labels[1]}
    for name, tensor in given.items():
        if tensor.shape[0] != 1 or tuple(tensor.shape[2:]) != size or len(size) not in (2, 3):
            raise ValueError(f"{name} must be one pair on the grid of fixed, {size}, got shape {tuple(tensor.shape)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("a report needs matplotlib: pip install 'monai_lm[demo]'") from error
    fixed, moving, ddf = (t.detach().float().cpu() for t in (fixed, moving, result.ddf))
    before = torch.zeros_like(ddf) if prediction is None else prediction.detach().float().cpu()
    spacing = (1.0,) * len(size) if affine is None else spacing_of(affine, len(size))
    table = _table(before, ddf, result, labels, spacing) | dict(measured or {})
    warnings = _warnings(table, result, dict(settings or {}))
    body = [
        _verdict(title, table, result, warnings),
        _numbers(table),
        _pictures(fixed, moving, before, ddf, labels, affine, prediction is not None),
    ]
    body.append(_figure("How it went", "Loss and damping over the iterations", figures.course(result.history[0])))
    body.append(_facts("Settings", dict(settings or {})))
    body.append(_facts("Versions", _versions(result)))
    page = (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(body)
        + f"\n<script>{_SCRIPT}</script></body></html>\n"
    )
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _table(
    before: Tensor,
    ddf: Tensor,
    result: RefinementResult,
    labels: tuple[Tensor, Tensor] | None,
    spacing: tuple[float, ...],
) -> dict[str, tuple[float, float]]:
    """Metrics before and after."""
    millimetres = torch.tensor(spacing).view(1, -1, *[1] * len(spacing))
    rows = {
        "dissimilarity per voxel": (float(result.initial_loss[0]), float(result.final_loss[0])),
        "folded cells": (float(fold_count(before)), float(fold_count(ddf))),
        "SDlogJ": (float(sd_log_jacobian(before)), float(sd_log_jacobian(ddf))),
        "mean displacement, mm": tuple(
            float(torch.linalg.vector_norm(u * millimetres, dim=1).mean()) for u in (before, ddf)
        ),
    }
    if labels is not None:
        fixed, moving = (label.detach().float().cpu() for label in labels)
        scores = []
        for field in (before, ddf):
            warped = torch.from_numpy(figures.warped_by(moving, field, "nearest"))[None, None]
            scores.append(compare_labels(warped, fixed, [spacing]))
        rows |= {
            DICE: (float(scores[0]["dice"]), float(scores[1]["dice"])),
            HD95: (float(scores[0]["hd95"]), float(scores[1]["hd95"])),
        }
    return rows  # type: ignore[return-value]


def _warnings(
    table: Mapping[str, tuple[float, float]], result: RefinementResult, settings: dict[str, Any]
) -> list[str]:
    """What a reader should be wary of, in plain words."""
    out = []
    loss, folds, motion = (table[k] for k in ("dissimilarity per voxel", "folded cells", "mean displacement, mm"))
    if not loss[1] < loss[0]:
        out.append("The images do not agree better than before: the field is the one that came in.")
    if folds[0] > 0:
        shift = float(result.repair_shift[0])
        out.append(
            f"The field that came in folded space in {folds[0]:.0f} cells. They were repaired first, which moved it by "
            f"{shift:.3f} voxel on average."
        )
    if folds[1] > 0:
        out.append(f"The refined field folds space in {folds[1]:.0f} cells. This should not happen: please report it.")
    if motion[1] > FAR:
        out.append(f"The images are far apart, {motion[1]:.1f} mm on average: align them affinely first.")
    dice = table.get(DICE)
    if dice is not None and dice[1] < dice[0]:
        out.append(
            f"The labels overlap less than before, Dice {dice[0]:.3f} → {dice[1]:.3f}, though the images agree more."
        )
    if TRE in table and table[TRE][1] > table[TRE][0]:
        out.append(f"The landmarks are farther apart than before, {table[TRE][0]:.2f} → {table[TRE][1]:.2f} mm.")
    limit = settings.get("seconds")
    if limit is not None and result.seconds >= float(limit):
        out.append(f"The time limit of {limit} s ended the refinement.")
    return out


def _verdict(
    title: str, table: Mapping[str, tuple[float, float]], result: RefinementResult, warnings: list[str]
) -> str:
    loss = table["dissimilarity per voxel"]
    better = 100 * (1 - loss[1] / loss[0]) if loss[0] > 0 else 0.0
    words = [f"The dissimilarity of the images fell by {better:.0f} % in {result.seconds:.1f} s."]
    if DICE in table:
        dice = table[DICE]
        words.append(f"The mean Dice of the labels went from {dice[0]:.3f} to {dice[1]:.3f}.")
    if table["folded cells"][1] == 0:
        words.append("The field has no folds.")
    listed = "".join(f"<li class='warning'>{html.escape(w)}</li>" for w in warnings)
    kind = "verdict warned" if warnings else "verdict"
    return f"<h1>{html.escape(title)}</h1><div class='{kind}'><p>{' '.join(words)}</p><ul>{listed}</ul></div>"


def _numbers(table: Mapping[str, tuple[float, float]]) -> str:
    rows = "".join(f"<tr><td>{name}</td><td>{a:.4g}</td><td>{b:.4g}</td></tr>" for name, (a, b) in table.items())
    return f"<h2>Measured</h2><table><tr><th></th><th>before</th><th>after</th></tr>{rows}</table>"


def _pictures(
    fixed: Tensor,
    moving: Tensor,
    before: Tensor,
    ddf: Tensor,
    labels: tuple[Tensor, Tensor] | None,
    affine: np.ndarray | None,
    predicted: bool,
) -> str:
    still = fixed[0, 0].numpy()
    views = figures.Views(still, affine)
    shown = {"fixed": still, "moving": moving[0, 0].numpy()}
    if predicted:
        shown["as predicted"] = figures.warped_by(moving, before)
    shown["refined"] = figures.warped_by(moving, ddf)
    shown = {name: figures.contrast(volume) for name, volume in shown.items()}
    outline, contours = None, None
    if labels is not None:
        still_label, moved = (label.detach().float().cpu() for label in labels)
        fields = {"moving": torch.zeros_like(ddf), "as predicted": before, "refined": ddf}
        contours = {name: figures.warped_by(moved, field, "nearest") for name, field in fields.items()}
        outline = still_label[0, 0].numpy()
    note = " Blue: labels of the fixed image; orange: labels of the moving image, warped." if labels is not None else ""
    first, second = figures.flicker(views, shown["fixed"], shown["refined"])
    differing = {
        "before": shown["fixed"] - shown["as predicted" if predicted else "moving"],
        "after": shown["fixed"] - shown["refined"],
    }
    return "\n".join(
        [
            _figure(
                "Images", "Fixed, moving and warped image." + note, figures.images(views, shown, contours, outline)
            ),
            "<h2>Flicker</h2><p>Fixed and refined image in turn; what jumps is not aligned. Click the picture to change"
            " by hand. <button type='button'>Flicker</button></p>"
            f"<div class='flicker'>{_image(first, 'fixed image')}{_image(second, 'refined image')}</div>",
            _figure("Differences", "Fixed minus warped image", figures.differences(views, differing)),
            _figure("Deformation", "Deformed grid and Jacobian", figures.deformation(views, shown["refined"], ddf)),
        ]
    )


def _figure(heading: str, caption: str, data: str) -> str:
    return (
        f"<h2>{heading}</h2><figure style='margin:0'>{_image(data, caption)}<figcaption>{caption}</figcaption></figure>"
    )


def _image(data: str, alt: str) -> str:
    return f"<img alt='{html.escape(alt, quote=True)}' src='data:image/png;base64,{data}'>"


def _facts(heading: str, facts: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(str(name))}</td><td>{html.escape(str(value))}</td></tr>" for name, value in facts.items()
    )
    return f"<h2>{heading}</h2><table>{rows}</table>"


def _versions(result: RefinementResult) -> dict[str, str]:
    import monai

    return {
        "monai_lm": monai_lm.__version__, "torch": torch.__version__, "monai": monai.__version__,
        "python": platform.python_version(), "device": str(result.ddf.device), "seconds": f"{result.seconds:.1f}",
    }  # fmt: skip
