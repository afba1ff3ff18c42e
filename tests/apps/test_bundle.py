"""Two files registered with a bundle: whatever its grid, the field leads where the bundle's does."""

import json
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from monai_lm.apps import cli, pairs
from monai_lm.apps.bundle import RegistrationBundle, save_weights
from monai_lm.apps.cohort import refine_cohort
from monai_lm.fields.space import Grid
from monai_lm.inferers import RegistrationInferer
from monai_lm.io import read_ddf

SHIFT = (1.5, -1.0, 0.5)  # voxels of the bundle's grid
NETWORK = '''
import torch

class Shift(torch.nn.Module):
    """Predicts one displacement everywhere."""

    def __init__(self):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(3))

    def forward(self, images):
        return self.shift.view(1, 3, 1, 1, 1).expand(len(images), 3, *images.shape[2:])
'''
FIXED = np.array([[0, -1.5, 0, 20.0], [1.25, 0, 0, -3.0], [0, 0, 2.0, 1.0], [0, 0, 0, 1]])  # turned
MOVING = FIXED + np.array([[0, 0, 0, 4.0], [0, 0, 0, 0], [0, 0, 0, -2.0], [0, 0, 0, 0]])


KEYS = ["fixed", "moving"]
PLAIN = [
    {"_target_": "LoadImaged", "keys": KEYS},
    {"_target_": "EnsureChannelFirstd", "keys": KEYS},
    {"_target_": "ConcatItemsd", "keys": KEYS[::-1], "name": "image"},
]
CROP = {"_target_": "CenterSpatialCropd", "keys": KEYS, "roi_size": 8}


def image(path: Path, size, affine, seed):
    values = np.random.default_rng(seed).random(size, dtype=np.float32)
    nib.save(nib.Nifti1Image(values, affine), path)
    return str(path)


@pytest.fixture
def pair(tmp_path):
    return {
        "fixed": image(tmp_path / "f.nii.gz", (14, 13, 12), FIXED, 0),
        "moving": image(tmp_path / "m.nii.gz", (14, 13, 12), MOVING, 1),
    }


@pytest.fixture
def trusted(monkeypatch):
    """Predictions are used whatever they do: a constant shift between two images of noise is not one to believe."""
    monkeypatch.setattr(
        "monai_lm.solver.refinement.believed", lambda ddf, *_: (ddf, torch.ones(len(ddf), dtype=torch.bool))
    )


@pytest.fixture
def bundle(tmp_path):
    """A bundle on a grid of its own: 2 voxels more on every side."""
    folder = tmp_path / "bundle"
    config = {
        "imports": ["$from scripts.network import Shift"],
        "bundle_root": ".",
        "network_def": {"_target_": "scripts.network.Shift"},
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [*PLAIN[:2], {"_target_": "BorderPadd", "keys": KEYS, "spatial_border": 2}, PLAIN[2]],
        },
        "refine": {"iterations": 0, "scales": [1]},
        "inferer": {
            "_target_": "monai_lm.RegistrationInferer",
            "prediction": "displacement",
            "refine": "@refine",
        },
    }
    for name in ("configs", "models", "scripts"):
        (folder / name).mkdir(parents=True)
    (folder / "configs" / "inference.json").write_text(json.dumps(config))
    (folder / "scripts" / "__init__.py").touch()
    (folder / "scripts" / "network.py").write_text(NETWORK)
    torch.save({"shift": torch.tensor(SHIFT)}, folder / "models" / "model.pt")
    return folder


def change(bundle, **entries):
    path = bundle / "configs" / "inference.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.usefixtures("trusted")
def test_the_field_leads_from_point_to_point_as_the_bundles_does(bundle, pair, tmp_path):
    """On the bundle's grids voxel ``x`` goes to voxel ``x + SHIFT``: in space by the affines, padding cancels."""
    pairs.refine_pair(**pair, output_dir=tmp_path / "out", bundle=bundle, report=False)
    values, affine = read_ddf(tmp_path / "out" / "ddf.nii.gz", moving_affine=MOVING)
    np.testing.assert_allclose(affine, FIXED)
    np.testing.assert_allclose(values, np.broadcast_to(np.reshape(SHIFT, (3, 1, 1, 1)), values.shape), atol=1e-4)


