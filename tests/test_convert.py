"""Fields of other networks: each conversion warps as its network does, and the check tells which is meant."""

import warnings

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from monai_lm import RegistrationInferer
from monai_lm.convert import (
    CONVENTIONS,
    MILLIMETRES,
    check,
    from_coarse,
    from_grid_sample,
    from_icon,
    from_lapirn,
    from_positions,
    from_symnet,
    from_symnet_velocities,
)
from monai_lm.fields import compose, gaussian_smooth, integrate, invert, warp

SIZES = [(11, 8), (7, 9, 8)]


def identity(size):
    return torch.stack(torch.meshgrid(*[torch.arange(s, dtype=torch.float64) for s in size], indexing="ij"))


def per_axis(values, n):
    return torch.tensor(values, dtype=torch.float64).view(-1, *[1] * n)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_a_map_for_grid_sample_warps_as_grid_sample_does(size, align_corners, random_tensor):
    """Onto the grid of an image of another size, too."""
    n = len(size)
    moving = random_tensor((2, 1, *[s + 3 for s in size]))
    grid = 0.7 * random_tensor((2, *size, n), 1)
    expected = F.grid_sample(moving, grid, align_corners=align_corners, padding_mode="border")
    ddf = from_grid_sample(grid, align_corners, moving.shape[2:])
    torch.testing.assert_close(warp(moving, ddf), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", SIZES)
def test_lapirns_displacement_is_added_to_the_identity_of_grid_sample(size, random_tensor):
    n, image = len(size), random_tensor((1, 1, *size))
    flow = 0.2 * random_tensor((1, n, *size), 1)
    unit = F.affine_grid(torch.eye(n, n + 1, dtype=torch.float64)[None], (1, 1, *size), align_corners=True)
    expected = F.grid_sample(image, unit + flow.movedim(1, -1), align_corners=True, padding_mode="border")
    torch.testing.assert_close(warp(image, from_lapirn(flow)), expected, rtol=0, atol=1e-9)


def test_symnets_displacement_is_in_hundreds_of_voxels_last_axis_first():
    flow = per_axis([0.03, 0.02, -0.01], 3).expand(1, 3, 5, 6, 7)
    expected = per_axis([-1.0, 2.0, 3.0], 3).expand(1, 3, 5, 6, 7)
    torch.testing.assert_close(from_symnet(flow), expected)
    torch.testing.assert_close(from_symnet(flow, range_flow=7), 0.07 * expected)


def test_symnets_two_velocities_each_go_half_the_way(random_tensor):
    """Shifts add up; exchanged images give the inverse; and so by SYMNet's own formula, within a margin of zeros."""
    size, steps = (14, 16, 12), 4
    shifts = [per_axis(value, 3).expand(1, 3, *size) / 100 for value in ([1.0, 0.0, -1.0], [0.0, 2.0, 1.0])]
    expected = per_axis([2.0, 2.0, -1.0], 3).expand(1, 3, *size)
    torch.testing.assert_close(from_symnet_velocities(shifts, steps=steps), expected)
    velocities = [0.04 * gaussian_smooth(F.pad(random_tensor((1, 3, 6, 8, 4), k), [4] * 6), 1.5) for k in range(2)]
    there, back = (from_symnet_velocities(v, steps=steps) for v in (velocities, velocities[::-1]))
    assert there.abs().max() > 0.4
    assert compose(there, back).abs().max() < 0.2 * there.abs().max()  # what interpolation leaves
    half = integrate(100 * velocities[1].flip(1), steps), integrate(-100 * velocities[0].flip(1), steps)
    grid = ((identity(size) + half[1]) * 2 / per_axis([s - 1.0 for s in size], 3) - 1).movedim(1, -1).flip(-1)
    expected = F.grid_sample(half[0], grid, align_corners=True) + half[1]
    torch.testing.assert_close(there, expected, rtol=0, atol=1e-3)


def test_positions_lead_to_voxels_of_the_moving_image(random_tensor):
    ddf = random_tensor((2, 3, 4, 5, 6))
    torch.testing.assert_close(from_positions(ddf + identity((4, 5, 6))), ddf)


def test_a_map_of_icons_is_in_units_of_one_voxel_less_than_the_grid_has():
    """On its grid of 175 a shift by .1 is 17.4 voxels; 17.5, by the number of voxels, is .57 % too long."""
    size = (175, 3, 5)
    phi = identity(size) / per_axis([s - 1.0 for s in size], 3) + per_axis([0.1, 0.5, -0.25], 3)
    expected = per_axis([17.4, 1.0, -1.0], 3).expand(1, 3, *size)
    torch.testing.assert_close(from_icon(phi[None]), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("factor", [None, 4, (4, 4, 4)])
def test_a_coarse_grid_of_blocks_keeps_a_linear_field(factor):
    """A block's centre lies at ``4 i + 1.5``: a field that is linear there is linear in voxels."""
    coarse = torch.cat([0.25 * 0.1 * (4 * identity((5, 6, 7))[:1] + 1.5), torch.zeros(2, 5, 6, 7)])[None]
    ddf = from_coarse(coarse, (20, 24, 28), factor)
    inner = (slice(None), 0, slice(2, -2))
    torch.testing.assert_close(ddf[inner], 0.1 * identity((20, 24, 28))[:1, 2:-2].double())
    assert ddf.shape == (1, 3, 20, 24, 28)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: from_grid_sample(torch.zeros(1, 3, 4, 5, 6)), r"grid must be \(B, \*S, n\)"),
        (lambda: from_grid_sample(torch.zeros(1, 4, 5, 2), size=(4, 5, 6)), "size must be 2 voxel counts"),
        (lambda: from_lapirn(torch.zeros(1, 2, 4, 5, 6)), r"flow must be \(B, n, \*S\)"),
        (lambda: from_symnet(torch.zeros(3, 4, 5, 6)), r"flow must be \(B, n, \*S\)"),
        (lambda: from_positions(torch.zeros(4, 5, 2)), r"positions must be \(B, n, \*S\)"),
        (lambda: from_symnet_velocities(torch.zeros(2, 2, 4, 5)), "the two that the network returns, got Tensor"),
        (lambda: from_symnet_velocities([torch.zeros(1, 2, 4, 5)]), "got 1 entries"),
        (lambda: from_icon(torch.zeros(1, 4, 5, 2)), r"phi must be \(B, n, \*S\)"),
        (
            lambda: from_coarse(torch.zeros(1, 2, 4, 5), (8,)),
            r"size must be 2 voxel counts, .* 2 components, got \(8,\)",
        ),
        (lambda: from_coarse(torch.zeros(1, 2, 4, 5), 8), "size must be 2 voxel counts, .* got 8"),
        (lambda: from_coarse(torch.zeros(1, 2, 4, 5), (8.0, 10)), r"size must be 2 voxel counts, .* got \(8.0, 10\)"),
        (lambda: from_coarse(torch.zeros(1, 2, 4, 5), (8, 10), 0), "factor must be a positive number or 2 of them"),
        (lambda: from_coarse(torch.zeros(1, 2, 4, 5), (8, 10), (2,)), r"factor must be .* an axis each, got \(2,\)"),
        (
            lambda: from_coarse(torch.zeros(1, 2, 4, 5), (8, 10), 4),
            r"factor must be about size / P, \[2.0, 2.0\] for a field of \(4, 5\) on an image of \(8, 10\) .*, got 4",
        ),
        (lambda: check(*[torch.zeros(1, 1, 8, 8)] * 2, torch.zeros(1, 2, 8, 8), "mm"), "given must be one of"),
        (
            lambda: check(*[torch.zeros(1, 1, 8, 8)] * 2, torch.zeros(1, 2, 8, 8), "millimetres"),
            "spacing must be given for given='millimetres'",
        ),
    ],
)
def test_what_is_none_of_them_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_what_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match=r"flow must be a torch\.Tensor, got tuple"):
        from_lapirn((torch.zeros(1, 3, 4, 5, 6),))


