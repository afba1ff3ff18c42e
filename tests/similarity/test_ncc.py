"""Global correlation against numpy."""

import numpy as np
import pytest
import torch

from monai_lm.similarity import NCC


def test_loss_is_one_minus_the_squared_correlation_times_voxels(size, random_tensor):
    warped, fixed = random_tensor((2, 2, *size), 0), random_tensor((2, 2, *size), 1)
    fixed = 50 + 3 * fixed - 2 * warped
    voxels = fixed[0, 0].numel()
    expected = [
        voxels * np.mean([1 - np.corrcoef(i.ravel(), j.ravel())[0, 1] ** 2 for i, j in zip(w, f, strict=True)])
        for w, f in zip(warped.numpy(), fixed.numpy(), strict=True)
    ]
    torch.testing.assert_close(NCC()(warped, fixed), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)


def test_inverted_contrast_is_a_perfect_match(size, random_tensor):
    image = random_tensor((1, 1, *size))
    assert NCC()(10 - 2 * image, image).item() == pytest.approx(0, abs=1e-4 * image.numel())


def test_uncorrelated_images_lose_one_per_voxel():
    row = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    warped, fixed = row.view(1, 1, 4, 1).expand(1, 1, 4, 4), row.view(1, 1, 1, 4).expand(1, 1, 4, 4)
    loss, derivative = NCC().loss_and_derivative(warped, fixed)
    assert loss.item() == pytest.approx(16)
    assert derivative.abs().max() < 1e-12


@pytest.mark.parametrize("epsilon", [0, -1.0, float("nan")])
def test_epsilon_that_is_not_positive_is_refused(epsilon):
    with pytest.raises(ValueError, match=f"epsilon must be positive, got {epsilon}"):
        NCC(epsilon=epsilon)
