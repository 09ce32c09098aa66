"""Golden bytes: today's code writes version 1 as it was, and reads it; no single byte of it is without meaning."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rfc8785

from ciuic_async.errors import CiuicError, FormatVersionError, IntegrityError
from ciuic_async.format import entry, jsontext, layout, manifest, segment
from ciuic_async.format import locator as locators
from ciuic_async.format.chain_file import ChainFile
from ciuic_async.format.digest import digest
from ciuic_async.format.locator import SegmentReference
from ciuic_async.segments.whole import check_segment
from ciuic_async.stores.memory import MemoryStore

HERE = Path(__file__).parent
RECIPE = runpy.run_path(str(HERE / "make_golden.py"))
GOLDEN = HERE / "golden" / "v1"
SNAPSHOT: str = RECIPE["SNAPSHOT"]
SEGMENT = layout.segment(SNAPSHOT, 0, 0)
ENTRY_KINDS = ("key", "note", "prune", "rollback", "snapshot", "tag")


def golden(name: str) -> bytes:
    return (GOLDEN / name).read_bytes()


def golden_root() -> manifest.ManifestRoot:
    return manifest.decode_root(golden(layout.manifest_root(SNAPSHOT)), SNAPSHOT)


def read_locator(data: bytes) -> locators.Locator:
    return locators.decode(data, SNAPSHOT, 0, RECIPE["snapshot_manifest"]().distinct_chunks())


def read_segment(data: bytes) -> tuple[object, ...]:
    """Every structure of a segment, parsed."""
    header = segment.parse_file_header(data[: segment.FILE_HEADER_BYTES], SEGMENT)
    trailer = segment.parse_trailer(data[-segment.TRAILER_BYTES :], len(data), SEGMENT)
    index = segment.parse_index(data[trailer.index_offset_bytes : -segment.TRAILER_BYTES], trailer, SEGMENT)
    headers = [segment.parse_record_header(data[e.offset_bytes : e.offset_bytes + 256], SEGMENT) for e in index]
    return header, trailer, tuple(index), tuple(headers)


READERS: dict[str, Callable[[bytes], Any]] = {
    layout.CHAIN_FILE: ChainFile.decode,
    layout.manifest_root(SNAPSHOT): lambda data: manifest.decode_root(data, SNAPSHOT),
    layout.manifest_part(SNAPSHOT, 0): lambda data: manifest.assemble(golden_root(), [data]),
    layout.locator(SNAPSHOT, 0): read_locator,
    SEGMENT: read_segment,
} | {f"entries/{kind}.json": lambda data: entry.decode(data, 5) for kind in ENTRY_KINDS}


def test_every_golden_file_is_made_and_read() -> None:
    """The recipe, the readers and the folder name the same files."""
    on_disk = {str(path.relative_to(GOLDEN)) for path in GOLDEN.rglob("*") if path.is_file()}
    assert on_disk == set(RECIPE["files"]()) == set(READERS)


@pytest.mark.parametrize("name", sorted(READERS))
def test_todays_code_writes_the_golden_bytes(name: str) -> None:
    """From the same inputs come the same bytes as in version 1."""
    assert RECIPE["files"]()[name] == golden(name)


def test_golden_files_mean_what_was_put_in() -> None:
    """Reading the golden files gives back the recipe's inputs."""
    assert READERS[layout.CHAIN_FILE](golden(layout.CHAIN_FILE)) == RECIPE["chain_file"]()
    root = golden_root()
    assert manifest.assemble(root, [golden(layout.manifest_part(SNAPSHOT, 0))]) == RECIPE["snapshot_manifest"]()
    assert read_locator(golden(layout.locator(SNAPSHOT, 0))) == RECIPE["locator"]()
    header, trailer, index, headers = read_segment(golden(SEGMENT))
    assert header == (SNAPSHOT, 0, 0, 1)
    assert index == tuple(RECIPE["segment_file"]()[1])
    assert headers == tuple(made for made, _ in RECIPE["records"]())
    assert isinstance(trailer, segment.Trailer)
    assert trailer.digest == digest(golden(SEGMENT)[:-32])
    for kind in ENTRY_KINDS:
        assert entry.kind_of(entry.decode(golden(f"entries/{kind}.json"), 0)) == kind


