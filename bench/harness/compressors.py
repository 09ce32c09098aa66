"""Lossless compressors under one face: one chunk in, one chunk out, one thread."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import zstandard

from ciuic_async.codecs.base import Base
from ciuic_async.codecs.choose import encoder_for
from ciuic_async.codecs.decode import decode as decode_chunk
from ciuic_async.codecs.planes import PlanesCodec

CHUNK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Compressor:
    """``compress`` takes a chunk nobody else uses; ``decompress`` gives back what was compressed.

    Both get the bytes of the same place in the previous snapshot, or None. Who knows nothing of deltas is handed the
    XOR of both by ``xored``.
    """

    compress: Callable[[bytearray, bytearray | None], Any]
    decompress: Callable[[Any, bytearray | None], Any]
    size: Callable[[Any], int] = len


def xor(data: Any, base: bytearray) -> bytearray:
    """The difference that every compressor can make use of."""
    return bytearray(np.bitwise_xor(np.frombuffer(data, np.uint8), np.frombuffer(base, np.uint8)).data)


def xored(pack: Callable[[Any], Any], unpack: Callable[[Any], Any], size: Callable[[Any], int] = len) -> Compressor:
    """A compressor without deltas, given the XOR to the base; that time counts as its own."""
    return Compressor(
        lambda chunk, base: pack(chunk if base is None else xor(chunk, base)),
        lambda packed, base: unpack(packed) if base is None else xor(unpack(packed), base),
        size,
    )


def _unpack(encoded: Any, base: bytearray | None = None) -> bytearray:
    """A record of ours back to bytes."""
    out = bytearray(encoded.header.raw_size_bytes)
    payload = encoded.payload[0] if len(encoded.payload) == 1 else b"".join(encoded.payload)
    lean_on = () if base is None else (memoryview(base),)
    decode_chunk(encoded.header, payload, memoryview(out), *lean_on)
    return out


def _stored(encoded: Any) -> int:
    return int(encoded.header.stored_size_bytes)


def planes(item_bytes: int) -> Compressor:
    """This engine's byte planes; hashing is not counted, others have none."""
    codec = PlanesCodec()
    return xored(lambda chunk: codec.encode(memoryview(chunk).toreadonly(), b"\0" * 32, item_bytes), _unpack, _stored)


def smallest(item_bytes: int) -> Compressor:
    """This engine's ``codec="smallest"``, with deltas of its own."""
    encoder = encoder_for("smallest")

    def compress(chunk: bytearray, base: bytearray | None) -> Any:
        raw = memoryview(chunk).toreadonly()
        lean_on = None if base is None else Base(memoryview(base).toreadonly(), b"\1" * 32, 0)
        return encoder.encode(raw, b"\0" * 32, item_bytes, ("model", "weight"), lean_on)

    def decompress(encoded: Any, base: bytearray | None) -> bytearray:
        return _unpack(encoded, base if any(encoded.header.base or b"") else None)

    return Compressor(compress, decompress, _stored)


def zstd(level: int) -> Callable[[int], Compressor]:
    """Plain zstd over the items as they lie."""

    def make(item_bytes: int) -> Compressor:
        packer, unpacker = zstandard.ZstdCompressor(level=level), zstandard.ZstdDecompressor()
        return xored(packer.compress, unpacker.decompress)

    return make


def zipnn(item_bytes: int) -> Compressor:
    """ZipNN: exponents apart, Huffman."""
    library = importlib.import_module("zipnn")
    dtype = "float32" if item_bytes == 4 else "bfloat16"
    packer = library.ZipNN(input_format="byte", bytearray_dtype=dtype, threads=1)
    return xored(packer.compress, packer.decompress)


def blosc2(level: int) -> Callable[[int], Compressor]:
    """Blosc2: byte shuffle, then zstd."""

    def make(item_bytes: int) -> Compressor:
        library = importlib.import_module("blosc2")
        options = {
            "codec": library.Codec.ZSTD,
            "clevel": level,
            "typesize": item_bytes,
            "filters": [library.Filter.SHUFFLE],
            "filters_meta": [0],
            "nthreads": 1,
        }
        library.set_nthreads(1)
        return xored(lambda chunk: library.compress2(chunk, **options), library.decompress2)

    return make


COMPRESSORS: dict[str, Callable[[int], Compressor]] = {
    "ciuic-async, planes": planes,
    "ciuic-async, smallest": smallest,
    "zipnn": zipnn,
    "zstd -1": zstd(-1),
    "zstd 1": zstd(1),
    "zstd 3": zstd(3),
    "blosc2 shuffle + zstd 1": blosc2(1),
    "blosc2 shuffle + zstd 3": blosc2(3),
}
