"""Similarity measures: each gives the value per pair and the derivative with respect to the warped image."""

from monai_lm.similarity.base import Similarity
from monai_lm.similarity.combined import Combined
from monai_lm.similarity.lncc import LNCC
from monai_lm.similarity.lookup import get_similarity
from monai_lm.similarity.mapped import MappedLNCC
from monai_lm.similarity.mi import MI
from monai_lm.similarity.mind import MIND
from monai_lm.similarity.modules import ModuleSimilarity
from monai_lm.similarity.mse import MSE
from monai_lm.similarity.ncc import NCC

__all__ = [
    "LNCC", "MI", "MIND", "MSE", "NCC", "Combined", "MappedLNCC", "ModuleSimilarity", "Similarity", "get_similarity",
]  # fmt: skip
