"""Whole refinements on a device: as on the CPU, without waiting inside the iterations, within its memory."""

import pytest
import torch
from monai.losses import LocalNormalizedCrossCorrelationLoss

import monai_lm
from monai_lm import refine
from monai_lm.fields import compose, fold_count, warp
from monai_lm.solver import refinement, run
from monai_lm.solver.engine import Engine
from monai_lm.solver.memory import MODES
from monai_lm.solver.residual import Residual

SIZES = {2: (36, 32), 3: (17, 16, 14)}
SETTINGS = {"scales": (2, 1), "iterations": (8, 6), "tolerance": 0.0}
VARIANTS = [
    *({"memory": mode} for mode in ("auto", *MODES)),
    {"control": "trust_region"},
    {"acceptance": "descent"},
    {"acceptance": "metropolis"},
    {"control": "trust_region", "acceptance": "descent", "memory": "half"},
    {"window": 3},
    {"symmetric": True},
    {"regularizer": "sliding", "spacing": (1.0, 2.0, 1.5)},
    {"similarity": "mse", "memory": "half"},
    {"kernels": "reference"},
    {"similarity": "ncc"},
    {"similarity": "mi"},
    {"similarity": LocalNormalizedCrossCorrelationLoss},
    {"spacing": (1.0, 2.0, 1.5)},
    {"seconds": 60.0},
    {"tolerance": 0.3},
]


@pytest.fixture
def pair(smooth_image, smooth_field):
    """``pair(n)``: two pairs of images, and a prediction that has most of the motion, with folds."""

    def make(n):
        size = SIZES[n]
        moving = smooth_image((2, 1, *size), 1.5, dtype=torch.float32)
        truth = smooth_field((2, n, *size), 3.0, 5.0, 1, torch.float32)
        prediction = 0.7 * truth + smooth_field((2, n, *size), 2.0, 0.5, 2, torch.float32)
        assert fold_count(prediction).min() > 0
        return warp(moving, truth), moving, prediction

    return make


def moved(tensors, device):
    return [None if t is None else t.to(device) for t in tensors]


def settings_of(variant, n):
    settings = SETTINGS | variant
    if "spacing" in settings:
        settings["spacing"] = settings["spacing"][:n]
    if isinstance(settings.get("similarity"), type):
        settings["similarity"] = settings["similarity"](spatial_dims=n, kernel_size=5)
    return settings


