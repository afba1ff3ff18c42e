"""An aligned image says where it lies to the other one, with its labels, and its voxels stay what they were."""

import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor
from monai.transforms import ResampleToMatch

from monai_lm.transforms import AlignAffine, AlignAffined

SHIFT = np.array([14.0, -9.0])


def picture(size, affine, shift):
    """A smooth picture of the plane on a grid, ``(1, *S)``, at points minus a shift."""
    at = np.stack(np.meshgrid(*[np.arange(s) for s in size], indexing="ij"), -1) @ affine[:2, :2].T + affine[:2, 3]
    x, y = np.moveaxis(at - shift, -1, 0)
    values = np.exp(-((x / 16) ** 2) - (y / 22) ** 2) * (2 + np.sin(x / 5) + np.cos(y / 6 + x / 9))
    return MetaTensor(torch.from_numpy(values.astype(np.float32))[None], affine=torch.from_numpy(affine))


@pytest.fixture(scope="module")
def images():
    fixed, moving = np.diag([2.0, 1.5, 1, 1]), np.diag([-1.5, 2.0, 1, 1])
    fixed[:2, 3], moving[:2, 3] = (-40, -50), (62, -66)
    return picture((40, 66), fixed, (0, 0)), picture((66, 58), moving, SHIFT)


def test_the_new_affine_puts_the_moving_image_onto_the_fixed_one(images):
    fixed, moving = images
    was = moving.affine.clone()
    aligned = AlignAffine("rigid")(fixed, moving)
    assert torch.equal(moving.affine, was)
    assert torch.equal(aligned.as_tensor(), moving.as_tensor())
    matrix = np.array(aligned.meta["alignment"]["matrix"])
    np.testing.assert_allclose(matrix @ aligned.affine.numpy(), was.numpy(), atol=1e-9)
    np.testing.assert_allclose(matrix[:2, 3], SHIFT, atol=0.5)
    brought = ResampleToMatch(padding_mode="border")(aligned, fixed)
    assert float((brought - fixed).abs().mean()) < 0.02 * float(fixed.max())


def test_a_loader_makes_batches_of_what_is_aligned_and_what_is_not(images):
    fixed, moving = images
    noise = [MetaTensor(torch.rand(x.shape, generator=torch.Generator().manual_seed(k)), affine=x.affine) for k, x in
             enumerate(images)]  # fmt: skip
    rows = [{"fixed": a, "moving": b} for a, b in ((fixed, moving), noise)]
    (batch,) = DataLoader(Dataset(rows, AlignAffined("moving", mode="rigid")), batch_size=2)
    assert batch["moving"].meta["alignment"]["kind"] == ["rigid", "none"]


def test_labels_go_along_and_masks_are_heeded(images):
    fixed, moving = images
    label, mask = (moving > 1).to(torch.uint8), torch.ones_like(fixed.as_tensor())
    mask[:, :6] = 0
    data = {"fixed": torch.where(mask > 0, fixed, 40.0), "moving": moving, "label": label, "mask": mask}
    out = AlignAffined(["moving", "label"], mode="rigid", mask_key="mask")(data)
    assert torch.equal(out["moving"].affine, out["label"].affine)
    assert out["label"].dtype == torch.uint8
    np.testing.assert_allclose(np.array(out["label"].meta["alignment"]["matrix"])[:2, 3], SHIFT, atol=0.5)
    with pytest.raises(KeyError, match="lesion"):
        AlignAffined(moving_mask_key="lesion")(data)
    with pytest.raises(ValueError, match=r"mode must be one of .*, got 'elastic'"):
        AlignAffined(mode="elastic")


def test_in_a_plane_affines_of_three_by_three_do_the_same(images):
    fixed, moving = images
    plane = [MetaTensor(x.as_tensor(), affine=x.affine) for x in images]
    for image in plane:
        image.affine = image.affine[[0, 1, 3]][:, [0, 1, 3]]
    whole, found = AlignAffine("rigid")(fixed, moving), AlignAffine("rigid")(*plane)
    torch.testing.assert_close(found.affine[:2, :2], whole.affine[:2, :2])
    assert found.meta["alignment"]["matrix"] == whole.meta["alignment"]["matrix"]
    with pytest.raises(ValueError, match="a single slice without the axis across it, got shape"):
        AlignAffine()(fixed[..., None], moving[..., None])
