"""A weighted sum of measures on groups of channels."""

import pytest
import torch
from torch import Tensor

from monai_lm import refine
from monai_lm.fields import gaussian_smooth, warp
from monai_lm.kernels.reference import ranged
from monai_lm.similarity import LNCC, MSE, NCC, Combined


def images(channels: int, batch: int = 2, seed: int = 0, shape: tuple[int, ...] = (9, 11)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return gaussian_smooth(torch.randn(batch, channels, *shape, generator=generator, dtype=torch.float64), 1.0)


def test_loss_and_derivative_are_the_weighted_ones_of_the_parts():
    warped, fixed = images(3, seed=1), images(3, seed=2)
    combined = Combined([LNCC(2), MSE()], [1, 2], [0.5, 3.0])
    loss, derivative = combined.loss_and_derivative(warped, fixed)
    first, first_derivative = LNCC(2).loss_and_derivative(warped[:, :1], fixed[:, :1])
    second, second_derivative = MSE().loss_and_derivative(warped[:, 1:], fixed[:, 1:])
    torch.testing.assert_close(loss, 0.5 * first + 3 * second)
    torch.testing.assert_close(derivative, torch.cat([0.5 * first_derivative, 3 * second_derivative], 1))


def test_derivative_is_that_of_the_loss():
    warped, fixed = images(2, batch=1, seed=1, shape=(6, 7)).requires_grad_(), images(2, batch=1, seed=2, shape=(6, 7))
    combined = Combined([LNCC(1), NCC()], [1, 1], [2.0, 0.5])
    assert torch.autograd.gradcheck(lambda w: combined(w, fixed), warped)


def test_prepared_evaluation_equals_that_of_the_prepared_parts():
    warped, fixed = images(3, seed=1), images(3, seed=2)
    combined = Combined([LNCC(2), MSE()], [2, 1])
    reference, moving = combined.prepare(fixed, warped)
    lncc_reference, lncc_moving = LNCC(2).prepare(fixed[:, :2], warped[:, :2])
    mse_reference, mse_moving = MSE().prepare(fixed[:, 2:], warped[:, 2:])
    assert torch.equal(moving, torch.cat([lncc_moving, mse_moving], 1))
    loss, derivative = combined.evaluate(moving, reference)
    parts = [LNCC(2).evaluate(lncc_moving, lncc_reference), MSE().evaluate(mse_moving, mse_reference)]
    torch.testing.assert_close(loss, parts[0][0] + parts[1][0])
    torch.testing.assert_close(derivative, torch.cat([parts[0][1], parts[1][1]], 1))


def test_refinement_follows_the_channel_with_the_weight():
    """Two channels that ask for opposite shifts: the heavier one wins."""
    moving = images(1, batch=1, seed=3, shape=(24, 26)).float()
    shift = torch.zeros(1, 2, 24, 26)
    shift[:, 0] = 1.0
    fixed = torch.cat([warp(moving, shift), warp(moving, -shift)], 1)
    both = torch.cat([moving, moving], 1)
    for weights, expected in (((100.0, 1.0), 1.0), ((1.0, 100.0), -1.0)):
        measure = Combined([MSE(), MSE()], [1, 1], weights)
        ddf = refine(fixed, both, similarity=measure, scales=(2, 1)).ddf
        assert abs(float(ddf[0, 0, 5:-5, 5:-5].mean()) - expected) < 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], []), "one length, not 0, got 0, 0 and 0"),
        (([MSE()], [1, 1]), "one length, not 0, got 1, 2 and 1"),
        (([MSE()], [0]), r"channels must be whole numbers of at least 1, got \[0\]"),
        (([MSE()], [True]), r"channels must be whole numbers of at least 1, got \[True\]"),
        (([MSE()], [1], [0.0]), "weights must be greater than 0, got 0.0"),
        (([MSE()], [1], [float("nan")]), "weights must be greater than 0, got nan"),
        (([MSE()], [1], [float("inf")]), "weights must be finite and greater than 0, got inf"),
        ((["ssim"], [1]), "similarity must be one of"),
    ],
)
def test_parts_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        Combined(*arguments)


def test_images_with_other_channels():
    measure = Combined([LNCC(), MSE()], [1, 2])
    with pytest.raises(ValueError, match=r"images must have 3 channels for \[1, 2\] per measure, got 2"):
        measure(images(2), images(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lncc", [1]), "measures must be a list, got 'lncc'"),
        (([MSE()], 1), "channels must be a list, got 1"),
        (([MSE], [1]), "similarity must be a name, a Similarity or a torch.nn.Module, got ABCMeta"),
        (([MSE()], [1], ["1"]), "weights must be a number, got str"),
    ],
)
def test_parts_of_the_wrong_type(arguments, message):
    with pytest.raises(TypeError, match=message):
        Combined(*arguments)


def test_names_and_modules_are_measures():
    warped, fixed = images(2, seed=1), images(2, seed=2)
    combined = Combined(["mse", torch.nn.MSELoss()], [1, 1])
    reference, moving = combined.prepare(fixed, warped)
    loss, derivative = combined.evaluate(moving, reference)
    parts = [
        MSE().loss_and_derivative(moving[:, i : i + 1], ranged(*reference[i][:3]) if i == 0 else reference[i][0])
        for i in (0, 1)
    ]
    torch.testing.assert_close(loss, parts[0][0] + parts[1][0])
    torch.testing.assert_close(derivative, torch.cat([parts[0][1], parts[1][1]], 1))
