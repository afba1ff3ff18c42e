"""Refining what ANTs, greedy, FireANTs and uniGradICON found, and handing it back: files that each of them wrote.

They run in environments of their own, in the folder that ``$MONAI_LM_PEERS`` names; see docs/chains.md.
"""

import os
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.ndimage import binary_erosion

from monai_lm.apps.commands import apply_field
from monai_lm.apps.pairs import refine_pair
from monai_lm.fields import gaussian_smooth
from monai_lm.fields.space import resample_moving

sitk = pytest.importorskip("SimpleITK", reason="the readers of ITK's files need SimpleITK")

FIXED, MOVING = (36, 34, 32), (44, 42, 40)
QUICK = {"scales": (2, 1), "iterations": (15, 10)}
AS_IT_IS = {"scales": (1,), "iterations": 0}


def affine(degrees, spacing, size, left=False):
    """Voxels turned about z, the centre of the grid at (10, -20, 30)."""
    a, out = np.deg2rad(degrees), np.eye(4)
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    out[:3, :3] = turn @ np.diag(np.array(spacing) * [-1 if left else 1, 1, 1])
    out[:3, 3] = np.array([10, -20, 30]) - out[:3, :3] @ ((np.array(size) - 1) / 2)
    return out


HERE, THERE = affine(8, (1.5, 1.5, 2.0), FIXED), affine(-6, (1.4, 1.6, 1.8), MOVING, left=True)


def smooth(channels, size, seed, sigma):
    out = gaussian_smooth(torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(seed)), sigma)
    return out / out.abs().max()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """``fixed.nii`` and ``moving.nii``: apart by an affine, ``affine.mat``, and a field of 3 voxels."""
    folder = tmp_path_factory.mktemp("chains")
    initial = np.eye(4)
    initial[:3, :3] += [[0.03, -0.08, 0], [0.08, 0.02, 0.03], [0, -0.03, -0.02]]
    initial[:3, 3] = [10, -20, 30] - initial[:3, :3] @ [10, -20, 30] + [3, -2, 1.5]
    moving, ddf = 1 + smooth(1, MOVING, 0, 2.0), 3 * smooth(3, FIXED, 1, 4.0)
    fixed = resample_moving(moving, ddf, HERE, THERE, initial)
    nib.save(nib.Nifti1Image(moving[0, 0].numpy(), THERE), folder / "moving.nii")
    nib.save(nib.Nifti1Image(fixed[0, 0].numpy(), HERE), folder / "fixed.nii")
    lps = np.diag([-1.0, -1, 1, 1]) @ initial @ np.diag([-1.0, -1, 1, 1])
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(lps[:3, :3].ravel().tolist())
    transform.SetTranslation(lps[:3, 3].tolist())
    sitk.WriteTransform(transform, str(folder / "affine.mat"))
    np.savetxt(folder / "plain.mat", initial)
    return folder


