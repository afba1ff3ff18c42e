"""Fields in voxels: NIfTI as MONAI and Learn2Reg have it, and Learn2Reg's npz by its evaluation's own steps."""

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import SaveImage

from monai_lm.fields import gaussian_smooth
from monai_lm.io import read_learn2reg_ddf, read_voxel_ddf, write_learn2reg_ddf, write_voxel_ddf

SHAPE = (12, 10, 8)
GRID = np.diag([-1.5, 2.0, 3.0, 1.0])
GRID[:3, 3] = (4.0, 5.0, 6.0)


def random_field(shape=SHAPE, amplitude: float = 3.0) -> np.ndarray:
    n = len(shape)
    ddf = gaussian_smooth(torch.randn(1, n, *shape, generator=torch.Generator().manual_seed(1)), 2.0)[0]
    return (ddf * (amplitude / ddf.abs().max())).numpy()


# --- NIfTI ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "stored"), [(SHAPE, (*SHAPE, 3)), ((7, 6), (7, 6, 1, 2))])
def test_voxels_are_stored_as_they_are(tmp_path, shape, stored):
    ddf = random_field(shape)
    write_voxel_ddf(tmp_path / "u.nii.gz", ddf, GRID)
    image = nib.load(tmp_path / "u.nii.gz")
    assert image.shape == stored
    assert int(image.header["intent_code"]) == 0
    np.testing.assert_array_equal(np.asarray(image.dataobj).reshape(*shape, len(shape)), np.moveaxis(ddf, 0, -1))
    back, there = read_voxel_ddf(str(tmp_path / "u.nii.gz"))
    np.testing.assert_array_equal(back, ddf)
    np.testing.assert_allclose(there, GRID)
    assert [p.name for p in tmp_path.iterdir()] == ["u.nii.gz"]


@pytest.mark.parametrize("shape", [SHAPE, (7, 6)])
def test_what_monai_saved_is_read(tmp_path, shape):
    ddf = random_field(shape)
    save = SaveImage(tmp_path, output_postfix="", separate_folder=False, resample=False, print_log=False)
    save(MetaTensor(ddf, affine=torch.from_numpy(GRID), meta={"filename_or_obj": "u.nii.gz"}))
    back, there = read_voxel_ddf(tmp_path / "u.nii.gz")
    np.testing.assert_array_equal(back, ddf)
    np.testing.assert_allclose(there, GRID)


@pytest.mark.parametrize("shape", [(5, 6, 7), (5, 6, 7, 2), (5, 6, 3), (5, 6, 7, 2, 3), (5, 6, 1, 4)])
def test_other_shapes_are_refused(tmp_path, shape):
    nib.save(nib.Nifti1Image(np.ones(shape, np.float32), np.eye(4)), tmp_path / "u.nii")
    with pytest.raises(ValueError, match=r"u.nii must be \(X, Y, Z, 1, 3\) or .* to hold vectors, got shape \(5, 6"):
        read_voxel_ddf(tmp_path / "u.nii")


# --- Learn2Reg --------------------------------------------------------------------------------------------------------


def test_full_resolution_is_half_precision_under_arr_0(tmp_path):
    ddf = random_field()
    write_learn2reg_ddf(tmp_path / "a" / "disp_0001_0002.npz", ddf)
    with np.load(tmp_path / "a" / "disp_0001_0002.npz") as archive:
        assert archive.files == ["arr_0"]
        assert archive["arr_0"].dtype == np.float16
        assert archive["arr_0"].shape == (3, *SHAPE)
    for size in (None, SHAPE):
        back = read_learn2reg_ddf(tmp_path / "a" / "disp_0001_0002.npz", size)
        assert back.dtype == np.float32
        np.testing.assert_allclose(back, ddf, rtol=2**-11, atol=1e-6)
    assert len(list((tmp_path / "a").iterdir())) == 1


def test_half_resolution_as_learn2regs_evaluation_upsamples_it(tmp_path):
    """``zoom(·, 2)`` of every component and no factor: values stay voxels of full resolution."""
    ndimage = pytest.importorskip("scipy.ndimage")

    def zoom(component, factor, order):  # by its default mode it zeroes corners that round to a hair outside
        return ndimage.zoom(component, factor, order=order, mode="nearest")

    ddf = gaussian_smooth(torch.from_numpy(random_field((32, 28, 24)))[None], 3.0)[0].numpy() * 3
    write_learn2reg_ddf(tmp_path / "u.npz", ddf, half=True)
    with np.load(tmp_path / "u.npz") as archive:
        half = archive["arr_0"].astype("float32")
    assert half.shape == (3, 16, 14, 12)
    np.testing.assert_allclose(half, [zoom(c, 0.5, order=1) for c in ddf], atol=2e-3)
    full = read_learn2reg_ddf(tmp_path / "u.npz", (32, 28, 24))
    np.testing.assert_allclose(full, [zoom(c, 2, order=1) for c in half], atol=1e-5)
    assert np.abs(full - [zoom(c, 2, order=2) for c in half]).max() < 0.1 * np.abs(ddf).max()
    assert np.abs(full - ddf).max() < 0.1 * np.abs(ddf).max()


