"""What refinement adds to a network: in the training loop, and per second at test time."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from monai.networks.nets import VoxelMorphUNet

import monai_lm
from benchmarks.data import BUNDLE, data_root, hippocampus_network, hippocampus_pairs
from benchmarks.gpu.measure import timed
from benchmarks.metrics import mean_dice
from benchmarks.rows import add_row
from monai_lm.fields import fold_count
from monai_lm.kernels.devices import find_device
from monai_lm.training import PairDataModule, RegistrationModule

SUPERVISIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "distill": {"supervision": "distill", "distillation": {"weight": 0.1, "every": 4}},
    "implicit": {"supervision": "implicit"},
}


def supervision(minutes: float = 4.0, labels: bool = True, device: str = "cpu", json_file: str | None = None) -> None:
    """Train a VoxelMorph network on hippocampus pairs for the same wall time in three ways; validation Dice.

    The Dice is that of 20 validation pairs, of the network's own field and after refinement (images only).

    Args:
        minutes: of training, each; validation comes on top.
        labels: with the Dice of the warped label maps; ``implicit`` needs them.
        device: cpu, cuda, ...
        json_file: write one line per way here, as it goes.
    """
    refine, kind = {"scales": (2, 1), "iterations": (10, 5)}, find_device(device).type
    print(f"supervision: hippocampus, {minutes} min each, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'supervision':<14}{'steps':>7}{'Dice':>8}{'refined':>9}{'folds':>9}", flush=True)
    for name, extra in SUPERVISIONS.items():
        if name == "implicit" and not labels:
            continue
        pl.seed_everything(0, verbose=False)
        network = VoxelMorphUNet(3, 2, 16, [16, 32, 32, 32, 32, 32], [])
        data = PairDataModule(
            data_root("hippocampus"), split=BUNDLE / "configs" / "split.json", pairs={"train": 400, "validation": 20},
            grid=(48, 64, 48), labels=3,
        )  # fmt: skip
        module = RegistrationModule(
            network, labels=3 if labels else 0, smoothness=0.2, refine=refine,
            optimizer=lambda parameters: torch.optim.Adam(parameters, 1e-3), **extra,
        )  # fmt: skip
        trainer = pl.Trainer(
            max_time={"seconds": round(60 * minutes)}, max_epochs=-1, accelerator=kind, precision="bf16-mixed",
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            gradient_clip_val=1.0, limit_val_batches=0,
        )  # fmt: skip
        trainer.fit(module, data)
        steps = trainer.global_step
        judge = pl.Trainer(accelerator=kind, logger=False, enable_progress_bar=False, enable_model_summary=False)
        result = judge.validate(module, data.val_dataloader(), verbose=False)[0]
        row = {"supervision": name, "steps": steps} | {k: float(v) for k, v in result.items()}
        print(
            f"{name:<14}{steps:7d}{row['val_dice_before']:8.4f}{row['val_dice_after']:9.4f}{row['val_folds_before']:9.1f}",
            flush=True,
        )
        add_row(json_file, row)


def knee(
    pairs: int = 12,
    part: str = "validation",
    iterations: tuple[tuple[int, int], ...] = ((0, 0), (5, 2), (10, 5), (20, 10), (50, 25)),
    device: str = "cpu",
    json_file: str | None = None,
) -> None:
    """Dice of the hippocampus bundle against the time that refinement takes, as a multiple of the network's.

    Args:
        pairs: how many.
        part: of the split.
        iterations: per level, at half and at full resolution.
        device: cpu, cuda, ...
        json_file: write one line per schedule here.
    """
    chosen = find_device(device)
    network, inferer = hippocampus_network(BUNDLE / "models" / "model.pt", chosen)
    settings: dict[str, Any] = dict(inferer.refine or {}) | {"scales": (2, 1), "damping": (0.1, 0.3)}
    prepared, predicting = [], 0.0
    for pair in hippocampus_pairs(part, pairs, seed=0):
        batch = {k: v[None].to(chosen) for k, v in pair.items()}
        both = torch.cat([batch["moving"], batch["fixed"]], 1)
        for _ in range(2):  # the first call of a shape is slower
            with torch.no_grad():
                ddf, seconds = timed(chosen, inferer.predict, both, network)
        predicting += seconds
        channels = [inferer.channels(batch[key]) for key in ("fixed", "moving")]
        prepared.append((batch, ddf, channels))
    print(f"knee: hippocampus, {part}, {pairs} pairs, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"network {predicting / pairs:.3f} s per pair")
    print(f"{'iterations':<14}{'Dice':>8}{'folds':>7}{'seconds':>9}{'x network':>11}", flush=True)
    for counts in iterations:
        _, first, images = prepared[0]
        monai_lm.refine(images[0], images[1], first, **settings | {"iterations": counts})  # warms up
        dice, folds, seconds = 0.0, 0, 0.0
        for batch, ddf, channels in prepared:
            result = monai_lm.refine(channels[0], channels[1], ddf, **settings | {"iterations": counts})
            seconds += result.seconds
            dice += mean_dice(batch["fixed_label"], batch["moving_label"], result.ddf) / pairs
            folds += int(fold_count(result.ddf))
        row = {"iterations": counts, "dice": dice, "folds": folds, "seconds": seconds / pairs}
        ratio = seconds / predicting
        print(f"{'-'.join(map(str, counts)):<14}{dice:8.4f}{folds:7d}{seconds / pairs:9.3f}{ratio:11.1f}", flush=True)
        add_row(json_file, row | {"ratio": ratio})
