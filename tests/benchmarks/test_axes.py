"""The command that exchanges and mirrors axes: fields come back to where they were."""

import pytest

from benchmarks import axes as module
from benchmarks.cases import Case


@pytest.mark.parametrize("shape", [(24, 20), (14, 12, 10)])
def test_fields_of_turned_images_are_turned_back(shape, smooth_image, monkeypatch, capsys):
    moving, noise = smooth_image((1, 1, *shape), 1.5, 0).float(), smooth_image((1, 1, *shape), 1.5, 1).float()
    case = Case(moving.roll(1, 2) + 0.1 * noise, moving, (moving, moving), (1.0, 1.5, 2.0)[: len(shape)])
    monkeypatch.setattr(module, "SETS", {"waves": lambda: iter([case])})
    module.axes(("waves",), 1, ("lncc", "mi"), 10)
    rows = capsys.readouterr().out.splitlines()[3:]
    assert [row.split(" | ")[1] for row in rows] == ["lncc", "mi"]
    assert all(float(cell.split(" ")[0]) < 1e-3 for row in rows for cell in row.strip("| ").split(" | ")[2:])
