"""Known maps between scenes in space are found, whatever grids show them; what does not help is not taken."""

from importlib import import_module

import numpy as np
import pytest
import torch

import monai_lm
from monai_lm.alignment.align import _basis, _descend, _moved
from monai_lm.alignment.view import View, levels_of, shrunk_grid
from monai_lm.fields.space import Grid
from monai_lm.similarity import NCC
from monai_lm.similarity.weighted import Weighted, with_moving_weight, with_weight

HALF = np.array([40.0, 52.0, 36.0])  # of the object, in millimetres
STRETCH = np.array([[1.10, 0.05, 0.02], [0.05, 0.88, -0.04], [0.02, -0.04, 1.04]])
TURNED = np.array([[0.0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, -1, 0], [0, 0, 0, 1]])  # axes swapped, two of them mirrored


def scene(points):
    """An ellipsoid with something in it, at points ``(..., n)`` in millimetres."""
    n = points.shape[-1]
    inside = 1 / (1 + np.exp(np.clip(30 * (np.linalg.norm(points / HALF[:n], axis=-1) - 1), -50, 50)))
    waves = np.sin(points[..., 0] / 9 + 0.3) * np.cos(points[..., 1] / 11) + np.sin(points.sum(-1) / 17)
    return inside * (2 + waves)


def rotation(n, degrees):
    """About an axis that is none of the grid's."""
    angle, axis = np.radians(degrees), np.array([0.3, -0.5, 0.81]) if n == 3 else np.array([0.0, 0, 1])
    x, y, z = axis / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return (np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross)[:n, :n]


def shown(spacing, extent, centre, codes, back):
    """An image and its affine: the scene seen at ``back`` of each voxel's place."""
    n, size = len(spacing), [round(e / s) for e, s in zip(extent, spacing, strict=True)]
    affine = np.eye(4)
    for axis, edge in enumerate(spacing):
        affine[axis, axis] = edge if codes[axis] in "RAS" else -edge
    affine[:n, 3] = centre - affine[:n, :n] @ ((np.array(size) - 1) / 2)
    voxels = np.stack(np.meshgrid(*[np.arange(s) for s in size], indexing="ij"), -1)
    points = voxels @ affine[:n, :n].T + affine[:n, 3]
    image = scene(points @ back[:n, :n].T + back[:n, 3])
    return torch.from_numpy(image.astype(np.float32))[None, None], affine


def pair(n, degrees, shift, codes="LPS", stretch=None):
    """``align``'s images and affines, and the map between them; the moving image on voxels of its own."""
    truth = np.eye(4)
    truth[:n, :n] = rotation(n, degrees) @ (np.eye(n) if stretch is None else stretch[:n, :n])
    truth[:n, 3] = np.array([0.6, -0.7, 0.4])[:n] * shift
    fixed, f = shown((3.0, 2.5, 4.0)[:n], (110, 130, 100)[:n], np.array([3.0, -4, 2])[:n], "RAS", np.eye(4))
    centre = truth[:n, 3] + np.array([5.0, -6, 4])[:n]
    moving, m = shown((2.5, 3.0, 3.5)[:n], (150, 160, 140)[:n], centre, codes, np.linalg.inv(truth))
    return (fixed, 300 - 80 * moving, f, m), truth


def noisy(case, part):
    """The same with noise, of a standard deviation that is a part of the scene's unit; seeded."""
    (fixed, moving, *affines), generator = case, torch.Generator().manual_seed(0)
    first, second = (torch.randn(x.shape, generator=generator) for x in (fixed, moving))
    return (fixed + part * first, moving + 80 * part * second, *affines)


def apart(a, b, n):
    """Mean distance in millimetres to which two maps lead the corners of the object."""
    corners = np.stack(np.meshgrid(*[[-h, h] for h in HALF[:n]], indexing="ij"), -1).reshape(-1, n)
    return np.linalg.norm(corners @ (a - b)[:n, :n].T + (a - b)[:n, 3], axis=1).mean()


