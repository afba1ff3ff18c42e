"""Guidance on a device: as on the CPU, and refused where it is on another one."""

import pytest
import torch

from monai_lm import refine
from monai_lm.guidance import Keypoints, Labels
from tests.solver.pairs import pair

SETTINGS = {"scales": (2, 1), "iterations": (4, 3), "tolerance": 0.0}


def problem(device):
    fixed, moving, ddf = (x.to(device) for x in pair((17, 16, 14), batch=2))
    points = (2 + torch.rand(2, 6, 3, generator=torch.Generator().manual_seed(0)) * 10).to(device)
    labels = [(image > 0.5).int() for image in (fixed, moving)]
    return fixed, moving, 0.5 * ddf, [Labels(*labels), Keypoints(points, points + 2)]


def test_guidance_stays_on_the_device(any_device):
    fixed, moving, ddf, guides = problem(any_device)
    result = refine(fixed, moving, ddf, guidance=guides, **SETTINGS)
    assert result.ddf.device == fixed.device
    fixed, moving, ddf, guides = problem("cpu")
    expected = refine(fixed, moving, ddf, guidance=guides, **SETTINGS)
    torch.testing.assert_close(result.ddf.cpu(), expected.ddf, rtol=0, atol=1e-3)


@pytest.mark.parametrize("which", [0, 1])
def test_guidance_of_another_device_is_refused(any_device, which):
    fixed, moving, ddf, _ = problem(any_device)
    guides = problem("cpu")[3]
    with pytest.raises(ValueError, match="guidance must be on the device of fixed"):
        refine(fixed, moving, ddf, guidance=guides[which], **SETTINGS)


def test_lesions_are_followed_around_on_the_device_as_on_the_cpu(any_device):
    results = []
    for device in (any_device, "cpu"):
        fixed, moving, ddf, _ = problem(device)
        lesion = torch.zeros_like(fixed)
        lesion[:1, :, 5:10, 5:10, 4:9] = 1
        results.append(refine(fixed, moving, ddf, lesion=lesion, moving_lesion=lesion.flip(2), **SETTINGS).ddf)
    torch.testing.assert_close(results[0].cpu(), results[1], rtol=0, atol=1e-3)
