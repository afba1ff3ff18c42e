"""The passes over a level: what they compute, what they share memory for, what comes back."""

from copy import copy
from dataclasses import replace

import pytest
import torch

from monai_lm.fields import compose, gaussian_smooth, warp
from monai_lm.kernels.reference import eulerian_gradient
from monai_lm.similarity import LNCC, MI, MSE, NCC, Combined
from monai_lm.similarity.base import normalized
from monai_lm.similarity.weighted import Weighted
from monai_lm.solver.acceptance import Always, Descent, Metropolis
from monai_lm.solver.damping import Simple, TrustRegion
from monai_lm.solver.descent import LM, WindowedLM, expected_decrease
from monai_lm.solver.engine import Engine
from monai_lm.solver.method import Method
from monai_lm.solver.pyramid import make_level
from monai_lm.solver.residual import Residual
from monai_lm.solver.smoothing import Elastic
from monai_lm.solver.trust import initial_trust

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
        method = Method(
            LM() if window == 1 else WindowedLM(window), TrustRegion() if control else Simple(), Metropolis()
        )
        start = Residual(2, level, fixed.device, dtype)
        start.field = residual.to(dtype)
        return Engine(fixed, moving, prediction, start, measure, method, 1.0, 0.5), fixed

    return make


def run(engine, steps=3):
    """Losses, expected decreases and the residual of a few steps."""
    out = []
    for _ in range(steps):
        loss = engine.evaluate()
        trust = initial_trust(engine.gradient, loss, 1.0, engine.unit)
        better = torch.tensor([True, False])
        out += [loss, trust.damping, engine.advance(trust, better)]
    return [*out, engine.residual.field, engine.residual._best, engine.residual._previous]


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
def test_a_weight_of_the_moving_image_takes_one_volume_more_to_warp(measure, build, random_tensor):
    plain, fixed = build(measure)
    weight = random_tensor((2, 1, *SIZE), 9).abs().float().clamp(max=1)
    alone, shared = (
        Engine(
            fixed, torch.cat([weight, plain.moving], 1), plain.prediction, copy(plain.residual),
            Weighted(measure, fixed=False, moving=True), replace(plain.method, damping=damping), 1.0, 0.5,
        )
        for damping in (TrustRegion(), Simple())
    )  # fmt: skip
    assert kept(shared) - kept(plain) == weight.numel()
    assert torch.equal(alone.evaluate(), shared.evaluate())
    assert torch.equal(alone.gradient, shared.gradient)
    assert not torch.equal(shared.gradient, (plain.evaluate(), plain.gradient)[1])


def kept(engine):
    """Numbers that a level works in."""
    tensors = (engine.sampled, engine.derivative, engine.work)
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // 4 for t in tensors}.values())


@pytest.mark.parametrize("measure", MEASURES, ids=["lncc", "mse", "ncc", "combined"])
def test_half_precision_is_near(measure, build):
    wide, half = (run(build(measure, True, dtype=dtype)[0]) for dtype in (torch.float32, torch.half))
    assert half[-1].dtype == torch.half
    for got, expected in zip(half, wide, strict=True):
        assert (got.float() - expected).abs().max() <= 0.02 * expected.abs().max()


@pytest.mark.parametrize("control", [False, True])
def test_a_step_is_that_of_the_parts(control, build):
    engine, fixed = build(MSE(), control)
    start, prediction = engine.residual.field.clone(), engine.prediction
    of_fixed, of_moving = MSE().ranges(fixed, engine.moving)
    warped = normalized(warp(engine.moving, compose(prediction, start)), of_moving)
    loss, derivative = MSE().evaluate(warped, MSE().ranged_reference(fixed, of_fixed))
    gradient = eulerian_gradient(derivative, warped)
    assert engine.unit == pytest.approx([1, 1, 0.5], rel=0.2)
    smooth = gaussian_smooth(gradient, engine.sigma)
    trust = initial_trust(smooth, loss, 1.0, engine.unit)
    v = LM().direction(smooth, trust, engine.unit, 0.5)
    torch.testing.assert_close(engine.evaluate(), loss)
    expected = engine.advance(trust, torch.tensor([True, True]))
    if control:
        torch.testing.assert_close(expected, expected_decrease(gradient, v))
    else:
        assert expected.isnan().all()
    relaxed = start.clone()
    Elastic().relax(compose(start, v), engine.unit, trust.length, relaxed)
    torch.testing.assert_close(engine.residual.field, relaxed, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.half])
