"""What a report says: values of known fields, the same labels in every mean, and the verdict."""

from dataclasses import replace

import pytest
import torch

from monai_lm.report.evidence import Evidence
from monai_lm.report.findings import Case, FieldMetrics, _cut_short, _far_apart, measure_field, verdict, warnings_of
from monai_lm.solver.result import Iteration


@pytest.fixture
def shifted(case):
    """The case with its true field, as the report's own functions take it."""
    ddf = case["result"].ddf
    spacing = (2.0, 1.0, 3.0)[: ddf.shape[1]]
    labels, landmarks = case["labels"], tuple(points[None] for points in case["landmarks"])
    return Case(
        case["fixed"], case["moving"], case["result"], ddf, None, case["affine"], spacing, labels, landmarks, {},
        torch.device("cpu"),
    )  # fmt: skip


def test_a_shift_of_two_voxels_is_measured_in_millimetres(shifted):
    before, after = measure_field(shifted, shifted.start), measure_field(shifted, shifted.ddf)
    assert before.dice[1] < 0.7 < 1 == after.dice[1] == after.mean_dice
    assert before.hd95[1] == pytest.approx(4.0)
    assert after.hd95 == {1: 0, 2: 0}
    assert (before.tre, after.tre) == (pytest.approx(4.0), pytest.approx(0.0))
    assert (before.displacement, after.displacement) == (0, pytest.approx(4.0))
    assert (after.folds, after.sdlogj) == (0, pytest.approx(0.0, abs=1e-6))


def test_a_mean_is_over_the_labels_asked_for():
    nan = float("nan")
    first = FieldMetrics({1: 0.5, 2: 0.7, 3: 0.0}, {1: 2.0, 2: 4.0, 3: nan}, None, 0.0, 0, 0, 0.0)
    second = FieldMetrics({1: 0.0, 2: 0.9, 3: 0.9}, {1: nan, 2: 3.0, 3: 1.0}, None, 0.0, 0, 0, 0.0)
    assert first.mean_dice == pytest.approx(0.4)
    shared = first.surfaces & second.surfaces
    assert shared == {2}
    assert (first.mean_hd95(shared), second.mean_hd95(shared)) == (4.0, 3.0)
    assert first.mean_hd95(first.surfaces) == 3.0
    assert first.values() == {"folds": 0, "sdlogj": 0, "dice": pytest.approx(0.4), "hd95_mm": 3}
    missed = FieldMetrics({1: 0.0}, {1: nan}, 1.5, 0.25, 3, 2, 0.0).values()
    assert missed == pytest.approx({"folds": 2, "sdlogj": 0.25, "dice": 0, "hd95_mm": nan, "tre_mm": 1.5}, nan_ok=True)
    empty = FieldMetrics(None, None, None, 0.0, 0, 0, 0.0)
    assert empty.values() == {"folds": 0, "sdlogj": 0}
    assert (empty.mean_dice, empty.surfaces, empty.mean_hd95([])) == (None, set(), None)


def test_the_verdict_follows_from_the_remarks(shifted):
    good = FieldMetrics({1: 0.9}, None, 1.0, 0.1, 0, 0, 0.0)
    worse = FieldMetrics({1: 0.8}, None, 2.0, 0.1, 0, 0, 0.0)
    folds = FieldMetrics({1: 0.9}, None, 1.0, 0.1, 3, 0, 0.0)
    for before, after, expected, state in (
        (worse, good, set(), "good"),
        (good, worse, {"dice", "tre"}, "check"),
        (good, folds, {"folds"}, "bad"),
    ):
        found = warnings_of(shifted, before, after)
        assert set(found) == expected
        assert verdict(shifted, found)[0] == state


def test_outcomes_in_plain_words(shifted):
    better = FieldMetrics({1: 0.9}, None, None, 0.1, 0, 0, 0.0)
    for warnings, state, outcome, words in (
        ({}, "good", "improved", "the images match better than before"),
        ({"repaired": ""}, "check", "improved", "see the remarks below"),
        ({"similarity": ""}, "check", "no improvement", "Nothing better was found; this is the start (the identity)."),
        ({"mirror": "", "misaligned": ""}, "check", "suspicious", "a mirror image fits as well or better, the images"),
        ({"iterations": ""}, "check", "suspicious", "the iterations ran out"),
        ({"folds": "", "mirror": ""}, "bad", "folded", "Do not use this field"),
    ):
        found = verdict(shifted, warnings)
        assert found[:2] == (state, outcome)
        assert words in found[2]
    assert warnings_of(shifted, better, better) == {}


def test_what_was_held_is_told_with_how_far_halves_lead_apart(shifted):
    value = FieldMetrics({1: 0.9}, None, None, 0.1, 0, 0, 0.0)
    for held, expected in ((0.1, set()), (0.6, {"halves"})):
        result = replace(shifted.result, apart=torch.tensor([5.25]), held=torch.tensor([held]))
        found = warnings_of(replace(shifted, result=result), value, value)
        assert set(found) == expected
    assert "lead 5.2 voxels apart. So in 60 % of what it shows" in found["halves"]
    assert verdict(shifted, found)[:2] == ("check", "improved")


def test_images_far_apart_are_told_only_if_they_did_not_come_together(shifted):
    far = replace(shifted, moving=shifted.fixed.roll(9, 2))
    together = Evidence(0.95, 0.3, 0.01, centred=0.0)
    assert _far_apart(far, together, doubted=False) == {}
    assert _far_apart(shifted, replace(together, sdlogj=0.9), doubted=True) == {}
    assert "--affine auto" in _far_apart(far, replace(together, sdlogj=0.6), doubted=False)["misaligned"]
    assert _far_apart(far, replace(together, centred=-0.3), doubted=False) == {}
    across = replace(together, sdlogj=0.6, witness="mind")
    assert _far_apart(far, across, doubted=False) == {}
    assert "misaligned" in _far_apart(far, replace(across, centred=-0.3), doubted=False)
    assert _far_apart(far, replace(across, sdlogj=0.3, centred=-0.3), doubted=False) == {}
    assert "misaligned" in _far_apart(far, together, doubted=True)
    told = _far_apart(replace(far, aligned="Aligned first, by a shift."), together, doubted=True)["misaligned"]
    assert "--affine auto" not in told
    assert "give an affine of another program" in told


def test_nobody_who_let_images_be_aligned_is_told_to_do_that_when_iterations_run_out(shifted):
    falling = [[Iteration(1.0, 0.8 - 0.01 * k, 1.0, 0.0, True, 0.0) for k in range(20)]]
    cut = replace(shifted, result=replace(shifted.result, history=falling))
    assert _cut_short(cut)["iterations"].endswith("or start from a better field (--affine auto).")
    assert _cut_short(replace(cut, aligned="Aligned."))["iterations"].endswith("or start from a better field.")
