"""Compile where it pays, fall back where it cannot."""

import logging
import shutil

import pytest
import torch

from monai_lm import compilation, refinement
from monai_lm.compilation import CompileClock, Ledger, compiled, compiling, piece

CPU = torch.device("cpu")


@pytest.fixture
def which(monkeypatch):
    """Decide what ``shutil.which`` finds."""
    found: set[str] = set()
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name in found else None)
    compilation.compiler_found.cache_clear()
    yield found
    compilation.compiler_found.cache_clear()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A cache on disk of the test's own."""
    monkeypatch.setattr(compilation, "cache_dir", lambda: str(tmp_path))
    monkeypatch.setattr(compilation, "_LOADED", set())
    return tmp_path


def another_process():
    """Kernels lie in the cache on disk only."""
    compilation._LOADED.clear()


def test_little_work_does_not_pay(which):
    which.add("g++")
    assert not Ledger(CPU, "a").pays(32**3 * 100)
    assert not Ledger(torch.device("cuda"), "a").pays(10_000)


@pytest.mark.parametrize("compiler", ["g++", "clang++", "c++"])
def test_much_work_pays_where_a_compiler_is(which, compiler):
    which.add(compiler)
    assert Ledger(CPU, "a").pays(128**3 * 100)


def test_nothing_pays_without_a_compiler(which):
    assert not which
    assert not Ledger(CPU, "a").pays(128**3 * 100)
    assert not Ledger(torch.device("cuda"), "a").pays(128**3 * 100)  # some seconds' work for a CPU, none for a GPU
    assert Ledger(torch.device("cuda"), "a").pays(512**3 * 100)
    assert not Ledger(torch.device("mps"), "a").pays(128**3 * 100)


def test_work_that_comes_back_pays_once_it_has_added_up(which):
    which.add("g++")
    work = 0.4 * compilation._WORTH["cpu"]
    decisions = []
    for _ in range(3):
        decisions.append(Ledger(CPU, "a").pays(work))
        Ledger(CPU, "a").note(work, fused=False)
    assert decisions == [False, False, True]
    assert not Ledger(CPU, "b").pays(work)


def test_kernels_on_disk_pay_for_less_work(which):
    which.add("g++")
    work = 2 * compilation._WORTH_LOADING["cpu"]
    assert not Ledger(CPU, "a").pays(work)
    Ledger(CPU, "a").note(work, fused=True)
    another_process()
    assert Ledger(CPU, "a").pays(work)
    assert not Ledger(CPU, "a").pays(0.4 * work)


def test_kernels_of_this_process_pay_for_any_work(which):
    which.add("g++")
    Ledger(CPU, "a").note(1.0, fused=True)
    assert Ledger(CPU, "a").pays(1.0)
    assert not Ledger(CPU, "b").pays(1.0)


@pytest.mark.parametrize("content", ["", "[]", '{"work": 1}', "{"])
def test_a_broken_ledger_is_an_empty_one(which, own_cache, content):
    which.add("g++")
    Ledger(CPU, "a").note(1e12, fused=True)
    (file,) = (own_cache / "monai_lm").iterdir()
    file.write_text(content)
    another_process()
    assert not Ledger(CPU, "a").pays(0.5 * compilation._WORTH["cpu"])


def test_a_ledger_that_cannot_be_written_is_no_error(own_cache, which):
    which.add("g++")
    (own_cache / "monai_lm").write_text("a file where the folder should be")
    Ledger(CPU, "a").note(1e12, fused=True)
    another_process()
    assert not Ledger(CPU, "a").pays(0.5 * compilation._WORTH["cpu"])


def unsupported(x: torch.Tensor) -> torch.Tensor:
    torch._dynamo.graph_break()
    return x + 1


def failing(x: torch.Tensor) -> torch.Tensor:
    raise ValueError(f"shape {tuple(x.shape)} is not welcome")


