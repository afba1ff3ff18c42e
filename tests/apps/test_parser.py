"""What is said of wrong command lines: which option, what was expected, what came."""

import sys
from typing import get_args

import pytest

from monai_lm.alignment import MODES
from monai_lm.apps import cli, options
from monai_lm.apps.parser import as_typed
from monai_lm.io import FORMATS
from monai_lm.io.formats import READABLE
from monai_lm.kernels import CHOICES
from monai_lm.similarity.lookup import MEASURES
from monai_lm.solver.memory import MODES as MODES_OF_MEMORY
from monai_lm.solver.regularizer import REGULARIZERS

PAIR = "refine --fixed f.nii --moving m.nii --output_dir out "
FIELD = "--ddf u.nii --output v.nii "
SCALES = "numbers of at least 1, separated by commas, or auto"
ITERATIONS = "a whole number of at least 0, or several of them separated by commas, or auto"
MEASURE = "lncc, mapped_lncc, mi, mind, mse, ncc or auto, or several of them separated by commas"
WRITTEN = "itk, itk_transform, metaimage, nrrd, fsl, voxel, learn2reg or freesurfer"
READ = (
    "auto, itk, itk_transform, metaimage, nrrd, fsl, voxel, learn2reg, niftyreg, freesurfer, m3z, afni, ras, lps or "
    "positions"
)


