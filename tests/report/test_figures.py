"""Pictures: what is marked on slices, and how."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from monai_lm.io.outputs import figure_class
from monai_lm.report.figures import (
    _draw_contours,
    _draw_folds,
    _draw_grid,
    _paint,
    _with_palette,
    pictures_of,
    volumes_of,
)
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
    lines = axis.collections[0].get_segments()
    assert len(lines) == 9 + 6
    assert lines[0].tolist() == [[(i - 0.5) * 2, -0.75] for i in range(6)]  # the axis is flipped, and so is the field
    assert lines[9].tolist() == [[-1.0, (i - 0.25) * 3] for i in range(9)]


@pytest.mark.parametrize("most", [0, 1, 4])
def test_outlines_are_those_that_matplotlib_draws(random_tensor, most):
    labels = (most * random_tensor((12, 15)).sigmoid()).ceil().numpy()
    labels[3:9, 4:9] = most
    axis, other = figure_class()().subplots(1, 2)
    _draw_contours(axis, View("slice", None, 0, (1, 0), (False, False), (2.0, 0.5), None), labels, "red")
    paths = axis.collections[0].get_paths()
    assert len(paths) == most
    for label, path in enumerate(paths, 1):
        expected = other.contour(2.0 * np.arange(15), 0.5 * np.arange(12), labels == label, [0.5]).get_paths()[0]
        assert path.vertices.tolist() == expected.vertices.tolist()
        assert len(path) == 0 or path.codes.tolist() == expected.codes.tolist()
    assert (most != 1) or len(paths[0]) == 0  # the label fills the slice
    axis.figure.canvas.draw()


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
    view = views_of(case)[0]
    assert np.abs(volumes.difference(volumes.warped, view)).max() < 1e-5
    assert np.abs(volumes.difference(volumes.warped[::-1], view)).max() > 0.5


def test_a_palette_keeps_greys_and_few_colours():
    pixels = np.arange(256, dtype=np.uint8).repeat(4).reshape(64, 16, 1).repeat(3, axis=2)
    pixels[5:9, 3:7] = (34, 211, 238)
    pixels[20] = (255, 159, 28)
    grey = (pixels == pixels[..., :1]).all(-1)
    shown = np.asarray(_with_palette(Image.fromarray(pixels), grey).convert("RGB"))
    assert np.array_equal(shown[~grey], pixels[~grey])
    assert np.abs(shown[grey].astype(int) - pixels[grey]).max() == 1
    assert shown.min() == 0
    assert shown.max() == 255


def test_a_picture_is_the_same_whatever_was_drawn_before(make_case, random_tensor):
    size = (14, 12, 10)
    labels = (random_tensor((1, 1, *size)) > 0.5).float()
    case = replace(
        make_case(size), ddf=3 * random_tensor((1, 3, *size), 1).float(), labels=(labels, labels.flip(2)),
        uncertainty=random_tensor((1, 1, *size), 2).abs().float(),
    )  # fmt: skip
    volumes, views = volumes_of(case), views_of(case)
    kinds = ["labels after", "jacobian after", "grid", "uncertainty", "difference after", "fixed", "labels before"]
    together = pictures_of(case, volumes, views, kinds)
    for kind in kinds:
        for i, view in enumerate(views):
            assert pictures_of(case, volumes, [view], [kind])[kind] == [together[kind][i]]
