"""Speed, memory and scaling, against peers in the same run."""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from benchmarks.data import BRAIN_SPLIT, brain_image, data_root, read_image
from benchmarks.descents import DESCENTS
from benchmarks.metrics import mean_dice
from benchmarks.peers import Outcome, machine, work
from benchmarks.rows import add_row


def speed(
    peers: tuple[str, ...] = ("predicted", "greedy", "fireants", "adam"),
    repeats: int = 3,
    threads: int = 2,
    device: str = "cpu",
    json_file: str | None = None,
) -> None:
    """Seconds per full-resolution iteration of a 1 mm brain (1000 ← 1001), each method in its own process.

    The difference of a long and a short run over the difference of their iterations: start-up and files cancel.
    Methods take turns; medians and ratios are printed.

    Args:
        peers: any of greedy, fireants, fireants-lm, ants and :data:`DESCENTS`; ``predicted`` is LM from a prediction.
        repeats: runs of each method.
        threads: for every method.
        device: cpu, cuda, ...; greedy and ants stay on the CPU.
        json_file: write one line per run here, as it goes.
    """
    pair = _brain_pair("1000", "1001")
    counts = {"fireants": (1, 3), "fireants-lm": (1, 3), "ants": (1, 3)}
    print(f"speed: {machine(threads)}; 176x224x176, seconds per iteration", flush=True)
    measured: dict[str, list[float]] = {method: [] for method in ("lm", *peers)}
    for _ in range(repeats):
        for method, values in measured.items():
            few, many = counts.get(method, (5, 25))
            task = {**pair, "scales": [1], "threads": threads, "device": device, "warm": True}
            name, task["prediction"] = ("lm", True) if method == "predicted" else (method, False)
            runs = [work(name, **task, iterations=[n]) for n in (few, many)]
            values.append((runs[1].seconds - runs[0].seconds) / (many - few))
            add_row(json_file, {"method": method, "seconds": values[-1], "settings": runs[1].settings})
            print(f"  {method:<12}{values[-1]:8.3f}", flush=True)
    medians = {method: statistics.median(values) for method, values in measured.items()}
    for method, value in medians.items():
        print(f"{method:<14}median {value:7.3f} s   {value / medians['lm']:6.1f} x LM", flush=True)


