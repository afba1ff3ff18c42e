"""The factored Levenberg-Marquardt iteration, law by law."""

import math
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from monai_lm.fields import compose, gaussian_smooth, warp
from monai_lm.similarity import LNCC, MSE
from monai_lm.solver import levenberg
from monai_lm.solver.levenberg import Trust

SHAPES = [(24, 21), (14, 12, 13)]


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def waves(shape: tuple[int, ...], seed: int, channels: int = 1, cycles: float = 1.5) -> Tensor:
    """Band-limited image ``(1, channels, *S)`` in float64: at most ``cycles`` periods along an axis."""
    generator = torch.Generator().manual_seed(seed)
    axes = [torch.linspace(0, 1, s, dtype=torch.float64) for s in shape]
    grid = torch.meshgrid(*axes, indexing="ij")
    out = []
    for _ in range(channels):
        total = torch.zeros(shape, dtype=torch.float64)
        for _ in range(4):
            frequency = cycles * (2 * torch.rand(len(shape), generator=generator, dtype=torch.float64) - 1)
            phase = 6.28 * float(torch.rand(1, generator=generator))
            total += torch.cos(2 * math.pi * sum(f * x for f, x in zip(frequency, grid, strict=True)) + phase)
        out.append(total / 4)
    return torch.stack(out)[None]


def interior_bump(shape: tuple[int, ...]) -> Tensor:
    """Smooth weight that vanishes at the border of the grid."""
    out = torch.ones(shape, dtype=torch.float64)
    for axis, size in enumerate(shape):
        profile = torch.sin(torch.linspace(0, math.pi, size, dtype=torch.float64)) ** 2
        out = out * profile.view([-1 if a == axis else 1 for a in range(len(shape))])
    return out


def trust_of(
    damping: float | Tensor,
    reference: float | Tensor | None = None,
    loss: float = 0.0,
    expected: float = math.nan,
    decrease: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> Trust:
    damping = torch.as_tensor(damping, dtype=dtype).reshape(-1)
    reference = damping if reference is None else torch.as_tensor(reference, dtype=dtype).reshape(-1)

    def full(value: float) -> Tensor:
        return torch.full_like(damping, value)

    return Trust(damping, reference, full(loss), full(expected), full(decrease))


def advance(residual: Tensor, v: Tensor, trust: Trust, sigma: tuple[float, ...]) -> Tensor:
    """The residual after a step that is composed into it, and smoothed."""
    out = residual.clone()
    levenberg.relax(compose(residual, v), trust, sigma, out)
    return out


def length(v: Tensor) -> Tensor:
    return torch.linalg.vector_norm(v, dim=1)


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 5), (6, 2), (5, 4, 6), (2, 3, 2)])
def test_spatial_gradient_is_numpys(shape):
    image = noise(2, 3, *shape)
    expected = np.gradient(image.numpy(), axis=tuple(range(2, image.dim())))
    for ours, theirs in zip(levenberg.spatial_gradient(image), expected, strict=True):
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
    gradient = levenberg.eulerian_gradient(measure.evaluate(warped, reference)[1], warped)
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
    pulled = levenberg.pull_back(raw, ddf)
    v = pulled * interior_bump(shape)
    v = v / v.abs().max()
    truth = directional_derivative(loss, ddf, v)
    assert float((pulled * v).sum()) == pytest.approx(truth, rel=0.02)
    assert float((raw * v).sum()) == pytest.approx(truth * 4 / 3, rel=0.02)
    warped = warp(moving, ddf)
    eulerian = levenberg.eulerian_gradient(2 * (warped - fixed), warped)
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
    torch.testing.assert_close(levenberg.pull_back(gradient, ddf), expected, rtol=1e-10, atol=1e-10)


# --- damping at the start --------------------------------------------------------------------------------------------


