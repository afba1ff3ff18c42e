"""Compiling the kernels: where they come from, what may go wrong, and what is said then."""

import os
import signal
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from monai_lm.kernels import build, cpu

needs_compiler = pytest.mark.skipif(cpu.why_not() is not None, reason=f"no kernels in C: {cpu.why_not()}")
REFINE = """
import sys, torch, warnings, monai_lm
from monai_lm.kernels import cpu
x = torch.randn(1, 1, 24, 20, 22, generator=torch.Generator().manual_seed(0))
result = monai_lm.refine(x, x.roll(1, 2), scales=(1,), iterations=3)
print(cpu.why_not(), float(result.final_loss), result.ddf.double().sum().item())
"""


def refined(folder, **environment):
    """What a new process says of the kernels, its loss and field, and what it warns of."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "MONAI_LM_CACHE": str(folder), **environment}
    root = Path(__file__).parents[2]
    out = subprocess.run(
        [sys.executable, "-c", REFINE], cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    reason, loss, total = out.stdout.strip().rsplit(" ", 2)
    return reason, float(loss), float(total), out.stderr


@pytest.fixture
def small_source(tmp_path, monkeypatch):
    """In place of the kernels, whose compilation takes seconds."""
    source = tmp_path / "small.c"
    source.write_text("int small(void) { return 3; }\n")
    monkeypatch.setattr(build, "SOURCE", source)


@pytest.fixture
def cache(tmp_path, monkeypatch, small_source):  # noqa: ARG001
    """The only folder in which compiled kernels are looked for."""
    monkeypatch.setattr(build, "cache_folders", lambda: iter([tmp_path / "cache"]))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A cache whose library was broken, and what the process said that compiled the kernels into it."""
    folder = tmp_path_factory.mktemp("compiled")
    folder.chmod(0o700)
    (folder / build.library_name(build.capability())).write_bytes(b"\x7fELF broken")
    return folder, refined(folder)


@needs_compiler
def test_kernels_are_compiled_once_and_then_found(cache, monkeypatch):
    made = build.build()
    assert made.parent == cache
    assert {p.name for p in cache.iterdir()} == {made.name, build._digest_file(made).name}  # nothing half made is left
    monkeypatch.setenv("CC", "no-such-compiler")
    assert build.build() == made


@needs_compiler
def test_two_that_compile_at_the_same_time_do_not_see_each_others_half_files(cache):
    with ThreadPoolExecutor(3) as threads:
        made = set(threads.map(lambda _: build.build(), range(3)))
    assert len(made) == 1
    library = made.pop()
    assert {p.name for p in cache.iterdir()} == {library.name, build._digest_file(library).name}


def test_other_source_other_flags_other_file(tmp_path, monkeypatch):
    names = {build.library_name(instructions) for instructions in ("AVX2", "plain")}
    changed = tmp_path / "cpu.c"
    changed.write_bytes(build.SOURCE.read_bytes() + b"\n")
    monkeypatch.setattr(build, "SOURCE", changed)
    names |= {build.library_name(instructions) for instructions in ("AVX2", "plain")}
    assert len(names) == 4


@pytest.mark.parametrize(
    ("command", "message"),
    [("no-such-compiler-here", "no-such-compiler-here"), ("false", "false: exit status 1")],
)
def test_a_compiler_that_fails_is_told(command, message, cache, monkeypatch):
    monkeypatch.setenv("CC", command)
    with pytest.raises(build.BuildError, match=message):
        build.build()
    assert list(cache.iterdir()) == []


