"""Peers in processes and environments of their own, watched from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.descents import DESCENTS

__all__ = ["PEERS", "Outcome", "machine", "work"]

PEERS: dict[str, tuple[str, ...]] = {
    "fireants": ("torch==2.13.0", "fireants"),
    "greedy": ("picsl-greedy",),
    "ants": ("antspyx",),
}
"""What to install for a peer; each gets a virtual environment, because their requirements exclude each other."""

_WORKERS = Path(__file__).parent / "workers"


@dataclass(frozen=True)
class Outcome:
    """What a worker's process told and showed.

    Attributes:
        seconds: of the registration itself.
        first: seconds of a first, short run in the same process, if there was one.
        peak: largest resident memory above that after the imports, in bytes; on a GPU what torch had allocated there.
        settings: the method's.
    """

    seconds: float
    first: float | None
    peak: int
    settings: dict[str, Any]


def work(method: str, **task: Any) -> Outcome:
    """Run one method in a process of its own.

    Args:
        method: ``fireants``, ``fireants-lm``, ``greedy``, ``ants``, ``lm``, and in our engine those of
            :data:`benchmarks.descents.DESCENTS`.
        task: ``fixed``, ``moving``, ``scales``, ``iterations``, ``threads``, ``device`` (greedy and ants have no other
            than the CPU), and what the worker may know more.
    """
    if method in (*DESCENTS, "fireants-lm"):
        task["optimizer"] = "levenberg" if method == "fireants-lm" else method
    peer = method.removesuffix("-lm")
    python, script = (_python(peer), f"run_{peer}.py") if peer in PEERS else (sys.executable, "run_ours.py")
    with tempfile.TemporaryDirectory() as folder:
        task = {"output": str(Path(folder) / "label.nii.gz"), **task}
        environment = {**os.environ, "OMP_NUM_THREADS": str(task["threads"])}
        process = subprocess.Popen(
            [python, str(_WORKERS / script), json.dumps(task)], stdout=subprocess.PIPE, text=True, env=environment,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        errors: list[str] = []
        reader = threading.Thread(target=lambda: errors.append(process.stderr.read() if process.stderr else ""))
        reader.start()
        samples: list[tuple[float, int]] = []
        watcher = threading.Thread(target=_watch, args=(process, samples))
        watcher.start()
        assert process.stdout is not None
        events = [json.loads(line[1:]) for line in process.stdout if line.startswith("@")]
        if process.wait() != 0:
            reader.join()
            raise SystemExit(f"{method} failed:\n{errors[0][-2000:]}")
        watcher.join()
    at = {event["event"]: event for event in events}
    base = max(rss for when, rss in samples if when <= at["imported"]["time"] + 0.2)
    peak = max(rss for when, rss in samples if when <= at["done"]["time"]) - base
    peak = at["done"].get("peak") or peak
    return Outcome(at["done"]["seconds"], at["done"].get("first"), peak, at["done"]["settings"])


def machine(threads: int) -> str:
    """One line about where this runs."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "?")
    return f"{model}, {os.cpu_count()} cores, {threads} threads"


def _watch(process: subprocess.Popen[str], samples: list[tuple[float, int]]) -> None:
    """Sample the resident memory of a process until it ends."""
    page = os.sysconf("SC_PAGE_SIZE")
    while process.poll() is None:
        try:
            samples.append((time.time(), int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * page))
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            return
        time.sleep(0.01)


def _python(peer: str) -> str:
    """Interpreter of a peer's environment, made at its first use in ``$MONAI_LM_PEERS`` (default: the user's cache)."""
    root = Path(os.environ.get("MONAI_LM_PEERS", Path.home() / ".cache" / "monai_lm" / "peers")) / peer
    python = root / "bin" / "python"
    installed = root / "installed"  # lists what was installed; older ones are empty
    if not installed.is_file() or installed.read_text().split() not in ([], list(PEERS[peer])):
        subprocess.run([sys.executable, "-m", "venv", str(root)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *PEERS[peer]], check=True)
        installed.write_text("\n".join(PEERS[peer]) + "\n")
    return str(python)
