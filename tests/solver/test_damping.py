"""Rules for the damping: each against its formula, all against the same laws."""

import math
from dataclasses import replace

import pytest
import torch

from monai_lm.solver.damping import DAMPINGS
from monai_lm.solver.trust import Outcome
from tests.solver.helpers import judge, trust_of


@pytest.mark.parametrize(("loss", "factor"), [(9.0, 0.975), (10.0, 0.975), (11.0, 1.5)])
def test_simple_control_uses_the_published_factors(loss, factor):
    _, _, new = judge(trust_of(2.0, loss=10.0), loss)
    assert float(new.damping) == pytest.approx(2.0 * factor)
    assert float(new.reference) == 2.0
    assert float(new.loss) == loss


@pytest.mark.parametrize(
    ("gain", "factor"),
    [(0.9, 1 / 1.5), (0.51, 1 / 1.5), (0.49, 1.0), (0.11, 1.0), (0.09, 1.5), (0.0, 1.5), (-3.0, 1.5)],
)
def test_trust_region_control_follows_the_gain_ratio(gain, factor):
    _, ratio, new = judge(trust_of(2.0, loss=10.0, expected=4.0), 10.0 - 4.0 * gain, "trust_region")
    assert float(ratio) == pytest.approx(gain)
    assert float(new.damping) == pytest.approx(2.0 * factor)


@pytest.mark.parametrize("loss", [12.0, math.inf, math.nan])
def test_a_rise_that_was_expected_is_still_a_rise(loss):
    """A smoothed step can go uphill: the expected decrease is negative, and so would be a ratio of two rises."""
    _, _, new = judge(trust_of(2.0, loss=10.0, expected=-2.0), loss, "trust_region")
    assert float(new.damping) == pytest.approx(3.0)


@pytest.mark.parametrize(("loss", "bound"), [(11.0, 1e6), (9.0, 1e-6)])
@pytest.mark.parametrize("control", ["simple", "trust_region"])
def test_damping_stays_within_its_bounds(loss, bound, control):
    trust = trust_of(3.0, loss=10.0, expected=1.0)
    for _ in range(700):
        trust = replace(judge(trust, loss, control)[2], loss=trust.loss)
    assert float(trust.damping) == pytest.approx(3.0 * bound, rel=1e-9)
    assert float(trust.reference) == 3.0


LOSSES = torch.tensor([9.0, 10.0, 11.0, math.nan, math.inf, 9.5])


@pytest.mark.parametrize("name", DAMPINGS)
def test_a_rule_has_no_memory_and_sees_one_pair_at_a_time(name):
    before, expected = torch.full((6,), 10.0), torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, -1.0])
    factor = DAMPINGS[name].factor(Outcome(LOSSES, before, expected, 1))
    assert factor.shape == (6,)
    assert bool((factor.isfinite() & (factor > 0)).all())
    for pair in range(6):
        one = slice(pair, pair + 1)
        alone = DAMPINGS[name].factor(Outcome(LOSSES[one], before[one], expected[one], 2))
        assert torch.equal(alone, factor[one])


@pytest.mark.parametrize("name", DAMPINGS)
def test_no_rule_lowers_the_damping_after_a_rise(name):
    factor = DAMPINGS[name].factor(Outcome(LOSSES[2:5], torch.full((3,), 10.0), torch.full((3,), 1.0), 1))
    assert bool((factor >= 1).all())
