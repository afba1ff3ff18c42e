"""Formats by name, and which one a file is."""

import gzip
import struct

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from monai_lm.fields import gaussian_smooth
from monai_lm.fields.space import Grid, out_of_plane
from monai_lm.io import FORMATS, READABLE, file_suffix, guess_format, read_ddf, write_ddf, write_fsl_ddf
from monai_lm.io.formats import _TABLE, check_grid


def affine_of(degrees=(0, 0, 0), scale=(1.5, 2.0, 3.0), origin=(7.0, -20.0, 0.0), shear=0.0):
    out = np.eye(4)
    out[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix() @ np.diag(scale)
    out[:3, 1] += shear * out[:3, 0]
    out[:3, 3] = origin
    return out


GRIDS = {
    "anisotropic": affine_of(),
    "LPS": affine_of(scale=(-1.5, -2.0, 3.0)),
    "LAS": affine_of(scale=(-1.5, 2.0, 3.0)),
    "ALS": affine_of((0, 0, 90)),
    "turned": affine_of((0, 0, 30), (1.5, -2.0, 3.0)),
    "sheared": affine_of(shear=0.3),
    "upright": affine_of((90, 0, 0)),
    "oblique": affine_of((20, -35, 50)),
}
THROUGH_SIMPLEITK = ("itk_transform", "metaimage", "nrrd")
AFNI = b"""<AFNI_attributes self_idcode="XYZ" ni_form="ni_group">
<AFNI_atr ni_type="String" ni_dimen="1" atr_name="BRICK_LABS" >
 "x_delta~y_delta~z_delta"
</AFNI_atr>
</AFNI_attributes>"""
SIZES = ((8, 7), (8, 7, 6))
CASES = [(name, size) for name in READABLE for size in SIZES if len(size) == 3 or _TABLE[name].planes]
EVERY = pytest.mark.parametrize(("name", "size"), CASES, ids=[f"{name} {len(size)}D" for name, size in CASES])
EVERY_GRID = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())


def field_of(size):
    noise = torch.randn(1, len(size), *size, generator=torch.Generator().manual_seed(1))
    return gaussian_smooth(noise, 1.5)[0].numpy()


def other_grid(grid, size):
    """A moving grid that is turned, shifted and stretched, along the first two axes, and has more voxels."""
    moving = grid @ affine_of((0, 0, 5), (0.9, 1.1, 1.0), (1.0, -2.0, 0.0))
    return {"moving_affine": moving, "moving_size": tuple(s + 2 for s in size)}


def homogeneous(ddf, position):
    """Voxels, or where they are led, as columns ``(4, N)``."""
    voxels = np.stack(np.meshgrid(*[np.arange(s) for s in ddf.shape[1:]], indexing="ij")).reshape(len(ddf), -1)
    out = np.zeros((4, voxels.shape[1]))
    out[: len(ddf)] = voxels + position * ddf.reshape(len(ddf), -1)
    out[3] = 1.0
    return out


def store_morph(path, led, size, grid):
    """FreeSurfer's: nodes at places in RAS, and tags that say so and where the atlas lies."""
    nodes = np.zeros(size, [("numbers", ">f4", 6), ("node", ">i4", 3)])
    nodes["numbers"][..., 3:] = led[:3].T.reshape(*size, 3)
    edges = np.linalg.norm(grid[:3, :3], axis=0)
    centre = grid[:3, :3] @ (np.array(size) / 2) + grid[:3, 3]
    geometry = struct.pack(">4i15f512x", 1, *size, *edges, *(grid[:3, :3] / edges).T.ravel(), *centre)
    tags = struct.pack(">i", 10) + 2 * geometry + struct.pack(">ii", 11, 1)
    path.write_bytes(gzip.compress(struct.pack(">f4if", 1.0, *size, 1, 20.0) + nodes.tobytes() + tags))


