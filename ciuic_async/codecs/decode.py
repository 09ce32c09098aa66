"""The way back for every codec."""

from __future__ import annotations

from ciuic_async.codecs import planes, raw, transform
from ciuic_async.errors import IntegrityError
from ciuic_async.format import segment
from ciuic_async.format.digest import Buffer
from ciuic_async.format.segment import RecordHeader


def decode(header: RecordHeader, payload: Buffer, out: memoryview, base: memoryview | None = None) -> None:
    """The ``Decoder`` (handoffs.py) for all codecs of this version, with or without the native core."""
    if header.codec != segment.CODEC_DELTA:
        base = None
    elif base is None or len(base) != header.raw_size_bytes:
        found = "none" if base is None else f"{len(base)} bytes"
        raise IntegrityError(
            f"chunk {header.digest.hex()[:16]}: is a delta to {header.base.hex()[:16]}: expected its "
            f"{header.raw_size_bytes} bytes, found {found}",
            kind="bad_base",
            where=header.digest.hex(),
        )
    try:
        if len(out) != header.raw_size_bytes or len(payload) != header.stored_size_bytes:
            raise ValueError(
                f"{len(payload)} bytes to decode to {len(out)}, the header says {header.stored_size_bytes} to "
                f"{header.raw_size_bytes}"
            )
        if header.codec == segment.CODEC_RAW:
            raw.decode(payload, out)
        else:
            how = transform.of_record(header)
            planes.decode(header.planes, payload, out, planes.native_core(), how, base)
    except ValueError as error:
        raise IntegrityError(
            f"chunk {header.digest.hex()[:16]}: payload is damaged: {error}",
            kind="bad_payload",
            where=header.digest.hex(),
        ) from error
