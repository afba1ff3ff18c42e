"""The first stage of the training: the segmenter."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric
from monai.networks.utils import one_hot
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor

from monai_lm.inferers.networks import SemanticRegistrationNet


class SegmentationModule(pl.LightningModule):
    """Train the segmenter of a network on images ``(B, 1, *S)`` and labels ``(B, 1, *S)``.

    Args:
        network: only its segmenter is trained.
        labels: number of label values including the background.
        learning_rate: peak of a one-cycle schedule of AdamW over the whole fit.
    """

    def __init__(self, network: SemanticRegistrationNet, labels: int, learning_rate: float) -> None:
        super().__init__()
        self.network, self.labels, self.learning_rate = network, labels, learning_rate
        self.loss = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False)
        self.dice_metric = DiceMetric(include_background=False)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Dice and cross entropy of the labels."""
        loss = self.loss(self.network.logits(batch["image"]).float(), batch["label"])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the Dice of the labels."""
        predicted = self.network.logits(batch["image"]).argmax(1, keepdim=True)
        score = self.dice_metric(one_hot(predicted, self.labels), one_hot(batch["label"], self.labels))
        self.log("val_dice", torch.as_tensor(score).nanmean(), prog_bar=True, batch_size=len(predicted))
        self.dice_metric.reset()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW under a one-cycle schedule that spans the whole fit."""
        optimizer = torch.optim.AdamW(self.network.segmenter.parameters(), lr=self.learning_rate, weight_decay=0.01)
        total = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=total, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
