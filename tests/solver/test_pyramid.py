"""Levels: sizes, units, automatic scales and shrunken images."""

import math

import pytest
import torch

from monai_lm.solver import pyramid
from monai_lm.solver.pyramid import Level, make_level, move_field, shrink


def half(image):
    """The image at half resolution."""
    size = image.shape[2:]
    return shrink(image, make_level(size, (1.0,) * len(size), 2))


@pytest.mark.parametrize(
    ("size", "spacing", "scale", "expected"),
    [
        ((64, 64, 64), (1, 1, 1), 4, (16, 16, 16)),
        ((176, 224, 176), (1, 1, 1), 8, (22, 28, 22)),
        ((256, 256), (0.5, 0.5), 2, (128, 128)),
        ((256, 250), (1, 1), 1.5, (172, 168)),  # even, and enough to cover the image
        ((64, 64, 20), (1, 1, 4), 2, (32, 32, 20)),  # slices are thicker than 2 mm: they stay
        ((64, 64, 20), (1, 1, 4), 4, (16, 16, 20)),
        ((64, 64, 20), (1, 1, 4), 8, (8, 8, 10)),  # 8 mm are two slices
        ((20, 64, 64), (3.0, 0.7, 0.7), 2, (20, 32, 32)),
        ((40, 12, 9), (1, 1, 1), 4, (10, 8, 8)),  # no axis is shrunk below 8 voxels
        ((40, 5, 2), (1, 1, 1), 4, (10, 5, 2)),
    ],
)
def test_sizes_of_a_level(size, spacing, scale, expected):
    level = make_level(size, spacing, scale)
    assert level.size == expected
    assert level.scale == scale


@pytest.mark.parametrize("size", [(33, 32), (20, 21, 22)])
def test_scale_one_keeps_the_grid(size):
    level = make_level(size, (2.5,) * len(size), 1)
    assert level == Level(1, size, (1.0,) * len(size), (1.0,) * len(size))


def test_unit_is_one_along_the_finest_axis_and_less_along_coarser_ones():
    level = make_level((64, 64, 20), (1, 1, 4), 1)
    assert level.unit == (1.0, 1.0, 0.25)
    assert level.in_voxels(2) == (2.0, 2.0, 0.5)


def test_unit_uses_the_spacing_of_the_level():
    """An axis that is too short to be shrunk by the whole factor keeps shorter voxels."""
    level = make_level((64, 12, 20), (1, 1, 5), 4)
    assert level.size == (16, 8, 20)
    assert level.factor == (4.0, 1.5, 1.0)
    assert level.unit == pytest.approx([1.5 / 4, 1.0, 1.5 / 5])


@pytest.mark.parametrize("padding", [1, 4, 5, 8])
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_equal_padding_on_both_sides_leaves_the_voxels_of_a_level_where_they_are(scale, padding):
    for length in (31, 32, 33, 34):
        places = []
        for margin in (0, padding):
            level = make_level((length + 2 * margin,), (1.0,), scale)
            assert level.factor == (scale,)
            first = (length - 1) / 2 - (level.size[0] - 1) / 2 * scale
            places.append({first + k * scale for k in range(level.size[0])})
        assert places[0] <= places[1]


@pytest.mark.parametrize("factor", [1e-3, 1000.0])
def test_a_level_does_not_depend_on_the_unit_of_the_spacing(factor):
    expected = make_level((60, 50, 14), (0.8, 0.9, 5.0), 4)
    level = make_level((60, 50, 14), [s * factor for s in (0.8, 0.9, 5.0)], 4)
    assert level.size == expected.size
    assert level.unit == pytest.approx(expected.unit)


@pytest.mark.parametrize("size", [(32, 28), (16, 19, 9)])
def test_shrink_keeps_constants(size):
    out = half(torch.full((2, 1, *size), 7.25))
    torch.testing.assert_close(out, torch.full_like(out, 7.25), rtol=1e-6, atol=0)


def test_shrink_to_the_same_grid_returns_the_same_tensor(size):
    image = torch.rand(1, 1, *size)
    assert shrink(image, make_level(size, (1.0,) * len(size), 1)) is image


