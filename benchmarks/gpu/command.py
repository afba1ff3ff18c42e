"""The command ``gpu``, and the process that works for it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.gpu import correctness, scaling, tables
from benchmarks.gpu.steps import Step, now_of, run_steps, table, write_row
from benchmarks.rows import read_rows
from monai_lm.kernels.devices import find_device

PARTS = ("correctness", "tables", "scaling")
_ROOT = Path(__file__).parents[2]


def gpu(out: str, part: str = "all", device: str = "cuda:0", dry: bool = False, minutes: float = 8.5) -> None:
    """Everything that matters on a GPU: correctness, tables against peers, scaling and profile.

    Every step writes a line of JSON to PART.jsonl as it goes; PART.txt, the table, is made of them, also of a part that
    was cut off. A part works in a process of its own, which is started again after a step that ended it.

    Args:
        out: folder for what was measured; what it has of a part is replaced.
        part: correctness, tables, scaling, or all.
        device: cuda, cuda:1, ...
        dry: tiny sizes on the CPU, to see whether it works.
        minutes: most for each part.
    """
    if part not in (*PARTS, "all"):
        raise ValueError(f"part must be all or one of {PARTS}, got {part!r}")
    chosen = find_device("cpu" if dry else device)
    if not dry and chosen.type != "cuda":
        raise ValueError(f"device must be a CUDA device, got {device!r}; --dry tries the steps out on the CPU")
    folder = Path(out).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for name in PARTS if part == "all" else (part,):
        rows = folder / f"{name}.jsonl"
        rows.unlink(missing_ok=True)
        deadline = time.time() + 60 * minutes
        task = {"part": name, "rows": str(rows), "device": str(chosen), "dry": dry, "deadline": deadline}
        run_process([sys.executable, "-m", "benchmarks.gpu.command", json.dumps(task)], rows, deadline)
        text = table(read_rows(rows))
        (folder / f"{name}.txt").write_text(text)
        print(f"{name}\n{text}", flush=True)


def run_process(command: list[str], rows: Path, deadline: float) -> None:
    """Have a process run a part; after one that died, another goes on behind the step that it died of."""
    while True:
        process = subprocess.Popen(command, cwd=_ROOT)
        try:
            code = process.wait(timeout=max(1.0, deadline + 20 - time.time()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            write_row(rows, _interrupted(rows), error="cut off: out of time")
            return
        if code == 0:
            return
        step = _interrupted(rows)
        if step not in {row["step"] for row in read_rows(rows)}:
            write_row(rows, step, error=f"the process ended with status {code}")
        if not now_of(rows).is_file():
            return  # it died before its first step and would do so again
        now_of(rows).unlink()


def _interrupted(rows: Path) -> str:
    """The step that was at work when its process ended."""
    return now_of(rows).read_text() if now_of(rows).is_file() else "start of the process"


def steps_of(part: str, device: torch.device, dry: bool, rows: Path) -> list[Step]:
    """The steps of a part, in the order of their importance."""
    if part == "correctness":
        return correctness.steps(device, dry, rows)
    return tables.steps(device, dry) if part == "tables" else scaling.steps(device, dry, rows.parent)


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    where, lines = torch.device(job["device"]), Path(job["rows"])
    run_steps(steps_of(job["part"], where, job["dry"], lines), lines, where, job["deadline"])
