"""Headers with random bytes: the documented error, or the field that the changed header says; nothing else.

``python -m pytest -m slow tests/io/test_fuzz.py`` tries 10,000 of each kind, or as many as ``$MONAI_LM_FUZZ`` says.
"""

import os
import re
import struct

import nibabel as nib
import numpy as np
import pytest

from monai_lm.io import read_affine, read_ddf, write_ddf
from monai_lm.io.images import Image
from monai_lm.io.simpleitk import reader_of

SIZE = (5, 4, 3)
GRID = np.array([[-1.5, 0, 0, 7.0], [0, 0, 3.0, -20.0], [0, 2.0, 0, 30.0], [0, 0, 0, 1.0]])
LPS = np.diag([-1.0, -1.0, 1.0])
AFNI = b'<AFNI_atr atr_name="BRICK_LABS" > "x_delta~y_delta~z_delta" </AFNI_atr>'
NUMBERS = ("TransformParameters", "TransformFixedParameters")
FEW, MANY = 40, int(os.environ.get("MONAI_LM_FUZZ", "10000"))


def field():
    return np.random.default_rng(0).normal(size=(3, *SIZE)).astype(np.float32)


def afni(path):
    vectors = np.einsum("ij,j...->...i", LPS @ GRID[:3, :3], field())[..., None, :]
    image = nib.Nifti1Image(vectors.astype(np.float32), GRID)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("afni", AFNI))
    nib.save(image, path)


def niftyreg(path):
    vectors = np.einsum("ij,j...->...i", GRID[:3, :3], field())[..., None, :]
    image = nib.Nifti1Image(vectors.astype(np.float32), GRID)
    image.header["intent_code"], image.header["intent_p1"], image.header["intent_name"] = 1007, 1, b"NREG_TRANS"
    nib.save(image, path)


def freesurfer(path):
    """Displacements in RAS millimetres, behind which a tag says so."""
    vectors = np.einsum("ij,j...->...i", GRID[:3, :3], field())
    nib.save(nib.MGHImage(vectors.astype(np.float32), GRID), path)
    content = bytearray(path.read_bytes())
    content[:4] = (3 << 8 | 1).to_bytes(4, "big")
    path.write_bytes(content + struct.pack(">iqiif", 13, 12, 3, 1, 0.0))


def freesurfer_nifti(path):
    """The same in NIfTI, where an extension says so."""
    vectors = np.einsum("ij,j...->...i", GRID[:3, :3], field())[..., None, :]
    image = nib.Nifti1Image(vectors.astype(np.float32), GRID)
    tags = b">\0\3\1" + struct.pack(">iqiif", 13, 12, 3, 1, 0.0) + struct.pack(">iqc", -1, 1, b"*")
    image.header["intent_code"] = 1006
    image.header.extensions.append(nib.nifti1.Nifti1Extension(14, tags))
    nib.save(image, path)


def morph(path):
    """Nodes at places in RAS, as a tag says, on an atlas that the tag before tells."""
    led = np.einsum("ij,j...->...i", GRID[:3, :3], field() + np.indices(SIZE)) + GRID[:3, 3]
    nodes = np.zeros(SIZE, [("before", ">f4", 3), ("place", ">f4", 3), ("node", ">i4", 3)])
    nodes["before"], nodes["place"] = 1, led
    edges = np.linalg.norm(GRID[:3, :3], axis=0)
    centre = GRID[:3, :3] @ (np.array(SIZE) / 2) + GRID[:3, 3]
    place = struct.pack(">4i15f512x", 1, *SIZE, *edges, *(GRID[:3, :3] / edges).T.ravel(), *centre)
    tags = struct.pack(">i", 10) + 2 * place + struct.pack(">ii", 11, 1)
    path.write_bytes(struct.pack(">f4if", 1.0, *SIZE, 1, 20.0) + nodes.tobytes() + tags)


def transform(path):
    write_ddf(path, field(), GRID, "itk_transform")


