"""How much of a refinement is kept in memory, and what is computed anew."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from monai_lm import kernels
from monai_lm.similarity import Similarity
from monai_lm.similarity.base import Range, normalized

__all__ = ["MODES", "automatic_mode", "halved"]

MODES = ("full", "half")
"""See the ``memory`` argument of :func:`monai_lm.refine`."""

_NEED = {"native": (14.0, 6.0), "reference": (55.0, 7.0)}
"""Bytes needed on a GPU beside the images and the prediction, as multiples of one image channel in float32: for one
channel, and for every further one. Counted with CPU data that are labelled as a GPU's (9.0 and 3.0 V are kept, in plain
PyTorch 53.3 and 5.8 V are needed), 3 more for what Triton's LNCC keeps of a channel, and a margin; not measured."""


def automatic_mode(fixed: Tensor, symmetric: bool = False, regularized: bool = False) -> str:
    """``"full"`` where the free memory of a GPU allows it, and on other devices.

    Args:
        fixed: ``(B, C, *S)``.
        symmetric: whether every pair is there twice: twice as much, copies of the images, and two fields for a moment.
        regularized: whether there is a regulariser, which takes 10 V of every pair for a moment.
    """
    if fixed.device.type != "cuda":
        return "full"
    free = torch.cuda.mem_get_info(fixed.device)[0]
    free += torch.cuda.memory_reserved(fixed.device) - torch.cuda.memory_allocated(fixed.device)
    one, more = _NEED["native" if kernels.missing(fixed.device) is None else "reference"]
    volume, channels = 4 * fixed.shape[0] * fixed[0, 0].numel(), fixed.shape[1]
    need = one + more * (channels - 1) + 10 * regularized
    return "full" if free > (2 * need + 4 * channels + 12 if symmetric else need) * volume else "half"


def halved(fixed: Tensor, moving: Tensor, measures: Sequence[Similarity]) -> tuple[Tensor, Tensor]:
    """Both images ``(B, C, *S)`` in half precision: as they are if they are, else shifted and scaled into its range.

    A weight of the fixed image, its last channel, is not shifted; the ranges of the moving one leave its own alone.

    Args:
        fixed: ``(B, C, *S)``.
        moving: ``(B, C, *S)``.
        measures: of the levels, coarse to fine. The ranges are those of one that cares for shift and scale, if there
            is any: the others bear them. Of several, one that allows for none at all comes first.
    """
    careful = [measure for measure in measures if not measure.invariant] or measures[-1:]
    ranges = [measure.image_ranges(fixed, moving) for measure in dict.fromkeys(careful)]
    of_fixed, of_moving = (None, None) if (None, None) in ranges else ranges[-1]
    channels = moving.shape[1] - int(measures[-1].weighs_moving)

    def half(image: Tensor, range_: Range) -> Tensor:
        if image.dtype in (torch.float16, torch.bfloat16):
            return image
        intensities, weight = image.tensor_split([channels if image is fixed else image.shape[1]], 1)
        return torch.cat([normalized(intensities, range_), weight], 1).half()

    return half(fixed, of_fixed), half(moving, of_moving)
