"""As a method of monai-physio: where its transforms lead, alone and in a chain, with masks and labels."""

import logging

import numpy as np
import pytest
import torch

from monai_lm import refine
from monai_lm.fields import fold_count, gaussian_smooth
from monai_lm.fields.space import resample_moving, to_voxel
from monai_lm.io import read_itk_transform

pytest.importorskip("monai_physio", reason="monai-physio is not installed, pip install 'monai_lm[physio]'")
import itk
from monai_physio import RegisterImagesBase, RegisterImagesChain, RegisterImagesGreedy

from monai_lm.integrations.physio import RegisterImagesLM

SIZE, OTHER = (26, 24, 22), (38, 36, 34)  # the moving image shows more
QUIET = {"log_level": logging.ERROR}
FEW = {"scales": (2, 1), "iterations": (20, 10)}


def turned(degrees, spacing, size, mirrored=False):
    """An affine with its voxels turned about z, the centre of the grid at (10, -20, 30)."""
    a = np.deg2rad(degrees)
    affine = np.eye(4)
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    affine[:3, :3] = turn @ np.diag(np.array(spacing) * [1, -1 if mirrored else 1, 1])
    affine[:3, 3] = np.array([10, -20, 30]) - affine[:3, :3] @ ((np.array(size) - 1) / 2)
    return affine


HERE, THERE = turned(12, (1.5, 1.2, 2.0), SIZE), turned(-9, (1.4, 1.3, 1.8), OTHER, mirrored=True)


