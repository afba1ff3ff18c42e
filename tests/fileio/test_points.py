"""Landmarks from files."""

import numpy as np
import pytest

from monai_lm.fileio import read_points


@pytest.mark.parametrize("header", ["", "x,y,z\n", "# made by hand\n", "\ufeff", "\ufeffx,y,z\n"])
def test_lines_of_numbers_after_a_header_or_not(tmp_path, header):
    (tmp_path / "p.csv").write_text(header + "1.5,-2,3\n\n4,5e-1,-6\n", "utf-8")
    np.testing.assert_array_equal(read_points(tmp_path / "p.csv"), [[1.5, -2, 3], [4, 0.5, -6]])


def test_slicers_points_are_read_in_the_system_they_say(tmp_path):
    header = "# Markups fiducial file version = 4.11\n# CoordinateSystem = {}\n# columns = id,x,y,z,ow\n"
    row = "vtkMRML_0,1.5,-2.0,3.0,0,0,0,1,1,1,0,F-1,,\n"
    lps, ras = [-1.5, 2.0, 3.0], [1.5, -2.0, 3.0]
    for system, expected in (("LPS", lps), ("1", lps), ("RAS", ras), ("0", ras)):
        (tmp_path / "p.fcsv").write_text(header.format(system) + row)
        np.testing.assert_array_equal(read_points(tmp_path / "p.fcsv"), [expected])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.csv", "x,y,z\n1,2,three\n", "must hold points, numbers separated by commas"),
        ("p.csv", "1,2,3\n4,5\n", "must hold points, numbers separated by commas"),
        ("p.csv", "1,2,3,4\n", r"2 or 3 finite coordinates, got shape \(1, 4\)"),
        ("p.csv", "1,2,nan\n1,2,nan\n", "2 or 3 finite coordinates"),
        ("p.csv", "nan,2,3\n1,2,3\n", "2 or 3 finite coordinates"),
        ("p.csv", "1.5.2,2,3\n1,2,3\n", "must hold points, numbers separated by commas"),
        ("p.csv", "", "2 or 3 finite coordinates"),
        ("p.fcsv", "vtkMRML_0,1,2,3\n", "must say its CoordinateSystem, LPS or RAS, got ''"),
    ],
)
def test_what_is_no_points_is_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_points(tmp_path / name)


def test_text_in_another_encoding_is_named(tmp_path):
    (tmp_path / "p.csv").write_bytes("größe,y,z\n1,2,3\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"p\.csv must be text in UTF-8"):
        read_points(tmp_path / "p.csv")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*p\.csv"):
        read_points(tmp_path / "p.csv")
