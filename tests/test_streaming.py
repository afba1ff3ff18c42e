"""Windows tile a volume, and kernels with a halo cannot tell them from the whole."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from monai_lm.fields import compose, gaussian_smooth
from monai_lm.streaming import (
    Span,
    Window,
    assembled,
    give_back_freed_memory,
    narrowed,
    overwrite,
    tiles,
    windows,
)


def assert_spans_tile(spans, size, halo):
    assert [s.first for s in spans] == [0, *[s.last for s in spans][:-1]]
    assert spans[-1].last == size
    assert len({s.length for s in spans}) == 1
    for s in spans:
        assert 0 <= s.start <= s.first < s.last <= s.start + s.length <= size
        assert s.start == 0 or s.first - s.start >= halo
        assert s.start + s.length == size or s.start + s.length - s.last >= halo


@pytest.mark.parametrize("rows", [1, 5, 24, 25, 40, 97])
@pytest.mark.parametrize("halo", [0, 1, 4])
def test_right_parts_tile_the_volume(rows, halo):
    volume = torch.zeros(2, 1, rows, 3)
    cut = windows(volume, 1, halo, bytes_at_a_time=4 * 2 * 3 * 9)
    assert_spans_tile([span for w in cut for span in w.spans], rows, halo)
    volume = torch.zeros(2, 1, rows, 31, 3)
    cut = tiles(volume, halo, 0.0, least=1)
    count = torch.zeros(rows, 31)
    for w in cut:
        w.right(count[None, None])[:] += 1
    assert bool((count == 1).all())
    strips = list(dict.fromkeys(w.spans[0] for w in cut))
    assert_spans_tile(strips, rows, halo)
    for strip in strips:
        assert_spans_tile([w.spans[1] for w in cut if w.spans[0] == strip], 31, halo)
    assert [w.spans[0] for w in cut] == sorted((w.spans[0] for w in cut), key=strips.index)


def test_the_limit_bounds_a_window():
    volume = torch.zeros(1, 1, 100, 10, 10)
    assert {w.spans[0].length for w in windows(volume, 3, 0, bytes_at_a_time=3 * 4 * 100 * 7)} == {7}
    assert windows(volume, 3, 0, bytes_at_a_time=1e9) == [Window((Span(0, 100, 0, 100),))]


def test_a_tile_has_its_share_of_the_volume_or_the_least():
    volume = torch.zeros(1, 1, 100, 120, 10)
    for share, least, expected in ((0.1, 1, 12000), (0.0, 20000, 20000)):
        sizes = {tuple(span.length for span in w.spans) for w in tiles(volume, 2, share, least)}
        ((rows, columns),) = sizes
        assert 10 * rows * columns == pytest.approx(expected, rel=0.05)
    assert tiles(volume, 2, 1.0) == [Window((Span(0, 100, 0, 100), Span(0, 120, 0, 120)))]


def test_a_kernel_with_a_halo_gives_what_it_gives_on_the_whole(random_tensor):
    volume = random_tensor((2, 1, 120, 7)).float()
    cut = windows(volume, 1, 6, bytes_at_a_time=1)
    assert len(cut) > 2
    parts = [w.cut(gaussian_smooth(w.of(volume), 2.0)) for w in cut]
    torch.testing.assert_close(torch.cat(parts, 2), gaussian_smooth(volume, 2.0))


@pytest.mark.parametrize("shape", [(1, 2, 130, 6), (1, 2, 50, 70), (2, 3, 40, 60, 7)])
@pytest.mark.parametrize("by_tiles", [False, True])
def test_overwriting_shows_the_kernel_the_old_values_only(shape, by_tiles, random_tensor):
    volume = random_tensor(shape).float()
    step = gaussian_smooth(random_tensor(shape, 1).float(), 1.0)
    assert 0.5 < float(step.abs().max()) < 2
    expected = gaussian_smooth(compose(volume, step), 1.0)
    cut = tiles(volume, 5, 0.0, least=1) if by_tiles else windows(volume, 2, 5, bytes_at_a_time=1)
    assert len({w.spans[0] for w in cut}) > (2 if by_tiles else 1)
    overwrite(volume, cut, lambda w: gaussian_smooth(compose(volume, w.of(step), w.origin(step)), 1.0))
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
    window = Window((Span(2, 4, 3, 5),))
    (a,), b = narrowed(((volume,), volume), window)
    assert a.flatten().tolist() == b.flatten().tolist() == [2, 3, 4, 5]
    assert window.right(volume).flatten().tolist() == [3, 4]
    assert window.cut(a).flatten().tolist() == [3, 4]
    assert window.inner().of(volume).flatten().tolist() == [3, 4]


def test_a_tile_of_a_volume_and_of_sums_along_its_lines():
    volume = torch.arange(30.0).view(1, 1, 5, 6)
    window = Window((Span(1, 3, 2, 4), Span(0, 4, 0, 3)))
    assert torch.equal(window.of(volume), volume[:, :, 1:4, :4])
    assert torch.equal(window.right(volume), volume[:, :, 2:4, :3])
    assert torch.equal(window.cut(window.of(volume)), window.right(volume))
    assert torch.equal(window.cut(window.of(volume)[:, 0], 1), window.right(volume)[:, 0])
    assert [int(number) for number in window.origin(volume)] == [1, 0]
    assert [int(number) for number in window.inner().origin(volume)] == [2, 0]


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