def test_a_shift_keeps_its_length_at_half_resolution_and_a_ramp_its_corners(tmp_path):
    shift = np.broadcast_to(np.array([1.0, -2.0, 3.0]).reshape(3, 1, 1, 1), (3, 12, 11, 9))
    write_learn2reg_ddf(tmp_path / "u.npz", shift, half=True)
    np.testing.assert_array_equal(read_learn2reg_ddf(tmp_path / "u.npz", (12, 11, 9)), shift)
    assert read_learn2reg_ddf(tmp_path / "u.npz").shape == (3, 6, 5, 4)
    ramp = np.broadcast_to(np.linspace(-1, 1, 12).reshape(1, -1, 1, 1), (3, 12, 10, 8))
    write_learn2reg_ddf(tmp_path / "u.npz", ramp, half=True)
    np.testing.assert_allclose(read_learn2reg_ddf(tmp_path / "u.npz", (12, 10, 8)), ramp, atol=1e-3)


def test_other_archives_are_refused(tmp_path):
    path = tmp_path / "u.npz"
    np.savez(path, field=np.ones(3))
    with pytest.raises(ValueError, match=r"u.npz must hold the array 'arr_0', got \['field'\]"):
        read_learn2reg_ddf(path)
    np.savez(path, np.ones((*SHAPE, 3)))
    with pytest.raises(ValueError, match=r"u.npz must hold \(3, X, Y, Z\) real numbers, got shape \(12, 10, 8, 3\)"):
        read_learn2reg_ddf(path)
    np.savez(path, np.full((3, 2, 2, 2), np.nan, np.float16))
    with pytest.raises(ValueError, match=r"u.npz must be finite, got 24 NaN or infinite values"):
        read_learn2reg_ddf(path)
    np.savez(path, np.array([{"an": "object"}], dtype=object))
    with pytest.raises(ValueError, match=r"u.npz must be a whole .npz file, got ValueError"):
        read_learn2reg_ddf(path)
    with pytest.raises(FileNotFoundError, match="no file"):
        read_learn2reg_ddf(tmp_path / "absent.npz")
    write_learn2reg_ddf(path, random_field())
    for size in ((12, 10, 9), (24, 20, 20), (6, 5, 4), (12, 10)):
        with pytest.raises(ValueError, match=r"u.npz must be of the size .* or of half of it, got \(12, 10, 8\)"):
            read_learn2reg_ddf(path, size)


@pytest.mark.parametrize("kept", [0, 10, 200, 0.5, 0.95])
def test_an_archive_that_was_cut_off_is_refused(tmp_path, kept):
    path = tmp_path / "u.npz"
    write_learn2reg_ddf(path, random_field())
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    with pytest.raises(
        ValueError, match=r"u.npz must be a whole .npz file, got (an empty|a zip archive that is|10 bytes|\w+:)"
    ):
        read_learn2reg_ddf(path)


def test_invalid_arguments_are_named_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"path must end in .npz, got 'u.nii'"):
        write_learn2reg_ddf(tmp_path / "u.nii", random_field())
    with pytest.raises(ValueError, match=r"ddf must be \(3, \*S\) for Learn2Reg, got shape \(2, 7, 6\)"):
        write_learn2reg_ddf(tmp_path / "u.npz", random_field((7, 6)))
    with pytest.raises(ValueError, match="ddf must be below 65504 voxels for half precision, got 70000"):
        write_learn2reg_ddf(tmp_path / "u.npz", np.full((3, 2, 2, 2), 7e4))
    with pytest.raises(ValueError, match="affine must be an invertible"):
        write_voxel_ddf(tmp_path / "u.nii", random_field(), np.zeros((4, 4)))
    assert list(tmp_path.iterdir()) == []


def test_a_failure_while_writing_leaves_what_is_there(tmp_path, monkeypatch):
    path = tmp_path / "u.npz"
    path.write_bytes(b"precious")

    def fail(temporary, **arrays):  # noqa: ARG001
        with open(temporary, "wb") as file:
            file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(OSError, match="disk full"):
        write_learn2reg_ddf(path, random_field())
    assert path.read_bytes() == b"precious"
    assert [p.name for p in tmp_path.iterdir()] == ["u.npz"]
