"""Which memory mode a device gets, and images in half precision."""

import pytest
import torch
from torch import nn

from monai_lm import kernels
from monai_lm.similarity import LNCC, MI, MIND, MSE, ModuleSimilarity
from monai_lm.solver import memory
from monai_lm.solver.memory import automatic_mode, halved
from tests.gpu.pretend import Pretend


@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_free_memory_of_a_gpu_decides(channels, triton, monkeypatch):
    volume = 4 * 2 * 16**3
    monkeypatch.setattr(kernels, "missing", lambda _: None if triton else "no Triton")
    one, more = memory._NEED["native" if triton else "reference"]
    with Pretend():
        image = torch.zeros(2, channels, 16, 16, 16, device="cuda")
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 6000)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 1000)
        for change, mode, regularized in ((1, "full", False), (-1, "half", False), (9, "half", True)):
            free = (one + more * (channels - 1) + change) * volume - 5000
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 10**12))
            assert automatic_mode(image, regularized=regularized) == mode


def test_other_devices_get_everything():
    assert automatic_mode(torch.zeros(1, 1, 8, 8)) == "full"


@pytest.mark.parametrize("measure", [LNCC(), MSE()], ids=["lncc", "mse"])
def test_halved_images_fit_into_half_precision(measure, random_tensor):
    fixed, moving = (1e6 * random_tensor((1, 1, 9, 8), seed).float() for seed in (0, 1))
    halves = halved(fixed, moving, [measure])
    assert all(image.dtype == torch.float16 and bool(image.isfinite().all()) for image in halves)
    for image, half in zip((fixed, moving), halves, strict=True):
        assert torch.corrcoef(torch.stack([image.flatten(), half.float().flatten()]))[0, 1] > 0.999999


def test_images_are_scaled_for_the_level_that_minds_most(random_tensor):
    """Others see the same whatever the scale; a module sees what it was given."""
    fixed, moving = (1e3 * random_tensor((1, 1, 9, 8), seed).float() for seed in (0, 1))
    alone = halved(fixed, moving, [MSE()])
    mixed = ([MSE(), LNCC()], [LNCC(), MSE()], [MIND(), MSE(), MI()])
    assert all(torch.equal(halved(fixed, moving, measures)[0], alone[0]) for measures in mixed)
    assert torch.equal(halved(fixed, moving, [LNCC(), ModuleSimilarity(nn.MSELoss()), MSE()])[0], fixed.half())
    assert not torch.equal(halved(fixed, moving, [LNCC()])[0], alone[0])


def test_half_precision_images_stay_what_they_are():
    image = torch.ones(1, 1, 8, 8, dtype=torch.bfloat16)
    assert halved(image, image, [MSE()])[0] is image
