"""A LightningModule that trains a registration network, and refines what it predicts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from monai.losses import DiceLoss, DiffusionLoss
from monai.networks.utils import one_hot
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric

from monai_lm.fields.algebra import resample
from monai_lm.fields.sampling import sample_points, warp
from monai_lm.inferers import RegistrationInferer
from monai_lm.similarity import Similarity, get_similarity
from monai_lm.solver.result import RefinementResult
from monai_lm.training.batch import images_of, measure_batch, tensor_of
from monai_lm.training.supervision import Distillation, through_refinement

__all__ = ["RegistrationModule"]

SUPERVISIONS = ("none", "distill", "implicit")


class _OneCycle(torch.optim.lr_scheduler.OneCycleLR):
    """A cycle as long as this fit, also when it goes on from a checkpoint of a shorter or longer one."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over where the other schedule was, not how long it was."""
        own = {name: getattr(self, name) for name in ("total_steps", "_schedule_phases")}
        super().load_state_dict(state_dict | own)


class RegistrationModule(pl.LightningModule):
    """Train a network that maps a pair of images to a velocity or a displacement, and refine its field at test time.

    A batch is a dictionary of tensors: ``fixed`` and ``moving`` ``(B, 1, *S)``, and, where they are used or there is
    something to measure, ``fixed_label`` and ``moving_label`` ``(B, 1, *S)`` with integer values (or ``(B, K, *s)``,
    shares of ``K`` structures on this or a coarser grid, for training only), and ``fixed_points`` and
    ``moving_points`` ``(B, N, n)`` in voxels: landmarks, NaN where a pair has fewer than others. Where the deformation
    is known, it is ``ddf`` ``(B, n, *s)``, in voxels of this or a coarser grid, NaN where it is not.

    Args:
        network: maps ``(B, 2, *S)`` (channel 0 moving, 1 fixed) to ``(B, n, *P)`` in voxels of its own grid.
        prediction: ``"velocity"`` or ``"displacement"``, see :class:`~monai_lm.inferers.RegistrationInferer`.
        integration_steps: squarings that integrate a velocity.
        divisible_pad: pad what the network sees to multiples of this.
        similarity: image term, see :func:`~monai_lm.similarity.get_similarity`; ``None`` trains without one.
        labels: number of label values including the background; 0 trains without labels.
        smoothness: weight of the diffusion penalty on what the network predicts.
        dice: weight of the Dice loss of the warped labels.
        keypoints: weight of the mean squared distance of the landmarks, in voxels².
        known: weight of the mean squared distance to the deformation that is known, in voxels² of its grid.
        refine: keyword arguments of :func:`~monai_lm.refine`, used wherever the module evaluates or predicts;
            ``None`` does not refine.
        features: see :class:`~monai_lm.inferers.RegistrationInferer`: a function, or the name of the network's method.
        supervision: how training uses refinement (see :mod:`monai_lm.training.supervision`): ``"none"``; ``"distill"``
            adds the squared distance to refined fields to the loss; ``"implicit"`` takes labels and landmarks at the
            refined field, and leads their gradient through it. The last two need ``refine``.
        distillation: keyword arguments of :class:`~monai_lm.training.supervision.Distillation`.
        learning_rate: peak of a one-cycle schedule of Adam over the whole fit, where ``optimizer`` is ``None``.
        optimizer: makes the optimizer of parameters; a ``functools.partial`` of a class, or what ``LightningCLI``
            makes of ``class_path`` and ``init_args``.
        scheduler: makes the learning rate schedule of an optimizer, stepped after every batch.
        takes: see :class:`~monai_lm.inferers.RegistrationInferer`.
        output: likewise.
        convert: likewise; ``smoothness`` is then of what it returns.
        network_size: likewise.

    Raises:
        ValueError: unknown ``supervision``, one that lacks what it needs, or arguments that the inferer refuses.
    """

    def __init__(
        self,
        network: nn.Module,
        prediction: str = "velocity",
        integration_steps: int = 5,
        divisible_pad: int | None = None,
        similarity: str | Similarity | nn.Module | None = "lncc",
        labels: int = 0,
        smoothness: float = 0.1,
        dice: float = 1.0,
        keypoints: float = 0.0,
        known: float = 0.0,
        refine: dict[str, Any] | None = None,
        features: str | Callable[[Tensor], Tensor] | None = None,
        supervision: str = "none",
        distillation: dict[str, Any] | None = None,
        learning_rate: float = 1e-3,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
        scheduler: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None = None,
        takes: Sequence[str] | None = None,
        output: int | str | None = None,
        convert: Callable[[Any], Tensor] | None = None,
        network_size: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if supervision not in SUPERVISIONS:
            raise ValueError(f"supervision must be one of {SUPERVISIONS}, got {supervision!r}")
        if supervision != "none" and refine is None:
            raise ValueError(f"refine must be keyword arguments of monai_lm.refine for {supervision!r}, got None")
        if supervision == "implicit" and not (labels or keypoints):
            raise ValueError("supervision 'implicit' needs labels or keypoints, whose loss it leads through refinement")
        self.save_hyperparameters(
            ignore=["network", "similarity", "features", "optimizer", "scheduler", "refine", "distillation", "convert"]
        )
        self.network, self.supervision, self.labels = network, supervision, labels
        self.weights = {
            "smoothness": smoothness,
            "similarity": 1.0,
            "dice": dice,
            "keypoints": keypoints,
            "known": known,
        }
        self.learning_rate, self.make_optimizer, self.make_scheduler = learning_rate, optimizer, scheduler
        channels = getattr(network, features) if isinstance(features, str) else features
        self.inferer = RegistrationInferer(
            prediction, integration_steps, divisible_pad, refine, channels, takes=takes, output=output,
            convert=convert, network_size=network_size,
        )  # fmt: skip
        self.similarity = None if similarity is None else get_similarity(similarity)
        self.distillation = Distillation(**(distillation or {})) if supervision == "distill" else None
        self.diffusion = DiffusionLoss()
        self.dice_loss = DiceLoss()
        self.means = nn.ModuleDict()

    def forward(self, images: Tensor) -> Tensor:
        """Return the (refined) field ``(B, n, *S)`` in voxels for ``(B, 2, *S)`` moving and fixed images."""
        return self.inferer(images, self.network)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of one batch: smoothness of the prediction, similarity, labels, landmarks, and refined fields."""
        images = images_of(batch)
        moving, fixed = images.split(1, 1)
        prediction = self.inferer.prediction_of(images, self.network)
        ddf = self.inferer.displacement(prediction, fixed.shape[2:])
        terms = {"smoothness": self.diffusion(prediction.float())}
        if self.similarity is not None:
            terms["similarity"] = self._dissimilarity(fixed, moving, ddf).mean()
        if self.supervision == "implicit":
            ddf = through_refinement(images, ddf, self.inferer)
        if self.labels:
            terms["dice"] = self._dice_loss(batch, ddf)
        if self.weights["keypoints"]:
            points = tensor_of(batch, "fixed_points")
            distance = points + sample_points(ddf, points) - tensor_of(batch, "moving_points")
            terms["keypoints"] = distance.square().sum(2).nanmean()
        if self.weights["known"]:
            target = tensor_of(batch, "ddf")
            known = ~target.isnan()
            distance = torch.where(known, resample(ddf, target.shape[2:]) - target, 0.0)
            terms["known"] = distance.square().sum() / known[:, 0].sum().clamp(min=1)
        loss = torch.stack([self.weights[name] * value for name, value in terms.items()]).sum()
        if self.distillation is not None:
            terms["distillation"] = self.distillation(images, ddf, self.inferer, self.network)
            loss = loss + terms["distillation"]
        self.log_dict({f"train_{name}": value.detach() for name, value in terms.items()}, batch_size=len(fixed))
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(fixed))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Log the metrics of the network's own field and, if the module refines, those of the refined one.

        Their names end in ``_before`` and ``_after``; see :func:`~monai_lm.fields.metrics.measure`.
        """
        self._evaluate("val", batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """As :meth:`validation_step`, with the 95 % Hausdorff distance of the labels."""
        self._evaluate("test", batch, surfaces=True)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """The refined field and how it came about.

        Returns:
            ``ddf`` ``(B, n, *S)`` in voxels; ``predicted``, the network's own field; and, if the module refines, the
            attributes of the :class:`~monai_lm.RefinementResult`, ``history`` among them.
        """
        predicted, result = self._fields(images_of(batch))
        return {"ddf": predicted, "predicted": predicted} | ({} if result is None else vars(result))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer and scheduler given, or Adam under a one-cycle schedule that spans the whole fit."""
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        if self.make_optimizer is not None:
            optimizer = self.make_optimizer(parameters)
            if self.make_scheduler is None:
                return optimizer
            scheduler = self.make_scheduler(optimizer)
        else:
            optimizer = torch.optim.Adam(parameters, lr=self.learning_rate)
            total = int(self.trainer.estimated_stepping_batches)
            scheduler = _OneCycle(optimizer, self.learning_rate, total_steps=total, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _fields(self, images: Tensor) -> tuple[Tensor, RefinementResult | None]:
        """The network's own field, and its refinement."""
        predicted = self.inferer.predict(images, self.network)
        return predicted, None if self.inferer.refine is None else self.inferer.refined(images, predicted)

    def _evaluate(self, stage: str, batch: dict[str, Any], surfaces: bool = False) -> None:
        images = images_of(batch)
        moving, fixed = images.split(1, 1)
        predicted, result = self._fields(images)
        for suffix, ddf in (("_before", predicted), ("_after", None if result is None else result.ddf)):
            if ddf is None:
                continue
            metrics = measure_batch(batch, ddf, surfaces)
            if self.similarity is not None:
                metrics["similarity"] = self._dissimilarity(fixed, moving, ddf)
            for name, values in metrics.items():
                self._log_mean(f"{stage}_{name}{suffix}", values)

    def _log_mean(self, name: str, values: Tensor) -> None:
        """Log the mean over all pairs, of all processes, that have a value."""
        if name not in self.means:
            self.means[name] = MeanMetric(nan_strategy="ignore").to(self.device)
        mean = self.means[name]
        assert isinstance(mean, MeanMetric)
        mean.update(values)
        self.log(name, mean, metric_attribute=f"means.{name}", prog_bar=True, batch_size=len(values))

    def _dissimilarity(self, fixed: Tensor, moving: Tensor, ddf: Tensor) -> Tensor:
        """Per voxel, ``(B,)``."""
        assert self.similarity is not None
        return self.similarity(warp(moving, ddf), fixed) / fixed[0, 0].numel()

    def _dice_loss(self, batch: dict[str, Any], ddf: Tensor) -> Tensor:
        fixed, moving = (self._shares(tensor_of(batch, key)) for key in ("fixed_label", "moving_label"))
        loss: Tensor = self.dice_loss(warp(moving, resample(ddf, fixed.shape[2:])), fixed)
        return loss

    def _shares(self, label: Tensor) -> Tensor:
        """Label map as channels, the background's left out; channels as they are."""
        return label if label.shape[1] > 1 else one_hot(label, self.labels)[:, 1:]
