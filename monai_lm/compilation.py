"""Compile a kernel where that pays, run it eagerly where it does not or cannot."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.callback import callback_handler
from torch._inductor.runtime.cache_dir_utils import cache_dir

__all__ = ["CompileClock", "Ledger", "compiled", "compiler_found", "compiling", "many_shapes", "piece"]

logger = logging.getLogger(__name__)

_WORTH = {"cpu": 1.6e8, "cuda": 1e10}
"""Voxels times iterations above which compiling a level saves more time than it costs, some 30 s: .2 µs per voxel and
iteration on 2 CPU cores (measured), some 60 times less on a GPU (counted: launches and bytes, not measured)."""

_WORTH_LOADING = {"cpu": 2e7, "cuda": 1.2e9}
"""The same where the compiled kernels lie in the cache on disk, from which they come in some 4 s."""


_LOADED: set[str] = set()
"""Names of the ledgers whose kernels this process has compiled or loaded."""


class Ledger:
    """What has been done at one level's shape on this machine so far: work done eagerly, and whether it was compiled.

    Compiling pays when the work ahead is large enough, and also when the eager work so far was: whoever comes back to a
    shape will come back again. It is kept in a small file in the compiler's cache on disk.

    Args:
        device: where the level's tensors are.
        key: what the level's kernels are compiled for.
    """

    def __init__(self, device: torch.device, *key: object) -> None:
        self._device = device
        name = hashlib.sha256(repr((torch.__version__, str(device), *key)).encode()).hexdigest()[:32]
        self._name, self._file = name, Path(cache_dir()) / "monai_lm" / f"{name}.json"

    def pays(self, work: float) -> bool:
        """Whether compiling is likely to save time on ``work`` (voxels times iterations), and a compiler is there."""
        if not compiler_found(self._device.type):
            return False
        if self._name in _LOADED:
            return True
        done = self._read()
        kind = self._device.type
        return work >= _WORTH_LOADING[kind] if done["compiled"] else work + done["work"] >= _WORTH[kind]

    def note(self, work: float, fused: bool) -> None:
        """Note work that is done."""
        if fused:
            _LOADED.add(self._name)
        done = self._read()
        done = {"compiled": done["compiled"] or fused, "work": done["work"] + (0 if fused else work)}
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.write_text(json.dumps(done))
        except OSError as error:  # a full or read-only disk: the next run decides as if it were the first
            logger.debug("cannot write %s: %s", self._file, error)

    def _read(self) -> dict[str, float]:
        try:
            done = json.loads(self._file.read_text())
            return {"compiled": bool(done["compiled"]), "work": float(done["work"])}
        except (OSError, ValueError, KeyError, TypeError):  # not there, or half written by a process beside this one
            return {"compiled": False, "work": 0.0}


@lru_cache
def compiler_found(device_type: str) -> bool:
    """Whether ``torch.compile`` has what it needs for a type of device."""
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
            return self.call(*args)
        except torch._dynamo.exc.TorchDynamoException as error:
            logger.warning("compiling %s failed, running it eagerly: %s", self.eager.__name__, error)
            self.call = self.eager
            return self.eager(*args)


@lru_cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled version of a module-level function of tensors, one per process (shapes are static within it)."""
    return _Compiled(function)


@contextmanager
def many_shapes() -> Iterator[None]:
    """A context in which one function may be compiled for many shapes: levels, devices, images of a cohort.

    Entering it takes as long as calling a small compiled kernel: it is for whole refinements.
    """
    with torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=4096):
        yield


class CompileClock:
    """Measures, as a context, how long the process compiles kernels or loads them from the cache on disk."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since = 0.0

    def __enter__(self) -> CompileClock:
        callback_handler.register_start_callback(self._start)
        callback_handler.register_end_callback(self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        callback_handler.remove_start_callback(self._start)
        callback_handler.remove_end_callback(self._stop)

    def _start(self, *_: object) -> None:
        self._since = time.perf_counter()

    def _stop(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._since


_COMPILING: ContextVar[bool] = ContextVar("monai_lm_compiling", default=False)


@contextmanager
def compiling(pieces: bool = True) -> Iterator[None]:
    """Whether calls of :func:`piece` inside compile what they call."""
    token = _COMPILING.set(pieces)
    try:
        yield
    finally:
        _COMPILING.reset(token)


def piece(function: Callable[..., Any], *args: Any) -> Any:
    """Call a module-level function of tensors, compiled by itself inside :func:`compiling`, else as it is.

    A compiler for CPUs makes one function of all it is given, in which all intermediate results live at the same time.
    What is called piece by piece gives each of them back as soon as it has served.
    """
    if torch.compiler.is_compiling() or not _COMPILING.get():
        return function(*args)
    return compiled(function)(*args)
