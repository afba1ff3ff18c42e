"""What a level starts from."""

import math

import pytest
import torch
import torch.nn.functional as F

from monai_lm.solver.trust import initial_trust
from tests.solver.helpers import noise, trust_of


def test_initial_damping_is_relative_to_the_typical_gradient():
    gradient = torch.zeros(2, 2, 6, 6, dtype=torch.float64)
    gradient[0, :, 0, 0] = torch.tensor([3.0, 4.0])
    gradient[0, 0, 2, 3] = 1.0
    gradient[1, 1] = 2.0
    loss = torch.tensor([5.0, 7.0], dtype=torch.float64)
    trust = initial_trust(gradient, loss, 0.5)
    typical = [(25 + 1) / (5 + 1), 2.0]  # voxels count as much as their gradient
    assert trust.damping.tolist() == pytest.approx([0.5 * g**2 / 2 for g in typical], rel=1e-12)
    assert torch.equal(trust.reference, trust.damping)
    assert trust.loss.tolist() == [5, 7]
    assert trust.expected.isnan().all()
    assert trust.memory.tolist() == [0, 0]
    assert sorted(trust.state()) == ["damping", "expected", "loss", "memory", "reference"]


@pytest.mark.parametrize("padding", [1, 7, 40])
def test_zero_padding_does_not_change_the_damping(padding):
    gradient = torch.zeros(1, 2, 14, 15)
    gradient[..., 4:10, 5:9] = noise(1, 2, 6, 4, dtype=torch.float32)
    padded = F.pad(gradient, [padding] * 4)
    before, after = (initial_trust(g, torch.zeros(1), 1.0).damping for g in (gradient, padded))
    assert float(after) == pytest.approx(float(before), rel=1e-5)


def test_zero_padding_does_not_change_the_damping_of_a_faint_gradient():
    """Which voxels count as having a gradient may not depend on how many have none."""
    gradient = torch.ones(1, 2, 8, 8)
    gradient[..., :4] *= math.sqrt(0.4e-8)
    padded = F.pad(gradient, [8] * 4)
    before, after = (initial_trust(g, torch.zeros(1), 1.0).damping for g in (gradient, padded))
    assert float(after) == pytest.approx(float(before), rel=1e-4)


def test_pairs_that_stop_move_no_more():
    trust = trust_of(torch.tensor([1.0, 2.0, 3.0]))
    stopped = trust.stopped(torch.tensor([True, False, True]))
    assert stopped.active.tolist() == [True, False, True]
    assert stopped.damping.tolist() == [1, 0, 3]
    assert stopped.length.tolist() == [1, -1, 1]
