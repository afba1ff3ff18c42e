"""What a field is worth on a batch."""

import pytest
import torch
from monai.data import MetaTensor

from monai_lm.fields import fold_count
from monai_lm.fields.metrics import sd_log_jacobian
from monai_lm.training.batch import images_of, measure_batch, spacing_of, tensor_of


def test_a_known_shift_is_measured_as_what_it_is():
    fixed, moving = torch.zeros(2, 1, 1, 12, 10)
    fixed[..., 4:8, 3:7], moving[..., 6:10, 3:7] = 1, 1
    ddf = torch.zeros(1, 2, 12, 10)
    ddf[:, 0] = 2
    image = MetaTensor(fixed, affine=torch.diag(torch.tensor([3.0, 1.0, 1.0, 1.0])))
    points = torch.tensor([[[4.0, 3.0], [7.0, 6.0]]])
    batch = {"fixed": image, "moving": moving, "fixed_label": fixed, "moving_label": moving}
    batch |= {"fixed_points": points, "moving_points": points + torch.tensor([2.0, 0.0])}
    before, after = measure_batch(batch, torch.zeros_like(ddf), surfaces=True), measure_batch(batch, ddf, surfaces=True)
    assert float(before["dice"]) == pytest.approx(0.5)
    assert float(before["hd95_mm"]) == pytest.approx(6.0)
    assert float(before["tre_mm"]) == pytest.approx(6.0)
    assert {key: float(value) for key, value in after.items()} == {
        "folds": 0, "sdlogj": 0, "dice": 1, "hd95_mm": 0, "tre_mm": 0,
    }  # fmt: skip


def test_only_what_there_is_is_measured():
    ddf = torch.randn(2, 2, 7, 6, generator=torch.Generator().manual_seed(0))
    out = measure_batch({"fixed": torch.zeros(2, 1, 7, 6)}, ddf)
    assert set(out) == {"folds", "sdlogj"}
    torch.testing.assert_close(out["folds"], fold_count(ddf).float())
    torch.testing.assert_close(out["sdlogj"], sd_log_jacobian(ddf))


def test_spacing_of_every_pair_of_a_batch():
    affines = torch.stack([torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0])), torch.eye(4)])
    image = MetaTensor(torch.zeros(2, 1, 4, 4, 4), affine=affines)
    assert spacing_of(image) == (2.0, 3.0, 4.0)
    assert spacing_of(image, 1) == (1.0, 1.0, 1.0)
    assert spacing_of(torch.zeros(1, 1, 4, 4)) == (1.0, 1.0)


def test_a_batch_that_lacks_something_is_named():
    image = torch.zeros(1, 1, 4, 4, dtype=torch.uint8)
    assert images_of({"fixed": image, "moving": image + 1})[0, :, 0, 0].tolist() == [1.0, 0.0]
    with pytest.raises(KeyError, match=r"a batch must have 'moving' .*\['fixed'\]"):
        tensor_of({"fixed": image}, "moving")
    with pytest.raises(ValueError, match=r"fixed and moving must be .*ResampleToMatchd brings one onto the other"):
        images_of({"fixed": image, "moving": image[..., 1:]})
    with pytest.raises(TypeError, match=r"a batch must be a dictionary .*, got a list; .* with batch_size=1"):
        images_of([{"fixed": image, "moving": image}])
