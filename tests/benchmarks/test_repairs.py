"""The command for repairs: hopeless fields end without folds, and the share of the gain is that of the history."""

import torch

from benchmarks import repairs as module
from benchmarks.cases import Case
from benchmarks.repairs import repairs


def test_every_field_ends_without_folds_and_shares_are_fractions(smooth_image, monkeypatch, capsys):
    image, label = smooth_image((1, 1, 20, 18, 16), 1.5, 0, torch.float32), torch.zeros(1, 1, 20, 18, 16)
    case = Case(image.roll(2, 2), image, (label, label), None, torch.zeros(1, 3, 20, 18, 16))
    monkeypatch.setattr(module, "SETS", {"predictions": lambda: iter([case])})
    repairs(("predictions",), 1)
    lines = capsys.readouterr().out.splitlines()
    fields = {cells[1]: cells for line in lines if len(cells := [cell.strip() for cell in line.split("|")]) == 8}
    assert [fields[name][5] for name in module._FIELDS] == ["0"] * len(module._FIELDS)
    assert fields["a network's"][2] == "0.0%"
    assert fields["mirrored"][6] == "no"
    _, start, lowest, returned, share = [cell.strip() for cell in lines[-1].split("|")][2:7]
    assert float(lowest) <= float(returned) < float(start)
    assert 0 <= float(share.split("%")[0]) < 50
