"""What is done to items before they are split into planes, in plain Python (docs/format.md, section 5).

The numbers are the native core's; ``csrc/planes.cpp`` does the same, fused with splitting and merging.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ciuic_async.format import segment
from ciuic_async.format.digest import Buffer
from ciuic_async.format.segment import RecordHeader

NONE = 0
XOR = segment.DELTA_XOR
DIFFERENCE = segment.DELTA_DIFFERENCE
ROTATED = 3

Words = np.ndarray[Any, np.dtype[Any]]


def of_record(header: RecordHeader) -> int:
    """Which transform the payload of a record other than a raw one has gone through."""
    if header.codec == segment.CODEC_DELTA:
        return header.method
    return ROTATED if header.codec == segment.CODEC_ROTATED else NONE


def forward(transform: int, raw: Buffer, base: Buffer | None, item_size_bytes: int) -> Buffer:
    """The transformed items: ``raw`` itself for ``NONE``, else a new array of bytes."""
    if transform == NONE:
        return raw
    words = _words(raw, item_size_bytes)
    if transform == ROTATED:
        return _bytes(_turn_upper(words, left=True))
    assert base is not None
    if transform == XOR:
        return _bytes(words ^ _words(base, item_size_bytes))
    one, top = _constants(words)
    difference = _rotate_left(words) - _rotate_left(_words(base, item_size_bytes))  # modulo 2^k
    return _bytes((difference << one) ^ (0 - (difference >> top)).astype(words.dtype))


def back(transform: int, items: memoryview, base: Buffer | None, item_size_bytes: int) -> None:
    """The exact inverse, in place."""
    if transform == NONE:
        return
    words = _words(items, item_size_bytes)
    if transform == ROTATED:
        words[:] = _turn_upper(words, left=False)
        return
    assert base is not None
    if transform == XOR:
        words ^= _words(base, item_size_bytes)
        return
    one, top = _constants(words)
    difference = (words >> one) ^ (0 - (words & one)).astype(words.dtype)
    rotated = _rotate_left(_words(base, item_size_bytes)) + difference
    words[:] = (rotated >> one) | (rotated << top)


def _words(data: Buffer, item_size_bytes: int) -> Words:
    """Unsigned little-endian integers; items of 16 bytes as two of 8, which is the same for XOR."""
    return np.frombuffer(data, dtype=f"<u{min(item_size_bytes, 8)}")


def _bytes(words: Words) -> memoryview:
    return np.ascontiguousarray(words).view(np.uint8).data


def _constants(words: Words) -> tuple[Any, Any]:
    """1, and the place of the highest bit, as integers of the words' own type."""
    return words.dtype.type(1), words.dtype.type(8 * words.dtype.itemsize - 1)


def _rotate_left(words: Words) -> Words:
    one, top = _constants(words)
    rotated: Words = (words << one) | (words >> top)
    return rotated


def _turn_upper(words: Words, *, left: bool) -> Words:
    """The upper 16 bits of every word rotated by one."""
    low = words.dtype.type(8 * words.dtype.itemsize - 16)
    upper = (words >> low).astype(np.uint16)
    here, there = (np.uint16(1), np.uint16(15)) if left else (np.uint16(15), np.uint16(1))
    turned = ((upper << here) | (upper >> there)).astype(words.dtype)
    kept = words & words.dtype.type((1 << int(low)) - 1)
    result: Words = (turned << low) | kept
    return result