@pytest.mark.usefixtures("trusted")
def test_an_affine_brings_the_moving_image_onto_the_fixed_grid_first(bundle, pair, tmp_path):
    """What the bundle sees of a fixed image that lies two voxels further on in a larger one is the fixed image."""
    values = nib.load(pair["fixed"]).get_fdata(dtype=np.float32)
    larger = np.pad(values, ((2, 1), (0, 2), (3, 0)))
    nib.save(nib.Nifti1Image(larger, MOVING), pair["moving"])
    step = np.eye(4)
    step[:3, 3] = (2, 0, 3)
    affine = MOVING @ step @ np.linalg.inv(FIXED)
    np.savetxt(tmp_path / "affine.txt", affine)
    change(bundle, refine={"similarity": "mse", "iterations": 0, "scales": [1]})
    further = {"bundle": bundle, "affine": tmp_path / "affine.txt", "report": False}
    pairs.refine_pair(**pair, **further, output_dir=tmp_path / "shifted")
    shifted, _ = read_ddf(tmp_path / "shifted" / "ddf.nii.gz", moving_affine=MOVING)
    expected = np.reshape(np.add(SHIFT, (2, 0, 3)), (3, 1, 1, 1))
    np.testing.assert_allclose(shifted, np.broadcast_to(expected, shifted.shape), atol=1e-4)
    torch.save({"shift": torch.zeros(3)}, bundle / "models" / "model.pt")
    assert pairs.refine_pair(**pair, **further, output_dir=tmp_path / "still")["loss_after"] < 1e-9


def test_what_does_not_overlap_or_is_empty_is_refused(bundle, pair, tmp_path):
    """A network invents a field for an image that holds nothing."""
    far = np.eye(4)
    far[0, 3] = 5000
    np.savetxt(tmp_path / "far.txt", far)
    options = {"bundle": bundle, "report": False, "output_dir": tmp_path / "out"}
    with pytest.raises(ValueError, match=r"must overlap, no voxel of the one lies in the other"):
        pairs.refine_pair(**pair, **options, affine=tmp_path / "far.txt")
    nib.save(nib.Nifti1Image(np.full((14, 13, 12), 3, np.float32), FIXED), pair["fixed"])
    change(bundle, preprocessing={"_target_": "Compose", "transforms": PLAIN})
    with pytest.raises(ValueError, match=r"fixed is constant where the bundle looks at it, 3 everywhere"):
        pairs.refine_pair(**pair, **options)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def marked(pair, tmp_path):
    """Images that say next to nothing, and a ball and points that lie 2.5 mm apart in space."""
    files = {}
    for role, affine, away in (("fixed", FIXED, 0.0), ("moving", MOVING, 2.5)):
        values = 1e-3 * nib.load(pair[role]).get_fdata(dtype=np.float32)
        nib.save(nib.Nifti1Image(values, affine), pair[role])
        space = np.stack(np.meshgrid(*map(np.arange, values.shape), indexing="ij"), -1) @ affine[:3, :3].T
        centre = FIXED[:3, :3] @ (7, 6, 6) + FIXED[:3, 3] + (away, 0, 0)
        ball = np.linalg.norm(space + affine[:3, 3] - centre, axis=-1) < 6
        files[f"{role}_label"], files[f"{role}_points"] = tmp_path / f"{role}_l.nii.gz", tmp_path / f"{role}.csv"
        nib.save(nib.Nifti1Image(ball.astype(np.uint8), affine), files[f"{role}_label"])
        points = centre + 3 * np.vstack([np.eye(3), -np.eye(3)])
        np.savetxt(files[f"{role}_points"], points, delimiter=",", header="x,y,z", comments="")
    return [(files[f"fixed_{kind}"], files[f"moving_{kind}"]) for kind in ("label", "points")]


@pytest.mark.parametrize("affine", [False, True])
def test_labels_and_points_guide_a_bundle_on_its_grid(bundle, pair, marked, tmp_path, affine):
    torch.save({"shift": torch.zeros(3)}, bundle / "models" / "model.pt")
    change(bundle, refine={"similarity": "mse", "iterations": 15, "scales": [1], "spacing": [1.25, 1.5, 2.0]})
    how = {"bundle": bundle, "report": False, "labels": marked[0], "points": marked[1]}
    if affine:
        np.savetxt(tmp_path / "affine.txt", np.eye(4) + 0.5 * np.eye(4, k=3))  # half a millimetre along x
        how["affine"] = tmp_path / "affine.txt"
    for guide, name, factor in (({"labels": "all"}, "dice", 1.05), ({"points": True}, "tre_mm", 0.6)):
        guide |= {"weight": 50}
        metrics = pairs.refine_pair(**pair, **how, guide=guide, output_dir=tmp_path / name)
        before, after = metrics[f"{name}_before"], metrics[f"{name}_after"]
        assert after > factor * before if factor > 1 else after < factor * before
        assert metrics["folds_after"] == 0
        assert metrics["provenance"]["refine"]["guidance"] == metrics["provenance"]["settings"]["guidance"] == guide


