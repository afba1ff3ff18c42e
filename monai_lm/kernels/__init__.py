"""The operations that an iteration is made of: one contract each, and an implementation for every kind of device.

What a kernel computes stands in :mod:`monai_lm.kernels.reference`, together with the version in plain PyTorch. There
are native ones for CPUs (``cpu.c``, compiled at its first use) and for GPUs (``gpu.py``, where Triton is). PyTorch's
dispatcher takes the one for the tensors at hand (``torch.ops.monai_lm``); what a native one cannot serve, such as
float64, it hands over to the reference. None of them is differentiable.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from monai_lm.kernels import cpu, reference

__all__ = [
    "CHOICES",
    "choose",
    "compose",
    "elastic",
    "gradient",
    "gradient_sums",
    "image_sums",
    "lncc",
    "mend",
    "mi",
    "missing",
    "mse",
    "ncc",
    "sample",
    "smooth",
    "step",
    "unfolded",
    "using",
]

CHOICES = ("auto", "native", "reference")
"""The ``kernels`` argument of :func:`monai_lm.refine`."""

_COMPARED = "Tensor warped, Tensor fixed, Tensor? shift, Tensor? factor, Tensor? weight"
_SCHEMAS = {
    "sample": "(Tensor image, Tensor? ddf, Tensor? outer, Tensor? shift, Tensor? factor, Tensor(a!) out) -> ()",
    "compose": "(Tensor outer, Tensor inner, Tensor(a!) out) -> ()",
    "smooth": "(Tensor x, float[] sigma, Tensor(a!) out) -> ()",
    "elastic": "(Tensor moved, float[] sigma, float[] bulk, Tensor weight, Tensor(a!) out) -> ()",
    "lncc": f"({_COMPARED}, int radius, float sigma, float epsilon, Tensor(a!) out) -> Tensor",
    "mse": f"({_COMPARED}, Tensor(a!) out) -> Tensor",
    "ncc": f"({_COMPARED}, float epsilon, Tensor(a!) out) -> Tensor",
    "mi": f"({_COMPARED}, int bins, Tensor(a!) out) -> Tensor",
    "gradient": "(Tensor warped, Tensor derivative, float[] sigma, Tensor(a!) out) -> ()",
    "step": "(Tensor smooth, Tensor residual, float[] unit, Tensor radius, Tensor damping, Tensor? warped, "
    "Tensor? derivative, Tensor(a!) out) -> Tensor",
    "choose": "(Tensor chosen, Tensor source, Tensor(a!) out) -> ()",
    "image_sums": "(Tensor image) -> Tensor",
    "gradient_sums": "(Tensor gradient, float[] unit) -> Tensor",
    "mend": "(Tensor(a!) ddf, Tensor? outer, Tensor(b!) folded, float sigma, float margin) -> Tensor",
    "unfolded": "(Tensor ddf, Tensor? outer, float margin, Tensor(a!)? out) -> Tensor",
}

P = ParamSpec("P")
R = TypeVar("R")

_PLAIN: ContextVar[bool] = ContextVar("monai_lm_plain_kernels", default=False)
_LIBRARY = torch.library.Library("monai_lm", "DEF")


def _gpu() -> ModuleType | None:
    """The kernels for GPUs, where Triton is installed; imported when one is used."""
    return importlib.import_module("monai_lm.kernels.gpu") if importlib.util.find_spec("triton") else None


_GPU_FAULTS: list[str] = []
"""Why Triton's kernels are not used any more in this process."""


def _on_gpu(name: str) -> Callable[..., Any]:
    plain = getattr(reference, name)

    def run(*args: Any) -> Any:
        native = None if _GPU_FAULTS else getattr(_gpu(), name, None)
        if native is None:
            return plain(*args)
        try:
            return native(*args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # Triton compiles when it is called: without a C compiler it cannot, for one
            _GPU_FAULTS.append(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
            warnings.warn(
                f"Triton's kernels do not work here, so plain PyTorch is used, which is slow: {_GPU_FAULTS[0]}",
                stacklevel=2,
            )
            return plain(*args)

    return run


def _fake(name: str) -> Callable[..., Any]:
    """What is known of a result without computing it."""

    def run(*args: Any) -> Tensor | None:
        first: Tensor = args[0]
        if name == "image_sums":
            return first.new_empty(*first.shape[:2], 5, dtype=torch.float64)
        if name == "gradient_sums":
            return first.new_empty(len(first), 3, dtype=torch.float64)
        if name == "mend":
            return first.new_empty(len(first), 2, dtype=torch.int64)
        if name == "unfolded":
            return first.new_empty(len(first), dtype=torch.int64)
        if _SCHEMAS[name].endswith("-> Tensor"):
            return first.new_empty(len(first), dtype=torch.promote_types(first.dtype, torch.float32))
        return None

    return run


for _name, _schema in _SCHEMAS.items():
    _LIBRARY.define(_name + _schema)
    _LIBRARY.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, getattr(cpu, _name), "CPU")
    _LIBRARY.impl(_name, _on_gpu(_name), "CUDA")
    _LIBRARY.impl(_name, _fake(_name), "Meta")


def _dispatched(plain: Callable[P, R]) -> Callable[P, R]:
    """A kernel by the device of its tensors, or its reference inside ``using("reference")``."""
    operation = getattr(torch.ops.monai_lm, plain.__name__).default

    @wraps(plain)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        return plain(*args, **kwargs) if _PLAIN.get() else operation(*args, **kwargs)

    return run


sample = _dispatched(reference.sample)
compose = _dispatched(reference.compose)
smooth = _dispatched(reference.smooth)
elastic = _dispatched(reference.elastic)
lncc = _dispatched(reference.lncc)
mse = _dispatched(reference.mse)
ncc = _dispatched(reference.ncc)
mi = _dispatched(reference.mi)
gradient = _dispatched(reference.gradient)
step = _dispatched(reference.step)
choose = _dispatched(reference.choose)
image_sums = _dispatched(reference.image_sums)
gradient_sums = _dispatched(reference.gradient_sums)
mend = _dispatched(reference.mend)
unfolded = _dispatched(reference.unfolded)


@contextmanager
def using(choice: str) -> Iterator[None]:
    """A context in which the kernels are those of a choice: ``"reference"`` takes plain PyTorch on any device."""
    token = _PLAIN.set(choice == "reference")
    try:
        yield
    finally:
        _PLAIN.reset(token)


def missing(device: torch.device) -> str | None:
    """Why a device has no native kernels, or ``None`` where it has them."""
    if device.type == "cpu":
        return cpu.why_not()
    if device.type != "cuda":
        return f"there are none for {device.type}"
    if _GPU_FAULTS:
        return _GPU_FAULTS[0]
    return None if _gpu() is not None else "Triton is not installed"
