"""The hippocampus bundle's other configurations: train, evaluate, on one process and on two."""

from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigWorkflow

from tests.bundles import run_bundle

pytest.importorskip("ignite", reason="the bundle extra is not installed")

ROOT = Path(__file__).parent.parent
BUNDLE = ROOT / "bundles" / "hippocampus_mr_registration"
DATA = Path(os.environ.get("MONAI_LM_DATA", ROOT.parent / "shared" / "data")).resolve() / "hippocampus"
TINY = {"epochs": 1, "epoch_pairs": 4, "num_workers": 0, "data#pairs#validation": 2,
        "train#trainer#check_val_every_n_epoch": 1, "refine#iterations": "[3,3]"}  # fmt: skip

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no hippocampus images in {DATA} (set MONAI_LM_DATA)")


def config(name: str) -> dict:
    return json.loads((BUNDLE / "configs" / f"{name}.json").read_text())


def run(names: list[str], output: Path, settings: dict, processes: int = 1) -> None:
    run_bundle(BUNDLE, names, processes, dataset_dir=DATA, output_dir=output, **settings)


def test_all_configurations_mean_the_same_network_and_refinement():
    train, inference = config("train"), config("inference")
    for key in ("network_def", "refine", "similarity", "integration_steps"):
        assert train[key] == inference[key]
    assert train["data"]["split"].endswith("configs/split.json'")
    assert config("metadata")["version"] in config("metadata")["changelog"]


@needs_data
def test_training_has_the_properties_of_a_bundle(monkeypatch):
    monkeypatch.chdir(BUNDLE)
    monkeypatch.syspath_prepend(BUNDLE)
    workflow = ConfigWorkflow(
        str(BUNDLE / "configs" / "train.json"), workflow_type="train", logging_file=False, bundle_root=str(BUNDLE),
        meta_file=str(BUNDLE / "configs" / "metadata.json"), dataset_dir=str(DATA), device="$torch.device('cpu')",
    )  # fmt: skip
    workflow.initialize()
    assert not workflow.check_properties()
    assert workflow.max_epochs == 20
    for name in [name for name in sys.modules if name.split(".")[0] == "scripts"]:
        del sys.modules[name]


def trained_registration_alone(output: Path) -> None:
    """The written weights are finite, and differ from the start's in the registration and nowhere else."""
    before, after = (torch.load(p, weights_only=True) for p in (BUNDLE / "models" / "model.pt", output / "model.pt"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("registration") for name in changed)
    assert all(torch.isfinite(after[name]).all() for name in changed)


@needs_data
def test_an_epoch_trains_the_registration_and_leaves_the_segmenter(tmp_path):
    run(["train"], tmp_path, TINY)
    trained_registration_alone(tmp_path)
    rows = list(csv.DictReader(next(tmp_path.rglob("metrics.csv")).open()))
    logged = {key: float(value) for row in rows for key, value in row.items() if value}
    assert logged["val_dice_after"] > logged["val_dice_before"] - 0.01
    assert logged["val_folds_after"] == 0


@needs_data
def test_the_segmenter_is_trained_by_laying_one_file_over_another(tmp_path):
    settings = {k: v for k, v in TINY.items() if "data#" not in k}
    run(
        ["train", "train_segmenter"],
        tmp_path,
        settings | {"train#trainer#max_steps": 2, "train#trainer#limit_val_batches": 2},
    )
    before, after = (torch.load(p, weights_only=True) for p in (BUNDLE / "models" / "model.pt", tmp_path / "model.pt"))
    assert before.keys() == after.keys()
    assert all(torch.isfinite(v).all() for v in after.values() if v.is_floating_point())
    seen = {name: int(v) for name, v in after.items() if name.endswith("num_batches_tracked")}
    assert set(seen.values()) == {2}
    assert all(name.startswith("segmenter") for name in seen)


@needs_data
def test_two_processes_train_one_network(tmp_path):
    settings = TINY | {
        "epoch_pairs": 8,
        "device": "$torch.device('cpu')",
    }  # the only step of a cycle is as good as none
    run(["train", "multi_gpu_train"], tmp_path, settings, processes=2)
    trained_registration_alone(tmp_path)


@needs_data
def test_two_processes_evaluate_what_one_does(tmp_path):
    names = ["inference", "evaluate"]
    settings = {"datalist#count": 3, "refine#iterations": "[3,3]"}
    run(names, tmp_path / "one", settings | {"device": "cpu"})
    run([*names, "multi_gpu_evaluate"], tmp_path / "two", settings | {"device": "$torch.device('cpu')"}, processes=2)
    one, two = (
        dict(line.split(",") for line in (tmp_path / f / "metrics.csv").read_text().split()) for f in ("one", "two")
    )
    assert {k: float(v) for k, v in two.items()} == pytest.approx({k: float(v) for k, v in one.items()}, abs=1e-4)
    fields = [sorted(p.name for p in (tmp_path / f).glob("*_ddf.nii.gz")) for f in ("one", "two")]
    assert fields[0] == fields[1]
    assert len(fields[0]) == 3
