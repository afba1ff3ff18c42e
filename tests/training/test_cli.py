"""``python -m monai_lm.training`` with a yaml file."""

import csv
import os
import runpy
import signal
import sys
from pathlib import Path

import pytest
import pytorch_lightning
import torch
import yaml
from pytorch_lightning.cli import LightningCLI

from monai_lm.training import PairDataModule, RegistrationModule
from monai_lm.training.cli import main

NETWORK = {
    "class_path": "monai.networks.nets.VoxelMorphUNet",
    "init_args": {
        "spatial_dims": 3, "in_channels": 2, "unet_out_channels": 4, "channels": [4, 4], "final_conv_channels": [],
    },
}  # fmt: skip


@pytest.fixture
def config(tmp_path, cohort):
    settings = {
        "seed_everything": 0,
        "trainer": {
            "accelerator": "cpu", "max_steps": 2, "logger": False, "enable_progress_bar": False,
            "enable_model_summary": False, "default_root_dir": str(tmp_path),
            "callbacks": [
                {"class_path": "monai_lm.training.FieldWriter", "init_args": {"output_dir": str(tmp_path / "out")}}
            ],
        },
        "model": {
            "network": NETWORK, "labels": 3, "refine": {"scales": [1], "iterations": 3},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.002}},
        },
        "data": {"data": str(cohort), "split": [0.5, 0.0, 0.5], "pairs": 2, "grid": [16, 16, 16]},
    }  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


class Ended(pytorch_lightning.Callback):
    def on_train_batch_start(self, *_):
        os.kill(os.getpid(), signal.SIGTERM)


def test_what_sigterm_ends_does_not_look_as_if_it_were_done(config):
    settings = yaml.safe_load(config.read_text())
    settings["trainer"]["callbacks"] = [{"class_path": f"{__name__}.Ended"}]
    config.write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(config)])
    assert ended.value.code == 143


def test_fit_then_predict_from_the_checkpoint(config, tmp_path):
    fitted = main(["fit", "--config", str(config)])
    assert fitted.trainer.global_step == 2
    assert fitted.trainer.optimizers[0].defaults["lr"] == 0.002
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    predicted = main(
        ["predict", "--config", str(config), "--ckpt_path", str(checkpoint), "--return_predictions", "false"]
    )
    for a, b in zip(fitted.model.parameters(), predicted.model.parameters(), strict=True):
        assert a.equal(b)
    rows = list(csv.DictReader((tmp_path / "out" / "metrics.csv").open()))
    assert len(rows) == 2
    assert all(float(row["loss_after"]) < float(row["loss_before"]) for row in rows)


def test_a_wrong_setting_is_named(config, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(config), "--model.roughness=1"])
    assert "roughness" in capsys.readouterr().err


def test_the_shipped_example_is_a_whole_configuration(tmp_path):
    example = Path(__file__).parents[2] / "docs" / "lightning.yaml"
    command = LightningCLI(
        RegistrationModule, PairDataModule, run=False, auto_configure_optimizers=False, save_config_callback=None,
        args=["--config", str(example), "--trainer.default_root_dir", str(tmp_path), "--trainer.accelerator", "cpu"],
    )  # fmt: skip
    assert command.model.labels == 3
    assert command.model.inferer.refine["iterations"] == [20, 10]
    assert command.datamodule.grid == [48, 64, 48]
    assert command.model(torch.zeros(1, 2, 16, 16, 16)).shape == (1, 3, 16, 16, 16)


def test_the_module_runs_as_a_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["monai_lm.training", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("monai_lm.training", run_name="__main__")
    assert stop.value.code == 0
    assert {"fit", "validate", "test", "predict"} <= set(capsys.readouterr().out.replace(",", " ").split())
