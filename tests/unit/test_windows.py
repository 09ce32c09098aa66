"""States larger than the host memory allowed are staged in windows: bit-exact, bounded, and failing cleanly."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ciuic_async import Checkpointer, CiuicWarning, PendingSnapshot, SaveFailedError, SnapshotChain, StoreError
from ciuic_async.capture.state_tree import flatten
from ciuic_async.handoffs import PlannedChunk
from ciuic_async.options import STAGING
from ciuic_async.pipeline.capture_stage import WindowQueue, stage_windows
from ciuic_async.staging.budget import SlotPlan
from ciuic_async.staging.device import Devices
from ciuic_async.staging.slots import Slot, SlotPool
from ciuic_async.staging.stager import stage, windows
from ciuic_async.stores.base import Unpublished
from ciuic_async.stores.local import LocalStore
from tests.strategies import State, fingerprint, trees

BOUND = STAGING.minimum_bytes


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(0, 40_000), max_size=12), chunk=st.sampled_from([4096, 16384]), factor=st.integers(1, 4)
)
def test_windows_cover_a_plan_exactly(sizes: list[int], chunk: int, factor: int) -> None:
    """Every chunk once and in order, each window within its size, staged bytes equal to the tensors'."""
    state = {"a": [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes]}
    captured = flatten(state, chunk_size_bytes=chunk)
    whole = torch.full((captured.plan.size_bytes,), 7, dtype=torch.uint8)
    if captured.plan.regions:
        stage(captured.sources, whole, 0, captured.plan.size_bytes, Devices())
    seen: list[PlannedChunk] = []
    for base, chunks in windows(captured.plan, factor * chunk):
        end = chunks[-1].address + chunks[-1].size_bytes
        assert end - base <= factor * chunk
        payload = torch.full((end - base,), 9, dtype=torch.uint8)
        stage(captured.sources, payload, base, end, Devices())
        for part in chunks:
            staged = payload[part.address - base :][: part.size_bytes]
            assert torch.equal(staged, whole[part.address :][: part.size_bytes])
        seen += chunks
    assert seen == list(captured.plan.chunks())


@settings(max_examples=20)
@given(state=trees())
def test_odd_states_are_staged_whole_in_windows(state: State) -> None:
    """Whatever the tree, windows of one small chunk hold what one big window holds; no byte is left as it was."""
    captured = flatten([state.value], chunk_size_bytes=4096)
    images = []
    for fill in (0x55, 0xAA):
        image = bytearray()
        for base, chunks in windows(captured.plan, 4096):
            payload = torch.full((4096,), fill, dtype=torch.uint8)
            stage(captured.sources, payload, base, chunks[-1].address + chunks[-1].size_bytes, Devices())
            for part in chunks:
                image += payload[part.address - base :][: part.size_bytes].numpy().tobytes()
        images.append(image)
    assert images[0] == images[1]


@pytest.mark.parametrize("codec", ["auto", "raw"])
def test_a_tensor_larger_than_the_bound_round_trips(codec: str, tmp_path: Path) -> None:
    """26 MB of state through 8 MiB of host memory, twice, with small tensors in between."""
    state: dict[str, Any] = {
        "big": torch.randn(5_000_001),
        "small": [torch.randn(n) for n in range(50)],
        "more": torch.randn(1_500_000),
    }
    with Checkpointer(tmp_path / "chain", state, host_memory_bytes=BOUND, codec=codec) as ckpt:
        for _ in range(2):
            state["big"] += 1
            expected = fingerprint(state)
            pending = ckpt.save()
            assert ckpt._pool.held_bytes <= BOUND
            assert fingerprint(pending.wait_durable(60).load()) == expected
        state["big"].zero_()
        ckpt.restore()
        assert fingerprint(state) == expected
        assert all(stats.stall_s > 0 for stats in ckpt.stats())
    assert SnapshotChain(tmp_path / "chain").verify().ok


class FailingStore(LocalStore):
    """A disk that is full while ``full`` is set."""

    full = False

    def begin(self, name: str) -> Unpublished:
        if self.full and name.startswith("segments/"):
            raise StoreError("disk full", kind="no_space")
        return super().begin(name)


@pytest.fixture
def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[SnapshotChain, FailingStore]]:
    monkeypatch.setattr("ciuic_async.chain.resolve_store", lambda url, _options: FailingStore(url))
    with SnapshotChain(tmp_path / "chain") as chain:
        store = chain.store
        assert isinstance(store, FailingStore)
        yield chain, store


def _save_and_wait(ckpt: Checkpointer) -> PendingSnapshot:
    """Whichever of the two calls tells of a failure."""
    pending = ckpt.save()
    ckpt.flush(30)
    return pending


