"""A mask says where the similarity counts."""

import pytest
import torch
from torch import Tensor

from monai_lm.fields import warp
from monai_lm.similarity.weighted import counted
from tests.solver.pairs import FLAT, SHAPES, error, pair, run, seen_of, smooth, texture


def masked_pair(shape: tuple[int, ...], batch: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pair, field, and the middle of the grid; more than three voxels outside of it, the fixed image is another one."""
    moving, truth = texture(shape, batch), smooth(shape, 1.0, batch) + 1.0
    fixed = warp(moving, truth)
    mask = torch.zeros(batch, 1, *shape)
    mask[(..., *(slice(s // 3, -(s // 3)) for s in shape))] = 1
    return torch.where(seen_of(mask), fixed, 3 * texture(shape, batch, seed=77)), moving, truth, mask


@pytest.mark.parametrize("similarity", ["lncc", "mi", "mind", "mse", "ncc"])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_lies_outside_the_mask_is_not_seen(shape, similarity):
    fixed, moving, truth, mask = masked_pair(shape)
    settings = {"iterations": 15, "similarity": similarity}
    masked = run(fixed, moving, None, mask, **settings)
    for hidden in (-1e3 * fixed, torch.full_like(fixed, float("nan"))):
        other = run(torch.where(seen_of(mask), fixed, hidden), moving, None, mask, **settings)
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
    factor = torch.maximum(fixed[seen_of(mask)].abs().max(), moving.abs().max())
    squares = ((fixed - moving) / factor)[counted(mask, fixed) > 0].square()
    torch.testing.assert_close(result.initial_loss[0], squares.mean(), rtol=1e-5, atol=0)


def test_masks_that_do_not_fit():
    fixed, moving, _ = pair(FLAT)
    for mask, message in (
        (torch.ones(1, 1, 4, 4), r"mask must be \(B, 1, \*S\) = \(1, 1, 32, 30\)"),
        (
            torch.eye(32, 30)[None, None] + 1,
            r"mask must be weights in \[0, 1\], or zeros and .* got values from 1 to 2",
        ),
        (-torch.eye(32, 30)[None, None], r"mask must be weights in \[0, 1\], .* got values from -1 to"),
        (torch.zeros(1, 1, *FLAT), r"mask must not be zero everywhere, got that for pairs \[0\]"),
        (torch.full((1, 1, *FLAT), float("nan")), "mask must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            run(fixed, moving, None, mask)
    with pytest.raises(TypeError, match="mask must be a torch"):
        run(fixed, moving, None, [1])
    with pytest.raises(ValueError, match="mask must be None for a similarity that cannot weigh voxels"):
        run(fixed, moving, None, torch.eye(32, 30)[None, None], similarity=torch.nn.MSELoss())


def test_any_value_beside_zero_means_one():
    fixed, moving, _, mask = masked_pair(FLAT, batch=2)
    scale = torch.tensor([255, 3]).view(2, 1, 1, 1)
    settings = {"iterations": 3, "scales": (1,)}
    expected = run(fixed, moving, None, mask, **settings)
    assert torch.equal(run(fixed, moving, None, (scale * mask).int(), **settings).ddf, expected.ddf)
    plain, full = (run(fixed, moving, None, m, **settings) for m in (None, scale * torch.ones_like(mask)))
    assert torch.equal(full.ddf, plain.ddf)


def test_what_is_not_finite_where_a_mask_counts_is_refused():
    fixed, moving, _, mask = masked_pair(FLAT)
    broken = fixed.clone()
    broken[..., 16, 15], broken[..., 0, 0] = float("nan"), float("nan")
    for given, count in ((mask, 1), (None, 2), (torch.ones_like(mask), 2)):
        with pytest.raises(ValueError, match=rf"^fixed must be finite, got {count} NaN"):
            run(broken, moving, None, given)
        with pytest.raises(ValueError, match=rf"^moving must be finite, got {count} NaN"):
            run(fixed, broken, moving_mask=given)


def balls(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A textured ball on a background of zero, warped: both images, the field, and masks that end at the border."""
    content, truth = texture(shape, seed=seed + 10), smooth(shape, 8.0, sigma=6.0, seed=seed)
    axes = torch.meshgrid(*[torch.linspace(-1, 1, s) for s in shape], indexing="ij")
    ball = (torch.linalg.vector_norm(torch.stack(axes), dim=0) < 0.6).float()[None, None]
    moving, mask = ball * (10 + 2 * content), (warp(ball, truth) > 0.5).float()
    return warp(moving, truth) * mask, moving, truth, mask, ball


@pytest.mark.parametrize("shape", [(64, 60), (32, 30, 31)])
def test_a_mask_that_ends_at_the_border_of_what_it_shows_is_as_good_as_none(shape):
    errors = []
    for seed in range(2):
        fixed, moving, truth, mask, ball = balls(shape, seed)
        fields = [run(fixed, moving, None, m, moving_mask=w).ddf for m, w in ((None, None), (mask, None), (None, ball))]
        counts = mask.expand_as(truth) > 0
        errors.append([float((field - truth)[counts].square().mean().sqrt()) for field in [0 * truth, *fields]])
    start, plain, masked, moving_masked = torch.tensor(errors).mean(0).tolist()
    assert plain < 0.4 * start
    assert masked < 1.3 * plain
    assert moving_masked < 1.3 * plain
