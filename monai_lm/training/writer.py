"""Write what a module predicts, pair by pair, so that a cohort can be stopped and started again."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from monai.data import MetaTensor
from pytorch_lightning.callbacks import BasePredictionWriter
from torch import Tensor

from monai_lm.fields import warp
from monai_lm.inferers import RegistrationInferer
from monai_lm.io import write_itk_ddf
from monai_lm.io.datalist import FILES, Entry, raise_all
from monai_lm.io.nifti import label_type, replacing, save_nifti, write_table
from monai_lm.io.outputs import as_json, check_outputs
from monai_lm.io.provenance import NEUTRAL, Recipe, describe, settings_of, weights_digest
from monai_lm.training.batch import labels_of, measure_batch, tensor_of
from monai_lm.training.data import PairDataModule

__all__ = ["FieldWriter"]


class FieldWriter(BasePredictionWriter):
    """Write field, warped image, warped labels and metrics of every pair that ``Trainer.predict`` refines.

    Of a pair ``NAME`` these are ``NAME_ddf.nii.gz`` (ITK's convention), ``NAME_warped.nii.gz``,
    ``NAME_warped_label.nii.gz`` and, when the others are complete, ``NAME.json`` with the metrics before (``…_before``)
    and after refinement (``…_after``) and what they were made of. Every file is whole or not there. A pair that is
    complete is not computed again if the pairs come from a :class:`~monai_lm.training.PairDataModule` and files,
    network and settings are the same; where they are not, nothing is predicted. At the end ``metrics.csv`` has a row
    per complete pair of the data module, or else of the folder, in the order of their names. Several processes share
    the work and one makes the table.

    Args:
        output_dir: made if missing.
        overwrite: compute pairs again that are complete, whatever they were made of.

    Raises:
        ValueError: names that do not do as names of files or come twice, or, with ``overwrite=False``, a folder that
            holds pairs of these names made of other files, another network or other settings; before the work.
    """

    def __init__(self, output_dir: str | Path, overwrite: bool = False) -> None:
        super().__init__(write_interval="batch")
        self.output_dir, self.overwrite = Path(output_dir), overwrite
        self._pairs: dict[str, Entry] = {}
        self._settings: dict[str, Any] = {}
        self._written: set[str] = set()

    def complete(self, name: str) -> bool:
        """Whether everything of a pair has been written."""
        return all((self.output_dir / f"{name}{end}").is_file() for end in ("_ddf.nii.gz", "_warped.nii.gz", ".json"))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Look at the folder and the names, and leave complete pairs out."""
        datamodule = getattr(trainer, "datamodule", None)
        if stage != "predict":
            return
        check_outputs(self.output_dir, ["metrics.csv"], overwrite=True)
        self._pairs, self._settings = {}, {}
        if isinstance(datamodule, PairDataModule):
            if "predict" in datamodule.datasets:
                self._pairs = {pair["name"]: pair for pair in datamodule.datasets["predict"].pairs}
            for name in self._pairs:
                _check_name(name)
            # weights are loaded from a checkpoint after this, so the pairs are looked at when they are asked for
            datamodule.skip(None if self.overwrite else self._unchanged(pl_module, datamodule))

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nobody writes before everybody has looked at what is there."""
        self._written = set()
        self._settings = _settings_of(pl_module, getattr(trainer, "datamodule", None))
        trainer.strategy.barrier("FieldWriter.on_predict_start")

    def _unchanged(self, module: pl.LightningModule, datamodule: PairDataModule) -> Callable[[Entry], bool]:
        """Whether a pair is complete; ValueError, once all have been looked at, where it is made of something else."""

        def look() -> set[str]:
            complete = [name for name in self._pairs if self.complete(name)]
            settings = _settings_of(module, datamodule) if complete else {}
            problems = []
            for name in complete:
                record = json.loads((self.output_dir / f"{name}.json").read_text()).get("provenance")
                if changes := _recipe(self._pairs[name], settings).changes(record):
                    problems.append(f"{name}: {self.output_dir} holds another result: {'; '.join(changes)}")
            if problems:
                problems.append("overwrite=True computes them again, another output_dir keeps both")
            raise_all(problems, "output_dir")
            if complete:
                warnings.warn(
                    f"{len(complete)} pairs are complete in {self.output_dir} and left out: same files, network and "
                    "settings; overwrite=True computes them again",
                    stacklevel=2,
                )
            return set(complete)

        found: list[set[str]] = []

        def done(pair: Entry) -> bool:
            if not found:
                found.append(look())
            return pair["name"] in found[0]

        return done

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
        before = measure_batch(batch, prediction["predicted"], surfaces=True)
        after = measure_batch(batch, ddf, surfaces=True) if refined else {}
        for pair, name in enumerate(batch["name"]):
            self._start(name)
            self._write_files(name, batch, ddf, pair)
            row: dict[str, Any] = {"name": name} | {k: self._pairs.get(name, {}).get(k) for k in ("fixed", "moving")}
            row |= {f"{key}_before": float(value[pair]) for key, value in before.items()}
            row |= {f"{key}_after": float(value[pair]) for key, value in after.items()}
            if refined:
                row |= {
                    "loss_before": float(prediction["initial_loss"][pair]),
                    "loss_after": float(prediction["final_loss"][pair]),
                    "repair_shift": float(prediction["repair_shift"][pair]),
                    "prediction_used": bool(prediction["prediction_used"][pair]),
                    "iterations": len(prediction["history"][pair]),
                    "seconds": prediction["seconds"] / len(ddf),
                }
            row["provenance"] = _recipe(self._pairs.get(name, {}), self._settings).record()
            with replacing(self.output_dir / f"{name}.json") as temporary:
                temporary.write_text(as_json(row) + "\n")

    def _start(self, name: str) -> None:
        """Before the files of a pair are written: a former ``NAME.json`` goes, it says that they are complete."""
        _check_name(name)
        if name in self._written:
            raise ValueError(f"every pair must have a name of its own, got {name!r} twice")
        self._written.add(name)
        (self.output_dir / f"{name}.json").unlink(missing_ok=True)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Merge the rows of all processes into ``metrics.csv``."""
        trainer.strategy.barrier("FieldWriter.on_predict_end")
        if trainer.is_global_zero:
            self.write_table()

    def write_table(self) -> Path:
        """Write ``metrics.csv`` from the pairs that are complete; returns its path."""
        files = sorted(self.output_dir.glob("[!.]*.json"))
        rows = [
            json.loads(f.read_text()) for f in files if not self._pairs or f.name.removesuffix(".json") in self._pairs
        ]
        return write_table(self.output_dir / "metrics.csv", [_plain(row) for row in rows])

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


def _recipe(pair: Entry, settings: dict[str, Any]) -> Recipe:
    return Recipe({key: Path(pair[key]) for key in FILES if key in pair}, settings)


def _settings_of(module: pl.LightningModule, datamodule: Any) -> dict[str, Any]:
    """What the predictions of a module depend on beside the files."""
    out: dict[str, Any] = {"network": weights_digest(module)}
    inferer = getattr(module, "inferer", None)
    if isinstance(inferer, RegistrationInferer):
        kept = {k: v for k, v in vars(inferer).items() if k not in ("refine", "match")}
        refine = None if inferer.refine is None else settings_of(inferer.refine)
        match = settings_of(inferer.match) if inferer.prediction == "features" else None
        for name, settings in (("refine", refine), ("match", match)):
            kept[name] = None if settings is None else {k: v for k, v in settings.items() if k not in NEUTRAL}
        out |= describe(kept)
    if isinstance(datamodule, PairDataModule):
        out |= {"grid": describe(datamodule.grid), "transform": describe(datamodule.transform)}
    return out


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not isinstance(value, Mapping) and value is not None}


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
