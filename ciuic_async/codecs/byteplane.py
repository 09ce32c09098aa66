"""Byte planes in plain Python (docs/format.md, "Byte planes"): byte 0 of every item, then byte 1, and so on.

Floats of one tensor tend to share exponents, so some planes compress well where items do not.
"""

from __future__ import annotations

import numpy as np

from ciuic_async.format.digest import Buffer


def split_planes(raw: Buffer, item_size_bytes: int) -> list[memoryview]:
    """One contiguous copy for each plane; ``len(raw)`` is a multiple of the item size."""
    items = np.frombuffer(raw, dtype=np.uint8).reshape(-1, item_size_bytes)
    return [np.ascontiguousarray(items[:, plane]).data for plane in range(item_size_bytes)]


def merge_planes(planes: list[Buffer], out: memoryview) -> None:
    """The inverse: all planes have ``len(out) / len(planes)`` bytes."""
    items = np.frombuffer(out, dtype=np.uint8).reshape(-1, len(planes))
    for number, plane in enumerate(planes):
        items[:, number] = np.frombuffer(plane, dtype=np.uint8)


def sample(plane: Buffer, size_bytes: int) -> bytes:
    """At most ``size_bytes`` of a plane, from four places between its ends; all of it when it is not longer."""
    view = memoryview(plane)
    if len(view) <= size_bytes:
        return bytes(view)
    piece = size_bytes // 4
    step = (len(view) - piece) // 3
    return b"".join(view[start : start + piece] for start in (0, step, 2 * step, 3 * step))
