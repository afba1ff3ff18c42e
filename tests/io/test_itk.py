"""Fields as ITK reads them: checked with SimpleITK on grids of every handedness."""

import os

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from monai_lm.fields import gaussian_smooth, warp
from monai_lm.io import read_itk_ddf, write_itk_ddf

sitk = pytest.importorskip("SimpleITK")


def rotation(axes: str, degrees) -> np.ndarray:
    return Rotation.from_euler(axes, degrees, degrees=True).as_matrix()


def affine(matrix: np.ndarray, origin=(7.0, -20.0, 30.0)) -> np.ndarray:
    out = np.eye(4)
    out[:3, :3], out[:3, 3] = matrix, origin
    return out


OBLIQUE = rotation("XYZ", (20, -35, 50))
AFFINES = {
    "identity": np.eye(4),
    "RAS isotropic": affine(np.diag([2.0, 2.0, 2.0])),
    "RAS anisotropic": affine(np.diag([0.7, 1.3, 3.0])),
    "LAS": affine(np.diag([-0.7, 1.3, 3.0])),
    "LPS": affine(np.diag([-1.0, -1.5, 2.0])),
    "RPI": affine(np.diag([1.0, -1.5, -2.0])),
    "PIR": affine(np.array([[0, 0, 2.0], [-1.0, 0, 0], [0, -1.5, 0]])),
    "oblique": affine(OBLIQUE @ np.diag([0.7, 1.3, 3.0])),
    "oblique, left-handed": affine(OBLIQUE @ np.diag([0.7, -1.3, 3.0])),
}
PLANES = {
    "identity": np.eye(4),
    "anisotropic": affine(np.diag([0.7, 1.3, 1.0]), (7.0, -20.0, 0.0)),
    "LA": affine(np.diag([-0.7, 1.3, 1.0]), (7.0, -20.0, 0.0)),
    "LP": affine(np.diag([-2.0, -1.3, 1.0]), (7.0, -20.0, 0.0)),
    "rotated": affine(rotation("z", 30) @ np.diag([0.7, 1.3, 1.0]), (7.0, -20.0, 0.0)),
}
GRIDS = [
    *((name, a, (14, 12, 10)) for name, a in AFFINES.items()),
    *((name, a, (16, 14)) for name, a in PLANES.items()),
]
GRID = pytest.mark.parametrize(
    ("grid", "shape"), [(a, s) for _, a, s in GRIDS], ids=[f"{len(s)}D {name}" for name, _, s in GRIDS]
)


def random_field(shape: tuple[int, ...], amplitude: float = 2.0) -> np.ndarray:
    noise = torch.randn(1, len(shape), *shape, generator=torch.Generator().manual_seed(1))
    ddf = gaussian_smooth(noise, 2.0)[0]
    return (ddf * (amplitude / ddf.abs().max())).numpy()


def itk_vectors(image) -> np.ndarray:
    """Vectors of a SimpleITK image, array axes in the order x, y, z: ``(*S, n)``."""
    array = sitk.GetArrayFromImage(image)
    return array.transpose(*range(array.ndim - 2, -1, -1), array.ndim - 1)


@GRID
def test_a_known_shift_is_lps_millimetres(tmp_path, grid, shape):
    """A shift of so many voxels along every axis moves a point as the affine says, with x and y negated."""
    n = len(shape)
    shift = np.array([1.0, -2.0, 3.0])[:n]
    write_itk_ddf(tmp_path / "ddf.nii.gz", np.broadcast_to(shift.reshape(n, *[1] * n), (n, *shape)), grid)
    image = sitk.ReadImage(str(tmp_path / "ddf.nii.gz"))
    expected = (np.diag([-1.0, -1.0, 1.0])[:n, :n] @ grid[:n, :n]) @ shift
    np.testing.assert_allclose(itk_vectors(image), np.broadcast_to(expected, (*shape, n)), atol=1e-3)
    # and ITK agrees on where the voxels are: from voxel 0 the shift leads to the voxel that is meant
    origin, target = (np.array(image.TransformContinuousIndexToPhysicalPoint(i)) for i in ([0.0] * n, shift.tolist()))
    np.testing.assert_allclose(target - origin, expected, atol=1e-3)


