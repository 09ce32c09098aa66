"""Deltas: exact inverses, bounded chains, never larger than planes alone, and nothing without the right base."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ciuic_async.codecs import planes, transform
from ciuic_async.codecs.base import Base
from ciuic_async.codecs.decode import decode
from ciuic_async.codecs.planes import Effort, encode_delta, native_core
from ciuic_async.codecs.smallest import SmallestEncoder
from ciuic_async.errors import IntegrityError
from ciuic_async.format import segment
from ciuic_async.format.digest import digest
from ciuic_async.handoffs import EncodedChunk

CORES = [pytest.param(None, id="plain")]
if native_core() is not None:
    CORES.append(pytest.param(native_core(), id="native"))
TRANSFORMS = [
    (how, item_size)
    for how in (transform.XOR, transform.DIFFERENCE, transform.ROTATED)
    for item_size in segment.ITEM_SIZES_BYTES
    if how == transform.XOR or item_size in segment.WORD_SIZES_BYTES
]


def _training_step(dtype: str = "f4") -> tuple[bytes, bytes]:
    """Weights before and after a small update."""
    random = np.random.default_rng(11)
    before = (random.standard_normal(1 << 16) * 0.02).astype(np.float32)
    after = before - random.standard_normal(1 << 16).astype(np.float32) * np.float32(1e-4)
    if dtype == "bf16":
        return tuple((array.view(np.uint32) >> 16).astype(np.uint16).tobytes() for array in (before, after))  # type: ignore[return-value]
    return before.astype(dtype).tobytes(), after.astype(dtype).tobytes()


def _back(chunk: EncodedChunk, base: bytes | None) -> bytes:
    out = bytearray(chunk.header.raw_size_bytes)
    decode(chunk.header, b"".join(chunk.payload), memoryview(out), None if base is None else memoryview(base))
    return bytes(out)


@pytest.mark.parametrize(("how", "item_size"), TRANSFORMS)
@given(data=st.data())
def test_transforms_are_exactly_undone(how: int, item_size: int, data: st.DataObject) -> None:
    """Every transform of any items and any base has its inverse, the sign bit and wrap-around included."""
    count = data.draw(st.integers(0, 70))
    edges = st.sampled_from([b"\0", b"\xff", b"\x80", b"\x7f", b"\x01"])
    raw = data.draw(st.binary(min_size=count * item_size, max_size=count * item_size))
    base = data.draw(st.one_of(st.just(raw), edges.map(lambda byte: byte * len(raw))))
    items = bytearray(transform.forward(how, raw, base, item_size))
    assert len(items) == len(raw)
    transform.back(how, memoryview(items), base, item_size)
    assert items == raw


def test_difference_is_what_the_format_says() -> None:
    """Small changes of a float's bits in either direction, and across zero, become small integers."""
    base = np.array([1.0, 1.0, -1.0, 0.0, 0.5], dtype=np.float32)
    bits = base.view(np.uint32) + np.array([1, -1, 1, 0, 0], dtype=np.int32).astype(np.uint32)
    bits[3] ^= 0x80000000  # minus zero
    zigzag = np.frombuffer(transform.forward(transform.DIFFERENCE, bits.tobytes(), base.tobytes(), 4), dtype=np.uint32)
    assert zigzag.tolist() == [4, 3, 4, 2, 0]


def test_rotation_is_what_the_format_says() -> None:
    """The sign of a float lies below its exponent afterwards; the low half stays."""
    for item_size, value, expected in [
        (4, 0xBF801234, 0x7F011234),
        (2, 0xBF80, 0x7F01),
        (8, 0xBFF0 << 48 | 5, 0x7FE1 << 48 | 5),
    ]:
        turned = bytes(transform.forward(transform.ROTATED, value.to_bytes(item_size, "little"), None, item_size))
        assert int.from_bytes(turned, "little") == expected


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("dtype", ["f4", "f2", "f8", "bf16"])
def test_a_training_step_is_smaller_as_a_delta(core: ModuleType | None, dtype: str) -> None:
    """Weights one small step apart take clearly fewer bytes as a delta, and come back."""
    before, after = _training_step(dtype)
    item_size = {"f4": 4, "f2": 2, "f8": 8, "bf16": 2}[dtype]
    encoder = SmallestEncoder(core=core)
    alone = encoder.encode(memoryview(after), digest(after), item_size)
    delta = encoder.encode(memoryview(after), digest(after), item_size, (), Base(memoryview(before), digest(before), 0))
    assert delta.header.codec == segment.CODEC_DELTA
    assert delta.header.stored_size_bytes < 0.95 * alone.header.stored_size_bytes
    assert _back(delta, before) == after


