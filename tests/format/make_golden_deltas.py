"""The recipe of ``golden/v1-deltas``: a segment with records of every codec, and the locator that leads to its bases.

``python tests/format/make_golden_deltas.py`` writes them; once, and never again. The arithmetic is written out here,
one item at a time, as docs/format.md has it: the package is not asked.
"""

from __future__ import annotations

from pathlib import Path

from ciuic_async.format import layout, segment
from ciuic_async.format.digest import digest
from ciuic_async.format.locator import ChunkLocation, Locator, SegmentReference

OLD = "0123456789abcdef0123"
NEW = "1123456789abcdef0123"
FOLDER = Path(__file__).parent / "golden" / "v1-deltas"

ITEM = 4
FIRST = [0x3F800000, 0xBF800001, 0x00000000, 0x80000000, 0xFFFFFFFF, 0x7F800000, 0x3E4CCCCD, 0x00000001]
SECOND = [0x3F800003, 0x3F800001, 0x80000000, 0x00000000, 0x00000000, 0xFF800000, 0x3E4CCCCC, 0x00010001]
THIRD = [0x3F7FFFFF, 0xBF800002, 0x00000001, 0x80000001, 0xFFFFFFFE, 0x7F800000, 0x3E4CCCCE, 0x80000001]
MASK = 0xFFFFFFFF


def to_bytes(items: list[int]) -> bytes:
    return b"".join(item.to_bytes(ITEM, "little") for item in items)


def planes(items: list[int]) -> bytes:
    """Byte 0 of every item, then byte 1, and so on."""
    return b"".join(to_bytes(items)[plane::ITEM] for plane in range(ITEM))


def rotate(item: int) -> int:
    return (item << 1 | item >> 31) & MASK


def difference(new: int, base: int) -> int:
    """Zigzag of the difference of the rotated items."""
    delta = (rotate(new) - rotate(base)) & MASK
    signed = delta - (1 << 32) if delta >> 31 else delta
    return 2 * signed if signed >= 0 else -2 * signed - 1


def turn_upper(item: int) -> int:
    """The upper 16 bits rotated left by one."""
    upper = item >> 16
    return ((upper << 1 | upper >> 15) & 0xFFFF) << 16 | item & 0xFFFF


CHUNKS = {"first": to_bytes(FIRST), "second": to_bytes(SECOND), "third": to_bytes(THIRD)}
DIGESTS = {name: digest(raw) for name, raw in CHUNKS.items()}
ROTATED = to_bytes([item ^ 0x01000000 for item in FIRST])


def records(snapshot: str) -> list[tuple[segment.RecordHeader, bytes]]:
    """Header and payload of every record of a snapshot's segment, in file order."""
    size = len(CHUNKS["first"])
    directory = ((segment.PLANE_RAW, size // ITEM),) * ITEM

    def header(
        codec: int, chunk: bytes, base: bytes = bytes(32), depth: int = 0, method: int = 0
    ) -> segment.RecordHeader:
        return segment.RecordHeader(codec, size, size, chunk, ITEM, directory, 0, base, depth, method)

    if snapshot == OLD:
        first = segment.RecordHeader(segment.CODEC_RAW, size, size, DIGESTS["first"], ITEM)
        second = header(segment.CODEC_DELTA, DIGESTS["second"], DIGESTS["first"], 1, segment.DELTA_XOR)
        exclusive = planes([new ^ old for new, old in zip(SECOND, FIRST, strict=True)])
        return [(first, CHUNKS["first"]), (second, exclusive)]
    third = header(segment.CODEC_DELTA, DIGESTS["third"], DIGESTS["second"], 2, segment.DELTA_DIFFERENCE)
    differences = planes([difference(new, old) for new, old in zip(THIRD, SECOND, strict=True)])
    items = [int.from_bytes(ROTATED[at : at + ITEM], "little") for at in range(0, size, ITEM)]
    turned = planes([turn_upper(item) for item in items])
    return [(third, differences), (header(segment.CODEC_ROTATED, digest(ROTATED)), turned)]


def segment_file(snapshot: str) -> tuple[bytes, dict[bytes, ChunkLocation]]:
    """The file, and where its records lie."""
    data = bytearray(segment.pack_file_header(snapshot, 0, 0, version=1))
    index = []
    depths = []
    for header, payload in records(snapshot):
        offset = segment.record_offset(len(data), header.size_bytes, header.codec, header.raw_size_bytes)
        data += bytes(offset - len(data)) + header.pack() + payload
        depths.append(header.depth)
        index.append(
            segment.IndexEntry(header.digest, offset, header.record_size_bytes, header.raw_size_bytes, header.codec)
        )
    data += segment.pack_tail(len(data), index)
    whole = bytes(data + digest(data))
    reference = SegmentReference(layout.segment(snapshot, 0, 0), len(whole), whole[-32:])
    places = {
        entry.digest: ChunkLocation(reference, entry.offset_bytes, entry.record_size_bytes, entry.codec, depth)
        for entry, depth in zip(index, depths, strict=True)
    }
    return whole, places


def distinct() -> dict[bytes, int]:
    """What the new snapshot's manifest would name, in its order."""
    return {DIGESTS["third"]: len(CHUNKS["third"]), digest(ROTATED): len(ROTATED)}


def locator() -> Locator:
    """Of the new snapshot: its chunks, and the old snapshot's that they are deltas to."""
    bases = {base: (len(CHUNKS["first"]), place) for base, place in segment_file(OLD)[1].items()}
    return Locator(NEW, 0, segment_file(NEW)[1], bases)


def files() -> dict[str, bytes]:
    """Every golden file by its name below ``golden/v1-deltas``."""
    return {
        layout.segment(OLD, 0, 0): segment_file(OLD)[0],
        layout.segment(NEW, 0, 0): segment_file(NEW)[0],
        layout.locator(NEW, 0): locator().encode(),
    }


if __name__ == "__main__":
    for name, data in files().items():
        (FOLDER / name).parent.mkdir(parents=True, exist_ok=True)
        (FOLDER / name).write_bytes(data)
