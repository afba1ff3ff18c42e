"""Jacobian determinants as files: those of the map that is written, in space."""

import math
import sys

import nibabel as nib
import numpy as np
import pytest
import torch

from monai_lm.apps import cli
from monai_lm.apps.cohort import refine_cohort
from monai_lm.apps.commands import evaluate_field
from monai_lm.apps.jacobian import jacobian_field
from monai_lm.apps.pairs import refine_pair
from monai_lm.fields import fold_count, gaussian_smooth
from monai_lm.fields.metrics import sd_log_jacobian
from monai_lm.io import read_ddf, write_ddf

QUICK = {"scales": (1,), "iterations": 5}
FIXED = np.array([[-1.5, 0, 0, 20], [0, 1, 0, -5], [0, 0, 2, 3], [0, 0, 0, 1.0]])
MOVING = np.array([[0, 1.2, 0, -3], [1, 0, 0, -6], [0, 0, 1.6, 2], [0, 0, 0, 1.0]])
CHANGE = np.array([[1.1, 0.1, 0, 0], [0, 0.9, 0.05, 0], [0, 0, 1.2, 0], [0, 0, 0, 1]])  # of space, in millimetres


@pytest.fixture
def images(tmp_path):
    """A fixed and a moving file on grids that overlap."""
    noise = torch.randn(2, 1, 18, 17, 16, generator=torch.Generator().manual_seed(0))
    for name, affine, values in zip(("fixed", "moving"), (FIXED, MOVING), gaussian_smooth(noise, 2.0), strict=True):
        nib.save(nib.Nifti1Image(values[0].numpy(), affine), tmp_path / f"{name}.nii.gz")
    return tmp_path / "fixed.nii.gz", tmp_path / "moving.nii.gz"


def field_of(change, size, fixed, moving):
    """The field ``(n, *S)`` between voxels of two grids that changes space as a 4x4 does."""
    voxels = np.stack([*np.meshgrid(*[np.arange(s) for s in size], indexing="ij")])
    n, matrix = len(size), np.linalg.solve(moving, change @ fixed)
    linear = np.einsum("ac,c...->a...", matrix[:n, :n], voxels)
    return linear + matrix[:n, 3].reshape(-1, *[1] * n) - voxels


def test_refine_writes_the_determinant_of_the_field_it_writes(images, tmp_path):
    metrics = refine_pair(*images, tmp_path / "out", report=False, settings=QUICK, jacobian=True)
    written = nib.load(tmp_path / "out" / "jacobian.nii.gz")
    assert written.get_data_dtype() == np.float32
    np.testing.assert_allclose(written.affine, FIXED)
    values = written.get_fdata()
    assert np.log(values).std() == pytest.approx(metrics["sdlogj_after"], rel=1e-4)
    assert np.log(values).std() > 0.01
    jacobian_field(tmp_path / "out" / "ddf.nii.gz", tmp_path / "jacobian.nii.gz")
    again = nib.load(tmp_path / "jacobian.nii.gz")
    np.testing.assert_allclose(again.get_fdata(), values, rtol=0, atol=1e-4)
    np.testing.assert_allclose(again.affine, FIXED)


def test_an_initial_affine_is_part_of_the_determinant(images, tmp_path):
    np.savetxt(tmp_path / "affine.txt", CHANGE)
    still = {"report": False, "settings": QUICK | {"iterations": 0}, "affine": tmp_path / "affine.txt"}
    refine_pair(*images, tmp_path / "out", jacobian=True, file_format="voxel", **still)
    values = nib.load(tmp_path / "out" / "jacobian.nii.gz").get_fdata()
    np.testing.assert_allclose(values, np.linalg.det(CHANGE), rtol=1e-4)
    jacobian_field(tmp_path / "out" / "ddf.nii.gz", tmp_path / "jacobian.nii.gz", moving=images[1])
    np.testing.assert_allclose(nib.load(tmp_path / "jacobian.nii.gz").get_fdata(), values, rtol=1e-4)
    refine_pair(*images, tmp_path / "out", overwrite=True, **still)
    assert not (tmp_path / "out" / "jacobian.nii.gz").exists()


@pytest.mark.parametrize("file_format", ["itk", "fsl", "voxel"])
def test_a_linear_map_has_its_determinant_in_any_format_and_on_any_grid(file_format, images, tmp_path):
    field, output = tmp_path / "field.nii.gz", tmp_path / "jacobian.nii"
    ddf, size = field_of(CHANGE, (18, 17, 16), FIXED, MOVING), (18, 17, 16)
    write_ddf(field, ddf, FIXED, file_format, moving_affine=MOVING, moving_size=size)
    for log, expected in ((False, np.linalg.det(CHANGE)), (True, math.log(np.linalg.det(CHANGE)))):
        jacobian_field(field, output, log, *images, overwrite=log)
        np.testing.assert_allclose(nib.load(output).get_fdata(), expected, rtol=1e-3)


