"""What users call, on a device: transforms, inferer, module, metrics, and the command line's work on files."""

import json
import sys
from contextlib import ExitStack, contextmanager
from unittest import mock

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from monai_lm import RegistrationInferer
from monai_lm.apps import cli, commands, pairs
from monai_lm.fields import fold_count, metrics, warp
from monai_lm.fields.topology import jacobian_determinant
from monai_lm.training import RegistrationModule
from monai_lm.training.batch import measure_batch
from monai_lm.transforms import InvertDDF, JacobianDeterminant, RefineDDF, WarpImage, WarpPoints

SIZE = (17, 16, 14)
AFFINE = np.array([[-1.5, 0, 0, 10], [0, 1, 0, -20], [0, 0, 1.25, 5], [0, 0, 0, 1]])
SETTINGS = {"scales": (2, 1), "iterations": (8, 4), "tolerance": 0.0}


@pytest.fixture
def pair(smooth_image, smooth_field):
    """Fixed and moving image, their labels, and a prediction, ``(1, …)``."""
    moving = smooth_image((1, 1, *SIZE), 1.5, dtype=torch.float32)
    truth = smooth_field((1, 3, *SIZE), 2.0, 4.0, 1, torch.float32)
    label = (moving > 0).float() + (moving > moving.max() / 2)
    return warp(moving, truth), moving, warp(label, truth, "nearest"), label, 0.7 * truth


class HalfOfTheWay(torch.nn.Module):
    """A network that knows the answer, whatever the images."""

    def __init__(self, ddf):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.5))
        self.register_buffer("ddf", ddf)

    def forward(self, _images):
        return self.scale * self.ddf


def same(out, expected, bound=1e-4):
    for name in expected:
        a, b = torch.as_tensor(out[name]).cpu().double(), torch.as_tensor(expected[name]).double()
        torch.testing.assert_close(
            a, b, rtol=bound, atol=bound, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
        )


@contextmanager
def sums_of(device):
    """On the CPU sums are as exact as the device's: a device without float64 has them in float32."""
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()) if device.type == "mps" else ():
            if name.startswith("monai_lm.") and hasattr(module, "widest_float"):
                stack.enter_context(mock.patch.object(module, "widest_float", return_value=torch.float32))
        yield


def settings_for(device):
    """With the same kernels on the CPU as on a device that has none of its own."""
    return SETTINGS | {"kernels": "auto" if device.type in ("cpu", "cuda") else "reference"}


def through_transforms(fixed, moving, ddf, points, settings):
    """Every array transform, one after another."""
    images = [MetaTensor(x[0], affine=torch.from_numpy(AFFINE)) for x in (fixed, moving)]
    refined = RefineDDF(**settings)(*images, ddf[0])
    inverse = InvertDDF()(refined)
    return {
        "refined": refined,
        "warped": WarpImage()(images[1], refined),
        "inverse": inverse,
        "jacobian": JacobianDeterminant(log=True)(refined),
        "voxels": WarpPoints()(points, refined),
        "space": WarpPoints(world=True)(points, refined),
    }


def test_transforms_stay_on_the_device(any_device, pair):
    fixed, moving, _, _, ddf = pair
    points = np.array([[3.0, 4.0, 5.0], [np.nan, 1.0, 2.0], [10.5, 9.25, 8.0]])
    settings = settings_for(any_device)
    with sums_of(any_device):
        expected = through_transforms(fixed, moving, ddf, points, settings)
    out = through_transforms(*(t.to(any_device) for t in (fixed, moving, ddf)), points, settings)
    assert {t.device for t in out.values()} == {any_device}
    same({k: v.as_tensor() if isinstance(v, MetaTensor) else v for k, v in out.items()}, expected, 1e-3)
    assert torch.equal(out["refined"].affine.cpu(), torch.from_numpy(AFFINE))


def test_a_transform_works_on_a_device_of_its_own(any_device, pair):
    fixed, moving, _, _, ddf = pair
    out = RefineDDF(device=any_device, **SETTINGS)(fixed[0], moving[0], ddf[0])
    assert out.device == any_device


@pytest.mark.parametrize("prediction", ["velocity", "displacement", "features"])
def test_the_inferer_stays_on_the_device(prediction, any_device, pair):
    fixed, moving, _, _, ddf = pair
    images = torch.cat([moving, fixed], 1)
    answer = torch.cat([moving, moving**2, fixed, fixed**2], 1)[..., ::2, ::2, ::2]
    network = HalfOfTheWay(answer if prediction == "features" else ddf)
    settings = settings_for(any_device)
    inferer = RegistrationInferer(prediction, refine=settings, match=settings if prediction == "features" else None)
    with torch.no_grad():
        with sums_of(any_device):
            expected = inferer(images, network)
        out = inferer(images.to(any_device), network.to(any_device))
    assert out.device == any_device
    assert float(expected.abs().max()) > 0.5
    same({"ddf": out}, {"ddf": expected}, 1e-3)