def test_a_function_that_does_not_compile_runs_eagerly_and_says_so_once(caplog):
    function = compiled(unsupported)
    with caplog.at_level(logging.WARNING, "monai_lm.compilation"):
        for value in (1.0, 2.0):
            assert torch.equal(function(torch.full((3,), value)), torch.full((3,), value + 1))
        function(torch.zeros(5))
    records = [r for r in caplog.records if r.name == "monai_lm.compilation"]
    assert len(records) == 1
    assert records[0].getMessage().startswith("compiling unsupported failed, running it eagerly: ")


def test_a_failing_compiler_is_tried_once(monkeypatch, caplog):
    """Also a missing or broken C++ compiler ends in eager execution."""
    calls = []

    def compile_badly(function, **options):
        assert options == {"dynamic": False, "fullgraph": True}

        def call(*args):
            calls.append((function, args))
            raise torch._dynamo.exc.BackendCompilerFailed(function, RuntimeError("no C++ compiler"), None)

        return call

    monkeypatch.setattr(torch, "compile", compile_badly)
    function = compilation._Compiled(torch.add)
    with caplog.at_level(logging.WARNING, "monai_lm.compilation"):
        for _ in range(3):
            assert float(function(torch.tensor(1.0), torch.tensor(2.0))) == 3
    assert len(calls) == 1
    assert sum("no C++ compiler" in r.getMessage() for r in caplog.records) == 1


def test_errors_of_the_function_itself_are_raised():
    with pytest.raises(ValueError, match=r"shape \(2,\) is not welcome"):
        compiled(failing)(torch.zeros(2))


def test_a_function_is_compiled_once_per_process():
    assert compiled(unsupported) is compiled(unsupported)
    assert compiled(unsupported) is not compiled(failing)


def test_the_users_compiler_settings_are_left_alone():
    before = (torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit)
    compiled(unsupported)(torch.zeros(1))
    assert (torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit) == before


def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2 if not torch.compiler.is_compiling() else x * 2 + 100


def quadrupled(x: torch.Tensor) -> torch.Tensor:
    return piece(doubled, piece(doubled, x))


def test_pieces_are_compiled_where_that_is_asked_for():
    """The function tells whether it is compiled."""
    one = torch.ones(3)
    assert quadrupled(one).tolist() == [4, 4, 4]
    with compiling(True):
        assert piece(doubled, one).tolist() == [102, 102, 102]
        assert quadrupled(one).tolist() == [304, 304, 304]
        with compiling(False):
            assert quadrupled(one).tolist() == [4, 4, 4]
        assert piece(quadrupled, one).tolist() == [304, 304, 304]  # one graph
    assert quadrupled(one).tolist() == [4, 4, 4]


def tripled(x: torch.Tensor) -> torch.Tensor:
    return 3 * x


def test_the_clock_runs_while_something_is_compiled_only():
    with CompileClock() as clock:
        assert compiled(tripled)(torch.ones(3)).tolist() == [3, 3, 3]
        first = clock.seconds
        assert first > 0
        compiled(tripled)(torch.ones(3))
        assert clock.seconds == first
    compiled(tripled)(torch.ones(3, 3))  # another shape, outside
    assert clock.seconds == first


def test_an_error_inside_ends_the_compiling():
    with pytest.raises(ValueError, match="not welcome"), compiling(True):
        failing(torch.zeros(1))
    assert quadrupled(torch.ones(1)).tolist() == [4]


def test_a_refinement_compiles_one_kernel_for_as_many_shapes_as_there_are(monkeypatch):
    """Whoever calls the levels, the benchmarks' Adam too: torch's own limit is eight."""
    seen = []
    monkeypatch.setattr(refinement, "_normal", lambda _: seen.append(torch._dynamo.config.recompile_limit) or 1 / 0)
    before = torch._dynamo.config.recompile_limit
    with pytest.raises(ZeroDivisionError):
        refinement._coarse_to_fine(*[None] * 9)
    assert seen == [256]
    assert torch._dynamo.config.recompile_limit == before < 256
