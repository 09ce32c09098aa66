"""The keeper: what is staged when the trainer dies becomes durable all the same.

5 kills at each moment, or 50 with ``CIUIC_CRASH_LONG=1``.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ciuic_async import Checkpointer, UsageError
from ciuic_async.chain import SnapshotChain
from ciuic_async.keeper import client, offer, process, rescue, wire
from ciuic_async.keeper.held import HeldSlot
from ciuic_async.keeper.rescue import Charge
from ciuic_async.options import KeeperOptions
from ciuic_async.transparency.log import Log
from tests.crash.faults import LONG
from tests.crash.keeper_lives import same, state_of

KILLS = 50 if LONG else 5

SCRIPT = """
import os, signal, sys, torch
from ciuic_async import Checkpointer
from tests.crash.keeper_lives import state_of
chain, end = sys.argv[1:3]
state = state_of(1)
ckpt = Checkpointer(chain, state, every_steps=1, keeper=True, rng=False)
ckpt.step().wait_staged(60)
print(ckpt._keeper.pid, flush=True)
if end == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if end == "durable":
    ckpt.flush(60)
    os.kill(os.getpid(), signal.SIGKILL)
if end == "segfault":
    os.kill(os.getpid(), signal.SIGSEGV)
if end == "exit":
    os._exit(0)
if end == "exec":
    os.execv(sys.executable, [sys.executable, "-c", "import sys; sys.stdin.read()"])
if end == "signalled":
    numbers = signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM
    deaf = sum(1 << number - 1 for number in numbers)
    while True:
        status = dict(line.split(":", 1) for line in open(f"/proc/{ckpt._keeper.pid}/status"))
        if int(status["SigIgn"], 16) & deaf == deaf:
            break
    for number in numbers:
        os.kill(ckpt._keeper.pid, number)
    os.kill(os.getpid(), signal.SIGKILL)
if end == "live":
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _own_runtime_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keepers of this test meet nobody else's. The path of a socket has a limit of some 100 bytes."""
    with tempfile.TemporaryDirectory(prefix="ciuic-") as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        yield


def _train(chain: Path, end: str) -> int:
    """A trainer that ends in a certain way, after it had one snapshot staged; its keeper's pid."""
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(chain), end], capture_output=True, text=True, timeout=120, check=False
    )
    assert found.stdout.strip(), found.stderr
    return int(found.stdout)


def _wait_for_end(pid: int) -> None:
    try:
        keeper = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([keeper], [], [], 60)[0], "the keeper does not end"
    finally:
        os.close(keeper)