# --- what networks make -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def predicted(request):
    """The middle of a brain pair, and Conditional LapIRN's field between them, at half the resolution."""
    folder = request.getfixturevalue("data_root") / "predictions"
    if not folder.is_dir():
        pytest.skip(f"no predictions at {folder}")
    part = (slice(None), slice(None), *[slice(30, 126)] * 3)
    images = [
        torch.from_numpy(np.asarray(nib.load(folder / f"{name}_t1.nii.gz").dataobj, np.float32))[None, None]
        for name in ("1012", "1036")
    ]
    ddf = torch.from_numpy(np.load(folder / "clapirn_lite_1012_1036.npz")["ddf"].astype(np.float32))[None]
    fixed, moving = (F.avg_pool3d(image[part], 2) for image in images)
    return fixed, moving, F.avg_pool3d(ddf[part], 2) / 2


def written(ddf, convention):
    """A displacement in voxels as it is in another convention."""
    if convention == "inverse direction":
        return invert(ddf)[0]
    size = ddf.new_tensor(ddf.shape[2:]).view(-1, *[1] * (ddf.dim() - 2))
    place = identity(ddf.shape[2:]).to(ddf)
    return {
        "voxels": ddf,
        "reversed": ddf.flip(1),
        "normalised": ddf * 2 / (size - 1),
        "normalised reversed": (ddf * 2 / (size - 1)).flip(1),
        "positions": ddf + place,
        "grid_sample": ((ddf + place) * 2 / (size - 1) - 1).flip(1),
        "icon": (ddf + place) / (size - 1),
    }[convention]


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_the_convention_of_a_networks_field_is_told(predicted, convention):
    fixed, moving, ddf = predicted
    given = written(ddf, convention)
    if convention != "inverse direction":  # of which the negative is no more than near
        torch.testing.assert_close(CONVENTIONS[convention](given), ddf, rtol=0, atol=1e-4)
    other = "voxels" if convention != "voxels" else "reversed"
    with pytest.warns(UserWarning, match=f"ddf fits the images better as '{convention}' than as '{other}'"):
        found = check(fixed, moving, given, other)
    assert found.best == convention
    assert str(found).splitlines()[:2] == [
        f"the field is {convention!r}", f"{convention:<20}{found.losses[convention]:.4f}"
    ]  # fmt: skip


