"""Two engines, one result: what is stored and what is computed anew, in windows or at once."""

import pytest
import torch

from monai_lm import engine as engine_module
from monai_lm import levenberg, streaming
from monai_lm.engine import Engine, HalfEngine, LeanEngine
from monai_lm.fields import compose, gaussian_smooth, warp
from monai_lm.levenberg import initial_trust_of
from monai_lm.pyramid import make_level
from monai_lm.similarity import LNCC, MSE, NCC, Combined
from monai_lm.streaming import tiles, windows

SIZE = (90, 9, 10)
SPACING = (1.0, 1.0, 2.0)
MEASURES = pytest.mark.parametrize(
    "measure",
    [LNCC(radius=1), MSE(), Combined([LNCC(radius=2), "mse"], [1, 1], [1, 30])],
    ids=["lncc", "mse", "combined"],
)


@pytest.fixture
def build(random_tensor):
    """``build(Engine, measure)`` on two smooth images, from a prediction and a residual that are not zero."""

    def make(kind, measure, control=False, window=1):
        channels = sum(getattr(measure, "channels", [1]))
        fixed, moving = (gaussian_smooth(random_tensor((2, channels, *SIZE), s).float(), 1.0) + 3 for s in (0, 1))
        prediction, residual = (8 * gaussian_smooth(random_tensor((2, 3, *SIZE), s).float(), 3.0) for s in (2, 3))
        level = make_level(SIZE, SPACING, 1)
        if kind is HalfEngine:  # and room for the best one
            residual = torch.stack([residual, torch.zeros_like(residual)]).half()
        return kind(level, fixed, moving, prediction, residual, measure, 1.0, 0.5, 0.5, window, control, False)

    return make


@pytest.fixture
def small_windows(monkeypatch):
    """Windows as small as their halos allow."""
    monkeypatch.setitem(streaming._BYTES, "cpu", 1)
    monkeypatch.setattr(engine_module, "tiles", lambda volume, halo, _: tiles(volume, halo, 0.0, least=1))


def run(engine, steps=3):
    """Losses, expected decreases and the residual of a few steps."""
    out = []
    for _ in range(steps):
        loss = engine.evaluate()
        trust = initial_trust_of(engine.gradients, loss, 1.0)
        better = torch.tensor([True, False])
        out += [loss, trust.damping, engine.advance(trust, better, keep=True)]
    return [*out, engine.residual, engine.best, engine.kept]


@MEASURES
@pytest.mark.parametrize("window", [1, 3])
def test_lean_and_full_agree_and_windows_do_not_matter(measure, window, build, monkeypatch):
    whole = run(build(Engine, measure, control=True, window=window))
    assert whole[2].isfinite().all()
    monkeypatch.setitem(streaming._BYTES, "cpu", 1)  # windows as small as the halos allow
    monkeypatch.setattr(engine_module, "tiles", lambda volume, halo, _: tiles(volume, halo, 0.0, least=1))
    for kind in (Engine, LeanEngine):
        engine = build(kind, measure, control=True, window=window)
        assert len(windows(engine.residual, 3, 6)) > 1 < len(tiles(engine.residual, 6, 0.0, least=1))
        for got, expected in zip(run(engine), whole, strict=True):
            tolerance = 1e-5 if got.dtype == torch.float32 else 4e-3  # the best of the lean engine is rounded
            assert (got - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.usefixtures("small_windows")
def test_a_step_is_that_of_the_levenberg_functions(build):
    engine = build(Engine, MSE())
    start, prediction = engine.residual.clone(), engine.prediction
    (_, factor), _ = MSE().ranges(engine.fixed, engine.moving)
    warped = warp(engine.moving, compose(prediction, start)) * factor
    loss, derivative = MSE().evaluate(warped, (engine.fixed * factor,))
    smooth = gaussian_smooth(levenberg.eulerian_gradient(derivative, warped), engine.sigma)
    trust = levenberg.initial_trust(smooth * engine.unit, loss, 1.0)
    v = levenberg.direction(smooth * engine.unit, trust, 0.5) * engine.unit
    torch.testing.assert_close(engine.evaluate(), loss)
    assert bool(engine.advance(trust, None, keep=False).isnan().all())
    torch.testing.assert_close(engine.residual, levenberg.advance(start, v, trust, engine.elastic), atol=1e-5, rtol=0)
    assert engine.unit.flatten().tolist() == pytest.approx([1, 1, 0.5], rel=0.2)


def test_measures_of_the_whole_image_are_for_the_full_engine(build):
    assert build(Engine, NCC()).evaluate().shape == (2,)
    with pytest.raises(ValueError, match=r"memory must be 'full' .* got 'low' or 'half' for NCC"):
        build(LeanEngine, NCC())


@pytest.mark.parametrize("kind", [Engine, LeanEngine, HalfEngine])
def test_best_and_kept_residuals_come_back(kind, build):
    engine = build(kind, MSE())
    start = engine.residual.clone()
    loss = engine.evaluate()
    trust = initial_trust_of(engine.gradients, loss, 1.0)
    engine.advance(trust, torch.tensor([True, True]), keep=True)
    moved = engine.residual.clone()
    assert (moved - start).abs().amax((1, 2, 3, 4)).min() > 0.1
    engine.retract(torch.tensor([True, False]))
    assert torch.equal(engine.residual, torch.stack([moved[0], start[1]]))
    engine.settle(torch.tensor([False, True]))
    torch.testing.assert_close(engine.residual, start, atol=4e-3, rtol=0)


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("kind", [Engine, LeanEngine, HalfEngine])
def test_displacement_composes_for_the_better_pairs_only(kind, build, monkeypatch):
    monkeypatch.setattr(engine_module, "_AT_A_TIME", 1000)  # of the values that are converted
    engine = build(kind, MSE())
    residual, prediction = engine.residual.float().clone(), engine.prediction
    ddf = engine.displacement(torch.tensor([True, False]))
    assert ddf.dtype == torch.float32
    torch.testing.assert_close(ddf[0], compose(prediction, residual)[0])
    assert torch.equal(ddf[1], prediction[1])
    assert ddf is engine.residual  # in whose place it is
