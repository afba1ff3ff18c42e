"""Register two files with a MONAI bundle: its network predicts, its inferer refines, on its grid; seen on any other."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from torch import Tensor, nn

from monai_lm.fields import repair
from monai_lm.fields.space import Grid, fixed_to_moving, from_space, move_to_grid, resample_moving
from monai_lm.inferers import RegistrationInferer
from monai_lm.io.images import Image, Pair
from monai_lm.io.nifti import save_nifti
from monai_lm.similarity.weighted import filled
from monai_lm.solver.result import RefinementResult

__all__ = ["RegistrationBundle", "save_weights", "shown_files"]


class RegistrationBundle:
    """A bundle whose inferer is a :class:`~monai_lm.RegistrationInferer`, with its weights.

    Its ``configs/inference.json`` must define ``network`` (or ``network_def``), ``inferer`` and ``preprocessing``, the
    last of which makes of two files ``fixed``, ``moving`` and ``image``, channel 0 moving and 1 fixed.

    Args:
        folder: of the bundle.
        device: where it works.
        settings: keyword arguments of :func:`monai_lm.refine` that replace entries of its ``refine``.

    Raises:
        FileNotFoundError: the folder has no inference configuration or no ``models/model.pt``.
        ValueError: a configuration or weights that cannot be used.
    """

    def __init__(
        self, folder: str | Path, device: str | torch.device = "cpu", settings: Mapping[str, Any] | None = None
    ) -> None:
        self.folder, self.device = Path(folder).absolute(), torch.device(device)
        config, weights = self.folder / "configs" / "inference.json", self.folder / "models" / "model.pt"
        for path in (config, weights):
            if not path.is_file():
                raise FileNotFoundError(f"bundle {folder} must have {path.relative_to(self.folder)}, it is missing")
        parser = ConfigParser()
        try:
            parser.read_config(str(config))
        except ValueError as error:
            raise ValueError(f"{config} cannot be read: {error}") from error
        parser["bundle_root"], parser["device"] = str(self.folder), self.device
        for name, value in (settings or {}).items():
            parser[f"refine#{name}"] = value
        _fit_levels(parser, settings or {})
        with _scripts_of(self.folder):
            network, inferer, self.preprocessing = (
                self._part(parser, name) for name in ("network", "inferer", "preprocessing")
            )
        if not isinstance(inferer, RegistrationInferer):
            raise ValueError(  # noqa: TRY004 (the file is wrong, not an argument's type)
                f"inferer of bundle {folder} must be a RegistrationInferer, got {type(inferer).__name__}"
            )
        self.network: nn.Module = network.to(self.device).eval()
        self.inferer = inferer
        try:
            self.network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        except Exception as error:  # torch raises what it likes for files that are cut off or of another network
            raise ValueError(f"{weights} cannot be loaded into the network of bundle {folder}: {error}") from error

    def register(
        self,
        fixed: str | Path,
        moving: str | Path,
        grid: Grid,
        beside: Callable[[Grid, Grid], Mapping[str, Any]] | None = None,
    ) -> tuple[Tensor, RefinementResult | None]:
        """Register two files and bring the field onto a grid.

        Args:
            fixed: image that stays.
            moving: image that is warped onto it.
            grid: the grid.
            beside: what else belongs to the pair, as keyword arguments of :func:`monai_lm.refine`, for the grids of the
                fixed and the moving image as the preprocessing makes them, which are compared voxel by voxel.

        Returns:
            The network's own field ``(1, n, *S)``, in voxels of the grid, and the result of the refinement with its
            field on that grid too and the ``seconds`` of prediction and refinement, or ``None`` where the bundle does
            not refine.

        Raises:
            ValueError: files that the bundle cannot take, images that are constant where it looks at them, or
                preprocessing that does not make of the files what it must.
        """
        with self._naming(f"cannot prepare {fixed} and {moving}"):
            data = self.preprocessing({"fixed": str(fixed), "moving": str(moving)})
        grids = [data.get(name) for name in ("fixed", "moving")]
        if "image" not in data or not all(isinstance(image, MetaTensor) for image in grids):
            raise ValueError(
                f"preprocessing of bundle {self.folder} must make image, fixed and moving, got {sorted(data)}"
            )
        own, target = (np.asarray(image.affine, dtype=np.float64) for image in grids)
        if not _same_orientation(own, target):
            raise ValueError(
                f"preprocessing of bundle {self.folder} must bring fixed and moving into one orientation, "
                f"as Orientationd does, got the affines\n{own}\nand\n{target}"
            )
        images = torch.as_tensor(data["image"])[None].to(self.device)
        for role, image in zip(("moving", "fixed"), images[0], strict=False):
            if image.numel() and bool(image.min() == image.max()):
                raise ValueError(
                    f"bundle {self.folder} cannot register {fixed} and {moving}: {role} is constant where the bundle "
                    f"looks at it, {float(image.min()):.4g} everywhere; it is empty, or does not overlap with the other"
                )
        started = time.perf_counter()
        with torch.no_grad(), self._naming(f"cannot register {fixed} and {moving}"):
            predicted = self.inferer.predict(images, self.network)
            result = None
            if self.inferer.refine is not None:
                size = tuple(images.shape[2:])
                further = {} if beside is None else beside(Grid(size, own), Grid(size, target))
                result = self.inferer.refined(images, predicted, **further)
        seconds = time.perf_counter() - started

        def seen(ddf: Tensor) -> Tensor:
            """A field of the bundle's grid, in voxels of ``grid`` and on it."""
            inner = from_space(ddf.detach(), np.eye(4), fixed_to_moving(own, target))
            return repair(move_to_grid(inner, own, grid.size, grid.affine))

        if result is not None:  # its inverse is not on this grid
            result = replace(result, ddf=seen(result.ddf), backward=None, seconds=seconds)
        return seen(predicted), result

    def _part(self, parser: ConfigParser, name: str) -> Any:
        found = name if parser.get(name) is not None or name != "network" else "network_def"
        if parser.get(found) is None:
            raise ValueError(f"bundle {self.folder} must define {name} in its inference configuration")
        with self._naming(f"cannot make its {name}"):
            return parser.get_parsed_content(found)

    @contextmanager
    def _naming(self, problem: str) -> Iterator[None]:
        """Make a ValueError of RuntimeError, which MONAI and torch raise for whatever goes wrong in a component."""
        try:
            yield
        except RuntimeError as error:
            raise ValueError(f"bundle {self.folder} {problem}: {error.__cause__ or error}") from error


