"""Durable soonest at least cost to training: measures as it goes, and chooses for each kind of tensor.

``decide.Policy`` decides; here is what it needs from the world: trial encodings, a clock, a lock. Wall time counts, not
CPU time: on a busy machine an encoder that waits for a core is as late as one that computes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from ciuic_async.codecs.base import Base, Kind
from ciuic_async.codecs.decide import DELTA, PLANES, RAW, Policy
from ciuic_async.codecs.planes import MINIMUM_BYTES, PlanesCodec, encode_delta, encode_planes, usable
from ciuic_async.codecs.raw import RawCodec, check_chunk
from ciuic_async.format.segment import align_up
from ciuic_async.handoffs import EncodedChunk
from ciuic_async.options import CODEC, WRITE, CodecOptions

_PIECE_ALIGNMENT_BYTES = 64


class AutoEncoder:
    """One for each training run, since it learns.

    Args:
        options: the tunables.
        threads: that call ``encode`` at once.
        clock_s: the time, for tests.
    """

    def __init__(
        self,
        options: CodecOptions = CODEC,
        threads: int = WRITE.encode_threads,
        clock_s: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._options = options
        self._effort = PlanesCodec(options).effort
        self._policy = Policy(options, threads)
        self._clock_s = clock_s
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return "auto"

    def encode(
        self, raw: memoryview, digest: bytes, item_size_bytes: int, kind: Kind = (), base: Base | None = None
    ) -> EncodedChunk:
        check_chunk(raw, item_size_bytes)
        if raw.nbytes < MINIMUM_BYTES:
            return RawCodec().encode(raw, digest, item_size_bytes)
        if base is not None and not usable(raw, digest, base):
            base = None
        with self._lock:
            way = self._policy.way(kind)
            trials = self._policy.trials(kind, with_base=base is not None)
        if way == DELTA and base is None:
            way = PLANES
        for trial in trials:
            self._try(trial, raw, digest, item_size_bytes, kind, base)
        encoded = None
        if way != RAW:
            encoded = self._measured(way, raw, digest, item_size_bytes, kind, base)
        return encoded or RawCodec().encode(raw, digest, item_size_bytes)

    def wants_base(self, kind: Kind, item_size_bytes: int) -> bool:
        with self._lock:
            return self._policy.wants_base(kind)

    def wrote(self, raw_bytes: int, stored_bytes: int, busy_s: float) -> None:
        with self._lock:
            self._policy.wrote(stored_bytes, busy_s)

    def _try(
        self, way: str, raw: memoryview, digest: bytes, item_size_bytes: int, kind: Kind, base: Base | None
    ) -> None:
        """Encode a piece from the middle, for the figures alone; twice, since the first time pays for fresh memory."""
        size = align_up(max(int(raw.nbytes * self._options.probe_share), MINIMUM_BYTES), _PIECE_ALIGNMENT_BYTES)
        start = (raw.nbytes - min(size, raw.nbytes)) // 2 // _PIECE_ALIGNMENT_BYTES * _PIECE_ALIGNMENT_BYTES
        piece = raw[start : start + size]
        piece = piece[: piece.nbytes // item_size_bytes * item_size_bytes]
        if base is not None:
            base = Base(base.raw[start : start + piece.nbytes], base.digest, base.depth)
        self._timed(way, piece, digest, item_size_bytes, base)
        encoded, took_s = self._timed(way, piece, digest, item_size_bytes, base)
        self._note(kind, way, piece.nbytes, encoded, took_s)

    def _measured(
        self, way: str, raw: memoryview, digest: bytes, item_size_bytes: int, kind: Kind, base: Base | None
    ) -> EncodedChunk | None:
        encoded, took_s = self._timed(way, raw, digest, item_size_bytes, base)
        self._note(kind, way, raw.nbytes, encoded, took_s)
        return encoded

    def _timed(
        self, way: str, raw: memoryview, digest: bytes, item_size_bytes: int, base: Base | None
    ) -> tuple[EncodedChunk | None, float]:
        began_s = self._clock_s()
        if way == DELTA and base is not None:
            encoded = encode_delta(raw, digest, item_size_bytes, base, self._effort)
        else:
            encoded = encode_planes(raw, digest, item_size_bytes, self._effort)
        return encoded, self._clock_s() - began_s

    def _note(self, kind: Kind, way: str, raw_bytes: int, encoded: EncodedChunk | None, took_s: float) -> None:
        stored = encoded.header.stored_size_bytes if encoded else raw_bytes
        with self._lock:
            self._policy.encoded(kind, way, raw_bytes, stored, took_s)
