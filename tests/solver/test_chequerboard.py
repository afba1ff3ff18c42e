"""A grid in two colours: all voxels, blocks, what is too small, weights."""

import pytest
import torch

from monai_lm.solver.chequerboard import BLOCK, colours, in_halves


@pytest.mark.parametrize("size", [(24, 30), (13, 12, 25), (40, 8, 24)])
def test_either_half_has_what_the_other_one_has_not(size):
    own = colours(size)
    assert own.shape == (2, 1, *size)
    assert torch.equal(own.sum(0), torch.ones(1, *size))
    blocks = [BLOCK if length >= 2 * BLOCK else length for length in size]
    assert len(own[(0, 0, *[slice(0, block) for block in blocks])].unique()) == 1
    next_one = [slice(0, block) for block in blocks]
    axis = max(range(len(size)), key=lambda k: size[k])
    next_one[axis] = slice(BLOCK, 2 * BLOCK)
    assert float(own[(0, 0, *next_one)].mean()) == 1 - float(own[(0, 0, *[slice(0, b) for b in blocks])].mean())


@pytest.mark.parametrize("size", [(11, 6), (8, 9, 10)])
def test_both_have_all_of_a_grid_that_is_too_small(size):
    assert bool(colours(size).all())


def test_weights_count_in_one_half_and_keep_their_mean():
    fixed = torch.rand(4, 3, 24, 18, generator=torch.Generator().manual_seed(0))
    fixed[1::2, -1, :6, :6] = 0
    halves = in_halves(fixed)
    assert torch.equal(halves[:, :-1], fixed[:, :-1])
    own = colours((24, 18)).repeat_interleave(2, 0)
    assert not bool(halves[:, -1:][own == 0].any())
    assert torch.equal(halves[:, -1:] > 0, (own > 0) & (fixed[:, -1:] > 0))
    torch.testing.assert_close(halves[:, -1].mean((1, 2)), torch.ones(4))


def test_a_pair_that_has_no_weight_in_its_half_keeps_all():
    fixed = torch.ones(2, 2, 24, 24)
    fixed[:, -1] = 24.0 * 24 / 36 * (colours((24, 24))[1, 0] > 0)
    fixed[:, -1, BLOCK:] = 0  # nothing but blocks of one colour
    halves = in_halves(fixed)
    assert torch.equal(halves[0, -1], fixed[0, -1])
    torch.testing.assert_close(halves[1, -1].mean(), torch.tensor(1.0))