def linear(path):
    import SimpleITK

    SimpleITK.WriteTransform(SimpleITK.Euler3DTransform((1, 2, 3), 0.1, -0.2, 0.3, (4, 5, 6)), str(path))


def image(path):
    nib.save((nib.MGHImage if path.suffix == ".mgh" else nib.Nifti1Image)(field()[0], GRID), path)


def by_nibabel(path):
    """The affine and the vectors ``(N, components)`` of a NIfTI file, as they are in it, by nibabel."""
    loaded = nib.load(path)
    data = np.asanyarray(loaded.dataobj).astype(np.float64)
    return loaded.affine, data.reshape(-1, data.shape[-1]), loaded.header


def by_simpleitk(path):
    """The affine, in RAS, and the vectors, in LPS, of MetaImage and NRRD, by SimpleITK."""
    import SimpleITK

    read = SimpleITK.ReadImage(str(path), imageIO=reader_of(path))
    n, affine = read.GetDimension(), np.eye(4)
    affine[:n, :n] = np.reshape(read.GetDirection(), (n, n)) * read.GetSpacing()
    affine[:n, 3] = read.GetOrigin()
    data = np.moveaxis(SimpleITK.GetArrayFromImage(read), range(n), range(n)[::-1])
    return np.diag([-1, -1, 1, 1]) @ affine, data.reshape(-1, data.shape[-1]).astype(np.float64), None


def check_field(path, name, result):
    """The field moves its voxels as the vectors of the file say, read by the library that the file is for."""
    ddf, affine = result
    n = len(ddf)
    assert ddf.dtype == np.float32
    assert np.isfinite(ddf).all()
    theirs, vectors, header = by_simpleitk(path) if name in ("metaimage", "nrrd") else by_nibabel(path)
    unit = {"micron": 1e-3, "meter": 1e3}.get(header.get_xyzt_units()[0], 1.0) if header else 1.0
    np.testing.assert_allclose(affine[:3], unit * theirs[:3], rtol=1e-6, atol=1e-6)
    led = ddf.reshape(n, -1).astype(np.float64)
    if name != "voxel":
        led = affine[:n, :n] @ led
        is_lps = name in ("metaimage", "nrrd", "afni") or (name == "itk" and int(header["intent_code"]) == 1007)
        vectors = vectors[:, :3] * (LPS if is_lps else np.eye(3)).diagonal()[: vectors.shape[1]]
        if name == "niftyreg" and int(header["intent_p1"]) == 0:
            voxels = np.stack(np.meshgrid(*[np.arange(s) for s in ddf.shape[1:]], indexing="ij")).reshape(n, -1)
            vectors[:, :n] -= (affine[:n, :n] @ voxels + affine[:n, 3:]).T
    size = max(1.0, np.abs(vectors).max(), *np.abs(affine).ravel())
    np.testing.assert_allclose(led.T, vectors[:, :n], rtol=1e-3, atol=1e-5 * size)


def mgh(path):
    """By nibabel, which knows no intents: the second byte of the version."""
    return nib.MGHImage.from_bytes(b"\0\0\0\1" + path.read_bytes()[4:])


def check_warp(path, name, result):  # noqa: ARG001
    """As :func:`check_field`, where the tag still says that they are displacements in RAS."""
    if struct.unpack(">i", path.read_bytes()[-12:-8])[0] == 3:
        (ddf, affine), image = result, mgh(path)
        np.testing.assert_allclose(affine, image.affine, rtol=1e-6, atol=1e-6)
        vectors = np.asanyarray(image.dataobj).astype(np.float64).reshape(-1, 3)
        size = max(1.0, np.abs(vectors).max(), *np.abs(affine).ravel())
        led = affine[:3, :3] @ ddf.reshape(3, -1).astype(np.float64)
        np.testing.assert_allclose(led.T, vectors, rtol=1e-3, atol=1e-5 * size)


def check_nifti_warp(path, name, result):
    """As :func:`check_field`, where the tag still says that they are displacements in RAS of every voxel."""
    if path.read_bytes()[364:384] == struct.pack(">iqii", 13, 12, 3, 1):
        check_field(path, name, result)


