"""MONAI transforms on fields, array and dictionary versions."""

from monai_lm.transforms.array import RefineDDF, SaveDDF, WarpImage
from monai_lm.transforms.dictionary import (
    RefineDDFD,
    RefineDDFd,
    RefineDDFDict,
    SaveDDFD,
    SaveDDFd,
    SaveDDFDict,
    WarpImageD,
    WarpImaged,
    WarpImageDict,
)

__all__ = [
    "RefineDDF",
    "RefineDDFD",
    "RefineDDFDict",
    "RefineDDFd",
    "SaveDDF",
    "SaveDDFD",
    "SaveDDFDict",
    "SaveDDFd",
    "WarpImage",
    "WarpImageD",
    "WarpImageDict",
    "WarpImaged",
]
