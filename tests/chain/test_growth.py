"""What an append costs does not grow with the log. Counted, not timed: the same on every machine."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ciuic_async.stores.memory import MemoryStore
from ciuic_async.transparency.keys import SigningKey

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """``bench/chain.py``, which does the counting, imported as the programs there are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        yield importlib.import_module("chain")


@pytest.fixture(scope="module")
def counted(bench: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a log of 356 entries costs, and one of 100,196: equally wide at the right edge."""
    key = SigningKey.generate()
    return bench.costs(bench.SHORT, key), bench.costs(bench.LONG, key)


@pytest.mark.parametrize("who", ["append, at work", "append, just started", "look at the newest"])
def test_a_long_log_costs_as_little_as_a_short_one(counted: tuple[dict[str, Any], dict[str, Any]], who: str) -> None:
    """Operations and bytes at 100,196 entries are at most 1.5 times those at 356, for writers and for readers."""
    short, long = (found[who] for found in counted)
    assert long.operations <= 1.5 * short.operations
    assert long.read_bytes <= 1.5 * short.read_bytes
    assert long.written_bytes <= 1.5 * short.written_bytes


def test_retention_reads_history_once(bench: Any) -> None:
    """After that it asks nothing more for every snapshot, however long the log: entries are remembered."""
    key = SigningKey.generate()
    short, long = bench.retention(bench.SHORT, key), bench.retention(bench.SHORT + 38 * 256, key)
    assert (short.operations, long.operations) == (0, 0)


def test_an_append_writes_what_it_must(counted: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """The slot, the last tile and its bundle, the head: four names, and no byte of other tiles."""
    _, long = counted
    assert long["append, at work"].operations <= 8
    assert long["append, at work"].written_bytes < 32 << 10


def test_a_new_key_reads_the_log_once(bench: Any, counted: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """It has to know that nobody announced it: each bundle and its tile once, for the first entry of a key only."""
    _, long = counted
    bundles = -(-bench.LONG // 256)
    assert bundles < long["append, by a new key"].operations <= 2 * bundles + 20


def test_the_meter_sees_everything(bench: Any) -> None:
    """What it counts is what the store inside was asked for, byte by byte."""
    inner = MemoryStore()
    place = bench.Metered(inner)

    def work() -> None:
        place.create("log/checkpoint", b"four")
        file = place.begin("log/tile/0/000")
        file.write(b"six by")
        place.publish([file])
        place.read("log/checkpoint", 10)
        place.read_into("log/tile/0/000", 1, memoryview(bytearray(3)))
        place.overwrite("log/checkpoint", b"eight by")
        assert place.size("log/checkpoint") == 8
        assert [listed.name for listed in place.list("log")] == ["log/checkpoint", "log/tile/0/000"]
        place.delete("log/checkpoint")

    meter = place.measure(work)
    assert (meter.operations, meter.read_bytes, meter.written_bytes) == (8, 7, 18)
    assert inner.size("log/checkpoint") is None
