"""Told to leave by SIGTERM or SIGUSR1, training leaves with its newest state durable. Handlers are chained, not stolen.

5 SIGTERMs at random moments, or 20 with ``CIUIC_CRASH_LONG=1``.
"""

from __future__ import annotations

import math
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ciuic_async import Checkpointer, UsageError
from ciuic_async.chain import SnapshotChain
from ciuic_async.preemption import SIGNALS
from tests.crash.faults import LONG

TERMS = 20 if LONG else 5

TRAINING = """
import sys, time, torch
from ciuic_async import Checkpointer
torch.set_num_threads(1)
model = torch.nn.Linear(700, 700)
optimizer = torch.optim.AdamW(model.parameters())
with Checkpointer(sys.argv[1], {"model": model, "optimizer": optimizer}, every_steps=10**6, preemption=20) as ckpt:
    ckpt.restore()
    while True:
        model(torch.randn(8, 700)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ckpt.step(batch=ckpt._step + 1)
        print(ckpt._step, flush=True)
"""


@pytest.fixture(autouse=True)
def _handlers_as_before() -> Iterator[None]:
    """What a test does to handlers ends with it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    assert {number: signal.getsignal(number) for number in before} == before, "a handler is left behind"


@pytest.mark.slow
@pytest.mark.timeout(60 + 20 * TERMS)
@pytest.mark.filterwarnings("ignore:.*taken in another environment:ciuic_async.errors.CiuicWarning")
def test_terminated_at_any_moment_nothing_is_lost(tmp_path: Path) -> None:
    """The last step that ended is durable; the process ends by SIGTERM, as it would have without us; within the grace
    time, or ``wait`` would not return."""
    chain = tmp_path / "chain"
    moments = random.Random(7)
    for _ in range(TERMS):
        with subprocess.Popen(
            [sys.executable, "-c", TRAINING, str(chain)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as trainer:
            assert trainer.stdout is not None
            assert trainer.stderr is not None
            steps = [int(trainer.stdout.readline()) for _ in range(moments.randint(1, 40))]
            trainer.terminate()
            steps += map(int, trainer.stdout.read().split())
            said = trainer.stderr.read()
            assert trainer.wait(20) == -signal.SIGTERM, said
        with SnapshotChain(chain, create=False) as history:
            latest = history.latest()
            assert latest is not None
            # The step that saved it ended the process before its line was printed.
            assert latest.step == steps[-1] + 1
            assert latest.batch == latest.step
            assert f"SIGTERM: step {latest.step} (snapshot {latest.id}) is durable" in said
            assert history.verify().ok


def _trainer(chain: Path, **options: Any) -> Checkpointer:
    return Checkpointer(chain, {"weights": torch.zeros(1000)}, every_steps=1000, rng=False, **options)


def _steps(chain: Path) -> list[int | None]:
    with SnapshotChain(chain, create=False) as history:
        return [snapshot.step for snapshot in history]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_handler_that_was_there_gets_the_signal_after_the_flush(tmp_path: Path, number: signal.Signals) -> None:
    """Somebody else's handler (a launcher's, a requeueing plugin's) is called once, when the state is durable; then
    training goes on, and a second signal is treated alike."""
    seen: list[list[int | None]] = []
    before = signal.signal(number, lambda *_: seen.append(_steps(tmp_path / "chain")))
    try:
        with _trainer(tmp_path / "chain", preemption=True) as ckpt:
            ckpt.step()
            for step in (2, 3):
                os.kill(os.getpid(), number)
                assert len(seen) == step - 2, "passed on in the middle of a step"
                assert ckpt.step() is not None
            assert ckpt.preempted
        assert seen == [[2], [2, 3]]
    finally:
        signal.signal(number, before)


def test_a_warning_that_nobody_handles_does_not_end_training(tmp_path: Path) -> None:
    """SLURM's SIGUSR1 announces the end: the state is made durable, and training uses the time that is left."""
    with _trainer(tmp_path / "chain", preemption=True) as ckpt:
        assert not ckpt.preempted
        os.kill(os.getpid(), signal.SIGUSR1)
        ckpt.step()
        assert ckpt.preempted
        assert ckpt.step() is None
    assert _steps(tmp_path / "chain") == [1]


