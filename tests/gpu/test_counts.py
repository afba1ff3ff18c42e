"""How often a whole refinement waits for the device, launches something on it, and how much memory it takes.

Counted with labels. A rise is a fault until somebody has raised the number here; ``pytest -s`` prints the table.
"""

import pytest
import torch

from monai_lm import refine
from monai_lm.fields import fold_count, metrics, warp
from monai_lm.transforms import InvertDDF
from tests.gpu.pretend import Pretend

SIZE = (24, 22, 20)
VOLUME = 4 * 24 * 22 * 20
ITERATIONS = (20, 10)
SETTINGS = {"scales": (2, 1), "iterations": ITERATIONS, "tolerance": 0.0, "smooth_residual": 0.6}

# run: (waits and copies, launches per iteration with one for every kernel, peak in V beside images and prediction
# without what kernels hold while they run)
MOST = {
    "identity": (16, 31, 9.1),
    "prediction": (20, 31, 9.1),
    "prediction, half": (21, 31, 5.3),
    "prediction, descent": (50, 33, 9.1),
    "prediction, metropolis": (50, 52, 12.1),
    "prediction, trust_region": (20, 49, 11.1),
    "prediction, seconds": (50, 31, 9.1),
    "prediction, regularised": (20, 390, 19.0),
    "identity, halves": (26, 61, 9.1),
    "prediction, halves": (31, 61, 9.1),
}
CHANGES = {
    "identity": {},
    "prediction": {},
    "prediction, half": {"memory": "half"},
    "prediction, descent": {"acceptance": "descent"},
    "prediction, metropolis": {"acceptance": "metropolis"},
    "prediction, trust_region": {"control": "trust_region"},
    "prediction, seconds": {"seconds": 600.0},
    "prediction, regularised": {"regularizer": "bending"},
    "identity, halves": {"smooth_residual": "auto"},
    "prediction, halves": {"smooth_residual": "auto"},
}


@pytest.fixture
def pair(smooth_image, smooth_field):
    """Images, and a prediction without folds, so that there is nothing to repair at the start."""
    moving = smooth_image((1, 1, *SIZE), 2.0, dtype=torch.float32)
    truth = smooth_field((1, 3, *SIZE), 1.5, 5.0, 1, torch.float32)
    assert fold_count(0.7 * truth) == 0
    return warp(moving, truth), moving, 0.7 * truth


def counted(given, settings, iterations=ITERATIONS):
    """Waits, launches, and the peak in V of what is there beside the given tensors."""
    with Pretend() as pretend:
        there = [None if t is None else t.to("cuda:1") for t in given]
        pretend.waits.clear()
        pretend.launches, pretend.peak, before = 0, pretend.live, pretend.live
        refine(*there, **SETTINGS | settings | {"iterations": iterations})
        return pretend.wait_count, pretend.launches, (pretend.peak - before) / VOLUME


@pytest.mark.parametrize("run", MOST)
def test_a_run_waits_launches_and_holds_no_more_than_it_did(run, pair, record_property):
    given = [*pair[:2], None if run.startswith("identity") else pair[2]]
    if run.endswith("half"):
        given[:2] = [image.half() for image in given[:2]]
    waits, launches, peak = counted(given, CHANGES[run])
    shorter = counted(given, CHANGES[run], (10, 10))[1]  # the first level is ten iterations longer, nothing else
    each = (launches - shorter) / 10
    print(f"\n{run:<26}{waits:4d} waits {each:6.0f} launches an iteration {peak:6.1f} V", end="")
    for name, value in (("waits", waits), ("launches", each), ("volumes", peak)):
        record_property(name, value)
    most_waits, most_launches, most_peak = MOST[run]
    assert waits <= most_waits
    assert each <= most_launches
    assert peak <= most_peak


def test_waits_grow_by_three_in_ten_iterations(pair):
    """To look for folds twice, and once whether to stop; a bar that is shown takes one more."""
    few, many = (counted(pair, {}, (n, 10))[0] for n in (10, 40))
    assert many - few == 9
    shown = counted(pair, {"progress": True}, (40, 10))[0]
    assert shown - many == 5  # forty and ten of them
    told = counted(pair, {"callback": lambda *_: None}, (40, 10))[0]
    assert told - many == 4  # likewise, and the last look reads what else is read when the run is over


def test_a_step_that_may_be_rejected_is_waited_for(pair):
    few, many = (counted(pair, {"acceptance": "descent"}, (n, 10))[0] for n in (10, 20))
    assert many - few == 3 + 10


@pytest.mark.parametrize(
    ("measure", "waits"),
    [
        (fold_count, 0),
        (metrics.sd_log_jacobian, 0),
        (lambda ddf: metrics.inverse_consistency(ddf, -ddf), 2),
        (lambda ddf: metrics.compare_labels(*(2 * [(ddf[:, :1] > 0).float()]), [(1.0, 1.0, 1.0)]), 4),
        (lambda ddf: InvertDDF()(ddf[0]), 60),
    ],
    ids=["folds", "sdlogj", "inverse consistency", "labels", "inverse"],
)
def test_measures_do_not_wait_more_than_they_did(measure, waits, pair):
    with Pretend() as pretend:
        ddf = pair[2].to("cuda:1")
        pretend.waits.clear()
        measure(ddf)
        assert pretend.wait_count <= waits
