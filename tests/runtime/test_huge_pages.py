"""Memory in huge pages: what is in it stays, and the kernel says that it is there."""

import mmap
from pathlib import Path

import numpy as np
import pytest

from qwenforge.runtime import huge_pages
from qwenforge.runtime.kv_cache import CacheTensor, KeyValueCache

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.fixture
def kernel_with_huge_pages() -> None:
    if not _SETTING.is_file() or "[never]" in _SETTING.read_text():
        pytest.skip("this kernel gives no transparent huge pages")
    probe = huge_pages.zeros(huge_pages.SIZE)
    probe[0] = 1
    if not _huge_bytes(probe):
        pytest.skip("this kernel gives no transparent huge pages to who asks")


def _huge_bytes(array: np.ndarray) -> int:
    """Bytes in huge pages of the mappings in which ``array`` lies."""
    first, last = array.ctypes.data, array.ctypes.data + array.nbytes
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if "-" in name and not name.endswith(":"):
            start, end = (int(address, 16) for address in name.split("-"))
            inside = start < last and first < end
        elif inside and name == "AnonHugePages:":
            found += int(rest[0]) * 1024
    return found


def _plain_memory(count: int) -> np.ndarray:
    """Bytes in small pages, unless the kernel makes all pages huge: NumPy asks for huge ones for its large arrays."""
    return np.frombuffer(mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)


@pytest.mark.usefixtures("kernel_with_huge_pages")
def test_new_memory_is_collapsed_and_keeps_its_contents() -> None:
    values = np.random.default_rng(0).integers(0, 256, 9 << 20, np.uint8)
    with huge_pages.collapsing_new_memory():
        new = _plain_memory(values.size)
        new[:] = values
        address = new.ctypes.data
    probe = _plain_memory(3 * huge_pages.SIZE)
    probe[:] = 1
    if not huge_pages.collapse([(probe.ctypes.data, probe.ctypes.data + probe.nbytes)]):
        pytest.skip("this kernel, older than 6.1, does not collapse memory on request")
    assert _huge_bytes(new) >= 3 * huge_pages.SIZE
    assert new.ctypes.data == address
    np.testing.assert_array_equal(new, values)


@pytest.mark.usefixtures("kernel_with_huge_pages")
def test_caches_of_a_small_model_lie_in_huge_pages_together() -> None:
    tensors = tuple(CacheTensor(f"past.{index}", f"present.{index}", 2, 64) for index in range(8))
    cache = KeyValueCache(tensors, batch=1, capacity=2048, dtype=np.dtype(np.float32))
    for index, buffer in enumerate(cache.buffers.values()):
        assert buffer.nbytes < huge_pages.SIZE
        assert not buffer.any()
        buffer[:] = index + 1
    assert [buffer.max() for buffer in cache.buffers.values()] == list(range(1, 9))
    assert _huge_bytes(cache.buffers["past.0"]) >= cache.nbytes // 2


@pytest.mark.parametrize("count", [0, 1, huge_pages.SIZE, huge_pages.SIZE + 1])
def test_zeros(count: int) -> None:
    array = huge_pages.zeros(count)
    assert array.shape == (count,)
    assert not array.any()
    array[:] = 255


@pytest.mark.parametrize(
    ("after", "before", "added"),
    [
        ([(0, 10)], [(20, 30)], [(0, 10)]),
        ([(0, 10)], [(0, 10)], []),
        ([(0, 30)], [(10, 20)], [(0, 10), (20, 30)]),
        ([(5, 30)], [(0, 10)], [(10, 30)]),
        ([(0, 15)], [(10, 20)], [(0, 10)]),
        ([(0, 40)], [(5, 10), (20, 30)], [(0, 5), (10, 20), (30, 40)]),
        ([(0, 10), (20, 40)], [(0, 30)], [(30, 40)]),
    ],
)
def test_what_was_added(
    after: list[huge_pages.Region], before: list[huge_pages.Region], added: list[huge_pages.Region]
) -> None:
    assert list(huge_pages._added(after, before)) == added


def test_without_proc_nothing_is_collapsed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huge_pages, "_MAPS", tmp_path / "maps")
    with huge_pages.collapsing_new_memory():
        assert np.ones(4, np.uint8).all()


def test_failure_in_the_block_is_passed_on() -> None:
    with pytest.raises(KeyError), huge_pages.collapsing_new_memory():
        raise KeyError("load")
