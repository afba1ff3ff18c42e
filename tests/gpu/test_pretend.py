"""The harness: it catches what a GPU would not forgive, and counts what it would have to wait for."""

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from monai_lm import refine
from monai_lm.solver.smoothing import Elastic
from tests.gpu.pretend import Pretend, label

CPU = torch.device("cpu")


def numbers(*shape, device="cuda:1"):
    return torch.arange(float(torch.Size(shape).numel())).view(shape).to(device)


@pytest.mark.usefixtures("pretend")
def test_a_label_goes_along_and_numbers_stay():
    a = numbers(2, 3)
    made = [a * 2, a[0], a.sum(), torch.zeros_like(a), a.new_ones(3), torch.full((2,), 1.0, device="cuda:1")]
    made += [a.clone().requires_grad_(), torch.nn.Linear(3, 2).to("cuda:1").weight, MetaTensor(a)]
    assert {t.device for t in made} == {torch.device("cuda:1")}
    assert all(t.is_cuda for t in made)
    assert a.cpu().device == CPU
    assert torch.equal((2 * a).cpu(), 2 * torch.arange(6.0).view(2, 3))
    assert label(torch.zeros(1)) == CPU


@pytest.mark.usefixtures("pretend")
def test_numbers_that_a_function_makes_for_itself_are_where_its_tensors_are():
    assert float(torch.quantile(numbers(5), 0.25)) == 1
    assert torch.linalg.vector_norm(torch.nn.functional.pad(numbers(1, 3), (1, 1), mode="replicate")).is_cuda


@pytest.mark.usefixtures("pretend")
def test_a_label_goes_through_autograd():
    leaf = numbers(4).requires_grad_()
    (leaf * leaf).sum().backward()
    assert leaf.grad.device == torch.device("cuda:1")
    assert leaf.grad.cpu().tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize(
    "mistake",
    [
        lambda a: a + torch.zeros(3),
        lambda a: torch.where(torch.zeros(3) > 0, a, a),
        lambda a: torch.stack([a[0], torch.tensor(1.0)]),
        lambda a: torch.zeros(3) + a[0],  # a number of the GPU does not go with the CPU's tensors
        lambda a: torch.zeros(3)[a.long()],
        lambda a: a.gather(0, torch.zeros(3).long()),
        lambda a: a + numbers(3, device="cuda"),  # which is the first one
        lambda a: torch.nn.Linear(3, 2)(a),
    ],
)
@pytest.mark.usefixtures("pretend")
def test_mixing_devices_raises(mistake):
    with pytest.raises(RuntimeError, match="expected all tensors on one device"):
        mistake(numbers(3))


def test_numbers_of_the_cpu_go_with_any_tensor(pretend):
    assert (numbers(3) * torch.tensor(2.0)).device == torch.device("cuda:1")
    assert pretend.waits == {("copy cpu to cuda", "outside of the package"): 1}  # that of the test's own numbers


@pytest.mark.usefixtures("pretend")
def test_arrays_are_the_cpus_alone():
    for read in (np.asarray, lambda a: a.numpy()):
        with pytest.raises(TypeError, match="can't convert cuda:1"):
            read(numbers(3))


@pytest.mark.parametrize(
    ("waiting", "count"),
    [
        (lambda a: float(a[0]), 1),
        (lambda a: bool((a > 0).any()), 1),
        (lambda a: a.tolist(), 1),
        (lambda a: a.nonzero(), 1),
        (lambda a: a[a > 0], 1),
        (lambda a: a.unique(), 1),
        (lambda a: a.cpu(), 1),
        (lambda a: a.new_tensor([1.0]), 1),
        (lambda _: torch.tensor([1.0], device="cuda:1"), 1),
        (lambda a: a.copy_(torch.zeros(3)), 1),
        (lambda a: torch.equal(a, a), 1),
        (lambda _: torch.cuda.synchronize(), 1),
        (lambda a: a[torch.tensor([0, 1])], 1),
        (lambda a: a.new_zeros(3), 0),
        (lambda _: torch.full((), 3.0, device="cuda:1"), 0),
        (lambda a: a.to("cuda:1", torch.float64), 0),
        (lambda a: a.__setitem__(a > 0, 1.0), 0),
        (lambda a: torch.where(a > 0, a, 0.0).sum(), 0),
        (lambda a: a[1:].shape[0], 0),
    ],
)
def test_waits_are_counted(pretend, waiting, count):
    a = numbers(3)
    pretend.waits.clear()
    waiting(a)
    assert pretend.wait_count == count
    torch.cuda.set_sync_debug_mode("error")
    if count:
        with pytest.raises(RuntimeError, match="synchronizing"):
            waiting(a)
    else:
        waiting(a)


def test_a_wait_is_told_with_file_and_line(pretend, monkeypatch):
    """A wait that is planted in the package: every elastic smoothing reads a number."""

    relax = Elastic.relax

    def reading(self, moved, *args):
        assert float(moved.sum()) is not None
        relax(self, moved, *args)

    monkeypatch.setattr(Elastic, "relax", reading)
    fixed = torch.rand(1, 1, 12, 12, generator=torch.Generator().manual_seed(0)).to("cuda:1")
    pretend.waits.clear()
    refine(fixed, fixed.roll(1, 2), scales=(1,), iterations=4, tolerance=0, smooth_residual=0.6)
    places = {where: count for (what, where), count in pretend.waits.items() if what == "_local_scalar_dense"}
    assert max(places.values()) == 4
    assert max(places, key=places.get).startswith("solver/engine.py:")


@pytest.mark.usefixtures("pretend")
def test_a_tensor_left_on_the_cpu_is_found_in_the_package(monkeypatch):
    monkeypatch.setattr(Elastic, "relax", lambda _, moved, *__: moved + torch.zeros(moved.shape))
    fixed = torch.rand(1, 1, 12, 12, generator=torch.Generator().manual_seed(0)).to("cuda:1")
    with pytest.raises(RuntimeError, match=r"found cpu, cuda:1 in add at solver/\w+\.py:\d+"):
        refine(fixed, fixed.roll(1, 2), scales=(1,), iterations=4)


@pytest.mark.usefixtures("pretend")
def test_doubles_are_refused_where_the_device_has_none():
    with pytest.raises(TypeError, match="float64"):
        numbers(3, device="mps").double()
    with pytest.raises(TypeError, match="float64"):
        torch.zeros(3, dtype=torch.float64, device="mps")


def test_bytes_and_launches_are_counted(pretend):
    assert torch.cuda.memory_allocated() == 0
    a = numbers(1000)
    b = a + 1
    view = b[10:]
    assert (pretend.live, pretend.launches) == (8000, 1)
    del b
    assert pretend.live == 8000  # the view holds it
    del view
    assert (pretend.live, pretend.peak) == (4000, 8000)
    torch.cuda.set_per_process_memory_fraction(9000 / 80 / 2**30)
    with pytest.raises(torch.OutOfMemoryError):
        [a + i for i in range(3)]


def test_it_leaves_nothing_behind():
    before = {name: getattr(torch.cuda, name) for name in ("Event", "is_available", "synchronize", "device")}
    with Pretend():
        inside = torch.zeros(2, device="cuda:1")
        assert torch.cuda.is_available()
    assert {name: getattr(torch.cuda, name) for name in before} == before
    assert inside.device == CPU
    assert (torch.zeros(2) + inside).tolist() == [0, 0]