def test_a_field_in_2d_and_one_that_says_not_where_it_lies(images, tmp_path):
    change = np.diag([1.25, 0.9, 1, 1]) + 0.1 * np.eye(4, k=1) * [[1], [0], [0], [0]]
    write_ddf(tmp_path / "flat.nii.gz", field_of(change, (9, 8), FIXED, FIXED), FIXED)
    jacobian_field(tmp_path / "flat.nii.gz", tmp_path / "j.nii.gz")
    np.testing.assert_allclose(nib.load(tmp_path / "j.nii.gz").get_fdata(), np.full((9, 8), 1.125), rtol=1e-4)
    write_ddf(tmp_path / "l2r.npz", field_of(CHANGE, (18, 17, 16), FIXED, FIXED), FIXED, "learn2reg")
    with pytest.raises(ValueError, match=r"l2r\.npz does not say where it lies"):
        jacobian_field(tmp_path / "l2r.npz", tmp_path / "k.nii.gz")
    jacobian_field(tmp_path / "l2r.npz", tmp_path / "k.nii.gz", fixed=images[0])
    np.testing.assert_allclose(nib.load(tmp_path / "k.nii.gz").get_fdata(), np.linalg.det(CHANGE), rtol=0.05)  # halfs


def test_outputs_are_checked_before_the_work(images, tmp_path):
    with pytest.raises(ValueError, match=r"output must end in .nii or .nii.gz for an image, got 'j.mha'"):
        jacobian_field(tmp_path / "none.nii.gz", tmp_path / "j.mha")
    with pytest.raises(FileExistsError, match="--overwrite replaces it"):
        jacobian_field(tmp_path / "none.nii.gz", images[0])


def test_a_cohort_without_its_determinants_is_not_complete(images, tmp_path):
    pairs = [{"fixed": str(images[0]), "moving": str(images[1]), "name": "one"}]
    how, folder = {"report": False, "settings": QUICK}, tmp_path / "out" / "one"
    refine_cohort(pairs, tmp_path / "out", **how)
    assert not (folder / "jacobian.nii.gz").exists()
    refine_cohort(pairs, tmp_path / "out", jacobian=True, **how)
    written = (folder / "jacobian.nii.gz").stat().st_mtime_ns
    refine_cohort(pairs, tmp_path / "out", jacobian=True, **how)
    assert (folder / "jacobian.nii.gz").stat().st_mtime_ns == written


def test_folds_and_sdlogj_are_counted_inside_the_mask_of_the_fixed_image(images, tmp_path):
    ddf = torch.randn(1, 3, 18, 17, 16, generator=torch.Generator().manual_seed(1)).mul(0.3).numpy()
    write_ddf(tmp_path / "field.nii.gz", ddf[0], FIXED, "voxel", moving_affine=FIXED)
    mask = np.zeros((18, 17, 16), np.uint8)
    mask[4:9, 3:7] = 1
    nib.save(nib.Nifti1Image(mask, FIXED), tmp_path / "mask.nii.gz")
    given = tmp_path / "field.nii.gz", images[0], images[0]
    every, inside = evaluate_field(*given), evaluate_field(*given, mask=tmp_path / "mask.nii.gz")
    ddf, mask = (torch.from_numpy(values) for values in (read_ddf(given[0])[0][None], mask[None, None]))
    assert inside["folds"] == int(fold_count(ddf, mask)) < every["folds"] == int(fold_count(ddf))
    assert inside["sdlogj"] == pytest.approx(float(sd_log_jacobian(ddf, mask=mask)), rel=1e-5)
    assert inside.keys() == every.keys()


def test_as_commands(images, tmp_path, monkeypatch):
    out, log = tmp_path / "out", tmp_path / "log.nii.gz"
    refine = ["refine", "--fixed", images[0], "--moving", images[1], "--output_dir", out, "--jacobian", "--report"]
    for words in (
        [*refine, "false", "--scales", "[1]", "--iterations", "[2]"],
        ["jacobian", "--ddf", out / "ddf.nii.gz", "--log", "--output", log],
    ):
        monkeypatch.setattr(sys, "argv", ["monai-lm", *map(str, words)])
        cli.main()
    plain = nib.load(out / "jacobian.nii.gz").get_fdata()
    assert np.ptp(plain) > 0.01
    np.testing.assert_allclose(nib.load(log).get_fdata(), np.log(plain), atol=1e-4)
