"""FreeSurfer's warps against surfa, FreeSurfer's package: what it writes leads where it leads."""

import gzip
import struct

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from monai_lm.apps.info import describe_file
from monai_lm.fields import warp
from monai_lm.io import guess_format, read_ddf, read_freesurfer_ddf, write_ddf
from monai_lm.io.volumes import load_volume

SIZE, OTHER = (10, 9, 8), (12, 11, 13)
TURN = Rotation.from_euler("XYZ", (20, -35, 50), degrees=True).as_matrix()
KINDS = ("abs_crs", "disp_crs", "abs_ras", "disp_ras")


def about(matrix, size):
    """An affine that puts the middle of a grid at a point."""
    out = np.eye(4)
    out[:3, :3] = matrix
    out[:3, 3] = np.array([7.0, -20.0, 30.0]) - matrix @ ((np.array(size) - 1) / 2)
    return out


FIXED = {
    "RAS": about(np.diag([1.5, 2.0, 3.0]), SIZE),
    "LIA": about(np.array([[-1.2, 0, 0], [0, 0, 1.5], [0, -1.0, 0]]), SIZE),
    "oblique": about(TURN @ np.diag([1.5, -2.0, 2.5]), SIZE),
}
MOVING = about(TURN.T @ np.diag([1.4, 1.2, -2.0]), OTHER)
EVERY_GRID = pytest.mark.parametrize("grid", FIXED.values(), ids=FIXED)


def places(affine, size):
    voxels = np.stack(np.meshgrid(*[np.arange(s) for s in size], indexing="ij"), -1)
    return voxels @ affine[:3, :3].T + affine[:3, 3]


@pytest.fixture
def written(tmp_path):
    """``written(displacement, grid, kind)``: a file of surfa's, and its warp, of RAS displacements ``(*S, 3)``."""
    surfa = pytest.importorskip("surfa", reason="surfa is not installed")

    def write(displacement, grid, kind, suffix=".mgz"):
        source, target = (surfa.ImageGeometry(s, vox2world=a) for s, a in ((OTHER, MOVING), (SIZE, grid)))
        formats = surfa.Warp.Format
        found = surfa.Warp(displacement.astype(np.float32), source, target, formats.disp_ras)
        found = found.convert(getattr(formats, kind))
        path = tmp_path / f"{kind}{suffix}"
        found.save(str(path))
        return path, found

    return write


