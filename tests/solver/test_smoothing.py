"""Regularisers of the residual: the elastic one against its formula, all against the same laws."""

import pytest
import torch

from monai_lm.fields import gaussian_smooth
from monai_lm.kernels.reference import bulk_push
from monai_lm.solver.smoothing import Adaptive, Elastic
from tests.solver.helpers import noise


class Halfway(Adaptive):
    """Of any dimensions."""

    def _on_grid(self, size):
        return [torch.full((1, 1, *size), 0.5), torch.zeros(1, 1, *size)]


EVERY = {
    "elastic": Elastic(0.8), "elastic, none": Elastic(0.0),
    "adaptive": Halfway(Elastic(0.6), Elastic(2.4), torch.zeros(1), torch.zeros(1)),
}  # fmt: skip


@pytest.mark.parametrize("shape", [(9, 8), (7, 6, 5)])
@pytest.mark.parametrize("name", EVERY)
def test_every_regulariser_goes_as_far_as_it_is_told(name, shape):
    """Nowhere at a weight of 0; and a pair that does not move keeps the residual from before the step."""
    moved, before = noise(3, len(shape), *shape), noise(3, len(shape), *shape, seed=1)
    given, out = moved.clone(), before.clone()
    EVERY[name].relax(moved, (1.0, 0.5, 0.2)[: len(shape)], torch.tensor([0.0, -1.0, 1.0], dtype=torch.float64), out)
    assert torch.equal(moved, given)
    torch.testing.assert_close(out[0], moved[0])
    assert torch.equal(out[1], before[1])
    alone = before[2:].clone()
    EVERY[name].relax(moved[2:], (1.0, 0.5, 0.2)[: len(shape)], torch.ones(1, dtype=torch.float64), alone)
    torch.testing.assert_close(alone, out[2:])


@pytest.mark.parametrize("name", EVERY)
def test_every_regulariser_leaves_a_shift_alone(name):
    shift = torch.ones(1, 2, 9, 8) * torch.tensor([2.0, -3.0]).view(1, 2, 1, 1)
    out = torch.zeros_like(shift)
    EVERY[name].relax(shift, (1.0, 0.5), torch.ones(1), out)
    torch.testing.assert_close(out, shift)


def test_the_elastic_one_is_its_formula():
    moved, out = noise(1, 3, 9, 8, 7), torch.zeros(1, 3, 9, 8, 7, dtype=torch.float64)
    Elastic(0.8).relax(moved, (1.0, 1.0, 0.0625), torch.full((1,), 0.25, dtype=torch.float64), out)
    pull = (
        gaussian_smooth(moved, (0.8, 0.8, 0.8 * 0.0625**0.15))
        - moved
        + bulk_push(moved, (0.32, 0.32, 0.32 * 0.0625**2))
    )
    torch.testing.assert_close(out, moved + 0.25 * pull)


@pytest.mark.parametrize("along", [True, False])
def test_the_elastic_one_resists_changes_of_volume_twice_as_much_as_shear(along):
    """A slow wave along its own direction, or across it."""
    x = torch.arange(200, dtype=torch.float64)
    wave = torch.sin(2 * torch.pi * x / 40)
    moved = torch.zeros(1, 2, 200, 8, dtype=torch.float64)
    moved[0, 0 if along else 1] = wave[:, None]
    out = torch.zeros_like(moved)
    Elastic(0.6).relax(moved, (1.0, 1.0), torch.ones(1, dtype=torch.float64), out)
    left = (out / moved)[0, 0 if along else 1, 50:150, 4].median()
    expected = 0.5 * 0.36 * (2 * torch.pi / 40) ** 2 * (2 if along else 1)
    assert float(1 - left) == pytest.approx(expected, rel=0.05)


def test_the_adaptive_one_is_soft_here_and_stiff_there_pair_by_pair():
    moved, weight = noise(2, 2, 16, 12), torch.ones(2, dtype=torch.float64)
    share = torch.zeros(2, 1, 8, 6)
    share[0, :, 4:] = 1  # on a coarser grid
    share[1] = 0.25
    soft, stiff, out = (torch.zeros_like(moved) for _ in range(3))
    Elastic(0.6).relax(moved, (1.0, 1.0), weight, soft)
    Elastic(2.4).relax(moved, (1.0, 1.0), weight, stiff)
    adaptive = Adaptive(Elastic(0.6), Elastic(2.4), share, torch.zeros_like(share))
    adaptive.relax(moved, (1.0, 1.0), weight, out)
    torch.testing.assert_close(out[0, :, :7], soft[0, :, :7])
    torch.testing.assert_close(out[0, :, 9:], stiff[0, :, 9:])
    torch.testing.assert_close(out[1], 0.75 * soft[1] + 0.25 * stiff[1])
    fine, expected = torch.zeros(2, 2, 32, 24), torch.zeros(2, 2, 32, 24)
    adaptive.relax(torch.ones_like(fine), (1.0, 1.0), weight, fine)  # of the next level
    Elastic(0.6).relax(torch.ones_like(fine), (1.0, 1.0), weight, expected)
    torch.testing.assert_close(fine, expected)


def test_the_adaptive_one_holds_the_residual_at_zero_where_it_is_told_as_far_as_steps_go():
    moved, still = noise(3, 2, 16, 12), torch.zeros(3, 1, 16, 12)
    still[:, :, 8:] = 1
    before, free = noise(3, 2, 16, 12, seed=1), torch.zeros_like(moved)
    out, weight = before.clone(), torch.tensor([1.0, 0.5, -1.0], dtype=torch.float64)
    Elastic(0.6).relax(moved, (1.0, 1.0), weight, free)
    Adaptive(Elastic(0.6), Elastic(2.4), torch.zeros_like(still), still).relax(moved, (1.0, 1.0), weight, out)
    torch.testing.assert_close(out[:2, :, :8], free[:2, :, :8])
    assert not bool(out[0, :, 8:].any())
    torch.testing.assert_close(out[1, :, 8:], 0.5 * free[1, :, 8:])
    assert torch.equal(out[2], before[2])  # a pair that does not move
