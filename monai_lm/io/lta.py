"""FreeSurfer's linear transforms (``.lta``), through nitransforms."""

from __future__ import annotations

from pathlib import Path

import numpy as np

__all__ = ["read_lta"]


def read_lta(path: str | Path) -> np.ndarray:
    """The ``(4, 4)`` matrix in RAS millimetres of an LTA of one transform, between RAS or between voxels.

    Returns:
        From points of its destination, the fixed image, to points of its source, the moving image
        (``mri_robust_register --mov SOURCE --dst DESTINATION --lta FILE``); of single precision.

    Raises:
        ValueError: nitransforms is missing, or it is no such LTA.
    """
    try:
        from nitransforms.io.lta import FSLinearTransform
    except ImportError as error:
        raise ValueError(
            f"{path} must be read with nitransforms, in the freesurfer extra: pip install 'monai_lm[freesurfer]'; or "
            "convert it: lta_convert --inlta FILE --outitk FILE.txt"
        ) from error
    try:
        lta = FSLinearTransform.from_string(Path(path).read_text("utf-8"))
        kind, valid = int(lta["type"]), all(int(lta[role]["valid"]) for role in ("src", "dst"))
        matrix = lta.to_ras() if kind == 1 or (kind == 0 and valid) else None
    except (AssertionError, IndexError, KeyError, TypeError, ValueError, np.linalg.LinAlgError) as error:
        raise ValueError(f"{path} must be an LTA of one transform, got {type(error).__name__}: {error}") from error
    if matrix is None:
        raise ValueError(
            f"{path} must be between RAS (type 1) or, with valid volumes, between voxels (type 0), got type {kind} and "
            f"{'valid' if valid else 'invalid'} volumes"
        )
    return np.asarray(matrix, dtype=np.float64)
