"""Few intensities far beyond all others count as the largest of those."""

import pytest
import torch

from monai_lm.similarity.outliers import squeezed, without_outliers
from tests.solver.pairs import error, noise, pair, run

SIZES = [(20, 18), (12, 11, 10)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.half])
@pytest.mark.parametrize("size", SIZES)
def test_outliers_become_the_largest_and_smallest_of_the_others(size, dtype):
    image = noise(2, 1, *size).to(dtype)
    spoiled = image.clone()
    spoiled[(0, 0, *(3 for _ in size))], spoiled[(0, 0, *(5 for _ in size))] = 6e4, -6e4
    mended, other = without_outliers(spoiled, image)
    assert other is image
    others = image[0].flatten()[(spoiled[0].abs() < 100).flatten()]
    assert mended[(0, 0, *(3 for _ in size))] == others.max()
    assert mended[(0, 0, *(5 for _ in size))] == others.min()
    same = spoiled.abs() < 100
    assert torch.equal(mended[same], image[same])
    assert torch.equal(without_outliers(spoiled[:1])[0], mended[:1])  # whatever else is in the batch
    torch.testing.assert_close(without_outliers(spoiled.flip(2))[0].flip(2), mended, rtol=0, atol=0)


def test_what_has_none_is_returned_as_it_is():
    for image in (noise(1, 1, 20, 18), torch.zeros(1, 1, 20, 18), torch.eye(20)[None, None], torch.ones(1, 1, 2, 2)):
        assert without_outliers(image)[0] is image
    vessels = torch.rand(1, 1, 40, 40)
    vessels[..., 7, 7] = 3.5  # less than three ranges beyond
    assert without_outliers(vessels)[0] is vessels


def test_soft_labels_of_a_small_structure_stay():
    label = 1e-4 * torch.rand(1, 1, 40, 40)
    label[..., 9, 9] = 1
    features = torch.cat([torch.rand(1, 1, 40, 40), label], 1)
    assert without_outliers(features)[0] is features
    second = torch.cat([torch.rand(1, 1, 40, 40), 1e6 * label], 1)
    assert without_outliers(second)[0][:, 1].max() == (1e6 * label).flatten().sort().values[-2]


def test_slabs_do_not_matter(monkeypatch):
    image = noise(1, 2, 30, 31)
    image[..., 4, 4] = 1e5
    (whole,) = without_outliers(image)
    monkeypatch.setattr("monai_lm.similarity.outliers._SLAB", 100)
    assert torch.equal(without_outliers(image)[0], whole)


def test_an_image_with_too_many_is_squeezed():
    image = torch.rand(1, 1, 60, 60)
    image[..., :4, :4] = 1e4  # more than a thousandth
    assert without_outliers(image)[0] is image
    assert squeezed(image)
    assert squeezed(-image)
    assert not squeezed(torch.rand(1, 1, 60, 60) ** 4)
    assert not squeezed((image > 1).float())  # a binary image has no others


@pytest.mark.parametrize("similarity", ["lncc", "mi", "mind", "mse", "ncc"])
def test_a_bright_voxel_misleads_no_measure(similarity):
    fixed, moving, truth = pair((32, 30))
    settings = {"similarity": similarity, "iterations": 15}
    plain = error(run(fixed, moving, None, **settings).ddf, truth)
    for spoiled in ("fixed", "moving"):
        images = {"fixed": fixed.clone(), "moving": moving.clone()}
        images[spoiled][..., 12, 17] = 1e4
        assert error(run(*images.values(), None, **settings).ddf, truth) < plain + 0.1
