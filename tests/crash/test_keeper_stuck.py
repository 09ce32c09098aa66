"""Keepers that hang, or are stopped, and trainers whose descriptors are beyond what ``select`` knows."""

from __future__ import annotations

import logging
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from ciuic_async import Checkpointer
from ciuic_async.chain import SnapshotChain
from ciuic_async.keeper import offer, process, wire
from ciuic_async.keeper.rescue import Charge
from ciuic_async.options import KeeperOptions
from tests.crash.keeper_lives import same, state_of

SCRIPT = """
import os, resource, signal, sys, torch
from ciuic_async import Checkpointer
from tests.crash.keeper_lives import state_of
chain, files = sys.argv[1], int(sys.argv[2])
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
held = [os.open("/dev/null", os.O_RDONLY) for _ in range(files)]
ckpt = Checkpointer(chain, state_of(1), every_steps=1, keeper=True, rng=False)
ckpt.step().wait_durable(60)
print(ckpt._keeper.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _own_runtime_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keepers of this test meet nobody else's. The path of a socket has a limit of some 100 bytes."""
    for name in ("_RUNTIME", "_SHARED"):
        monkeypatch.setattr(wire, name, "/proc/none")
    monkeypatch.delenv("TMPDIR", raising=False)
    with tempfile.TemporaryDirectory(prefix="ciuic-") as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        yield


class _Trainer:
    """A trainer with one durable snapshot that lives until ``kill``, and its keeper."""

    def __init__(self, chain: Path, files: int = 0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(chain), str(files)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.keeper = int(self.process.stdout.readline())
        self.pidfd = os.pidfd_open(self.keeper)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def has_keeper(self) -> bool:
        return not select.select([self.pidfd], [], [], 0)[0]

    def wait_for_keeper(self) -> None:
        assert select.select([self.pidfd], [], [], 60)[0], "the keeper does not end"

    def __enter__(self) -> _Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        os.close(self.pidfd)


def _restore(chain: Path) -> None:
    state = state_of(0)
    with Checkpointer(chain, state, rng=False) as ckpt:
        progress = ckpt.restore()
        assert progress is not None
        assert same(state, state_of(1))


@pytest.mark.parametrize("trainer_lives", [True, False])
def test_a_keeper_that_is_stopped_is_not_waited_for(
    tmp_path: Path, trainer_lives: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without any sign of life ``restore`` goes to the chain, and says so; it ends the keeper, lest that adds something
    later, unless its trainer lives."""
    monkeypatch.setattr(offer, "KEEPER", KeeperOptions(silent_s=0.5))
    monkeypatch.setattr(offer, "_LOOK_S", 0.05)
    with _Trainer(tmp_path / "chain") as trainer:
        with SnapshotChain(tmp_path / "chain", create=False) as chain:
            assert offer.find(chain.origin, chain.url) == []  # it has answered: from now on the address is its own
        signal.pidfd_send_signal(trainer.pidfd, signal.SIGSTOP)
        if not trainer_lives:
            trainer.kill()
        _restore(tmp_path / "chain")
        assert "no sign of life" in caplog.text
        assert trainer.has_keeper() is trainer_lives


def test_a_keeper_at_work_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that shows that it lives is not taken for a stopped one, however long it says nothing."""
    monkeypatch.setattr(offer, "KEEPER", KeeperOptions(silent_s=0.4))
    monkeypatch.setattr(offer, "_LOOK_S", 0.02)
    monkeypatch.setattr(offer, "_REPORT_S", 0.1)
    monkeypatch.setattr(process, "_PULSE_S", 0.02)
    long_enough = threading.Event()

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            assert isinstance(record.args, tuple)
            (waited_s,) = record.args
            assert isinstance(waited_s, float)
            if "still writing" in record.msg and waited_s > 1.0:
                long_enough.set()

    told = Told()
    logging.getLogger("ciuic_async").addHandler(told)
    try:
        with SnapshotChain(tmp_path / "chain") as chain:
            path, listener = wire.listen(chain.origin, chain.url)
            keeper = process._Keeper.__new__(process._Keeper)
            keeper._address = path
            threading.Thread(target=keeper.show_life, daemon=True).start()
            descriptor = os.pidfd_open(os.getpid())

            def answer() -> None:
                with listener, listener.accept()[0] as peer:
                    assert long_enough.wait(60)
                    wire.send(peer, {"state": "over", "step": 1}, [descriptor])
                    wire.receive(peer)

            thread = threading.Thread(target=answer)
            thread.start()
            (found,) = offer.find(chain.origin, chain.url)
            found.close()
            thread.join()
            path.unlink()
            os.close(descriptor)
    finally:
        logging.getLogger("ciuic_async").removeHandler(told)
    assert long_enough.is_set()


@pytest.mark.parametrize("hangs", [True, False])
def test_an_attempt_on_a_disk_that_hangs_has_an_end(hangs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel ends a keeper whose attempt takes too long; one that is over in time leaves no timer behind."""
    monkeypatch.setattr(process, "KEEPER", KeeperOptions(attempt_s=0.2 if hangs else 60.0))
    keeper = process._Keeper.__new__(process._Keeper)
    keeper._charge, keeper._tried = Charge("", "", "", "", ""), []
    if hangs:
        monkeypatch.setattr(process, "rescue", lambda *_: threading.Event().wait())
    child = os.fork()
    if not child:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # as the keeper has it; the test runner may have its own
            keeper._attempt(None)
            os._exit(0 if signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0) else 4)
        finally:
            os._exit(3)
    _, status = os.waitpid(child, 0)
    assert status == (signal.SIGALRM if hangs else 0)


def test_any_number_of_open_files_will_do(tmp_path: Path) -> None:
    """A trainer with more than 1024 open files, as sharded datasets have: its keeper offers the memory all the same,
    and ends when a restarted trainer with as many tells it to."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2048:
        pytest.skip(f"at most {hard} files may be open here")
    with _Trainer(tmp_path / "chain", files=1100) as trainer:
        trainer.kill()
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        held = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
        try:
            with SnapshotChain(tmp_path / "chain", create=False) as chain:
                (found,) = offer.find(chain.origin, chain.url)
                assert found.step == 1
                found._link.close()  # it hears nothing of its dismissal, so its end is seen to
                found.dismiss()
                trainer.wait_for_keeper()
        finally:
            for descriptor in held:
                os.close(descriptor)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
