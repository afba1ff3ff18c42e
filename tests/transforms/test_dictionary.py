"""Dictionary transforms, alone and in pipelines."""

import pickle

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor
from monai.transforms import Compose, EnsureChannelFirstd, EnsureTyped, LoadImaged, MapTransform, ScaleIntensityd
from torch import Tensor

import monai_lm.transforms as package
from monai_lm import refine
from monai_lm.fields import gaussian_smooth, warp
from monai_lm.io import FORMATS
from monai_lm.transforms import LoadDDFd, RefineDDF, RefineDDFd, SaveDDFd, WarpImage, WarpImaged

SETTINGS = {"iterations": 6, "scales": (2, 1)}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(shape: tuple[int, ...] = (20, 22)) -> dict[str, Tensor]:
    """Fixed ``(1, *S)``, moving ``(1, *S)`` and half the field between them ``(n, *S)``."""
    moving = gaussian_smooth(noise(1, 1, *shape, seed=1), 1.5)
    ddf = gaussian_smooth(noise(1, len(shape), *shape, seed=2), 3.0)
    ddf = ddf * (1.5 / ddf.abs().max())
    return {"fixed": warp(moving, ddf)[0], "moving": moving[0], "ddf": 0.5 * ddf[0]}


def scaling(*spacing: float) -> Tensor:
    return torch.diag(torch.tensor([*spacing, *[1.0] * (4 - len(spacing))], dtype=torch.float64))


def plain(x: Tensor) -> Tensor:
    return x.as_tensor() if isinstance(x, MetaTensor) else x


@pytest.mark.parametrize("name", ["LoadDDF", "RefineDDF", "WarpImage", "SaveDDF", "JacobianDeterminant"])
def test_aliases_are_the_same_class(name):
    transforms = {getattr(package, name + suffix) for suffix in ("d", "D", "Dict")}
    assert len(transforms) == 1
    (transform,) = transforms
    assert issubclass(transform, MapTransform)
    assert {name, name + "d", name + "D", name + "Dict"} <= set(package.__all__)


# --- RefineDDFd -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(20, 22), (12, 13, 14)])
def test_replaces_the_field_and_nothing_else(shape):
    data = {**pair(shape), "name": "patient7"}
    copies = {k: v.clone() for k, v in data.items() if isinstance(v, Tensor)}
    out = RefineDDFd(**SETTINGS)(data)
    expected = RefineDDF(**SETTINGS)(data["fixed"], data["moving"], data["ddf"])
    assert torch.equal(plain(out["ddf"]), plain(expected))
    assert out["ddf"].meta["refinement"]["final_loss"] == expected.meta["refinement"]["final_loss"]
    assert set(out) == set(data)
    assert out["fixed"] is data["fixed"]
    assert out["name"] == "patient7"
    for key, copy in copies.items():
        assert torch.equal(data[key], copy)


def test_keys_can_be_chosen():
    data = pair()
    renamed = {"f": data["fixed"], "m": data["moving"], "u": data["ddf"], "ddf": "something else"}
    out = RefineDDFd("f", "m", "u", device="cpu", **SETTINGS)(renamed)
    assert torch.equal(plain(out["u"]), plain(RefineDDFd(**SETTINGS)(data)["ddf"]))
    assert out["ddf"] == "something else"


