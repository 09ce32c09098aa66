"""The bytes as they are."""

from __future__ import annotations

from dataclasses import dataclass

from ciuic_async.codecs.base import Base, Kind
from ciuic_async.errors import UsageError
from ciuic_async.format import segment
from ciuic_async.format.digest import Buffer
from ciuic_async.format.segment import RecordHeader
from ciuic_async.handoffs import EncodedChunk


@dataclass(frozen=True, slots=True)
class RawCodec:
    """Stores a chunk unchanged; the payload is a view of ``raw``."""

    @property
    def name(self) -> str:
        return "raw"

    def encode(
        self, raw: memoryview, digest: bytes, item_size_bytes: int, kind: Kind = (), base: Base | None = None
    ) -> EncodedChunk:
        check_chunk(raw, item_size_bytes)
        header = RecordHeader(segment.CODEC_RAW, raw.nbytes, raw.nbytes, digest, item_size_bytes)
        return EncodedChunk(header, (raw,))

    def wants_base(self, kind: Kind, item_size_bytes: int) -> bool:
        return False

    def wrote(self, raw_bytes: int, stored_bytes: int, busy_s: float) -> None:
        """Nothing to learn."""


def check_chunk(raw: memoryview, item_size_bytes: int) -> None:
    """What every codec asks of its input.

    Raises:
        UsageError: kind ``bad_chunk``.
    """
    if item_size_bytes not in segment.ITEM_SIZES_BYTES or raw.nbytes % item_size_bytes:
        raise UsageError(
            f"a chunk of {raw.nbytes} bytes is no whole number of items of {item_size_bytes} bytes", kind="bad_chunk"
        )
    if raw.nbytes > segment.MAX_CHUNK_BYTES:
        raise UsageError(
            f"a chunk of {raw.nbytes} bytes, expected at most {segment.MAX_CHUNK_BYTES}; use smaller chunks",
            kind="bad_chunk",
        )


def decode(payload: Buffer, out: memoryview) -> None:
    """Raises ValueError when the lengths differ."""
    if len(payload) != len(out):
        raise ValueError(f"{len(payload)} raw bytes for {len(out)}")
    out[:] = payload
