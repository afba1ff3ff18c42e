"""The map of where a field may be off, by the way back."""

import pytest
import torch

from monai_lm.fields import compose, gaussian_smooth, invert, warp
from monai_lm.solver.refinement import refine
from monai_lm.solver.uncertainty import uncertainty

SETTINGS = {"scales": (2, 1), "iterations": (20, 20), "smooth_residual": 0.6}


@pytest.fixture
def pair(smooth_image, smooth_field):
    """Images of which the right half shows nothing but noise of its own, and the field that leads between them."""
    moving = smooth_image((1, 1, 40, 36), 1.5, dtype=torch.float32)
    truth = smooth_field((1, 2, 40, 36), 3.0, 6.0, 1, torch.float32)
    fixed = warp(moving, truth)
    fixed[..., 18:] = smooth_image((1, 1, 40, 18), 1.0, 7, dtype=torch.float32)
    return fixed, moving, truth


def test_it_is_large_where_the_images_tell_nothing(pair):
    fixed, moving, truth = pair
    ddf = refine(fixed, moving, **SETTINGS).ddf
    found = uncertainty(fixed, moving, ddf, **SETTINGS)
    assert found.shape == (1, 1, 40, 36)
    assert found.dtype == torch.float32
    error = torch.linalg.vector_norm(ddf - truth, dim=1, keepdim=True)
    told, untold = (..., slice(4, 14)), (..., slice(22, 32))
    assert error[untold].mean() > 3 * error[told].mean()
    assert found[untold].mean() > 3 * found[told].mean()


def test_a_field_that_is_held_where_nothing_is_told_is_not_called_certain():
    """There both ways would be held, and there and back again would end where it started."""
    images = [torch.randn(1, 1, 96, 88, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    result = refine(*images)
    assert float(result.held) > 0.9
    assert float(result.ddf.norm(dim=1).mean()) < 0.5
    assert float(uncertainty(*images, result.ddf).mean()) > 1


def test_it_is_the_round_trip_in_millimetres(pair):
    fixed, moving, _ = pair
    spacing = (0.5, 2.0)
    prediction = torch.full((1, 2, 40, 36), 0.5)
    ddf = refine(fixed, moving, prediction, spacing=spacing, **SETTINGS).ddf
    back = refine(moving, fixed, invert(prediction)[0], spacing=spacing, **SETTINGS).ddf
    trip = compose(back, ddf) * torch.tensor(spacing).view(1, 2, 1, 1)
    expected = gaussian_smooth(trip.square().sum(1, keepdim=True), (2.0, 0.5)).sqrt()
    torch.testing.assert_close(uncertainty(fixed, moving, ddf, prediction, spacing=spacing, **SETTINGS), expected)


def test_masks_change_places(pair):
    fixed, moving, _ = pair
    mask, moving_mask = torch.ones(2, 1, 1, 40, 36)
    mask[..., :6], moving_mask[..., 30:] = 0, 0
    ddf = refine(fixed, moving, None, mask, moving_mask=moving_mask, **SETTINGS).ddf
    back = refine(moving, fixed, None, moving_mask, moving_mask=mask, **SETTINGS).ddf
    expected = gaussian_smooth(compose(back, ddf).square().sum(1, keepdim=True), 2.0).sqrt()
    torch.testing.assert_close(
        uncertainty(fixed, moving, ddf, None, mask, moving_mask=moving_mask, **SETTINGS), expected
    )


def test_what_does_not_fit_is_refused(pair):
    fixed, moving, ddf = pair
    with pytest.raises(ValueError, match="guidance must not be given"):
        uncertainty(fixed, moving, ddf, guidance=[object()])
    with pytest.raises(ValueError, match="symmetric must not be set"):
        uncertainty(fixed, moving, ddf, symmetric=True)
    with pytest.raises(ValueError, match="ddf"):
        uncertainty(fixed, moving, ddf[..., 1:])
    with pytest.raises(TypeError, match="unheard"):
        uncertainty(fixed, moving, ddf, unheard=1)
