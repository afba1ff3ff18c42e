"""Labels and landmarks of files guide their refinement, on grids and after an affine of any kind."""

import json
import sys

import nibabel as nib
import numpy as np
import pytest
import torch

from monai_lm.apps import cli
from monai_lm.apps.pairs import refine_pair
from monai_lm.fields import gaussian_smooth

FIXED = np.array([[-1.5, 0, 0, 20], [0, 1, 0, -5], [0, 0, 2, 3], [0, 0, 0, 1.0]])
MOVING = np.array([[0, 1.2, 0, -3], [1.0, 0, 0, -6], [0, 0, 1.6, 2], [0, 0, 0, 1.0]])
SHIFT = np.array([1.5, 1.0, -2.0])
QUICK = {"iterations": 30, "similarity": "mse"}


@pytest.fixture
def files(tmp_path):
    """Images that say little, and a ball and points that are shifted in space; the paths by their roles."""
    noise = 1e-3 * torch.randn(2, 1, 22, 21, 20, generator=torch.Generator().manual_seed(0))
    paths = {}
    for role, affine, image in zip(("fixed", "moving"), (FIXED, MOVING), gaussian_smooth(noise, 2.0), strict=True):
        centre = np.array([4.0, 5.0, 22.0]) + (SHIFT if role == "moving" else 0)
        voxels = np.stack(np.meshgrid(*(np.arange(s) for s in image.shape[1:]), indexing="ij"), -1)
        space = voxels @ affine[:3, :3].T + affine[:3, 3]
        ball = (np.linalg.norm(space - centre, axis=-1) < 6).astype(np.uint8)
        for kind, values in (("", image[0].numpy()), ("_label", ball)):
            paths[role + kind] = tmp_path / f"{role}{kind}.nii.gz"
            nib.save(nib.Nifti1Image(values, affine), paths[role + kind])
        points = centre + 4 * np.vstack([np.eye(3), -np.eye(3)])
        paths[role + "_points"] = tmp_path / f"{role}.csv"
        np.savetxt(paths[role + "_points"], points, delimiter=",", header="x,y,z", comments="")
    return paths


def test_labels_and_points_of_files_are_brought_together(files, tmp_path):
    labels, points = ((files[f"fixed_{k}"], files[f"moving_{k}"]) for k in ("label", "points"))
    images = files["fixed"], files["moving"]
    for guide in ({"labels": "all", "weight": 50}, {"points": True, "weight": 50}):
        out = tmp_path / next(iter(guide))
        metrics = refine_pair(
            *images, out, labels=labels, points=points, report=False, settings=QUICK, guide=guide, device="cpu"
        )
        name, better = ("dice", 1) if "labels" in guide else ("tre", -1)
        key = next(k for k in metrics if k.startswith(name) and k.endswith("_before"))
        assert better * metrics[key.replace("before", "after")] > better * metrics[key] * (1.05 if better > 0 else 0.5)
        assert metrics["folds_after"] == 0
        assert metrics["provenance"]["settings"]["guidance"] == guide


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_soft_labels_of_files_guide(files, tmp_path, shape):
    """A ball as a probability, in a file of one, or as one volume of several, on a grid of its own."""
    soft, volumes = [], 1 if shape else 2
    for role in ("fixed", "moving"):
        ball = nib.load(files[role + "_label"])
        data = ball.get_fdata(dtype=np.float32)[:-1]  # of another size than the image
        maps = [0.9 * data, 0.1 * data[::-1]][:volumes]
        values = maps[0].reshape(*data.shape, *shape) if shape else np.stack(maps, -1)
        soft.append(tmp_path / f"{role}_soft{len(shape)}.nii.gz")
        nib.save(nib.Nifti1Image(values.astype(np.float32), ball.affine), soft[-1])
    labels = files["fixed_label"], files["moving_label"]
    how = {"labels": labels, "report": False, "settings": QUICK, "device": "cpu", "guide": {"weight": 50}}
    metrics = refine_pair(files["fixed"], files["moving"], tmp_path / "out", soft_labels=soft, **how)
    before = next(k for k in metrics if k.startswith("dice") and k.endswith("_before"))
    assert metrics[before.replace("before", "after")] > 1.05 * metrics[before]
    assert {"fixed_soft_labels", "moving_soft_labels"} <= set(metrics["provenance"]["inputs"])
    assert metrics["provenance"]["refine"]["guidance"] == {"weight": 50, "soft_labels": volumes}


