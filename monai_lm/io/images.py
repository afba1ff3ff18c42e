"""Images, fields and pairs from files, checked, with where they lie."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monai_lm.fields.space import Grid, fixed_to_moving, from_space, out_of_plane, share_inside, to_voxel
from monai_lm.io import read_affine, read_ddf, read_points
from monai_lm.io.nifti import open_nifti
from monai_lm.io.volumes import load_volume, says_edges
from monai_lm.similarity.weighted import continued
from monai_lm.solver.between import Between
from monai_lm.solver.checks import check_shown, checked_mask
from monai_lm.solver.lesion import outside

__all__ = ["Field", "Image", "Pair", "Probabilities", "load_pair", "load_points", "unmeasured"]


class Image:
    """A 2D or 3D image or label map from a file.

    Args:
        path: NIfTI, MGH, MetaImage or NRRD file of one volume, or a picture. A volume of one voxel along one axis,
            whichever, is an image in 2D of the other two.
        label: it must hold labels, whole numbers of at least 0.
        finite: it must be finite.

    Attributes:
        path: where it came from.
        data: ``(1, 1, *S)`` float32; of labels int32, or int64 for labels from 2³¹ on.
        grid: voxel counts and voxel-to-RAS affine; in 2D the axis that the image lacks comes last in that.
        is_label: whether it holds labels.
        is_measured: whether the file says how long the edges of a voxel are.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is none of these, is cut off, is not finite, holds several volumes, has a singular affine, or
            holds no labels although it must.
    """

    def __init__(self, path: str | Path, label: bool = False, finite: bool = True) -> None:
        values, affine = load_volume(path, finite, label)
        shape = values.shape
        while len(shape) > 3 and shape[-1] == 1:
            shape = shape[:-1]
        if len(shape) not in (2, 3) or sum(s > 1 for s in shape) < 2:
            series = "; monai-lm sequence takes a series" if len(shape) == 4 else ""
            raise ValueError(f"{path} must hold one 2D or 3D volume, got shape {values.shape}{series}")
        thick, affine = _axes(shape, affine)
        values = values.reshape([shape[axis] for axis in thick])
        self.path, self.is_label, self.grid = Path(path), label, Grid(values.shape, affine)
        self.is_measured = says_edges(path)
        self.data = torch.from_numpy(_labels(path, values) if label else values.astype(np.float32))[None, None]


class Probabilities:
    """Probability maps from a file, as the softmax of a segmentation network.

    Args:
        path: file of ``(X, Y, Z, K)`` or ``(X, Y, Z, 1, K)``, a volume for each label, or ``(X, Y, Z)``, of one label.

    Attributes:
        path: where it came from.
        data: ``(1, K, *S)`` float32 in [0, 1].
        grid: voxel counts and voxel-to-RAS affine, as those of an :class:`Image`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no image, is cut off, is not finite, or holds no probabilities.
    """

    def __init__(self, path: str | Path) -> None:
        values, affine = load_volume(path)
        shape = values.shape
        if not 2 <= len(shape) <= 5 or sum(s > 1 for s in shape[:3]) < 2 or (len(shape) == 5 and shape[3] != 1):
            raise ValueError(f"{path} must hold probabilities (X, Y, Z, K), a volume for each label, got shape {shape}")
        if values.min() < 0 or values.max() > 1.001:  # half precision may round beyond 1
            raise ValueError(
                f"{path} must hold probabilities in [0, 1], got {values.min():.4g} to {values.max():.4g}; a label map "
                "is given as fixed_label or moving_label, logits need a softmax, percent a division"
            )
        thick, affine = _axes(shape[:3], affine)
        size = tuple(shape[axis] for axis in thick)
        maps = np.ascontiguousarray(np.moveaxis(values.reshape(*size, -1), -1, 0), dtype=np.float32)
        self.path, self.grid = Path(path), Grid(size, affine)
        self.data = torch.from_numpy(maps)[None]


def _axes(shape: tuple[int, ...], affine: np.ndarray) -> tuple[list[int], np.ndarray]:
    """The axes of a volume that are more than a voxel long, and its affine with them first."""
    thick = [axis for axis, s in enumerate(shape) if s > 1]
    return thick, affine[:, [*thick, *(axis for axis in range(3) if axis not in thick), 3]]


def _labels(path: str | Path, values: np.ndarray) -> np.ndarray:
    """Values of a file as int32, or int64 where they need it; ValueError unless they are labels, each with its own."""
    slope, offset = _scaling(path)
    if (slope, offset) != (1.0, 0.0):
        if np.abs(values - values.round()).max() > 0.01:
            raise ValueError(
                f"{path} must hold labels, whole numbers of at least 0; it stores them scaled by {slope:.6g} plus "
                f"{offset:.6g} (scl_slope, scl_inter), which makes no whole numbers of them. If what is stored are the "
                "labels, write them without: nib.Nifti1Image(np.asarray(image.dataobj.get_unscaled()), image.affine)"
            )
        values = values.round()
    if (values != values.round()).any() or values.min() < 0:
        raise ValueError(f"{path} must hold labels, whole numbers of at least 0, got other values")
    if values.dtype == np.float32 and values.max() > 2**24:
        raise ValueError(
            f"{path} must hold labels up to {2**24}, which float32 can tell apart, got larger ones; store integers"
        )
    return values.astype(np.int32 if values.max() < 2**31 else np.int64)


def _scaling(path: str | Path) -> tuple[float, float]:
    """Slope and offset by which a NIfTI file scales what it stores; 1 and 0 for others."""
    if not str(path).lower().endswith((".nii", ".nii.gz")):
        return 1.0, 0.0
    stored = open_nifti(path).dataobj
    return float(stored.slope), float(stored.inter)


class Field:
    """A displacement field from a file, seen from a fixed to a moving grid.

    Args:
        path: the file.
        fixed: image on the grid the field lives on; ``None`` takes the grid from the file.
        moving: image the field leads to; ``None``: the same grid.
        file_format: see :func:`monai_lm.io.read_ddf`.

    Attributes:
        ddf: ``(1, n, *S)`` float32, from voxels of its grid to voxels of the moving grid.
        grid: the grid it lives on.
        moving: the grid it leads to.
    """

    def __init__(
        self, path: str | Path, fixed: Image | None = None, moving: Image | None = None, file_format: str = "auto"
    ) -> None:
        start = None if fixed is None else fixed.grid
        end = start if moving is None else moving.grid
        given: dict[str, Any] = {} if end is None else {"moving_affine": end.affine, "moving_size": end.size}
        given |= {} if start is None else {"size": start.size, "fixed_affine": start.affine}
        values, affine = read_ddf(path, file_format, **given)
        if affine is None:
            if start is None:
                raise ValueError(f"{path} does not say where it lies: an image on its grid must be given")
            affine = start.affine
        self.grid = Grid(values.shape[1:], affine)
        self.moving = end or self.grid
        self.ddf = torch.from_numpy(np.ascontiguousarray(values))[None].float()
        if moving is not None and len(moving.grid.size) != len(values):
            raise ValueError(
                f"{moving.path} must have as many axes as the field {path}, {len(values)}, got {moving.grid.size}"
            )
        if fixed is not None and not fixed.grid.is_close(self.grid):
            own, size = self.grid, fixed.grid.size
            hint = "" if own.size != size else f"; affines\n{own.affine}\nand\n{fixed.grid.affine}"
            raise ValueError(
                f"{path} must lie on the grid of the fixed image {fixed.path}, {size} voxels, got {own.size}{hint}\n"
                "(a field belongs to the image it was made for as fixed; were fixed and moving exchanged? One made for "
                "another grid of the same image is brought to this one by monai-lm convert --fixed … --resample)"
            )

    def inner(self) -> Tensor:
        """The field in voxels of its own grid alone: continued beyond it, that means the same for any moving grid."""
        return from_space(self.ddf, np.eye(4), fixed_to_moving(self.grid.affine, self.moving.affine))


@dataclass(frozen=True)
class Pair:
    """A fixed and a moving image, where the one lies to the other, and what there is to measure; :func:`load_pair`.

    Attributes:
        fixed: image that stays.
        moving: image that is warped onto it.
        initial: ``(4, 4)`` affine in RAS millimetres from fixed to moving points; ``None``: the world spaces agree.
        labels: label maps of the fixed and of the moving image.
        points: landmarks ``(N, n)`` in RAS millimetres in the fixed and in the moving image.
        mask: where the similarity counts, on the fixed grid.
        moving_mask: the same on the moving grid.
        lesion: labels on the fixed grid; what is not zero is a lesion.
        moving_lesion: the same on the moving grid.
        soft_labels: probability maps of as many labels in the space of the fixed and of the moving image.
    """

    fixed: Image
    moving: Image
    initial: np.ndarray | None = None
    labels: tuple[Image, Image] | None = None
    points: tuple[Tensor, Tensor] | None = None
    mask: Image | None = None
    moving_mask: Image | None = None
    lesion: Image | None = None
    moving_lesion: Image | None = None
    soft_labels: tuple[Probabilities, Probabilities] | None = None

    @property
    def between(self) -> Between:
        """How the two grids lie to each other."""
        return Between(self.fixed.grid, self.moving.grid, self.initial)

    def whole(self, ddf: Tensor) -> Tensor:
        """A field ``(1, n, *S)`` on the fixed grid and the affine after it, as one into voxels of the moving image."""
        return self.between.whole(ddf)

    def brought(self, image: Image, ddf: Tensor) -> Tensor:
        """An image or label map on the moving side, sampled once through field and affine, ``(1, 1, *S)``.

        It is computed where the field is.
        """
        mode, outside = ("nearest", "zeros") if image.is_label else ("bilinear", "border")
        between = Between(self.fixed.grid, image.grid, self.initial)
        return between.brought(image.data.to(ddf.device), ddf, mode, outside)


def load_pair(
    fixed: str | Path,
    moving: str | Path,
    affine: str | Path | None = None,
    labels: tuple[str | Path, str | Path] | None = None,
    points: tuple[str | Path, str | Path] | None = None,
    mask: str | Path | None = None,
    moving_mask: str | Path | None = None,
    lesion: str | Path | None = None,
    moving_lesion: str | Path | None = None,
    soft_labels: tuple[str | Path, str | Path] | None = None,
) -> Pair:
    """Load a pair and what is known of it. Images are continued where they are not finite, under what hides them.

    Zeros of a mask hide, and lesions.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file that cannot be used, or that does not fit the others.
    """
    hidden = mask is not None or lesion is not None, moving_mask is not None or moving_lesion is not None
    f, m = Image(fixed, finite=not hidden[0]), Image(moving, finite=not hidden[1])
    n = len(f.grid.size)
    if len(m.grid.size) != n:
        raise ValueError(f"fixed and moving must both be 2D or 3D, got shapes {f.grid.size} and {m.grid.size}")
    _check_planes(f, m, {"affine": affine, "points": points})
    maps = (Image(labels[0], label=True), Image(labels[1], label=True)) if labels else None
    weights = [None if path is None else Image(path) for path in (mask, moving_mask)]
    lesions = [None if path is None else Image(path, label=True) for path in (lesion, moving_lesion)]
    beside = ((maps and maps[0], f), (weights[0], f), (weights[1], m), (lesions[0], f), (lesions[1], m))
    for image, its in beside:
        if image and not its.grid.is_close(image.grid):
            raise ValueError(
                f"{image.path} must lie on the grid of its image {its.path}, {its.grid.size} voxels, got "
                f"{image.grid.size}; affines\n{its.grid.affine}\nand\n{image.grid.affine}"
            )
    for image, hole, its in zip(weights, lesions, (f, m), strict=True):
        if image:
            image.data = checked_mask(image.data, its.data, str(image.path), str(its.path))
        lesion_there = None if hole is None else (hole.data > 0).to(its.data)
        shows = outside(image and image.data, lesion_there, str(image and image.path))
        if shows is not None:
            check_shown(str(its.path), its.data, shows)
            its.data = continued(its.data, torch.isfinite(its.data))
    landmarks = (load_points(points[0], n), load_points(points[1], n)) if points else None
    if points and landmarks and landmarks[0].shape != landmarks[1].shape:
        counts = [len(p) for p in landmarks]
        raise ValueError(f"{points[0]} and {points[1]} must hold as many points, got {counts[0]} and {counts[1]}")
    for role, path, found, image in zip(("fixed", "moving"), points or (), landmarks or (), (f, m), strict=False):
        _check_inside(f"{role}_points {path}", found, image)
    initial = None if affine is None else read_affine(affine, n)
    soft = _soft_labels(soft_labels, (f, m)) if soft_labels else None
    return Pair(f, m, initial, maps, landmarks, weights[0], weights[1], lesions[0], lesions[1], soft)


def unmeasured(fixed: Image, moving: Image) -> str:
    """What to know of images whose files do not say how long their voxels are; empty where both do."""
    silent = [image for image in (fixed, moving) if not image.is_measured]
    names = " and ".join(dict.fromkeys(image.path.name for image in silent))
    if len(silent) == 2:
        return (
            f"No size of a voxel is known of {names}. It counts as 1 mm: millimetres are voxels here. A file that has "
            "its resolution, as TIFF can, tells it."
        )
    if silent:
        other = moving if silent[0] is fixed else fixed
        return (
            f"No size of a voxel is known of {names}. It counts as 1 mm, beside {other.path.name}, which has "
            f"{_told(other.grid)}. Unless that is so, store it with its resolution, as TIFF can."
        )
    return ""


def _soft_labels(
    paths: tuple[str | Path, str | Path], images: tuple[Image, Image]
) -> tuple[Probabilities, Probabilities]:
    """Probability maps of two images; ValueError if one does not reach its image, or for other labels in the one."""
    soft = Probabilities(paths[0]), Probabilities(paths[1])
    for role, maps, image in zip(("fixed", "moving"), soft, images, strict=True):
        here, there = maps.grid, image.grid
        grids = f"{maps.path} has {_told(here)}, {image.path} {_told(there)}"
        if len(here.size) != len(there.size):
            raise ValueError(f"{role}_soft_labels must have as many axes as {role}: {grids}")
        still = torch.zeros(1, len(there.size), *there.size)
        if share_inside(Between(there, here).whole(still), here.size) == 0:
            raise ValueError(
                f"{role}_soft_labels must lie where {role} does, no voxel of the one is in the other: {grids}, "
                f"affines\n{here.affine}\nand\n{there.affine}\n(saved without the one of their image?)"
            )
        if here.size == there.size and not here.is_close(there):
            warnings.warn(
                f"{role}_soft_labels have as many voxels as {role}, but lie elsewhere: {grids}; saved without the "
                "affine of their image, they would",
                stacklevel=4,
            )
    counts = [maps.data.shape[1] for maps in soft]
    if counts[0] != counts[1]:
        raise ValueError(
            f"fixed_soft_labels and moving_soft_labels must hold as many labels, a volume for each, got {counts[0]} in "
            f"{soft[0].path} and {counts[1]} in {soft[1].path}"
        )
    return soft


def _told(grid: Grid) -> str:
    size, edges = ("×".join(f"{value:.4g}" for value in values) for values in (grid.size, grid.spacing))
    return f"{size} voxels of {edges} mm"


def _check_planes(fixed: Image, moving: Image, given: Mapping[str, Any]) -> None:
    """ValueError for images in 2D whose planes differ by ten degrees, or that are not those of what is given beside."""
    if len(fixed.grid.size) == 2:
        if out_of_plane(fixed.grid.affine) and (beside := [name for name, value in given.items() if value is not None]):
            raise ValueError(
                f"{fixed.path} must lie in a plane of x and y where {' and '.join(beside)} are given, which know no "
                f"other, got the affine\n{fixed.grid.affine}"
            )
        normals = [np.cross(*image.grid.affine[:3, :2].T) for image in (fixed, moving)]
        a, b = (normal / np.linalg.norm(normal) for normal in normals)
        if (cosine := abs(float(a @ b))) < np.cos(np.pi / 18):
            angle = np.degrees(np.arccos(min(1.0, cosine)))
            raise ValueError(
                f"{fixed.path} and {moving.path} must lie in parallel planes, got {angle:.0f} degrees between them; "
                "store both with the affine of one plane, such as np.diag([dx, dy, 1, 1])"
            )


def _check_inside(name: str, points: Tensor, image: Image) -> None:
    """Warn if most points ``(N, n)`` in RAS millimetres lie outside of their image: then they hardly are in RAS."""
    voxels = to_voxel(points, image.grid.affine)
    inside = ((voxels > -1) & (voxels < voxels.new_tensor(image.grid.size))).all(1)
    if 2 * (out := int((~inside).sum())) > len(points):
        warnings.warn(
            f"{name}: {out} of {len(points)} lie outside of {image.path}, taken as RAS millimetres (of LPS if "
            "their file says that): are they voxels?",
            stacklevel=4,
        )


def load_points(path: str | Path, n: int) -> Tensor:
    """Landmarks ``(N, n)`` in RAS millimetres, float64; ValueError for another number of coordinates."""
    points = torch.from_numpy(read_points(path))
    if points.shape[1] != n:
        raise ValueError(f"{path} must hold points of {n} coordinates, got {points.shape[1]}")
    return points
