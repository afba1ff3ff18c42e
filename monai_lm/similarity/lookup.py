"""From a name, a loss module or a measure to a measure."""

from __future__ import annotations

from torch import nn

from monai_lm.similarity.auto import Auto
from monai_lm.similarity.base import Similarity
from monai_lm.similarity.lncc import LNCC
from monai_lm.similarity.mapped import MappedLNCC
from monai_lm.similarity.mi import MI
from monai_lm.similarity.mind import MIND
from monai_lm.similarity.modules import ModuleSimilarity
from monai_lm.similarity.mse import MSE
from monai_lm.similarity.ncc import NCC
from monai_lm.similarity.weighted import Weighted

__all__ = ["MEASURES", "get_similarity", "name_of"]

MEASURES: dict[str, type[Similarity]] = {
    "lncc": LNCC, "mapped_lncc": MappedLNCC, "mi": MI, "mind": MIND, "mse": MSE, "ncc": NCC,
}  # fmt: skip
"""The ``similarity`` argument of :func:`monai_lm.refine`."""


def get_similarity(similarity: str | Similarity | nn.Module) -> Similarity:
    """Turn a name, a loss module or a measure into a measure.

    Args:
        similarity: a name in :data:`MEASURES`, or ``"auto"``; a :class:`Similarity`; or any module called as
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
        if similarity not in (known := MEASURES | {"auto": Auto}):
            raise ValueError(f"similarity must be one of {sorted(known)} or a loss module, got {similarity!r}")
        return known[similarity]()
    raise TypeError(f"similarity must be a name, a Similarity or a torch.nn.Module, got {type(similarity).__name__}")


def name_of(measure: Similarity) -> str:
    """Its name in :data:`MEASURES`, or that of its class; of a loss module that of the module's."""
    if isinstance(measure, Weighted):
        return name_of(measure.measure)
    names = {kind: name for name, kind in MEASURES.items()}
    module = measure.module if isinstance(measure, ModuleSimilarity) else measure
    return names.get(type(measure), type(module).__name__)
