"""Files against the programs they are for: what SimpleITK, ANTs, fslpy and greedy make of them, we make of the field.

ANTs (antspyx), fslpy, greedy and surfa run in environments of their own, ``$MONAI_LM_PEERS/ants``, ``/fslpy`` and so on
(default: the user's cache, where the benchmarks put theirs); without one, its tests skip.
"""

import json
import os
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from monai_lm.fields import gaussian_smooth, warp
from monai_lm.fields.space import fixed_to_moving, resample_moving, through_affine
from monai_lm.io import (
    read_affine,
    read_ddf,
    read_fsl_ddf,
    read_itk_ddf,
    write_ddf,
    write_fsl_ddf,
    write_itk_ddf,
    write_itk_image_ddf,
    write_itk_transform,
)

sitk = pytest.importorskip("SimpleITK")

SHAPE, OTHER = (26, 24, 20), (30, 25, 28)
CENTRE = np.array([7.0, -20.0, 30.0])


def rotation(axes: str, degrees) -> np.ndarray:
    return Rotation.from_euler(axes, degrees, degrees=True).as_matrix()


def about_centre(matrix: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """An affine that puts the middle of a grid of that shape at ``CENTRE``."""
    out = np.eye(4)
    out[:3, :3] = matrix
    out[:3, 3] = CENTRE - matrix @ ((np.array(shape) - 1) / 2)
    return out


OBLIQUE = rotation("XYZ", (20, -35, 50))
SPACES = {
    "RAS isotropic": np.diag([2.0, 2.0, 2.0]),
    "RAS anisotropic": np.diag([1.5, 1.8, 2.6]),
    "LAS": np.diag([-1.5, 1.8, 2.6]),
    "LPS": np.diag([-1.7, -1.9, 2.2]),
    "PIR": np.array([[0, 0, 2.0], [-1.6, 0, 0], [0, -1.8, 0]]),
    "oblique": OBLIQUE @ np.diag([1.5, 1.8, 2.4]),
    "oblique, left-handed": OBLIQUE @ np.diag([1.5, -1.8, 2.4]),
}
PAIRS = [
    ("RAS isotropic", "RAS isotropic"),
    ("RAS isotropic", "LAS"),
    ("RAS anisotropic", "LPS"),
    ("LAS", "oblique"),
    ("LPS", "RAS anisotropic"),
    ("PIR", "oblique, left-handed"),
    ("oblique", "RAS isotropic"),
    ("oblique, left-handed", "PIR"),
]
PAIR = pytest.mark.parametrize("pair", PAIRS, ids=[f"{f} from {m}" for f, m in PAIRS])


def smooth(channels: int, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    noise = torch.randn(1, channels, *shape, generator=torch.Generator().manual_seed(seed))
    out = gaussian_smooth(noise, 2.5)
    return out / out.abs().max()


def coordinates(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Where the voxels of a grid are, ``(3, *S)``."""
    voxels = np.stack(np.meshgrid(*[np.arange(s) for s in shape], indexing="ij"))
    return np.einsum("ij,j...->i...", affine[:3, :3], voxels) + affine[:3, 3].reshape(3, 1, 1, 1)


def world_affine():
    """A turn, a stretch and a shift about ``CENTRE``, as a transform of SimpleITK."""
    transform = sitk.AffineTransform(3)
    transform.SetMatrix((rotation("z", 9) @ rotation("x", -5) @ np.diag([1.05, 0.95, 1.0])).ravel().tolist())
    transform.SetTranslation((2.0, -3.0, 1.5))
    transform.SetCenter((-CENTRE[0] + 3, -CENTRE[1], CENTRE[2]))
    return transform


class Case:
    """Images, field and files of one pair of grids; the field in voxels of the fixed grid."""

    def __init__(self, folder: Path, pair: tuple[str, str]) -> None:
        fixed, moving = pair
        self.fixed_affine, self.moving_affine = about_centre(SPACES[fixed], SHAPE), about_centre(SPACES[moving], OTHER)
        self.ddf = 2.5 * smooth(3, SHAPE, 1)
        self.moving = 1 + smooth(1, OTHER, 2)  # positive: ANTs starts at the centres of mass
        folder.mkdir()
        nib.save(nib.Nifti1Image(self.moving[0, 0].numpy(), self.moving_affine), folder / "moving.nii")
        sitk.WriteTransform(world_affine(), str(folder / "affine.mat"))
        self.initial = read_affine(folder / "affine.mat")
        nib.save(nib.Nifti1Image(self.ours(), self.fixed_affine), folder / "fixed.nii")
        write_itk_ddf(folder / "warp.nii.gz", self.ddf[0].numpy(), self.fixed_affine)
        whole = through_affine(self.ddf, self.fixed_affine, self.moving_affine, self.initial)[0].numpy()
        write_itk_ddf(folder / "whole.nii.gz", whole, self.fixed_affine, self.moving_affine)
        write_itk_transform(folder / "chain.h5", self.ddf[0].numpy(), self.fixed_affine, initial=self.initial)
        write_itk_image_ddf(folder / "whole.mha", whole, self.fixed_affine, self.moving_affine)
        self.folder = folder

    def ours(self) -> np.ndarray:
        affines = (self.fixed_affine, self.moving_affine, self.initial)
        return resample_moving(self.moving, self.ddf, *affines)[0, 0].numpy()

    def inside(self, ddf: np.ndarray, initial: np.ndarray | None) -> np.ndarray:
        matrix = fixed_to_moving(self.fixed_affine, self.moving_affine, initial)
        points = coordinates(matrix, SHAPE) + np.einsum("ij,j...->i...", matrix[:3, :3], ddf)
        return np.all([(p > 0.05) & (p < s - 1.05) for p, s in zip(points, OTHER, strict=True)], axis=0)

    def assert_same(self, theirs: np.ndarray, ours: np.ndarray, inside: np.ndarray) -> None:
        assert inside.mean() > 0.3
        assert np.corrcoef(ours[inside], theirs[inside])[0, 1] > 0.99999
        np.testing.assert_allclose(ours[inside], theirs[inside], atol=1e-3)
        assert ours[inside].std() > 0.04


# --- SimpleITK --------------------------------------------------------------------------------------------------------


@PAIR
def test_simpleitk_samples_across_grids_as_we_do(tmp_path, pair):
    case = Case(tmp_path / "case", pair)
    fixed, moving = (sitk.ReadImage(str(case.folder / f"{name}.nii")) for name in ("fixed", "moving"))
    inside = case.inside(case.ddf[0].numpy(), case.initial)
    for name, parts in {"warp": [world_affine()], "whole": []}.items():
        field = sitk.ReadImage(str(case.folder / f"{name}.nii.gz"), sitk.sitkVectorFloat64)
        transform = sitk.CompositeTransform([*parts, sitk.DisplacementFieldTransform(field)])
        theirs = sitk.Resample(moving, fixed, transform, sitk.sitkLinear, -100.0)
        case.assert_same(sitk.GetArrayFromImage(theirs).T, case.ours(), inside)


# --- ANTs -------------------------------------------------------------------------------------------------------------


def peer(name: str) -> str:
    root = Path(os.environ.get("MONAI_LM_PEERS", Path.home() / ".cache" / "monai_lm" / "peers"))
    python = root / name / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no environment with {name} at {root / name}; set MONAI_LM_PEERS to the folder of the peers")
    return str(python)


def run_peer(name: str, script: str, *arguments: str) -> None:
    environment = {**os.environ, "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([peer(name), "-c", script, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


APPLY = """
import json, sys, ants
for folder, register in json.loads(sys.argv[1]):
    f, m = ants.image_read(f"{folder}/fixed.nii"), ants.image_read(f"{folder}/moving.nii")
    def apply(name, *files):
        w = ants.apply_transforms(f, m, list(files), whichtoinvert=[False] * len(files), defaultvalue=-100)
        ants.image_write(w, f"{folder}/{name}.nii")
    apply("ants_both", f"{folder}/warp.nii.gz", f"{folder}/affine.mat")
    apply("ants_whole", f"{folder}/whole.nii.gz")
    apply("ants_chain", f"{folder}/chain.h5")
    apply("ants_mha", f"{folder}/whole.mha")
    if register:
        start = [f"{folder}/affine.mat"]
        ants.registration(f, m, "SyNOnly", start, reg_iterations=(10, 5), outprefix=f"{folder}/syn_", random_seed=1)
        apply("ants_syn", f"{folder}/syn_1Warp.nii.gz", f"{folder}/syn_0GenericAffine.mat")
        options = dict(outprefix=f"{folder}/one_", random_seed=1, write_composite_transform=True)
        ants.registration(f, m, "SyNOnly", start, reg_iterations=(10, 5), **options)
        apply("ants_composite", f"{folder}/one_Composite.h5")
    for axis in range(3):
        m = ants.image_read(f"{folder}/ramp{axis}.nii")
        apply(f"ants_shift{axis}", f"{folder}/shift.nii.gz")
"""
SHIFT = np.array([1.0, -2.0, 3.0])


@pytest.fixture(scope="module")
def ants_cases(tmp_path_factory):
    peer("ants")
    folder = tmp_path_factory.mktemp("ants")
    cases = {pair: Case(folder / str(i), pair) for i, pair in enumerate(PAIRS)}
    for case in cases.values():
        shift = np.broadcast_to(SHIFT.reshape(3, 1, 1, 1), (3, *SHAPE))
        write_itk_ddf(case.folder / "shift.nii.gz", shift, case.fixed_affine)
        # images of the coordinates, in RAS: what is sampled tells where
        for axis, coordinate in enumerate(coordinates(case.moving_affine, OTHER)):
            nib.save(nib.Nifti1Image(coordinate, case.moving_affine), case.folder / f"ramp{axis}.nii")
    run_peer("ants", APPLY, json.dumps([[str(c.folder), pair in PAIRS[3:5]] for pair, c in cases.items()]))
    return cases


def sampled(case: Case, name: str) -> np.ndarray:
    return np.asarray(nib.load(case.folder / f"{name}.nii").dataobj)


@PAIR
@pytest.mark.parametrize("name", ["ants_both", "ants_whole", "ants_chain", "ants_mha"])
def test_ants_samples_across_grids_as_we_do(ants_cases, pair, name):
    """The field before an affine of its own, both in one file, a composite of both, and MetaImage."""
    case = ants_cases[pair]
    case.assert_same(sampled(case, name), case.ours(), case.inside(case.ddf[0].numpy(), case.initial))


@PAIR
def test_ants_goes_where_a_known_shift_leads(ants_cases, pair):
    """To a thousandth of a millimetre: x + 1, y - 2, z + 3 voxels, by images of the coordinates."""
    case = ants_cases[pair]
    inside = case.inside(SHIFT.reshape(3, 1, 1, 1), None)
    assert inside.mean() > 0.3
    expected = coordinates(case.fixed_affine, SHAPE) + (case.fixed_affine[:3, :3] @ SHIFT).reshape(3, 1, 1, 1)
    for axis in range(3):
        np.testing.assert_allclose(sampled(case, f"ants_shift{axis}")[inside], expected[axis][inside], atol=1e-3)


@pytest.mark.parametrize("pair", PAIRS[3:5], ids=["oblique to LAS", "RAS to LPS"])
def test_what_ants_registered_is_read(ants_cases, pair):
    """Field and affine that antsRegistration wrote, read by us, warp as antsApplyTransforms does with them.

    It starts from a known affine: the one that it finds in these images differs from run to run, whatever the seed, and
    at times (a stretch by 1.75 in one of six runs) leads most of the grid out of the moving image.
    """
    case = ants_cases[pair]
    ddf, affine = read_itk_ddf(case.folder / "syn_1Warp.nii.gz")
    initial = read_affine(case.folder / "syn_0GenericAffine.mat")
    np.testing.assert_allclose(affine, case.fixed_affine, atol=1e-4)
    assert np.abs(ddf).max() > 0.5
    np.testing.assert_allclose(initial, case.initial, atol=1e-4)
    field = torch.from_numpy(ddf)[None]
    ours = resample_moving(case.moving, field, case.fixed_affine, case.moving_affine, initial)[0, 0].numpy()
    case.assert_same(sampled(case, "ants_syn"), ours, case.inside(ddf, initial))


@pytest.mark.parametrize("pair", PAIRS[3:5], ids=["oblique to LAS", "RAS to LPS"])
def test_a_composite_that_ants_registered_is_read(ants_cases, pair):
    """One ``.h5`` of field and affine, as fMRIPrep keeps it."""
    pytest.importorskip("pyfive", reason="pyfive, which reads .h5, is not installed")
    case = ants_cases[pair]
    ddf, affine = read_ddf(case.folder / "one_Composite.h5", moving_affine=case.moving_affine)
    np.testing.assert_allclose(affine, case.fixed_affine, atol=1e-4)
    points = np.stack(np.meshgrid(*[np.arange(s) for s in SHAPE], indexing="ij")) + ddf
    inside = np.all([(p > 0.05) & (p < s - 1.05) for p, s in zip(points, OTHER, strict=True)], axis=0)
    ours = warp(case.moving, torch.from_numpy(ddf)[None])[0, 0].numpy()
    case.assert_same(sampled(case, "ants_composite"), ours, inside)


# --- FSL, by fslpy ----------------------------------------------------------------------------------------------------

FSLPY = """
import json, sys, numpy as np
from fsl.data.image import Image
from fsl.transform.fnirt import readFnirt
from fsl.transform.nonlinear import applyDeformation, convertDeformationType
for folder, alike in json.loads(sys.argv[1]):
    f, m = Image(f"{folder}/fixed.nii"), Image(f"{folder}/moving.nii")
    for name in ("relative", "absolute"):
        field = readFnirt(f"{folder}/{name}.nii.gz", m, f, None if alike else name)
        assert field.deformationType == name, (field.deformationType, name)
        np.save(f"{folder}/fsl_{name}.npy", applyDeformation(m, field, mode="nearest"))
        other = {"relative": "absolute", "absolute": "relative"}[name]
        image = Image(convertDeformationType(field, other), header=field.header)
        image.save(f"{folder}/fsl_made_{other}.nii.gz")
    field = readFnirt(f"{folder}/shift.nii.gz", m, f, "relative")
    np.save(f"{folder}/points.npy", field.transform(np.load(f"{folder}/voxels.npy"), "voxel", "world"))
"""
VOXELS = np.array([[8, 9, 7], [12, 10, 6], [10, 14, 9], [15, 12, 8]])


@pytest.fixture(scope="module")
def fsl_cases(tmp_path_factory):
    peer("fslpy")
    folder = tmp_path_factory.mktemp("fsl")
    cases = {pair: Case(folder / str(i), pair) for i, pair in enumerate(PAIRS)}
    for case in cases.values():
        affines = (case.fixed_affine, case.moving_affine)
        whole = through_affine(case.ddf, *affines, case.initial)[0].numpy()
        for name in ("relative", "absolute"):
            write_fsl_ddf(case.folder / f"{name}.nii.gz", whole, *affines, OTHER, relative=name == "relative")
        shift = torch.from_numpy(SHIFT).double().view(1, 3, 1, 1, 1).expand(1, 3, *SHAPE)
        write_fsl_ddf(case.folder / "shift.nii.gz", through_affine(shift, *affines)[0].numpy(), *affines, OTHER)
        np.save(case.folder / "voxels.npy", VOXELS)
    run_peer("fslpy", FSLPY, json.dumps([[str(c.folder), pair in PAIRS[:2]] for pair, c in cases.items()]))
    return cases


@PAIR
@pytest.mark.parametrize("name", ["relative", "absolute"])
def test_fslpy_samples_across_grids_as_we_do(fsl_cases, pair, name):
    """It guesses the kind of the file, as we do, where the axes of the grids are alike, and is told it elsewhere."""
    case = fsl_cases[pair]
    theirs = np.load(case.folder / f"fsl_{name}.npy")
    case.assert_same(theirs, case.ours(), case.inside(case.ddf[0].numpy(), case.initial))


@PAIR
def test_fslpy_goes_where_a_known_shift_leads(fsl_cases, pair):
    case = fsl_cases[pair]
    expected = (VOXELS + SHIFT) @ case.fixed_affine[:3, :3].T + case.fixed_affine[:3, 3]
    np.testing.assert_allclose(np.load(case.folder / "points.npy"), expected, atol=1e-3)


@PAIR
@pytest.mark.parametrize("name", ["relative", "absolute"])
def test_what_fslpy_wrote_is_read(fsl_cases, pair, name):
    case = fsl_cases[pair]
    ddf, affine = read_fsl_ddf(case.folder / f"fsl_made_{name}.nii.gz", case.moving_affine, OTHER)
    expected = through_affine(case.ddf, case.fixed_affine, case.moving_affine, case.initial)[0].numpy()
    np.testing.assert_allclose(ddf, expected, atol=1e-3)
    np.testing.assert_allclose(affine, case.fixed_affine, atol=1e-4)


# --- greedy -----------------------------------------------------------------------------------------------------------

GREEDY = """
import sys
from picsl_greedy import Greedy3D
folder = sys.argv[1]
images = f"-i {folder}/fixed.nii {folder}/moving.nii"
greedy = Greedy3D()
greedy.execute(f"-threads 1 -a -d 3 {images} -o {folder}/plain.mat -m NCC 2x2x2 -n 40x20 -ia-image-centers")
greedy.execute(
    f"-threads 1 -d 3 {images} -it {folder}/plain.mat -o {folder}/greedy.nii.gz -m NCC 2x2x2 -n 20x10 -wp 0"
)
greedy.execute(
    f"-threads 1 -d 3 -rf {folder}/fixed.nii -rm {folder}/moving.nii {folder}/sampled.nii "
    f"-r {folder}/greedy.nii.gz {folder}/plain.mat"
)
"""


def test_what_greedy_registered_is_read(tmp_path):
    """Its field, as ITK writes it, and its affine, four rows of numbers in RAS millimetres."""
    case = Case(tmp_path / "case", PAIRS[3])
    run_peer("greedy", GREEDY, str(case.folder))
    ddf, affine = read_itk_ddf(case.folder / "greedy.nii.gz")
    initial = read_affine(case.folder / "plain.mat")
    np.testing.assert_allclose(affine, case.fixed_affine, atol=1e-4)
    assert np.abs(ddf).max() > 0.5
    assert np.abs(initial - np.eye(4)).max() > 0.01
    affines = (case.fixed_affine, case.moving_affine, initial)
    ours = resample_moving(case.moving, torch.from_numpy(ddf)[None], *affines)[0, 0].numpy()
    case.assert_same(sampled(case, "sampled"), ours, case.inside(ddf, initial))


# --- AFNI and SPM, by nitransforms ------------------------------------------------------------------------------------


def led_by(ddf, affine):
    """Where a field in voxels of its own grid leads its voxels, ``(N, 3)`` in RAS millimetres."""
    return np.moveaxis(coordinates(affine, ddf.shape[1:]) + np.einsum("ij,j...->i...", affine[:3, :3], ddf), 0, -1)


@pytest.mark.parametrize("space", [name for name in SPACES if "oblique" not in name])  # AFNI leaves obliquity out
def test_nitransforms_leads_points_as_the_field_of_afni_that_is_read(tmp_path, space):
    nonlinear = pytest.importorskip("nitransforms.nonlinear", reason="nitransforms is not installed")
    affine, shift = about_centre(SPACES[space], SHAPE), np.array([1.25, -2.5, 0.75])
    moved = np.moveaxis(2.5 * smooth(3, SHAPE, 3)[0].numpy(), 0, -1) + shift
    image = nib.Nifti1Image((moved * [-1, -1, 1])[..., None, :].astype(np.float32), affine)
    labels = b'<AFNI_atr atr_name="BRICK_LABS" > "x_delta~y_delta~z_delta" </AFNI_atr>'
    image.header.extensions.append(nib.nifti1.Nifti1Extension("afni", labels))
    nib.save(image, tmp_path / "afni.nii")
    ddf, found = read_ddf(tmp_path / "afni.nii")
    ours = led_by(ddf, found)
    np.testing.assert_allclose(ours, np.moveaxis(coordinates(affine, SHAPE), 0, -1) + moved, atol=1e-3)
    theirs = nonlinear.DenseFieldTransform.from_filename(tmp_path / "afni.nii", fmt="afni")
    start = np.moveaxis(coordinates(found, SHAPE), 0, -1).reshape(-1, 3)
    np.testing.assert_allclose(ours.reshape(-1, 3), theirs.map(start), atol=1e-3)


@pytest.mark.parametrize("space", SPACES)
def test_nitransforms_leads_points_as_the_positions_of_spm_that_are_read(tmp_path, space):
    nonlinear = pytest.importorskip("nitransforms.nonlinear", reason="nitransforms is not installed")
    affine = about_centre(SPACES[space], SHAPE)
    places = np.moveaxis(coordinates(affine, SHAPE) + 2.5 * smooth(3, SHAPE, 4)[0].numpy() + 1, 0, -1)
    image = nib.Nifti1Image(places[..., None, :].astype(np.float32), affine)
    image.header["descrip"] = b"Deformation"
    nib.save(image, tmp_path / "y_spm.nii")
    ddf, found = read_ddf(tmp_path / "y_spm.nii")
    theirs = nonlinear.DenseFieldTransform(nib.load(tmp_path / "y_spm.nii"), is_deltas=False)
    start = np.moveaxis(coordinates(found, SHAPE), 0, -1).reshape(-1, 3)
    np.testing.assert_allclose(led_by(ddf, found).reshape(-1, 3), theirs.map(start), atol=1e-3)


SURFA = """
import sys, numpy, surfa
warp = surfa.load_warp(sys.argv[1])
numpy.save(sys.argv[2], numpy.asarray(warp.convert(surfa.Warp.Format.abs_crs).data))
"""


@pytest.mark.parametrize("degrees", [(0, 0, 0), (20, -35, 50)])
def test_surfa_reads_a_warp_in_voxels_of_its_source(tmp_path, degrees):
    """It makes positions in voxels of the source of our displacements in RAS, by the geometries behind the data."""
    turn = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    fixed, moving, size = np.eye(4), np.eye(4), (10, 9, 8)
    fixed[:3, :3], fixed[:3, 3] = turn @ np.diag([-1.5, 2.0, 3.0]), (7, -20, 30)
    moving[:3, :3], moving[:3, 3] = turn.T @ np.diag([1.4, -1.2, 2.0]), (-3, 5, 10)
    ddf = np.random.default_rng(0).normal(scale=3, size=(3, *size)).astype(np.float32)
    write_ddf(tmp_path / "w.mgz", ddf, fixed, "freesurfer", moving_affine=moving, moving_size=(12, 11, 13))
    run_peer("surfa", SURFA, str(tmp_path / "w.mgz"), str(tmp_path / "led.npy"))
    voxels = np.stack(np.meshgrid(*[np.arange(s) for s in size], indexing="ij"))
    np.testing.assert_allclose(np.moveaxis(np.load(tmp_path / "led.npy"), -1, 0), voxels + ddf, atol=1e-3)