@pytest.mark.parametrize(
    ("n", "mode", "codes", "degrees"),
    [(2, "rigid", "LPS", 30), (2, "affine", "LAS", -25), (3, "affine", "LPS", 30)],
)
def test_a_known_map_is_found_to_less_than_half_a_voxel(n, mode, codes, degrees):
    case, truth = pair(n, degrees, 40, codes, STRETCH if mode == "affine" else None)
    found = monai_lm.align(*case, mode)
    assert found.kind == mode
    assert apart(found.matrix, truth, n) < 1.0
    assert found.losses[mode] < 0.5 * found.losses["none"]
    if mode == "rigid":
        assert found.rotation == pytest.approx(abs(degrees), abs=0.5)
        np.testing.assert_allclose(found.scales, 1, atol=1e-9)


def test_the_order_and_the_direction_of_the_axes_do_not_matter():
    (fixed, moving, f, m), _ = pair(3, 12, 20)
    f[:3, 3] += f[:3, :3] @ (4, 4, 2)
    fixed = fixed[..., 4:-4, 4:-4, 2:-2].contiguous()
    first = monai_lm.align(fixed, moving, f, m, "rigid")
    turn = TURNED.copy()
    turn[:3, 3] = (0, fixed.shape[3] - 1, fixed.shape[4] - 1)
    turned = fixed.transpose(2, 3).flip(2, 4).contiguous()  # its voxel (i, j, k) is voxel (j, -1 - i, -1 - k)
    assert turned[0, 0, 1, 2, 3] == fixed[0, 0, 2, -2, -4]
    again = monai_lm.align(turned, moving, f @ turn, m, "rigid")
    assert apart(first.matrix, again.matrix, 3) < 1e-3


def test_auto_leaves_images_alone_that_are_aligned_and_takes_the_simplest_that_does():
    (fixed, moving, f, m), _ = pair(2, 0, 0)
    still = monai_lm.align(fixed, moving, f, m)
    assert still.kind == "none"
    np.testing.assert_array_equal(still.matrix, np.eye(4))
    assert "they stay there" in str(still)
    case, _ = pair(2, 20, 15)
    turned = monai_lm.align(*case)
    assert turned.kind == "rigid"
    np.testing.assert_array_equal(turned.matrix, monai_lm.align(*case).matrix)
    assert turned.values()["rotation_degrees"] == pytest.approx(20, abs=0.5)
    assert "turns by" in str(turned)


@pytest.mark.parametrize("stretch", [None, STRETCH])
def test_auto_takes_affine_maps_for_what_is_stretched_not_for_noise(stretch):
    case, truth = pair(2, 12, 15, stretch=stretch)
    found = monai_lm.align(*noisy(case, 0.3))
    assert found.kind == ("rigid" if stretch is None else "affine")
    assert apart(found.matrix, truth, 2) < 0.6


def test_noise_does_not_draw_images_off_a_common_grid():
    (fixed, _, f, _), _ = pair(2, 0, 0)
    found = monai_lm.align(*noisy((fixed, 300 - 80 * fixed, f, f.copy()), 0.3))
    assert found.kind == "none"
    # interpolation averages noise away: as long as voxels met voxels, the true place seemed 12 % worse than others
    assert min(found.losses.values()) > 0.95 * found.losses["none"]


@pytest.mark.parametrize("shift", [0, 400])
def test_what_halves_of_the_fixed_image_do_not_agree_on_is_not_taken(shift):
    """Of what has nothing to do with each other any map may look best."""
    (fixed, moving, f, m), _ = pair(2, 0, shift)
    generator = torch.Generator().manual_seed(1)
    noise = [torch.randn(image.shape, generator=generator) for image in (fixed, moving)]
    found = monai_lm.align(*noise, f, m, "rigid")
    assert found.losses["rigid"] < found.losses["none"]
    assert found.kind == ("center" if shift else "none")
    assert found.apart > 0.15 * 35
    assert (
        f"No alignment is taken: two halves of the fixed image, aligned on their own, lead {found.apart:.1f} mm"
        in str(found)
    )
    told = monai_lm.align(fixed, moving, f, m, "rigid")
    assert told.kind == "rigid"
    assert told.apart is None if shift else told.apart < 1  # alike before: halves are asked, and agree


def test_what_makes_images_much_more_alike_is_taken_without_asking_halves(monkeypatch):
    """Crops of one scene, turned: halves of so few voxels do not find each other."""
    (fixed, moving, f, m), truth = pair(2, 40, 3)
    crops = fixed[:, :, :14].contiguous(), moving[:, :, :-16].contiguous(), f, m
    found = monai_lm.align(*crops, "rigid")
    assert (found.kind, found.apart) == ("rigid", None)
    assert found.losses["rigid"] < 0.4 * min(found.losses["none"], found.losses["center"])
    assert apart(found.matrix, truth, 2) < 0.5
    monkeypatch.setattr(import_module("monai_lm.alignment.align"), "_TELLS", 0.0)
    assert monai_lm.align(*crops, "rigid").kind == "none"


