"""Threads that work ahead, in order."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ciuic_async.pipeline.workers import OrderedWorkers


@pytest.fixture(params=[0, 1, 3])
def workers(request: pytest.FixtureRequest) -> Iterator[OrderedWorkers]:
    """No thread but the caller's own, one, or several."""
    made = OrderedWorkers(request.param, "ciuic-test", lambda: None)
    yield made
    made.close()


def test_results_come_in_the_order_of_the_items(workers: OrderedWorkers) -> None:
    """Whoever finishes first, results keep the order, and a pool serves many maps."""
    for count in (0, 1, 7, 100):
        assert list(workers.map(lambda n: n * n, range(count))) == [n * n for n in range(count)]


def test_an_error_arrives_where_it_belongs(workers: OrderedWorkers) -> None:
    """Results before the failing item are given, its error is raised as it was, and the pool works on."""

    def fail_at_five(number: int) -> int:
        if number == 5:
            raise ValueError("five")
        return number

    results = workers.map(fail_at_five, range(10))
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="five"):
        next(results)
    assert list(workers.map(fail_at_five, range(3))) == [0, 1, 2]


def test_work_ahead_is_bounded() -> None:
    """Items are taken only as far ahead of the consumer as twice the number of threads, and one."""
    pool = OrderedWorkers(2, "ciuic-test", lambda: None)
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    results = pool.map(lambda n: n, items())
    for _ in range(10):
        next(results)
    assert len(taken) <= 10 + 2 * 2 + 1
    results.close()  # type: ignore[attr-defined]
    pool.close()


def test_nothing_runs_any_more_when_the_consumer_stops() -> None:
    """After an early stop no call is running: what they read may be given back."""
    pool = OrderedWorkers(3, "ciuic-test", lambda: None)
    running = threading.Semaphore(0)
    inside = 0
    lock = threading.Lock()

    def work(number: int) -> int:
        nonlocal inside
        with lock:
            inside += 1
        running.release()
        result = sum(range(50_000)) + number
        with lock:
            inside -= 1
        return result

    results = pool.map(work, range(100))
    next(results)
    running.acquire()
    results.close()  # type: ignore[attr-defined]
    assert inside == 0
    pool.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ciuic-test")]


@pytest.fixture
def no_more_threads() -> Iterator[Callable[[], None]]:
    """From the call on the system refuses new threads: no address space holds the stack they ask for."""
    before = threading.stack_size()

    def refuse() -> None:
        threading.stack_size(1 << 47)

    yield refuse
    threading.stack_size(before)


def _threads(name: str) -> int:
    return sum(thread.name.startswith(name) for thread in threading.enumerate())


def test_threads_can_be_started_early_and_once() -> None:
    """start() starts all of them before there is work, and a second call starts none; of none there is none."""
    pool = OrderedWorkers(3, "ciuic-test", lambda: None)
    pool.start()
    pool.start()
    assert _threads("ciuic-test") == 3
    assert list(pool.map(str, range(9))) == [str(n) for n in range(9)]
    assert _threads("ciuic-test") == 3
    pool.close()
    none = OrderedWorkers(0, "ciuic-test", lambda: None)
    none.start()
    assert _threads("ciuic-test") == 0
    none.close()


def test_without_any_thread_the_caller_does_the_work(no_more_threads: Callable[[], None]) -> None:
    """When no thread can be started results are the same, from the consumer's own thread, and errors arrive."""
    no_more_threads()
    pool = OrderedWorkers(3, "ciuic-test", lambda: None)
    assert list(pool.map(lambda n: (n, threading.current_thread()), range(20))) == [
        (n, threading.current_thread()) for n in range(20)
    ]
    with pytest.raises(ZeroDivisionError):
        list(pool.map(lambda n: 1 // n, range(3)))
    pool.close()


def test_the_threads_there_are_go_on_where_more_are_refused(
    no_more_threads: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread of three could be started: it does all the work, in order."""
    start = threading.Thread.start

    def start_the_last(thread: threading.Thread) -> None:
        start(thread)
        no_more_threads()

    monkeypatch.setattr(threading.Thread, "start", start_the_last)
    pool = OrderedWorkers(3, "ciuic-test", lambda: None)
    done = list(pool.map(lambda n: (n, threading.current_thread().name), range(50)))
    assert done == [(n, "ciuic-test-0") for n in range(50)]
    pool.close()


def test_a_script_that_never_closes_still_gets_its_last_snapshot(tmp_path: Path) -> None:
    """At interpreter exit what was taken becomes durable, also with several encoding threads."""
    program = f"""
import torch
from ciuic_async import Checkpointer
from ciuic_async.options import WRITE
object.__setattr__(WRITE, "encode_threads", 3)
model = torch.nn.Linear(1500, 1500)
checkpointer = Checkpointer({str(tmp_path / "chain")!r}, {{"model": model}})
checkpointer.step()
checkpointer.save()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    from ciuic_async import SnapshotChain

    chain = SnapshotChain(tmp_path / "chain", create=False)
    assert [snapshot.step for snapshot in chain] == [1]
    assert chain.verify().ok


def test_the_caller_helps_after_the_deadline() -> None:
    """While the only thread is stuck, results wait until the deadline; then the caller does what is left itself."""
    pool = OrderedWorkers(1, "ciuic-test", lambda: None)
    stuck, inside = threading.Event(), threading.Event()
    workers: dict[int, str] = {}

    def work(number: int) -> int:
        workers[number] = threading.current_thread().name
        if number == 1:
            inside.set()
            assert stuck.wait(60)
        if number == 2:
            assert inside.wait(60)  # the thread is in its task, so this one is the caller
            stuck.set()
        return number

    assert list(pool.map(work, range(6), deadline_s=time.monotonic())) == list(range(6))
    assert threading.current_thread().name in workers.values()
    pool.close()


def test_without_a_deadline_only_the_threads_work() -> None:
    """The caller never takes work as long as there is time."""
    pool = OrderedWorkers(2, "ciuic-test", lambda: None)
    names = set(pool.map(lambda _: threading.current_thread().name, range(50), deadline_s=time.monotonic() + 3600))
    assert threading.current_thread().name not in names
    pool.close()
