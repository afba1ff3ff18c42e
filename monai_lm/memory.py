"""How much of a refinement is kept in memory, and what is computed anew."""

from __future__ import annotations

import torch
from torch import Tensor

from monai_lm.similarity import Similarity
from monai_lm.similarity.base import normalized

__all__ = ["MODES", "automatic_mode", "halved"]

MODES = ("full", "low", "half")
"""From fast to lean; see the ``memory`` argument of :func:`monai_lm.refine`."""

_NEED = {"full": (49.0, 14.0), "low": (13.0, 4.0)}
"""Bytes needed on a GPU beside the images and the prediction, as multiples of one image channel in float32: for one
channel, and for every further one. Peaks that were counted with CPU data that are labelled as a GPU's, at 96³ and 192³
(:mod:`tests.gpu.pretend`), where a lean refinement is at its least lean; not measured on a GPU."""


def automatic_mode(fixed: Tensor, similarity: Similarity) -> str:
    """The fastest mode that the free memory of a GPU allows; ``"full"`` on other devices.

    Args:
        fixed: ``(B, C, *S)``.
        similarity: measures that look at the whole image at once have no other mode than ``"full"``.
    """
    if fixed.device.type != "cuda" or similarity.halo is None:
        return "full"
    free = torch.cuda.mem_get_info(fixed.device)[0]
    free += torch.cuda.memory_reserved(fixed.device) - torch.cuda.memory_allocated(fixed.device)
    volume = 4 * fixed.shape[0] * fixed[0, 0].numel()
    further = fixed.shape[1] - 1
    return next((mode for mode, (one, more) in _NEED.items() if free > (one + more * further) * volume), "half")


def halved(fixed: Tensor, moving: Tensor, similarity: Similarity) -> tuple[Tensor, Tensor]:
    """Both images ``(B, C, *S)`` in half precision: as they are if they are, else shifted and scaled into its range."""
    ranges = similarity.ranges(fixed, moving)
    images = []
    for image, range_ in zip((fixed, moving), ranges, strict=True):
        half = image.dtype in (torch.float16, torch.bfloat16)
        images.append(image if half else normalized(image, range_).half())
    return images[0], images[1]
