"""Initial affines: where points go, as SimpleITK, which wrote the files, says."""

import struct
from importlib.util import find_spec

import numpy as np
import pytest

from monai_lm.io import read_affine, write_affine

sitk = pytest.importorskip("SimpleITK")

H5 = pytest.param(".h5", marks=pytest.mark.skipif(find_spec("pyfive") is None, reason="pyfive is not installed"))
MATRIX = np.array([[1.1, 0.1, -0.05], [-0.2, 0.9, 0.02], [0.03, 0.04, 1.2]])

VERSOR = (0.1, -0.2, 0.3, np.sqrt(0.86))


def test_parameters_of_elastix_are_told(tmp_path):
    (tmp_path / "TransformParameters.0.txt").write_text('(Transform "AffineTransform")\n(TransformParameters 1 0)\n')
    with pytest.raises(
        ValueError, match=r"TransformParameters.0.txt must be .*, got elastix's parameters, of which transf"
    ):
        read_affine(tmp_path / "TransformParameters.0.txt")


def affine(n: int):
    transform = sitk.AffineTransform(n)
    transform.SetMatrix(MATRIX[:n, :n].ravel().tolist())
    transform.SetTranslation((3.0, -4.0, 5.0)[:n])
    transform.SetCenter((10.0, 20.0, -30.0)[:n])
    return transform


def euler(zyx: bool):
    transform = sitk.Euler3DTransform((1.0, 2.0, 3.0), 0.1, -0.2, 0.3, (4.0, 5.0, 6.0))
    transform.SetComputeZYX(zyx)
    return transform


def composite():
    transform = sitk.CompositeTransform(3)
    for part in (affine(3), sitk.TranslationTransform(3, (1.0, 2.0, 3.0)), euler(False)):
        transform.AddTransform(part)
    return transform


TRANSFORMS = {
    "affine": affine(3),
    "affine 2D": affine(2),
    "translation": sitk.TranslationTransform(3, (1.0, -2.0, 3.0)),
    "translation 2D": sitk.TranslationTransform(2, (1.0, -2.0)),
    "Euler": euler(False),
    "Euler ZYX": euler(True),
    "versor": sitk.VersorRigid3DTransform(VERSOR, (1.0, 2.0, 3.0), (4.0, 5.0, 6.0)),
    "similarity": sitk.Similarity3DTransform(1.3, VERSOR, (1.0, 2.0, 3.0), (4.0, 5.0, 6.0)),
    "scale": sitk.ScaleTransform(3, (1.1, 0.9, 1.2)),
    "scale and versor": sitk.ScaleVersor3DTransform((1.1, 0.9, 1.2), VERSOR, (1.0, 2.0, 3.0), (4.0, 5.0, 6.0)),
    "Euler 2D": sitk.Euler2DTransform((1.0, 2.0), 0.4, (3.0, -4.0)),
    "similarity 2D": sitk.Similarity2DTransform(0.8, 0.4, (3.0, -4.0), (1.0, 2.0)),
}


def assert_moves_points_as(matrix: np.ndarray, transform) -> None:
    n = transform.GetDimension()
    flip = np.array([-1.0, -1.0, 1.0])
    for ras in np.random.default_rng(0).uniform(-100, 100, (5, 3)):
        point = (flip * ras)[:n]
        theirs = flip[:n] * np.array(transform.TransformPoint(point.tolist()))
        ours = (matrix @ [*ras, 1.0])[:3]
        np.testing.assert_allclose(ours[:n], theirs, atol=1e-4)
        if n == 2:
            assert ours[2] == ras[2]


@pytest.mark.parametrize("suffix", [".mat", ".txt", ".tfm", H5])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_points_go_where_itk_moves_them(tmp_path, name, suffix):
    path = tmp_path / f"x{suffix}"
    sitk.WriteTransform(TRANSFORMS[name], str(path))
    assert_moves_points_as(read_affine(path), TRANSFORMS[name])


@pytest.mark.parametrize("suffix", [".txt", ".tfm", H5])
def test_of_several_parts_the_last_is_applied_first(tmp_path, suffix):
    sitk.WriteTransform(composite(), str(tmp_path / f"x{suffix}"))
    assert_moves_points_as(read_affine(str(tmp_path / f"x{suffix}")), composite())


def test_a_known_shift_changes_sign_in_x_and_y(tmp_path):
    sitk.WriteTransform(sitk.TranslationTransform(3, (1.0, 2.0, 3.0)), str(tmp_path / "x.mat"))
    np.testing.assert_array_equal(read_affine(tmp_path / "x.mat")[:3, 3], [-1, -2, 3])


def matlab(name: str, values: np.ndarray, order: str = "<", precision: int = 0) -> bytes:
    """A variable of a MATLAB level 4 file, as the format's description has it."""
    encoded = name.encode() + b"\0"
    head = struct.pack(f"{order}5i", (1000 if order == ">" else 0) + 10 * precision, len(values), 1, 0, len(encoded))
    return head + encoded + values.astype(f"{order}f{4 if precision else 8}").tobytes()


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("precision", "kind"), [(0, "double"), (1, "float")])
def test_both_byte_orders_and_precisions(tmp_path, order, precision, kind):
    parameters, centre = np.array([*MATRIX.ravel(), 3.0, -4.0, 5.0]), np.array([10.0, 20.0, -30.0])
    name = f"AffineTransform_{kind}_3_3"
    content = matlab(name, parameters, order, precision) + matlab("fixed", centre, order, precision)
    (tmp_path / "x.mat").write_bytes(content)
    assert_moves_points_as(read_affine(tmp_path / "x.mat"), affine(3))


