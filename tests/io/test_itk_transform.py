"""ITK's transforms as fields: points go where SimpleITK, which wrote or reads the files, says."""

import sys

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from monai_lm.fields.space import Grid, resample_moving
from monai_lm.io import guess_format, read_ddf, read_itk_transform, write_ddf, write_itk_transform
from monai_lm.io.itk_transform import applied_parts
from monai_lm.io.simpleitk import itk_grid

sitk = pytest.importorskip("SimpleITK")
pytest.importorskip("pyfive", reason="pyfive, which reads .h5, is not installed")

SIZE = (9, 8, 7)
TURN = Rotation.from_euler("XYZ", (20, -35, 50), degrees=True).as_matrix()
FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])


def affine(matrix, origin=(7.0, -20.0, 30.0)):
    out = np.eye(4)
    out[:3, :3], out[:3, 3] = matrix, origin
    return out


GRIDS = {
    "RAS": affine(np.diag([1.5, 2.0, 3.0])),
    "LAS": affine(np.diag([-0.7, 1.3, 3.0])),
    "LPS": affine(np.diag([-1.0, -1.5, 2.0])),
    "oblique": affine(TURN @ np.diag([0.7, 1.3, 3.0])),
    "oblique, left-handed": affine(TURN @ np.diag([0.7, -1.3, 3.0])),
}
EVERY_GRID = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
MOVING = affine(TURN.T @ np.diag([1.1, -1.4, 2.0]), (-3.0, 4.0, 9.0))


def displacement(grid, vectors):
    """SimpleITK's transform of LPS vectors ``(X, Y, Z, 3)`` on a grid."""
    where = itk_grid(Grid(SIZE, grid))
    image = sitk.GetImageFromArray(np.ascontiguousarray(np.moveaxis(vectors, (0, 1, 2), (2, 1, 0))), isVector=True)
    image.SetOrigin(where["outputOrigin"])
    image.SetSpacing(where["outputSpacing"])
    image.SetDirection(where["outputDirection"])
    return sitk.DisplacementFieldTransform(sitk.Cast(image, sitk.sitkVectorFloat64))


def shift(grid, vector=(1.25, -2.5, 0.75)):
    return displacement(grid, np.broadcast_to(np.array(vector), (*SIZE, 3)))


def bumps(grid):
    return displacement(grid, np.random.default_rng(0).normal(size=(*SIZE, 3)))


def euler():
    return sitk.Euler3DTransform((1.0, 2.0, 3.0), 0.1, -0.2, 0.3, (4.0, 5.0, 6.0))


def misses(ddf, grid, moving_affine, transform):
    """How far the field leads its voxels from where SimpleITK leads them, in millimetres, at most."""
    voxels = np.stack(np.meshgrid(*[np.arange(s) for s in ddf.shape[1:]], indexing="ij")).reshape(3, -1)
    led = moving_affine @ np.vstack([voxels + ddf.reshape(3, -1), np.ones(voxels.shape[1])])
    start = FLIP @ grid @ np.vstack([voxels, np.ones(voxels.shape[1])])
    theirs = np.array([transform.TransformPoint(point) for point in start[:3].T.tolist()]).T
    return np.abs((FLIP @ led)[:3] - theirs).max()


@EVERY_GRID
@pytest.mark.parametrize("suffix", [".h5", ".tfm"])
def test_a_known_shift_and_an_affine_after_it_are_recovered(tmp_path, grid, suffix):
    """ANTs' and fMRIPrep's chain: the last part of a composite, the field, comes first."""
    path = tmp_path / f"u{suffix}"
    sitk.WriteTransform(shift(grid), str(path))
    ddf, found = read_ddf(path)
    assert guess_format(path) == "itk_transform"
    np.testing.assert_allclose(found, grid, atol=1e-9)
    expected = np.linalg.solve(grid[:3, :3], [-1.25, 2.5, 0.75])
    np.testing.assert_allclose(ddf, np.broadcast_to(expected.reshape(3, 1, 1, 1), ddf.shape), atol=1e-5)
    chain = sitk.CompositeTransform([euler(), bumps(grid)])
    sitk.WriteTransform(chain, str(path))
    for given in ({}, {"moving_affine": MOVING}):
        ddf, found = read_ddf(path, **given)
        assert ddf.dtype == np.float32
        assert misses(ddf, found, given.get("moving_affine", grid), chain) < 1e-3
    assert applied_parts(path) == (["DisplacementFieldTransform", "Euler3DTransform"], False)


