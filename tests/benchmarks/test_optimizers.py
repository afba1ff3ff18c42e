"""The command for optimizers: curves, paired differences, rows that are run once."""

import json
import math

import pytest
import torch

from benchmarks import optimizers as module
from benchmarks.cases import Case
from benchmarks.descents import DESCENTS
from benchmarks.optimizers import ahead, optimizers


def test_a_curve_is_read_where_it_is_as_rough():
    curve = [{"sdlogj_after": rough, "dice_after": dice} for rough, dice in ((0.4, 0.8), (0.2, 0.7))]
    assert ahead(curve, {"sdlogj_after": 0.3, "dice_after": 0.72}) == pytest.approx(0.03)
    assert ahead(curve, {"sdlogj_after": 0.4, "dice_after": 0.9}) == pytest.approx(-0.1)
    assert math.isnan(ahead(curve, {"sdlogj_after": 0.1, "dice_after": 0.7}))
    assert math.isnan(ahead([], {"sdlogj_after": 0.1, "dice_after": 0.7}))


def test_every_optimizer_is_run_once_and_compared_with_lm(smooth_image, monkeypatch, tmp_path, capsys):
    image, label = smooth_image((1, 1, 24, 22), 1.5, 0, torch.float32), torch.zeros(1, 1, 24, 22)
    label[..., 8:16, 8:14] = 1
    case = Case(image.roll(2, 2), image, (label.roll(2, 2), label))
    monkeypatch.setattr(module, "SETS", {"squares": lambda: iter([case, case])})
    file = tmp_path / "rows.jsonl"
    optimizers(("squares",), smoothings=(0.5, 1.0), json_file=str(file))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert (
        len({(row["pair"], row["descent"], row["smoothing"]) for row in rows})
        == len(rows)
        == 2 * (1 + len(DESCENTS)) * 2
    )
    for row in rows:  # what is printed is of the rows in the file
        row["dice_after"] = 0.5 if row["descent"] == "lm" else 0.25
        row["sdlogj_after"] = {0.5: 0.2, 1.0: 0.1}[row["smoothing"]] - 0.05 * (row["descent"] == "adam")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    optimizers(("squares",), smoothings=(0.5, 1.0), json_file=str(file))
    table = capsys.readouterr().out.splitlines()
    told = {line.split(" |")[0]: line.split(" | ")[1:] for line in table}
    assert told["| lm, 0.5"][:2] == ["0.5", "0.2"]
    assert told["| stateless, 1"][-2:] == ["+0.2500 (0.0000)", "+0.2500 (0.0000) |"]
    assert told["| adam, 0.5"][-1] == "+0.2500 (0.0000) |"
    assert told["| adam, 1"][-1] == "– |"
    assert len(file.read_text().splitlines()) == len(rows)


def test_an_optimizer_that_is_none_is_named():
    with pytest.raises(ValueError, match=r"descents must be of .*'lm'.*got \['lbfgs'\]"):
        optimizers((), descents=("lm", "lbfgs"))