def test_a_few_voxels_do_not_tell_an_affine_map():
    (fixed, moving, f, m), truth = pair(2, 5, 3)
    mask = torch.zeros_like(fixed)
    mask[:, :, 12:26, 18:34] = 1
    found = monai_lm.align(fixed, moving, f, m, "affine", mask=mask)
    assert found.kind == "rigid"
    assert apart(found.matrix, truth, 2) < 1
    assert "affine map that was asked for is not taken: too few voxels tell it" in str(found)


def test_halves_share_no_voxel_and_miss_none():
    (fixed, moving, f, m), _ = pair(2, 4, 3)
    grids = Grid(tuple(fixed.shape[2:]), f), Grid(tuple(moving.shape[2:]), m)
    images = with_weight(fixed, torch.ones_like(fixed)), with_moving_weight(moving, torch.ones_like(moving))
    view = View(*images, grids, Weighted(NCC(), True, True), levels_of(grids[0])[-1])
    assert view.counted == pytest.approx(view.fixed[0, 0].numel())
    first, second = view.halves()
    torch.testing.assert_close(first.fixed[:, -1] + second.fixed[:, -1], view.fixed[:, -1])
    assert not (first.fixed[:, -1] * second.fixed[:, -1]).any()
    assert view.look(np.eye(4)).loss == pytest.approx(
        np.mean([half.look(np.eye(4)).loss for half in (first, second)]), rel=0.1
    )


@pytest.mark.parametrize("exact", [False, True])
def test_an_affine_of_a_plane_may_be_three_by_three(exact, random_tensor):
    image, affine = random_tensor((1, 1, 12, 10)), np.diag([2.0, 3.0, 1.0, 1.0])
    affine[:2, 3] = 7, -5
    plane = affine[np.ix_((0, 1, 3), (0, 1, 3))]
    found = monai_lm.align(image, image.roll(2, 2), plane, affine if exact else torch.from_numpy(plane), "center")
    whole = monai_lm.align(image, image.roll(2, 2), affine, affine, "center")
    np.testing.assert_array_equal(found.matrix, whole.matrix)
    with pytest.raises(ValueError, match=r"fixed_affine must be an invertible \(4, 4\) .*, got shape \(3, 3\)"):
        monai_lm.align(image[..., None].expand(-1, -1, -1, -1, 4), torch.rand(1, 1, 4, 4, 4), plane, affine)


def test_center_shifts_what_is_shown_and_brings_images_together_that_lie_apart():
    case, truth = pair(2, 0, 400)
    found = monai_lm.align(*case, "center")
    assert (found.kind, found.losses["none"]) == ("center", float("inf"))
    assert apart(found.matrix, truth, 2) < 3
    assert found.shift == pytest.approx(np.linalg.norm(truth[:2, 3]), abs=3)
    assert "there was no overlap" in str(found)


def test_a_spoilt_part_outside_the_masks_is_not_seen():
    (fixed, moving, f, m), truth = pair(2, 15, 20)
    mask, moving_mask = torch.ones_like(fixed), torch.ones_like(moving)
    mask[:, :, :, :12] = moving_mask[:, :, :8] = 0
    first = monai_lm.align(fixed, moving, f, m, "rigid", mask=mask, moving_mask=moving_mask)
    spoilt = fixed.clone(), moving.clone()
    spoilt[0][:, :, :, :9], spoilt[1][:, :, :5] = 50, -900  # as in refine(), three voxels beside a mask are seen
    again = monai_lm.align(*spoilt, f, m, "rigid", mask=mask, moving_mask=moving_mask)
    assert apart(first.matrix, truth, 2) < 1
    assert apart(first.matrix, again.matrix, 2) < 1e-3


