"""Native and plain kernels, full and half precision: the same field."""

import pytest
import torch

from monai_lm import refine
from monai_lm.fields import fold_count
from tests.solver.pairs import FLAT, error, pair, run


@pytest.mark.parametrize("memory", ["full", "half"])
def test_plain_pytorch_gives_the_same_field(memory):
    fixed, moving, truth = pair((20, 18, 17))
    settings = {"scales": (1,), "iterations": 15, "tolerance": 0, "memory": memory}
    native, plain = (run(fixed, moving, 0.5 * truth, kernels=k, **settings) for k in ("auto", "reference"))
    torch.testing.assert_close(native.ddf, plain.ddf, rtol=0, atol=1e-3 if memory == "full" else 0.03)
    assert error(native.ddf, 0.5 * truth) > 0.01
    assert torch.equal(run(fixed, moving, 0.5 * truth, kernels="native", **settings).ddf, native.ddf)
    with torch.inference_mode():
        inside = run(fixed.clone(), moving.clone(), 0.5 * truth, **settings)
    assert torch.equal(inside.ddf, native.ddf)


@pytest.mark.parametrize("similarity", ["lncc", "mi", "mind", "mse", "ncc"])
def test_the_number_of_threads_changes_no_bit(similarity):
    fixed, moving, truth = pair((36, 40, 38))
    noisy = 0.5 * truth + 0.8 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))  # to be repaired
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            result = run(fixed, moving, noisy, iterations=6, similarity=similarity)
            results.append((result.ddf, result.final_loss))
    finally:
        torch.set_num_threads(threads)
    for ddf, loss in results[1:]:
        assert torch.equal(ddf, results[0][0])
        assert torch.equal(loss, results[0][1])


def test_native_kernels_that_are_not_there_are_an_error(monkeypatch):
    fixed, moving, _ = pair(FLAT)
    monkeypatch.setattr("monai_lm.kernels.missing", lambda _: "there is no C compiler")
    with pytest.raises(ValueError, match="kernels must not be 'native' on cpu: there is no C compiler"):
        refine(fixed, moving, kernels="native")


@pytest.mark.parametrize("similarity", ["lncc", "mi", "mind", "mse", "ncc"])
@pytest.mark.parametrize("predicted", [False, True])
def test_half_precision_ends_where_the_full_one_does(predicted, similarity):
    fixed, moving, truth = pair(FLAT, batch=2)
    start = 0.5 * truth if predicted else None
    settings = {"iterations": 10, "scales": (1,), "similarity": similarity}
    full, half = (run(fixed, moving, start, memory=m, **settings) for m in ("full", "half"))
    assert error(half.ddf, full.ddf) < 0.03 < error(full.ddf, 0.0)
    assert half.ddf.dtype == torch.float32
    assert int(fold_count(half.ddf).sum()) == 0
    rtol = 0.05 if similarity == "mi" else 0.02  # sums over few voxels a bin follow the field more closely
    torch.testing.assert_close(half.final_loss, full.final_loss, rtol=rtol, atol=1e-4)


def test_half_mode_takes_half_precision_images():
    fixed, moving, _ = pair(FLAT)
    result = run(fixed.half(), moving.half(), iterations=5, scales=(1,), memory="half")
    assert result.final_loss < result.initial_loss


@pytest.mark.parametrize("memory", ["lots", 3, None])
def test_unknown_memory_is_refused(memory):
    fixed, moving, _ = pair(FLAT)
    with pytest.raises(ValueError, match=r"memory must be 'auto' or one of \('full', 'half'\), got"):
        refine(fixed, moving, memory=memory)
