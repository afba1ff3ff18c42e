"""Slices: where they lie on the page, what is marked on them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from monai_lm.report.figures import (
    View,
    _draw_folds,
    _draw_grid,
    _paint,
    figure_class,
    further_slices,
    views_of,
    volumes_of,
)
from monai_lm.report.findings import Case


def case_of(size, make_result, affine):
    image = torch.zeros(1, 1, *size)
    image[(0, 0, *[s // 3 for s in size])] = 1
    ddf = torch.zeros(1, len(size), *size)
    return Case(image, image, make_result(ddf), ddf, None, affine, (1.0,) * len(size), None, None, {}, image.device)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, -1), (-1, -1, 1)])
def test_views_are_those_of_radiology_for_any_orientation(make_result, order, signs):
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    for axis, (world, sign) in enumerate(zip(order, signs, strict=True)):
        affine[world, axis] = sign
    size = (6, 9, 12)
    views = views_of(case_of(size, make_result, affine))
    assert [v.name.split(",")[0] for v in views] == ["axial", "coronal", "sagittal"]
    assert [v.letters for v in views] == [tuple("RLAP"), tuple("RLSI"), tuple("APSI")]
    assert [v.index for v in views] == [size[v.normal] // 3 for v in views]
    voxels = np.stack(np.meshgrid(*[np.arange(s) for s in size], indexing="ij"))
    world = np.einsum("ij,jklm->iklm", affine[:3, :3], voxels)
    for view, (right, up) in zip(views, [(0, 1), (0, 2), (1, 2)], strict=True):
        across, along = view.cut(world[right]), view.cut(world[up])
        assert (np.diff(across, axis=1) == -1).all()  # towards the patient's left, or the back
        assert (np.diff(along, axis=0) == 1).all()  # towards the front, or the head


def test_a_sagittal_slice_in_2d(make_result):
    affine = np.zeros((4, 4))
    affine[1, 0] = affine[2, 1] = affine[0, 2] = affine[3, 3] = 1
    (view,) = views_of(case_of((6, 9), make_result, affine))
    assert view.letters == tuple("APSI")
    assert view.axes == (0, 1)
    assert view.flips == (True, False)


def test_without_an_affine_nothing_is_claimed(make_result):
    views = views_of(case_of((6, 9, 12), make_result, None))
    assert [v.letters for v in views] == [None] * 3
    assert [v.name for v in views] == ["axis 2, voxel 4", "axis 1, voxel 3", "axis 0, voxel 2"]


@pytest.mark.parametrize(("flips", "expected"), [((False, False), (1.5, 4.5)), ((True, True), (3.5, 3.5))])
def test_folded_cells_are_marked_between_their_voxels(flips, expected):
    cells = np.zeros((7, 10), bool)  # of a grid of 6 by 9 voxels
    cells[2, 5] = True
    axis = figure_class()().add_subplot()
    _draw_folds(axis, View("slice", None, 0, (0, 1), flips, (1.0, 1.0), None), cells)
    assert axis.collections[0].get_offsets().tolist() == [list(expected)]


def test_the_deformed_grid_is_drawn_where_it_lands():
    ddf = np.zeros((2, 6, 9))
    ddf[0], ddf[1] = 0.5, -0.25
    axis = figure_class()().add_subplot()
    _draw_grid(axis, View("slice", None, 0, (0, 1), (True, False), (2.0, 3.0), None), ddf)
    row, column = axis.lines[0], axis.lines[9]
    assert row.get_xdata().tolist() == [(i - 0.5) * 2 for i in range(6)]  # the axis is flipped, and so is the field
    assert row.get_ydata().tolist() == [-0.75] * 6
    assert column.get_xdata().tolist() == [-1.0] * 9
    assert column.get_ydata().tolist() == [(i - 0.25) * 3 for i in range(9)]


def test_jacobian_map_shows_the_logarithm(make_result):
    grow = torch.arange(6.0).view(1, 1, 6, 1).expand(1, 1, 6, 8)
    ddf = torch.cat([grow, torch.zeros_like(grow)], 1)  # doubles every voxel along axis 0
    case = case_of((6, 8), make_result, None)
    case = replace(case, ddf=ddf)
    volumes = volumes_of(case)
    assert volumes.limit == 1.0
    axis = figure_class()().add_subplot()
    _paint(case, volumes, "jacobian after", views_of(case)[0], axis)
    shown = axis.images[0]
    assert shown.get_clim() == (-1.0, 1.0)
    assert np.array_equal(shown.get_array(), np.ones((8, 6)))


def test_difference_is_in_parts_of_the_windows(make_result, random_tensor):
    image = random_tensor((1, 1, 12, 10)).float()
    case = replace(case_of((12, 10), make_result, None), fixed=image, moving=5 * image + 3)
    volumes = volumes_of(case)
    assert np.abs(volumes.difference(volumes.warped)).max() < 1e-5
    assert np.abs(volumes.difference(volumes.warped[::-1])).max() > 0.5


def test_further_slices_spread_over_the_foreground_beside_the_central_one(make_result):
    case = case_of((40, 9, 12), make_result, None)
    case.fixed.zero_()
    case.fixed[:, :, 10:35, 2:4, 3:5] = 1
    view = views_of(case)[2]
    assert (view.normal, view.index) == (0, 22)
    further = further_slices(case, view)
    assert [v.index for v in further] == [14, 18, 26, 30]
    assert further[0].name == "axis 0, voxel 14"
    assert further_slices(case, replace(view, normal=None)) == []
