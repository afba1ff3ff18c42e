"""refine(): what it recovers, what it keeps, what it refuses."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.losses import LocalNormalizedCrossCorrelationLoss
from torch import Tensor, nn

from monai_lm import refine
from monai_lm.fields import fold_count, gaussian_smooth, repair, warp
from monai_lm.similarity import LNCC, MSE, NCC, Similarity
from monai_lm.similarity.base import normalized
from monai_lm.solver.acceptance import ACCEPTANCES
from monai_lm.solver.pyramid import make_level
from monai_lm.solver.schedule import automatic_scales

SHAPES = [(32, 30), (16, 18, 17)]
FLAT = (32, 30)

CONTROLS = ("simple", "trust_region")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def texture(shape: tuple[int, ...], batch: int = 1, seed: int = 1) -> Tensor:
    image = gaussian_smooth(noise(batch, 1, *shape, seed=seed), 1.5)
    return image / image.std()


def smooth(shape: tuple[int, ...], amplitude: float, batch: int = 1, sigma: float = 4.0, seed: int = 2) -> Tensor:
    ddf = gaussian_smooth(noise(batch, len(shape), *shape, seed=seed), sigma)
    return ddf * (amplitude / ddf.abs().max())


def pair(shape: tuple[int, ...], batch: int = 1, amplitude: float = 1.6) -> tuple[Tensor, Tensor, Tensor]:
    """Fixed and moving image ``(B, 1, *S)`` and the smooth field ``(B, n, *S)`` between them."""
    moving, ddf = texture(shape, batch), smooth(shape, amplitude, batch)
    return warp(moving, ddf), moving, ddf


def error(a: Tensor, b: Tensor | float) -> float:
    """Mean end-point error in voxels."""
    return float(torch.linalg.vector_norm(a - b, dim=1).mean())


def run(fixed: Tensor, moving: Tensor, ddf: Tensor | None = None, mask: Tensor | None = None, **kwargs):
    return refine(fixed, moving, ddf, mask, **kwargs)


class Flat(Similarity):
    """A measure without a derivative."""

    def evaluate(self, warped: Tensor, reference: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        return torch.ones(warped.shape[0]), torch.zeros_like(warped)


class Local(Similarity):
    """Squared error in the corner ``[:4, :4]`` only."""

    def evaluate(self, warped: Tensor, reference: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        difference = torch.zeros_like(warped)
        difference[..., :4, :4] = (warped - reference[0])[..., :4, :4]
        return difference.square().flatten(1).sum(1), 2 * difference


# --- what it recovers -------------------------------------------------------------------------------------------------


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


# --- symmetries -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_flips_commute(shape):
    fixed, moving, truth = pair(shape)
    result = run(fixed, moving, 0.5 * truth).ddf
    assert error(result, 0.5 * truth) > 0.02
    for axis in range(len(shape)):

        def flip(field: Tensor, axis: int = axis) -> Tensor:
            out = field.flip(2 + axis)
            out[:, axis] *= -1
            return out

        flipped = run(fixed.flip(2 + axis), moving.flip(2 + axis), flip(0.5 * truth)).ddf
        assert error(flip(flipped), result) < 0.01


@pytest.mark.parametrize(("shape", "order"), [(FLAT, (1, 0)), ((16, 18, 17), (2, 0, 1)), ((16, 18, 17), (1, 0, 2))])
def test_permutations_of_the_axes_commute(shape, order):
    fixed, moving, truth = pair(shape)
    axes = (0, 1, *[2 + a for a in order])
    result = run(fixed, moving, 0.5 * truth).ddf
    permuted = run(fixed.permute(axes), moving.permute(axes), (0.5 * truth).permute(axes)[:, order]).ddf
    assert error(permuted, result.permute(axes)[:, order]) < 0.01


@pytest.mark.parametrize("similarity", ["lncc", "mse"])
@pytest.mark.parametrize("scales", [(1,), (2, 1)])
@pytest.mark.parametrize(("shape", "padding"), [((40, 42), 8), ((40, 42), 5), ((40, 38, 39), 5)])
def test_zero_padding_changes_nothing_where_the_object_is(shape, padding, scales, similarity):
    axes = torch.meshgrid(*[torch.linspace(-1, 1, s) for s in shape], indexing="ij")
    distance = sum(x.square() for x in axes).sqrt()
    mask = (torch.sigmoid((0.65 - distance) * 20) * (distance < 0.95))[None, None]
    moving = mask * (3 + texture(shape))
    fixed = warp(moving, smooth(shape, 3.0))
    n, settings = len(shape), {"similarity": similarity, "scales": scales, "iterations": 20, "tolerance": 0}
    result = run(fixed, moving, **settings).ddf
    padded = run(F.pad(fixed, [padding] * 2 * n), F.pad(moving, [padding] * 2 * n), **settings).ddf
    padded = padded[(..., *[slice(padding, -padding)] * n)]
    difference = torch.linalg.vector_norm(padded - result, dim=1, keepdim=True)
    assert float(torch.linalg.vector_norm(result, dim=1, keepdim=True)[mask > 0.5].mean()) > 0.1
    assert float(difference[mask > 0.5].mean()) < 0.05


@pytest.mark.parametrize(("control", "acceptance"), list(itertools.product(CONTROLS, ACCEPTANCES)))
def test_a_pair_gets_the_result_it_would_get_alone(control, acceptance):
    fixed, moving, truth = pair(FLAT, batch=3)
    fixed = torch.tensor([1.0, 50.0, 0.01]).view(3, 1, 1, 1) * fixed
    prediction = torch.tensor([0.0, 0.9, 0.5]).view(3, 1, 1, 1) * truth
    settings = {"control": control, "acceptance": acceptance, "step": 1.0}
    together = run(fixed, moving, prediction, **settings)
    for i in range(3):
        one = slice(i, i + 1)
        alone = run(fixed[one], moving[one], prediction[one], **settings)
        torch.testing.assert_close(together.ddf[one], alone.ddf, rtol=0, atol=1e-4)
        torch.testing.assert_close(together.final_loss[one], alone.final_loss, rtol=1e-3, atol=1e-6)
        assert [r[:1] + r[4:5] for r in together.history[i]] == [r[:1] + r[4:5] for r in alone.history[0]]


def test_a_folded_prediction_is_repaired_as_it_would_be_alone():
    """The smoothing that one pair needs is no business of the others."""
    fixed, moving, _ = pair((20, 20), batch=2)
    generator = torch.Generator().manual_seed(10)
    rough = torch.randn(2, 1, 2, 20, 20, generator=generator)
    mild, wild = gaussian_smooth(rough[0], 2.0), rough[1]
    prediction = torch.cat([3 * mild / mild.std(), 4 * wild / wild.std()])
    together = run(fixed, moving, prediction, iterations=0)
    for i in range(2):
        one = slice(i, i + 1)
        alone = run(fixed[one], moving[one], prediction[one], iterations=0)
        torch.testing.assert_close(together.ddf[one], alone.ddf, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("scale", "offset"), [(3.0, 0.0), (1.0, 100.0), (0.01, -5.0), (-2.0, 7.0)])
def test_lncc_does_not_see_gain_and_offset(scale, offset):
    fixed, moving, truth = pair(FLAT)
    result = run(fixed, moving, 0.5 * truth).ddf
    assert error(run(scale * fixed + offset, moving, 0.5 * truth).ddf, result) < 0.01
    assert error(run(fixed, scale * moving + offset, 0.5 * truth).ddf, result) < 0.01


@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1e3, 1e30])
@pytest.mark.parametrize("similarity", ["lncc", "mse", "ncc"])
def test_a_common_intensity_scale_does_not_matter(similarity, factor):
    fixed, moving, truth = pair(FLAT)
    result = run(fixed, moving, 0.5 * truth, similarity=similarity, iterations=15).ddf
    scaled = run(factor * fixed, factor * moving, 0.5 * truth, similarity=similarity, iterations=15).ddf
    assert error(scaled, result) < 0.01


@pytest.mark.parametrize("factor", [1e-30, 1e-15, 1e15, 1e30])
def test_modules_survive_extreme_intensities(factor):
    fixed, moving, truth = pair(FLAT)
    result = run(factor * fixed, factor * moving, 0.5 * truth, similarity=nn.MSELoss(), iterations=5)
    assert bool(torch.isfinite(result.ddf).all())


@pytest.mark.parametrize("acceptance", ACCEPTANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_two_runs_are_bit_equal(shape, acceptance):
    fixed, moving, truth = pair(shape)
    results = [run(fixed, moving, 0.5 * truth, acceptance=acceptance, step=1.0, iterations=12) for _ in range(2)]
    assert torch.equal(results[0].ddf, results[1].ddf)
    assert torch.equal(results[0].final_loss, results[1].final_loss)


def test_the_seed_decides_the_metropolis_run():
    fixed, moving, _ = pair(FLAT)
    settings = {"acceptance": "metropolis", "step": 6.0, "scales": (1,), "iterations": 25, "tolerance": 0}
    paths = [[row.accepted for row in run(fixed, moving, seed=seed, **settings).history[0]] for seed in (0, 0, 1, 2, 3)]
    assert paths[0] == paths[1]
    assert any(path != paths[0] for path in paths[2:])


# --- similarity and context -------------------------------------------------------------------------------------------

MEASURES = {
    "lncc": lambda: "lncc",
    "mse": lambda: "mse",
    "ncc": NCC,
    "MSELoss": nn.MSELoss,
    "MSELoss_sum": lambda: nn.MSELoss(reduction="sum"),
    "monai_lncc": lambda: LocalNormalizedCrossCorrelationLoss(spatial_dims=2, kernel_size=5),
}


@pytest.mark.parametrize("name", MEASURES)
def test_measures_and_modules_work_wherever_they_are_called(name):
    """The same bits under no_grad, inference_mode (inputs made inside it too) and bfloat16 autocast."""
    fixed, moving, truth = pair(FLAT)
    settings = {"similarity": MEASURES[name](), "iterations": 20}
    plain = run(fixed, moving, 0.5 * truth, **settings)
    assert error(plain.ddf, truth) < 0.7 * error(0.5 * truth, truth)
    with torch.no_grad():
        assert torch.equal(run(fixed, moving, 0.5 * truth, **settings).ddf, plain.ddf)
    with torch.inference_mode():
        assert torch.equal(run(fixed, moving, 0.5 * truth, **settings).ddf, plain.ddf)
        inside = run(fixed.clone(), moving.clone(), 0.5 * truth, **settings)
        assert torch.equal(inside.ddf, plain.ddf)
    with torch.autocast("cpu", torch.bfloat16):
        cast = run(fixed, moving, 0.5 * truth, **settings)
        assert cast.ddf.dtype == torch.float32
        assert torch.equal(cast.ddf, plain.ddf)


def test_a_module_gives_what_the_same_measure_gives():
    fixed, moving, truth = pair(FLAT)
    settings = {"iterations": 20, "acceptance": "descent", "control": "trust_region"}
    results = [
        run(fixed, moving, 0.5 * truth, similarity=similarity, **settings).ddf
        for similarity in ("mse", nn.MSELoss(), nn.MSELoss(reduction="none"))
    ]
    assert error(results[0], results[1]) < 0.01
    assert error(results[0], results[2]) < 0.01


def test_the_losses_are_those_of_the_measure():
    """Per voxel, at the finest level, for the field that came in and the one that goes out."""
    fixed, moving, truth = pair(FLAT, batch=2)
    for measure in (LNCC(radius=2), MSE(), NCC()):
        result = run(fixed, moving, 0.5 * truth, similarity=measure, iterations=10)
        reference, (_, moving_range) = measure.prepare(fixed, moving)[0], measure.ranges(fixed, moving)
        for field, reported in ((0.5 * truth, result.initial_loss), (result.ddf, result.final_loss)):
            warped = normalized(warp(moving, field), moving_range)
            loss = measure.evaluate(warped, reference)[0] / fixed[0, 0].numel()
            torch.testing.assert_close(reported, loss, rtol=1e-5, atol=1e-7)
        assert bool((result.final_loss < result.initial_loss).all())


# --- inputs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "convert",
    [
        torch.Tensor.half,
        torch.Tensor.bfloat16,
        torch.Tensor.double,
        lambda x: (60 * x).to(torch.int16),
        lambda x: (30 * x + 128).clamp(0, 255).to(torch.uint8),
        lambda x: x > 0,
    ],
    ids=["half", "bfloat16", "double", "int16", "uint8", "bool"],
)
def test_other_dtypes_equal_their_float32_values(convert):
    fixed, moving, truth = pair(FLAT)
    fixed, moving = convert(fixed), convert(moving)
    result = run(fixed, moving, (0.5 * truth).double(), iterations=10)
    assert torch.equal(result.ddf, run(fixed.float(), moving.float(), 0.5 * truth, iterations=10).ddf)
    assert result.ddf.dtype == torch.float32
    assert error(result.ddf, 0.5 * truth) > 0.01


def test_meta_tensors_are_plain_inside_and_out():
    fixed, moving, truth = pair(FLAT)
    result = run(MetaTensor(fixed), MetaTensor(moving), MetaTensor(0.5 * truth), iterations=10)
    assert type(result.ddf) is torch.Tensor
    assert torch.equal(result.ddf, run(fixed, moving, 0.5 * truth, iterations=10).ddf)


@pytest.mark.parametrize("iterations", [0, 5])
def test_the_callers_tensors_stay_as_they_are(iterations):
    fixed, moving, truth = pair(FLAT)
    inputs = [t.clone().requires_grad_() for t in (fixed, moving, 0.5 * truth)]
    result = run(*inputs, iterations=iterations, similarity=nn.MSELoss())
    for tensor, original in zip(inputs, (fixed, moving, 0.5 * truth), strict=True):
        assert torch.equal(tensor, original)
        assert tensor.requires_grad
        assert tensor.grad is None
    assert not result.ddf.requires_grad
    result.ddf.add_(1)  # the result is the caller's own, no view of the prediction
    assert torch.equal(inputs[2], 0.5 * truth)


def test_noncontiguous_and_expanded_inputs():
    fixed, moving, truth = pair(FLAT)
    result = run(fixed, moving, 0.5 * truth, iterations=5).ddf
    strided = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (fixed, moving, 0.5 * truth)]
    torch.testing.assert_close(run(*strided, iterations=5).ddf, result)
    expanded = [t.expand(2, -1, -1, -1) for t in (fixed, moving, 0.5 * truth)]
    torch.testing.assert_close(run(*expanded, iterations=5).ddf, result.expand(2, -1, -1, -1))


@pytest.mark.parametrize("channels", [2, 3])
def test_channels_are_averaged(channels):
    """Copies of one channel change nothing."""
    fixed, moving, truth = pair(FLAT)
    for similarity in ("lncc", "mse", "ncc"):
        settings = {"similarity": similarity, "iterations": 5}
        one = run(fixed, moving, 0.5 * truth, **settings)
        many = run(fixed.repeat(1, channels, 1, 1), moving.repeat(1, channels, 1, 1), 0.5 * truth, **settings)
        assert error(many.ddf, one.ddf) < 1e-3
        torch.testing.assert_close(many.final_loss, one.final_loss, rtol=1e-3, atol=1e-6)


# --- what it keeps ----------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("similarity", ["lncc", "mse", "ncc", nn.MSELoss()])
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


# --- constant images, NaN ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("similarity", ["lncc", "mse", "ncc", nn.MSELoss()])
@pytest.mark.parametrize("name", ["fixed", "moving"])
@pytest.mark.parametrize("value", [0.0, 7.5])
def test_a_constant_image_warns_and_leaves_the_field(name, value, similarity):
    fixed, moving, truth = pair(FLAT, batch=2)
    images = {"fixed": fixed, "moving": moving}
    images[name] = images[name].clone()
    images[name][0] = value
    with pytest.warns(UserWarning, match=rf"{name} is constant in pairs \[0\]; their field is returned unchanged"):
        result = run(**images, ddf=0.5 * truth, similarity=similarity, iterations=20)
    assert torch.equal(result.ddf[0], 0.5 * truth[0])
    assert bool(torch.isfinite(result.ddf).all())
    assert bool(torch.isfinite(result.final_loss).all())
    assert float(result.final_loss[0]) == float(result.initial_loss[0])
    alone = run(fixed[1:], moving[1:], 0.5 * truth[1:], similarity=similarity, iterations=20)
    torch.testing.assert_close(result.ddf[1:], alone.ddf, rtol=0, atol=1e-4)


def test_ordinary_images_do_not_warn():
    fixed, moving, _ = pair(FLAT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(fixed, moving, iterations=2)


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


# --- levels, stopping, history ----------------------------------------------------------------------------------------


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
    longer = run(fixed, moving, damping=(9, 9, 0.3, 1.0), smooth_gradient=[5, 2.0, 1.0], **settings).ddf
    assert torch.equal(longer, result)
    default = run(fixed, moving, **settings).ddf
    assert torch.equal(default, result)  # the documented defaults end in 0.3, 1 and 2.0, 1
    assert not torch.equal(run(fixed, moving, damping=(1.0, 0.3), smooth_gradient=(2.0, 1.0), **settings).ddf, result)
    same = run(fixed, moving, damping=0.5, smooth_gradient=1, iterations=4, scales=(2, 1)).ddf
    each = run(fixed, moving, damping=(0.5, 0.5), smooth_gradient=(1, 1), iterations=(4, 4), scales=(2, 1)).ddf
    assert torch.equal(same, each)


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


# --- kernels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["full", "half"])
def test_plain_pytorch_gives_the_same_field(memory):
    fixed, moving, truth = pair((20, 18, 17))
    settings = {"scales": (1,), "iterations": 15, "tolerance": 0, "memory": memory}
    native, plain = (run(fixed, moving, 0.5 * truth, kernels=k, **settings) for k in ("auto", "reference"))
    torch.testing.assert_close(native.ddf, plain.ddf, rtol=0, atol=1e-3 if memory == "full" else 0.03)
    assert error(native.ddf, 0.5 * truth) > 0.01
    assert torch.equal(run(fixed, moving, 0.5 * truth, kernels="native", **settings).ddf, native.ddf)
    with torch.inference_mode():
        inside = run(fixed.clone(), moving.clone(), 0.5 * truth, **settings)
    assert torch.equal(inside.ddf, native.ddf)


@pytest.mark.parametrize("similarity", ["lncc", "mse", "ncc"])
def test_the_number_of_threads_changes_no_bit(similarity):
    fixed, moving, truth = pair((36, 40, 38))
    noisy = 0.5 * truth + 0.8 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))  # to be repaired
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            result = run(fixed, moving, noisy, iterations=6, similarity=similarity)
            results.append((result.ddf, result.final_loss))
    finally:
        torch.set_num_threads(threads)
    for ddf, loss in results[1:]:
        assert torch.equal(ddf, results[0][0])
        assert torch.equal(loss, results[0][1])


def test_native_kernels_that_are_not_there_are_an_error(monkeypatch):
    fixed, moving, _ = pair(FLAT)
    monkeypatch.setattr("monai_lm.kernels.missing", lambda _: "there is no C compiler")
    with pytest.raises(ValueError, match="kernels must not be 'native' on cpu: there is no C compiler"):
        refine(fixed, moving, kernels="native")


# --- errors -----------------------------------------------------------------------------------------------------------


def image(*shape: int) -> Tensor:
    return noise(*(shape or (1, 1, 12, 12)))


def with_value(tensor: Tensor, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[3] = value
    return tensor


BAD_TENSORS = {
    "fixed rank 3": ({"fixed": image(1, 12, 12)}, ValueError, r"fixed must be \(B, C, H, W\) or .*shape \(1, 12, 12\)"),
    "moving rank 6": ({"moving": image(1, 1, 2, 2, 2, 2)}, ValueError, r"moving must be \(B, C, H, W\) or .*2, 2, 2\)"),
    "ranks differ": ({"moving": image(1, 1, 12, 12, 12)}, ValueError, "fixed and moving must have the same batch size"),
    "grids differ": (
        {"moving": image(1, 1, 12, 13)},
        ValueError,
        r"same batch size and grid, got shapes \(1, 1, 12, 12\) and \(1, 1, 12, 13\); resample one",
    ),
    "batches differ": ({"moving": image(2, 1, 12, 12)}, ValueError, r"same batch size and grid, got shapes"),
    "channels differ": ({"moving": image(1, 2, 12, 12)}, ValueError, "must have the same channels, got 1 and 2"),
    "devices differ": (
        {"moving": image().to("meta")},
        ValueError,
        "fixed and moving must be on one device, got cpu and meta",
    ),
    "fixed empty": ({"fixed": image(0, 1, 12, 12)}, ValueError, r"fixed must not be empty, got shape \(0, 1, 12, 12\)"),
    "moving empty": ({"moving": image(1, 0, 12, 12)}, ValueError, "moving must not be empty, got shape"),
    "one voxel": (
        {"fixed": image(1, 1, 12, 1), "moving": image(1, 1, 12, 1)},
        ValueError,
        r"fixed must have at least 2 voxels along every axis, got shape \(1, 1, 12, 1\)",
    ),
    "fixed NaN": ({"fixed": with_value(image(), math.nan)}, ValueError, "fixed must be finite, got 1 NaN or infinite"),
    "moving inf": ({"moving": with_value(image(), -math.inf)}, ValueError, "moving must be finite, got 1 NaN or"),
    "fixed array": ({"fixed": image().numpy()}, TypeError, "fixed must be a torch.Tensor, got ndarray"),
    "moving None": ({"moving": None}, TypeError, "moving must be a torch.Tensor, got NoneType"),
    "complex": ({"fixed": image().to(torch.complex64)}, TypeError, "fixed must be real, got dtype torch.complex64"),
    "ddf channels": (
        {"ddf": image(1, 3, 12, 12)},
        ValueError,
        r"ddf must be \(B, n, \*S\) = \(1, 2, 12, 12\) on the grid of fixed, got shape \(1, 3, 12, 12\)",
    ),
    "ddf grid": ({"ddf": image(1, 2, 6, 6)}, ValueError, r"ddf must be .*got shape \(1, 2, 6, 6\)"),
    "ddf rank": ({"ddf": image(2, 12, 12)}, ValueError, r"ddf must be .*got shape \(2, 12, 12\)"),
    "ddf batch": ({"ddf": image(2, 2, 12, 12)}, ValueError, r"ddf must be .*got shape \(2, 2, 12, 12\)"),
    "ddf NaN": ({"ddf": with_value(image(1, 2, 12, 12), math.nan)}, ValueError, "ddf must be finite, got 1 NaN"),
    "ddf device": (
        {"ddf": image(1, 2, 12, 12).to("meta")},
        ValueError,
        "ddf must be on the device of fixed, cpu, got meta",
    ),
    "ddf list": ({"ddf": [[0.0]]}, TypeError, "ddf must be a torch.Tensor, got list"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_that_do_not_fit(case):
    arguments, error_type, message = BAD_TENSORS[case]
    with pytest.raises(error_type, match=message):
        refine(**{"fixed": image(), "moving": image(), **arguments})


BAD_SETTINGS = [
    (
        {"similarity": "ssim"},
        ValueError,
        r"similarity must be one of \['lncc', 'mse', 'ncc'\] or a loss module, got 'ss",
    ),
    ({"similarity": None}, TypeError, "similarity must be a name, a Similarity or a torch.nn.Module, got NoneType"),
    ({"similarity": nn.MSELoss}, TypeError, "similarity must be a name, a Similarity or a torch.nn.Module, got type"),
    (
        {"scales": (2, 1), "iterations": (5,)},
        ValueError,
        "iterations must have one number per level, 2 for scales .* 1$",
    ),
    (
        {"scales": (1,), "iterations": (5, 5)},
        ValueError,
        "iterations must have one number per level, 1 for scales .* 2$",
    ),
    ({"scales": (1, 2)}, ValueError, r"scales must be strictly decreasing and not empty, got \(1, 2\)"),
    ({"scales": (2, 2, 1)}, ValueError, r"scales must be strictly decreasing and not empty, got \(2, 2, 1\)"),
    ({"scales": ()}, ValueError, r"scales must be strictly decreasing and not empty, got \(\)"),
    ({"scales": (2, 0.5)}, ValueError, "scales must be (finite and )?at least 1, got 0.5"),
    ({"scales": (2, -1)}, ValueError, "scales must be (finite and )?at least 1, got -1"),
    ({"scales": "coarse"}, ValueError, "scales must be 'auto' or a sequence of numbers, got 'coarse'"),
    ({"scales": ("2", "1")}, TypeError, "scales must be a number, got str"),
    ({"scales": 2}, (TypeError, ValueError), "scales must be"),
    ({"scales": None}, (TypeError, ValueError), "scales must be"),
    ({"iterations": -1}, ValueError, "iterations must be (finite and )?at least 0, got -1"),
    ({"iterations": "many"}, ValueError, "iterations must be 'auto', a number or a sequence, got 'many'"),
    ({"scales": (1,), "iterations": (2.5,)}, TypeError, r"iterations must be .*got .*2\.5"),
    ({"iterations": 2.5}, (TypeError, ValueError), "iterations must be"),
    ({"iterations": True}, TypeError, "iterations must be .*got (bool|True)"),
    ({"iterations": None}, (TypeError, ValueError), "iterations must be"),
    ({"step": -0.5}, ValueError, "step must be (finite and )?greater than 0, got -0.5"),
    ({"step": 0}, ValueError, "step must be (finite and )?greater than 0, got 0"),
    ({"step": math.nan}, ValueError, "step must be (finite and )?greater than 0, got nan"),
    ({"step": math.inf}, ValueError, "step must be (finite and )?greater than 0, got inf"),
    ({"step": "big"}, TypeError, "step must be a number, got str"),
    ({"damping": 0}, ValueError, "damping must be (finite and )?greater than 0, got 0"),
    ({"damping": (1.0, 0.0)}, ValueError, "damping must be (finite and )?greater than 0, got 0.0"),
    (
        {"scales": (4, 2, 1), "damping": (1.0, 1.0)},
        ValueError,
        r"damping must be one number or at least one per level \(3\)",
    ),
    ({"damping": "low"}, TypeError, "damping must be a number.*, got str"),
    ({"damping": None}, (TypeError, ValueError), "damping must be"),
    ({"smooth_gradient": -1}, ValueError, "smooth_gradient must be (finite and )?at least 0, got -1"),
    ({"smooth_gradient": ()}, ValueError, "smooth_gradient must be one number or at least one per level"),
    ({"smooth_residual": -0.5}, ValueError, "smooth_residual must be (finite and )?at least 0, got -0.5"),
    ({"smooth_residual": (0.5, 0.5)}, TypeError, "smooth_residual must be a number, got tuple"),
    ({"window": 2}, ValueError, "window must be an odd number of voxels, got 2"),
    ({"window": 0}, ValueError, "window must be an odd number of voxels, got 0"),
    ({"window": 3.0}, ValueError, "window must be an odd number of voxels, got 3.0"),
    (
        {"control": "adam"},
        ValueError,
        r"control must be one of \('simple', 'trust_region', 'constant'\) or a Damping, got 'adam'",
    ),
    (
        {"acceptance": "sometimes"},
        ValueError,
        r"acceptance must be one of \('always', 'descent', 'metropolis'\) or a Acceptance, got 'so",
    ),
    ({"spacing": (1, 1, 1)}, ValueError, r"spacing must be 2 positive numbers, one per axis, got \(1, 1, 1\)"),
    ({"spacing": (1, 0)}, ValueError, r"spacing must be 2 positive numbers, one per axis, got \(1, 0\)"),
    ({"spacing": (1, -2)}, ValueError, r"spacing must be 2 positive numbers, one per axis, got \(1, -2\)"),
    ({"spacing": (1, math.nan)}, ValueError, "spacing must be 2 positive numbers"),
    ({"spacing": (math.inf, 1)}, ValueError, "spacing must be 2 positive numbers"),
    ({"spacing": 2.0}, (TypeError, ValueError), "spacing must be"),
    ({"spacing": ("a", "b")}, (TypeError, ValueError), "spacing must be"),
    ({"seconds": 0}, ValueError, "seconds must be (finite and )?greater than 0, got 0"),
    ({"seconds": "short"}, TypeError, "seconds must be a number, got str"),
    ({"tolerance": -0.1}, ValueError, "tolerance must be (finite and )?at least 0, got -0.1"),
    ({"kernels": "fast"}, ValueError, r"kernels must be one of \('auto', 'native', 'reference'\), got 'fast'"),
    ({"seed": 1.5}, TypeError, "seed must be a whole number, got 1.5"),
    ({"kernels": None}, ValueError, r"kernels must be one of \('auto', 'native', 'reference'\), got None"),
]


@pytest.mark.parametrize(
    ("settings", "error_type", "message"), BAD_SETTINGS, ids=[str(case[0]) for case in BAD_SETTINGS]
)
def test_settings_out_of_range(settings, error_type, message):
    with pytest.raises(error_type, match=message):
        run(image(), image(), **settings)


def test_numpys_numbers_are_numbers():
    settings = {
        "scales": (2, 1),
        "iterations": (3, 2),
        "step": 0.25,
        "damping": (0.5, 1.0),
        "spacing": (1, 2),
        "seed": 3,
    }
    settings["acceptance"] = "metropolis"
    arrays = {"scales": np.array([2, 1]), "iterations": np.array([3, 2]), "step": np.float64(0.25)}
    arrays |= {"damping": tuple(np.array([0.5, 1.0])), "spacing": np.array([1, 2]), "seed": np.int64(3)}
    fixed, moving, _ = pair(FLAT)
    expected = run(fixed, moving, **settings).ddf
    for name, value in arrays.items():
        assert torch.equal(run(fixed, moving, **{**settings, name: value}).ddf, expected)


def test_a_loss_that_ignores_the_warped_image():
    class Blind(nn.Module):
        def forward(self, warped: Tensor, fixed: Tensor) -> Tensor:  # noqa: ARG002
            return fixed.sum()

    with pytest.raises(ValueError, match="similarity must be differentiable: the loss that Blind returned"):
        run(image(), image(), similarity=Blind())


# --- mask -------------------------------------------------------------------------------------------------------------


def masked_pair(shape: tuple[int, ...], batch: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pair, field, and the middle of the grid, where the fixed image is true; around it, it is another image."""
    moving, truth = texture(shape, batch), smooth(shape, 1.0, batch) + 1.0
    fixed = warp(moving, truth)
    mask = torch.zeros(batch, 1, *shape)
    mask[(..., *(slice(s // 5, -(s // 5)) for s in shape))] = 1
    return torch.where(mask > 0, fixed, 3 * texture(shape, batch, seed=77)), moving, truth, mask


@pytest.mark.parametrize("similarity", ["lncc", "mse", "ncc"])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_lies_outside_the_mask_is_not_seen(shape, similarity):
    fixed, moving, truth, mask = masked_pair(shape)
    settings = {"iterations": 15, "similarity": similarity}
    masked = run(fixed, moving, None, mask, **settings)
    other = run(torch.where(mask > 0, fixed, -1e3 * fixed), moving, None, mask, **settings)
    assert torch.equal(masked.ddf, other.ddf)
    plain = run(fixed, moving, **settings)
    inside = mask.expand_as(truth) > 0
    assert (masked.ddf - truth)[inside].square().mean() < 0.5 * (plain.ddf - truth)[inside].square().mean()


def test_a_mask_of_ones_changes_nothing():
    fixed, moving, truth = pair(FLAT, batch=2)
    settings = {"iterations": 8, "scales": (1,)}
    plain = run(fixed, moving, 0.5 * truth, **settings)
    masked = run(fixed, moving, 0.5 * truth, torch.ones(2, 1, *FLAT, dtype=torch.bool), **settings)
    torch.testing.assert_close(masked.ddf, plain.ddf, rtol=0, atol=1e-3)
    assert error(masked.ddf, plain.ddf) < 1e-4
    torch.testing.assert_close(masked.final_loss, plain.final_loss, rtol=1e-4, atol=1e-6)


def test_half_precision_takes_masks():
    fixed, moving, truth, mask = masked_pair((16, 18, 17))
    start, settings = 0.5 * truth, {"iterations": 6, "scales": (1,)}
    full, half = (run(fixed, moving, start, mask, memory=m, **settings) for m in ("full", "half"))
    assert error(full.ddf, half.ddf) < 0.03
    assert error(full.ddf, start) > 0.05


def test_pairs_have_masks_of_their_own():
    fixed, moving, _, mask = masked_pair(FLAT, batch=2)
    mask[1] = 0.5 * mask[1].roll(3, -1)  # the mean over a mask does not depend on its scale
    together = run(fixed, moving, None, mask, iterations=10)
    for i in range(2):
        one = slice(i, i + 1)
        alone = run(fixed[one], moving[one], None, mask[one] / mask[one].max(), iterations=10)
        torch.testing.assert_close(together.ddf[one], alone.ddf, rtol=0, atol=1e-4)
        torch.testing.assert_close(together.final_loss[one], alone.final_loss, rtol=1e-4, atol=1e-6)


def test_the_loss_is_the_mean_over_the_mask():
    fixed, moving, _, mask = masked_pair(FLAT)
    result = run(fixed, moving, None, mask, similarity="mse", iterations=3, scales=(1,))
    factor = torch.maximum(fixed[mask > 0].abs().max(), moving.abs().max())
    squares = ((fixed - moving) / factor)[mask > 0].square()
    torch.testing.assert_close(result.initial_loss[0], squares.mean(), rtol=1e-5, atol=0)


def test_masks_that_do_not_fit():
    fixed, moving, _ = pair(FLAT)
    for mask, message in (
        (torch.ones(1, 1, 4, 4), r"mask must be \(B, 1, \*S\) = \(1, 1, 32, 30\)"),
        (2 * torch.ones(1, 1, *FLAT), r"mask must be weights in \[0, 1\], got values from 2 to 2"),
        (torch.zeros(1, 1, *FLAT), r"mask must not be zero everywhere, got that for pairs \[0\]"),
        (torch.full((1, 1, *FLAT), float("nan")), "mask must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            run(fixed, moving, None, mask)
    with pytest.raises(TypeError, match="mask must be a torch"):
        run(fixed, moving, None, [1])
    with pytest.raises(ValueError, match="mask must be None for a similarity that cannot weigh voxels"):
        run(fixed, moving, None, torch.ones(1, 1, *FLAT), similarity=torch.nn.MSELoss())


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("similarity", ["lncc", "mse", "ncc"])
@pytest.mark.parametrize("predicted", [False, True])
def test_half_precision_ends_where_the_full_one_does(predicted, similarity):
    fixed, moving, truth = pair(FLAT, batch=2)
    start = 0.5 * truth if predicted else None
    settings = {"iterations": 10, "scales": (1,), "similarity": similarity}
    full, half = (run(fixed, moving, start, memory=m, **settings) for m in ("full", "half"))
    assert error(half.ddf, full.ddf) < 0.03 < error(full.ddf, 0.0)
    assert half.ddf.dtype == torch.float32
    assert int(fold_count(half.ddf).sum()) == 0
    torch.testing.assert_close(half.final_loss, full.final_loss, rtol=0.02, atol=1e-4)


def test_half_mode_takes_half_precision_images():
    fixed, moving, _ = pair(FLAT)
    result = run(fixed.half(), moving.half(), iterations=5, scales=(1,), memory="half")
    assert result.final_loss < result.initial_loss


@pytest.mark.parametrize("memory", ["lots", 3, None])
def test_unknown_memory_is_refused(memory):
    fixed, moving, _ = pair(FLAT)
    with pytest.raises(ValueError, match=r"memory must be 'auto' or one of \('full', 'half'\), got"):
        refine(fixed, moving, memory=memory)
