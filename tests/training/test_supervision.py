"""Refined fields as targets, and gradients through them."""

import pytest
import torch

from monai_lm import RegistrationInferer, refine
from monai_lm.fields import gaussian_smooth, warp
from monai_lm.training.supervision import Distillation, implicit, through_refinement


def _images():
    moving = gaussian_smooth(torch.randn(1, 1, 20, 20, generator=torch.Generator().manual_seed(0)), 2.0)
    shift = torch.zeros(1, 2, 20, 20)
    shift[:, 1] = 1.5
    return torch.cat([moving, warp(moving, shift)], 1)


def test_the_implicit_gradient_is_exact_where_the_optimum_is_known():
    # E(u) = Σ (a·u - b)² / 2 + λ/2 |u - u0|², an image of gradient a; u* by the normal equations, and autograd
    generator = torch.Generator().manual_seed(0)
    u0, b = (torch.randn(1, c, 4, 5, generator=generator, dtype=torch.float64) for c in (2, 1))
    u0.requires_grad_()
    target = torch.randn(1, 2, 4, 5, generator=generator, dtype=torch.float64)
    a, damping = torch.tensor([0.7, -1.3], dtype=torch.float64), 0.4
    system = torch.outer(a, a) + damping * torch.eye(2, dtype=torch.float64)
    optimum = torch.einsum("ij,bj...->bi...", torch.linalg.inv(system), a.view(1, 2, 1, 1) * b + damping * u0)
    (expected,) = torch.autograd.grad((optimum - target).square().sum(), u0)
    gradient = a.view(1, 2, 1, 1).expand(1, 2, 4, 5)
    refined = implicit(u0, optimum.detach(), gradient, torch.full((1, 1, 1, 1), damping, dtype=torch.float64))
    torch.testing.assert_close(refined, optimum)
    (got,) = torch.autograd.grad((refined - target).square().sum(), u0)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_through_refinement_is_refinement_forward():
    images = _images()
    inferer = RegistrationInferer("displacement", refine={"scales": (1,), "iterations": 5})
    ddf = torch.zeros(1, 2, 20, 20)
    moving, fixed = images.split(1, 1)
    expected = refine(fixed, moving, ddf, scales=(1,), iterations=5).ddf
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(through_refinement(images, ddf, inferer), expected)


def test_through_refinement_leaves_open_what_the_image_does_not_say():
    images = _images()
    images[:, :, :, 12:] = images[:, :, :, 11:12]  # no slope along the second axis there
    inferer = RegistrationInferer("displacement", refine={"scales": (1,), "iterations": 0})
    ddf = torch.zeros(1, 2, 20, 20, requires_grad=True)
    out = through_refinement(images, ddf, inferer, damping=1e-6)
    (got,) = torch.autograd.grad(out[:, 1].sum(), ddf)
    assert float(got[0, 1, :, 13:].min()) > 0.999
    assert float(got[0, 1, :, 2:9].abs().median()) < 0.9


def test_distillation_refines_every_few_batches_and_learns_from_memory_between():
    calls = []

    class Counting(RegistrationInferer):
        def refined(self, inputs, ddf):
            calls.append(1)
            return super().refined(inputs, ddf)

    inferer = Counting("displacement", refine={"scales": (1,), "iterations": 5})
    network = torch.nn.Conv2d(2, 2, 1)
    torch.nn.init.zeros_(network.weight)
    torch.nn.init.zeros_(network.bias)
    distillation = Distillation(weight=2.0, every=3, capacity=2)
    images = _images()
    for _ in range(7):
        loss = distillation(images, inferer.predict(images, network), inferer, network)
        moving, fixed = images.split(1, 1)
        target = refine(fixed, moving, torch.zeros(1, 2, 20, 20), scales=(1,), iterations=5).ddf
        torch.testing.assert_close(loss, 2 * target.square().sum(1).mean(), rtol=2e-3, atol=0)
        assert float(torch.autograd.grad(loss, network.bias)[0][1]) < 0  # towards the shift
    assert len(calls) == 3
    assert len(distillation.memory) == 2


@pytest.mark.parametrize("arguments", [{"weight": -1}, {"every": 0}, {"capacity": 0}])
def test_distillation_refuses_what_makes_no_sense(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Distillation(**arguments)
