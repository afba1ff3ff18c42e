"""Gaussian and box filters against loops and their laws."""

import itertools
import math

import numpy as np
import pytest
import torch

from monai_lm.fields import gaussian_smooth
from monai_lm.kernels.reference import box_sum, gaussian_taps, inverse_window_counts


def clamped(image, index):
    return image[tuple(min(max(i, 0), s - 1) for i, s in zip(index, image.shape, strict=True))]


def smooth_by_loops(image, sigmas):
    """Convolution with the product of sampled Gaussians, cut at three sigma, all axes at once."""
    radii = [math.ceil(3 * s) for s in sigmas]
    offsets = list(itertools.product(*[range(-r, r + 1) for r in radii]))
    weights = [math.exp(-0.5 * sum((o / s) ** 2 for o, s in zip(offset, sigmas, strict=True))) for offset in offsets]
    out = np.zeros_like(image)
    for x in np.ndindex(*image.shape):
        values = [clamped(image, np.add(x, offset)) for offset in offsets]
        out[x] = np.dot(weights, values) / sum(weights)
    return out


def box_by_loops(image, radius):
    out = np.zeros_like(image)
    for x in np.ndindex(*image.shape):
        out[x] = image[tuple(slice(max(i - radius, 0), i + radius + 1) for i in x)].sum()
    return out


def axis_sigmas(sigma, axis, n):
    return [sigma if a == axis else 0.0 for a in range(n)]


@pytest.mark.parametrize("sigma", [0.4, 1.0, 2.7])
def test_taps_are_a_normalised_gaussian(sigma):
    taps = gaussian_taps(sigma)
    assert len(taps) == math.ceil(3 * sigma) + 1
    assert taps[0] + 2 * sum(taps[1:]) == pytest.approx(1, abs=1e-14)
    assert [t / taps[0] for t in taps] == pytest.approx([math.exp(-(k**2) / (2 * sigma**2)) for k in range(len(taps))])


def test_taps_of_sigma_zero():
    assert gaussian_taps(0) == (1.0,)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("sigma", [0.5, 1.0, 4.0])
def test_constants_are_preserved(size, dtype, tolerance, sigma):
    constant = torch.full((1, 2, *size), 123.4, dtype=dtype)
    torch.testing.assert_close(gaussian_smooth(constant, sigma), constant, rtol=tolerance, atol=0)


def test_gaussian_equals_loops(size, random_tensor):
    image = random_tensor((2, 1, *size))
    sigmas = [0.5, 0.9, 0.6][: len(size)]
    expected = np.stack([smooth_by_loops(pair[0].numpy(), sigmas)[None] for pair in image])
    torch.testing.assert_close(gaussian_smooth(image, sigmas), torch.from_numpy(expected), rtol=1e-12, atol=1e-12)


def test_sigma_zero_returns_the_input_unchanged(size, random_tensor):
    image = random_tensor((1, 1, *size), dtype=torch.float32)
    assert torch.equal(gaussian_smooth(image, 0.0), image)
    assert torch.equal(gaussian_smooth(image, 0), image)
    assert torch.equal(gaussian_smooth(image, [0.0] * len(size)), image)


def test_the_input_is_left_alone(size, random_tensor):
    image = random_tensor((1, 1, *size))
    copy = image.clone()
    gaussian_smooth(image, 1.0)
    assert torch.equal(image, copy)


def test_sigma_per_axis_equals_one_axis_after_the_other(size, random_tensor):
    image, sigmas = random_tensor((1, 2, *size)), [0.7, 1.5, 2.0][: len(size)]
    sequential = image
    for axis in reversed(range(len(size))):
        sequential = gaussian_smooth(sequential, axis_sigmas(sigmas[axis], axis, len(size)))
    torch.testing.assert_close(gaussian_smooth(image, sigmas), sequential, rtol=1e-12, atol=1e-12)


