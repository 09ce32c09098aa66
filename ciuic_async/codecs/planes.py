"""Byte planes, each as it is or as one zstd frame (docs/format.md, section 5).

The native core and plain Python choose and compress a little differently; either decodes what the other wrote.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType

from ciuic_async import native
from ciuic_async.codecs import byteplane, zstd
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


def native_core() -> ModuleType | None:
    """The core, if it can compress."""
    return native.core if native.core is not None and native.core.zstd_available() else None


@dataclass(frozen=True, slots=True)
class PlanesCodec:
    """Compresses the planes of which a probe shrinks; a chunk without such planes is stored raw.

    ``core`` is for tests: None forces plain Python.
    """

    name = "planes"
    options: CodecOptions = CODEC
    core: ModuleType | None = field(default_factory=native_core)

    def encode(self, raw: memoryview, digest: bytes, item_size_bytes: int) -> EncodedChunk:
        check_chunk(raw, item_size_bytes)
        encoded = None
        if raw.nbytes >= MINIMUM_BYTES:
            if self.core is not None:
                encoded = self._encode_native(self.core, raw, item_size_bytes)
            else:
                encoded = self._encode_plain(raw, item_size_bytes)
        if encoded is None:
            return RawCodec().encode(raw, digest, item_size_bytes)
        planes, payload = encoded
        level = self.options.level if self.core is not None else self.options.fallback_level
        stored_size = sum(stored for _, stored in planes)
        header = RecordHeader(segment.CODEC_PLANES, raw.nbytes, stored_size, digest, item_size_bytes, planes, level)
        return EncodedChunk(header, payload)

    def _encode_native(
        self, core: ModuleType, raw: memoryview, item_size_bytes: int
    ) -> tuple[Planes, tuple[Buffer, ...]] | None:
        gain_permille = round(self.options.minimum_gain * 1000)
        encoded = core.encode_planes(
            raw, item_size_bytes, self.options.level, gain_permille, self.options.probe_size_bytes
        )
        if encoded is None:
            return None
        directory, payload = encoded
        return tuple(directory), (payload,)

    def _encode_plain(self, raw: memoryview, item_size_bytes: int) -> tuple[Planes, tuple[Buffer, ...]] | None:
        worthwhile = {plane for plane in range(item_size_bytes) if self._pays(raw, item_size_bytes, plane)}
        if not worthwhile:
            return None
        payload: list[Buffer] = []
        directory = []
        for number, plane in enumerate(byteplane.split_planes(raw, item_size_bytes)):
            frame = zstd.compress(plane, self.options.fallback_level) if number in worthwhile else plane
            if len(frame) < len(plane):
                directory.append((PLANE_ZSTD, len(frame)))
                payload.append(frame)
            else:
                directory.append((PLANE_RAW, len(plane)))
                payload.append(plane)
        if all(method == PLANE_RAW for method, _ in directory):
            return None
        return tuple(directory), tuple(payload)

    def _pays(self, raw: memoryview, item_size_bytes: int, plane: int) -> bool:
        sample = byteplane.sample(raw, item_size_bytes, plane, self.options.probe_size_bytes)
        frame = zstd.compress(sample, self.options.fallback_level)
        return len(frame) <= len(sample) * (1 - self.options.minimum_gain)


def decode(planes: Planes, payload: Buffer, out: memoryview, core: ModuleType | None) -> None:
    """Fill ``out``; the payload is hostile.

    Raises:
        ValueError: it does not decode to exactly these sizes.
    """
    if core is not None:
        core.decode_planes(payload, planes, out)
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