@pytest.mark.parametrize(("n", "predicted"), [(2, False), (3, True)], ids=["2D-identity", "3D-prediction"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: ",".join(str(v[key]) for key in v))
def test_a_device_refines_as_the_cpu_does(variant, n, predicted, device, pair, record_property):
    *images, prediction = pair(n)
    given = [*images, prediction if predicted else None]
    expected = refine(*given, **settings_of(variant, n))
    result = refine(*moved(given, device), **settings_of(variant, n))
    assert result.ddf.device == device
    distance = float(torch.linalg.vector_norm(result.ddf.cpu() - expected.ddf, dim=1).mean())
    record_property("mean_voxels", distance)
    assert distance < 0.01
    assert fold_count(result.ddf).tolist() == [0, 0]
    assert (result.final_loss < 0.9 * result.initial_loss).all()
    assert float(torch.linalg.vector_norm(expected.ddf, dim=1).mean()) > 0.1


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("similarity", ["lncc", "mi", "mse", "ncc"])
@pytest.mark.parametrize("n", [2, 3])
def test_masks_of_both_images_count_on_a_device_as_on_the_cpu(n, similarity, memory, device, pair):
    *images, prediction = pair(n)
    masks = [torch.ones_like(images[0]) for _ in range(2)]
    masks[0][:, :, :5], masks[1][:, :, :, -4:] = 0, 0.5
    masks[1][1, :, 6:9, 6:9] = 0
    settings = SETTINGS | {"similarity": similarity, "memory": memory}
    if (similarity, memory) == ("mi", "half"):  # from some ten iterations on, rounding moves this field by .1 voxel
        settings["iterations"] = (4, 3)
    expected = refine(*images, prediction, masks[0], moving_mask=masks[1], **settings)
    fixed, moving, ddf, mask, moving_mask = moved([*images, prediction, *masks], device)
    result = refine(fixed, moving, ddf, mask, moving_mask=moving_mask, **settings)
    assert result.ddf.device == device
    assert float(torch.linalg.vector_norm(result.ddf.cpu() - expected.ddf, dim=1).mean()) < 0.01


@pytest.mark.parametrize("memory", MODES)
def test_the_same_call_gives_the_same_field(memory, device, pair):
    given = moved(pair(3), device)
    results = [refine(*given, **SETTINGS, memory=memory) for _ in range(2)]
    assert torch.equal(results[0].ddf.cpu(), results[1].ddf.cpu())


def test_a_pair_does_not_depend_on_its_batch(device, pair):
    given = moved(pair(3), device)
    together, alone = refine(*given, **SETTINGS).ddf, refine(*(t[1:] for t in given), **SETTINGS).ddf
    assert float((together[1:] - alone).abs().max()) < 1e-3


def test_the_optimizer_works_where_its_field_is(device, pair):
    fixed, moving, _ = moved(pair(3), device)
    field = torch.zeros(2, 3, *SIZES[3], device=device).requires_grad_()
    optimizer = monai_lm.FactoredLM([field], acceptance="descent")
    losses = [optimizer.step(lambda: (warp(moving, field) - fixed).square().flatten(1).mean(1)) for _ in range(8)]
    assert field.device == device
    assert (losses[-1] < 0.9 * losses[0]).all()
    composed = compose(field.detach(), field.detach())
    assert composed.device == device


@pytest.mark.parametrize(
    "variant", [{}, {"control": "trust_region"}, {"window": 3}, {"similarity": "mse"}, {"similarity": "mi"}], ids=str
)
def test_the_host_never_waits_inside_the_iterations(variant, device, pair, monkeypatch):
    """Four of them: after five it looks for folds. Everything between the first step and the last."""
    if device.type != "cuda":
        pytest.skip("only CUDA can say that nobody waited")
    advance, settle = Engine.advance, Residual.settle

    def silent(self, *args):
        torch.cuda.set_sync_debug_mode("error")
        return advance(self, *args)

    def loud(self, better):
        torch.cuda.set_sync_debug_mode("default")
        settle(self, better)

    monkeypatch.setattr(Engine, "advance", silent)
    monkeypatch.setattr(Residual, "settle", loud)
    try:
        refine(*moved(pair(3), device), **SETTINGS | {"iterations": 4} | variant)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_history_tells_when_work_was_done(device, pair):
    result = refine(*moved(pair(3), device), **SETTINGS)
    for pair_history in result.history:
        seconds = [iteration.seconds for iteration in pair_history]
        assert seconds == sorted(seconds)
        assert 0 < seconds[0] < seconds[-1] < result.seconds


def test_an_exhausted_device_goes_down_to_half_precision(device, smooth_image):
    """Full precision does not fit, half does; with less memory still, a sentence."""
    if device.type != "cuda":
        pytest.skip("the limit is CUDA's")
    edge = 4096 if device.index == 0 else 1024  # a GPU's cache of freed blocks blurs what is small
    fixed = smooth_image((1, 1, 64, 64), 2.0, dtype=torch.float32).repeat(1, 1, edge // 64, edge // 64).to(device)
    given, settings = (fixed, fixed.roll(1, 2)), {"scales": (1,), "iterations": 2, "smooth_residual": 0.6}
    needs, results = {}, {}
    for mode in MODES:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        results[mode] = refine(*given, **settings, memory=mode).ddf.cpu()
        needs[mode] = torch.cuda.max_memory_allocated(device)
    assert needs["half"] < 0.95 * needs["full"]
    between = needs["half"] + 0.6 * (needs["full"] - needs["half"])
    total = torch.cuda.get_device_properties(device).total_memory
    try:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(between / total, device)
        with pytest.warns(UserWarning, match="memory='full' ran out of memory, trying 'half'"):
            result = refine(*given, **settings, memory="full").ddf
        assert torch.equal(result.cpu(), results["half"])
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(0.98 * needs["half"] / total, device)
        expected = f"{device} has too little memory for images .* with memory='half'"
        with pytest.warns(UserWarning, match="trying"), pytest.raises(torch.OutOfMemoryError, match=expected):
            refine(*given, **settings, memory="full")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def test_half_precision_is_tried_when_memory_runs_out(device, pair, monkeypatch):
    def iterate(engine, stage, settings, *args):
        if settings.memory == "full":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run.descend(engine, stage, settings, *args)

    monkeypatch.setattr(refinement, "descend", iterate)
    given = moved(pair(3), device)
    with pytest.warns(UserWarning, match="ran out of memory, trying 'half'"):
        result = refine(*given, **SETTINGS, memory="full")
    assert torch.equal(result.ddf.cpu(), refine(*given, **SETTINGS, memory="half").ddf.cpu())


@pytest.mark.gpu
def test_a_second_device_is_as_good_as_the_first(gpu, pair):
    if gpu.type != "cuda" or torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    given = pair(3)
    results = [refine(*moved(given, f"cuda:{index}"), **SETTINGS).ddf for index in (0, 1)]
    assert results[1].device == torch.device("cuda:1")
    assert torch.equal(results[0].cpu(), results[1].cpu())
