"""One level: its start, its field, its step, and what its loop returns."""

from itertools import pairwise

import pytest
import torch
from tqdm import tqdm

from monai_lm import level as level_module
from monai_lm.fields import compose, fold_count, gaussian_smooth, warp
from monai_lm.level import LevelRun, Settings, pick
from monai_lm.levenberg import initial_trust
from monai_lm.pyramid import make_level
from monai_lm.result import Record
from monai_lm.similarity import MSE

SIZE = (26, 24)


def noise(seed, channels, sigma, size=SIZE):
    generator = torch.Generator().manual_seed(seed)
    smooth = gaussian_smooth(torch.randn(1, channels, *size, generator=generator), sigma)
    return smooth / smooth.std()


def settings(**changes):
    values = {
        "similarity": MSE(), "step": 0.5, "control": "simple", "acceptance": "always", "window": 1,
        "smooth_residual": 0.5, "tolerance": 0.0, "seed": 0, "compile": False, "deadline": float("inf"),
    }  # fmt: skip
    return Settings(**{**values, **changes})


def make_run(prediction=None, scale=1, **changes):
    moving, truth = noise(0, 1, 2.0), noise(1, 2, 5.0)
    fixed = warp(moving, truth)
    return LevelRun(make_level(SIZE, (1, 1), scale), fixed, moving, prediction, settings(**changes), 1.0, 10)


def iterate(run, count, residual=None):
    residual = torch.zeros(1, 2, *run.level.size) if residual is None else residual
    record = Record(1, 0.0)
    with torch.no_grad():
        best, loss = run.iterate(residual, 1.0, count, record, tqdm(disable=True))
    return best, loss, record.history()[0]


def test_field_is_the_prediction_after_the_residual():
    prediction, residual = 0.8 * noise(2, 2, 5.0), 0.5 * noise(3, 2, 5.0)
    run = make_run(prediction)
    assert torch.equal(run.displacement(residual), compose(prediction, residual))
    assert torch.equal(run.displacement(torch.zeros_like(residual)), prediction)
    assert make_run().displacement(residual) is residual


def test_start_brings_the_residual_to_the_grid_in_its_units():
    run = make_run(scale=2)
    residual = torch.full((1, 2, *SIZE), 2.0)
    expected = [2.0 * (new - 1) / (old - 1) for new, old in zip(run.level.size, SIZE, strict=True)]
    started = run.start(residual)
    assert started.shape[2:] == run.level.size
    assert started.amax((0, 2, 3)).tolist() == pytest.approx(expected)
    assert run.start(started) is started


def test_start_unfolds_the_residual():
    rough = 4 * noise(4, 2, 0.7, (13, 12))
    assert int(fold_count(make_run().start(rough))) == 0


def test_step_repairs_only_where_it_shall():
    run, rough = make_run(), 4 * noise(5, 2, 0.7)
    assert int(fold_count(rough)) > 0
    at = run.evaluate(rough, rough)
    trust = initial_trust(at.smooth, at.loss, 1.0)
    assert int(fold_count(run.step(at, trust, mend=True)[0].residual)) == 0
    assert int(fold_count(run.step(at, trust, mend=False)[0].residual)) > 0


@pytest.mark.parametrize("acceptance", ["always", "descent", "metropolis"])
def test_the_best_iterate_comes_back_with_its_loss(acceptance, monkeypatch):
    monkeypatch.setattr(level_module, "repair", lambda residual, *_: residual)
    run = make_run(acceptance=acceptance, step=3.0)  # so long that the loss also rises
    best, loss, history = iterate(run, 15)
    losses = [row.loss for row in history]
    assert any(b > a for a, b in pairwise(losses))
    assert float(loss) / (SIZE[0] * SIZE[1]) == pytest.approx(min(losses), rel=1e-6)
    assert float(run.loss(best)) == pytest.approx(float(loss), rel=1e-6)


def test_a_best_iterate_that_folds_is_repaired_and_measured_anew():
    run = make_run(step=3.0)
    best, loss, history = iterate(run, 15)
    assert int(fold_count(best)) == 0
    assert float(run.loss(best)) == pytest.approx(float(loss), rel=1e-6)
    assert float(loss) < history[0].loss * SIZE[0] * SIZE[1]


def test_long_levels_are_repaired_on_the_way(monkeypatch):
    rounds = []
    original = level_module.repair
    monkeypatch.setattr(level_module, "repair", lambda *args: rounds.append(1) or original(*args))
    iterate(make_run(), 49)
    assert len(rounds) == 1  # at its end
    rounds.clear()
    iterate(make_run(), 101)
    assert len(rounds) == 3  # at 50, at 100, at its end


def test_pick_chooses_pair_by_pair():
    new, old = torch.ones(3, 2, 4, 4), torch.zeros(3, 2, 4, 4)
    assert pick(torch.tensor([True, False, True]), new, old)[:, 0, 0, 0].tolist() == [1, 0, 1]
