"""The adaptive choice: on a simulated clock and store it is durable soonest, or nearly so, and follows what changes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ciuic_async.codecs.auto import AutoEncoder
from ciuic_async.codecs.base import Base, Kind
from ciuic_async.codecs.decide import DELTA, NOTHING, PLANES, RAW, Cost, Policy, soonest, time_to_durable_s
from ciuic_async.format import segment
from ciuic_async.format.digest import digest
from ciuic_async.options import CODEC

MIB = 1 << 20
CHUNK_BYTES = 4 * MIB
THREADS = 2
WEIGHTS, MOMENTS, NOISE = ("model", "weight"), ("optimizer", "exp_avg_sq"), ("optimizer", "exp_avg")

WAYS: dict[Kind, dict[str, Cost]] = {
    WEIGHTS: {PLANES: Cost(1 / 2.0e9, 0.82), DELTA: Cost(1 / 1.0e9, 0.55)},
    MOMENTS: {PLANES: Cost(1 / 2.0e9, 0.80), DELTA: Cost(1 / 1.0e9, 0.50)},
    NOISE: {PLANES: Cost(1 / 2.5e9, 1.0), DELTA: Cost(1 / 2.0e9, 1.0)},
}
"""Measured on weights and moments of a small GPT."""


@dataclass
class Simulation:
    """Encoders and a store of known speed; time passes only as they say."""

    store_bytes_per_s: float
    chunks: int = 50
    with_bases: bool = True
    policy: Policy = field(default_factory=lambda: Policy(CODEC, THREADS))
    trial_bytes: int = 0
    used: dict[str, int] = field(default_factory=dict)

    def snapshot(self) -> float:
        """Seconds to durable of one snapshot: encoding in threads, and storing beside it."""
        encode_s = 0.0
        stored_bytes = 0.0
        self.used = {}
        self.trial_bytes = 0
        for kind, ways in WAYS.items():
            for _ in range(self.chunks):
                base = self.with_bases and self.policy.wants_base(kind)
                way = self.policy.way(kind)
                for trial in self.policy.trials(kind, with_base=base):
                    size = int(2 * CHUNK_BYTES * CODEC.probe_share)
                    self.trial_bytes += size
                    encode_s += self._encode(kind, trial, ways[trial], size)
                if way == DELTA and not base:
                    way = PLANES
                self.used[way] = self.used.get(way, 0) + 1
                if way != RAW:
                    encode_s += self._encode(kind, way, ways[way], CHUNK_BYTES)
                stored_bytes += CHUNK_BYTES * (1.0 if way == RAW else ways[way].stored)
        busy_s = stored_bytes / self.store_bytes_per_s
        self.policy.wrote(int(stored_bytes), busy_s)
        return max(encode_s / THREADS, busy_s)

    def _encode(self, kind: Kind, way: str, cost: Cost, size: int) -> float:
        took_s = size * cost.encode_s
        self.policy.encoded(kind, way, size, int(size * cost.stored), took_s)
        return took_s

    @property
    def raw_s(self) -> float:
        """Time to durable with codec="raw"."""
        return len(WAYS) * self.chunks * CHUNK_BYTES / self.store_bytes_per_s


def test_a_fast_disk_gets_raw_bytes() -> None:
    """Where compressing would only be later, everything is raw; the trials cost less than a twentieth."""
    simulation = Simulation(8e9)
    for _ in range(40):
        assert simulation.snapshot() <= 1.05 * simulation.raw_s
        assert simulation.used == {RAW: 3 * simulation.chunks}


@pytest.mark.parametrize("store_mb_per_s", [50, 100, 200])
def test_a_slow_store_gets_fewer_bytes_from_the_second_snapshot_on(store_mb_per_s: int) -> None:
    """The first snapshot measures; the second is durable clearly sooner than raw, later ones sooner still."""
    simulation = Simulation(store_mb_per_s * 1e6)
    first, second, third, *later = (simulation.snapshot() for _ in range(12))
    assert first <= 1.05 * simulation.raw_s
    assert second < 0.9 * simulation.raw_s
    assert max(third, *later) < 0.75 * simulation.raw_s
    assert simulation.used == {DELTA: 2 * simulation.chunks, RAW: simulation.chunks}  # noise stays as it is


def test_without_bases_deltas_give_way_to_planes() -> None:
    """A slow store whose parent is not in memory is served by planes alone."""
    simulation = Simulation(1e8, with_bases=False)
    times = [simulation.snapshot() for _ in range(6)]
    assert max(times[1:]) < 0.9 * simulation.raw_s
    assert simulation.used[PLANES] == 2 * simulation.chunks


def test_bases_are_wanted_only_where_the_store_is_slow() -> None:
    """On a store that is nearly as fast as the encoders nobody fetches a base, however long it goes on."""
    simulation = Simulation(2e9)
    for _ in range(20):
        simulation.snapshot()
        assert not any(simulation.policy.wants_base(kind) for kind in WAYS)


def test_trials_are_bounded_and_come_again() -> None:
    """At most two pieces a kind and way and 3% of the bytes in a snapshot; then none for sixteen snapshots."""
    simulation = Simulation(8e9)
    trials = []
    for _ in range(2 * CODEC.probe_every + 1):
        simulation.snapshot()
        assert simulation.trial_bytes <= 0.03 * 3 * simulation.chunks * CHUNK_BYTES
        assert simulation.trial_bytes <= 3 * 2 * CODEC.probe_chunks * 2 * CHUNK_BYTES * CODEC.probe_share
        trials.append(simulation.trial_bytes > 0)
    assert trials == [number % CODEC.probe_every == 0 for number in range(len(trials))]


def test_follows_a_disk_that_becomes_slower_and_faster_again() -> None:
    """A snapshot after the store's speed drops to a hundredth, fewer bytes go there; raw again when it is back."""
    simulation = Simulation(8e9)
    for _ in range(5):
        simulation.snapshot()
    simulation.store_bytes_per_s = 8e7
    simulation.snapshot()
    assert simulation.snapshot() < 0.95 * simulation.raw_s
    assert RAW not in simulation.used or simulation.used[RAW] == simulation.chunks
    simulation.store_bytes_per_s = 8e9
    for _ in range(12):
        simulation.snapshot()
    assert simulation.used == {RAW: 3 * simulation.chunks}
    assert simulation.snapshot() <= 1.05 * simulation.raw_s