@GRID
def test_simpleitk_resamples_as_warp_does(tmp_path, grid, shape):
    ddf, n = random_field(shape), len(shape)
    moving = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    write_itk_ddf(tmp_path / "ddf.nii.gz", ddf, grid)
    nib.save(nib.Nifti1Image(moving, grid), tmp_path / "moving.nii.gz")
    image = sitk.ReadImage(str(tmp_path / "moving.nii.gz"))
    vectors = sitk.Cast(sitk.ReadImage(str(tmp_path / "ddf.nii.gz")), sitk.sitkVectorFloat64)
    assert image.GetDimension() == vectors.GetDimension() == n
    np.testing.assert_allclose(vectors.GetDirection(), image.GetDirection(), atol=1e-6)
    np.testing.assert_allclose(vectors.GetOrigin(), image.GetOrigin(), atol=1e-4)
    resampled = sitk.Resample(image, image, sitk.DisplacementFieldTransform(vectors), sitk.sitkLinear, -100.0)
    theirs = sitk.GetArrayFromImage(resampled).T
    ours = warp(torch.from_numpy(moving)[None, None], torch.from_numpy(ddf)[None])[0, 0].numpy()
    position = np.stack(np.meshgrid(*[np.arange(s) for s in shape], indexing="ij")) + ddf
    inside = np.all([(p > 0.01) & (p < s - 1.01) for p, s in zip(position, shape, strict=True)], axis=0)
    assert inside.mean() > 0.4
    np.testing.assert_allclose(ours[inside], theirs[inside], atol=2e-3)


@pytest.mark.parametrize(("shape", "stored"), [((5, 6, 7), (5, 6, 7, 1, 3)), ((5, 6), (5, 6, 1, 1, 2))])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_the_header_says_what_it_is(tmp_path, shape, stored, suffix):
    grid = AFFINES["oblique"] if len(shape) == 3 else PLANES["rotated"]
    write_itk_ddf(tmp_path / f"ddf{suffix}", random_field(shape), grid)
    image = nib.load(tmp_path / f"ddf{suffix}")
    header = image.header
    assert image.shape == stored
    assert int(header["intent_code"]) == 1007
    assert header.get_xyzt_units()[0] == "mm"
    assert header.get_data_dtype() == np.float32
    assert int(header["qform_code"]) == int(header["sform_code"]) == 1
    np.testing.assert_allclose(header.get_sform(), grid, atol=1e-5)
    np.testing.assert_allclose(header.get_qform(), grid, atol=1e-5)


def test_vectors_keep_their_place_along_every_axis(tmp_path):
    ddf = np.zeros((3, 4, 5, 6), np.float32)
    ddf[1, 3, 2, 1] = 0.5
    write_itk_ddf(tmp_path / "ddf.nii", ddf, affine(np.diag([1.0, 2.0, 3.0])))
    data = np.asanyarray(nib.load(tmp_path / "ddf.nii").dataobj)
    assert np.argwhere(data).tolist() == [[3, 2, 1, 0, 1]]
    assert data[3, 2, 1, 0, 1] == -1.0
    vectors = itk_vectors(sitk.ReadImage(str(tmp_path / "ddf.nii")))
    assert np.argwhere(vectors).tolist() == [[3, 2, 1, 1]]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int16])
def test_the_array_is_not_changed_and_any_real_dtype_will_do(tmp_path, dtype):
    ddf = (4 * random_field((5, 6, 7))).astype(dtype)
    before = ddf.copy()
    write_itk_ddf(tmp_path / "ddf.nii", ddf, np.eye(4))
    np.testing.assert_array_equal(ddf, before)
    data = np.asanyarray(nib.load(tmp_path / "ddf.nii").dataobj)[:, :, :, 0]
    np.testing.assert_allclose(np.moveaxis(data, -1, 0), ddf * np.array([-1, -1, 1.0])[:, None, None, None], atol=1e-6)


