"""The map of uncertainty as a file, in the metrics and in the report."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch

from monai_lm.apps.cohort import refine_cohort
from monai_lm.apps.pairs import refine_pair
from monai_lm.fields import gaussian_smooth, warp
from monai_lm.solver.refinement import refine
from monai_lm.solver.uncertainty import uncertainty

QUICK = {"scales": (1,), "iterations": 5}
AFFINE = np.diag([-1.5, 1.0, 2.0, 1.0])


@pytest.fixture
def files(tmp_path):
    """A fixed and a moving file on one grid."""
    random = torch.Generator().manual_seed(0)
    moving = gaussian_smooth(torch.randn(1, 1, 16, 18, 14, generator=random), 1.5)
    fixed = warp(moving, 2 * gaussian_smooth(torch.randn(1, 3, 16, 18, 14, generator=random), 3.0) / 0.1)
    for name, image in (("fixed", fixed), ("moving", moving)):
        nib.save(nib.Nifti1Image(image[0, 0].numpy(), AFFINE), tmp_path / f"{name}.nii.gz")
    return tmp_path / "fixed.nii.gz", tmp_path / "moving.nii.gz"


def test_it_is_written_measured_and_shown(files, tmp_path):
    metrics = refine_pair(*files, tmp_path / "out", settings=QUICK, uncertainty=True)
    written = nib.load(tmp_path / "out" / "uncertainty.nii.gz")
    np.testing.assert_allclose(written.affine, AFFINE)
    fixed, moving = (torch.from_numpy(nib.load(f).get_fdata(dtype=np.float32))[None, None] for f in files)
    settings = QUICK | {"spacing": (1.5, 1.0, 2.0)}
    expected = uncertainty(fixed, moving, refine(fixed, moving, **settings).ddf, **settings)
    np.testing.assert_allclose(written.get_fdata(), expected[0, 0], atol=1e-4)
    assert metrics["uncertainty_mm"] == pytest.approx(float(expected.mean()), abs=1e-4)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["uncertainty_mm"] == metrics["uncertainty_mm"]
    assert "The uncertainty says where the field may be off" in (tmp_path / "out" / "report.html").read_text()
    again = refine_pair(*files, tmp_path / "out", settings=QUICK, report=False, overwrite=True)
    assert "uncertainty_mm" not in again
    assert not (tmp_path / "out" / "uncertainty.nii.gz").exists()


def test_a_cohort_has_it_for_every_pair(files, tmp_path):
    pairs = [{"fixed": str(files[0]), "moving": str(files[1]), "name": "a"}]
    refine_cohort(pairs, tmp_path / "out", settings=QUICK, report=False)
    rows, failed = refine_cohort(pairs, tmp_path / "out", settings=QUICK, report=False, uncertainty=True)
    assert not failed
    assert rows[0]["uncertainty_mm"] > 0
    assert (tmp_path / "out" / "a" / "uncertainty.nii.gz").exists()


def test_what_has_no_way_back_is_refused(files, tmp_path):
    with pytest.raises(ValueError, match="uncertainty cannot be told together with symmetric"):
        refine_pair(*files, tmp_path / "out", settings=QUICK | {"symmetric": True}, uncertainty=True)
    assert not (tmp_path / "out").exists()
