"""Fewest bytes: planes with every gain taken, or a delta where that is smaller still."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType

from ciuic_async.codecs.base import Base, Kind
from ciuic_async.codecs.planes import Effort, encode_delta, encode_planes, native_core
from ciuic_async.codecs.raw import RawCodec, check_chunk
from ciuic_async.handoffs import EncodedChunk
from ciuic_async.options import CODEC, CodecOptions


@dataclass(frozen=True, slots=True)
class SmallestEncoder:
    """Never takes more bytes than planes alone, nor than the chunk itself. ``core`` None forces plain Python."""

    options: CodecOptions = CODEC
    core: ModuleType | None = field(default_factory=native_core)

    @property
    def name(self) -> str:
        return "smallest"

    def encode(
        self, raw: memoryview, digest: bytes, item_size_bytes: int, kind: Kind = (), base: Base | None = None
    ) -> EncodedChunk:
        check_chunk(raw, item_size_bytes)
        effort = Effort(self.options.smallest_level, self.options.smallest_gain, self.core)
        best = encode_planes(raw, digest, item_size_bytes, effort) or RawCodec().encode(raw, digest, item_size_bytes)
        if base is not None:
            delta = encode_delta(raw, digest, item_size_bytes, base, effort)
            if delta is not None and delta.header.stored_size_bytes < best.header.stored_size_bytes:
                best = delta
        return best

    def wants_base(self, kind: Kind, item_size_bytes: int) -> bool:
        return True

    def wrote(self, raw_bytes: int, stored_bytes: int, busy_s: float) -> None:
        """Nothing to learn: what counts is bytes."""
