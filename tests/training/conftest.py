"""A network and a quiet trainer."""

import pytest
import pytorch_lightning as pl
import torch


@pytest.fixture
def network():
    """Maps two channels to a small velocity, 3D."""
    torch.manual_seed(0)
    last = torch.nn.Conv3d(4, 3, 3, padding=1)
    torch.nn.init.normal_(last.weight, std=1e-2)
    return torch.nn.Sequential(torch.nn.Conv3d(2, 4, 3, padding=1), torch.nn.ReLU(), last)


@pytest.fixture
def trainer(tmp_path):
    """Makes a trainer that keeps quiet."""

    def make(**kwargs):
        settings = {
            "default_root_dir": tmp_path, "accelerator": "cpu", "logger": False, "enable_progress_bar": False,
            "enable_model_summary": False, "enable_checkpointing": False,
        }  # fmt: skip
        return pl.Trainer(**(settings | kwargs))

    return make
