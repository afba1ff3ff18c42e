"""Array transforms on channel-first images."""

import json
import pickle
import warnings

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.networks.blocks import Warp
from monai.transforms import Transform
from torch import Tensor

from monai_lm import refine
from monai_lm.fields import fold_count, gaussian_smooth, warp
from monai_lm.fields.space import resample_moving, through_affine
from monai_lm.io import FORMATS, file_suffix, write_fsl_ddf, write_learn2reg_ddf
from monai_lm.transforms import LoadDDF, RefineDDF, SaveDDF, WarpImage

SHAPES = [(20, 22), (12, 13, 14)]
SETTINGS = {"iterations": 6, "scales": (2, 1)}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Fixed ``(1, *S)``, moving ``(1, *S)`` and half the field between them ``(n, *S)``."""
    moving = gaussian_smooth(noise(1, 1, *shape, seed=1), 1.5)
    ddf = gaussian_smooth(noise(1, len(shape), *shape, seed=2), 3.0)
    ddf = ddf * (1.5 / ddf.abs().max())
    return warp(moving, ddf)[0], moving[0], 0.5 * ddf[0]


def scaling(*spacing: float) -> Tensor:
    return torch.diag(torch.tensor([*spacing, *[1.0] * (4 - len(spacing))], dtype=torch.float64))


def plain(x: Tensor) -> Tensor:
    return x.as_tensor() if isinstance(x, MetaTensor) else x


# --- RefineDDF --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "convert", [torch.Tensor.numpy, torch.Tensor.clone, MetaTensor], ids=["numpy", "tensor", "meta"]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_refines_like_refine_whatever_the_container(shape, convert):
    fixed, moving, ddf = pair(shape)
    expected = refine(fixed[None], moving[None], ddf[None], **SETTINGS)
    out = RefineDDF(**SETTINGS)(*(convert(x) for x in (fixed, moving, ddf)))
    assert isinstance(out, MetaTensor)
    assert torch.equal(plain(out), expected.ddf[0])
    assert not torch.equal(plain(out), ddf)
    assert torch.equal(out.affine, torch.eye(4, dtype=torch.float64))


def test_mixed_containers_and_reversed_arrays():
    fixed, moving, ddf = pair((20, 22))
    expected = plain(RefineDDF(**SETTINGS)(fixed, moving, ddf))
    mixed = RefineDDF(**SETTINGS)(fixed.numpy()[:, ::-1].copy()[:, ::-1], MetaTensor(moving), ddf.double().numpy())
    torch.testing.assert_close(plain(mixed), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_starts_from_the_identity_without_a_prediction(shape):
    fixed, moving, _ = pair(shape)
    out = RefineDDF(**SETTINGS)(fixed, moving)
    assert torch.equal(plain(out), refine(fixed[None], moving[None], **SETTINGS).ddf[0])


def test_the_spacing_is_that_of_the_fixed_image():
    fixed, moving, ddf = pair((12, 13, 14))
    expected = refine(fixed[None], moving[None], ddf[None], spacing=(1.0, 1.5, 3.0), **SETTINGS).ddf[0]
    isotropic = refine(fixed[None], moving[None], ddf[None], **SETTINGS).ddf[0]
    assert not torch.equal(expected, isotropic)
    affine = scaling(1.0, 1.5, 3.0)
    out = RefineDDF(**SETTINGS)(MetaTensor(fixed, affine=affine), moving, ddf)
    assert torch.equal(plain(out), expected)
    assert torch.equal(out.affine, affine)
    given = RefineDDF(spacing=(1, 1, 1), **SETTINGS)(MetaTensor(fixed, affine=affine), moving, ddf)
    assert torch.equal(plain(given), isotropic)  # an explicit spacing has precedence
    other = RefineDDF(**SETTINGS)(fixed, MetaTensor(moving, affine=affine), ddf)
    assert torch.equal(plain(other), isotropic)  # that of the moving image does not matter


def test_an_oblique_affine_is_carried_and_gives_the_spacing():
    fixed, moving, ddf = pair((12, 13, 14))
    c, s = np.cos(0.5), np.sin(0.5)
    rotation = torch.tensor([[0, -1, 0, 5.0], [c, 0, -s, 6], [s, 0, c, 7], [0, 0, 0, 1]], dtype=torch.float64)
    affine = rotation @ scaling(1.0, 1.5, 3.0)
    out = RefineDDF(**SETTINGS)(MetaTensor(fixed, affine=affine), moving, ddf)
    expected = refine(fixed[None], moving[None], ddf[None], spacing=(1.0, 1.5, 3.0), **SETTINGS).ddf[0]
    torch.testing.assert_close(plain(out), expected, rtol=0, atol=1e-3)
    assert torch.equal(out.affine, affine)


@pytest.mark.parametrize(
    "affine", [scaling(1.0, 3.0), scaling(1.0, 3.0, 7.0), torch.diag(torch.tensor([1.0, 3.0, 1.0]))]
)
def test_a_2d_image_has_the_spacing_of_its_two_axes(affine):
    fixed, moving, ddf = pair((20, 22))
    out = RefineDDF(**SETTINGS)(MetaTensor(fixed, affine=affine), moving, ddf)
    expected = refine(fixed[None], moving[None], ddf[None], spacing=(1.0, 3.0), **SETTINGS).ddf[0]
    assert torch.equal(plain(out), expected)


def test_the_metadata_tells_how_it_went():
    fixed, moving, ddf = pair((20, 22))
    ddf[0, 10, 10] += 3.0
    out = RefineDDF(**SETTINGS)(fixed, moving, ddf)
    expected = refine(fixed[None], moving[None], ddf[None], **SETTINGS)
    record = out.meta["refinement"]
    assert {"initial_loss", "final_loss", "predicted_folds", "seconds"} <= set(record)
    assert record["initial_loss"] == pytest.approx(float(expected.initial_loss))
    assert record["final_loss"] == pytest.approx(float(expected.final_loss))
    assert record["final_loss"] < record["initial_loss"]
    assert record["held"] == 0 <= record["apart"]
    assert record["improved"]
    still = RefineDDF(**SETTINGS)(moving, moving).meta["refinement"]
    assert not still["improved"]
    assert record["predicted_folds"] == int(fold_count(ddf[None])) > 0
    assert 0 < record["seconds"] < 60
    assert json.loads(json.dumps(record)) == record


@pytest.mark.parametrize("meta", [False, True])
def test_the_callers_data_stays_as_it_is(meta):
    inputs = [MetaTensor(x, affine=scaling(2, 2)) if meta else x for x in pair((20, 22))]
    copies = [plain(x).clone() for x in inputs]
    out = RefineDDF(**SETTINGS)(*inputs)
    out.add_(1)
    out.affine[0, 0] = 99
    for x, copy in zip(inputs, copies, strict=True):
        assert torch.equal(plain(x), copy)
        if meta:
            assert torch.equal(x.affine, scaling(2, 2))
            assert "refinement" not in x.meta


def test_a_transform_can_be_pickled_and_used_again():
    inputs = pair((20, 22))
    transform = RefineDDF(device="cpu", **SETTINGS)
    first = transform(*inputs)
    copy = pickle.loads(pickle.dumps(transform))
    assert torch.equal(plain(copy(*inputs)), plain(first))
    assert torch.equal(plain(transform(*inputs)), plain(first))
    assert isinstance(copy, Transform)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_refines_inside_evaluation_contexts(context):
    inputs = pair((20, 22))
    expected = plain(RefineDDF(**SETTINGS)(*inputs))
    with context():
        out = RefineDDF(**SETTINGS)(*(MetaTensor(x.clone()) for x in inputs))
    assert torch.equal(plain(out), expected)


def test_errors_name_the_argument():
    fixed, moving, ddf = pair((20, 22))
    with pytest.raises(ValueError, match="fixed and moving must have the same batch size and grid"):
        RefineDDF()(fixed, moving[:, :-1], ddf)
    with pytest.raises(ValueError, match=r"ddf must be \(B, n, \*S\)"):
        RefineDDF()(fixed, moving, ddf[:1])
    with pytest.raises(ValueError, match="similarity must be one of"):
        RefineDDF(similarity="ssim")(fixed, moving, ddf)
    with pytest.raises(TypeError, match=r"RefineDDF takes the keyword arguments .* got \['stepp'\]"):
        RefineDDF(stepp=1.0)(fixed, moving, ddf)


# --- WarpImage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding_mode", ["border", "zeros"])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("shape", SHAPES)
def test_warps_as_monais_block_does(shape, mode, padding_mode):
    image, ddf = noise(2, *shape, seed=3), 3 * pair(shape)[2]
    out = WarpImage(mode, padding_mode)(image, ddf)
    expected = Warp(mode, padding_mode)(image[None], ddf[None])[0]
    if mode == "nearest":  # the two may round a tie, or a coordinate close to one, to different sides
        assert float((out == expected).float().mean()) > 0.999
    else:
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert float((out - image).abs().mean()) > 0.1


@pytest.mark.parametrize(
    "convert", [torch.Tensor.numpy, torch.Tensor.clone, MetaTensor], ids=["numpy", "tensor", "meta"]
)
def test_containers_do_not_change_the_values(convert):
    fixed, moving, ddf = pair((20, 22))
    out = WarpImage()(convert(moving), convert(2 * ddf))
    torch.testing.assert_close(plain(out), fixed)
    assert isinstance(out, MetaTensor) == (convert is MetaTensor)


def test_nearest_keeps_labels():
    labels = torch.randint(0, 5, (1, 12, 13, 14), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    labels = labels * 50
    ddf = 3 * pair((12, 13, 14))[2]
    out = WarpImage("nearest")(labels, ddf)
    assert set(out.unique().tolist()) <= set(labels.unique().tolist())
    grid = torch.stack(torch.meshgrid(*[torch.arange(s) for s in (12, 13, 14)], indexing="ij"))
    index = (grid + ddf + 0.5).floor().long()
    for axis, size in enumerate((12, 13, 14)):
        index[axis].clamp_(0, size - 1)
    assert torch.equal(out, labels[0][index[0], index[1], index[2]][None].to(out.dtype))


def test_the_field_may_live_on_another_grid():
    moving, shift = noise(1, 9, 8), torch.tensor([2.0, 1.0]).view(2, 1, 1)
    out = WarpImage()(moving, shift.expand(2, 5, 6))
    assert torch.equal(out, moving[:, 2:7, 1:7])


def test_a_warped_image_lies_where_the_field_does():
    """The affine is that of the field (the fixed grid), the rest of the metadata that of the moving image."""
    fixed, moving, ddf = pair((12, 13, 14))
    at_origin, elsewhere = scaling(2, 2, 2), scaling(2, 2, 2)
    elsewhere[0, 3] = 5
    image = MetaTensor(moving, affine=elsewhere, meta={"filename_or_obj": "moving.nii.gz"})
    field = MetaTensor(2 * ddf, affine=at_origin.clone())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = WarpImage()(image, field)
    assert torch.equal(out.affine, at_origin)
    assert out.meta["filename_or_obj"] == "moving.nii.gz"
    assert torch.equal(image.affine, elsewhere)
    torch.testing.assert_close(plain(out), fixed)
    out.affine[0, 0] = 99
    assert torch.equal(field.affine, at_origin)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "cubic"}, "mode must be 'bilinear' or 'nearest', got 'cubic'"),
        ({"padding_mode": "reflection"}, "padding_mode must be 'border' or 'zeros', got 'reflection'"),
    ],
)
def test_unknown_modes(arguments, message):
    with pytest.raises(ValueError, match=message):
        WarpImage(**arguments)


@pytest.mark.parametrize(
    ("image", "ddf"),
    [((1, 8, 8), (3, 8, 8)), ((1, 8, 8, 8), (2, 8, 8)), ((1, 1, 8, 8), (1, 2, 8, 8))],
)
def test_an_image_and_a_field_that_do_not_fit(image, ddf):
    with pytest.raises(ValueError, match=r"ddf must be \(n, \*S\) for an image \(C, \*M\), got shapes"):
        WarpImage()(torch.zeros(image), torch.zeros(ddf))


@pytest.mark.parametrize(
    ("name", "image", "ddf"),
    [("img", (8, 8), (2, 8, 8)), ("ddf", (1, 8, 8), (8, 8)), ("img", (1, 1, 8, 8, 8), (3, 8, 8, 8))],
)
def test_what_is_no_item_is_named(name, image, ddf):
    with pytest.raises(ValueError, match=rf"{name} must be one item, \(C, H, W\) or \(C, H, W, D\), got shape"):
        WarpImage()(torch.zeros(image), torch.zeros(ddf))


# --- SaveDDF ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "convert", [torch.Tensor.numpy, torch.Tensor.clone, MetaTensor], ids=["numpy", "tensor", "meta"]
)
def test_simpleitk_reads_what_is_saved(tmp_path, convert):
    sitk = pytest.importorskip("SimpleITK")
    ddf = pair((12, 13, 14))[2]
    affine = scaling(1.0, 1.5, 3.0) if convert is MetaTensor else scaling(1, 1, 1)
    field = MetaTensor(ddf, affine=affine) if convert is MetaTensor else convert(ddf)
    assert SaveDDF(tmp_path / "out", "warp")(field, "patient7") is field
    image = sitk.ReadImage(str(tmp_path / "out" / "patient7_warp.nii.gz"))
    assert image.GetSpacing() == pytest.approx(affine.diag()[:3].tolist())
    vectors = sitk.GetArrayFromImage(image).transpose(3, 2, 1, 0)
    lps = ddf.numpy() * affine.diag()[:3].numpy()[:, None, None, None] * np.array([-1, -1, 1])[:, None, None, None]
    np.testing.assert_allclose(vectors, lps, atol=1e-5)


def test_fields_with_a_graph_can_be_saved(tmp_path):
    ddf = torch.ones(2, 4, 5, requires_grad=True)
    SaveDDF(str(tmp_path))(ddf)
    assert [p.name for p in tmp_path.iterdir()] == ["pair_ddf.nii.gz"]


def test_a_field_that_replaces_another_pair_s_is_told(tmp_path):
    save, field = SaveDDF(tmp_path), torch.zeros(2, 4, 5)
    save(field, "a")
    save(field.bfloat16(), "b")
    with pytest.warns(UserWarning, match=r"a_ddf\.nii\.gz is replaced"):
        save(field, "a")
    with pytest.raises(ValueError, match=r"name must do as part of a file's name, got '\.\./evil'"):
        save(field, "../evil")


def test_a_batch_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match=r"ddf must be \(n, \*S\)"):
        SaveDDF(tmp_path)(torch.zeros(1, 3, 4, 5, 6))
    assert list(tmp_path.iterdir()) == []


# --- grids that contradict each other ---------------------------------------------------------------------------------


def test_axes_of_another_spacing_or_direction_are_refused_voxel_by_voxel_and_other_origins_are_not():
    fixed, moving, ddf = pair((12, 13, 14))
    there, turned = scaling(1.5, 1.0, 1.0), scaling(-1.5, 1.0, 1.0)
    shifted = there.clone()
    shifted[:3, 3] = 7.0
    refine_ddf = RefineDDF(iterations=1)
    out = refine_ddf(MetaTensor(fixed, affine=there), MetaTensor(moving, affine=shifted), ddf)
    assert torch.equal(out.affine, there)
    assert torch.equal(out.meta["moving_affine"], shifted)
    unknown = refine_ddf(
        MetaTensor(fixed, affine=there), MetaTensor(moving), ddf
    )  # MONAI's identity, no place in space
    assert "moving_affine" not in unknown.meta
    for wrong in (turned, scaling(1.0, 1.0, 2.0)):
        images = MetaTensor(fixed, affine=there), MetaTensor(moving, affine=wrong)
        with pytest.raises(ValueError, match="fixed and moving must have voxel axes of the same direction and spacing"):
            RefineDDF(world=False, iterations=1)(*images)
        with pytest.raises(ValueError, match=r"ddf must say in its meta\['moving_affine'\] that it leads to voxels"):
            refine_ddf(*images, ddf)
        with pytest.raises(ValueError, match="ddf and img must have voxel axes of the same direction and spacing"):
            WarpImage()(MetaTensor(moving, affine=wrong), MetaTensor(ddf, affine=there))


def test_a_field_that_is_not_finite_does_not_warp():
    _, moving, ddf = pair((20, 22))
    ddf[0, 3, 3] = float("inf")
    with pytest.raises(ValueError, match="ddf must be finite, got 1 NaN or infinite values"):
        WarpImage()(moving, ddf)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64])
def test_nearest_keeps_the_dtype_and_large_label_values(dtype):
    top = min(torch.iinfo(dtype).max, 2**31 - 1)
    labels = (top - torch.arange(16, dtype=torch.int64)).to(dtype).reshape(1, 4, 4)
    out = WarpImage("nearest")(labels, torch.zeros(2, 4, 4))
    assert out.dtype == dtype
    assert torch.equal(out, labels)


def test_unknown_settings_are_found_when_the_transform_is_made():
    with pytest.raises(TypeError, match=r"RefineDDF takes the keyword arguments .* got \['scale'\]"):
        RefineDDF(scale=2)
    with pytest.raises(TypeError, match=r"RefineDDF takes the keyword arguments .* got \['moving_mask'\]"):
        RefineDDF(moving_mask=torch.ones(1, 20, 22))  # it is of a pair, not a setting


def test_masks_of_both_images_are_those_of_refine():
    fixed, moving, ddf = pair((20, 22))
    mask, moving_mask = torch.ones(1, 20, 22), torch.ones(1, 20, 22, dtype=torch.bool)
    mask[:, :6], moving_mask[..., 14:] = 0, False
    out = RefineDDF(**SETTINGS)(fixed, moving, ddf, mask, moving_mask)
    images = [x[None] for x in (fixed, moving, ddf, mask)]
    assert torch.equal(out.as_tensor()[None], refine(*images, moving_mask=moving_mask[None], **SETTINGS).ddf)
    moved, other = (MetaTensor(x, affine=torch.diag(torch.tensor([s, 1.0, 1, 1]))) for x, s in ((moving, 3), (mask, 2)))
    with pytest.raises(ValueError, match="moving and moving_mask"):
        RefineDDF(**SETTINGS)(fixed, moved, ddf, mask, other)


def test_the_refined_field_carries_the_file_name_of_the_fixed_image():
    fixed, moving, ddf = pair((20, 22))
    out = RefineDDF(**SETTINGS)(MetaTensor(fixed, meta={"filename_or_obj": "a/b.nii.gz"}), moving, ddf)
    assert out.meta["filename_or_obj"] == "a/b.nii.gz"


# --- LoadDDF ----------------------------------------------------------------------------------------------------------


def oblique() -> torch.Tensor:
    """Another orientation, spacing and origin than ``scaling`` gives."""
    out = torch.eye(4, dtype=torch.float64)
    out[:3, :3] = torch.tensor([[0, -1.1, 0], [1.2, 0.1, 0], [0, 0, 1.3]])
    out[:3, 3] = torch.tensor([12.0, -1.0, 0.5])
    return out


@pytest.mark.parametrize("file_format", FORMATS)
def test_what_is_saved_is_loaded_in_every_format(tmp_path, file_format):
    if file_format == "itk_transform":
        pytest.importorskip("pyfive", reason="pyfive, which reads .h5, is not installed")
    ddf, affine = pair((12, 13, 14))[2], scaling(-1.5, 2, 3)
    SaveDDF(tmp_path, file_format=file_format)(MetaTensor(ddf, affine=affine))
    (path,) = tmp_path.iterdir()
    assert path.name == f"pair_ddf{file_suffix(file_format)}"
    fixed = MetaTensor(torch.zeros(1, 12, 13, 14), affine=affine)
    for said in ("auto", file_format):
        out = LoadDDF(said)(str(path), fixed)
        torch.testing.assert_close(plain(out), ddf, rtol=0, atol=2e-3 if file_format == "learn2reg" else 1e-5)
        assert out.dtype == torch.float32
        torch.testing.assert_close(out.affine, affine.to(out.affine))
        assert out.meta["filename_or_obj"] == str(path)
        assert "moving_affine" not in out.meta


@pytest.mark.parametrize("file_format", ["itk", "fsl"])
def test_a_field_in_millimetres_leads_into_a_moving_image_on_another_grid(tmp_path, file_format):
    """Saved, loaded for the moving image and applied, it samples that image where the field in voxels led."""
    affine = scaling(1.0, 1.5, 2.0).double()
    moving = MetaTensor(noise(1, 11, 12, 15), affine=oblique())
    ddf = through_affine(pair((12, 13, 14))[2][None].double(), affine, oblique())[0].float()
    field = MetaTensor(ddf, affine=affine, meta={"moving_affine": oblique(), "moving_size": (11, 12, 15)})
    SaveDDF(tmp_path, file_format=file_format)(field)
    out = LoadDDF()(tmp_path / "pair_ddf.nii.gz", moving=moving)
    torch.testing.assert_close(plain(out), ddf, rtol=0, atol=1e-4)
    warped = WarpImage()(moving, out)
    expected = resample_moving(plain(moving)[None].double(), pair((12, 13, 14))[2][None].double(), affine, oblique())[0]
    torch.testing.assert_close(plain(warped).double(), expected, rtol=0, atol=1e-3)
    assert float(warped.std()) > 0.1
    torch.testing.assert_close(warped.affine, affine.to(warped.affine))
    elsewhere = MetaTensor(noise(1, 11, 12, 15), affine=scaling(1, 1, 4))
    with pytest.raises(ValueError, match="ddf and img must have voxel axes of the same direction and spacing"):
        WarpImage()(elsewhere, out)


def test_a_field_at_half_resolution_takes_size_and_affine_of_the_fixed_image(tmp_path):
    shift = np.broadcast_to(np.float32([1, -2, 3]).reshape(3, 1, 1, 1), (3, 12, 13, 14))
    write_learn2reg_ddf(tmp_path / "u.npz", shift, half=True)
    out = LoadDDF()(tmp_path / "u.npz", MetaTensor(torch.zeros(1, 12, 13, 14), affine=scaling(2, 2, 3)))
    np.testing.assert_array_equal(plain(out).numpy(), shift)
    assert torch.equal(out.affine, scaling(2, 2, 3).to(out.affine))


def test_a_file_on_another_grid_than_the_fixed_image_is_refused(tmp_path):
    SaveDDF(tmp_path)(MetaTensor(pair((12, 13, 14))[2], affine=scaling(1, 1, 2)))
    path = tmp_path / "pair_ddf.nii.gz"
    with pytest.raises(ValueError, match=r"pair_ddf.nii.gz must be on the grid of fixed, \(9, 13, 14\), got a field"):
        LoadDDF()(path, torch.zeros(1, 9, 13, 14))
    with pytest.raises(ValueError, match=r"pair_ddf.nii.gz must be on the grid of fixed, with the affine"):
        LoadDDF()(path, MetaTensor(torch.zeros(1, 12, 13, 14), affine=scaling(1, 1, 3)))
    assert LoadDDF()(path, torch.zeros(1, 12, 13, 14)).shape == (3, 12, 13, 14)
    with pytest.raises(TypeError, match="moving must be a MetaTensor with an affine, got Tensor"):
        LoadDDF()(path, moving=torch.zeros(1, 12, 13, 14))
    with pytest.raises(ValueError, match=r"pair_ddf.nii.gz must be \(X, Y, Z, 3\) to be FSL's"):
        LoadDDF("fsl")(path)


def test_formats_that_do_not_exist():
    with pytest.raises(ValueError, match=r"file_format must be 'auto' or one of \('itk', .*, got 'nifti'"):
        LoadDDF("nifti")
    with pytest.raises(ValueError, match=r"file_format must be one of \('itk', .*, got 'auto'"):
        SaveDDF(file_format="auto")


def test_fsl_positions_are_read_when_told(tmp_path):
    ddf = pair((12, 13, 14))[2].numpy()
    write_fsl_ddf(tmp_path / "w.nii.gz", ddf, np.eye(4), relative=False)
    for relative in (None, False):
        np.testing.assert_allclose(plain(LoadDDF(relative=relative)(tmp_path / "w.nii.gz")), ddf, atol=1e-4)
    assert np.abs(plain(LoadDDF(relative=True)(tmp_path / "w.nii.gz")).numpy() - ddf).max() > 5


def test_a_field_for_a_moving_image_on_another_grid_is_not_refined(tmp_path):
    fixed, moving, ddf = pair((12, 13, 14))
    affine = scaling(1.0, 1.5, 2.0)
    SaveDDF(tmp_path)(MetaTensor(ddf, affine=affine))
    loaded = LoadDDF()(tmp_path / "pair_ddf.nii.gz", moving=MetaTensor(moving, affine=oblique()))
    there = MetaTensor(fixed, affine=affine), MetaTensor(moving, affine=affine)
    with pytest.raises(ValueError, match="ddf must lead into the voxels of moving, with the affine"):
        RefineDDF(**SETTINGS)(*there, loaded)
    right = LoadDDF()(tmp_path / "pair_ddf.nii.gz", moving=there[1])
    expected = RefineDDF(**SETTINGS)(*there, MetaTensor(ddf, affine=affine))
    missed = torch.linalg.vector_norm(plain(RefineDDF(**SETTINGS)(*there, right)) - plain(expected), dim=0)
    assert float(missed.mean()) < 1e-3  # the file is in float32, and damping amplifies rounding
