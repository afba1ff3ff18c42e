"""Affines from and to files, as one matrix: RAS millimetres, from points of the fixed to points of the moving image.

ITK's transforms (also as ANTs, SimpleITK and Slicer write them) map points of the fixed image to points of the moving
image too, in LPS millimetres: ``y = M (x − c) + c + t`` with a centre ``c``. A transform of parts applies the last part
first. Tested with SimpleITK and ANTs.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

from monai_lm.fields.space import check_affine
from monai_lm.io.content import check_file, look_of
from monai_lm.io.itk_hdf5 import is_hdf5, read_hdf5_parts
from monai_lm.io.itk_parts import Part, text_parts
from monai_lm.io.itk_transform import linear_matrix
from monai_lm.io.lta import read_lta
from monai_lm.io.nifti import replacing

__all__ = ["read_affine", "write_affine"]

_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_COMPOSITE = "CompositeTransform_"


def read_affine(path: str | Path, dimensions: int | None = None) -> np.ndarray:
    """Read a linear transform.

    Args:
        path: ITK's binary ``.mat`` (MATLAB level 4, as ANTs writes), its text (``.txt``, ``.tfm``) or ``.h5`` (it and
            transforms with scales or skews need SimpleITK), FreeSurfer's ``.lta`` (needs nitransforms) whose
            destination is the fixed image, or four rows of four numbers, which are taken as they are: RAS millimetres,
            from fixed to moving (as greedy writes). But for LTA the content decides, not the suffix.
            FSL's FLIRT writes four rows of four numbers too that mean something else (FSL's millimetres, from moving to
            fixed): they cannot be told apart.
        dimensions: of the images: 3 refuses transforms of a plane, 2 those that lead out of it (but for a shift, which
            is of no account there); default: all are read.

    Returns:
        ``(4, 4)`` float64 in RAS millimetres, from points of the fixed to points of the moving image; of a 2D transform
        with the third axis left as it is.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: none of these formats, a transform that is not linear, one of other ``dimensions``, or one
            that is singular; or the package that it needs is missing.
    """
    path = Path(path)
    check_file(path)
    content = path.read_bytes()
    if not content:
        raise ValueError(f"{path} must hold a linear transform, got an empty file")
    if is_hdf5(path):
        return _checked(path, *_by_simpleitk(path, read_hdf5_parts(path), dimensions))
    if path.suffix.lower() == ".lta":
        return _checked(path, read_lta(path), dimensions)
    if content.startswith(b"#Insight Transform File"):
        parts = text_parts(path, content.decode("utf-8", "replace"))
    elif (rows := _four_by_four(content)) is not None:
        return _checked(path, rows, dimensions)
    else:
        parts = _matlab_parts(path, content)
    if dimensions == 3 and (planar := [name for name, _, _ in parts if name.endswith("_2_2")]):
        raise ValueError(f"{path} must hold a transform of points in space, as the images are, got {planar[0]!r}")
    if any(_kind(name) not in _KINDS for name, _, _ in parts if not name.startswith(_COMPOSITE)):
        if len(parts) > 1 and not parts[0][0].startswith(_COMPOSITE):
            raise ValueError(f"{path} must hold one transform or one composite, got {[name for name, _, _ in parts]}")
        return _checked(path, *_by_simpleitk(path, parts, dimensions))
    lps = _combined(path, parts)
    return _checked(path, _LPS @ lps @ _LPS, dimensions)


def _by_simpleitk(path: Path, parts: list[Part], dimensions: int | None) -> tuple[np.ndarray, int | None]:
    """The matrix in RAS millimetres of what is not read here, and of which dimensions the images are."""
    matrix, n = linear_matrix(path, parts)
    if dimensions == 3 and n == 2:
        raise ValueError(f"{path} must hold a transform of points in space, as the images are, got one of a plane")
    return _LPS @ matrix @ _LPS, dimensions


def write_affine(path: str | Path, matrix: np.ndarray, dimensions: int = 3) -> None:
    """Write a linear transform as ITK's text, which ANTs, SimpleITK and Slicer read (``.txt``, ``.tfm``).

    Args:
        path: where to.
        matrix: ``(4, 4)`` in RAS millimetres, from points of the fixed to points of the moving image.
        dimensions: 2 writes a transform of the plane of x and y.

    Raises:
        ValueError: a matrix that is no invertible 4×4.
    """
    lps, n = _LPS @ check_affine("matrix", matrix) @ _LPS, dimensions
    numbers = " ".join(repr(float(value)) for value in [*lps[:n, :n].ravel(), *lps[:n, 3]])
    with replacing(Path(path)) as temporary:
        temporary.write_text(
            f"#Insight Transform File V1.0\n#Transform 0\nTransform: AffineTransform_double_{n}_{n}\n"
            f"Parameters: {numbers}\nFixedParameters:{' 0' * n}\n"
        )


def _checked(path: Path, matrix: np.ndarray, dimensions: int | None) -> np.ndarray:
    """A matrix ``(4, 4)`` in RAS millimetres that can be inverted and, for images of a plane, stays in it."""
    matrix = check_affine(f"the matrix in {path}", matrix)
    if dimensions == 2 and max(np.abs(matrix[2, :2]).max(), np.abs(matrix[:2, 2]).max()) > 1e-6:
        raise ValueError(f"{path} must keep to the plane of the images, got the matrix\n{matrix}")
    return matrix


def _four_by_four(content: bytes) -> np.ndarray | None:
    """Sixteen numbers in four lines, or none."""
    try:
        lines = [line.split("#")[0].replace(",", " ").split() for line in content.decode("ascii").splitlines()]
        rows = [[float(word) for word in line] for line in lines if line]
    except (UnicodeDecodeError, ValueError):
        return None
    return np.array(rows) if [len(row) for row in rows] == [4] * 4 else None


# --- the two containers -----------------------------------------------------------------------------------------------


def _matlab_parts(path: Path, content: bytes) -> list[Part]:
    """Variables of a MATLAB level 4 file, in pairs: the transform's parameters under its name, then ``fixed``."""
    variables: list[tuple[str, np.ndarray]] = []
    at = 0
    while at < len(content):
        try:
            name, values, at = _matlab_variable(content, at)
        except (struct.error, ValueError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path} must be ITK's .mat (MATLAB level 4), ITK's text or four rows of four numbers, "
                f"got {look_of(path)}"
            ) from error
        variables.append((name, values))
    names = [name for name, _ in variables]
    if not names or len(names) % 2 or set(names[1::2]) != {"fixed"}:
        raise ValueError(f"{path} must hold a transform and its variable 'fixed', got the variables {names}")
    return [(variables[i][0], variables[i][1], variables[i + 1][1]) for i in range(0, len(names), 2)]


