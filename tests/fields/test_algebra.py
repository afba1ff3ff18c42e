"""Composition, integration and resampling of fields against formulas and known maps."""

import itertools
import math

import numpy as np
import pytest
import torch
from monai.networks.blocks import DVF2DDF

from monai_lm.fields import compose, integrate, resample

WIDE = pytest.mark.parametrize("size", [(24, 20), (16, 14, 15)], ids=["2D", "3D"])


def interpolate(field, position):
    """Displacement vector at a position of an array ``(n, *S)`` continued by its border value."""
    sizes = field.shape[1:]
    position = [min(max(p, 0.0), s - 1.0) for p, s in zip(position, sizes, strict=True)]
    total = np.zeros(len(sizes))
    for corner in itertools.product((0, 1), repeat=len(sizes)):
        index = [math.floor(p) + c for p, c in zip(position, corner, strict=True)]
        weight = math.prod(1 - abs(p - i) for p, i in zip(position, index, strict=True))
        if weight > 0:
            total += weight * field[(slice(None), *index)]
    return total


def compose_by_loops(outer, inner):
    outer, inner = outer.numpy(), inner.numpy()
    out = np.zeros_like(inner)
    for b, *x in np.ndindex(inner.shape[0], *inner.shape[2:]):
        step = inner[(b, slice(None), *x)]
        out[(b, slice(None), *x)] = step + interpolate(outer[b], np.array(x) + step)
    return torch.from_numpy(out)


def positions(size):
    """Voxel coordinates ``(1, n, *S)`` in float64."""
    axes = [torch.arange(s, dtype=torch.float64) for s in size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]


def linear_field(size, matrix, shift=0.0):
    return torch.einsum("ac,bc...->ba...", matrix, positions(size)) + shift


def test_compose_equals_loops(size, random_tensor):
    outer, inner = (random_tensor((2, len(size), *size), seed) for seed in (0, 1))
    torch.testing.assert_close(compose(outer, inner), compose_by_loops(outer, inner), rtol=1e-12, atol=1e-12)


def test_compose_takes_the_outer_field_from_another_grid(size, random_tensor):
    outer = random_tensor((1, len(size), *[s + 2 for s in size]))
    inner = random_tensor((1, len(size), *size), 1)
    torch.testing.assert_close(compose(outer, inner), compose_by_loops(outer, inner), rtol=1e-12, atol=1e-12)


def test_composing_with_the_identity_is_exact(size, random_tensor):
    field = random_tensor((1, len(size), *size), dtype=torch.float32)
    assert torch.equal(compose(field, torch.zeros_like(field)), field)
    assert torch.equal(compose(torch.zeros_like(field), field), field)


def test_constant_shifts_add(size, random_tensor):
    n = len(size)
    first, second = (random_tensor((1, n), seed).view(1, n, *[1] * n).expand(1, n, *size) for seed in (0, 1))
    torch.testing.assert_close(compose(first, second), first + second, rtol=1e-12, atol=1e-12)


def test_compose_applies_inner_first():
    inner = torch.zeros(1, 2, 5, 5)
    inner[:, 0] = 1
    outer = torch.zeros(1, 2, 5, 5)
    outer[:, 1, 3] = 7
    assert compose(outer, inner)[0, 1].sum(1).tolist() == [0, 0, 35, 0, 0]


@WIDE
def test_compose_is_associative_for_smooth_fields(size, smooth_field, interior):
    a, b, c = (smooth_field((1, len(size), *size), 1.0, 6.0, seed) for seed in range(3))
    left, right = compose(compose(a, b), c), compose(a, compose(b, c))
    assert (interior(left - right, 3)).abs().max() < 5e-3
    assert (left - a - b - c).abs().max() > 0.05  # not just addition


def test_compose_of_linear_fields_multiplies_their_maps(interior, random_tensor):
    first, second = 0.05 * random_tensor((2, 2), 0), 0.05 * random_tensor((2, 2), 1)
    size, eye = (13, 12), torch.eye(2, dtype=torch.float64)
    product = (eye + first) @ (eye + second) - eye
    composed = compose(linear_field(size, first), linear_field(size, second))
    torch.testing.assert_close(interior(composed, 4), interior(linear_field(size, product), 4), rtol=1e-12, atol=1e-12)


def test_compose_is_equivariant_to_flips_and_transposition(size, random_tensor, flip_field, transpose_field):
    outer, inner = (random_tensor((1, len(size), *size), seed) for seed in (2, 3))
    expected = compose(outer, inner)
    for axis in range(len(size)):
        flipped = compose(flip_field(outer, axis), flip_field(inner, axis))
        torch.testing.assert_close(flipped, flip_field(expected, axis), rtol=1e-12, atol=1e-12)
    transposed = compose(transpose_field(outer), transpose_field(inner))
    torch.testing.assert_close(transposed, transpose_field(expected), rtol=1e-12, atol=1e-12)


