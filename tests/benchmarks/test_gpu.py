"""``python -m benchmarks gpu``: all of it dry, on the CPU and on labels, and what becomes of steps that go wrong."""

import json
import math
import runpy
import sys
import time

import pytest
import torch

from benchmarks.gpu import command, correctness, scaling, tables
from benchmarks.gpu.measure import synthetic
from benchmarks.gpu.steps import now_of, run_steps, table
from benchmarks.rows import read_rows
from monai_lm.fields import fold_count, warp
from tests.conftest import PROJECT_ROOT
from tests.gpu.pretend import Pretend

CPU = torch.device("cpu")
LATER = time.time() + 10_000


@pytest.fixture
def benchmarks(monkeypatch):
    """``benchmarks(*words)``: ``python -m benchmarks`` in this process, which has imported everything."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["benchmarks", *words])
        runpy.run_module("benchmarks", run_name="__main__")

    return run


def test_a_dry_run_of_everything_fails_nowhere(tmp_path, benchmarks, capsys):
    benchmarks("gpu", "--out", str(tmp_path), "--dry")
    printed = capsys.readouterr().out
    rows = {part: {row["step"]: row for row in read_rows(tmp_path / f"{part}.jsonl")} for part in command.PARTS}
    assert not [row for part in rows.values() for row in part.values() if "error" in row]
    assert rows["correctness"]["tests"]["exit_code"] == 0
    assert rows["correctness"]["imports"]["failed"] == {}
    tested = [row for row in rows["correctness"].values() if row.get("outcome") == "passed"]
    assert len(tested) > 30
    assert all(row["mean_voxels"] < 0.01 for row in tested if "mean_voxels" in row)
    for name in ("LM", "LM, predicted", "adam", "stateless"):
        whole = rows["tables"][f"whole, {name}"]
        assert whole["folds"] == 0
        assert whole["missed_voxels"] < 0.5
    assert rows["scaling"]["repair"]["folds_before"] > rows["scaling"]["repair"]["folds_after"] == 0
    assert (tmp_path / "trace_reference.json.gz").stat().st_size > 1000
    for part in command.PARTS:
        assert (tmp_path / f"{part}.txt").read_text() in printed


@pytest.mark.parametrize("part", ["tables", "scaling"])
def test_the_steps_run_on_a_labelled_device(part, tmp_path, monkeypatch):
    """Those that start no process of their own; on the device all of them count memory."""
    device, rows = torch.device("cuda:1"), tmp_path / "rows.jsonl"
    monkeypatch.setattr(tables, "DRY_SIZES", ((16, 18, 17),))
    elsewhere = ("first call", "fireants", "equal", "profile", "whole, ")
    with Pretend():
        steps = tables.steps(device, True) if part == "tables" else scaling.steps(device, True, tmp_path)
        own = [step for step in steps if not step[0].startswith(elsewhere)]
        run_steps(own, rows, device, LATER)
    found = read_rows(rows)
    assert [row["step"] for row in found] == [name for name, _ in own]
    assert not [row for row in found if "error" in row]
    counted = [row["volumes"] for row in found if "volumes" in row]
    assert len(counted) >= 4
    assert all(3 < volumes < 80 for volumes in counted)


def test_the_machine_and_its_copying_are_told_on_a_label(tmp_path):
    with Pretend():
        steps = [s for s in correctness.steps(torch.device("cuda:1"), True, tmp_path) if s[0] != "tests"]
        run_steps(steps, tmp_path / "rows.jsonl", torch.device("cuda:1"), LATER)
    machine, imports, copy = read_rows(tmp_path / "rows.jsonl")
    assert machine["GiB"] == 80
    assert imports["failed"] == {}
    assert copy["GB_per_s"] > 0


@pytest.mark.parametrize("size", [(64, 64, 64), (32, 36, 34)])
def test_the_synthetic_pair_is_what_it_says(size):
    pair = synthetic(size, CPU)
    assert fold_count(pair.truth).item() == fold_count(pair.prediction).item() == 0
    assert torch.equal(warp(pair.moving, pair.truth), pair.fixed)
    assert float(torch.linalg.vector_norm(pair.truth, dim=1).mean()) > 2
    assert pair.volume == 4 * math.prod(size)


def test_a_step_that_fails_is_told_and_stops_nobody(tmp_path):
    rows = tmp_path / "rows.jsonl"

    def fail():
        raise ValueError("no\nluck")

    run_steps([("a", lambda: {"x": 1.23456}), ("b", fail), ("c", lambda: {"y": None})], rows, CPU, LATER)
    a, b, c = read_rows(rows)
    assert (a["x"], b["error"], c["y"]) == (1.23456, "ValueError: no\nluck", None)
    assert "fail" in b["traceback"]
    assert table([a, b, c]).splitlines() == [
        "a  x 1.235",
        "c  y None",
        "",
        "failed:",
        "b  error ValueError: no",
        "luck",
    ]
    assert not now_of(rows).exists()
    run_steps([("a", fail), ("d", dict)], rows, CPU, LATER)  # what has its line is not run again
    assert [row["step"] for row in read_rows(rows)] == ["a", "b", "c", "d"]


def test_no_step_is_begun_after_the_deadline(tmp_path):
    run_steps([("a", lambda: {"x": 1})], tmp_path / "rows.jsonl", CPU, time.time() - 1)
    assert read_rows(tmp_path / "rows.jsonl") == [{"step": "a", "skipped": "out of time"}]


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"step": "a"}\n{"step": "b", "x"')
    assert read_rows(rows) == [{"step": "a"}]


WORKER = """
import os, sys, time
from pathlib import Path
from benchmarks.gpu.steps import run_steps
import torch
rows = Path(sys.argv[1])
steps = [("a", lambda: {{"x": 1}}), ("b", lambda: {bad}), ("c", lambda: {{"x": 3}})]
run_steps(steps, rows, torch.device("cpu"), time.time() + 100)
"""


def test_a_process_that_dies_is_followed_by_one_that_goes_on(tmp_path):
    rows = tmp_path / "rows.jsonl"
    command.run_process([sys.executable, "-c", WORKER.format(bad="os._exit(7)"), str(rows)], rows, LATER)
    a, b, c = read_rows(rows)
    assert (a["x"], b["step"], b["error"], c["x"]) == (1, "b", "the process ended with status 7", 3)


def test_a_process_that_hangs_is_cut_off(tmp_path):
    rows = tmp_path / "rows.jsonl"
    code = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text('b'); time.sleep(1000)"
    command.run_process([sys.executable, "-c", code, str(now_of(rows))], rows, time.time() - 16)  # and some seconds
    assert read_rows(rows) == [{"step": "b", "error": "cut off: out of time"}]


def test_a_process_that_cannot_start_is_not_tried_for_ever(tmp_path):
    rows = tmp_path / "rows.jsonl"
    command.run_process([sys.executable, "-c", "raise SystemExit(9)"], rows, LATER)
    assert read_rows(rows) == [{"step": "start of the process", "error": "the process ended with status 9"}]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"device": "cuda:7"}, "device must be auto or one that torch has here"),
        ({"device": "cpu"}, "device must be a CUDA device, got 'cpu'; --dry tries the steps out on the CPU"),
        ({"part": "speed", "dry": True}, "part must be all or one of"),
    ],
)
def test_bad_input_is_refused_before_anything_is_done(arguments, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        command.gpu(str(tmp_path / "out"), **arguments)
    assert not (tmp_path / "out").exists()


def test_a_device_that_is_not_there_ends_with_one_sentence(tmp_path, benchmarks, capsys):
    with pytest.raises(SystemExit) as stop:
        benchmarks("gpu", "--out", str(tmp_path), "--device", "cuda:7")
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("benchmarks: device must be auto or one that torch has here")
    assert len(told.strip().splitlines()) == 1


def test_the_requirements_are_pinned():
    lines = (PROJECT_ROOT / "benchmarks" / "gpu_requirements.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert pins == sorted(pins)
    assert all(line.count("==") == 1 for line in pins)
    assert json.dumps(pins).count("torch") == 0
