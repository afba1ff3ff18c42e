"""The count of good and bad fields that are doubted, and what they are made of."""

import json

import pytest
import torch

from benchmarks.cases import Case
from benchmarks.nonsense import KINDS, trial
from benchmarks.verdict import verdict
from monai_lm.fields import warp


def row(kind, half="A", doubted=(), dice=(0.5, 0.8), **more):
    """A line of what the benchmark writes."""
    more = {"set": "heart", "pair": 0, "nonsense": False} | more
    outcome = "suspicious" if doubted else "improved"
    told = {"kind": kind, "half": half, "outcome": outcome, "remarks": list(doubted)}
    return told | {"dice_before": dice[0], "dice_after": dice[1], **more}


def test_fields_are_good_bad_or_the_same_by_dice_by_a_known_error_or_because_nothing_could_be_right(tmp_path, capsys):
    rows = [row("real, lncc"), row("real, lncc", "B", ["rough"], (0.5, 0.4), pair=1)]
    rows += [row("noise 1, lncc", nonsense=True), row("noise 1, lncc", "B", ["rough", "mirror"], nonsense=True)]
    rows += [row("known 0 .06, lncc", "A", ["noise"], error_before=0.0, error_after=0.4)]
    rows += [row("shifted .3, lncc", dice=(0.0, 0.6)), row("shifted .1, lncc", dice=(0.3, 0.75))]
    rows += [
        row("real, lncc", dice=(0.5, 0.502), pair=2),
        row("known 1 .06, lncc", error_before=0.5, error_after=0.505),
    ]
    rows += [row("random, lncc", "B", ["contrast"]), row("mirrored 0, lncc", set="brain", nonsense=True)]
    (tmp_path / "rows").write_text("\n".join(map(json.dumps, rows)))
    verdict(rows=str(tmp_path / "rows"))
    said = capsys.readouterr().out
    for line in (
        "| real, lncc | 1 | 0 | 1 | 1 | 1 | 0 | 0 |  | 0 |  |",
        "| noise 1, lncc | 0 |  | 2 | 1 | 0 |  | 0 |  | 0 |  |",
        "| known 0 .06, lncc | 0 |  | 1 | 1 | 0 |  | 0 |  | 0 |  |",
        "| known 1 .06, lncc | 0 |  | 0 |  | 1 | 0 | 0 |  | 0 |  |",
        "| shifted .3, lncc | 0 |  | 0 |  | 0 |  | 1 | 0 | 0 |  |",
        "| shifted .1, lncc | 1 | 0 | 0 |  | 0 |  | 0 |  | 0 |  |",
        "| mirrored 0, lncc | 0 |  | 0 |  | 0 |  | 0 |  | 1 | 0 |",
        "| all, half B | 1 | 1 | 2 | 2 | 0 |  | 0 |  | 0 |  |",
        "| measures that suit, half B | 0 |  | 2 | 2 | 0 |  | 0 |  | 0 |  |",
        "| rough | 0 | 2 | 0 | 0 |",
    ):
        assert line in said.splitlines()


@pytest.mark.parametrize("planar", [True, False])
def test_every_kind_can_be_made(random_tensor, planar):
    size = (1, 1, 20, 18) if planar else (1, 1, 20, 18, 16)
    image, label = random_tensor(size).float(), (random_tensor(size, 1) > 0).float()
    case = Case(image, 2 * image + 1, (label, label.flip(2)))
    for kind in [kind for kind in KINDS if not kind.startswith("other organ")]:
        made = trial(case, kind, 3, "hippocampus")
        if made is None:
            assert planar
            assert kind.startswith("mirrored 2")
            continue
        assert made.similarity == kind.rsplit(", ")[1]
        assert made.nonsense is kind.startswith(("noise", "mirrored"))
        assert made.case.moving.shape == made.case.labels[1].shape == size
        assert (made.start is None) is not kind.startswith("begun")
        if made.truth is not None and kind.startswith("known 3"):
            assert float(made.truth.square().sum(1).sqrt().mean()) == pytest.approx(3, rel=0.01)
            assert torch.equal(made.case.labels[0], warp(label.flip(2), made.truth, mode="nearest"))
