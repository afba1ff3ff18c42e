"""Train the bundle's network, the segmenter first: ``python …/scripts/train.py segmenter --data … --steps 4500``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from monai.bundle import ConfigParser
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).parent))
from data import PairDataset, SubjectDataset, load_subjects
from segmentation import SegmentationModule

from monai_lm.training import RegistrationModule

BUNDLE = Path(__file__).parent.parent
TRAINING_GRID = (48, 64, 48)  # holds every image of the data set; the networks are convolutional, inference uses 64³
LABELS = 3


def main() -> None:
    """Train one stage, keep the last weights, and write them as a plain state dictionary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["segmenter", "registration"], help="the second starts from the first")
    parser.add_argument("--data", required=True, help="folder with images and labels")
    parser.add_argument("--config", default=str(BUNDLE / "configs" / "inference.json"), help="defines the network")
    parser.add_argument("--weights", help="state dictionary to start from")
    parser.add_argument("--output", default=str(BUNDLE / "models" / "model.pt"))
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--unsupervised", action="store_true", help="train the registration without labels")
    parser.add_argument("--smoothness", type=float, default=0.2)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--resume", help="Lightning checkpoint to go on from")
    parser.add_argument("--logs", default="runs")
    args = parser.parse_args()
    pl.seed_everything(0)
    if args.threads:
        torch.set_num_threads(args.threads)

    config = ConfigParser()
    config.read_config(args.config)
    network = config.get_parsed_content("network_def").to(memory_format=torch.channels_last_3d)
    if args.weights:
        network.load_state_dict(torch.load(args.weights, weights_only=True))
    train, validation = (load_subjects(args.data, part, TRAINING_GRID) for part in ("train", "validation"))
    datasets: list[Dataset]
    if args.stage == "segmenter":
        module: pl.LightningModule = SegmentationModule(network, LABELS, args.learning_rate)
        datasets = [SubjectDataset(train, augment=True), SubjectDataset(validation)]
    else:
        if hasattr(network, "segmenter"):
            network.segmenter.requires_grad_(False).eval()
        module = RegistrationModule(
            network=network,
            integration_steps=int(config["integration_steps"]),
            labels=0 if args.unsupervised else LABELS,
            smoothness=args.smoothness,
            learning_rate=args.learning_rate,
        )
        datasets = [PairDataset(train, pairs=400, augment=True), PairDataset(validation, pairs=20, seed=0)]
    trainer = pl.Trainer(
        max_steps=args.steps,
        accelerator="auto",
        devices=1,
        precision=args.precision,
        gradient_clip_val=1.0,
        logger=CSVLogger(args.logs, name=args.stage),
        callbacks=[ModelCheckpoint(save_last=True, every_n_epochs=1)],
        check_val_every_n_epoch=2,
        log_every_n_steps=20,
        enable_progress_bar=sys.stderr.isatty(),
    )
    loaders = [
        DataLoader(datasets[0], args.batch_size, shuffle=True, drop_last=True, num_workers=1, persistent_workers=True),
        DataLoader(datasets[1], 1),
    ]
    trainer.fit(module, *loaders, ckpt_path=args.resume)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    torch.save(halved(network.state_dict()), args.output)


def halved(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights in half precision; modules that share a tensor still share it, so that the file holds it once."""
    shared: dict[int, torch.Tensor] = {}
    for tensor in weights.values():
        shared.setdefault(tensor.data_ptr(), tensor.half() if tensor.is_floating_point() else tensor)
    return {name: shared[tensor.data_ptr()] for name, tensor in weights.items()}


if __name__ == "__main__":
    main()
