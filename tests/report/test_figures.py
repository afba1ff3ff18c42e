"""Pictures: what is marked on slices, and how."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from monai_lm.io.outputs import figure_class
from monai_lm.report.figures import _draw_folds, _draw_grid, _paint, volumes_of
from monai_lm.report.views import View, views_of


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


def test_jacobian_map_shows_the_logarithm(make_case):
    grow = torch.arange(6.0).view(1, 1, 6, 1).expand(1, 1, 6, 8)
    ddf = torch.cat([grow, torch.zeros_like(grow)], 1)  # doubles every voxel along axis 0
    case = make_case((6, 8))
    case = replace(case, ddf=ddf)
    volumes = volumes_of(case)
    assert volumes.limit == 1.0
    axis = figure_class()().add_subplot()
    _paint(case, volumes, "jacobian after", views_of(case)[0], axis)
    shown = axis.images[0]
    assert shown.get_clim() == (-1.0, 1.0)
    assert np.array_equal(shown.get_array(), np.ones((8, 6)))


def test_difference_is_in_parts_of_the_windows(make_case, random_tensor):
    image = random_tensor((1, 1, 12, 10)).float()
    case = replace(make_case((12, 10)), fixed=image, moving=5 * image + 3)
    volumes = volumes_of(case)
    assert np.abs(volumes.difference(volumes.warped)).max() < 1e-5
    assert np.abs(volumes.difference(volumes.warped[::-1])).max() > 0.5