def test_a_plain_matrix_is_taken_as_it_is(tmp_path):
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = MATRIX, (1.0, -2.0, 3e-1)
    np.savetxt(tmp_path / "x.mat", matrix)
    np.testing.assert_allclose(read_affine(tmp_path / "x.mat"), matrix)
    np.savetxt(tmp_path / "x.txt", matrix, delimiter=",", header="RAS")
    np.testing.assert_allclose(read_affine(tmp_path / "x.txt"), matrix)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", [b"", b"\x89HDF\r\n\x1a\n" + bytes(100), b"a letter", b"1 2 3\n4 5 6\n", b"\xff" * 40]
)
def test_other_contents_are_refused(tmp_path, content):
    (tmp_path / "x.mat").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"x.mat must (be ITK's .mat|be a whole ITK|be read with py|hold a linear .* an empty)"
    ):
        read_affine(tmp_path / "x.mat")


@pytest.mark.parametrize("kept", [10, 30, 60, 150, 160, 185])
def test_a_mat_file_that_was_cut_off_is_refused(tmp_path, kept):
    sitk.WriteTransform(affine(3), str(tmp_path / "x.mat"))
    whole = (tmp_path / "x.mat").read_bytes()
    assert kept < len(whole)
    (tmp_path / "x.mat").write_bytes(whole[:kept])
    with pytest.raises(ValueError, match=r"x.mat must"):
        read_affine(tmp_path / "x.mat")


HEAD = "#Insight Transform File V1.0\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD, "must hold one transform or one composite transform, got 0 transforms"),
        (
            HEAD + "Transform: BSplineTransform_double_3_3\nParameters: 1 2\nFixedParameters: 0 0 0\n",
            "must say where its grid lies in 18 numbers, got",
        ),
        (
            HEAD + "Transform: AffineTransform_double_3_3\nParameters: 1 0 0 0 1 0\nFixedParameters: 0 0 0\n",
            "must have 12 finite parameters and a centre of 3 for AffineTransform_double_3_3, got 6 and 3",
        ),
        (
            HEAD + "Transform: TranslationTransform_double_3_3\nParameters: 1 nan 0\nFixedParameters:\n",
            "must have 3 finite parameters",
        ),
        (
            HEAD + "Transform: TranslationTransform_double_3_3\nParameters: 1 2_0 3\nFixedParameters:\n",
            "must have numbers as Parameters, got '1 2_0 3'",
        ),
        (
            HEAD + "Transform: TranslationTransform_double_3_3\nParameters: 1 two 3\nFixedParameters:\n",
            "must have numbers as Parameters, got '1 two 3'",
        ),
        (
            HEAD + "Transform: AffineTransform_double_2_2\nParameters: 1 1 1 1 0 0\nFixedParameters: 0 0\n",
            r"the matrix in .*x.txt must be an invertible \(4, 4\) matrix",
        ),
        (
            HEAD + 2 * "Transform: TranslationTransform_double_3_3\nParameters: 1 0 0\nFixedParameters:\n",
            "must hold one transform or one composite transform, got 2 transforms",
        ),
        ("1 0 0 0\n0 1 0 0\n0 0 0 0\n0 0 0 1\n", r"the matrix in .*x.txt must be an invertible \(4, 4\) matrix"),
    ],
)
def test_texts_that_hold_no_linear_transform_are_refused(tmp_path, text, message):
    (tmp_path / "x.txt").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_affine(tmp_path / "x.txt")
    assert "x.txt" in str(error.value)


@pytest.mark.parametrize("suffix", ["mat", "tfm"])
def test_transforms_fit_the_images_dimensions(tmp_path, suffix):
    flat, shifted, tilted = (str(tmp_path / f"{name}.{suffix}") for name in ("flat", "shifted", "tilted"))
    sitk.WriteTransform(affine(2), flat)
    sitk.WriteTransform(sitk.TranslationTransform(3, (1.0, -2.0, 5.0)), shifted)
    sitk.WriteTransform(sitk.Euler3DTransform((0.0, 0.0, 0.0), 0.3, 0.0, 0.0), tilted)
    with pytest.raises(ValueError, match=r"must hold a transform of points in space, .* got 'AffineTransform_"):
        read_affine(flat, 3)
    with pytest.raises(ValueError, match="must keep to the plane of the images"):
        read_affine(tilted, 2)
    for path, dimensions in ((flat, 2), (shifted, 2), (shifted, 3), (tilted, 3)):
        np.testing.assert_array_equal(read_affine(path, dimensions), read_affine(path))


def test_an_absent_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*x.mat"):
        read_affine(tmp_path / "x.mat")


@pytest.mark.parametrize("n", [2, 3])
def test_what_is_written_is_what_itk_and_this_package_read(tmp_path, n):
    matrix = np.eye(4)
    matrix[:n, :n], matrix[:n, 3] = MATRIX[:n, :n], (3.0, -4.0, 5.0)[:n]
    write_affine(tmp_path / "affine.txt", matrix, n)
    np.testing.assert_allclose(read_affine(tmp_path / "affine.txt", n), matrix, atol=1e-12)
    lps = np.array([-1.0, -1.0, 1.0])[:n]
    point = np.array([7.0, 8.0, -9.0])[:n]
    moved = np.array(sitk.ReadTransform(str(tmp_path / "affine.txt")).TransformPoint((lps * point).tolist()))
    np.testing.assert_allclose(lps * moved, matrix[:n, :n] @ point + matrix[:n, 3], atol=1e-9)
