"""Which levels there are, and what holds for each of them."""

import re

import numpy as np
import pytest

from monai_lm.similarity import LNCC, MI, MSE, NCC
from monai_lm.solver.pyramid import make_level
from monai_lm.solver.refinement import check_keywords
from monai_lm.solver.schedule import DAMPING, automatic_scales, make_schedule


def refusal(kind, message):
    return pytest.raises(kind, match=f"^{re.escape(message)}$")


def dampings(value, scales=(4, 2, 1)):
    """δ of every level."""
    return [stage.damping for stage in make_schedule(scales, "auto", value, 1.0, "lncc", (64, 64), (1.0, 1.0), False)]


@pytest.mark.parametrize(
    ("size", "predicted", "expected"),
    [
        ((64, 64, 64), False, (4, 2, 1)),
        ((176, 224, 176), False, (8, 4, 2, 1)),
        ((256, 256), False, (8, 4, 2, 1)),
        ((40, 56, 40), False, (2, 1)),
        ((12, 12, 12), False, (2, 1)),
        ((4, 4), False, (1,)),
        ((4, 5, 3), False, (1,)),
        ((2, 2, 2), False, (1,)),
        ((64, 64, 64), True, (2, 1)),
        ((176, 224, 176), True, (2, 1)),
        ((256, 256), True, (2, 1)),
        ((4, 4), True, (1,)),
        ((4, 5, 3), True, (1,)),
    ],
)
def test_automatic_scales(size, predicted, expected):
    assert automatic_scales(size, (1.0,) * len(size), predicted) == expected


@pytest.mark.parametrize("slices", [7, 10, 15])
def test_thick_slices_do_not_keep_the_plane_from_coarse_levels(slices):
    """Only axes that are fine enough shrink, so a few slices that are never shrunk must not forbid coarse levels."""
    size, spacing = (256, 256, slices), (1.0, 1.0, 10.0)
    assert make_level(size, spacing, 8).size == (32, 32, slices)
    assert automatic_scales(size, spacing, predicted=False) == (8, 4, 2, 1)
    assert automatic_scales(size, spacing, predicted=True) == (2, 1)


def test_automatic_scales_do_not_depend_on_the_order_of_the_axes():
    assert automatic_scales((20, 64, 64), (4, 1, 1), False) == automatic_scales((64, 64, 20), (1, 1, 4), False)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(2, [2.0, 2.0, 2.0]), (0.5, [0.5, 0.5, 0.5]), ((3, 2, 1), [3.0, 2.0, 1.0]), ([*DAMPING], [0.1, 0.3, 1.0])],
)
def test_a_setting_is_spread_over_the_levels_from_the_fine_end(value, expected):
    assert dampings(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("mi", [MI, MI, MI]),
        (("mi", "lncc"), [MI, MI, LNCC]),
        (["mi", "mse", "lncc"], [MI, MSE, LNCC]),
    ],
)
def test_measures_are_spread_over_the_levels_from_the_fine_end(value, expected):
    stages = make_schedule((4, 2, 1), "auto", 1.0, 1.0, value, (64, 64), (1.0, 1.0), False)
    assert [type(stage.similarity) for stage in stages] == expected


def test_more_measures_than_levels_are_cut_where_levels_are_automatic_only():
    measures = [MSE(), "ncc", "mi", LNCC()]
    stages = make_schedule("auto", "auto", 1.0, 1.0, measures, (64, 64), (1.0, 1.0), False)
    assert [type(stage.similarity) for stage in stages] == [NCC, MI, LNCC]
    with refusal(ValueError, "similarity must have at most one measure per level, 2 for scales [2, 1], got 4"):
        make_schedule((2, 1), "auto", 1.0, 1.0, measures, (64, 64), (1.0, 1.0), False)


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        ([], ValueError, r"similarity must be a measure or a sequence of at least one, got \[\]"),
        (["mi", "ssim"], ValueError, "similarity must be one of .* or a loss module, got 'ssim'"),
        (["mi", 3], TypeError, "similarity must be a name, a Similarity or a torch.nn.Module, got int"),
        ({"mi": 1}, TypeError, "similarity must be a name, a Similarity or a torch.nn.Module, got dict"),
    ],
)
def test_measures_of_levels_that_are_none_are_refused(value, kind, message):
    with pytest.raises(kind, match=message):
        make_schedule((2, 1), "auto", 1.0, 1.0, value, (64, 64), (1.0, 1.0), False)