@pytest.mark.parametrize("convention", ["voxels", *MILLIMETRES])
def test_with_a_spacing_millimetres_are_told(predicted, convention):
    fixed, moving, ddf = predicted
    edges = ddf.new_tensor([1.5, 2.0, 3.0]).view(3, 1, 1, 1)
    signs = ddf.new_tensor([-1, -1, 1] if "LPS" in convention else [1, 1, 1]).view(3, 1, 1, 1)
    given = ddf if convention == "voxels" else ddf * edges * signs
    found = check(fixed, moving, given, convention, spacing=(1.5, 2.0, 3.0))
    assert found.best == convention
    assert set(found.losses) == {*CONVENTIONS, *MILLIMETRES}
    assert set(check(fixed, moving, ddf, spacing=(1, 1, 1)).losses) == {*CONVENTIONS, "millimetres LPS"}
    if convention != "voxels":
        with pytest.warns(UserWarning, match=f"better as '{convention}' than as 'voxels'"):
            check(fixed, moving, given, spacing=(1.5, 2.0, 3.0))


def test_a_field_is_a_tensor():
    for call in (from_grid_sample, from_lapirn, from_symnet, from_icon, lambda u: from_coarse(u, (4, 5))):
        with pytest.raises(TypeError, match=r"must be a torch.Tensor, got ndarray"):
            call(np.zeros((1, 2, 4, 5)))