def test_one_sigma_means_the_same_for_all_axes(size, random_tensor):
    image = random_tensor((1, 1, *size))
    assert torch.equal(gaussian_smooth(image, 1.2), gaussian_smooth(image, [1.2] * len(size)))


def test_an_axis_with_sigma_zero_is_not_mixed(size, random_tensor):
    image = random_tensor((1, 1, *size))
    for axis in range(len(size)):
        smoothed = gaussian_smooth(image, axis_sigmas(1.0, axis, len(size)))
        kept = gaussian_smooth(image.narrow(2 + (axis + 1) % len(size), 1, 1), axis_sigmas(1.0, axis, len(size)))
        torch.testing.assert_close(smoothed.narrow(2 + (axis + 1) % len(size), 1, 1), kept, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("sigma", "tolerance"), [(0.5, 0.15), (1.0, 0.03), (1.5, 0.04), (3.0, 0.04)])
@pytest.mark.parametrize("n", [2, 3])
def test_variance_of_the_impulse_response_is_sigma_squared(n, sigma, tolerance):
    for axis in range(n):
        impulse = torch.zeros(1, 1, *[41 if a == axis else 3 for a in range(n)], dtype=torch.float64)
        impulse[(0, 0, *[20 if a == axis else 1 for a in range(n)])] = 1
        response = gaussian_smooth(impulse, axis_sigmas(sigma, axis, n)).movedim(2 + axis, -1).reshape(-1, 41).sum(0)
        distance = torch.arange(41, dtype=torch.float64) - 20
        assert response.sum() == pytest.approx(1)
        assert (response * distance).sum() == pytest.approx(0, abs=1e-12)
        assert (response * distance**2).sum() == pytest.approx(sigma**2, rel=tolerance)


def test_gaussian_is_equivariant_to_flips(size, random_tensor):
    image = random_tensor((1, 1, *size))
    for dim in range(2, 2 + len(size)):
        flipped = gaussian_smooth(image.flip(dim), 1.0).flip(dim)
        torch.testing.assert_close(flipped, gaussian_smooth(image, 1.0), rtol=1e-12, atol=1e-12)


def test_gradcheck_of_gaussian(size, random_tensor):
    image = random_tensor((1, 1, *size)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gaussian_smooth(x, 0.8), (image,))


@pytest.mark.parametrize("radius", [0, 1, 2, 7])
def test_box_sum_equals_loops(size, radius, random_tensor):
    image = random_tensor((2, 1, *size))
    expected = np.stack([box_by_loops(pair[0].numpy(), radius)[None] for pair in image])
    torch.testing.assert_close(box_sum(image, radius), torch.from_numpy(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("radius", [1, 3])
def test_box_sum_is_its_own_adjoint(size, radius, random_tensor):
    a, b = (random_tensor((1, 2, *size), seed) for seed in (0, 1))
    left, right = (box_sum(a, radius) * b).sum(), (a * box_sum(b, radius)).sum()
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("radius", [1, 2, 7])
def test_inverse_window_counts_are_one_over_the_box_sum_of_ones(size, radius):
    ones = torch.ones(2, 3, *size, dtype=torch.float64)
    counts = inverse_window_counts(ones, radius)
    assert counts.shape == (1, 1, *size)
    assert counts.dtype == torch.float64
    torch.testing.assert_close((counts * box_sum(ones, radius)), ones, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("shape", "sigma", "message"),
    [
        ((1, 1, 8, 8, 8, 8), 1.0, "x must be"),
        ((1, 1, 8), 1.0, "x must be"),
        ((1, 1, 8, 8), -1.0, "sigma must be at least 0"),
        ((1, 1, 8, 8), (1.0, float("nan")), "sigma must be at least 0"),
    ],
)
def test_what_cannot_be_smoothed_is_refused(shape, sigma, message):
    with pytest.raises(ValueError, match=message):
        gaussian_smooth(torch.zeros(shape), sigma)
