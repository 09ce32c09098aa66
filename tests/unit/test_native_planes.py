"""Byte planes of the native core: shapes, what it refuses, and the zstd frames it writes itself."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

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


@pytest.mark.parametrize("call", ["encode_planes", "estimate_planes"])
def test_encode_refuses_what_it_must_not_read(call: str) -> None:
    """Sizes, transforms and bases are checked before the first byte is read."""
    level = (0,) if call == "encode_planes" else ()
    for raw, base, item_size, transform, gain, message in [
        (bytes(10), None, 4, 0, 80, "item"),
        (bytes((64 << 20) + 4), None, 4, 0, 80, "64 MiB"),
        (bytes(16), None, 4, 0, 1001, "gain"),
        (bytes(16), None, 4, 4, 80, "transform"),
        (bytes(16), None, 1, 3, 80, "transform"),
        (bytes(16), bytes(16), 16, 2, 80, "transform"),
        (bytes(16), None, 4, 1, 80, "base"),
        (bytes(16), bytes(16), 4, 3, 80, "base"),
        (bytes(16), bytes(12), 4, 2, 80, "base"),
        (bytes(16), bytes(20), 4, 1, 80, "base"),
    ]:
        with pytest.raises(ValueError, match=message):
            getattr(core, call)(raw, base, item_size, transform, *level, gain)


def test_decode_refuses_bases_that_do_not_fit() -> None:
    """A decoder reads a base only where there is one, as long as what it fills."""
    directory = [(0, 4)] * 4
    for base, transform in [(None, 1), (bytes(12), 2), (bytes(20), 1), (bytes(16), 0), (None, 4)]:
        with pytest.raises(ValueError, match=r"base|transform"):
            core.decode_planes(bytes(16), directory, base, transform, bytearray(16))


LEVELS = [pytest.param(0, id="quickly"), pytest.param(1, id="thoroughly")]


def _frame(data: bytes, level: int) -> bytes:
    """The frame of one plane of bytes, or b"" where it was stored raw."""
    encoded = core.encode_planes(data, None, 1, 0, level, 10)
    return b"" if encoded is None else bytes(encoded[1])


@pytest.mark.parametrize("level", LEVELS)
@given(data=st.data())
def test_own_frames_are_read_by_the_library(level: int, data: st.DataObject) -> None:
    """Whatever symbols occur, how often, and however few or many: the library decodes our frames to the same bytes."""
    symbols = data.draw(st.lists(st.integers(0, 255), min_size=1, max_size=256, unique=True))
    decay = data.draw(st.floats(0.3, 1.0))
    shares = np.array([decay**at for at in range(len(symbols))])
    size = data.draw(st.one_of(st.integers(0, 2000), st.sampled_from([65535, 65536, 65537, 65536 + 300, 200_000])))
    random = np.random.default_rng(data.draw(st.integers(0, 1 << 32)))
    plane = random.choice(np.array(symbols, dtype=np.uint8), size, p=shares / shares.sum()).tobytes()
    frame = _frame(plane, level)
    if frame:
        assert len(frame) < size
        assert zstandard.get_frame_parameters(frame).content_size == size
        assert zstandard.ZstdDecompressor().decompress(frame, max_output_size=size, allow_extra_data=False) == plane


@pytest.mark.parametrize("level", LEVELS)
def test_blocks_of_all_kinds_follow_each_other(level: int) -> None:
    """Repeated, coded and incompressible blocks in every order, the last one of any length, are one frame."""
    random = np.random.default_rng(3)
    kinds = [
        bytes(65536),
        random.bytes(65536),
        random.binomial(20, 0.5, 65536).astype(np.uint8).tobytes(),
        b"x" * 65536,
    ]
    for order in itertools.permutations(range(4)):
        for cut in (0, 1, 255, 256, 65535):
            plane = b"".join(kinds[number] for number in order)
            plane = plane[: len(plane) - cut]
            frame = _frame(plane, level)
            assert len(frame) < 65536 * 2.2
            assert zstandard.ZstdDecompressor().decompress(frame) == plane


@pytest.mark.parametrize("level", LEVELS)
def test_frames_come_near_the_entropy(level: int) -> None:
    """Exponents of weights take hardly more than Shannon's bound; a plane of zeros takes next to nothing."""
    exponents = np.random.default_rng(5).binomial(30, 0.4, 1 << 20).astype(np.uint8)
    counts = np.bincount(exponents)
    counts = counts[counts > 0]
    bound = -(counts * np.log2(counts / counts.sum())).sum() / 8
    assert bound < len(_frame(exponents.tobytes(), level)) < 1.02 * bound
    assert len(_frame(bytes(1 << 20), level)) < 100


@pytest.mark.parametrize("level", LEVELS)
def test_skewed_counts_are_cut_to_the_longest_code(level: int) -> None:
    """Counts like Fibonacci's would need codes of 20 bits; the format has 11."""
    plane = b"".join(bytes([symbol]) * count for symbol, count in enumerate(_fibonacci(65536)))
    shuffled = np.random.default_rng(1).permutation(np.frombuffer(plane, dtype=np.uint8)).tobytes()
    frame = _frame(shuffled, level)
    assert 0 < len(frame) < len(shuffled) / 2
    assert zstandard.ZstdDecompressor().decompress(frame) == shuffled


def _fibonacci(limit: int) -> list[int]:
    counts = [1, 1]
    while sum(counts) + counts[-1] + counts[-2] <= limit:
        counts.append(counts[-1] + counts[-2])
    return counts
