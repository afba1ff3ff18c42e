"""What every measure promises: exact derivatives, conventions of sums and means, batches, autograd."""

from inspect import signature

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from monai_lm.similarity import LNCC, MSE, lookup
from monai_lm.similarity.base import contrast, standardize

EVERY = {
    "lncc, Gaussian": LNCC(radius=1, window="gaussian"),
    **{name: make() for name, make in lookup.MEASURES.items()},
}
SMOOTHED = {
    f"{name}, epsilon .1": make(epsilon=0.1)
    for name, make in lookup.MEASURES.items()
    if "epsilon" in signature(make).parameters and not make.learns  # that one's is LNCC's
}
MEASURES = pytest.mark.parametrize("measure", EVERY.values(), ids=EVERY.keys())
KEEPING = {name: measure for name, measure in EVERY.items() if type(measure) is not MSE}
INVARIANT = pytest.mark.parametrize("measure", KEEPING.values(), ids=KEEPING.keys())
EXPLAINED = {name: measure for name, measure in EVERY.items() if not isinstance(measure, MSE)}
EXPLAINING = pytest.mark.parametrize("measure", EXPLAINED.values(), ids=EXPLAINED.keys())
"""Those that tell what part of an image the other one explains: a constant explains nothing."""


@pytest.fixture
def pair(smooth_image):
    """``pair(size, channels, batch)``: two images that resemble each other, not on the same intensity scale."""

    def make(size, channels=1, batch=1, dtype=torch.float64):
        fixed, noise = (smooth_image((batch, channels, *size), 1.0, seed) for seed in (0, 1))
        return (3 * fixed + 2 * noise + 5).to(dtype), (4 * fixed + 7).to(dtype)

    return make


def numerical_derivative(measure, warped, fixed, h):
    out = torch.zeros_like(warped)
    for index in range(warped.numel()):
        step = torch.zeros(warped.numel(), dtype=warped.dtype)
        step[index] = h
        step = step.view_as(warped)
        out.view(-1)[index] = (measure(warped + step, fixed) - measure(warped - step, fixed)).sum() / (2 * h)
    return out


@MEASURES
@pytest.mark.parametrize("channels", [1, 2])
def test_closed_form_derivative_equals_autograd_of_the_loss(size, measure, channels, pair):
    warped, fixed = pair(size, channels, batch=2)
    reference, moving = measure.prepare(fixed, warped)
    leaf = moving.clone().requires_grad_()
    loss, derivative = measure.evaluate(leaf, reference)
    (expected,) = torch.autograd.grad(loss.sum(), leaf)
    assert loss.shape == (2,)
    assert expected.abs().max() > 1e-3
    error = (derivative.detach() - expected).abs().max() / expected.abs().max()
    assert error < 1e-8


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("measure", [*EVERY.values(), *SMOOTHED.values()], ids=[*EVERY, *SMOOTHED])
def test_derivative_agrees_with_finite_differences_on_raw_images(size, measure, channels, pair):
    """ε is a fraction of the squared contrast of the warped image, so it changes with the image, too."""
    warped, fixed = pair(size, channels)
    loss, derivative = measure.loss_and_derivative(warped, fixed)
    expected = numerical_derivative(measure, warped, fixed, 1e-6)
    assert torch.equal(loss, measure(warped, fixed))
    assert (derivative - expected).norm() / expected.norm() < 1e-6


@MEASURES
def test_autograd_gets_the_derivative_times_the_incoming_gradient(size, measure, pair):
    warped, fixed = pair(size, 2, batch=2)
    weights = torch.tensor([2.0, -3.0], dtype=torch.float64)
    leaf = warped.clone().requires_grad_()
    (measure(leaf, fixed) * weights).sum().backward()
    _, derivative = measure.loss_and_derivative(warped, fixed)
    torch.testing.assert_close(leaf.grad, derivative * weights.view(2, *[1] * (1 + len(size))), rtol=1e-12, atol=0)


