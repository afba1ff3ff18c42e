"""Pictures in two dimensions, as of stained tissue: PNG, TIFF, JPEG; through Pillow, which comes with matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from monai_lm.io.content import check_file

__all__ = ["PICTURE_SUFFIXES", "load_picture", "says_resolution"]

PICTURE_SUFFIXES = (".png", ".tif", ".tiff", ".jpg", ".jpeg")

_GREY = (0.299, 0.587, 0.114)
"""What red, green and blue add to the grey of a colour, by ITU-R BT.601."""

_RESOLUTION = 282
"""TIFF's tag; Pillow has one per inch where it is missing."""

_COLORS = ("PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV")
_PALETTE = "P"
"""Pillow's names of what a pixel holds: several numbers, and one that stands for a colour."""


def load_picture(path: str | Path, label: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Read a picture, colours as grey, where ITK, and so ANTs and Slicer, have it: the first pixel at 0.

    A pixel is a millimetre wide, but where a TIFF or JPEG file says how many are an inch or a centimetre.

    Args:
        path: PNG, TIFF or JPEG.
        label: it is a label map: one number for every pixel, or a palette, whose numbers are the labels. JPEG, which
            changes numbers, and colours are none.

    Returns:
        The data ``(columns, rows, 1)``, float32, and the ``(4, 4)`` pixel-to-RAS affine in millimetres.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: Pillow is missing, it is no such picture, is broken, holds several, or no labels although it must.
    """
    check_file(path)
    image = _opened(path)
    if label and (image.format == "JPEG" or image.mode in ("LA", *_COLORS)):
        got = "JPEG, which changes numbers" if image.format == "JPEG" else f"colours ({image.mode})"
        raise ValueError(f"{path} must hold labels, a number or a palette's for every pixel, got {got}")
    if image.mode in (_PALETTE, *_COLORS) and not label:
        values = np.asarray(image.convert("RGB"), np.float32) @ np.array(_GREY, np.float32)
    else:
        values = np.asarray(image.convert("L") if image.mode in ("1", "LA") else image, np.float32)
    width, height = (25.4 / count if count > 0 else 1.0 for count in _per_inch(image))
    return np.ascontiguousarray(values.T)[:, :, None], np.diag([-width, -height, 1.0, 1.0])


def says_resolution(path: str | Path) -> bool:
    """Whether a picture says how wide and high its pixels are; its errors are those of :func:`load_picture`."""
    check_file(path)
    return min(_per_inch(_opened(path, header=True))) > 0


def _per_inch(image: Any) -> tuple[float, float]:
    """Pixels along the width and the height, as ITK has them; 0 where the file does not say it."""
    per_inch = (0, 0)
    if image.format == "TIFF" and _RESOLUTION in image.tag_v2:
        per_inch = image.info.get("dpi", per_inch)
    elif image.format == "JPEG" and image.info.get("jfif_unit") == 1:
        per_inch = image.info["jfif_density"]
    width, height = (float(count) for count in per_inch)
    return width, height


def _opened(path: str | Path, header: bool = False) -> Any:
    """A picture of Pillow's, read to its end, or its ``header`` alone."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ValueError(f"{path} must be read with Pillow: pip install Pillow") from error
    try:
        with Image.open(path, formats=("PNG", "TIFF", "JPEG")) as image:
            if (count := getattr(image, "n_frames", 1)) > 1:
                raise ValueError(f"{path} must hold one picture, got {count}")
            if not header:
                image.load()
            return image
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, EOFError) as error:
        raise ValueError(f"{path} must be a whole PNG, TIFF or JPEG picture, got {error}") from error
