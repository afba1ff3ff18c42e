"""A small cohort of 3D images with labels on disk, a network, and a quiet trainer."""

import nibabel as nib
import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from monai_lm.fields import gaussian_smooth


@pytest.fixture(scope="session")
def cohort(tmp_path_factory):
    """Folder with ``images`` and ``labels`` of six subjects: blobs at places of their own, 12 × 14 × 10 voxels."""
    root = tmp_path_factory.mktemp("cohort")
    generator = torch.Generator().manual_seed(0)
    affine = np.diag([1.5, 1.0, 2.0, 1.0])
    for folder in ("images", "labels"):
        (root / folder).mkdir()
    for number in range(6):
        noise = torch.randn(1, 1, 12, 14, 10, generator=generator)
        image = (gaussian_smooth(noise, 2.0)[0, 0] * 1000).numpy()
        label = (image > np.percentile(image, 70)).astype(np.uint8) + (image > np.percentile(image, 90))
        nib.save(nib.Nifti1Image(image.astype(np.float32), affine), root / "images" / f"s{number}.nii.gz")
        nib.save(nib.Nifti1Image(label.astype(np.uint8), affine), root / "labels" / f"s{number}.nii.gz")
    return root


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
