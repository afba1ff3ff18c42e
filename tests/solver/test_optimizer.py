"""FactoredLM: torch's optimizer interface around the levenberg iteration."""

import copy
import io
import itertools
import pickle
import warnings

import pytest
import torch
from monai.networks.blocks import Warp
from torch import Tensor

from monai_lm import FactoredLM, refine
from monai_lm.fields import compose, fold_count, gaussian_smooth, warp
from monai_lm.kernels.reference import eulerian_gradient
from monai_lm.similarity import LNCC
from monai_lm.similarity.base import normalized
from monai_lm.solver.acceptance import ACCEPTANCES

SHAPES = [(24, 22), (14, 13, 12)]

CONTROLS = ("simple", "trust_region")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def known_warp(shape: tuple[int, ...], batch: int = 1, amplitude: float = 1.5) -> tuple[Tensor, Tensor, Tensor]:
    """Fixed and moving image ``(B, 1, *S)`` and the smooth field ``(B, n, *S)`` between them."""
    moving = gaussian_smooth(noise(batch, 1, *shape, seed=1), 1.5)
    moving = moving / moving.std()
    ddf = gaussian_smooth(noise(batch, len(shape), *shape, seed=2), 4.0)
    ddf = ddf * (amplitude / ddf.abs().max())
    return warp(moving, ddf), moving, ddf


def end_point_error(a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.vector_norm(a - b, dim=1).mean())


def squares(fixed: Tensor, moving: Tensor, field: Tensor, per_pair: bool = False):
    """Closure of the summed squares."""

    def closure() -> Tensor:
        difference = (warp(moving, field) - fixed).square()
        return difference.flatten(1).sum(1) if per_pair else difference.sum()

    return closure


def zeros(shape: tuple[int, ...], batch: int = 1) -> Tensor:
    return torch.zeros(batch, len(shape), *shape, requires_grad=True)


# --- one implementation behind two faces ------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize(("control", "acceptance"), list(itertools.product(CONTROLS, ACCEPTANCES)))
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_refine_bit_for_bit(shape, control, acceptance, window):
    """With the same gradient in ``.grad`` every iterate is the one of ``refine`` on a single level."""
    iterations, step = 12, 1.5  # long steps, so that some are rejected
    fixed, moving, _ = known_warp(shape, batch=2)
    settings = {"control": control, "acceptance": acceptance, "window": window, "step": step, "seed": 3}
    result = refine(
        fixed, moving, similarity=LNCC(), scales=(1,), iterations=iterations, damping=1.0, smooth_gradient=1.0,
        tolerance=0, **settings,
    )  # fmt: skip
    measure, field = LNCC(), zeros(shape, batch=2)
    reference, (_, moving_range) = measure.prepare(fixed, moving)[0], measure.ranges(fixed, moving)

    def closure() -> Tensor:
        warped = normalized(warp(moving, field.detach()), moving_range)
        loss, derivative = measure.evaluate(warped, reference)
        field.grad = eulerian_gradient(derivative, warped)
        return loss

    optimizer = FactoredLM([field], damping=1.0, smooth_gradient=1.0, eulerian=True, repair_every=5, **settings)
    best, best_loss = field.detach().clone(), closure()
    for _ in range(iterations):
        optimizer.step(closure)
        loss = closure()
        better = loss < best_loss
        best = torch.where(better.view(-1, *[1] * (field.dim() - 1)), field.detach(), best)
        best_loss = torch.where(better, loss, best_loss)
    assert torch.equal(result.ddf, best)
    voxels = fixed[0, 0].numel()
    assert torch.equal(result.final_loss, best_loss / voxels)
    accepted = [row.accepted for history in result.history for row in history]
    if acceptance == "descent":
        assert torch.equal(best, field.detach())
        assert not all(accepted)  # else this would not have tested a rejection


# --- any PyTorch loss -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("acceptance", ["always", "descent"])
@pytest.mark.parametrize("shape", SHAPES)
def test_recovers_a_known_warp_through_monais_warp(shape, acceptance):
    fixed, moving, truth = known_warp(shape)
    field = zeros(shape)
    optimizer = FactoredLM([field], acceptance=acceptance)
    block, mse = Warp(), torch.nn.MSELoss()
    losses = [float(optimizer.step(lambda: mse(block(moving, field), fixed))) for _ in range(60)]
    assert min(losses) < 0.05 * losses[0]
    assert end_point_error(field.detach(), truth) < 0.4 * end_point_error(torch.zeros_like(truth), truth)
    assert int(fold_count(field.detach())) == 0


