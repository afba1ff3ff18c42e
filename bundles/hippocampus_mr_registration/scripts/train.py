"""Train the bundle's network: ``python bundles/hippocampus_mr_registration/scripts/train.py --data … --steps 6000``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from monai.bundle import ConfigParser
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent))
from data import PairDataset, load_subjects

from monai_lm.training import RegistrationModule

BUNDLE = Path(__file__).parent.parent
TRAINING_GRID = (48, 64, 48)  # holds every image of the data set; the network is convolutional, inference uses 64³


def main() -> None:
    """Train, keep the last weights, and write them as a plain state dictionary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="folder with images and labels")
    parser.add_argument("--output", default=str(BUNDLE / "models" / "model.pt"))
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--unsupervised", action="store_true", help="train without labels")
    parser.add_argument("--smoothness", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--resume", help="Lightning checkpoint to go on from")
    parser.add_argument("--logs", default="runs")
    args = parser.parse_args()
    pl.seed_everything(0)
    if args.threads:
        torch.set_num_threads(args.threads)

    config = ConfigParser()
    config.read_config(BUNDLE / "configs" / "inference.json")
    module = RegistrationModule(
        network=config.get_parsed_content("network_def").to(memory_format=torch.channels_last_3d),
        integration_steps=int(config["integration_steps"]),
        labels=0 if args.unsupervised else 3,
        smoothness=args.smoothness,
        learning_rate=args.learning_rate,
    )
    train = PairDataset(load_subjects(args.data, "train", TRAINING_GRID), pairs=200, augment=True)
    validation = PairDataset(load_subjects(args.data, "validation", TRAINING_GRID), pairs=20, seed=0)
    trainer = pl.Trainer(
        max_steps=args.steps,
        accelerator="auto",
        devices=1,
        logger=CSVLogger(args.logs, name=Path(args.output).stem),
        callbacks=[ModelCheckpoint(save_last=True, every_n_epochs=1)],
        check_val_every_n_epoch=2,
        log_every_n_steps=20,
        enable_progress_bar=sys.stderr.isatty(),
    )
    trainer.fit(module, DataLoader(train, batch_size=1), DataLoader(validation, batch_size=1), ckpt_path=args.resume)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    torch.save(module.network.state_dict(), args.output)


if __name__ == "__main__":
    main()