@pytest.mark.parametrize("names", [("lesion", "moving_lesion"), ("mask", "moving_mask")])
def test_lesions_and_masks_reach_a_bundle_on_the_grids_it_compares(bundle, pair, marked, tmp_path, monkeypatch, names):
    given, refined = {}, RegistrationInferer.refined
    monkeypatch.setattr(
        RegistrationInferer, "refined", lambda *args, **kwargs: given.update(kwargs) or refined(*args, **kwargs)
    )
    how = {"bundle": bundle, "report": False, "output_dir": tmp_path / "out"}
    pairs.refine_pair(**pair, **how, **dict(zip(names, marked[0], strict=True)))
    for name, path in zip(names, marked[0], strict=True):
        expected = np.pad(nib.load(path).get_fdata(), 2)
        np.testing.assert_array_equal(given[name][0, 0].numpy(), expected)
    assert given["guidance"] is None


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("names", [("mask", "moving_mask"), ("lesion", "moving_lesion")])
def test_what_lies_in_holes_of_masks_and_in_lesions_does_not_reach_a_bundle(
    bundle, pair, marked, tmp_path, affine, names
):
    """Not the network, nor what resamples before it, nor the refinement; what is around does."""
    spacing = {"_target_": "Spacingd", "keys": KEYS, "pixdim": 1.1}
    change(bundle, preprocessing={"_target_": "Compose", "transforms": [*PLAIN[:2], spacing, CROP, PLAIN[2]]})
    script = bundle / "scripts" / "network.py"
    script.write_text(NETWORK.replace("self.shift.view", "(images.mean() * self.shift).view"))
    change(bundle, refine={"iterations": 3, "scales": [1]})
    files = tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"
    how = {"bundle": bundle, "report": False, **dict(zip(names, files, strict=True))}
    if affine:
        np.savetxt(tmp_path / "affine.txt", np.eye(4) + 0.5 * np.eye(4, k=3))
        how["affine"] = tmp_path / "affine.txt"
    holes = [nib.load(path).get_fdata() > 0 for path in marked[0]]
    for hole, file, space in zip(holes, files, (FIXED, MOVING), strict=True):
        counts = np.where(hole, 0.0, 1.0) if "mask" in names else np.where(hole, 2.0, 0.0)
        counts[:2] = 0
        nib.save(nib.Nifti1Image(counts.astype(np.float32), space), file)
    fields = []
    for k, (inside, around) in enumerate(((0.0, 0.0), (np.nan if "mask" in names else 50.0, 0.0), (0.0, 9.0))):
        for role, hole, space in zip(KEYS, holes, (FIXED, MOVING), strict=True):
            values = np.where(hole, inside, nib.load(pair[role]).get_fdata(dtype=np.float32))
            values[:2] = around
            nib.save(nib.Nifti1Image(values.astype(np.float32), space), pair[role])
        pairs.refine_pair(**pair, **how, output_dir=tmp_path / str(k))
        fields.append(nib.load(tmp_path / str(k) / "ddf.nii.gz").get_fdata())
    np.testing.assert_array_equal(fields[1], fields[0])
    assert np.abs(fields[2] - fields[0]).max() > 0.1


def test_the_soft_labels_that_guide_a_bundle_are_in_its_record(bundle, pair, marked, tmp_path):
    how = {"bundle": bundle, "report": False, "soft_labels": marked[0]}
    for k, guide in enumerate((None, {"weight": 2.0})):
        metrics = pairs.refine_pair(**pair, **how, guide=guide, output_dir=tmp_path / str(k))
        assert metrics["provenance"]["refine"]["guidance"] == {"soft_labels": 1} | (guide or {})


