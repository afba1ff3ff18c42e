"""Which memory mode a device gets, and images in half precision."""

import pytest
import torch

from monai_lm.memory import automatic_mode, halved
from monai_lm.similarity import LNCC, MSE, NCC
from tests.gpu.pretend import Pretend


@pytest.mark.parametrize(("channels", "volumes", "mode"), [
    (1, 50, "full"), (1, 48, "low"), (1, 14, "low"), (1, 12, "half"), (3, 78, "full"), (3, 76, "low"), (3, 20, "half"),
])  # fmt: skip
def test_the_free_memory_of_a_gpu_decides(channels, volumes, mode, monkeypatch):
    volume = 4 * 2 * 16**3
    with Pretend():
        image = torch.zeros(2, channels, 16, 16, 16, device="cuda")
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (volumes * volume - 5000, 10**12))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 6000)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 1000)
        assert automatic_mode(image, LNCC()) == mode
        assert automatic_mode(image, NCC()) == "full"


def test_other_devices_get_everything():
    assert automatic_mode(torch.zeros(1, 1, 8, 8), LNCC()) == "full"


@pytest.mark.parametrize("measure", [LNCC(), MSE()], ids=["lncc", "mse"])
def test_halved_images_fit_into_half_precision(measure, random_tensor):
    fixed, moving = (1e6 * random_tensor((1, 1, 9, 8), seed).float() for seed in (0, 1))
    halves = halved(fixed, moving, measure)
    assert all(image.dtype == torch.float16 and bool(image.isfinite().all()) for image in halves)
    for image, half in zip((fixed, moving), halves, strict=True):
        assert torch.corrcoef(torch.stack([image.flatten(), half.float().flatten()]))[0, 1] > 0.999999


def test_half_precision_images_stay_what_they_are():
    image = torch.ones(1, 1, 8, 8, dtype=torch.bfloat16)
    assert halved(image, image, MSE())[0] is image
