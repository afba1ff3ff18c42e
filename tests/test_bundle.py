"""The hippocampus bundle: its metadata, its split, and registrations of real pairs through MONAI's bundle API."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai import bundle as monai_bundle
from monai.bundle import ConfigParser, ConfigWorkflow, ckpt_export, verify_metadata, verify_net_in_out
from monai.networks.nets import DynUNet, VoxelMorphUNet

from monai_lm import refine
from monai_lm.apps.bundle import RegistrationBundle
from monai_lm.fields import fold_count, warp
from monai_lm.fields.space import Grid
from monai_lm.io.datalist import named
from monai_lm.solver.smoothing import Elastic

jsonschema = pytest.importorskip("jsonschema", reason="the bundle extra is not installed")
pytest.importorskip("ignite", reason="the bundle extra is not installed")

ROOT = Path(__file__).parent.parent
BUNDLE = ROOT / "bundles" / "hippocampus_mr_registration"
INFERENCE = BUNDLE / "configs" / "inference.json"
METADATA = BUNDLE / "configs" / "metadata.json"
MODEL = BUNDLE / "models" / "model.pt"
DATA = Path(os.environ.get("MONAI_LM_DATA", ROOT.parent / "shared" / "data")).resolve() / "hippocampus"
SCHEMA = ROOT.parent / "shared" / "monai" / "meta_schema_20240725.json"

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no hippocampus images in {DATA} (set MONAI_LM_DATA)")
needs_schema = pytest.mark.skipif(not SCHEMA.is_file(), reason=f"no metadata schema at {SCHEMA}")
needs_model = pytest.mark.skipif(not MODEL.is_file(), reason=f"no trained weights at {MODEL}")


def parser() -> ConfigParser:
    config = ConfigParser()
    config.read_config(INFERENCE)
    return config


def pair_of(fixed: str, moving: str) -> dict[str, str]:
    """Entry of ``datalist`` for two subjects."""
    subjects = {"fixed": f"{fixed}.nii.gz", "moving": f"{moving}.nii.gz"}
    images = {key: str(DATA / "images" / file) for key, file in subjects.items()}
    return images | {f"{key}_label": str(DATA / "labels" / file) for key, file in subjects.items()}


@pytest.fixture
def scripts(monkeypatch):
    """The bundle's ``scripts`` on the path as MONAI puts it there, and gone again afterwards."""
    monkeypatch.syspath_prepend(BUNDLE)
    spec = importlib.util.find_spec("scripts.pairs")
    assert Path(spec.origin).parent == BUNDLE / "scripts"
    yield importlib.import_module("scripts.pairs")
    for name in [name for name in sys.modules if name.split(".")[0] == "scripts"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Weights of a network that predicts almost no motion."""
    torch.manual_seed(0)
    network = parser().get_parsed_content("network_def")
    *_, last = (module for module in network.modules() if isinstance(module, torch.nn.Conv3d))
    torch.nn.init.normal_(last.weight, std=1e-4)
    torch.nn.init.zeros_(last.bias)
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save(network.state_dict(), path)
    return path


def run(output_dir: Path, weights: Path, **overrides) -> None:
    """Run the inference configuration in this process."""
    workflow = ConfigWorkflow(
        str(INFERENCE),
        workflow_type="infer",
        logging_file=False,
        bundle_root=str(BUNDLE),
        output_dir=str(output_dir),
        device="cpu",
        **{"handlers#0#load_path": str(weights), **overrides},
    )
    workflow.initialize()
    workflow.run()


@pytest.fixture(scope="module")
def registered(tmp_path_factory) -> Path:
    """Output of the documented command on two test pairs, run from the bundle's folder."""
    if not DATA.is_dir():
        pytest.skip(f"no hippocampus images in {DATA} (set MONAI_LM_DATA)")
    output = tmp_path_factory.mktemp("registered")
    settings = {
        "dataset_dir": DATA,
        "output_dir": output,
        "device": "cpu",
        "datalist#count": 2,
        "refine#iterations": "[3, 3]",
    }
    options = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/inference.json", *options]
    done = subprocess.run(command, cwd=BUNDLE, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return output


def padded_affine(name: str) -> np.ndarray:
    """Affine of a subject's image, padded about its centre to 64 voxels."""
    image = nib.load(DATA / "images" / f"{name}.nii.gz")
    affine = image.affine.copy()
    affine[:, 3] = image.affine @ [*(-((64 - size) // 2) for size in image.shape), 1]
    return affine


def voxel_field(path: Path) -> torch.Tensor:
    """Field file in LPS millimetres, between two places in space, as ``(1, 3, *S)`` in voxels."""
    image = nib.load(path)
    fixed, moving = (padded_affine(name) for name in path.name.removesuffix("_ddf.nii.gz").split("__"))
    ras = np.asarray(image.dataobj, dtype=np.float64)[:, :, :, 0] * [-1, -1, 1] - (moving - fixed)[:3, 3]
    return torch.from_numpy(np.einsum("ij,xyzj->ixyz", np.linalg.inv(image.affine[:3, :3]), ras))[None].float()


def names(folder: Path) -> list[str]:
    return sorted(path.name.removesuffix("_ddf.nii.gz") for path in folder.glob("*_ddf.nii.gz"))


# --- what lies in the configurations ---


@needs_schema
def test_metadata_follows_the_schema(tmp_path):
    jsonschema.validate(json.loads(METADATA.read_text()), json.loads(SCHEMA.read_text()))
    schema = shutil.copy(SCHEMA, tmp_path)
    verify_metadata(meta_file=str(METADATA), filepath=str(schema))


def test_metadata_names_the_schema_its_version_and_its_packages():
    metadata = json.loads(METADATA.read_text())
    assert metadata["schema"].endswith(SCHEMA.name)
    assert metadata["version"] in metadata["changelog"]
    assert set(metadata["required_packages_version"]) == {"monai_lm", "nibabel", "pytorch-ignite"}


def test_split_is_disjoint_and_sorted():
    split = json.loads((BUNDLE / "configs" / "split.json").read_text())
    assert {part: len(subjects) for part, subjects in split.items()} == {"train": 180, "validation": 20, "test": 20}
    assert len(set().union(*split.values())) == 220
    assert all(subjects == sorted(subjects) for subjects in split.values())


def test_network_has_the_shapes_of_the_metadata():
    formats = json.loads(METADATA.read_text())["network_data_format"]
    image, pred = formats["inputs"]["image"], formats["outputs"]["pred"]
    network = parser().get_parsed_content("network_def").eval()
    assert (type(network.segmenter), type(network.registration)) == (DynUNet, VoxelMorphUNet)
    with torch.no_grad():
        velocity = network(torch.rand(1, image["num_channels"], *image["spatial_shape"]))
    assert velocity.shape == (1, pred["num_channels"], *pred["spatial_shape"])
    verify_net_in_out("network_def", meta_file=str(METADATA), config_file=str(INFERENCE), device="cpu")


def test_refine_entries_but_similarity_and_damping_are_the_defaults_of_refine():
    defaults = {name: p.default for name, p in inspect.signature(refine).parameters.items()}
    entries = {k: tuple(v) if isinstance(v, list) else v for k, v in parser()["refine"].items()}
    assert entries.pop("similarity") == "@similarity"
    assert entries.pop("damping") == (0.1, 0.1, 0.1, 0.3)  # chosen on validation pairs, for soft labels
    assert entries.pop("smooth_residual") == Elastic().sigma  # its figures were measured with that
    assert entries == {name: defaults[name] for name in entries}


@pytest.mark.usefixtures("scripts")
def test_workflow_has_the_properties_of_an_inference_bundle(tmp_path):
    pair = {"fixed": "a.nii.gz", "moving": "b.nii.gz"}
    workflow = ConfigWorkflow(
        str(INFERENCE), workflow_type="infer", logging_file=False, output_dir=str(tmp_path), datalist=[pair]
    )
    workflow.initialize()
    assert workflow.check_properties() == []
    assert workflow.dataset_data == [pair | {"name": "a__b"}]


# --- what the model zoo and its users ask for ---


def test_the_bundle_has_the_files_of_the_model_zoo_none_too_large_and_no_path_of_a_machine():
    names = {str(path.relative_to(BUNDLE)) for path in BUNDLE.rglob("*") if path.is_file()}
    configs = {f"configs/{name}" for name in ("metadata.json", "inference.json", "train.json", "logging.conf")}
    assert names >= configs | {
        "LICENSE",
        "docs/README.md",
        "docs/data_license.txt",
        "models/model.pt",
        "models/model.ts",
    }
    assert max(path.stat().st_size for path in BUNDLE.rglob("*")) < 25e6
    for path in (*BUNDLE.glob("configs/*"), *BUNDLE.glob("docs/*")):
        assert not [folder for folder in ("/home/", "/root/", "/work/", "/Users/") if folder in path.read_text()], path


@needs_model
def test_the_exported_model_predicts_what_the_network_predicts(tmp_path):
    exported = tmp_path / "model.ts"
    ckpt_export(
        "network_def", filepath=str(exported), ckpt_file=str(MODEL), meta_file=str(METADATA), config_file=str(INFERENCE)
    )
    network = parser().get_parsed_content("network_def").eval()
    network.load_state_dict(torch.load(MODEL, weights_only=True))
    images = torch.rand(1, 2, 32, 48, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network(images)
        for path in (exported, MODEL.with_suffix(".ts")):
            script = torch.jit.load(path).eval()
            torch.testing.assert_close(script(images), expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(script.features(images[:, :1]), network.features(images[:, :1]))
    assert expected.abs().max() > 0.1


@needs_model
@pytest.mark.usefixtures("scripts")
@pytest.mark.parametrize("workflow_type", ["train", "inference"])
def test_monai_loads_the_network_with_its_weights(workflow_type):
    network = monai_bundle.load(BUNDLE.name, bundle_dir=str(BUNDLE.parent), workflow_type=workflow_type)
    weights = torch.load(MODEL, weights_only=True)
    loaded = network.state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name].to(loaded[name].dtype)) for name in weights)


# --- pairs ---


def test_names_of_pairs_never_collide():
    paths = [("x/a.nii.gz", "b.nii"), ("y/a.nii.gz", "b.nii.gz"), ("a.nii", "b_2.nii"), ("s.1.nii.gz", "s.2.nii.gz")]
    out = named({"fixed": fixed, "moving": moving} for fixed, moving in paths)
    assert [pair["name"] for pair in out] == ["a__b", "a__b_2", "a__b_2_2", "s.1__s.2"]


def test_pair_without_moving_raises():
    with pytest.raises(ValueError, match=r"pair 0 must have the keys fixed and moving, \['moving'\] missing"):
        named([{"fixed": "a.nii.gz"}])


@needs_data
def test_drawn_pairs_are_seeded_different_and_of_the_test_part(scripts):
    test = set(json.loads((BUNDLE / "configs" / "split.json").read_text())["test"])
    pairs = scripts.draw_pairs(DATA, count=380)
    subjects = [tuple(Path(pair[key]).name.removesuffix(".nii.gz") for key in ("fixed", "moving")) for pair in pairs]
    assert len(set(subjects)) == 380
    assert {name for pair in subjects for name in pair} == test
    assert scripts.draw_pairs(DATA, count=5) == scripts.draw_pairs(DATA, count=5)
    assert scripts.draw_pairs(DATA, count=5) != scripts.draw_pairs(DATA, count=5, seed=1)
    with pytest.raises(ValueError, match="count must be between 1 and 380, the ordered pairs of test, got 381"):
        scripts.draw_pairs(DATA, count=381)


@needs_data
def test_pairs_are_found_in_the_layout_of_the_archive(scripts, tmp_path):
    for key in ("images", "labels"):
        (tmp_path / f"{key}Tr").symlink_to(DATA / key)
    there, here = scripts.draw_pairs(tmp_path), scripts.draw_pairs(DATA)
    relative = [{k: str(Path(v).relative_to(tmp_path)).replace("sTr", "s") for k, v in pair.items()} for pair in there]
    assert relative == [{k: str(Path(v).relative_to(DATA)) for k, v in pair.items()} for pair in here]


@pytest.mark.usefixtures("scripts")
def test_wrong_dataset_dir_says_what_it_must_hold(tmp_path, weights):
    with pytest.raises(RuntimeError) as caught:
        run(tmp_path / "out", weights, dataset_dir=str(tmp_path / "nowhere"))
    chain, error = [], caught.value
    while error is not None:
        chain.append(error)
        error = error.__cause__
    missing = [error for error in chain if isinstance(error, FileNotFoundError)]
    assert len(missing) == 1
    assert "must hold images/ and labels/, or imagesTr/ and labelsTr/" in str(missing[0])
    assert str(tmp_path / "nowhere") in str(missing[0])


# --- registrations ---


def test_command_writes_three_files_for_each_pair(registered):
    assert len(names(registered)) == 2
    expected = {f"{name}_{kind}.nii.gz" for name in names(registered) for kind in ("ddf", "warped", "warped_label")}
    expected |= {"metrics.csv", "mean_dice_raw.csv", "mean_dice_before_raw.csv"}
    assert {path.name for path in registered.iterdir()} == expected


def test_fields_are_itk_vectors_without_folds(registered):
    for name in names(registered):
        image = nib.load(registered / f"{name}_ddf.nii.gz")
        assert image.shape == (64, 64, 64, 1, 3)
        assert image.header.get_intent()[0] == "vector"
        field = voxel_field(registered / f"{name}_ddf.nii.gz")
        assert int(fold_count(field)) == 0
        assert field.abs().max() > 0.5


def test_written_field_warps_the_moving_image_to_the_written_one(registered):
    preprocessing = parser().get_parsed_content("preprocessing")
    for name in names(registered):
        files = pair_of(*name.split("__"))
        pair = preprocessing(files)
        torch.testing.assert_close(pair["image"][0], pair["moving"][0], check_stride=False)
        torch.testing.assert_close(pair["image"][1:].as_tensor(), pair["fixed"].as_tensor())
        field = voxel_field(registered / f"{name}_ddf.nii.gz")
        written = nib.load(registered / f"{name}_warped.nii.gz")
        warped = warp(pair["moving"].as_tensor()[None], field)[0, 0]
        np.testing.assert_allclose(written.get_fdata(), warped.numpy(), atol=1e-4)
        label = nib.load(registered / f"{name}_warped_label.nii.gz")
        assert label.get_data_dtype() == np.uint8
        assert set(np.unique(label.dataobj)) == {0, 1, 2}
        # every file lies on the padded grid of the fixed image, which is where it was in space
        original = nib.load(files["fixed"])
        padding = [(64 - size) // 2 for size in original.shape]
        expected = original.affine @ [*(-p for p in padding), 1]
        for file in (written, label, nib.load(registered / f"{name}_ddf.nii.gz")):
            np.testing.assert_allclose(file.affine[:3, :3], original.affine[:3, :3], atol=1e-6)
            np.testing.assert_allclose(file.affine[:, 3], expected, atol=1e-6)


def test_simpleitk_warps_the_original_label_to_the_written_one(registered):
    """The whole way through space: the file of the field, the moving label as it was distributed, another reader."""
    sitk = pytest.importorskip("SimpleITK", reason="the dev extra is not installed")
    for name in names(registered):
        written = sitk.ReadImage(str(registered / f"{name}_warped_label.nii.gz"))
        field = sitk.ReadImage(str(registered / f"{name}_ddf.nii.gz"), sitk.sitkVectorFloat64)
        moving = sitk.ReadImage(str(DATA / "labels" / f"{name.split('__')[1]}.nii.gz"))
        warp_by_itk = sitk.DisplacementFieldTransform(field)
        warped = sitk.Resample(moving, written, warp_by_itk, sitk.sitkNearestNeighbor)
        a, b = (sitk.GetArrayFromImage(image) > 0 for image in (warped, written))
        assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.995


def read_csv(path: Path) -> dict[str, list[float]]:
    rows = (line.split(",") for line in path.read_text().splitlines())
    return {row[0]: [float(value) for value in row[1:]] for row in rows if row[0] != "filename"}


def test_dice_rises_and_is_that_of_the_written_labels(registered):
    after, before = read_csv(registered / "mean_dice_raw.csv"), read_csv(registered / "mean_dice_before_raw.csv")
    assert sorted(after) == sorted(before) == names(registered)
    for name in after:
        assert after[name][-1] > before[name][-1] + 0.01
        label = nib.load(pair_of(*name.split("__"))["fixed_label"])
        warped = np.asarray(nib.load(registered / f"{name}_warped_label.nii.gz").dataobj)
        begin = [(64 - size) // 2 for size in label.shape]
        target = np.zeros((64, 64, 64))
        target[tuple(slice(b, b + size) for b, size in zip(begin, label.shape, strict=True))] = label.dataobj
        for index, value in enumerate((1, 2)):
            a, b = warped == value, target == value
            assert after[name][index] == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()), abs=1e-4)
    metrics = read_csv(registered / "metrics.csv")
    assert metrics["mean_dice"][0] == pytest.approx(np.mean([row[-1] for row in after.values()]), abs=1e-4)
    assert metrics["mean_dice_before"][0] == pytest.approx(np.mean([row[-1] for row in before.values()]), abs=1e-4)


@needs_data
@pytest.mark.usefixtures("scripts")
def test_pairs_without_labels_are_registered_and_not_evaluated(tmp_path, weights):
    pair = pair_of("hippocampus_311", "hippocampus_314")
    run(tmp_path, weights, datalist=[{key: pair[key] for key in ("fixed", "moving")}], refine=None)
    stem = "hippocampus_311__hippocampus_314"
    assert {path.name for path in tmp_path.iterdir()} == {f"{stem}_ddf.nii.gz", f"{stem}_warped.nii.gz"}
    assert voxel_field(tmp_path / f"{stem}_ddf.nii.gz").abs().max() < 0.1  # the network's own: almost no motion


@needs_data
@pytest.mark.usefixtures("scripts")
def test_overrides_reach_refine(tmp_path, weights):
    with pytest.raises(RuntimeError) as caught:
        run(tmp_path, weights, **{"dataset_dir": str(DATA), "datalist#count": 1, "refine#step": -1})
    assert "step must be greater than 0, got -1" in str(caught.value.__cause__)


@needs_data
@needs_model
@pytest.mark.usefixtures("scripts")
def test_trained_weights_register_a_pair(tmp_path):
    pair = pair_of("hippocampus_327", "hippocampus_320")
    run(tmp_path, MODEL, **{"datalist": [pair], "refine#iterations": [10, 5]})
    metrics = read_csv(tmp_path / "metrics.csv")
    assert metrics["mean_dice"][0] > metrics["mean_dice_before"][0] + 0.05
    assert int(fold_count(voxel_field(next(tmp_path.glob("*_ddf.nii.gz"))))) == 0


@needs_data
@needs_model
def test_orientation_does_not_matter(tmp_path):
    """The same images with other array axes: the field leads to the same places."""
    subjects = {"fixed": "hippocampus_327", "moving": "hippocampus_320"}
    pair = {name: DATA / "images" / f"{subject}.nii.gz" for name, subject in subjects.items()}
    turned = {}
    for name, path in pair.items():
        image = nib.load(path).as_reoriented(np.array([[0, -1], [2, 1], [1, -1]]))
        nib.save(image, turned.setdefault(name, tmp_path / f"{name}.nii.gz"))
    settings = {"iterations": [3, 2], "scales": [2, 1]}
    registration = RegistrationBundle(BUNDLE, settings=settings)
    grid = nib.load(pair["fixed"])
    fields = [registration.register(**files, grid=Grid(grid.shape, grid.affine))[1].ddf for files in (pair, turned)]
    assert fields[0].norm(dim=1).mean() > 0.5
    assert (fields[1] - fields[0]).norm(dim=1).mean() < 0.02
