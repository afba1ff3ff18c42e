"""RefineDDF(d) between two grids: what the command does from files, and the parts of a pair that go along."""

import warnings

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch, list_data_collate, pad_list_data_collate
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, PadListDataCollate

from monai_lm.apps import pairs
from monai_lm.fields import gaussian_smooth
from monai_lm.fields.space import resample_moving, through_affine
from monai_lm.guidance import Keypoints, Labels
from monai_lm.solver.refinement import refine
from monai_lm.transforms import InvertDDFd, LoadDDFd, RefineDDF, RefineDDFd, WarpImage, WarpImaged

SETTINGS = {"iterations": 4, "scales": (2, 1)}
FIXED = np.diag([1.0, 1.5, 1.0, 1.0])
TURNED = np.array([[0, 0, 1.0, -1.0], [-1.25, 0, 0, 24.0], [0, 1.0, 0, 0.5], [0, 0, 0, 1]])
INITIAL = np.array([[0.995, 0.0998, 0, -1.0], [-0.0998, 0.995, 0, 1.5], [0, 0, 1, 0.5], [0, 0, 0, 1]])


def placed(image, affine):
    return MetaTensor(image, affine=torch.from_numpy(affine))


@pytest.fixture(scope="module")
def images():
    """A fixed image, and one like it on a grid with other axes, spacing and size, moved by an affine and a shift."""
    noise = torch.randn(1, 1, 26, 24, 22, generator=torch.Generator().manual_seed(0))
    world = gaussian_smooth(noise, 2.0)
    still, there = torch.zeros(1, 3, 20, 16, 18), torch.zeros(1, 3, 21, 18, 20)
    fixed = resample_moving(world, still, FIXED, np.eye(4))
    back = np.linalg.inv(INITIAL)
    back[0, 3] += 0.7
    moving = resample_moving(world, there, TURNED, np.eye(4), back)
    return placed(fixed[0], FIXED), placed(moving[0], TURNED)


@pytest.fixture(scope="module")
def by_command(images, tmp_path_factory):
    """Both images as files, an affine, and what ``monai-lm refine`` makes of them."""
    folder = tmp_path_factory.mktemp("pair")
    for name, image in zip(("fixed", "moving"), images, strict=True):
        nib.save(nib.Nifti1Image(image[0].numpy(), image.affine.numpy()), folder / f"{name}.nii.gz")
    np.savetxt(folder / "affine.txt", INITIAL)
    files = folder / "fixed.nii.gz", folder / "moving.nii.gz", folder / "out"
    metrics = pairs.refine_pair(*files, affine=folder / "affine.txt", report=False, settings=SETTINGS)
    return folder, metrics