def test_gradcheck_of_compose(random_tensor):
    outer, inner = (0.4 * torch.tanh(random_tensor((1, 2, 3, 4), seed)) for seed in (0, 1))
    assert torch.autograd.gradcheck(compose, (outer.requires_grad_(), inner.requires_grad_()))


def test_gradcheck_of_integrate(random_tensor):
    velocity = (0.2 * torch.tanh(random_tensor((1, 2, 4, 3), 2))).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: integrate(v, 3), (velocity,))


def test_integral_of_a_constant_velocity_is_that_constant(size, random_tensor):
    n = len(size)
    velocity = 3 * random_tensor((1, n)).view(1, n, *[1] * n).expand(1, n, *size)
    torch.testing.assert_close(integrate(velocity), velocity, rtol=1e-12, atol=1e-12)


def test_integral_of_a_linear_velocity_is_the_matrix_exponential(interior):
    size, centre = (17, 16), torch.tensor([8.0, 7.5], dtype=torch.float64)
    matrix = torch.tensor([[0.05, -0.2], [0.15, -0.1]], dtype=torch.float64)
    exponential = torch.linalg.matrix_exp(matrix) - torch.eye(2, dtype=torch.float64)
    velocity, expected = (linear_field(size, m, -(m @ centre).view(1, 2, 1, 1)) for m in (matrix, exponential))
    error = interior(integrate(velocity, steps=10) - expected, 5)
    assert error.abs().max() < 1e-3


@WIDE
def test_integrals_of_opposite_velocities_cancel(size, smooth_field, interior):
    velocity = smooth_field((1, len(size), *size), 2.0, 6.0, 4)
    forward, backward = integrate(velocity), integrate(-velocity)
    assert interior(compose(forward, backward), 4).abs().max() < 0.02
    assert interior(forward + backward, 4).abs().max() > 0.1  # the negative field is not the inverse


@pytest.mark.filterwarnings("ignore:monai.networks.blocks.Warp")
@WIDE
def test_integrate_agrees_with_monai_where_the_velocity_vanishes_at_the_border(size, smooth_field):
    velocity = smooth_field((2, len(size), *size), 2.0, 3.0, 5, vanish=True)
    torch.testing.assert_close(integrate(velocity, 7), DVF2DDF(num_steps=7)(velocity), rtol=1e-9, atol=1e-9)


def test_resample_of_a_linear_map_is_exact(size, random_tensor):
    new = tuple(2 * s + a for a, s in enumerate(size))
    matrix = random_tensor((len(size), len(size)))
    # the same map in the voxels of the new grid: y = r x with r = (new - 1) / (old - 1) per axis
    ratio = torch.tensor([(m - 1) / (s - 1) for m, s in zip(new, size, strict=True)], dtype=torch.float64)
    expected = linear_field(new, ratio[:, None] * matrix / ratio)
    torch.testing.assert_close(resample(linear_field(size, matrix), new), expected, rtol=1e-10, atol=1e-10)


def test_resample_there_and_back_through_a_multiple_of_the_grid_is_exact(size, random_tensor):
    field = random_tensor((2, len(size), *size))
    finer = resample(field, [3 * (s - 1) + 1 for s in size])
    torch.testing.assert_close(resample(finer, size), field, rtol=1e-12, atol=1e-12)


def test_resample_to_the_same_size_returns_the_same_tensor(size, random_tensor):
    field = random_tensor((1, len(size), *size))
    assert resample(field, size) is field
    assert resample(field, list(size)) is field


def test_resample_commutes_with_composition_of_linear_maps(interior, random_tensor):
    size, new = (9, 11), (17, 31)
    first, second = (linear_field(size, 0.05 * random_tensor((2, 2), seed)) for seed in (5, 6))
    coarse = resample(compose(first, second), new)
    fine = compose(resample(first, new), resample(second, new))
    torch.testing.assert_close(interior(fine, 6), interior(coarse, 6), rtol=1e-10, atol=1e-10)


def test_steps_and_sizes_that_make_no_sense():
    field = torch.zeros(1, 2, 4, 5)
    with pytest.raises(ValueError, match="steps must be at least 0, got -1"):
        integrate(field, -1)
    for size in [(1, 5), (4, 5, 6), (4,)]:
        with pytest.raises(ValueError, match=r"size must be 2 voxel counts of at least 2 .*, got \("):
            resample(field, size)
    with pytest.raises(ValueError, match=r"field of \(1, 5\) voxels"):
        resample(field[:, :, :1], (4, 5))
