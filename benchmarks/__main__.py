"""Command line of the benchmarks."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from jsonargparse import auto_cli

from benchmarks.ablation import ablation
from benchmarks.alignment import alignment
from benchmarks.axes import axes
from benchmarks.brain import brain
from benchmarks.brain_bundle import brain_bundle
from benchmarks.contrasts import contrasts
from benchmarks.conventions import conventions
from benchmarks.gpu.command import gpu
from benchmarks.guidance import guidance
from benchmarks.hippocampus import hippocampus
from benchmarks.moving_mask import moving_mask
from benchmarks.optimizers import optimizers
from benchmarks.performance import accuracy, first, memory, reach, scaling, speed
from benchmarks.profile import profile
from benchmarks.prostate import prostate
from benchmarks.repairs import repairs
from benchmarks.smoothness import smoothness
from benchmarks.training import knee, supervision
from benchmarks.uncertainty import uncertainty
from benchmarks.validation import validation
from benchmarks.verdict import verdict
from monai_lm.apps.console import console
from monai_lm.apps.parser import Parser

if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=UserWarning, module="monai")
    commands: list[Any] = [
        hippocampus,
        brain,
        brain_bundle,
        ablation,
        axes,
        alignment,
        speed,
        memory,
        scaling,
        accuracy,
        reach,
        first,
        profile,
        gpu,
        guidance,
        knee,
        supervision,
        optimizers,
        contrasts,
        conventions,
        repairs,
        moving_mask,
        prostate,
        smoothness,
        uncertainty,
        validation,
        verdict,
    ]
    with console("benchmarks"):
        how: dict[str, Any] = {"parser_class": Parser, "prog": "python -m benchmarks"}
        auto_cli(commands, args=sys.argv[1:] or ["--help"], as_positional=False, **how)
