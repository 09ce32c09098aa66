"""The adaptive choice, as pure logic: told what was measured, it says how to encode. No clock, no bytes, no threads.

A snapshot is durable when both its encoding and its writing are done, and the two overlap: for each kind of tensor

    time to durable = max(raw bytes * seconds to encode a byte / threads, stored bytes * seconds to store a byte)

The kind is stored raw unless another way is predicted clearly sooner. What was seen in a snapshot is folded into what
is expected when it is over, so that all chunks of a snapshot are decided on the same grounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ciuic_async.codecs.base import Kind
from ciuic_async.options import CODEC, CodecOptions

RAW = "raw"
PLANES = "planes"
DELTA = "delta"

_DELTA_PAYS_FROM = 4.0
"""Deltas are tried where storing the planes takes this many times as long as making them: they are twice the work."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a way of encoding costs for each raw byte: seconds in one thread, and bytes stored."""

    encode_s: float
    stored: float


NOTHING = Cost(0.0, 1.0)
"""Raw: no time, and every byte."""


def time_to_durable_s(cost: Cost, threads: int, store_s: float) -> float:
    """For each raw byte, with encoding and storing side by side; ``store_s`` is for each stored byte."""
    return max(cost.encode_s / threads, cost.stored * store_s)


def soonest(ways: Mapping[str, Cost], threads: int, store_s: float, sooner: float) -> str:
    """The way that is durable first; raw, unless another one is so by the share ``sooner``."""
    best = min(ways, key=lambda way: time_to_durable_s(ways[way], threads, store_s), default=RAW)
    if best == RAW:
        return RAW
    raw_s = time_to_durable_s(NOTHING, threads, store_s)
    return best if time_to_durable_s(ways[best], threads, store_s) <= raw_s * (1 - sooner) else RAW


@dataclass(slots=True)
class _Seen:
    """Sums over the current snapshot."""

    raw_bytes: int = 0
    stored_bytes: int = 0
    encode_s: float = 0.0


@dataclass(slots=True)
class Policy:
    """How chunks of each kind are to be encoded. Callers serialize.

    Args:
        options: thresholds, how often to try, how fast to forget.
        threads: that encode at once.
    """

    options: CodecOptions = CODEC
    threads: int = 1
    _expected: dict[tuple[Kind, str], Cost] = field(default_factory=dict)
    _seen: dict[tuple[Kind, str], _Seen] = field(default_factory=dict)
    _tried: dict[tuple[Kind, str], int] = field(default_factory=dict)
    _choices: dict[Kind, str] = field(default_factory=dict)
    _store_s: float | None = None
    _snapshots: int = 0

    def way(self, kind: Kind) -> str:
        """How chunks of this kind are encoded in this snapshot; raw until it is known that another way pays."""
        return self._choices.get(kind, RAW)

    def wants_base(self, kind: Kind) -> bool:
        """Whether a base would be used: for deltas, or to try one where the store is slow enough for them."""
        return self.way(kind) == DELTA or self._tries_left(kind, DELTA)

    def trials(self, kind: Kind, *, with_base: bool) -> list[str]:
        """Ways to try on this chunk beside the chosen one; each counts as tried."""
        chosen = self.way(kind)
        ways = [PLANES, DELTA] if with_base else [PLANES]
        due = [way for way in ways if way != chosen and self._tries_left(kind, way)]
        for way in due:
            self._tried[kind, way] = self._tried.get((kind, way), 0) + 1
        return due

    def encoded(self, kind: Kind, way: str, raw_bytes: int, stored_bytes: int, encode_s: float) -> None:
        """Told of every chunk or piece of one that was encoded, on trial or not."""
        seen = self._seen.setdefault((kind, way), _Seen())
        seen.raw_bytes += raw_bytes
        seen.stored_bytes += stored_bytes
        seen.encode_s += encode_s

    def wrote(self, stored_bytes: int, busy_s: float) -> None:
        """A snapshot is durable: learn from it and decide for the next one."""
        if stored_bytes > 0 and busy_s > 0:
            self._store_s = self._smoothed(self._store_s, busy_s / stored_bytes)
        for key, seen in self._seen.items():
            if seen.raw_bytes:
                before = self._expected.get(key)
                self._expected[key] = Cost(
                    self._smoothed(before.encode_s if before else None, seen.encode_s / seen.raw_bytes),
                    self._smoothed(before.stored if before else None, seen.stored_bytes / seen.raw_bytes),
                )
        self._seen.clear()
        self._tried.clear()
        self._snapshots += 1
        if self._store_s is not None:
            for kind in {kind for kind, _ in self._expected}:
                ways = dict(self._ways(kind))
                self._choices[kind] = soonest(ways, self.threads, self._store_s, self.options.sooner)

    def _ways(self, kind: Kind) -> Iterator[tuple[str, Cost]]:
        yield RAW, NOTHING
        for way in (PLANES, DELTA):
            if cost := self._expected.get((kind, way)):
                yield way, cost

    def _tries_left(self, kind: Kind, way: str) -> bool:
        """Whether this way is unknown or was last known long ago, and was not tried enough in this snapshot."""
        if self._tried.get((kind, way), 0) >= self.options.probe_chunks:
            return False
        again = self._snapshots % self.options.probe_every == 0
        if (kind, way) in self._expected and not again:
            return False
        return way != DELTA or self._deltas_may_pay(kind)

    def _deltas_may_pay(self, kind: Kind) -> bool:
        planes = self._expected.get((kind, PLANES))
        if planes is None or self._store_s is None:
            return False
        return planes.stored * self._store_s >= _DELTA_PAYS_FROM * planes.encode_s / self.threads

    def _smoothed(self, before: float | None, now: float) -> float:
        share = self.options.smoothing
        return now if before is None else before * (1 - share) + now * share
