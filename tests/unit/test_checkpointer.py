"""The Checkpointer as a training loop sees it: schedules, a busy writer, failures, forks, and what it leaves behind."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ciuic_async import (
    Checkpointer,
    CiuicWarning,
    Event,
    KeepLatest,
    PendingSnapshot,
    SaveFailedError,
    SnapshotChain,
    StoreError,
    UsageError,
)
from ciuic_async.format.digest import digest
from ciuic_async.options import WRITE
from ciuic_async.stores.base import Unpublished
from ciuic_async.stores.local import LocalStore


class GatedStore(LocalStore):
    """A local store whose publishing waits for a gate, or fails."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.gate = threading.Event()
        self.gate.set()
        self.reached = threading.Event()
        self.error: StoreError | None = None

    def publish(self, files: Sequence[Unpublished]) -> None:
        self.reached.set()
        assert self.gate.wait(60)
        if self.error is not None:
            for file in files:
                file.discard()
            raise self.error
        super().publish(files)


@pytest.fixture
def gated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[SnapshotChain, GatedStore]]:
    """A chain on a gated store."""
    monkeypatch.setattr("ciuic_async.chain.resolve_store", lambda url, _options: GatedStore(url))
    with SnapshotChain(tmp_path / "chain") as chain:
        store = chain.store
        assert isinstance(store, GatedStore)
        yield chain, store
        store.gate.set()


def _steps(chain: Path | SnapshotChain) -> list[int | None]:
    opened = chain if isinstance(chain, SnapshotChain) else SnapshotChain(chain)
    return [snapshot.step for snapshot in opened]


# --- schedules --------------------------------------------------------------------------------------------------------


def test_every_steps(tmp_path: Path) -> None:
    """A snapshot at each multiple; step() says which calls took one."""
    with Checkpointer(tmp_path / "chain", {"n": 1}, every_steps=3) as ckpt:
        taken = [ckpt.step() is not None for _ in range(7)]
    assert taken == [False, False, True, False, False, True, False]
    assert _steps(tmp_path / "chain") == [3, 6]