def test_the_module_measures_where_the_batch_is(any_device, pair):
    ddf = pair[-1]
    points = torch.tensor([[[3.0, 4.0, 5.0], [10.5, 9.25, 8.0]]])
    batch = dict(zip(("fixed", "moving", "fixed_label", "moving_label"), pair, strict=False))
    batch |= {"fixed_points": points, "moving_points": points + 1}
    module = RegistrationModule(HalfOfTheWay(ddf), prediction="displacement", labels=3, refine=SETTINGS, keypoints=1.0)
    there = {k: v.to(any_device) for k, v in batch.items()}
    expected = measure_batch(batch, ddf, surfaces=True)
    out = measure_batch(there, ddf.to(any_device), surfaces=True)
    assert {v.device for v in out.values()} == {any_device}
    assert 0 < float(expected["dice"]) < 1
    same(out, expected)
    module.to(any_device)
    module.log_dict = module.log = lambda *_, **__: None
    loss = module.training_step(there, 0)
    loss.backward()
    assert module.network.scale.grad.device == any_device
    assert module.predict_step(there, 0)["ddf"].device == any_device


def test_metrics_stay_on_the_device(any_device, pair):
    _, _, fixed_label, moving_label, ddf = pair
    here = [ddf, -ddf, fixed_label, moving_label]
    for metric, chosen in (
        (metrics.FoldCountMetric(), [0]),
        (metrics.SDLogJacobianMetric(), [0]),
        (metrics.InverseConsistencyMetric(), [0, 1]),
        (metrics.LabelDiceMetric(), [2, 3]),
    ):
        values = []
        for tensors in (here, [t.to(any_device) for t in here]):
            metric.reset()
            metric(*(tensors[i] for i in chosen))
            values.append(float(metric.aggregate()))
        assert values[1] == pytest.approx(values[0], rel=1e-4, nan_ok=False)


def saved(folder, pair):
    names = ("fixed", "moving", "fixed_label", "moving_label")
    for name, volume in zip(names, pair, strict=False):
        nib.save(nib.Nifti1Image(volume[0, 0].numpy(), AFFINE), folder / f"{name}.nii.gz")
    (folder / "points.csv").write_text("x,y,z\n-5.0,-10.0,12.0\n0.5,-8.0,9.0\n")
    turned = np.eye(4)
    turned[:3, 3] = 0.5, -0.25, 0.75
    np.savetxt(folder / "affine.txt", turned)
    return [folder / f"{name}.nii.gz" for name in names]


def test_the_command_line_s_work_stays_on_the_device(any_device, pair, tmp_path):
    """Files in, files out: measured, inverted and warped where it was refined."""
    fixed, moving, fixed_label, moving_label = saved(tmp_path, pair)
    results = {}
    for name in ("cpu", str(any_device)):
        out, points = tmp_path / name.replace(":", "-"), (tmp_path / "points.csv", tmp_path / "points.csv")
        values = pairs.refine_pair(
            fixed, moving, out, affine=tmp_path / "affine.txt", labels=(fixed_label, moving_label), points=points,
            device=name, report=False, settings=SETTINGS,
        )  # fmt: skip
        assert json.loads((out / "metrics.json").read_text())["dice_after"] == pytest.approx(values["dice_after"])
        commands.invert_field(out / "ddf.nii.gz", out / "back.nii.gz", device=name)
        commands.apply_field(out / "ddf.nii.gz", moving, out / "again.nii.gz", device=name)
        commands.apply_field(out / "ddf.nii.gz", points[0], out / "moved.csv", device=name)
        written = {n: nib.load(out / f"{n}.nii.gz").get_fdata() for n in ("ddf", "inverse", "warped", "back", "again")}
        written["moved"] = np.loadtxt(out / "moved.csv", delimiter=",", skiprows=1)
        measured = commands.evaluate_field(out / "ddf.nii.gz", fixed, moving, points=points, device=name)
        results[name] = (
            written
            | measured
            | {k: values[k] for k in ("dice_after", "hd95_mm_after", "tre_mm_after", "folds_after", "sdlogj_after")}
        )
    same(results[str(any_device)], results["cpu"], 2e-3)
    assert np.abs(results["cpu"]["ddf"]).max() > 0.5


def test_field_files_of_the_device_have_no_folds(any_device, pair):
    """And the functions that say so run there."""
    ddf = pair[-1].to(any_device)
    assert fold_count(ddf).tolist() == [0]
    assert jacobian_determinant(ddf).device == any_device


@pytest.mark.usefixtures("pretend")
def test_a_device_with_too_little_memory_ends_with_a_sentence(pair, tmp_path, monkeypatch, capsys):
    """The leanest mode does not fit either; the same for a device that is not there."""
    fixed, moving, *_ = saved(tmp_path, pair)

    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("monai_lm.solver.refinement.descend", exhausted)
    words = ["refine", "--fixed", str(fixed), "--moving", str(moving), "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["monai-lm", *words, "--device", "cuda:1", "--report", "false"])
    with pytest.raises(SystemExit) as ended, pytest.warns(UserWarning, match="trying 'half'"):
        cli.main()
    assert ended.value.code == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("monai-lm: cuda:1 has too little memory for images (1, 1, 17, 16, 14) with memory='half'")
    assert not (tmp_path / "out").exists()
