"""A segment's bytes in plain Python: the executable specification that the writer must equal byte for byte."""

from __future__ import annotations

from collections.abc import Sequence

from ciuic_async.format import segment
from ciuic_async.format.digest import hasher
from ciuic_async.format.segment import IndexEntry
from ciuic_async.handoffs import EncodedChunk


def build_segment(snapshot: str, rank: int, number: int, chunks: Sequence[EncodedChunk]) -> bytes:
    """The whole file, in memory."""
    file = bytearray(segment.pack_file_header(snapshot, rank, number))
    whole = hasher()
    whole.update(file)
    entries = []
    for chunk in chunks:
        header = chunk.header
        offset = segment.record_offset(len(file), header.size_bytes, header.codec, header.raw_size_bytes)
        fixed = bytes(offset - len(file)) + header.pack()
        payload = b"".join(chunk.payload)
        file += fixed + payload
        whole.update(fixed)
        if not segment.leaves_out(segment.VERSION, header.codec):
            whole.update(payload)
        entries.append(index_entry(chunk, offset))
    tail = segment.pack_tail(len(file), entries)
    whole.update(tail)
    return bytes(file + tail + whole.digest())


def index_entry(chunk: EncodedChunk, offset_bytes: int) -> IndexEntry:
    """The index's line for a record at this offset."""
    header = chunk.header
    return IndexEntry(header.digest, offset_bytes, header.record_size_bytes, header.raw_size_bytes, header.codec)
