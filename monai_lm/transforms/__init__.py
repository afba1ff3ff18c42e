"""MONAI transforms on fields, array and dictionary versions."""

from monai_lm.transforms.array import LoadDDF, RefineDDF, SaveDDF, WarpImage
from monai_lm.transforms.dictionary import (
    LoadDDFD,
    LoadDDFd,
    LoadDDFDict,
    OnFixedGridD,
    OnFixedGridd,
    OnFixedGridDict,
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
    "LoadDDF",
    "LoadDDFD",
    "LoadDDFDict",
    "LoadDDFd",
    "OnFixedGridD",
    "OnFixedGridDict",
    "OnFixedGridd",
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
