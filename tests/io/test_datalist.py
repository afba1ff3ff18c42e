"""Lists of subjects and pairs."""

import json
from itertools import permutations

import nibabel as nib
import numpy as np
import pytest

from monai_lm.io.datalist import check_files, draw_pairs, named, read_list, share, split_subjects


def test_a_folder_is_a_list_of_subjects(cohort):
    entries = read_list(cohort)[""]
    assert [e["image"].rsplit("/", 1)[1] for e in entries] == [f"s{i}.nii.gz" for i in range(6)]
    assert all("labels" in e["label"] for e in entries)


def test_a_csv_of_pairs_starts_at_its_own_folder_and_says_the_part(tmp_path):
    (tmp_path / "pairs.csv").write_text(
        "fixed,moving,part,fixed_label\na.nii,b.nii,train,\nc.nii,d.nii,testing,e.nii\n"
    )
    parts = read_list(tmp_path / "pairs.csv")
    assert parts["train"] == [{"fixed": str(tmp_path / "a.nii"), "moving": str(tmp_path / "b.nii")}]
    assert parts["test"][0]["fixed_label"] == str(tmp_path / "e.nii")


def test_a_csv_of_a_spreadsheet_is_read(tmp_path):
    (tmp_path / "pairs.csv").write_text("fixed,moving\na.nii,b.nii\n", "utf-8-sig")
    assert read_list(tmp_path / "pairs.csv")[""][0]["fixed"] == str(tmp_path / "a.nii")


def test_parts_and_json_that_are_wrong_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"data must name parts among .*, got \['trian'\]"):
        read_list([{"image": "a.nii", "part": "trian"}])
    (tmp_path / "list.json").write_text("{")
    with pytest.raises(ValueError, match=r"data must be a JSON file, got .*list\.json"):
        read_list(tmp_path / "list.json")
    with pytest.raises(ValueError, match=r"split must be a JSON file, got .*list\.json"):
        split_subjects([{"image": "a.nii"}], tmp_path / "list.json", 0)


def test_a_monai_datalist_is_read_by_part(tmp_path):
    datalist = {"name": "x", "training": [{"image": "a.nii", "label": "b.nii"}], "validation": ["c.nii"]}
    (tmp_path / "datalist.json").write_text(json.dumps(datalist))
    parts = read_list(tmp_path / "datalist.json", root="/data")
    assert parts == {
        "train": [{"image": "/data/a.nii", "label": "/data/b.nii"}], "validation": [{"image": "/data/c.nii"}],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "data must be a folder, a file"),
        ([{"picture": "a"}], "entry 0 of data must have an image, or fixed and moving"),
        ({"left": []}, "data must have at least one of the parts"),
    ],
)
def test_what_is_no_list_is_refused(source, message):
    with pytest.raises(ValueError, match=message):
        read_list(source)


def _entries(*names):
    return [{"image": f"/d/{name}_{i}.nii.gz", "subject": name} for i, name in enumerate(names)]


def test_all_images_of_a_subject_fall_into_one_part():
    parts = split_subjects(_entries(*"abcdeabcde"), (0.6, 0.2, 0.2), seed=3)
    subjects = {part: {e["subject"] for e in entries} for part, entries in parts.items()}
    assert [len(subjects[p]) for p in ("train", "validation", "test")] == [3, 1, 1]
    assert set.union(*subjects.values()) == set("abcde")
    assert sum(len(entries) for entries in parts.values()) == 10
    assert parts == split_subjects(_entries(*"abcdeabcde"), (0.6, 0.2, 0.2), seed=3)


def test_a_split_reports_every_problem_at_once():
    with pytest.raises(ValueError, match="2 problem") as caught:
        split_subjects(_entries(*"ab"), {"train": ["a", "z"], "val": ["a"]}, 0)
    assert "z: in part train, but there is no image" in str(caught.value)
    assert "a: in two parts, train and validation" in str(caught.value)


@pytest.mark.parametrize(
    ("pairing", "expected"),
    [("all", {(0, 1), (1, 0), (1, 2), (2, 1)}), ("intra", {(0, 2), (2, 0)})],
)
def test_pairs_are_of_different_subjects_or_of_the_same(pairing, expected):
    assert set(draw_pairs(_entries("a", "b", "a"), pairing, None, 0)) == expected


def test_random_pairs_are_seeded_and_different():
    entries = _entries(*"abcdef")
    drawn = draw_pairs(entries, "random", 12, seed=5)
    assert drawn == draw_pairs(entries, "random", 12, seed=5) != draw_pairs(entries, "random", 12, seed=6)
    assert len(set(drawn)) == 12
    assert all(f != m for f, m in drawn)


def test_every_process_has_its_share_of_the_pairs():
    pairs = [{"name": str(i)} for i in range(5)]
    shares = [share(pairs, rank, 3) for rank in range(3)]
    assert [[int(p["name"]) for p in part] for part in shares] == [[0, 3], [1, 4], [2]]
    with pytest.raises(ValueError, match="there must be a pair for each of the 6 processes, got 5 pairs"):
        share(pairs, 0, 6)


def test_namesakes_are_numbered():
    pairs = [{"fixed": "/a/x.nii.gz", "moving": "/a/y.nii"}, {"fixed": "/b/x.nii", "moving": "/b/y.nii"}]
    assert [p["name"] for p in named([*pairs, {**pairs[0], "name": "mine"}])] == ["x__y", "x__y_2", "mine"]