def test_a_mask_of_what_a_bundle_does_not_look_at_is_refused(bundle, pair, tmp_path):
    counts = np.zeros((14, 13, 12), np.uint8)
    counts[:2] = 1
    nib.save(nib.Nifti1Image(counts, FIXED), tmp_path / "mask.nii.gz")
    change(bundle, preprocessing={"_target_": "Compose", "transforms": [*PLAIN[:2], CROP, PLAIN[2]]})
    with pytest.raises(ValueError, match=r"mask.nii.gz must show something of what the bundle looks at, it is zero"):
        pairs.refine_pair(**pair, bundle=bundle, mask=tmp_path / "mask.nii.gz", output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("trusted")
def test_the_field_is_brought_to_any_grid(bundle, pair):
    registration = RegistrationBundle(bundle)
    affine = np.diag([2.0, 1.0, 1.0, 1.0])
    affine[:3, 3] = (5.0, 0.0, 3.0)
    _, result = registration.register(pair["fixed"], pair["moving"], Grid((6, 8, 9), affine))
    world = MOVING[:3, :3] @ SHIFT + (MOVING - FIXED)[:3, 3]
    expected = torch.from_numpy(world / (2, 1, 1)).view(1, 3, 1, 1, 1).expand(1, 3, 6, 8, 9)
    torch.testing.assert_close(result.ddf, expected.float(), rtol=0, atol=1e-4)


def test_settings_replace_those_of_the_bundle(bundle, pair):
    result = RegistrationBundle(bundle, settings={"iterations": 3}).register(**pair, grid=Grid((14, 13, 12), FIXED))[1]
    assert len(result.history[0]) == 4
    with pytest.raises(ValueError, match=r"(?s)bundle .* cannot make its inferer: .*got \['steps'\]"):
        RegistrationBundle(bundle, settings={"steps": 3})


def test_a_bundles_values_per_level_fit_fewer_levels_that_are_asked_for(bundle):
    """Those of the finest levels stay; values that were asked for, too, have to fit by themselves."""
    change(bundle, refine={"iterations": 0, "damping": [9.0, 0.2, 0.7], "similarity": ["mi", "mse", "ncc"]})
    registration = RegistrationBundle(bundle, settings={"scales": (2, 1)})
    assert registration.inferer.refine | {"scales": 0} == {
        "iterations": 0, "scales": 0, "damping": [0.2, 0.7], "similarity": ["mse", "ncc"]
    }  # fmt: skip
    whole = RegistrationBundle(bundle, settings={"scales": "auto"}).inferer.refine["damping"]
    assert whole == [9.0, 0.2, 0.7]
    with pytest.raises(ValueError, match=r"damping must be one number or one per level, 1 for scales \[1\], got 2"):
        RegistrationBundle(bundle, settings={"scales": [1], "damping": [0.1, 0.2]})


def test_the_log_has_the_iterations_of_the_bundles_refinement(bundle, pair, tmp_path):
    change(bundle, refine={"iterations": 3, "scales": [1]})
    log = tmp_path / "log.jsonl"
    metrics = pairs.refine_pair(**pair, output_dir=tmp_path / "out", bundle=bundle, report=False, log_json=log)
    assert [json.loads(line)["iteration"] for line in log.read_text().splitlines()] == [0, 1, 2, 3]
    assert metrics["provenance"]["refine"] == {"bundle": str(bundle), "iterations": 3, "scales": [1]}


def test_the_seconds_are_those_of_network_and_refinement(bundle, pair):
    registration = RegistrationBundle(bundle)
    registration.network.register_forward_hook(lambda *_: time.sleep(0.3))
    result = registration.register(**pair, grid=Grid((14, 13, 12), FIXED))[1]
    assert result.seconds >= 0.3


def test_a_bundle_that_does_not_refine_gives_its_own_field(bundle, pair):
    change(bundle, refine=None)
    predicted, result = RegistrationBundle(bundle).register(**pair, grid=Grid((14, 13, 12), FIXED))
    assert result is None
    assert predicted.shape == (1, 3, 14, 13, 12)


def test_the_command_registers_and_measures(bundle, pair, tmp_path, monkeypatch, capsys):
    options = [f"--{name}={value}" for name, value in pair.items()]
    arguments = ["refine", *options, f"--bundle={bundle}", f"--output_dir={tmp_path / 'out'}", "--report=false"]
    monkeypatch.setattr("sys.argv", ["monai-lm", *arguments, "--json=true"])
    cli.main()
    assert json.loads(capsys.readouterr().out)["folds_after"] == 0


def test_images_that_a_bundle_cannot_take_are_refused_and_stop_no_cohort(bundle, pair, tmp_path):
    flat = {name: image(tmp_path / f"flat_{name}.nii.gz", (14, 13), np.eye(4), 2) for name in pair}
    turned = nib.load(pair["moving"]).slicer[::-1]
    nib.save(turned, tmp_path / "turned.nii.gz")
    registration = RegistrationBundle(bundle)
    with pytest.raises(ValueError, match=r"(?s)must bring fixed and moving into one orientation, .*got the affines"):
        registration.register(pair["fixed"], tmp_path / "turned.nii.gz", Grid((14, 13, 12), FIXED))
    with pytest.raises(ValueError, match=r"(?s)bundle .* cannot (prepare|register) .*flat_fixed"):
        registration.register(**flat, grid=Grid((14, 13), np.eye(4)))
    rows, failed = refine_cohort(
        [flat | {"name": "a"}, pair | {"name": "b"}], tmp_path / "out", report=False, bundle=bundle
    )
    assert [row["name"] for row in rows] == ["b"]
    assert list(failed) == ["a"]


def test_two_bundles_do_not_take_each_others_modules(bundle, pair, tmp_path):
    other = tmp_path / "other"
    bundle.rename(other)
    script = other / "scripts" / "network.py"
    script.write_text(NETWORK.replace("Shift(", "Move("))
    change(other, imports=["$from scripts.network import Move"], network_def={"_target_": "scripts.network.Move"})
    assert type(RegistrationBundle(other).network).__name__ == "Move"
    script.write_text(NETWORK)
    change(other, imports=["$from scripts.network import Shift"], network_def={"_target_": "scripts.network.Shift"})
    other.rename(bundle)
    assert type(RegistrationBundle(bundle).network).__name__ == "Shift"
    assert pair


def test_what_is_missing_or_wrong_is_named(bundle, pair, tmp_path):
    def refused(error, message):
        with pytest.raises(error, match=message):
            pairs.refine_pair(**pair, output_dir=tmp_path / "out", bundle=bundle, report=False)
        assert not (tmp_path / "out").exists()

    with pytest.raises(ValueError, match="ddf cannot be used together with bundle"):
        pairs.refine_pair(**pair, output_dir=tmp_path / "out", ddf=pair["fixed"], bundle=bundle)
    weights = bundle / "models" / "model.pt"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:100])
    refused(ValueError, r"model.pt cannot be loaded into the network of bundle")
    torch.save({"other": torch.zeros(3)}, weights)
    refused(ValueError, r"(?s)model.pt cannot be loaded .*Missing key")
    weights.unlink()
    refused(FileNotFoundError, r"must have models/model.pt, it is missing")
    weights.write_bytes(kept)
    change(bundle, inferer={"_target_": "SimpleInferer"})
    refused(ValueError, "must be a RegistrationInferer, got SimpleInferer")
    change(bundle, preprocessing={"_target_": "Compose", "transforms": []})
    change(bundle, inferer={"_target_": "monai_lm.RegistrationInferer", "prediction": "displacement", "refine": {}})
    refused(ValueError, r"must make image, fixed and moving, got \['fixed', 'moving'\]")
    change(bundle, inferer=None)
    refused(ValueError, "must define inferer in its inference configuration")
    (bundle / "configs" / "inference.json").write_text('{"a":')
    refused(ValueError, r"inference.json cannot be read: ")
    (bundle / "configs" / "inference.json").unlink()
    refused(FileNotFoundError, "must have configs/inference.json, it is missing")


def test_saved_weights_are_halved_and_shared_tensors_are_written_once(tmp_path):
    first = torch.nn.Linear(100, 100)
    network = torch.nn.ModuleDict({"a": first, "b": torch.nn.Sequential(first), "c": torch.nn.BatchNorm1d(3)})
    save_weights(network, tmp_path / "new" / "model.pt")
    weights = torch.load(tmp_path / "new" / "model.pt", weights_only=True)
    assert weights.keys() == network.state_dict().keys()
    for name, value in network.state_dict().items():
        assert torch.equal(weights[name], value.half() if value.is_floating_point() else value)
    assert (tmp_path / "new" / "model.pt").stat().st_size < 2 * 100 * 101 + 5000
    network.load_state_dict(weights)
