"""Where the images are, and which are for tuning and which for reporting."""

from __future__ import annotations

import importlib.util
import os
import random
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigParser
from torch import Tensor, nn

from monai_lm import RegistrationInferer

ROOT = Path(__file__).parent.parent
BUNDLE = ROOT / "bundles" / "hippocampus_mr_registration"
BRAIN_BUNDLE = ROOT / "bundles" / "brain_mri_registration"

# fixed subjects; a prototype was tuned on some of the validation pairs; the brain bundle has a split of its own
BRAIN_SPLIT = {
    "validation": ("1000", "1001", "1002", "1006", "1007"),
    "test": ("1008", "1009", "1010", "1011", "1012", "1013", "1014", "1015", "1017", "1036"),
}


def data_root(folder: str) -> Path:
    """A folder of ``$MONAI_LM_DATA`` (default ``../shared/data`` seen from the project's root)."""
    path = Path(os.environ.get("MONAI_LM_DATA", ROOT.parent / "shared" / "data")) / folder
    if not path.is_dir():
        raise SystemExit(f"no images at {path}: set MONAI_LM_DATA to the folder that holds {folder!r}")
    return path


def hippocampus_pairs(part: str, pairs: int, seed: int) -> list[dict[str, Tensor]]:
    """Seeded random ordered pairs of different subjects of a part of the bundle's split, on its grid.

    ``fixed``, ``moving`` ``(1, *S)`` in [0, 1], ``fixed_label`` and ``moving_label``.
    """
    subjects = hippocampus_subjects(part)
    generator = random.Random(seed)
    out = []
    for chosen in [generator.sample(range(len(subjects)), 2) for _ in range(pairs)]:
        pair: dict[str, Tensor] = {}
        for role, number in zip(("fixed", "moving"), chosen, strict=True):
            pair |= {role: subjects[number]["image"], f"{role}_label": subjects[number]["label"]}
        out.append(pair)
    return out


def hippocampus_subjects(part: str) -> list[dict[str, Tensor]]:
    """``image`` and ``label`` ``(1, *S)`` of the subjects of a part of the bundle's split, on its grid."""
    subjects: list[dict[str, Tensor]] = _bundle_data().load_subjects(data_root("hippocampus"), part)
    return subjects


def _bundle_data() -> ModuleType:
    """The bundle's own data module; a bundle is a folder of scripts, not a package."""
    spec = importlib.util.spec_from_file_location("hippocampus_data", BUNDLE / "scripts" / "data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hippocampus_network(
    weights: str | Path, device: str | torch.device = "cpu"
) -> tuple[nn.Module, RegistrationInferer]:
    """A network with these weights and its inferer, as the bundle defines them or a ``.json`` beside the weights."""
    own = Path(weights).with_suffix(".json")
    config = ConfigParser()
    config.read_config(own if own.is_file() else BUNDLE / "configs" / "inference.json")
    config["device"] = torch.device(device)
    network, inferer = config.get_parsed_content("network"), config.get_parsed_content("inferer")
    network.load_state_dict(torch.load(weights, weights_only=True))
    network.eval()
    return network, inferer


def read_image(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Values as float32, and the affine; the values in memory and in C order, as MONAI's readers give them.

    A file's own order is Fortran's, and its pages stay in memory as long as somebody looks at them: an image would
    count twice.
    """
    image = nib.Nifti1Image.from_filename(path)
    return np.array(image.dataobj, dtype=np.float32, order="C"), np.asarray(image.affine)


def brain_image(subject: str, kind: str) -> Tensor:
    """``t1`` or ``seg`` of a subject, ``(1, 1, 176, 224, 176)`` float32."""
    return torch.from_numpy(read_image(data_root("brain") / f"{subject}_{kind}.nii.gz")[0])[None, None]
