"""What a codec is: bytes of one chunk in, one record out, and back.

A codec is a small frozen value. It may be called from several threads at once and releases the GIL while it works.
Encoded bytes may differ between the compiled core and plain Python; decoded bytes never do.
"""

from __future__ import annotations

from typing import Protocol

from ciuic_async.handoffs import EncodedChunk


class Codec(Protocol):
    """Turns the raw bytes of a chunk into a record."""

    name: str

    def encode(self, raw: memoryview, digest: bytes, item_size_bytes: int) -> EncodedChunk:
        """Encode one chunk.

        Args:
            raw: its bytes; only read, and not kept beyond the returned value's life.
            digest: BLAKE3-256 of ``raw``.
            item_size_bytes: of the elements; ``len(raw)`` is a multiple.
        """
