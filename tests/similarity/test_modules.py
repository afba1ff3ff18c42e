"""Loss modules as measures: agreement with the closed form, conventions, contexts and errors."""

import contextlib

import pytest
import torch
from monai.losses import GlobalMutualInformationLoss, LocalNormalizedCrossCorrelationLoss
from torch import nn

from monai_lm.similarity import MSE, ModuleSimilarity

CONTEXTS = pytest.mark.parametrize(
    "context",
    [
        contextlib.nullcontext,
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    ],
    ids=["plain", "no_grad", "inference_mode", "autocast"],
)


class Loss(nn.Module):
    """A loss module made of a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, warped, fixed):
        return self.function(warped, fixed)


class WeightedFixed(nn.Module):
    """A loss that has a gradient, but none in the warped image."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, warped, fixed):
        return (self.weight * fixed).sum() + 0 * warped.detach().sum()


@pytest.fixture
def pair(random_tensor, size):
    def make(channels=1, batch=2, dtype=torch.float64):
        return tuple(random_tensor((batch, channels, *size), seed, dtype) for seed in (0, 1))

    return make


@pytest.mark.parametrize(("reduction", "channels"), [("mean", 1), ("mean", 2), ("sum", 1), ("none", 1)])
def test_mse_module_agrees_with_mse(pair, reduction, channels):
    warped, fixed = pair(channels)
    loss, derivative = ModuleSimilarity(nn.MSELoss(reduction=reduction)).loss_and_derivative(warped, fixed)
    expected_loss, expected = MSE().loss_and_derivative(warped, fixed)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(derivative, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_sums_are_taken_as_they_are(pair, reduction):
    warped, fixed = pair(channels=3)
    loss = ModuleSimilarity(nn.MSELoss(reduction=reduction)).loss_and_derivative(warped, fixed)[0]
    torch.testing.assert_close(loss, 3 * MSE()(warped, fixed), rtol=1e-12, atol=0)


@pytest.mark.parametrize("build", ["lncc", "mi"])
def test_averaging_monai_losses_are_multiplied_by_the_number_of_voxels(pair, size, build):
    warped, fixed = pair(dtype=torch.float32)
    if build == "lncc":
        module = LocalNormalizedCrossCorrelationLoss(spatial_dims=len(size), kernel_size=3)
    else:
        module = GlobalMutualInformationLoss(num_bins=5)
        warped, fixed = warped.sigmoid(), fixed.sigmoid()
    loss, derivative = ModuleSimilarity(module).loss_and_derivative(warped, fixed)
    voxels = fixed[0, 0].numel()
    for b in range(2):
        leaf = warped[b : b + 1].clone().requires_grad_()
        expected = module(leaf, fixed[b : b + 1]) * voxels
        expected.backward()
        torch.testing.assert_close(loss[b], expected.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(derivative[b : b + 1], leaf.grad, rtol=1e-5, atol=1e-6)


def test_a_pair_does_not_depend_on_its_batch(pair):
    """The module normalises over everything it is given, so pairs must be passed one by one."""
    module = ModuleSimilarity(Loss(lambda w, f: ((w - f) ** 2).mean() / w.var()))
    warped, fixed = pair(batch=3)
    losses, derivatives = module.loss_and_derivative(warped, fixed)
    loss, derivative = module.loss_and_derivative(warped[1:2], fixed[1:2])
    assert torch.equal(losses[1:2], loss)
    assert torch.equal(derivatives[1:2], derivative)
    assert losses.shape == (3,)


@CONTEXTS
def test_works_in_every_context(pair, context, size):
    weight = torch.ones(1, 1, *[3] * len(size))
    convolve = nn.functional.conv2d if len(size) == 2 else nn.functional.conv3d
    measure = ModuleSimilarity(Loss(lambda w, f: convolve(w - f, weight).square().sum().view(1, 1).expand(2, 1) / 2))
    warped, fixed = pair(dtype=torch.float32)
    expected_loss, expected = measure.loss_and_derivative(warped, fixed)
    with context():
        made_here = warped * 1.0, fixed * 1.0
        loss, derivative = measure.loss_and_derivative(*made_here)
    assert loss.dtype == derivative.dtype == torch.float32
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(derivative, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_mode_of_the_caller_is_restored(pair, mode):
    with mode():
        ModuleSimilarity(nn.MSELoss()).loss_and_derivative(*pair())
        assert not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)


def test_calling_the_measure_hands_the_derivative_to_autograd(pair):
    warped, fixed = pair()
    leaf = warped.clone().requires_grad_()
    ModuleSimilarity(nn.MSELoss())(leaf, fixed).sum().backward()
    torch.testing.assert_close(leaf.grad, 2 * (warped - fixed), rtol=1e-12, atol=1e-15)


def test_images_are_not_changed_by_a_module_that_writes_in_place(pair):
    warped, fixed = pair()
    copies = warped.clone(), fixed.clone()
    ModuleSimilarity(Loss(lambda w, f: (w - f.mul_(2)).square().mean())).loss_and_derivative(warped, fixed)
    assert torch.equal(warped, copies[0])
    assert torch.equal(fixed, copies[1])


def test_a_derivative_that_is_not_finite_counts_as_zero(pair):
    warped, fixed = pair()
    warped.flatten()[:3] = fixed.flatten()[:3]
    measure = ModuleSimilarity(Loss(lambda w, f: (w - f).square().sqrt().mean()))
    loss, derivative = measure.loss_and_derivative(warped, fixed)
    assert torch.isfinite(loss).all()
    assert not derivative.flatten()[:3].any()
    torch.testing.assert_close(derivative.flatten()[3:], (warped - fixed).sign().flatten()[3:], rtol=1e-12, atol=0)


def test_module_gets_no_gradients(pair):
    module = WeightedFixed()
    measure = ModuleSimilarity(Loss(lambda w, f: (module.weight * w - f).square().mean()))
    measure.loss_and_derivative(*pair(dtype=torch.float32))
    assert module.weight.grad is None


@pytest.mark.parametrize(
    ("module", "name"),
    [(Loss(lambda _, f: f.sum()), "Loss"), (Loss(lambda w, f: (w.detach() - f).sum()), "Loss")],
    ids=["ignores", "detaches"],
)
def test_a_loss_that_does_not_depend_on_the_warped_image_is_refused(pair, module, name):
    message = f"similarity must be differentiable: the loss that {name} returned does not depend on the warped image"
    with pytest.raises(ValueError, match=message):
        ModuleSimilarity(module).loss_and_derivative(*pair())


def test_a_loss_that_depends_only_on_the_parameters_of_the_module_is_refused(pair):
    with pytest.raises(ValueError, match="does not depend on the warped image"):
        ModuleSimilarity(WeightedFixed()).loss_and_derivative(*pair(dtype=torch.float32))


@pytest.mark.parametrize("value", [1.0, (torch.ones(()), torch.ones(()))], ids=["float", "tuple"])
def test_a_loss_that_is_no_tensor_is_refused(pair, value):
    with pytest.raises((TypeError, ValueError), match=r"similarity must .*(float|tuple)"):
        ModuleSimilarity(Loss(lambda *_: value)).loss_and_derivative(*pair())
