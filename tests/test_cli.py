"""The monai-lm command."""

import subprocess
import sys

import pytest

from monai_lm import cli


def test_demo_runs_as_a_command(tmp_path):
    pytest.importorskip("nilearn", reason="the demo needs nilearn")
    command = [sys.executable, "-m", "monai_lm.cli", "demo", "--output_dir", str(tmp_path), "--resolution", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "refined by LM" in done.stdout
    assert (tmp_path / "demo.png").is_file()


def test_bad_value_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["monai-lm", "demo", "--output_dir", str(tmp_path), "--resolution", "0"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("monai-lm: resolution must be between 1 and 4")
    assert "\n" not in error


def test_unwritable_output_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    pytest.importorskip("nilearn", reason="the demo needs nilearn")
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(sys, "argv", ["monai-lm", "demo", "--output_dir", str(tmp_path / "file"), "--resolution", "4"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "monai-lm:" in capsys.readouterr().err