def test_a_step_can_be_taken_back(dtype, build):
    engine, _ = build(MSE(), dtype=dtype)
    start, residual = engine.residual.field.clone(), engine.residual
    trust = initial_trust(engine.gradient, engine.evaluate(), 1.0, engine.unit)
    engine.advance(trust, torch.tensor([True, True]))
    moved = residual.field.clone()
    assert (moved - start).abs().amax((1, 2, 3, 4)).min() > 0.1
    engine.retract(torch.tensor([True, False]))
    assert torch.equal(residual.field, torch.stack([moved[0], start[1]]))
    residual.settle(torch.tensor([False, True]))
    assert torch.equal(residual.field, start)


@pytest.mark.parametrize(
    ("acceptance", "best", "previous"), [(Always(), True, False), (Descent(), False, True), (Metropolis(), True, True)]
)
def test_no_more_is_kept_than_the_acceptance_needs(acceptance, best, previous, build):
    engine, _ = build(MSE())
    engine.method = replace(engine.method, acceptance=acceptance)
    trust = initial_trust(engine.gradient, engine.evaluate(), 1.0, engine.unit)
    engine.advance(trust, torch.tensor([True, True]))
    assert (engine.residual._best is not None, engine.residual._previous is not None) == (best, previous)


@pytest.mark.parametrize("dtype", [torch.float32, torch.half])
def test_displacement_composes_for_the_better_pairs_only(dtype, build):
    engine, _ = build(MSE(), dtype=dtype)
    residual, prediction = engine.residual.field.float().clone(), engine.prediction
    ddf = engine.displacement(torch.tensor([True, False]))
    assert ddf.dtype == torch.float32
    torch.testing.assert_close(ddf[0], compose(prediction, residual)[0])
    assert torch.equal(ddf[1], prediction[1])
    assert ddf is engine.residual.field  # in whose place it is


def test_the_residual_is_smoothed_across_thick_slices_more_than_in_space(build):
    """Left to themselves they would fold against each other."""
    engine, _ = build(MSE())
    assert engine.sigma == pytest.approx((1.0, 1.0, 0.5), rel=0.2)
    moved, out = torch.zeros(1, 3, *SIZE), torch.zeros(1, 3, *SIZE)
    moved[0, 0, 15, 4, 5] = 1.0
    engine.method.smoothing.relax(moved, engine.unit, torch.ones(1), out)
    within, across = out[0, 0, 15, 5, 5], out[0, 0, 15, 4, 6]
    assert 0.4 * within < across < within


@pytest.mark.parametrize("measure", [LNCC(), MSE(), NCC(), MI()], ids=["lncc", "mse", "ncc", "mi"])
def test_many_channels_are_seen_some_at_a_time(measure, build, random_tensor, monkeypatch):
    """Nineteen in three parts, of seven at most: what comes out is the same, in the memory of seven and a gradient."""
    one, _ = build(measure)
    images = [random_tensor((2, 19, *SIZE), seed).float() for seed in (3, 4)]

    def engine():
        return Engine(*images, one.prediction, copy(one.residual), measure, one.method, 1.0, 0.5)

    apart = engine()
    monkeypatch.setattr("monai_lm.solver.engine._AT_ONCE", 19)
    whole = engine()
    volume = images[0][:, 0].numel()
    assert (kept(whole), kept(apart)) == ((2 * 19 + 3) * volume, (2 * 7 + 3) * volume)
    assert apart.other.numel() == 3 * volume
    for got, expected in ((apart.evaluate(), whole.evaluate()), (apart.loss(None), whole.loss(None))):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
    apart.evaluate(), whole.evaluate()
    assert (apart.gradient - whole.gradient).norm() < 1e-5 * whole.gradient.norm()
    assert len(Engine(*images, None, copy(one.residual), measure, promising(one.method), 1.0, 0.5).parts) == 1


def promising(method):
    """The method with a damping that needs what a step promises, from the images as they were."""
    return replace(method, damping=TrustRegion())
