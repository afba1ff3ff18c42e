"""How often ``monai_lm.convert.check`` tells the convention of a field."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from benchmarks.data import data_root, hippocampus_pairs, read_image
from monai_lm import refine
from monai_lm.convert import CONVENTIONS, check
from monai_lm.fields import gaussian_smooth, invert, warp

__all__ = ["conventions"]

Case = tuple[Tensor, Tensor, Tensor]


def conventions(pairs: int = 12) -> None:
    """Write fields in every convention and count what is told: right, nothing, or wrong.

    Third-party predictions on brains (two pairs, their volumes at half size too), fields that registration found on
    the hippocampus' validation pairs, known smooth deformations of those images by 4, 2, 1 and .5 voxels at most, with
    a tenth of noise, and predictions that are useless: noise fields, between images that have nothing to do with them.

    Args:
        pairs: of the hippocampus.
    """
    print("| fields | largest, voxels | told right | cannot tell | told wrong | which |\n|---|---|---|---|---|---|")
    for name, cases in _kinds(pairs):
        counts: Counter[str] = Counter()
        wrong: Counter[str] = Counter()
        largest = []
        for fixed, moving, ddf in cases:
            largest.append(float(ddf.abs().max()))
            for written in CONVENTIONS:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)
                    best = check(fixed, moving, _written(ddf, written)).best
                told = "none" if best is None else "right" if best == written else "wrong"
                counts[told] += 1
                if told == "wrong":
                    wrong[f"{written} as {best}"] += 1
        row = [counts[told] for told in ("right", "none", "wrong")]
        which = ", ".join(f"{n}x {what}" for what, n in wrong.most_common(4))
        print(f"| {name} | {np.median(largest):.1f} | {' | '.join(map(str, row))} | {which} |", flush=True)


def _written(ddf: Tensor, convention: str) -> Tensor:
    """A displacement in voxels as it would be in another convention."""
    size = ddf.new_tensor(ddf.shape[2:]).view(-1, *[1] * (ddf.dim() - 2))
    identity = torch.stack(torch.meshgrid(*[torch.arange(float(s)) for s in ddf.shape[2:]], indexing="ij"))
    write: dict[str, Callable[[], Tensor]] = {
        "voxels": lambda: ddf,
        "reversed": lambda: ddf.flip(1),
        "normalised": lambda: ddf * 2 / (size - 1),
        "normalised reversed": lambda: (ddf * 2 / (size - 1)).flip(1),
        "inverse direction": lambda: invert(ddf)[0],
        "positions": lambda: ddf + identity,
        "grid_sample": lambda: ((ddf + identity) * 2 / (size - 1) - 1).flip(1),
        "icon": lambda: (ddf + identity) / (size - 1),
    }
    return write[convention]()


def _kinds(pairs: int) -> Iterator[tuple[str, Iterator[Case]]]:
    yield "Conditional LapIRN, brains", _predictions()
    chosen = hippocampus_pairs("validation", pairs, 0)
    images = [(p["fixed"][None].float(), p["moving"][None].float()) for p in chosen]
    yield "LM, hippocampus, 5 iterations", ((f, m, refine(f, m, iterations=5).ddf) for f, m in images)
    for most in (4.0, 2.0, 1.0, 0.5):
        yield f"known, hippocampus, {most:g}", (_known(m, most, k) for k, (_, m) in enumerate(images))
    yield "nonsense, hippocampus", ((f, m, _smooth(m, 3.0, 100 + k)) for k, (f, m) in enumerate(images))


def _predictions() -> Iterator[Case]:
    folder = data_root("predictions")
    for file in sorted(folder.glob("*.npz")):
        names = file.stem.split("_")[-2:]
        fixed, moving = (torch.from_numpy(read_image(folder / f"{n}_t1.nii.gz")[0])[None, None] for n in names)
        yield fixed, moving, torch.from_numpy(np.load(file)["ddf"].astype("f4"))[None]


def _known(moving: Tensor, most: float, seed: int) -> Case:
    ddf = _smooth(moving, most, seed)
    return warp(moving, ddf), moving, ddf + _smooth(moving, most / 10, seed + 50)


def _smooth(image: Tensor, most: float, seed: int) -> Tensor:
    n = image.dim() - 2
    noise = torch.randn(1, n, *image.shape[2:], generator=torch.Generator().manual_seed(seed))
    ddf = gaussian_smooth(noise, 5.0)
    return ddf * (most / ddf.abs().max())