def test_more_values_than_levels_are_cut_where_levels_are_automatic_only():
    assert dampings([5, 4, 3, 2, 1], "auto") == [3.0, 2.0, 1.0]
    message = "{} must be one number or one per level, 3 for scales [4, 2, 1], got 5; leave out the first 2, of coarser"
    for name in ("damping", "smooth_gradient"):
        given = {"damping": 1.0, "smooth_gradient": 1.0} | {name: [5, 4, 3, 2, 1]}
        with refusal(ValueError, f"{message.format(name)} levels"):
            make_schedule((4, 2, 1), "auto", *given.values(), "lncc", (64, 64), (1.0, 1.0), False)


def test_too_few_values_for_the_levels_are_refused():
    with refusal(ValueError, "damping must be one number or at least one per level (3), got 2"):
        dampings([1, 2])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 0, 1], "damping must be greater than 0, got 0"),
        (-1, "damping must be greater than 0, got -1"),
        ([-1, 1, 1, 1], "damping must be greater than 0, got -1"),
    ],
)
def test_values_of_levels_out_of_range_are_refused(value, message):
    with refusal(ValueError, message):
        dampings(value)


@pytest.mark.parametrize("value", [[1, "a", 1], "abc", True])
def test_values_of_levels_that_are_no_numbers_are_refused(value):
    with pytest.raises(TypeError, match=r"damping must be a number, got (str|bool)"):
        dampings(value)


@pytest.mark.parametrize("value", [None, object()], ids=["None", "object"])
def test_a_setting_that_is_neither_number_nor_sequence_is_refused_by_name(value):
    with pytest.raises(TypeError, match="damping must be"):
        dampings(value)


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"scales": (1, 2)}, ValueError, "scales must be strictly decreasing and not empty, got (1, 2)"),
        (
            {"scales": (2, 1), "iterations": (9, 9, 9)},
            ValueError,
            "iterations must have one number per level, 2 for scales [2, 1], got 3",
        ),
        (
            {"iterations": (9, 1.5)},
            TypeError,
            "iterations must be 'auto', a whole number or a sequence of them, got (9, 1.5)",
        ),
        (
            {"scales": (1,), "similarity": ("mi", "lncc")},
            ValueError,
            "similarity must have at most one measure per level, 1 for scales [1], got 2",
        ),
        ({"damping": (1, 0)}, ValueError, "damping must be greater than 0, got 0"),
        ({"step": 0}, ValueError, "step must be greater than 0, got 0"),
        ({"kernels": "c"}, ValueError, "kernels must be one of ('auto', 'native', 'reference'), got 'c'"),
        ({"window": 2}, ValueError, "window must be an odd number of voxels, got 2"),
        (
            {"regularizer": "l2"},
            ValueError,
            "regularizer must be one of ('diffusion', 'bending', 'sliding'), a Regularizer or None, got 'l2'",
        ),
    ],
)  # fmt: skip
def test_settings_that_are_kept_are_checked_for_images_of_any_size(settings, kind, message):
    with refusal(kind, message):
        check_keywords("settings", settings)


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"smooth_residual": "auto"}, {"iterations": (9, 9, 9)}, {"iterations": np.array([9, 9])},
        {"similarity": ("mi", "mi", "lncc")}, {"damping": 1},
    ],
)  # fmt: skip
def test_settings_that_fit_some_images_are_kept(settings):
    check_keywords("settings", settings)