def test_two_grids_and_an_affine_give_what_the_command_gives(by_command):
    folder, metrics = by_command
    keys = ["fixed", "moving"]
    data = {key: str(folder / f"{key}.nii.gz") for key in keys} | {"affine": str(folder / "affine.txt")}
    refining = RefineDDFd(ddf_key=None, affine_key="affine", **SETTINGS)
    loaded = Compose([LoadImaged(keys, image_only=True), EnsureChannelFirstd(keys)])(data)
    out = refining(loaded)
    assert out["ddf"].meta["refinement"]["final_loss"] == pytest.approx(metrics["loss_after"], rel=1e-5)
    assert out["ddf"].meta["refinement"]["final_loss"] < 0.7 * out["ddf"].meta["refinement"]["initial_loss"]
    files = {"ddf": str(folder / "out" / "ddf.nii.gz"), "inverse": str(folder / "out" / "inverse.nii.gz")}
    written = LoadDDFd("ddf", fixed_key="fixed", moving_key="moving")(loaded | files)
    torch.testing.assert_close(out["ddf"].as_tensor(), written["ddf"].as_tensor(), rtol=0, atol=1e-4)
    warped = WarpImaged("moving")(out)["moving"]
    stored = nib.load(folder / "out" / "warped.nii.gz")
    np.testing.assert_allclose(warped[0].numpy(), stored.get_fdata(), atol=1e-4)
    np.testing.assert_allclose(warped.affine.numpy(), stored.affine, atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the grids are mirrored against each other, the field does not fold
        inverse = InvertDDFd("ddf")(out)["ddf"]
    expected = LoadDDFd("inverse", fixed_key="moving", moving_key="fixed")(loaded | files)["inverse"]
    inside = (slice(None), *[slice(4, -4)] * 3)
    torch.testing.assert_close(inverse.as_tensor()[inside], expected.as_tensor()[inside], rtol=0, atol=0.02)
    assert inverse.meta["moving_size"] == tuple(loaded["fixed"].shape[1:])


def test_everything_of_the_moving_image_goes_along(images):
    fixed, moving = images
    hidden = torch.ones_like(moving.as_tensor())
    hidden[:, 8:12, 8:12, 8:12] = 0
    labels = [(image.as_tensor() > 0).to(torch.uint8) for image in images]
    points = torch.tensor([[8.0, 7, 9], [12, 9, 6]])
    across = through_affine(torch.zeros(1, 3, 20, 16, 18), FIXED, TURNED)
    there = torch.stack([p + across[(0, slice(None), *p.long())] for p in points])  # the same places
    out = RefineDDF(guide_weight=2.0, **SETTINGS)(
        fixed, moving, None, None, hidden, labels, (points, there), affine=np.eye(4)
    )
    still = torch.zeros(1, 3, 20, 16, 18)
    onto = resample_moving(labels[1][None], still, FIXED, TURNED, mode="nearest", padding_mode="zeros")
    guides = [Labels(labels[0][None], onto, 2.0), Keypoints(points[None], points[None], 2.0)]
    shown, weight = (resample_moving(x[None], still, FIXED, TURNED) for x in (moving.as_tensor(), hidden))
    result = refine(
        fixed.as_tensor()[None], shown, moving_mask=weight, guidance=guides, spacing=(1.0, 1.5, 1.0), **SETTINGS
    )
    whole = through_affine(result.ddf, FIXED, TURNED)[0]
    assert (out.as_tensor() - whole).abs().mean() < 0.02  # under the mask an image is filled before it is resampled
    assert (out.as_tensor() - RefineDDF(**SETTINGS)(fixed, moving).as_tensor()).abs().mean() > 0.1


def test_pairs_on_grids_of_their_own_go_through_a_data_loader(images):
    """Refined before they are a batch, or after they are none any more; a batch and what is padded are refused.

    MONAI's inverse of the padding misses by a voxel where the sizes differ by an odd number.
    """
    fixed, moving = images
    rows = [{"fixed": fixed, "moving": moving}, {"fixed": fixed[:, 2:], "moving": moving[:, :, :-2]}]
    refining, warping = RefineDDFd(ddf_key=None, world=True, **SETTINGS), WarpImaged("moving")
    expected = [warping(refining(row))["moving"] for row in rows]

    def loaded(rows, transform, collate):
        (batch,) = DataLoader(Dataset([dict(row) for row in rows], transform), batch_size=2, collate_fn=collate)
        return batch

    for item in decollate_batch(loaded(rows[:1] * 2, refining, list_data_collate)):
        assert torch.equal(warping(item)["moving"], expected[0])
    assert all(map(torch.equal, (warping(refining(row))["moving"] for row in loaded(rows, None, list)), expected))
    padded = [loaded(rows, transform, pad_list_data_collate) for transform in (refining, None)]
    for transform, batch in ((warping, padded[0]), (refining, padded[1])):
        with pytest.raises(
            ValueError, match=r"must have its own size, got .*DataLoader\(collate_fn=list\) leaves items"
        ):
            transform(decollate_batch(batch)[1])
    for transform in (warping, refining):
        with pytest.raises(ValueError, match=r"must be one item \(C, \*S\), got a batch \(2, 1, 2.*decollate_batch"):
            transform(padded[0])
    before, after = ([PadListDataCollate.inverse(item) for item in decollate_batch(batch)] for batch in padded)
    assert all(map(torch.equal, (warping(item)["moving"] for item in before), expected))
    assert all(map(torch.equal, (warping(refining(item))["moving"] for item in after), expected))


def test_a_prediction_into_another_grid_is_refined(images):
    fixed, moving = images
    field = RefineDDF(**SETTINGS)(fixed, moving, affine=INITIAL)
    out = RefineDDF(iterations=0)(fixed, moving, field, affine=INITIAL)
    torch.testing.assert_close(out.as_tensor(), field.as_tensor(), rtol=0, atol=1e-4)
    assert out.meta["refinement"]["prediction_used"]
    assert out.meta["moving_size"] == (21, 18, 20)


def test_a_plane_is_registered_in_space():
    image = gaussian_smooth(torch.randn(1, 1, 40, 40, generator=torch.Generator().manual_seed(1)), 2.0)[0]
    fixed = MetaTensor(image[:, 5:35, 5:35], affine=torch.diag(torch.tensor([2.0, 2.0, 1.0])))
    moving = MetaTensor(image[:, 3:35, 4:38].flip(1), affine=torch.tensor([[-2.0, 0, 58], [0, 2, -2], [0, 0, 1]]))
    out = RefineDDF(iterations=3, scales=(1,))(fixed, moving)
    torch.testing.assert_close(WarpImage()(moving, out).as_tensor(), fixed.as_tensor(), rtol=0, atol=1e-4)


def test_a_world_of_ones_own_voxels_changes_nothing(images):
    fixed = images[0]
    moving = fixed.clone().roll(1, 1)
    assert torch.equal(RefineDDF(world=True, **SETTINGS)(fixed, moving), RefineDDF(**SETTINGS)(fixed, moving))
    shifted = moving.clone()
    shifted.affine[0, 3] += 1.0  # one voxel
    near = RefineDDF(world=True, iterations=0)(fixed, shifted)
    torch.testing.assert_close(near.as_tensor()[:1], torch.full((1, *near.shape[1:]), -1.0))


def test_where_a_registered_field_is_stored(images):
    fixed, moving = images
    data = {"fixed": fixed, "moving": moving}
    assert set(RefineDDFd(ddf_key=None, output_key="u", iterations=0)(data)) == {"fixed", "moving", "u"}
    with pytest.raises(KeyError, match="ddf"):
        RefineDDFd(iterations=0)(data)


def test_a_batch_of_tensors_is_refused(images):
    fixed, moving = (image.as_tensor() for image in images)
    ddf = torch.zeros(3, 20, 16, 18)
    cases = {
        "fixed": (fixed[None], moving),
        "ddf": (fixed, moving, ddf[None]),
        "mask": (fixed, moving, ddf, fixed[None]),
    }
    for name, given in cases.items():
        with pytest.raises(ValueError, match=rf"{name} must be one item, \(C, H, W\) or \(C, H, W, D\), got shape"):
            RefineDDF()(*given)


def test_what_cannot_be_compared_in_space_is_refused(images):
    fixed, moving = images
    with pytest.raises(TypeError, match=r"fixed and moving must be MetaTensors .* got MetaTensor and Tensor"):
        RefineDDF()(fixed, moving.as_tensor(), affine=np.eye(4))
    with pytest.raises(ValueError, match="affine must be None where world is false"):
        RefineDDF(world=False)(fixed, moving, affine=np.eye(4))
    with pytest.raises(ValueError, match=r"affine must be an invertible \(4, 4\) matrix"):
        RefineDDF()(fixed, moving, affine=np.zeros((4, 4)))
    away = np.eye(4)
    away[0, 3] = 1000
    with pytest.raises(ValueError, match="fixed and moving must overlap"):
        RefineDDF()(fixed, moving, affine=away)
    with pytest.raises(ValueError, match=r"moving_mask must be \(B, 1, \*S\)"):
        RefineDDF()(fixed, moving, moving_mask=torch.ones(1, 4, 4, 4))
    with pytest.raises(ValueError, match="labels of the moving image must be on the grid of moving"):
        RefineDDF()(fixed, moving, labels=(torch.ones(1, 20, 16, 18), torch.ones(1, 20, 16, 18)))
