"""Metrics of displacement fields: regularity and landmarks."""

from __future__ import annotations

import torch
from torch import Tensor

from monai_lm.fields import jacobian_determinant, sample_points

__all__ = ["sd_log_jacobian", "target_registration_error"]


def sd_log_jacobian(ddf: Tensor, floor: float = 1e-3) -> Tensor:
    """Standard deviation over all voxels of the logarithm of the Jacobian determinant (central differences).

    Args:
        ddf: ``(B, n, *S)`` in voxels.
        floor: smaller determinants, negative ones included, count as this; how many voxels fold is for
            :func:`monai_lm.fields.fold_count` to say.

    Returns:
        ``(B,)``.

    Source:
        Leow et al., "Statistical properties of Jacobian maps and the realization of unbiased large-deformation
        nonlinear image registration", IEEE Transactions on Medical Imaging 2007.
    """
    return jacobian_determinant(ddf).flatten(1).clamp(min=floor).log().std(1, correction=0)


def target_registration_error(ddf: Tensor, fixed_points: Tensor, moving_points: Tensor, spacing: Tensor) -> Tensor:
    """Distance of every fixed landmark, moved by the field, from its counterpart in the moving image.

    Args:
        ddf: ``(B, n, *S)`` in voxels, from the fixed to the moving grid.
        fixed_points: ``(B, N, n)`` in voxels of the fixed grid; NaN points give NaN.
        moving_points: ``(B, N, n)`` in voxels of the moving grid.
        spacing: ``(B, n)`` voxel edges of the moving grid, in millimetres.

    Returns:
        ``(B, N)`` in millimetres.
    """
    error = fixed_points + sample_points(ddf, fixed_points) - moving_points
    return torch.linalg.vector_norm(error * spacing[:, None], dim=2)
