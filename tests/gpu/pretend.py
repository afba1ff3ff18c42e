"""A GPU for machines that have none: data of the CPU whose storages carry the label of another device.

Inside :class:`Pretend` a labelled tensor says ``cuda:1`` when it is asked for its device. Mixing devices raises, as on
a GPU; every wait of the host for the device and every copy between the two is counted, with file and line; so are
launches (calls of ATen operations that are not views) and the bytes of labelled storages that are alive. A memory
limit and ``torch.cuda.set_sync_debug_mode("error")`` raise as they would there.

What it cannot show: speed, numbers of another processor, compiled kernels, streams.
"""

from __future__ import annotations

import sys
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from monai_lm.kernels import reference
from monai_lm.solver import refinement

CPU = torch.device("cpu")
TOTAL_MEMORY = 80 * 2**30

_READ_BY_HOST = {"_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "unique_consecutive", "masked_select"}
_READ_BY_HOST |= {"equal", "_linalg_check_errors", "bincount", "repeat_interleave"}
_NO_LAUNCH = {"empty", "empty_like", "new_empty", "empty_strided", "lift_fresh", "detach", "alias", "equal"}
_NO_LAUNCH |= {"_local_scalar_dense", "set_", "resize_", "is_same_size", "_unsafe_view", "view_as"}
_ALL_ALIKE = {"cat", "stack"}  # where even a number of another device is refused
_LOOKED_UP = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}  # by indices of the host, too


def label(tensor: Tensor) -> torch.device:
    """The device that a tensor says it is on."""
    return getattr(tensor.untyped_storage(), "labelled_device", CPU)


def _named(device: Any) -> torch.device:
    """With its index: the current CUDA device is always the first one."""
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return torch.device(device.type, 0) if device.type != "cpu" and device.index is None else device


def _where() -> str:
    """The innermost line of the package, or of what is tested in its place, that is being run."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename.replace("\\", "/")
        if "/monai_lm/" in path and "/tests/" not in path:
            return f"{path.rsplit('/monai_lm/', 1)[1]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "outside of the package"


class Pretend:
    """A context in which tensors may carry the label of a device.

    Attributes:
        waits: how often the host waited for the device, or copied to it, by (what, ``file:line``).
        launches: calls of operations on labelled tensors that are no views.
        live: bytes of labelled storages.
        peak: the most of them at a time.
        limit: bytes of labelled storages from which on an allocation raises ``torch.OutOfMemoryError``.
    """

    def __init__(self) -> None:
        self.waits: Counter[tuple[str, str]] = Counter()
        self.launches = self.live = self.peak = 0
        self.limit = float(TOTAL_MEMORY)
        self.sync_debug_mode = "default"
        self._stack = ExitStack()

    def __enter__(self) -> Pretend:
        for patch in self._patches():
            self._stack.enter_context(patch)
        self._stack.enter_context(_Functions(self))
        self._stack.enter_context(_Operations(self))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def wait_count(self) -> int:
        """All waits and copies."""
        return sum(self.waits.values())

    def wait(self, what: str) -> None:
        """Count one; RuntimeError where the program has said that there must be none."""
        where = _where()
        if self.sync_debug_mode == "error":
            raise RuntimeError(f"called a synchronizing CUDA operation: {what} at {where}")
        self.waits[what, where] += 1

    def mark(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Label the storage of a tensor, if it has no label yet."""
        storage = tensor.untyped_storage()
        if device.type != "cpu" and not hasattr(storage, "labelled_device"):
            if device.type == "mps" and tensor.dtype == torch.float64:
                raise TypeError(f"Cannot convert a MPS Tensor to float64 dtype, at {_where()}")
            size = storage.nbytes()
            if self.live + size > self.limit:
                raise torch.OutOfMemoryError(f"{device}: {self.live + size} of {self.limit:.0f} bytes, at {_where()}")
            storage.labelled_device = device  # type: ignore[attr-defined]
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, size)
        return tensor

    def _freed(self, size: int) -> None:
        self.live -= size

    def _patches(self) -> Iterator[Any]:
        """What ``torch.cuda`` says and does."""

        def set_limit(fraction: float, _: Any = None) -> None:
            self.limit = fraction * TOTAL_MEMORY

        def reset_peak(_: Any = None) -> None:
            self.peak = self.live

        answers = {
            "is_available": lambda: True,
            "device_count": lambda: 2,
            "current_device": lambda: 0,
            "current_stream": lambda _=None: None,
            "synchronize": lambda _=None: self.wait("synchronize"),
            "mem_get_info": lambda _=None: (int(self.limit) - self.live, TOTAL_MEMORY),
            "memory_allocated": lambda _=None: self.live,
            "memory_reserved": lambda _=None: self.live,
            "max_memory_allocated": lambda _=None: self.peak,
            "reset_peak_memory_stats": reset_peak,
            "empty_cache": lambda: None,
            "set_per_process_memory_fraction": set_limit,
            "get_device_name": lambda _=None: "a label",
            "get_device_properties": lambda _=None: SimpleNamespace(total_memory=TOTAL_MEMORY, name="a label"),
            "get_device_capability": lambda _=None: (0, 0),
            "get_sync_debug_mode": lambda: self.sync_debug_mode,
            "set_sync_debug_mode": lambda mode: setattr(self, "sync_debug_mode", mode),
            "Event": _Event,
            "device": _device_guard,
        }
        for name, answer in answers.items():
            yield mock.patch.object(torch.cuda, name, answer)
        yield mock.patch.object(refinement, "rehearse")  # its threads know no labels


