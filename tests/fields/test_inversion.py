"""Inversion of fields against formulas and known maps, affine ones and those that lead to other grids among them."""

import numpy as np
import pytest
import torch

from monai_lm.fields import compose, fold_count, inversion, invert, sample_points

WIDE = pytest.mark.parametrize("size", [(24, 20), (16, 14, 15)], ids=["2D", "3D"])


def positions(size):
    """Voxel coordinates ``(1, n, *S)`` in float64."""
    axes = [torch.arange(s, dtype=torch.float64) for s in size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]


def linear_field(size, matrix, shift=0.0):
    return torch.einsum("ac,bc...->ba...", matrix, positions(size)) + shift


def test_inverse_of_a_shift_is_the_opposite_shift(size, random_tensor):
    n = len(size)
    shift = random_tensor((2, n)).view(2, n, *[1] * n).expand(2, n, *size)
    inverse, residual = invert(shift)
    torch.testing.assert_close(inverse, -shift, rtol=0, atol=1e-12)
    assert residual.shape == (2, *size)
    assert residual.max() < 1e-12


@WIDE
def test_residual_of_the_inverse_is_what_is_left_of_the_composition(size, smooth_field):
    field = smooth_field((2, len(size), *size), 2.0, 3.0, 6)
    inverse, residual = invert(field, iterations=4)
    expected = torch.linalg.vector_norm(compose(field, inverse), dim=1)
    torch.testing.assert_close(residual, expected, rtol=1e-9, atol=1e-12)
    assert residual.max() > 1e-4  # four iterations leave something to report


@WIDE
def test_inverse_cancels_a_smooth_field_on_both_sides(size, smooth_field, interior):
    field = smooth_field((1, len(size), *size), 0.25, 8.0, 7)
    inverse, residual = invert(field)
    assert residual.max() < 1e-4
    assert interior(compose(field, inverse), 2).abs().max() < 1e-3
    assert interior(compose(inverse, field), 2).abs().max() < 1e-3


@pytest.mark.parametrize("size", [(15, 13), (9, 8, 9)], ids=["2D", "3D"])
def test_inverse_converges_where_the_field_is_no_contraction(size):
    """``u = 1.5 (x - c)``: the plain fixed-point iteration diverges, the inverse is ``-0.6 (y - c)``."""
    n = len(size)
    centred = positions(size) - torch.tensor([(s - 1) / 2 for s in size]).view(1, n, *[1] * n)
    inverse, residual = invert(1.5 * centred)
    assert residual.max() < 1e-4
    torch.testing.assert_close(inverse, -0.6 * centred, rtol=0, atol=1e-4)


def test_inverse_on_another_grid():
    """A linear map of a (9, 11) grid, inverted on a larger moving grid: exact where the map covers it."""
    size, new = (9, 11), (12, 14)
    matrix = torch.tensor([[0.2, 0.1], [-0.1, 0.3]], dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)
    inverse, residual = invert(linear_field(size, matrix), size=new)
    assert inverse.shape == (1, 2, *new)
    assert residual.shape == (1, *new)
    expected = linear_field(new, torch.linalg.inv(eye + matrix) - eye)
    source = positions(new) + expected
    covered = ((source[:, 0] >= 0) & (source[:, 0] <= 8) & (source[:, 1] >= 0) & (source[:, 1] <= 10))[0]
    assert covered.sum() > 80
    torch.testing.assert_close(inverse[..., covered], expected[..., covered], rtol=0, atol=2e-4)


@WIDE
def test_inverse_of_one_pair_does_not_depend_on_the_others(size, smooth_field):
    easy, hard = smooth_field((1, len(size), *size), 0.1, 4.0, 8), smooth_field((1, len(size), *size), 3.0, 4.0, 9)
    alone, _ = invert(easy)
    together, _ = invert(torch.cat([easy, hard]))
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=2e-4)


@WIDE
def test_inverse_is_equivariant_to_flips_and_transposition(size, smooth_field, flip_field, transpose_field):
    field = smooth_field((1, len(size), *size), 1.0, 4.0, 10)
    inverse, _ = invert(field)
    assert fold_count(inverse).tolist() == [0]
    torch.testing.assert_close(invert(flip_field(field, 1))[0], flip_field(inverse, 1), rtol=0, atol=1e-9)
    torch.testing.assert_close(invert(transpose_field(field))[0], transpose_field(inverse), rtol=0, atol=1e-9)


# --- fields with an affine in them ------------------------------------------------------------------------------------


def turned(n, degrees, stretch):
    """A rotation in the plane of the first two axes after a stretch, ``(n, n)``."""
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    out = torch.eye(n, dtype=torch.float64)
    out[:2, :2] = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
    return out @ torch.diag(torch.tensor(stretch[:n], dtype=torch.float64))