@pytest.mark.usefixtures("cache")
def test_no_compiler_at_all(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(build.BuildError, match="there is no C compiler"):
        build.build()


def test_a_folder_that_others_can_write_to_is_not_trusted(cache):
    cache.mkdir()
    cache.chmod(0o777)
    (cache / build.library_name(build.capability())).write_bytes(b"not mine")
    with pytest.raises(build.BuildError, match="can be written by others"):
        build.build()


@needs_compiler
@pytest.mark.usefixtures("small_source")
def test_a_cache_that_cannot_be_written_is_passed_over(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setattr(build, "cache_folders", lambda: iter([blocked / "cache", tmp_path / "other"]))
    assert build.build().parent == tmp_path / "other"
    monkeypatch.setattr(build, "cache_folders", lambda: iter([blocked / "cache"]))
    with pytest.raises(build.BuildError, match=r"nowhere to write to: .*file"):
        build.build()


@needs_compiler
@pytest.mark.parametrize("content", [0, 1, 4096, -1, "other"])
def test_a_library_that_is_not_what_was_compiled_is_compiled_anew(content, cache):
    """One that was cut off would end the process with SIGBUS when it is loaded, and every later one."""
    made = build.build()
    whole = made.read_bytes()
    made.write_bytes(b"\x7fELF" + whole[5:] if content == "other" else whole[:content])
    assert build.build() == made
    assert made.read_bytes() == whole
    build._digest_file(made).unlink()
    assert build.build() == made
    assert sorted(f.suffix for f in cache.iterdir()) == sorted([made.suffix, ".sha256"])


@needs_compiler
def test_a_chosen_library_without_the_kernels_gives_way_to_plain_pytorch(tmp_path):
    source, library = tmp_path / "x.c", tmp_path / "x.so"
    source.write_text("int x;")
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    told = refined(tmp_path / "a", MONAI_LM_KERNELS=str(library))
    assert "undefined symbol" in told[0] or "symbol not found" in told[0]
    assert told[3].count("plain PyTorch is used") == 1


def test_where_kernels_are_kept(monkeypatch):
    monkeypatch.setenv("MONAI_LM_CACHE", "/chosen")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    folders = [str(f) for f in build.cache_folders()]
    assert folders[0] == "/chosen"
    assert folders[-1].endswith(f"monai_lm-{os.getuid()}")
    if sys.platform != "darwin":
        assert folders[1] == "/xdg/monai_lm"


@needs_compiler
def test_a_broken_library_in_the_cache_is_told_and_does_not_matter(compiled):
    reason, loss, _, errors = compiled[1]
    assert reason == "None"  # it is compiled anew
    assert loss > 0
    assert "Traceback" not in errors


@needs_compiler
def test_a_process_without_a_compiler_says_so_once_and_gets_the_same_result(compiled, tmp_path):
    folder, native = compiled
    plain = refined(tmp_path / "b", CC="no-such-compiler")
    again = refined(folder, CC="no-such-compiler", OMP_NUM_THREADS="1")  # another process, one thread, same bits
    assert again[:3] == native[:3]
    assert "no-such-compiler" in plain[0]
    assert plain[3].count("plain PyTorch is used") == 1
    assert plain[1] == pytest.approx(native[1], rel=1e-4)
    assert plain[2] == pytest.approx(native[2], rel=1e-2, abs=1e-2)


@needs_compiler
@pytest.mark.skipif(not build.is_x86(), reason="the machine has one set of instructions only")
def test_older_processors_get_kernels_of_their_own(compiled):
    folder, modern = compiled
    before = {p for p in folder.iterdir() if p.suffix == ".so"}
    old = refined(folder, ATEN_CPU_CAPABILITY="default")
    assert old[0] == "None"
    assert len(before) == 1
    assert len({p for p in folder.iterdir() if p.suffix == ".so"} - before) == 1
    assert old[1] == pytest.approx(modern[1], rel=1e-4)


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_threads_of_its_own():
    image = torch.randn(1, 1, 64, 64, 64)
    out, again = torch.empty_like(image), torch.empty_like(image)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        cpu.smooth(image, (1.0, 1.0, 1.0), out)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            signal.alarm(30)  # a child that hangs is killed
            try:
                cpu.smooth(image, (1.0, 1.0, 1.0), again)
                os._exit(0 if out.numpy().tobytes() == again.numpy().tobytes() else 1)  # torch's own threads may hang
            except BaseException:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        cpu.smooth(image, (1.0, 1.0, 1.0), again)
        assert torch.equal(out, again)
    finally:
        torch.set_num_threads(threads)


@needs_compiler
def test_threads_that_call_at_the_same_time_do_not_disturb_each_other():
    images = [torch.randn(1, 1, 48, 50, 52, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    expected = [torch.empty_like(image) for image in images]
    for image, out in zip(images, expected, strict=True):
        cpu.smooth(image, (1.0, 1.0, 1.0), out)

    def work(number):
        out = torch.empty_like(images[number])
        for _ in range(10):
            cpu.smooth(images[number], (1.0, 1.0, 1.0), out)
        return out

    with ThreadPoolExecutor(6) as threads:
        for out, right in zip(threads.map(work, range(6)), expected, strict=True):
            assert torch.equal(out, right)


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="a limit of the address space is Linux's")
def test_a_kernel_without_memory_raises_and_the_next_call_works():
    """In the middle of its work, on its threads: the process goes on."""
    code = """
import resource, torch
from monai_lm import kernels
from monai_lm.fields import fold_count
torch.set_num_threads(2)
field, small, blurred = torch.zeros(1, 3, 160, 160, 160), torch.ones(1, 3, 8, 8, 8), torch.empty(1, 3, 8, 8, 8)
fold_count(small)
fold_count(torch.zeros(1, 3, 40, 40, 40))  # its threads are there
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**19, used + 2**19))
try:
    print("counted", fold_count(field))
except MemoryError as error:
    print("MemoryError", error)
kernels.smooth(small, [1.0] * 3, blurred)
print(round(float(blurred.sum())))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "MemoryError no memory for the intermediate results of unfolded" in done.stdout
    assert "1536" in done.stdout
