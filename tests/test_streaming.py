"""Windows tile a volume, and kernels with a halo cannot tell them from the whole."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from monai_lm.fields import compose, gaussian_smooth
from monai_lm.streaming import (
    Window,
    assembled,
    give_back_freed_memory,
    narrowed,
    overwrite,
    windows,
)


@pytest.mark.parametrize("rows", [1, 5, 24, 25, 40, 97])
@pytest.mark.parametrize("halo", [0, 1, 4])
def test_right_rows_tile_the_volume(rows, halo):
    volume = torch.zeros(2, 1, rows, 3)
    cut = windows(volume, 1, halo, bytes_at_a_time=4 * 2 * 3 * 9)
    assert [w.first for w in cut] == [0, *[w.last for w in cut][:-1]]
    assert cut[-1].last == rows
    assert len({w.rows for w in cut}) == 1
    for w in cut:
        assert 0 <= w.start <= w.first < w.last <= w.start + w.rows <= rows
        assert w.start == 0 or w.first - w.start >= halo
        assert w.start + w.rows == rows or w.start + w.rows - w.last >= halo


def test_the_limit_bounds_a_window():
    volume = torch.zeros(1, 1, 100, 10, 10)
    assert {w.rows for w in windows(volume, 3, 0, bytes_at_a_time=3 * 4 * 100 * 7)} == {7}
    assert windows(volume, 3, 0, bytes_at_a_time=1e9) == [Window(0, 100, 0, 100)]


def test_a_kernel_with_a_halo_gives_what_it_gives_on_the_whole(random_tensor):
    volume = random_tensor((2, 1, 120, 7)).float()
    cut = windows(volume, 1, 6, bytes_at_a_time=1)
    assert len(cut) > 2
    parts = [w.cut(gaussian_smooth(w.of(volume), 2.0)) for w in cut]
    torch.testing.assert_close(torch.cat(parts, 2), gaussian_smooth(volume, 2.0))


def test_overwriting_shows_the_kernel_the_old_rows_only(random_tensor):
    volume = random_tensor((1, 2, 130, 6)).float()
    step = gaussian_smooth(random_tensor((1, 2, 130, 6), 1).float(), 1.0)
    expected = gaussian_smooth(compose(volume, step), 1.0)
    cut = windows(volume, 2, 5, bytes_at_a_time=1)
    assert len(cut) > 3
    overwrite(volume, cut, lambda w: gaussian_smooth(compose(volume, w.of(step), w.first_row(step)), 1.0))
    torch.testing.assert_close(volume, expected)


def test_volumes_are_assembled_from_what_a_kernel_returns_for_windows(random_tensor):
    volume = random_tensor((2, 1, 100, 5)).float()

    def kernel(x):
        return x, (gaussian_smooth(x, 1.0), torch.cat([x, -x], 1))

    cut = windows(volume, 1, 4, bytes_at_a_time=1)
    x, (smooth, both) = assembled(100, cut, lambda w: kernel(w.of(volume)))
    assert len(cut) > 3
    for got, expected in zip((x, smooth, both), (volume, *kernel(volume)[1]), strict=True):
        torch.testing.assert_close(got, expected)


def test_nested_tuples_are_narrowed_throughout():
    volume = torch.arange(10.0).view(1, 1, 10, 1)
    window = Window(2, 4, 3, 5)
    (a,), b = narrowed(((volume,), volume), window)
    assert a.flatten().tolist() == b.flatten().tolist() == [2, 3, 4, 5]
    assert window.right(volume).flatten().tolist() == [3, 4]
    assert window.cut(a).flatten().tolist() == [3, 4]


def resident() -> int:
    """Bytes of the process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


ON_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


FREE_BLOCKS = """
import torch
from pathlib import Path
from monai_lm.streaming import keep_freed_memory, sparing_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

def left():
    before = resident()
    blocks = [torch.ones(2**20) for _ in range(12)]  # 48 MiB
    last = torch.ones(2**20)  # above them, so that they are not at the end of the heap
    assert resident() - before > 35 * 2**20
    del blocks
    return resident() - before

with sparing_memory(torch.device("cpu")):
    spared = left()
print(spared / 2**20, left() / 2**20)
"""


@ON_LINUX
def test_large_blocks_go_back_as_soon_as_they_are_freed_while_memory_is_spared():
    """In a process of its own, whose heap has no gaps."""
    out = subprocess.run([sys.executable, "-c", FREE_BLOCKS], capture_output=True, text=True, check=True).stdout
    spared, kept = (float(number) for number in out.split())
    assert spared < 10
    assert kept > 40


@ON_LINUX
def test_freed_memory_goes_back_to_the_system():
    blocks = [torch.ones(2**18) for _ in range(200)]  # 200 MiB in blocks that are kept when they are freed
    last = torch.ones(2**8)  # above them, so that they are not at the end of the heap
    del blocks
    give_back_freed_memory(last.device)
    before = resident()
    again = [torch.ones(2**18) for _ in range(200)]
    assert resident() - before > 150 * 2**20
    del again
    give_back_freed_memory(last.device)
    assert resident() - before < 50 * 2**20
