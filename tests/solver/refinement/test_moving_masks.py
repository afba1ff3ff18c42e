"""A mask of the moving image says what of it counts, wherever the field leads."""

import pytest
import torch
from torch import Tensor

from monai_lm.fields import gaussian_smooth, warp
from monai_lm.similarity import LNCC, MSE, Combined
from monai_lm.similarity.weighted import counted
from tests.solver.pairs import FLAT, SHAPES, error, noise, pair, run, smooth, texture

MEASURES = ["lncc", "mi", "mse", "ncc"]
WIDE = {(32, 30): (48, 46), (16, 18, 17): (26, 24, 25)}
"""Sizes with room for a lesion."""


def bare(shape: tuple[int, ...], batch: int = 1) -> Tensor:
    return texture(shape, batch) + 8 * gaussian_smooth(noise(batch, 1, *shape, seed=5), 4.0)


def lesion(shape: tuple[int, ...], batch: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fixed image, moving image with a bright ball that the fixed one has not, the field, and the mask without it."""
    clean, truth = bare(shape, batch), smooth(shape, 2.5, batch, sigma=6.0)
    axes = [torch.linspace(-1, 1, s) + 0.2 for s in shape]
    distance = torch.linalg.vector_norm(torch.stack(torch.meshgrid(*axes, indexing="ij")), dim=0)[None, None]
    mask = (distance > 0.37).float().expand_as(clean).contiguous()
    return warp(clean, truth), torch.where(distance < 0.32, 6.0, clean), truth, mask


def missed(ddf: Tensor, truth: Tensor, counts: Tensor) -> float:
    """Mean end-point error in voxels where something counts."""
    return float(torch.linalg.vector_norm(ddf - truth, dim=1, keepdim=True)[counts > 0.99].mean())


@pytest.mark.parametrize("similarity", MEASURES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_mask_of_ones_changes_not_a_bit(shape, similarity):
    fixed, moving, truth = pair(shape, batch=2)
    mask = torch.ones(2, 1, *shape, dtype=torch.bool)
    fixed_mask = torch.ones(2, 1, *shape)
    fixed_mask[:, :, :5] = 0
    settings = {"iterations": 5, "similarity": similarity}
    ones, module = torch.ones_like(fixed), {"similarity": torch.nn.MSELoss(), "iterations": 1}
    assert torch.equal(run(fixed, moving, None, ones, moving_mask=mask, **module).ddf, run(fixed, moving, **module).ddf)
    for given in (None, fixed_mask):
        plain = run(fixed, moving, 0.5 * truth, given, **settings)
        masked = run(fixed, moving, 0.5 * truth, given, moving_mask=mask, **settings)
        assert torch.equal(masked.ddf, plain.ddf)
        assert torch.equal(masked.final_loss, plain.final_loss)


@pytest.mark.parametrize("similarity", ["lncc", "mse"])
def test_a_mask_that_hides_a_corner_changes_little_elsewhere(similarity):
    fixed, moving, _ = pair(FLAT)
    mask = torch.ones(1, 1, *FLAT)
    mask[..., :2, :2] = 0
    plain, masked = (run(fixed, moving, moving_mask=m, similarity=similarity) for m in (None, mask))
    assert error(masked.ddf[..., 8:, 8:], plain.ddf[..., 8:, 8:]) < 0.03
    torch.testing.assert_close(masked.initial_loss, plain.initial_loss, rtol=0.05, atol=0)


@pytest.mark.parametrize("memory", ["full", "half"])
@pytest.mark.parametrize("similarity", [*MEASURES, Combined([LNCC(), MSE()], [1, 1])], ids=[*MEASURES, "combined"])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_lies_under_zeros_is_not_seen(shape, similarity, memory):
    fixed, moving, truth, mask = lesion(shape)
    if isinstance(similarity, Combined):
        fixed, moving = (torch.cat([image, 2 * image + 1], 1) for image in (fixed, moving))
    settings = {"similarity": similarity, "memory": memory, "iterations": 8, "moving_mask": mask}
    masked = run(fixed, moving, 0.5 * truth, **settings)
    assert error(masked.ddf, 0.5 * truth) > 0.02
    for hidden in (-1e3 * moving, torch.full_like(moving, float("nan"))):
        other = run(fixed, torch.where(mask > 0, moving, hidden), 0.5 * truth, **settings)
        assert torch.equal(masked.ddf, other.ddf)
        assert torch.equal(masked.initial_loss, other.initial_loss)
        assert torch.equal(masked.final_loss, other.final_loss)


@pytest.mark.parametrize(("similarity", "bound"), [("lncc", 0.08), ("mi", 0.2), ("mse", 0.11), ("ncc", 0.11)])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_warp_is_recovered_around_a_lesion_as_if_there_were_none(shape, similarity, bound):
    fixed, moving, truth, mask = lesion(WIDE[shape])
    healthy, counts = bare(WIDE[shape]), warp(mask, truth)
    masked, plain = (
        run(fixed, moving, similarity=similarity, moving_mask=m, smooth_residual=0.6).ddf for m in (mask, None)
    )
    without = run(fixed, healthy, similarity=similarity, smooth_residual=0.6).ddf
    assert missed(masked, truth, counts) < bound < 0.5 * missed(torch.zeros_like(truth), truth, counts)
    assert missed(masked, truth, counts) < missed(without, truth, counts) + 0.025
    hidden = 1 - counts  # where the field goes on by itself
    beside = counts * (gaussian_smooth(hidden, 1.0) > 0.01)
    assert missed(masked, truth, beside) < 0.7 * missed(plain, truth, beside)
    assert missed(masked, truth, hidden) < 0.3 * missed(plain, truth, hidden)


@pytest.mark.parametrize("similarity", ["lncc", "mse"])
def test_either_side_of_a_pair_may_have_the_lesion(similarity):
    """The pair the other way round, with the mask on the fixed side, is recovered as well; and with both masks."""
    fixed, moving, truth, mask = lesion(WIDE[FLAT])
    there = run(fixed, moving, similarity=similarity, moving_mask=mask)
    back = run(moving, fixed, None, mask, similarity=similarity)
    assert missed(there.ddf, truth, warp(mask, truth)) < 0.2
    assert missed(back.inverse(), truth, warp(mask, truth)) < 0.3
    both = run(fixed, moving, None, warp(mask, truth), similarity=similarity, moving_mask=mask)
    assert missed(both.ddf, truth, warp(mask, truth)) < 0.2


def test_without_a_field_a_mask_means_the_same_on_either_side():
    fixed, moving, _, mask = lesion(FLAT)
    settings = {"similarity": "ncc", "iterations": 0, "scales": (1,)}
    here, there = run(fixed, moving, None, mask, **settings), run(fixed, moving, moving_mask=mask, **settings)
    torch.testing.assert_close(here.initial_loss, there.initial_loss, rtol=1e-3, atol=0)


@pytest.mark.parametrize("kernels", ["native", "reference"])
def test_the_loss_is_the_mean_over_what_counts_where_the_field_leads(kernels):
    fixed, moving, truth, mask = lesion(FLAT)
    mask = 0.2 + 0.8 * gaussian_smooth(mask, 1.0)  # soft, and nothing hidden
    fixed_mask = (noise(1, 1, *FLAT, seed=8) > 0).float()
    settings = {"similarity": "mse", "iterations": 3, "scales": (1,), "kernels": kernels}
    result = run(fixed, moving, truth, fixed_mask, moving_mask=mask, **settings)
    fixed_mask = counted(fixed_mask, fixed)
    factor = torch.maximum(fixed[fixed_mask > 0].abs().max(), moving.abs().max())
    for ddf, loss in ((truth, result.initial_loss), (result.ddf, result.final_loss)):
        weight = fixed_mask * warp(mask, ddf)
        squares = ((fixed - warp(moving, ddf)) / factor).square()
        torch.testing.assert_close(loss[0], (weight * squares).sum() / weight.sum(), rtol=1e-4, atol=0)


def test_half_precision_is_near():
    fixed, moving, truth, mask = lesion((26, 24, 25))
    settings = {"iterations": 6, "scales": (1,), "moving_mask": mask}
    full, half = (run(fixed, moving, 0.5 * truth, memory=m, **settings) for m in ("full", "half"))
    assert error(full.ddf, half.ddf) < 0.03
    assert error(full.ddf, 0.5 * truth) > 0.05


@pytest.mark.parametrize("control", ["simple", "trust_region"])
def test_pairs_have_masks_of_their_own(control):
    fixed, moving, _, mask = lesion(FLAT, batch=3)
    mask[1] = 0.5 * mask[1].roll(5, -1)
    mask[2] = 1
    settings = {"iterations": 10, "control": control}
    together = run(fixed, moving, moving_mask=mask, **settings)
    for i in range(3):
        one = slice(i, i + 1)
        alone = run(fixed[one], moving[one], moving_mask=mask[one] / mask[one].max(), **settings)
        torch.testing.assert_close(together.ddf[one], alone.ddf, rtol=0, atol=1e-3)
        torch.testing.assert_close(together.final_loss[one], alone.final_loss, rtol=1e-4, atol=1e-6)


def test_an_image_that_is_constant_where_it_counts_keeps_its_field():
    fixed, moving, truth, mask = lesion(FLAT)
    with pytest.warns(UserWarning, match=r"moving is constant .* where masks and lesions leave it in pairs \[0\]"):
        result = run(fixed, torch.where(mask > 0, 3.3, moving), 0.1 * truth, moving_mask=mask, iterations=3)
    torch.testing.assert_close(result.ddf, 0.1 * truth)


def test_masks_that_have_nothing_in_common_leave_the_field_and_say_so():
    fixed, moving, _, mask = lesion(FLAT)
    left, right = torch.zeros_like(mask), torch.zeros_like(mask)
    left[..., :8], right[..., 20:] = 1, 1
    with pytest.warns(UserWarning, match=r"not finite at the prediction of pairs \[0\].* where their masks leave them"):
        result = run(fixed, moving, None, left, moving_mask=right, iterations=3, scales=(1,))
    assert not result.ddf.any()


def test_masks_that_do_not_fit():
    fixed, moving, _ = pair(FLAT)
    for mask, message in (
        (torch.ones(1, 1, 4, 4), r"^moving_mask must be \(B, 1, \*S\) = \(1, 1, 32, 30\) on the grid of moving"),
        (torch.ones(1, 2, *FLAT), r"^moving_mask must be \(B, 1, \*S\)"),
        (torch.eye(32, 30)[None, None] + 1, r"^moving_mask must be weights in \[0, 1\], .* got values from 1 to 2"),
        (-torch.ones(1, 1, *FLAT), r"^moving_mask must be weights in \[0, 1\]"),
        (torch.zeros(1, 1, *FLAT), r"^moving_mask must not be zero everywhere, got that for pairs \[0\]"),
        (torch.full((1, 1, *FLAT), float("nan")), "moving_mask must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            run(fixed, moving, moving_mask=mask)
    with pytest.raises(TypeError, match=r"^moving_mask must be a torch\."):
        run(fixed, moving, moving_mask=[1])
    with pytest.raises(ValueError, match="moving_mask must be None for a similarity that cannot weigh voxels"):
        run(fixed, moving, moving_mask=torch.eye(32, 30)[None, None], similarity=torch.nn.MSELoss())


@pytest.mark.parametrize("similarity", ["lncc", "mi"])
def test_masks_that_meet_on_coarse_levels_only_keep_the_field(similarity):
    fixed, moving, _, mask = lesion((48, 46))
    left, right = torch.zeros_like(mask), torch.zeros_like(mask)
    left[:, :, :24], right[:, :, 26:] = 1, 1  # a voxel beyond either counts, too
    with pytest.warns(UserWarning, match=r"similarity is not finite at the prediction of pairs \[0\]"):
        result = run(fixed, moving, None, left, moving_mask=right, iterations=5, scales=(4, 1), similarity=similarity)
    assert not result.ddf.any()
