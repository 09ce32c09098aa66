"""Locators: where the chunks of a snapshot lie (docs/format.md, section 4)."""

from __future__ import annotations

from dataclasses import dataclass, field

from ciuic_async.errors import IntegrityError
from ciuic_async.format import jsontext, layout
from ciuic_async.format.digest import DIGEST_SIZE_BYTES, digest
from ciuic_async.format.fields import Fields, check_array, check_hex, check_integer, malformed
from ciuic_async.format.segment import (
    ALIGNMENT_BYTES,
    CODEC_DELTA,
    FILE_HEADER_BYTES,
    MAX_CHUNK_BYTES,
    MAX_DEPTH,
    MAX_RECORD_HEADER_BYTES,
    RECORD_HEADER_BYTES,
    stored_limit_bytes,
)

SCHEMA = "ciuic.dev/locator/v1"
SCHEMA_WITH_BASES = "ciuic.dev/locator/v2"
LIMIT_BYTES = 256 << 20
HEAD_LIMIT_BYTES = 4 << 10
CHUNK_LIMIT_BYTES = 1536  # its row, those of a base at each of four depths, and a segment of its own for each of them


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
    """Location of every distinct chunk of a snapshot, in manifest order, and of what they are deltas to.

    ``bases`` has, by digest, the raw size and the location of every chunk that deltas need, directly or through other
    bases, and that the manifest does not name.
    """

    snapshot: str
    generation: int
    chunks: dict[bytes, ChunkLocation]
    bases: dict[bytes, tuple[int, ChunkLocation]] = field(default_factory=dict)

    def segments(self) -> list[SegmentReference]:
        """The distinct segments that reading needs, those of bases included, in order of first use."""
        own = (location.segment for location in self.chunks.values())
        of_bases = (self.bases[base][1].segment for base in sorted(self.bases))
        return list(dict.fromkeys([*own, *of_bases]))

    def place(self, chunk: bytes) -> ChunkLocation | None:
        """Where a chunk or a base lies."""
        return self.chunks.get(chunk) or self.bases.get(chunk, (0, None))[1]

    def encode(self) -> bytes:
        segments = self.segments()
        numbers = {segment: number for number, segment in enumerate(segments)}

        def row(place: ChunkLocation) -> list[jsontext.Json]:
            return [
                numbers[place.segment], place.offset_bytes, place.record_size_bytes, place.codec, place.depth,
            ]  # fmt: skip

        body: dict[str, jsontext.Json] = {
            "schema": SCHEMA_WITH_BASES if self.bases else SCHEMA,
            "snapshot": self.snapshot,
            "generation": self.generation,
            "segments": [[s.path, s.size_bytes, s.digest.hex()] for s in segments],
            "chunks": [row(place) for place in self.chunks.values()],
        }
        if self.bases:
            body["bases"] = [[base.hex(), size, *row(place)] for base, (size, place) in sorted(self.bases.items())]
        return jsontext.encode(body | {"digest": digest(jsontext.encode(body)).hex()})


def limit_bytes(chunks: int) -> int:
    """The most that a locator of so many distinct chunks can need.

    It is unsigned, so anybody who can write to the store could make it as large as readers allow; parsed JSON takes
    many times its size.
    """
    return min(LIMIT_BYTES, HEAD_LIMIT_BYTES + CHUNK_LIMIT_BYTES * chunks)


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
    value = jsontext.decode(data, what=what, limit_bytes=limit_bytes(len(distinct)))
    fields = Fields(value, what)
    with_bases = isinstance(value, dict) and value.get("schema") == SCHEMA_WITH_BASES
    fields.schema(SCHEMA_WITH_BASES if with_bases else SCHEMA)
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
    base_rows = fields.array("bases") if with_bases else []
    fields.done()
    chunks = {}
    for (chunk, raw_size), row in zip(distinct.items(), rows, strict=True):
        chunks[chunk] = _location(check_array(row, what), raw_size, segments, what)
    bases = _bases(base_rows, distinct, segments, what)
    if with_bases and not bases:
        raise malformed(what, "an empty list of bases")
    return Locator(snapshot, generation, chunks, bases)


def _bases(
    rows: list[jsontext.Json], distinct: dict[bytes, int], segments: list[SegmentReference], what: str
) -> dict[bytes, tuple[int, ChunkLocation]]:
    bases: dict[bytes, tuple[int, ChunkLocation]] = {}
    previous = b""
    for row in rows:
        row = check_array(row, what)
        if len(row) != 7:
            raise malformed(what, "a base row is not [digest, raw size, segment, offset, size, codec, depth]")
        base = check_hex(row[0], what, DIGEST_SIZE_BYTES)
        raw_size = check_integer(row[1], what)
        if base <= previous or base in distinct:
            raise malformed(what, "bases are not sorted by digest, or name a chunk of the manifest")
        if raw_size > MAX_CHUNK_BYTES:
            raise malformed(what, f"a base of {raw_size} bytes")
        previous = base
        bases[base] = (raw_size, _location(row[2:], raw_size, segments, what))
    return bases


def _location(
    row: list[jsontext.Json], raw_size_bytes: int, segments: list[SegmentReference], what: str
) -> ChunkLocation:
    """One checked row of five numbers."""
    numbers = [check_integer(item, what) for item in row]
    if len(numbers) != 5 or numbers[0] >= len(segments):
        raise malformed(what, "a row's place is not [segment, offset, size, codec, depth]")
    segment = segments[numbers[0]]
    if numbers[2] < RECORD_HEADER_BYTES or numbers[1] + numbers[2] > segment.size_bytes:
        raise malformed(what, f"a record at {numbers[1]} of {numbers[2]} bytes lies outside {segment.path}")
    if numbers[1] < FILE_HEADER_BYTES or numbers[1] % ALIGNMENT_BYTES:
        raise malformed(what, f"no record can start at byte {numbers[1]} of {segment.path}")
    if numbers[2] > MAX_RECORD_HEADER_BYTES + stored_limit_bytes(raw_size_bytes):
        raise malformed(what, f"a record of {numbers[2]} bytes for a chunk of {raw_size_bytes} bytes")
    if numbers[4] > MAX_DEPTH or (numbers[4] > 0) != (numbers[3] == CODEC_DELTA):
        raise malformed(what, f"a record of codec {numbers[3]} at depth {numbers[4]}")
    return ChunkLocation(segment, *numbers[1:])
