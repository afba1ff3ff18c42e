"""Levels, stopping, spacing, and what the history tells."""

import math
import time

import pytest
import torch

from monai_lm.fields import fold_count
from monai_lm.similarity import MSE
from monai_lm.solver.pyramid import make_level
from monai_lm.solver.schedule import automatic_scales
from tests.solver.pairs import CONTROLS, FLAT, SHAPES, error, noise, pair, run


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_history_tells_every_iteration(shape, control):
    fixed, moving, _ = pair(shape, batch=2)
    scales, counts, deltas = (4, 2, 1), (3, 0, 5), (0.1, 0.2, 0.7)
    result = run(fixed, moving, scales=scales, iterations=counts, damping=deltas, tolerance=0, control=control)
    assert len(result.history) == 2
    for history in result.history:
        assert [row.level for row in history] == [s for s, k in zip(scales, counts, strict=True) for _ in range(k + 1)]
        seconds = [row.seconds for row in history]
        assert seconds == sorted(seconds)
        assert 0 < seconds[0] <= seconds[-1] <= result.seconds
        assert all(row.accepted for row in history)  # acceptance="always"
        for scale, delta in zip(scales, deltas, strict=True):
            rows = [row for row in history if row.level == scale]
            assert rows[0].damping == pytest.approx(delta)
            assert math.isnan(rows[0].gain_ratio)
            assert all(math.isnan(row.gain_ratio) == (control == "simple") for row in rows[1:])
            for before, row, after in zip(rows, rows[1:], rows[2:], strict=False):
                factor = {"simple": 0.975 if row.loss <= before.loss else 1.5}.get(control) or (
                    1 / 1.5 if row.gain_ratio > 0.5 else 1 if row.gain_ratio >= 0.1 else 1.5
                )
                assert after.damping == pytest.approx(row.damping * factor, rel=1e-4)


def test_whoever_asks_is_told_the_history_while_it_is_made():
    """Every ten iterations and at the end of a level; what is told is what the result has."""
    fixed, moving, _ = pair(FLAT, batch=2)
    told, settings = [], {"scales": (2, 1), "iterations": (25, 3), "tolerance": 0}
    result = run(fixed, moving, callback=lambda *what: told.append((*what, time.perf_counter())), **settings)
    for k, history in enumerate(result.history):
        mine = [(number, row) for number, row in ((n, r) for p, n, r, _ in told if p == k)]
        assert [number for number, _ in mine] == list(range(len(history)))
        assert all(ours is row for (_, ours), row in zip(mine, history, strict=True))
    moments = [moment for pair_number, _, _, moment in told if pair_number == 0]
    gaps = sorted(range(1, len(moments)), key=lambda n: moments[n - 1] - moments[n])[:3]
    assert sorted(gaps) == [11, 21, 26]  # before the 11th, the 21st, and the next level
    assert torch.equal(result.ddf, run(fixed, moving, **settings).ddf)


def test_who_is_told_may_end_the_refinement():
    fixed, moving, _ = pair(FLAT)

    def enough(_, number, __):
        if number == 12:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        run(fixed, moving, callback=enough, scales=(1,), iterations=20, tolerance=0)
    with pytest.raises(TypeError, match="callback must be None or a function, got str"):
        run(fixed, moving, callback="print")


def test_the_history_tells_what_descent_rejected():
    fixed, moving, _ = pair(FLAT)
    result = run(fixed, moving, acceptance="descent", step=4.0, scales=(1,), iterations=20, tolerance=0)
    best, rejected = result.history[0][0].loss, 0
    for row in result.history[0][1:]:
        assert row.accepted == (row.loss <= best)
        best, rejected = min(best, row.loss), rejected + (not row.accepted)
    assert rejected > 0
    assert float(result.final_loss) == pytest.approx(best, rel=1e-6)


def test_the_first_and_last_losses_are_in_the_history():
    fixed, moving, truth = pair(FLAT)
    result = run(fixed, moving, 0.5 * truth, scales=(1,), iterations=9, tolerance=0)
    losses = [row.loss for row in result.history[0]]
    assert losses[0] == pytest.approx(float(result.initial_loss), rel=1e-5)
    assert min(losses) == pytest.approx(float(result.final_loss), rel=1e-5)


