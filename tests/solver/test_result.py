"""The result of a refinement: inverse, history."""

import dataclasses
import math
import pickle
import time

import pytest
import torch

from monai_lm import RefinementResult, refine
from monai_lm.fields import compose, gaussian_smooth
from monai_lm.kernels.devices import Stopwatch
from monai_lm.solver.result import Iteration, Record

CPU = torch.device("cpu")


def smooth(shape: tuple[int, ...], amplitude: float, batch: int = 1) -> torch.Tensor:
    noise = torch.randn(batch, len(shape), *shape, generator=torch.Generator().manual_seed(0))
    ddf = gaussian_smooth(noise, 4.0)
    return ddf * (amplitude / ddf.abs().max())


def result_of(ddf: torch.Tensor) -> RefinementResult:
    pairs = ddf.shape[0]
    history = [[Iteration(1.0, 0.5, 1.0, math.nan, True, 0.01)] for _ in range(pairs)]
    loss, folds = torch.ones(pairs), torch.zeros(pairs, dtype=torch.long)
    return RefinementResult(ddf, history, loss, 0.5 * loss, folds, 0 * loss, 0.02)


@pytest.mark.parametrize("shape", [(30, 28), (20, 18, 19)])
def test_the_inverse_composes_to_the_identity_both_ways(shape):
    """In the interior; at the border the field is continued by its edge value."""
    ddf = smooth(shape, 2.0, batch=2)
    inverse = result_of(ddf).inverse()
    assert inverse.shape == ddf.shape
    inside = (..., *[slice(4, -4)] * len(shape))
    # compose(ddf, inverse) is what the inversion solves for; the other order also interpolates the inverse
    for composed, tolerance in ((compose(ddf, inverse), 1e-3), (compose(inverse, ddf), 0.05)):
        assert float(torch.linalg.vector_norm(composed, dim=1)[inside].max()) < tolerance
    assert float(torch.linalg.vector_norm(inverse, dim=1).mean()) > 0.1


@pytest.mark.parametrize("n", [2, 3])
def test_the_inverse_of_a_shift_is_the_opposite_shift(n):
    shift = torch.tensor([1.5, -2.0, 0.25][:n]).view(1, n, *[1] * n)
    ddf = shift.expand(1, n, *[8] * n)
    torch.testing.assert_close(result_of(ddf).inverse(), -ddf)


def test_a_result_cannot_be_changed_and_survives_pickling():
    result = result_of(smooth((8, 8), 1.0))
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.seconds = 3.0
    copy = pickle.loads(pickle.dumps(result))
    assert torch.equal(copy.ddf, result.ddf)
    assert copy.history[0][0].level == 1.0
    assert math.isnan(copy.history[0][0].gain_ratio)


def test_a_record_gives_every_pair_the_iterations_in_which_it_was_active():
    record = Record(2, Stopwatch(CPU, time.perf_counter()))
    yes, no = torch.tensor([True, True]), torch.tensor([True, False])
    nan = torch.full((2,), math.nan)
    start, gains = torch.tensor([2.0, 0.0]), torch.tensor([0.5, -1.0])
    record.add(2, (10, 0.1), torch.tensor([40.0, 80.0]), torch.tensor([1.0, 2.0]), start, nan, yes, yes)
    record.add(2, (10, 0.1), torch.tensor([30.0, 70.0]), torch.tensor([3.0, 4.0]), start, gains, no, yes)
    record.add(1, (20, 0.1), torch.tensor([40.0, 120.0]), torch.tensor([5.0, 6.0]), start, nan, yes, no)
    first, second = record.history()
    assert [(row.level, row.loss, row.accepted) for row in first] == [(2, 4.0, True), (2, 3.0, True), (1, 2.0, True)]
    assert [(row.level, row.loss, row.accepted) for row in second] == [(2, 8.0, True), (2, 7.0, False)]
    assert [row.damping for row in first] == pytest.approx([0.05, 0.15, 0.25])
    assert [row.damping for row in second] == pytest.approx([0.2, 0.4])  # λ₀ is 0 where there was no gradient
    assert math.isnan(second[0].gain_ratio)
    assert second[1].gain_ratio == -1.0
    assert 0 < first[0].seconds <= first[1].seconds <= first[2].seconds
    assert all(isinstance(row, Iteration) and isinstance(row.accepted, bool) for row in first)


def test_a_record_tells_what_it_noted_since_the_last_time_and_no_more():
    told = []
    record = Record(2, Stopwatch(CPU, time.perf_counter()), lambda *what: told.append(what))
    ones, both = torch.ones(2), torch.tensor([True, True])
    row = ones, ones, ones, both, torch.tensor([True, False])
    record.add(2, (10, 0.1), 20 * ones, *row[:3], both, both)
    assert told == []
    record.tell()
    record.tell()
    assert [(pair, number, one.loss) for pair, number, one in told] == [(0, 0, 2.0), (1, 0, 2.0)]
    record.add(1, (10, 0.1), 10 * ones, *row)
    history = record.history()
    assert [(pair, number) for pair, number, _ in told] == [(0, 0), (1, 0), (0, 1)]
    assert history == [[one for pair, _, one in told if pair == k] for k in range(2)]
    assert history[0][0].seconds <= history[0][1].seconds


def test_a_record_without_iterations_is_empty():
    assert Record(3, Stopwatch(CPU, 0.0)).history() == [[], [], []]


def test_a_result_says_in_a_few_lines_what_it_is():
    ddf = torch.zeros(2, 2, 8, 8)
    ddf[1, 0] = 3.0
    result = RefinementResult(
        ddf, [[], []], torch.tensor([0.5, 0.4]), torch.tensor([0.25, 0.3]), torch.tensor([7, 0]), torch.zeros(2), 1.5,
        torch.tensor([True, False]),
    )  # fmt: skip
    assert result.unimproved == []
    assert str(result).splitlines() == [
        "RefinementResult(ddf=(2, 2, 8, 8), similarity=lncc, 1.50 s)",
        "  pair 0: loss 0.5000 to 0.2500, 0 folds (predicted 7), moved by 0.00 voxels, at most 0.00",
        "  pair 1: loss 0.4000 to 0.3000, 0 folds (predicted 0), moved by 3.00 voxels, at most 3.00, "
        "prediction not used",
    ]
    assert repr(result) == str(result)


def test_a_result_says_that_nothing_better_was_found_and_what_it_is_then():
    image = gaussian_smooth(torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0)), 1.0)
    moving = torch.cat([image[:2], image[2:].roll(2, 2)])
    folded = torch.zeros(3, 2, 16, 16)
    folded[2, 0] = 2.0
    folded[2, 0, 8, 8] = 5.0
    predicted = refine(image, moving, folded, iterations=0)
    assert [predicted.start(k) for k in range(3)] == [
        "the prediction",
        "the prediction",
        "the prediction, without its folds",
    ]
    assert predicted.unimproved == [0, 1, 2]
    alone = refine(image, moving, iterations=2)
    assert alone.unimproved == [0, 1]
    assert not alone.ddf[:2].any()
    lines = str(alone).splitlines()[1:]
    assert lines[0].endswith("at most 0.00; nothing better was found, this is the start (the identity)")
    assert "nothing better" not in lines[2]
