"""Structures of the MICCAI 2012 multi-atlas challenge (Neuromorphometrics): classes, sides, tissues."""

from __future__ import annotations

__all__ = ["MIRRORED", "STRUCTURES", "TISSUES"]

_MIDLINE = (4, 11, 15, 35, 46, 69, 71, 72, 73)  # ventricles, brain stem, CSF, optic chiasm, vermis
_SIDED = (
    *((23, 30), (31, 32), (36, 37), (38, 39), (40, 41), (42, 43), (44, 45), (47, 48), (49, 50), (51, 52), (55, 56)),
    *((57, 58), (59, 60), (61, 62), (63, 64), (75, 76)),
)
_NOT_USED = (110, 126, 130, 158, 188)
_CORTEX = tuple((v, v + 1) for v in range(100, 208, 2) if v not in _NOT_USED)

STRUCTURES: tuple[int, ...] = (0, *sorted({*_MIDLINE, *(v for pair in (*_SIDED, *_CORTEX) for v in pair)}))
"""Label values, background first; a structure's class is its place here."""

_CLASS = {value: number for number, value in enumerate(STRUCTURES)}
_OTHER = {a: b for pair in (*_SIDED, *_CORTEX) for a, b in (pair, pair[::-1])}

MIRRORED: tuple[int, ...] = tuple(_CLASS[_OTHER.get(value, value)] for value in STRUCTURES)
"""Class of the same structure on the other side, per class."""

_SAME = {**{b: a for a, b in _SIDED}, **dict.fromkeys((v for pair in _CORTEX for v in pair), 100), 42: 100, 43: 100}
_SAME |= {71: 38, 72: 38, 73: 38, 4: 51, 11: 51, 15: 51, 49: 51, 50: 51, 52: 51}
_KINDS = sorted({_SAME.get(value, value) for value in STRUCTURES})

TISSUES: tuple[int, ...] = tuple(_KINDS.index(_SAME.get(value, value)) for value in STRUCTURES)
"""Number of the tissue of a class: both sides, all of the cortex, all ventricles look alike. 0 is the background."""
