"""The command for contrasts: what becomes of intensities, rows that are run once, differences to LNCC."""

import json

import numpy as np
import pytest
import torch

from benchmarks import contrasts as module
from benchmarks.cases import Case
from benchmarks.contrasts import CONTRASTS, KNOWN, contrasts, recolored


def test_intensities_are_mapped_as_the_table_says():
    ramp = torch.linspace(-3, 7, 2001).view(1, 1, -1, 1)
    for kind in CONTRASTS:
        out = recolored(ramp, kind, 5).flatten().numpy()
        values = CONTRASTS[kind] or np.random.default_rng(5).permutation(6) / 5
        np.testing.assert_allclose(out[[0, 401, 800, 1200, 1599, 2000]], 10 * np.array(values) - 3, atol=0.1)
    np.testing.assert_allclose(recolored(ramp, "inverted"), 4 - recolored(ramp, "same"), atol=0.1)
    assert not torch.equal(recolored(ramp, "random", 0), recolored(ramp, "random", 1))


@pytest.mark.parametrize("side", ["moving", "fixed"])
def test_every_measure_is_run_once_and_compared_with_lncc(side, smooth_image, monkeypatch, tmp_path, capsys):
    image, label = smooth_image((1, 1, 24, 22), 1.5, 0, torch.float32), torch.zeros(1, 1, 24, 22)
    label[..., 8:16, 8:14] = 1
    case = Case(image.roll(2, 2), image, (label.roll(2, 2), label))
    monkeypatch.setattr(module, "SETS", {"squares": lambda: iter([case, case])})
    file = tmp_path / "rows.jsonl"
    for _ in range(2):
        contrasts(("squares",), 2, ("lncc", "mse", KNOWN), ("same", "inverted"), side, str(file))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 2 * 6
    assert {row["side"] for row in rows} == {side}
    dice = {(row["kind"], row["similarity"]): row["dice_after"] for row in rows}
    assert dice["same", "lncc"] == pytest.approx(dice["inverted", "lncc"], abs=0.02)
    assert dice["same", "lncc"] == pytest.approx(dice["inverted", KNOWN], abs=0.02)
    table = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| inverted, mse")]
    assert float(table[0][4].split()[0]) == pytest.approx(dice["inverted", "mse"] - dice["same", "lncc"], abs=6e-4)


@pytest.mark.parametrize(
    ("side", "measure"), [("moving", "mse"), ("fixed", "mse"), ("moving", KNOWN), ("fixed", KNOWN)]
)
def test_the_image_that_is_asked_for_is_mapped_or_both_where_the_map_is_known(side, measure, smooth_image, monkeypatch):
    images = {"fixed": smooth_image((1, 1, 24, 22), 1.5, 0), "moving": smooth_image((1, 1, 24, 22), 1.5, 1)}
    seen = []

    def refined(pair, _, settings):
        seen.append((pair, settings["similarity"]))
        return {"dice_before": 0.5, "dice_after": 0.6, "sdlogj_after": 0.1, "seconds": 1.0}

    monkeypatch.setattr(module, "refined", refined)
    label = torch.zeros(1, 1, 24, 22)
    monkeypatch.setattr(module, "SETS", {"one": lambda: iter([Case(**images, labels=(label, label))])})
    contrasts(("one",), 1, (measure,), ("like T2",), side)
    (plain, first), (pair, used) = seen
    assert first == "lncc"
    assert used == ("lncc" if measure == KNOWN else measure)
    for name, image in images.items():
        mapped = measure == KNOWN or name == side
        assert torch.equal(getattr(pair, name), recolored(image, "like T2") if mapped else image)
    assert torch.equal(
        getattr(plain, "moving" if side == "fixed" else "fixed"), images["moving" if side == "fixed" else "fixed"]
    )