@pytest.mark.parametrize("size", [(33, 29), (17, 21, 16)])
def test_shrink_keeps_linear_ramps_away_from_the_edge(size):
    """The centre is shared, so voxel ``i`` of ``n`` lies at ``2 (i - (n - 1) / 2) + (old - 1) / 2``."""
    for axis, old in enumerate(size):
        shape = [-1 if a == axis else 1 for a in range(len(size))]
        ramp = torch.arange(old, dtype=torch.float64).view(1, 1, *shape).expand(1, 1, *size)
        line = half(ramp).movedim(2 + axis, -1)
        new = line.shape[-1]
        line = line.reshape(-1, new)[0]
        expected = 2 * (torch.arange(new, dtype=torch.float64) - (new - 1) / 2) + (old - 1) / 2
        torch.testing.assert_close(line[3:-3], expected[3:-3], rtol=0, atol=1e-9)
        assert (line - expected.clamp(0, old - 1)).abs().max() < 1


def test_shrink_commutes_with_mirrors(size, random_tensor):
    image = random_tensor((1, 2, *[3 * s for s in size]))
    for axis in range(2, image.dim()):
        torch.testing.assert_close(half(image.flip(axis)), half(image).flip(axis), rtol=1e-12, atol=1e-12)


def test_shrink_removes_what_the_coarse_grid_cannot_hold():
    stripes = torch.tensor([1.0, -1.0]).repeat(32).view(1, 1, 64, 1).expand(1, 1, 64, 64)
    assert half(stripes)[:, :, 2:-2].abs().max() < 0.05
    assert shrink(stripes, make_level((64, 64), (1.0, 1.0), 4))[:, :, 2:-2].abs().max() < 1e-3
    slow = torch.sin(torch.arange(64.0) * 2 * math.pi / 32).view(1, 1, 64, 1).expand(1, 1, 64, 64)
    assert half(slow).abs().max() > 0.95


def test_shrink_does_not_smooth_an_axis_that_keeps_its_length(random_tensor):
    image = random_tensor((1, 1, 1, 12)).expand(1, 1, 32, 12)
    out = shrink(image, make_level((32, 12), (1.0, 2.0), 2))
    torch.testing.assert_close(out, image[:, :, :16], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(32, 24), (16, 20, 24)])
def test_a_field_comes_to_another_level_in_its_units(size, monkeypatch):
    """A linear field stays the same motion: ``u(x) = A x`` about the shared centre."""
    fine, coarse = (make_level(size, (1.0,) * len(size), scale) for scale in (1, 2))
    matrix = torch.randn(len(size), len(size), generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def field(level):
        axes = [torch.arange(s, dtype=torch.float64) - (s - 1) / 2 for s in level.size]
        return torch.einsum("ij,j...->i...", matrix, torch.stack(torch.meshgrid(*axes, indexing="ij")))[None]

    down = move_field(field(fine), fine, coarse)
    inner = (..., *[slice(1, -1)] * len(size))  # the border continues outside
    torch.testing.assert_close(down[inner], field(coarse)[inner], rtol=1e-10, atol=1e-10)
    up = move_field(field(coarse), coarse, fine)
    torch.testing.assert_close(up[inner], field(fine)[inner], rtol=1e-10, atol=1e-10)
    out = torch.empty(1, len(size), *fine.size, dtype=torch.float32)
    assert move_field(field(coarse), coarse, fine, out) is out
    torch.testing.assert_close(out, up.float())
    monkeypatch.setattr(pyramid, "_SLAB", 1)  # row by row
    assert torch.equal(move_field(field(coarse), coarse, fine), up)


def test_a_field_of_one_vector_that_shares_memory_comes_to_a_level_of_its_size():
    level = make_level((8, 8), (1, 1), 1)
    shift = torch.tensor([1.5, -2.0]).view(1, 2, 1, 1).expand(1, 2, 8, 8)
    assert torch.equal(move_field(shift, level, level), shift)