def test_every_epochs(tmp_path: Path) -> None:
    """An epoch is over when step() is first called with the next one."""
    with Checkpointer(tmp_path / "chain", {"n": 1}, every_epochs=2) as ckpt:
        taken = [ckpt.step(epoch=number // 3) is not None for number in range(15)]
    assert [number for number, was in enumerate(taken) if was] == [6, 12]


def test_epochs_that_are_no_numbers_count_by_change(tmp_path: Path) -> None:
    """With texts as epochs every change is one."""
    with Checkpointer(tmp_path / "chain", {"n": 1}, every_epochs=1) as ckpt:
        taken = [ckpt.step(epoch=name) is not None for name in "aabbc"]
    assert taken == [False, False, True, False, True]


def test_every_seconds(tmp_path: Path) -> None:
    """A period that is always over takes one at each step; one that never is takes none."""
    for seconds, expected in ((1e-9, [1, 2]), (1e9, [])):
        with Checkpointer(tmp_path / f"{seconds}", {"n": 1}, every_seconds=seconds) as ckpt:
            ckpt.step()
            ckpt.step()
        assert _steps(tmp_path / f"{seconds}") == expected


def test_any_schedule_is_enough_and_none_takes_none(tmp_path: Path) -> None:
    """Several schedules are joined by or; without any only save() takes snapshots."""
    with Checkpointer(tmp_path / "both", {"n": 1}, every_steps=4, every_epochs=1) as ckpt:
        for number in range(8):
            ckpt.step(epoch=number // 3)
    assert _steps(tmp_path / "both") == [4, 7, 8]
    with Checkpointer(tmp_path / "none", {"n": 1}) as ckpt:
        assert [ckpt.step(), ckpt.step()] == [None, None]
        ckpt.save()
    assert _steps(tmp_path / "none") == [2]


# --- tags and metrics -------------------------------------------------------------------------------------------------


METRICS: dict[str, Any] = {
    "loss": 0.1 + 0.2,
    "tiny": 5e-324,
    "zero": -0.0,
    "steps": 2**53 - 1,
    "flag": True,
    "tensor": torch.tensor(1 / 3),
    "trained": torch.tensor(0.7, requires_grad=True),
    "nan": math.nan,
    "infinite": -math.inf,
}


def test_metrics_and_tags_are_recorded_exactly(tmp_path: Path) -> None:
    """Every float comes back bit for bit, tensors by value; NaN and infinities are numbers here."""
    with Checkpointer(tmp_path / "chain", {"n": 1}) as ckpt:
        snapshot = ckpt.save(metrics=METRICS, tags=("golden", "ärlig")).wait_durable(30)
        progress = ckpt.restore("golden")
        assert progress is not None
    for found in (snapshot.metrics, progress.metrics, SnapshotChain(tmp_path / "chain").get("ärlig").metrics):
        for name, value in METRICS.items():
            expected = float(value.detach() if isinstance(value, torch.Tensor) else value)
            assert repr(found[name]) == repr(expected)
    assert snapshot.tags == ("golden", "ärlig")


BAD_METRICS: dict[str, Any] = {
    "too many": {f"m{n}": n for n in range(33)},
    "a text": {"loss": "low"},
    "a vector": {"loss": torch.ones(2)},
    "complex": {"loss": 1j},
    "too large an int": {"loss": 10**400},
    "a name that is none": {3: 1.0},
    "a name with a line break": {"a\nb": 1.0},
}


@pytest.mark.parametrize("metrics", BAD_METRICS.values(), ids=list(BAD_METRICS))
def test_metrics_that_are_none_are_reported(metrics: Any, tmp_path: Path) -> None:
    """A wrong metric loses that snapshot loudly and nothing else."""
    with Checkpointer(tmp_path / "chain", {"n": 1}, every_steps=1) as ckpt:
        with pytest.warns(CiuicWarning, match="metric"):
            pending = ckpt.step(metrics=metrics)
        assert pending is not None
        assert isinstance(pending.error, UsageError)
        ckpt.step()
    assert _steps(tmp_path / "chain") == [2]


def test_32_metrics_are_enough_for_everybody(tmp_path: Path) -> None:
    """The limit itself is allowed."""
    with Checkpointer(tmp_path / "chain", {"n": 1}) as ckpt:
        assert len(ckpt.save(metrics={f"m{n}": n for n in range(32)}).wait_durable(30).metrics) == 32


@pytest.mark.parametrize("tags", ["golden", [""], ["a\nb"], [3], ["x" * 201]])
def test_tags_that_are_none_are_refused(tags: Any, tmp_path: Path) -> None:
    """A wrong tag is a UsageError at the call."""
    with Checkpointer(tmp_path / "chain", {"n": 1}) as ckpt, pytest.raises(UsageError, match="tag"):
        ckpt.save(tags=tags)


# --- a busy writer ----------------------------------------------------------------------------------------------------


def test_skipping_when_busy_blocks_nothing(gated: tuple[SnapshotChain, GatedStore]) -> None:
    """when_busy="skip": with both slots in use step() gives None at once; what was taken becomes durable."""
    chain, store = gated
    with Checkpointer(chain, {"t": torch.ones(9)}, every_steps=1, when_busy="skip", rng=False) as ckpt:
        store.gate.clear()
        pendings = [ckpt.step() for _ in range(5)]
        assert [pending is not None for pending in pendings] == [True, True, False, False, False]
        store.gate.set()
        ckpt.flush(30)
    assert _steps(chain) == [1, 2]


def test_waiting_is_bounded_and_loud(gated: tuple[SnapshotChain, GatedStore]) -> None:
    """when_busy="wait": after busy_timeout_s the snapshot is skipped with a warning; training goes on."""
    chain, store = gated
    with Checkpointer(chain, {"t": torch.ones(9)}, every_steps=1, busy_timeout_s=0.05, rng=False) as ckpt:
        store.gate.clear()
        ckpt.step()
        ckpt.step()
        with pytest.warns(CiuicWarning, match="busy_timeout_s"):  # at once, though older snapshots are unfinished
            third = ckpt.step()
        assert third is not None
        assert third.phase == "failed"
        assert third.error is not None
        assert third.error.kind == "busy"
        store.gate.set()
        ckpt.flush(30)
    assert _steps(chain) == [1, 2]


def test_waiting_ends_when_the_writer_is_done(gated: tuple[SnapshotChain, GatedStore]) -> None:
    """A snapshot that has to wait for a slot gets the one that comes free."""
    chain, store = gated
    with Checkpointer(chain, {"t": torch.ones(9)}, every_steps=1, rng=False) as ckpt:
        store.gate.clear()
        ckpt.step()
        ckpt.step()
        opener = threading.Thread(target=store.gate.set)
        opener.start()
        assert ckpt.step() is not None
        opener.join()
    assert _steps(chain) == [1, 2, 3]


def test_flush_says_when_it_takes_too_long(gated: tuple[SnapshotChain, GatedStore]) -> None:
    """A TimeoutError names the step; the work goes on."""
    chain, store = gated
    with Checkpointer(chain, {"n": 1}, rng=False) as ckpt:
        store.gate.clear()
        pending = ckpt.save()
        with pytest.raises(TimeoutError, match="step 0 is still staged"):
            ckpt.flush(0.02)
        with pytest.raises(TimeoutError):
            pending.wait_durable(0.02)
        store.gate.set()
        ckpt.flush(30)
        assert pending.phase == "durable"


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_failure_warns_once_and_training_goes_on(gated: tuple[SnapshotChain, GatedStore]) -> None:
    """on_error="warn": the next step warns with the cause, later ones do not, and the next snapshot is durable."""
    chain, store = gated
    with Checkpointer(chain, {"t": torch.ones(9)}, every_steps=2) as ckpt:
        store.error = StoreError("disk full", kind="no_space")
        ckpt.step()
        pending = ckpt.step()
        assert pending is not None
        with pytest.warns(CiuicWarning, match="step 2 did not become durable: disk full"):
            ckpt.flush(30)
        store.error = None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert ckpt.step() is None
            assert ckpt.step() is not None
            ckpt.flush(30)
    assert _steps(chain) == [4]
    assert chain.verify().ok


def test_a_failure_is_raised_once(gated: tuple[SnapshotChain, GatedStore]) -> None:
    """on_error="raise": one SaveFailedError with the store's error as cause and its kind, at the next call."""
    chain, store = gated
    ckpt = Checkpointer(chain, {"n": 1}, every_steps=1, on_error="raise")
    store.error = StoreError("disk full", kind="no_space")
    ckpt.step()
    with pytest.raises(SaveFailedError, match="disk full") as failure:
        ckpt.flush(30)
    assert failure.value.kind == "no_space"
    assert failure.value.__cause__ is store.error
    store.error = None
    ckpt.step()
    ckpt.flush(30)
    store.error = StoreError("gone")
    ckpt.step()
    with pytest.raises(SaveFailedError, match="gone"):
        ckpt.close()
    ckpt.close()


def test_a_failure_somebody_waited_for_is_not_told_again(gated: tuple[SnapshotChain, GatedStore]) -> None:
    """wait_durable() raises it; then neither step() nor close() does."""
    chain, store = gated
    with Checkpointer(chain, {"n": 1}, every_steps=1, on_error="raise") as ckpt:
        store.error = StoreError("disk full")
        pending = ckpt.step()
        assert pending is not None
        with pytest.raises(SaveFailedError):
            pending.wait_durable(30)
        store.error = None
        ckpt.step()
        ckpt.flush(30)
    assert _steps(chain) == [2]


def test_a_broken_state_dict_is_a_failure_with_its_cause(tmp_path: Path) -> None:
    """What an object's state_dict() raises names the object and is the cause's cause."""

    class Broken:
        def state_dict(self) -> Any:
            raise ZeroDivisionError("odd")

        def load_state_dict(self, state: Any) -> None: ...

    with Checkpointer(tmp_path / "chain", {"loader": Broken()}, on_error="raise") as ckpt:
        with pytest.raises(SaveFailedError, match=r"loader.*odd") as failure:
            ckpt.save()
        assert isinstance(failure.value.__cause__, UsageError)
        assert ckpt.step() is None, "nothing is due, nobody asks the object"


def test_a_position_that_cannot_be_stored_costs_no_slot(tmp_path: Path) -> None:
    """An epoch that is an object fails its snapshots by name, however many, and the next one works."""
    with Checkpointer(tmp_path / "chain", {"n": 1}, every_steps=1, busy_timeout_s=5) as ckpt:
        for _ in range(4):
            with pytest.warns(CiuicWarning, match="epoch: .*object"):
                ckpt.step(epoch=object())
        ckpt.step(epoch=1)
    assert _steps(tmp_path / "chain") == [5]


def test_an_exception_in_the_loop_keeps_what_was_taken(tmp_path: Path) -> None:
    """Leaving the with-block by an error makes snapshots durable and lets the error through."""

    def train() -> None:
        with Checkpointer(tmp_path / "chain", {"n": 1}, every_steps=1) as ckpt:
            ckpt.step()
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        train()
    assert _steps(tmp_path / "chain") == [1]


def test_listeners_and_callbacks_cannot_harm(tmp_path: Path) -> None:
    """What they raise is logged; the snapshot is durable; events come in order with its id."""
    events: list[Event] = []

    def listen(event: Event) -> None:
        events.append(event)
        raise RuntimeError("listener")

    def callback(pending: PendingSnapshot) -> None:
        raise RuntimeError("callback")

    with Checkpointer(tmp_path / "chain", {"t": torch.ones(9)}, listener=listen) as ckpt:
        pending = ckpt.save()
        pending.add_done_callback(callback)
        snapshot = pending.wait_durable(30)
        ckpt.flush(30)
    assert {event.stage for event in events} == {"stage", "commit"}
    assert {event.snapshot for event in events} == {snapshot.id}


# --- arguments --------------------------------------------------------------------------------------------------------


WRONG: list[dict[str, Any]] = [
    {"staging": "sometimes"},
    {"when_busy": "panic"},
    {"on_error": "ignore"},
    {"codec": "best"},
    {"every_steps": 0},
    {"every_seconds": -1.0},
    {"every_epochs": 0},
    {"overhead_budget": 1.5},
    {"mtbf_s": 0},
    {"frozen": "model.*"},
    {"host_memory_bytes": 1000},
    {"preemption": -1},
    {"preemption": "yes"},
]


@pytest.mark.parametrize("options", WRONG, ids=lambda options: next(iter(options)))
def test_options_that_cannot_be_kept_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    """A wrong value is a UsageError that names the option; no chain is made."""
    with pytest.raises(UsageError, match=next(iter(options))):
        Checkpointer(tmp_path / "chain", {"n": 1}, **options)
    assert not (tmp_path / "chain").exists()


@pytest.mark.parametrize("state", [{}, [1], None, {1: 2}, {"": 1}], ids=repr)
def test_a_state_that_is_no_mapping_of_names_is_refused(state: Any, tmp_path: Path) -> None:
    """The UsageError shows what a state looks like; no chain is made."""
    with pytest.raises(UsageError, match="state"):
        Checkpointer(tmp_path / "chain", state)
    assert not (tmp_path / "chain").exists()


def test_a_job_of_several_ranks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Storing one rank's state as if it were all would lose the others: WORLD_SIZE=2 is a UsageError."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="2 ranks") as refusal:
        Checkpointer(tmp_path / "chain", {"n": 1})
    assert refusal.value.kind == "several_ranks"
    assert not (tmp_path / "chain").exists()


# --- ends -------------------------------------------------------------------------------------------------------------


def test_close_is_idempotent_and_final(tmp_path: Path) -> None:
    """After close() nothing is taken; statistics stay readable."""
    ckpt = Checkpointer(tmp_path / "chain", {"t": torch.ones(1000)}, every_steps=1)
    ckpt.step()
    ckpt.close()
    ckpt.close()
    with pytest.raises(UsageError, match="closed"):
        ckpt.save()
    with pytest.raises(UsageError, match="closed"):
        ckpt.step()
    (stats,) = ckpt.stats()
    assert stats.step == 1
    assert stats.raw_bytes > 4000
    assert stats.persist_s is not None
    assert stats.write_s is not None
    assert 0 < stats.write_s <= stats.persist_s
    assert stats.stall_s >= stats.stage_s > 0


def test_a_shared_chain_stays_open(tmp_path: Path) -> None:
    """Who opened the chain closes it: two runs after each other use one object."""
    with SnapshotChain(tmp_path / "chain") as chain:
        for value in (1, 2):
            with Checkpointer(chain, {"n": value}) as ckpt:
                assert ckpt.chain is chain
                ckpt.save()
        assert [snapshot.load()["n"] for snapshot in chain] == [1, 2]


@pytest.mark.usefixtures("no_leaks")
def test_nothing_is_left_behind(tmp_path: Path) -> None:
    """Threads end and descriptors are closed with close(), also after a restore."""
    ckpt = Checkpointer(tmp_path / "chain", {"t": torch.ones(100_000)}, every_steps=2)
    ckpt.step()
    ckpt.step()
    ckpt.restore()
    ckpt.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("ciuic")]


def test_a_checkpointer_without_snapshots_starts_no_writer(tmp_path: Path) -> None:
    """Opening and restoring alone starts no thread that stays."""
    with Checkpointer(tmp_path / "chain", {"n": 1}) as ckpt:
        ckpt.restore()
        assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("ciuic")]


FORK = """
    import os, sys, threading, warnings
    warnings.simplefilter("ignore", DeprecationWarning)  # of fork beside threads: that is what is tried
    import torch, ciuic_async

    ckpt = ciuic_async.Checkpointer(sys.argv[1], {"t": torch.ones(100_000)}, every_steps=1)
    ckpt.step()
    pid = os.fork()
    if pid == 0:
        assert ckpt.step() is None
        for call in (ckpt.save, ckpt.restore):
            try:
                call()
            except ciuic_async.UsageError as error:
                assert "forked child" in str(error)
            else:
                os._exit(3)
        ckpt.close()
        os._exit(0 if threading.active_count() == 1 else 4)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    ckpt.step()
    ckpt.close()
"""

SCRIPT_WITHOUT_CLOSE = """
    import sys
    import torch, ciuic_async
    ckpt = ciuic_async.Checkpointer(sys.argv[1], {"t": torch.ones(1_000_000)})
    ckpt.save()
    ckpt.save()
"""


def _script(text: str, *arguments: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text), *map(str, arguments)], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_forked_child_is_inert(tmp_path: Path) -> None:
    """The child takes nothing and closes nothing; the parent's snapshots before and after are durable."""
    _script(FORK, tmp_path / "chain")
    assert _steps(tmp_path / "chain") == [1, 2]
    assert SnapshotChain(tmp_path / "chain").verify().ok