def _matlab_variable(content: bytes, at: int) -> tuple[str, np.ndarray, int]:
    """Name and values of the real, full matrix at a position, and the position behind it."""
    order = "<" if struct.unpack_from("<i", content, at)[0] in range(5000) else ">"
    kind, rows, columns, imaginary, length = struct.unpack_from(f"{order}5i", content, at)
    machine, precision, storage = kind // 1000, kind // 10 % 10, kind % 10
    if (
        machine not in (0, 1)
        or precision > 1
        or storage
        or imaginary
        or not 0 < length <= 256
        or min(rows, columns) < 0
    ):
        raise ValueError("no matrix of real floating point numbers")
    at += 20
    name = content[at : at + length].rstrip(b"\0").decode("ascii")
    dtype = np.dtype(f"{'<' if machine == 0 else '>'}f{4 if precision else 8}")
    at += length
    size = rows * columns * dtype.itemsize
    if at + size > len(content):
        raise ValueError(f"{name} is cut off")
    return name, np.frombuffer(content, dtype, rows * columns, at).astype(np.float64), at + size


# --- what the parameters mean -----------------------------------------------------------------------------------------


def _combined(path: Path, parts: list[Part]) -> np.ndarray:
    """The LPS matrix of all parts, the last applied first."""
    composite = bool(parts) and parts[0][0].startswith(_COMPOSITE)
    parts = parts[1:] if composite else parts
    if not parts or (len(parts) > 1 and not composite):
        raise ValueError(f"{path} must hold one transform or one composite transform, got {len(parts)} transforms")
    out = np.eye(4)
    for part in parts:
        out = out @ _matrix(path, *part)
    return out