def check_morph(path, name, result):  # noqa: ARG001
    """Where the header and the last tag are as they were, nodes are led to the places of the file."""
    content, (ddf, affine) = path.read_bytes(), result
    assert ddf.dtype == np.float32
    assert np.isfinite(ddf).all()
    if content[:20] == struct.pack(">f4i", 1.0, *SIZE, 1) and content[-8:] == struct.pack(">ii", 11, 1):
        numbers = np.frombuffer(content, ">f4", 9 * 60, 24).reshape(60, 9).astype(np.float64)
        known = (numbers[:, :6] != 0).any(1)
        led = affine[:3, :3] @ (ddf + np.indices(SIZE)).reshape(3, -1).astype(np.float64) + affine[:3, 3:]
        size = max(1.0, np.abs(numbers[:, 3:6]).max(), *np.abs(affine).ravel())
        np.testing.assert_allclose(led.T[known], numbers[known, 3:6], rtol=1e-3, atol=1e-5 * size)


def check_fsl(path, name, result):  # noqa: ARG001
    ddf, affine = result
    assert ddf.dtype == np.float32
    assert np.isfinite(ddf).all()
    np.testing.assert_allclose(affine[:3], nib.load(path).affine[:3], rtol=1e-6)


def check_transform(path, name, result):  # noqa: ARG001
    """Some voxels are led to where SimpleITK leads them."""
    import SimpleITK

    assert_leads_as(result, SimpleITK.ReadTransform(str(path)))


def assert_leads_as(result, read):
    ddf, affine = result
    assert ddf.dtype == np.float32
    assert np.isfinite(ddf).all()
    n = len(ddf)
    for voxel in ([0] * n, [1] * n, [s - 1 for s in ddf.shape[1:]]):
        start = affine[:n, :n] @ voxel + affine[:n, 3]
        end = start + affine[:n, :n] @ ddf[(slice(None), *voxel)].astype(np.float64)
        theirs = LPS[:n, :n] @ read.TransformPoint((LPS[:n, :n] @ start).tolist())
        np.testing.assert_allclose(end, theirs, rtol=1e-3, atol=1e-4 * max(1.0, np.abs(affine).max()))


def check_affine(path, name, result):  # noqa: ARG001
    import SimpleITK

    assert_moves_as(result, SimpleITK.ReadTransform(str(path)))


def assert_moves_as(result, read):
    n = read.GetDimension()
    for point in (np.zeros(n), np.arange(1.0, n + 1)):
        theirs = LPS[:n, :n] @ read.TransformPoint((LPS[:n, :n] @ point).tolist())
        np.testing.assert_allclose(result[:n, :n] @ point + result[:n, 3], theirs, rtol=1e-4, atol=1e-4)


def check_text(path, name, result):  # noqa: ARG001
    """As :func:`check_affine` of the numbers in the text: ITK's reader crashes on some of them."""
    import SimpleITK

    text = path.read_bytes().decode("latin-1")
    numbers = dict(re.findall(r"^(Parameters|FixedParameters):(.*)$", text, re.MULTILINE))
    if "Transform: Euler3DTransform_" in text and len(numbers) == 2:
        read = SimpleITK.Euler3DTransform()
        fixed = [float(word) for word in numbers["FixedParameters"].split()]
        read.SetFixedParameters([*fixed, 0.0][:4])  # the fourth may be missing
        read.SetParameters([float(word) for word in numbers["Parameters"].split()])
        assert_moves_as(result, read)


def by_pyfive(path):
    """The transform of a file with its numbers as pyfive reads them: ITK's HDF5 crashes on some files."""
    import pyfive
    import SimpleITK

    with pyfive.File(path) as file:
        group = file["TransformGroup/0"]
        parameters, fixed = (group[name][()].tolist() if name in group else [] for name in NUMBERS)
        kind = group["TransformType"][()][0].decode().split("_")[0]
    is_field = kind == "DisplacementFieldTransform"
    read = SimpleITK.DisplacementFieldTransform(3) if is_field else SimpleITK.Euler3DTransform()
    read.SetFixedParameters(fixed if is_field else [*fixed, 0.0][:4])
    read.SetParameters(parameters)
    return read


