"""What a refinement recovers of a known warp."""

import itertools

import pytest
import torch

from monai_lm.fields import fold_count, warp
from monai_lm.similarity import LNCC, MI
from monai_lm.solver.acceptance import ACCEPTANCES
from tests.solver.pairs import CONTROLS, FLAT, SHAPES, error, noise, pair, run, smooth


@pytest.mark.parametrize("similarity", ["lncc", "mse", "ncc"])
@pytest.mark.parametrize("shape", SHAPES)
def test_recovers_a_smooth_warp_from_the_identity(shape, similarity):
    fixed, moving, truth = pair(shape)
    result = run(fixed, moving, similarity=similarity)
    assert error(result.ddf, truth) < 0.45 * error(truth, 0)
    assert float(result.final_loss) < 0.2 * float(result.initial_loss)
    assert result.ddf.shape == truth.shape
    assert result.ddf.dtype == torch.float32
    assert int(fold_count(result.ddf)) == 0
    assert result.predicted_folds.tolist() == [0]
    assert result.repair_shift.tolist() == [0]


@pytest.mark.parametrize("similarity", ["lncc", "mse", "ncc"])
@pytest.mark.parametrize("shape", SHAPES)
def test_improves_an_imperfect_prediction(shape, similarity):
    fixed, moving, truth = pair(shape)
    prediction = truth + smooth(shape, 0.8, sigma=3.0, seed=9)
    result = run(fixed, moving, prediction, similarity=similarity)
    assert error(result.ddf, truth) < 0.9 * error(prediction, truth)
    assert float(result.final_loss) < 0.5 * float(result.initial_loss)


@pytest.mark.parametrize("remap", [lambda x: x, lambda x: 3 - 2 * x])
@pytest.mark.parametrize("shape", SHAPES)
def test_mutual_information_recovers_a_warp_from_an_inverted_image_too(shape, remap):
    fixed, moving, truth = pair(shape)
    result = run(fixed, remap(moving), similarity=MI(32))
    assert error(result.ddf, truth) < 0.6 * error(truth, 0)
    prediction = truth + smooth(shape, 0.8, sigma=3.0, seed=9)
    near = run(fixed, remap(moving), prediction, similarity=MI(32))
    assert error(near.ddf, truth) < 0.9 * error(prediction, truth)


@pytest.mark.parametrize("similarity", ["lncc", "mse"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_true_field_survives_noise(shape, similarity):
    fixed, moving, truth = pair(shape)
    level = 0.02  # of the standard deviation of the image
    result = run(
        fixed + level * noise(*fixed.shape, seed=3), moving + level * noise(*moving.shape, seed=4), truth,
        similarity=similarity,
    )  # fmt: skip
    assert error(result.ddf, truth) <= 0.05


@pytest.mark.parametrize("shape", SHAPES)
def test_heavy_noise_does_not_throw_a_good_start_further_than_none(shape):
    """Noise is fitted, but from the truth no worse than from nothing, and far from undoing it."""
    fixed, moving, truth = pair(shape)
    fixed, moving = fixed + 0.1 * noise(*fixed.shape, seed=3), moving + 0.1 * noise(*moving.shape, seed=4)
    start, none = (run(fixed, moving, ddf) for ddf in (truth, None))
    assert error(start.ddf, truth) < 1.2 * error(none.ddf, truth)
    assert error(start.ddf, truth) < 0.75 * error(truth, 0)


@pytest.mark.parametrize(("control", "acceptance"), list(itertools.product(CONTROLS, ACCEPTANCES)))
@pytest.mark.parametrize("window", [1, 3])
def test_every_setting_recovers_the_warp(control, acceptance, window):
    fixed, moving, truth = pair(FLAT)
    result = run(fixed, moving, control=control, acceptance=acceptance, window=window)
    assert error(result.ddf, truth) < 0.6 * error(truth, 0)
    assert float(result.final_loss) < 0.3 * float(result.initial_loss)


@pytest.mark.parametrize("scales", [(2,), (4, 2), (2.5, 1.5)])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_pyramid_that_ends_early_still_returns_the_full_grid(shape, scales):
    fixed, moving, truth = pair(shape)
    result = run(fixed, moving, scales=scales, iterations=30, smooth_gradient=1.0)  # levels of 4 and 8 voxels
    assert result.ddf.shape == truth.shape
    assert error(result.ddf, truth) < 0.95 * error(truth, 0)
    assert int(fold_count(result.ddf)) == 0
    reference, prepared = LNCC().prepare(fixed, moving)
    loss = LNCC().evaluate(warp(prepared, result.ddf), reference)[0] / fixed[0, 0].numel()
    torch.testing.assert_close(result.final_loss, loss)  # on the grid of the images, not of the last level
    assert {row.level for row in result.history[0]} == set(scales)
