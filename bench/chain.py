"""What does a long history cost? Verifying a thousand snapshots; an append and a look at the end of a log that grew.

    python bench/chain.py                # about a minute; writes bench/results/chain.json

Two views. *Verify*: a chain of small snapshots, its log, every manifest and every locator checked (``deep=False``), the
best of several times. *Growth*: what one append asks of the store when the log has a few hundred entries and when it
has a hundred thousand, counted by a store that meters another; both sizes have equally wide tiles at their end, so
that only the length differs. Counts are the same on every machine and at every time; a test holds them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ciuic_async import Checkpointer, SnapshotChain
from ciuic_async.errors import StoreError
from ciuic_async.format.digest import Buffer
from ciuic_async.format.entry import Common, KeyEntry, NoteEntry
from ciuic_async.pipeline.history import for_retention
from ciuic_async.stores.base import Listed, Store, Unpublished
from ciuic_async.stores.memory import MemoryStore
from ciuic_async.transparency.keys import SigningKey
from ciuic_async.transparency.log import Log
from harness.output import parser, rows, say, seconds, store, workplace

ORIGIN = "ciuic.dev/chain/" + "b" * 32
COMMON = Common("b" * 20, "2026-01-01T00:00:00.000Z", "host", "bench")
SHORT, LONG = 356, 100_196
"""Entries of the two logs: 100 in the last tile of each."""
BATCH = 8192
GOAL_VERIFY_S = 2.0
GOAL_GROWTH = 1.5


@dataclass
class Meter:
    """What a store was asked for."""

    operations: int = 0
    read_bytes: int = 0
    written_bytes: int = 0


class Metered:
    """A store that counts what is asked of another. Each file of one ``publish`` is an operation."""

    def __init__(self, inner: Store) -> None:
        self._inner = inner
        self.capabilities = inner.capabilities
        self.meter = Meter()

    @property
    def url(self) -> str:
        return self._inner.url

    def measure(self, work: Callable[[], object]) -> Meter:
        """What ``work`` asks of the store."""
        self.meter = Meter()
        work()
        return self.meter

    def initialize(self) -> None:
        self._inner.initialize()

    def read(self, name: str, limit_bytes: int) -> bytes:
        self.meter.operations += 1
        data = self._inner.read(name, limit_bytes)
        self.meter.read_bytes += len(data)
        return data

    def read_into(self, name: str, offset_bytes: int, buffer: memoryview) -> None:
        self.meter.operations += 1
        self._inner.read_into(name, offset_bytes, buffer)
        self.meter.read_bytes += buffer.nbytes

    def size(self, name: str) -> int | None:
        self.meter.operations += 1
        return self._inner.size(name)

    def list(self, prefix: str = "") -> Iterator[Listed]:
        self.meter.operations += 1
        return self._inner.list(prefix)

    def create(self, name: str, data: Buffer) -> None:
        self.meter.operations += 1
        self.meter.written_bytes += memoryview(data).nbytes
        self._inner.create(name, data)

    def overwrite(self, name: str, data: Buffer) -> None:
        self.meter.operations += 1
        self.meter.written_bytes += memoryview(data).nbytes
        self._inner.overwrite(name, data)

    def begin(self, name: str) -> Unpublished:
        return _MeteredFile(self._inner.begin(name), self)

    def publish(self, files: Sequence[Unpublished]) -> None:
        self.meter.operations += len(files)
        self._inner.publish([file.inner if isinstance(file, _MeteredFile) else file for file in files])

    def delete(self, name: str) -> None:
        self.meter.operations += 1
        self._inner.delete(name)

    def sweep_unpublished(self, older_than_s: float) -> int:
        return self._inner.sweep_unpublished(older_than_s)

    def now_s(self) -> float:
        return self._inner.now_s()

    def lock(self) -> AbstractContextManager[None]:
        return self._inner.lock()

    def close(self) -> None:
        self._inner.close()


class _MeteredFile:
    """A file being filled, of which every byte counts. It has no descriptor: what is written past it would not."""

    def __init__(self, inner: Unpublished, place: Metered) -> None:
        self.inner = inner
        self.name = inner.name
        self._place = place

    def write(self, data: Buffer, /) -> None:
        self._place.meter.written_bytes += memoryview(data).nbytes
        self.inner.write(data)

    def filled(self) -> None:
        self.inner.filled()

    def fileno(self) -> int:
        raise StoreError(f"{self.name}: what is metered has no descriptor", kind="no_descriptor", where=self.name)

    def discard(self) -> None:
        self.inner.discard()


# --- growth -----------------------------------------------------------------------------------------------------------


def append(log: Log, key: SigningKey, count: int, start: int = 0) -> None:
    """Notes of equal length, ``count`` of them in one slot."""
    announcement = KeyEntry(COMMON, key.vkey(ORIGIN)).encode()
    batch = [NoteEntry(COMMON, f"entry {number:09d}").encode() for number in range(start, start + count)]
    log.append(lambda _: batch, key, announce=lambda: announcement)


def grown(size: int, key: SigningKey) -> Metered:
    """A store in memory with a log of this many entries."""
    place = Metered(MemoryStore())
    log = Log(place, ORIGIN)
    while len(log) < size:
        append(log, key, min(BATCH, size - len(log) - (len(log) == 0)), len(log))
    assert len(log) == size
    return place


def costs(size: int, key: SigningKey) -> dict[str, Meter]:
    """What is asked of the store by those who come to a log of this many entries.

    An append is by one who is at work, by a process that has just started, or by a key that never wrote here; a look
    is a new reader's at the newest entry. The log ends with some entries more than it had.
    """
    place = grown(size, key)
    working = Log(place, ORIGIN)
    append(working, key, 1)  # entry ``size``: it has found its key and its place
    return {
        "append, at work": place.measure(lambda: append(working, key, 1)),
        "append, just started": place.measure(lambda: append(Log(place, ORIGIN), key, 1)),
        "look at the newest": place.measure(lambda: newest(place)),
        "append, by a new key": place.measure(lambda: append(Log(place, ORIGIN), SigningKey.generate(), 1)),
    }


def retention(size: int, key: SigningKey) -> Meter:
    """What retention asks of a log of this many entries after every snapshot, once it has read the history."""
    place = grown(size, key)
    working = Log(place, ORIGIN)
    append(working, key, 1)
    for_retention(working)
    append(working, key, 1)
    return place.measure(lambda: for_retention(working))


def newest(place: Store) -> None:
    """Open the log and read its last entry."""
    log = Log(place, ORIGIN)
    log.entry(log.refresh().size - 1)


# --- verify -----------------------------------------------------------------------------------------------------------


def chain_of(path: Path, snapshots: int) -> None:
    """A chain of small snapshots, each with a manifest, a locator and a segment of its own."""
    weight = torch.zeros(100)
    with Checkpointer(path, {"w": weight}, rng=False, key=SigningKey.generate().secret()) as checkpointer:
        for number in range(snapshots):
            weight.fill_(number)
            checkpointer.save(metrics={"loss": 1 / (number + 1)}).wait_durable(60)


def verify_s(path: Path, repeats: int) -> float:
    """The least time of several for everything but chunk data."""
    best_s = float("inf")
    for _ in range(repeats):
        with SnapshotChain(path, create=False) as chain:
            begin_s = time.perf_counter()
            report = chain.verify(deep=False)
            best_s = min(best_s, time.perf_counter() - begin_s)
        assert report.ok, report.problems
    return best_s


# --- the program ------------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; ``--quick`` makes everything small."""
    made = parser(__doc__)
    made.add_argument("--snapshots", type=int, default=None, help="in the chain that is verified (1000)")
    made.add_argument("--repeats", type=int, default=5)
    options = made.parse_args(arguments)
    if options.snapshots is None:
        options.snapshots = 20 if options.quick else 1000
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write, and print the tables."""
    options = parse(arguments)
    with workplace(options) as folder:
        chain_of(folder / "chain", options.snapshots)
        say(f"a chain of {options.snapshots} snapshots")
        spent_s = verify_s(folder / "chain", 1 if options.quick else options.repeats)
    say(f"verified in {spent_s:.2f} s")
    key = SigningKey.generate()
    length = SHORT + 256 if options.quick else LONG
    short, long = costs(SHORT, key), costs(length, key)
    short["retention, at work"], long["retention, at work"] = retention(SHORT, key), retention(length, key)
    table = [["", "operations", "", "bytes read", "", "bytes written", ""]]
    sizes = [f"{SHORT:,}", f"{length:,}"]
    table.append(["entries in the log", *sizes * 3])
    growth: dict[str, Any] = {}
    for name in short:
        few, many = short[name], long[name]
        figures = [few.operations, many.operations, few.read_bytes, many.read_bytes]
        table.append([name, *(f"{value:,}" for value in (*figures, few.written_bytes, many.written_bytes))])
        growth[name] = {"short": asdict(few), "long": asdict(many)}
    result = {
        "question": "What does a long history cost?",
        "method": f"verify(deep=False), least of {options.repeats}; operations and bytes counted in a store in memory",
        "snapshots": options.snapshots,
        "verify_s": spent_s,
        "goal_verify_s": GOAL_VERIFY_S,
        "goal_growth": GOAL_GROWTH,
        "entries": [SHORT, length],
        "growth": growth,
        "table": table,
    }
    store("chain", result, options)
    print(f"verify(deep=False) of {options.snapshots} snapshots: {seconds(spent_s)} (goal: {seconds(GOAL_VERIFY_S)})")
    rows(table)


if __name__ == "__main__":
    main()