@EVERY_GRID
def test_on_the_fixed_grid_any_transform_is_sampled(tmp_path, grid):
    """Linear ones, B-splines, composites that begin with an affine, a field on another grid."""
    spline = sitk.BSplineTransformInitializer(shift(grid).GetDisplacementField(), [3, 3, 3])
    spline.SetParameters(np.random.default_rng(1).normal(size=len(spline.GetParameters())).tolist())
    other = grid @ affine(np.diag([0.8, 1.1, 0.9]), (0.3, 0.2, -0.1))
    begun = sitk.CompositeTransform([bumps(grid), euler()])
    for name, transform in {"affine": euler(), "spline": spline, "begun": begun, "other": bumps(grid)}.items():
        path = tmp_path / f"{name}.h5"
        sitk.WriteTransform(transform, str(path))
        where = {"size": (6, 5, 4), "fixed_affine": other}
        ddf, found = read_ddf(path, moving_affine=MOVING, **where)
        assert ddf.shape == (3, 6, 5, 4)
        np.testing.assert_array_equal(found, other)
        assert misses(ddf, other, MOVING, transform) < 1e-3
        if name != "other":
            with pytest.raises(ValueError, match=rf"{name}.h5 must begin with a displacement field .* \['.*; give the"):
                read_ddf(path)


@EVERY_GRID
@pytest.mark.parametrize("initial", [None, affine(TURN @ np.diag([1.1, 0.9, 1.0]), (1.0, 2.0, 3.0))])
def test_simpleitk_moves_points_as_the_field_that_was_written(tmp_path, grid, initial):
    ddf = np.random.default_rng(2).normal(size=(3, *SIZE)).astype(np.float32)
    write_itk_transform(tmp_path / "u.h5", ddf, grid, MOVING, initial)
    end = MOVING if initial is None else initial @ MOVING
    assert misses(ddf, grid, end, sitk.ReadTransform(str(tmp_path / "u.h5"))) < 1e-3
    back = read_itk_transform(tmp_path / "u.h5", end)[0]
    np.testing.assert_allclose(back, ddf, atol=2e-6, rtol=1e-6)


def test_simpleitk_resamples_through_the_file_as_the_field_does(tmp_path):
    grid, size = GRIDS["LAS"], (12, 11, 10)
    ddf = np.random.default_rng(3).uniform(-1, 1, (3, *size)).astype(np.float32)
    write_ddf(tmp_path / "u.h5", ddf, grid, "itk_transform")
    values = np.random.default_rng(4).normal(size=size).astype(np.float32)
    image = sitk.GetImageFromArray(np.ascontiguousarray(values.T))
    where = itk_grid(Grid(size, grid))
    image.SetOrigin(where["outputOrigin"])
    image.SetSpacing(where["outputSpacing"])
    image.SetDirection(where["outputDirection"])
    resampled = sitk.Resample(image, image, sitk.ReadTransform(str(tmp_path / "u.h5")), sitk.sitkLinear)
    ours = resample_moving(torch.from_numpy(values)[None, None], torch.from_numpy(ddf)[None], grid, grid)[0, 0].numpy()
    inside = (slice(1, -1),) * 3
    np.testing.assert_allclose(ours[inside], sitk.GetArrayFromImage(resampled).T[inside], atol=1e-3)


def test_a_plane(tmp_path):
    grid = np.diag([-1.5, 2.0, 1.0, 1.0])
    ddf = np.random.default_rng(5).normal(size=(2, 6, 7)).astype(np.float32)
    write_itk_transform(tmp_path / "u.tfm", ddf, grid, initial=affine(np.diag([1.1, 1.0, 1.0]), (1.0, 2.0, 5.0)))
    assert sitk.ReadTransform(str(tmp_path / "u.tfm")).GetDimension() == 2
    back, found = read_itk_transform(tmp_path / "u.tfm", np.diag([1.1, 1, 1, 1]) @ grid)
    np.testing.assert_allclose(back[0] + 1 / 1.65, ddf[0], atol=1e-5)
    np.testing.assert_allclose(found, grid, atol=1e-9)
    with pytest.raises(ValueError, match=r"u.tfm must be a transform in 3D as the fixed grid is, got one in 2D"):
        read_itk_transform(tmp_path / "u.tfm", None, SIZE, np.eye(4))
    with pytest.raises(ValueError, match="initial must keep to the plane"):
        write_itk_transform(tmp_path / "v.tfm", ddf, grid, initial=affine(TURN))


