"""Mutual information against loops over voxels and bins, and what makes it fit for images of different contrast."""

import itertools

import numpy as np
import pytest
import torch

from monai_lm import kernels
from monai_lm.kernels import cpu, reference
from monai_lm.similarity import MI


def spline(x):
    """Cubic B-spline."""
    x = abs(x)
    return (4 - 6 * x**2 + 3 * x**3) / 6 if x < 1 else (2 - x) ** 3 / 6 if x < 2 else 0.0


def looped(warped, fixed, bins):
    """``1 - MI / (H - h)`` of two arrays, by its definition."""
    i, j = ((image - image.min()) / np.ptp(image) for image in (warped.ravel(), fixed.ravel()))
    joint = np.zeros((bins, bins))
    for (a, b), row, column in itertools.product(zip(i, j, strict=True), range(bins), range(bins)):
        joint[row, column] += max(0.0, 1 - abs((bins - 1) * b - row)) * spline((bins - 4) * a + 1.5 - column)
    p = joint / joint.sum()
    of_fixed, of_warped = p.sum(1, keepdims=True), p.sum(0, keepdims=True)
    seen = p > 0
    shared = (p[seen] * np.log(p[seen] / (of_fixed * of_warped)[seen])).sum()
    own = -(of_warped[of_warped > 0] * np.log(of_warped[of_warped > 0])).sum()
    return 1 - shared / (own - 0.86635)


@pytest.mark.parametrize("bins", [8, 32])
def test_loss_is_that_of_the_joint_histogram(size, bins, random_tensor):
    warped, fixed = random_tensor((2, 2, *size), 0), random_tensor((2, 2, *size), 1)
    expected = [
        np.mean([looped(w, f, bins) for w, f in zip(*images, strict=True)]) * fixed[0, 0].numel()
        for images in zip(warped.numpy(), fixed.numpy(), strict=True)
    ]
    torch.testing.assert_close(MI(bins)(warped, fixed), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("remap", [lambda x: 9 - 2 * x, lambda x: x.exp(), lambda x: (x - 0.3).abs()])
def test_a_map_of_intensities_is_told_from_noise(remap, smooth_image):
    fixed, noise = smooth_image((1, 1, 40, 41), 2.0, 0), smooth_image((1, 1, 40, 41), 2.0, 1)
    same, close, far = (MI(32)(image, fixed) for image in (remap(fixed), remap(0.9 * fixed + 0.1 * noise), noise))
    assert same < close - 0.05 * fixed.numel()
    assert close < far - 0.1 * fixed.numel()


def test_intensities_beyond_the_range_are_clamped_and_have_no_derivative(size, random_tensor):
    fixed, warped = random_tensor((1, 1, *size), 0), random_tensor((1, 1, *size), 1)
    reference_, moving = MI().prepare(fixed, warped)
    outside = torch.rand(moving.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    moving[outside] = torch.where(moving[outside] > 0.5, 1.1, -0.1).double()
    loss, derivative = MI().evaluate(moving, reference_)
    assert not derivative[outside].any()
    assert derivative[~outside].any()
    further = torch.where(outside, 3 * moving - 1, moving)
    torch.testing.assert_close(MI().evaluate(further, reference_)[0], loss, rtol=1e-12, atol=0)
    further[0, 0, 0, 0] = float("nan")
    assert MI().evaluate(further, reference_)[0].isfinite()


def test_a_constant_image_has_no_derivative_in_any_implementation(random_tensor):
    image = random_tensor((1, 1, 30, 31), 0, torch.float32)
    for images in ((image, torch.full_like(image, 3.3)), (torch.full_like(image, 3.3), image)):
        for choice in ("auto", "reference"):
            with kernels.using(choice):
                held, moving = MI().prepare(images[1], images[0])
                loss, derivative = MI().evaluate(moving, held)
            assert loss.item() == pytest.approx(image.numel(), rel=1e-6)
            assert not derivative.any()


def test_a_weight_of_zero_everywhere_is_a_loss_of_zero(size, random_tensor):
    image, nothing = random_tensor((1, 1, *size), dtype=torch.float32), torch.zeros(1, 1, *size)
    for module in (cpu, reference):
        out = torch.empty_like(image)
        assert module.mi(image, image, None, None, nothing, 32, out).item() == 0
        assert not out.any()


def test_slabs_change_nothing(monkeypatch, random_tensor):
    images = [random_tensor((2, 1, 9, 8, 7), seed).abs() for seed in (0, 1)]
    whole, cut = torch.empty(2, 1, 9, 8, 7).double(), torch.empty(2, 1, 9, 8, 7).double()
    loss = reference.mi(*images, None, None, None, 16, whole)
    monkeypatch.setattr(reference, "_SLAB", 300)
    torch.testing.assert_close(reference.mi(*images, None, None, None, 16, cut), loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(cut, whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bins", [7, 257, 0, 16.0, True, None])
def test_bins_that_cannot_be_are_refused(bins):
    with pytest.raises(ValueError, match=f"bins must be a whole number from 8 to 256, got {bins}"):
        MI(bins)