def test_a_script_that_never_closes_loses_nothing(tmp_path: Path) -> None:
    """At the interpreter's exit what was taken is made durable."""
    _script(SCRIPT_WITHOUT_CLOSE, tmp_path / "chain")
    assert len(SnapshotChain(tmp_path / "chain")) == 2


MANY_SAVES = """
    import gc, os, sys
    import torch, ciuic_async

    def resident():
        gc.collect()
        return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    state = {"t": torch.zeros(1 << 18), "n": 0}
    sizes, descriptors = [], []
    with ciuic_async.Checkpointer(sys.argv[1], state, rng=False, codec="raw") as ckpt:
        for number in range(240):
            state["t"][number] += 1
            ckpt.save().wait_durable(60)
            ckpt.chain.prune(ciuic_async.KeepLatest(2))  # here, so that none is under way when descriptors are counted
            if number in (39, 239):
                sizes.append(resident())
                descriptors.append(len(os.listdir("/proc/self/fd")))
    assert descriptors[0] == descriptors[1], descriptors
    print(sizes[1] / sizes[0])
"""


@pytest.mark.slow
@pytest.mark.timeout(300)  # 440 commits: on a busy disk each of them waits
def test_memory_and_descriptors_stay_flat(tmp_path: Path) -> None:
    """200 snapshots after 40 of warming up: the process grows by less than 2 %, and opens nothing."""
    assert float(_script(MANY_SAVES, tmp_path / "chain")) < 1.02


