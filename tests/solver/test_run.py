"""One level: its start, its field, its step, and what its loop returns."""

from itertools import pairwise

import pytest
import torch
from tqdm import tqdm

from monai_lm.fields import fold_count, gaussian_smooth, warp
from monai_lm.kernels.devices import Stopwatch
from monai_lm.similarity import MSE
from monai_lm.solver import engine as engine_module
from monai_lm.solver.levenberg import initial_trust
from monai_lm.solver.pyramid import make_level
from monai_lm.solver.result import Record
from monai_lm.solver.run import LevelRun, Settings

SIZE = (26, 24)


def noise(seed, channels, sigma, size=SIZE):
    generator = torch.Generator().manual_seed(seed)
    smooth = gaussian_smooth(torch.randn(1, channels, *size, generator=generator), sigma)
    return smooth / smooth.std()


def settings(**changes):
    values = {
        "similarity": MSE(), "step": 0.5, "control": "simple", "acceptance": "always", "window": 1,
        "smooth_residual": 0.5, "tolerance": 0.0, "seed": 0, "memory": "full",
        "deadline": float("inf"),
    }  # fmt: skip
    return Settings(**{**values, **changes})


def make_run(prediction=None, scale=1, residual=None, before=1, **changes):
    moving, truth = noise(0, 1, 2.0), noise(1, 2, 5.0)
    fixed = warp(moving, truth)
    finest = make_level(SIZE, (1, 1), 1)
    given_up = [] if residual is None else [(make_level(SIZE, (1, 1), before), residual)]
    level = make_level(SIZE, (1, 1), scale)
    run = LevelRun(level, fixed, moving, prediction, given_up, finest, settings(**changes), 1.0)
    assert not given_up
    return run


def iterate(run, count):
    """The residual that a level ends with, its loss, and the history of the only pair."""
    record = Record(1, Stopwatch(torch.device("cpu"), 0.0))
    with torch.no_grad():
        loss = run.iterate(1.0, count, record, tqdm(disable=True))
    return run.engine.residual, loss, record.history()[0]


def test_the_residual_of_the_level_before_comes_to_the_grid_in_its_units():
    residual = torch.full((1, 2, *SIZE), 2.0)
    run = make_run(scale=2, residual=residual)
    assert run.engine.residual.shape[2:] == run.level.size
    assert run.engine.residual.amax((0, 2, 3)).tolist() == pytest.approx([1.0, 1.0])
    assert make_run(residual=residual).engine.residual is residual


def test_a_residual_that_folds_on_the_new_grid_is_unfolded():
    run = make_run(residual=4 * noise(4, 2, 0.7, (14, 12)), before=2)
    assert int(fold_count(run.engine.residual)) == 0


@pytest.mark.parametrize("acceptance", ["always", "descent", "metropolis"])
@pytest.mark.parametrize("control", ["simple", "trust_region"])
def test_the_best_iterate_comes_back_with_its_loss(acceptance, control, monkeypatch):
    monkeypatch.setattr(engine_module, "repair_in_place", lambda *_: False)
    run = make_run(acceptance=acceptance, control=control, step=3.0)  # so long that the loss also rises
    best, loss, history = iterate(run, 15)
    losses = [row.loss for row in history]
    assert any(b > a for a, b in pairwise(losses))
    assert float(loss) / (SIZE[0] * SIZE[1]) == pytest.approx(min(losses), rel=1e-6)
    assert float(run.engine.loss(best)) == pytest.approx(float(loss), rel=1e-6)


def test_a_best_iterate_that_folds_is_repaired_and_measured_anew():
    run = make_run(step=3.0)
    best, loss, history = iterate(run, 15)
    assert int(fold_count(best)) == 0
    assert float(run.engine.loss(best)) == pytest.approx(float(loss), rel=1e-6)
    assert float(loss) < history[0].loss * SIZE[0] * SIZE[1]


def test_long_levels_are_repaired_on_the_way(monkeypatch):
    rounds = []
    original = engine_module.repair_in_place
    monkeypatch.setattr(engine_module, "repair_in_place", lambda *args: rounds.append(1) or original(*args))
    iterate(make_run(), 49)
    assert len(rounds) == 1  # at its end
    rounds.clear()
    iterate(make_run(), 101)
    assert len(rounds) == 3  # at 50, at 100, at its end


def test_half_precision_is_for_large_levels_only():
    kinds = [make_run(scale=scale, memory="half").engine.residual.dtype for scale in (2.5, 1)]
    assert kinds == [torch.float32, torch.float16]


def test_frozen_pairs_stay_where_they_are():
    run = make_run(tolerance=0.5)  # so high that the level is left early
    _, _, history = iterate(run, 100)
    assert len(history) < 60
    trust = initial_trust(run.engine.gradient, torch.ones(1), 0.0)
    before = run.engine.residual.clone()
    run.engine.evaluate()
    run.engine.advance(trust, None, keep=False)
    assert torch.equal(run.engine.residual, before)
