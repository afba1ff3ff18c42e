"""The parts together: what is judged, and what follows for the damping and the motion."""

import inspect
import math
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

import monai_lm
from monai_lm.fields import compose, gaussian_smooth, warp
from monai_lm.kernels.reference import eulerian_gradient
from monai_lm.similarity import MSE
from monai_lm.similarity.lookup import MEASURES
from monai_lm.solver.acceptance import ACCEPTANCES, Always
from monai_lm.solver.damping import DAMPINGS, Simple, TrustRegion
from monai_lm.solver.descent import DESCENTS, LM, WindowedLM, expected_decrease
from monai_lm.solver.method import Method, make_method
from monai_lm.solver.smoothing import Elastic
from monai_lm.solver.trust import Trust, initial_trust
from tests.solver.helpers import advance, direction, interior_bump, judge, length, noise, trust_of, waves


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize(("control", "acceptance"), list(product(("simple", "trust_region"), ACCEPTANCES)))
def test_repeated_rejection_ends_the_motion(control, acceptance, window):
    """The step and the whole change of the map, the elastic smoothing included, go to zero."""
    gradient = noise(1, 2, 16, 15)
    residual = gaussian_smooth(noise(1, 2, 16, 15, seed=1), 1.5)
    trust = initial_trust(gradient, torch.ones(1, dtype=torch.float64), 1.0)
    longest, change = [], []
    for k in range(60):
        v = direction(gradient, trust, 0.5, window)
        longest.append(float(length(v).max()))
        change.append(float((advance(residual, v, trust, 0.5) - residual).abs().max()))
        trust = replace(trust, expected=expected_decrease(gradient, v))
        _, _, trust = judge(trust, 2.0 + k, control, acceptance, 0.999)
    assert all(b <= a * (1 + 1e-9) for a, b in pairwise(longest[1:]))
    assert longest[-1] < 1e-4 * longest[0]
    assert change[-1] < 2e-3 * change[0]


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("n", [2, 3])
def test_without_a_gradient_nothing_moves(n, window):
    gradient = noise(2, n, *[8] * n, dtype=torch.float32)
    gradient[1] = 0
    residual = noise(2, n, *[8] * n, seed=1, dtype=torch.float32)
    trust = initial_trust(gradient, torch.zeros(2), 1.0)
    v = direction(gradient, trust, 0.5, window)
    assert torch.count_nonzero(v[1]) == 0
    assert torch.isfinite(v).all()
    moved = advance(residual, v, trust, 0.5)
    assert torch.equal(moved[1], residual[1])
    assert not torch.equal(moved[0], residual[0])


@pytest.mark.parametrize("n", [2, 3])
def test_advance_composes_and_blends_the_smoothing_by_the_radius(n):
    residual, v = noise(1, n, *[7] * n), 0.3 * noise(1, n, *[7] * n, seed=1)
    moved = compose(residual, v)
    trust = trust_of(4.0, 1.0)  # radius 1/2
    torch.testing.assert_close(advance(residual, v, trust, 0.0), moved)
    relaxed = torch.empty_like(moved)
    Elastic(0.8).relax(moved, (1.0,) * n, torch.ones(1), relaxed)
    torch.testing.assert_close(advance(residual, v, trust, 0.8), 0.5 * (moved + relaxed))


def test_pairs_are_moved_independently():
    gradient, residual = noise(3, 2, 9, 8), noise(3, 2, 9, 8, seed=1)
    trust = initial_trust(gradient, torch.zeros(3, dtype=torch.float64), 1.0)
    for window in (1, 3):
        v = direction(gradient, trust, 0.5, window)
        moved = advance(residual, v, trust, 0.5)
        for pair in range(3):
            one = slice(pair, pair + 1)
            alone = initial_trust(gradient[one], torch.zeros(1, dtype=torch.float64), 1.0)
            v_alone = direction(gradient[one], alone, 0.5, window)
            torch.testing.assert_close(v_alone, v[one], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(advance(residual[one], v_alone, alone, 0.5), moved[one])


@pytest.mark.parametrize("control", ["simple", "trust_region"])
@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_a_rise_and_never_the_reference(loss, control):
    for acceptance in tuple(ACCEPTANCES):
        accepted, _, new = judge(
            trust_of(2.0, loss=10.0, expected=1.0, memory=5.0), loss, control, acceptance, chance=0.0
        )
        assert bool(accepted) == (not ACCEPTANCES[acceptance](0).may_reject)
        assert float(new.damping) == pytest.approx(3.0)
        assert float(new.loss) == 10
        assert float(new.memory) == 5


@pytest.mark.parametrize("acceptance", tuple(ACCEPTANCES))
@pytest.mark.parametrize("start", [math.nan, math.inf])
def test_a_finite_loss_is_better_than_a_start_that_is_not(start, acceptance):
    """A level may start where the loss is not finite; the first finite loss must become the reference."""
    accepted, _, new = judge(trust_of(2.0, loss=start), 5.0, "simple", acceptance, chance=0.5)
    assert bool(accepted)
    assert float(new.loss) == 5
    if acceptance == "metropolis":
        assert math.isfinite(float(new.memory))  # an infinite temperature would accept everything from here on


@pytest.mark.parametrize("acceptance", tuple(ACCEPTANCES))
@pytest.mark.parametrize("control", tuple(DAMPINGS))
def test_pairs_are_judged_independently(control, acceptance):
    start, loss = torch.tensor([10.0, 10.0, 10.0, 0.5]), torch.tensor([9.0, 12.0, math.nan, 0.51])
    values = torch.tensor([1.0, 2, 3, 4]), torch.ones(4), start, torch.tensor([1.0, 3, 1, 2]), torch.full((4,), 2.0)
    trust = Trust(*values, torch.ones(4, dtype=torch.bool))
    accepted, gain, new = judge(trust, loss, control, acceptance, 0.4)
    for pair in range(4):
        one = slice(pair, pair + 1)
        alone = Trust.of({name: value[one] for name, value in trust.state().items()})
        accepted_alone, gain_alone, new_alone = judge(alone, loss[one], control, acceptance, 0.4)
        assert torch.equal(accepted[one], accepted_alone)
        assert torch.equal(gain[one], gain_alone)
        for name, value in new_alone.state().items():
            torch.testing.assert_close(new.state()[name][one], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(64, 60), (30, 28, 29)])
