"""The defaults on every validation set: quality, roughness, folds, time, and what looking for folds takes of it."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from statistics import fmean, stdev
from typing import Any
from unittest import mock

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

import monai_lm
from benchmarks.cases import SETS, Case
from benchmarks.metrics import mean_dice, similarity_of
from benchmarks.peers import work
from benchmarks.rows import Row, add_row, read_rows
from monai_lm import kernels
from monai_lm.fields import warp
from monai_lm.fields.metrics import measure
from monai_lm.io import read_ddf
from monai_lm.solver.regularizer import REGULARIZERS
from monai_lm.solver.schedule import automatic_scales


def validation(
    sets: tuple[str, ...] = tuple(SETS),
    pairs: int = 5,
    greedy: bool = False,
    identity: bool = False,
    settings: dict[str, Any] | None = None,
    json_file: str | None = None,
    against: str | None = None,
) -> None:
    """Refine pairs of the validation sets; one line per pair and the means of every set.

    ``seconds`` passed on the clock, ``cpu`` on all processors; ``guard`` is the part of these that went into looking
    for folds and repairing them; ``fingerprint`` is the field's, the same where two versions do the same.

    Args:
        sets: of :data:`benchmarks.cases.SETS`.
        pairs: of each set, at most.
        greedy: register the pairs with greedy, too, from the identity, with the same iterations on the same levels, or
            on those of them that leave it four voxels of every axis.
        identity: leave predictions aside.
        settings: keyword arguments of ``monai_lm.refine``; default: none. A regulariser may be ``{name: weight}``, a
            similarity ``{name: {argument: value}}``.
        json_file: write one line per pair here, as it goes; pairs that stand in it are not run again, and it must be of
            the same settings.
        against: the ``json_file`` of another run; paired differences to it are printed, with standard errors.
    """
    done, how = _read(json_file), {"identity": identity, "settings": settings or {}}
    if other := [row["how"] for row in done.values() if row["how"] != how]:
        raise SystemExit(f"json_file must hold a run with {how}, got one with {other[0]}")
    for name in sets:
        for number, case in enumerate(islice(SETS[name](), pairs)):
            for method in ("lm", *(("greedy",) if greedy else ())):
                key = (name, number, method)
                if key not in done:
                    start = None if identity else case.ddf
                    found = _greedy(case) if method == "greedy" else refined(case, start, settings or {})
                    done[key] = {"set": name, "pair": number, "method": method, "how": how, **found}
                    add_row(json_file, done[key])
                    print(
                        "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in done[key].items())
                    )
    _print([row for (name, number, _), row in done.items() if name in sets and number < pairs], _read(against))


def refined(case: Case, start: Tensor | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Refine a case from a field, and measure what came out."""
    spent = [0.0]

    def clocked(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            started = time.process_time()
            try:
                return run(*args)
            finally:
                spent[0] += time.process_time() - started

        return call

    weighed = settings.get("regularizer")
    if isinstance(weighed, dict):
        ((kind, weight),) = weighed.items()
        settings = settings | {"regularizer": REGULARIZERS[kind](weight)}
    settings = settings | {"similarity": similarity_of(settings.get("similarity", "lncc"))}
    with ExitStack() as stack:
        for name in ("unfolded", "mend"):
            stack.enter_context(mock.patch.object(kernels, name, clocked(getattr(kernels, name))))
        started = time.process_time()
        result = monai_lm.refine(case.fixed, case.moving, start, spacing=case.spacing, **settings)
        cpu = time.process_time() - started
    values = _measured(case, start, result.ddf.cpu(), result.seconds)
    return {**values, "measure": result.similarity, "cpu": cpu, "guard": spent[0] / cpu}


def _greedy(case: Case) -> dict[str, Any]:
    size, edges = case.fixed.shape[2:], case.spacing or (1.0,) * (case.fixed.dim() - 2)
    scales = [s for s in automatic_scales(size, edges, False) if min(size) >= 4 * s]  # it shrinks all axes alike
    affine = np.diag([*edges, 1.0])
    with tempfile.TemporaryDirectory() as folder:
        paths = {key: str(Path(folder) / f"{key}.nii.gz") for key in ("fixed", "moving", "field")}
        for key, image in (("fixed", case.fixed), ("moving", case.moving)):
            nib.save(nib.Nifti1Image(image[0, 0].numpy(), affine), paths[key])
        counts = [100 if scale >= 4 else 50 if scale >= 2 else 25 for scale in scales]
        out = work("greedy", **paths, scales=scales, iterations=counts, threads=torch.get_num_threads())
        ddf = torch.from_numpy(read_ddf(paths["field"], "itk")[0])[None]
    return _measured(case, None, ddf, out.seconds)


def _measured(case: Case, start: Tensor | None, ddf: Tensor, seconds: float) -> dict[str, Any]:
    """See :func:`monai_lm.fields.metrics.measure` for the names."""
    fixed, moving = case.labels
    values = measure(ddf, (warp(moving.float(), ddf, mode="nearest"), fixed))
    return {
        "dice_before": mean_dice(fixed, moving, start),
        **{f"{name}_after": float(value) for name, value in values.items()},
        "seconds": seconds,
        "fingerprint": hashlib.sha256(ddf.numpy().tobytes()).hexdigest()[:12],
    }


def _read(path: str | None) -> dict[tuple[str, int, str], Row]:
    return {(row["set"], row["pair"], row["method"]): row for row in read_rows(path)}


def _print(rows: list[Row], others: dict[tuple[str, int, str], Row]) -> None:
    columns = ("dice_before", "dice_after", "sdlogj_after", "folds_after", "seconds", "cpu", "guard")
    print("| set | method | pairs | " + " | ".join(columns) + " |\n|---|---|---|" + "---|" * len(columns))
    for name, method in dict.fromkeys((row["set"], row["method"]) for row in rows):
        found = [row for row in rows if (row["set"], row["method"]) == (name, method)]
        means = [f"{fmean(row[c] for row in found):.4g}" if c in found[0] else "–" for c in columns]
        print(f"| {name} | {method} | {len(found)} | " + " | ".join(means) + " |")
        both = [(row, others[key]) for row in found if (key := (name, row["pair"], method)) in others]
        for column in ("dice_after", "sdlogj_after", "seconds") if both else ():
            gaps = [row[column] - other[column] for row, other in both]
            error = stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else float("nan")
            print(f"    {column}: {fmean(gaps):+.4g} (standard error {error:.2g}) against the other run")