def test_folders_are_made_and_files_replaced(tmp_path):
    path = tmp_path / "a" / "b" / "ddf.nii.gz"
    for amplitude in (1.0, 2.0):
        write_itk_ddf(str(path), random_field((5, 6, 7), amplitude), np.eye(4))
        assert np.abs(nib.load(path).get_fdata()).max() == pytest.approx(amplitude)
    assert os.listdir(path.parent) == ["ddf.nii.gz"]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_the_file_has_the_permissions_of_any_other(tmp_path):
    write_itk_ddf(tmp_path / "ddf.nii.gz", random_field((5, 6, 7)), np.eye(4))
    (tmp_path / "other").write_text("")
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("ddf.nii.gz", "other")]
    assert modes[0] == modes[1]


# --- errors -----------------------------------------------------------------------------------------------------------

GOOD = np.zeros((3, 4, 5, 6), np.float32)


def with_nan() -> np.ndarray:
    ddf = GOOD.copy()
    ddf[0, 1, 2, 3] = np.nan
    return ddf


@pytest.mark.parametrize(
    ("ddf", "grid", "name", "message"),
    [
        (np.zeros((2, 4, 5, 6)), np.eye(4), "x.nii", r"ddf must be \(n, \*S\) .*got shape \(2, 4, 5, 6\)"),
        (np.zeros((3, 4, 5)), np.eye(4), "x.nii", r"ddf must be \(n, \*S\) .*got shape \(3, 4, 5\)"),
        (np.zeros((1, 4)), np.eye(4), "x.nii", r"ddf must be \(n, \*S\) .*got shape \(1, 4\)"),
        (np.zeros((1, 3, 4, 5, 6)), np.eye(4), "x.nii", r"ddf must be \(n, \*S\) .*got shape \(1, 3, 4, 5, 6\)"),
        (with_nan(), np.eye(4), "x.nii", "ddf must be finite"),
        (GOOD, np.eye(3), "x.nii", r"affine must be an invertible \(4, 4\) matrix .*, got shape \(3, 3\)"),
        (GOOD, np.diag([1.0, 0, 1, 1]), "x.nii", r"affine must be an invertible \(4, 4\) matrix"),
        (GOOD, np.full((4, 4), np.nan), "x.nii", r"affine must be an invertible \(4, 4\) matrix"),
        (GOOD, np.eye(4), "x.mha", r"path must end in .nii or .nii.gz, got 'x.mha'"),
        (GOOD, np.eye(4), "x.gz", r"path must end in .nii or .nii.gz, got 'x.gz'"),
        ([[0.0]], np.eye(4), "x.nii", "ddf must be"),
    ],
    ids=[
        "two of three components",
        "three of two",
        "1D",
        "batch",
        "NaN",
        "3x3",
        "singular",
        "NaN affine",
        "mha",
        "gz",
        "list",
    ],
)
def test_invalid_data_is_refused_and_leaves_what_is_there(tmp_path, ddf, grid, name, message):
    path = tmp_path / name
    path.write_bytes(b"precious")
    with pytest.raises((TypeError, ValueError), match=message), np.errstate(all="ignore"):
        write_itk_ddf(path, ddf, grid)
    assert path.read_bytes() == b"precious"
    assert os.listdir(tmp_path) == [name]


