"""Every implementation of every kernel against the reference in float64: shapes, batches, channels, borders, precision.

The implementations for GPUs are in ``test_gpu.py``, which runs them in Triton's interpreter.
"""

import pytest
import torch

from monai_lm import fields, kernels
from monai_lm.kernels import cpu, reference

SIZES = [(13, 17, 19), (2, 3, 5), (33, 12, 40), (2, 2, 2), (31, 37), (2, 5)]
BATCHES = [(1, 1), (2, 1), (2, 3)]
UNIT = (1.0, 0.5, 0.8)
IMPLEMENTATIONS = {"C": cpu, "dispatched": kernels, "reference": reference}

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=f"no kernels in C: {cpu.why_not()}")


def noise(shape, seed, sigma=0.0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return reference.smoothed(values, [sigma] * (len(shape) - 2)) if sigma else values


class Given:
    """Random arguments of kernels, in float64."""

    def __init__(self, size, batch, channels):
        self.n, self.image, self.field = len(size), (batch, channels, *size), (batch, len(size), *size)
        self.warped, self.fixed = noise(self.image, 0, 0.8), noise(self.image, 1, 0.8)
        self.warped, self.fixed = self.warped / self.warped.std(), self.fixed / self.fixed.std()
        self.ddf, self.outer = 20 * noise(self.field, 2, 2.0), 30 * noise(self.field, 3, 2.0)
        self.weight = noise((batch, 1, *size), 4).abs() * (noise((batch, 1, *size), 5) > -0.5)
        self.shift, self.factor = noise((batch, channels), 6), noise((batch, channels), 7).abs() + 0.5
        self.derivative = noise(self.image, 8, 1.0)
        self.smooth = noise(self.field, 9, 1.0)
        self.damping = self.smooth.square().sum(1).flatten(1).mean(1)
        self.alpha = torch.tensor([0.7, -1.0], dtype=torch.float64)[:batch]
        self.radius = torch.tensor([0.5, 0.3], dtype=torch.float64)[:batch]
        self.sigma, self.unit = (1.0, 2.0, 0.5)[: self.n], UNIT[: self.n]


def of_image(*names):
    return lambda g: ([getattr(g, name) if isinstance(name, str) else name for name in names], g.image)


def of_field(*names):
    return lambda g: ([getattr(g, name) if isinstance(name, str) else name for name in names], g.field)


# the arguments before ``out``, and the shape of ``out``
CASES = {
    "sample": of_image("warped", "ddf", None, None, None),
    "sample, all": of_image("warped", "ddf", "outer", "shift", "factor"),
    "sample, no residual": of_image("warped", None, "outer", None, "factor"),
    "compose": of_field("outer", "ddf"),
    "smooth": of_image("warped", "sigma"),
    "smooth, far": lambda g: ([g.warped, (0.0, 3.0, 4.0)[: g.n]], g.image),
    "smooth, no": lambda g: ([g.warped, (0.0,) * g.n], g.image),
    "elastic": lambda g: ([g.ddf, (0.5,) * g.n, (0.0,) * g.n, g.alpha], g.field),
    "elastic, bulk": lambda g: ([g.ddf, (0.5, 0.0, 1.0)[: g.n], (0.1, 0.2, 0.05)[: g.n], g.alpha], g.field),
    **{f"lncc, {r}": of_image("warped", "fixed", "shift", "factor", None, r, 0.0, 2e-3) for r in (1, 2, 3, 5)},
    **{f"lncc, {r}, Gaussian": of_image("warped", "fixed", None, "factor", None, r, 1.5, 2e-3) for r in (2, 6)},
    "lncc, weighted": of_image("warped", "fixed", None, None, "weight", 2, 0.0, 2e-3),
    "lncc, weighted, Gaussian": of_image("warped", "fixed", "shift", None, "weight", 3, 1.0, 2e-3),
    "mse": of_image("warped", "fixed", None, None, None),
    "mse, all": of_image("warped", "fixed", "shift", "factor", "weight"),
    "ncc": of_image("warped", "fixed", None, None, None, 1e-6),
    "ncc, all": of_image("warped", "fixed", "shift", "factor", "weight", 1e-6),
    "mi": of_image("warped", "fixed", None, None, None, 32),
    "mi, all": of_image("warped", "fixed", "shift", "factor", "weight", 8),
    "gradient": of_field("warped", "derivative", "sigma"),
    "gradient, no smoothing": lambda g: ([g.warped, g.derivative, (0.0,) * g.n], g.field),
    "step": of_field("smooth", "ddf", "unit", "radius", "damping", None, None),
    "step, promise": of_field("smooth", "ddf", "unit", "radius", "damping", "warped", "derivative"),
    "step, far": lambda g: ([g.smooth, g.ddf, g.unit, 6 * g.radius, g.damping, None, None], g.field),
    "step, no pair": lambda g: ([g.smooth, g.ddf, g.unit, g.radius, 0 * g.damping, None, None], g.field),
}


def in_type(arguments, dtype):
    return [a.to(dtype) if isinstance(a, torch.Tensor) else a for a in arguments]


def close(out, expected, tolerance):
    scale = expected[expected.isfinite()].abs().max().clamp(min=1e-9) if bool(expected.isfinite().any()) else 1.0
    torch.testing.assert_close(out.double() / scale, expected.double() / scale, rtol=0, atol=tolerance, equal_nan=True)


WHERE = [
    *((kind, size, (2, 3)) for kind in ("dispatched", "reference") for size in ((13, 17, 19), (31, 37))),
    *(("C", size, batch) for size in SIZES for batch in BATCHES),
]


@pytest.fixture(scope="module", autouse=True)
def two_threads():
    """Kernels share their work between threads, also where the suite's processes have one each."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("kind", "size", "batch_and_channels"), WHERE, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_every_implementation_is_the_reference_in_float64(case, kind, size, batch_and_channels):
    batch, channels = batch_and_channels
    name, given = case.split(",")[0], Given(size, batch, channels)
    arguments, shape = CASES[case](given)
    exact = torch.full(shape, 7.0, dtype=torch.float64)
    returned = getattr(reference, name)(*arguments, exact)
    out = torch.full(shape, 7.0)
    got = getattr(IMPLEMENTATIONS[kind], name)(*in_type(arguments, torch.float32), out)
    close(out, exact, 2e-4 if "weighted" in case else 5e-5)
    if returned is not None:
        assert got.dtype == torch.float32
        close(got, returned, 3e-4)


HALVES = [
    (torch.float16, torch.float16, 2e-3),
    (torch.bfloat16, torch.float32, 2e-4),  # what is read shows in full
    (torch.bfloat16, torch.bfloat16, 2**-7),  # one unit in the last place of the largest value
]


@pytest.mark.parametrize(("dtype", "written", "tolerance"), HALVES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [(13, 17, 19), (31, 37)], ids=str)
def test_half_precision_is_read_and_rounded(size, case, dtype, written, tolerance):
    """What is read in half precision is what the reference reads, what is written what it writes."""
    name, given = case.split(",")[0], Given(size, 2, 1)
    arguments, shape = CASES[case](given)
    arguments = [a.to(dtype) if isinstance(a, torch.Tensor) and a.dim() > 3 else a for a in arguments]
    arguments = [a.float() if isinstance(a, torch.Tensor) and a.dim() < 3 else a for a in arguments]
    expected, out = torch.full(shape, 7.0, dtype=written), torch.full(shape, 7.0, dtype=written)
    returned = getattr(reference, name)(*arguments, expected)
    got = getattr(cpu, name)(*arguments, out)
    close(out, expected, tolerance)
    if returned is not None:
        close(got, returned, 3e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_to_the_nearest_as_torch_does(dtype):
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    finite = bits[bits.isfinite()].sort().values
    between = torch.cat([finite, (finite[1:] + finite[:-1]) / 2, finite * 1.0003, torch.tensor([1e6, -1e6, 7e4, 1e-9])])
    wide = torch.cat([between, torch.zeros(-len(between) % 8)]).view(1, 1, 8, -1)
    out = torch.empty(wide.shape, dtype=dtype)
    cpu.smooth(wide, (0.0, 0.0), out)
    assert torch.equal(out, wide.to(dtype))
    back = torch.empty(wide.shape)
    cpu.smooth(out, (0.0, 0.0), back)
    assert torch.equal(back, out.float())


@pytest.mark.parametrize("size", [(13, 17, 19), (31, 37)], ids=str)
def test_displacements_that_lead_anywhere_read_nothing_outside(size):
    """Far away, infinitely far, and nowhere: positions are clamped, NaN counts as the first voxel."""
    given = Given(size, 1, 1)
    for value in (1e9, -1e9, 3e38, float("inf"), float("-inf"), float("nan")):
        ddf = given.ddf.float()
        ddf[:, :, 1] = value
        out, exact = torch.empty(given.image), torch.empty(given.image, dtype=torch.float64)
        cpu.sample(given.warped.float(), ddf, given.outer.float(), None, None, out)
        reference.sample(given.warped, ddf.double(), given.outer, None, None, exact)
        assert out.isfinite().all()
        close(out, exact, 1e-4)
        field, wide = torch.empty(given.field), torch.empty(given.field, dtype=torch.float64)
        cpu.compose(given.outer.float(), ddf, field)
        reference.compose(given.outer, ddf.double(), wide)
        torch.testing.assert_close(field[:, :, 2:], wide.float()[:, :, 2:], rtol=0, atol=1e-3)
        assert torch.equal(field[:, :, 1].isnan(), wide[:, :, 1].isnan())


def test_nan_in_an_image_stays_where_windows_see_it():
    given = Given((20, 18, 22), 1, 1)
    warped = given.warped.float()
    warped[0, 0, 10, 9, 11] = float("nan")
    out, exact = torch.empty(given.image), torch.empty(given.image)
    loss = cpu.lncc(warped, given.fixed.float(), None, None, None, 2, 0.0, 2e-3, out)
    reference.lncc(warped, given.fixed.float(), None, None, None, 2, 0.0, 2e-3, exact)
    assert loss.isnan().all()
    assert torch.equal(out.isnan(), exact.isnan())
    assert int(out.isnan().sum()) == 9**3


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_results_may_take_the_place_of_arguments(size, batch):
    given = Given(size, batch, 1)
    work = torch.zeros(given.field)
    work[:, :1], work[:, 1:2] = given.warped, given.derivative
    expected = torch.empty(given.field)
    cpu.gradient(given.warped.float(), given.derivative.float(), given.sigma, expected)
    cpu.gradient(work[:, :1], work[:, 1:2], given.sigma, work)
    assert torch.equal(work, expected)
    step = [given.ddf.float(), given.unit, given.radius.float(), given.damping.float(), None, None]
    cpu.step(work, *step, work)
    cpu.step(expected, *step, moved := torch.empty(given.field))
    assert torch.equal(work, moved)
    inner = given.ddf.float()
    cpu.compose(given.outer.float(), inner, composed := torch.empty(given.field))
    cpu.compose(given.outer.float(), inner, inner)
    assert torch.equal(inner, composed)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("amplitude", [0.3, 1.0])
def test_folds_are_those_of_the_reference(size, outer, amplitude):
    given = Given(size, 2, 1)
    ddf, after = amplitude * given.ddf, 0.3 * given.outer if outer else None
    cells = (2, *(s + 1 for s in size))
    mask, exact = torch.zeros(cells, dtype=torch.bool), torch.zeros(cells, dtype=torch.bool)
    count = cpu.unfolded(ddf.float(), None if after is None else after.float(), 1e-3, mask)
    expected = reference.unfolded(ddf, after, 1e-3, exact)
    assert count.tolist() == mask.flatten(1).sum(1).tolist()
    assert int((mask ^ exact).sum()) <= 1 + 0.002 * mask.numel()  # a determinant may be at the margin
    assert (count - expected).abs().max() <= 1 + 0.002 * mask.numel()
    assert torch.equal(cpu.unfolded(ddf.float(), None if after is None else after.float(), 1e-3, None), count)


@pytest.mark.parametrize("sigma", [1.0, 1.6, 6.0])
@pytest.mark.parametrize("size", [(60, 51, 40), *SIZES], ids=str)
@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_round_of_repair_is_that_of_the_reference(size, outer, sigma, dtype):
    ddf, after = (8 * noise((2, len(size), *size), 0, 1.5)).to(dtype), None
    if outer:
        after = (3 * noise((2, len(size), *size), 1, 6.0)).float()
    mask = torch.zeros(2, *(s + 1 for s in size), dtype=torch.bool)
    cpu.unfolded(ddf, after, 1e-3, mask)
    other, other_mask = ddf.clone(), mask.clone()
    got = cpu.mend(ddf, after, mask, sigma, 1e-3)
    expected = reference.mend(other, after, other_mask, sigma, 1e-3)
    torch.testing.assert_close(ddf, other, rtol=0, atol=1e-5 if dtype == torch.float32 else 4e-3)
    assert torch.equal(got[:, 1], expected[:, 1])
    assert int((mask ^ other_mask).sum()) <= 1 + (0 if dtype == torch.float32 else 0.01 * mask.numel())
    assert got[:, 0].tolist() == mask.flatten(1).sum(1).tolist()


@pytest.mark.parametrize("sigma", [1.0, 2.4])
@pytest.mark.parametrize("size", [(61, 50, 75), (90, 101)], ids=str)
def test_few_folds_far_apart_are_repaired_alone(size, sigma):
    """At corners, at borders of tiles and beside them: only what is around folds is smoothed and looked at again."""
    ddf = torch.zeros(2, len(size), *size)
    for place in (0, 20, 24, 25, 47):
        ddf[(0, slice(None), *[min(place + axis, s - 1) for axis, s in enumerate(size)])] = 2.0
    ddf[(0, 0, *[s - 1 for s in size])] = -3.0
    mask = torch.zeros(2, *(s + 1 for s in size), dtype=torch.bool)
    assert cpu.unfolded(ddf, None, 1e-3, mask)[0] > 10
    before, other, other_mask = ddf.clone(), ddf.clone(), mask.clone()
    for _ in range(3):
        got, expected = cpu.mend(ddf, None, mask, sigma, 1e-3), reference.mend(other, None, other_mask, sigma, 1e-3)
        torch.testing.assert_close(ddf, other, rtol=0, atol=1e-5)
        assert torch.equal(mask, other_mask)
        assert torch.equal(got, expected)
    assert got[0, 0] == 0
    assert torch.equal(ddf[1], before[1])


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sums_are_those_of_the_reference(size):
    given = Given(size, 2, 3)
    image = given.warped.float() + 100
    torch.testing.assert_close(cpu.image_sums(image), reference.image_sums(image), rtol=1e-6, atol=1e-9)
    image[1, 2].flatten()[3] = float("nan")
    assert cpu.image_sums(image)[1, 2, :3].isnan().all()
    assert cpu.image_sums(image)[0].isfinite().all()
    smooth = given.smooth.float()
    close(cpu.gradient_sums(smooth, given.unit), reference.gradient_sums(smooth, given.unit), 1e-6)


def test_pairs_may_lie_anywhere_and_what_is_not_contiguous_is_left_to_the_reference():
    wide = noise((3, 4, 9, 8, 7), 0).float()
    part = wide[::2, 1:3]  # every pair is contiguous
    out, exact = torch.empty(2, 2, 9, 8, 7), torch.empty(2, 2, 9, 8, 7)
    assert cpu.available(part) is not None
    cpu.smooth(part, (1.0, 1.0, 1.0), out)
    reference.smooth(part, (1.0, 1.0, 1.0), exact)
    close(out, exact, 1e-6)
    turned = wide.transpose(2, 3)
    assert cpu.available(turned) is None
    assert cpu.available(wide.double()) is None
    kernels.smooth(turned, (1.0, 0.0, 0.0), out := torch.empty(turned.shape))
    close(out.transpose(2, 3), reference.smoothed(wide, (0.0, 1.0, 0.0)), 1e-6)


@pytest.mark.parametrize("shape", [(0, 1, 6, 5), (0, 2, 6, 5, 4)], ids=str)
def test_an_empty_batch_stays_empty(shape):
    image, field = torch.zeros(shape), torch.zeros(0, len(shape) - 2, *shape[2:])
    assert cpu.available(image) is None
    assert fields.gaussian_smooth(image, 1.0).shape == image.shape
    assert fields.warp(image, field).shape == image.shape
    assert fields.compose(field, field).shape == field.shape


def test_plain_pytorch_can_be_asked_for(monkeypatch):
    image, out = noise((1, 1, 6, 5), 0).float(), torch.empty(1, 1, 6, 5)
    monkeypatch.setattr(cpu, "available", lambda *_: pytest.fail("the kernels in C are not to be asked"))
    with kernels.using("reference"):
        kernels.smooth(image, (1.0, 1.0), out)
    close(out, reference.smoothed(image, (1.0, 1.0)), 1e-7)


def test_fake_tensors_have_the_shapes_of_the_results():
    from torch._subclasses.fake_tensor import FakeTensorMode

    given = Given((9, 8, 7), 2, 1)
    arguments, shape = CASES["lncc, 2"](given)
    given_in_float = in_type(arguments, torch.float32)
    loss = kernels.lncc(*given_in_float, torch.empty(shape))
    with FakeTensorMode() as fake:
        faked = [fake.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in given_in_float]
        out = kernels.lncc(*faked, torch.empty(shape))
        field = torch.empty(given.field)
        counts = kernels.unfolded(field, None, 0.0, None)
        sums = (
            kernels.image_sums(faked[0]),
            kernels.gradient_sums(field, UNIT),
            kernels.mend(field, None, field, 1.0, 0.0),
        )
    assert (out.shape, out.dtype) == (loss.shape, loss.dtype)
    assert (tuple(counts.shape), counts.dtype) == ((2,), torch.int64)
    assert [tuple(s.shape) for s in sums] == [(2, 1, 5), (2, 3), (2, 2)]


def test_kernels_for_a_gpu_that_fail_are_told_once_and_replaced(monkeypatch):
    """A GPU without a C compiler, for one: Triton needs it."""

    class Broken:
        @staticmethod
        def smooth(*_):
            raise RuntimeError("Failed to find C compiler.\nPlease specify via CC.")

    monkeypatch.setattr(kernels, "_gpu", lambda: Broken)
    monkeypatch.setattr(kernels, "_GPU_FAULTS", [])
    assert kernels.missing(torch.device("cuda")) is None
    image, out = noise((1, 1, 6, 5), 0).float(), torch.empty(1, 1, 6, 5)
    with pytest.warns(UserWarning, match=r"plain PyTorch is used, .*: RuntimeError: Failed to find C compiler\.$"):
        kernels._on_gpu("smooth")(image, (1.0, 1.0), out)
    close(out, reference.smoothed(image, (1.0, 1.0)), 1e-7)
    kernels._on_gpu("smooth")(image, (2.0, 2.0), out)  # without another word
    close(out, reference.smoothed(image, (2.0, 2.0)), 1e-7)
    assert "C compiler" in kernels.missing(torch.device("cuda"))
    monkeypatch.setattr(kernels, "_GPU_FAULTS", [])
    monkeypatch.setattr(Broken, "smooth", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError):
        kernels._on_gpu("smooth")(image, (1.0, 1.0), out)


@pytest.mark.parametrize("kind", IMPLEMENTATIONS)
@pytest.mark.parametrize("size", [(4, 5, 6), (5, 6)], ids=str)
def test_chosen_pairs_are_copied_and_the_others_stay(size, kind):
    source, out = noise((3, len(size), *size), 0), noise((3, len(size), *size), 1)
    before = out.clone()
    IMPLEMENTATIONS[kind].choose(torch.tensor([True, False, True]), source, out)
    assert torch.equal(out[::2], source[::2])
    assert torch.equal(out[1], before[1])
