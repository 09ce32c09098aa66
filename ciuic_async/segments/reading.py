"""What both ways of reading a segment share: bytes from the store, and errors that name the segment."""

from __future__ import annotations

from ciuic_async.errors import CiuicError, IntegrityError, NotFoundError
from ciuic_async.format import segment
from ciuic_async.format.segment import RecordHeader
from ciuic_async.stores.base import Store


def read_into(store: Store, path: str, offset_bytes: int, buffer: memoryview) -> None:
    """Fill the buffer. Raises IntegrityError (kind ``missing``), StoreError."""
    try:
        store.read_into(path, offset_bytes, buffer)
    except NotFoundError as error:
        raise missing(path) from error


def parse_header(data: memoryview, offset_bytes: int, path: str) -> RecordHeader:
    """A record's header; errors name the segment as their place."""
    try:
        return segment.parse_record_header(data, f"{path}, record at {offset_bytes}")
    except CiuicError as error:
        raise type(error)(str(error), kind=error.kind, where=path) from error


def missing(path: str) -> IntegrityError:
    """There is no such segment."""
    return IntegrityError(f"{path}: the segment is missing", kind="missing", where=path)


def bad(path: str, message: str, kind: str = "bad_segment") -> IntegrityError:
    """The segment is not what it should be."""
    return IntegrityError(f"{path}: {message}", kind=kind, where=path)