def test_a_failure_while_writing_leaves_no_half_file(tmp_path, monkeypatch):
    path = tmp_path / "ddf.nii.gz"
    path.write_bytes(b"precious")

    def fail(image, temporary):  # noqa: ARG001
        with open(temporary, "wb") as file:
            file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(nib, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        write_itk_ddf(path, GOOD, np.eye(4))
    assert path.read_bytes() == b"precious"
    assert os.listdir(tmp_path) == ["ddf.nii.gz"]


def test_a_moving_image_elsewhere_in_space(tmp_path):
    """A field of zeros maps voxel onto voxel: in space that is the step between the two images."""
    fixed, moving = np.diag([2.0, 1.0, 1.0, 1.0]), np.diag([2.0, 1.0, 1.5, 1.0])
    moving[:3, 3] = (5.0, -3.0, 1.0)
    write_itk_ddf(tmp_path / "ddf.nii.gz", np.zeros((3, 4, 5, 6)), fixed, moving)
    written = np.asarray(nib.load(tmp_path / "ddf.nii.gz").dataobj)[:, :, :, 0]
    assert np.allclose(written[..., 0], -5)
    assert np.allclose(written[..., 1], 3)
    assert np.allclose(written[..., 2], 1 + 0.5 * np.arange(6))
    with pytest.raises(ValueError, match=r"moving_affine must be an invertible \(4, 4\) .*, got shape \(3, 3\)"):
        write_itk_ddf(tmp_path / "ddf.nii.gz", np.zeros((3, 4, 5, 6)), fixed, np.eye(3))


# --- reading ----------------------------------------------------------------------------------------------------------


@GRID
def test_what_is_written_is_read_back(tmp_path, grid, shape):
    ddf = random_field(shape)
    write_itk_ddf(tmp_path / "ddf.nii.gz", ddf, grid)
    back, there = read_itk_ddf(tmp_path / "ddf.nii.gz")
    assert back.dtype == np.float32
    np.testing.assert_allclose(back, ddf, atol=1e-5)
    np.testing.assert_allclose(there, grid, atol=1e-5)


@GRID
def test_a_field_between_two_grids_is_read_back(tmp_path, grid, shape):
    moving_affine = PLANES["LP"] if len(shape) == 2 else AFFINES["oblique, left-handed"]
    ddf = random_field(shape)
    write_itk_ddf(tmp_path / "ddf.nii.gz", ddf, grid, moving_affine)
    back, _ = read_itk_ddf(str(tmp_path / "ddf.nii.gz"), moving_affine)
    np.testing.assert_allclose(back, ddf, atol=1e-4)


@pytest.mark.parametrize("pixel", [sitk.sitkVectorFloat32, sitk.sitkVectorFloat64])
@GRID
def test_a_field_that_simpleitk_wrote_moves_points_as_simpleitk_does(tmp_path, grid, shape, pixel):
    n = len(shape)
    write_itk_ddf(tmp_path / "ours.nii", random_field(shape), grid)
    vectors = sitk.Cast(sitk.ReadImage(str(tmp_path / "ours.nii")), pixel)
    sitk.WriteImage(vectors, str(tmp_path / "theirs.nii.gz"))
    ddf, there = read_itk_ddf(tmp_path / "theirs.nii.gz")
    transform = sitk.DisplacementFieldTransform(sitk.Cast(vectors, sitk.sitkVectorFloat64))
    image = sitk.Image(shape, sitk.sitkUInt8)
    image.SetOrigin(vectors.GetOrigin())
    image.SetSpacing(vectors.GetSpacing())
    image.SetDirection(vectors.GetDirection())
    for voxel in np.ndindex(*shape):
        point = transform.TransformPoint(image.TransformIndexToPhysicalPoint(voxel))
        theirs = np.array(image.TransformPhysicalPointToContinuousIndex(point))
        if all(1 <= v < s - 1 for v, s in zip(voxel, shape, strict=True)):
            np.testing.assert_allclose(ddf[(slice(None), *voxel)], theirs - voxel, atol=1e-4)
    np.testing.assert_allclose(there[:n, :n], grid[:n, :n], atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 6, 7), (5, 6)])
