"""The hippocampus bundle's other configurations: train, evaluate, on one process and on two."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigWorkflow

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
    """Run configurations, the later over the earlier, from the bundle's folder."""
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "29517", "-m"]
    files = ",".join(f"'configs/{name}.json'" for name in names)
    options = {"config_file": f"[{files}]", "dataset_dir": DATA, "output_dir": output, **settings}
    command = [*start, "monai.bundle", "run", *(t for k, v in options.items() for t in (f"--{k}", str(v)))]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=BUNDLE, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


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


@needs_data
def test_an_epoch_trains_the_registration_and_leaves_the_segmenter(tmp_path):
    run(["train"], tmp_path, TINY)
    before, after = (torch.load(p, weights_only=True) for p in (BUNDLE / "models" / "model.pt", tmp_path / "model.pt"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("registration") for name in changed)
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


@needs_data
def test_two_processes_train_one_network(tmp_path):
    run(["train", "multi_gpu_train"], tmp_path, TINY | {"device": "$torch.device('cpu')"}, processes=2)
    assert torch.load(tmp_path / "model.pt", weights_only=True)


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
