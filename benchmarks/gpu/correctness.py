"""First part: does it work, and does it compute what the CPU computes."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import pkgutil
import platform
import subprocess
import sys
from pathlib import Path

import torch

import monai_lm
from benchmarks.gpu.measure import timed
from benchmarks.gpu.steps import Step, Values

_ROOT = Path(__file__).parents[2]


def steps(device: torch.device, dry: bool, rows: Path) -> list[Step]:
    """What is there; how fast it copies; the tests marked ``gpu``, each of which writes a line of its own."""
    return [
        ("machine", lambda: machine(device)),
        ("imports", imports),
        ("copy", lambda: copy(device, 2**20 if dry else 2**28)),
        ("tests", lambda: tests(device, dry, rows)),
    ]


def machine(device: torch.device) -> Values:
    """Versions, and the device."""
    values: Values = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}
    installed = {found.name: found.version for found in importlib.metadata.distributions()}
    values |= {name: installed.get(name) for name in ("triton", "monai", "fireants", "fused-lncc")}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        values |= {"device": torch.cuda.get_device_name(device), "gpus": torch.cuda.device_count()}
        values |= {"capability": str(torch.cuda.get_device_capability(device)), "GiB": total / 2**30}
        values["free_GiB"] = free / 2**30
    return values


def imports() -> Values:
    """Every module of the package but adapters; those that cannot be imported, with the reason. One needs Triton."""
    modules = pkgutil.walk_packages(monai_lm.__path__, "monai_lm.")
    found = [module.name for module in modules if not module.name.startswith("monai_lm.integrations.")]
    if importlib.util.find_spec("triton") is None:
        found.remove("monai_lm.kernels.gpu")
    reasons = {name: _reason(name) for name in found if not name.endswith("__main__")}
    return {"modules": len(reasons), "failed": {name: reason for name, reason in reasons.items() if reason}}


def _reason(module: str) -> str | None:
    """Why it cannot be imported."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        return str(error)
    return None


def copy(device: torch.device, count: int) -> Values:
    """Bandwidth of copying float32 within the device, bytes read and written: the roof of everything here."""
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = min(timed(device, lambda: [target.copy_(source) for _ in range(10)])[1] for _ in range(3))
    return {"GB_per_s": 10 * 8 * count / seconds / 1e9, "MiB": 4 * count / 2**20}


def tests(device: torch.device, dry: bool, rows: Path) -> Values:
    """``pytest -m gpu``: kernels against float64, modes, memory, determinism, waits. Those in 2D when dry."""
    chosen = ["-k", "2D"] if dry else []
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu", "--device", str(device), *chosen]
    environment = {**os.environ, "MONAI_LM_GPU_ROWS": str(rows.absolute())}
    command += ["-p", "benchmarks.gpu.plugin", "-p", "no:cacheprovider"]
    out = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, check=False)
    last = (out.stdout.strip().splitlines() or [out.stderr[-500:]])[-1]
    values: Values = {"closing_line": last, "exit_code": out.returncode}
    return values | ({} if out.returncode == 0 else {"output": (out.stdout + out.stderr)[-3000:]})