@pytest.mark.parametrize("control", CONTROLS)
def test_recovers_what_a_prediction_left_over(control):
    """The usage of the docstring: a residual composed with a prediction, which does not erode."""
    shape = (28, 26)
    fixed, moving, truth = known_warp(shape)
    prediction = 0.6 * truth
    residual = zeros(shape)
    optimizer = FactoredLM([residual], control=control)

    def closure() -> Tensor:
        return (warp(moving, compose(prediction, residual)) - fixed).square().mean()

    losses = [float(optimizer.step(closure)) for _ in range(40)]
    assert losses[-1] < 0.1 * losses[0]
    refined = compose(prediction, residual.detach())
    assert end_point_error(refined, truth) < 0.6 * end_point_error(prediction, truth)


def test_descent_never_raises_the_loss():
    fixed, moving, _ = known_warp((24, 22), batch=2)
    field = zeros((24, 22), batch=2)
    optimizer = FactoredLM([field], step=2.0, acceptance="descent")
    losses = torch.stack([optimizer.step(squares(fixed, moving, field, per_pair=True)) for _ in range(25)])
    assert bool((losses[1:] <= losses[:-1]).all())
    assert bool((losses[1:] == losses[:-1]).any())  # something was rejected


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_the_scale_of_the_loss_does_not_matter(factor):
    fixed, moving, _ = known_warp((20, 22))
    fields = []
    for weight in (1.0, factor):
        field = zeros((20, 22))
        optimizer = FactoredLM([field])
        closure = squares(fixed, moving, field)
        for _ in range(10):
            optimizer.step(lambda weight=weight, closure=closure: weight * closure())
        fields.append(field.detach())
    torch.testing.assert_close(fields[0], fields[1], rtol=0, atol=1e-3)


def test_a_closure_that_calls_backward_gives_the_same_steps():
    fixed, moving, _ = known_warp((20, 22))
    fields = [zeros((20, 22)), zeros((20, 22))]
    silent, eager = (squares(fixed, moving, field) for field in fields)

    def backward() -> Tensor:
        loss = eager()
        loss.backward()
        return loss

    optimizers = [FactoredLM([field], acceptance="descent") for field in fields]
    for _ in range(6):
        assert torch.equal(optimizers[0].step(silent), optimizers[1].step(backward))
    assert torch.equal(fields[0], fields[1])
    assert float(fields[0].detach().abs().max()) > 0.1


def test_steps_inside_no_grad_are_the_same():
    fixed, moving, _ = known_warp((20, 22))
    fields = [zeros((20, 22)), zeros((20, 22))]
    optimizers = [FactoredLM([field]) for field in fields]
    for _ in range(3):
        optimizers[0].step(squares(fixed, moving, fields[0]))
        with torch.no_grad():
            optimizers[1].step(squares(fixed, moving, fields[1]))
    assert torch.equal(fields[0], fields[1])


def test_float64_fields_stay_float64():
    fixed, moving, _ = known_warp((20, 22))
    single, double = zeros((20, 22)), zeros((20, 22)).detach().double().requires_grad_()
    for field, images in ((single, (fixed, moving)), (double, (fixed.double(), moving.double()))):
        optimizer = FactoredLM([field], acceptance="descent", control="trust_region")
        for _ in range(5):
            optimizer.step(squares(*images, field))
        assert all(v.dtype == field.dtype for v in optimizer.state[field].values() if isinstance(v, Tensor))
    assert double.dtype == torch.float64
    torch.testing.assert_close(single, double.float(), rtol=0, atol=1e-3)