@contextmanager
def _device_guard(_: Any) -> Iterator[None]:
    yield


class _Event:
    """An event that knows when it was recorded."""

    def __init__(self, **_: Any) -> None:
        self.seconds = 0.0

    def record(self, _: Any = None) -> None:
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: _Event) -> float:
        return 1000 * (later.seconds - self.seconds)


class _Functions(TorchFunctionMode):
    """What Python's face of a tensor says of its device, and what moves or makes tensors."""

    def __init__(self, pretend: Pretend) -> None:
        super().__init__()
        self.pretend = pretend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        handler = getattr(self, f"on_{name.strip('_')}", None) if args and isinstance(args[0], Tensor) else None
        if handler is not None:
            return handler(func, args, kwargs)
        if kwargs.get("device") is not None:
            return self._made(name, func, args, kwargs)
        given = {label(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)} - {CPU}
        if len(given) != 1:
            return func(*args, **kwargs)
        with self.telling(inside=given.pop()):
            return func(*args, **kwargs)

    def on_get(self, func: Any, args: Any, kwargs: Any) -> Any:
        attribute, device = func.__self__.__name__, label(args[0])
        if attribute == "device":
            return device
        if attribute in ("is_cuda", "is_mps", "is_cpu"):
            return device.type == attribute[3:]
        return func(*args, **kwargs)

    def on_get_device(self, func: Any, args: Any, kwargs: Any) -> int:
        index = label(args[0]).index
        return -1 if index is None else index

    def on_tolist(self, func: Any, args: Any, kwargs: Any) -> Any:
        if label(args[0]) != CPU:
            self.pretend.wait("tolist")
        return func(*args, **kwargs)

    def on_numpy(self, func: Any, args: Any, kwargs: Any) -> Any:
        if label(args[0]) != CPU:
            raise TypeError(f"can't convert {label(args[0])} device type tensor to numpy, at {_where()}")
        return func(*args, **kwargs)

    on_array = on_numpy

    def on_pin_memory(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        return args[0]

    def on_deepcopy(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        tensor, memo = args
        if label(tensor) == CPU:
            return func(*args, **kwargs)
        copied = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        if isinstance(tensor, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, tensor.requires_grad)
        return memo.setdefault(id(tensor), copied)

    def on_cpu(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        return self._moved(args[0], CPU, None, copy=False)

    def on_cuda(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        device = args[1] if len(args) > 1 else kwargs.get("device")
        return self._moved(args[0], _named("cuda" if device is None else device), None, copy=False)

    def on_to(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        tensor, *rest = args
        copy = bool(kwargs.pop("copy", False))
        if rest and isinstance(rest[0], Tensor):
            return self._moved(tensor, label(rest[0]), rest[0].dtype, copy)
        other = kwargs.pop("other", None)
        if other is not None:
            return self._moved(tensor, label(other), other.dtype, copy)
        device, dtype, _, _ = torch._C._nn._parse_to(*rest[:2], **kwargs)
        return self._moved(tensor, None if device is None else _named(device), dtype, copy)

    def _moved(self, tensor: Tensor, device: torch.device | None, dtype: torch.dtype | None, copy: bool) -> Tensor:
        dtype = tensor.dtype if dtype is None else dtype
        if device is None or device == label(tensor):
            return tensor.to(dtype, copy=copy)
        self.pretend.wait(f"copy {label(tensor).type} to {device.type}")
        with self.telling(target=device):
            return tensor.to(dtype, copy=True)

    @contextmanager
    def telling(self, **devices: torch.device) -> Iterator[None]:
        """Tell the mode below about the call that it will see the operations of."""
        operations = torch.utils._python_dispatch._get_current_dispatch_mode()
        assert isinstance(operations, _Operations)
        before = {name: getattr(operations, name) for name in devices}
        vars(operations).update(devices)
        try:
            yield
        finally:
            vars(operations).update(before)

    def on_new_tensor(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        device = kwargs.pop("device", None)
        device = label(args[0]) if device is None else _named(device)
        return self._copied_from_host(func, args, kwargs, device)

    def _made(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        device = _named(kwargs.pop("device"))
        if name in ("as_tensor", "asarray") and isinstance(args[0], Tensor):
            return self._moved(args[0], device, kwargs.get("dtype"), copy=False)
        if name in ("tensor", "as_tensor", "asarray"):
            return self._copied_from_host(func, args, kwargs, device)
        with self.telling(target=device):
            return func(*args, **kwargs, device="cpu")

    def _copied_from_host(self, func: Any, args: Any, kwargs: Any, device: torch.device) -> Tensor:
        if device.type != "cpu":
            self.pretend.wait("copy cpu to " + device.type)
        made = func(*args, **kwargs)
        with self.telling(target=device):
            return made.detach().clone().requires_grad_(made.requires_grad)


class _Operations(TorchDispatchMode):
    """Every ATen operation: devices must agree, results are labelled, waits, launches and bytes are counted."""

    def __init__(self, pretend: Pretend) -> None:
        super().__init__()
        self.pretend = pretend
        self.target: torch.device | None = None  # what is made is there, whatever it is made of
        self.inside: torch.device | None = None  # the call is about tensors there, and so is what it makes of nothing

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        device = self.target or (self._agreed(name, tensors) if tensors else self.inside) or CPU
        if device.type != "cpu" and self.target is None:
            self._count(name, func.is_view, tensors)
        if func.namespace == "monai_lm" and device.type not in (
            "cpu",
            "cuda",
        ):  # there are no kernels but the reference
            with _Functions(self.pretend), _Operations(self.pretend):
                return getattr(reference, name)(*args, **kwargs)
        out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.pretend.mark(tensor, device)
        return out

    def _agreed(self, name: str, tensors: list[Tensor]) -> torch.device:
        """The device of an operation; a number of the CPU goes with any."""
        found = {label(t) for t in tensors if t.dim() > 0 or label(t) != CPU or name in _ALL_ALIKE}
        others = found - {CPU}
        if name == "copy_":
            if len(found) > 1:
                self.pretend.wait("copy " + " to ".join(label(t).type for t in tensors[1::-1]))
            return label(tensors[0])
        if name in _LOOKED_UP and len(others) == 1 and label(tensors[0]) != CPU:
            if CPU in found:
                self.pretend.wait("copy cpu to " + label(tensors[0]).type)
            return label(tensors[0])
        if len(found) > 1:
            devices = ", ".join(sorted(str(d) for d in found))
            raise RuntimeError(f"expected all tensors on one device, found {devices} in {name} at {_where()}")
        return next(iter(others), CPU)

    def _count(self, name: str, is_view: bool, tensors: list[Tensor]) -> None:
        masked = name in _LOOKED_UP and any(t.dtype == torch.bool for t in tensors[1:])
        filled = name.startswith("index_put") and tensors[-1].numel() == 1  # CUDA fills by the mask as it is
        if name in _READ_BY_HOST or (masked and not filled):
            self.pretend.wait(name)
        if not is_view and name not in _NO_LAUNCH:
            self.pretend.launches += 1