def _fit_levels(parser: ConfigParser, settings: Mapping[str, Any]) -> None:
    """Of a bundle's own values per level, keep the fine end where there are fewer levels in the ``settings``."""
    scales = settings.get("scales", "auto")
    for name in {"damping", "smooth_gradient", "similarity"} - set(settings):
        own = parser.get(f"refine#{name}")
        if isinstance(own, list) and isinstance(scales, Sequence) and not isinstance(scales, str):
            parser[f"refine#{name}"] = own[-len(scales) :]


def _same_orientation(affine: np.ndarray, other: np.ndarray) -> bool:
    """Whether voxel axes point the same way, to within 60 degrees."""
    a, b = (m[:3, :3] / np.linalg.norm(m[:3, :3], axis=0) for m in (affine, other))
    return bool(((a * b).sum(0) > 0.5).all())


@contextmanager
def _scripts_of(folder: Path) -> Iterator[None]:
    """The bundle's own modules can be imported, as ``monai.bundle run`` has it in the bundle's folder."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name not in before and name.split(".")[0] == "scripts"]:
            del sys.modules[name]  # another bundle has modules of the same name


def save_weights(network: nn.Module, file: str | Path) -> None:
    """Write a plain state dictionary in half precision, as ``models/model.pt`` of a bundle."""
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    torch.save(_halved(network.state_dict()), file)


def _halved(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights in half precision; modules that share a tensor still share it, so that the file holds it once."""
    shared: dict[tuple[object, ...], Tensor] = {}
    halved = {}
    for name, tensor in weights.items():
        key = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
        halved[name] = shared.setdefault(key, tensor.half() if tensor.is_floating_point() else tensor)
    return halved


@contextmanager
def shown_files(pair: Pair) -> Iterator[tuple[Path, Path]]:
    """The files of a pair for a bundle to read, new ones where it shall see something else than they hold.

    Of an image with a mask or a lesion that is what is not hidden, the holes and the lesion filled from around; of a
    moving image with an initial affine, what that brings onto the fixed grid.
    """
    fixed, moving, f = pair.fixed.path, pair.moving.path, pair.fixed.grid
    with TemporaryDirectory() as folder:
        seen = _seen(pair.fixed, pair.mask, pair.lesion)
        if seen is not pair.fixed.data:
            fixed = _written(Path(folder) / "fixed", fixed, seen, f.affine)
        data, grid = _seen(pair.moving, pair.moving_mask, pair.moving_lesion), pair.moving.grid
        if pair.initial is not None or data is not pair.moving.data:
            if pair.initial is not None:
                still = torch.zeros(1, len(f.size), *f.size)
                data = resample_moving(data, still, f.affine, grid.affine, pair.initial, padding_mode="zeros")
                grid = f
            moving = _written(Path(folder) / "moving", moving, data, grid.affine)
        yield fixed, moving


def _seen(image: Image, mask: Image | None, lesion: Image | None) -> Tensor:
    """What of an image ``(1, 1, *S)`` neither its mask nor its lesion hides, continued into what they do."""
    if mask is None and lesion is None:
        return image.data
    shows = torch.ones_like(image.data) if mask is None else mask.data
    return filled(image.data, shows, None if lesion is None else lesion.data)


def _written(folder: Path, path: Path, data: Tensor, affine: np.ndarray) -> Path:
    """A file in a new folder, of the name of another one, of an image ``(1, 1, *S)``."""
    folder.mkdir()
    file = folder / f"{path.name.split('.')[0]}.nii.gz"
    save_nifti(file, data[0, 0].numpy(), affine, "none")
    return file
