"""A LightningModule that trains a registration network."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from monai.losses import DiceLoss, DiffusionLoss
from monai.metrics import DiceMetric
from monai.networks.utils import one_hot
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from monai_lm.fields import warp
from monai_lm.inferers import RegistrationInferer
from monai_lm.similarity import Similarity, get_similarity

__all__ = ["RegistrationModule"]


class RegistrationModule(pl.LightningModule):
    """Train a network that maps a pair of images to a velocity or a displacement.

    A batch is a dictionary of tensors: ``fixed`` and ``moving`` ``(B, 1, *S)``, and, where labels are used,
    ``fixed_label`` and ``moving_label`` ``(B, 1, *S)`` with integer values.

    Args:
        network: maps ``(B, 2, *S)`` (channel 0 moving, 1 fixed) to ``(B, n, *S)`` in voxels.
        prediction: ``"velocity"`` or ``"displacement"``, see :class:`~monai_lm.inferers.RegistrationInferer`.
        integration_steps: squarings that integrate a velocity.
        similarity: image term, see :func:`~monai_lm.similarity.get_similarity`.
        labels: number of label values including the background; 0 trains without labels.
        smoothness: weight of the diffusion penalty on what the network predicts.
        dice: weight of the Dice loss of the warped labels.
        refine: keyword arguments of :func:`~monai_lm.refine` used by ``predict_step``; ``None`` does not refine.
        learning_rate: peak of a one-cycle schedule of Adam over the whole fit.
    """

    def __init__(
        self,
        network: nn.Module,
        prediction: str = "velocity",
        integration_steps: int = 5,
        similarity: str | Similarity | nn.Module = "lncc",
        labels: int = 0,
        smoothness: float = 0.1,
        dice: float = 1.0,
        refine: dict[str, Any] | None = None,
        learning_rate: float = 1e-3,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["network", "similarity"])
        self.labels, self.smoothness, self.dice, self.learning_rate = labels, smoothness, dice, learning_rate
        self.network = network
        self.inferer = RegistrationInferer(prediction, integration_steps, refine=refine)
        self.similarity = get_similarity(similarity)
        self.diffusion = DiffusionLoss()
        self.dice_loss = DiceLoss(include_background=False)
        self.dice_metric = DiceMetric(include_background=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the (refined) field ``(B, n, *S)`` in voxels for ``(B, 2, *S)`` moving and fixed images."""
        return self.inferer(images, self.network)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch: similarity, smoothness of the prediction, and Dice where labels are used."""
        fixed, moving = batch["fixed"], batch["moving"]
        prediction = self.network(torch.cat([moving, fixed], 1))
        ddf = self.inferer.displacement(prediction, fixed.shape[2:])
        image_loss = self.similarity(warp(moving, ddf), fixed).mean() / fixed[0, 0].numel()
        loss = image_loss + self.smoothness * self.diffusion(prediction)
        self.log("train_similarity", image_loss)
        if self.labels:
            dice_loss = self.dice_loss(
                warp(self._one_hot(batch["moving_label"]), ddf), self._one_hot(batch["fixed_label"])
            )
            loss = loss + self.dice * dice_loss
            self.log("train_dice_loss", dice_loss, prog_bar=True)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the similarity and, where the batch has labels, the Dice of the network's own field."""
        fixed, moving = batch["fixed"], batch["moving"]
        ddf = self.inferer.predict(torch.cat([moving, fixed], 1), self.network)
        self.log("val_similarity", self.similarity(warp(moving, ddf), fixed).mean() / fixed[0, 0].numel())
        if "fixed_label" in batch:
            labels = max(self.labels, int(batch["fixed_label"].max()) + 1)
            warped = warp(batch["moving_label"].float(), ddf, mode="nearest")
            score = self.dice_metric(one_hot(warped, labels), one_hot(batch["fixed_label"], labels))
            self.log("val_dice", torch.as_tensor(score).nanmean(), prog_bar=True)
            self.dice_metric.reset()

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the refined field ``(B, n, *S)`` in voxels."""
        return self(torch.cat([batch["moving"], batch["fixed"]], 1))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam under a one-cycle schedule that spans the whole fit."""
        optimizer = torch.optim.Adam(self.network.parameters(), lr=self.learning_rate)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            self.learning_rate,
            total_steps=int(self.trainer.estimated_stepping_batches),
            pct_start=0.1,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _one_hot(self, label: Tensor) -> Tensor:
        return one_hot(label, self.labels)
