"""What a result was made of: files and settings, recorded beside it and compared before it is taken for another's."""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import monai_lm
from monai_lm.alignment import MODES
from monai_lm.guidance import Guidance
from monai_lm.similarity import Similarity
from monai_lm.solver.acceptance import Acceptance
from monai_lm.solver.damping import Damping
from monai_lm.solver.descent import Descent
from monai_lm.solver.refinement import defaults
from monai_lm.solver.regularizer import Regularizer
from monai_lm.solver.smoothing import Smoothing

__all__ = [
    "NEUTRAL",
    "Recipe",
    "describe",
    "file_record",
    "machine",
    "pair_recipe",
    "settings_of",
    "version_of",
    "weights_digest",
]

_BUNDLE = ("configs/**/*", "models/model.pt", "scripts/**/*.py")
"""The files of a bundle that its results depend on."""

NEUTRAL = ("progress", "callback", "kernels")
"""Keyword arguments of :func:`monai_lm.refine` that change how it works, not what it finds."""


@dataclass(frozen=True)
class Recipe:
    """Files and settings that a result is made of.

    Attributes:
        inputs: by their role; a folder is a MONAI bundle.
        settings: JSON values, see :func:`describe`.
    """

    inputs: Mapping[str, Path]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """What to write beside the result: ``monai_lm`` (the version), ``inputs`` and ``settings``."""
        files = {role: file_record(path) for role, path in self.inputs.items()}
        return {"monai_lm": monai_lm.__version__, "inputs": files, "settings": dict(self.settings)}

    def changes(self, record: Any) -> list[str]:
        """In what this recipe differs from one that was recorded, in words; empty if the result would be the same.

        A file is the same with the same path, size and time of change, or else with the same content.
        """
        if not isinstance(record, Mapping) or not {"monai_lm", "inputs", "settings"} <= set(record):
            return ["it does not say what it was made of"]
        then, out = record["inputs"], []
        for role in dict.fromkeys([*then, *self.inputs]):
            old = then[role]["path"] if role in then else "none"
            new = str(self.inputs.get(role, "none"))
            if role not in then or role not in self.inputs or not _same(then[role], self.inputs[role]):
                out.append(f"{role} was {old}, is {new}" if old != new else f"{role} {new} has changed since")
        before, now = _flat({**record["settings"], "monai_lm": record["monai_lm"]}), _flat(self.settings)
        now["monai_lm"] = monai_lm.__version__
        changed = [name for name in dict.fromkeys([*before, *now]) if before.get(name) != now.get(name)]
        return out + [f"{name} was {_word(before.get(name))}, is {_word(now.get(name))}" for name in changed]


def pair_recipe(
    fixed: str | Path,
    moving: str | Path,
    ddf: str | Path | None = None,
    affine: str | Path | None = None,
    labels: tuple[str | Path, str | Path] | None = None,
    points: tuple[str | Path, str | Path] | None = None,
    mask: str | Path | None = None,
    moving_mask: str | Path | None = None,
    bundle: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    file_format: str = "itk",
    ddf_format: str = "auto",
    guide: Mapping[str, Any] | None = None,
    ddf_before_affine: bool = False,
    lesion: str | Path | None = None,
    moving_lesion: str | Path | None = None,
    soft_labels: tuple[str | Path, str | Path] | None = None,
) -> Recipe:
    """Recipe of :func:`monai_lm.apps.pairs.refine_pair`, whose arguments these are."""
    given: dict[str, str | Path | None] = {"fixed": fixed, "moving": moving, "ddf": ddf}
    given["affine"] = None if affine in MODES else affine
    for name, two in (("label", labels), ("points", points), ("soft_labels", soft_labels)):
        given |= {f"{role}_{name}": path for role, path in zip(("fixed", "moving"), two or (), strict=False)}
    given |= {"mask": mask, "moving_mask": moving_mask, "lesion": lesion, "moving_lesion": moving_lesion}
    given["bundle"] = bundle
    files = {k: Path(v).absolute() for k, v in given.items() if v is not None}
    chosen = settings_of(settings) if bundle is None else describe(settings or {})
    kept = {name: value for name, value in chosen.items() if name not in NEUTRAL}
    if guide is not None:
        kept["guidance"] = describe(guide)
    if affine in MODES:
        kept["affine"] = affine
    if ddf_before_affine:
        kept["ddf_before_affine"] = True
    return Recipe(files, kept | {"file_format": file_format, "ddf_format": ddf_format})


