"""BLAKE3-256, the digest of content."""

from __future__ import annotations

from typing import Protocol

from blake3 import blake3

Buffer = bytes | bytearray | memoryview

DIGEST_SIZE_BYTES = 32
ZERO_DIGEST = bytes(DIGEST_SIZE_BYTES)


class Hasher(Protocol):
    """An incremental digest; ``update`` releases the GIL for large buffers."""

    def update(self, data: Buffer, /) -> object: ...

    def digest(self) -> bytes: ...


def digest(data: Buffer) -> bytes:
    """BLAKE3-256 of ``data``: 32 bytes, what ``b3sum`` prints. Releases the GIL for large buffers."""
    return blake3(data).digest()


def hasher() -> Hasher:
    """A new incremental BLAKE3-256."""
    return blake3()
