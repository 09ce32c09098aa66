"""A few threads that work ahead, in order.

Not ``concurrent.futures``: its pools refuse work as soon as the interpreter begins to exit, and that is when a script
that never called ``close`` still has a snapshot to finish.
"""

from __future__ import annotations

import queue
import threading
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

    Where threads cannot be started (a limit of the machine; Python 3.12 starts none once the interpreter exits) those
    there are do the work, or the caller alone does it.
    """

    def __init__(self, count: int, name: str, initializer: Callable[[], None]) -> None:
        self._count = count
        self._name = name
        self._initializer = initializer
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Results in the order of ``items``; at most twice ``count`` calls are ahead of the consumer.

        When the consumer stops early, or a call raises, no call is running any more when this ends.
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
                    yield _result(ahead.popleft())
            while ahead:
                yield _result(ahead.popleft())
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
        if self._count == 1:
            return
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


def _result(task: _Task) -> Any:
    task.done.wait()
    if task.error is not None:
        raise task.error
    return task.result