def test_the_time_budget_ends_the_run():
    fixed, moving, _ = pair(FLAT)
    for seconds in (1e-6, 0.05):
        result = run(fixed, moving, seconds=seconds, scales=(4, 2, 1), iterations=100000, tolerance=0)
        assert result.seconds < seconds + 2
        assert float(result.final_loss) <= float(result.initial_loss)
        assert int(fold_count(result.ddf)) == 0
        levels = [row.level for row in result.history[0]]
        assert [levels.count(scale) <= 2 for scale in (2, 1)] == [True, True]  # the rest is not begun
    assert 2 < levels.count(4) < 10000
    whole = run(fixed, moving, seconds=1e6, scales=(4, 2, 1), iterations=5, tolerance=0)
    assert torch.equal(whole.ddf, run(fixed, moving, scales=(4, 2, 1), iterations=5, tolerance=0).ddf)


def test_the_tolerance_stops_a_pair_that_stalls():
    fixed, moving, truth = pair(FLAT)
    counts = []
    for tolerance in (0, 0.005, 0.6):
        result = run(fixed, moving, 0.7 * truth, scales=(1,), iterations=200, tolerance=tolerance)
        counts.append(len(result.history[0]) - 1)
        assert error(result.ddf, truth) < 0.8 * error(0.7 * truth, truth)
    assert counts[0] == 200
    assert 200 > counts[1] > counts[2] >= 10


def test_a_pair_that_stalls_does_not_stop_the_others():
    fixed, moving, truth = pair(FLAT, batch=2)
    start = torch.cat([truth[:1], torch.zeros_like(truth[1:])])
    result = run(fixed, moving, start, scales=(1,), iterations=60)
    lengths = [len(history) for history in result.history]
    assert lengths[0] < lengths[1]
    assert error(result.ddf[1:], truth[1:]) < 0.5 * error(truth[1:], 0)


def test_settings_per_level_are_aligned_at_the_finest():
    fixed, moving, _ = pair(FLAT)
    settings = {"scales": (2, 1), "iterations": (4, 3)}
    result = run(fixed, moving, damping=(0.3, 1.0), smooth_gradient=(2.0, 1.0), **settings).ddf
    default = run(fixed, moving, **settings).ddf
    assert torch.equal(default, result)  # the documented defaults end in 0.3, 1 and 2.0, 1
    assert not torch.equal(run(fixed, moving, damping=(1.0, 0.3), smooth_gradient=(2.0, 1.0), **settings).ddf, result)
    same = run(fixed, moving, damping=0.5, smooth_gradient=1, iterations=4, scales=(2, 1)).ddf
    each = run(fixed, moving, damping=(0.5, 0.5), smooth_gradient=(1, 1), iterations=(4, 4), scales=(2, 1)).ddf
    assert torch.equal(same, each)


@pytest.mark.parametrize("memory", ["full", "half"])
def test_every_level_has_its_measure(memory):
    fixed, moving, truth = pair(FLAT)
    settings = {"scales": (4, 2, 1), "iterations": (4, 3, 2), "memory": memory, "mask": torch.ones_like(fixed)}
    settings["mask"][..., :6, :] = 0
    result = run(fixed, moving, 0.5 * truth, similarity=("mi", "ncc"), **settings)
    of_mi, of_ncc = (run(fixed, moving, 0.5 * truth, similarity=name, **settings) for name in ("mi", "ncc"))
    losses, first = ([row.loss for row in r.history[0]] for r in (result, of_mi))
    if memory == "full":  # half precision shifts images by the finest level's measure
        assert losses[:9] == first[:9]  # two levels, with their starts
    assert result.history[0][9].loss != pytest.approx(of_mi.history[0][9].loss, rel=1e-2)
    assert float(result.initial_loss) == pytest.approx(float(of_ncc.initial_loss), rel=1e-3)
    assert min(losses[9:]) == pytest.approx(float(result.final_loss), rel=1e-4)
    assert float(result.final_loss) < 0.8 * float(result.initial_loss)
    assert torch.equal(run(fixed, moving, 0.5 * truth, similarity=["mi", "mi", "ncc"], **settings).ddf, result.ddf)


