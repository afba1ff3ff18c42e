"""The command for validation sets: what it prints of pairs, resumes, compares and refuses."""

import json

import pytest
import torch

from benchmarks import validation as module
from benchmarks.cases import Case
from benchmarks.validation import validation
from monai_lm import refine


@pytest.fixture
def pairs(smooth_image, monkeypatch):
    """Two pairs of squares, moved by two voxels, in place of the sets."""
    cases = []
    for seed in range(2):
        image = smooth_image((1, 1, 24, 22), 1.5, seed, torch.float32)
        label = torch.zeros(1, 1, 24, 22)
        label[..., 8:16, 8:14] = 1
        cases.append(Case(image.roll(2, 2), image, (label.roll(2, 2), label), (1.0, 2.0)))
    monkeypatch.setattr(module, "SETS", {"squares": lambda: iter(cases)})
    return cases


def test_pairs_are_measured_once_and_compared(pairs, tmp_path, capsys):
    file = str(tmp_path / "rows.jsonl")
    validation(("squares",), json_file=file)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["pair"] for row in rows] == [0, 1]
    assert all(row["dice_before"] == 0.75 < row["dice_after"] and row["folds_after"] == 0 for row in rows)
    assert all(0 < row["guard"] < 1 for row in rows)
    again = refine(pairs[0].fixed, pairs[0].moving, spacing=(1.0, 2.0))
    assert module._measured(pairs[0], None, again.ddf, 0.0)["fingerprint"] == rows[0]["fingerprint"]
    assert rows[0]["fingerprint"] != rows[1]["fingerprint"]
    rows[1]["dice_after"] -= 0.1
    (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, rows)))
    capsys.readouterr()
    validation(("squares",), json_file=file, against=str(tmp_path / "other.jsonl"))  # nothing is run again
    told = capsys.readouterr().out
    assert "dice_after: +0.05 (standard error 0.05)" in told
    assert "sdlogj_after: +0 (standard error 0)" in told
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 2


@pytest.mark.usefixtures("pairs")
def test_rows_of_other_settings_are_not_taken_for_these(tmp_path):
    file = str(tmp_path / "rows.jsonl")
    validation(("squares",), pairs=1, settings={"iterations": 1}, json_file=file)
    with pytest.raises(SystemExit, match=r"json_file must hold a run with .*'iterations': 2.*'iterations': 1"):
        validation(("squares",), pairs=2, settings={"iterations": 2}, json_file=file)
