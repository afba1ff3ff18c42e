"""Fixtures shared by all tests: sizes in 2D and 3D, seeded random tensors and fields, real data."""

from __future__ import annotations

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from monai_lm.fields import gaussian_smooth

PROJECT_ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser):
    """``--device``, for the tests that are marked ``gpu``."""
    parser.addoption("--device", help="device of the tests marked gpu, such as cuda:1, or cpu to try them out")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """The whole suite runs in two processes of one thread each where pytest-xdist is there; ``-n`` chooses otherwise.

    A file stays in one process, for what its tests share.
    """
    given, whole = config.option, config.args_source is not pytest.Config.ArgsSource.ARGS
    if not config.pluginmanager.hasplugin("xdist") or hasattr(config, "workerinput"):  # a worker comes here too
        return
    if whole and given.numprocesses is None and not (given.collectonly or given.usepdb):
        given.numprocesses, given.dist, given.loadscopereorder = 2, "loadfile", False
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items):
    """Refuse names that differ between processes, which could not share the tests then."""
    if changing := [item.nodeid for item in items if " at 0x" in item.nodeid]:
        raise pytest.UsageError(f"give these tests ids without addresses: {changing}")


@pytest.fixture(params=[(6, 5), (4, 5, 3)], ids=["2D", "3D"])
def size(request):
    """A tiny grid with a different length along every axis; a test that uses it runs in 2D and in 3D."""
    return request.param


@pytest.fixture(scope="session")
def generator():
    """``generator(seed)``: a new CPU generator."""
    return lambda seed=0: torch.Generator().manual_seed(seed)


@pytest.fixture(scope="session")
def random_tensor(generator):
    """``random_tensor(shape, seed)``: standard normal values, float64 unless asked."""

    def make(shape, seed=0, dtype=torch.float64):
        return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)

    return make


@pytest.fixture(scope="session")
def smooth_image(random_tensor):
    """``smooth_image(shape, sigma, seed)``: ``(B, C, *S)`` normal noise after a Gaussian that is not the package's."""

    def make(shape, sigma=2.0, seed=0, dtype=torch.float64):
        image = random_tensor(shape, seed)
        for dim in range(2, image.dim()):
            i = torch.arange(image.shape[dim], dtype=torch.float64)
            weight = torch.exp(-0.5 * ((i[:, None] - i) / sigma) ** 2)
            weight = weight / weight.sum(1, keepdim=True)
            image = torch.movedim(torch.movedim(image, dim, -1) @ weight.T, -1, dim)
        return image.to(dtype)

    return make


@pytest.fixture(scope="session")
def smooth_field(smooth_image):
    """``smooth_field(shape, amplitude, sigma, seed)``: ``(B, n, *S)``, largest displacement component ``amplitude``.

    With ``vanish`` the field falls off to zero at the border, smoothly, over the whole grid.
    """

    def make(shape, amplitude=1.0, sigma=3.0, seed=0, dtype=torch.float64, vanish=False):
        field = smooth_image(shape, sigma, seed)
        for dim in range(2, field.dim()) if vanish else ():
            window = torch.hann_window(field.shape[dim], periodic=False, dtype=torch.float64)
            field = field * window.view([-1 if d == dim else 1 for d in range(field.dim())])
        return (field * (amplitude / field.abs().max())).to(dtype)

    return make


@pytest.fixture(scope="session")
def flip_field():
    """``flip_field(field, axis)``: the field of the mirrored space, vectors included."""

    def flip(field, axis):
        flipped = field.flip(2 + axis).clone()
        flipped[:, axis] *= -1
        return flipped

    return flip


@pytest.fixture(scope="session")
def transpose_field():
    """``transpose_field(field)``: the field of the space with its axes in reversed order, vectors included."""

    def transpose(field):
        axes = range(field.dim() - 1, 1, -1)
        return field.permute(0, 1, *axes).flip(1).contiguous()

    return transpose


@pytest.fixture(scope="session")
def interior():
    """``interior(tensor, margin)``: a ``(B, C, *S)`` tensor without ``margin`` voxels at every edge."""

    def crop(tensor, margin):
        return tensor[(..., *[slice(margin, s - margin) for s in tensor.shape[2:]])]

    return crop


@pytest.fixture(scope="session")
def data_root():
    """Folder of the real images: environment variable ``MONAI_LM_DATA``, default ``../shared/data``."""
    default = PROJECT_ROOT.parent / "shared" / "data"
    folder = Path(os.environ.get("MONAI_LM_DATA", default)).expanduser()
    if not folder.is_absolute():
        folder = PROJECT_ROOT / folder
    if not folder.is_dir():
        pytest.skip(f"real images not found at {folder}; set MONAI_LM_DATA to their folder")
    return folder


@pytest.fixture(scope="session")
def cohort(tmp_path_factory):
    """Folder with ``images`` and ``labels`` of six subjects: blobs at places of their own, 12 × 14 × 10 voxels."""
    root = tmp_path_factory.mktemp("cohort")
    generator = torch.Generator().manual_seed(0)
    affine = np.diag([1.5, 1.0, 2.0, 1.0])
    for folder in ("images", "labels"):
        (root / folder).mkdir()
    for number in range(6):
        noise = torch.randn(1, 1, 12, 14, 10, generator=generator)
        image = (gaussian_smooth(noise, 2.0)[0, 0] * 1000).numpy()
        label = (image > np.percentile(image, 70)).astype(np.uint8) + (image > np.percentile(image, 90))
        nib.save(nib.Nifti1Image(image.astype(np.float32), affine), root / "images" / f"s{number}.nii.gz")
        nib.save(nib.Nifti1Image(label.astype(np.uint8), affine), root / "labels" / f"s{number}.nii.gz")
    return root
