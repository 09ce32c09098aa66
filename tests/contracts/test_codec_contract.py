"""What every encoder promises (ciuic_async/codecs/base.py), with the native core and without."""

from __future__ import annotations

import threading
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ciuic_async.codecs import planes, transform
from ciuic_async.codecs.auto import AutoEncoder
from ciuic_async.codecs.base import Base, ChunkEncoder
from ciuic_async.codecs.choose import encoder_for
from ciuic_async.codecs.decode import decode
from ciuic_async.codecs.planes import PlanesCodec, native_core
from ciuic_async.codecs.raw import RawCodec
from ciuic_async.codecs.smallest import SmallestEncoder
from ciuic_async.errors import UsageError
from ciuic_async.format import segment
from ciuic_async.format.digest import digest
from ciuic_async.handoffs import EncodedChunk

CORES = [pytest.param(None, id="plain")]
if native_core() is not None:
    CORES.append(pytest.param(native_core(), id="native"))
CODECS = [
    pytest.param(lambda: RawCodec(), id="raw"),
    pytest.param(lambda: AutoEncoder(), id="auto"),
    *(pytest.param(lambda core=core: PlanesCodec(core=core.values[0]), id=f"planes-{core.id}") for core in CORES),
    *(pytest.param(lambda core=core: SmallestEncoder(core=core.values[0]), id=f"smallest-{core.id}") for core in CORES),
]

_random = np.random.default_rng(7)
_weights = (_random.standard_normal(1 << 18) * 0.02).astype(np.float32)
CONTENTS = {
    "empty": (b"", 4),
    "one byte": (b"x", 1),
    "below the minimum": (bytes(508), 4),
    "the minimum": (bytes(512), 4),
    "zeros": (bytes(1 << 20), 8),
    "float32 weights": (_weights.tobytes(), 4),
    "bfloat16 weights": ((_weights.view(np.uint32) >> 16).astype(np.uint16).tobytes(), 2),
    "float64": (_weights.astype(np.float64).tobytes(), 8),
    "complex128": (_weights[: 1 << 14].astype(np.complex128).tobytes(), 16),
    "noise": (_random.bytes(1 << 20), 4),
    "text": (b"the quick brown fox " * 5000, 1),
    "odd length": (bytes(range(251)) * 99, 1),
    "only the last plane pays": (np.arange(1 << 18, dtype=np.uint32).tobytes(), 4),
}


@pytest.fixture(params=CODECS)
def codec(request: pytest.FixtureRequest) -> ChunkEncoder:
    encoder: ChunkEncoder = request.param()
    return encoder


@pytest.fixture(params=CORES)
def decoding_core(request: pytest.FixtureRequest) -> ModuleType | None:
    return request.param


def _encode(codec: ChunkEncoder, raw: bytes, item_size: int, old: bytes | None = None) -> EncodedChunk:
    base = None if old is None else Base(memoryview(old), digest(old), 0)
    return codec.encode(memoryview(raw), digest(raw), item_size, ("model", "weight"), base)


@pytest.mark.parametrize("content", CONTENTS)
def test_decodes_to_the_same_bytes_whatever_decodes(
    codec: ChunkEncoder, decoding_core: ModuleType | None, content: str
) -> None:
    """What one implementation encodes, every implementation decodes to the same bytes; the header passes its checks."""
    raw, item_size = CONTENTS[content]
    chunk = _encode(codec, raw, item_size)
    payload = b"".join(chunk.payload)
    header = segment.parse_record_header(chunk.header.pack() + payload, "test")
    assert header == chunk.header
    assert len(payload) == header.stored_size_bytes <= len(raw)
    out = bytearray(len(raw))
    if header.codec != segment.CODEC_RAW:
        planes.decode(header.planes, payload, memoryview(out), decoding_core, transform.of_record(header))
        assert out == raw
    out = bytearray(len(raw))
    decode(header, payload, memoryview(out))
    assert out == raw