def test_a_mask_can_be_a_key():
    data = pair()
    mask = torch.zeros_like(data["fixed"])
    mask[:, : mask.shape[1] // 2] = 1
    out = RefineDDFd(mask_key="organ", **SETTINGS)(data | {"organ": mask})
    images = [data[key][None] for key in ("fixed", "moving", "ddf")]
    assert torch.equal(plain(out["ddf"]), refine(*images, mask[None], **SETTINGS).ddf[0])
    assert not torch.equal(plain(out["ddf"]), refine(*images, **SETTINGS).ddf[0])
    with pytest.raises(KeyError, match=r"organ.*RefineDDFd"):
        RefineDDFd(mask_key="organ", **SETTINGS)(data)
    moving = RefineDDFd(mask_key="organ", moving_mask_key="healthy", **SETTINGS)
    both = moving(data | {"organ": mask, "healthy": mask.flip(2)})
    expected = refine(*images, mask[None], moving_mask=mask.flip(2)[None], **SETTINGS)
    assert torch.equal(plain(both["ddf"]), expected.ddf[0])
    with pytest.raises(KeyError, match=r"healthy.*RefineDDFd"):
        moving(data | {"organ": mask})
    unmasked = RefineDDFd(mask_key="organ", allow_missing_keys=True, **SETTINGS)(data)
    assert torch.equal(plain(unmasked["ddf"]), refine(*images, **SETTINGS).ddf[0])


@pytest.mark.parametrize("key", ["fixed", "moving", "ddf"])
def test_a_missing_key_raises_unless_allowed(key):
    data = pair()
    del data[key]
    with pytest.raises(KeyError, match=f"{key}.*RefineDDFd"):
        RefineDDFd(**SETTINGS)(data)
    out = RefineDDFd(allow_missing_keys=True, **SETTINGS)(data)
    if key == "ddf":  # from the identity
        assert torch.equal(plain(out["ddf"]), refine(data["fixed"][None], data["moving"][None], **SETTINGS).ddf[0])
    else:  # nothing to do
        assert set(out) == set(data)
        assert out["ddf"] is data["ddf"]


def test_pickled_transforms_are_the_same():
    data = pair()
    transform = RefineDDFd(**SETTINGS)
    copy = pickle.loads(pickle.dumps(transform))
    assert torch.equal(plain(copy(data)["ddf"]), plain(transform(data)["ddf"]))


def test_a_pipeline_from_files_to_files(tmp_path):
    """Load, normalise, refine, warp, save: the affine of the fixed image goes all the way."""
    sitk = pytest.importorskip("SimpleITK")
    data, affine = pair((12, 13, 14)), np.diag([-1.0, 1.5, 3.0, 1.0])
    for name in ("fixed", "moving"):
        nib.save(nib.Nifti1Image(100 * data[name][0].numpy() + 500, affine), tmp_path / f"{name}.nii.gz")
    images = ["fixed", "moving"]
    pipeline = Compose(
        [
            LoadImaged(images, image_only=True),
            EnsureChannelFirstd(images),
            ScaleIntensityd(images),
            EnsureTyped(["ddf"]),
            RefineDDFd(**SETTINGS),
            WarpImaged("moving"),
            SaveDDFd("ddf", output_dir=tmp_path / "out", name_key="fixed"),
        ]
    )
    paths = {name: str(tmp_path / f"{name}.nii.gz") for name in images}
    out = pipeline({**paths, "ddf": data["ddf"]})
    expected = refine(
        data["fixed"][None], data["moving"][None], data["ddf"][None], spacing=(1.0, 1.5, 3.0), **SETTINGS
    ).ddf[0]
    assert float((plain(out["ddf"]) - expected).abs().mean()) < 0.01
    for key in ("ddf", "moving"):
        np.testing.assert_allclose(out[key].affine.numpy(), affine)
    warped = warp(plain(pipeline.transforms[2](pipeline.transforms[1](pipeline.transforms[0](paths)))["moving"])[None],
                  plain(out["ddf"])[None])[0]  # fmt: skip
    torch.testing.assert_close(plain(out["moving"]), warped, rtol=0, atol=1e-5)
    image = sitk.ReadImage(str(tmp_path / "out" / "fixed_ddf.nii.gz"))
    assert image.GetSpacing() == pytest.approx((1.0, 1.5, 3.0))
    vectors = sitk.GetArrayFromImage(image).transpose(3, 2, 1, 0)
    factor = np.array([-1.0, -1.0, 1.0]) * np.array([-1.0, 1.5, 3.0])  # LPS times the affine
    np.testing.assert_allclose(vectors, plain(out["ddf"]).numpy() * factor[:, None, None, None], atol=1e-4)


def test_data_loaders_collate_refined_fields():
    data = [pair(), pair()]
    loader = DataLoader(Dataset(data, RefineDDFd(**SETTINGS)), batch_size=2)
    (batch,) = loader
    expected = RefineDDFd(**SETTINGS)(data[0])["ddf"]
    assert torch.equal(plain(batch["ddf"]), torch.stack([plain(expected)] * 2))


# --- WarpImaged -------------------------------------------------------------------------------------------------------


def test_every_key_is_warped_in_its_mode():
    data = {**pair(), "label": (noise(1, 20, 22, seed=4) > 0).float()}
    copies = {k: v.clone() for k, v in data.items()}
    out = WarpImaged(["moving", "label"], mode=["bilinear", "nearest"], padding_mode="zeros")(data)
    assert torch.equal(out["moving"], WarpImage("bilinear", "zeros")(data["moving"], data["ddf"]))
    assert torch.equal(out["label"], WarpImage("nearest", "zeros")(data["label"], data["ddf"]))
    assert not torch.equal(out["label"], data["label"])
    assert out["fixed"] is data["fixed"]
    for key, copy in copies.items():
        assert torch.equal(data[key], copy)


def test_one_mode_serves_all_keys_and_other_fields_can_be_used():
    data = pair()
    data = {"a": data["moving"], "b": data["fixed"], "u": data["ddf"]}
    out = WarpImaged(["a", "b"], ddf_key="u", mode="nearest")(data)
    for key in "ab":
        assert torch.equal(out[key], WarpImage("nearest")(data[key], data["u"]))


def test_missing_images_raise_unless_allowed():
    data = pair()
    with pytest.raises(KeyError, match="label"):
        WarpImaged(["moving", "label"])(data)
    out = WarpImaged(["moving", "label"], allow_missing_keys=True)(data)
    assert set(out) == set(data)
    assert not torch.equal(out["moving"], data["moving"])
    with pytest.raises(KeyError, match="ddf"):
        WarpImaged("moving")({"moving": data["moving"]})


def test_modes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"mode must be one name or one per key \(2\), got 3"):
        WarpImaged(["a", "b"], mode=["nearest"] * 3)
    with pytest.raises(ValueError, match="mode must be 'bilinear' or 'nearest', got 'cubic'"):
        WarpImaged("a", mode="cubic")


