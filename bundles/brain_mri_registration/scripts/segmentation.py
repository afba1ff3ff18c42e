"""Training of the segmenter."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

__all__ = ["SegmentationModule"]


class SegmentationModule(pl.LightningModule):
    """Cross entropy on voxels drawn at random: half of them evenly, half of them so that small structures count.

    Args:
        network: has ``logits``, ``(B, classes, *S / 2)`` of images ``(B, 1, *S)``.
        classes: number of classes including the background.
        learning_rate: peak of a one-cycle schedule of AdamW over the whole fit.
        drawn: voxels per batch.
    """

    def __init__(self, network: nn.Module, classes: int, learning_rate: float, drawn: int = 60000) -> None:
        super().__init__()
        self.network, self.classes, self.learning_rate, self.drawn = network, classes, learning_rate, drawn

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy of logits at 2 mm; the target is one of the eight labels of 1 mm there, at random."""
        logits = self.network.logits(batch["image"], batch["centre"])
        a, b, c = (int(torch.randint(2, ())) for _ in range(3))
        label = batch["label"][:, 0, a::2, b::2, c::2].flatten().long()
        counts = torch.bincount(label, minlength=self.classes).float()
        rare = torch.multinomial(counts.clamp_min(1).rsqrt()[label], self.drawn // 2, replacement=True)
        chosen = torch.cat([torch.randint(len(label), (self.drawn // 2,), device=label.device), rare])
        logits = logits.movedim(1, -1).flatten(0, -2)[chosen].float()
        loss = F.cross_entropy(logits, label[chosen], label_smoothing=0.02)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the Dice of the labels at 1 mm."""
        predicted = self.network.logits(batch["image"]).argmax(1, keepdim=True).float()
        predicted = F.interpolate(predicted, scale_factor=2, mode="nearest").to(torch.uint8)
        label = batch["label"]
        both = torch.bincount(label[predicted == label].flatten().long(), minlength=self.classes)
        sizes = [torch.bincount(x.flatten().long(), minlength=self.classes) for x in (predicted, label)]
        dice = (2 * both / (sizes[0] + sizes[1]))[1:]
        self.log("val_dice", dice[sizes[1][1:] > 0].mean(), prog_bar=True, batch_size=len(label), sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW under a one-cycle schedule that spans the whole fit."""
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=self.learning_rate, weight_decay=0.01)
        total = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=total, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