@pytest.mark.slow
@pytest.mark.timeout(120 + 10 * KILLS)
@pytest.mark.parametrize("kind", ["staged", "staging"])
def test_what_was_staged_survives_the_trainer(tmp_path: Path, kind: str) -> None:
    """Killed right after ``wait_staged``, or while the next one is copied: the newest staged snapshot is restored."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.crash.keeper_lives", str(tmp_path / "chain"), kind, str(KILLS)],
        capture_output=True,
        text=True,
        timeout=100 + 10 * KILLS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lives = json.loads(done.stdout)
    assert len(lives) == KILLS
    for found in lives:
        assert found == {
            "wanted": found["wanted"],
            "found": found["wanted"],
            "exact": True,
            "skipped": 0,
            "problems": 0,
        }


@pytest.mark.parametrize("end", ["kill", "segfault", "exit", "signalled"])
def test_however_the_trainer_dies_the_keeper_finishes_and_goes(tmp_path: Path, end: str) -> None:
    """SIGKILL, a crash, an exit that cleans nothing up, or a batch system that first signals all processes of a job:
    durable, then handed over, then gone."""
    keeper = _train(tmp_path / "chain", end)
    state = state_of(0)
    with Checkpointer(tmp_path / "chain", state, rng=False) as ckpt:
        progress = ckpt.restore()
        assert progress is not None
        assert (progress.step, progress.skipped) == (1, ())
        assert same(state, state_of(1))
    _wait_for_end(keeper)
    assert not list(wire.addresses(ckpt.chain.origin, ckpt.chain.url)), "an address is left"


@pytest.mark.damages
@pytest.mark.parametrize("end", ["kill", "durable"])
def test_a_restarted_trainer_restores_from_memory(tmp_path: Path, end: str) -> None:
    """No byte of chunk data comes from the disk: with every segment destroyed the restore is exact all the same.

    Also where the snapshot had become durable before the trainer died.
    """
    chain = tmp_path / "chain"
    _train(chain, end)
    deadline = time.monotonic() + 60
    with SnapshotChain(chain, create=False) as history:
        while history.latest() is None:
            assert time.monotonic() < deadline
            os.sched_yield()
        assert history.verify().ok
    for segment in chain.glob("segments/*/*"):
        segment.chmod(0o600)
        segment.write_bytes(b"\xff" * segment.stat().st_size)
    state = state_of(0)
    with Checkpointer(chain, state, rng=False) as ckpt:
        progress = ckpt.restore()
        assert progress is not None
        assert progress.skipped == ()
    assert same(state, state_of(1))


def test_a_trainer_that_ends_in_order_leaves_no_keeper(tmp_path: Path) -> None:
    """Closing says good-bye: the process is gone when ``close`` returns, and so is its address."""
    state = state_of(1)
    with Checkpointer(tmp_path / "chain", state, every_steps=1, keeper=True, rng=False) as ckpt:
        ckpt.step()
        assert ckpt._keeper is not None
        pid = ckpt._keeper.pid
        assert pid is not None
    assert not Path(f"/proc/{pid}").exists()
    assert not list(wire.addresses(ckpt.chain.origin, ckpt.chain.url))


def test_the_keeper_of_a_living_trainer_is_left_alone(tmp_path: Path) -> None:
    """Somebody else who restores from the chain neither takes the memory nor ends the keeper."""
    chain = tmp_path / "chain"
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(chain), "live"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as trainer:
        assert trainer.stdout is not None
        keeper = int(trainer.stdout.readline())
        state = state_of(0)
        with Checkpointer(chain, state, rng=False) as ckpt:
            ckpt.restore()
            assert list(wire.addresses(ckpt.chain.origin, ckpt.chain.url))
            assert offer.find(ckpt.chain.origin, ckpt.chain.url) == []
        assert Path(f"/proc/{keeper}").exists()
        trainer.kill()
    state = state_of(0)
    with Checkpointer(chain, state, rng=False) as ckpt:
        progress = ckpt.restore()
        assert progress is not None
    _wait_for_end(keeper)


def test_a_killed_keeper_does_not_hurt_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Snapshots go on; a new keeper is there at the next one, and holds what there is."""
    monkeypatch.setattr(client, "KEEPER", KeeperOptions(restart_pause_s=0.0))
    state = state_of(1)
    with Checkpointer(tmp_path / "chain", state, every_steps=1, keeper=True, rng=False) as ckpt:
        keeper = ckpt._keeper
        assert keeper is not None
        pids = set()
        for step in range(2, 5):
            pending = ckpt.step()
            assert pending is not None
            pending.wait_durable(60)
            pid = keeper.pid
            assert pid is not None
            pids.add(pid)
            os.kill(pid, signal.SIGKILL)
            _wait_for_end(pid)
            state |= state_of(step)
        assert len(pids) == 3
    assert [snapshot.step for snapshot in ckpt.chain] == [1, 2, 3]


def test_a_keeper_that_cannot_start_is_no_keeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training and snapshots go on; the log says why there is none."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-such-python"))
    with Checkpointer(tmp_path / "chain", state_of(1), every_steps=1, keeper=True, rng=False) as ckpt:
        pending = ckpt.step()
        assert pending is not None
        assert pending.wait_durable(60).step == 1
        assert ckpt._keeper is not None
        assert ckpt._keeper.pid is None


@pytest.mark.parametrize("lacking", ["pidfd_open", "executable", "interpreter"])
def test_where_it_cannot_work_it_is_refused(tmp_path: Path, lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Better no keeper than one that only pretends: the message says what is missing."""
    if lacking == "executable":
        monkeypatch.setattr(sys, "executable", "")
    elif lacking == "interpreter":  # a packed program would start itself once more
        monkeypatch.setattr(sys, "frozen", True, raising=False)
    else:
        monkeypatch.delattr(os, lacking)
    with pytest.raises(UsageError, match="keeper=True") as refused:
        Checkpointer(tmp_path / "chain", {"n": 1}, keeper=True)
    assert refused.value.kind == "no_keeper"


def test_a_state_in_windows_is_never_taken_for_a_whole_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Staged in windows no slot has a description, so nobody can mistake a part for the whole; a warning says so."""
    with Checkpointer(
        tmp_path / "chain", state_of(1), every_steps=1, keeper=True, rng=False, host_memory_bytes=8 << 20
    ) as ckpt:
        pending = ckpt.step()
        assert pending is not None
        pending.wait_durable(60)
        descriptors = [slot.descriptor for slot in ckpt._pool._slots]
        assert descriptors
        assert [HeldSlot.open(descriptor) for descriptor in descriptors] == [None] * len(descriptors)
    assert "nothing to keep" in caplog.text


def test_a_trainer_that_becomes_another_program_is_gone(tmp_path: Path) -> None:
    """``exec`` keeps the process and ends training: the keeper finishes what was staged at once, and holds the memory
    for the next one, not for as long as the process lives."""
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "chain"), "exec"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as trainer:
        assert trainer.stdout is not None
        keeper = int(trainer.stdout.readline())
        deadline = time.monotonic() + 60
        with SnapshotChain(tmp_path / "chain", create=False) as chain:
            while not (offers := offer.find(chain.origin, chain.url)):
                assert time.monotonic() < deadline
                os.sched_yield()
            assert [one.step for one in offers] == [1]
            for one in offers:
                one.dismiss()
        _wait_for_end(keeper)
        assert trainer.poll() is None
        trainer.kill()
    assert _step(tmp_path / "chain") == 1


