"""Voxels and millimetres, against explicit matrices, float64 brute force and other orders of the same steps."""

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from monai_lm.fields import compose, warp
from monai_lm.fields.space import (
    Grid,
    fixed_to_moving,
    from_space,
    is_sheared,
    move_to_grid,
    out_of_plane,
    resample_moving,
    spacing_of,
    through_affine,
    to_space,
    to_voxel,
    to_world,
)


def rotation(axes: str, degrees) -> np.ndarray:
    return Rotation.from_euler(axes, degrees, degrees=True).as_matrix()


def affine(matrix, origin=(7.0, -20.0, 30.0)) -> np.ndarray:
    out = np.eye(4)
    out[:3, :3], out[:3, 3] = matrix, origin
    return out


OBLIQUE = affine(rotation("XYZ", (20, -35, 50)) @ np.diag([0.7, -1.3, 3.0]))
LAS = affine(np.diag([-0.7, 1.3, 3.0]))
WORLD = affine(rotation("z", 8) @ np.diag([1.05, 0.9, 1.0]) + 0.02, (1.0, 2.0, -1.5))
PLANE = affine(rotation("z", 30) @ np.diag([0.7, 1.3, 1.0]), (7.0, -20.0, 0.0))
PLANE_LP = affine(np.diag([-2.0, -1.1, 1.0]), (3.0, 4.0, 0.0))
TURN = affine(rotation("z", 12), (1.0, -2.0, 0.0))


