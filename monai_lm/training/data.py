"""A LightningDataModule that turns lists of images into pairs on one grid."""

from __future__ import annotations

import hashlib
import pickle
import random
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytorch_lightning as pl
import torch
from monai.data import CacheDataset, DataLoader, MetaTensor, PersistentDataset, list_data_collate
from monai.data import Dataset as TransformDataset
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    Lambdad,
    LoadImaged,
    ResizeWithPadOrCropd,
    ScaleIntensityRangePercentilesd,
)
from pytorch_lightning.overrides.distributed import UnrepeatedDistributedSampler
from torch.utils.data import Dataset, get_worker_info

from monai_lm.io.datalist import (
    PARTS,
    SYNONYMS,
    Entry,
    check_files,
    draw_pairs,
    named,
    read_list,
    split_subjects,
    subject_of,
)

__all__ = ["PairDataModule", "PairDataset"]

_STAGES = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",), "predict": ("predict",)}


class PairDataModule(pl.LightningDataModule):
    """Pairs of images for training, validation, test and prediction.

    Subjects are divided over the parts, and pairs are formed within a part only. Every image is loaded once, scaled
    between its 0.5 and 99.5 percentiles to [0, 1] and, with ``grid``, padded or cropped about its centre. All files are
    looked at before anything starts.

    Args:
        data: subjects (``image``, ``label``, ``subject``) or pairs (``fixed``, ``moving`` and optionally
            ``fixed_label``, ``moving_label``, ``fixed_points``, ``moving_points``, ``name``): a folder with ``images``
            and ``labels``, a CSV or JSON file, a list, or a MONAI datalist, a dictionary of lists by part. Points are
            CSV files of voxel coordinates of the image as stored, one point per line, without a header.
        root: what relative paths start from.
        split: subjects of every part, as a JSON file or a dictionary, or the fractions of train, validation and test;
            where the data itself says ``part``, it is not asked for.
        pairing: how subjects become pairs: ``"random"`` or ``"all"`` pairs of different subjects, ``"intra"`` those of
            images of one subject. Training draws such pairs anew in every epoch, unless the data are pairs.
        pairs: how many pairs a part has, one number or a dictionary by part: drawn from the subjects, or the first of
            pairs that are listed; ``None`` takes them all.
        predict: the part that ``predict`` takes where the data has none of that name; as many pairs as ``pairs`` says
            for ``predict``, else for that part.
        labels: number of label values including the background, or the values themselves; files with others are
            refused. ``None`` does not look.
        grid: voxel counts of the common grid; ``None`` leaves the images as they are, which then must fit each other.
        transform: replaces the default loading of a dictionary with ``image`` and perhaps ``label``; MONAI's keys.
        augmentation: applied to every training pair, a dictionary with ``fixed``, ``moving`` and their labels.
        cache: ``"memory"`` keeps the loaded images, a folder keeps them there (MONAI's ``PersistentDataset``, by path,
            size and time of change of the files and by what loads them), ``None`` loads them anew.
        batch_size: pairs per batch; they must have one size, so 1 without a ``grid``, unless all have.
        num_workers: processes that load.
        seed: of splits and pairs.
        pin_memory: page-locked batches, which are copied to a CUDA device faster; ``None``: where there is one.

    Raises:
        ValueError: data that cannot be used, with one line per file and reason; raised by ``setup``.
    """

    def __init__(
        self,
        data: str | Path | Sequence[Mapping[str, Any]] | Mapping[str, Any],
        root: str | Path | None = None,
        split: str | Path | Mapping[str, Sequence[str]] | Sequence[float] = (0.8, 0.1, 0.1),
        pairing: str = "random",
        pairs: int | Mapping[str, int] | None = None,
        predict: str = "test",
        labels: int | Sequence[int] | None = None,
        grid: Sequence[int] | None = None,
        transform: Callable[[Any], Any] | None = None,
        augmentation: Callable[[Any], Any] | None = None,
        cache: str | Path | None = "memory",
        batch_size: int = 1,
        num_workers: int = 0,
        seed: int = 0,
        pin_memory: bool | None = None,
    ) -> None:
        super().__init__()
        if predict not in PARTS:
            raise ValueError(f"predict must be one of {PARTS}, got {predict!r}")
        if isinstance(pairs, Mapping) and (
            unknown := sorted({SYNONYMS.get(part, part) for part in pairs} - set(PARTS))
        ):
            raise ValueError(f"pairs must name parts among {PARTS}, got {unknown}")
        if grid is not None and (isinstance(grid, str) or len(grid) not in (2, 3) or min(grid) < 2):
            raise ValueError(f"grid must be 2 or 3 voxel counts of at least 2, got {grid!r}")
        self.source, self.root, self.split, self.pairing = data, root, split, pairing
        self.counts = {SYNONYMS.get(k, k): v for k, v in pairs.items()} if isinstance(pairs, Mapping) else pairs
        self.predict_part, self.grid, self.cache, self.seed = predict, grid, cache, seed
        self.values = range(1, labels) if isinstance(labels, int) else labels
        self.transform, self.augmentation = transform, augmentation
        self.batch_size, self.num_workers, self.pin_memory = batch_size, num_workers, pin_memory
        self.datasets: dict[str, PairDataset] = {}
        self._parts: dict[str, list[Entry]] | None = None
        self._done: Callable[[Entry], bool] | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read, split and check what a stage needs, and make its data sets."""
        parts = self._read()
        wanted = [p for names in ([_STAGES[stage]] if stage else _STAGES.values()) for p in names]
        for part in dict.fromkeys(wanted):
            source = self.predict_part if part == "predict" and not parts.get(part) else part
            if parts.get(source) and part not in self.datasets:
                self.datasets[part] = self._dataset(part, source, parts[source])

    def skip(self, done: Callable[[Entry], bool] | None) -> None:
        """Leave out the pairs that are ``done`` whenever pairs to predict are asked for; ``None`` leaves out none."""
        self._done = done

    def train_dataloader(self) -> DataLoader:
        """Training pairs in random order."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader | list:
        """Validation pairs; none if there are none."""
        return self._loader("validation") if "validation" in self.datasets else []

    def test_dataloader(self) -> DataLoader:
        """Test pairs."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader:
        """Pairs to predict, without those that :meth:`skip` leaves out."""
        return self._loader("predict", self._done)

    def _read(self) -> dict[str, list[Entry]]:
        """Entries by part; subjects without a part are split."""
        if self._parts is None:
            parts = read_list(self.source, self.root)
            loose = parts.pop("", [])
            subjects = [entry for entry in loose if "image" in entry]
            if len(subjects) < len(loose):  # pairs that say nothing are to be predicted
                parts.setdefault("predict", []).extend(entry for entry in loose if "fixed" in entry)
            if subjects:
                parts |= split_subjects(subjects, self.split, self.seed)
            _check_parts(parts)
            self._parts = parts
        return self._parts

    def _dataset(self, part: str, source: str, entries: list[Entry]) -> PairDataset:
        """The pairs of a part, made of the entries of the part ``source``."""
        counts, training = self.counts, part == "train"
        count = counts.get(part, counts.get(source)) if isinstance(counts, Mapping) else counts
        drawn = "fixed" not in entries[0]
        if drawn:
            draw = None if training else count
            pairs = [_joined(entries[f], entries[m]) for f, m in draw_pairs(entries, self.pairing, draw, self.seed)]
        else:
            pairs = entries[:count]
        pairs = named(pairs)
        check_files(pairs, self.values, same_grid=self.grid is None and self.transform is None)
        images: dict[tuple[str, str | None], int] = {}
        for pair in pairs:
            for role in ("fixed", "moving"):
                pair[f"{role}_index"] = images.setdefault((pair[role], pair.get(f"{role}_label")), len(images))
        loaded = self._cached([{"image": i} | ({"label": la} if la else {}) for i, la in images])
        augmentation = self.augmentation if training else None
        return PairDataset(loaded, pairs, count if training and drawn else None, augmentation)

    def _cached(self, files: list[Entry]) -> Dataset:
        transform = default_transform(self.grid) if self.transform is None else self.transform
        if self.cache == "memory":
            return CacheDataset(files, transform, progress=False)
        if self.cache is None:
            return TransformDataset(files, transform)
        how = f"{self.grid}" if self.transform is None else _pickled(transform)
        return PersistentDataset(files, transform, self.cache, hash_func=lambda entry: _cache_key(entry, how))

    def _loader(self, part: str, done: Callable[[Entry], bool] | None = None) -> DataLoader:
        if part not in self.datasets:
            raise ValueError(f"data must have pairs for the part {part!r}, got parts {sorted(self._read())}")
        dataset = self.datasets[part]
        if done is not None:
            left = [pair for pair in dataset.pairs if not done(pair)]
            dataset = PairDataset(dataset.images, left, dataset.count, dataset.augmentation)
        sampler = None
        world = self.trainer.world_size if self.trainer is not None else 1
        if part != "train" and world > 1:  # every pair once, where Lightning's own sampler repeats some
            assert self.trainer is not None
            sampler = UnrepeatedDistributedSampler(
                dataset, num_replicas=world, rank=self.trainer.global_rank, shuffle=False
            )
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=part == "train",
            sampler=sampler,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available() if self.pin_memory is None else self.pin_memory,
            persistent_workers=self.num_workers > 0 and part == "train",
            collate_fn=_collated,
        )


class PairDataset(Dataset):
    """Pairs of loaded images.

    Args:
        images: data set of dictionaries with ``image`` and perhaps ``label``, ``(1, *S)``.
        pairs: dictionaries with ``name``, ``fixed_index``, ``moving_index`` and perhaps paths of points.
        count: draw so many of the pairs anew every time; ``None`` takes each once, in order.
        augmentation: applied to every pair.
    """

    def __init__(
        self,
        images: Any,
        pairs: list[Entry],
        count: int | None = None,
        augmentation: Callable[[Any], Any] | None = None,
    ) -> None:
        self.images, self.pairs, self.count, self.augmentation = images, pairs, count, augmentation

    def __len__(self) -> int:
        return len(self.pairs) if self.count is None else self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair = self.pairs[index if self.count is None else _draw(index, len(self.pairs))]
        item: dict[str, Any] = {"name": pair["name"]}
        for role in ("fixed", "moving"):
            loaded = self.images[pair[f"{role}_index"]]
            item[role] = loaded["image"]
            if "label" in loaded:
                item[f"{role}_label"] = loaded["label"]
            if f"{role}_points" in pair:
                item[f"{role}_points"] = read_points(pair[f"{role}_points"], pair[role], item[role])
        return item if self.augmentation is None else self.augmentation(item)


def read_points(path: str, stored: str, image: MetaTensor) -> torch.Tensor:
    """Landmarks ``(N, n)`` in voxels of an image, from a file of voxel coordinates of the image as ``stored``."""
    n = image.dim() - 1
    expected = f"must be lines of {n} numbers between commas, voxels without a header,"
    try:
        points = np.loadtxt(path, delimiter=",", ndmin=2)
    except ValueError as error:
        raise ValueError(f"{path}: {expected} got others: {error}") from error
    if points.shape[1] != n or not np.isfinite(points).all():
        raise ValueError(f"{path}: {expected} got shape {points.shape}")
    stored_image: Any = nib.load(stored)
    affine = np.linalg.inv(np.asarray(image.affine, dtype=float)) @ stored_image.affine
    moved = np.pad(points, ((0, 0), (0, 3 - n))) @ affine[:3, :3].T + affine[:3, 3]
    return torch.as_tensor(moved[:, :n], dtype=torch.float32)


def default_transform(grid: Sequence[int] | None) -> Compose:
    """Load an ``image`` and its ``label``, scale the image to [0, 1], and pad or crop both about the centre."""
    keys = ["image", "label"]
    steps: list[Any] = [
        LoadImaged("image", image_only=True),
        LoadImaged("label", dtype=np.float64, image_only=True, allow_missing_keys=True),
        Lambdad("label", _as_small_as_exact, allow_missing_keys=True),
        EnsureChannelFirstd(keys, allow_missing_keys=True),
        ScaleIntensityRangePercentilesd("image", lower=0.5, upper=99.5, b_min=0.0, b_max=1.0, clip=True),
    ]
    if grid is not None:
        steps.append(ResizeWithPadOrCropd(keys, tuple(grid), allow_missing_keys=True))
    return Compose(steps)


def _as_small_as_exact(label: MetaTensor) -> MetaTensor:
    """Labels as float32, as MONAI has them, or as they are where that would merge them."""
    return label if float(label.max()) > 2**24 else label.to(torch.float32)  # type: ignore[return-value]


def _cache_key(entry: Any, how: str) -> bytes:
    """What a cached entry is known by: its files as they are now, and what loads them."""
    states = {key: (path, *_size_and_time(path)) for key, path in sorted(entry.items())}
    return hashlib.md5(f"{states} {how}".encode(), usedforsecurity=False).hexdigest().encode()


def _size_and_time(path: str) -> tuple[int, int]:
    state = Path(path).stat()
    return state.st_size, state.st_mtime_ns


def _pickled(transform: Any) -> str:
    """A digest of a transform and its settings, or, where it cannot be pickled, a name that never comes again."""
    try:
        return hashlib.sha256(pickle.dumps(transform)).hexdigest()
    except (AttributeError, TypeError, pickle.PicklingError):
        return uuid.uuid4().hex


def _collated(rows: list[dict[str, Any]]) -> Any:
    """One batch of pairs; ValueError for pairs of different sizes."""
    sizes = {tuple(row["fixed"].shape[1:]) for row in rows}
    if len(sizes) > 1:
        raise ValueError(f"pairs of one batch must have one size, got {sorted(sizes)}; give a grid, or batch_size=1")
    return list_data_collate(rows)


def _draw(index: int, count: int) -> int:
    """A random number below ``count``, other for every epoch, worker, process and index."""
    worker = get_worker_info()
    seed = torch.initial_seed() if worker is not None else int(torch.randint(2**62, ()))
    return random.Random(f"{seed} {index}").randrange(count)


def _joined(fixed: Entry, moving: Entry) -> Entry:
    pair = {"fixed": fixed["image"], "moving": moving["image"]}
    for role, entry in (("fixed", fixed), ("moving", moving)):
        pair |= {f"{role}_{key}": entry[key] for key in ("label",) if key in entry}
    return pair


def _check_parts(parts: Mapping[str, Iterable[Entry]]) -> None:
    """No subject in two of the parts that a network learns from and is judged by."""
    owner: dict[str, str] = {}
    problems = []
    for part in ("train", "validation", "test"):
        for entry in parts.get(part, ()):
            subjects = [subject_of(entry)] if "image" in entry else [entry["fixed"], entry["moving"]]
            problems += [f"{s}: in {owner[s]} and in {part}" for s in subjects if owner.setdefault(s, part) != part]
    if problems:
        lines = "\n".join(f"  {line}" for line in dict.fromkeys(problems))
        raise ValueError(f"data must have every subject in one part only, got\n{lines}")