def test_initial_damping_is_relative_to_the_typical_gradient():
    gradient = torch.zeros(2, 2, 6, 6, dtype=torch.float64)
    gradient[0, :, 0, 0] = torch.tensor([3.0, 4.0])
    gradient[0, 0, 2, 3] = 1.0
    gradient[1, 1] = 2.0
    loss = torch.tensor([5.0, 7.0], dtype=torch.float64)
    trust = levenberg.initial_trust(gradient, loss, 0.5)
    typical = [(25 + 1) / (5 + 1), 2.0]  # voxels count as much as their gradient
    assert trust.damping.tolist() == pytest.approx([0.5 * g**2 / 2 for g in typical], rel=1e-12)
    assert torch.equal(trust.reference, trust.damping)
    assert trust.loss.tolist() == [5, 7]
    assert trust.expected.isnan().all()
    assert trust.decrease.tolist() == [0, 0]
    assert sorted(trust.state()) == ["damping", "decrease", "expected", "loss", "reference"]


@pytest.mark.parametrize("padding", [1, 7, 40])
def test_zero_padding_does_not_change_the_damping(padding):
    gradient = torch.zeros(1, 2, 14, 15)
    gradient[..., 4:10, 5:9] = noise(1, 2, 6, 4, dtype=torch.float32)
    padded = F.pad(gradient, [padding] * 4)
    before, after = (levenberg.initial_trust(g, torch.zeros(1), 1.0).damping for g in (gradient, padded))
    assert float(after) == pytest.approx(float(before), rel=1e-5)


def test_zero_padding_does_not_change_the_damping_of_a_faint_gradient():
    """Which voxels count as having a gradient may not depend on how many have none."""
    gradient = torch.ones(1, 2, 8, 8)
    gradient[..., :4] *= math.sqrt(0.4e-8)
    padded = F.pad(gradient, [8] * 4)
    before, after = (levenberg.initial_trust(g, torch.zeros(1), 1.0).damping for g in (gradient, padded))
    assert float(after) == pytest.approx(float(before), rel=1e-4)


# --- direction -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_direction_is_the_damped_rank_one_inverse(shape):
    gradient = noise(2, len(shape), *shape)
    trust = trust_of(torch.tensor([0.7, 40.0], dtype=torch.float64), torch.tensor([0.7, 10.0], dtype=torch.float64))
    v = levenberg.direction(gradient, trust, step=0.5)
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
    v = levenberg.direction(gradient, trust_of(damping, dtype=torch.float32), 0.5, window)
    assert float(length(v).max()) <= 0.5 * (1 + 1e-6)


