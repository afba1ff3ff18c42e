"""Validation pairs of two halves of the subjects: on the one bounds are chosen, on the other they are tried."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import chain, permutations, zip_longest

import torch

from benchmarks.ablation import half_size
from benchmarks.cases import SETS, Case, case_of
from benchmarks.data import BRAIN_SPLIT, brain_image, data_root, hippocampus_subjects

__all__ = ["HALVES"]

Halved = Iterator[tuple[str, Case]]


def _hippocampi() -> Halved:
    subjects, draw = hippocampus_subjects("validation"), random.Random(7)
    order = draw.sample(range(len(subjects)), len(subjects))
    for number in range(40):
        half = "AB"[number % 2]
        chosen = [subjects[k] for k in draw.sample(order[number % 2 :: 2], 2)]
        images, labels = ([torch.as_tensor(one[key])[None].float() for one in chosen] for key in ("image", "label"))
        yield half, Case(images[0], images[1], (labels[0], labels[1]))


def _brains() -> Halved:
    """At 2 mm."""
    known = BRAIN_SPLIT["validation"]
    for half, subjects in _alternating(known[:3], known[3:]):
        images = [half_size(brain_image(subject, "t1")) for subject in subjects]
        labels = [brain_image(subject, "seg")[:, :, ::2, ::2, ::2] for subject in subjects]
        yield half, Case(images[0], images[1], (labels[0], labels[1]))


def _hearts() -> Halved:
    """A pair is of one patient."""
    for number, case in enumerate(SETS["cardiac"]()):
        yield "AB"[number % 2], case


def _abdomens() -> Halved:
    for half, (fixed, moving) in _alternating(("1", "2", "3", "5"), ("8", "10", "13", "15")):
        row = {"fixed": f"{fixed}.nii.gz", "moving": f"{moving}.nii.gz", "align": "center"}
        row |= {"fixed_seg": f"{fixed}_seg.nii.gz", "moving_seg": f"{moving}_seg.nii.gz"}
        yield half, case_of(data_root("abdomen"), row)


def _alternating(first: tuple[str, ...], second: tuple[str, ...]) -> Iterator[tuple[str, tuple[str, str]]]:
    """Ordered pairs of either half in turn, in a fixed order without one fixed subject after the other."""
    some = []
    for half, subjects in (("A", first), ("B", second)):
        ordered = [(half, (one, other)) for one, other in permutations(subjects, 2)]
        some.append(random.Random(0).sample(ordered, len(ordered)))
    return (one for one in chain.from_iterable(zip_longest(*some)) if one is not None)


HALVES: dict[str, Callable[[], Halved]] = {
    "hippocampus": _hippocampi, "brain": _brains, "cardiac": _hearts, "abdomen": _abdomens,
}  # fmt: skip
"""Half, ``A`` or ``B``, and pair, in turn. Of brains there are five validation subjects, three and two."""
