"""The Triton kernels without a GPU: in Triton's interpreter against the reference, and compiled for several of them.

Both run in processes of their own, this file being their program: the interpreter has to be chosen before triton is
imported, and a compiler that fails may take its process along.
"""

import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from functools import lru_cache
from pathlib import Path
from unittest import mock

import pytest
import torch

from monai_lm.kernels import reference

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {"3d": (2, 1, 13, 7, 9), "thin": (1, 3, 2, 3, 5), "2d": (2, 1, 9, 12)}
PARTS = (1, 1, 5, 2, 3)
"""Has so many planes that two programs march over them."""
UNIT = (1.0, 2.0, 0.5)


# --- in the interpreter


def images(shape, seed=0, dtype=torch.float32):
    """Two images, shifts, factors and a weight; the pairs lie apart in memory."""
    random = torch.Generator().manual_seed(seed)
    batch, channels, *size = shape
    apart = torch.rand(batch, 2 * channels + 1, *size, generator=random).to(dtype)
    weight = torch.rand(batch, 1, *size, generator=random)
    weight[:, :, : size[0] // 2] *= (torch.rand(batch, 1, *size, generator=random) > 0.5)[:, :, : size[0] // 2]
    shift, factor = torch.rand(2, batch, channels, generator=random)
    return apart[:, :channels], apart[:, channels:-1], shift, factor + 0.5, weight.to(dtype)


def field(shape, scale=2.0, seed=0, wild=False, dtype=torch.float32):
    """A field; a wild one has NaN, leads far outside, and to infinity."""
    random = torch.Generator().manual_seed(seed + 10)
    ddf = scale * torch.randn(shape[0], len(shape) - 2, *shape[2:], generator=random)
    if wild:
        ddf[0, 0, 0], ddf[0, -1, -1], ddf[-1, 0, 0, 1], ddf[-1, -1, -1, -1] = 1e4, -1e4, float("nan"), float("inf")
    return ddf.to(dtype)


def agree(result, expected, tolerance=1e-5):
    if result is None:
        assert expected is None
        return
    result, expected = result.double(), expected.double()
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result.isinf(), expected.isinf())
    result, expected = (t.nan_to_num(0.0, 0.0, 0.0) for t in (result, expected))
    error, size = (result - expected).abs().max(), expected.abs().max()
    assert error <= tolerance * size, f"off by {error:.2e} where the largest is {size:.2e}"


def check(name, *args, out, tolerance=1e-5, exact=torch.float64):
    """A kernel against the reference in a wider type; both start from the same ``out``."""
    from monai_lm.kernels import gpu

    wide = [a.to(exact) if isinstance(a, torch.Tensor) else a for a in args]
    expected_out, out = out.to(exact, copy=True), out.clone()
    result = getattr(gpu, name)(*args, out)
    expected = getattr(reference, name)(*wide, expected_out)
    agree(out, expected_out, tolerance)
    agree(result, expected, tolerance)
    return out


def sample(shape):
    image, other, shift, factor, _ = images(shape)
    small = image[..., 1:].contiguous()  # another grid than the field's
    ddf, outer = field(shape, wild=True), field((*shape[:2], *(s + 1 for s in shape[2:])), seed=1)
    check("sample", image, ddf, outer, shift, factor, out=other)
    if image[0].numel() > 200:  # slow here
        return
    check("sample", small, ddf, None, None, factor, out=other)
    check("sample", image, None, outer, shift, None, out=other)
    check("sample", image, None, None, None, None, out=other)


def compose(shape):
    outer, inner = field((*shape[:2], *(s + 1 for s in shape[2:])), seed=1), field(shape, wild=True)
    out = check("compose", outer, inner, out=inner * 0)
    from monai_lm.kernels import gpu

    gpu.compose(outer, inner, inner)
    agree(inner, out, 0.0)


def smooth(shape):
    x = field(shape)
    x[0, 0, 0, 0] = float("nan")  # must not spread further than the filter is wide
    for sigma in ((0.4, 0.8, 0.0), (0.0, 0.0, 0.0), (0.0, 2.4, 0.4)):  # the last one is not compiled for its radius
        check("smooth", x, sigma[: x.shape[1]], out=x * 0)
    smooth_images(shape)


def smooth_images(shape):
    check("smooth", images(shape)[0], (0.6, 0.4, 0.3)[: len(shape) - 2], out=images(shape)[1])


