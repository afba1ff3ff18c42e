"""WarpPoints(d) and InvertDDF(d): points follow the field, the inverse leads back, and says where it lies."""

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from monai_lm.fields import compose, warp
from monai_lm.fields.space import to_world
from monai_lm.transforms import InvertDDF, InvertDDFd, InvertDDFDict, WarpPoints, WarpPointsd, WarpPointsDict

AFFINE = torch.tensor([[0, -1.5, 0, 9.0], [2.0, 0, 0, -4.0], [0, 0, 1.0, 3.0], [0, 0, 0, 1]], dtype=torch.float64)


@pytest.fixture
def field(smooth_field):
    """A smooth field ``(n, *S)`` in voxels that vanishes at the border."""
    return lambda size: smooth_field((1, len(size), *size), 2.0, 4.0, vanish=True)[0]


@pytest.mark.parametrize("size", [(24, 22), (16, 18, 17)])
def test_points_go_where_the_warped_image_takes_its_values_from(size, field):
    """An image of coordinates, warped, holds at a voxel the place that the voxel is led to."""
    ddf = field(size)
    coordinates = torch.stack(torch.meshgrid(*[torch.arange(s, dtype=torch.float64) for s in size], indexing="ij"))
    warped = warp(coordinates[None], ddf[None])[0]
    points = torch.tensor([[7.0, 9.0, 8.0], [10.0, 12.0, 5.0], [4.0, 6.0, 11.0]], dtype=torch.float64)[:, : len(size)]
    expected = torch.stack([warped[(slice(None), *point.long())] for point in points])
    moved = WarpPoints()(points, ddf)
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-9)
    assert (moved - points).norm(dim=1).max() > 0.3
    torch.testing.assert_close(WarpPoints()(points[None], ddf), moved[None])  # MONAI's (C, N, n)
    torch.testing.assert_close(WarpPoints()(points.tolist(), ddf), moved)
    assert WarpPoints()(torch.full((1, len(size)), torch.nan), ddf).isnan().all()


def test_points_in_space_go_through_both_affines(field):
    moving = AFFINE.clone()
    moving[:3, 3] += torch.tensor([5.0, -1.0, 2.0])
    ddf = MetaTensor(field((16, 18, 17)), affine=AFFINE)
    voxels = torch.tensor([[7.5, 9.25, 8.0], [3.0, 6.0, 11.0]], dtype=torch.float64)
    world = to_world(voxels, AFFINE)
    there = WarpPoints()(voxels, ddf)
    torch.testing.assert_close(WarpPoints(world=True)(world, ddf), to_world(there, AFFINE))
    ddf.meta["moving_affine"] = moving
    torch.testing.assert_close(WarpPoints(world=True)(world, ddf), to_world(there, moving))


@pytest.mark.parametrize("size", [(24, 22), (16, 18, 17)])
def test_the_inverse_leads_points_back(size, field):
    ddf = field(size).float()
    points = torch.full((1, len(size)), 8.0, dtype=torch.float64)  # between voxels the inverse is interpolated
    there = WarpPoints()(points, InvertDDF()(ddf))
    assert (there - points).norm() > 0.3
    assert (WarpPoints()(there, ddf) - points).abs().max() < 1e-3
    assert compose(ddf[None], InvertDDF()(ddf).as_tensor()[None]).abs().max() < 1e-3


def test_the_inverse_lies_on_the_moving_grid_and_leads_to_the_fixed_one():
    moving = AFFINE.clone()
    moving[:3, 3] -= AFFINE[:3, :3] @ torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64)  # begins two voxels earlier
    shift = torch.tensor([2.0, 0.0, 0.0]).view(3, 1, 1, 1)
    ddf = MetaTensor(shift.expand(3, 12, 12, 12).clone(), affine=AFFINE)
    ddf.meta |= {"moving_affine": moving, "moving_size": (15, 12, 12), "filename_or_obj": "a/fixed.nii.gz"}
    inverse = InvertDDF()(ddf)
    assert inverse.shape == (3, 15, 12, 12)
    torch.testing.assert_close(inverse.as_tensor(), -shift.expand(3, 15, 12, 12))
    torch.testing.assert_close(inverse.affine, moving)
    torch.testing.assert_close(inverse.meta["moving_affine"], AFFINE)
    assert inverse.meta["moving_size"] == (12, 12, 12)
    assert inverse.meta["filename_or_obj"] == "a/fixed.nii.gz"
    again = InvertDDF()(inverse)
    torch.testing.assert_close(again.as_tensor(), ddf.as_tensor())
    torch.testing.assert_close(again.affine, AFFINE)


def test_a_field_that_folds_is_inverted_with_a_warning():
    ddf = torch.zeros(2, 12, 12)
    ddf[0, 5], ddf[0, 6] = 2.0, -2.0
    with pytest.warns(UserWarning, match="ddf folds in .* cells, where it has no inverse"):
        InvertDDF()(ddf)


def test_dictionary_versions_do_what_the_array_versions_do(field):
    ddf, points = field((16, 18, 17)), np.array([[4.0, 5.0, 6.0]])
    out = WarpPointsd("points", ddf_key="field")({"points": points, "field": ddf})
    torch.testing.assert_close(out["points"], WarpPoints()(points, ddf))
    torch.testing.assert_close(InvertDDFd("field")({"field": ddf})["field"], InvertDDF()(ddf))
    assert WarpPointsd("points", allow_missing_keys=True)({"ddf": ddf})["ddf"] is ddf
    with pytest.raises(KeyError, match="field"):
        InvertDDFd("field")({})
    assert (WarpPointsDict, InvertDDFDict) == (WarpPointsd, InvertDDFd)


@pytest.mark.parametrize(
    ("points", "ddf", "message"),
    [
        (torch.zeros(2, 2), torch.zeros(3, 4, 4, 4), r"points must be \(N, 3\) or \(C, N, 3\) .* got \(2, 2\)"),
        (torch.zeros(3), torch.zeros(3, 4, 4, 4), r"points must be \(N, 3\) or \(C, N, 3\) .* got \(3,\)"),
        (torch.zeros(2, 3), torch.zeros(2, 4, 4, 4), r"ddf must be \(n, \*S\).* got shape \(2, 4, 4, 4\)"),
        (torch.zeros(2, 3), torch.zeros(3, 4, 4, 1), "at least 2 voxels along every axis"),
        (torch.zeros(2, 2), torch.full((2, 4, 4), torch.inf), "ddf must be finite"),
    ],
)
def test_points_and_fields_that_do_not_fit_are_refused(points, ddf, message):
    with pytest.raises(ValueError, match=message):
        WarpPoints()(points, ddf)


def test_what_cannot_be_inverted_or_placed_is_refused():
    with pytest.raises(ValueError, match=r"ddf must be \(n, \*S\).*got shape \(2, 4, 4, 4\)"):
        InvertDDF()(torch.zeros(2, 4, 4, 4))
    with pytest.raises(ValueError, match="ddf must be finite"):
        InvertDDF()(torch.full((2, 4, 4), torch.nan))
    with pytest.raises(ValueError, match="at least 2 voxels along every axis"):
        InvertDDF()(torch.zeros(3, 8, 8, 1))
    with pytest.raises(TypeError, match="ddf must be a MetaTensor with an affine for points in space"):
        WarpPoints(world=True)(torch.zeros(2, 3), torch.zeros(3, 4, 4, 4))
