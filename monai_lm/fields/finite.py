"""Checks of numbers and fields: a NaN would become an index, or a field of zeros, without a word."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from inspect import signature
from numbers import Real
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from monai_lm.fields.sampling import recorded

__all__ = ["check_finite", "check_number", "checked"]

P = ParamSpec("P")
R = TypeVar("R")


def check_finite(name: str, tensor: Tensor, hint: str = "") -> None:
    """No NaN and no infinity, else ValueError, which ends with the hint; a GPU is waited for."""
    slabs = tensor.split(max(1, 2**20 // max(1, tensor[:, :, :1].numel())), 2) if tensor.dim() > 2 else [tensor]
    bad = int(sum((~torch.isfinite(slab)).sum() for slab in slabs))  # slab by slab: a field is large
    if bad:
        raise ValueError(f"{name} must be finite, got {bad} NaN or infinite values{hint}")


def check_number(name: str, value: Any, minimum: float, exclusive: bool = False) -> None:
    """A finite real number ``>= minimum`` (``>`` if ``exclusive``)."""
    if isinstance(value, bool) or not isinstance(value, Real | np.integer | np.floating):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    bound = f"{'greater than' if exclusive else 'at least'} {minimum}"
    number = float(value)
    if math.isinf(number):
        raise ValueError(f"{name} must be finite and {bound}, got {value}")
    if not (number > minimum if exclusive else number >= minimum):
        raise ValueError(f"{name} must be {bound}, got {value}")


def checked(function: Callable[P, R], *names: str) -> Callable[P, R]:
    """A function that raises ValueError where the named arguments, fields, are not finite.

    Not while a compiler traces it, and not while autograd records it: a step of training would wait for the GPU at
    every call. The package itself calls what is wrapped, with fields that were checked where they came in.
    """
    places = {name: list(signature(function).parameters).index(name) for name in names}

    @wraps(function)
    def look(*args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function with fields that were looked at."""
        if not recorded(*(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))):
            for name, place in places.items():
                field = args[place] if place < len(args) else kwargs.get(name)
                if isinstance(field, Tensor):
                    check_finite(name, field)
        return function(*args, **kwargs)

    return look
