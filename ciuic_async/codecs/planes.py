"""Byte planes, each as it is or as one zstd frame, of items as they are or transformed (docs/format.md, section 5).

The native core and plain Python choose and compress a little differently; either decodes what the other wrote.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from types import ModuleType

import numpy as np

from ciuic_async import native
from ciuic_async.codecs import byteplane, transform, zstd
from ciuic_async.codecs.base import Base, Kind
from ciuic_async.codecs.raw import RawCodec, check_chunk
from ciuic_async.format import segment
from ciuic_async.format.digest import Buffer
from ciuic_async.format.segment import PLANE_RAW, PLANE_ZSTD, RecordHeader
from ciuic_async.handoffs import EncodedChunk
from ciuic_async.options import CODEC, CodecOptions

Planes = tuple[tuple[int, int], ...]
"""(method, stored size in bytes) of each plane."""

MINIMUM_BYTES = 512
"""Smaller chunks are stored raw: a plane directory and frame headers would eat the gain."""

_SAMPLE_ITEMS = 4096
_SAMPLE_PIECES = 16


def native_core() -> ModuleType | None:
    """The core, if it can compress and decompress."""
    return native.core if native.core is not None and native.core.zstd_available() else None


@dataclass(frozen=True, slots=True)
class Effort:
    """How hard to try.

    ``level`` is zstd's for planes in which bytes repeat, 0 for coding byte by byte alone; what shrinks by less than
    ``minimum_gain`` (a share) is stored as it is. ``core`` None forces plain Python.
    """

    level: int
    minimum_gain: float
    core: ModuleType | None = field(default_factory=native_core)
    fallback_level: int = CODEC.fallback_level

    @property
    def gain_permille(self) -> int:
        return round(self.minimum_gain * 1000)


@dataclass(frozen=True, slots=True)
class PlanesCodec:
    """Planes alone: fast, and what ``auto`` uses where compression pays. Stores raw what has no plane that shrinks.

    ``core`` is for tests: None forces plain Python.
    """

    options: CodecOptions = CODEC
    core: ModuleType | None = field(default_factory=native_core)

    @property
    def name(self) -> str:
        return "planes"

    @property
    def effort(self) -> Effort:
        return Effort(0, self.options.minimum_gain, self.core, self.options.fallback_level)

    def encode(
        self, raw: memoryview, digest: bytes, item_size_bytes: int, kind: Kind = (), base: Base | None = None
    ) -> EncodedChunk:
        check_chunk(raw, item_size_bytes)
        encoded = encode_planes(raw, digest, item_size_bytes, self.effort)
        return encoded or RawCodec().encode(raw, digest, item_size_bytes)

    def wants_base(self, kind: Kind, item_size_bytes: int) -> bool:
        return False

    def wrote(self, raw_bytes: int, stored_bytes: int, busy_s: float) -> None:
        """Nothing to learn."""


def encode_planes(raw: memoryview, digest: bytes, item_size_bytes: int, effort: Effort) -> EncodedChunk | None:
    """Planes of the items as they are or rotated, whichever a sample finds smaller; None where nothing shrinks."""
    if raw.nbytes < MINIMUM_BYTES:
        return None
    how = transform.NONE
    if item_size_bytes in segment.WORD_SIZES_BYTES:
        how = _smaller(raw, None, item_size_bytes, (transform.NONE, transform.ROTATED), effort)
    encoded = _encode(raw, None, item_size_bytes, how, effort)
    if encoded is None:
        return None
    planes, payload, level = encoded
    codec = segment.CODEC_ROTATED if how == transform.ROTATED else segment.CODEC_PLANES
    header = RecordHeader(codec, raw.nbytes, sum(s for _, s in planes), digest, item_size_bytes, planes, level)
    return EncodedChunk(header, payload)


def encode_delta(
    raw: memoryview, digest: bytes, item_size_bytes: int, base: Base, effort: Effort
) -> EncodedChunk | None:
    """Planes of the difference to ``base``; None where nothing shrinks or the base will not do."""
    if not usable(raw, digest, base):
        return None
    how = transform.XOR
    if item_size_bytes in segment.WORD_SIZES_BYTES:
        how = _smaller(raw, base.raw, item_size_bytes, (transform.DIFFERENCE, transform.XOR), effort)
    encoded = _encode(raw, base.raw, item_size_bytes, how, effort)
    if encoded is None:
        return None
    planes, payload, level = encoded
    stored = sum(s for _, s in planes)
    header = RecordHeader(
        segment.CODEC_DELTA,
        raw.nbytes,
        stored,
        digest,
        item_size_bytes,
        planes,
        level,
        base.digest,
        base.depth + 1,
        how,
    )
    return EncodedChunk(header, payload)


def usable(raw: memoryview, digest: bytes, base: Base) -> bool:
    """Whether a delta to ``base`` can be made and its restore stays bounded."""
    same_length = base.raw.nbytes == raw.nbytes >= MINIMUM_BYTES
    return same_length and base.depth < segment.MAX_DEPTH and base.digest != digest


def _smaller(
    raw: memoryview, base: memoryview | None, item_size_bytes: int, transforms: Iterable[int], effort: Effort
) -> int:
    """The transform that gives fewest bytes, by a sample."""

    def estimate(how: int) -> int:
        if effort.core is not None:
            size: int = effort.core.estimate_planes(raw, base, item_size_bytes, how, effort.gain_permille)
            return size
        return _estimate_plain(raw, base, item_size_bytes, how)

    return min(transforms, key=estimate)


def _estimate_plain(raw: memoryview, base: memoryview | None, item_size_bytes: int, how: int) -> int:
    """Entropy of the planes' bytes in a sample, in bits."""
    count = raw.nbytes // item_size_bytes
    piece = min(count, _SAMPLE_ITEMS // _SAMPLE_PIECES)
    starts = [(count - piece) * number // (_SAMPLE_PIECES - 1) for number in range(_SAMPLE_PIECES)]
    bits = 0.0
    places = [slice(start * item_size_bytes, (start + piece) * item_size_bytes) for start in starts]
    sampled = b"".join(raw[place] for place in places)
    sampled_base = b"".join(base[place] for place in places) if base is not None else None
    for plane in byteplane.split_planes(
        transform.forward(how, sampled, sampled_base, item_size_bytes), item_size_bytes
    ):
        counts = np.bincount(np.frombuffer(plane, dtype=np.uint8))
        counts = counts[counts > 0]
        bits -= float((counts * np.log2(counts / counts.sum())).sum())
    return round(bits)


def _encode(
    raw: memoryview, base: memoryview | None, item_size_bytes: int, how: int, effort: Effort
) -> tuple[Planes, tuple[Buffer, ...], int] | None:
    """Directory, payload, and the level to note."""
    if effort.core is not None:
        encoded = effort.core.encode_planes(raw, base, item_size_bytes, how, effort.level, effort.gain_permille)
        if encoded is None:
            return None
        directory, whole = encoded
        return tuple(directory), (whole,), effort.level
    level = effort.level or effort.fallback_level
    payload: list[Buffer] = []
    planes = []
    for plane in byteplane.split_planes(transform.forward(how, raw, base, item_size_bytes), item_size_bytes):
        frame = zstd.compress(plane, level) if _pays(plane, level, effort.minimum_gain) else plane
        shrank = len(frame) < len(plane) and len(frame) <= len(plane) * (1 - effort.minimum_gain)
        payload.append(frame if shrank else plane)
        planes.append((PLANE_ZSTD if shrank else PLANE_RAW, len(payload[-1])))
    if all(method == PLANE_RAW for method, _ in planes):
        return None
    return tuple(planes), tuple(payload), level


def _pays(plane: Buffer, level: int, minimum_gain: float) -> bool:
    """Whether a sample of a plane shrinks: compressing noise to find out that it is noise takes long."""
    sampled = byteplane.sample(plane, 32 << 10)
    return len(zstd.compress(sampled, level)) <= len(sampled) * (1 - minimum_gain)


def decode(
    planes: Planes,
    payload: Buffer,
    out: memoryview,
    core: ModuleType | None,
    how: int = transform.NONE,
    base: memoryview | None = None,
) -> None:
    """Fill ``out``; the payload is hostile, ``how`` fits the item size, and ``base`` is as long as ``out`` for deltas.

    Raises:
        ValueError: it does not decode to exactly these sizes.
    """
    if core is not None:
        core.decode_planes(payload, planes, base, how, out)
        return
    size = len(out) // len(planes)
    if sum(stored for _, stored in planes) != len(payload):
        raise ValueError(f"planes do not add up to {len(payload)} bytes")
    view = memoryview(payload)
    decoded: list[Buffer] = []
    position = 0
    for number, (method, stored) in enumerate(planes):
        piece = view[position : position + stored]
        position += stored
        if method == PLANE_RAW and stored == size:
            decoded.append(piece)
        elif method == PLANE_ZSTD:
            try:
                decoded.append(zstd.decompress(piece, size))
            except ValueError as error:
                raise ValueError(f"zstd plane {number} {error}") from error
        else:
            raise ValueError(f"plane {number} has method {method} and {stored} bytes for {size}")
    byteplane.merge_planes(decoded, out)
    transform.back(how, out, base, len(planes))
