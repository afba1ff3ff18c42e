"""The monai-lm command."""

import inspect
import json
import re
import runpy
import subprocess
import sys
import warnings

import nibabel as nib
import numpy as np
import pytest
import torch

import monai_lm
from monai_lm.apps import cli, commands, pairs
from monai_lm.fields import gaussian_smooth
from monai_lm.solver.regularizer import Sliding

REFINE_PAIR = pairs.refine_pair


@pytest.mark.filterwarnings("ignore:'monai_lm.apps.cli' found in sys.modules:RuntimeWarning")
def test_demo_runs_as_a_command(tmp_path, monkeypatch, capsys):
    pytest.importorskip("nilearn", reason="the demo needs nilearn")
    monkeypatch.setattr(sys, "argv", ["monai-lm", "demo", "--output_dir", str(tmp_path), "--resolution", "4"])
    runpy.run_module("monai_lm.apps.cli", run_name="__main__")
    assert "refined by LM" in capsys.readouterr().out
    assert (tmp_path / "demo.png").is_file()


def test_bad_value_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["monai-lm", "demo", "--output_dir", str(tmp_path), "--resolution", "0"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("monai-lm: --resolution must be a whole number from 1 to 4, got '0'")
    assert "\n" not in error


def test_unwritable_output_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    pytest.importorskip("nilearn", reason="the demo needs nilearn")
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(sys, "argv", ["monai-lm", "demo", "--output_dir", str(tmp_path / "file"), "--resolution", "4"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "monai-lm:" in capsys.readouterr().err


def test_refine_then_evaluate_as_commands(tmp_path, monkeypatch, capsys):
    image = gaussian_smooth(torch.randn(1, 1, 20, 18, 16, generator=torch.Generator().manual_seed(0)), 2.0)[
        0, 0
    ].numpy()
    for name, values in (("fixed", image[1:]), ("moving", image[:-1])):
        nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / f"{name}.nii.gz")
    images = ["--fixed", str(tmp_path / "fixed.nii.gz"), "--moving", str(tmp_path / "moving.nii.gz")]
    out = tmp_path / "out"
    refine = [
        "refine",
        *images,
        "--output_dir",
        str(out),
        "--scales",
        "[2,1]",
        "--iterations",
        "[10,5]",
        "--json",
        "true",
    ]
    monkeypatch.setattr(sys, "argv", ["monai-lm", *refine, "--report", "false"])
    cli.main()
    refined = json.loads(capsys.readouterr().out)
    assert refined["loss_after"] < 0.3 * refined["loss_before"]
    monkeypatch.setattr(
        sys, "argv", ["monai-lm", "evaluate", *images, "--ddf", str(out / "ddf.nii.gz"), "--json", "true"]
    )
    cli.main()
    measured = json.loads(capsys.readouterr().out)
    assert measured == pytest.approx({k: refined[f"{k}_after"] for k in measured}, rel=1e-4)
    monkeypatch.setattr(sys, "argv", ["monai-lm", *refine])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "--overwrite replaces it" in capsys.readouterr().err


def test_info_names_versions_and_devices(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["monai-lm", "info", "--json", "true"])
    cli.main()
    info = json.loads(capsys.readouterr().out)
    assert info["torch"] == torch.__version__
    assert info["devices"]


@pytest.mark.parametrize("words", [["--json"], ["--json", "true"]])
def test_a_switch_alone_means_true(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["monai-lm", "info", *words])
    cli.main()
    assert "torch" in json.loads(capsys.readouterr().out)


def test_a_switch_before_another_option_means_true(monkeypatch):
    given = {}
    monkeypatch.setattr(commands, "invert_field", lambda *values: given.update(values=values) or 0.0)
    words = ["--ddf", "a.nii.gz", "--overwrite", "--output", "b.nii.gz"]
    monkeypatch.setattr(sys, "argv", ["monai-lm", "invert", *words])
    cli.main()
    assert given["values"] == ("a.nii.gz", "b.nii.gz", None, "itk", True, "auto", "auto")
    monkeypatch.setattr(sys, "argv", ["monai-lm", "invert", *words[:2], *words[3:], "--overwrite", "false"])
    cli.main()
    assert given["values"] == ("a.nii.gz", "b.nii.gz", None, "itk", False, "auto", "auto")


def test_refine_and_cohort_take_the_same_options(monkeypatch):
    given = []
    monkeypatch.setattr(pairs, "refine_pair", lambda *_, **how: given.append(how) or {})
    monkeypatch.setattr("monai_lm.apps.cohort.refine_cohort", lambda *_, **how: given.append(how) or ([], {}))
    words = ["--output_dir", "out", "--report", "--scales", "[4,2]", "--step", "0.3", "--file_format", "fsl"]
    words += ["--smooth_residual", "0.6"]
    for start in (["refine", "--fixed", "f.nii", "--moving", "m.nii"], ["cohort", "--pairs", "pairs.csv"]):
        for more in ([], ["--bundle", "folder"]):
            monkeypatch.setattr(sys, "argv", ["monai-lm", *start, *words, *more])
            cli.main()
    of_refine, of_cohort = given[:2], given[2:]
    for one, other in zip(of_refine, of_cohort, strict=True):
        assert (one["report"], one["file_format"], one["device"]) == (True, "fsl", "auto")
        assert one["settings"] == other["settings"]  # no progress bar: stderr is no terminal here
    assert of_cohort[0]["settings"].keys() > {"similarity", "seconds", "memory"}
    different = {"scales": [4, 2], "step": 0.3, "smooth_residual": 0.6}
    assert of_cohort[1]["settings"] == different  # from the bundle's own
    assert (of_cohort[1]["bundle"], of_cohort[0]["bundle"]) == ("folder", None)


def test_a_regulariser_has_a_weight_or_its_own(monkeypatch, capsys):
    given = []
    monkeypatch.setattr(pairs, "refine_pair", lambda *_, **how: given.append(how["settings"]["regularizer"]) or {})
    start = ["monai-lm", "refine", "--fixed", "f.nii", "--moving", "m.nii", "--output_dir", "out"]
    for words in ([], ["--regularizer", "bending"], ["--regularizer", "sliding", "--regularizer_weight", "2"]):
        monkeypatch.setattr(sys, "argv", [*start, *words])
        cli.main()
    assert given == [None, "bending", Sliding(2.0)]
    monkeypatch.setattr(sys, "argv", [*start, "--regularizer_weight", "2"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "--regularizer_weight needs --regularizer diffusion|bending|sliding, got 2 alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--guide_weight 2",
            "--guide_weight needs --guide_labels, --guide_points or --fixed_soft_labels and --moving_soft_labels, got",
        ),
        ("--guide_points --symmetric", "--guide_points cannot be used together with --symmetric"),
        ("--fixed_lesion L --symmetric", "--fixed_lesion cannot be used together with --symmetric"),
        (
            "--fixed_soft_labels L --moving_soft_labels M --symmetric",
            "--fixed_soft_labels and --moving_soft_labels cannot be used together with --symmetric",
        ),
        ("--bundle B --ddf u.nii", "--ddf cannot be used together with --bundle"),
        ("--guide_labels 1", "--guide_labels needs --fixed_label and --moving_label"),  # a list of one
        ("cohort --pairs none.csv", "--pairs must be a folder, a file.*got 'none.csv', missing"),
    ],
)
def test_what_is_wrong_is_named_as_it_was_typed(words, message, monkeypatch, capsys, tmp_path):
    usual = {
        "refine": "--fixed f.nii --moving m.nii --output_dir out", "cohort": "--output_dir out",
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    command, *options = words.split() if words.split()[0] in usual else ["refine", *words.split()]
    monkeypatch.setattr(sys, "argv", ["monai-lm", command, *usual[command].split(), *options])
    with pytest.raises(SystemExit):
        cli.main()
    assert re.search(f"^monai-lm: {message}", capsys.readouterr().err)


def test_masks_of_either_side_reach_the_work(monkeypatch):
    given = []
    monkeypatch.setattr(pairs, "refine_pair", lambda *files, **how: given.append((files, how)) or {})
    words = ["--fixed", "f.nii", "--moving", "m.nii", "--output_dir", "out"]
    monkeypatch.setattr(
        sys,
        "argv",
        ["monai-lm", "refine", *words, "--fixed_mask", "a.nii", "--moving_mask", "b.nii", "--fixed_lesion", "c.nii"],
    )
    cli.main()
    named = inspect.signature(REFINE_PAIR).bind(*given[0][0], **given[0][1]).arguments
    assert (named["mask"], named["moving_mask"]) == ("a.nii", "b.nii")
    assert (named["lesion"], named["moving_lesion"]) == ("c.nii", None)


def test_no_command_at_all_prints_the_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["monai-lm"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    said = capsys.readouterr()
    assert "Available subcommands" in said.out
    assert said.err == ""


def test_a_warning_of_the_work_is_a_line(tmp_path, monkeypatch, capsys):
    def warn(*_, **__):
        warnings.warn("no report is written", stacklevel=1)
        return {"loss": 0.5, "remarks": {"rough": "The field is rough."}, "provenance": {"command": None}}

    monkeypatch.setattr(pairs, "refine_pair", warn)
    words = ["refine", "--fixed", "f.nii", "--moving", "m.nii", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["monai-lm", *words])
    cli.main()
    said = capsys.readouterr()
    assert said.err == "monai-lm: warning: no report is written\n"
    assert said.out == "loss                0.5\n- The field is rough.\n"


def test_the_version(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["monai-lm", "--version"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"monai-lm {monai_lm.__version__}\n"


@pytest.mark.parametrize("scales", ["4,2,1", "[4,2,1]"])
def test_a_list_needs_no_brackets(scales, monkeypatch):
    given = {}
    monkeypatch.setattr(pairs, "refine_pair", lambda *_, **how: given.update(how["settings"]) or {})
    words = ["refine", "--fixed", "f.nii", "--moving", "m.nii", "--output_dir", "out"]
    monkeypatch.setattr(sys, "argv", ["monai-lm", *words, "--scales", scales, "--iterations", "20"])
    cli.main()
    assert (given["scales"], given["iterations"]) == ([4, 2, 1], 20)


@pytest.mark.parametrize(
    ("written", "expected"), [("mi", "mi"), ("mi,lncc", ["mi", "lncc"]), ("[mi,mi,lncc]", ["mi", "mi", "lncc"])]
)
@pytest.mark.parametrize("command", ["refine", "sequence"])
def test_every_level_may_have_a_measure(command, written, expected, monkeypatch):
    given = []
    monkeypatch.setattr(pairs, "refine_pair", lambda *_, **how: given.append(how["settings"]) or {})
    monkeypatch.setattr(
        "monai_lm.apps.sequence.register_sequence",
        lambda *_, **how: given.append(how["settings"]) or [{"over": "mask"}],
    )
    files = {"refine": ["--fixed", "f.nii", "--moving", "m.nii"], "sequence": ["--series", "s.nii"]}[command]
    monkeypatch.setattr(sys, "argv", ["monai-lm", command, *files, "--output_dir", "out", "--similarity", written])
    cli.main()
    assert given[0]["similarity"] == expected


@pytest.mark.parametrize(("written", "expected"), [("0.6", 0.6), ("auto", "auto")])
def test_a_series_may_be_followed_as_usual(written, expected, monkeypatch):
    given = []
    monkeypatch.setattr(
        "monai_lm.apps.sequence.register_sequence",
        lambda *_, **how: given.append(how["settings"]) or [{"over": "mask"}],
    )
    words = ["sequence", "--series", "s.nii", "--output_dir", "out", "--smooth_residual", written]
    monkeypatch.setattr(sys, "argv", ["monai-lm", *words])
    cli.main()
    assert given[0]["smooth_residual"] == expected


@pytest.mark.parametrize("values", [["4", "2", "1"], ["4,", "2,", "1"]])
def test_a_list_of_words_is_told_how_it_is_written(values, monkeypatch, capsys):
    words = ["refine", "--fixed", "f.nii", "--moving", "m.nii", "--output_dir", "out", "--scales", *values]
    monkeypatch.setattr(sys, "argv", ["monai-lm", *words])
    with pytest.raises(SystemExit):
        cli.main()
    assert f"--scales must be one word, --scales 4,2,1, got {' '.join(values)}" in capsys.readouterr().err


def test_a_dry_run_tells_the_plan_and_writes_nothing(tmp_path, monkeypatch, capsys):
    for name, shape in (("fixed", (20, 18, 16)), ("moving", (22, 18, 16))):
        values = np.random.default_rng(0).random(shape, np.float32)
        nib.save(nib.Nifti1Image(values, np.diag([1, 1, 2, 1])), tmp_path / f"{name}.nii.gz")
    files = ["--fixed", str(tmp_path / "fixed.nii.gz"), "--moving", str(tmp_path / "moving.nii.gz")]
    words = ["refine", *files, "--output_dir", str(tmp_path / "out"), "--report", "false", "--scales", "2,1"]
    monkeypatch.setattr(sys, "argv", ["monai-lm", *words, "--iterations", "3,2", "--dry_run", "--json"])
    cli.main()
    plan = json.loads(capsys.readouterr().out)
    assert plan["moving"] == "22 x 18 x 16 voxels of 1 x 1 x 2 mm"
    assert plan["start"] == "the identity"
    assert plan["levels"] == "10 x 10 x 16 up to 3 iterations, 20 x 18 x 16 up to 2 iterations"
    assert plan["settings"] == "scales [2.0, 1.0], iterations [3, 2]"
    assert "alignment" not in plan
    assert set(plan["outputs"].split(", ")) == {"metrics.json", "ddf.nii.gz", "inverse.nii.gz", "warped.nii.gz"}
    monkeypatch.setattr(sys, "argv", ["monai-lm", *words, "--symmetric", "--affine", "center", "--dry_run", "--json"])
    cli.main()
    plan = json.loads(capsys.readouterr().out)
    assert "symmetric true" in plan["settings"]
    assert plan["alignment"].startswith("center. ")
    monkeypatch.setattr(sys, "argv", sys.argv[:-1])
    cli.main()
    assert f"alignment           {plan['alignment']}\n" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    log = tmp_path / "log.jsonl"
    monkeypatch.setattr(sys, "argv", ["monai-lm", *words, "--iterations", "3,2", "--log_json", str(log)])
    cli.main()
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["level"] for row in rows] == [2.0] * 4 + [1.0] * 3
    assert rows[0]["gain_ratio"] is None
    assert [row["iteration"] for row in rows] == list(range(7))


def test_plain_commands_import_neither_monai_nor_what_draws(pair, tmp_path):
    two = ["--fixed", str(pair["fixed"]), "--moving", str(pair["moving"]), "--iterations", "2"]
    field, moved = str(tmp_path / "out" / "ddf.nii.gz"), str(tmp_path / "moved.nii.gz")
    lines = [
        (0, ["--help"]),
        (0, ["refine", "--help"]),
        (0, ["refine", *two, "--output_dir", str(tmp_path / "out"), "--report", "false"]),
        (2, ["refine", *two, "--output_dir", str(tmp_path / "none"), "--affine", "nothing.mat"]),
        (0, ["apply", "--ddf", field, "--input", str(pair["moving"]), "--output", moved]),
        (0, ["convert", "--ddf", field, "--output", str(tmp_path / "fsl.nii.gz"), "--to", "fsl"]),
        (0, ["info"]),
        (0, ["info", field]),
    ]
    labels = ["--fixed_label", str(pair["labels"][0]), "--moving_label", str(pair["labels"][1])]
    reported = ["refine", *two, *labels, "--output_dir", str(tmp_path / "reported")]
    code = f"""
import sys
from monai_lm.apps import cli

def ended(words):
    sys.argv = ["monai-lm", *words]
    try:
        cli.main()
    except SystemExit as end:
        return end.code
    return 0

def imported():
    return {{"monai", "matplotlib", "pandas", "scipy.ndimage"}} & set(sys.modules)

for expected, words in {lines}:
    assert ended(words) == expected, words
    assert not imported(), (words, imported())
assert ended({reported}) == 0
assert imported() == {{"matplotlib", "scipy.ndimage"}}, imported()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