# --- SaveDDFd ---------------------------------------------------------------------------------------------------------


def stored_spacing(path) -> list[float]:
    return [float(z) for z in nib.load(path).header.get_zooms()[:3]]


def test_files_are_named_after_the_pair_or_what_is_asked(tmp_path):
    field = MetaTensor(torch.ones(3, 4, 5, 6))
    image = MetaTensor(torch.ones(1, 4, 5, 6), meta={"filename_or_obj": "/data/sub-01.nii.gz"})
    data = {"ddf": field, "image": image, "name": "patient7"}
    out = SaveDDFd("ddf", tmp_path)(data)
    SaveDDFd("ddf", tmp_path, name_key="name", output_postfix="warp")(data)
    SaveDDFd("ddf", tmp_path, name_key="image")(data)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "pair_ddf.nii.gz",
        "patient7_warp.nii.gz",
        "sub-01_ddf.nii.gz",
    ]
    assert set(out) == set(data)
    assert all(out[key] is data[key] for key in data)


def test_two_fields_do_not_overwrite_each_other(tmp_path):
    data = {"ddf": torch.ones(3, 4, 5, 6), "inverse": -torch.ones(3, 4, 5, 6), "name": "patient7"}
    SaveDDFd(["ddf", "inverse"], tmp_path, name_key="name")(data)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_field_without_an_affine_gets_that_of_the_image(tmp_path):
    image = MetaTensor(torch.ones(1, 4, 5, 6), affine=scaling(2, 3, 4))
    for field in (torch.ones(3, 4, 5, 6), np.ones((3, 4, 5, 6), np.float32)):
        SaveDDFd("ddf", tmp_path, affine_key="fixed")({"ddf": field, "fixed": image})
        assert stored_spacing(tmp_path / "pair_ddf.nii.gz") == pytest.approx([2, 3, 4])
    SaveDDFd("ddf", tmp_path)({"ddf": torch.ones(3, 4, 5, 6)})
    assert stored_spacing(tmp_path / "pair_ddf.nii.gz") == pytest.approx([1, 1, 1])


def test_a_field_with_an_affine_of_its_own_keeps_it(tmp_path):
    field = MetaTensor(torch.ones(3, 4, 5, 6), affine=scaling(5, 6, 7))
    image = MetaTensor(torch.ones(1, 4, 5, 6), affine=scaling(2, 3, 4))
    SaveDDFd("ddf", tmp_path, affine_key="fixed")({"ddf": field, "fixed": image})
    assert stored_spacing(tmp_path / "pair_ddf.nii.gz") == pytest.approx([5, 6, 7])
    assert torch.equal(field.affine, scaling(5, 6, 7))
    assert torch.equal(image.affine, scaling(2, 3, 4))


