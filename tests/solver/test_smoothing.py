"""Regularisers of the residual: the elastic one against its formula, all against the same laws."""

import pytest
import torch

from monai_lm.fields import gaussian_smooth
from monai_lm.solver.smoothing import Elastic
from tests.solver.helpers import noise

EVERY = {"elastic": Elastic(0.8), "elastic, none": Elastic(0.0)}


@pytest.mark.parametrize("shape", [(9, 8), (7, 6, 5)])
@pytest.mark.parametrize("name", EVERY)
def test_every_regulariser_goes_as_far_as_it_is_told(name, shape):
    """Nowhere at a weight of 0; and a pair that does not move keeps the residual from before the step."""
    moved, before = noise(3, len(shape), *shape), noise(3, len(shape), *shape, seed=1)
    given, out = moved.clone(), before.clone()
    EVERY[name].relax(moved, torch.tensor([0.0, -1.0, 1.0], dtype=torch.float64), out)
    assert torch.equal(moved, given)
    torch.testing.assert_close(out[0], moved[0])
    assert torch.equal(out[1], before[1])
    alone = before[2:].clone()
    EVERY[name].relax(moved[2:], torch.ones(1, dtype=torch.float64), alone)
    torch.testing.assert_close(alone, out[2:])


@pytest.mark.parametrize("name", EVERY)
def test_every_regulariser_leaves_a_shift_alone(name):
    shift = torch.ones(1, 2, 9, 8) * torch.tensor([2.0, -3.0]).view(1, 2, 1, 1)
    out = torch.zeros_like(shift)
    EVERY[name].relax(shift, torch.ones(1), out)
    torch.testing.assert_close(out, shift)


def test_the_elastic_one_blends_in_a_gaussian():
    moved, out = noise(1, 3, 9, 8, 7), torch.zeros(1, 3, 9, 8, 7, dtype=torch.float64)
    Elastic(0.8).relax(moved, torch.full((1,), 0.25, dtype=torch.float64), out)
    torch.testing.assert_close(out, 0.75 * moved + 0.25 * gaussian_smooth(moved, 0.8))
