"""Command line of the benchmarks."""

from __future__ import annotations

import warnings
from typing import Any

from jsonargparse import auto_cli

from benchmarks.ablation import ablation
from benchmarks.brain import brain
from benchmarks.brain_bundle import brain_bundle
from benchmarks.hippocampus import hippocampus
from benchmarks.performance import accuracy, memory, reach, scaling, speed
from benchmarks.profile import profile
from benchmarks.training import knee, supervision
from benchmarks.verdict import verdict

if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=UserWarning, module="monai")
    commands: list[Any] = [
        hippocampus,
        brain,
        brain_bundle,
        ablation,
        speed,
        memory,
        scaling,
        accuracy,
        reach,
        profile,
        knee,
        supervision,
        verdict,
    ]
    auto_cli(commands, as_positional=False)