def memory(
    peers: tuple[str, ...] = ("adam", "greedy"),
    modes: tuple[str, ...] = ("full", "half"),
    similarities: tuple[Any, ...] = ("lncc",),
    channels: tuple[int, ...] = (1,),
    size: int = 256,
    iterations: int = 12,
    threads: int = 2,
    device: str = "cpu",
    json_file: str | None = None,
) -> None:
    """Peak resident memory above that after the imports, in V (one float32 image of one channel), two images included.

    Ours refine a predicted field, which the caller owns: its 3 V are taken off. Images are synthetic.

    Args:
        peers: any of greedy, fireants, fireants-lm, ants and :data:`DESCENTS`; with one channel and LNCC.
        modes: of ours.
        similarities: of ours: names, or ``{name: {argument: value}}``.
        channels: of the images, of ours.
        size: edge of the cube.
        iterations: at full resolution.
        threads: for every method.
        device: cpu, cuda, ...; greedy and ants stay on the CPU.
        json_file: write one line per run here, as it goes.
    """
    volume = 4 * size**3
    ours_in: dict[str, dict[str, Any]] = {
        f"lm, {mode}, {measure}, {count}": {"options": {"memory": mode, "similarity": measure}, "channels": count}
        for mode, measure, count in product(modes, similarities, channels)
    }
    print(f"memory: {machine(threads)}; {size}^3, peak above the imports in V = {volume / 2**20:.0f} MiB", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        pair = _synthetic_pair(Path(folder), (size,) * 3)
        for method in (*ours_in, *peers):
            ours = method in ours_in or method in DESCENTS
            name = "lm" if method in ours_in else method
            count = 2 if name.startswith("fireants") else iterations
            task = {**pair, "scales": [1], "iterations": [count], "threads": threads, "device": device}
            task["prediction"] = ours
            task |= ours_in.get(method, {})
            out = work(name, **task)
            peak = out.peak / volume - (3 if ours else 0)
            row = {"method": method, "size": size, "volumes": peak, "seconds": out.seconds / count}
            add_row(json_file, {**row, "settings": out.settings})
            print(f"{method:<24}{peak:7.1f} V   {out.seconds / count:8.3f} s an iteration, all included", flush=True)


def scaling(
    sizes: tuple[int, ...] = (128, 160, 192, 224, 256, 320),
    mode: str = "full",
    threads: int = 2,
    device: str = "cpu",
    json_file: str | None = None,
) -> None:
    """Seconds per iteration and peak memory of ours over the image size, and the exponents in the number of voxels.

    Args:
        sizes: edges of the cubes.
        mode: ``full`` or ``half``.
        threads: to use.
        device: cpu, cuda, ...; greedy and ants stay on the CPU.
        json_file: write one line per size here, as it goes.
    """
    print(f"scaling, memory={mode!r}: {machine(threads)}", flush=True)
    rows = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            pair = _synthetic_pair(Path(folder), (size,) * 3)
            task = {**pair, "scales": [1], "threads": threads, "device": device, "options": {"memory": mode}}
            task["prediction"] = True
            runs = [work("lm", **task, iterations=[n], warm=True) for n in (3, 13)]
        seconds = (runs[1].seconds - runs[0].seconds) / 10
        rows.append((size**3, seconds, runs[1].peak - 12 * size**3))
        add_row(json_file, {"size": size, "mode": mode, "seconds": seconds, "volumes": rows[-1][2] / (4 * size**3)})
        print(f"{size:4d}^3 {seconds:8.3f} s/iteration {1e9 * seconds / size**3:7.1f} ns/voxel", end=" ")
        print(f"{rows[-1][2] / (4 * size**3):6.1f} V", flush=True)
    for name, column in (("time", 1), ("memory", 2)):
        logs = np.log([[row[0], row[column]] for row in rows])
        print(f"exponent of {name}: {np.polyfit(logs[:, 0], logs[:, 1], 1)[0]:.3f}", flush=True)


def accuracy(
    methods: tuple[str, ...] = ("lm", "greedy", "fireants", "fireants-lm", "ants"),
    part: str = "test",
    pairs: int = 3,
    scales: tuple[int, ...] = (4, 2, 1),
    iterations: tuple[int, ...] = (100, 50, 25),
    settings: dict[str, dict[str, Any]] | None = None,
    threads: int = 2,
    device: str = "cpu",
    json_file: str | None = None,
) -> None:
    """Dice and seconds of whole registrations of 1 mm brains.

    Args:
        methods: to compare; ``lm`` runs with the defaults, in a new process: kernels come from the cache on disk.
        part: of the split by fixed subject: ``test`` to report, ``validation`` to tune.
        pairs: how many, each fixed subject with the next one of the part as moving.
        scales: of all methods.
        iterations: per scale.
        settings: of fireants and fireants-lm by name, over those in ``workers/run_fireants.py``; to tune them.
        threads: for every method.
        device: cpu, cuda, ...; greedy and ants stay on the CPU.
        json_file: write one line per run here, as it goes.
    """
    if unknown := sorted(set(settings or {}) - {"fireants", "fireants-lm"}):
        raise SystemExit(f"settings must be those of fireants or fireants-lm, got {unknown}")
    print(f"accuracy, {part}: {machine(threads)}", flush=True)
    subjects = BRAIN_SPLIT[part]
    scores: dict[str, list[float]] = {method: [] for method in methods}
    for fixed, moving in list(zip(subjects, (*subjects[1:], subjects[0]), strict=True))[:pairs]:
        for method in methods:
            task = {**_brain_pair(fixed, moving), "scales": scales, "iterations": iterations, "threads": threads}
            task["device"] = device
            task["settings"] = (settings or {}).get(method, {})
            dice, seconds = _dice_of(method, fixed, moving, **task)
            scores[method].append(dice)
            add_row(json_file, {"fixed": fixed, "moving": moving, "method": method, "dice": dice, "seconds": seconds})
            print(f"{fixed} <- {moving}  {method:<13}{dice:7.4f}{seconds:9.1f} s", flush=True)
    for method, values in scores.items():
        print(f"{method:<13}mean Dice {statistics.mean(values):.4f}", flush=True)


def reach(
    pairs: tuple[tuple[str, str], ...] = (("1000", "1001"), ("1000", "1002")),
    finest: tuple[int, ...] = (0, 1, 2, 4, 8, 16, 25),
    threads: int = 2,
    device: str = "cpu",
    json_file: str | None = None,
) -> None:
    """Seconds until ours has the Dice that greedy ends with, 1 mm brains of the validation split.

    Greedy runs its whole schedule. Ours runs 100-50-n with n rising until its Dice is greedy's: warm (the second run of
    a process) and in a new process whose kernels come from the cache on disk. Start-up and files do not count.

    Args:
        pairs: fixed and moving subject.
        finest: iterations at full resolution that are tried.
        threads: for both.
        device: cpu, cuda, ...; greedy and ants stay on the CPU.
        json_file: write one line per run here, as it goes.
    """
    print(f"reach: {machine(threads)}", flush=True)
    for fixed, moving in pairs:
        whole, goal, spent = {**_brain_pair(fixed, moving), "threads": threads, "device": device}, 0.0, 0.0
        runs = [("greedy", False, 25)] + [("lm", warm, n) for warm in (False, True) for n in finest]
        reached: set[bool] = set()
        for method, warm, n in runs:
            if method == "lm" and warm in reached:
                continue
            task = {**whole, "scales": [4, 2, 1], "iterations": [100, 50, n], "warm": warm}
            dice, seconds = _dice_of(method, fixed, moving, **task)
            row = {"fixed": fixed, "moving": moving, "method": method, "warm": warm, "finest": n}
            add_row(json_file, {**row, "dice": dice, "seconds": seconds})
            if method == "greedy":
                goal, spent = dice, seconds
                print(f"{fixed} <- {moving}  greedy: Dice {goal:.4f} in {spent:.1f} s", flush=True)
            elif dice >= goal:
                reached.add(warm)
                how = f"{'warm' if warm else 'new process'}: Dice {dice:.4f} in {seconds:.1f} s"
                print(f"  LM 100-50-{n}, {how}, {seconds / spent:.2f} of greedy's", flush=True)


def first(size: int = 64, repeats: int = 2) -> None:
    """Seconds of the very first refinement, with no kernels in the cache, and of the next one, in new processes.

    Args:
        size: edge of the cube.
        repeats: how often, each with a cache of its own.
    """
    code = (
        "import time, torch; from monai_lm import refine; torch.manual_seed(0); "
        f"x = torch.rand(2, 1, 1, *[{size}] * 3); started = time.perf_counter(); refine(*x); "
        "print(time.perf_counter() - started)"
    )
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            hidden = ("MONAI_LM_KERNELS", "XDG_CACHE_HOME")
            environment = {key: value for key, value in os.environ.items() if key not in hidden}
            environment |= dict.fromkeys(("MONAI_LM_CACHE", "HOME", "TMPDIR"), cache)
            runs = [subprocess.check_output([sys.executable, "-c", code], env=environment, text=True) for _ in "12"]
        cold, warm = map(float, runs)
        print(f"first {cold:.2f} s, next {warm:.2f} s: {cold - warm:.2f} s more", flush=True)


def _dice_of(method: str, subject: str, moving_subject: str, **task: Any) -> tuple[float, float]:
    """Mean Dice of the warped structures, and the seconds of the registration."""
    with tempfile.TemporaryDirectory() as folder:
        label, output = data_root("brain") / f"{moving_subject}_seg.nii.gz", Path(folder) / "label.nii.gz"
        options = {"tolerance": 0.005}
        out: Outcome = work(method, **task, label=str(label), output=str(output), options=options)
        warped = torch.from_numpy(read_image(output)[0])[None, None]
    return mean_dice(brain_image(subject, "seg"), warped), out.seconds


def _brain_pair(fixed: str, moving: str) -> dict[str, str]:
    root = data_root("brain")
    return {"fixed": str(root / f"{fixed}_t1.nii.gz"), "moving": str(root / f"{moving}_t1.nii.gz")}


def _synthetic_pair(folder: Path, size: tuple[int, ...]) -> dict[str, str]:
    """Two images of low-frequency waves, a few voxels apart, without compression."""
    axes = np.meshgrid(*(np.arange(s, dtype=np.float32) for s in size), indexing="ij", sparse=True)
    pair = {}
    for name, shift in (("fixed", 0.0), ("moving", 2.5)):
        image = sum(np.sin(2 * math.pi * (a + shift) / p) for a in axes for p in (17.0, 29.0, 53.0))
        pair[name] = str(folder / f"{name}.nii")
        nib.save(nib.Nifti1Image(np.asarray(image, np.float32), np.eye(4)), pair[name])
    return pair
