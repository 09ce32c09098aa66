"""A few threads of low priority that work ahead, in order, and a caller who helps them when time is short.

Raising a thread's priority again needs a privilege, so urgency is a matter of who works: until the deadline only the
threads do, in time that training leaves over; after it the caller, who kept its priority, takes work from their queue.

Not ``concurrent.futures``: its pools refuse work as soon as the interpreter begins to exit, and that is when a script
that never called ``close`` still has a snapshot to finish.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class _Task:
    """One call: its result or its error, once ``done``."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call: Callable[[], Any] | None = call
        self.done = threading.Event()
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        call, self.call = self.call, None
        try:
            if call is not None:
                self.result = call()
        except BaseException as error:
            self.error = error
        self.done.set()


class OrderedWorkers:
    """``count`` daemon threads, started by ``start`` or on first use. One thread at a time may use this.

    Args:
        count: of threads; 0: the caller alone does everything.
        name: of the threads, and a number.
        initializer: called first on each of them.

    Where threads cannot be started (a limit of the machine; Python 3.12 starts none once the interpreter exits) those
    there are do the work, or the caller alone does it.
    """

    def __init__(self, count: int, name: str, initializer: Callable[[], None]) -> None:
        self._count = count
        self._name = name
        self._initializer = initializer
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def map(self, function: Callable[[T], R], items: Iterable[T], *, deadline_s: float | None = None) -> Iterator[R]:
        """Results in the order of ``items``; at most twice ``count`` calls are ahead of the consumer.

        When the consumer stops early, or a call raises, no call is running any more when this ends.

        Args:
            deadline_s: by ``time.monotonic``: from then on the consumer's thread works too, instead of waiting.
        """
        self.start()
        if not self._threads:
            yield from map(function, items)
            return
        ahead: deque[_Task] = deque()
        try:
            for item in items:
                task = _Task(lambda item=item: function(item))  # type: ignore[misc]
                ahead.append(task)
                self._tasks.put(task)
                if len(ahead) > 2 * self._count:
                    yield self._result(ahead.popleft(), deadline_s)
            while ahead:
                yield self._result(ahead.popleft(), deadline_s)
        finally:
            for task in ahead:
                task.call = None
            for task in ahead:
                task.done.wait()

    def close(self) -> None:
        """End the threads. Idempotent."""
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []

    def start(self) -> None:
        """Start the threads that do not run yet, as far as that is possible. Idempotent."""
        while len(self._threads) < self._count:
            name = f"{self._name}-{len(self._threads)}"
            thread = threading.Thread(target=self._work, name=name, daemon=True)
            try:
                thread.start()
            except RuntimeError:
                return
            self._threads.append(thread)

    def _work(self) -> None:
        self._initializer()
        while (task := self._tasks.get()) is not None:
            task.run()

    def _result(self, task: _Task, deadline_s: float | None) -> Any:
        if deadline_s is not None:
            task.done.wait(max(deadline_s - time.monotonic(), 0.0))
            while not task.done.is_set():
                try:
                    waiting = self._tasks.get_nowait()
                except queue.Empty:
                    break  # a thread is at it
                if waiting is not None:
                    waiting.run()
        task.done.wait()
        if task.error is not None:
            raise task.error
        return task.result