@pytest.fixture
def said(monkeypatch, capsys, tmp_path):
    """What a command line, which must end with exit code 2, says on stderr in the one line that it has."""
    monkeypatch.chdir(tmp_path)

    def run(words):
        monkeypatch.setattr(sys, "argv", ["monai-lm", *words.split()])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 2
        out, error = capsys.readouterr()
        assert out == ""
        line, end = error[:-1], error[-1]
        assert (line.count("\n"), end) == (0, "\n")
        assert line.startswith("monai-lm: ")
        return line.removeprefix("monai-lm: ")

    return run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("refne --fixed f.nii", "'refne' is no command of monai-lm, did you mean refine?"),
        ("version", "'version' is no command of monai-lm, did you mean --version?"),
        (
            "warp",
            "'warp' is no command of monai-lm; there are refine, cohort, sequence, apply, invert, jacobian, compose, "
            "convert, evaluate, info and demo",
        ),
        ("--fixed f.nii refine", "--fixed must come after a command, as monai-lm refine --fixed; see monai-lm --help"),
        ("--versio", "--versio is no option of monai-lm, did you mean --version?"),
        ("refine", "--fixed, --moving and --output_dir must be given; see monai-lm refine --help"),
        ("apply --ddf u.nii --input i.nii", "--output must be given; see monai-lm apply --help"),
        ("compose --first u.nii", "--second and --output must be given; see monai-lm compose --help"),
        ("refine --fixed --moving m.nii", "--fixed must be followed by a value, got --moving"),
        ("refine --moving m.nii --fixed", "--fixed must be followed by a value, got none"),
        (f"{PAIR} --fixed_lable l.nii", "--fixed_lable is no option of monai-lm refine, did you mean --fixed_label?"),
        (
            f"{PAIR} --smooth-gradient 1",
            "--smooth-gradient is no option of monai-lm refine; see monai-lm refine --help",
        ),
        (
            f"{PAIR} --mask k.nii",
            "--mask is no option of monai-lm refine, did you mean --fixed_mask or --moving_mask?",
        ),
        (f"{PAIR} --out o", "--out is no option of monai-lm refine, did you mean --output_dir?"),
        (f"{PAIR} -o o", "-o is no option of monai-lm refine, did you mean --output_dir or --overwrite?"),
        ("apply u.nii i.nii", "'u.nii' must come after an option, as --name u.nii; see monai-lm apply --help"),
        (f"{PAIR} --ddf a.nii b.nii", "--ddf must be one word, quoted if need be, got a.nii b.nii"),
        (f"{PAIR} --scales 4 2 1", "--scales must be one word, --scales 4,2,1, got 4 2 1"),
        ("info a.nii b.nii", "--file must be one word, quoted if need be, got a.nii b.nii"),
        (f"{PAIR} --scales abc", f"--scales must be {SCALES}, got 'abc'"),
        (f"{PAIR} --scales 4,x", f"--scales must be {SCALES}, got '4,x'"),
        (f"{PAIR} --scales=4,0.5", f"--scales must be {SCALES}, got '4,0.5'"),
        (f"{PAIR} --iterations 3.5", f"--iterations must be {ITERATIONS}, got '3.5'"),
        (f"{PAIR} --iterations 10,-1", f"--iterations must be {ITERATIONS}, got '10,-1'"),
        (f"{PAIR} --similarity lnc", f"--similarity must be {MEASURE}, got 'lnc'"),
        (f"{PAIR} --similarity mi,x", f"--similarity must be {MEASURE}, got 'mi,x'"),
        (f"{PAIR} --step abc", "--step must be a number greater than 0, got 'abc'"),
        (f"{PAIR} --step 0", "--step must be a number greater than 0, got '0'"),
        (f"{PAIR} --seconds -1", "--seconds must be a number greater than 0, got '-1'"),
        (f"{PAIR} --seconds=-1", "--seconds must be a number greater than 0, got '-1'"),
        (f"{PAIR} --memory ful", "--memory must be auto, full or half, got 'ful'"),
        (f"{PAIR} --kernels c", "--kernels must be auto, native or reference, got 'c'"),
        (f"{PAIR} --smooth_residual x", "--smooth_residual must be a number of at least 0, or auto, got 'x'"),
        (f"{PAIR} --regularizer l2", "--regularizer must be diffusion, bending or sliding, got 'l2'"),
        (
            f"{PAIR} --regularizer_weight 2",
            "--regularizer_weight needs --regularizer diffusion|bending|sliding, got 2 alone",
        ),
        (
            f"{PAIR} --regularizer bending --regularizer_weight -1",
            "--regularizer_weight must be a number of at least 0, got '-1'",
        ),
        (f"{PAIR} --guide_points --guide_weight -1", "--guide_weight must be a number greater than 0, got '-1'"),
        (f"{PAIR} --guide_labels 1,a", "--guide_labels must be whole numbers, separated by commas, or all, got '1,a'"),
        (f"{PAIR} --bundle none", "--bundle must be a folder, found none at none"),
        (f"{PAIR} --scales 1,2", "--scales must be strictly decreasing and not empty, got (1.0, 2.0)"),
        (
            f"{PAIR} --scales 4,2 --iterations 9,9,9",
            "--iterations must have one number per level, 2 for scales [4.0, 2.0], got 3",
        ),
        (f"{PAIR} --uncertainty --symmetric", "--uncertainty cannot be told together with --symmetric"),
        (
            "apply --ddf u.nii --input i.nii --output o.csv",
            "--output must end in .nii or .nii.gz for an image, got 'o.csv'",
        ),
        (f"{PAIR} --overwrite maybe", "--overwrite must be true or false, got 'maybe'"),
        (f"{PAIR} --file_format afni", f"--file_format must be {WRITTEN}, got 'afni'"),
        (f"{PAIR} --ddf_format foo", f"--ddf_format must be {READ}, got 'foo'"),
        (
            f"{PAIR} --fixed_label l.nii",
            "--fixed_label and --moving_label must be given together, got --fixed_label l.nii alone",
        ),
        (
            "cohort --pairs p.csv --output_dir out --affine a.mat",
            "--affine must be auto, center, rigid or affine, got 'a.mat'",
        ),
        (
            "cohort --pairs p.csv --output_dir out --seed 1",
            "--seed is no option of monai-lm cohort; see monai-lm cohort --help",
        ),
        ("sequence --series s.nii --output_dir out --reference last", "--reference must be a whole number, got 'last'"),
        ("sequence --series s.nii --output_dir out --similarity x", f"--similarity must be {MEASURE}, got 'x'"),
        (f"invert {FIELD} --ddf_format foo", f"--ddf_format must be {READ}, got 'foo'"),
        (f"jacobian {FIELD} --log 2", "--log must be true or false, got '2'"),
        (
            "compose --first u.nii --second u.nii --output v.nii --first_format x",
            f"--first_format must be {READ}, got 'x'",
        ),
        (f"convert {FIELD} --to afni", f"--to must be {WRITTEN}, got 'afni'"),
        (
            f"convert {FIELD} --to itk --resample",
            "--resample must be used together with --fixed, the image on whose grid the field shall lie",
        ),
        (
            "evaluate --ddf u.nii --fixed f.nii --moving m.nii --moving_points p.csv",
            "--fixed_points and --moving_points must be given together, got --moving_points p.csv alone",
        ),
        ("info --file_format", "--file_format must be followed by a value, got none"),
        ("demo --resolution 9", "--resolution must be a whole number from 1 to 4, got '9'"),
        ("demo --seed 1.5", "--seed must be a whole number, got '1.5'"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_a_line(words, message, said):
    assert said(words) == message


@pytest.mark.parametrize(
    ("words", "text", "message"),
    [
        ("refine --config c.yaml", "step: abc", "step in c.yaml must be a number greater than 0, got 'abc'"),
        ("refine --config c.yaml --step 1", "step: abc", "step in c.yaml must be a number greater than 0, got 'abc'"),
        ("--config c.yaml refine", "refine: {step: 0}", "refine.step in c.yaml must be a number greater than 0, got 0"),
        ("refine --config c.yaml", "scales: [2, x]", f"scales in c.yaml must be {SCALES}, got [2, 'x']"),
        ("demo --config c.yaml", "sed: 1", "sed in c.yaml is no option of monai-lm demo, did you mean seed?"),
        (
            "--config c.yaml demo",
            "deno: {seed: 1}",
            "deno.seed in c.yaml is no option of monai-lm demo, did you mean seed?",
        ),
        (
            "demo --config c.yaml",
            "just text",
            "--config must be a YAML file of names and values of options, got c.yaml: just text",
        ),
        (
            "demo --config d.yaml",
            "",
            "--config must be a YAML file of names and values of options, got d.yaml, which is no file",
        ),
        (
            "--config c.yaml",
            "seed: 1",
            "a command must come first, one of refine, cohort, sequence, apply, invert, jacobian, compose, convert, "
            "evaluate, info or demo; see monai-lm --help",
        ),
    ],
)
def test_what_is_wrong_in_a_file_of_options_is_named_with_it(words, text, message, said, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    assert said(words) == message


def test_a_broken_file_of_options_is_named_with_the_place(said, tmp_path):
    (tmp_path / "c.yaml").write_text("seed: [1\n")
    message = said("demo --config c.yaml")
    assert message.startswith("--config must be a YAML file of names and values of options, got c.yaml: ")
    assert "line 2" in message


@pytest.mark.parametrize("way", ["--output-dir out", "--output_dir=out", "--output-dir=out"])
def test_dashes_and_equal_signs_may_be_used(way, monkeypatch):
    given = {}
    monkeypatch.setattr(cli, "run_demo", lambda *values: given.update(values=values))
    monkeypatch.setattr(sys, "argv", ["monai-lm", "demo", *way.split(), "--seed=-1"])
    cli.main()
    assert given["values"] == ("out", 2, -1)


def test_the_types_of_options_are_the_tables_of_the_work():
    for kind, names in (
        (options.Alignment, MODES), (options.Kernels, CHOICES), (options.Measure, (*MEASURES, "auto")),
        (options.Memory, ("auto", *MODES_OF_MEMORY)), (options.Regularization, REGULARIZERS),
        (options.Written, FORMATS), (options.Readable, ("auto", *READABLE)),
    ):  # fmt: skip
        assert get_args(kind) == tuple(names)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("ddf and step must be x, got step", "--ddf and --step must be x, got step"),
        ("ddf cannot be used together with bundle, which", "--ddf cannot be used together with --bundle, which"),
        ("guide_weight needs fixed_mask or a step", "--guide_weight needs --fixed_mask or a step"),
        ("mask must not be zero everywhere", "--fixed_mask must not be zero everywhere"),
        ("no file out/fixed_mask.nii or 'fixed_mask'", "no file out/fixed_mask.nii or 'fixed_mask'"),
        ("--fixed_mask must be one", "--fixed_mask must be one"),
        ("a step must be taken", "a step must be taken"),
    ],
)
def test_arguments_are_named_as_options(message, expected):
    assert as_typed(message, ["ddf", "step", "bundle", "guide_weight", "fixed_mask"]) == expected
    assert as_typed(message, []) == message