def test_the_gain_ratio_tends_to_one(shape):
    """Actual over expected decrease → 1 as the step → 0, at a field that is not on the grid points."""
    n = len(shape)
    moving, fixed = waves(shape, 1), waves(shape, 2)
    ddf = (0.4 + 1.5 * waves(shape, 3, n)) * interior_bump(shape)
    measure = MSE()
    reference, moving = measure.prepare(fixed, moving)

    def at(u: Tensor) -> tuple[Tensor, Tensor]:
        warped = warp(moving, u)
        loss, derivative = measure.evaluate(warped, reference)
        return loss, eulerian_gradient(derivative, warped)

    loss, gradient = at(ddf)
    start = initial_trust(gradient, loss, 1.0)
    errors = []
    for step in (1.0, 0.1, 0.01, 0.001):
        v = direction(gradient, start, step) * interior_bump(shape)
        trust = replace(start, expected=expected_decrease(gradient, v))
        candidate, _ = at(advance(ddf, v, trust, 0.0))
        _, gain, _ = judge(trust, candidate, "trust_region")
        errors.append(abs(float(gain) - 1))
    assert errors[0] > 1.5 * max(errors[1:])
    assert max(errors[1:]) < 0.02  # what is left is the difference between the interpolant's slope and the stencil's


def test_expected_decrease_is_the_inner_product_per_pair():
    gradient, v = noise(2, 2, 5, 4), noise(2, 2, 5, 4, seed=1)
    expected = [-float((gradient[i] * v[i]).sum()) for i in range(2)]
    assert expected_decrease(gradient, v).tolist() == pytest.approx(expected)


def test_names_stand_for_the_parts():
    assert (
        make_method("lm", "simple", "always", 0.6, 1, 0) == Method() == Method(LM(), Simple(), Always(), Elastic(0.6))
    )
    assert make_method("lm", "trust_region", Always(), Elastic(1.0), 3, 7) == Method(
        WindowedLM(3), TrustRegion(), Always(), Elastic(1.0)
    )


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("descent", "adam", "descent must be one of .* or a Descent, got 'adam'"),
        ("control", None, "control must be one of .* or a Damping, got None"),
        ("acceptance", 3, "acceptance must be one of .* or a Acceptance, got 3"),
        ("window", 2, "window must be an odd number of voxels, got 2"),
        ("window", True, "window must be an odd number"),
        ("window", 3.0, "window must be an odd number"),
        ("smooth_residual", -1, "smooth_residual must be at least 0"),
        ("smooth_residual", 101.0, "smooth_residual must be at most 100 voxels, got 101.0"),
        ("smooth_residual", "elastic", "smooth_residual must be a number or a Smoothing, got 'elastic'"),
    ],
)
def test_what_is_neither_name_nor_part_is_refused(argument, value, message):
    given = {
        "descent": "lm", "control": "simple", "acceptance": "always", "smooth_residual": 0.5, "window": 1, "seed": 0,
    }  # fmt: skip
    with pytest.raises((TypeError, ValueError), match=message):
        make_method(**given | {argument: value})


@pytest.mark.parametrize(
    ("argument", "names"),
    [("descent", DESCENTS), ("control", DAMPINGS), ("acceptance", ACCEPTANCES), ("similarity", MEASURES)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refine_tells_every_name_that_an_argument_takes(argument, names):
    told = inspect.getdoc(monai_lm.refine).split(f"\n    {argument}: ")[1].split("\n    ")[0:3]
    assert [name for name in names if f'``"{name}"``' not in " ".join(told)] == []
