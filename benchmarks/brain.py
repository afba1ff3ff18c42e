"""Brain at 1 mm from the identity, against greedy, pair by pair."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import monai_lm
from benchmarks.data import BRAIN_SPLIT, brain_image, data_root, read_image
from benchmarks.metrics import mean_dice
from benchmarks.rows import add_row
from monai_lm.fields import fold_count
from monai_lm.kernels.devices import find_device

MOVING = ("1001", "1002", "1006", "1000")


def brain(
    part: str = "validation",
    fixed: tuple[str, ...] | None = None,
    moving_per_fixed: int = 1,
    greedy: bool = True,
    prototype: bool = False,
    repeats: int = 1,
    device: str = "cpu",
    json_file: str | None = None,
) -> None:
    """Mean Dice of 138 structures, folds and seconds; scales 4-2-1, iterations 100-50-25.

    Args:
        part: of the split by fixed subject: ``test`` to report, ``validation`` to tune.
        fixed: fixed subjects; default: all of the part.
        moving_per_fixed: how many moving subjects for each (1001, 1002, 1006 for 1000).
        greedy: run picsl-greedy (NCC 2x2x2) beside it, ``pip install picsl-greedy``.
        prototype: also the prototype's settings, damping 1 and smooth_gradient 1 on every level.
        repeats: run each of ours so often in a row; the first one may compile the kernels.
        device: of ours: cpu, cuda, ...
        json_file: write one line per pair here, as it goes.
    """
    settings: dict[str, dict[str, Any]] = {"LM": {}}
    if prototype:
        settings["LM, prototype's settings"] = {"damping": 1.0, "smooth_gradient": 1.0}
    print(f"brain, {part}, torch {torch.__version__}, {torch.get_num_threads()} threads; settings: {settings}")
    print(f"{'fixed':<7}{'moving':<8}{'method':<28}{'Dice':>7}{'folds':>9}{'seconds':>9}", flush=True)
    for f in fixed or BRAIN_SPLIT[part]:
        movings = MOVING[:3] if f == "1000" else [m for m in (*BRAIN_SPLIT[part], *MOVING) if m != f]
        for m in movings[:moving_per_fixed]:
            images = [
                brain_image(s, k).to(find_device(device)) for s, k in ((f, "t1"), (m, "t1"), (f, "seg"), (m, "seg"))
            ]
            rows = [("start", mean_dice(images[2], images[3]), 0, 0.0)]
            for name, extra in settings.items():
                for _ in range(repeats):
                    result = monai_lm.refine(images[0], images[1], scales=(4, 2, 1), iterations=(100, 50, 25), **extra)
                    dice = mean_dice(images[2], images[3], result.ddf)
                    rows.append((name, dice, int(fold_count(result.ddf)), result.seconds))
            if greedy:
                rows.append(("greedy", *_greedy(f, m, images[2])))
            for name, dice, folds, seconds in rows:
                print(f"{f:<7}{m:<8}{name:<28}{dice:7.4f}{folds:9d}{seconds:9.1f}", flush=True)
            add_row(json_file, {"fixed": f, "moving": m, "rows": rows})


def _greedy(fixed: str, moving: str, fixed_label: Tensor) -> tuple[float, int, float]:
    """Dice, folds of its field and seconds of greedy's own command on the same files."""
    if importlib.util.find_spec("picsl_greedy") is None:
        raise SystemExit("greedy is not installed: pip install picsl-greedy")
    root = data_root("brain")
    images = [root / f"{s}_t1.nii.gz" for s in (fixed, moving)]
    with tempfile.TemporaryDirectory() as folder:
        field, label = Path(folder) / "warp.nii.gz", Path(folder) / "label.nii.gz"
        threads = f"-threads {torch.get_num_threads()}"
        started = time.perf_counter()
        _run(f"-d 3 -i {images[0]} {images[1]} -m NCC 2x2x2 -n 100x50x25 -o {field} {threads}")
        seconds = time.perf_counter() - started
        _run(f"-d 3 -rf {images[0]} -ri NN -rm {root / f'{moving}_seg.nii.gz'} {label} -r {field} {threads}")
        warped = torch.from_numpy(read_image(label)[0])[None, None]
        vectors, affine = read_image(field)
    ras = vectors[:, :, :, 0] * np.array([-1.0, -1.0, 1.0])
    voxels = np.einsum("ij,xyzj->ixyz", np.linalg.inv(affine[:3, :3]), ras)
    folds = int(fold_count(torch.from_numpy(voxels[None].astype(np.float32))))
    return mean_dice(fixed_label.cpu(), warped), folds, seconds


def _run(command: str) -> None:
    code = "import sys; from picsl_greedy import Greedy3D; Greedy3D().execute(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, command], check=True, stdout=subprocess.DEVNULL)
