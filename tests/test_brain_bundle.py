"""The brain bundle: tables of labels, views to train on, configurations, model, and registrations of small brains."""

from __future__ import annotations

import csv
import importlib
import inspect
import json
import os
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai import bundle as monai_bundle
from monai.bundle import ConfigParser, ConfigWorkflow, verify_metadata, verify_net_in_out
from torch.nn import functional as F

from monai_lm import refine
from monai_lm.apps.bundle import RegistrationBundle
from monai_lm.fields import fold_count, warp
from monai_lm.fields.metrics import compare_labels
from monai_lm.fields.space import Grid
from monai_lm.solver.smoothing import Elastic
from tests.bundles import run_bundle

jsonschema = pytest.importorskip("jsonschema", reason="the bundle extra is not installed")
pytest.importorskip("ignite", reason="the bundle extra is not installed")

ROOT = Path(__file__).parent.parent
BUNDLE = ROOT / "bundles" / "brain_mri_registration"
INFERENCE = BUNDLE / "configs" / "inference.json"
METADATA = BUNDLE / "configs" / "metadata.json"
MODEL = BUNDLE / "models" / "model.pt"
DATA = Path(os.environ.get("MONAI_LM_DATA", ROOT.parent / "shared" / "data")).resolve() / "brain"
SCHEMA = ROOT.parent / "shared" / "monai" / "meta_schema_20240725.json"

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no brains in {DATA} (set MONAI_LM_DATA)")
needs_schema = pytest.mark.skipif(not SCHEMA.is_file(), reason=f"no metadata schema at {SCHEMA}")


def config(name: str) -> dict:
    return json.loads((BUNDLE / "configs" / f"{name}.json").read_text())


