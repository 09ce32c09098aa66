"""Being told to leave: SIGTERM (Kubernetes, spot machines, launchers) and SIGUSR1 (SLURM's warning).

A signal comes in the middle of a step, when the state is half changed. So the handler only notes it; the next ``step``
takes and flushes a snapshot and then passes the signal on to whoever handled it before: nobody's handler is stolen.
Where no step comes within the grace time a thread passes it on.
"""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

from ciuic_async.events import logger

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_LONGEST_GRACE_S = 7 * 24 * 3600.0
"""What locks and queues can wait for has an end; nobody who announces an end waits this long."""
_HANDLER_S = 1.0
"""How long the main thread may take to come to a handler once the grace time is over."""
_WARNINGS = frozenset({signal.SIGUSR1})
"""Signals that announce an end and are none: where nobody handles them, training goes on after the flush."""

Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None


@dataclass(frozen=True, slots=True)
class Notice:
    """A signal that nobody has acted on. Times by ``time.monotonic``."""

    number: int
    came_s: float
    deadline_s: float

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name


class Preemption:
    """Handlers for both signals, from construction until ``close``. A thread ``ciuic-preempt`` sees to the deadline.

    Args:
        grace_s: how long a signal may wait for a step and its snapshot.
        report: called on that thread when the grace time is over and no ``take`` came: says what is durable.

    Make it on the main thread, where alone Python sets handlers.
    """

    def __init__(self, grace_s: float, report: Callable[[Notice], None]) -> None:
        self._grace_s = min(grace_s, _LONGEST_GRACE_S)
        self._report = report
        self._owner_pid = os.getpid()
        self._previous: dict[int, Handler] = {}
        self._notices: dict[int, Notice] = {}
        self._passing_on: set[int] = set()
        self._queue: queue.SimpleQueue[Notice | None] = queue.SimpleQueue()
        self._handler = self._note  # one object: bound methods are made anew each time
        self.preempted = False
        """Whether a signal ever came. A loop may look at it and end in its own way."""
        # First: where the system gives no thread, no handler is left behind that nobody sees to.
        self._thread = threading.Thread(
            target=_watch, args=(self._queue, weakref.ref(self)), name="ciuic-preempt", daemon=True
        )
        self._thread.start()
        for number in SIGNALS:
            previous = signal.getsignal(number)
            if previous is None:  # set by other code than Python: it cannot be called from here
                logger.warning(
                    "%s has a handler that Python cannot call: it is left alone", signal.Signals(number).name
                )
                continue
            self._previous[number] = previous
            signal.signal(number, self._handler)
        _installed.add(self)

    def take(self) -> Notice | None:
        """The signal to act on now, or None. Whoever gets one calls ``pass_on`` when that is done."""
        return next(iter(list(self._notices.values())), None)  # a copy: one may come between two instructions

    def pass_on(self, notice: Notice) -> None:
        """Give the signal to whoever handled it before: that may end the process, or raise. Else training goes on."""
        if self._notices.pop(notice.number, None) is None:
            return  # the grace time was over first
        if threading.current_thread() is threading.main_thread():
            self._pass_on(notice.number, None)
        else:
            self._passing_on.add(notice.number)
            os.kill(self._owner_pid, notice.number)

    def close(self) -> None:
        """Set the handlers back that were there before, unless others were set on top. Idempotent.

        A signal that nobody acted on is sent again: it is for whoever comes next. Not so a warning that nobody handles:
        that would end a process which leaves in order.
        """
        if os.getpid() != self._owner_pid:
            return
        self._queue.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join()
        self._restore()
        notices, self._notices = self._notices, {}
        for number in notices:
            if not self._is_only_a_warning(number):
                os.kill(self._owner_pid, number)

    def _restore(self) -> None:
        _installed.discard(self)
        for number in self._previous:
            with suppress(ValueError):  # another thread closes: the handler stays, and passes everything on
                if signal.getsignal(number) is self._handler:
                    signal.signal(number, self._before(number))

    def _before(self, number: int) -> Handler:
        """The handler below. Another checkpointer's that was closed meanwhile, under ours, has nothing to do there."""
        previous = self._previous[number]
        below = getattr(previous, "__self__", None)
        if isinstance(below, Preemption) and below not in _installed:
            return below._before(number)
        return previous

    def _is_only_a_warning(self, number: int) -> bool:
        return number in _WARNINGS and self._before(number) == signal.SIG_DFL

    # --- on the main thread, between two instructions of whatever it does: no locks, no logging ---------------------

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number in self._passing_on or self not in _installed or os.getpid() != self._owner_pid:
            self._passing_on.discard(number)
            self._pass_on(number, frame)
            return
        if number in self._notices:
            return  # launchers repeat themselves
        now_s = time.monotonic()
        self.preempted = True
        notice = self._notices[number] = Notice(number, now_s, now_s + self._grace_s)
        self._queue.put(notice)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        previous = self._before(number)
        if callable(previous):
            previous(number, frame)
        elif previous == signal.SIG_DFL and not (os.getpid() == self._owner_pid and self._is_only_a_warning(number)):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    # --- on the thread ----------------------------------------------------------------------------------------------

    def expire(self, notice: Notice) -> None:
        """The grace time is over. The handler runs on the main thread as soon as that can."""
        if self._notices.get(notice.number) is notice:
            try:
                self._report(notice)
            finally:
                if self._notices.pop(notice.number, None) is not None:
                    self._passing_on.add(notice.number)
                    os.kill(self._owner_pid, notice.number)
                    self._insist(notice.number)

    def _insist(self, number: int) -> None:
        """A main thread that hangs in native code (a collective, a driver) runs no handler, so no signal ends it."""
        gives_up_s = time.monotonic() + _HANDLER_S
        while number in self._passing_on and time.monotonic() < gives_up_s:
            time.sleep(_HANDLER_S / 20)
        if number in self._passing_on and self._before(number) == signal.SIG_DFL and number not in _WARNINGS:
            # What the kernel would have done without us. Python's own ``signal`` is for the main thread.
            ctypes.CDLL(None).signal(number, None)
            os.kill(self._owner_pid, number)


_installed: weakref.WeakSet[Preemption] = weakref.WeakSet()


def _watch(notices: queue.SimpleQueue[Notice | None], owner: weakref.ref[Preemption]) -> None:
    """Wait for the deadline of every notice; most are acted on long before."""
    waiting: list[Notice] = []
    while True:
        first = min(waiting, key=lambda notice: notice.deadline_s, default=None)
        try:
            notice = notices.get(timeout=None if first is None else max(first.deadline_s - time.monotonic(), 0.0))
        except queue.Empty:
            assert first is not None
            waiting.remove(first)
            preemption = owner()
            if preemption is not None:
                preemption.expire(first)
            del preemption
            continue
        if notice is None:
            return
        waiting.append(notice)


def _forget_in_child() -> None:
    """A forked child (a data loader's worker) takes signals as if we had never been there."""
    for preemption in list(_installed):
        preemption._restore()


os.register_at_fork(after_in_child=_forget_in_child)
