"""zstd frames through the ``zstandard`` package, for where the native core or libzstd.so.1 is missing."""

from __future__ import annotations

import threading

import zstandard

from ciuic_async.format.digest import Buffer

_MAGIC = b"\x28\xb5\x2f\xfd"  # neither skippable frames nor old formats


class _PerThread(threading.local):
    """Contexts, which may serve one thread at a time."""

    def __init__(self) -> None:
        self.compressors: dict[int, zstandard.ZstdCompressor] = {}
        self.decompressor = zstandard.ZstdDecompressor()


_mine = _PerThread()


def compress(data: Buffer, level: int) -> bytes:
    """One frame that says how long its content is."""
    compressor = _mine.compressors.get(level)
    if compressor is None:
        compressor = _mine.compressors[level] = zstandard.ZstdCompressor(level=level, write_content_size=True)
    return compressor.compress(data)


def decompress(frame: Buffer, size_bytes: int) -> bytes:
    """The content of exactly one whole frame of exactly this length; ``frame`` is hostile.

    Raises:
        ValueError: it is anything else. What the frame claims is checked before memory is allocated.
    """
    if bytes(frame[:4]) != _MAGIC:
        raise ValueError("does not start with a zstd frame")
    try:
        if zstandard.frame_content_size(frame) != size_bytes:
            raise ValueError(f"does not say that it has {size_bytes} bytes")
        content = _mine.decompressor.decompress(frame, max_output_size=size_bytes, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"is not exactly one whole frame: {error}") from error
    if len(content) != size_bytes:
        raise ValueError(f"decodes to {len(content)} bytes, expected {size_bytes}")
    return content
