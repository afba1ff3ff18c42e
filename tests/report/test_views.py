"""Slices: which ones, and where they lie on the page."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from monai_lm.report.views import further_slices, views_of


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, -1), (-1, -1, 1)])
def test_views_are_those_of_radiology_for_any_orientation(make_case, order, signs):
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    for axis, (world, sign) in enumerate(zip(order, signs, strict=True)):
        affine[world, axis] = sign
    size = (6, 9, 12)
    views = views_of(make_case(size, affine))
    assert [v.name.split(",")[0] for v in views] == ["axial", "coronal", "sagittal"]
    assert [v.letters for v in views] == [tuple("RLAP"), tuple("RLSI"), tuple("APSI")]
    assert [v.index for v in views] == [size[v.normal] // 3 for v in views]
    voxels = np.stack(np.meshgrid(*[np.arange(s) for s in size], indexing="ij"))
    world = np.einsum("ij,jklm->iklm", affine[:3, :3], voxels)
    for view, (right, up) in zip(views, [(0, 1), (0, 2), (1, 2)], strict=True):
        across, along = view.cut(world[right]), view.cut(world[up])
        assert (np.diff(across, axis=1) == -1).all()  # towards the patient's left, or the back
        assert (np.diff(along, axis=0) == 1).all()  # towards the front, or the head


def test_a_sagittal_slice_in_2d(make_case):
    affine = np.zeros((4, 4))
    affine[1, 0] = affine[2, 1] = affine[0, 2] = affine[3, 3] = 1
    (view,) = views_of(make_case((6, 9), affine))
    assert view.letters == tuple("APSI")
    assert view.axes == (0, 1)
    assert view.flips == (True, False)


def test_without_an_affine_nothing_is_claimed(make_case):
    views = views_of(make_case((6, 9, 12)))
    assert [v.letters for v in views] == [None] * 3
    assert [v.name for v in views] == ["axis 2, voxel 4", "axis 1, voxel 3", "axis 0, voxel 2"]


def test_further_slices_spread_over_the_foreground_beside_the_central_one(make_case):
    case = make_case((40, 9, 12))
    case.fixed.zero_()
    case.fixed[:, :, 10:35, 2:4, 3:5] = 1
    view = views_of(case)[2]
    assert (view.normal, view.index) == (0, 22)
    further = further_slices(case, view)
    assert [v.index for v in further] == [14, 18, 26, 30]
    assert further[0].name == "axis 0, voxel 14"
    assert further_slices(case, replace(view, normal=None)) == []