def test_the_slope_is_that_of_the_loss_and_steps_of_a_rigid_descent_are_rigid():
    (fixed, moving, f, m), truth = pair(2, 4, 3)
    grids = Grid(tuple(fixed.shape[2:]), f), Grid(tuple(moving.shape[2:]), m)
    view, frame = View(fixed, moving, grids, NCC(), levels_of(grids[0])[-1]), (np.array([1.0, 2.0]), 30.0)
    look = view.look(np.eye(4))
    slope = _basis(2, rigid=True).reshape(3, -1) @ look.normal(*frame)[0].ravel()
    for axis, step in enumerate(1e-2 * np.eye(3)):
        ends = [view.look(_moved(np.eye(4), sign * step, frame, rigid=True)).loss for sign in (1, -1)]
        assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(slope[axis], rel=0.2)  # differences of voxels, not exact
    end = _descend(look, frame, rigid=True)
    np.testing.assert_allclose(end.matrix[:2, :2] @ end.matrix[:2, :2].T, np.eye(2), atol=1e-12)
    assert end.loss < look.loss
    assert apart(end.matrix, truth, 2) < 1


def test_levels_keep_their_place_in_space():
    grid = Grid((100, 80, 20), np.diag([1.0, 1.2, 5.0, 1.0]))
    levels = levels_of(grid)
    assert [level.scale for level in levels] == [4.0, 2.0, 1.0]
    for level in levels:
        small = shrunk_grid(grid, level)
        middle, same = (np.append((np.array(g.size) - 1) / 2, 1) for g in (grid, small))
        np.testing.assert_allclose(small.affine @ same, grid.affine @ middle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "similarity"}, "mode must be one of .*'auto'.*, got 'similarity'"),
        ({"fixed": torch.zeros(2, 1, 8, 8)}, r"fixed must be one image \(1, C, \*S\).*got shape \(2, 1, 8, 8\)"),
        ({"moving": torch.zeros(1, 1, 8, 8, 8)}, "must have as many axes and channels"),
        ({"moving": torch.full((1, 1, 8, 8), float("nan"))}, "moving must be finite"),
        ({"fixed_affine": np.zeros((4, 4))}, "fixed_affine must be an invertible"),
        ({"moving_affine": np.full((4, 4), np.nan)}, "moving_affine must be an invertible"),
        (
            {"moving_affine": np.diag([1, 0, 1])},
            r"moving_affine must be an invertible \(4, 4\) matrix with the last row 0 0 0 1, or \(3, 3\)",
        ),
        ({"moving_affine": np.eye(4) * 1j}, "moving_affine must be an invertible"),
        ({"fixed_affine": "affine.txt"}, "fixed_affine must be an invertible .* got 'affine.txt'"),
        ({"fixed_affine": [[1, 2], [3]]}, r"fixed_affine must be an invertible .* got \[\[1, 2\], \[3\]\]"),
        ({"fixed": torch.zeros(1, 1, 8, 8, 1)}, "a single slice without the axis across it, got shape"),
        ({"moving_affine": TURNED[[0, 2, 1, 3]]}, "must lie in a plane of x and y"),
        ({"mask": torch.zeros(1, 1, 8, 8)}, "mask must not be zero everywhere"),
        (
            {"moving_mask": torch.ones(1, 1, 4, 4)},
            r"moving_mask must be \(B, 1, \*S\) = \(1, 1, 8, 8\) on the grid of mov",
        ),
    ],
)
def test_what_cannot_be_used_is_named(change, message, random_tensor):
    given = {"fixed": random_tensor((1, 1, 8, 8)), "moving": random_tensor((1, 1, 8, 8)), "fixed_affine": np.eye(4)}
    with pytest.raises(ValueError, match=message):
        monai_lm.align(**given | {"moving_affine": np.eye(4)} | change)


@pytest.mark.parametrize("value", [1e3, 1e6])
def test_one_bright_voxel_does_not_keep_images_apart(value):
    axis = torch.arange(40.0)
    shift = (4.0, -3.0)
    images = [
        torch.exp(-((axis[:, None] - 20 - s) ** 2 / 60 + (axis - 18 - t) ** 2 / 30))[None, None]
        + 0.3 * torch.exp(-((axis[:, None] - 26 - s) ** 2 + (axis - 20 - t) ** 2) / 8)[None, None]
        for s, t in ((0.0, 0.0), shift)
    ]
    images[0][0, 0, 2, 3] = value
    found = monai_lm.align(*images, np.eye(4), np.eye(4), "center")
    np.testing.assert_allclose(found.matrix[:2, 3], shift, atol=0.5)  # a quarter of the coarse images' voxel
