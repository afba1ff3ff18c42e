"""From a name, a loss module or a measure to a measure."""

from __future__ import annotations

from torch import nn

from monai_lm.similarity.base import Similarity
from monai_lm.similarity.lncc import LNCC
from monai_lm.similarity.mi import MI
from monai_lm.similarity.mind import MIND
from monai_lm.similarity.modules import ModuleSimilarity
from monai_lm.similarity.mse import MSE
from monai_lm.similarity.ncc import NCC

__all__ = ["MEASURES", "get_similarity"]

MEASURES: dict[str, type[Similarity]] = {"lncc": LNCC, "mi": MI, "mind": MIND, "mse": MSE, "ncc": NCC}
"""The ``similarity`` argument of :func:`monai_lm.refine`."""


def get_similarity(similarity: str | Similarity | nn.Module) -> Similarity:
    """Turn a name, a loss module or a measure into a measure.

    Args:
        similarity: a name in :data:`MEASURES`; a :class:`Similarity`; or any module called as
            ``module(warped, fixed)`` that returns a loss (MONAI's losses, for example).

    Raises:
        ValueError: unknown name.
        TypeError: anything else.
    """
    if isinstance(similarity, Similarity):
        return similarity
    if isinstance(similarity, nn.Module):
        return ModuleSimilarity(similarity)
    if isinstance(similarity, str):
        if similarity not in MEASURES:
            raise ValueError(f"similarity must be one of {sorted(MEASURES)} or a loss module, got {similarity!r}")
        return MEASURES[similarity]()
    raise TypeError(f"similarity must be a name, a Similarity or a torch.nn.Module, got {type(similarity).__name__}")