def test_soft_labels_that_are_none_are_named(files, tmp_path):
    images = files["fixed"], files["moving"]
    for name, values in (
        ("one", np.zeros((5, 5, 5, 1))),
        ("two", np.zeros((5, 5, 5, 2))),
        ("logits", np.ones((5, 5, 5)) * 3),
    ):
        nib.save(nib.Nifti1Image(values.astype(np.float32), FIXED), tmp_path / f"{name}.nii")
    one, two, logits = (tmp_path / f"{name}.nii" for name in ("one", "two", "logits"))
    with pytest.raises(
        ValueError, match=r"fixed_soft_labels and moving_soft_labels must .* got 1 in .*one.nii and 2 in .*two.nii"
    ):
        refine_pair(*images, tmp_path / "no", soft_labels=(one, two))
    with pytest.raises(ValueError, match=r"logits.nii must hold probabilities in \[0, 1\], got 3 to 3; a label map"):
        refine_pair(*images, tmp_path / "no", soft_labels=(one, logits))
    with pytest.raises(ValueError, match="fixed and moving must have a label in common"):
        refine_pair(*images, tmp_path / "no", soft_labels=(one, one), report=False)
    with pytest.raises(
        ValueError, match="uncertainty cannot be told together with fixed_soft_labels and moving_soft_la"
    ):
        refine_pair(*images, tmp_path / "no", soft_labels=(one, one), uncertainty=True)
    assert not (tmp_path / "no").exists()


def test_soft_labels_that_are_not_where_their_image_is_are_named_with_both_grids(files, tmp_path):
    images, here = (files["fixed"], files["moving"]), (files["fixed_label"], tmp_path / "soft.nii")
    ball, how = nib.load(files["moving_label"]).get_fdata(dtype=np.float32), {"report": False, "settings": QUICK}
    grids = r".*soft.nii has 22×21×20 voxels of 1×1×1 mm, .*moving.nii.gz 22×21×20 voxels of 1×1.2×1.6 mm"
    far = np.eye(4)
    far[:3, 3] = 500
    nib.save(nib.Nifti1Image(ball, far), here[1])
    with pytest.raises(ValueError, match=f"moving_soft_labels must lie where moving does, .*: {grids}"):
        refine_pair(*images, tmp_path / "no", soft_labels=here, **how)
    nib.save(nib.Nifti1Image(ball, np.eye(4)), here[1])
    with pytest.warns(UserWarning, match=f"moving_soft_labels have as many voxels as moving, .* elsewhere: {grids}"):
        refine_pair(*images, tmp_path / "no", soft_labels=here, dry_run=True, **how)
    nib.save(nib.Nifti1Image(ball[..., 0], np.eye(4)), here[1])
    with pytest.raises(ValueError, match=r"moving_soft_labels must have as many axes as moving: .* has 22×21 voxels"):
        refine_pair(*images, tmp_path / "no", soft_labels=here, **how)
    assert not (tmp_path / "no").exists()


def test_the_command_line_says_what_guides(files, tmp_path, monkeypatch, capsys):
    roles = [f"--{role}={path}" for role, path in files.items()]
    roles += [f"--{role}_soft_labels={files[role + '_label']}" for role in ("fixed", "moving")]
    options = [
        "--guide_labels=[1]",
        "--guide_points=true",
        "--guide_weight=2",
        "--report=false",
        "--iterations=2",
        "--json",
    ]
    monkeypatch.setattr(sys, "argv", ["monai-lm", "refine", *roles, f"--output_dir={tmp_path / 'out'}", *options])
    cli.main()
    found = json.loads(capsys.readouterr().out)
    assert {"fixed_soft_labels", "moving_soft_labels"} <= set(found["provenance"]["inputs"])
    assert found["provenance"]["settings"]["guidance"] == {"labels": [1], "points": True, "weight": 2.0}


def test_what_lies_in_lesions_of_files_is_not_seen_and_is_recorded(files, tmp_path):
    """Whatever the balls hold, on grids of either image, the field is the same, and folds nothing."""
    fields, how = [], {"lesion": files["fixed_label"], "moving_lesion": files["moving_label"]}
    for k, value in enumerate((0.0, 5.0)):
        for role in ("fixed", "moving"):
            image, ball = (nib.load(files[role + kind]).get_fdata(dtype=np.float32) for kind in ("", "_label"))
            nib.save(nib.Nifti1Image(np.where(ball > 0, value, image), nib.load(files[role]).affine), files[role])
        metrics = refine_pair(
            files["fixed"], files["moving"], tmp_path / str(k), report=False, settings={"iterations": 3}, **how
        )
        fields.append(nib.load(tmp_path / str(k) / "ddf.nii.gz").get_fdata())
        assert metrics["folds_after"] == 0
        assert {"lesion", "moving_lesion"} <= set(metrics["provenance"]["inputs"])
    np.testing.assert_array_equal(*fields)
    assert np.abs(fields[0]).max() > 0.1
    with pytest.raises(ValueError, match="uncertainty cannot be told together with fixed_lesion and moving_lesion"):
        refine_pair(files["fixed"], files["moving"], tmp_path / "no", uncertainty=True, **how)


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        ({"labels": "all"}, "guide_labels needs fixed_label and moving_label"),
        ({"points": True}, "guide_points needs fixed_points and moving_points"),
        ({"labels": "some"}, "guide_labels must be a list of labels or 'all'"),
    ],
)
def test_what_is_not_there_cannot_guide(files, tmp_path, guide, message):
    with pytest.raises(ValueError, match=message):
        refine_pair(files["fixed"], files["moving"], tmp_path / "out", report=False, guide=guide)
