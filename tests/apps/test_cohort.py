"""Cohorts: every pair once, interrupted or not, and one bad pair stops nobody."""

import csv
import json
import os
import sys

import nibabel as nib
import numpy as np
import pytest
import torch

from monai_lm.apps import cli
from monai_lm.apps.cohort import refine_cohort
from monai_lm.apps.pairs import refine_pair
from monai_lm.fields import gaussian_smooth

SETTINGS = {"iterations": 5, "scales": (1,)}


@pytest.fixture
def cohort(tmp_path):
    """A list of three pairs: labels and a name of its own, two masks and soft labels, nothing."""
    image = gaussian_smooth(torch.randn(1, 1, 18, 16, 14, generator=torch.Generator().manual_seed(0)), 2.0)[0, 0]
    for number in range(3):
        values = image[number : number + 16].numpy()
        nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / f"i{number}.nii.gz")
        nib.save(nib.Nifti1Image((values > 0).astype(np.uint8), np.eye(4)), tmp_path / f"l{number}.nii.gz")
    rows = [
        "fixed,moving,fixed_label,moving_label,fixed_mask,moving_mask,name,fixed_soft_labels,moving_soft_labels",
        "i0.nii.gz,i1.nii.gz,l0.nii.gz,l1.nii.gz,,,first,,",
        "i1.nii.gz,i2.nii.gz,,,l1.nii.gz,l2.nii.gz,,l1.nii.gz,l2.nii.gz",
        "i2.nii.gz,i0.nii.gz,,,,,,,",
    ]
    (tmp_path / "pairs.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "pairs.csv"


def run(cohort, out, **kwargs):
    return refine_cohort(cohort, out, report=False, settings=SETTINGS, **kwargs)


def table(out):
    with (out / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_pair_is_what_refining_it_alone_gives(cohort, tmp_path):
    rows, failed = run(cohort, tmp_path / "out")
    assert not failed
    assert [row["name"] for row in rows] == ["first", "i1__i2", "i2__i0"]
    here = cohort.parent
    alone = refine_pair(
        here / "i1.nii.gz", here / "i2.nii.gz", tmp_path / "alone", mask=here / "l1.nii.gz",
        moving_mask=here / "l2.nii.gz", soft_labels=(here / "l1.nii.gz", here / "l2.nii.gz"),
        report=False, settings=SETTINGS,
    )  # fmt: skip
    own = ("name", "fixed", "moving", "remarks", "seconds")
    assert {k: v for k, v in rows[1].items() if k not in own} == {
        k: v for k, v in alone.items() if k not in (*own, "headline", "provenance")
    }
    assert rows[1]["remarks"] == " ".join(alone["remarks"])
    written = [{k: row[k] for k in ("name", "fixed", "moving")} for row in table(tmp_path / "out")]
    assert written[1:] == [
        {"name": f"i{a}__i{b}", "fixed": str(here / f"i{a}.nii.gz"), "moving": str(here / f"i{b}.nii.gz")}
        for a, b in ((1, 2), (2, 0))
    ]
    fields = [nib.load(folder / "ddf.nii.gz").get_fdata() for folder in (tmp_path / "alone", tmp_path / "out/i1__i2")]
    np.testing.assert_array_equal(*fields)
    assert float(table(tmp_path / "out")[0]["dice_after"]) == rows[0]["dice_after"] > rows[0]["dice_before"]
    assert table(tmp_path / "out")[2]["dice_after"] == ""


def test_an_interrupted_cohort_goes_on_where_it_stopped(cohort, tmp_path):
    out = tmp_path / "out"
    run(cohort, out)
    complete = table(out)
    (out / "metrics.csv").unlink()
    (out / "first" / "metrics.json").unlink()  # as if stopped before the last file
    written = {p: p.stat().st_mtime_ns for p in out.glob("*/ddf.nii.gz")}
    run(cohort, out)
    again = {p.parent.name for p, time in written.items() if p.stat().st_mtime_ns != time}
    assert again == {"first"}
    assert [{**row, "seconds": 0} for row in table(out)] == [{**row, "seconds": 0} for row in complete]
    run(cohort, out, overwrite=True)
    assert all(p.stat().st_mtime_ns != time for p, time in written.items())


def test_a_bad_pair_stops_nobody_and_is_named(cohort, tmp_path, monkeypatch, capsys):
    (tmp_path / "i0.nii.gz").write_bytes((tmp_path / "i0.nii.gz").read_bytes()[:200])
    out = tmp_path / "out"
    options = {
        "pairs": cohort,
        "output_dir": out,
        "iterations": 3,
        "scales": "[1]",
        "report": False,
    }
    command = [str(word) for key, value in options.items() for word in (f"--{key}", value)]
    monkeypatch.setattr(sys, "argv", ["monai-lm", "cohort", *command])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert "1 pairs complete" in said.out
    assert "2 pairs failed:\n  first: " in said.err
    assert "i0.nii.gz" in said.err
    assert [row["name"] for row in table(out)] == ["i1__i2"]
    assert sorted(p.name for p in out.iterdir()) == ["i1__i2", "metrics.csv"]


def test_a_list_is_checked_before_the_work_all_at_once(tmp_path):
    pairs = [
        {"fixed": "no.nii.gz", "moving": "neither.nii.gz", "name": "../up"},
        {"fixed": "no.nii.gz", "moving": "no.nii.gz", "fixed_label": "no.nii.gz", "labels": 3},
        {"fixed": __file__, "moving": __file__, "name": "metrics.csv"},
    ]
    with (
        pytest.raises(ValueError, match="pairs has 8 problem") as error,
        pytest.warns(UserWarning, match=r"columns \['labels'\]"),
    ):
        refine_cohort(pairs, tmp_path / "out")
    for text in (
        "'../up': the name of a pair",
        "'metrics.csv': the name of a pair must do as the name of a folder beside metrics.csv",
        "neither.nii.gz",
        "must be given together",
    ):
        assert text in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "problems"),
    [
        (
            "--symmetric",
            [
                "first: fixed_lesion cannot be used together with --symmetric",
                "i1__i2: fixed_soft_labels and moving_soft_labels cannot be used together with --symmetric",
            ],
        ),
        (
            "--uncertainty",
            [
                "first: --uncertainty cannot be told together with fixed_lesion",
                "i1__i2: --uncertainty cannot be told together with fixed_soft_labels and moving_soft_labels",
            ],
        ),
        ("--bundle .", ["i2__i0: ddf cannot be used together with --bundle, which predicts by itself"]),
        ("--guide_points", ["first, i1__i2, i2__i0: --guide_points needs fixed_points and moving_points, got none"]),
        (
            "--guide_points --symmetric",
            ["first, i1__i2, i2__i0: --guide_points cannot be used together with --symmetric"],
        ),
    ],
)
@pytest.mark.usefixtures("cohort")
def test_what_pairs_cannot_be_refined_with_is_refused_before_the_work(option, problems, tmp_path, monkeypatch, capsys):
    rows = [
        {"name": "first", "fixed": "i0.nii.gz", "moving": "i1.nii.gz", "fixed_lesion": "l0.nii.gz"},
        {
            "fixed": "i1.nii.gz", "moving": "i2.nii.gz",
            "fixed_soft_labels": "l1.nii.gz", "moving_soft_labels": "l2.nii.gz",
        },
        {"fixed": "i2.nii.gz", "moving": "i0.nii.gz", "ddf": "l0.nii.gz"},
    ]  # fmt: skip
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    words = ["cohort", "--pairs", str(tmp_path / "pairs.json"), "--output_dir", str(tmp_path / "out"), *option.split()]
    monkeypatch.setattr(sys, "argv", ["monai-lm", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    said = capsys.readouterr().err.splitlines()
    assert said == [f"monai-lm: --pairs has {len(problems)} problem(s):", *(f"  {problem}" for problem in problems)]
    assert not (tmp_path / "out").exists()


def test_many_pairs_with_one_problem_are_counted(tmp_path):
    for name in ("f", "m", "l"):
        (tmp_path / f"{name}.nii").touch()
    pair = {"fixed": "f.nii", "moving": "m.nii", "moving_lesion": "l.nii"}
    (tmp_path / "pairs.json").write_text(json.dumps([pair] * 8))
    message = r"f__m, f__m_2, f__m_3, f__m_4, f__m_5, 3 more: moving_lesion cannot be used together with symmetric"
    with pytest.raises(ValueError, match=message):
        refine_cohort(tmp_path / "pairs.json", tmp_path / "out", settings={"symmetric": True})


def test_settings_and_devices_are_looked_at_before_the_work(cohort, tmp_path):
    for how, message in (
        ({"settings": {"scales": (1, 2)}}, "scales must be strictly decreasing"),
        ({"device": "gpu"}, "device must be auto or one that torch has here, cpu.*, got 'gpu'$"),
        ({"ddf_format": "foo"}, "ddf_format must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            refine_cohort(cohort, tmp_path / "out", **how)
    assert not (tmp_path / "out").exists()


def test_a_list_without_pairs_is_an_error(tmp_path):
    (tmp_path / "pairs.csv").write_text("fixed,moving\n")
    with pytest.raises(ValueError, match=r"pairs must have at least one pair, got none in .*pairs\.csv"):
        refine_cohort(tmp_path / "pairs.csv", tmp_path / "out")


@pytest.mark.usefixtures("cohort")
def test_lists_may_be_json_and_namesakes_are_numbered(tmp_path):
    pair = {"fixed": "i0.nii.gz", "moving": "i1.nii.gz"}
    (tmp_path / "pairs.json").write_text(json.dumps([pair, pair]))
    rows, _ = run(tmp_path / "pairs.json", tmp_path / "out")
    assert [row["name"] for row in rows] == ["i0__i1", "i0__i1_2"]


def lists(folder, *rows):
    path = folder / "list.csv"
    path.write_text("\n".join(["fixed,moving,name", *rows]) + "\n")
    return path


@pytest.fixture
def namesakes(tmp_path):
    """``s0/t1.nii.gz`` to ``s3/t1.nii.gz``, other images each."""
    image = gaussian_smooth(torch.randn(1, 1, 24, 16, 14, generator=torch.Generator().manual_seed(1)), 2.0)[0, 0]
    for number in range(4):
        (tmp_path / f"s{number}").mkdir()
        nib.save(
            nib.Nifti1Image(image[2 * number : 2 * number + 16].numpy(), np.eye(4)),
            tmp_path / f"s{number}" / "t1.nii.gz",
        )
    return tmp_path


def test_what_another_pair_left_is_not_taken_for_a_pairs(namesakes):
    out, first, second = namesakes / "out", "s0/t1.nii.gz,s1/t1.nii.gz,", "s2/t1.nii.gz,s3/t1.nii.gz,"
    run(lists(namesakes, first), out)
    kept = (out / "t1__t1" / "metrics.json").read_text()
    with pytest.raises(ValueError, match="pairs has 1 problem") as error:
        run(lists(namesakes, second, first), out)
    for text in (
        f"t1__t1: {out / 't1__t1'} holds another result",
        f"fixed was {namesakes / 's0/t1.nii.gz'}, is {namesakes / 's2/t1.nii.gz'}",
        "Give the pair another name",
    ):
        assert text in str(error.value)
    assert (out / "t1__t1" / "metrics.json").read_text() == kept
    rows, _ = run(lists(namesakes, second, first), out, overwrite=True)
    alone = refine_pair(
        namesakes / "s2/t1.nii.gz", namesakes / "s3/t1.nii.gz", namesakes / "alone", report=False, settings=SETTINGS
    )
    assert [row["loss_after"] for row in rows] == [alone["loss_after"], json.loads(kept)["loss_after"]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"similarity": "mse"}, "similarity was 'lncc', is 'mse'"),
        ({"iterations": 6}, "iterations was 5, is 6"),
        ({"kernels": "native", "progress": True}, None),
    ],
)
def test_what_other_settings_left_is_not_taken_for_a_result(namesakes, settings, message):
    pairs, out = lists(namesakes, "s0/t1.nii.gz,s1/t1.nii.gz,a"), namesakes / "out"
    rows, _ = run(pairs, out)
    if message is None:  # how the work is done does not matter
        assert refine_cohort(pairs, out, report=False, settings=SETTINGS | settings)[0] == rows
        return
    with pytest.raises(ValueError, match=message):
        refine_cohort(pairs, out, report=False, settings=SETTINGS | settings)


def test_a_file_that_changed_is_another_file_and_one_that_was_touched_is_not(namesakes):
    pairs, out, image = lists(namesakes, "s0/t1.nii.gz,s1/t1.nii.gz,a"), namesakes / "out", namesakes / "s1/t1.nii.gz"
    rows, _ = run(pairs, out)
    os.utime(image, ns=(1, 1))
    assert run(pairs, out)[0] == rows
    image.write_bytes((namesakes / "s2/t1.nii.gz").read_bytes())
    with pytest.raises(ValueError, match=f"moving {image} has changed since"):
        run(pairs, out)


def test_a_result_that_says_not_what_it_is_of_is_no_pairs(namesakes):
    pairs, out = lists(namesakes, "s0/t1.nii.gz,s1/t1.nii.gz,a"), namesakes / "out"
    for text in ('{"loss": 0.5}', "{", "[]"):
        (out / "a").mkdir(parents=True, exist_ok=True)
        (out / "a" / "metrics.json").write_text(text)
        with pytest.raises(ValueError, match="it does not say what it was made of"):
            run(pairs, out)


def test_a_pair_without_one_of_its_files_is_done_again(namesakes):
    pairs, out = lists(namesakes, "s0/t1.nii.gz,s1/t1.nii.gz,a"), namesakes / "out"
    run(pairs, out)
    (out / "a" / "inverse.nii.gz").unlink()
    run(pairs, out)
    assert (out / "a" / "inverse.nii.gz").is_file()


def test_names_that_are_given_twice_are_refused(namesakes):
    pairs = lists(namesakes, "s0/t1.nii.gz,s1/t1.nii.gz,a", "s2/t1.nii.gz,s3/t1.nii.gz,a")
    with pytest.raises(ValueError, match="'a': the name of 2 pairs"):
        run(pairs, namesakes / "out")
    assert not (namesakes / "out").exists()


def test_without_matplotlib_all_pairs_are_refined_without_reports(namesakes, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    pairs = lists(namesakes, "s0/t1.nii.gz,s1/t1.nii.gz,a", "s2/t1.nii.gz,s3/t1.nii.gz,b")
    with pytest.warns(UserWarning, match="no report is written: pictures need matplotlib") as warned:
        rows, failed = refine_cohort(pairs, namesakes / "out", settings=SETTINGS)
    assert [row["name"] for row in rows] == ["a", "b"]
    assert not failed
    assert sum("no report" in str(w.message) for w in warned) == 1


def test_an_error_of_torch_in_one_pair_stops_nobody(namesakes, monkeypatch):
    def broken(fixed, *args, **kwargs):
        if "s0" in str(fixed):
            raise torch.OutOfMemoryError("out of memory")
        return refine_pair(fixed, *args, **kwargs)

    monkeypatch.setattr("monai_lm.apps.cohort.refine_pair", broken)
    pairs = lists(namesakes, "s0/t1.nii.gz,s1/t1.nii.gz,a", "s2/t1.nii.gz,s3/t1.nii.gz,b")
    rows, failed = run(pairs, namesakes / "out")
    assert [row["name"] for row in rows] == ["b"]
    assert failed == {"a": "out of memory"}


def test_how_to_refine_is_checked_before_the_work(namesakes, monkeypatch):
    monkeypatch.setattr("monai_lm.apps.cohort.refine_pair", pytest.fail)
    pairs = lists(namesakes, "s0/t1.nii.gz,s1/t1.nii.gz,a")
    with pytest.raises(TypeError, match=r"settings takes the keyword arguments .*, got \['stepp'\]"):
        refine_cohort(pairs, namesakes / "out", report=False, settings={"stepp": 1})
    with pytest.raises(ValueError, match="file_format must be one of"):
        refine_cohort(pairs, namesakes / "out", report=False, file_format="dicom")
    (namesakes / "file").write_text("in the way")
    with pytest.raises(ValueError, match="output_dir must be a folder, got the file"):
        refine_cohort(pairs, namesakes / "file", report=False)


def test_pairs_without_an_affine_are_aligned_first_where_that_is_asked_for(cohort, tmp_path):
    np.savetxt(tmp_path / "own.txt", np.eye(4))
    here = cohort.parent
    pairs = [{"fixed": str(here / "i0.nii.gz"), "moving": str(here / f"i{k}.nii.gz")} for k in (1, 2)]
    pairs[1]["affine"] = str(tmp_path / "own.txt")
    rows, failed = run(pairs, tmp_path / "out", affine="center")
    assert not failed
    found = [json.loads((tmp_path / "out" / row["name"] / "metrics.json").read_text()) for row in rows]
    assert ["alignment" in metrics for metrics in found] == [True, False]
    first = (tmp_path / "out" / rows[0]["name"] / "metrics.json").stat().st_mtime_ns
    assert run(pairs, tmp_path / "out", affine="center")[0] == rows
    assert (tmp_path / "out" / rows[0]["name"] / "metrics.json").stat().st_mtime_ns == first
    with pytest.raises(ValueError, match="affine was 'center', is 'rigid'"):
        run(pairs, tmp_path / "out", affine="rigid")
    with pytest.raises(ValueError, match=r"affine must be one of .* got 'centre'"):
        run(pairs, tmp_path / "out", affine="centre")