def test_a_keeper_finds_the_packages_where_the_trainer_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer in an archive, or that a launcher set up, has folders on ``sys.path`` that its interpreter lacks."""
    monkeypatch.setenv(client.LOG, str(tmp_path / "log"))
    bare = getattr(sys, "_base_executable", sys.executable)  # outside of any virtual environment
    head = f"import sys; sys.path += {sys.path!r}\n"
    done = subprocess.run(
        [bare, "-c", head + SCRIPT, str(tmp_path / "chain"), "kill"], capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    with SnapshotChain(tmp_path / "chain", create=False) as chain:
        offers = offer.find(chain.origin, chain.url)
        assert [one.step for one in offers] == [1], (tmp_path / "log").read_text()
        for one in offers:
            one.dismiss()
    _wait_for_end(int(done.stdout))


def test_a_log_that_cannot_be_written_does_not_end_the_keeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its log may lie on the disk that is full: it is there all the same for whoever restores, and for another try."""
    monkeypatch.setenv(client.LOG, "/dev/full")
    keeper = _train(tmp_path / "chain", "kill")
    with SnapshotChain(tmp_path / "chain", create=False) as chain:
        offers = offer.find(chain.origin, chain.url)
        assert [one.step for one in offers] == [1]
        for one in offers:
            one.dismiss()
    _wait_for_end(keeper)


def test_nobody_is_killed_in_a_keepers_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A keeper in another container has a number that is somebody else's here: it is known by a descriptor alone."""
    monkeypatch.setattr(offer, "KEEPER", KeeperOptions(exit_s=0.1))
    with (
        SnapshotChain(tmp_path / "chain") as chain,
        subprocess.Popen(["sleep", "60"]) as keeper,
        subprocess.Popen(["sleep", "60"]) as somebody,
    ):
        path, listener = wire.listen(chain.origin, chain.url)
        pidfd = os.pidfd_open(keeper.pid)

        def answer() -> None:
            with listener, listener.accept()[0] as peer:
                wire.send(peer, {"state": "over", "pid": somebody.pid, "step": 1}, [pidfd])
                wire.receive(peer)

        thread = threading.Thread(target=answer)
        thread.start()
        (found,) = offer.find(chain.origin, chain.url)
        found.dismiss()
        thread.join()
        assert keeper.wait(60) == -signal.SIGKILL
        assert somebody.poll() is None
        somebody.kill()
        os.close(pidfd)
        path.unlink()


# --- the rescue, in this process --------------------------------------------------------------------------------------


class _Silent:
    """A keeper's client that starts nothing: the test is the keeper."""

    pid = None

    def start(self) -> None: ...
    def hold(self, slot: Any) -> None: ...
    def let_go(self, slot: Any) -> None: ...
    def close(self) -> None: ...


def _staged(chain: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Checkpointer, HeldSlot, Charge]:
    """A trainer with one durable snapshot and one that is staged and does not become durable."""
    monkeypatch.setattr("ciuic_async.checkpointer.Keeper", lambda *_: _Silent())
    state = state_of(1)
    ckpt = Checkpointer(chain, state, every_steps=1, keeper=True, rng=False, **options)
    first = ckpt.step()
    assert first is not None
    first.wait_durable(60)
    ckpt._writer.wait_idle()
    monkeypatch.setattr(ckpt._writer, "submit", lambda job: None)
    state |= state_of(2)
    ckpt.step()
    found = [HeldSlot.open(slot.descriptor) for slot in ckpt._pool._slots]
    newest = rescue.newest(slot for slot in found if slot is not None)
    assert newest is not None
    return ckpt, newest, _charge(ckpt)


def _charge(ckpt: Checkpointer) -> Charge:
    return Charge(ckpt.chain.url, ckpt.chain.origin, ckpt.chain.secret, ckpt.chain.run, "auto")


