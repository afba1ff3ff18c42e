"""Running a bundle's configurations by MONAI's command, here or in several processes."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run_bundle(bundle: Path, names: list[str], processes: int = 1, **settings) -> None:
    """Run configurations, the later over the earlier, from the bundle's folder.

    One process is this one, which has imported everything: ``python -m monai.bundle run`` without its start.
    """
    files = ",".join(f"'configs/{name}.json'" for name in names)
    options = {"config_file": f"[{files}]", **settings}
    command = ["monai.bundle", "run", *(text for key, value in options.items() for text in (f"--{key}", str(value)))]
    (_run_here if processes == 1 else _run_in)(bundle, command, processes)


def _run_here(bundle: Path, command: list[str], _processes: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(bundle)
        patch.syspath_prepend(bundle)
        patch.setattr(sys, "argv", [*command, "--logging_file", "False"])  # logging is this process's
        try:
            runpy.run_module(command[0], run_name="__main__")
        finally:
            for name in [name for name in sys.modules if name.split(".")[0] == "scripts"]:
                del sys.modules[name]


def _run_in(bundle: Path, command: list[str], processes: int) -> None:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*start, *command], cwd=bundle, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