def test_chains_of_deltas_are_bounded() -> None:
    """Snapshot after snapshot leans on the one before, at most MAX_DEPTH deep; then a chunk stands alone again."""
    encoder = SmallestEncoder()
    random = np.random.default_rng(2)
    weights = random.standard_normal(1 << 14).astype(np.float32)
    depths = []
    base: Base | None = None
    for _ in range(2 * segment.MAX_DEPTH + 4):
        weights = weights + np.float32(1e-5) * random.standard_normal(1 << 14).astype(np.float32)
        raw = weights.tobytes()
        chunk = encoder.encode(memoryview(raw), digest(raw), 4, (), base)
        segment.parse_record_header(chunk.header.pack(), "test")
        assert _back(chunk, bytes(base.raw) if base else None) == raw
        depths.append(chunk.header.depth)
        base = Base(memoryview(raw), digest(raw), chunk.header.depth)
    period = [*range(segment.MAX_DEPTH + 1)]
    assert depths == (period * 3)[: len(depths)]


@pytest.mark.parametrize("core", CORES)
def test_a_base_that_is_of_no_use_costs_nothing(core: ModuleType | None) -> None:
    """Unrelated bytes, another length, too deep, or the chunk itself: what comes out is what planes alone give."""
    before, after = _training_step()
    noise = np.random.default_rng(4).bytes(len(after))
    encoder = SmallestEncoder(core=core)
    alone = encoder.encode(memoryview(after), digest(after), 4)
    for base in [
        Base(memoryview(noise), digest(noise), 0),
        Base(memoryview(before)[:-4], digest(before[:-4]), 0),
        Base(memoryview(before), digest(before), segment.MAX_DEPTH),
        Base(memoryview(after), digest(after), 0),
    ]:
        assert encoder.encode(memoryview(after), digest(after), 4, (), base) == alone


@pytest.mark.parametrize("base", [None, b"", bytes(4), bytes((1 << 18) - 4), bytes((1 << 18) + 4)])
def test_a_delta_without_its_base_is_refused(base: bytes | None) -> None:
    """No base, or one of another length, is bad_base that names the chunk; nothing is written."""
    before, after = _training_step()
    chunk = encode_delta(
        memoryview(after), digest(after), 4, Base(memoryview(before), digest(before), 0), Effort(0, 0.08)
    )
    assert chunk is not None
    out = bytearray(b"#" * len(after))
    with pytest.raises(IntegrityError) as caught:
        decode(chunk.header, chunk.payload[0], memoryview(out), None if base is None else memoryview(base))
    assert (caught.value.kind, caught.value.where) == ("bad_base", digest(after).hex())
    assert set(out) == {ord("#")}


@pytest.mark.parametrize("core", CORES)
def test_bf16_values_stored_as_float32_cost_no_more_than_bf16(core: ModuleType | None) -> None:
    """Two planes of zeros cost next to nothing."""
    _, raw = _training_step("bf16")
    halves = np.frombuffer(raw, dtype=np.uint16)
    wide = (halves.astype(np.uint32) << 16).tobytes()
    encoder = SmallestEncoder(core=core)
    narrow_size = encoder.encode(memoryview(raw), digest(raw), 2).header.stored_size_bytes
    chunk = encoder.encode(memoryview(wide), digest(wide), 4)
    assert chunk.header.stored_size_bytes <= narrow_size + 100
    assert _back(chunk, None) == wide


@pytest.mark.parametrize("core", CORES)
def test_what_repeats_is_found(core: ModuleType | None) -> None:
    """Bytes that only matching can shrink, such as a repeated row of noise, are not left lying by "smallest"."""
    raw = np.random.default_rng(9).bytes(1000) * 300
    chunk = SmallestEncoder(core=core).encode(memoryview(raw), digest(raw), 1)
    assert chunk.header.stored_size_bytes < len(raw) / 20
    assert _back(chunk, None) == raw


def test_estimates_rank_transforms_as_encoding_does() -> None:
    """What is chosen by a sample is what gives fewest bytes."""
    core = native_core()
    if core is None:
        pytest.skip("the native core is not in use")
    before, after = _training_step()
    sizes = []
    estimates = []
    for how in (transform.XOR, transform.DIFFERENCE):
        directory, _ = core.encode_planes(after, before, 4, how, 0, 10)
        sizes.append(sum(stored for _, stored in directory))
        estimates.append(core.estimate_planes(after, before, 4, how, 10))
    assert np.argmin(sizes) == np.argmin(estimates)
    assert estimates == pytest.approx(sizes, rel=0.1)
    assert planes.usable(memoryview(after), digest(after), Base(memoryview(before), digest(before), 0))