def store(path, name, ddf, grid, moving_affine=None, moving_size=None, components=None):
    """Write a field in a format, in one that is only read by the formula: ``A_m (x + u(x)) − A_f x`` or the first."""
    if name in THROUGH_SIMPLEITK:
        pytest.importorskip("SimpleITK")
    if name == "itk_transform":
        pytest.importorskip("pyfive", reason="pyfive, which reads .h5, is not installed")
    if name in FORMATS:
        write_ddf(path, ddf, grid, name, moving_affine=moving_affine, moving_size=moving_size)
        return
    led = (grid if moving_affine is None else moving_affine) @ homogeneous(ddf, 1)
    if name == "m3z":
        store_morph(path, led, ddf.shape[1:], grid)
        return
    vectors = (led if name == "positions" else led - grid @ homogeneous(ddf, 0))[:3]
    vectors *= np.array([[-1], [-1], [1]]) if name in ("lps", "afni") else 1
    vectors = vectors[: components or len(ddf)].T.reshape(*ddf.shape[1:], *[1] * (4 - len(ddf)), -1)
    image = nib.Nifti1Image(vectors.astype(np.float32), grid)
    if name == "niftyreg":
        image.header["intent_code"], image.header["intent_p1"], image.header["intent_name"] = 1007, 1, b"NREG_TRANS"
    if name == "afni":
        image.header.extensions.append(nib.nifti1.Nifti1Extension("afni", AFNI))
    nib.save(image, path)


def stored_and_read(path, name, ddf, grid):
    store(path, name, ddf, grid)
    return read_ddf(path, name)


@EVERY
@EVERY_GRID
def test_what_is_written_is_told_and_read_back(tmp_path, name, size, grid):
    path, ddf, target = tmp_path / "a" / f"u{_TABLE[name].suffix}", field_of(size), other_grid(grid, size)
    path.parent.mkdir()
    try:
        check_grid(name, "grid", Grid(size, grid))
    except ValueError as refused:
        with pytest.raises(ValueError, match=str(refused).split("\n")[0].removeprefix("grid ")):
            stored_and_read(path, name, ddf, grid)
        return
    upright = len(size) == 2 and out_of_plane(grid)
    for given in ({}, target):
        store(path, name, ddf, grid, **given, components=3 if upright else None)
        said = [name]
        if name not in ("ras", "lps", "positions"):
            assert guess_format(path) == name
            said += ["auto"]
        for one in said:
            back, affine = read_ddf(path, one, **given)
            assert back.dtype == np.float32
            np.testing.assert_allclose(back, ddf, atol=1e-3)
            assert (affine is not None) == _TABLE[name].has_affine
            if affine is not None:
                axes = [0, 1, 3] if len(size) == 2 and name in THROUGH_SIMPLEITK else range(4)  # ITK's planes
                np.testing.assert_allclose(affine[np.ix_(axes, axes)], grid[np.ix_(axes, axes)], atol=1e-6)


@pytest.mark.parametrize("name", ["itk", "ras", "lps", "positions"])
def test_two_components_do_not_do_for_a_plane_that_stands_upright(tmp_path, name):
    image = nib.Nifti1Image(np.zeros((8, 7, 1, 1, 2), np.float32), GRIDS["upright"])
    image.header["intent_code"] = 1007
    nib.save(image, tmp_path / "u.nii")
    with pytest.raises(ValueError, match=r"u.nii must hold three components for a plane .*, got two and the affine"):
        read_ddf(tmp_path / "u.nii", name)


@pytest.mark.parametrize("name", FORMATS)
def test_what_does_not_hold_planes_says_so_before_and_while_it_writes(tmp_path, name):
    assert file_suffix(name) == _TABLE[name].suffix
    if _TABLE[name].planes:
        assert file_suffix(name, 2) == _TABLE[name].suffix
    else:
        with pytest.raises(ValueError, match=f"file_format must be 'itk' or .* or 'voxel' for 2D fields, got '{name}'"):
            file_suffix(name, 2)
        with pytest.raises(ValueError, match=r"ddf must be \(3, \*S\).*, got shape \(2, 8, 7\)"):
            write_ddf(tmp_path / f"u{file_suffix(name)}", field_of(SIZES[0]), np.eye(4), name)


@EVERY
@pytest.mark.parametrize("argument", ["moving_affine", "moving_size"])
def test_what_a_format_asks_for_matters_and_nothing_else(tmp_path, name, size, argument):
    path, ddf, grid = tmp_path / f"u{_TABLE[name].suffix}", field_of(size), GRIDS["anisotropic"]
    target = other_grid(grid, size)
    store(path, name, ddf, grid, **target)
    back = read_ddf(path, name, **{k: v for k, v in target.items() if k != argument})[0]
    assert (np.abs(back - ddf).max() > 0.1) == (argument in _TABLE[name].asks)


