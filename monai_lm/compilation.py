"""Compile a kernel where that pays, run it eagerly where it does not or cannot."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

__all__ = ["compiled", "pays"]

logger = logging.getLogger(__name__)

_WORTH = 4e7
"""Voxels times iterations above which compiling a level saves more time than it costs (measured, 2 CPU cores)."""


def pays(device: torch.device, voxels: int, iterations: int) -> bool:
    """Whether compiling for this much work at one shape is likely to save time, and a compiler is there."""
    return voxels * iterations >= _WORTH and _compiler_found(device.type)


@lru_cache
def _compiler_found(device_type: str) -> bool:
    if device_type == "cpu":
        return any(shutil.which(name) for name in ("g++", "clang++", "c++"))
    return device_type == "cuda"


class _Compiled:
    """A function that is compiled at its first call and falls back to eager for good if that fails."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.eager = function
        self.call: Callable[..., Any] = torch.compile(function, dynamic=False, fullgraph=True)

    def __call__(self, *args: Any) -> Any:
        if self.call is self.eager:
            return self.eager(*args)
        try:
            with torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=4096):
                return self.call(*args)
        except torch._dynamo.exc.TorchDynamoException as error:
            logger.warning("compiling %s failed, running it eagerly: %s", self.eager.__name__, error)
            self.call = self.eager
            return self.eager(*args)


@lru_cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled version of a module-level function of tensors, one per process (shapes are static within it)."""
    return _Compiled(function)
