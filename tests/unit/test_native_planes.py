"""Byte planes of the native core: shapes, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from ciuic_async import native

core = native.core
pytestmark = pytest.mark.skipif(core is None, reason="the native core is not in use")


@pytest.mark.parametrize("item_size", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 95, 4097])
def test_split_is_the_transposed_bytes_and_merge_its_inverse(item_size: int, count: int) -> None:
    """Plane k holds byte k of every item: docs/format.md, "Byte planes"; vector kernels and their tails alike."""
    items = np.random.default_rng(count).integers(0, 256, (count, item_size), dtype=np.uint8)
    planes = bytearray(items.size)
    core.split_planes(memoryview(items.reshape(-1)), planes, item_size)
    assert bytes(planes) == np.ascontiguousarray(items.T).tobytes()
    back = bytearray(items.size)
    core.merge_planes(planes, back, item_size)
    assert bytes(back) == items.tobytes()


@pytest.mark.parametrize("function", ["split_planes", "merge_planes"])
@pytest.mark.parametrize(
    ("source", "target", "item_size"),
    [
        (bytes(12), bytearray(12), 3),
        (bytes(12), bytearray(12), 0),
        (bytes(6), bytearray(6), 4),
        (bytes(8), bytearray(4), 4),
    ],
)
def test_refuses_sizes_that_do_not_fit(function: str, source: bytes, target: bytearray, item_size: int) -> None:
    """Unknown item sizes, broken items and different lengths are ValueErrors, not memory errors."""
    with pytest.raises(ValueError, match=r"item|length"):
        getattr(core, function)(source, target, item_size)


def test_refuses_overlap_and_read_only_targets() -> None:
    """A buffer cannot be split into itself, and nothing is written to what Python says is constant."""
    buffer = bytearray(64)
    with pytest.raises(ValueError, match="overlap"):
        core.split_planes(memoryview(buffer)[:32], memoryview(buffer)[16:48], 2)
    with pytest.raises(BufferError):
        core.split_planes(bytes(4), bytes(4), 2)


def test_encode_refuses_what_it_must_not_read() -> None:
    """Sizes are checked before the first byte is read."""
    with pytest.raises(ValueError, match="item"):
        core.encode_planes(bytes(10), 4, -50, 80, 4096)
    with pytest.raises(ValueError, match="64 MiB"):
        core.encode_planes(bytes((64 << 20) + 4), 4, -50, 80, 4096)
    with pytest.raises(ValueError, match="gain"):
        core.encode_planes(bytes(16), 4, -50, 1001, 4096)
