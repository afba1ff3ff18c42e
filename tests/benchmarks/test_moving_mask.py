"""The command for masks of the moving image: its measure is differentiated exactly, its table has every way."""

import pytest
import torch

from benchmarks.moving_mask import WAYS, Exact, moving_mask
from monai_lm.similarity import get_similarity
from monai_lm.similarity.weighted import Weighted


@pytest.mark.parametrize("name", ["lncc", "mi", "mse", "ncc"])
def test_the_exact_derivative_is_that_of_the_loss_of_image_and_weight(name, size, random_tensor):
    weight, warped, fixed = (random_tensor((2, 1, *size), seed) for seed in range(3))
    both = torch.cat([weight.abs() + 0.1, warped], 1)
    exact, held = Exact(get_similarity(name)), Weighted(get_similarity(name), fixed=False, moving=True)
    reference = exact.reference(torch.cat([torch.ones_like(fixed), fixed], 1))
    loss, derivative = exact.evaluate(both, reference)
    torch.testing.assert_close(loss, held.evaluate(both, held.reference(fixed))[0])
    direction, h = random_tensor(tuple(both.shape), 5), 1e-5
    ahead, behind = (exact.evaluate(both + s * direction, reference)[0] for s in (h, -h))
    slope = (derivative * direction).flatten(1).sum(1)
    torch.testing.assert_close((ahead - behind) / (2 * h), slope, rtol=1e-5, atol=1e-6)
    assert derivative[:, 0].abs().max() > 1e-3


def test_leaving_out_the_weights_derivative_is_better_beside_the_lesion(capsys):
    moving_mask(("lncc",), (48, 46), 4)
    rows = [[cell.strip() for cell in line.split("|")[2:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    errors = {row[0]: [float(value) for value in row[1:]] for row in rows[:-1]}
    assert tuple(errors) == WAYS
    assert errors["no lesion"][1] < errors["mask"][1] < errors["mask, exact"][1] < errors["no mask"][1]
    told = [float(cell.split()[0]) for cell in rows[-1][1:]]
    expected = [a - b for a, b in zip(errors["mask, exact"], errors["mask"], strict=True)]
    assert told == pytest.approx(expected, abs=2e-3)