def elastic(shape):
    x, weight = field(shape), torch.tensor([0.6, -1.0])[: shape[0]]
    n = x.shape[1]
    for sigma, bulk in (
        ((0.3, 0.5, 0.3), (0.1, 0.2, 0.3)),
        ((0.3, 0.5, 0.3), (0.0,) * 3),
        ((0.0, 2.4, 0.0), (0.2,) * 3),
    ):
        check("elastic", x, sigma[:n], bulk[:n], weight, out=field(shape, seed=3))


def gradient(shape):
    warped, derivative, *_ = images(shape)
    check("gradient", warped, derivative, (0.4, 0.5, 0.0)[: len(shape) - 2], out=field(shape))
    from monai_lm.kernels import gpu

    out = field((1, 1, *shape[2:]))
    first, second = out[:, :1], out[:, 1:2]
    expected = torch.empty_like(out)
    reference.gradient(first.clone(), second.clone(), (0.5,) * out.shape[1], expected)
    gpu.gradient(first, second, (0.5,) * out.shape[1], out)
    agree(out, expected)


def step(shape):
    warped, derivative, *_ = images(shape)
    g, r = field(shape), field(shape, seed=1)
    g[0, 0, 0], g[-1, -1, -1] = float("nan"), float("inf")
    radius, damping = torch.tensor([0.5, 0.7])[: shape[0]], torch.tensor([0.3, -1.0])[: shape[0]]
    out = check("step", g, r, UNIT[: g.shape[1]], radius, damping, warped, derivative, out=g * 0)
    check("step", g, r, UNIT[: g.shape[1]], radius, damping, None, None, out=g * 0)
    from monai_lm.kernels import gpu

    gpu.step(g, r, UNIT[: g.shape[1]], radius, damping, None, None, g)
    agree(g, out, 0.0)


def lncc(shape, radius=1, sigma=0.0):
    warped, fixed, shift, factor, weight = images(shape)
    check("lncc", warped, fixed, shift, factor, None, radius, sigma, 1e-3, out=warped * 0)
    check("lncc", warped, fixed, None, None, weight, radius, sigma, 1e-3, out=warped * 0, tolerance=3e-5)


def pointwise(name, shape, *epsilon):
    warped, fixed, shift, factor, weight = images(shape)
    check(name, warped, fixed, shift, factor, None, *epsilon, out=warped * 0)
    check(name, warped, fixed, None, factor, weight, *epsilon, out=warped * 0)


def mi(shape, bins):
    warped, fixed, shift, factor, weight = images(shape)
    warped.mul_(1.4).sub_(0.2)  # some are clamped
    check("mi", warped, fixed, shift, factor, None, bins, out=warped * 0)
    check("mi", warped, fixed, None, factor, weight, bins, out=warped * 0)
    check("mi", warped, fixed, None, None, 0 * weight, bins, out=warped)
    for same in ((torch.full_like(warped, 0.3), fixed), (warped, torch.full_like(fixed, 0.3))):
        assert not check("mi", *same, None, None, None, bins, out=warped).any()
    warped[0, 0, 0], warped[-1, -1, -1], fixed[0, 0, :, 0] = float("nan"), float("inf"), float("nan")
    check("mi", warped, fixed, shift, factor, weight, bins, out=warped * 0)


def sums(shape):
    from monai_lm.kernels import gpu

    image, _, _, _, weight = images(shape)
    ddf = field(shape)
    for x, g in ((image - 0.5, ddf), (weight, field(shape, wild=True))):
        agree(gpu.image_sums(x), reference.image_sums(x))
        agree(gpu.gradient_sums(g, UNIT[: g.shape[1]]), reference.gradient_sums(g, UNIT[: g.shape[1]]))
    image[0, 0, 0] = float("nan")
    agree(gpu.image_sums(image), reference.image_sums(image))


def unfolded(shape):
    from monai_lm.kernels import gpu

    outer = field((*shape[:2], *(s + 1 for s in shape[2:])), seed=1, scale=0.3)
    wild = field(shape)
    wild[0, 0, 1, 1] = float("nan")
    for ddf, over in ((field(shape, 0.3), None), (field(shape, 0.2), outer), (wild, outer)):
        cells = (shape[0], *(s + 1 for s in shape[2:]))
        out, expected = torch.zeros(cells, dtype=torch.bool), torch.ones(cells, dtype=torch.bool)
        counts = reference.unfolded(ddf, over, 0.1, expected)
        assert torch.equal(gpu.unfolded(ddf, over, 0.1, out), counts)
        assert torch.equal(gpu.unfolded(ddf, over, 0.1, None), counts)
        assert torch.equal(out, expected)


