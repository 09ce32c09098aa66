"""Element types by name. Which torch dtype a name means is capture's business; here are only sizes."""

from __future__ import annotations

from ciuic_async.errors import FormatVersionError

ITEM_SIZE_BYTES = {
    "bool": 1,
    "uint8": 1,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex32": 4,
    "complex64": 8,
    "complex128": 16,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "float4_e2m1fn_x2": 1,
    "bits8": 1,
    "bits16": 2,
    "bits1x8": 1,
    "bits2x4": 1,
    "bits4x2": 1,
}


def item_size_bytes(name: str, what: str) -> int:
    """Bytes of one element.

    Raises:
        FormatVersionError: kind ``unknown_dtype``.
    """
    try:
        return ITEM_SIZE_BYTES[name]
    except KeyError:
        raise FormatVersionError(
            f"{what}: unknown dtype {name[:80]!r}; upgrade ciuic-async", kind="unknown_dtype", where=what
        ) from None
