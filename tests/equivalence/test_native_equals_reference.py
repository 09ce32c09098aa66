"""The fast paths and the plain ones: segments are identical byte for byte, planes are the same planes."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ciuic_async import native
from ciuic_async.codecs import byteplane, planes, transform
from ciuic_async.codecs.planes import PlanesCodec
from ciuic_async.codecs.raw import RawCodec
from ciuic_async.format import layout, segment
from ciuic_async.format.digest import digest
from ciuic_async.handoffs import EncodedChunk
from ciuic_async.options import WriteOptions
from ciuic_async.segments.reference import build_segment
from ciuic_async.segments.whole import check_segment
from ciuic_async.segments.writer import SegmentWriter
from ciuic_async.stores.base import Store
from ciuic_async.stores.local import LocalStore
from ciuic_async.stores.memory import MemoryStore

SNAPSHOT = "0123456789abcdef0123"
MIB = 1 << 20


@st.composite
def chunks(draw: st.DrawFn) -> EncodedChunk:
    """Compressible or not, tiny or beyond the 1 MiB from which raw payloads are aligned for direct reads."""
    size = draw(st.one_of(st.integers(0, 5000), st.sampled_from([MIB - 1, MIB, MIB + 1, MIB + 4095])))
    seed = draw(st.integers(0, 255))
    if draw(st.booleans()):
        raw = bytes([seed]) * size
        return PlanesCodec().encode(memoryview(raw), digest(raw), 1)
    raw = bytes((seed + at * at) & 255 for at in range(61)) * (size // 61) + bytes(size % 61)
    return RawCodec().encode(memoryview(raw), digest(raw), 1)


def _written(store: Store, content: list[EncodedChunk], options: WriteOptions) -> dict[str, bytes]:
    """The published segments by name; each has passed the deep check."""
    store.initialize()
    writer = SegmentWriter(store, SNAPSHOT, 3, first_number=5, options=options)
    try:
        for chunk in content:
            writer.append(chunk)
        finished = writer.finish()
        store.publish(finished.files)
    finally:
        writer.abort()
    for reference in {location.segment for location in finished.locations.values()}:
        assert check_segment(store, reference)
    return {listed.name: store.read(listed.name, 1 << 30) for listed in store.list(layout.SEGMENTS)}


@settings(max_examples=40)
@given(content=st.lists(chunks(), min_size=1, max_size=8), buffer_pages=st.sampled_from([1, 3, 256]))
def test_written_file_equals_the_reference(content: list[EncodedChunk], buffer_pages: int) -> None:
    """The native writer's file, the plain writer's and the executable specification are the same bytes."""
    name = layout.segment(SNAPSHOT, 3, 5)
    expected = {name: build_segment(SNAPSHOT, 3, 5, content)}
    options = WriteOptions(buffer_size_bytes=buffer_pages * 4096, queue_depth=2)
    with tempfile.TemporaryDirectory() as folder:
        assert _written(LocalStore(Path(folder) / "default"), content, options) == expected
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "core", None)
            assert _written(LocalStore(Path(folder) / "plain"), content, options) == expected
    assert _written(MemoryStore(), content, options) == expected


@given(content=st.lists(chunks(), min_size=2, max_size=8))
@settings(max_examples=20)
def test_rolling_writes_the_reference_of_each_part(content: list[EncodedChunk]) -> None:
    """Several segments are the references of consecutive runs of chunks, numbered one after the other."""
    files = _written(MemoryStore(), content, WriteOptions(segment_size_bytes=20_000))
    rest = list(content)
    for number, name in enumerate(sorted(files, key=len), start=5):
        assert name == layout.segment(SNAPSHOT, 3, number)
        for count in range(1, len(rest) + 1):
            if build_segment(SNAPSHOT, 3, number, rest[:count]) == files[name]:
                rest = rest[count:]
                break
        else:
            pytest.fail(f"{name} is no run of the chunks that are left")
    assert not rest


@pytest.mark.skipif(native.core is None, reason="the native core is not in use")
@given(data=st.binary(max_size=3000), item_size=st.sampled_from([1, 2, 4, 8, 16]))
def test_planes_equal_those_of_numpy(data: bytes, item_size: int) -> None:
    """split and merge of the core and of plain Python give the same bytes."""
    assert native.core is not None
    items = data[: len(data) // item_size * item_size]
    split = bytearray(len(items))
    native.core.split_planes(items, split, item_size)
    pieces = byteplane.split_planes(items, item_size)
    assert b"".join(pieces) == bytes(split)
    out = bytearray(len(items))
    byteplane.merge_planes(list(pieces), memoryview(out))
    assert out == items


@pytest.mark.skipif(native.core is None, reason="the native core is not in use")
@given(data=st.data(), item_size=st.sampled_from([1, 2, 4, 8, 16]), how=st.sampled_from([0, 1, 2, 3]))
def test_transformed_planes_equal_those_of_numpy(data: st.DataObject, item_size: int, how: int) -> None:
    """Transforms of the core and of plain Python give the same bytes, vector loops and their tails alike."""
    assert native.core is not None
    if how in (transform.DIFFERENCE, transform.ROTATED) and item_size not in segment.WORD_SIZES_BYTES:
        return
    count = data.draw(st.one_of(st.integers(0, 200), st.sampled_from([2047, 2048, 2049, 5000])))
    random = np.random.default_rng(data.draw(st.integers(0, 1 << 32)))
    raw = random.bytes(count * item_size)
    base = random.bytes(count * item_size) if how in (transform.XOR, transform.DIFFERENCE) else None
    expected = [bytes(p) for p in byteplane.split_planes(transform.forward(how, raw, base, item_size), item_size)]
    out = bytearray(len(raw))
    native.core.decode_planes(b"".join(expected), [(0, count)] * item_size, base, how, out)
    assert out == raw  # the core's way back from numpy's way there
    zeros = bytes(len(raw))
    encoded = native.core.encode_planes(zeros, None if base is None else base, item_size, how, 0, 0)
    if encoded is None:
        return
    directory, payload = encoded
    plain = bytearray(len(raw))
    planes.decode(tuple(directory), payload, memoryview(plain), None, how, None if base is None else memoryview(base))
    assert plain == zeros  # and numpy's way back from the core's way there
