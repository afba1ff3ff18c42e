"""FieldWriter: whole files, cohorts that go on, and processes that share the work."""

import csv
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import monai_lm
from monai_lm.fields import fold_count
from monai_lm.io import read_itk_ddf
from monai_lm.training import FieldWriter, PairDataModule, RegistrationModule

REFINE = {"scales": (1,), "iterations": 5}


@pytest.fixture
def data(cohort):
    def make():
        return PairDataModule(cohort, split=(0, 0, 1), pairs=5, grid=(16, 16, 16), labels=3)

    return make


def _rows(folder):
    return list(csv.DictReader((folder / "metrics.csv").open()))


def test_files_hold_what_was_predicted(tmp_path, data, network, trainer):
    module = RegistrationModule(network, refine=REFINE)
    outputs = trainer(callbacks=[FieldWriter(tmp_path)]).predict(module, data())
    rows = _rows(tmp_path)
    assert len(rows) == len(outputs) == 5
    assert [row["name"] for row in rows] == sorted(row["name"] for row in rows)
    pairs = data()
    pairs.setup("predict")
    for batch, output in zip(pairs.predict_dataloader(), outputs, strict=True):
        name = batch["name"][0]
        ddf, affine = read_itk_ddf(tmp_path / f"{name}_ddf.nii.gz")
        np.testing.assert_allclose(ddf, output["ddf"][0].numpy(), atol=1e-5)
        np.testing.assert_allclose(
            affine, batch["fixed"].affine[0] if batch["fixed"].affine.dim() == 3 else batch["fixed"].affine
        )
        row = next(r for r in rows if r["name"] == name)
        warped = nib.load(tmp_path / f"{name}_warped_label.nii.gz").get_fdata()
        fixed = batch["fixed_label"][0, 0].numpy()
        dice = [2 * ((warped == k) & (fixed == k)).sum() / ((warped == k).sum() + (fixed == k).sum()) for k in (1, 2)]
        assert float(row["dice_after"]) == pytest.approx(np.mean(dice), abs=1e-6)
        assert float(row["folds_after"]) == int(fold_count(output["ddf"])) == 0
        assert float(row["loss_after"]) < float(row["loss_before"])


def test_labels_that_float32_would_merge_keep_their_values(tmp_path, cohort, network, trainer):
    """Loaded, measured and written: labels 1 and 2 of the cohort under other names give the Dice of 1 and 2."""
    names, rows = np.array([0, 16777216, 16777217], np.uint32), {}
    for folder, naming in (("plain", np.arange(3)), ("large", names)):
        pair = {"name": "pair"}
        for role, subject in (("fixed", "s0"), ("moving", "s1")):
            label = nib.load(cohort / "labels" / f"{subject}.nii.gz")
            stored = naming.astype(np.uint32)[np.asarray(label.dataobj)]
            pair[role], pair[f"{role}_label"] = (
                cohort / "images" / f"{subject}.nii.gz",
                tmp_path / f"{folder}_{subject}.nii",
            )
            nib.save(nib.Nifti1Image(stored, label.affine), pair[f"{role}_label"])
        data = PairDataModule([{k: str(v) for k, v in pair.items()}], grid=(16, 16, 16))
        trainer(callbacks=[FieldWriter(tmp_path / folder)]).predict(RegistrationModule(network, refine=None), data)
        rows[folder] = _rows(tmp_path / folder)[0]
    assert rows["large"] == rows["plain"]
    assert 0 < float(rows["plain"]["dice_before"]) < 1
    plain, large = (nib.load(tmp_path / folder / "pair_warped_label.nii.gz") for folder in ("plain", "large"))
    np.testing.assert_array_equal(np.asarray(large.dataobj), names[np.asarray(plain.dataobj)])
    assert large.get_data_dtype() == np.uint32


