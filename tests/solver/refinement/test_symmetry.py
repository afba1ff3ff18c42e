"""What must not matter: flips, axes, padding, the batch, intensities, runs, threads."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monai_lm.fields import gaussian_smooth, warp
from monai_lm.solver.acceptance import ACCEPTANCES
from tests.solver.pairs import CONTROLS, FLAT, SHAPES, error, pair, run, smooth, texture

_BENDING = {"regularizer": "bending"}


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


@pytest.mark.parametrize(
    "settings", [{"similarity": name} for name in ("lncc", "ncc", "mse", "mi", "mind")] + [_BENDING]
)
@pytest.mark.parametrize(("order", "flipped"), [((0, 1, 2), 2), ((2, 0, 1), 0), ((1, 2, 0), 0)])
def test_thick_slices_may_lie_along_any_axis(order, flipped, settings):
    """Images, prediction and spacing on exchanged and mirrored axes: the field follows."""
    spacing, settings = (1.0, 1.2, 7.7), settings | {"iterations": 8}
    moving = gaussian_smooth(torch.randn(1, 1, 24, 20, 9, generator=torch.Generator().manual_seed(0)), (2, 2, 0.6))
    truth = smooth((24, 20, 9), 3.0)
    fixed = warp(moving, truth)

    def turned(image: Tensor) -> Tensor:
        return image.permute(0, 1, *[2 + a for a in order]).flip(2 + flipped)

    def field(ddf: Tensor) -> Tensor:
        out = turned(ddf)[:, order]
        out[:, flipped] *= -1
        return out

    result = run(fixed, moving, 0.5 * truth, spacing=spacing, **settings).ddf
    assert error(result, 0.5 * truth) > 0.02
    turned_spacing = [spacing[a] for a in order]
    again = run(turned(fixed), turned(moving), field(0.5 * truth), spacing=turned_spacing, **settings).ddf
    assert error(again, field(result)) < 0.01


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
@pytest.mark.parametrize("similarity", ["lncc", "mi", "mind", "mse", "ncc"])
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