def _matrix(path: Path, name: str, parameters: np.ndarray, fixed: np.ndarray) -> np.ndarray:
    """``M (x − c) + c + t`` of one part, in its own frame (LPS)."""
    _, n = kind = _kind(name)
    count, parse = _KINDS[kind]
    centre = np.zeros(n) if name.startswith("Translation") and not len(fixed) else fixed[:n]
    most = n + (name.startswith("Euler3D"))  # the order of its angles
    if (
        len(parameters) != count
        or len(centre) != n
        or len(fixed) > most
        or not np.isfinite([*parameters, *fixed]).all()
    ):
        raise ValueError(
            f"{path} must have {count} finite parameters and a centre of {n} for {name}, "
            f"got {len(parameters)} and {len(fixed)}: {parameters.tolist()}, {fixed.tolist()}"
        )
    linear, translation = parse(parameters, fixed)
    out, rows = np.eye(4), [*range(n)]
    out[np.ix_(rows, rows)] = linear
    out[rows, 3] = translation + centre - linear @ centre
    return out


def _kind(name: str) -> tuple[str, int]:
    """Class and dimension of one of ITK's transforms by the name in its file, of any other ``("", 0)``."""
    match = re.fullmatch(r"(\w+?)_(?:double|float)_([23])_\2", name)
    return (match[1], int(match[2])) if match else ("", 0)


def _affine(n: int) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    return lambda p, fixed: (p[: n * n].reshape(n, n), p[n * n :])  # noqa: ARG005


def _translation(parameters: np.ndarray, fixed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # noqa: ARG001
    return np.eye(len(parameters)), parameters


def _rotation(axis: int, angle: float) -> np.ndarray:
    out = np.eye(3)
    a, b = (axis + 1) % 3, (axis + 2) % 3
    out[a, a] = out[b, b] = np.cos(angle)
    out[b, a] = np.sin(angle)
    out[a, b] = -out[b, a]
    return out


def _euler(p: np.ndarray, fixed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Angles about x, y and z: about z after x after y, or z after y after x where the fourth fixed parameter says."""
    x, y, z = (_rotation(axis, p[axis]) for axis in range(3))
    return (z @ y @ x if len(fixed) > 3 and fixed[3] else z @ x @ y), p[3:]


def _versor(p: np.ndarray, fixed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # noqa: ARG001
    """The vector part of a unit quaternion, a translation and, in a similarity, a scale."""
    v = p[:3]
    w = np.sqrt(max(0.0, 1 - v @ v))
    cross = np.array([[0, -v[2], v[1]], [v[2], 0, -v[0]], [-v[1], v[0], 0]])
    return (p[6] if len(p) > 6 else 1.0) * (np.eye(3) + 2 * w * cross + 2 * cross @ cross), p[3:6]


def _plane_rotation(p: np.ndarray, fixed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # noqa: ARG001
    """In 2D, an angle and a translation, in a similarity with a scale before them."""
    scale, angle = (p[0], p[1]) if len(p) == 4 else (1.0, p[0])
    return scale * _rotation(2, angle)[:2, :2], p[-2:]


_KINDS: dict[tuple[str, int], tuple[int, Callable[..., tuple[np.ndarray, np.ndarray]]]] = {
    **{(name, n): (n * n + n, _affine(n)) for name in ("AffineTransform", "MatrixOffsetTransformBase") for n in (2, 3)},
    **{("TranslationTransform", n): (n, _translation) for n in (2, 3)},
    ("Euler3DTransform", 3): (6, _euler),
    ("VersorRigid3DTransform", 3): (6, _versor),
    ("Similarity3DTransform", 3): (7, _versor),
    ("Euler2DTransform", 2): (3, _plane_rotation),
    ("Rigid2DTransform", 2): (3, _plane_rotation),
    ("Similarity2DTransform", 2): (4, _plane_rotation),
}
"""By name and dimension: how many parameters, and what linear map and translation they mean."""