def test_what_cannot_be_held_or_read_is_named(tmp_path, monkeypatch):
    sheared = GRIDS["RAS"] + 0.3 * np.eye(4, k=1) * np.array([0, 1, 0, 0])
    ddf = np.zeros((3, *SIZE), np.float32)
    with pytest.raises(ValueError, match="affine must have voxel axes at right angles for ITK's files"):
        write_itk_transform(tmp_path / "u.h5", ddf, sheared)
    with pytest.raises(ValueError, match=r"path must end in .h5 or .hdf5 or .tfm or .txt, got 'u.xfm'"):
        write_itk_transform(tmp_path / "u.xfm", ddf, np.eye(4))
    assert not list(tmp_path.iterdir())
    sitk.WriteTransform(shift(GRIDS["RAS"]), str(tmp_path / "u.h5"))
    with pytest.raises(ValueError, match="fixed_affine must have voxel axes at right angles"):
        read_itk_transform(tmp_path / "u.h5", None, SIZE, sheared)
    whole = (tmp_path / "u.h5").read_bytes()
    for kept in (0, 30, len(whole) // 2):
        (tmp_path / "cut.h5").write_bytes(whole[:kept])
        with pytest.raises(
            ValueError, match=r"cut.h5 must be a whole ITK transform file in HDF5, got (an empty file|\w+: )"
        ):
            read_ddf(tmp_path / "cut.h5")
    sitk.WriteTransform(shift(GRIDS["RAS"], (np.nan, 0, 0)), str(tmp_path / "nan.h5"))
    with pytest.raises(ValueError, match=r"nan.h5 must be finite, got 504 NaN"):
        read_ddf(tmp_path / "nan.h5")
    with pytest.raises(FileNotFoundError, match="no file"):
        read_ddf(tmp_path / "absent.h5")
    head = "#Insight Transform File V1.0\n#Transform 0\nTransform: "
    grid = " ".join(map(str, [2, 2, 2, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 1, 0, 0, 0, 1]))
    for text, message in (  # on the second and third ITK's own reader ends the process, or reads beyond the numbers
        (
            "ScaleLogarithmicTransform_double_3_3\nParameters: 0 0 0",
            "transforms that SimpleITK has, got another .Scale",
        ),
        (
            "Euler3DTransform_double_3_3\nParameters:\nFixedParameters: 0 0 0",
            "have 4 fixed and 6 other .*, got 4 and 0",
        ),
        ("ScaleVersor3DTransform_double_3_3\nParameters: 1 2\nFixedParameters: 0 0 0", "9 other .*, got 3 and 2"),
        (
            f"DisplacementFieldTransform_double_3_3\nParameters: 1\nFixedParameters: {grid}",
            r"hold 3 numbers .*, got 1 ",
        ),
        ("DisplacementFieldTransform_double_3_3\nParameters: 1\nFixedParameters: 2", "say where its grid lies in 18"),
        ("ReadTransform_double_3_3\nParameters:", "transforms that SimpleITK has"),
        (
            "AffineTransform_double_4_4\nParameters:",
            "transforms of ITK's in 2D or 3D, got 'AffineTransform_double_4_4'",
        ),
    ):
        (tmp_path / "odd.tfm").write_text(f"{head}{text}\n")
        with pytest.raises(ValueError, match=rf"odd.tfm must .*{message}"):
            read_ddf(tmp_path / "odd.tfm")
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    for call in (lambda: read_ddf(tmp_path / "u.h5"), lambda: write_itk_transform(tmp_path / "u.h5", ddf, np.eye(4))):
        with pytest.raises(ValueError, match=r"u.h5 must be read and written with SimpleITK, in the itk extra: pip"):
            call()
    assert (tmp_path / "u.h5").read_bytes() == whole
