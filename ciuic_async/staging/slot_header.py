"""What a slot says of itself at the start of its memory, for whoever finds it after its maker died. No torch here.

    page 0     the header
    page 1 ..  the description: a plan, then a request, as ``pipeline.handover`` writes them; nobody else reads them
    then       the payload, at a whole page

The state is one aligned word and written last: a slot whose state is ``STAGED`` or ``DURABLE`` holds all that it says,
whenever its maker was killed.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from mmap import mmap

from ciuic_async.errors import IntegrityError
from ciuic_async.format.digest import Buffer

PAGE_BYTES = 4096
FREE, FILLING, STAGED, DURABLE = range(4)

_HEADER = struct.Struct("<8sIIQqQQQQ20s")
_STATE = struct.Struct("<I")
_STATE_AT = 12
_MAGIC = b"CIUICSLT"
_VERSION = 2
_NO_STEP = -1


@dataclass(frozen=True, slots=True)
class SlotHeader:
    """Where things lie in a slot's memory, in bytes from its start, and which snapshot it is about."""

    state: int
    sequence: int
    step: int | None
    snapshot: str
    plan_size_bytes: int
    request_size_bytes: int
    payload_at: int
    payload_size_bytes: int

    def encode(self) -> bytes:
        return _HEADER.pack(
            _MAGIC,
            _VERSION,
            self.state,
            self.sequence,
            _NO_STEP if self.step is None else self.step,
            self.plan_size_bytes,
            self.request_size_bytes,
            self.payload_at,
            self.payload_size_bytes,
            self.snapshot.encode("ascii").ljust(20, b"\0"),
        )

    @classmethod
    def decode(cls, data: Buffer, size_bytes: int) -> SlotHeader:
        """Of a slot of ``size_bytes`` in all.

        Raises:
            IntegrityError: it is none, of another version, or leads outside of the slot.
        """
        if len(data) < _HEADER.size:
            raise _bad("it is shorter than a header")
        magic, version, state, sequence, step, plan, request, at, payload, snapshot = _HEADER.unpack_from(data)
        if magic != _MAGIC or version != _VERSION:
            raise _bad(f"expected {_MAGIC!r} version {_VERSION}, found {magic!r} version {version}")
        if PAGE_BYTES + plan + request > at or at % PAGE_BYTES or at + payload > size_bytes:
            raise _bad(f"its parts do not fit into {size_bytes} bytes")
        try:
            name = snapshot.rstrip(b"\0").decode("ascii")
        except UnicodeDecodeError:
            raise _bad("the snapshot's name is none") from None
        return cls(state, sequence, None if step == _NO_STEP else step, name, plan, request, at, payload)


def set_state(memory: bytearray | memoryview | mmap, state: int) -> None:
    """Change the state of a slot and nothing else. ``memory`` begins with the header."""
    _STATE.pack_into(memory, _STATE_AT, state)


def _bad(message: str) -> IntegrityError:
    return IntegrityError(f"staging memory: {message}", kind="bad_slot")
