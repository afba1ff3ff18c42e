"""Metrics of fields against brute force and known maps."""

import numpy as np
import pytest
import torch

from monai_lm.metrics import sd_log_jacobian, target_registration_error


def test_sd_log_jacobian_is_that_of_a_known_map():
    x = torch.arange(12, dtype=torch.float64)
    stretch = torch.where(x < 6, 0.0, 0.5 * (x - 6) ** 2 / 6)  # determinant 1 + (x - 6) / 6 inside the right half
    ddf = torch.zeros(1, 2, 12, 5, dtype=torch.float64)
    ddf[0, 0] = stretch[:, None]
    determinant = 1 + np.gradient(stretch.numpy())
    expected = np.log(np.repeat(determinant, 5)).std()
    assert float(sd_log_jacobian(ddf)) == pytest.approx(expected, rel=1e-6)


def test_sd_log_jacobian_vanishes_for_uniform_scaling_and_is_finite_for_folds():
    x = torch.arange(8.0)
    scaled = torch.stack([0.3 * x[:, None].expand(8, 8), 0.1 * x[None].expand(8, 8)])
    folded = -2 * scaled / 0.3
    values = sd_log_jacobian(torch.stack([scaled, folded]))
    assert float(values[0]) == pytest.approx(0, abs=1e-5)
    assert torch.isfinite(values).all()


def test_target_registration_error_is_a_distance_in_millimetres():
    ddf = torch.zeros(1, 3, 6, 7, 8)
    ddf[:, 0], ddf[:, 2] = 1.0, torch.arange(6.0).view(6, 1, 1)  # the shift along z grows with x
    fixed = torch.tensor([[[2.5, 3.0, 4.0], [float("nan"), 0, 0], [0.0, 0.0, 0.0]]])
    moving = torch.tensor([[[3.5, 3.0, 5.5], [1.0, 1.0, 1.0], [1.0, 2.0, 0.0]]])
    error = target_registration_error(ddf, fixed, moving, torch.tensor([[1.0, 1.5, 2.0]]))
    assert error[0, 0].item() == pytest.approx(2.0 * 1.0)  # 4 + 2.5 = 6.5 against 5.5, voxels of 2 mm
    assert error[0, 1].isnan()
    assert error[0, 2].item() == pytest.approx(3.0)