def test_a_writer_that_fails_in_the_middle_loses_no_slot(failing: tuple[SnapshotChain, FailingStore]) -> None:
    """The failure keeps its own cause however the two threads race; afterwards windows work as before."""
    chain, store = failing
    state = {"big": torch.randn(6_000_000)}
    with Checkpointer(chain, state, host_memory_bytes=BOUND, busy_timeout_s=20, rng=False) as ckpt:
        for _ in range(5):
            store.full = True
            with pytest.warns(CiuicWarning, match="disk full"):
                pending = _save_and_wait(ckpt)
            assert pending.phase == "failed"
            assert pending.error is not None
            assert pending.error.kind == "no_space"
        store.full = False
        snapshot = ckpt.save().wait_durable(60)
        assert torch.equal(snapshot.load()["big"], state["big"])
    assert chain.verify().ok


STAGE_IN_LITTLE_MEMORY = """
    import sys
    import torch, ciuic_async

    def high_water():
        return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024

    state = {str(n): torch.rand(8 << 20) for n in range(5)}  # 160 MB
    with ciuic_async.Checkpointer(sys.argv[1], state, host_memory_bytes=16 << 20) as ckpt:
        open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts again
        before = high_water()
        ckpt.save().wait_durable(100)
        print(high_water() - before)
"""


@pytest.mark.slow
def test_peak_memory_is_bounded(tmp_path: Path) -> None:
    """160 MB of state with 16 MiB allowed: the process grows by less than 80 MB (windows, codec, write buffers)."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(STAGE_IN_LITTLE_MEMORY), str(tmp_path / "chain")],
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 80 << 20


@pytest.mark.parametrize("gives_up", ["before a window is copied", "while one is copied"])
def test_a_writer_that_gives_up_gets_no_further_window(gives_up: str) -> None:
    """Whenever the writer ends, staging ends with an error and every slot is back in the pool, none of them twice."""
    pool = SlotPool()
    captured = flatten([torch.ones(50_000) for _ in range(4)], chunk_size_bytes=1 << 16)
    plan = SlotPlan(2, 1 << 17, windowed=True)
    output = WindowQueue(whole=False)
    first = pool.acquire(plan, 0, 0.0)
    assert first is not None
    marked: list[int] = []

    def mark(slot: Slot) -> None:
        marked.append(slot.sequence)
        if gives_up == "while one is copied":
            output.release_all(pool)

    if gives_up == "before a window is copied":
        output.release_all(pool)
    with pytest.raises(SaveFailedError) as caught:
        stage_windows(captured, plan, pool, Devices(), output, first=first, timeout_s=0.0, mark=mark)
    assert caught.value.kind == "writer_failed"
    assert len(marked) == (gives_up == "while one is copied")
    slots = [pool.acquire(plan, 0, 0.0) for _ in range(3)]
    assert len({id(slot) for slot in slots[:2]}) == 2
    assert slots[2] is None, "no more than the plan's two slots, so none was handed back twice"
    for slot in slots[:2]:
        assert slot is not None
        pool.release(slot)
    pool.close()


def test_a_writer_that_frees_no_memory_is_waited_for_so_long() -> None:
    """Staging ends with an error that says what to do; the writer gets the windows so far, and then that error."""
    pool = SlotPool()
    captured = flatten([torch.ones(50_000) for _ in range(4)], chunk_size_bytes=1 << 16)
    plan = SlotPlan(1, 1 << 18, windowed=True)
    output = WindowQueue(whole=False)
    first = pool.acquire(plan, 0, 0.0)
    assert first is not None
    with pytest.raises(SaveFailedError, match="raise host_memory_bytes") as caught:
        stage_windows(captured, plan, pool, Devices(), output, first=first, timeout_s=0.0, mark=lambda slot: None)
    assert caught.value.kind == "staging_timeout"
    output.abandon(caught.value)
    found = iter(output)
    assert next(found).base == 0
    with pytest.raises(SaveFailedError) as again:
        next(found)
    assert again.value is caught.value
    output.release_all(pool)
    assert pool.acquire(plan, 0, 0.0) is first
    pool.release(first)
    pool.close()


def test_a_window_is_released_once() -> None:
    """A window whose slot went back already takes nobody else's slot away."""
    pool = SlotPool()
    captured = flatten([torch.ones(50_000)], chunk_size_bytes=1 << 16)
    plan = SlotPlan(1, 1 << 18, windowed=False)
    output = WindowQueue(whole=True)
    slot = pool.acquire(plan, 0, 0.0)
    assert slot is not None
    stage_windows(captured, plan, pool, Devices(), output, first=slot, timeout_s=0.0, mark=lambda slot: None)
    output.end()
    (window,) = output
    output.release(pool, window)
    again = pool.acquire(plan, 0, 0.0)
    assert again is slot
    output.release(pool, window)
    assert pool.acquire(plan, 0, 0.0) is None, "it is in use"
    pool.release(again)
    pool.close()