@INVARIANT
def test_prepare_then_evaluate_gives_the_loss_of_the_call(size, measure, pair):
    warped, fixed = pair(size)
    reference, moving = measure.prepare(fixed, warped)
    loss, _ = measure.evaluate(moving, reference)
    torch.testing.assert_close(loss, measure(warped, fixed), rtol=1e-10, atol=0)


@MEASURES
def test_batch_gives_the_loss_of_every_pair(size, measure, pair):
    warped, fixed = pair(size, 2, batch=3)
    losses, derivatives = measure.loss_and_derivative(warped, fixed)
    for b in range(3):
        loss, derivative = measure.loss_and_derivative(warped[b : b + 1], fixed[b : b + 1])
        torch.testing.assert_close(losses[b : b + 1], loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(derivatives[b : b + 1], derivative, rtol=1e-10, atol=1e-12)


@MEASURES
def test_channels_are_averaged(size, measure, pair):
    warped, fixed = pair(size, 2)
    losses, derivatives = zip(
        *[measure.loss_and_derivative(warped[:, c : c + 1], fixed[:, c : c + 1]) for c in range(2)], strict=True
    )
    loss, derivative = measure.loss_and_derivative(warped, fixed)
    torch.testing.assert_close(loss, (losses[0] + losses[1]) / 2, rtol=1e-12, atol=0)
    torch.testing.assert_close(derivative, torch.cat(derivatives, 1) / 2, rtol=1e-10, atol=1e-14)


@MEASURES
def test_a_descent_step_lowers_the_loss(size, measure, pair):
    warped, fixed = pair(size)
    loss, derivative = measure.loss_and_derivative(warped, fixed)
    step = 1e-3 * loss.item() / derivative.square().sum()
    lower = measure(warped - step * derivative, fixed)
    assert lower.item() == pytest.approx(0.999 * loss.item(), rel=1e-4)


@MEASURES
def test_loss_is_invariant_to_flips_and_transposition(size, measure, pair):
    warped, fixed = pair(size)
    loss, derivative = measure.loss_and_derivative(warped, fixed)
    flipped, flipped_derivative = measure.loss_and_derivative(warped.flip(2), fixed.flip(2))
    torch.testing.assert_close(flipped, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(flipped_derivative.flip(2), derivative, rtol=1e-9, atol=1e-12)
    transposed = measure(warped.transpose(2, 3), fixed.transpose(2, 3))
    torch.testing.assert_close(transposed, loss, rtol=1e-12, atol=0)


@MEASURES
@pytest.mark.parametrize("value", [0.0, 7.0, 1e6])
def test_a_constant_warped_image_gives_a_finite_derivative(size, measure, value, pair):
    fixed = pair(size, dtype=torch.float32)[1]
    constant = torch.full_like(fixed, value)
    loss, derivative = measure.loss_and_derivative(constant, fixed)
    assert torch.isfinite(derivative).all()
    if measure in EXPLAINED.values():
        assert loss.item() == pytest.approx(fixed.numel())
        assert not derivative.any()


@EXPLAINING
def test_a_constant_fixed_image_gives_a_zero_derivative(size, measure, pair):
    warped = pair(size, dtype=torch.float32)[0]
    loss, derivative = measure.loss_and_derivative(warped, torch.full_like(warped, 3.3))
    assert loss.item() == pytest.approx(warped.numel())
    assert not derivative.any()


@INVARIANT
@pytest.mark.parametrize(("factor", "offset"), [(2.5, 0.0), (1.0, 100.0), (-3.0, 40.0), (1e-12, 0.0), (1e12, 0.0)])
def test_loss_is_invariant_to_intensity_scale_and_offset(size, measure, factor, offset, pair):
    warped, fixed = pair(size, 2)
    loss, derivative = measure.loss_and_derivative(warped, fixed)
    changed, changed_derivative = measure.loss_and_derivative(factor * warped + offset, fixed)
    torch.testing.assert_close(changed, loss, rtol=1e-9, atol=0)
    error = (factor * changed_derivative - derivative).abs().max() / derivative.abs().max()
    assert error < 1e-9
    torch.testing.assert_close(measure(warped, factor * fixed + offset), loss, rtol=1e-9, atol=0)


@INVARIANT
@pytest.mark.parametrize("offset", [0.0, 100.0, 1e4])
def test_float32_stays_close_to_float64_with_a_large_offset(measure, offset, pair):
    warped, fixed = ((image + offset).float() for image in pair((16, 15)))
    loss, derivative = measure.loss_and_derivative(warped, fixed)
    expected_loss, expected = measure.loss_and_derivative(warped.double(), fixed.double())
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-4, atol=0)
    assert (derivative.double() - expected).norm() / expected.norm() < 1e-3
    unshifted = measure(*pair((16, 15)))
    torch.testing.assert_close(loss.double(), unshifted, rtol=2e-3, atol=0)


@INVARIANT
def test_loss_lies_between_zero_and_the_number_of_voxels(size, measure, pair, random_tensor):
    warped, fixed = pair(size)
    voxels = fixed.numel()
    losses = [measure(image, fixed).item() for image in (fixed, warped, random_tensor(fixed.shape, 9))]
    assert all(0 <= loss < voxels for loss in losses)
    if measure.standardized:  # a histogram needs more voxels for it
        assert losses == sorted(losses)
        assert losses[0] < 0.05 * voxels


@MEASURES
def test_the_fixed_image_gets_no_gradient(size, measure, pair):
    warped, fixed = pair(size)
    fixed.requires_grad_()
    measure(warped.requires_grad_(), fixed).sum().backward()
    assert fixed.grad is None
    assert warped.grad.abs().sum() > 0


@MEASURES
def test_autocast_changes_nothing(size, measure, pair):
    warped, fixed = pair(size, dtype=torch.float32)
    expected = measure(warped, fixed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = measure(warped, fixed)
    assert out.dtype == torch.float32
    assert torch.equal(out, expected)


def test_standardized_channels_have_zero_mean_and_unit_contrast(size, pair):
    image = pair(size, 2, batch=2)[0]
    out, scale = standardize(image)
    axes = tuple(range(2, image.dim()))
    torch.testing.assert_close(out.mean(axes), torch.zeros(2, 2, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(contrast(out).flatten(), torch.ones(4, dtype=torch.float64), rtol=1e-12, atol=0)
    assert scale.shape == (2, 2, *[1] * len(size))
    torch.testing.assert_close(scale.flatten(2)[:, :, 0], contrast(image), rtol=1e-12, atol=0)


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e5])
def test_standardize_leaves_no_mean_of_a_large_offset_in_float32(offset, random_tensor):
    image = random_tensor((1, 1, 24, 24, 24), dtype=torch.float32) + offset
    assert standardize(image)[0].double().mean().abs() < 1e-6


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_standardize_survives_extreme_intensities_in_float32(size, factor, pair):
    image = pair(size, dtype=torch.float32)[0]
    torch.testing.assert_close(standardize(image * factor)[0], standardize(image)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, -4.0, 1234.567])
def test_a_constant_channel_standardizes_to_zero_next_to_one_that_varies(size, value, pair):
    image = pair(size, 2, dtype=torch.float32)[0]
    image[:, 1] = value
    out, scale = standardize(image)
    assert not out[:, 1].any()
    assert torch.isfinite(scale).all()
    assert float(contrast(out)[0, 0].squeeze()) == pytest.approx(1, rel=1e-5)


def test_contrast_is_the_mean_difference_weighted_by_itself(size, pair):
    image = pair(size, 2, batch=2)[0]
    differences = [np.diff(image.numpy(), axis=axis).reshape(2, 2, -1) for axis in range(2, image.dim())]
    d = np.abs(np.concatenate(differences, 2))
    out = contrast(image)
    np.testing.assert_allclose(out.numpy(), (d**2).sum(2) / d.sum(2), rtol=1e-12)


def test_contrast_of_a_step_is_its_height_whatever_lies_around():
    image = torch.zeros(1, 1, 9, 8)
    image[..., 4:] = 3.0
    for padding in (0, 1, 30):
        padded = F.pad(image, [padding, padding, 0, 0], mode="replicate")
        assert float(contrast(padded)) == 3.0