def test_a_cohort_that_was_stopped_goes_on(tmp_path, data, network, trainer):
    module = RegistrationModule(network, refine=REFINE)
    trainer(callbacks=[FieldWriter(tmp_path / "whole")]).predict(module, data())
    trainer(callbacks=[FieldWriter(tmp_path / "stopped")], limit_predict_batches=2).predict(module, data())
    assert len(_rows(tmp_path / "stopped")) == 2
    times = {f: f.stat().st_mtime_ns for f in (tmp_path / "stopped").glob("*.json")}
    with pytest.warns(UserWarning, match=r"2 pairs are complete in .*stopped and left out: same files, network and"):
        outputs = trainer(callbacks=[FieldWriter(tmp_path / "stopped")]).predict(module, data())
    assert len(outputs) == 3
    assert all(file.stat().st_mtime_ns == time for file, time in times.items())
    whole, stopped = (
        [{k: v for k, v in r.items() if k != "seconds"} for r in _rows(tmp_path / n)] for n in ("whole", "stopped")
    )
    assert whole == stopped
    again = trainer(callbacks=[FieldWriter(tmp_path / "stopped", overwrite=True)]).predict(module, data())
    assert len(again) == 5


def _stopped(tmp_path, data, module, trainer, **kwargs):
    trainer(callbacks=[FieldWriter(tmp_path)], limit_predict_batches=2).predict(module, data(), **kwargs)
    return {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.json")}


@pytest.mark.parametrize("changed", ["network", "settings", "grid", "file"])
def test_what_something_else_made_is_not_taken_for_a_result(tmp_path, cohort, network, trainer, changed):
    images = [tmp_path / f"s{i}.nii.gz" for i in range(3)]
    for i, image in enumerate(images):
        image.write_bytes((cohort / "images" / f"s{i}.nii.gz").read_bytes())
    pairs = [{"fixed": str(images[0]), "moving": str(images[i])} for i in (1, 2)]
    grid, refine, out = (16, 16, 16), dict(REFINE), tmp_path / "out"
    times = _stopped(out, lambda: PairDataModule(pairs, grid=grid), RegistrationModule(network, refine=refine), trainer)
    assert len(times) == 2
    if changed == "network":
        network[0].weight.data += 0.1
    elif changed == "settings":
        refine["step"] = 0.25
    elif changed == "grid":
        grid = (18, 16, 16)
    else:
        images[2].write_bytes((cohort / "images" / "s3.nii.gz").read_bytes())
    module = RegistrationModule(network, refine=refine)
    with pytest.raises(ValueError, match="output_dir has") as error:
        trainer(callbacks=[FieldWriter(out)]).predict(module, PairDataModule(pairs, grid=grid))
    expected = {
        "network": "network was '", "settings": "refine.step was 0.5, is 0.25", "grid": "[16, 16, 16], is [18, 16, 16]",
        "file": f"s0__s2: {out} holds another result: moving {images[2]} has changed since",
    }  # fmt: skip
    assert expected[changed] in str(error.value)
    assert all(file.stat().st_mtime_ns == time for file, time in times.items())
    again = trainer(callbacks=[FieldWriter(out, overwrite=True)]).predict(module, PairDataModule(pairs, grid=grid))
    assert len(again) == 2


def test_pairs_of_the_network_of_a_checkpoint_are_left_out(tmp_path, data, network, trainer):
    """The weights are those that the checkpoint brings, which come after the callbacks are set up."""
    module = RegistrationModule(network, refine=REFINE)
    fit = trainer(max_epochs=1, enable_checkpointing=True, limit_val_batches=0)
    fit.fit(module, PairDataModule(data().source, split=(1, 0, 0), pairs=1, grid=(16, 16, 16)))
    fit.save_checkpoint(tmp_path / "a.ckpt")
    times = _stopped(tmp_path / "out", data, module, trainer, ckpt_path=tmp_path / "a.ckpt")
    network[0].weight.data += 1  # replaced by the checkpoint's
    with pytest.warns(UserWarning, match="2 pairs are complete"):
        left = trainer(callbacks=[FieldWriter(tmp_path / "out")]).predict(module, data(), ckpt_path=tmp_path / "a.ckpt")
    assert len(left) == 3
    assert all(file.stat().st_mtime_ns == time for file, time in times.items())


def test_the_table_is_of_the_pairs_of_this_run_and_says_their_images(tmp_path, cohort, network, trainer):
    images = [str(cohort / "images" / f"s{i}.nii.gz") for i in range(3)]
    module = RegistrationModule(network)
    for moving in images[1:]:
        pairs = PairDataModule([{"fixed": images[0], "moving": moving}], grid=(16, 16, 16))
        trainer(callbacks=[FieldWriter(tmp_path / "out")]).predict(module, pairs)
        (row,) = _rows(tmp_path / "out")
        assert (row["fixed"], row["moving"]) == (images[0], moving)


@pytest.mark.filterwarnings("ignore:.*pairs are complete")
def test_one_data_module_leaves_out_for_one_folder_what_it_predicts_for_another(tmp_path, data, network, trainer):
    pairs, module = data(), RegistrationModule(network)
    counts = [
        len(trainer(callbacks=[writer]).predict(module, pairs) or [])
        for writer in (FieldWriter(tmp_path / "a"), FieldWriter(tmp_path / "a"), FieldWriter(tmp_path / "b"))
    ]
    assert counts == [5, 0, 5]


def test_a_name_that_comes_twice_is_refused(tmp_path, network, trainer):
    batch = {k: torch.rand(1, 1, 8, 8, 8) for k in ("fixed", "moving")} | {"name": ["a"]}
    loader = torch.utils.data.DataLoader([batch, batch], batch_size=None)
    with pytest.raises(ValueError, match="every pair must have a name of its own, got 'a' twice"):
        trainer(callbacks=[FieldWriter(tmp_path)]).predict(RegistrationModule(network), loader)


def test_a_folder_that_is_a_file_is_found_before_the_work(tmp_path, data, network, trainer):
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(ValueError, match="output_dir must be a folder, got the file"):
        trainer(callbacks=[FieldWriter(tmp_path / "out")]).predict(RegistrationModule(network), data())


def test_without_refinement_the_network_is_written(tmp_path, data, network, trainer):
    trainer(callbacks=[FieldWriter(tmp_path)], limit_predict_batches=1).predict(RegistrationModule(network), data())
    (row,) = _rows(tmp_path)
    assert "dice_before" in row
    assert "dice_after" not in row


@pytest.mark.parametrize("name", ["../x", ".hidden", "a/b"])
def test_names_that_are_no_file_names_are_refused(tmp_path, cohort, network, trainer, name):
    images = [str(cohort / "images" / f"s{i}.nii.gz") for i in range(2)]
    pair = {"fixed": images[0], "moving": images[1], "name": name}
    with pytest.raises(ValueError, match="do as the name of a file"):
        trainer(callbacks=[FieldWriter(tmp_path)]).predict(RegistrationModule(network), PairDataModule([pair]))


_SCRIPT = """
import json, sys, torch, pytorch_lightning as pl
from monai_lm.training import FieldWriter, PairDataModule, RegistrationModule
cohort, output, devices = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.manual_seed(0)
last = torch.nn.Conv3d(4, 3, 3, padding=1)
torch.nn.init.normal_(last.weight, std=1e-2)
network = torch.nn.Sequential(torch.nn.Conv3d(2, 4, 3, padding=1), torch.nn.ReLU(), last)
module = RegistrationModule(network, labels=3, refine={"scales": (1,), "iterations": 5})
data = PairDataModule(cohort, split=(0.5, 0, 0.5), pairs=5, grid=(16, 16, 16), labels=3)
trainer = pl.Trainer(accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", logger=False,
    enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, max_epochs=1,
    callbacks=[FieldWriter(output)])
metrics = trainer.test(module, data, verbose=False)[0]
trainer.predict(module, data, return_predictions=False)
trainer.fit(module, data)
if trainer.is_global_zero:
    json.dump(metrics, open(output + "/../metrics" + str(devices), "w"))
"""


def test_two_processes_do_what_one_does(tmp_path, cohort, monkeypatch):
    script = tmp_path / "run.py"
    script.write_text(_SCRIPT)
    for devices in (1, 2):
        (tmp_path / f"out{devices}").mkdir()
    monkeypatch.setattr(sys, "argv", [str(script), str(cohort), str(tmp_path / "out1"), "1"])
    runpy.run_path(str(script))
    environment = os.environ | {"PYTHONPATH": str(Path(monai_lm.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, cohort, tmp_path / "out2", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / f"metrics{d}").read_text()) for d in (1, 2))
    assert one.keys() == two.keys()
    assert two == pytest.approx(one, rel=1e-5)
    first, second = (_rows(tmp_path / f"out{d}") for d in (1, 2))
    assert [r["name"] for r in first] == [r["name"] for r in second]
    assert len(first) == 5
    for row in first:
        fields = [read_itk_ddf(tmp_path / f"out{d}" / f"{row['name']}_ddf.nii.gz")[0] for d in (1, 2)]
        np.testing.assert_allclose(*fields, atol=1e-5)
    assert torch.distributed.is_available()