@pytest.mark.parametrize(("intent", "frame"), [(1007, "LPS"), (1006, "RAS")])
def test_the_intent_says_the_frame_as_it_does_to_itk(tmp_path, shape, intent, frame):
    n = len(shape)
    data = np.zeros((*shape, *[1] * (4 - n), n), np.float32)
    data[:] = (1.0, 2.0, 3.0)[:n]
    grid = AFFINES["oblique"] if n == 3 else PLANES["rotated"]
    image = nib.Nifti1Image(data, grid)
    image.header["intent_code"] = intent
    nib.save(image, tmp_path / "x.nii")
    theirs = itk_vectors(sitk.ReadImage(str(tmp_path / "x.nii")))[(2,) * n] * np.array([-1, -1, 1])[:n]  # as RAS
    np.testing.assert_allclose(theirs, data[(0,) * n].ravel() * (1 if frame == "RAS" else np.array([-1, -1, 1])[:n]))
    ours = grid[:n, :n] @ read_itk_ddf(tmp_path / "x.nii")[0][(slice(None), *(2,) * n)]
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    said = read_itk_ddf(tmp_path / "x.nii", vectors=frame)[0]
    np.testing.assert_array_equal(said, read_itk_ddf(tmp_path / "x.nii")[0])
    reverse = read_itk_ddf(tmp_path / "x.nii", vectors="LPS" if frame == "RAS" else "RAS")[0]
    other = grid[:n, :n] @ reverse[(slice(None), *(2,) * n)]
    np.testing.assert_allclose(other, theirs * np.array([-1, -1, 1])[:n], atol=1e-5)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", ">f8", "<i2"])
def test_any_stored_type_is_read(tmp_path, dtype):
    values = np.arange(5 * 6 * 7 * 3).reshape(5, 6, 7, 1, 3) % 11
    image = nib.Nifti1Image(values.astype(dtype), np.diag([2.0, 2, 2, 1]))
    image.header["intent_code"] = 1006
    if dtype[0] == ">":
        image = nib.Nifti1Image(values.astype(dtype), np.diag([2.0, 2, 2, 1]), image.header.as_byteswapped(">"))
    image.header.set_data_dtype(dtype)
    for name in ("x.nii", "x.nii.gz"):
        nib.save(image, tmp_path / name)
        np.testing.assert_array_equal(read_itk_ddf(tmp_path / name)[0], np.moveaxis(values[:, :, :, 0], -1, 0) / 2)


def written(tmp_path, shape=(5, 6, 7, 1, 3), intent=1007, value=1.0, grid=None, dtype=np.float32):
    data = np.full(shape, value, dtype)
    image = nib.Nifti1Image(data, np.eye(4) if grid is None else grid)
    image.header["intent_code"] = intent
    nib.save(image, tmp_path / "x.nii")
    return tmp_path / "x.nii"


@pytest.mark.parametrize(
    "shape",
    [(5, 6, 7), (5, 6, 7, 2), (5, 6, 7, 1, 2), (5, 6, 7, 2, 3), (5, 6, 1, 1, 4), (5, 6, 7, 3, 1)],
)
def test_other_dimensions_are_refused(tmp_path, shape):
    path = written(tmp_path, shape)
    stored = str(nib.load(path).shape)
    with pytest.raises(ValueError, match=r"x.nii must be \(X, Y, Z, 1, 3\) or \(X, Y, 1, 1, 2\)") as error:
        read_itk_ddf(path)
    assert f"got shape {stored}" in str(error.value)


def test_another_intent_asks_which_frame(tmp_path):
    path = written(tmp_path, intent=0)
    with pytest.raises(
        ValueError, match=r"x.nii must have the intent 1007 .* got 0; say file_format='lps' or 'ras' for"
    ):
        read_itk_ddf(path)
    assert read_itk_ddf(path, vectors="LPS")[0][:, 0, 0, 0].tolist() == [-1, -1, 1]
    with pytest.raises(ValueError, match="vectors must be 'LPS', 'RAS' or None, got 'lps'"):
        read_itk_ddf(path, vectors="lps")


