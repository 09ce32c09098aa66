"""What an encoder is: bytes of one chunk in, one record out. The way back is ``decode.decode``, the same for all.

An encoder may be called from several threads at once and releases the GIL while it works. Encoded bytes may differ
between the compiled core and plain Python; decoded bytes never do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ciuic_async.handoffs import EncodedChunk

Kind = tuple[str, ...]
"""What tells kinds of tensors apart: top-level name, last string of the path, whether it is a pack. Only compared."""


@dataclass(frozen=True, slots=True)
class Base:
    """The bytes that the same place had in the previous durable snapshot: a delta may be made to them.

    ``raw`` is only read; ``depth`` is that of the record in which ``digest`` is stored.
    """

    raw: memoryview
    digest: bytes
    depth: int


class ChunkEncoder(Protocol):
    """Turns the raw bytes of a chunk into a record."""

    @property
    def name(self) -> str: ...

    def encode(
        self, raw: memoryview, digest: bytes, item_size_bytes: int, kind: Kind = (), base: Base | None = None
    ) -> EncodedChunk:
        """Encode one chunk.

        Args:
            raw: its bytes; only read, and not kept beyond the returned value's life.
            digest: BLAKE3-256 of ``raw``.
            item_size_bytes: of the elements; ``len(raw)`` is a multiple.
            kind: what it is a piece of.
            base: what a delta may be made to; one of another length, of the same digest or too deep is passed over.
        """

    def wants_base(self, kind: Kind, item_size_bytes: int) -> bool:
        """Whether ``encode`` would look at a base: asked before one is fetched."""

    def wrote(self, raw_bytes: int, stored_bytes: int, busy_s: float) -> None:
        """Told after each snapshot that became durable.

        Args:
            raw_bytes: of the chunks that were encoded.
            stored_bytes: what the store took for them.
            busy_s: for how long the store was busy with that, waiting for chunks not counted.
        """
