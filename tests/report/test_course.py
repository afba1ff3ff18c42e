"""Levels that ended by their limit of iterations."""

import pytest

from monai_lm.report.course import Cut, cut_short
from monai_lm.solver.result import Iteration


def course(**levels):
    """A history of losses per level."""
    return [Iteration(float(scale[1:]), loss, 1.0, 0.0, True, 0.0) for scale, some in levels.items() for loss in some]


def falling(first, last, iterations):
    return [first + (last - first) * k / iterations for k in range(iterations + 1)]


def test_a_level_that_still_falls_is_cut_short_and_one_that_has_come_to_rest_is_not():
    rest = [*falling(0.8, 0.5, 30), *[0.5] * 12]
    assert cut_short(course(s4=rest, s1=rest)) == []
    found = cut_short(course(s4=falling(0.8, 0.5, 100), s1=rest))
    assert found == [Cut(4.0, 100, pytest.approx(0.1))]


def test_the_finest_level_may_go_on_longer_but_not_stop_after_a_few():
    slow = [0.8, 0.7, *falling(0.55, 0.45, 20)]
    assert cut_short(course(s1=slow)) == []
    assert [cut.scale for cut in cut_short(course(s4=slow, s1=slow))] == [4]
    assert cut_short(course(s1=falling(0.8, 0.5, 4))) == [Cut(1.0, 4, pytest.approx(0.25))]
    assert cut_short(course(s1=falling(0.8, 0.5, 3))) == []


def test_what_gains_nothing_is_not_cut_short_and_worse_iterates_do_not_count():
    assert cut_short([]) == []
    assert cut_short(course(s1=falling(0.8, 0.799, 5))) == []
    assert cut_short(course(s4=[*falling(0.8, 0.5, 20), *falling(0.7, 0.6, 20)], s1=[0.8])) == []
