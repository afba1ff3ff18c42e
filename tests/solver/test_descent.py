"""Gradients and steps: each against its formula, all descents against the same laws."""

import math
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.descents import DESCENTS as OTHERS
from monai_lm.fields import compose, warp
from monai_lm.kernels.reference import eulerian_gradient, spatial_gradient
from monai_lm.similarity import LNCC, MSE
from monai_lm.solver.descent import DESCENTS, expected_decrease, pull_back
from monai_lm.solver.trust import initial_trust
from tests.solver.helpers import SHAPES, direction, interior_bump, length, noise, trust_of, waves


@pytest.mark.parametrize("shape", [(7, 5), (6, 2), (5, 4, 6), (2, 3, 2)])
def test_spatial_gradient_is_numpys(shape):
    image = noise(2, 3, *shape)
    expected = np.gradient(image.numpy(), axis=tuple(range(2, image.dim())))
    for ours, theirs in zip(spatial_gradient(image), expected, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-12, atol=1e-12)


def directional_derivative(loss, ddf: Tensor, v: Tensor, eps: float = 1e-4) -> float:
    """Central difference of ``loss`` along the compositional update ``u ∘ (id + eps v)``."""
    return float((loss(compose(ddf, eps * v)) - loss(compose(ddf, -eps * v))) / (2 * eps))


@pytest.mark.parametrize("measure", [MSE(), LNCC(radius=2)], ids=["mse", "lncc"])
@pytest.mark.parametrize("shape", [(48, 44), (26, 24, 25)])
def test_eulerian_gradient_is_the_derivative_of_a_compositional_update(shape, measure):
    """``d/dε ℓ(moving ∘ φ ∘ (id + ε v)) = ⟨g, v⟩`` for images without detail below the voxel."""
    n = len(shape)
    moving, fixed = waves(shape, 1), waves(shape, 2)
    ddf = 2.5 * waves(shape, 3, n) * interior_bump(shape)
    reference, moving = measure.prepare(fixed, moving)

    def loss(u: Tensor) -> Tensor:
        return measure.evaluate(warp(moving, u), reference)[0]

    warped = warp(moving, ddf)
    gradient = eulerian_gradient(measure.evaluate(warped, reference)[1], warped)
    assert gradient.shape == ddf.shape
    # along the gradient (masked to the interior) and along the gradient on one side only
    bump = interior_bump(shape)
    for v in (gradient * bump, gradient * bump * (gradient > 0), gradient * bump * (waves(shape, 5) > 0)):
        v = v / v.abs().max()
        assert directional_derivative(loss, ddf, v) == pytest.approx(float((gradient * v).sum()), rel=0.05)


@pytest.mark.parametrize("shape", [(48, 44), (26, 24, 25)])
def test_pull_back_turns_an_autograd_gradient_into_the_compositional_one(shape):
    """Under a shrinking map, ``I + ∇u = 3/4``, the raw gradient is a third too large for a compositional update."""
    moving, fixed = waves(shape, 1), waves(shape, 2)
    axes = [torch.arange(s, dtype=torch.float64) - (s - 1) / 2 for s in shape]
    ddf = -0.25 * torch.stack(torch.meshgrid(*axes, indexing="ij"))[None] + 0.1

    def loss(u: Tensor) -> Tensor:
        return (warp(moving, u) - fixed).square().sum()

    leaf = ddf.clone().requires_grad_()
    raw = torch.autograd.grad(loss(leaf), leaf)[0]
    pulled = pull_back(raw, ddf)
    v = pulled * interior_bump(shape)
    v = v / v.abs().max()
    truth = directional_derivative(loss, ddf, v)
    assert float((pulled * v).sum()) == pytest.approx(truth, rel=0.02)
    assert float((raw * v).sum()) == pytest.approx(truth * 4 / 3, rel=0.02)
    warped = warp(moving, ddf)
    eulerian = eulerian_gradient(2 * (warped - fixed), warped)
    assert float((eulerian * v).sum()) == pytest.approx(truth, rel=0.05)


