"""A small pair with everything a report can show."""

from __future__ import annotations

import pytest
import torch

from monai_lm.report.case import Case
from monai_lm.report.rivals import Rivals
from monai_lm.solver.result import Iteration, RefinementResult


@pytest.fixture
def make_result():
    """``make_result(ddf, **changes)``: a result that improved, without folds, in 1 s."""

    def make(ddf, initial=0.5, final=0.3, seconds=1.0, folds=0, shift=0.0):
        history = [
            Iteration(2, 0.5, 0.1, float("nan"), True, 0.1),
            Iteration(2, 0.4, 0.1, float("nan"), True, 0.2),
            Iteration(1, 0.45, 0.3, float("nan"), True, 0.3),
            Iteration(1, 0.46, 0.3, float("nan"), False, 0.4),
            Iteration(1, 0.3, 0.9, float("nan"), True, 0.5),
        ]
        values = (torch.tensor([float(v)]) for v in (initial, final))
        return RefinementResult(ddf, [history], *values, torch.tensor([folds]), torch.tensor([float(shift)]), seconds)

    return make


@pytest.fixture(params=[(24, 20), (24, 14, 12)], ids=["2D", "3D"])
def case(request, make_result):
    """Keyword arguments of ``write_report`` but the path: a blob, and the blob moved by 2 voxels along axis 0."""
    size = request.param
    n = len(size)
    axes = [torch.arange(s, dtype=torch.float32) for s in size]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    middle = torch.tensor([(s - 1) / 2 for s in size]).view(-1, *[1] * n)

    def blob(offset):
        centre = middle.clone()
        centre[0] += offset
        return ((points - centre) ** 2).sum(0)[None, None]

    fixed, moving = (torch.exp(-blob(o) / 18) for o in (0.0, 2.0))
    ddf = torch.zeros(1, n, *size)
    ddf[:, 0] = 2
    labels = tuple((blob(o) < 16).float() + (blob(o) < 4).float() for o in (0.0, 2.0))
    landmark = middle.view(1, n)
    moved = landmark.clone()
    moved[:, 0] += 2
    return {
        "fixed": fixed,
        "moving": moving,
        "result": make_result(ddf),
        "affine": torch.diag(torch.tensor([2.0, 1.0, 3.0, 1.0])),
        "labels": labels,
        "landmarks": (torch.cat([landmark, landmark + 1]), torch.cat([moved, landmark + float("nan")])),
    }


@pytest.fixture
def make_case(make_result):
    """``make_case(size, affine)``: a voxel at a third of the grid in both images, and no motion."""

    def make(size, affine=None):
        image = torch.zeros(1, 1, *size)
        image[(0, 0, *[s // 3 for s in size])] = 1
        ddf = torch.zeros(1, len(size), *size)
        return Case(image, image, make_result(ddf), ddf, None, affine, (1.0,) * len(size), None, None, {}, image.device)

    return make


@pytest.fixture
def without_rivals(monkeypatch):
    """Reports that do not refine mirror images: a second for every page, and pages do not show it."""
    monkeypatch.setattr("monai_lm.report.evidence.rivals_of", lambda *_: Rivals())