@pytest.fixture
def scripts(monkeypatch):
    """The bundle's ``scripts`` on the path as MONAI puts it there, and gone again afterwards."""
    monkeypatch.syspath_prepend(BUNDLE)
    yield lambda name: importlib.import_module(f"scripts.{name}")
    for name in [name for name in sys.modules if name.split(".")[0] == "scripts"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def small_brains(tmp_path_factory) -> Path:
    """Every subject of the split at 4 mm, called 1 mm, so that the configurations run in seconds."""
    if not DATA.is_dir():
        pytest.skip(f"no brains in {DATA} (set MONAI_LM_DATA)")
    folder = tmp_path_factory.mktemp("brains")
    for name in sorted({name for part in config("split").values() for name in part}):
        for kind in ("t1", "seg"):
            image = nib.load(DATA / f"{name}_{kind}.nii.gz")
            values = np.pad(np.asarray(image.dataobj)[1::4, 1::4, 1::4], ((2, 2), (4, 4), (2, 2)))
            nib.save(nib.Nifti1Image(values, np.diag([-1.0, 1, 1, 1])), folder / f"{name}_{kind}.nii.gz")
    return folder


def run(names: list[str], data: Path, output: Path, processes: int = 1, **settings) -> None:
    run_bundle(BUNDLE, names, processes, dataset_dir=data, output_dir=output, **settings)


SMALL = {
    "preprocessing#transforms#7#spatial_size": "[48,64,48]", "match#iterations": "10",
    "refine#iterations": "5",
}  # fmt: skip


# --- labels and views ---


def test_classes_sides_and_tissues_belong_together(scripts):
    labels = scripts("labels")
    assert len(labels.STRUCTURES) == len(labels.MIRRORED) == len(labels.TISSUES) == 140
    assert labels.STRUCTURES[0] == labels.MIRRORED[0] == labels.TISSUES[0] == 0
    other = np.array(labels.MIRRORED)
    assert np.array_equal(other[other], np.arange(140))
    assert (other != np.arange(140)).sum() == 140 - 10  # background and nine structures in the middle
    tissues = np.array(labels.TISSUES)
    assert np.array_equal(tissues[other], tissues)
    value = {v: k for k, v in enumerate(labels.STRUCTURES)}
    assert labels.STRUCTURES[other[value[47]]] == 48  # right and left hippocampus
    assert tissues[value[100]] == tissues[value[207]] != tissues[value[44]]  # cortex, white matter


def test_values_out_of_the_protocol_are_background(scripts):
    data, labels = scripts("data"), scripts("labels")
    values = torch.tensor([0, 4, 74, 65, 207, 208, 47])
    places = [labels.STRUCTURES.index(v) if v in labels.STRUCTURES else 0 for v in values.tolist()]
    assert data.to_classes(values).tolist() == places == [0, 1, 0, 0, 139, 0, places[-1]]


@needs_data
def test_the_table_has_the_labels_and_the_sides_of_a_real_brain(scripts):
    labels = scripts("labels")
    segmentation = np.asarray(nib.load(DATA / "1000_seg.nii.gz").dataobj)
    assert set(np.unique(segmentation)) <= set(labels.STRUCTURES)
    at = {v: np.argwhere(segmentation == v)[:, 0].mean() for v in labels.STRUCTURES[1:] if (segmentation == v).any()}
    middle = segmentation.shape[0] / 2
    for value, other in zip(labels.STRUCTURES, labels.MIRRORED, strict=True):
        partner = labels.STRUCTURES[other]
        if value < partner and value in at and partner in at:
            assert (at[value] - middle) * (at[partner] - middle) < 0, (value, partner)


@pytest.fixture
def toy_brain() -> dict[str, torch.Tensor]:
    """A ball far from the grid's centre, one side of it a structure of the right hemisphere, the other of the left."""
    axes = torch.meshgrid(*[torch.arange(s, dtype=torch.float32) for s in (96, 96, 96)], indexing="ij")
    distance = sum((a - c) ** 2 for a, c in zip(axes, (36, 54, 44), strict=True)).sqrt()
    label = torch.where(axes[0] < 36, 4, 5).byte() * (distance < 14)  # classes of values 23 and 30
    return {"image": (label > 0).float()[None] * 0.5, "label": label[None]}


def test_views_follow_from_their_number(scripts, toy_brain):
    views, again, other = (scripts("data").RandomViews([toy_brain], 4, (64, 64, 64), seed=s) for s in (0, 0, 1))
    for number in (3, 0, 1):
        first, second = views[number], again[number]
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert first["image"].shape == first["label"].shape == (1, 64, 64, 64)
        assert (first["image"].min(), first["image"].max()) == (0, 1)
        assert set(first["label"].unique().tolist()) <= {0, 4, 5}
    assert len(list(views)) == len(views) == 4
    assert not torch.equal(views[0]["image"], views[1]["image"])
    assert not torch.equal(other[0]["image"], views[0]["image"])


@pytest.mark.parametrize("size", [(32, 48, 48), (48, 56, 48), (64, 64)])
def test_views_that_end_on_two_voxels_are_refused(scripts, size):
    with pytest.raises(ValueError, match="size must be three multiples of 16 from 48, got"):
        scripts("data").RandomViews([], 1, size)


def test_a_view_says_where_it_lies_mirrored_or_not(scripts, toy_brain, monkeypatch):
    data = scripts("data")
    monkeypatch.setattr(data._Draw, "normal", lambda _, *shape: torch.zeros(shape))  # neither deformed nor noisy
    monkeypatch.setattr(data, "integrate", lambda velocity, _: torch.zeros_like(velocity))
    views = data.RandomViews([toy_brain], 12, (64, 64, 64), synthetic=0.0)
    mirrored = []
    for number in range(12):
        view = views[number]
        label = view["label"][0]
        content = (label > 0).nonzero().float()
        middle = (content.amin(0) + content.amax(0)) / 2
        torch.testing.assert_close(31.5 - middle, view["centre"], atol=1.01, rtol=0)
        right, left = ((label == k).nonzero()[:, 0].float().mean() for k in (4, 5))
        assert right < left  # a mirrored brain has its right side where the right side is
        mirrored.append(bool(view["centre"][0] < 0))
    assert set(mirrored) == {True, False}  # boxes lie on one side of this brain's centre
    assert len({tuple(views[k]["centre"].tolist()) for k in range(12)}) > 6


def test_the_loss_is_small_where_the_logits_are_right(scripts):
    module_type = scripts("segmentation").SegmentationModule
    label = torch.randint(5, (1, 1, 8, 8, 8), generator=torch.Generator().manual_seed(0))
    label = F.interpolate(label.float(), scale_factor=2, mode="nearest").long()

    class Known(torch.nn.Module):
        def logits(self, *_):
            return self.sign * 20 * F.one_hot(label[:, 0, ::2, ::2, ::2], 5).movedim(-1, 1).float()

    network = Known()
    module = module_type(network, 5, 1e-3, drawn=200)
    module.log = lambda name, value, **_: logged.update({name: float(value)})
    logged: dict[str, float] = {}
    batch = {"image": torch.zeros(1, 1, 16, 16, 16), "label": label, "centre": torch.zeros(1, 3)}
    losses = []
    for network.sign in (1, -1):
        losses.append(float(module.training_step(batch, 0)))
    assert losses[0] < 0.5 < 5 < losses[1]
    network.sign = 1
    module.validation_step(batch, 0)
    assert logged["val_dice"] == 1


# --- configurations and model ---


@needs_schema
def test_metadata_follows_the_schema(tmp_path):
    jsonschema.validate(json.loads(METADATA.read_text()), json.loads(SCHEMA.read_text()))
    verify_metadata(meta_file=str(METADATA), filepath=str(shutil.copy(SCHEMA, tmp_path)))
    assert config("metadata")["version"] in config("metadata")["changelog"]


def test_the_bundle_has_the_files_of_the_model_zoo_none_too_large_and_no_path_of_a_machine():
    names = {str(path.relative_to(BUNDLE)) for path in BUNDLE.rglob("*") if path.is_file()}
    listed = ("metadata", "inference", "evaluate", "train", "multi_gpu_train", "multi_gpu_evaluate", "split")
    models = {"models/model.pt", "models/model.ts"}
    assert names >= {f"configs/{name}.json" for name in listed} | models | {
        "configs/logging.conf",
        "LICENSE",
        "docs/README.md",
        "docs/data_license.txt",
    }
    assert max(path.stat().st_size for path in BUNDLE.rglob("*")) < 25e6
    for path in (*BUNDLE.glob("configs/*"), *BUNDLE.glob("docs/*")):
        assert not [folder for folder in ("/home/", "/root/", "/work/", "/Users/") if folder in path.read_text()], path


def test_subjects_are_in_one_part_and_configurations_agree():
    split = config("split")
    assert {part: len(names) for part, names in split.items()} == {"train": 10, "validation": 2, "test": 3}
    assert len(set().union(*split.values())) == 15
    train, inference = config("train"), config("inference")
    for key in ("network_def", "similarity", "match", "refine"):
        assert train[key] == inference[key]
    assert train["train"]["inferer"] == inference["inferer"]


def test_refine_entries_are_the_defaults_of_refine_but_the_schedule():
    defaults = {name: p.default for name, p in inspect.signature(refine).parameters.items()}
    entries = {k: tuple(v) if isinstance(v, list) else v for k, v in config("inference")["refine"].items()}
    del entries["scales"], entries["iterations"]
    assert entries.pop("similarity") == "@similarity"  # of the images and the codes
    assert entries.pop("smooth_residual") == Elastic().sigma  # its figures were measured with that
    assert entries == {name: defaults[name] for name in entries}


def network() -> torch.nn.Module:
    parser = ConfigParser()
    parser.read_config(INFERENCE)
    return parser.get_parsed_content("network_def").eval()


def test_network_has_the_shapes_of_the_metadata_and_the_exported_model_is_the_same():
    verify_net_in_out("network_def", meta_file=str(METADATA), config_file=str(INFERENCE), device="cpu")
    net = network()
    net.load_state_dict(torch.load(MODEL, weights_only=True))
    images = torch.rand(1, 2, 32, 48, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        codes = net(images)
        torch.testing.assert_close(torch.jit.load(MODEL.with_suffix(".ts")).eval()(images), codes, rtol=1e-4, atol=1e-5)
    assert codes.shape == (1, 18, 16, 24, 16)
    assert 0.1 < codes[:, 1:9].norm(dim=1).max() <= 1.0


@pytest.mark.usefixtures("scripts")
def test_monai_loads_the_network_with_its_weights():
    loaded = monai_bundle.load(BUNDLE.name, bundle_dir=str(BUNDLE.parent), workflow_type="inference").state_dict()
    weights = torch.load(MODEL, weights_only=True)
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name].to(loaded[name].dtype)) for name in weights)