def check_h5(path, name, result):  # noqa: ARG001
    assert_leads_as(result, by_pyfive(path))


def check_affine_h5(path, name, result):  # noqa: ARG001
    assert_moves_as(result, by_pyfive(path))


def check_image(path, name, result):  # noqa: ARG001
    loaded = mgh(path) if path.suffix == ".mgh" else nib.load(path)
    np.testing.assert_allclose(result.data.numpy().ravel(), np.asanyarray(loaded.dataobj).ravel(), rtol=1e-6)


def written(name):
    return lambda path: write_ddf(path, field(), GRID, name)


CASES = {
    "fsl": ("u.nii", written("fsl"), read_ddf, check_fsl, 352),
    "itk": ("u.nii", written("itk"), read_ddf, check_field, 352),
    "voxel": ("u.nii", written("voxel"), read_ddf, check_field, 352),
    "afni": ("u.nii", afni, read_ddf, check_field, 460),
    "niftyreg": ("u.nii", niftyreg, read_ddf, check_field, 352),
    "freesurfer": ("u.mgh", freesurfer, read_ddf, check_warp, 1 << 20),
    "freesurfer nii": ("u.nii", freesurfer_nifti, read_ddf, check_nifti_warp, 412),
    "m3z": ("u.m3d", morph, read_ddf, check_morph, 1 << 20),
    "metaimage": ("u.mha", written("metaimage"), read_ddf, check_field, 330),
    "nrrd": ("u.nrrd", written("nrrd"), read_ddf, check_field, 330),
    "itk_transform": ("u.tfm", transform, read_ddf, check_transform, 6000),
    "itk_transform h5": ("u.h5", transform, read_ddf, check_h5, 1 << 20),
    "affine h5": ("x.h5", linear, lambda path, _: read_affine(path), check_affine_h5, 1 << 20),
    "affine mat": ("x.mat", linear, lambda path, _: read_affine(path), check_affine, 220),
    "affine tfm": ("x.tfm", linear, lambda path, _: read_affine(path), check_text, 260),
    "image nii": ("i.nii", image, lambda path, _: Image(path), check_image, 352),
    "image mgh": ("i.mgh", image, lambda path, _: Image(path), check_image, 284),
}


def fuzzed(rng, whole, header, is_text):
    """A file with one to three bytes of its header changed, in a text mostly digits to others, or cut off."""
    out = bytearray(whole)
    header = min(header, len(out))
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(header))
        if is_text and chr(out[at]).isdigit() and rng.random() < 0.8:
            out[at] = ord(str(rng.integers(10)))
        else:
            out[at] = rng.integers(256) if rng.random() < 0.5 else out[at] ^ (1 << int(rng.integers(8)))
    return bytes(out[: rng.integers(header)] if rng.random() < 0.02 else out)


def try_headers(path, case, count):
    """Fuzz; returns how many files were still read."""
    name, (_, save, read, check, header) = case, CASES[case]
    if save not in (afni, niftyreg, freesurfer, freesurfer_nifti, morph, image) and name not in ("itk", "voxel", "fsl"):
        pytest.importorskip("SimpleITK")
    if path.suffix == ".h5":
        pytest.importorskip("pyfive")
    save(path)
    whole, rng, good = path.read_bytes(), np.random.default_rng(7), 0
    for i in range(count):
        path.write_bytes(fuzzed(rng, whole, header, path.suffix in (".mha", ".nrrd", ".tfm")))
        try:
            result = read(path, name.split(" ")[0])
        except ValueError as error:
            if path.name not in str(error):
                raise AssertionError(f"header {i}") from error
            continue
        check(path, name, result)
        good += 1
    return good


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_few_headers(tmp_path, case):
    assert try_headers(tmp_path / CASES[case][0], case, FEW) > 0


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_many_headers(tmp_path, case):
    assert try_headers(tmp_path / CASES[case][0], case, MANY) > MANY // 100