def itk_image(data, affine):
    """``(X, Y, Z)`` with an affine in RAS as an image of ITK's."""
    image = itk.image_from_array(np.ascontiguousarray(np.asarray(data).T))
    lps = np.diag([-1.0, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection(itk.matrix_from_array(lps[:3, :3] / spacing))
    image.SetOrigin(lps[:3, 3].tolist())
    return image


def noise(seed, sigma=2.0, size=SIZE):
    image = gaussian_smooth(torch.randn(1, 1, *size, generator=torch.Generator().manual_seed(seed)), sigma)
    return image / image.std()


@pytest.fixture(scope="module")
def pair():
    """The moving image on a grid of its own, and the fixed image: moving by a known field and the two affines."""
    moving = noise(0, size=OTHER)
    ddf = torch.cat([noise(k, 4.0) for k in (1, 2, 3)], 1)
    ddf = 6 * ddf / ddf.abs().max()
    return moving, ddf, resample_moving(moving, ddf, HERE, THERE)


def points_of(affine, margin=4):
    """Voxels away from the border, ``(N, 3)``, and where they are in LPS."""
    voxels = np.stack(np.meshgrid(*[np.arange(margin, s - margin, 3) for s in SIZE], indexing="ij"), -1).reshape(-1, 3)
    return voxels, (voxels @ affine[:3, :3].T + affine[:3, 3]) * [-1, -1, 1]


def led(transform, points):
    return np.array([list(transform.TransformPoint(p.tolist())) for p in points])


def register(pair, registrar, moving_mask=None, moving_labelmap=None):
    moving, _, fixed = pair
    registrar.set_fixed_image(itk_image(fixed[0, 0], HERE))
    return registrar.register(itk_image(moving[0, 0], THERE), moving_mask, moving_labelmap)


def test_the_transforms_lead_where_the_refined_field_does(pair):
    moving, truth, fixed = pair
    still = torch.zeros_like(truth)
    ours = refine(fixed, resample_moving(moving, still, HERE, THERE), spacing=(1.5, 1.2, 2.0), **FEW)
    registrar = RegisterImagesLM(**QUIET, **FEW)
    result = register(pair, registrar)
    voxels, points = points_of(HERE)
    forward, inverse = result["fixed_to_moving_transform"], result["moving_to_fixed_transform"]
    there = led(forward, points)
    expected = voxels + ours.ddf[0][:, voxels[:, 0], voxels[:, 1], voxels[:, 2]].T.numpy()
    expected = (expected @ HERE[:3, :3].T + HERE[:3, 3]) * [-1, -1, 1]
    np.testing.assert_allclose(there, expected, atol=1e-3)
    assert result["loss"] == pytest.approx(float(ours.final_loss), abs=1e-5)
    known = voxels + truth[0][:, voxels[:, 0], voxels[:, 1], voxels[:, 2]].T.numpy()
    known = (known @ HERE[:3, :3].T + HERE[:3, 3]) * [-1, -1, 1]
    assert np.linalg.norm(there - known, axis=1).mean() < 0.35 * np.linalg.norm(points - known, axis=1).mean()
    inside = to_voxel(torch.from_numpy(there * [-1, -1, 1]), THERE).numpy()
    inside = np.all((inside > 1) & (inside < np.array(OTHER) - 2), 1)
    assert inside.mean() > 0.8
    assert np.linalg.norm(led(inverse, there[inside]) - points[inside], axis=1).mean() < 0.05
    warped = itk.array_from_image(registrar.get_registered_image()).T
    shown = resample_moving(moving, ours.ddf, HERE, THERE)[0, 0].numpy()
    np.testing.assert_allclose(warped[6:-6, 6:-6, 4:-4], shown[6:-6, 6:-6, 4:-4], atol=5e-3)


def test_a_part_of_an_image_lies_where_it_was_cut_out(pair):
    moving, _, fixed = pair
    whole = itk_image(moving[0, 0], THERE)
    region = itk.ImageRegion[3]([2, 3, 1], [30, 29, 28])
    part = itk.extract_image_filter(whole, extraction_region=region)
    assert list(part.GetLargestPossibleRegion().GetIndex()) == [2, 3, 1]
    registrar = RegisterImagesLM(**QUIET, iterations=0)
    registrar.set_fixed_image(itk_image(fixed[0, 0], HERE))
    result = registrar.register(part)
    _, points = points_of(HERE, 7)
    for name in ("fixed_to_moving_transform", "moving_to_fixed_transform"):
        np.testing.assert_allclose(led(result[name], points), points, atol=1e-3)


class Known(RegisterImagesBase):
    """A method that finds a known shift, in LPS millimetres."""

    def __init__(self, shift):
        super().__init__(**QUIET)
        self.shift = shift

    def registration_method(self, moving_image, **_):  # noqa: ARG002
        forward, inverse = (itk.TranslationTransform[itk.D, 3].New() for _ in range(2))
        forward.SetOffset(self.shift)
        inverse.SetOffset([-s for s in self.shift])
        return {"fixed_to_moving_transform": forward, "moving_to_fixed_transform": inverse, "loss": 0.0}


def test_a_chain_goes_on_where_another_method_ended(pair):
    """The moving image is moved by 9 mm in space; the first method knows it, ours finds the rest."""
    moving, truth, fixed = pair
    away = THERE.copy()
    away[:3, 3] += [9, -6, 0]
    chain = RegisterImagesChain(
        [Known([-9.0, 6.0, 0.0]), RegisterImagesLM(**QUIET, **FEW), RegisterImagesLM(**QUIET, iterations=0)], **QUIET
    )
    chain.set_prewarp_background_value(0.0)
    chain.set_fixed_image(itk_image(fixed[0, 0], HERE))
    result = chain.register(itk_image(moving[0, 0], away))
    voxels, points = points_of(HERE)
    known = voxels + truth[0][:, voxels[:, 0], voxels[:, 1], voxels[:, 2]].T.numpy()
    known = (known @ HERE[:3, :3].T + HERE[:3, 3] + [9, -6, 0]) * [-1, -1, 1]
    there = led(result["fixed_to_moving_transform"], points)
    left = np.linalg.norm(there - known, axis=1).mean()
    assert left < 0.35 * np.linalg.norm(points - known + [-9, 6, 0], axis=1).mean()
    back = led(result["moving_to_fixed_transform"], there)
    assert np.median(np.linalg.norm(back - points, axis=1)) < 0.05


def test_on_one_grid_the_transforms_are_each_others_inverse(pair):
    """So a later method, or whoever inverts the first, gets our inverse and makes none of its own."""
    registrar = RegisterImagesLM(**QUIET, **FEW)
    registrar.set_fixed_image(itk_image(pair[2][0, 0], HERE))
    result = registrar.register(itk_image(noise(0)[0, 0], HERE))
    forward, inverse = result["fixed_to_moving_transform"], result["moving_to_fixed_transform"]
    _, points = points_of(HERE)
    np.testing.assert_array_equal(led(forward.GetInverseTransform(), points), led(inverse, points))
    np.testing.assert_array_equal(led(inverse.GetInverseTransform(), points), led(forward, points))


def box(size, margin):
    out = np.zeros(size, np.uint8)
    out[(slice(margin, -margin),) * 3] = 1
    return out


def test_what_the_masks_hide_is_not_seen(pair):
    """Away from the masks, images that change change nothing."""
    moving, _, fixed = pair
    results = []
    for hidden in (0, 1):
        registrar = RegisterImagesLM(**QUIET, **FEW)
        registrar.set_mask_dilation(0)
        elsewhere = [5 * hidden * (1 - box(size, 3)) for size in (SIZE, OTHER)]
        registrar.set_fixed_image(itk_image(fixed[0, 0] + elsewhere[0] * noise(7)[0, 0].numpy(), HERE))
        registrar.set_fixed_mask(itk_image(box(SIZE, 7), HERE))
        seen = itk_image(moving[0, 0] + elsewhere[1] * noise(8, size=OTHER)[0, 0].numpy(), THERE)
        results.append(registrar.register(seen, itk_image(box(OTHER, 7), THERE)))
    _, points = points_of(HERE, 8)
    fields = [led(result["fixed_to_moving_transform"], points) for result in results]
    np.testing.assert_allclose(*fields, atol=2e-3)
    assert np.abs(fields[0] - points).max() > 0.5


def test_label_maps_guide_where_there_are_both():
    """Images without content: labels alone move."""
    fixed, moving = np.zeros((2, *SIZE), np.uint8)
    fixed[8:18, 8:16, 7:15] = 3
    moving[10:20, 8:16, 7:15] = 3
    registrar = RegisterImagesLM(**QUIET, **FEW)
    blank = noise(5, 6.0)[0, 0] * 1e-3
    registrar.set_fixed_image(itk_image(blank, HERE))
    registrar.set_fixed_labelmap(itk_image(fixed, HERE))
    result = registrar.register(itk_image(blank, HERE), moving_labelmap=itk_image(moving, HERE))
    edge = np.array([[8, 12, 11], [17, 12, 11]])
    points = (edge @ HERE[:3, :3].T + HERE[:3, 3]) * [-1, -1, 1]
    there = led(result["fixed_to_moving_transform"], points) * [-1, -1, 1]
    moved = to_voxel(torch.from_numpy(there), HERE).numpy() - edge
    assert moved[:, 0].min() > 1


def test_it_refines_what_greedy_found_and_both_go_into_a_file(pair, tmp_path):
    pytest.importorskip("picsl_greedy", reason="picsl-greedy is not installed")
    moving, truth, fixed = pair
    greedy = RegisterImagesGreedy(**QUIET)
    greedy.set_number_of_iterations([5, 1])
    chain = RegisterImagesChain([greedy, RegisterImagesLM(**QUIET, **FEW)], **QUIET)
    chain.set_prewarp_background_value(0.0)
    chain.set_fixed_image(itk_image(fixed[0, 0], HERE))
    result = chain.register(itk_image(moving[0, 0], THERE))
    voxels, points = points_of(HERE)
    known = voxels + truth[0][:, voxels[:, 0], voxels[:, 1], voxels[:, 2]].T.numpy()
    known = (known @ HERE[:3, :3].T + HERE[:3, 3]) * [-1, -1, 1]
    off = [
        np.linalg.norm(led(transform, points) - known, axis=1).mean()
        for transform in (greedy.fixed_to_moving_transform, result["fixed_to_moving_transform"])
    ]
    assert off[1] < 0.8 * off[0]
    itk.transformwrite([result["fixed_to_moving_transform"]], str(tmp_path / "both.tfm"))
    ddf, _ = read_itk_transform(tmp_path / "both.tfm", THERE, SIZE, HERE)
    there = voxels + ddf[:, voxels[:, 0], voxels[:, 1], voxels[:, 2]].T
    there = (there @ THERE[:3, :3].T + THERE[:3, 3]) * [-1, -1, 1]
    np.testing.assert_allclose(there, led(result["fixed_to_moving_transform"], points), atol=1e-3)


def test_what_it_cannot_register():
    with pytest.raises(TypeError, match=r"RegisterImagesLM takes the keyword arguments .*, got \['sclaes'\]"):
        RegisterImagesLM(**QUIET, sclaes=(2, 1))
    registrar = RegisterImagesLM(**QUIET)
    image = itk_image(noise(0)[0, 0], HERE)
    with pytest.raises(ValueError, match="fixed_image must be set"):
        registrar.registration_method(image)
    registrar.set_fixed_image(image)
    with pytest.raises(ValueError, match=r"moving_image must be in 3D with one component, got 2D with 1"):
        registrar.register(itk.image_from_array(np.zeros((8, 8), np.float32)))
    far = HERE.copy()
    far[:3, 3] += 500
    with pytest.raises(ValueError, match="fixed_image and moving_image must overlap"):
        registrar.register(itk_image(noise(0)[0, 0], far))


def test_the_first_transform_has_no_folds(pair):
    result = register(pair, RegisterImagesLM(**QUIET, step=1.0, smooth_residual=0.2, **FEW))
    field = itk.array_from_image(result["fixed_to_moving_transform"].GetDisplacementField()).T
    voxels = np.einsum("ij,j...->i...", np.linalg.inv(np.diag([-1, -1, 1]) @ HERE[:3, :3]), field)
    assert int(fold_count(torch.from_numpy(voxels)[None])) == 0