@pytest.mark.usefixtures("scripts")
@pytest.mark.parametrize("kind", ["inference", "train"])
def test_workflows_have_the_properties_of_a_bundle(kind, small_brains, tmp_path):
    workflow = ConfigWorkflow(
        str(BUNDLE / "configs" / f"{kind}.json"), workflow_type=kind, logging_file=False, bundle_root=str(BUNDLE),
        meta_file=str(METADATA), dataset_dir=str(small_brains), output_dir=str(tmp_path), device="$torch.device('cpu')",
    )  # fmt: skip
    workflow.initialize()
    assert not workflow.check_properties()


def test_images_of_other_voxels_are_brought_to_1_mm_and_labels_stay_labels(small_brains, tmp_path):
    files = {"fixed": "1008_t1", "moving": "1009_t1", "fixed_label": "1008_seg", "moving_label": "1009_seg"}
    for name in files.values():
        image = nib.load(small_brains / f"{name}.nii.gz")
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), np.diag([-1.2, 0.9, 1, 1])), tmp_path / f"{name}.nii.gz")
    parser = ConfigParser()
    parser.read_config(INFERENCE)
    out = parser.get_parsed_content("preprocessing")({k: str(tmp_path / f"{v}.nii.gz") for k, v in files.items()})
    assert out["image"].shape == (2, 176, 224, 176)
    for role in files:
        np.testing.assert_allclose(out[role].affine[:3, :3], np.eye(3), atol=1e-9)
    label = np.asarray(nib.load(small_brains / "1008_seg.nii.gz").dataobj)
    assert set(out["fixed_label"].unique().tolist()) <= set(np.unique(label).tolist())
    assert float((out["fixed_label"] > 0).sum()) == pytest.approx(1.2 * 0.9 * (label > 0).sum(), rel=0.05)