def choose(shape):
    from monai_lm.kernels import gpu

    x, out = field(shape, wild=True), field(shape, seed=1)
    for chosen in ([True, False], [False, False], [True, True]):
        chosen = torch.tensor(chosen[: shape[0]])
        expected = out.clone()
        reference.choose(chosen, x, expected)
        gpu.choose(chosen, x, out)
        assert torch.equal(out.nan_to_num(), expected.nan_to_num())
        out = field(shape, seed=2)


def mend(shape):
    from monai_lm.kernels import gpu

    outer = field((*shape[:2], *(s + 1 for s in shape[2:])), seed=1, scale=0.1)
    for sigma, over in ((1.0, None), (2.4, outer)):
        ddf, before = field(shape, 0.1), field(shape, 0.1)
        ddf[:, :, shape[2] // 2] += 2 * field(shape)[:, :, shape[2] // 2]
        wide, cells = ddf.double(), torch.empty(shape[0], *(s + 1 for s in shape[2:]), dtype=torch.bool)
        assert reference.unfolded(ddf, over, 0.01, cells).min() > 0
        exact_cells, before = cells.clone(), ddf.clone()
        over_exactly = None if over is None else over.double()
        expected = reference.mend(wide, over_exactly, exact_cells, sigma, 0.01)
        assert torch.equal(gpu.mend(ddf, over, cells, sigma, 0.01), expected)
        assert torch.equal(cells, exact_cells)
        agree(ddf, wide)
        assert (ddf - before).abs().max() > 0.1


def half(shape):
    for dtype, rounding in ((torch.float16, 2.0**-10), (torch.bfloat16, 2.0**-7)):
        image, other, shift, factor, _ = images(shape, dtype=dtype)
        ddf, small = field(shape, dtype=dtype), field(shape, 0.3, seed=1, dtype=dtype)
        settings = {"tolerance": rounding, "exact": dtype}
        check("sample", image, ddf, small, shift.to(dtype), factor.to(dtype), out=other, **settings)
        check("compose", small, ddf, out=ddf, **settings)
        check("smooth", ddf, (0.4,) * ddf.shape[1], out=ddf, **settings)
        check("mse", image, other, None, None, None, out=image, **settings)
        check("mi", image, other, None, None, None, 16, out=image, **settings)
        control = torch.rand(2, shape[0]).to(dtype)
        check("step", ddf, small, UNIT[: ddf.shape[1]], *control, None, None, out=ddf, **settings)


def doubles(shape):
    """What the kernels cannot serve."""
    x = field(shape, dtype=torch.float64)
    check("smooth", x, (0.4,) * x.shape[1], out=x * 0, tolerance=0.0)
    check("compose", x, x.float(), out=x * 0, tolerance=0.0)
    check("mi", x, x, None, None, None, 16, out=x * 0, tolerance=0.0)
    check("mi", x.float(), x.float(), None, None, None, 65, out=x.float(), tolerance=0.0, exact=torch.float32)


def launches(shape):
    """How often each kernel of an iteration is launched, as the table of ``gpu.py`` and the documents say."""
    from monai_lm.kernels import gpu

    image, other, shift, factor, _ = images(shape)
    ddf, small, one = field(shape), field(shape, 0.3, seed=1), torch.ones(shape[0])
    calls = {
        "sample": (image, ddf, None, shift, factor, other),
        "lncc": (image, other, shift, factor, None, 2, 0.0, 1e-3, image.clone()),
        "mi": (image, other, shift, factor, None, 16, image.clone()),
        "gradient": (image, other, (1.0, 1.0, 1.0), ddf),
        "step": (ddf, small, UNIT, one, one, None, None, ddf),
        "elastic": (ddf, (0.5, 0.5, 0.5), (0.1, 0.1, 0.1), one, small),
        "unfolded": (ddf, None, 1e-3, None),
        "choose": (one > 0, ddf, small),
        "mend": (ddf, None, torch.zeros(shape[0], *(s + 1 for s in shape[2:]), dtype=torch.bool), 1.0, 1e-3),
    }
    counts = dict.fromkeys(calls, 0)
    for name, args in calls.items():

        def count(*_, name=name, **__):
            counts[name] += 1

        with mock.patch.object(gpu, "_run", count):
            getattr(gpu, name)(*args)
    once = dict.fromkeys(("sample", "step", "unfolded", "choose"), 1)
    assert counts == {**once, **dict.fromkeys(("lncc", "mi", "gradient", "elastic"), 2), "mend": 21}


CASES = {
    **{f"{f.__name__} {name}": (f, (s,)) for f in (sample, compose) for name, s in SHAPES.items()},
    **{
        f"{f.__name__} {name}": (f, (SHAPES[name],))
        for f in (gradient, step, sums, unfolded, choose, mend)
        for name in ("thin", "2d")
    },
    **{f"{f.__name__} {name}": (f, (SHAPES[name],)) for f in (smooth, elastic, lncc) for name in ("thin", "2d")},
    "smooth in parts": (smooth_images, (PARTS,)),
    "lncc in parts": (lncc, (PARTS,)),
    "unfolded in parts": (unfolded, (PARTS,)),
    "lncc of radius 3": (lncc, ((1, 1, 4, 9), 3)),
    "lncc of radius 5": (lncc, ((1, 1, 2, 2, 4), 5)),
    "lncc, Gaussian": (lncc, ((1, 1, 3, 3, 5), 2, 1.2)),
    "lncc, Gaussian, 2d": (lncc, (SHAPES["2d"], 2, 1.2)),
    "lncc, Gaussian of radius 5": (lncc, ((1, 1, 2, 2, 3), 5, 1.6)),
    **{f"mse {name}": (pointwise, ("mse", s)) for name, s in SHAPES.items()},
    **{f"ncc {name}": (pointwise, ("ncc", s, 1e-5)) for name, s in SHAPES.items()},
    **{f"mi {name}": (mi, (s, 16)) for name, s in SHAPES.items()},
    **{f"mi of {bins} bins": (mi, (SHAPES["2d"], bins)) for bins in (5, 33, 64)},
    "mi in parts": (mi, ((1, 1, 40, 60), 16)),
    "half": (half, (SHAPES["2d"],)),
    "double": (doubles, (SHAPES["2d"],)),
    "launches": (launches, (SHAPES["3d"],)),
}


def failure(case, args):
    """What a case had to say; nothing if all is well."""
    try:
        case(*args)
    except Exception:
        return traceback.format_exc()
    return ""


def interpret():
    """Run all cases, the thin ones in the tiles that GPUs get, the others in fewer: their number is what takes time."""
    from monai_lm.kernels import gpu

    torch.set_num_threads(1)
    said = {name: failure(*case) for name, case in CASES.items() if name.endswith("thin")}
    gpu._TILE.update(by=8, bz=32)
    gpu._MARCH.update(groups=4, bz=32)
    say(said | {name: failure(*case) for name, case in CASES.items() if name not in said})


def say(result):
    sys.stdout.write(json.dumps(result) + "\n")


@lru_cache
def run(*args, **environment):
    """What this file says as a program, in JSON."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    kept |= {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", **environment}
    done = subprocess.run([sys.executable, __file__, *args], env=kept, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_kernels_agree_with_the_reference(case):
    said = run("interpret", TRITON_INTERPRET="1")[case]
    assert not said, said


# --- compiled

POINTERS = {torch.float32: "*fp32", torch.float64: "*fp64", torch.int32: "*i32", torch.uint8: "*u8"}


def calls(backend):
    """Every kernel and what it is launched with: kernel, its arguments by name, warps."""
    from monai_lm.kernels import gpu

    recorded = []

    def record(kernel, _programs, _out, *args, num_warps=4, **compiled):
        names = inspect.signature(kernel.fn).parameters
        given = {**dict(zip(names, args, strict=False)), **compiled}
        recorded.append((kernel, given, num_warps))

    gpu._run, gpu._HIP = record, backend == "hip"
    image, ddf = torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, 3, 4, 4, 4)
    number, numbers = torch.ones(1, 1), torch.ones(1)
    flat = image[:, :, 0]
    gpu.sample(image, ddf, ddf, number, number, image)
    gpu.compose(ddf, ddf, ddf)
    gpu.smooth(ddf, (1.0, 1.0, 1.0), ddf)
    gpu.elastic(ddf, (0.5, 0.5, 0.5), (0.1, 0.1, 0.1), numbers, ddf)
    gpu.elastic(ddf, (0.5, 0.5, 0.5), (0.0, 0.0, 0.0), numbers, ddf)
    gpu.smooth(ddf, (3.0, 0.0, 0.0), ddf)
    gpu.step(ddf, ddf, UNIT, numbers, numbers, image, image, ddf)
    gpu.gradient(image, image, (2.0, 2.0, 2.0), ddf)
    for radius in (3, 2, 4, 5):
        gpu.lncc(image, image, number, number, None, radius, 0.0, 1e-5, image)
    gpu.lncc(image, image, None, None, image, 3, 0.0, 1e-5, image)
    gpu.lncc(flat, flat, None, None, None, 3, 0.0, 1e-5, flat)
    gpu.lncc(image, image, number, number, None, 2, 1.5, 1e-5, image)
    gpu.lncc(image, image, None, None, image, 5, 1.5, 1e-5, image)
    gpu.mse(image, image, number, number, image, image)
    gpu.ncc(image, image, number, number, image, 1e-5, image)
    for bins in (16, 32, 64):
        gpu.mi(image, image, number, number, image, bins, image)
    gpu.mi(image, image, None, None, None, 16, image)
    gpu.image_sums(image)
    gpu.gradient_sums(ddf, UNIT)
    gpu.choose(numbers > 0, ddf, ddf)
    gpu.mend(ddf, None, torch.zeros(1, 5, 5, 5, dtype=torch.bool), 1.0, 0.0)
    gpu.unfolded(ddf, ddf, 0.0, torch.zeros(1, 5, 5, 5, dtype=torch.bool))
    gpu.unfolded(ddf[:, :2, 0].contiguous(), None, 0.0, None)
    return recorded


def signature(kernel, given):
    def type_of(parameter):
        value = given[parameter.name]
        if parameter.is_constexpr or value is None:
            return "constexpr"
        assert parameter.do_not_specialize, f"{parameter.name} of {kernel.__name__} is another compilation for a size"
        if isinstance(value, torch.Tensor):
            return POINTERS[value.dtype]
        if isinstance(value, tuple):
            return ("fp32",) * len(value)
        return parameter.annotation_type or ("fp32" if isinstance(value, float) else "i32")

    return {p.name: type_of(p) for p in kernel.params}


def assembled(ptx):
    """What ptxas says; there are several with triton, for older and newer GPUs."""
    from triton.backends import nvidia

    said = "no ptxas"
    arch = re.search(r"\.target (\w+)", ptx).group(1)
    for program in sorted(Path(nvidia.__file__).parent.glob("bin/ptxas*")):
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
            file.write(ptx)
            file.flush()
            command = [program, "-v", f"-arch={arch}", "-o", os.devnull, file.name]
            said = subprocess.run(command, capture_output=True, text=True).stderr
        if "Used" in said:
            break
    return said


def compiled(backend, arch, each="all"):
    """Compile every kernel for a GPU, or one version of each; say how many registers and spills they have."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = GPUTarget("cuda", int(arch), 32) if backend == "cuda" else GPUTarget(backend, arch, 64)
    said, done = [], set()
    for kernel, given, num_warps in calls(backend):
        types = signature(kernel, given)
        constants = {name: given[name] for name, kind in types.items() if kind == "constexpr"}
        label = " ".join([kernel.__name__, *(f"{k}={v}" for k, v in constants.items() if v is not None)])
        version = kernel.__name__ if each == "one" else (label, str(types))
        if version in done:
            continue
        done.add(version)
        sys.stderr.write(f"compiling {label}\n")  # the last one that is seen if the compiler dies
        sys.stderr.flush()
        source = ASTSource(fn=kernel, signature=types, constexprs=constants)
        made = triton.compile(source, target=target, options={"num_warps": num_warps, "enable_fp_fusion": True})
        if backend == "cuda":
            text = assembled(made.asm["ptx"])
            found = re.search(r"Used (\d+) registers", text), re.search(r"(\d+) bytes spill stores", text)
        else:
            text = made.asm["amdgcn"]
            found = re.search(r"\.vgpr_count:\s+(\d+)", text), re.search(r"\.vgpr_spill_count:\s+(\d+)", text)
        said.append((label, *(int(f.group(1)) if f else None for f in found), text if None in found else ""))
    say(said)


AMD = pytest.param("hip", "gfx942", "all", marks=pytest.mark.slow)


@pytest.mark.parametrize(("backend", "arch", "each"), [("cuda", "80", "one"), ("cuda", "90", "all"), AMD])
def test_kernels_compile_without_spills(backend, arch, each):
    from triton.backends import nvidia

    if backend == "cuda" and not list(Path(nvidia.__file__).parent.glob("bin/ptxas*")):
        pytest.skip("triton comes without ptxas here")
    said = run("compiled", backend, arch, each)
    for label, registers, _, text in said:
        assert registers is not None, f"{label}: {text}"
    spilled = {label: spills for label, _, spills, _ in said if spills}
    assert not spilled
    from monai_lm.kernels import gpu

    kernels = {name for name, value in vars(gpu).items() if getattr(value, "do_not_specialize", None)}
    assert kernels == {label.split()[0] for label, *_ in said}


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