def test_a_handler_that_raises_ends_the_loop_in_order(tmp_path: Path) -> None:
    """``sys.exit`` in the handler that was there comes out of ``step``, after the flush."""

    def leave(*_: object) -> None:
        sys.exit(3)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        with _trainer(tmp_path / "chain", preemption=True) as ckpt:
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(SystemExit):
                ckpt.step()
        assert _steps(tmp_path / "chain") == [1]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_without_a_step_the_signal_is_passed_on_at_the_deadline(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A loop that hangs is not kept alive: the handler gets the signal when the grace time is over, and the log says
    what is durable."""
    seen = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: seen.set())
    try:
        with _trainer(tmp_path / "chain", preemption=0.05) as ckpt:
            ckpt.step()
            ckpt.save().wait_durable(60)
            os.kill(os.getpid(), signal.SIGTERM)
            assert seen.wait(30)
            assert "SIGTERM: its grace time is over; the newest durable snapshot is step 1" in caplog.text
            assert ckpt.step() is None, "it was passed on once"
    finally:
        signal.signal(signal.SIGTERM, before)


def test_what_is_not_durable_in_time_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that hangs holds nobody beyond the grace time; the message names the newest durable snapshot instead."""
    hangs = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with _trainer(tmp_path / "chain", preemption=0.2) as ckpt:
            ckpt.step()
            ckpt.save().wait_durable(60)
            persist = ckpt._writer._persister.persist

            def slow(*given: Any, **more: Any) -> Any:
                hangs.wait(60)
                return persist(*given, **more)

            monkeypatch.setattr(ckpt._writer._persister, "persist", slow)
            os.kill(os.getpid(), signal.SIGTERM)
            pending = ckpt.step()
            assert pending is not None
            assert pending.phase == "staged"
            assert "SIGTERM: step 2 is staged" in caplog.text
            assert "the newest durable snapshot is step 1" in caplog.text
            hangs.set()
        assert _steps(tmp_path / "chain") == [1, 2]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_busy_writer_is_no_reason_to_skip_the_last_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``when_busy="skip"`` the one on its way is waited for first: the newest state is what counts now."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with _trainer(tmp_path / "chain", preemption=30, when_busy="skip", host_memory_bytes=8 << 20) as ckpt:
            ckpt.step()
            ckpt.save()
            os.kill(os.getpid(), signal.SIGTERM)
            assert ckpt.step() is not None
        assert _steps(tmp_path / "chain") == [1, 2]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_handlers_are_set_back(tmp_path: Path) -> None:
    """After ``close`` the handlers are those of before; one that was set on top of ours stays."""
    before = signal.getsignal(signal.SIGTERM)
    with _trainer(tmp_path / "chain", preemption=True):
        ours = signal.getsignal(signal.SIGTERM)
        assert ours is not before
    assert signal.getsignal(signal.SIGTERM) is before
    seen: list[int] = []

    def on_top(number: int, frame: Any) -> None:
        seen.append(number)
        assert callable(below)
        below(number, frame)

    base = signal.signal(signal.SIGTERM, lambda number, _: seen.append(-number))
    try:
        with _trainer(tmp_path / "chain", preemption=True):
            below = signal.signal(signal.SIGTERM, on_top)
        assert signal.getsignal(signal.SIGTERM) is on_top
        os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [signal.SIGTERM, -signal.SIGTERM], "closed, ours only passes on"
    finally:
        signal.signal(signal.SIGTERM, before)
    assert base is before


def test_a_signal_that_no_step_acted_on_comes_again_after_close(tmp_path: Path) -> None:
    """The loop ended before it could act: everything taken is durable, and then the signal is for who comes next."""
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        with _trainer(tmp_path / "chain", preemption=True) as ckpt:
            ckpt.step()
            ckpt.save()
            os.kill(os.getpid(), signal.SIGTERM)
            assert seen == []
        assert seen == [signal.SIGTERM]
        assert _steps(tmp_path / "chain") == [1]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_forked_child_dies_of_the_signal_as_ever(tmp_path: Path) -> None:
    """Data loader workers are ended by SIGTERM: in a child our handler is not there."""
    with _trainer(tmp_path / "chain", preemption=True):
        child = os.fork()
        if not child:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGTERM


def test_off_the_main_thread_it_is_refused(tmp_path: Path) -> None:
    """Python sets handlers on the main thread only: an error at once, instead of a flush that never comes."""
    failures: list[UsageError] = []

    def make() -> None:
        try:
            _trainer(tmp_path / "chain", preemption=True)
        except UsageError as error:
            failures.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert [error.kind for error in failures] == ["not_main_thread"]
    assert not (tmp_path / "chain").exists()


def test_without_a_thread_no_handler_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system gives no thread that sees to the deadline, signals go where they went before."""

    def none_left(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    before = [signal.getsignal(number) for number in SIGNALS]
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", none_left)
        with pytest.raises(RuntimeError, match="new thread"):
            _trainer(tmp_path / "chain", preemption=True)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def _run(code: str, chain: Path) -> int:
    """What a process with a handler of ours comes to."""
    head = (
        "import ctypes, os, signal, sys, torch\nfrom ciuic_async import Checkpointer\nstate = {'w': torch.zeros(9)}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", head + code, str(chain)], capture_output=True, text=True, timeout=120, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode


def test_a_warning_after_the_last_step_does_not_end_a_process_that_leaves_in_order(tmp_path: Path) -> None:
    """SLURM warns while the loop is over and everything becomes durable: the rest of the script still runs."""
    code = (
        "with Checkpointer(sys.argv[1], state, every_steps=1, rng=False, preemption=True) as ckpt:\n"
        "    ckpt.step()\n"
        "    os.kill(os.getpid(), signal.SIGUSR1)\n"
        "sys.exit(7)\n"
    )
    assert _run(code, tmp_path / "chain") == 7
    assert _steps(tmp_path / "chain") == [1]


def test_a_process_that_hangs_in_native_code_ends_at_the_deadline(tmp_path: Path) -> None:
    """A collective that waits for a lost rank runs no handler; the process ends by SIGTERM all the same."""
    code = (
        "with Checkpointer(sys.argv[1], state, every_steps=1, rng=False, preemption=0.1) as ckpt:\n"
        "    ckpt.step().wait_durable(60)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)\n"
        "    libc.pthread_mutex_lock(mutex)\n"
        "    libc.pthread_mutex_lock(mutex)\n"
    )
    assert _run(code, tmp_path / "chain") == -signal.SIGTERM
    assert _steps(tmp_path / "chain") == [1]


def test_a_grace_time_without_end_is_none_that_breaks(tmp_path: Path) -> None:
    """``preemption=math.inf``: locks cannot wait so long, and ``step`` must not fail when the signal comes."""
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        with _trainer(tmp_path / "chain", preemption=math.inf) as ckpt:
            os.kill(os.getpid(), signal.SIGTERM)
            ckpt.step()
            assert seen == [signal.SIGTERM]
        assert _steps(tmp_path / "chain") == [1]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_in_the_middle_of_looking_for_one_does_no_harm(tmp_path: Path) -> None:
    """It comes between two instructions of ``step``, whichever: it is acted on now or at the next one."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with _trainer(tmp_path / "chain", preemption=True) as ckpt:
            preemption = ckpt._preemption
            assert preemption is not None

            def come(frame: Any, event: str, argument: Any) -> None:
                if event == "c_return" and argument is iter:
                    sys.setprofile(None)
                    preemption._note(signal.SIGTERM, None)

            sys.setprofile(come)
            try:
                preemption.take()
            finally:
                sys.setprofile(None)
            assert ckpt.preempted
            assert ckpt.step() is not None
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("first", [0, 1])
def test_handlers_are_set_back_in_whatever_order_checkpointers_close(tmp_path: Path, first: int) -> None:
    """Two models, two chains: the last one that closes leaves the handlers of before."""
    before = signal.getsignal(signal.SIGUSR1)
    both = [_trainer(tmp_path / name, preemption=True) for name in "ab"]
    both[first].close()
    both[1 - first].close()
    assert signal.getsignal(signal.SIGUSR1) is before
