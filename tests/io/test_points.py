"""Landmarks from files."""

import json

import numpy as np
import pytest

from monai_lm.io import read_points

VTK = """# vtk DataFile Version 5.1
vtk output SPACE=LPS
ASCII
DATASET POLYDATA
POINTS 2 float
1.5 -2 3 4
5 -6
VERTICES 2 4
1 0 1 1
"""


@pytest.mark.parametrize("header", ["", "x,y,z\n", "# made by hand\n", "\ufeff", "\ufeffx,y,z\n"])
def test_lines_of_numbers_after_a_header_or_not(tmp_path, header):
    (tmp_path / "p.csv").write_text(header + "1.5,-2,3\n\n4,5e-1,-6\n", "utf-8")
    np.testing.assert_array_equal(read_points(tmp_path / "p.csv"), [[1.5, -2, 3], [4, 0.5, -6]])


def test_ants_points_are_in_lps(tmp_path):
    (tmp_path / "p.csv").write_text("x,y,z,t,label\n1.5,-2,3,0,7\n4,5,-6,0,8\n")
    np.testing.assert_array_equal(read_points(tmp_path / "p.csv"), [[-1.5, 2, 3], [-4, -5, -6]])


@pytest.mark.parametrize("header", ["l,p,s", "L, P, S", "x_lps,y_lps,z_lps", '"x (LPS)","y (LPS)","z (LPS)"'])
def test_a_header_that_says_lps_is_obeyed(tmp_path, header):
    (tmp_path / "p.csv").write_text(f"{header}\n1.5,-2,3\n4,5,-6\n")
    np.testing.assert_array_equal(read_points(tmp_path / "p.csv"), [[-1.5, 2, 3], [-4, -5, -6]])


def test_quoted_headers_of_ants_are_its_too(tmp_path):
    (tmp_path / "p.csv").write_text('"x","y","z","t"\n1.5,-2,3,0\n')
    np.testing.assert_array_equal(read_points(tmp_path / "p.csv"), [[-1.5, 2, 3]])


@pytest.mark.parametrize("header", ["i,j,k", "id,i,j,k", "voxel_x,voxel_y,voxel_z", "x_index,y_index"])
def test_points_in_voxels_are_refused(tmp_path, header):
    (tmp_path / "p.csv").write_text(f"{header}\n1,2,3\n")
    with pytest.raises(ValueError, match=r"p.csv must hold points in millimetres, got the header .* of voxels"):
        read_points(tmp_path / "p.csv")


@pytest.mark.parametrize(
    "text",
    [
        "id,x,y,z\n7,1.5,-2,3\n8,4,0.5,-6\n",
        "label;y;x;z\nright;-2;1.5;3\nleft;0.5;4;-6\n",
        "x (mm),y (mm),z (mm),index\n1.5,-2,3,7\n4,0.5,-6,8\n",
        '"tip","1.5","-2","3"\n"base, left","4","0.5","-6"\n',
        "1.5,-2,3,tip,\n4,0.5,-6,base,\n",
        "x;y;z\n1,5;-2;3\n4;0,5;-6\n",
        "1,5;-2,0;3,0\n4,0;5e-1;-6,0\n",
        "x\ty\tz\r\n1.5\t-2\t3\r\n4\t0.5\t-6\r\n",
        "1,5\t-2\t3\n4\t0,5\t-6\n",
        "1.5 -2  3\n 4 0.5 -6\n",
        "# x_ras,y_ras,z_ras\n1.5,-2,3\n4,0.5,-6\n",
        "x_ras,y_ras,z_ras,mass\n1.5,-2,3\n4,0.5,-6,\n",
    ],
)
def test_columns_beside_the_coordinates_other_separators_and_decimal_commas(tmp_path, text):
    np.testing.assert_array_equal(_read(tmp_path / "p.csv", text), [[1.5, -2, 3], [4, 0.5, -6]])


def _read(path, text):
    path.write_text(text)
    return read_points(path)


@pytest.mark.parametrize(("name", "sign"), [("lps", -1), ("ras", 1)])
@pytest.mark.parametrize("header", ["x_{0} y_{0} z_{0}", "# x_{0} y_{0} z_{0}", "# points, {1}", "x_{0}\ty_{0}\tz_{0}"])
def test_points_in_text_are_read_where_it_says_their_system(tmp_path, header, name, sign):
    between = "\t" if "\t" in header else " "
    text = f"{header.format(name, name.upper())}\n1.5{between}-2{between}3\n"
    np.testing.assert_array_equal(_read(tmp_path / "p.txt", text), [[sign * 1.5, sign * -2, 3]])


@pytest.mark.parametrize("text", ["12 40 7\n13 41 8\n", "12\t40\t7\n", "x y z\n12 40 7\n", "12,40,7\n"])
def test_points_in_text_that_may_be_voxels_are_refused_with_the_way_out(tmp_path, text):
    first = " ".join(text.split("\n")[0].replace(",", " ").split())
    message = f"of which system its millimetres are, as 'x_ras y_ras z_ras' .*, got '{first}'; voxels, as DIR-Lab's"
    with pytest.raises(ValueError, match=message):
        _read(tmp_path / "p.txt", text)


