"""The lines of the documentation that make a field of another package's: run as printed, against known maps."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from monai_lm.fields import resample, warp

PAGE = (Path(__file__).parents[1] / "docs" / "networks.md").read_text()
SIZE = (7, 9, 8)


@pytest.fixture(scope="module")
def printed():
    """The functions of the page, by name."""
    names = {"torch": torch}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        if "def " in block:
            exec(block, names)
    return names


def identity(size):
    return torch.stack(torch.meshgrid(*[torch.arange(s, dtype=torch.float64) for s in size], indexing="ij"))


def test_a_map_of_icons_is_in_units_of_one_voxel_less_than_the_grid_has(printed):
    """On its grid of 175 a shift by .1 is 17.4 voxels; 17.5, by the number of voxels, is .57 % too long."""
    size = (175, 3, 5)
    grid = identity(size) / (torch.tensor(size) - 1).view(3, 1, 1, 1)
    shift = torch.tensor([0.1, 0.5, -0.25], dtype=torch.float64).view(3, 1, 1, 1)
    ddf = printed["from_icon"]((grid + shift)[None])
    expected = torch.tensor([17.4, 1.0, -1.0], dtype=torch.float64).view(1, 3, 1, 1, 1).expand(1, 3, *size)
    torch.testing.assert_close(ddf, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(
        resample(ddf, (349, 5, 9)), 2 * expected[..., :1, :1, :1].expand(1, 3, 349, 5, 9), rtol=0, atol=1e-6
    )


def test_a_map_for_grid_sample_warps_as_grid_sample_does(printed, random_tensor):
    image, noise = random_tensor((1, 1, *SIZE)), 0.2 * random_tensor((1, *SIZE, 3), 1)
    size = torch.tensor(SIZE)
    grid = (identity(SIZE).movedim(0, -1) / (size - 1) * 2 - 1).flip(-1)[None] + noise
    expected = F.grid_sample(image, grid, align_corners=True, padding_mode="border")
    torch.testing.assert_close(warp(image, printed["from_grid_sample"](grid)), expected, rtol=0, atol=1e-9)
