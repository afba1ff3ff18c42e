"""RegistrationModule under a real Lightning Trainer."""

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from monai_lm.fields import fold_count, gaussian_smooth, warp
from monai_lm.training import RegistrationModule


def _pairs(count, labels=False):
    """2D images and their copies shifted by two voxels."""
    generator = torch.Generator().manual_seed(0)
    moving = gaussian_smooth(torch.randn(count, 1, 24, 24, generator=generator), 2.0)
    shift = torch.zeros(count, 2, 24, 24)
    shift[:, 0] = 2.0
    fixed = warp(moving, shift)
    rows = {"fixed": fixed, "moving": moving}
    if labels:
        rows |= {"fixed_label": (fixed > 0).float(), "moving_label": (moving > 0).float()}
    return [{k: v[i] for k, v in rows.items()} for i in range(count)]


def _network():
    torch.manual_seed(0)
    last = torch.nn.Conv2d(8, 2, 3, padding=1)
    torch.nn.init.normal_(last.weight, std=1e-3)
    return torch.nn.Sequential(torch.nn.Conv2d(2, 8, 5, padding=2), torch.nn.ReLU(), last)


def _trainer(tmp_path, **kwargs):
    return pl.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, **kwargs,
    )  # fmt: skip


@pytest.mark.parametrize("labels", [0, 2])
def test_training_improves_the_validation_similarity(tmp_path, labels):
    module = RegistrationModule(_network(), labels=labels, learning_rate=1e-2)
    loader = DataLoader(_pairs(8, labels > 0), batch_size=4)
    trainer = _trainer(tmp_path, max_epochs=15)
    before = trainer.validate(module, loader, verbose=False)[0]
    trainer.fit(module, loader)
    after = trainer.validate(module, loader, verbose=False)[0]
    assert after["val_similarity"] < 0.8 * before["val_similarity"]
    if labels:
        assert after["val_dice"] > before["val_dice"]


def test_predict_refines_in_inference_mode(tmp_path):
    pairs = _pairs(2)
    loader = DataLoader(pairs, batch_size=2)
    refined = _trainer(tmp_path).predict(RegistrationModule(_network(), refine={"scales": (2, 1)}), loader)[0]
    alone = _trainer(tmp_path).predict(RegistrationModule(_network()), loader)[0]
    fixed, moving = (torch.stack([p[k] for p in pairs]) for k in ("fixed", "moving"))
    error = (warp(moving, refined) - fixed).square().mean()
    assert error < 0.1 * (warp(moving, alone) - fixed).square().mean()
    assert fold_count(refined).tolist() == [0, 0]


def test_settings_are_saved():
    module = RegistrationModule(_network(), labels=2, smoothness=0.7)
    assert module.hparams["smoothness"] == 0.7
    assert "network" not in module.hparams