@WIDE
@pytest.mark.parametrize(
    ("degrees", "stretch", "offset"),
    [(20, (1.3, 0.8, 1.1), 2.0), (120, (1.0, 1.0, 1.0), 1.0), (0, (-1.0, 1.0, 1.0), 1.0), (5, (2.5, 2.5, 2.5), 0.0)],
    ids=["turned and stretched", "turned far", "mirrored", "larger"],
)
def test_a_field_with_an_affine_in_it_is_inverted(size, degrees, stretch, offset, smooth_field):
    """``M (x − c) + c + t`` after a smooth deformation: exact where the fixed grid comes to, whatever ``M`` is."""
    n = len(size)
    middle = torch.tensor([(s - 1) / 2 for s in size], dtype=torch.float64).view(1, n, *[1] * n)
    inner = smooth_field((1, n, *size), 0.8, 4.0, 11)
    matrix = turned(n, degrees, stretch)
    led = torch.einsum("ac,bc...->ba...", matrix, positions(size) - middle + inner) + middle + offset
    field = led - positions(size)
    inverse, residual = invert(field)
    points = (positions(size) + inverse)[0].flatten(1).T
    there = points + sample_points(field, points[None])[0]
    missed = torch.linalg.vector_norm(there - positions(size)[0].flatten(1).T, dim=1)
    inside = ((points >= 0) & (points <= torch.tensor(size) - 1)).all(1)
    assert inside.double().mean() > 0.1
    assert missed[inside].max() < 2e-4
    torch.testing.assert_close(residual.flatten(), missed, rtol=0, atol=1e-9)


@WIDE
def test_an_affine_field_has_the_inverse_affine_field(size):
    n = len(size)
    matrix, eye = turned(n, 15, (1.1, 0.9, 1.05)), torch.eye(n, dtype=torch.float64)
    field = linear_field(size, matrix - eye, 1.5)
    back = torch.linalg.inv(matrix)
    expected = linear_field(size, back - eye) - 1.5 * back.sum(1).view(1, n, *[1] * n)
    inverse, residual = invert(field)
    source = (positions(size) + expected)[0]
    covered = torch.stack([(x >= 0) & (x <= s - 1) for x, s in zip(source, size, strict=True)]).all(0)
    assert covered.double().mean() > 0.5
    torch.testing.assert_close(inverse[..., covered], expected[..., covered], rtol=0, atol=1e-9)
    assert residual.max() < 1e-4  # beyond the border too: what is continued by its border value comes everywhere


@WIDE
def test_an_inverse_lives_on_another_grid_of_other_voxels(size, smooth_field):
    """The voxels of the inverse's grid are led to those of the field's by a matrix first; nothing is interpolated."""
    n = len(size)
    field = smooth_field((1, n, *size), 1.5, 4.0, 12)
    rows = [*range(n), 3]
    grid = np.eye(4)
    grid[:n, :n] = turned(n, 30, (0.7, 1.2, 0.9)).numpy()
    grid[:3, 3] = (3.0, -2.0, 1.0)
    matrix = torch.from_numpy(grid[np.ix_(rows, rows)])
    new = tuple(s - 3 for s in size)
    inverse, residual = invert(field, new, grid=grid)
    points = (positions(new) + inverse)[0].flatten(1).T
    targets = positions(new)[0].flatten(1).T @ matrix[:n, :n].T + matrix[:n, n]
    there = points + sample_points(field, points[None])[0]
    assert torch.linalg.vector_norm(there - targets, dim=1).max() < 1e-4
    assert residual.shape == (1, *new)


def test_a_field_that_is_steep_without_folding_converges():
    """Slopes up to -0.97, where a step of one fixed length goes back and forth, and up to 6."""
    x = torch.arange(60, dtype=torch.float64)
    led = torch.cumsum(torch.where((x // 10) % 2 == 0, 0.03, 7.0), 0)
    field = torch.zeros(1, 2, 60, 4, dtype=torch.float64)
    field[0, 0] = (led - led.mean() + 30 - x)[:, None]
    _, residual = invert(field)
    assert residual.max() < 1e-3


def test_a_field_that_leads_far_away_does_not_iterate_below_its_rounding(monkeypatch, smooth_field):
    """5000 voxels away single precision has steps of half a thousandth."""
    field = smooth_field((1, 2, 24, 20), 2.0, 4.0, dtype=torch.float32) + 5000
    calls = []
    monkeypatch.setattr(inversion, "sample_points", lambda *given: calls.append(1) or sample_points(*given))
    grid = np.eye(4)
    grid[:2, 3] = 5000
    inverse, residual = invert(field, grid=grid)
    assert residual.max() < 5e-3
    assert len(calls) < 20
    near, _ = invert(field.double() - 5000)
    torch.testing.assert_close(inverse.double(), near, rtol=0, atol=1e-2)


def test_a_field_that_is_not_finite_is_refused():
    field = torch.zeros(1, 2, 5, 5)
    field[0, 1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match="ddf must be finite, got 1 NaN or infinite values"):
        invert(field)