# --- pairs and groups -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("acceptance", ACCEPTANCES)
def test_a_loss_per_pair_makes_pairs_independent(acceptance):
    fixed, moving, _ = known_warp((20, 22), batch=3)
    contrast = torch.tensor([1.0, 30.0, 0.01]).view(3, 1, 1, 1)
    fixed, moving = contrast * fixed, contrast * moving
    together = zeros((20, 22), batch=3)
    optimizer = FactoredLM([together], step=1.0, acceptance=acceptance)
    for _ in range(8):
        optimizer.step(squares(fixed, moving, together, per_pair=True))
    assert optimizer.state[together]["damping"].shape == (3,)
    for pair in range(3):
        one = slice(pair, pair + 1)
        alone = zeros((20, 22))
        optimizer = FactoredLM([alone], step=1.0, acceptance=acceptance)
        for _ in range(8):
            optimizer.step(squares(fixed[one], moving[one], alone, per_pair=True))
        torch.testing.assert_close(together[one], alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("control", CONTROLS)
def test_a_scalar_loss_gives_one_damping_for_the_batch(control):
    fixed, moving, _ = known_warp((20, 22), batch=2)
    contrast = torch.tensor([1.0, 100.0]).view(2, 1, 1, 1)
    field = zeros((20, 22), batch=2)
    optimizer = FactoredLM([field], control=control, acceptance="descent")
    first = optimizer.step(squares(contrast * fixed, contrast * moving, field))
    assert first.shape == ()
    assert optimizer.state[field]["reference"].shape == (1,)
    faint, strong = field.detach().abs().amax((1, 2, 3)).tolist()
    assert faint < 0.01 * strong  # λ is that of the strong pair: the faint one hardly moves
    before = field.detach().clone()
    for _ in range(4):
        optimizer.step(squares(contrast * fixed, contrast * moving, field))
    assert not torch.equal(before, field.detach())


def test_groups_have_their_own_settings():
    """For a constant gradient the first step is ``step / …`` long, in every group by its own ``step`` and ``lr``."""
    fields = [zeros((12, 12)) for _ in range(3)]
    weight = gaussian_smooth(noise(1, 2, 12, 12), 1.0)
    groups = [{"params": [fields[0]]}, {"params": [fields[1]], "step": 0.1}, {"params": [fields[2]], "lr": 0.5}]
    optimizer = FactoredLM(groups, step=0.4, smooth_residual=0.0)
    optimizer.step(lambda: sum((weight * field).sum() for field in fields))
    torch.testing.assert_close(fields[1], fields[0] * 0.25)
    torch.testing.assert_close(fields[2], fields[0] * 0.5)
    assert 0.2 < float(torch.linalg.vector_norm(fields[0].detach(), dim=1).max()) <= 0.4 * (1 + 1e-6)


def test_a_group_with_a_bad_setting_is_not_added():
    optimizer = FactoredLM([zeros((8, 8))])
    with pytest.raises(ValueError, match=r"step must be (finite and )?greater than 0, got -1"):
        optimizer.add_param_group({"params": [zeros((8, 8))], "step": -1})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [zeros((6, 7, 8))], "step": 0.1})
    assert [group["step"] for group in optimizer.param_groups] == [0.5, 0.1]


def test_a_field_without_a_gradient_stays():
    moving_field, resting = zeros((10, 10)), zeros((10, 10))
    optimizer = FactoredLM([moving_field, resting], acceptance="descent")
    optimizer.step(lambda: (moving_field - 1).square().sum())
    assert float(moving_field.detach().abs().max()) > 0
    assert torch.count_nonzero(resting) == 0


def test_steps_and_smoothing_are_isotropic_in_space():
    """With a spacing, steps are bounded in units of the finest edge: a third of a voxel along a threefold edge."""
    weight = noise(1, 2, 14, 14)
    fields = {}
    for spacing in (None, (2.0, 2.0), (1.0, 3.0)):
        field = zeros((14, 14))
        optimizer = FactoredLM([field], spacing=spacing, smooth_residual=0.0)
        optimizer.step(lambda field=field: (weight * field).sum())
        fields[spacing] = field.detach()
    assert torch.equal(fields[None], fields[(2.0, 2.0)])
    physical = fields[(1.0, 3.0)] * torch.tensor([1.0, 3.0]).view(1, 2, 1, 1)
    assert float(torch.linalg.vector_norm(physical, dim=1).max()) <= 0.5 * (1 + 1e-6)
    assert not torch.equal(fields[None], fields[(1.0, 3.0)])


# --- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("acceptance", ACCEPTANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_state_is_a_few_scalars_per_pair(shape, acceptance):
    fixed, moving, _ = known_warp(shape, batch=2)
    field = zeros(shape, batch=2)
    optimizer = FactoredLM([field], acceptance=acceptance, window=3)
    for _ in range(3):
        optimizer.step(squares(fixed, moving, field, per_pair=True))
    for state in (optimizer.state[field], optimizer.state_dict()["state"][0]):
        assert sorted(state) == ["damping", "expected", "loss", "memory", "reference", "step"]
        assert all(v.numel() <= 2 if isinstance(v, Tensor) else isinstance(v, int) for v in state.values())
        assert state["step"] == 3


