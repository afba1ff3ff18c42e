"""NaN in what the public functions are given: named, not turned into an index or a field of zeros; no cost in loops."""

import pytest
import torch

from monai_lm import fields
from monai_lm.fields import metrics, sampling, space
from monai_lm.fields.finite import checked

GOOD = torch.zeros(1, 2, 6, 5)
IMAGE = torch.arange(30.0).view(1, 1, 6, 5)
AFFINE = torch.eye(4)


def spoilt(value):
    bad = GOOD.clone()
    bad[0, 1, 2, 3] = value
    return bad


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("ddf", lambda bad: fields.warp(IMAGE, bad)),
        ("ddf", lambda bad: fields.warp(IMAGE, ddf=bad, mode="nearest")),
        ("outer", lambda bad: fields.compose(bad, GOOD)),
        ("inner", lambda bad: fields.compose(GOOD, bad)),
        ("velocity", lambda bad: fields.integrate(bad)),
        ("ddf", lambda bad: fields.invert(bad)),
        ("ddf", lambda bad: fields.repair(bad)),
        ("outer", lambda bad: fields.repair(GOOD, bad)),
        ("ddf", lambda bad: fields.sample_points(bad, torch.zeros(1, 3, 2))),
        ("ddf", lambda bad: space.move_to_grid(bad, AFFINE, (4, 4), AFFINE)),
        ("ddf", lambda bad: space.resample_moving(IMAGE, bad, AFFINE, AFFINE)),
        ("ddf", lambda bad: metrics.inverse_consistency(bad, GOOD)),
        ("inverse", lambda bad: metrics.inverse_consistency(GOOD, bad)),
        ("ddf", lambda bad: metrics.target_registration_error(bad, *torch.zeros(2, 1, 3, 2), torch.ones(1, 2))),
    ],
)
def test_a_field_that_is_not_finite_is_named(name, call, value):
    with pytest.raises(ValueError, match=f"^{name} must be finite, got 1 NaN or infinite values"):
        call(spoilt(value))
    call(GOOD)  # and one that is, is taken


@pytest.mark.parametrize(
    "call",
    [
        fields.jacobian_determinant,
        lambda bad: fields.gaussian_smooth(bad, 1.0),
        lambda bad: fields.resample(bad, (11, 9)),
        lambda bad: space.through_affine(bad, AFFINE, AFFINE),
        lambda bad: metrics.sd_log_jacobian(bad),
    ],
)
def test_what_is_linear_or_a_number_says_nan_where_it_is(call):
    assert call(spoilt(float("nan"))).isnan().any()


def test_folds_are_counted_where_a_field_is_nan():
    assert int(fields.fold_count(spoilt(float("nan")))) == 4


def test_a_training_step_and_a_compiler_are_not_made_to_wait(monkeypatch):
    """Nothing is looked at where autograd records the field."""
    seen = checked(lambda ddf: ddf.isnan().sum(), "ddf")
    bad = spoilt(float("nan")).requires_grad_()
    assert int(seen(bad)) == 1
    with pytest.raises(ValueError, match="ddf must be finite"), torch.no_grad():
        seen(bad)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert int(seen(bad.detach())) == 1


def test_a_fixed_prediction_is_not_looked_at_in_every_step_of_a_loop():
    """As in the closure of FactoredLM: the residual is recorded, the prediction before it is not."""
    residual = GOOD.clone().requires_grad_()
    composed = checked(lambda outer, inner: outer + inner, "outer", "inner")
    assert composed(spoilt(float("nan")), inner=residual).isnan().sum() == 1
    with pytest.raises(ValueError, match="outer must be finite"):
        composed(spoilt(float("nan")), inner=residual.detach())


def test_warp_compiles_as_one_graph(smooth_field):
    ddf = smooth_field((1, 2, 6, 5), dtype=torch.float32)
    compiled = torch.compile(fields.warp, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(IMAGE, ddf), sampling.warp(IMAGE, ddf))


def test_the_engine_does_not_look_again():
    """What an iteration calls is not what is wrapped: a look would wait for a GPU."""
    from monai_lm.inferers import inferer as inferers
    from monai_lm.solver import descent, engine, optimizer, refinement, residual
    from monai_lm.training import module, supervision

    wrapped = {name for name in fields.__all__ if hasattr(getattr(fields, name), "__wrapped__")}
    assert wrapped == {"compose", "integrate", "repair", "sample_points", "warp"}
    for part in (engine, inferers, descent, optimizer, refinement, residual, module, supervision):
        for name in wrapped & set(vars(part)):
            assert not hasattr(vars(part)[name], "__wrapped__"), (part.__name__, name)
