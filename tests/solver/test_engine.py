"""The passes over a level: what they compute, what they share memory for, what comes back."""

import pytest
import torch

from monai_lm.fields import compose, gaussian_smooth, warp
from monai_lm.similarity import LNCC, MSE, NCC, Combined
from monai_lm.similarity.base import normalized
from monai_lm.solver import levenberg
from monai_lm.solver.engine import Engine
from monai_lm.solver.levenberg import initial_trust
from monai_lm.solver.pyramid import make_level

SIZE = (30, 9, 10)
SPACING = (1.0, 1.0, 2.0)
MEASURES = [LNCC(radius=1), MSE(), NCC(), Combined([LNCC(radius=2), "mse"], [1, 1], [1, 30])]


@pytest.fixture
def build(random_tensor):
    """``build(measure)`` on two smooth images, from a prediction and a residual that are not zero."""

    def make(measure, control=False, window=1, dtype=torch.float32):
        channels = sum(getattr(measure, "channels", [1]))
        fixed, moving = (gaussian_smooth(random_tensor((2, channels, *SIZE), s).float(), 1.0) + 3 for s in (0, 1))
        prediction, residual = (8 * gaussian_smooth(random_tensor((2, 3, *SIZE), s).float(), 3.0) for s in (2, 3))
        level = make_level(SIZE, SPACING, 1)
        return Engine(
            level, fixed, moving, prediction, residual.to(dtype), measure, 1.0, 0.5, 0.5, window, control
        ), fixed

    return make


def run(engine, steps=3):
    """Losses, expected decreases and the residual of a few steps."""
    out = []
    for _ in range(steps):
        loss = engine.evaluate()
        trust = initial_trust(engine.gradient, loss, 1.0, engine.unit)
        better = torch.tensor([True, False])
        out += [loss, trust.damping, engine.advance(trust, better, keep=True)]
    return [*out, engine.residual, engine.best, engine.kept]


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("measure", MEASURES, ids=["lncc", "mse", "ncc", "combined"])
def test_images_that_share_memory_with_the_gradient_change_nothing(measure, window, build):
    alone, shared = (build(measure, control, window)[0] for control in (True, False))
    assert alone.warped.data_ptr() != alone.work.data_ptr()
    assert (shared.warped.data_ptr() == shared.work.data_ptr()) == (shared.moving.shape[1] == 1)
    for index, (got, expected) in enumerate(zip(run(shared), run(alone), strict=True)):
        if index % 3 == 2 and index < 9:  # the decrease that a step promises
            assert expected.isfinite().all()
            assert got.isnan().all()
        else:
            assert torch.equal(got, expected)


@pytest.mark.parametrize("measure", MEASURES, ids=["lncc", "mse", "ncc", "combined"])
def test_half_precision_is_near(measure, build):
    wide, half = (run(build(measure, True, dtype=dtype)[0]) for dtype in (torch.float32, torch.half))
    assert half[-1].dtype == torch.half
    for got, expected in zip(half, wide, strict=True):
        assert (got.float() - expected).abs().max() <= 0.02 * expected.abs().max()


@pytest.mark.parametrize("control", [False, True])
def test_a_step_is_that_of_the_levenberg_functions(control, build):
    engine, fixed = build(MSE(), control)
    start, prediction = engine.residual.clone(), engine.prediction
    of_fixed, of_moving = MSE().ranges(fixed, engine.moving)
    warped = normalized(warp(engine.moving, compose(prediction, start)), of_moving)
    loss, derivative = MSE().evaluate(warped, MSE().ranged_reference(fixed, of_fixed))
    gradient = levenberg.eulerian_gradient(derivative, warped)
    unit = torch.tensor(engine.unit).view(1, -1, 1, 1, 1)
    assert engine.unit == pytest.approx([1, 1, 0.5], rel=0.2)
    smooth = gaussian_smooth(gradient, engine.sigma)
    trust = levenberg.initial_trust(smooth, loss, 1.0, engine.unit)
    v = levenberg.direction(smooth * unit, trust, 0.5) * unit
    torch.testing.assert_close(engine.evaluate(), loss)
    expected = engine.advance(trust, None, keep=False)
    if control:
        torch.testing.assert_close(expected, levenberg.expected_decrease(gradient, v))
    else:
        assert expected.isnan().all()
    relaxed = start.clone()
    levenberg.relax(compose(start, v), trust, engine.elastic, relaxed)
    torch.testing.assert_close(engine.residual, relaxed, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.half])
def test_best_and_kept_residuals_come_back(dtype, build):
    engine, _ = build(MSE(), dtype=dtype)
    start = engine.residual.clone()
    trust = initial_trust(engine.gradient, engine.evaluate(), 1.0, engine.unit)
    engine.advance(trust, torch.tensor([True, True]), keep=True)
    moved = engine.residual.clone()
    assert (moved - start).abs().amax((1, 2, 3, 4)).min() > 0.1
    engine.retract(torch.tensor([True, False]))
    assert torch.equal(engine.residual, torch.stack([moved[0], start[1]]))
    engine.settle(torch.tensor([False, True]))
    assert torch.equal(engine.residual, start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.half])
def test_displacement_composes_for_the_better_pairs_only(dtype, build):
    engine, _ = build(MSE(), dtype=dtype)
    residual, prediction = engine.residual.float().clone(), engine.prediction
    ddf = engine.displacement(torch.tensor([True, False]))
    assert ddf.dtype == torch.float32
    torch.testing.assert_close(ddf[0], compose(prediction, residual)[0])
    assert torch.equal(ddf[1], prediction[1])
    assert ddf is engine.residual  # in whose place it is


def test_gradients_are_smoothed_in_space_and_the_residual_on_its_grid():
    """Thick slices would be left to themselves, and fold against each other, were the residual smoothed in space."""
    level, shape = make_level((12, 12, 6), (1.0, 1.0, 5.0), 1), (1, 1, 12, 12, 6)
    images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    residual = torch.zeros(1, 3, *shape[2:])
    engine = Engine(level, *images, None, residual, LNCC(), 1.0, 0.5, 0.5, 1, False)
    assert engine.sigma == pytest.approx((1.0, 1.0, 0.2))
    assert engine.elastic == [0.5, 0.5, 0.5]
