"""Locators: where the chunks of a snapshot lie (docs/format.md, section 4)."""

from __future__ import annotations

from dataclasses import dataclass

from ciuic_async.errors import IntegrityError
from ciuic_async.format import jsontext, layout
from ciuic_async.format.digest import DIGEST_SIZE_BYTES, digest
from ciuic_async.format.fields import Fields, check_array, check_hex, check_integer, malformed
from ciuic_async.format.segment import (
    ALIGNMENT_BYTES,
    FILE_HEADER_BYTES,
    MAX_RECORD_HEADER_BYTES,
    RECORD_HEADER_BYTES,
    stored_limit_bytes,
)

SCHEMA = "ciuic.dev/locator/v1"
LIMIT_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class SegmentReference:
    """A segment by name, exact size and the BLAKE3 at its end."""

    path: str
    size_bytes: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class ChunkLocation:
    """Where one chunk's record lies, header included."""

    segment: SegmentReference
    offset_bytes: int
    record_size_bytes: int
    codec: int
    depth: int = 0


@dataclass(frozen=True, slots=True)
class Locator:
    """Location of every distinct chunk of a snapshot, in manifest order."""

    snapshot: str
    generation: int
    chunks: dict[bytes, ChunkLocation]

    def segments(self) -> list[SegmentReference]:
        """The distinct segments, in order of first use."""
        return list(dict.fromkeys(location.segment for location in self.chunks.values()))

    def encode(self) -> bytes:
        segments = self.segments()
        numbers = {segment: number for number, segment in enumerate(segments)}
        body = {
            "schema": SCHEMA,
            "snapshot": self.snapshot,
            "generation": self.generation,
            "segments": [[s.path, s.size_bytes, s.digest.hex()] for s in segments],
            "chunks": [
                [numbers[c.segment], c.offset_bytes, c.record_size_bytes, c.codec, c.depth]
                for c in self.chunks.values()
            ],
        }
        return jsontext.encode(body | {"digest": digest(jsontext.encode(body)).hex()})


def decode(data: bytes, snapshot: str, generation: int, distinct: dict[bytes, int]) -> Locator:
    """Parse a locator.

    Args:
        data: the file.
        snapshot, generation: whose it must be.
        distinct: ``Manifest.distinct_chunks()``: the rows' order.

    Raises:
        IntegrityError: kind ``digest_mismatch``, ``malformed``, ``bad_name`` or one of ``jsontext.decode``.
    """
    what = layout.locator(snapshot, generation)
    value = jsontext.decode(data, what=what, limit_bytes=LIMIT_BYTES)
    fields = Fields(value, what)
    fields.schema(SCHEMA)
    claimed = fields.hex("digest", DIGEST_SIZE_BYTES)
    assert isinstance(value, dict)
    if digest(jsontext.encode({k: v for k, v in value.items() if k != "digest"})) != claimed:
        raise IntegrityError(f"{what}: does not match its own digest", kind="digest_mismatch", where=what)
    if fields.string("snapshot") != snapshot or fields.integer("generation") != generation:
        raise malformed(what, "locator of another snapshot or generation")
    segments = []
    for row in fields.array("segments"):
        row = check_array(row, what)
        if len(row) != 3 or not isinstance(row[0], str):
            raise malformed(what, "a segment row is not [path, size, digest]")
        path = layout.check_reference(row[0], layout.SEGMENTS, what)
        segment_digest = check_hex(row[2], what, DIGEST_SIZE_BYTES)
        segments.append(SegmentReference(path, check_integer(row[1], what), segment_digest))
    rows = fields.array("chunks")
    if len(rows) != len(distinct):
        raise malformed(what, f"{len(rows)} rows for {len(distinct)} distinct chunks")
    fields.done()
    chunks = {}
    for (chunk, raw_size), row in zip(distinct.items(), rows, strict=True):
        numbers = [check_integer(item, what) for item in check_array(row, what)]
        if len(numbers) != 5 or numbers[0] >= len(segments):
            raise malformed(what, "a chunk row is not [segment, offset, size, codec, depth]")
        segment = segments[numbers[0]]
        if numbers[2] < RECORD_HEADER_BYTES or numbers[1] + numbers[2] > segment.size_bytes:
            raise malformed(what, f"a record at {numbers[1]} of {numbers[2]} bytes lies outside {segment.path}")
        if numbers[1] < FILE_HEADER_BYTES or numbers[1] % ALIGNMENT_BYTES:
            raise malformed(what, f"no record can start at byte {numbers[1]} of {segment.path}")
        if numbers[2] > MAX_RECORD_HEADER_BYTES + stored_limit_bytes(raw_size):
            raise malformed(what, f"a record of {numbers[2]} bytes for a chunk of {raw_size} bytes")
        chunks[chunk] = ChunkLocation(segment, *numbers[1:])
    return Locator(snapshot, generation, chunks)
