"""Rules for keeping steps: each against its definition, all against the same laws."""

import math

import numpy as np
import pytest
import torch

from monai_lm.solver.acceptance import ACCEPTANCES, chance
from monai_lm.solver.trust import Outcome
from tests.solver.helpers import judge, trust_of


def test_descent_accepts_what_did_not_rise_and_keeps_the_loss_otherwise():
    for loss, expected in [(9.0, True), (10.0, True), (10.001, False)]:
        accepted, _, new = judge(trust_of(1.0, loss=10.0), loss, acceptance="descent", chance=0.0)
        assert bool(accepted) == expected
        assert float(new.loss) == (loss if expected else 10.0)


@pytest.mark.parametrize("rise", [0.01, 1.0, 2.0, 10.0])
def test_metropolis_accepts_a_rise_with_the_boltzmann_probability(rise):
    """Probability ``exp(-Δ / T)``, ``T`` the last accepted decrease, which a rise leaves as it is."""
    trust = trust_of(1.0, loss=10.0, memory=2.0)
    probability = math.exp(-rise / 2.0)
    accepted, _, new = judge(trust, 10.0 + rise, acceptance="metropolis", chance=probability - 1e-6)
    assert bool(accepted)
    assert float(new.loss) == 10.0 + rise
    assert float(new.memory) == 2.0
    assert float(new.damping) == 1.5
    rejected, _, new = judge(trust, 10.0 + rise, acceptance="metropolis", chance=probability + 1e-6)
    assert not bool(rejected)
    assert float(new.loss) == 10.0


def test_metropolis_at_the_ends_of_the_chance():
    falls, _, new = judge(trust_of(1.0, loss=10.0, memory=2.0), 9.5, acceptance="metropolis", chance=0.999)
    assert bool(falls)
    assert float(new.memory) == 0.5
    cold = judge(trust_of(1.0, loss=10.0), 10.001, acceptance="metropolis", chance=0.0)  # nothing accepted yet: T = 0
    assert not bool(cold[0])
    assert bool(judge(trust_of(1.0, loss=10.0, memory=2.0), 12.0, acceptance="metropolis", chance=0.0)[0])


LOSSES = torch.tensor([9.0, 10.0, 11.0, math.nan, math.inf, 1e6])


@pytest.mark.parametrize("name", ACCEPTANCES)
def test_a_rule_decides_for_every_pair_alone_and_the_same_way_each_time(name):
    rule, before, memory = ACCEPTANCES[name](3), torch.full((6,), 10.0), torch.full((6,), 2.0)
    accepted, new = rule.accepts(Outcome(LOSSES, before, torch.full((6,), math.nan), 5), memory)
    assert accepted.dtype == torch.bool
    assert bool(accepted[:2].all())  # what does not rise is kept
    for pair in range(6):
        one = slice(pair, pair + 1)
        alone = rule.accepts(Outcome(LOSSES[one], before[one], torch.full((1,), math.nan), 5), memory[one])
        assert torch.equal(alone[0], accepted[one])
        assert torch.equal(alone[1], new[one])


@pytest.mark.parametrize("name", ACCEPTANCES)
def test_a_rule_does_what_it_says_of_itself(name):
    """The engine keeps no residual to return to, and no best one, where a rule says that there is no need."""
    rule = ACCEPTANCES[name](0)
    rises = torch.tensor([10.5, 20.0, math.nan, math.inf])
    kept = torch.zeros(4, dtype=torch.bool)
    for iteration in range(1, 50):
        outcome = Outcome(rises, torch.full((4,), 10.0), torch.full((4,), math.nan), iteration)
        accepted, _ = rule.accepts(outcome, torch.ones(4))
        kept |= accepted
        if not rule.may_reject:
            assert bool(accepted.all())
        else:
            assert not bool(accepted[2:].any())
    if rule.ends_at_best:
        assert not bool(kept.any())


def test_chance_is_a_deterministic_uniform_number():
    numbers = [chance(3, k) for k in range(1000)]
    assert numbers == [chance(3, k) for k in range(1000)]
    assert all(0 <= x < 1 for x in numbers)
    assert len(set(numbers)) == 1000
    assert np.mean(numbers) == pytest.approx(0.5, abs=0.03)
    assert np.std(numbers) == pytest.approx(12**-0.5, abs=0.02)
    assert [chance(4, k) for k in range(10)] != numbers[:10]