@pytest.mark.parametrize("n", [2, 3])
def test_the_radius_is_reached_where_the_gradient_is_the_root_of_the_damping(n):
    unit = F.normalize(noise(1, n, *[5] * n), dim=1)
    v = levenberg.direction(3.0 * unit, trust_of(9.0), 0.4)
    torch.testing.assert_close(length(v), torch.full_like(length(v), 0.4), rtol=1e-12, atol=0)
    for factor in (0.5, 2.0):
        assert float(length(levenberg.direction(factor * 3.0 * unit, trust_of(9.0), 0.4)).max()) < 0.4 * 0.81


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
    v64 = levenberg.direction(gradient, trust_of(damping), 0.5, window)
    np.testing.assert_allclose(v64[0].numpy(), expected, rtol=1e-9, atol=1e-12)
    v32 = levenberg.direction(gradient.float(), trust_of(damping, dtype=torch.float32), 0.5, window)
    np.testing.assert_allclose(v32[0].numpy(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("relative", [1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize("n", [2, 3])
def test_windowed_direction_goes_downhill_where_gradients_are_parallel(n, relative):
    """Parallel gradients make a rank-one mean: the inverse must keep its sign down to the smallest damping."""
    gradient = noise(1, n, *[1] * n, dtype=torch.float32).expand(1, n, *[7] * n).contiguous()
    damping = relative * float(gradient.square().sum(1).mean())
    v = levenberg.direction(gradient, trust_of(damping, dtype=torch.float32), 0.5, window=3)
    cosine = F.cosine_similarity(v, gradient, dim=1)
    assert float(cosine.max()) < -0.9


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("factor", [1e-8, 1e-3, 1e3, 1e8])
@pytest.mark.parametrize("shape", SHAPES)
def test_scaling_the_loss_does_not_change_the_step(shape, factor, window):
    gradient = noise(2, len(shape), *shape, dtype=torch.float32)
    loss = torch.zeros(2)
    steps = [
        levenberg.direction(g, levenberg.initial_trust(g, loss, 0.3), 0.5, window)
        for g in (gradient, factor * gradient)
    ]
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("factor", [1e-30, 1e-20, 1e20, 1e30])
def test_extreme_gradients_give_finite_steps(factor):
    """Squares of gradients beyond 1e19 or below 1e-19 leave float32; the step must stay finite and bounded."""
    gradient = noise(1, 2, 9, 8, dtype=torch.float32)
    gradient = factor * gradient
    for window in (1, 3):
        v = levenberg.direction(gradient, levenberg.initial_trust(gradient, torch.zeros(1), 1.0), 0.5, window)
        assert float(length(v).max()) <= 0.5 * (1 + 1e-6)


# --- rejection, zero gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize(("control", "acceptance"), list(product(levenberg.CONTROLS, levenberg.ACCEPTANCES)))
def test_repeated_rejection_ends_the_motion(control, acceptance, window):
    """The step and the whole change of the map, the elastic smoothing included, go to zero."""
    gradient = noise(1, 2, 16, 15)
    residual = gaussian_smooth(noise(1, 2, 16, 15, seed=1), 1.5)
    trust = levenberg.initial_trust(gradient, torch.ones(1, dtype=torch.float64), 1.0)
    longest, change = [], []
    for k in range(60):
        v = levenberg.direction(gradient, trust, 0.5, window)
        longest.append(float(length(v).max()))
        change.append(float((advance(residual, v, trust, (0.5, 0.5)) - residual).abs().max()))
        trust = replace(trust, expected=levenberg.expected_decrease(gradient, v))
        _, _, trust = levenberg.judge(trust, torch.full((1,), 2.0 + k, dtype=torch.float64), control, acceptance, 0.999)
    assert all(b <= a * (1 + 1e-9) for a, b in pairwise(longest[1:]))
    assert longest[-1] < 1e-4 * longest[0]
    assert change[-1] < 2e-3 * change[0]


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("n", [2, 3])
def test_without_a_gradient_nothing_moves(n, window):
    gradient = noise(2, n, *[8] * n, dtype=torch.float32)
    gradient[1] = 0
    residual = noise(2, n, *[8] * n, seed=1, dtype=torch.float32)
    trust = levenberg.initial_trust(gradient, torch.zeros(2), 1.0)
    v = levenberg.direction(gradient, trust, 0.5, window)
    assert torch.count_nonzero(v[1]) == 0
    assert torch.isfinite(v).all()
    moved = advance(residual, v, trust, (0.5,) * n)
    assert torch.equal(moved[1], residual[1])
    assert not torch.equal(moved[0], residual[0])


@pytest.mark.parametrize("n", [2, 3])
def test_advance_composes_and_blends_the_smoothing_by_the_radius(n):
    residual, v = noise(1, n, *[7] * n), 0.3 * noise(1, n, *[7] * n, seed=1)
    moved = compose(residual, v)
    trust = trust_of(4.0, 1.0)  # radius 1/2
    torch.testing.assert_close(advance(residual, v, trust, (0.0,) * n), moved)
    smooth = gaussian_smooth(moved, 0.8)
    torch.testing.assert_close(advance(residual, v, trust, (0.8,) * n), 0.5 * (moved + smooth))


def test_pairs_are_moved_independently():
    gradient, residual = noise(3, 2, 9, 8), noise(3, 2, 9, 8, seed=1)
    trust = levenberg.initial_trust(gradient, torch.zeros(3, dtype=torch.float64), 1.0)
    for window in (1, 3):
        v = levenberg.direction(gradient, trust, 0.5, window)
        moved = advance(residual, v, trust, (0.5, 0.5))
        for pair in range(3):
            one = slice(pair, pair + 1)
            alone = levenberg.initial_trust(gradient[one], torch.zeros(1, dtype=torch.float64), 1.0)
            v_alone = levenberg.direction(gradient[one], alone, 0.5, window)
            torch.testing.assert_close(v_alone, v[one], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(advance(residual[one], v_alone, alone, (0.5, 0.5)), moved[one])


# --- judge -----------------------------------------------------------------------------------------------------------


def judge(trust: Trust, loss, control="simple", acceptance="always", chance=0.5):
    return levenberg.judge(
        trust, torch.as_tensor(loss, dtype=trust.loss.dtype).reshape(-1), control, acceptance, chance
    )


@pytest.mark.parametrize(("loss", "factor"), [(9.0, 0.975), (10.0, 0.975), (11.0, 1.5)])
def test_simple_control_uses_the_published_factors(loss, factor):
    _, _, new = judge(trust_of(2.0, loss=10.0), loss)
    assert float(new.damping) == pytest.approx(2.0 * factor)
    assert float(new.reference) == 2.0
    assert float(new.loss) == loss


@pytest.mark.parametrize(
    ("gain", "factor"),
    [(0.9, 1 / 1.5), (0.51, 1 / 1.5), (0.49, 1.0), (0.11, 1.0), (0.09, 1.5), (0.0, 1.5), (-3.0, 1.5)],
)
def test_trust_region_control_follows_the_gain_ratio(gain, factor):
    _, ratio, new = judge(trust_of(2.0, loss=10.0, expected=4.0), 10.0 - 4.0 * gain, "trust_region")
    assert float(ratio) == pytest.approx(gain)
    assert float(new.damping) == pytest.approx(2.0 * factor)


@pytest.mark.parametrize("loss", [12.0, math.inf, math.nan])
def test_a_rise_that_was_expected_is_still_a_rise(loss):
    """A smoothed step can go uphill: the expected decrease is negative, and so would be a ratio of two rises."""
    _, _, new = judge(trust_of(2.0, loss=10.0, expected=-2.0), loss, "trust_region")
    assert float(new.damping) == pytest.approx(3.0)


@pytest.mark.parametrize("control", levenberg.CONTROLS)
@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_a_rise_and_never_the_reference(loss, control):
    for acceptance in levenberg.ACCEPTANCES:
        accepted, _, new = judge(
            trust_of(2.0, loss=10.0, expected=1.0, decrease=5.0), loss, control, acceptance, chance=0.0
        )
        assert bool(accepted) == (acceptance == "always")
        assert float(new.damping) == pytest.approx(3.0)
        assert float(new.loss) == 10
        assert float(new.decrease) == 5


@pytest.mark.parametrize("acceptance", levenberg.ACCEPTANCES)
@pytest.mark.parametrize("start", [math.nan, math.inf])
def test_a_finite_loss_is_better_than_a_start_that_is_not(start, acceptance):
    """A level may start where the loss is not finite; the first finite loss must become the reference."""
    accepted, _, new = judge(trust_of(2.0, loss=start), 5.0, "simple", acceptance, chance=0.5)
    assert bool(accepted)
    assert float(new.loss) == 5
    if acceptance == "metropolis":
        assert math.isfinite(float(new.decrease))  # an infinite temperature would accept everything from here on


@pytest.mark.parametrize(("loss", "bound"), [(11.0, 1e6), (9.0, 1e-6)])
@pytest.mark.parametrize("control", levenberg.CONTROLS)
def test_damping_stays_within_its_bounds(loss, bound, control):
    trust = trust_of(3.0, loss=10.0, expected=1.0)
    for _ in range(700):
        trust = replace(judge(trust, loss, control)[2], loss=trust.loss)
    assert float(trust.damping) == pytest.approx(3.0 * bound, rel=1e-9)
    assert float(trust.reference) == 3.0


@pytest.mark.parametrize("acceptance", levenberg.ACCEPTANCES)
@pytest.mark.parametrize("control", levenberg.CONTROLS)
def test_pairs_are_judged_independently(control, acceptance):
    start, loss = torch.tensor([10.0, 10.0, 10.0, 0.5]), torch.tensor([9.0, 12.0, math.nan, 0.51])
    trust = Trust(
        torch.tensor([1.0, 2, 3, 4]), torch.ones(4), start, torch.tensor([1.0, 3, 1, 2]), torch.full((4,), 2.0)
    )
    accepted, gain, new = levenberg.judge(trust, loss, control, acceptance, 0.4)
    for pair in range(4):
        one = slice(pair, pair + 1)
        alone = Trust(**{name: value[one] for name, value in trust.state().items()})
        accepted_alone, gain_alone, new_alone = levenberg.judge(alone, loss[one], control, acceptance, 0.4)
        assert torch.equal(accepted[one], accepted_alone)
        assert torch.equal(gain[one], gain_alone)
        for name, value in new_alone.state().items():
            torch.testing.assert_close(new.state()[name][one], value, rtol=0, atol=0, equal_nan=True)


def test_descent_accepts_what_did_not_rise_and_keeps_the_loss_otherwise():
    for loss, expected in [(9.0, True), (10.0, True), (10.001, False)]:
        accepted, _, new = judge(trust_of(1.0, loss=10.0), loss, acceptance="descent", chance=0.0)
        assert bool(accepted) == expected
        assert float(new.loss) == (loss if expected else 10.0)


@pytest.mark.parametrize("rise", [0.01, 1.0, 2.0, 10.0])
def test_metropolis_accepts_a_rise_with_the_boltzmann_probability(rise):
    """Probability ``exp(-Δ / T)``, ``T`` the last accepted decrease, which a rise leaves as it is."""
    trust = trust_of(1.0, loss=10.0, decrease=2.0)
    probability = math.exp(-rise / 2.0)
    accepted, _, new = judge(trust, 10.0 + rise, acceptance="metropolis", chance=probability - 1e-6)
    assert bool(accepted)
    assert float(new.loss) == 10.0 + rise
    assert float(new.decrease) == 2.0
    assert float(new.damping) == 1.5
    rejected, _, new = judge(trust, 10.0 + rise, acceptance="metropolis", chance=probability + 1e-6)
    assert not bool(rejected)
    assert float(new.loss) == 10.0


def test_metropolis_at_the_ends_of_the_chance():
    falls, _, new = judge(trust_of(1.0, loss=10.0, decrease=2.0), 9.5, acceptance="metropolis", chance=0.999)
    assert bool(falls)
    assert float(new.decrease) == 0.5
    cold = judge(trust_of(1.0, loss=10.0), 10.001, acceptance="metropolis", chance=0.0)  # nothing accepted yet: T = 0
    assert not bool(cold[0])
    assert bool(judge(trust_of(1.0, loss=10.0, decrease=2.0), 12.0, acceptance="metropolis", chance=0.0)[0])


# --- gain ratio ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 60), (30, 28, 29)])
def test_the_gain_ratio_tends_to_one(shape):
    """Actual over expected decrease → 1 as the step → 0, at a field that is not on the grid points."""
    n = len(shape)
    moving, fixed = waves(shape, 1), waves(shape, 2)
    ddf = (0.4 + 1.5 * waves(shape, 3, n)) * interior_bump(shape)
    measure = MSE()
    reference, moving = measure.prepare(fixed, moving)

    def at(u: Tensor) -> tuple[Tensor, Tensor]:
        warped = warp(moving, u)
        loss, derivative = measure.evaluate(warped, reference)
        return loss, levenberg.eulerian_gradient(derivative, warped)

    loss, gradient = at(ddf)
    start = levenberg.initial_trust(gradient, loss, 1.0)
    errors = []
    for step in (1.0, 0.1, 0.01, 0.001):
        v = levenberg.direction(gradient, start, step) * interior_bump(shape)
        trust = replace(start, expected=levenberg.expected_decrease(gradient, v))
        candidate, _ = at(advance(ddf, v, trust, (0.0,) * n))
        _, gain, _ = levenberg.judge(trust, candidate, "trust_region", "always", 0.0)
        errors.append(abs(float(gain) - 1))
    assert errors[0] > 1.5 * max(errors[1:])
    assert max(errors[1:]) < 0.02  # what is left is the difference between the interpolant's slope and the stencil's


def test_expected_decrease_is_the_inner_product_per_pair():
    gradient, v = noise(2, 2, 5, 4), noise(2, 2, 5, 4, seed=1)
    expected = [-float((gradient[i] * v[i]).sum()) for i in range(2)]
    assert levenberg.expected_decrease(gradient, v).tolist() == pytest.approx(expected)


# --- chance ----------------------------------------------------------------------------------------------------------


def test_chance_is_a_deterministic_uniform_number():
    numbers = [levenberg.chance(3, k) for k in range(1000)]
    assert numbers == [levenberg.chance(3, k) for k in range(1000)]
    assert all(0 <= x < 1 for x in numbers)
    assert len(set(numbers)) == 1000
    assert np.mean(numbers) == pytest.approx(0.5, abs=0.03)
    assert np.std(numbers) == pytest.approx(12**-0.5, abs=0.02)
    assert [levenberg.chance(4, k) for k in range(10)] != numbers[:10]