def test_a_coarse_measure_that_misleads_is_told_by_the_finest():
    """What is kept is by the finest level's measure, from the prediction on."""
    fixed, moving, truth = pair(FLAT)
    wrong = MSE()
    wrong.ranges = lambda f, _: ((f.new_zeros(1, 1), -f.new_ones(1, 1)), (f.new_zeros(1, 1), f.new_ones(1, 1)))
    misled = run(fixed, moving, truth, similarity=[wrong, "lncc"], scales=(2, 1), iterations=(30, 0))
    assert torch.equal(misled.final_loss, misled.initial_loss)
    torch.testing.assert_close(misled.ddf, truth, rtol=0, atol=1e-5)


def test_automatic_scales_and_iterations():
    fixed, moving, truth = pair((64, 64))
    levels = [row.level for row in run(fixed, moving, tolerance=0, seconds=1e-6).history[0]]
    assert sorted(set(levels), reverse=True) == list(automatic_scales((64, 64), (1, 1), predicted=False)) == [4, 2, 1]
    levels = [row.level for row in run(fixed, moving, truth, tolerance=0).history[0]]
    assert [levels.count(scale) for scale in (2, 1)] == [51, 26]
    assert automatic_scales((128, 128, 128), (1, 1, 1), predicted=False) == (8, 4, 2, 1)
    assert automatic_scales((9, 9), (1, 1), predicted=True)[-1] == 1


def test_levels_shrink_only_the_axes_that_are_fine():
    spacing = (1.0, 1.0, 3.0)
    assert [make_level((32, 30, 10), spacing, s).size for s in (4, 2, 1)] == [(8, 8, 8), (16, 16, 10), (32, 30, 10)]
    assert make_level((32, 30, 10), spacing, 1).unit == pytest.approx((1, 1, 1 / 3))
    assert make_level((32, 30, 10), spacing, 1).in_voxels(1.5) == pytest.approx((1.5, 1.5, 0.5))


def test_spacing_is_relative_and_makes_steps_isotropic_in_space():
    shape = (20, 18, 10)
    fixed, moving, truth = pair(shape, amplitude=1.2)
    result = run(fixed, moving, spacing=(1, 1, 3))
    assert error(result.ddf, truth) < 0.8 * error(truth, 0)
    assert torch.equal(run(fixed, moving, spacing=(2.0, 2.0, 6.0)).ddf, result.ddf)
    assert torch.equal(run(fixed, moving, spacing=[5, 5, 5]).ddf, run(fixed, moving).ddf)
    one = run(fixed, moving, spacing=(1, 1, 3), scales=(1,), iterations=1, smooth_residual=0.0, step=0.4).ddf
    physical = one * torch.tensor([1.0, 1.0, 3.0]).view(1, 3, 1, 1, 1)
    assert 0.3 < float(torch.linalg.vector_norm(physical, dim=1).max()) <= 0.4 * (1 + 1e-5)


@pytest.mark.parametrize("shape", [(2, 2), (2, 9), (3, 2, 5), (9, 8, 2)])
def test_the_smallest_grids(shape):
    fixed, moving = noise(1, 1, *shape, seed=1), noise(1, 1, *shape, seed=2)
    for scales in ("auto", (4, 2, 1)):
        result = run(fixed, moving, scales=scales, iterations=5)
        assert result.ddf.shape == (1, len(shape), *shape)
        assert float(result.final_loss) <= float(result.initial_loss)
        assert int(fold_count(result.ddf)) == 0


def test_the_progress_bar_counts_every_iteration(capsys):
    fixed, moving, _ = pair(FLAT)
    run(fixed, moving, scales=(2, 1), iterations=(4, 3), progress=True)
    assert "7/7" in capsys.readouterr().err
    run(fixed, moving, scales=(2, 1), iterations=(4, 3))
    assert capsys.readouterr().err == ""
