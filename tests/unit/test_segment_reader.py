"""SegmentReader and the checks of whole segments, on files that are as they should be, or a little damaged."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from ciuic_async.codecs.planes import PlanesCodec
from ciuic_async.codecs.raw import RawCodec
from ciuic_async.errors import IntegrityError
from ciuic_async.format import layout, segment
from ciuic_async.format.digest import digest
from ciuic_async.format.locator import ChunkLocation, Locator
from ciuic_async.format.segment import RecordHeader
from ciuic_async.handoffs import EncodedChunk
from ciuic_async.pipeline.chunks import chunk_reader
from ciuic_async.segments.reader import SegmentReader
from ciuic_async.segments.whole import check_segment, scan_segment
from ciuic_async.segments.writer import SegmentWriter
from ciuic_async.stores.memory import MemoryStore

SNAPSHOT = "0123456789abcdef0123"
PATH = layout.segment(SNAPSHOT, 0, 0)
CONTENTS = [
    b"small",
    bytes((1 << 20) + 5),
    (np.random.default_rng(1).standard_normal(1 << 16) * 0.02).astype(np.float32).tobytes(),
    np.random.default_rng(2).bytes(1 << 20),
    b"",
]


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def locations(store: MemoryStore) -> dict[bytes, ChunkLocation]:
    """One published segment with raw and compressed records."""
    writer = SegmentWriter(store, SNAPSHOT)
    for number, raw in enumerate(CONTENTS):
        codec = RawCodec() if number == 3 else PlanesCodec()
        writer.append(codec.encode(memoryview(raw), digest(raw), 4 if len(raw) % 4 == 0 else 1))
    finished = writer.finish()
    store.publish(finished.files)
    codecs = {location.codec for location in finished.locations.values()}
    assert segment.CODEC_RAW in codecs
    assert len(codecs) > 1
    return finished.locations


def _change(store: MemoryStore, at: int, new: bytes) -> None:
    content = bytearray(store.read(PATH, 1 << 30))
    content[at : at + len(new)] = new
    store.overwrite(PATH, content)


def test_reads_every_chunk(store: MemoryStore, locations: dict[bytes, ChunkLocation]) -> None:
    """Any order, any codec, large after small: the bytes are the chunk's."""
    reader = chunk_reader(store)
    for raw in [*CONTENTS, *reversed(CONTENTS)]:
        assert reader.read_chunk(digest(raw), len(raw), locations[digest(raw)]) == raw