@pytest.mark.parametrize("status", ["undefined", "missing", "preview"])
def test_points_of_slicer_that_are_not_placed_are_refused(tmp_path, status):
    points = [{"position": [1, 2, 3], "positionStatus": "defined"}, {"position": [0, 0, 0], "positionStatus": status}]
    content = {"markups": [{"coordinateSystem": "RAS", "controlPoints": points}]}
    (tmp_path / "p.mrk.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"p.mrk.json must hold points that are placed, got points \[1\], from 0"):
        read_points(tmp_path / "p.mrk.json")
    del points[1]
    (tmp_path / "p.mrk.json").write_text(json.dumps(content))
    np.testing.assert_array_equal(read_points(tmp_path / "p.mrk.json"), [[1, 2, 3]])


def test_slicers_points_are_read_in_the_system_they_say(tmp_path):
    header = "# Markups fiducial file version = 4.11\n# CoordinateSystem = {}\n# columns = id,x,y,z,ow\n"
    row = "vtkMRML_0,1.5,-2.0,3.0,0,0,0,1,1,1,0,F-1,,\n"
    lps, ras = [-1.5, 2.0, 3.0], [1.5, -2.0, 3.0]
    for system, expected in (("LPS", lps), ("1", lps), ("RAS", ras), ("0", ras)):
        (tmp_path / "p.fcsv").write_text(header.format(system) + row)
        np.testing.assert_array_equal(read_points(tmp_path / "p.fcsv"), [expected])


@pytest.mark.parametrize(("system", "sign"), [("LPS", -1), ("RAS", 1)])
def test_slicers_markups_are_read_in_the_system_they_say(tmp_path, system, sign):
    points = [{"id": "1", "position": [1.5, -2.0, 3.0]}, {"id": "2", "position": [4.0, 5.0, -6.0]}]
    markup = {"markups": [{"type": "Fiducial", "coordinateSystem": system, "controlPoints": points}]}
    (tmp_path / "p.mrk.json").write_text(json.dumps(markup))
    expected = [[sign * 1.5, sign * -2.0, 3.0], [sign * 4.0, sign * 5.0, -6.0]]
    np.testing.assert_array_equal(read_points(tmp_path / "p.mrk.json"), expected)


@pytest.mark.parametrize(("system", "sign"), [("LPS", -1), ("RAS", 1)])
def test_points_of_vtk_files_may_stand_in_lines_of_any_length(tmp_path, system, sign):
    (tmp_path / "p.vtk").write_text(VTK.replace("LPS", system))
    expected = [[sign * 1.5, sign * -2.0, 3.0], [sign * 4.0, sign * 5.0, -6.0]]
    np.testing.assert_array_equal(read_points(tmp_path / "p.vtk"), expected)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.csv", "x,y,z\n1,2,three\n", "must hold points, numbers in rows of one length"),
        ("p.csv", "1,2,3\n4,5\n", "must hold points, numbers in rows of one length"),
        (
            "p.csv",
            "1,2,3,4\n",
            "points of 2 or 3 coordinates, or name them in a header, as id,x,y,z, got 4 columns; numbers",
        ),
        ("p.csv", "7,1,2,3\n8,1,2,3\n", "or name them in a header, as id,x,y,z, got 4 columns; numbers with a decimal"),
        ("p.csv", "a,b,c,d\n7,1,2,3\n", "got 4 columns under the header 'a,b,c,d'"),
        ("p.csv", "1,5,2,5,3,5\n", "got 6 columns; numbers with a decimal comma need semicolons or tabs between them"),
        ("p.csv", "x,y,z\n1,5,2,5,3,5\n", r"columns that its header names, 'x,y,z', got more in the points \[0\]"),
        ("p.csv", "x;y;z\n1.234,5;2;3\n", "must hold points, numbers in rows of one length"),
        ("p.csv", "x_ras,y_ras,x,y\n1,2,3,4\n", "must be in one coordinate system, got the columns 'xras,yras,x,y'"),
        ("p.csv", "x,y,x\n1,2,3\n", "must name every coordinate once"),
        ("p.csv", "1,2,nan\n1,2,nan\n", r"finite points, got NaN or infinite coordinates in points \[0, 1\], from 0"),
        ("p.csv", "nan,2,3\n1,2,3\n", r"finite points, .* in points \[0\], from 0"),
        ("p.csv", "1.5.2,2,3\n1,2,3\n", "must hold points, numbers in rows of one length"),
        ("p.csv", "", "must hold points, got none"),
        ("p.mrk.json", "{}", r"must be Slicer's markups, a list .*, got JSON of \[\] \(KeyError: 'markups'\)"),
        ("p.mrk.json", "[1", "must be Slicer's markups in JSON, got no JSON"),
        ("p.mrk.json", '{"markups": []}', "must be Slicer's markups"),
        ("p.vtk", VTK.replace("ASCII", "BINARY"), "must be a legacy VTK file in ASCII with POINTS"),
        ("p.vtk", VTK.replace("SPACE=LPS", "vtk output"), "must say its coordinate system, LPS or RAS, got ''"),
        ("p.vtk", VTK.replace("POINTS 2", "POINTS 3"), "must hold points, numbers in rows of one length"),
        ("p.fcsv", "vtkMRML_0,1,2,3\n", "must say its coordinate system, LPS or RAS, got ''"),
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