def test_missing_fields_raise_unless_allowed(tmp_path):
    with pytest.raises(KeyError, match="ddf"):
        SaveDDFd("ddf", tmp_path)({})
    assert SaveDDFd("ddf", tmp_path, allow_missing_keys=True)({"a": 1}) == {"a": 1}
    assert list(tmp_path.iterdir()) == []


def test_names_keep_their_dots_and_an_unknown_affine_is_replaced(tmp_path):
    field = MetaTensor(torch.ones(3, 4, 5, 6), meta={"filename_or_obj": "/x/sub.01.nii.gz"})
    fixed = MetaTensor(torch.ones(1, 4, 5, 6), affine=torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0])))
    SaveDDFd("ddf", tmp_path, affine_key="fixed")({"ddf": field, "fixed": fixed})
    written = nib.load(tmp_path / "sub.01_ddf.nii.gz")
    np.testing.assert_allclose(written.affine, fixed.affine)
    np.testing.assert_allclose(np.asarray(written.dataobj)[..., 2], 2.0)
    with pytest.raises(TypeError, match="fixed must be a MetaTensor with an affine, got Tensor"):
        SaveDDFd("ddf", tmp_path, affine_key="fixed")({"ddf": torch.ones(3, 4, 5, 6), "fixed": torch.ones(1, 4, 5, 6)})


# --- LoadDDFd ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_format", FORMATS)
def test_files_become_the_fields_in_them(tmp_path, file_format):
    if file_format == "itk_transform":
        pytest.importorskip("pyfive", reason="pyfive, which reads .h5, is not installed")
    fixed = MetaTensor(torch.zeros(1, 12, 13, 14), affine=scaling(1, 1.5, 3))
    data = {"ddf": pair((12, 13, 14))["ddf"], "fixed": fixed, "name": "a"}
    SaveDDFd("ddf", tmp_path, name_key="name", affine_key="fixed", file_format=file_format)(data)
    (path,) = tmp_path.iterdir()
    out = LoadDDFd("ddf", fixed_key="fixed", file_format=file_format)({**data, "ddf": str(path)})
    torch.testing.assert_close(plain(out["ddf"]), data["ddf"], rtol=0, atol=2e-3)
    torch.testing.assert_close(out["ddf"].affine, fixed.affine)
    assert out["fixed"] is fixed
    moving = MetaTensor(torch.zeros(1, 9, 9, 9), affine=scaling(2, 2, 2))
    led = LoadDDFd("ddf", moving_key="moving")({"ddf": path, "moving": moving})["ddf"]
    assert torch.equal(led.meta["moving_affine"].to(moving.affine), moving.affine)
    assert torch.allclose(plain(led), data["ddf"], atol=2e-3) == (file_format in ("voxel", "learn2reg"))


def test_missing_files_raise_unless_allowed():
    with pytest.raises(KeyError, match="ddf"):
        LoadDDFd("ddf")({})
    assert LoadDDFd("ddf", allow_missing_keys=True)({"a": 1}) == {"a": 1}
    with pytest.raises(KeyError, match="fixed"):
        LoadDDFd("ddf", fixed_key="fixed")({"ddf": "x.nii"})
    with pytest.raises(FileNotFoundError, match=r"no file x.nii"):
        LoadDDFd("ddf")({"ddf": "x.nii"})


def test_nameless_samples_have_names_of_their_own(tmp_path):
    save = SaveDDFd("ddf", output_dir=tmp_path)
    for shift in range(3):
        save({"ddf": torch.full((2, 4, 4), float(shift))})
    names = [f"pair{end}_ddf.nii.gz" for end in ("", "_1", "_2")]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    for shift, name in enumerate(names):
        assert np.abs(nib.load(tmp_path / name).get_fdata()).max() == shift


def test_nameless_samples_of_several_workers_have_names_of_their_own(tmp_path):
    data = Dataset([{"ddf": torch.zeros(2, 4, 4)} for _ in range(5)], SaveDDFd("ddf", output_dir=tmp_path))
    list(DataLoader(data, batch_size=1, num_workers=2))
    assert len(list(tmp_path.iterdir())) == 5