def test_view_is_valid_until_the_next_call_of_its_thread(
    store: MemoryStore, locations: dict[bytes, ChunkLocation]
) -> None:
    """Other threads' calls leave it alone: every thread has buffers of its own."""
    reader = chunk_reader(store)
    mine = reader.read_chunk(digest(CONTENTS[2]), len(CONTENTS[2]), locations[digest(CONTENTS[2])])
    wrong: list[int] = []

    def read_others() -> None:
        for _ in range(5):
            for number, raw in enumerate(CONTENTS):
                if reader.read_chunk(digest(raw), len(raw), locations[digest(raw)]) != raw:
                    wrong.append(number)

    threads = [threading.Thread(target=read_others) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert mine == CONTENTS[2]


def test_flipped_bit_is_a_digest_mismatch_unless_told_otherwise(
    store: MemoryStore, locations: dict[bytes, ChunkLocation]
) -> None:
    """The chunk's digest finds what nothing else can; verify=False is the user's explicit word."""
    raw = CONTENTS[3]
    location = locations[digest(raw)]
    end = location.offset_bytes + location.record_size_bytes
    _change(store, end - 1, bytes([raw[-1] ^ 1]))
    with pytest.raises(IntegrityError) as caught:
        chunk_reader(store).read_chunk(digest(raw), len(raw), location)
    assert (caught.value.kind, caught.value.where) == ("digest_mismatch", PATH)
    changed = chunk_reader(store, verify=False).read_chunk(digest(raw), len(raw), location)
    assert changed[:-1] == raw[:-1]


def test_missing_segment_is_damage(store: MemoryStore, locations: dict[bytes, ChunkLocation]) -> None:
    """A locator's segment that is not there is an IntegrityError, so that an older snapshot can serve."""
    store.delete(PATH)
    (reference,) = {location.segment for location in locations.values()}
    for call in (
        lambda: chunk_reader(store).read_chunk(digest(b"small"), 5, locations[digest(b"small")]),
        lambda: check_segment(store, reference),
        lambda: scan_segment(store, PATH),
    ):
        with pytest.raises(IntegrityError) as caught:
            call()
        assert (caught.value.kind, caught.value.where) == ("missing", PATH)


def test_wrong_locations_are_refused(store: MemoryStore, locations: dict[bytes, ChunkLocation]) -> None:
    """Nobody signs a locator: whatever it says, wrong bytes are never returned, and no huge buffer is made."""
    raw = CONTENTS[2]
    right = locations[digest(raw)]
    reader = chunk_reader(store)
    for wrong in (
        locations[digest(CONTENTS[0])],
        replace(right, offset_bytes=right.offset_bytes + 64),
        replace(right, offset_bytes=1 << 60),
        replace(right, record_size_bytes=right.record_size_bytes - 1),
        replace(right, record_size_bytes=right.record_size_bytes + 1),
        replace(right, record_size_bytes=1 << 60),
        replace(right, record_size_bytes=0),
        replace(right, codec=segment.CODEC_RAW),
        replace(right, depth=1),
    ):
        with pytest.raises(IntegrityError) as caught:
            reader.read_chunk(digest(raw), len(raw), wrong)
        assert caught.value.where == PATH
        assert caught.value.kind in ("wrong_record", "bad_segment", "checksum_mismatch", "truncated")
    for digest_, size in ((digest(b"other"), len(raw)), (digest(raw), len(raw) - 4), (digest(raw), 1 << 40)):
        with pytest.raises(IntegrityError) as caught:
            reader.read_chunk(digest_, size, right)
        assert caught.value.kind == "wrong_record"


def test_check_returns_the_index(store: MemoryStore, locations: dict[bytes, ChunkLocation]) -> None:
    """A whole segment passes, and its index says what the writer said."""
    (reference,) = {location.segment for location in locations.values()}
    entries = check_segment(store, reference)
    assert {entry.digest: (entry.offset_bytes, entry.record_size_bytes, entry.codec) for entry in entries} == {
        chunk: (location.offset_bytes, location.record_size_bytes, location.codec)
        for chunk, location in locations.items()
    }


def test_scan_finds_every_record(store: MemoryStore, locations: dict[bytes, ChunkLocation]) -> None:
    """Without the index: the same records at the same offsets, also when the end of the file is gone."""
    expected = {(chunk, location.offset_bytes) for chunk, location in locations.items()}
    assert {(header.digest, offset) for header, offset in scan_segment(store, PATH)} == expected
    end = max(location.offset_bytes + location.record_size_bytes for location in locations.values())
    store.overwrite(PATH, store.read(PATH, 1 << 30)[:end])
    assert {(header.digest, offset) for header, offset in scan_segment(store, PATH)} == expected


@pytest.mark.parametrize("damaged", range(len(CONTENTS)))
def test_scan_goes_on_behind_damage(store: MemoryStore, locations: dict[bytes, ChunkLocation], damaged: int) -> None:
    """One broken header hides one record and no other."""
    lost = digest(CONTENTS[damaged])
    _change(store, locations[lost].offset_bytes + 10, b"\xff")
    found = {header.digest for header, _ in scan_segment(store, PATH)}
    assert found == set(locations) - {lost}


# --- deltas -----------------------------------------------------------------------------------------------------------

VERSIONS = [np.random.default_rng(number).bytes(10_000) for number in range(segment.MAX_DEPTH + 1)]
"""Each is stored as what changed since the one before."""


def _delta(raw: bytes, base: bytes, depth: int) -> EncodedChunk:
    changed = (np.frombuffer(raw, np.uint8) ^ np.frombuffer(base, np.uint8)).tobytes()
    planes = ((segment.PLANE_RAW, len(raw)),)
    header = RecordHeader(
        segment.CODEC_DELTA, len(raw), len(raw), digest(raw), 1, planes, 0, digest(base), depth, segment.DELTA_XOR
    )
    return EncodedChunk(header, (changed,))


@pytest.fixture
def versions(store: MemoryStore) -> dict[bytes, ChunkLocation]:
    """A chunk as it is, and ``MAX_DEPTH`` deltas on top of each other; where their records lie."""
    writer = SegmentWriter(store, SNAPSHOT)
    writer.append(RawCodec().encode(memoryview(VERSIONS[0]), digest(VERSIONS[0]), 1))
    for depth in range(1, len(VERSIONS)):
        writer.append(_delta(VERSIONS[depth], VERSIONS[depth - 1], depth))
    finished = writer.finish()
    store.publish(finished.files)
    return {digest(raw): replace(finished.locations[digest(raw)], depth=depth) for depth, raw in enumerate(VERSIONS)}


def _reader(
    store: MemoryStore, chunks: Mapping[bytes, ChunkLocation], bases: Mapping[bytes, ChunkLocation]
) -> SegmentReader:
    sizes = dict.fromkeys(chunks, len(VERSIONS[0]))
    beside = {chunk: (len(VERSIONS[0]), place) for chunk, place in bases.items()}
    return chunk_reader(store, where=Locator(SNAPSHOT, 0, dict(chunks), beside), sizes=sizes)


@pytest.mark.parametrize("depth", range(len(VERSIONS)))
@pytest.mark.parametrize("whose", ["the snapshot's own", "beside it"])
def test_deltas_are_followed_to_their_base(
    store: MemoryStore, versions: dict[bytes, ChunkLocation], depth: int, whose: str
) -> None:
    """A chunk of any depth comes back whole, whether its bases are chunks of the snapshot or only there for it."""
    wanted = digest(VERSIONS[depth])
    below = {chunk: place for chunk, place in versions.items() if chunk != wanted}
    own = versions if whose == "the snapshot's own" else {wanted: versions[wanted]}
    with _reader(store, own, {} if own is versions else below) as reader:
        for _ in range(2):
            assert reader.read_chunk(wanted, len(VERSIONS[depth]), versions[wanted]) == VERSIONS[depth]


def test_base_that_nobody_knows_is_missing(store: MemoryStore, versions: dict[bytes, ChunkLocation]) -> None:
    """A delta without a place for its base is an error of its own kind, at every level and without any locator."""
    for missing in (0, 1):
        known = {chunk: place for chunk, place in versions.items() if chunk != digest(VERSIONS[missing])}
        for reader in (_reader(store, {}, known), chunk_reader(store)):
            with pytest.raises(IntegrityError) as caught:
                reader.read_chunk(digest(VERSIONS[2]), len(VERSIONS[2]), versions[digest(VERSIONS[2])])
            assert (caught.value.kind, caught.value.where) == ("missing_base", PATH)


@pytest.mark.parametrize("stand_in", [1, 2, 3])
def test_depths_fall_one_by_one(store: MemoryStore, versions: dict[bytes, ChunkLocation], stand_in: int) -> None:
    """A base of another depth than one less is refused: what a locator says can never become a circle."""
    known = {**versions, digest(VERSIONS[1]): versions[digest(VERSIONS[stand_in])]}
    known[digest(VERSIONS[1])] = replace(known[digest(VERSIONS[1])], depth=max(stand_in, 2))
    with pytest.raises(IntegrityError) as caught:
        _reader(store, {}, known).read_chunk(digest(VERSIONS[2]), len(VERSIONS[2]), versions[digest(VERSIONS[2])])
    assert (caught.value.kind, caught.value.where) == ("bad_base", PATH)


@pytest.mark.parametrize("depth", range(3))
def test_damage_below_a_delta_is_found_and_told_where_it_is(
    store: MemoryStore, versions: dict[bytes, ChunkLocation], depth: int
) -> None:
    """One bit at any level makes the chunk on top an error that names the damaged record, and never wrong bytes."""
    damaged = versions[digest(VERSIONS[depth])]
    _change(store, damaged.offset_bytes + damaged.record_size_bytes - 1, b"\x00")
    _change(store, damaged.offset_bytes + damaged.record_size_bytes - 2, b"\x00")
    with pytest.raises(IntegrityError, match=f"record at {damaged.offset_bytes}: ") as caught:
        _reader(store, {}, versions).read_chunk(digest(VERSIONS[2]), len(VERSIONS[2]), versions[digest(VERSIONS[2])])
    assert caught.value.kind == "digest_mismatch"


def test_base_of_another_length_is_refused(store: MemoryStore, versions: dict[bytes, ChunkLocation]) -> None:
    """What a locator says of a base's size is held against the base's own record."""
    places = {chunk: (len(VERSIONS[0]) - 1, place) for chunk, place in versions.items()}
    reader = chunk_reader(store, where=Locator(SNAPSHOT, 0, {}, places))
    with pytest.raises(IntegrityError) as caught:
        reader.read_chunk(digest(VERSIONS[1]), len(VERSIONS[1]), versions[digest(VERSIONS[1])])
    assert caught.value.kind == "wrong_record"
