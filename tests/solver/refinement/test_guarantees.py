"""What a refinement keeps: the prediction, no folds, the loss, also where images or losses are of no use."""

import math
import re
import warnings

import pytest
import torch
from torch import Tensor, nn

from monai_lm.fields import fold_count, repair
from monai_lm.solver.acceptance import ACCEPTANCES
from tests.solver.pairs import CONTROLS, FLAT, SHAPES, Flat, Local, error, noise, pair, run


@pytest.mark.parametrize("scales", ["auto", (1,), (2,), (4, 2, 1)])
@pytest.mark.parametrize("shape", SHAPES)
def test_without_iterations_the_prediction_comes_back_exactly(shape, scales):
    fixed, moving, truth = pair(shape)
    result = run(fixed, moving, truth, scales=scales, iterations=0)
    assert torch.equal(result.ddf, truth)
    assert torch.equal(result.final_loss, result.initial_loss)
    assert result.predicted_folds.tolist() == [0]
    assert result.repair_shift.tolist() == [0]


@pytest.mark.parametrize("acceptance", ACCEPTANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_without_a_gradient_the_prediction_does_not_erode(shape, acceptance):
    fixed, moving, truth = pair(shape)
    result = run(fixed, moving, truth, similarity=Flat(), acceptance=acceptance, iterations=30, tolerance=0)
    assert torch.equal(result.ddf, truth)


def test_the_prediction_does_not_erode_far_from_the_gradient():
    """Elastic smoothing acts on the residual only; the corner of ``Local`` reaches 3 iterations × a few voxels."""
    fixed, moving, truth = pair((40, 40), amplitude=3.0)
    result = run(fixed, moving, 0.8 * truth, similarity=Local(), scales=(1,), iterations=3, tolerance=0, step=0.2)
    assert error(result.ddf[..., :4, :4], 0.8 * truth[..., :4, :4]) > 0.01
    assert torch.equal(result.ddf[..., 24:, 24:], 0.8 * truth[..., 24:, 24:])


@pytest.mark.parametrize("similarity", ["lncc", "mi", "mind", "mse", "ncc", nn.MSELoss()])
def test_identical_images_stay_at_the_identity(similarity):
    _, moving, _ = pair(FLAT)
    result = run(moving, moving.clone(), similarity=similarity)
    assert torch.count_nonzero(result.ddf) == 0


@pytest.mark.parametrize("acceptance", ACCEPTANCES)
@pytest.mark.parametrize("amplitude", [0.3, 3.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_fold_comes_out(shape, amplitude, acceptance):
    """Whatever the prediction, and however rough the steps."""
    fixed, moving = noise(2, 1, *shape, seed=5), noise(2, 1, *shape, seed=6)
    prediction = amplitude * noise(2, len(shape), *shape, seed=7)
    folds = fold_count(prediction)
    result = run(
        fixed, moving, prediction, acceptance=acceptance, iterations=12, step=2.0, smooth_gradient=0.0,
        smooth_residual=0.0, tolerance=0,
    )  # fmt: skip
    assert torch.equal(result.predicted_folds, folds)
    assert bool((folds > 0).all())
    assert result.prediction_used.tolist() == [amplitude < 1] * 2  # what folds in most cells is not
    assert torch.equal(result.repair_shift > 0, result.prediction_used)
    assert fold_count(result.ddf).tolist() == [0, 0]
    assert bool((result.final_loss <= result.initial_loss).all())


@pytest.mark.parametrize("shape", SHAPES)
def test_a_folded_prediction_is_repaired_and_the_shift_told(shape):
    fixed, moving, truth = pair(shape)
    prediction = truth.clone()
    prediction[(0, 0, *[8] * len(shape))] += 3.0  # one voxel out of place
    result = run(fixed, moving, prediction, iterations=0)
    mended = repair(prediction)
    assert torch.equal(result.ddf, mended)
    assert int(fold_count(mended)) == 0
    assert int(result.predicted_folds) == int(fold_count(prediction)) > 0
    assert float(result.repair_shift) == pytest.approx(error(mended, prediction))
    assert float(result.repair_shift) < 0.05  # the repair is local
    assert torch.equal(result.ddf[..., -3:], prediction[..., -3:])


@pytest.mark.parametrize("acceptance", ACCEPTANCES)
@pytest.mark.parametrize("control", CONTROLS)
def test_the_dissimilarity_never_rises(control, acceptance):
    """Also where every step is far too long."""
    fixed, moving, truth = pair(FLAT, batch=2)
    prediction = torch.cat([truth[:1], torch.zeros_like(truth[1:])])
    for step in (0.5, 8.0):
        result = run(fixed, moving, prediction, control=control, acceptance=acceptance, step=step, iterations=7)
        assert bool((result.final_loss <= result.initial_loss).all())


@pytest.mark.parametrize("similarity", ["lncc", "mi", "mind", "mse", "ncc", nn.MSELoss()])
@pytest.mark.parametrize("name", ["fixed", "moving"])
@pytest.mark.parametrize("value", [0.0, 7.5])
def test_a_constant_image_warns_and_leaves_the_field(name, value, similarity):
    fixed, moving, truth = pair(FLAT, batch=2)
    images = {"fixed": fixed, "moving": moving}
    images[name] = images[name].clone()
    images[name][0] = value
    on = " on the grid of fixed" if name == "moving" else ""
    with pytest.warns(UserWarning, match=rf"{name} is constant{on} in pairs \[0\]; their field is returned unchanged"):
        result = run(**images, ddf=0.5 * truth, similarity=similarity, iterations=20)
    assert torch.equal(result.ddf[0], 0.5 * truth[0])
    assert bool(torch.isfinite(result.ddf).all())
    assert bool(torch.isfinite(result.final_loss).all())
    assert float(result.final_loss[0]) == float(result.initial_loss[0])
    assert result.history[0] == []  # not an iteration
    alone = run(fixed[1:], moving[1:], 0.5 * truth[1:], similarity=similarity, iterations=20)
    torch.testing.assert_close(result.ddf[1:], alone.ddf, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("kind", "offset"), [(torch.float32, 1e6), (torch.float32, -1e7), (torch.bfloat16, 20.0)])
@pytest.mark.parametrize("name", ["fixed", "moving"])
def test_an_image_too_far_from_zero_for_its_type_is_named(name, kind, offset):
    fixed, moving, _ = pair(FLAT, batch=2)
    images = {"fixed": fixed / fixed.max(), "moving": moving / moving.max()}
    images[name][1] += offset
    images[name] = images[name].to(kind)
    with pytest.warns(UserWarning, match=rf"{name} has fewer than 64 values in pairs \[1\], as {kind} tells") as told:
        run(**images, iterations=1)
    assert len(told) == 1
    found = float(re.search("subtract the offset, (.*), before", str(told[0].message))[1])
    assert found == pytest.approx(float(images[name][1].min()), rel=1e-8)
    mask = torch.ones_like(fixed)
    images[name][1, :, :4], mask[:, :, :4] = 0, 0  # the offset is told where the image counts
    with pytest.warns(
        UserWarning, match=rf"{name} has fewer than 64 values where masks and lesions leave it in pairs \[1\]"
    ):
        run(**images, **{"mask" if name == "fixed" else "moving_mask": mask}, iterations=1)


@pytest.mark.parametrize(
    "kind", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int32]
)
def test_ordinary_images_do_not_warn(kind):
    images = [(200 * (x - x.min()) / (x.max() - x.min())).to(kind) for x in pair(FLAT)[:2]]
    if kind in (torch.float64, torch.int32):  # have the digits for it
        images = [image + 10**8 for image in images]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(*images, iterations=2)
        run(*images, iterations=2, memory="half")


class Broken(nn.Module):
    """Squared error that is ``bad`` from call ``first`` to call ``last``."""

    def __init__(self, bad: float, first: int = 0, last: int = 10**9, gradient_only: bool = False) -> None:
        super().__init__()
        self.bad, self.first, self.last, self.calls = bad, first, last, 0
        self.gradient_only = gradient_only

    def forward(self, warped: Tensor, fixed: Tensor) -> Tensor:
        loss = (warped - fixed).square().mean()
        if self.first <= self.calls <= self.last:
            worse = loss * self.bad
            loss = loss.detach() + worse - worse.detach().nan_to_num(0, 0, 0) if self.gradient_only else worse
            if self.gradient_only:
                loss = loss.nan_to_num(1.0)
        self.calls += 1
        return loss


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("acceptance", ACCEPTANCES)
def test_a_loss_that_is_never_finite_leaves_the_prediction(bad, acceptance):
    fixed, moving, truth = pair(FLAT)
    with pytest.warns(UserWarning, match=r"similarity is not finite at the prediction of pairs \[0\]"):
        result = run(fixed, moving, 0.5 * truth, similarity=Broken(bad), acceptance=acceptance, iterations=12)
    assert torch.equal(result.ddf, 0.5 * truth)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("acceptance", ACCEPTANCES)
def test_a_run_recovers_from_losses_that_are_not_finite(bad, acceptance):
    fixed, moving, truth = pair(FLAT)
    settings = {"acceptance": acceptance, "iterations": 25, "scales": (1,)}
    result = run(fixed, moving, 0.5 * truth, similarity=Broken(bad, 3, 5), **settings)
    assert error(result.ddf, truth) < 0.8 * error(0.5 * truth, truth)
    assert bool(torch.isfinite(result.ddf).all())


def test_a_run_recovers_from_a_start_whose_loss_is_not_finite():
    fixed, moving, truth = pair(FLAT)
    for acceptance in ACCEPTANCES:
        settings = {"acceptance": acceptance, "iterations": 25, "scales": (1,), "tolerance": 0}
        result = run(fixed, moving, 0.5 * truth, similarity=Broken(math.nan, 0, 0), **settings)
        assert bool(torch.isfinite(result.ddf).all())
        assert bool(torch.isfinite(result.final_loss).all())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_that_are_not_finite_do_not_reach_the_field(bad):
    fixed, moving, truth = pair(FLAT)
    result = run(fixed, moving, 0.5 * truth, similarity=Broken(bad, 2, 6, gradient_only=True), iterations=12)
    assert bool(torch.isfinite(result.ddf).all())
    assert bool(torch.isfinite(result.final_loss).all())