def test_segments_of_version_2_are_written_and_read() -> None:
    """The same records in a segment of version 2: its digest leaves raw payloads out, and the check passes for both."""
    written, _ = RECIPE["segment_file"](2)
    assert written == (HERE / "golden" / "v2" / SEGMENT).read_bytes()
    assert written[:8] + written[9:-32] == golden(SEGMENT)[:8] + golden(SEGMENT)[9:-32]  # but for version and digest
    for data in (written, golden(SEGMENT)):
        store = MemoryStore()
        store.create(SEGMENT, data)
        assert len(check_segment(store, SegmentReference(SEGMENT, len(data), data[-32:]))) == 4
        other = data[:8] + bytes([3 - data[8]]) + data[9:]
        store = MemoryStore()
        store.create(SEGMENT, other)
        with pytest.raises(IntegrityError) as caught:  # the rules of the other version do not fit
            check_segment(store, SegmentReference(SEGMENT, len(other), other[-32:]))
        assert caught.value.kind == "digest_mismatch"


def test_the_golden_locator_leads_to_the_chunks() -> None:
    """Following manifest, locator and segment by hand gives bytes with the digests that the manifest names."""
    data = golden(SEGMENT)
    found = read_locator(golden(layout.locator(SNAPSHOT, 0)))
    for chunk, size in RECIPE["snapshot_manifest"]().chunks():
        place = found.chunks[chunk]
        record = data[place.offset_bytes : place.offset_bytes + place.record_size_bytes]
        header = segment.parse_record_header(record, SEGMENT)
        payload = record[header.size_bytes :]
        if header.codec == segment.CODEC_PLANES:
            count = header.item_size_bytes
            payload = b"".join(payload[n :: len(payload) // count] for n in range(len(payload) // count))
        assert (digest(payload), len(payload)) == (chunk, size)


@pytest.mark.parametrize("kind", ENTRY_KINDS)
def test_entries_are_rfc_8785(kind: str) -> None:
    """An independent implementation of RFC 8785 writes the same bytes of every kind of entry."""
    data = golden(f"entries/{kind}.json")
    assert rfc8785.dumps(jsontext.decode(data, what="entry", limit_bytes=65535)) == data


@pytest.mark.parametrize("name", sorted(set(READERS) - {SEGMENT}))
def test_every_changed_byte_of_a_json_file_is_seen(name: str) -> None:
    """Any one byte changed (its lowest bit, its highest bit, or to a blank) is refused or changes what is read."""
    data = golden(name)
    before = READERS[name](data)
    for at in range(len(data)):
        for value in {data[at] ^ 1, data[at] ^ 0x80, 0x20} - {data[at]}:
            changed = data[:at] + bytes([value]) + data[at + 1 :]
            try:
                after = READERS[name](changed)
            except (IntegrityError, FormatVersionError):
                continue
            assert after != before, f"byte {at} of {name} means nothing"


def test_every_changed_byte_of_a_locator_is_refused() -> None:
    """A locator is covered by its own digest: every changed byte is refused."""
    data = golden(layout.locator(SNAPSHOT, 0))
    for at in range(len(data)):
        with pytest.raises((IntegrityError, FormatVersionError)):
            read_locator(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])


def test_every_changed_byte_of_a_segments_structures_is_seen() -> None:
    """Headers, directory, index, padding behind it and trailer: a changed byte is refused or changes what is parsed.

    Payloads, and zeros between records, are covered by the chunk digests and the digest at the end.
    """
    data = golden(SEGMENT)
    before = read_segment(data)
    _, index = RECIPE["segment_file"]()
    payloads = set()
    for place, (header, payload) in zip(index, RECIPE["records"](), strict=True):
        start = place.offset_bytes + header.size_bytes
        payloads |= set(range(start, segment.align_up(start + len(payload), 64)))
    for at in set(range(len(data))) - payloads:
        changed = bytearray(data)
        changed[at] ^= 1
        try:
            after = read_segment(bytes(changed))
        except (IntegrityError, FormatVersionError):
            continue
        assert after != before, f"byte {at} means nothing"
        assert digest(changed[:-32]) != changed[-32:]


@pytest.mark.parametrize("name", sorted(READERS))
def test_every_truncation_is_refused(name: str) -> None:
    """A file cut off anywhere, or followed by anything, is refused with a typed error."""
    data = golden(name)
    for size in {*range(0, len(data), max(1, len(data) // 200)), len(data) - 1}:
        with pytest.raises(CiuicError):
            READERS[name](data[:size])
    for tail in (b"\n", b"\0", b"{}", bytes(4096)):
        with pytest.raises(CiuicError):
            READERS[name](data + tail)
