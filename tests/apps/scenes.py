"""A scene in the world, as files of two images on grids of their own, and their refinement."""

import nibabel as nib
import numpy as np

from monai_lm.apps import pairs

QUICK = {"scales": (2, 1), "iterations": (40, 20)}
FIXED = np.diag([1.5, 1.5, 2.0, 1.0])
# turned, mirrored, on other voxels, elsewhere
MOVING = np.array([[0, -1.2, 0, 34.0], [1.3, 0, 0, -2.0], [0, 0, 1.8, 1.0], [0, 0, 0, 1]])


def scene(points):
    """A smooth picture of the world, at points ``(..., 3)`` in millimetres."""
    x, y, z = points.T
    return (np.sin(x / 3.1) * np.cos(y / 2.7) + np.sin(z / 3.3 + x / 5) + np.cos(y / 4.1 - z / 6)).T


def world_of(size, affine):
    voxels = np.stack(np.meshgrid(*[np.arange(s) for s in size], indexing="ij"), -1)
    return voxels @ affine[:3, :3].T + affine[:3, 3]


def save(path, values, affine):
    nib.save(nib.Nifti1Image(np.asarray(values), affine), path)
    return path


def refined(pair, folder, **kwargs):
    keywords = {"labels": pair["labels"], "points": pair["points"], "report": False, "settings": QUICK} | kwargs
    return pairs.refine_pair(pair["fixed"], pair["moving"], folder, **keywords)