def machine() -> dict[str, str]:
    """Versions and the system, for the record."""
    versions = {name: version_of(name) for name in ("torch", "monai", "numpy")}
    return versions | {"python": platform.python_version(), "system": platform.platform()}


def version_of(name: str) -> str:
    """Version of a package; one that is installed under its name need not be imported for it."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # such as monai-weekly
        return str(import_module(name).__version__)


def settings_of(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Every setting of :func:`monai_lm.refine` but its tensors and who is told of its iterations: JSON values.

    Where they are not given they are its defaults.
    """
    chosen = defaults() | dict(given or {})
    return {name: describe(value) for name, value in chosen.items() if name != "callback"}


def describe(value: Any) -> Any:
    """A setting as JSON: numbers, text, lists and dictionaries as they are, anything else by its type and settings.

    Of a guidance, a similarity, a module or a part of the method these are its public attributes, and a digest of its
    weights; other objects and functions are told by their names alone.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): describe(v) for k, v in value.items()}
    if isinstance(value, Sequence):
        return [describe(v) for v in value]
    if isinstance(value, Tensor | np.ndarray):
        return f"{type(value).__name__} {tuple(value.shape)} {_digest(torch.as_tensor(value))}"
    kind = value if callable(value) and hasattr(value, "__qualname__") else type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if not isinstance(
        value, Guidance | Similarity | nn.Module | Descent | Damping | Acceptance | Smoothing | Regularizer
    ):
        return name
    out = {k: describe(v) for k, v in vars(value).items() if not k.startswith("_") and k != "training"}
    return {"type": name} | out | ({"weights": weights_digest(value)} if isinstance(value, nn.Module) else {})


def weights_digest(module: nn.Module) -> str:
    """A digest of the parameters and buffers of a module, in their order."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {_digest(tensor)}".encode())
    return digest.hexdigest()[:16]


def _digest(tensor: Tensor) -> str:
    values = tensor.detach().cpu().contiguous()
    return hashlib.sha256(values.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def file_record(path: Path) -> dict[str, Any]:
    """Path, size in bytes, time of the last change, and SHA-256 of a file, or of the files of a bundle together."""
    size, modified = _state(path)
    return {"path": str(path), "bytes": size, "modified": modified, "sha256": _sha256(path)}


def _same(record: Mapping[str, Any], path: Path) -> bool:
    size, modified = _state(path)
    if record["bytes"] != size:
        return False
    return (record["path"], record["modified"]) == (str(path), modified) or record["sha256"] == _sha256(path)


def _files(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from sorted({file for pattern in _BUNDLE for file in path.glob(pattern) if file.is_file()})
    else:
        yield path


def _state(path: Path) -> tuple[int, str]:
    if not path.exists():
        raise FileNotFoundError(f"no file or folder {path}")
    found = [file.stat() for file in _files(path)]
    latest = max((state.st_mtime for state in found), default=0.0)
    return sum(state.st_size for state in found), datetime.fromtimestamp(latest, timezone.utc).isoformat()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    for file in _files(path):
        digest.update(b"" if file == path else str(file.relative_to(path)).encode())
        with file.open("rb") as opened:
            while block := opened.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries as one, with dots in the names."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        out |= {f"{name}.{k}": v for k, v in _flat(value).items()} if isinstance(value, Mapping) else {name: value}
    return out


def _word(value: Any) -> str:
    return "none" if value is None else repr(value)
