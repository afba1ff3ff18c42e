"""The devices that a test of this folder runs on: a GPU where there is one, and labels in any case."""

from __future__ import annotations

import pytest
import torch

from monai_lm import kernels
from tests.gpu.pretend import Pretend

GPU = pytest.param("gpu", marks=pytest.mark.gpu)
CUDA, APPLE = (pytest.param(name, id=f"labelled-{name}") for name in ("cuda:1", "mps:0"))


@pytest.fixture
def pretend():
    """A :class:`Pretend` that is active."""
    with Pretend() as pretend:
        yield pretend


@pytest.fixture(params=[GPU, CUDA])
def device(request):
    """A CUDA device: that of ``--device``, if it is there, and a label; see :mod:`tests.gpu.pretend`."""
    return _device(request)


@pytest.fixture(params=[GPU, CUDA, APPLE])
def any_device(request):
    """As ``device``, and a label of one that has no float64."""
    return _device(request)


def _device(request):
    if request.param == "gpu":
        return request.getfixturevalue("gpu")
    request.getfixturevalue("pretend")
    return torch.device(request.param)


@pytest.fixture
def gpu(request):
    """The device of ``--device``, by default the first CUDA device."""
    named = request.config.getoption("--device")
    if named is None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    yield torch.device(named or "cuda:0")
    assert kernels._GPU_FAULTS == []  # a test that passes on plain PyTorch says nothing of Triton's kernels
