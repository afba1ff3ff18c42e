"""The benchmarks' own metrics."""

import importlib.util
from pathlib import Path

import pytest
import torch
from monai.metrics import DiceMetric
from monai.networks.utils import one_hot

from benchmarks.metrics import similarity_of
from monai_lm.similarity import LNCC


def _load(name):
    path = Path(__file__).parents[2] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_mean_dice_is_monais():
    metrics = _load("metrics")
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(0, 4, (1, 1, 9, 8, 7), generator=generator).float()
    b = torch.randint(0, 4, (1, 1, 9, 8, 7), generator=generator).float()
    expected = DiceMetric(include_background=False)(one_hot(b, 4), one_hot(a, 4)).mean()
    assert metrics.mean_dice(a, b) == pytest.approx(float(expected), abs=1e-6)
    shift = torch.zeros(1, 3, 9, 8, 7)
    shift[:, 1] = 1
    moved = torch.cat([b[:, :, :, 1:], b[:, :, :, -1:]], 3)
    assert metrics.mean_dice(a, b, shift) == pytest.approx(metrics.mean_dice(a, moved), abs=1e-6)


def test_paired_bootstrap_interval_covers_the_mean():
    metrics = _load("metrics")
    mean, low, high = metrics.paired_bootstrap([0.1, 0.2, 0.3, 0.4])
    assert mean == pytest.approx(0.25)
    assert 0.1 <= low < mean < high <= 0.4
    assert metrics.paired_bootstrap([0.5, 0.5]) == (0.5, 0.5, 0.5)


def test_measures_are_made_of_what_json_can_say():
    made = similarity_of(["mi", {"lncc": {"window": "gaussian", "radius": 3}}])
    assert made[0] == similarity_of("mi") == "mi"
    assert (type(made[1]), made[1].radius, made[1].window) == (LNCC, 3, "gaussian")