@EVERY_GRID
@pytest.mark.parametrize("suffix", [".mgz", ".nii.gz"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_known_shift_is_recovered_between_any_grids(written, grid, suffix, kind):
    shift = np.array([1.25, -2.5, 0.75])
    path, _ = written(np.broadcast_to(shift, (*SIZE, 3)), grid, kind, suffix)
    assert guess_format(path) == "freesurfer"
    ddf, affine = read_ddf(path, moving_affine=MOVING)
    np.testing.assert_allclose(affine, grid, atol=1e-4)
    voxels = np.stack(np.meshgrid(*[np.arange(s) for s in SIZE], indexing="ij"))
    led = np.moveaxis(voxels + ddf, 0, -1) @ MOVING[:3, :3].T + MOVING[:3, 3]
    np.testing.assert_allclose(led, places(grid, SIZE) + shift, atol=1e-3)


@EVERY_GRID
@pytest.mark.parametrize("kind", ["disp_crs", "abs_ras"])
def test_surfa_warps_an_image_alike(written, grid, kind):
    import surfa

    rng = np.random.default_rng(0)
    smooth = [gaussian_filter(rng.normal(size=SIZE), 2) for _ in range(3)]
    path, found = written(12 * np.stack(smooth, -1), grid, kind, ".mgh")
    image = gaussian_filter(rng.normal(size=OTHER), 1.5).astype(np.float32)
    theirs = found.transform(surfa.Volume(image, geometry=surfa.ImageGeometry(OTHER, vox2world=MOVING)))
    ddf = read_freesurfer_ddf(path, MOVING)[0]
    ours = warp(torch.from_numpy(image)[None, None], torch.from_numpy(ddf)[None])[0, 0].numpy()
    led = np.stack(np.meshgrid(*[np.arange(s) for s in SIZE], indexing="ij")) + ddf
    inside = np.all([(p > 0.05) & (p < s - 1.05) for p, s in zip(led, OTHER, strict=True)], axis=0)
    assert inside.mean() > 0.2
    np.testing.assert_allclose(ours[inside], np.asarray(theirs.data).squeeze()[inside], atol=1e-3 * np.abs(image).max())


@EVERY_GRID
def test_what_is_written_says_all_that_freesurfer_asks(tmp_path, grid):
    """Positions in voxels by the tags alone, as ``mri_warp_convert`` has them: four frames, or every second voxel."""
    noise = np.random.default_rng(0).normal(size=(3, *SIZE))
    ddf = 3 * np.stack([gaussian_filter(one, 2) for one in noise]).astype(np.float32)
    write_ddf(tmp_path / "w.mgh", ddf, grid, "freesurfer", moving_affine=MOVING, moving_size=OTHER)
    np.testing.assert_allclose(read_ddf(tmp_path / "w.mgh", moving_affine=MOVING)[0], ddf, atol=1e-4)
    content = (tmp_path / "w.mgh").read_bytes()
    tags = content[284 + 12 * int(np.prod(SIZE)) :]
    for step in (1, 2):
        voxels = np.stack(np.meshgrid(*[np.arange(s) for s in SIZE], indexing="ij"))
        frames = np.concatenate([voxels + ddf, np.zeros((1, *SIZE))]).astype(np.float32)
        image = nib.MGHImage(np.moveaxis(frames, 0, -1), grid).to_bytes()[: 284 + 16 * int(np.prod(SIZE))]
        kind = struct.pack(">iqiif", 13, 12, 0, step, 0.0)
        (tmp_path / "v.mgh").write_bytes(content[:4] + image[4:] + tags[:-24] + kind)
        back, affine = read_ddf(tmp_path / "v.mgh", moving_affine=MOVING)
        np.testing.assert_allclose(back, ddf, atol=1e-4)
        np.testing.assert_allclose(affine, grid @ np.diag([step, step, step, 1]), atol=1e-4)


@pytest.mark.parametrize("frames", [3, 4])
def test_a_warp_in_nifti_is_told_by_its_extension(tmp_path, frames):
    """Its intent, 1006, would make displacements of RAS millimetres of voxels of the source."""
    ddf = np.random.default_rng(0).normal(size=(3, *SIZE)).astype(np.float32)
    values = np.zeros((*SIZE, 1, frames), np.float32)
    values[:, :, :, 0, :3] = np.moveaxis(ddf, 0, -1)
    edges = np.linalg.norm(MOVING[:3, :3], axis=0)
    centre = MOVING @ [*(np.array(OTHER) / 2), 1]
    source = struct.pack(">4i15f", 1, *OTHER, *edges, *(MOVING[:3, :3] / edges).T.ravel(), *centre[:3])
    geometry = source + struct.pack(">i", 5) + b"a.mgz" + source + struct.pack(">i", 0)
    tags = struct.pack(">iq", 10, len(geometry)) + geometry + struct.pack(">iqiif", 13, 12, 1, 1, 0)
    for name, content, intent in (
        ("u", b">\0\3\1" + tags + struct.pack(">iqc", -1, 1, b"*"), 1006),
        ("broken", b">\0\3\1" + tags[:60], 1006),
        ("image", b">\0\0\1" + tags, 1007),
    ):
        image = nib.Nifti1Image(values, FIXED["LIA"])
        image.header["intent_code"] = intent
        image.header.extensions.append(nib.nifti1.Nifti1Extension(14, content))
        nib.save(image, tmp_path / f"{name}.nii")
    assert guess_format(tmp_path / "u.nii") == describe_file(tmp_path / "u.nii")["format"] == "freesurfer"
    back, affine = read_ddf(tmp_path / "u.nii", moving_affine=MOVING)
    np.testing.assert_allclose(back, ddf, atol=1e-4)
    np.testing.assert_allclose(affine, FIXED["LIA"], atol=1e-5)
    assert guess_format(tmp_path / "image.nii") == "itk"
    for name, said, message in (
        ("u", "itk", r"must be (ITK's, got FreeSurfer's; say file_format='freesurfer'|\(X, Y, Z, 1, 3\) or)"),
        ("broken", "auto", r"must be a whole NIfTI file of a warp, got .*the tag 10 of 165 bytes"),
        ("image", "freesurfer", "must have FreeSurfer's extension of a warp"),
    ):
        with pytest.raises(ValueError, match=rf"{name}.nii {message}"):
            read_ddf(tmp_path / f"{name}.nii", said)


def test_what_is_no_warp_or_broken_is_named(written, tmp_path):
    import surfa

    path, _ = written(np.zeros((*SIZE, 3)), FIXED["oblique"], "disp_crs", ".mgh")
    assert describe_file(path)["format"] == "freesurfer"
    whole = path.read_bytes()
    start = 284 + 12 * int(np.prod(SIZE))
    broken = {
        r"must be a whole MGH file, got an empty file": b"",
        r"must be a whole MGH file, got": whole[: start // 2],
        r"must be a whole MGH file of a warp, got .*none as what its numbers are": whole[: start + 20],
        r"must be a whole MGH file of a warp, got .*the tag 10 of 1176 bytes": whole[: start + 20 + 60],
        r"must be finite, got 1 NaN": whole[:284] + struct.pack(">f", np.nan) + whole[288:],
        r"must be a warp of FreeSurfer's, .*, got shape \(10, 9, 8, 3\) and the intent 0": b"\0\0\0\1" + whole[4:],
    }
    for message, content in broken.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"disp_crs.mgh {message}"):
            read_freesurfer_ddf(path)
    labels = surfa.Volume(np.arange(24, dtype=np.int32).reshape(2, 3, 4) % 5)
    labels.save(str(tmp_path / "labels.mgz"), intent=surfa.core.framed.FramedArrayIntents.label)  # FreeSurfer 8's
    content = gzip.decompress((tmp_path / "labels.mgz").read_bytes())
    assert content[2] == 1
    np.testing.assert_array_equal(load_volume(tmp_path / "labels.mgz")[0], labels.data)
    assert describe_file(tmp_path / "labels.mgz")["kind"] == "label map"