def run_peer(name, script, folder):
    root = Path(os.environ.get("MONAI_LM_PEERS", Path.home() / ".cache" / "monai_lm" / "peers"))
    python = root / name / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no environment with {name} at {root / name}; set MONAI_LM_PEERS to the folder of the peers")
    environment = {**os.environ, "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run([python, "-c", script], cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def values(path):
    return np.asarray(nib.load(path).dataobj, dtype=np.float64)


def assert_same_where_it_leads_inside(ours, theirs):
    """Images of positive values; theirs are -100 where the moving image does not reach."""
    inside = binary_erosion(theirs > -50, np.ones((3, 3, 3)))  # greedy mixes both at the border
    assert inside.mean() > 0.4
    np.testing.assert_allclose(ours[inside], theirs[inside], atol=3e-3)


def assert_refined(folder, name, theirs, **files):
    """A chain starts at what the other program's warped image shows, and ends better, at what SimpleITK shows."""
    images = folder / "fixed.nii", folder / "moving.nii"
    refine_pair(*images, folder / f"{name}_start", report=False, settings=AS_IT_IS, **files)
    assert_same_where_it_leads_inside(values(folder / f"{name}_start" / "warped.nii.gz"), theirs)
    metrics = refine_pair(*images, folder / name, report=False, settings=QUICK, **files)
    assert metrics["prediction_used"]
    assert metrics["folds_after"] == 0
    assert metrics["loss_after"] < 0.8 * metrics["loss_before"]
    field = sitk.ReadImage(str(folder / name / "ddf.nii.gz"), sitk.sitkVectorFloat64)
    fixed, moving = (sitk.ReadImage(str(path)) for path in images)
    shown = sitk.Resample(moving, fixed, sitk.DisplacementFieldTransform(field), sitk.sitkLinear, -100.0)
    assert_same_where_it_leads_inside(values(folder / name / "warped.nii.gz"), sitk.GetArrayFromImage(shown).T)


ANTS = """
import ants
f, m = ants.image_read("fixed.nii"), ants.image_read("moving.nii")
ants.registration(f, m, "SyNOnly", ["affine.mat"], reg_iterations=(8, 4), outprefix="ants_", random_seed=1)
w = ants.apply_transforms(f, m, ["ants_1Warp.nii.gz", "ants_0GenericAffine.mat"], defaultvalue=-100)
ants.image_write(w, "ants_warped.nii")
"""
ANTS_READS = """
import ants
f, m = ants.image_read("fixed.nii"), ants.image_read("moving.nii")
ants.image_write(ants.apply_transforms(f, m, ["ants/ddf.nii.gz"], defaultvalue=-100), "ants_ours.nii")
w = ants.apply_transforms(m, f, ["ants/inverse.nii.gz"], defaultvalue=-100)
ants.image_write(w, "ants_back.nii")
"""


def test_ants_starts_and_reads_what_comes_of_it(folder):
    run_peer("ants", ANTS, folder)
    files = {"ddf": folder / "ants_1Warp.nii.gz", "affine": folder / "ants_0GenericAffine.mat"}
    assert_refined(folder, "ants", values(folder / "ants_warped.nii"), ddf_before_affine=True, **files)
    run_peer("ants", ANTS_READS, folder)
    assert_same_where_it_leads_inside(values(folder / "ants" / "warped.nii.gz"), values(folder / "ants_ours.nii"))
    moving, back = (values(folder / name) for name in ("moving.nii", "ants_back.nii"))
    core = np.zeros(MOVING, dtype=bool)
    core[10:-10, 10:-10, 10:-10] = True
    core &= back > -50
    assert core.sum() > 3000
    assert np.corrcoef(moving[core], back[core])[0, 1] > 0.97


GREEDY = """
from picsl_greedy import Greedy3D
greedy = Greedy3D()
images = "-threads 1 -d 3 -i fixed.nii moving.nii"
greedy.execute(f"{images} -it plain.mat -o greedy_warp.nii.gz -m NCC 2x2x2 -n 8x4 -wp 0")
reslice = "-threads 1 -d 3 -rf fixed.nii -rb -100 -rm moving.nii greedy_warped.nii"
greedy.execute(f"{reslice} -r greedy_warp.nii.gz plain.mat")
"""
GREEDY_READS = """
from picsl_greedy import Greedy3D
Greedy3D().execute("-threads 1 -d 3 -rf fixed.nii -rb -100 -rm moving.nii greedy_ours.nii -r greedy/ddf.nii.gz")
"""


def test_greedy_starts_and_reads_what_comes_of_it(folder):
    run_peer("greedy", GREEDY, folder)
    files = {"ddf": folder / "greedy_warp.nii.gz", "affine": folder / "plain.mat"}
    assert_refined(folder, "greedy", values(folder / "greedy_warped.nii"), ddf_before_affine=True, **files)
    run_peer("greedy", GREEDY_READS, folder)
    assert_same_where_it_leads_inside(values(folder / "greedy" / "warped.nii.gz"), values(folder / "greedy_ours.nii"))


FIREANTS = """
import SimpleITK as sitk, torch
from fireants.io import BatchedImages, Image
from fireants.registration.affine import AffineRegistration
from fireants.registration.greedy import GreedyRegistration
fixed, moving = (BatchedImages([Image.load_file(f"{name}.nii", device="cpu")]) for name in ("fixed", "moving"))
start = AffineRegistration([2, 1], [30, 15], fixed, moving, optimizer_lr=3e-3)
start.optimize()
gentle = dict(optimizer_lr=0.2, smooth_warp_sigma=1.0, smooth_grad_sigma=2.0)  # no folds
reg = GreedyRegistration([2, 1], [8, 2], fixed, moving, init_affine=start.get_affine_matrix().detach(), **gentle)
reg.optimize()
reg.save_as_ants_transforms("fireants_warp.nii.gz")
field = sitk.ReadImage("fireants_warp.nii.gz", sitk.sitkVectorFloat64)
f, m = sitk.ReadImage("fixed.nii"), sitk.ReadImage("moving.nii")
w = sitk.Resample(m, f, sitk.DisplacementFieldTransform(field), sitk.sitkLinear, -100.0)
sitk.WriteImage(w, "fireants_warped.nii")
torch.save(reg.evaluate(fixed, moving)[0, 0].detach(), "fireants_own.pt")
"""


def test_fireants_starts_with_its_affine_in_the_field(folder):
    run_peer("fireants", FIREANTS, folder)
    theirs = values(folder / "fireants_warped.nii")
    own = torch.load(folder / "fireants_own.pt").T.numpy()
    inside = (theirs > -50) & (own > 0.05)
    assert np.corrcoef(own[inside], theirs[inside])[0, 1] > 0.999
    assert_refined(folder, "fireants", theirs, ddf=folder / "fireants_warp.nii.gz")


ICON = """
import itk, numpy as np, torch
from icon_registration.itk_wrapper import create_itk_transform
f, m = (itk.imread(f"{name}.nii", itk.F) for name in ("fixed", "moving"))
shape = (24, 24, 24)
axes = [torch.linspace(0, 1, s) for s in shape]
ident = torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]
phi = ident + 0.04 * torch.sin(6 * ident.flip(1))
transform = create_itk_transform(phi, ident, m, f)
itk.transformwrite([transform], "icon.hdf5")
interpolator = itk.LinearInterpolateImageFunction.New(m)
w = itk.resample_image_filter(m, transform=transform, interpolator=interpolator, use_reference_image=True,
                              reference_image=f, default_pixel_value=-100)
itk.imwrite(w, "icon_warped.nii")
"""


def test_a_transform_of_unigradicon_is_read(folder):
    """Its composite of two grids and a field, as ``unigradicon-register --transform_out`` writes it, without weights.

    The map is made up, so what it leads to is compared and not improved.
    """
    pytest.importorskip("pyfive", reason="pyfive, which reads .h5, is not installed")
    run_peer("unigradicon", ICON, folder)
    output = folder / "icon_ours.nii.gz"
    apply_field(folder / "icon.hdf5", folder / "moving.nii", output, fixed=folder / "fixed.nii")
    assert_same_where_it_leads_inside(values(output), values(folder / "icon_warped.nii"))