@pytest.mark.parametrize("shape", [(6, 5), (4, 5, 6)])
def test_pull_back_of_a_linear_map_is_the_transposed_matrix(shape):
    """For ``u(x) = A x`` the factor ``(I + ∇u)ᵀ`` is ``(I + A)ᵀ`` everywhere, edges included."""
    n = len(shape)
    matrix = 0.3 * noise(n, n, seed=4)
    grid = torch.stack(torch.meshgrid(*[torch.arange(s, dtype=torch.float64) for s in shape], indexing="ij"))
    ddf = torch.einsum("ij,j...->i...", matrix, grid)[None]
    gradient = noise(1, n, *shape, seed=5)
    expected = torch.einsum("ji,bj...->bi...", torch.eye(n, dtype=torch.float64) + matrix, gradient)
    torch.testing.assert_close(pull_back(gradient, ddf), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_direction_is_the_damped_rank_one_inverse(shape):
    gradient = noise(2, len(shape), *shape)
    trust = trust_of(torch.tensor([0.7, 40.0], dtype=torch.float64), torch.tensor([0.7, 10.0], dtype=torch.float64))
    v = direction(gradient, trust, step=0.5)
    for pair, (damping, radius) in enumerate([(0.7, 0.5), (40.0, 0.25)]):  # λ = 4 λ₀ halves the radius
        g = gradient[pair]
        expected = -2 * math.sqrt(damping) * radius * g / (g.square().sum(0) + damping)
        torch.testing.assert_close(v[pair], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("damping", [1e-4, 1e-2, 1.0, 1e2, 1e6])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_step_is_longer_than_the_radius(shape, damping, window):
    gradient = noise(1, len(shape), *shape, dtype=torch.float32) * 10 ** noise(
        1, 1, *shape, seed=1, dtype=torch.float32
    )
    v = direction(gradient, trust_of(damping, dtype=torch.float32), 0.5, window)
    assert float(length(v).max()) <= 0.5 * (1 + 1e-6)


@pytest.mark.parametrize("n", [2, 3])
def test_the_radius_is_reached_where_the_gradient_is_the_root_of_the_damping(n):
    unit = F.normalize(noise(1, n, *[5] * n), dim=1)
    v = direction(3.0 * unit, trust_of(9.0), 0.4)
    torch.testing.assert_close(length(v), torch.full_like(length(v), 0.4), rtol=1e-12, atol=0)
    for factor in (0.5, 2.0):
        assert float(length(direction(factor * 3.0 * unit, trust_of(9.0), 0.4)).max()) < 0.4 * 0.81


def solve_by_brute_force(gradient: np.ndarray, damping: float, window: int, radius: float) -> np.ndarray:
    """``-2√λ s (mean_w(g gᵀ) + λ I)⁻¹ g``, clipped to ``s``, one voxel at a time; ``(n, *S)``."""
    n, *shape = gradient.shape
    half, out = window // 2, np.zeros_like(gradient)
    for voxel in product(*[range(s) for s in shape]):
        around = tuple(slice(max(0, i - half), i + half + 1) for i in voxel)
        g = gradient[(slice(None), *around)].reshape(n, -1)
        hessian = g @ g.T / g.shape[1] + damping * np.eye(n)
        v = -2 * math.sqrt(damping) * radius * np.linalg.solve(hessian, gradient[(slice(None), *voxel)])
        out[(slice(None), *voxel)] = v * min(1.0, radius / max(np.linalg.norm(v), 1e-300))
    return out


@pytest.mark.parametrize("damping", [0.01, 1.0, 50.0])
@pytest.mark.parametrize(("shape", "window"), [((7, 6), 3), ((7, 6), 5), ((5, 4, 6), 3), ((2, 3, 4), 5)])
def test_windowed_direction_is_the_solution_of_every_voxels_system(shape, window, damping):
    gradient = noise(1, len(shape), *shape, seed=3)
    expected = solve_by_brute_force(gradient[0].numpy(), damping, window, 0.5)
    v64 = direction(gradient, trust_of(damping), 0.5, window)
    np.testing.assert_allclose(v64[0].numpy(), expected, rtol=1e-9, atol=1e-12)
    v32 = direction(gradient.float(), trust_of(damping, dtype=torch.float32), 0.5, window)
    np.testing.assert_allclose(v32[0].numpy(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("relative", [1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize("n", [2, 3])
def test_windowed_direction_goes_downhill_where_gradients_are_parallel(n, relative):
    """Parallel gradients make a rank-one mean: the inverse must keep its sign down to the smallest damping."""
    gradient = noise(1, n, *[1] * n, dtype=torch.float32).expand(1, n, *[7] * n).contiguous()
    damping = relative * float(gradient.square().sum(1).mean())
    v = direction(gradient, trust_of(damping, dtype=torch.float32), 0.5, window=3)
    cosine = F.cosine_similarity(v, gradient, dim=1)
    assert float(cosine.max()) < -0.9


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("factor", [1e-8, 1e-3, 1e3, 1e8])
@pytest.mark.parametrize("shape", SHAPES)
def test_scaling_the_loss_does_not_change_the_step(shape, factor, window):
    gradient = noise(2, len(shape), *shape, dtype=torch.float32)
    loss = torch.zeros(2)
    steps = [direction(g, initial_trust(g, loss, 0.3), 0.5, window) for g in (gradient, factor * gradient)]
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("factor", [1e-30, 1e-20, 1e20, 1e30])
def test_extreme_gradients_give_finite_steps(factor):
    """Squares of gradients beyond 1e19 or below 1e-19 leave float32; the step must stay finite and bounded."""
    gradient = noise(1, 2, 9, 8, dtype=torch.float32)
    gradient = factor * gradient
    for window in (1, 3):
        v = direction(gradient, initial_trust(gradient, torch.zeros(1), 1.0), 0.5, window)
        assert float(length(v).max()) <= 0.5 * (1 + 1e-6)


EVERY = {**{f"{name} {window}": make(window) for name, make in DESCENTS.items() for window in (1, 3)}, **OTHERS}


@pytest.mark.parametrize("unit", [(1.0, 1.0), (1.0, 0.4)])
@pytest.mark.parametrize("name", EVERY)
def test_every_descent_goes_downhill_no_farther_than_its_step(name, unit):
    gradient = 7.0 * noise(2, 2, 12, 11, dtype=torch.float32)
    trust = initial_trust(gradient, torch.zeros(2), 1.0, unit)
    v = EVERY[name].start().direction(gradient.clone(), trust, unit, 0.3)
    assert v.shape == gradient.shape
    assert bool(((v * gradient).flatten(1).sum(1) < 0).all())
    assert float((v.abs().amax((0, 2, 3)) / v.new_tensor(unit)).max()) <= 0.3 * (1 + 1e-5) / min(unit)
    if name not in ("adam", "lion"):  # their components are bounded one by one, in voxels
        assert float(length(v / v.new_tensor(unit).view(1, 2, 1, 1)).max()) <= 0.3 * (1 + 1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_every_descent_sees_one_pair_at_a_time_and_keeps_still_without_a_gradient(name):
    gradient = noise(3, 2, 9, 8, dtype=torch.float32)
    gradient[1] = 0
    trust = initial_trust(gradient, torch.zeros(3), 1.0)
    together = EVERY[name].start()
    alone = EVERY[name].start()
    for _ in range(3):  # with its state, if it has one
        v = together.direction(gradient.clone(), trust, [1.0, 1.0], 0.3)
        one = initial_trust(gradient[2:], torch.zeros(1), 1.0)
        torch.testing.assert_close(alone.direction(gradient[2:].clone(), one, [1.0, 1.0], 0.3), v[2:])
        assert torch.count_nonzero(v[1]) == 0


@pytest.mark.parametrize("name", EVERY)
def test_every_descent_composes_its_step_and_tells_what_it_promises(name):
    gradient, residual = noise(2, 2, 12, 11, dtype=torch.float32), noise(2, 2, 12, 11, seed=1, dtype=torch.float32)
    warped, derivative = (
        noise(2, 1, 12, 11, seed=2, dtype=torch.float32),
        noise(2, 1, 12, 11, seed=3, dtype=torch.float32),
    )
    trust, unit = initial_trust(gradient, torch.zeros(2), 1.0), [1.0, 0.5]
    v = EVERY[name].start().direction(gradient.clone(), trust, unit, 0.3)
    for image in (None, (warped, derivative)):
        out = gradient.clone()
        expected = EVERY[name].start().advance(out, residual, trust, unit, 0.3, image, out)
        torch.testing.assert_close(out, compose(residual, v), rtol=0, atol=1e-5)
        if image is None:
            assert expected.isnan().all()
        else:
            torch.testing.assert_close(
                expected, expected_decrease(eulerian_gradient(derivative, warped), v), rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("name", EVERY)
def test_every_level_starts_without_the_state_of_the_one_before(name):
    gradient = noise(1, 2, 9, 8, dtype=torch.float32)
    trust = initial_trust(gradient, torch.zeros(1), 1.0)
    steps = [EVERY[name].start().direction(gradient.clone(), trust, [1.0, 1.0], 0.3) for _ in range(2)]
    assert torch.equal(*steps)