@pytest.mark.parametrize("core", CORES)
@given(data=st.data())
def test_round_trip_of_anything(core: ModuleType | None, data: st.DataObject) -> None:
    """Any items of any size come back."""
    encoder = data.draw(st.sampled_from([PlanesCodec(core=core), SmallestEncoder(core=core)]))
    item_size = data.draw(st.sampled_from(segment.ITEM_SIZES_BYTES))
    item = data.draw(st.binary(min_size=item_size, max_size=item_size))
    noise = data.draw(st.binary(max_size=600))
    raw = item * data.draw(st.integers(0, 400)) + noise[: len(noise) // item_size * item_size]
    chunk = _encode(encoder, raw, item_size)
    out = bytearray(len(raw))
    decode(chunk.header, b"".join(chunk.payload), memoryview(out))
    assert out == raw


@pytest.mark.parametrize("content", ["empty", "below the minimum", "noise"])
def test_what_does_not_shrink_is_stored_as_it_is(codec: ChunkEncoder, content: str) -> None:
    """No gain, no cost: the payload is a view of the chunk and not a copy."""
    raw, item_size = CONTENTS[content]
    view = memoryview(raw)
    chunk = codec.encode(view, digest(raw), item_size)
    assert chunk.header.codec == segment.CODEC_RAW
    assert chunk.payload[0] is view


@pytest.mark.parametrize("core", CORES)
def test_weights_shrink(core: ModuleType | None) -> None:
    """The exponent plane of weights is compressed and their mantissa planes are not."""
    for content, raw_planes in (("float32 weights", 3), ("bfloat16 weights", 1)):
        raw, item_size = CONTENTS[content]
        header = _encode(PlanesCodec(core=core), raw, item_size).header
        methods = [method for method, _ in header.planes]
        assert methods == [segment.PLANE_RAW] * raw_planes + [segment.PLANE_ZSTD]
        assert header.stored_size_bytes < 0.9 * header.raw_size_bytes


def test_serves_several_threads(codec: ChunkEncoder) -> None:
    """One codec encodes in several threads at once, each chunk as if alone."""
    results: dict[int, bool] = {}

    def work(number: int) -> None:
        raw = (np.arange(1 << 16, dtype=np.uint32) * (number + 1)).tobytes()
        good = True
        for _ in range(5):
            chunk = _encode(codec, raw, 4)
            out = bytearray(len(raw))
            decode(chunk.header, b"".join(chunk.payload), memoryview(out))
            good = good and out == raw
        results[number] = good

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(4), True)


@pytest.mark.parametrize(
    ("raw", "item_size"), [(bytes(10), 4), (bytes(12), 3), (bytes(8), 0), (bytes((64 << 20) + 1), 1)]
)
def test_refuses_what_is_no_chunk(codec: ChunkEncoder, raw: bytes, item_size: int) -> None:
    """Broken items, unknown item sizes and more than 64 MiB are the caller's mistake."""
    with pytest.raises(UsageError) as caught:
        _encode(codec, raw, item_size)
    assert caught.value.kind == "bad_chunk"


def test_words_choose_encoders() -> None:
    """Users' words are the encoders' names; any other word is refused."""
    for name in ("auto", "smallest", "raw"):
        assert encoder_for(name).name == name
    with pytest.raises(UsageError) as caught:
        encoder_for("best")
    assert caught.value.kind == "unknown_codec"


@pytest.mark.parametrize("content", CONTENTS)
def test_with_a_base_the_chunk_comes_back_too(codec: ChunkEncoder, content: str) -> None:
    """Whatever is made of a base, the record passes its checks and decodes with that base; it is never larger."""
    raw, item_size = CONTENTS[content]
    old = bytes(byte ^ 1 if at % 97 == 0 else byte for at, byte in enumerate(raw))
    alone = _encode(codec, raw, item_size).header.stored_size_bytes
    chunk = _encode(codec, raw, item_size, old)
    payload = b"".join(chunk.payload)
    header = segment.parse_record_header(chunk.header.pack() + payload, "test")
    assert header.stored_size_bytes <= alone
    out = bytearray(len(raw))
    decode(header, payload, memoryview(out), memoryview(old))
    assert out == raw
    if header.codec == segment.CODEC_DELTA:
        assert (header.base, header.depth) == (digest(old), 1)


def test_only_those_who_want_bases_ask_for_them() -> None:
    """Fetching a base costs time: "raw" never asks, "smallest" always, "auto" not before it knows its store."""
    wants = {name: encoder_for(name).wants_base(("model", "weight"), 4) for name in ("raw", "smallest", "auto")}
    assert wants == {"raw": False, "smallest": True, "auto": False}