def _leave(ckpt: Checkpointer) -> None:
    """End a trainer whose snapshot never reached its writer."""
    for pending in ckpt._unfinished:
        pending.phase = "durable"
    ckpt.close()


def _step(chain: Path) -> int | None:
    with SnapshotChain(chain, create=False) as history:
        latest = history.latest()
        return None if latest is None else latest.step


@pytest.mark.parametrize("frozen", [(), ("fixed",)])
def test_a_rescued_snapshot_is_the_one_that_was_staged(
    tmp_path: Path, frozen: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same tree, bytes, step, run and parent as the trainer would have committed; the parent's chunks are shared."""
    ckpt, slot, charge = _staged(tmp_path / "chain", monkeypatch, frozen=frozen)
    outcome = rescue.rescue(charge, slot)
    assert (outcome.problem, outcome.step) == (None, 2)
    with SnapshotChain(tmp_path / "chain", create=False) as history:
        first, second = history
        assert (second.id, second.step, second.parent) == (outcome.snapshot, 2, first.id)
        assert second.entry.common.run == first.entry.common.run
        assert same(second.load(), state_of(2))
        assert second.stored_bytes < second.raw_bytes
        manifest = second.resolve().manifest
        in_memory = slot.chunks(manifest)
        assert (len(in_memory) == len(list(manifest.chunks()))) is not bool(frozen)
    _leave(ckpt)


def test_what_the_trainer_committed_is_not_committed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer died between its claim and its note of it: the keeper finds the entry in the log."""
    monkeypatch.setattr("ciuic_async.checkpointer.Keeper", lambda *_: _Silent())
    chain = tmp_path / "chain"
    ckpt = Checkpointer(chain, state_of(1), every_steps=1, keeper=True, rng=False)
    descriptors: list[int] = []
    monkeypatch.setattr(
        "ciuic_async.background.BackgroundWriter._tidy",
        lambda writer: descriptors.extend(os.dup(slot.descriptor) for slot in ckpt._pool._slots),
    )
    pending = ckpt.step()
    assert pending is not None
    snapshot = pending.wait_durable(60)
    ckpt._writer.wait_idle()
    for descriptor in descriptors:
        os.pwrite(descriptor, b"\x02", 12)  # STAGED, as before
    slots = [slot for slot in map(HeldSlot.open, descriptors) if slot is not None]
    outcome = rescue.rescue(_charge(ckpt), rescue.newest(slots))
    assert outcome.snapshot == snapshot.id
    assert len(ckpt.chain) == 1
    ckpt.close()
    for descriptor in descriptors:
        os.close(descriptor)


def test_history_that_went_on_is_not_appended_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run restored the parent and saved: the late snapshot would be ``latest`` although it is older."""
    ckpt, slot, charge = _staged(tmp_path / "chain", monkeypatch)
    state = state_of(0)
    with Checkpointer(tmp_path / "chain", state, every_steps=1, rng=False) as other:
        other.restore()
        pending = other.step()
        assert pending is not None
        mine = pending.wait_durable(60)
    outcome = rescue.rescue(charge, slot)
    assert outcome.snapshot is None
    assert outcome.final
    assert "went on without it" in str(outcome.problem)
    with SnapshotChain(tmp_path / "chain", create=False) as history:
        latest = history.latest()
        assert latest is not None
        assert latest.id == mine.id
    _leave(ckpt)


def test_a_run_beside_is_no_reason_to_give_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries of others that do not come from this run's snapshots change nothing."""
    ckpt, slot, charge = _staged(tmp_path / "chain", monkeypatch)
    with Checkpointer(tmp_path / "chain", state_of(7), every_steps=1, rng=False) as other:
        other.step()
    assert rescue.rescue(charge, slot).problem is None
    assert _step(tmp_path / "chain") == 2
    _leave(ckpt)


def test_a_failed_rescue_can_be_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk: the outcome names the reason, nothing is half there, and the next try succeeds."""
    ckpt, slot, charge = _staged(tmp_path / "chain", monkeypatch)
    segments = tmp_path / "chain" / "segments"
    segments.rename(tmp_path / "away")
    segments.write_bytes(b"")  # no folder can be made
    outcome = rescue.rescue(charge, slot)
    assert outcome.problem
    assert not outcome.final
    segments.unlink()
    (tmp_path / "away").rename(segments)
    assert rescue.rescue(charge, slot).problem is None
    assert _step(tmp_path / "chain") == 2
    _leave(ckpt)


def test_another_chain_in_the_same_place_is_not_added_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training died, its chain was deleted, and a new one begun there: the old state must not be its newest."""
    ckpt, slot, charge = _staged(tmp_path / "chain", monkeypatch)
    (tmp_path / "chain").rename(tmp_path / "away")
    with Checkpointer(tmp_path / "chain", state_of(7), every_steps=1, rng=False) as other:
        other.step()
    outcome = rescue.rescue(charge, slot)
    assert outcome.final
    assert "another chain" in str(outcome.problem)
    assert _step(tmp_path / "chain") == 1
    _leave(ckpt)


def test_a_chain_put_back_from_a_copy_is_not_added_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody undid history on purpose: what comes from snapshots that are not there any more is not added."""
    SnapshotChain(tmp_path / "chain").close()
    shutil.copytree(tmp_path / "chain", tmp_path / "copy")
    ckpt, slot, charge = _staged(tmp_path / "chain", monkeypatch)
    (tmp_path / "chain").rename(tmp_path / "away")
    (tmp_path / "copy").rename(tmp_path / "chain")
    outcome = rescue.rescue(charge, slot)
    assert outcome.final
    assert "restored from a backup" in str(outcome.problem)  # the pin knows more
    shutil.rmtree(os.environ["XDG_STATE_HOME"])
    assert rescue.rescue(charge, slot).final
    assert "put back" in str(rescue.rescue(charge, slot).problem)
    assert _step(tmp_path / "chain") is None
    (tmp_path / "chain").rename(tmp_path / "copy")
    (tmp_path / "away").rename(tmp_path / "chain")
    _leave(ckpt)


def test_an_attempt_that_got_through_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry was claimed, and then something failed: the next attempt finds it, instead of adding it again."""
    ckpt, slot, charge = _staged(tmp_path / "chain", monkeypatch)

    def fails(log: Log, key: object) -> None:
        raise OSError("the network file system went away")

    tried: list[str] = []
    with monkeypatch.context() as broken:
        broken.setattr(Log, "_try_publish", fails)
        assert "went away" in str(rescue.rescue(charge, slot, tried).problem)
    outcome = rescue.rescue(charge, slot, tried)
    assert (outcome.problem, [outcome.snapshot]) == (None, tried)
    with SnapshotChain(tmp_path / "chain", create=False) as history:
        assert [snapshot.step for snapshot in history] == [1, 2]
    _leave(ckpt)


def test_being_told_to_end_is_no_failed_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM in the middle of an attempt is not swallowed as one more problem of the disk."""
    ckpt, slot, charge = _staged(tmp_path / "chain", monkeypatch)

    def terminated(*_: object) -> None:
        raise process._Terminated

    with monkeypatch.context() as told:
        told.setattr(rescue, "_persist", terminated)
        with pytest.raises(process._Terminated):
            rescue.rescue(charge, slot)
    assert charge.secret not in repr(charge), "a traceback must not show the key"
    _leave(ckpt)


@pytest.mark.parametrize("at", ["plan", "request"])
def test_a_description_of_another_version_is_not_acted_on(
    tmp_path: Path, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that does not parse is never written as a snapshot; the outcome says so, and nothing is raised."""
    ckpt, slot, charge = _staged(tmp_path / "chain", monkeypatch)
    place = 4096 + (slot.header.plan_size_bytes if at == "request" else 0)
    for descriptor in (one.descriptor for one in ckpt._pool._slots):
        os.pwrite(descriptor, b"[", place)
    outcome = rescue.rescue(charge, slot)
    assert outcome.final
    assert outcome.snapshot is None
    assert _step(tmp_path / "chain") == 1
    _leave(ckpt)


def test_memory_with_wrong_bytes_is_not_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that changed in memory are noticed like those on a disk, and the disk's are taken."""
    ckpt, slot, charge = _staged(tmp_path / "chain", monkeypatch)
    outcome = rescue.rescue(charge, slot)
    for one in ckpt._pool._slots:
        one.payload().fill_(7)
    state = state_of(0)
    with Checkpointer(tmp_path / "chain", state, rng=False) as other:

        class Lying:
            snapshot, step, problem = outcome.snapshot, 2, None

            def chunks(self, snapshot: str, manifest: Any) -> Any:
                assert snapshot == outcome.snapshot
                found = slot.chunks(manifest)
                assert found
                return found

            def dismiss(self) -> None:
                pass

        monkeypatch.setattr(offer, "find", lambda *_: [Lying()])
        assert other.restore() is not None
    assert same(state, state_of(2))
    _leave(ckpt)


def test_the_keeper_never_imports_torch() -> None:
    """It is small, and starts in the time of a Python interpreter."""
    code = "import sys, ciuic_async.keeper.process; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