def of(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fixed, moving and world affines for ``n`` axes."""
    return (OBLIQUE, LAS, WORLD) if n == 3 else (PLANE, PLANE_LP, TURN)


def grid(size) -> np.ndarray:
    return np.stack(np.meshgrid(*[np.arange(s, dtype=float) for s in size], indexing="ij"))


def mapped(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """A homogeneous matrix applied to ``(n, *S)`` points, one by one in the axes of the points."""
    n = len(points)
    rows = [*range(n), 3]
    matrix = matrix[np.ix_(rows, rows)]
    return np.stack([sum(matrix[i, j] * points[j] for j in range(n)) + matrix[i, n] for i in range(n)])


# --- affines ----------------------------------------------------------------------------------------------------------


def test_spacing_is_the_length_of_a_voxels_edges_whatever_their_direction():
    assert spacing_of(OBLIQUE) == pytest.approx((0.7, 1.3, 3.0))
    assert spacing_of(torch.from_numpy(PLANE), 2) == pytest.approx((0.7, 1.3))


@pytest.mark.parametrize(("size", "matrix"), [((9, 8, 7), OBLIQUE), ((9, 8), PLANE)])
def test_a_grid_is_close_to_another_while_its_corners_are_within_a_tenth_of_a_voxel(size, matrix):
    here, n = Grid(size, matrix), len(size)
    assert here.spacing == pytest.approx((0.7, 1.3, 3.0)[:n])
    assert here.is_close(here)
    assert not here.is_close(Grid((*size[:-1], size[-1] + 1), matrix))
    for shift in (0.069, 0.071):  # of an edge of .7 mm
        assert here.is_close(Grid(size, affine(matrix[:3, :3], matrix[:3, 3] + [0, shift, 0]))) == (shift < 0.07)
    stretched = matrix @ np.diag([1.0, 1 + 0.5 / (1.3 * (size[1] - 1)), 1.0, 1.0])  # the far corners move by .5 mm
    assert not here.is_close(Grid(size, stretched))


def test_world_and_voxel_of_known_points():
    points = torch.tensor([[0.0, 0, 0], [1, 2, 3]])
    assert torch.allclose(to_world(points, LAS), torch.tensor([[7.0, -20, 30], [6.3, -17.4, 39]]))
    assert torch.equal(to_voxel(to_world(points, LAS).double(), LAS).round(), points.double())
    assert to_world(torch.tensor([[1, 2]]), PLANE_LP).tolist() == [[1.0, pytest.approx(1.8)]]
    assert to_world(points, LAS).dtype == torch.float32


def test_voxels_of_the_fixed_grid_and_of_the_moving_grid_are_one_point_in_space():
    matrix = fixed_to_moving(OBLIQUE, torch.from_numpy(LAS))
    points = torch.randn(20, 3, dtype=torch.float64)
    moved = torch.from_numpy(mapped(matrix, points.T.numpy())).T
    torch.testing.assert_close(to_world(moved, LAS), to_world(points, OBLIQUE))
    initial = fixed_to_moving(OBLIQUE, LAS, WORLD)
    np.testing.assert_allclose(LAS @ initial, WORLD @ OBLIQUE)
    np.testing.assert_array_equal(fixed_to_moving(LAS, LAS), np.eye(4))


# --- fields -----------------------------------------------------------------------------------------------------------


def test_a_field_in_a_space_is_where_points_go(size, smooth_field):
    n = len(size)
    fixed, moving, _ = of(n)
    u = smooth_field((2, n, *size), 2.0)
    expected = [mapped(moving, grid(size) + v.numpy()) - mapped(fixed, grid(size)) for v in u]
    there = to_space(u, fixed, moving)
    np.testing.assert_allclose(there.numpy(), np.stack(expected), atol=1e-9)
    torch.testing.assert_close(from_space(there, fixed, moving), u, rtol=0, atol=1e-9)


def test_on_one_grid_zero_is_exactly_zero_and_a_shift_is_the_affine_times_the_shift():
    assert not from_space(torch.zeros(1, 3, 4, 5, 6), OBLIQUE, OBLIQUE).any()
    assert not through_affine(torch.zeros(1, 3, 4, 5, 6), OBLIQUE, OBLIQUE).any()
    shift = torch.tensor([1.0, -2.0, 3.0]).view(1, 3, 1, 1, 1).expand(1, 3, 4, 5, 6)
    expected = OBLIQUE[:3, :3] @ [1.0, -2.0, 3.0]
    np.testing.assert_allclose(to_space(shift, OBLIQUE, OBLIQUE)[0, :, 1, 2, 3], expected, atol=1e-6)


def test_single_precision_is_good_to_a_thousandth_of_a_millimetre_far_from_the_origin():
    far = affine(OBLIQUE[:3, :3], (900.0, -1200.0, 700.0))
    u = torch.randn(1, 3, 60, 5, 40, generator=torch.Generator().manual_seed(0))
    back = from_space(to_space(u, far, LAS), far, LAS)
    assert float((back - u).abs().max()) < 1e-3


def test_through_the_affine_is_the_affine_after_the_field(size, smooth_field):
    """As a composition: the affine's own field, on a grid large enough, composed with ``u``."""
    n = len(size)
    fixed, moving, world = of(n)
    u = smooth_field((1, n, *size), 1.0)
    matrix = fixed_to_moving(fixed, moving, world)
    expected = mapped(matrix, grid(size) + u[0].numpy()) - grid(size)
    np.testing.assert_allclose(through_affine(u, fixed, moving, world)[0].numpy(), expected, atol=1e-9)
    # inside the grid, composing with the sampled affine field is the same, as an affine field is linear
    inner = u * 0 + 0.5
    inner[:, :, -1:] = 0
    alone = through_affine(torch.zeros_like(u), fixed, moving, world)
    together = compose(alone, inner)
    inside = tuple(slice(0, s - 1) for s in size)
    torch.testing.assert_close(
        together[(..., *inside)], through_affine(inner, fixed, moving, world)[(..., *inside)], rtol=0, atol=1e-6
    )


# --- sampling ---------------------------------------------------------------------------------------------------------


def brute_force(moving: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Linear interpolation of one channel, continued by its border, voxel by voxel in float64."""
    n = len(positions)
    out = np.zeros(positions.shape[1:])
    for index in np.ndindex(*out.shape):
        p = [min(max(positions[(a, *index)], 0.0), moving.shape[a] - 1.0) for a in range(n)]
        low = [min(int(np.floor(q)), moving.shape[a] - 2) for a, q in enumerate(p)]
        for corner in np.ndindex(*(2,) * n):
            weight = np.prod([p[a] - low[a] if c else 1 - p[a] + low[a] for a, c in enumerate(corner)])
            out[index] += weight * moving[tuple(low[a] + c for a, c in enumerate(corner))]
    return out


@pytest.mark.parametrize("initial", [False, True], ids=["", "with an initial affine"])
def test_one_sample_through_field_and_affine_by_brute_force(size, smooth_field, random_tensor, initial):
    n = len(size)
    fixed, moving_affine, world = of(n)
    other = (9, 7, 8)[:n]
    # the moving grid is laid over the fixed one, so that something is sampled
    centre = mapped(fixed, ((np.array(size) - 1) / 2)[:, None])[:, 0]
    moving_affine = moving_affine.copy()
    moving_affine[:n, 3] += centre - mapped(moving_affine, ((np.array(other) - 1) / 2)[:, None])[:, 0]
    u, moving = smooth_field((2, n, *size), 1.5), random_tensor((2, 3, *other))
    out = resample_moving(moving, u, fixed, moving_affine, world if initial else None)
    assert out.shape == (2, 3, *size)
    for b in range(2):
        world_points = mapped(fixed, grid(size) + u[b].numpy())
        world_points = mapped(world, world_points) if initial else world_points
        rows = [*range(n), 3]
        inverse = np.eye(4)
        inverse[np.ix_(rows, rows)] = np.linalg.inv(moving_affine[np.ix_(rows, rows)])
        expected = brute_force(moving[b, 1].numpy(), mapped(inverse, world_points))
        np.testing.assert_allclose(out[b, 1].numpy(), expected, atol=1e-9)
    assert float(out.std()) > 0.1


def test_on_one_grid_it_is_warp(size, smooth_field, random_tensor):
    n = len(size)
    u, moving = smooth_field((2, n, *size), 1.5), random_tensor((2, 1, *size))
    there = of(n)[0]
    for mode in ("bilinear", "nearest"):
        torch.testing.assert_close(
            resample_moving(moving, u, there, there, mode=mode, padding_mode="zeros"), warp(moving, u, mode, "zeros")
        )


def test_storing_the_moving_image_in_another_orientation_changes_nothing(smooth_field, random_tensor):
    """Flipped and transposed in memory with the affine to match, it is the same image."""
    u, moving = smooth_field((1, 3, 4, 5, 6), 1.5), random_tensor((1, 1, 7, 6, 5))
    expected = resample_moving(moving, u, OBLIQUE, OBLIQUE)
    turned = moving.flip(2).permute(0, 1, 4, 2, 3)  # new axes (k, -i, j)
    storage = np.zeros((4, 4))
    storage[0, 1], storage[0, 3], storage[1, 2], storage[2, 0], storage[3, 3] = -1, 6, 1, 1, 1
    torch.testing.assert_close(resample_moving(turned, u, OBLIQUE, OBLIQUE @ storage), expected)


def test_labels_keep_their_dtype_and_gradients_reach_the_field(smooth_field, random_tensor):
    u, labels = smooth_field((1, 3, 4, 5, 6), 1.5), torch.randint(0, 9, (1, 1, 7, 6, 5), dtype=torch.uint8)
    out = resample_moving(labels, u, OBLIQUE, OBLIQUE, mode="nearest")
    assert out.dtype == torch.uint8
    assert set(out.unique().tolist()) <= set(labels.unique().tolist())
    u.requires_grad_()
    moving, near = random_tensor((1, 1, 7, 6, 5)), affine(np.diag([1.01, 0.99, 1.0]), (0.05, 0.02, -0.03))
    assert torch.autograd.gradcheck(lambda v: resample_moving(moving, v, OBLIQUE, OBLIQUE, near), (u,))


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [np.eye(3), np.diag([1.0, 0, 1, 1]), np.full((4, 4), np.nan), np.ones((4, 4)), np.diag([1.0, 1, 1, 2])],
    ids=["3x3", "singular", "NaN", "rank one", "last row"],
)
def test_matrices_that_are_no_affine_are_named(wrong):
    field, image = torch.zeros(1, 3, 4, 5, 6), torch.zeros(1, 1, 4, 5, 6)
    for name, arguments in (
        ("fixed_affine", (wrong, LAS, None)),
        ("moving_affine", (LAS, wrong, None)),
        ("initial", (LAS, LAS, wrong)),
    ):
        with pytest.raises(ValueError, match=rf"{name} must be an invertible \(4, 4\) .* the last row 0 0 0 1, got"):
            resample_moving(image, field, *arguments)
    with pytest.raises(ValueError, match="affine must be an invertible"):
        to_world(torch.zeros(3), wrong)
    with pytest.raises(ValueError, match="affine must be an invertible"):
        spacing_of(wrong)


def test_small_voxels_are_not_singular():
    assert spacing_of(np.diag([1e-5, 1e-5, 1e-5, 1.0])) == pytest.approx((1e-5, 1e-5, 1e-5))


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"ddf must be \(B, n, \*S\) .* got shape \(1, 2, 4, 5, 6\)"):
        through_affine(torch.zeros(1, 2, 4, 5, 6), LAS, LAS)
    with pytest.raises(ValueError, match=r"moving must be \(B, C, \*M\) .* got shapes \(2, 1, 4, 5, 6\) and"):
        resample_moving(torch.zeros(2, 1, 4, 5, 6), torch.zeros(1, 3, 4, 5, 6), LAS, LAS)
    with pytest.raises(ValueError, match=r"points must be \(..., 2\) or \(..., 3\), got shape \(5, 4\)"):
        to_world(torch.zeros(5, 4), LAS)


def test_a_field_on_another_grid_points_to_the_same_places():
    old, new = affine(rotation("xyz", (10, -20, 30)) @ np.diag([2.0, 1.5, 1.0])), affine(np.diag([-1.0, 1.0, 2.0]))
    old[:3, 3] = new[:3, :3] @ [5, 6, 4] + new[:3, 3] - old[:3, :3] @ [5, 5, 5]  # centres of both meet
    slope = 0.01 * np.arange(9).reshape(3, 3)
    index = np.stack(np.meshgrid(*[np.arange(11.0)] * 3, indexing="ij"), -1)
    field = torch.from_numpy(np.moveaxis(index @ slope.T + [1, 2, 3], -1, 0))[None]
    moved = move_to_grid(field, old, (11, 13, 9), new)
    assert moved.shape == (1, 3, 11, 13, 9)
    for voxel in ((5, 6, 4), (4, 6, 4), (6, 7, 5)):
        place = new[:3, :3] @ voxel + new[:3, 3]
        at = np.linalg.inv(old[:3, :3]) @ (place - old[:3, 3])
        vector = old[:3, :3] @ (slope @ at + [1, 2, 3])
        np.testing.assert_allclose(new[:3, :3] @ moved[(0, slice(None), *voxel)].numpy(), vector, atol=1e-9)


def test_fields_and_sizes_that_cannot_be_moved_are_refused():
    field, eye = torch.zeros(1, 3, 4, 4, 4), np.eye(4)
    for size in ((4, 4), (4, 4, 0), (4, 4, 4.5), (4, 4, "4")):
        with pytest.raises(ValueError, match="size must be 3 whole numbers above 0, got"):
            move_to_grid(field, eye, size, eye)
    field[0, 1, 2, 2, 2] = torch.nan
    with pytest.raises(ValueError, match="ddf must be finite, got 1 NaN or infinite values"):
        move_to_grid(field, eye, (4, 4, 4), eye)


def test_shear_and_tilt_are_told_from_rounding():
    assert not any(is_sheared(a) or is_sheared(a.astype(np.float32)) for a in (OBLIQUE, LAS, PLANE, np.eye(4)))
    sheared = OBLIQUE.copy()
    sheared[:3, 1] += 0.001 * sheared[:3, 0]
    assert is_sheared(sheared)
    assert is_sheared(torch.from_numpy(WORLD))
    assert not any(out_of_plane(a) for a in (PLANE, PLANE_LP, LAS, TURN))
    assert out_of_plane(OBLIQUE)
    assert out_of_plane(affine(rotation("x", 1)))
    assert not out_of_plane(affine(rotation("x", 0.5)))
