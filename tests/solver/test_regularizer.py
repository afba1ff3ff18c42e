"""Regularisers: all against the same laws, and what they do to a refinement."""

from functools import cache
from itertools import pairwise

import pytest
import torch

from monai_lm import refine
from monai_lm.fields import fold_count, gaussian_smooth, warp
from monai_lm.fields.metrics import sd_log_jacobian
from monai_lm.solver.descent import pull_back
from monai_lm.solver.regularizer import REGULARIZERS, Bending, Diffusion, Regularized, Sliding
from tests.solver.helpers import noise, trust_of, waves

SHAPES = [(9, 8), (6, 7, 5)]


def edges_of(shape):
    return (1.5, 0.7, 2.0)[: len(shape)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", REGULARIZERS)
def test_every_derivative_is_that_of_autograd(name, shape):
    field = noise(2, len(shape), *shape).requires_grad_()
    energy = REGULARIZERS[name]().evaluate(field, edges_of(shape), None)
    (expected,) = torch.autograd.grad(energy.sum(), field)
    found = torch.ones_like(expected)
    with torch.no_grad():
        again = REGULARIZERS[name]().evaluate(field, edges_of(shape), found)
    torch.testing.assert_close(again, energy.detach())
    torch.testing.assert_close(found - 1, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", REGULARIZERS)
def test_a_shift_costs_nothing_and_an_affine_map_no_bending(name, shape):
    n = len(shape)
    grid = torch.stack(torch.meshgrid(*[torch.arange(s, dtype=torch.float64) for s in shape], indexing="ij"))
    affine = (torch.einsum("ab,b...->a...", noise(n, n), grid) + 2)[None]
    shift = torch.full_like(affine, 3.0)
    assert float(REGULARIZERS[name]().evaluate(shift, edges_of(shape), None)) == 0
    bent = float(REGULARIZERS[name]().evaluate(affine, edges_of(shape), None))
    assert bent < 1e-20 if name == "bending" else bent > 1


@pytest.mark.parametrize("name", REGULARIZERS)
def test_flips_and_exchanged_axes_change_nothing(name):
    field, edges, out = noise(1, 3, 6, 7, 5), (1.5, 0.7, 2.0), torch.zeros(1, 3, 6, 7, 5).double()
    energy = REGULARIZERS[name]().evaluate(field, edges, out)

    def turned(u):
        u = u.flip(3) * torch.tensor([1.0, -1, 1]).view(1, 3, 1, 1, 1)  # a component points the other way, too
        return u.permute(0, 1, 4, 2, 3)[:, [2, 0, 1]]

    turned_out = torch.zeros_like(turned(out))
    again = REGULARIZERS[name]().evaluate(turned(field), (2.0, 1.5, 0.7), turned_out)
    torch.testing.assert_close(again, energy)
    torch.testing.assert_close(turned_out, turned(out))


@pytest.mark.parametrize("name", REGULARIZERS)
def test_the_same_field_in_millimetres_costs_the_same_at_any_spacing(name):
    def mean_energy(size, edges):
        axes = [(torch.arange(s, dtype=torch.float64) + 0.5) / s * 2 * torch.pi for s in size]
        x, y = torch.meshgrid(*axes, indexing="ij")
        field = torch.stack([2 * x.cos() * (2 * y).cos() / edges[0], y.cos() / edges[1]])[None]
        return float(REGULARIZERS[name]().evaluate(field, edges, None)) / field[0, 0].numel()

    assert mean_energy((320, 120), (0.5, 1.0)) == pytest.approx(mean_energy((160, 240), (1.0, 0.5)), rel=0.03)


@pytest.mark.parametrize("name", REGULARIZERS)
def test_the_pull_is_for_a_compositional_update_and_smoothed_as_the_images_is(name):
    residual, derivative = 3 * waves((14, 12), 1, channels=2), torch.zeros(1, 2, 14, 12).double()
    at = Regularized(REGULARIZERS[name](0.3), (1.0, 2.0), (1.0, 0.5), 1.2)
    at.regularizer.evaluate(residual, (1.0, 2.0), derivative)
    expected = 0.3 * gaussian_smooth(pull_back(derivative, residual), (1.2, 0.6))
    pull = torch.ones_like(residual)
    torch.testing.assert_close(at.pull(residual, pull), at.loss(residual))
    torch.testing.assert_close(pull, 1 + expected)


def test_damping_starts_where_no_step_overshoots():
    stiff = Regularized(Bending(2.0), (1.0, 1.0), (1.0, 1.0), 1.0)
    trust = stiff.steadied(trust_of(torch.tensor([1.0, 1e4, 0.0])), 0.5)
    least = (4 * 16 * torch.e**-2) ** 2
    assert trust.damping.tolist() == trust.reference.tolist() == pytest.approx([least, 1e4, 0.0])
    assert Regularized(Diffusion(0.5), (1.0, 1.0), (1.0, 1.0), 0.0).stiffness == pytest.approx(8.0)  # of a chessboard
    assert Regularized(Bending(1.0), (2.0, 4.0), (1.0, 0.5), 0.0).stiffness == pytest.approx(32.0)


@cache
def pair():
    images = [gaussian_smooth(noise(1, 1, 40, 36, seed=s, dtype=torch.float32), 1.5) for s in (0, 1)]
    return images[0], images[1] + 2 * images[0]


@pytest.mark.parametrize("make", [Diffusion, Bending, Sliding])
def test_the_heavier_the_smoother_and_no_folds(make):
    fields = [refine(*pair(), regularizer=make(weight)).ddf for weight in (0.0, 0.1, 1.0)]
    assert torch.equal(fields[0], refine(*pair()).ddf)
    rough = [float(sd_log_jacobian(ddf)) for ddf in fields]
    assert all(less < 0.9 * more for more, less in pairwise(rough)), rough
    assert all(int(fold_count(ddf)) == 0 for ddf in fields)


def test_images_that_change_places_give_the_inverse():
    there = refine(*pair(), regularizer="bending", symmetric=True, iterations=8)
    back = refine(*pair()[::-1], regularizer="bending", symmetric=True, iterations=8)
    assert torch.equal(there.inverse(), back.ddf)


def test_half_spaces_slide_along_each_other():
    """By 1.5 voxels to either side: near the interface errors are smaller than with the defaults, and than diffused."""

    def missed(seed, **settings):
        moving = gaussian_smooth(noise(1, 1, 64, 64, seed=seed, dtype=torch.float32), 1.2)
        truth = torch.zeros(1, 2, 64, 64)
        truth[:, 1, :32], truth[:, 1, 32:] = 1.5, -1.5
        result = refine(warp(moving, truth), moving, similarity="mse", **settings)
        assert int(fold_count(result.ddf)) == 0
        return float((result.ddf - truth).norm(dim=1)[0, 28:36, 8:-8].mean())

    def mean(**settings):
        return sum(missed(seed, **settings) for seed in range(2)) / 2

    sliding = mean(regularizer=Sliding(0.05, 0.05), smooth_residual=0.3)
    assert sliding < 0.8 * mean()
    assert sliding < 0.6 * mean(regularizer=Diffusion(0.05), smooth_residual=0.3)


def test_what_cannot_regularise_is_told():
    with pytest.raises(ValueError, match=r"regularizer must be one of \('diffusion', 'bending', 'sliding'\).*'tv'"):
        refine(*pair(), regularizer="tv")
    with pytest.raises(ValueError, match=r"regularizer must be None with a control that compares"):
        refine(*pair(), regularizer="bending", control="trust_region")
    with pytest.raises(ValueError, match=r"weight must be at least 0, got -1"):
        Bending(-1)
    with pytest.raises(ValueError, match=r"strain must be greater than 0, got 0"):
        Sliding(strain=0)