# --- several at once --------------------------------------------------------------------------------------------------


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    """KeepLatest(2): two snapshots are left, both whole, and their files only."""
    weight = torch.zeros(100_000)
    with Checkpointer(tmp_path / "chain", {"w": weight}, every_steps=1, keep=KeepLatest(2), rng=False) as ckpt:
        for _ in range(6):
            weight += torch.rand(100_000)
            ckpt.step()
            ckpt.flush(30)
        expected = weight.clone()
    chain = SnapshotChain(tmp_path / "chain")
    assert _steps(chain) == [5, 6]
    assert torch.equal(chain.get("latest").load()["w"], expected)
    assert chain.verify().ok
    assert len(list((tmp_path / "chain" / "manifests").iterdir())) == 2


def test_two_checkpointers_share_a_chain(tmp_path: Path) -> None:
    """Both append at once; nothing is lost, and every snapshot is whole."""
    failures: list[BaseException] = []
    start = threading.Barrier(2)

    def train(name: int) -> None:
        try:
            weight = torch.full((50_000,), float(name))
            with Checkpointer(tmp_path / "chain", {"w": weight}, every_steps=1, on_error="raise", rng=False) as ckpt:
                start.wait(30)
                for _ in range(8):
                    weight += 2
                    ckpt.step()
        except BaseException as error:
            failures.append(error)

    with SnapshotChain(tmp_path / "chain"):  # so that it is there when both begin
        threads = [threading.Thread(target=train, args=(name,)) for name in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
    chain = SnapshotChain(tmp_path / "chain")
    assert sorted(float(snapshot.load()["w"][0]) for snapshot in chain) == [float(n) for n in range(2, 18)]
    assert chain.verify().ok


def test_the_state_may_grow_and_shrink(tmp_path: Path) -> None:
    """Slots follow the state: each snapshot holds what was there at its call."""
    state: dict[str, Any] = {"t": torch.zeros(10)}
    sizes = [10, 1_000_000, 3, 2_000_000, 0]
    with Checkpointer(tmp_path / "chain", state, rng=False) as ckpt:
        for size in sizes:
            state["t"] = torch.full((size,), float(size))
            ckpt.save()
    loaded = [snapshot.load()["t"] for snapshot in SnapshotChain(tmp_path / "chain")]
    assert [len(tensor) for tensor in loaded] == sizes
    assert all(torch.equal(tensor, torch.full_like(tensor, float(len(tensor)))) for tensor in loaded)


def test_the_checkpointer_keeps_no_state_alive(tmp_path: Path) -> None:
    """A tensor that training dropped is freed once its snapshot is taken."""
    state: dict[str, Any] = {"t": torch.zeros(1000)}
    with Checkpointer(tmp_path / "chain", state) as ckpt:
        ckpt.save().wait_durable(30)
        storage = state["t"].untyped_storage()._weak_ref()
        state["t"] = None
        gc.collect()
        assert torch.UntypedStorage._expired(storage)
        torch.UntypedStorage._free_weak_ref(storage)  # type: ignore[no-untyped-call]


def test_before_update_is_harmless(tmp_path: Path) -> None:
    """With blocking staging everything is copied already."""
    with Checkpointer(tmp_path / "chain", {"n": 1}, every_steps=1) as ckpt:
        ckpt.before_update()
        ckpt.step()
        ckpt.before_update()
    assert _steps(tmp_path / "chain") == [1]


@pytest.mark.parametrize("idle", [0, 1])
def test_digests_made_at_once_or_behind_are_the_same(
    tmp_path: Path, idle: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On busy processors staging digests, else the writer does: manifest, dedup and bytes are the same."""
    monkeypatch.setattr("ciuic_async.taking.idle_processors", lambda: idle)
    state = {"a": torch.randn(2_000_000), "b": torch.zeros(10), "c": torch.randn(300_000)}
    with Checkpointer(tmp_path / "chain", state, rng=False, codec="raw") as ckpt:
        first = ckpt.save().wait_durable(60)
        state["c"].add_(1)
        second = ckpt.save().wait_durable(60)
        digesting = [thread for thread in threading.enumerate() if thread.name.startswith("ciuic-digest")]
        assert bool(digesting) is (idle == 0 and WRITE.digest_threads > 0)
        manifest = second.resolve().manifest
        expected = [
            digest(data)
            for tensor in (state["a"], state["c"])
            for data in _pieces(tensor.numpy().tobytes(), manifest.tensors[0].shards[0].chunk_size_bytes)
        ]
        found = [chunk for tensor in manifest.tensors for shard in tensor.shards for chunk in shard.chunk_digests()]
        assert found == expected
        assert second.stored_bytes < first.stored_bytes / 4
        assert all(torch.equal(second.load()[name], value) for name, value in state.items())


def _pieces(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]
