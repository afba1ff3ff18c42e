"""Mean squared error: values, derivative and the scale of the intensities."""

import torch

from monai_lm.kernels.reference import ranged
from monai_lm.similarity import MSE


def test_loss_is_the_sum_of_squares_over_voxels_averaged_over_channels(size, random_tensor):
    warped, fixed = random_tensor((2, 3, *size), 0), random_tensor((2, 3, *size), 1)
    loss, derivative = MSE().loss_and_derivative(warped, fixed)
    expected = ((warped - fixed).numpy() ** 2).reshape(2, 3, -1).sum(2).mean(1)
    torch.testing.assert_close(loss, torch.from_numpy(expected), rtol=1e-12, atol=0)
    torch.testing.assert_close(derivative, 2 / 3 * (warped - fixed), rtol=1e-12, atol=0)


def test_equal_images_have_no_loss_and_no_derivative(size, random_tensor):
    image = random_tensor((1, 1, *size))
    loss, derivative = MSE().loss_and_derivative(image, image)
    assert loss.item() == 0
    assert not derivative.any()


def test_loss_of_a_constant_difference(size):
    loss = MSE()(torch.full((1, 2, *size), 5.0), torch.full((1, 2, *size), 2.0))
    assert loss.item() == 9 * torch.Size(size).numel()


def test_prepare_divides_both_images_of_a_pair_by_one_factor(size, random_tensor):
    fixed, moving = random_tensor((2, 1, *size), 0), 100 * random_tensor((2, 1, *size), 1)
    fixed[1] *= 1e4
    (raw, shift, factor, _), scaled = MSE().prepare(fixed, moving)
    reference = ranged(raw, shift, factor)
    largest = torch.tensor([moving[0].abs().max(), fixed[1].abs().max()]).view(2, *[1] * (1 + len(size)))
    torch.testing.assert_close(reference, fixed / largest, rtol=1e-12, atol=0)
    torch.testing.assert_close(scaled, moving / largest, rtol=1e-12, atol=0)


def test_prepare_then_evaluate_gives_the_loss_over_the_square_of_the_factor(size, random_tensor):
    fixed, moving = random_tensor((1, 1, *size), 0), 3 * random_tensor((1, 1, *size), 1)
    reference, scaled = MSE().prepare(fixed, moving)
    loss, _ = MSE().evaluate(scaled, reference)
    factor = torch.maximum(moving.abs().max(), fixed.abs().max())
    torch.testing.assert_close(loss * factor**2, MSE()(moving, fixed), rtol=1e-10, atol=0)


def test_prepare_survives_two_empty_images(size):
    (raw, shift, factor, _), moving = MSE().prepare(torch.zeros(1, 1, *size), torch.zeros(1, 1, *size))
    assert not ranged(raw, shift, factor).any()
    assert not moving.any()


def test_prepare_takes_a_moving_image_on_another_grid(size, random_tensor):
    fixed, moving = random_tensor((1, 1, *size)), 3 * random_tensor((1, 1, *[s + 2 for s in size]))
    (raw, shift, factor, _), scaled = MSE().prepare(fixed, moving)
    reference = ranged(raw, shift, factor)
    assert max(reference.abs().max(), scaled.abs().max()) == 1
    torch.testing.assert_close(reference / scaled.flatten()[0], fixed / moving.flatten()[0], rtol=1e-12, atol=0)