@pytest.mark.parametrize("most", [0.0, 0.3])
def test_of_a_small_field_nothing_is_told(most, smooth_image):
    moving = smooth_image((1, 1, 32, 36), 2.0, dtype=torch.float32)
    ddf = gaussian_smooth(torch.randn(1, 2, 32, 36, generator=torch.Generator().manual_seed(0)), 4.0)
    ddf *= most / ddf.abs().max()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = check(warp(moving, ddf), moving, ddf, "reversed")
    assert found.best is None
    assert str(found).startswith("cannot tell which convention")


def test_voxelmorph_returns_a_displacement_in_voxels(random_tensor):
    vxm = pytest.importorskip("voxelmorph", reason="VoxelMorph's convention is checked where it is installed")
    torch.manual_seed(0)
    how = {"ndim": 3, "source_channels": 1, "target_channels": 1, "nb_features": [4, 4, 4], "flow_initializer": 0.3}
    network = vxm.nn.models.VxmPairwise(**how)
    source, target = (gaussian_smooth(random_tensor((1, 1, 16, 24, 32), k).float(), 1.5) for k in range(2))
    with torch.no_grad():
        flow, warped = network(source, target, return_warped_source=True)
        assert torch.equal(network(source, target), flow)
    assert flow.abs().max() > 0.5
    torch.testing.assert_close(warp(source, flow, padding_mode="zeros"), warped, rtol=0, atol=1e-4)


def test_icon_returns_a_map_in_units_of_voxels_less_one(random_tensor):
    """Of two steps, the first at half the resolution."""
    icon = pytest.importorskip("icon_registration", reason="ICON's convention is checked where it is installed")
    networks = pytest.importorskip("icon_registration.networks")
    torch.manual_seed(0)
    steps = [networks.UNet2(2, [[2, 4, 8], [4, 8]], dimension=3) for _ in range(2)]
    for step in steps:
        torch.nn.init.normal_(step.lastConv.weight, std=0.1)
    first, second = (icon.FunctionFromVectorField(step) for step in steps)
    network = icon.TwoStepRegistration(icon.DownsampleRegistration(first, dimension=3), second).eval()
    network.assign_identity_map((1, 1, 16, 24, 32))
    moving, fixed = (gaussian_smooth(random_tensor((1, 1, 16, 24, 32), k).float(), 1.5) for k in range(2))
    with torch.no_grad():
        phi = network(moving, fixed)(network.identity_map)
        warped = network.as_function(moving)(phi)
    ddf = from_icon(phi)
    assert ddf.abs().amax((0, 2, 3, 4)).min() > 0.5
    torch.testing.assert_close(warp(moving, ddf), warped, rtol=0, atol=1e-5)
    inferer = RegistrationInferer("displacement", takes=("moving", "fixed"), convert=from_icon)
    with torch.no_grad():
        predicted = inferer(torch.cat([moving, fixed], 1), lambda m, f: network(m, f)(network.identity_map))
    torch.testing.assert_close(predicted, ddf)


def test_convex_adam_returns_a_displacement_in_voxels_components_last(random_tensor):
    convex = pytest.importorskip("convexAdam.convex_adam_MIND", reason="convexAdam is checked where it is installed")
    moving = gaussian_smooth(random_tensor((1, 1, 48, 52, 56)).float(), 2.0)
    shift = torch.tensor([3.0, -2.0, 0.0]).view(1, 3, 1, 1, 1)
    fixed = warp(moving, shift.expand(1, 3, 48, 52, 56))
    out = convex.convex_adam_pt(fixed[0, 0], moving[0, 0], grid_sp=4, disp_hw=3, selected_niter=20)
    ddf = torch.from_numpy(out).movedim(-1, 0)[None].float()
    inner = (slice(None), slice(None), *[slice(16, -16)] * 3)
    assert (ddf[inner].mean((2, 3, 4)) - shift.flatten()).abs().max() < 0.4