def test_files_that_hold_no_field_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"x.nii must be finite, got 630 NaN or infinite values"):
        read_itk_ddf(written(tmp_path, value=np.inf))
    with pytest.raises(ValueError, match=r"x.nii must hold real numbers, got dtype complex64"):
        read_itk_ddf(written(tmp_path, dtype=np.complex64))
    image = nib.Nifti1Image(np.ones((5, 6, 7, 1, 3), np.float32), None)
    image.header.set_sform(np.diag([1.0, 0.0, 1.0, 1.0]), 1)
    image.header["intent_code"] = 1007
    image.to_filename(tmp_path / "flat.nii")
    with pytest.raises(ValueError, match=r"affine of .*flat.nii must be an invertible \(4, 4\) matrix"):
        read_itk_ddf(tmp_path / "flat.nii")
    with pytest.raises(ValueError, match="moving_affine must be an invertible"):
        read_itk_ddf(written(tmp_path), np.zeros((4, 4)))
    with pytest.raises(FileNotFoundError, match=r"no file .*absent.nii"):
        read_itk_ddf(tmp_path / "absent.nii")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kept", [0, 100, 400, 0.9])
def test_a_file_that_was_cut_off_is_refused(tmp_path, suffix, kept):
    path = tmp_path / f"ddf{suffix}"
    write_itk_ddf(path, random_field((14, 12, 10)), np.eye(4))
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    with pytest.raises(
        ValueError, match=rf"ddf{suffix} must be a whole NIfTI file, got (\w+: |an empty|a gzip file, cut|100 bytes)"
    ):
        read_itk_ddf(path)


def test_a_file_of_another_kind_is_refused(tmp_path):
    for name in ("x.nii", "x.nii.gz"):
        (tmp_path / name).write_text("a letter, not an image" * 100)
        with pytest.raises(ValueError, match=f"{name} must be a whole NIfTI file"):
            read_itk_ddf(tmp_path / name)
    nib.save(nib.MGHImage(np.ones((4, 5, 6), np.float32), np.eye(4)), tmp_path / "x.mgz")
    with pytest.raises(ValueError, match=r"x.mgz must be a NIfTI file, got the suffix of MGH"):
        read_itk_ddf(tmp_path / "x.mgz")


def test_a_sheared_grid_is_refused_with_the_way_out(tmp_path):
    """ITK's direction is a rotation: of this grid it would put the far corner 3 mm elsewhere."""
    grid = AFFINES["RAS anisotropic"].copy()
    grid[0, 1] += 0.3
    with pytest.raises(ValueError, match=r"(?s)affine must have voxel axes at right angles .*resample .*'voxel'"):
        write_itk_ddf(tmp_path / "ddf.nii", GOOD, grid)
    assert os.listdir(tmp_path) == []
    write_itk_ddf(tmp_path / "ddf.nii", GOOD, AFFINES["oblique"].astype(np.float32), grid)  # rounded; where it leads to
    grid = AFFINES["oblique, left-handed"] @ np.diag([1, 1, 1, 1.0])
    write_itk_ddf(tmp_path / "ddf.nii", GOOD, grid)


@pytest.mark.parametrize("tilt", [10, 90])
def test_a_plane_that_is_not_one_of_x_and_y_is_refused(tmp_path, tilt):
    """ITK takes the part of the affine in x and y: a tilted plane would be foreshortened, without a word."""
    grid = affine(rotation("x", tilt) @ np.diag([0.7, 1.3, 3.0]))
    with pytest.raises(ValueError, match=r"(?s)affine must lie in a plane of x and y .*'voxel', which holds it"):
        write_itk_ddf(tmp_path / "ddf.nii", random_field((5, 6)), grid)
    write_itk_ddf(tmp_path / "ddf.nii", random_field((5, 6)), affine(rotation("x", 0.1) @ np.diag([0.7, 1.3, 3.0])))
