"""Write what a module predicts, pair by pair, so that a cohort can be stopped and started again."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from monai.data import MetaTensor
from pytorch_lightning.callbacks import BasePredictionWriter
from torch import Tensor

from monai_lm.evaluation import labels_of, measure, tensor_of
from monai_lm.fields import warp
from monai_lm.fileio import write_itk_ddf
from monai_lm.fileio.files import label_type, replacing, save_nifti, write_table
from monai_lm.training.data import PairDataModule

__all__ = ["FieldWriter"]


class FieldWriter(BasePredictionWriter):
    """Write field, warped image, warped labels and metrics of every pair that ``Trainer.predict`` refines.

    Of a pair ``NAME`` these are ``NAME_ddf.nii.gz`` (ITK's convention), ``NAME_warped.nii.gz``,
    ``NAME_warped_label.nii.gz`` and, when the others are complete, ``NAME.json`` with the metrics before (``…``) and
    after refinement (``…_refined``). Every file is whole or not there. A pair that has its ``NAME.json`` is not
    computed again if the pairs come from a :class:`~monai_lm.training.PairDataModule`. At the end ``metrics.csv`` has a
    row per pair of the folder, in the order of their names. Several processes share the work and one makes the table.

    Args:
        output_dir: made if missing.
        overwrite: compute pairs again that are complete.
    """

    def __init__(self, output_dir: str | Path, overwrite: bool = False) -> None:
        super().__init__(write_interval="batch")
        self.output_dir, self.overwrite = Path(output_dir), overwrite

    def complete(self, name: str) -> bool:
        """Whether everything of a pair has been written."""
        return (self.output_dir / f"{name}.json").is_file()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave complete pairs out."""
        datamodule = getattr(trainer, "datamodule", None)
        if stage == "predict" and not self.overwrite and isinstance(datamodule, PairDataModule):
            skipped = datamodule.skip(self.complete)
            if skipped:
                warnings.warn(
                    f"{skipped} pairs are complete in {self.output_dir} and left out, whatever network or settings "
                    "they are of; overwrite=True computes them again",
                    stacklevel=2,
                )
            trainer.strategy.barrier("FieldWriter.setup")  # nobody writes before everybody has looked

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the pairs of a batch."""
        ddf, refined = prediction["ddf"], "history" in prediction
        before = measure(batch, prediction["predicted"], surfaces=True)
        after = measure(batch, ddf, surfaces=True) if refined else {}
        for pair, name in enumerate(batch["name"]):
            _check_name(name)
            self._write_files(name, batch, ddf, pair)
            row: dict[str, Any] = {"name": name} | {key: float(value[pair]) for key, value in before.items()}
            row |= {f"{key}_refined": float(value[pair]) for key, value in after.items()}
            if refined:
                row |= {
                    "loss": float(prediction["initial_loss"][pair]),
                    "loss_refined": float(prediction["final_loss"][pair]),
                    "repair_shift": float(prediction["repair_shift"][pair]),
                    "iterations": len(prediction["history"][pair]),
                    "seconds": prediction["seconds"] / len(ddf),
                }
            with replacing(self.output_dir / f"{name}.json") as temporary:
                temporary.write_text(json.dumps(row, indent=1) + "\n")

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Merge the rows of all processes into ``metrics.csv``."""
        trainer.strategy.barrier("FieldWriter.on_predict_end")
        if trainer.is_global_zero:
            self.write_table()

    def write_table(self) -> Path:
        """Write ``metrics.csv`` from the pairs that are complete; returns its path."""
        rows = [json.loads(file.read_text()) for file in sorted(self.output_dir.glob("[!.]*.json"))]
        return write_table(self.output_dir / "metrics.csv", rows)

    def _write_files(self, name: str, batch: Mapping[str, Any], ddf: Tensor, pair: int) -> None:
        affine, moving_affine = (_affine(batch[key], pair) for key in ("fixed", "moving"))
        field = ddf[pair].float().cpu()
        write_itk_ddf(self.output_dir / f"{name}_ddf.nii.gz", field.numpy(), affine, moving_affine)
        for key, postfix, mode in (("moving", "warped", "bilinear"), ("moving_label", "warped_label", "nearest")):
            if key in batch:
                image = labels_of(batch, key) if mode == "nearest" else tensor_of(batch, key)
                warped = warp(image[pair, None].cpu(), field[None], mode=mode)[0, 0].numpy()
                dtype = label_type(warped) if mode == "nearest" else np.float32
                save_nifti(self.output_dir / f"{name}_{postfix}.nii.gz", warped, affine, "none", dtype)


def _check_name(name: str) -> None:
    if not name or Path(name).name != name or name.startswith("."):
        raise ValueError(f"the name of a pair must do as the name of a file, got {name!r}")


def _affine(image: Any, pair: int) -> np.ndarray:
    """Affine ``(4, 4)`` of a pair's image; the identity where it does not say."""
    out = np.eye(4)
    if isinstance(image, MetaTensor):
        affine = image.affine if image.affine.dim() == 2 else image.affine[pair]
        matrix = torch.as_tensor(affine).cpu().double().numpy()
        if matrix.shape == (4, 4):
            out = matrix
    return out
