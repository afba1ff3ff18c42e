"""The inverse of a field and an affine between two grids, and what is said where there is none."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from monai_lm.apps import commands
from monai_lm.fields import fold_count, gaussian_smooth, repair, sample_points
from monai_lm.fields.inverses import inspect_inverse, invert_between
from monai_lm.fields.space import through_affine, to_world
from monai_lm.io import read_itk_ddf, write_itk_ddf

# two grids that overlap but for a part, and an affine that turns, stretches and shifts between them
FIXED, SIZE = np.diag([-1.5, 1.5, 2.0, 1.0]), (30, 32, 24)
FIXED[:3, 3] = (20.0, -25.0, -20.0)
MOVING, OTHER = np.array([[0, 0, 1.8, -40.0], [1.4, 0, 0, -20.0], [0, 1.6, 0, -60.0], [0, 0, 0, 1]]), (34, 28, 26)
INITIAL = np.eye(4)
INITIAL[:3, :3] = Rotation.from_euler("xyz", (12, -8, 15), degrees=True).as_matrix() @ np.diag([1.1, 0.9, 1.05])
INITIAL[:3, 3] = (-12.0, 6.0, -35.0)


def smooth(amplitude: float) -> torch.Tensor:
    noise = gaussian_smooth(torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(3)), 3.0)
    return repair(noise * (amplitude / noise.abs().max()))


def missed_in_millimetres(whole: torch.Tensor, inverse: torch.Tensor, size=OTHER) -> tuple[torch.Tensor, torch.Tensor]:
    """How far the inverse, then the field lead astray, at voxels of the moving grid that the fixed image comes to."""
    voxels = torch.stack(torch.meshgrid(*[torch.arange(s) for s in size], indexing="ij"), -1).flatten(0, -2).double()
    points = voxels + inverse[0].flatten(1).T.double()
    back = points + sample_points(whole.double(), points[None])[0]
    covered = ((points >= 0) & (points <= torch.tensor(SIZE) - 1)).all(1)
    return torch.linalg.vector_norm(to_world(back, MOVING) - to_world(voxels, MOVING), dim=1)[covered], covered


def test_field_and_affine_together_are_inverted_to_a_thousandth_of_a_millimetre(tmp_path):
    """Read from a file that has the affine in it, as the command line has it, and with the affine known, as refine."""
    ddf = smooth(2.5)
    whole = through_affine(ddf, FIXED, MOVING, INITIAL)
    write_itk_ddf(tmp_path / "f.nii.gz", whole[0].numpy(), FIXED, MOVING)
    nib.save(nib.Nifti1Image(np.zeros(OTHER, np.float32), MOVING), tmp_path / "moving.nii.gz")
    report = commands.invert_field(tmp_path / "f.nii.gz", tmp_path / "i.nii.gz", tmp_path / "moving.nii.gz")
    inverse, affine = read_itk_ddf(tmp_path / "i.nii.gz", FIXED)
    np.testing.assert_allclose(affine, MOVING, atol=1e-4)
    for found in (torch.from_numpy(inverse)[None], invert_between(ddf, FIXED, MOVING, INITIAL, OTHER)[0]):
        missed, covered = missed_in_millimetres(whole, found)
        assert missed.max() < 1e-3
        assert 0.3 < covered.double().mean() < 0.8
    assert report.residual < 1e-3
    assert report.outside == pytest.approx(int((~covered).sum()), rel=0.01)
    assert report.folded == report.failed == 0
    assert report.voxels == np.prod(OTHER)


@pytest.mark.parametrize(("axis", "sign", "end"), [(0, 1, "right"), (1, -1, "anterior"), (2, 1, "inferior")])
def test_the_report_says_beyond_which_end_of_the_fixed_image_nothing_comes(axis, sign, end):
    """FIXED runs to the left, forward and up; a shift of five voxels, so many planes have no counterpart."""
    ddf = torch.zeros(1, 3, *SIZE)
    ddf[:, axis] = 5.0 * sign
    inverse, residual = invert_between(ddf, FIXED, FIXED, None, SIZE)
    report = inspect_inverse(ddf, inverse, residual, FIXED, FIXED)
    assert report.sides == (end,)
    assert report.outside == 5 * np.prod(SIZE) // SIZE[axis]
    assert f"beyond its {end} end: nothing of the fixed image comes there" in str(report)
    assert "fold" not in str(report)
    assert report.residual == pytest.approx(0, abs=1e-4)


def test_the_report_says_where_the_field_folds():
    ddf = torch.zeros(1, 3, *SIZE)
    ddf[0, 0, 14, 10:14, 8:12], ddf[0, 0, 15, 10:14, 8:12] = 2.0, -2.0
    assert int(fold_count(ddf)) > 0
    inverse, residual = invert_between(ddf, FIXED, FIXED, None, SIZE)
    report = inspect_inverse(ddf, inverse, residual, FIXED, FIXED)
    assert report.folded > 0
    assert report.failed == report.outside == 0
    near = FIXED[:3, :3] @ [14.5, 11.5, 9.5] + FIXED[:3, 3]
    np.testing.assert_allclose(report.places["folded"], near, atol=8)
    assert f"{report.folded} of {report.voxels} voxels lie where the field folds" in str(report)


def test_two_dimensions_have_sides_too():
    ddf = torch.zeros(1, 2, 12, 14)
    ddf[:, 1] = -3.0
    inverse, residual = invert_between(ddf, np.eye(4), np.eye(4), None, (12, 14))
    report = inspect_inverse(ddf, inverse, residual, np.eye(4), np.eye(4))
    assert report.sides == ("anterior",)
    assert report.outside == 3 * 12


def test_the_command_prints_it(tmp_path, monkeypatch, capsys):
    from monai_lm.apps import cli

    ddf = np.zeros((3, *SIZE), np.float32)
    ddf[2] = 4.0
    write_itk_ddf(tmp_path / "f.nii.gz", ddf, FIXED)
    words = ["invert", "--ddf", str(tmp_path / "f.nii.gz"), "--output", str(tmp_path / "i.nii.gz")]
    monkeypatch.setattr("sys.argv", ["monai-lm", *words])
    cli.main()
    assert (
        f"{4 * 30 * 32} of {30 * 32 * 24} voxels lie outside the image of the fixed grid, beyond its inferior end"
        in (capsys.readouterr().out)
    )


@pytest.mark.slow
def test_native_brains_with_an_affine_between_them(data_root, tmp_path):
    """The brain of the one reaches the other and comes back, to a hundredth of a millimetre everywhere."""
    folder = Path(data_root) / "brain_native"
    images = [nib.load(folder / f"{name}_t1.nii.gz") for name in ("1001", "1006")]
    (fixed, moving), brain = (np.asarray(i.affine) for i in images), np.asarray(images[1].dataobj) > 0
    middles = [i.affine[:3, :3] @ np.argwhere(np.asarray(i.dataobj) > 0).mean(0) + i.affine[:3, 3] for i in images]
    initial = INITIAL.copy()
    initial[:3, 3] = middles[1] - initial[:3, :3] @ middles[0]
    size = images[0].shape
    noise = gaussian_smooth(torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0)), 8.0)
    ddf = repair(noise * (6 / noise.abs().max()))
    whole = through_affine(ddf, fixed, moving, initial)
    write_itk_ddf(tmp_path / "f.nii", whole[0].numpy(), fixed, moving)
    commands.invert_field(tmp_path / "f.nii", tmp_path / "i.nii", folder / "1006_t1.nii.gz")
    inverse = torch.from_numpy(read_itk_ddf(tmp_path / "i.nii", fixed)[0])
    voxels = torch.from_numpy(np.argwhere(brain)).double()
    points = voxels + inverse[:, torch.from_numpy(brain)].T.double()
    back = points + sample_points(whole.double(), points[None])[0]
    assert torch.linalg.vector_norm(back - voxels, dim=1).max() < 0.01
