"""Compile the C kernels with the system's compiler, once per machine and source, into the user's cache."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

__all__ = ["SOURCE", "BuildError", "build", "cache_folders", "capability", "compile_library", "library_name"]

SOURCE = Path(__file__).with_name("cpu.c")

_FLAGS: tuple[str, ...] = ("-O3", "-std=c11", "-shared", "-fPIC", "-fvisibility=hidden", "-fopenmp-simd")
_FLAGS += ("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-ffp-contract=fast", "-pthread")
"""Not ``-ffast-math``: a NaN must not become an index."""

_INSTRUCTIONS = {"AVX2": ("-mavx2", "-mfma", "-mf16c")}
"""By what torch says of the CPU; anything else gets the compiler's own choice, which every CPU of its kind has. Wider
vectors (AVX-512) were not faster on an EPYC that has them, but for the look for folds (.044 instead of .050 s)."""

_SECONDS = 120
"""After which a compiler is given up."""


class BuildError(RuntimeError):
    """The kernels cannot be compiled here; the message says why."""


def capability() -> str:
    """Which instructions are compiled for: ``"AVX2"``, or ``"plain"`` for any CPU of the machine's kind."""
    if not is_x86():
        return "plain"
    import torch  # not needed by who builds a wheel

    return "AVX2" if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") else "plain"


def is_x86() -> bool:
    """Whether the machine has 64-bit x86 processors."""
    return platform.machine().lower() in ("x86_64", "amd64")


def library_name(instructions: str) -> str:
    """File name of the compiled kernels: it tells source, flags and kind of machine, so that a cache may be shared."""
    told = (SOURCE.read_bytes(), repr((_FLAGS, _INSTRUCTIONS.get(instructions))).encode())
    digest = hashlib.sha256(b"\0".join(told)).hexdigest()[:16]
    return f"kernels-{sys.platform}-{platform.machine().lower()}-{instructions.lower()}-{digest}.so"


def cache_folders() -> Iterator[Path]:
    """Where compiled kernels are looked for and written, in this order.

    ``$MONAI_LM_CACHE``, the user's cache folder, and one in the folder for temporary files that nobody else can write.
    """
    if chosen := os.environ.get("MONAI_LM_CACHE"):
        yield Path(chosen)
    with suppress(RuntimeError):  # no home
        home = Path.home()
        default = home / "Library/Caches" if sys.platform == "darwin" else home / ".cache"
        yield Path(os.environ.get("XDG_CACHE_HOME") or default) / "monai_lm"
    yield Path(tempfile.gettempdir()) / f"monai_lm-{os.getuid()}"


def build(anew: bool = False) -> Path:
    """The compiled kernels for this CPU: ``$MONAI_LM_KERNELS``, from the wheel, from a cache, or compiled now.

    Args:
        anew: compile, whatever is there.

    Raises:
        BuildError: there is no compiler, it fails, or there is nowhere to write to.
    """
    if chosen := os.environ.get("MONAI_LM_KERNELS"):
        return Path(chosen)
    if os.name != "posix":
        raise BuildError(f"the kernels need POSIX threads, which {sys.platform} has not")
    name = library_name(capability())
    shipped = SOURCE.with_name("built") / name
    if shipped.is_file() and not anew:
        return shipped
    folders = list(cache_folders())
    for folder in folders:
        if _trusted(folder) and _whole(folder / name) and not anew:
            return folder / name
    reasons = []
    for folder in folders:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not _trusted(folder):
                reasons.append(f"{folder} can be written by others")
                continue
            with tempfile.TemporaryDirectory(dir=folder) as place:  # so that nobody sees half a file
                made = compile_library(Path(place) / name, capability())
                digest = Path(place) / "digest"
                digest.write_text(_digest(made))
                digest.replace(_digest_file(folder / name))
                made.replace(folder / name)
            return folder / name
        except OSError as error:
            reasons.append(str(error))
    raise BuildError("nowhere to write to: " + "; ".join(reasons))


def compile_library(to: Path, instructions: str) -> Path:
    """Compile the kernels into a file.

    Args:
        to: the file.
        instructions: as :func:`capability` says.

    Raises:
        BuildError: there is no compiler, or it fails.
    """
    compiler = os.environ.get("CC") or next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
    if compiler is None:
        raise BuildError("there is no C compiler (cc, gcc or clang)")
    command = [*compiler.split(), *_FLAGS, *_INSTRUCTIONS.get(instructions, ()), str(SOURCE), "-o", str(to)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{compiler}: {error}") from error
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise BuildError(f"{compiler}: {last[0]}")
    return to


def _digest(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()


def _digest_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _whole(library: Path) -> bool:
    """Whether a library in a cache is what was compiled: loading one that was cut off kills the process."""
    try:
        return _digest_file(library).read_text() == _digest(library)
    except OSError:
        return False


def _trusted(folder: Path) -> bool:
    """Whether nobody but the user (and root) can have put a library there."""
    try:
        info = folder.stat()
    except OSError:
        return False
    return info.st_uid in (0, os.getuid()) and not info.st_mode & 0o022