def test_files_are_checked_all_at_once(tmp_path):
    def save(name, shape, affine=None, values=0):
        nib.save(
            nib.Nifti1Image(np.full(shape, values, np.uint8), np.eye(4) if affine is None else affine), tmp_path / name
        )
        return str(tmp_path / name)

    fixed = save("fixed.nii", (4, 5, 6))
    (tmp_path / "broken.nii").write_bytes(b"nothing")
    pairs = [
        {"fixed": fixed, "moving": str(tmp_path / "missing.nii")},
        {"fixed": fixed, "moving": str(tmp_path / "broken.nii")},
        {"fixed": fixed, "moving": save("four.nii", (4, 5, 6, 2))},
        {"fixed": fixed, "moving": save("flipped.nii", (4, 5, 6), np.diag([-1.0, 1, 1, 1]))},
        {"fixed": fixed, "moving": save("coarse.nii", (4, 5, 6), np.diag([2.0, 1, 1, 1]))},
        {"fixed": fixed, "moving": save("short.nii", (4, 5, 5)), "fixed_label": save("seven.nii", (4, 5, 6), values=7)},
        {"fixed": fixed, "moving": fixed, "moving_label": save("small.nii", (4, 5, 3))},
    ]
    pairs.append(pairs[6] | {"moving_label": save("turned.nii", (4, 5, 6), np.diag([-1.0, -1, 1, 1]))})
    with pytest.raises(ValueError, match="data has 9 problem") as caught:
        check_files(pairs, values=(1, 2), same_grid=True)
    lines = str(caught.value).splitlines()[1:]
    reasons = ["no such file", "cannot be read", "one 2D or 3D", "label values must be among [0, 1, 2], got [7.0",
               "orientation LAS", "spacing [2.0, 1.0, 1.0]", "shape (4, 5, 5)", "shape (4, 5, 3)",
               "orientation LPS, but its image has RAS"]  # fmt: skip
    assert all(any(reason in line for line in lines) for reason in reasons)
    check_files(pairs[5:6], values=None, same_grid=False)


def test_an_orientation_is_found_once_a_file_however_many_pairs_it_is_in(cohort, monkeypatch):
    subjects, found, find = read_list(cohort)[""], [], nib.aff2axcodes
    monkeypatch.setattr(nib, "aff2axcodes", lambda affine: found.append(1) or find(affine))
    pairs = [
        {role: subject["image"] for role, subject in zip(("fixed", "moving"), pair, strict=True)}
        | {f"{role}_label": subject["label"] for role, subject in zip(("fixed", "moving"), pair, strict=True)}
        for pair in permutations(subjects, 2)
    ]
    check_files(pairs, values=(1, 2), same_grid=True)
    assert (len(pairs), len(found)) == (30, 12)


def test_a_name_that_is_given_is_kept_and_given_once_only():
    pair = {"fixed": "x.nii", "moving": "y.nii"}
    assert [p["name"] for p in named([pair, {**pair, "name": "x__y"}])] == ["x__y_2", "x__y"]
    with pytest.raises(ValueError, match=r"pairs has 1 problem\(s\):\n  'a': the name of 2 pairs"):
        named([{**pair, "name": "a"}, pair, {**pair, "name": "a"}])


@pytest.mark.parametrize(("separator", "suffix"), [(",", "csv"), (";", "csv"), ("\t", "csv"), ("\t", "tsv")])
def test_a_table_may_be_separated_as_spreadsheets_do(tmp_path, separator, suffix):
    rows = [["fixed", "moving", "name"], ["a.nii", " b.nii", "1,5 T"], ["c.nii", "d.nii", ""]]
    file = tmp_path / f"pairs.{suffix}"
    quoted = [[f'"{v}"' if separator in v else v for v in row] for row in rows]
    file.write_text("".join(separator.join(row) + "\r\n" for row in quoted))
    first, second = read_list(file)[""]
    assert first == {"fixed": str(tmp_path / "a.nii"), "moving": str(tmp_path / "b.nii"), "name": "1,5 T"}
    assert second == {"fixed": str(tmp_path / "c.nii"), "moving": str(tmp_path / "d.nii")}


def test_more_values_than_columns_are_refused(tmp_path):
    file = tmp_path / "pairs.csv"
    file.write_text("\nfixed,moving\na.nii,b.nii\n\na.nii,b.nii,c.nii\n")
    with pytest.raises(ValueError, match=r"as many values as columns in every line, got more in lines \[5\]"):
        read_list(file)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ("a.nii,b.nii", r"name columns in its first line, image or fixed and moving, got \['a.nii', 'b.nii'\]"),
        ("Fixed,Moving", r"got \['Fixed', 'Moving'\]"),
        ("fixed,moving,fixed", r"name every column once, got \['fixed'\] more than once"),
    ],
)
def test_columns_without_names_or_with_one_name_are_refused(tmp_path, header, reason):
    file = tmp_path / "pairs.csv"
    file.write_text(header + "\nc.nii,d.nii\n")
    with pytest.raises(ValueError, match=reason):
        read_list(file)


def test_lines_may_end_as_on_any_system_and_values_may_have_breaks(tmp_path):
    file = tmp_path / "pairs.csv"
    for end in ("\n", "\r\n", "\r"):
        lines = ["", "fixed,moving,name", "a.nii,b.nii,one", "", f'c.nii,d.nii,"x{end}y\u2028z"']
        file.write_bytes(end.join(lines).encode())
        first, second = read_list(file)[""]
        assert first == {"fixed": str(tmp_path / "a.nii"), "moving": str(tmp_path / "b.nii"), "name": "one"}
        assert second["name"] == f"x{end}y\u2028z"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'fixed,moving\na.nii,"b.nii\n', r"pairs.csv must be a table, got in line 2: unexpected end of data"),
        ("fixed,moving\n".encode("utf-16"), r"pairs.csv must be text in UTF-8, got 'utf-8' codec can't decode"),
    ],
)
def test_what_is_no_table_is_named(tmp_path, content, reason):
    file = tmp_path / "pairs.csv"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        read_list(file)
