"""The report: one file, true numbers, warnings exactly when there is something to warn of."""

import base64
import io
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from monai_lm import refine
from monai_lm.fields import fold_count, gaussian_smooth, warp
from monai_lm.report import write_report

pytest.importorskip("matplotlib", reason="the demo extra is not installed")
Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")


def _pair(size):
    generator = torch.Generator().manual_seed(0)
    moving = gaussian_smooth(torch.randn(1, 1, *size, generator=generator), 2.0)
    ddf = torch.zeros(1, len(size), *size)
    ddf[:, 0] = 1.5
    fixed = warp(moving, ddf)
    labels = ((fixed > 0).float(), (moving > 0).float())
    return fixed, moving, labels


def _refined(size=(20, 22)):
    fixed, moving, labels = _pair(size)
    return fixed, moving, labels, refine(fixed, moving, scales=(2, 1), iterations=(20, 10), compile=False)


def _cells(page):
    """Rows of the table of what was measured."""
    rows = re.findall(r"<tr><td>([^<]*)</td><td>([^<]*)</td><td>([^<]*)</td></tr>", page)
    return {name: (float(a), float(b)) for name, a, b in rows}


def _write(path, *args, **kwargs):
    write_report(path / "report.html", *args, **kwargs)
    return (path / "report.html").read_text()


@pytest.mark.parametrize("size", [(20, 22), (12, 13, 14)])
def test_numbers_and_pictures_are_those_of_the_pair(tmp_path, size):
    fixed, moving, labels, result = _refined(size)
    affine = np.diag([-2.0, 1.0, 1.5, 1.0])
    page = _write(
        tmp_path, fixed, moving, result, affine=affine, labels=labels, settings={"step": 0.5}, title="A <b> & B"
    )
    cells = _cells(page)
    assert cells["dissimilarity per voxel"] == pytest.approx(
        (float(result.initial_loss), float(result.final_loss)), rel=1e-3
    )
    warped = warp(labels[1], result.ddf, mode="nearest")
    dice = [float(2 * (a * labels[0]).sum() / (a.sum() + labels[0].sum())) for a in (labels[1], warped)]
    assert cells["Dice, mean of labels"] == pytest.approx(dice, rel=1e-3)
    spacing = torch.tensor([2.0, 1.0, 1.5][: len(size)]).view(1, -1, *[1] * len(size))
    motion = float(torch.linalg.vector_norm(result.ddf * spacing, dim=1).mean())
    assert cells["mean displacement, mm"] == pytest.approx((0, motion), rel=1e-3)
    assert "A &lt;b&gt; &amp; B" in page
    assert "<b>" not in page
    assert "class='warning'" not in page
    pictures = re.findall(r"src='data:image/png;base64,([^']+)'", page)
    assert len(pictures) == 6
    assert all(Image.open(io.BytesIO(base64.b64decode(p))).width > 200 for p in pictures)
    assert not re.search(r"(src|href)=['\"]?https?:", page)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def _still(result):
    return replace(result, ddf=torch.zeros_like(result.ddf), final_loss=result.initial_loss)


def test_warnings_come_exactly_when_there_is_something_to_warn_of(tmp_path):
    fixed, moving, labels, result = _refined()
    folded = torch.zeros_like(result.ddf)
    folded[0, 0, 10], folded[0, 0, 11] = 1.5, -1.5
    assert int(fold_count(folded)) > 0
    far = replace(result, ddf=result.ddf + 20)
    cases = [
        ((result,), {}, None),
        ((_still(result),), {}, "do not agree better"),
        ((result,), {"prediction": folded}, f"folded space in {int(fold_count(folded))} cells"),
        ((replace(result, ddf=folded),), {}, "This should not happen"),
        ((far,), {}, "far apart"),
        ((result,), {"settings": {"seconds": result.seconds / 2}}, "time limit"),
        ((result,), {"settings": {"seconds": result.seconds * 2}}, None),
        ((replace(result, ddf=-result.ddf),), {"labels": labels}, "labels overlap less"),
        ((result,), {"labels": labels}, None),
        ((result,), {"measured": {"target registration error, mm": (1.0, 1.5)}}, "landmarks are farther apart"),
    ]
    for args, kwargs, expected in cases:
        page = _write(tmp_path, fixed, moving, *args, **kwargs)
        warnings = re.findall(r"<li class='warning'>([^<]*)</li>", page)
        if expected is None:
            assert warnings == []
        else:
            assert any(expected in w for w in warnings), (expected, warnings)


def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path):
    fixed, moving, labels, result = _refined()
    with pytest.raises(ValueError, match=r"path must end in \.html"):
        write_report(tmp_path / "report.pdf", fixed, moving, result)
    for name, args, kwargs in (
        ("moving", (fixed, moving[..., 1:]), {}),
        ("prediction", (fixed, moving), {"prediction": torch.zeros(1, 2, 5, 5)}),
        ("moving label", (fixed, moving), {"labels": (labels[0], labels[1][..., 1:])}),
    ):
        with pytest.raises(ValueError, match=f"{name} must be one pair on the grid of fixed"):
            write_report(tmp_path / "report.html", *args, result, **kwargs)
    assert not list(tmp_path.iterdir())