def test_size_and_kind_reach_the_formats_that_ask(tmp_path):
    ddf, grid = field_of(SIZES[1]), GRIDS["LAS"]
    write_fsl_ddf(tmp_path / "u.nii", ddf, grid)
    voxels = np.stack(np.meshgrid(*[np.arange(s) for s in ddf.shape[1:]], indexing="ij"))
    np.testing.assert_allclose(read_ddf(tmp_path / "u.nii", relative=False)[0], ddf - voxels, atol=1e-4)
    write_ddf(tmp_path / "u.npz", ddf[:, ::2, ::2, ::2], grid, "learn2reg")
    assert read_ddf(tmp_path / "u.npz", size=(8, 7, 6))[0].shape == ddf.shape


@pytest.mark.parametrize(
    ("shape", "intent", "expected"),
    [
        ((5, 6, 7, 1, 3), 1007, "itk"),
        ((5, 6, 7, 1, 3), 1006, "itk"),
        ((5, 6, 1, 1, 2), 1007, "itk"),
        ((5, 6, 7, 3), 2006, "fsl"),
        ((5, 6, 7, 3), 2007, "fsl"),
    ],
)
def test_intent_and_shape_tell(tmp_path, shape, intent, expected):
    image = nib.Nifti1Image(np.ones(shape, np.float32), np.eye(4))
    image.header["intent_code"] = intent
    nib.save(image, tmp_path / "u.nii")
    assert guess_format(str(tmp_path / "u.nii")) == expected


@pytest.mark.parametrize(
    ("shape", "intent"),
    [((5, 6, 7, 1, 3), 0), ((5, 6, 7, 3), 0), ((5, 6, 1, 2), 0), ((5, 6, 7, 3), 1007), ((5, 6, 7, 3), 1006)],
)
def test_a_file_that_does_not_say_what_it_is_is_asked_about(tmp_path, shape, intent):
    """The same vectors may be voxels, millimetres of either system or positions: none of them is taken for granted."""
    grid = np.diag([-2.0, 2.0, 3.0, 1.0])
    vectors = np.zeros(shape, np.float32)
    vectors[..., 0], vectors[..., 1] = 4.0, 1.0
    image = nib.Nifti1Image(vectors, grid)
    image.header["intent_code"] = intent
    nib.save(image, tmp_path / "u.nii")
    advice = r"say file_format='lps' or 'ras' .*, 'positions' .*, 'voxel' .* or 'fsl'"
    with pytest.raises(ValueError, match=rf"u.nii must say what its vectors are, got shape .* {intent}; {advice}"):
        read_ddf(tmp_path / "u.nii")
    n = shape[-1]
    for said, expected in {"voxel": (4.0, 1.0), "ras": (-2.0, 0.5), "lps": (2.0, -0.5)}.items():
        ddf, affine = read_ddf(tmp_path / "u.nii", said)
        assert ddf.shape == (n, *shape[:n])
        assert ddf[:2].reshape(2, -1)[:, 7].tolist() == list(expected)
        np.testing.assert_array_equal(affine, grid)
    if intent:  # ITK's but for the fourth axis: said to be ITK's, its intent counts
        assert read_ddf(tmp_path / "u.nii", "itk")[0][:, 2, 3, 1].tolist() == (
            [2.0, -0.5, 0.0] if intent == 1007 else [-2.0, 0.5, 0.0]
        )


def test_what_is_no_field_is_refused(tmp_path):
    nib.save(nib.Nifti1Image(np.ones((5, 6, 7), np.float32), np.eye(4)), tmp_path / "image.nii")
    with pytest.raises(
        ValueError, match=r"image.nii must hold a displacement field, got shape \(5, 6, 7\) and intent 0"
    ):
        guess_format(tmp_path / "image.nii")
    (tmp_path / "u.mif").write_text("mrtrix image")
    with pytest.raises(ValueError, match=r"u.mif must be a whole NIfTI file"):
        read_ddf(tmp_path / "u.mif")
    with pytest.raises(FileNotFoundError, match="no file"):
        read_ddf(tmp_path / "absent.nii")
    for call in (
        lambda: read_ddf(tmp_path / "image.nii", "mrtrix"),
        lambda: write_ddf(tmp_path / "u.nii", np.zeros((2, 5, 6)), np.eye(4), "mrtrix"),
        lambda: file_suffix("mrtrix"),
    ):
        with pytest.raises(ValueError, match=r"file_format must be one of \('(auto', ')?itk', .*, got 'mrtrix'"):
            call()
