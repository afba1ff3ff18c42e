"""One level: its start, its field, its step, and what its loop returns."""

from itertools import pairwise

import pytest
import torch
from tqdm import tqdm

from monai_lm.fields import fold_count, gaussian_smooth, warp
from monai_lm.kernels.devices import Stopwatch
from monai_lm.similarity import MSE
from monai_lm.solver import residual as residual_module
from monai_lm.solver.method import make_method
from monai_lm.solver.pyramid import make_level
from monai_lm.solver.residual import Residual
from monai_lm.solver.result import Record
from monai_lm.solver.run import Problem, Settings, descend, engine_of
from monai_lm.solver.schedule import Stage
from monai_lm.solver.trust import initial_trust

SIZE = (26, 24)


def noise(seed, channels, sigma, size=SIZE):
    generator = torch.Generator().manual_seed(seed)
    smooth = gaussian_smooth(torch.randn(1, channels, *size, generator=generator), sigma)
    return smooth / smooth.std()


def settings(acceptance="always", control="simple", **changes):
    values = {"step": 0.5, "tolerance": 0.0, "memory": "full", "deadline": float("inf")}
    return Settings(**{**values, **changes}, method=make_method("lm", control, acceptance, 0.5, 1, 0))


def stage(scale, iterations=0):
    return Stage(make_level(SIZE, (1, 1), scale), iterations, 1.0, 1.0, MSE())


def make_run(prediction=None, scale=1, residual=None, before=1, **changes):
    """An engine on a level, and its settings."""
    moving, truth = noise(0, 1, 2.0), noise(1, 2, 5.0)
    given = None
    if residual is not None:
        given = Residual(1, make_level(SIZE, (1, 1), before), residual.device, residual.dtype)
        given.field = residual
    problem, how = Problem(warp(moving, truth), moving, prediction), settings(**changes)
    return engine_of(stage(scale), stage(1), problem, given, how), how


def iterate(run, count, scale=1):
    """The residual that a level ends with, its loss, and the history of the only pair."""
    engine, how = run
    record = Record(1, Stopwatch(torch.device("cpu"), 0.0))
    with torch.no_grad():
        loss = descend(engine, stage(scale, count), how, record, tqdm(disable=True))
    return engine.residual.field, loss, record.history()[0]


def test_the_residual_of_the_level_before_comes_to_the_grid_in_its_units():
    residual = torch.full((1, 2, *SIZE), 2.0)
    moved = make_run(scale=2, residual=residual)[0].residual
    assert moved.field.shape[2:] == moved.level.size == (14, 12)
    assert moved.field.amax((0, 2, 3)).tolist() == pytest.approx([1.0, 1.0])
    assert make_run(residual=residual)[0].residual.field is residual


def test_a_residual_that_folds_on_the_new_grid_is_unfolded():
    run = make_run(residual=4 * noise(4, 2, 0.7, (14, 12)), before=2)
    assert int(fold_count(run[0].residual.field)) == 0


@pytest.mark.parametrize("acceptance", ["always", "descent", "metropolis"])
@pytest.mark.parametrize("control", ["simple", "trust_region"])
def test_the_best_iterate_comes_back_with_its_loss(acceptance, control, monkeypatch):
    monkeypatch.setattr(residual_module, "repair_in_place", lambda *_: False)
    run = make_run(acceptance=acceptance, control=control, step=6.0)  # so long that the loss also rises
    best, loss, history = iterate(run, 15)
    losses = [row.loss for row in history]
    assert any(b > a for a, b in pairwise(losses))
    assert float(loss) / (SIZE[0] * SIZE[1]) == pytest.approx(min(losses), rel=1e-6)
    assert float(run[0].loss(best)) == pytest.approx(float(loss), rel=1e-6)


def test_a_best_iterate_that_folds_is_repaired_and_measured_anew():
    run = make_run(step=3.0)
    best, loss, history = iterate(run, 15)
    assert int(fold_count(best)) == 0
    assert float(run[0].loss(best)) == pytest.approx(float(loss), rel=1e-6)
    assert float(loss) < history[0].loss * SIZE[0] * SIZE[1]


def test_levels_are_repaired_on_the_way(monkeypatch):
    rounds = []
    original = residual_module.repair_in_place
    monkeypatch.setattr(residual_module, "repair_in_place", lambda *args: rounds.append(1) or original(*args))
    iterate(make_run(), 5)
    assert len(rounds) == 1  # at its end
    rounds.clear()
    iterate(make_run(), 11)
    assert len(rounds) == 3  # at 5, at 10, at its end


def test_half_precision_is_for_large_levels_only():
    kinds = [make_run(scale=scale, memory="half")[0].residual.field.dtype for scale in (2.5, 1)]
    assert kinds == [torch.float32, torch.float16]


def test_frozen_pairs_stay_where_they_are():
    run = make_run(tolerance=0.5)  # so high that the level is left early
    _, _, history = iterate(run, 100)
    assert len(history) < 60
    engine, before = run[0], run[0].residual.field.clone()
    engine.evaluate()
    trust = initial_trust(engine.gradient, torch.ones(1), 1.0).stopped(torch.tensor([False]))
    engine.advance(trust, torch.tensor([False]))
    assert torch.equal(engine.residual.field, before)