# --- runs ---


def test_two_processes_evaluate_what_one_does(small_brains, tmp_path):
    names = ["inference", "evaluate"]
    settings = SMALL | {"datalist#count": 2, "device": "$torch.device('cpu')"}
    run(names, small_brains, tmp_path / "one", **settings)
    run([*names, "multi_gpu_evaluate"], small_brains, tmp_path / "two", processes=2, **settings)
    metrics = [
        dict(line.split(",") for line in (tmp_path / f / "metrics.csv").read_text().split()) for f in ("one", "two")
    ]
    one, two = ({k: float(v) for k, v in m.items()} for m in metrics)
    assert two == pytest.approx(one, abs=1e-4)
    assert one["mean_dice"] > one["mean_dice_before"] + 0.02
    written = sorted(path.name for path in (tmp_path / "one").glob("*_ddf.nii.gz"))
    assert written == sorted(path.name for path in (tmp_path / "two").glob("*_ddf.nii.gz"))
    assert len(written) == 2


def test_a_few_steps_train_the_segmenter(small_brains, tmp_path):
    settings = {"views": 4, "view_size": "[48,64,48]", "num_workers": 0, "validate_every": 4}
    run(["train"], small_brains, tmp_path, device="$torch.device('cpu')", **settings)
    weights, start = torch.load(tmp_path / "model.pt", weights_only=True), torch.load(MODEL, weights_only=True)
    assert weights.keys() == start.keys()
    assert {t.dtype for t in weights.values() if t.is_floating_point()} == {torch.float16}
    rows = list(csv.DictReader(next(tmp_path.rglob("metrics.csv")).open()))
    assert 0 <= float(next(row["val_dice"] for row in rows if row["val_dice"])) < 0.5
    assert torch.equal(weights["codes"].float(), network().codes.half().float())
    scales = [v for k, v in weights.items() if ".norm" in k and k.endswith(".weight")]  # 1 until they are trained
    assert len(scales) > 10
    assert all((v != 1).any() for v in scales)
    assert {int(v) for k, v in weights.items() if k.endswith("num_batches_tracked")} == {4}
    assert all(torch.isfinite(v).all() for v in weights.values() if v.is_floating_point())


def test_training_starts_from_given_weights(small_brains, tmp_path):
    settings = {"views": 2, "view_size": "[48,64,48]", "num_workers": 0, "validate_every": 2, "start": MODEL}
    run(["train"], small_brains, tmp_path, device="$torch.device('cpu')", **settings)
    weights, start = (torch.load(file, weights_only=True) for file in (tmp_path / "model.pt", MODEL))
    trained = [k for k in start if k.endswith("conv.weight")]
    assert len(trained) > 10
    for key in trained:  # AdamW moves a weight by the learning rate, at most 2e-3 a step
        change = (weights[key].float() - start[key].float()).abs().max()
        assert 0 < change < 5e-3 < start[key].float().std(), key


def test_a_bundles_field_has_no_folds_and_fits_the_fixed_files_grid(small_brains):
    grid = nib.load(small_brains / "1008_t1.nii.gz")
    bundle = RegistrationBundle(BUNDLE, settings={"scales": [2, 1], "iterations": 20})
    bundle.inferer.match |= {"similarity": "mse", "scales": (1,), "iterations": (2,)}  # structures are too small here
    bundle.preprocessing.transforms[7].padder.padder.spatial_size = [48, 64, 48]
    files = {role: small_brains / f"{name}_t1.nii.gz" for role, name in (("fixed", "1008"), ("moving", "1009"))}
    predicted, result = bundle.register(**files, grid=Grid(grid.shape, grid.affine))
    assert predicted.shape == result.ddf.shape == (1, 3, *grid.shape)
    assert int(fold_count(result.ddf)) == 0
    fixed, moving = (
        torch.from_numpy(np.asarray(nib.load(small_brains / f"{s}_seg.nii.gz").dataobj)).float()[None, None]
        for s in ("1008", "1009")
    )  # as the files have them: LAS, the bundle works in RAS
    before = float(compare_labels(moving, fixed)["dice"])
    after = float(compare_labels(warp(moving, result.ddf, mode="nearest"), fixed)["dice"])
    assert after > before + 0.02