@pytest.mark.parametrize(("control", "acceptance"), list(itertools.product(CONTROLS, ACCEPTANCES)))
def test_a_saved_run_resumes_exactly(control, acceptance):
    fixed, moving, _ = known_warp((20, 22), batch=2)
    settings = {"control": control, "acceptance": acceptance, "step": 1.5, "repair_every": 4}
    field = zeros((20, 22), batch=2)
    optimizer = FactoredLM([field], **settings)
    for _ in range(5):
        optimizer.step(squares(fixed, moving, field, per_pair=True))
    file = io.BytesIO()
    torch.save({"field": field.detach(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)
    resumed = saved["field"].requires_grad_()
    other = FactoredLM([resumed])  # the settings come with the state
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a resumed field is not a start at a nonzero field
        other.load_state_dict(saved["optimizer"])
        for _ in range(5):
            losses = [
                o.step(squares(fixed, moving, f, per_pair=True)) for o, f in ((optimizer, field), (other, resumed))
            ]
            assert torch.equal(*losses)
            assert torch.equal(field, resumed)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_copies_and_pickles_go_on_alike(twin):
    fixed, moving, _ = known_warp((20, 22))
    field = zeros((20, 22))
    optimizer = FactoredLM([field], acceptance="metropolis", step=1.0)
    for _ in range(3):
        optimizer.step(squares(fixed, moving, field))
    other = twin(optimizer)
    (copied,) = other.param_groups[0]["params"]
    assert copied is not field
    for _ in range(3):
        optimizer.step(squares(fixed, moving, field))
        other.step(squares(fixed, moving, copied))
    assert torch.equal(field, copied)


# --- what must not happen ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("acceptance", ["descent", "metropolis"])
def test_a_rejected_step_restores_the_field_exactly(acceptance):
    fixed, moving, truth = known_warp((20, 22), batch=2)
    start = 0.5 * truth
    field = start.clone().requires_grad_()
    calls = itertools.count()
    optimizer = FactoredLM([field], step=0.1, acceptance=acceptance, smooth_residual=0.0)

    def closure() -> Tensor:
        penalty = torch.tensor([1e6, 0.0]) * next(calls)  # of pair 0 the loss rises with every call
        return squares(fixed, moving, field, per_pair=True)() + penalty

    optimizer.step(closure)
    assert torch.equal(field[0].detach(), start[0])
    assert not torch.equal(field[1].detach(), start[1])
    damping = optimizer.state[field]["damping"] / optimizer.state[field]["reference"]
    assert damping.tolist() == pytest.approx([1.5, 0.975])
    optimizer.step(closure)
    assert torch.equal(field[0].detach(), start[0])


@pytest.mark.parametrize("acceptance", ACCEPTANCES)
def test_a_zero_gradient_returns_the_field(acceptance):
    """Also the elastic smoothing acts only where there is a step."""
    start = gaussian_smooth(noise(1, 2, 12, 14), 2.0)
    field = start.clone().requires_grad_()
    optimizer = FactoredLM([field], acceptance=acceptance)
    with pytest.warns(UserWarning, match="erodes"):
        optimizer.step(lambda: 0 * field.sum() + 3)
    optimizer.step(lambda: 0 * field.sum() + 3)
    assert torch.equal(field.detach(), start)


@pytest.mark.parametrize("acceptance", ACCEPTANCES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_a_rise(acceptance, bad):
    fixed, moving, _ = known_warp((20, 22))
    field = zeros((20, 22))
    optimizer = FactoredLM([field], acceptance=acceptance)
    closure = squares(fixed, moving, field)
    first = optimizer.step(closure)
    for _ in range(3):
        optimizer.step(lambda: closure() * bad)
    assert bool(torch.isfinite(field).all())
    state = optimizer.state[field]
    assert float(state["damping"]) > float(state["reference"])
    assert float(state["loss"]) <= float(first)


@pytest.mark.parametrize("weight", [1e-30, 1e20, 1e30])
@pytest.mark.parametrize("repair_every", [0, 1])
def test_extreme_losses_leave_a_finite_field(weight, repair_every):
    fixed, moving, _ = known_warp((20, 22))
    field = zeros((20, 22))
    optimizer = FactoredLM([field], repair_every=repair_every)
    for _ in range(3):
        optimizer.step(lambda: weight * squares(fixed, moving, field)())
    assert bool(torch.isfinite(field).all())


@pytest.mark.parametrize("acceptance", ACCEPTANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_step_folds(shape, acceptance):
    """Without smoothing, on noise, at three voxels per step."""
    fixed, moving = noise(1, 1, *shape, seed=5), noise(1, 1, *shape, seed=6)
    field = zeros(shape)
    options = {"step": 3.0, "smooth_gradient": 0.0, "smooth_residual": 0.0, "acceptance": acceptance}
    optimizer = FactoredLM([field], **options)
    for _ in range(6):
        optimizer.step(squares(fixed, moving, field))
        assert int(fold_count(field.detach())) == 0
    rough = zeros(shape)
    unguarded = FactoredLM([rough], **{**options, "acceptance": "always"}, repair_every=0)
    for _ in range(6):
        unguarded.step(squares(fixed, moving, rough))
    assert int(fold_count(rough.detach())) > 0  # the setting does fold where nothing repairs it


def test_learning_rate_schedulers_shrink_the_step():
    weight = gaussian_smooth(noise(1, 2, 12, 12), 1.0)
    field = zeros((12, 12))
    optimizer = FactoredLM([field], step=0.4, smooth_gradient=0.0, smooth_residual=0.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    longest = []
    for _ in range(3):
        before = field.detach().clone()
        optimizer.step(lambda: (weight * field).sum())
        scheduler.step()
        longest.append(float((field.detach() - before).norm(dim=1).max()))
    assert 0.3 < longest[0] <= 0.4 * (1 + 1e-6)
    assert longest[1] == pytest.approx(0.1 * longest[0], rel=0.4)  # the field has changed, and with it the gradient
    assert longest[2] == pytest.approx(0.1 * longest[1], rel=0.1)
    assert optimizer.param_groups[0]["step"] == 0.4


def test_without_a_learning_rate_nothing_moves_not_even_by_smoothing():
    weight = gaussian_smooth(noise(1, 2, 12, 12), 1.0)
    field = zeros((12, 12))
    optimizer = FactoredLM([field], step=0.4, smooth_residual=0.8)
    optimizer.step(lambda: (weight * field).sum())
    optimizer.param_groups[0]["lr"] = 0.0
    before = field.detach().clone()
    optimizer.step(lambda: (weight * field).sum())
    assert before.abs().max() > 0.1
    assert torch.equal(field.detach(), before)


def test_without_a_learning_rate_folds_stay_too():
    folded = (6 * noise(1, 2, 12, 12)).requires_grad_()
    before = folded.detach().clone()
    assert int(fold_count(before)) > 0
    optimizer = FactoredLM([folded], smooth_residual=0.0, lr=0.0)
    optimizer.step(lambda: folded.square().sum())
    assert torch.equal(folded.detach(), before)


def test_a_start_that_is_not_zero_warns_of_erosion():
    field = torch.ones(1, 2, 8, 8, requires_grad=True)
    optimizer = FactoredLM([field])
    with pytest.warns(UserWarning, match="erodes a field that does not start at zero") as caught:
        optimizer.step(lambda: field.square().sum())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(lambda: field.square().sum())  # once is enough
    assert caught[0].filename == __file__  # the caller's line, not torch's


@pytest.mark.parametrize(("start", "smooth_residual"), [(0.0, 0.5), (1.0, 0.0)])
def test_no_warning_where_nothing_erodes(start, smooth_residual):
    field = torch.full((1, 2, 8, 8), start, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FactoredLM([field], smooth_residual=smooth_residual).step(lambda: (field - 2).square().sum())
    assert float((field.detach() - start).abs().max()) > 0


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        (torch.zeros(2, 8, 8), r"params must be fields \(B, n, \*S\) with n = len\(S\) = 2 or 3, .*\(2, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8), r"params must be fields .*\(1, 3, 8, 8\)"),
        (torch.zeros(1, 2, 8, 8, 8), r"params must be fields .*\(1, 2, 8, 8, 8\)"),
        (torch.zeros(0, 2, 8, 8), r"params must be fields .*\(0, 2, 8, 8\)"),
        (torch.zeros(3, 3), r"params must be fields .*\(3, 3\)"),
        (torch.zeros(1, 2, 8, 1), r"params must have at least 2 voxels along every axis, got shape \(1, 2, 8, 1\)"),
        (torch.zeros(1, 2, 8, 8).half(), r"params must be float32 or float64 .*got torch.float16"),
        (torch.zeros(1, 2, 8, 8).bfloat16(), r"params must be float32 or float64 .*got torch.bfloat16"),
    ],
)
def test_parameters_that_are_no_fields(parameter, message):
    with pytest.raises(ValueError, match=message):
        FactoredLM([parameter.requires_grad_()])


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"step": -0.5}, ValueError, "step must be (finite and )?greater than 0, got -0.5"),
        ({"step": 0}, ValueError, "step must be (finite and )?greater than 0, got 0"),
        ({"step": "long"}, TypeError, "step must be a number, got str"),
        ({"damping": 0.0}, ValueError, "damping must be (finite and )?greater than 0, got 0.0"),
        ({"damping": float("nan")}, ValueError, "damping must be (finite and )?greater than 0, got nan"),
        ({"smooth_gradient": -1}, ValueError, "smooth_gradient must be (finite and )?at least 0, got -1"),
        ({"smooth_residual": -1}, ValueError, "smooth_residual must be (finite and )?at least 0, got -1"),
        ({"lr": -1.0}, ValueError, "lr must be (finite and )?at least 0, got -1.0"),
        ({"repair_every": -1}, ValueError, "repair_every must be (finite and )?at least 0, got -1"),
        (
            {"control": "adam"},
            ValueError,
            r"control must be one of \('simple', 'trust_region', 'constant'\) or a Damping, got 'adam'",
        ),
        ({"acceptance": "never"}, ValueError, r"acceptance must be one of .*got 'never'"),
        ({"window": 2}, ValueError, "window must be an odd number of voxels, got 2"),
        ({"window": -1}, ValueError, "window must be an odd number of voxels, got -1"),
        ({"spacing": (1, 1, 1)}, ValueError, r"spacing must be 2 positive numbers, one per axis, got \(1, 1, 1\)"),
        ({"spacing": (1, 0)}, ValueError, r"spacing must be 2 positive numbers, one per axis, got \(1, 0\)"),
        ({"spacing": 2.0}, (TypeError, ValueError), "spacing must be"),
    ],
)
def test_settings_out_of_range(settings, error, message):
    with pytest.raises(error, match=message):
        FactoredLM([zeros((8, 8))], **settings)


@pytest.mark.parametrize(
    ("closure", "error", "message"),
    [
        (lambda _: 3.0, TypeError, "closure must return the loss as a torch.Tensor, got float"),
        (lambda _: None, TypeError, "closure must return the loss as a torch.Tensor, got NoneType"),
        (
            lambda field: field.sum((2, 3)),
            ValueError,
            r"closure must return a scalar or \(2,\) losses, got shape \(2, 2\)",
        ),
        (lambda field: field[:1].sum(1), ValueError, r"closure must return a scalar or \(2,\) losses, got shape"),
        (lambda _: torch.zeros(2), ValueError, "closure must return a loss that depends on the fields"),
    ],
)
def test_closures_that_do_not_fit(closure, error, message):
    field = zeros((8, 8), batch=2)
    with pytest.raises(error, match=message):
        FactoredLM([field]).step(lambda: closure(field))
    assert torch.count_nonzero(field) == 0


@pytest.mark.parametrize("closure", [None, 1.0])
def test_a_step_needs_a_closure(closure):
    with pytest.raises(TypeError, match="closure must be a function that returns the loss, got"):
        FactoredLM([zeros((8, 8))]).step(closure)
    with pytest.raises(TypeError, match="closure"):
        FactoredLM([zeros((8, 8))]).step()


def test_a_loss_per_pair_needs_fields_of_the_same_batch_size():
    fields = [zeros((8, 8), batch=2), zeros((8, 8), batch=3)]
    optimizer = FactoredLM(fields)
    with pytest.raises(ValueError, match=r"loss"):
        optimizer.step(lambda: (fields[0] - 1).square().flatten(1).sum(1) + (fields[1] - 1).square().sum())
