"""Devices by name, their widest numbers, and when their work was done."""

import time

import pytest
import torch

from monai_lm.kernels.devices import Stopwatch, find_device, widest_float
from tests.gpu.pretend import Pretend


def test_devices_that_are_there_are_found():
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto") == torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with Pretend():
        assert find_device("auto") == torch.device("cuda")
        assert find_device("cuda:1") == torch.device("cuda:1")


@pytest.mark.parametrize("name", ["cuda:99", "tpu-ish", "xla", "meta", "", "cuda:-2"])
def test_devices_that_are_not_there_are_refused_in_a_sentence(name):
    with pytest.raises(ValueError, match=r"device must be auto or one that torch has here, cpu.*, got ") as caught:
        find_device(name)
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_apple_has_no_doubles():
    assert widest_float(torch.device("mps")) == torch.float32
    assert {widest_float(torch.device(name)) for name in ("cpu", "cuda:1")} == {torch.float64}


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_laps_are_seconds_since_the_start(device):
    with Pretend():
        started = time.perf_counter()
        watch = Stopwatch(torch.device(device), started)
        assert watch.seconds() == []
        watch.lap()
        time.sleep(0.05)
        watch.lap()
        first, second = watch.seconds()
    assert first >= 0
    assert second - first >= 0.05
