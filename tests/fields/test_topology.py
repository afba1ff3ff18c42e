"""Jacobians, folds and repair against simplex volumes, digital-diffeomorphism and known maps."""

import itertools

import numpy as np
import pytest
import torch

from monai_lm.fields import compose, fold_count, jacobian_determinant, repair, topology
from monai_lm.fields.topology import MARGIN, folded_cells
from monai_lm.kernels.reference import cell_determinants

WIDE = pytest.mark.parametrize("size", [(24, 22), (18, 17, 18)], ids=["2D", "3D"])
NOISY = pytest.mark.parametrize("size", [(14, 12), (9, 8, 7)], ids=["2D", "3D"])


def linear_field(size, matrix):
    axes = [torch.arange(s, dtype=torch.float64) for s in size]
    return torch.einsum("ac,c...->a...", matrix, torch.stack(torch.meshgrid(*axes, indexing="ij")))[None]


def simplices(n):
    """Vertices of the simplices of a unit cell: one at every corner and, in 3D, the two of one parity."""
    corners = list(itertools.product((0, 1), repeat=n))
    for corner in corners:
        yield [corner] + [tuple(1 - c if a == axis else c for a, c in enumerate(corner)) for axis in range(n)]
    if n == 3:
        yield [c for c in corners if sum(c) % 2 == 0]
        yield [c for c in corners if sum(c) % 2 == 1]


def signed_volume(vertices):
    vertices = np.array(vertices, dtype=np.float64)
    return np.linalg.det(vertices[1:] - vertices[0])


def smallest_ratio_by_loops(ddf):
    """Smallest volume ratio, mapped against original simplex, in every cell of the grid and of the ring around it."""
    field = ddf.numpy()
    n, size = field.shape[0], field.shape[1:]

    def mapped(x):
        inside = tuple(min(max(i, 0), s - 1) for i, s in zip(x, size, strict=True))
        return np.array(x) + field[(slice(None), *inside)]

    out = np.zeros([s + 1 for s in size])
    for cell in np.ndindex(*out.shape):
        ratios = []
        for simplex in simplices(n):
            vertices = [tuple(i - 1 + c for i, c in zip(cell, corner, strict=True)) for corner in simplex]
            ratios.append(signed_volume([mapped(v) for v in vertices]) / signed_volume(vertices))
        out[cell] = min(ratios)
    return torch.from_numpy(out)


