"""The unknown: what it notes, keeps, returns to, and how it goes from level to level."""

import pytest
import torch

from monai_lm.fields import fold_count
from monai_lm.solver.pyramid import make_level
from monai_lm.solver.residual import Residual

FINE, COARSE = (make_level((24, 20), (1.0, 1.0), scale) for scale in (1, 2))


@pytest.fixture
def residual(random_tensor):
    """Three pairs, on the fine level."""
    made = Residual(3, FINE, torch.device("cpu"), torch.float32)
    assert torch.count_nonzero(made.field) == 0
    made.field.copy_(random_tensor((3, 2, *FINE.size), 0, torch.float32))
    return made


def test_every_pair_returns_to_its_own_best(residual):
    first = residual.field.clone()
    residual.note(torch.tensor([True, True, True]))
    second = residual.field.add_(1).clone()
    residual.note(torch.tensor([False, True, False]))
    third = residual.field.add_(1).clone()
    residual.settle(torch.tensor([False, False, True]))
    assert torch.equal(residual.field, torch.stack([first[0], second[1], third[2]]))
    residual.settle(torch.tensor([False, False, False]))  # the best was given up: nothing to return to
    assert torch.equal(residual.field, torch.stack([first[0], second[1], third[2]]))


def test_rejected_pairs_return_to_what_was_kept_last(residual):
    assert not residual.retract(torch.tensor([False, False, False]))  # nothing was kept
    residual.keep()
    residual.field.add_(1)
    residual.keep()
    kept, moved = residual.field.clone(), residual.field.add_(1).clone()
    assert not residual.retract(torch.tensor([True, True, True]))
    assert residual.retract(torch.tensor([True, False, True]))
    assert torch.equal(residual.field, torch.stack([moved[0], kept[1], moved[2]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.half])
def test_it_moves_in_the_units_of_the_level_and_forgets_what_lay_on_the_other(residual, dtype):
    residual.field.copy_(torch.tensor([4.0, -2.0]).view(1, 2, 1, 1).expand(3, 2, *FINE.size))
    residual.keep()
    residual.move_to(COARSE, dtype, None)
    assert residual.level == COARSE
    assert residual.field.dtype == dtype
    assert residual.field.shape == (3, 2, *COARSE.size)
    assert residual.field.amax((2, 3)).tolist() == residual.field.amin((2, 3)).tolist() == [[2.0, -1.0]] * 3
    assert not residual.retract(torch.tensor([False, False, False]))


def test_staying_is_free_and_moving_unfolds(residual):
    before = residual.field
    residual.move_to(FINE, torch.float32, None)
    assert residual.field is before
    assert int(fold_count(before).min()) > 0
    residual.move_to(COARSE, torch.float32, None)
    assert int(fold_count(residual.field).max()) == 0
