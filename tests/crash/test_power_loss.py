"""The power fails after any operation: everything that was not synced is gone, or there, or some of it.

Short form: a sample of the prefixes of one run's operations. ``CIUIC_CRASH_LONG=1``: every prefix, more mixtures.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import ciuic_async
from ciuic_async import Checkpointer, KeepLatest, native
from ciuic_async.chain import SnapshotChain
from ciuic_async.errors import CiuicError, NotFoundError
from ciuic_async.events import Event
from ciuic_async.stores import local
from tests.crash.faults import KEPT, LONG, check, fast_folder, same, spread, state_at
from tests.crash.forgetful_store import Disk, Operation, RecordingOs, lay_out

STEPS = 4
MIXTURES = 6 if LONG else 2
PREFIXES = 110
"""Of the short form."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200 if LONG else 300)]


@pytest.fixture
def folder() -> Iterator[Path]:
    with fast_folder() as made:
        yield made


def train(chain: Path, recorder: RecordingOs, steps: range) -> None:
    """Take a snapshot of each of ``steps``, and drop all but the newest two."""
    state: dict[str, Any] = state_at(0)
    step = 0

    def committed(event: Event) -> None:
        """On the writer's thread, between the snapshot's last operation and retention's first."""
        if event.stage == "commit":
            recorder.report(step, event.snapshot)

    with Checkpointer(
        chain, state, every_steps=1, keep=KeepLatest(KEPT), rng=False, listener=committed
    ) as checkpointer:
        checkpointer.restore()
        checkpointer._step = steps.start - 1
        for step in steps:
            state.update(state_at(step))
            pending = checkpointer.step()
            assert pending is not None
            pending.wait_durable()


def record(chain: Path, monkeypatch: pytest.MonkeyPatch) -> RecordingOs:
    """What the disk saw of a run that makes a chain, takes four snapshots and drops the older two."""
    chain.mkdir()
    recorder = RecordingOs(chain)
    with monkeypatch.context() as patch:
        patch.setattr(local, "os", recorder)
        train(chain, recorder, range(1, STEPS + 1))
    return recorder


def judge(folder: Path, state: dict[str, bytes | None], durable: dict[int, str]) -> None:
    """What must hold of a disk after a power cut."""
    shutil.rmtree(os.environ["XDG_STATE_HOME"], ignore_errors=True)  # of the end of the run
    lay_out(state, folder)
    if "ciuic.json" in state:
        check(folder, durable)
        return
    assert not durable, "the chain itself is gone"
    with pytest.raises(NotFoundError):
        SnapshotChain(folder, create=False)
    again = ciuic_async.save(state_at(77), folder)
    with SnapshotChain(folder, create=False) as chain:
        assert same(chain.get(again.id).load(), state_at(77))
        report = chain.verify()
        assert report.ok, report.problems


def key_of(state: dict[str, bytes | None], durable: dict[int, str]) -> bytes:
    hasher = hashlib.sha256(repr(sorted(durable)).encode())
    for name, content in state.items():
        if not name.startswith("tmp/"):  # never read
            hasher.update(f"{name} {None if content is None else hashlib.sha256(content).hexdigest()}\n".encode())
    return hasher.digest()


@pytest.mark.parametrize("with_core", [False, True], ids=["plain", "native"])
def test_what_was_durable_survives_a_power_cut_at_any_moment(
    folder: Path, monkeypatch: pytest.MonkeyPatch, with_core: bool
) -> None:
    """After every prefix of the operations, whatever unsynced names and bytes survive: nothing durable is lost."""
    if with_core and (native.core is None or not LONG):
        pytest.skip("the long form, with the native core")
    if not with_core:
        monkeypatch.setattr(native, "core", None)
    recorder = record(folder / "run", monkeypatch)
    operations = recorder.operations
    assert sum(operation.kind == "durable" for operation in operations) == STEPS
    wanted = set(spread(len(operations), PREFIXES)) | {
        number for number, operation in enumerate(operations, 1) if operation.kind == "durable"
    }
    dice = random.Random(7)
    disk = Disk(recorder.folders)
    seen: set[bytes] = set()
    for number, operation in enumerate(operations, 1):
        disk.apply(operation)
        if number not in wanted:
            continue
        for how in ("lost", "kept", *["mixed"] * MIXTURES):
            state = disk.after_power_loss(how, dice)
            key = key_of(state, disk.durable)
            if key in seen:
                continue
            seen.add(key)
            place = folder / "state"
            try:
                judge(place, state, dict(disk.durable))
            except BaseException as error:
                error.add_note(f"after operation {number} of {len(operations)}, {how}: {operation_text(operation)}")
                raise
            shutil.rmtree(place)
    assert len(seen) > PREFIXES / 2, "too few different states to mean anything"


def test_what_a_killed_process_left_unsynced_is_synced_by_the_next(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill, a second process that goes on, then a power cut: what the second reported durable rests on nothing that
    only the first had made, such as a folder that it did not live to sync."""
    monkeypatch.setattr(native, "core", None)
    whole = two_lives(folder / "whole", None, monkeypatch)
    for calls in spread(whole.calls // 2, 40):
        recorder = two_lives(folder / "run", calls, monkeypatch)
        disk = Disk(recorder.folders)
        for operation in recorder.operations:
            disk.apply(operation)
        assert 2 in disk.durable
        try:
            judge(folder / "state", disk.after_power_loss("lost", random.Random(0)), dict(disk.durable))
        except BaseException as error:
            error.add_note(f"the first process died after call {calls} of {whole.calls}")
            raise
        shutil.rmtree(folder / "state")
        shutil.rmtree(folder / "run")


def two_lives(chain: Path, calls: int | None, monkeypatch: pytest.MonkeyPatch) -> RecordingOs:
    """What the disk saw of a process that makes a chain and dies after so many calls, and of one that goes on."""
    chain.mkdir()
    recorder = RecordingOs(chain)
    with monkeypatch.context() as patch:
        patch.setattr(local, "os", recorder)
        recorder.dies_after = calls
        with suppress(CiuicError):
            train(chain, recorder, range(1, 2))
        recorder.dies_after = None
        train(chain, recorder, range(2, 3))
    return recorder


def operation_text(operation: Operation) -> str:
    return f"{operation.kind} {operation.name} of node {operation.node} in folder {operation.folder}"


def test_the_model_forgets_what_was_not_synced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store without its folder syncs loses snapshots in this model: the campaign above can fail."""
    recorder = record(folder / "run", monkeypatch)
    disk = Disk(recorder.folders)
    for operation in recorder.operations:
        if operation.kind != "sync" or operation.node not in recorder.folders or operation.node == 0:
            disk.apply(operation)
    state = disk.after_power_loss("lost", random.Random(0))
    assert len(disk.durable) == STEPS
    with pytest.raises(AssertionError, match=r"gone|not in the chain"):
        judge(folder / "state", state, dict(disk.durable))