def one_fold(size, amplitude=1.6, dtype=torch.float32):
    """Zero but for the centre voxel, which jumps over its neighbour along the first axis."""
    field = torch.zeros(1, len(size), *size, dtype=dtype)
    field[(0, 0, *[s // 2 for s in size])] = amplitude
    return field


def non_diffeomorphic_volume(field):
    """NDV (area in 2D) of a ``(1, n, *S)`` field from the package of those who defined it."""
    package = pytest.importorskip("digital_diffeomorphism", reason="the oracle digital-diffeomorphism is not installed")
    measure = package.ndv if field.shape[1] == 3 else package.nda
    displacement = field[0].movedim(0, -1).float().numpy().copy()  # it changes its input
    return float(measure(displacement, is_disp=True)[0])


def test_jacobian_determinant_of_a_linear_map_is_exact(size, random_tensor):
    n = len(size)
    matrix = 0.3 * random_tensor((n, n))
    expected = torch.linalg.det(torch.eye(n, dtype=torch.float64) + matrix)
    out = jacobian_determinant(linear_field(size, matrix))
    torch.testing.assert_close(out, expected.expand(1, *size), rtol=1e-11, atol=1e-11)


def test_jacobian_determinant_is_the_central_difference(size, random_tensor):
    n, field = len(size), random_tensor((1, len(size), *size))
    centre = tuple(1 for _ in size)
    columns = []
    for axis in range(n):
        ahead, behind = (tuple(1 + d * (a == axis) for a in range(n)) for d in (1, -1))
        columns.append((field[(0, slice(None), *ahead)] - field[(0, slice(None), *behind)]) / 2)
    matrix = torch.stack(columns, 1) + torch.eye(n, dtype=torch.float64)
    assert jacobian_determinant(field)[(0, *centre)].item() == pytest.approx(torch.linalg.det(matrix).item())


def test_identity_has_determinant_one_and_no_folds(size):
    identity = torch.zeros(2, len(size), *size)
    assert torch.equal(jacobian_determinant(identity), torch.ones(2, *size))
    assert fold_count(identity).tolist() == [0, 0]
    assert not folded_cells(identity, margin=0.999).any()
    assert folded_cells(identity, margin=1.0).all()


def test_any_translation_has_no_folds(size, random_tensor):
    n = len(size)
    shift = 100 * random_tensor((1, n), dtype=torch.float32).view(1, n, *[1] * n).expand(1, n, *size)
    assert fold_count(shift).tolist() == [0]


@pytest.mark.parametrize("amplitude", [0.3, 1.0])
@pytest.mark.parametrize("size", [(6, 5), (4, 3, 5)], ids=["2D", "3D"])
def test_folded_cells_equal_simplex_volumes(size, amplitude, random_tensor):
    field = amplitude * random_tensor((2, len(size), *size), 1)
    smallest = torch.stack([smallest_ratio_by_loops(pair) for pair in field])
    for margin in (0.0, 0.1, -0.5):
        assert torch.equal(folded_cells(field, margin), smallest <= margin)
    folded = smallest <= 0
    assert torch.equal(fold_count(field), folded.flatten(1).sum(1))
    assert folded.any()
    assert not folded.all()


@pytest.mark.parametrize("size", [(5, 4), (4, 5, 3)], ids=["2D", "3D"])
def test_a_fold_in_the_ring_around_the_grid_counts(size):
    """A turn by 120 degrees folds nowhere between voxels, but its continuation by border values does."""
    n, turn = len(size), torch.zeros(len(size), len(size), dtype=torch.float64)
    turn[:2, :2] = torch.tensor([[-1.5, -(0.75**0.5)], [0.75**0.5, -1.5]])
    field = linear_field(size, turn)
    mask = folded_cells(field)[0]
    assert mask.shape == tuple(s + 1 for s in size)
    assert not mask[(slice(1, -1),) * n].any()
    assert mask[[0, -1], 1:-1].all()
    assert mask[1:-1, [0, -1]].all()
    assert torch.equal(mask, smallest_ratio_by_loops(field[0]) <= 0)


def test_a_reflection_is_folded_everywhere(size):
    n = len(size)
    matrix = torch.zeros(n, n, dtype=torch.float64)
    matrix[0, 0] = -2
    mask = folded_cells(linear_field(size, matrix))
    assert mask[(0, *[slice(1, -1)] * n)].all()


def test_nan_counts_as_folded(size):
    field = torch.zeros(2, len(size), *size)
    field[(1, 0, *[2] * len(size))] = float("nan")
    counts = fold_count(field)
    assert counts[0] == 0
    assert counts[1] >= 2 ** len(size)


@pytest.mark.parametrize("size", [(10, 12), (4, 3, 5)], ids=["2D", "3D"])
def test_inside_a_mask_cells_count_that_have_a_corner_there(size, random_tensor):
    field, mask = 0.5 * random_tensor((2, len(size), *size), 1), random_tensor((2, 1, *size), 2) > 0.5
    folded, expected = folded_cells(field), [0, 0]
    for pair, *cell in folded.nonzero().tolist():
        corners = [[v for v in (i - 1, i) if 0 <= v < s] for i, s in zip(cell, size, strict=True)]
        expected[pair] += any(bool(mask[(pair, 0, *corner)]) for corner in itertools.product(*corners))
    assert fold_count(field, mask).tolist() == expected
    assert all(0 < some < every for some, every in zip(expected, fold_count(field).tolist(), strict=True))
    assert torch.equal(fold_count(field, torch.ones_like(mask)), fold_count(field))


def test_an_axis_of_one_voxel_has_no_jacobian():
    with pytest.raises(ValueError, match=r"ddf must be at least 2 voxels long .* got shape \(1, 2, 4, 1\)"):
        jacobian_determinant(torch.zeros(1, 2, 4, 1))


def test_a_collapsed_cell_counts_as_folded():
    field = torch.zeros(1, 2, 6, 4)
    field[:, 0] = torch.tensor([0.0, 0.0, 0.0, -1.0, -1.0, -1.0]).view(1, 6, 1)
    assert folded_cells(field)[0, :, 2].tolist() == [False, False, False, True, False, False, False]


@pytest.mark.parametrize("size", [(24, 22), (14, 12, 13)], ids=["2D", "3D"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_fold_count_of_half_precision_is_that_of_the_same_values_in_float32(size, dtype, generator):
    field = torch.randn(4, len(size), *size, generator=generator(3)).bfloat16().half()  # exact in all of them
    for scale in (0.25, 0.5):
        counts = fold_count((scale * field).to(dtype))
        assert counts.dtype == torch.int64
        assert counts.tolist() == fold_count(scale * field.float()).tolist()


def test_fold_count_is_invariant_to_batch_order_flips_and_transposition(
    size, random_tensor, flip_field, transpose_field
):
    field = 0.4 * random_tensor((3, len(size), *size), 4)
    counts = fold_count(field)
    assert counts.unique().numel() > 1
    assert fold_count(field.flip(0)).tolist() == counts.flip(0).tolist()
    for axis in range(len(size)):
        assert fold_count(flip_field(field, axis)).tolist() == counts.tolist()
    assert fold_count(transpose_field(field)).tolist() == counts.tolist()


@pytest.mark.parametrize("size", [(12, 11), (9, 10, 8)], ids=["2D", "3D"])
def test_negative_parts_sum_to_the_non_diffeomorphic_volume(size, random_tensor):
    """A corner simplex is counted at 1/2 of its volume, and so is a central one, which is twice as large."""
    field = torch.zeros(1, len(size), *size, dtype=torch.float64)
    inside = (..., *[slice(3, -3)] * len(size))
    field[inside] = random_tensor(field[inside].shape, 5)
    padded = torch.nn.functional.pad(field, [1, 1] * len(size))  # zero at the edges
    negative = [-d.clamp(max=0).sum().item() for d in cell_determinants(padded)]
    expected = sum(negative) / 4 if len(size) == 2 else sum(negative[:8]) / 12 + sum(negative[8:]) / 6
    assert expected > 1
    assert non_diffeomorphic_volume(field) == pytest.approx(expected, rel=1e-5)


@NOISY
@pytest.mark.parametrize("amplitude", [0.05, 0.25, 3.0])
def test_no_folds_means_no_non_diffeomorphic_volume(size, amplitude, random_tensor):
    field = amplitude * random_tensor((1, len(size), *size), 6, dtype=torch.float32)
    assert (fold_count(field).item() > 0) == (amplitude > 0.05)
    sound = repair(field)
    assert fold_count(sound).tolist() == [0]
    assert non_diffeomorphic_volume(sound) == 0


@NOISY
@pytest.mark.parametrize("amplitude", [0.5, 2.0, 20.0])
def test_repair_leaves_no_folds_in_noise(size, amplitude, random_tensor):
    field = amplitude * random_tensor((2, len(size), *size), 7, dtype=torch.float32)
    assert (fold_count(field) > 0).all()
    repaired = repair(field)
    assert fold_count(repaired).tolist() == [0, 0]
    assert not folded_cells(repaired, MARGIN).any()


@NOISY
@pytest.mark.parametrize("amplitude", [0.5, 5.0])
def test_repair_leaves_no_folds_in_the_composed_map(size, amplitude, random_tensor, smooth_field):
    outer = smooth_field((2, len(size), *size), 1.5, 4.0, 8, dtype=torch.float32)
    assert not folded_cells(outer, MARGIN).any()
    field = amplitude * random_tensor((2, len(size), *size), 9, dtype=torch.float32)
    repaired = repair(field, outer)
    assert fold_count(compose(outer, repaired)).tolist() == [0, 0]


def test_repair_with_an_outer_field_looks_at_the_composed_map_only():
    """The inner field is sound by itself and folds only together with the outer one."""
    position = torch.arange(20.0).view(1, 1, 20, 1).expand(1, 1, 20, 20)
    squeeze = torch.cat([-0.9 * (position - 9.5).clamp(-4, 4), torch.zeros_like(position)], 1)
    wiggle = torch.zeros_like(squeeze)
    wiggle[0, 1] = 6 * torch.sin(position[0, 0])
    shear = torch.zeros_like(squeeze)
    shear[:, 0] = 0.9 * torch.sin(position[0, 0].T)
    assert fold_count(wiggle).item() == fold_count(shear).item() == 0
    assert repair(shear) is shear
    assert fold_count(compose(wiggle, shear)).item() > 0
    assert fold_count(compose(wiggle, repair(shear, wiggle))).item() == 0


def test_repair_returns_the_same_tensor_where_nothing_folds(size, smooth_field):
    field = smooth_field((2, len(size), *size), 0.2, 2.0, 10)
    assert fold_count(field).tolist() == [0, 0]
    assert repair(field) is field
    assert repair(field, torch.zeros_like(field)) is field


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("outer", [False, True])
def test_repair_in_place_is_repair(dtype, outer, random_tensor, smooth_field):
    field = (4 * random_tensor((3, 2, 15, 16))).to(dtype)
    field[1] = 1
    around = smooth_field((3, 2, 15, 16)).to(dtype) if outer else None
    expected, given = repair(field, around), field.clone()
    assert topology.repair_in_place(given, around)
    assert torch.equal(given, expected)
    assert torch.equal(given[1], field[1])
    assert not torch.equal(given[0], field[0])
    assert not topology.repair_in_place(torch.ones_like(field))


@WIDE
def test_repair_leaves_the_input_alone(size):
    field = one_fold(size)
    copy = field.clone()
    repair(field)
    assert torch.equal(field, copy)


@WIDE
def test_repair_of_one_fold_does_not_touch_far_voxels(size, smooth_field):
    field = smooth_field((1, len(size), *size), 1.0, 5.0, 11, dtype=torch.float32)
    assert fold_count(field).item() == 0
    field = field + one_fold(size, 2.0)
    assert fold_count(field).item() > 0
    repaired = repair(field)
    assert fold_count(repaired).item() == 0
    far = torch.zeros(size, dtype=torch.bool)
    for axis, length in enumerate(size):
        distance = (torch.arange(length) - length // 2).abs() > 6
        far |= distance.view([-1 if a == axis else 1 for a in range(len(size))])
    assert far.sum() > 100
    assert torch.equal(repaired[..., far], field[..., far])


@WIDE
def test_repair_keeps_a_clean_pair_bit_for_bit(size, smooth_field, random_tensor):
    clean = smooth_field((1, len(size), *size), 1.0, 5.0, 12, dtype=torch.float32)
    noise = 3 * random_tensor(clean.shape, 13, dtype=torch.float32)
    repaired = repair(torch.cat([clean, noise, clean]))
    assert torch.equal(repaired[:1], clean)
    assert torch.equal(repaired[2:], clean)
    assert fold_count(repaired).tolist() == [0, 0, 0]


@pytest.mark.parametrize("size", [(20, 18), (13, 12, 11)], ids=["2D", "3D"])
def test_repair_of_a_pair_does_not_depend_on_the_others(size, smooth_image, random_tensor):
    lightly = smooth_image((1, len(size), *size), 1.0, 14, dtype=torch.float32) * 5
    heavily = 30 * random_tensor((1, len(size), *size), 15, dtype=torch.float32)
    assert (fold_count(torch.cat([lightly, heavily])) > 0).all()
    together = repair(torch.cat([lightly, heavily]))
    torch.testing.assert_close(together[:1], repair(lightly), rtol=0, atol=1e-5)
    torch.testing.assert_close(together[1:], repair(heavily), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "amplitude"),
    [((2, 2), 2.0), ((12, 3), 100.0), ((2, 2, 2), 2.0), ((12, 10, 2), 0.5), ((8, 7, 3), 100.0)],
    ids=["2x2", "12x3", "2x2x2", "12x10x2", "8x7x3"],
)
def test_repair_of_thin_images(size, amplitude, random_tensor):
    """Images may be as thin as two voxels; the reach of the smoothing may exceed that."""
    field = amplitude * random_tensor((1, len(size), *size), 17, dtype=torch.float32)
    assert fold_count(field).item() > 0
    assert fold_count(repair(field)).item() == 0


@WIDE
@pytest.mark.parametrize("noise", [0.0, 10.0])
def test_repair_keeps_a_huge_translation(size, noise, random_tensor):
    field = 500 + one_fold(size, 3.0) + noise * random_tensor((1, len(size), *size), 15, dtype=torch.float32)
    repaired = repair(field)
    assert fold_count(repaired).item() == 0
    torch.testing.assert_close(repaired.mean(), torch.tensor(500.0), rtol=0, atol=2.0)
    assert (repaired - 500).abs().max() < 30


@NOISY
def test_a_field_that_resists_is_shrunk_towards_its_mean(size, random_tensor):
    """Without rounds of smoothing only the shrinking is left, of the folded pair alone."""
    sound = torch.full((1, len(size), *size), -3.3)
    noise = random_tensor(sound.shape, 18, dtype=torch.float32)
    repaired = repair(torch.cat([sound, 50 + noise]), rounds=0)
    assert fold_count(repaired).tolist() == [0, 0]
    assert torch.equal(repaired[:1], sound)
    deviation = repaired[1] - 50
    assert deviation.abs().max() < noise.abs().max()
    spread, original = (x - x.mean(dim=tuple(range(1, x.dim())), keepdim=True) for x in (deviation, noise[0]))
    factor = (spread * original).sum() / (original * original).sum()
    assert 0.02 < factor < 0.6
    torch.testing.assert_close(spread, factor * original, rtol=0, atol=1e-4)


@NOISY
def test_repair_is_equivariant_to_flips_and_transposition(size, random_tensor, flip_field, transpose_field):
    field = 0.6 * random_tensor((1, len(size), *size), 16)
    repaired = repair(field)
    torch.testing.assert_close(repair(flip_field(field, 1)), flip_field(repaired, 1), rtol=0, atol=1e-9)
    torch.testing.assert_close(repair(transpose_field(field)), transpose_field(repaired), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_field_in_half_precision_is_repaired_as_the_wide_one_is(dtype, random_tensor):
    folded = (1.5 * random_tensor((1, 3, 12, 11, 10), 3)).to(dtype)
    wide, narrow = repair(folded.float()), repair(folded)
    assert int(fold_count(narrow)) == 0
    assert float((narrow.float() - wide).abs().mean()) < 0.2 * float((wide - folded.float()).abs().mean())


@pytest.mark.parametrize(
    ("ddf", "outer", "message"),
    [
        ((1, 2, 6, 7, 8), None, r"ddf must be \(B, n, \*S\) with n = len\(S\) = 2 or 3, got shape \(1, 2, 6, 7, 8\)"),
        ((1, 1, 6, 7), None, "ddf must be"),
        ((1, 3, 6, 7, 8, 9), None, "ddf must be"),
        ((5, 3, 8, 8, 8), (1, 3, 8, 8, 8), r"outer must be \(B, n, \*M\) for a field \(5, 3, 8, 8, 8\)"),
        ((1, 3, 8, 8, 8), (1, 2, 8, 8), "outer must be"),
        ((1, 3, 8, 8, 8), (1, 3, 1, 8, 8), "every axis at least 2 voxels long"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(ddf, outer, message, random_tensor):
    given = random_tensor(ddf, 0, torch.float32), None if outer is None else torch.zeros(outer)
    with pytest.raises(ValueError, match=message):
        repair(*given)
    with pytest.raises(ValueError, match=message):
        folded_cells(given[0], 0.0, given[1])
    if outer is None:
        with pytest.raises(ValueError, match=message):
            fold_count(given[0])


def test_autograd_knows_nothing_of_a_repair(random_tensor):
    folded = (2 * random_tensor((1, 2, 12, 11), 0, torch.float32)).requires_grad_()
    assert not repair(folded).requires_grad
    whole = torch.zeros(1, 2, 12, 11, requires_grad=True)
    assert repair(whole) is whole


def test_no_pairs_have_no_folds():
    assert fold_count(torch.zeros(0, 3, 8, 8, 8)).shape == (0,)
