"""The count of false alarms and misses."""

import json

from benchmarks.verdict import verdict


def row(kind, agreement, sdlogj, extremes, dice=0.8, **more):
    more |= {"dice_before": 0.5, "dice_after": dice} if kind == "real" or "," in kind else {}
    more = {"polarity": 1.0, "information": 0.8, "gained": 0.2, "any_contrast": False} | more
    return {"set": "a", "kind": kind, "agreement_before": 0.4, "agreement": agreement, "sdlogj": sdlogj,
            "extremes": extremes, **more}  # fmt: skip


def test_doubted_real_pairs_are_false_alarms_and_nonsense_that_is_not_doubted_is_missed(tmp_path, capsys):
    rows = [row("real", 0.95, 0.3, 0.0), row("real", 0.95, 2.0, 0.0), row("noise", 0.3, 1.5, 0.6)]
    rows += [row("noise 1", 0.95, 0.3, 0.2), row("mirrored", 0.95, 0.3, 0.0)]
    rows += [row("random, lncc", 0.9, 0.3, 0.0, 0.4, polarity=0.5), row("random, lncc", 0.9, 0.3, 0.0, 0.4)]
    rows += [row("random, mi", 0.4, 0.3, 0.0, 0.6, any_contrast=True)]
    (tmp_path / "rows").write_text("\n".join(map(json.dumps, rows)))
    verdict(rows=str(tmp_path / "rows"))
    said = capsys.readouterr().out
    assert "pairs as they are: false alarms 1 of 2, misses 0 of 0" in said
    assert "other contrasts, by a measure for one: false alarms 0 of 0, misses 1 of 2" in said
    assert "other contrasts, by mi: false alarms 0 of 1, misses 0 of 0" in said
    assert "nonsense: false alarms 0 of 0, misses 1 of 3" in said
    assert "all: false alarms 1 of 3, misses 2 of 5" in said
    (real,) = [line for line in said.splitlines() if "| real" in line]
    assert real.split("|")[3:] == [
        " 2 ",
        " 0 ",
        " 0.500 → 0.800 ",
        " 0.40 → 0.95–0.95 ",
        " 0.30–2.00 ",
        " 0.00–0.00 ",
        " 1.00–1.00 ",
        " 0.20–0.20 ",
        " 1 ",
        "",
    ]