def test_a_busy_machine_makes_raw_the_better_choice() -> None:
    """Encoders that wait for a core are slow encoders: planes are given up when they would be later than raw."""
    policy = Policy(CODEC, 1)
    for _ in range(6):
        policy.encoded(WEIGHTS, PLANES, CHUNK_BYTES, int(CHUNK_BYTES * 0.8), CHUNK_BYTES / 2e9)
        policy.wrote(CHUNK_BYTES, CHUNK_BYTES / 2e8)
    assert policy.way(WEIGHTS) == PLANES
    for _ in range(3):
        policy.encoded(WEIGHTS, PLANES, CHUNK_BYTES, int(CHUNK_BYTES * 0.8), CHUNK_BYTES / 1e8)
        policy.wrote(CHUNK_BYTES, CHUNK_BYTES / 2e8)
    assert policy.way(WEIGHTS) == RAW


def test_snapshots_without_bytes_teach_nothing() -> None:
    """A snapshot in which everything was deduplicated says nothing of the store, and breaks nothing."""
    policy = Policy(CODEC, 1)
    for _ in range(3):
        policy.wrote(0, 0.0)
    assert policy.way(WEIGHTS) == RAW
    assert not policy.wants_base(WEIGHTS)


COSTS = st.builds(Cost, st.floats(0, 1e-6), st.floats(0.01, 1.1))


@given(st.fixed_dictionaries({PLANES: COSTS, DELTA: COSTS}), st.integers(1, 16), st.floats(1e-11, 1e-6))
def test_the_choice_is_raw_or_clearly_sooner(ways: dict[str, Cost], threads: int, store_s: float) -> None:
    """Never slower than raw; nothing else is sooner than what was chosen over raw; near ties are raw."""
    chosen = soonest({RAW: NOTHING, **ways}, threads, store_s, 0.1)
    times = {way: time_to_durable_s(cost, threads, store_s) for way, cost in {RAW: NOTHING, **ways}.items()}
    if chosen == RAW:
        assert min(times.values()) > times[RAW] * 0.9 * (1 - 1e-9)
    else:
        assert times[chosen] == min(times.values()) <= times[RAW] * 0.9


class Clock:
    """Moves by a fixed step at each look."""

    def __init__(self, step_s: float) -> None:
        self.now_s = 0.0
        self.step_s = step_s

    def __call__(self) -> float:
        self.now_s += self.step_s
        return self.now_s


def _weights(count: int, seed: int = 1) -> bytes:
    return (np.random.default_rng(seed).standard_normal(count) * 0.02).astype(np.float32).tobytes()


def test_the_encoder_learns_from_real_chunks() -> None:
    """First raw, with trials; after a slow snapshot planes, then deltas where there are bases; depth stays bounded."""
    encoder = AutoEncoder(threads=1, clock_s=Clock(1e-6))
    codecs = []
    depth = 0
    previous = None
    for seed in range(segment.MAX_DEPTH + 4):
        raw = bytearray(_weights(1 << 18))
        raw[::1024] = bytes([seed]) * len(raw[::1024])
        frozen = bytes(raw)
        base = (
            Base(memoryview(previous), digest(previous), depth) if previous and encoder.wants_base(WEIGHTS, 4) else None
        )
        header = encoder.encode(memoryview(frozen), digest(frozen), 4, WEIGHTS, base).header
        segment.parse_record_header(header.pack(), "test")
        codecs.append(header.codec)
        previous, depth = frozen, header.depth
        encoder.wrote(len(frozen), header.stored_size_bytes, header.stored_size_bytes / 1e8)
    delta = segment.CODEC_DELTA
    assert codecs[:2] == [segment.CODEC_RAW, segment.CODEC_ROTATED]
    assert codecs[2:] == [delta] * segment.MAX_DEPTH + [segment.CODEC_ROTATED, delta]


def test_small_and_broken_chunks_do_no_harm() -> None:
    """Tiny chunks are raw and not tried; trials of chunks hardly larger than a trial, of any item size, work."""
    encoder = AutoEncoder(threads=1, clock_s=Clock(1e-6))
    for size in (0, 16, 496, 512, 1040, 65536 + 16):
        for item_size in segment.ITEM_SIZES_BYTES:
            raw = bytes(size)
            for kind in ((str(size), str(item_size)), ("shared",)):
                base = Base(memoryview(bytes(b"\1" * size)), digest(b"\1" * size), 0)
                chunk = encoder.encode(memoryview(raw), digest(raw), item_size, kind, base)
                assert chunk.header.raw_size_bytes == size
                assert chunk.header.stored_size_bytes <= size
