"""The harmonic extension: against a solved system, affine fields, and what is between."""

import pytest
import torch

from monai_lm.fields.extension import extend_in_place
from tests.solver.helpers import noise

SHAPES = [(11, 9), (7, 8, 6)]
SPACING = (1.0, 1.5, 3.0)


def place(shape):
    """A hole with an island in it, that meets the border of the grid."""
    inside = torch.zeros(1, 1, *shape, dtype=torch.float64)
    inside[(..., *(slice(0 if a == 0 else 2, s - 2) for a, s in enumerate(shape)))] = 1
    inside[(..., *(s // 2 for s in shape))] = 0
    return inside


def solved(field, inside, spacing):
    """By a dense system: what flows into every voxel inside is nothing."""
    shape, count = inside.shape[2:], inside.numel()
    index = torch.arange(count).view(shape)
    matrix, right = torch.eye(count, dtype=torch.float64), field.flatten(2)[0].T.clone()
    for voxel in inside.flatten().nonzero().flatten().tolist():
        matrix[voxel, voxel], right[voxel] = 0, 0
    for axis, edge in enumerate(spacing):
        lower = index.narrow(axis, 0, shape[axis] - 1).flatten().tolist()
        upper = index.narrow(axis, 1, shape[axis] - 1).flatten().tolist()
        for a, b in [*zip(lower, upper, strict=True), *zip(upper, lower, strict=True)]:
            if inside.flatten()[a]:
                matrix[a, a] += 1 / edge**2
                matrix[a, b] -= 1 / edge**2
    return torch.linalg.solve(matrix, right).T.reshape(field.shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_solution_of_laplaces_equation_and_nothing_outside_changes(shape):
    field, inside, spacing = noise(1, 2, *shape), place(shape), SPACING[: len(shape)]
    out = field.clone()
    extend_in_place(out, inside, spacing, 60)
    torch.testing.assert_close(out, solved(field, inside, spacing), rtol=0, atol=1e-6)
    kept = inside.expand_as(field) == 0
    assert torch.equal(out[kept], field[kept])
    assert float(out.max()) <= float(field[kept].max()) + 1e-6
    assert float(out.min()) >= float(field[kept].min()) - 1e-6


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.0, 1.0, 3.0)])
def test_an_affine_field_is_found_again_by_few_cycles(spacing):
    shape = (40, 38, 36)
    grid = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, s) for s in shape], indexing="ij"))
    inside = (grid.norm(dim=0) < 0.7).float()[None, None]
    affine = (torch.einsum("ab,b...->a...", noise(3, 3).float(), grid) + 2)[None]
    out = affine * (1 - inside)
    missing = [float((out - affine).abs().max())]
    for _ in range(2):
        extend_in_place(out, inside, spacing, 6)
        missing.append(float((out - affine).abs().max()))
    assert missing[1] < 0.05 * missing[0]
    assert missing[2] < 0.2 * missing[1]


@pytest.mark.parametrize("size", [9, 25, 33, 40])
@pytest.mark.parametrize("ends", ["first", "last"])
def test_no_number_of_cycles_leads_away_where_the_mask_meets_the_border(size, ends):
    """Of such sizes the last voxels of coarser grids stand out over the border."""
    inside = torch.ones(1, 1, size, 9, 12)
    inside[:, :, 0 if ends == "first" else -1] = 0
    field = noise(1, 3, size, 9, 12).float() * (1 - inside)
    around = field.abs().max()
    for cycles in (1, 5, 30):
        extend_in_place(field, inside, (1.0, 1.0, 1.0), cycles)
        assert float(field.abs().max()) <= float(around) + 1e-5
    before = field.clone()
    extend_in_place(field, inside, (1.0, 1.0, 1.0), 1)
    assert float((field - before).abs().max()) < 1e-3 * float(around)
