"""The count of false alarms and misses."""

import json

from benchmarks.verdict import verdict


def row(kind, agreement, sdlogj, extremes):
    more = {"dice_before": 0.5, "dice_after": 0.8} if kind == "real" else {}
    return {"set": "a", "kind": kind, "agreement_before": 0.4, "agreement": agreement, "sdlogj": sdlogj,
            "extremes": extremes, **more}  # fmt: skip


def test_doubted_real_pairs_are_false_alarms_and_nonsense_that_is_not_doubted_is_missed(tmp_path, capsys):
    rows = [row("real", 0.95, 0.3, 0.0), row("real", 0.95, 2.0, 0.0), row("noise", 0.3, 1.5, 0.6)]
    rows += [row("noise 1", 0.95, 0.3, 0.2), row("mirrored", 0.95, 0.3, 0.0)]
    (tmp_path / "rows").write_text("\n".join(map(json.dumps, rows)))
    verdict(rows=str(tmp_path / "rows"))
    said = capsys.readouterr().out
    assert "false alarms: 1 of 2; misses: 1 of 3" in said
    (real,) = [line for line in said.splitlines() if "| real" in line]
    assert real.split("|")[3:] == [
        " 2 ",
        " 0.500 → 0.800 ",
        " 0.40 → 0.95–0.95 ",
        " 0.30–2.00 ",
        " 0.00–0.00 ",
        " 1 ",
        "",
    ]
