"""The snapshot that is copied while training goes on: at most one at a time.

``Flight`` is such a snapshot, ``Overlap`` sees it through. Who does what:

- the training thread begins the copy (``take_off``) and returns to training;
- the thread ``ciuic-stage`` copies with low priority, or waits for the GPU's copy;
- whoever is about to change tensors (``staging.gate``: the optimizer's hook, a state that is loaded) or calls the
  checkpointer *lands* it first: the copy is finished (on a GPU the stream is made to wait for it), and the tensors are
  compared with what they were. Only then the writer gets the snapshot; if something changed them it is discarded, and
  taken again at the next step.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, replace

from ciuic_async.background import BackgroundWriter, Job, forget_locals
from ciuic_async.errors import CiuicError, InternalError, SaveFailedError
from ciuic_async.events import Event, Listener, logger, notify
from ciuic_async.handoffs import PlannedChunk, StagedWindow
from ciuic_async.options import WRITE
from ciuic_async.pending import PendingSnapshot
from ciuic_async.staging.device import Pending
from ciuic_async.staging.gate import Gate, Watch
from ciuic_async.staging.slots import Slot, SlotPool
from ciuic_async.staging.stager import settle


@dataclass(slots=True, eq=False)
class Flight:
    """A snapshot whose copy is under way.

    Args:
        job: for the writer, once it is staged.
        slot: whose payload is being filled; owned by this.
        chunks: all of them.
        works: the copies under way.
        watch: the tensors that may not change yet; keeps their memory alive.
        began_s: when copying began (``perf_counter``).
    """

    job: Job
    slot: Slot
    chunks: tuple[PlannedChunk, ...]
    works: list[Pending]
    watch: Watch
    began_s: float
    landed: bool = False
    """Nothing that comes now can change the copy."""
    copied_s: float | None = None
    """When the copy was found complete."""
    error: BaseException | None = None
    """What went wrong on the background thread."""
    over: bool = False
    """Handed on, discarded or failed."""


@dataclass(frozen=True, slots=True)
class Torn:
    """A snapshot that must be taken again."""

    job: Job
    reason: str


class Overlap:
    """Sees the flight of one checkpointer through. Owns the thread ``ciuic-stage`` and the gate; ends with ``close``.

    Holds no training state but the tensors of the current flight.
    """

    def __init__(self, writer: BackgroundWriter, pool: SlotPool, listener: Listener | None) -> None:
        self._writer = writer
        self._pool = pool
        self._listener = listener
        self.gate = Gate(self.pass_gate)
        self._owner_pid = os.getpid()
        self._flight: Flight | None = None
        self._torn: Torn | None = None
        self._training_thread = threading.current_thread()
        # Guards the flight. One thread lands it, others that are about to change tensors wait here. Reentrant:
        # callbacks of a snapshot that fails may call us, and garbage collection may close us.
        self._mutex = threading.RLock()
        self._flights: queue.SimpleQueue[Flight | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.torn_in_a_row = 0
        self.last_gate_s = 0.0

    # --- the training thread ----------------------------------------------------------------------------------------

    def take_off(self, flight: Flight) -> None:
        """Go on with training; none is under way. ``gate`` is open, the objects it loads are watched."""
        self._training_thread = threading.current_thread()
        flight.job.pending.drive = self.drive
        self._flight = flight
        self._start()
        if self._thread is not None:
            self._flights.put(flight)

    def finish(self, *, last_chance: bool = False) -> None:
        """Land what is under way and wait until it is staged; on the thread that changes tensors.

        Args:
            last_chance: nothing can be taken again. A tensor that was replaced, and not changed, is then no reason to
                discard: what was copied is what it was.
        """
        self._land(last_chance=last_chance, wait=True)

    def pass_gate(self) -> None:
        """Land what is under way, on a thread that is about to change tensors. Never raises an ``Exception``."""
        self._land(last_chance=False, wait=False)

    @property
    def has_torn(self) -> bool:
        """Whether a snapshot must be taken again."""
        return self._torn is not None

    @property
    def torn_pending(self) -> PendingSnapshot | None:
        """The snapshot that must be taken again."""
        torn = self._torn
        return None if torn is None else torn.job.pending

    def take_torn(self) -> Torn | None:
        """What must be taken again now; it is the caller's from here on."""
        torn, self._torn = self._torn, None
        if torn is not None:
            torn.job.pending.drive = None  # whoever waits for it has nothing to drive any more
        return torn

    def give_up(self) -> None:
        """What must be taken again never will be: it fails."""
        torn = self.take_torn()
        if torn is None:
            return
        error = SaveFailedError(
            f"training changed the state while it was copied ({torn.reason}), and no step() came to take it again; "
            "call flush() before you change tensors outside of an optimizer, or use staging='blocking'",
            kind="torn",
        )
        self._failed(torn.job, error)

    def drive(self, for_ever: bool) -> None:
        """A thread is going to wait for the snapshot under way, which may need it to get on.

        Only the training thread knows that nothing changes tensors right now. (If it has ended, nothing does.)
        """
        if os.getpid() != self._owner_pid:
            return
        if threading.current_thread() is self._training_thread or not self._training_thread.is_alive():
            self.finish(last_chance=True)
            if for_ever:
                self.give_up()

    def close(self) -> None:
        """Land and stage what is under way, end the thread, close the gate. Idempotent."""
        self.finish(last_chance=True)
        self.give_up()
        self.gate.close()
        thread, self._thread = self._thread, None
        if thread is not None:
            self._flights.put(None)
            if thread is not threading.current_thread():  # where garbage collection may run this
                thread.join()

    # --- landing ----------------------------------------------------------------------------------------------------

    def _land(self, *, last_chance: bool, wait: bool) -> None:
        if self._flight is None:
            return
        with self._mutex:
            flight = self._flight
            if flight is None or flight.over:
                return
            try:
                self._land_flight(flight, last_chance, wait)
            except BaseException as error:
                self._drop(flight, error)
                if not isinstance(error, Exception):
                    raise

    def _land_flight(self, flight: Flight, last_chance: bool, wait: bool) -> None:
        started = time.perf_counter()
        if wait:
            for work in flight.works:
                work.wait()
        # Every thread that comes here has a stream of its own: all of them wait, also after the flight has landed.
        complete = [work.order() for work in flight.works]
        if (wait or all(complete)) and flight.copied_s is None:
            flight.copied_s = time.perf_counter()
        reason = None if flight.landed else _what_changed(flight, last_chance)
        flight.landed = reason is None
        if flight.over:
            return  # garbage collection closed us meanwhile, on this very thread
        gate_s = time.perf_counter() - started
        stats = flight.job.stats
        flight.job.stats = replace(stats, stall_s=stats.stall_s + gate_s, gate_s=stats.gate_s + gate_s)
        self.last_gate_s = flight.job.stats.gate_s
        if reason is None:
            self._hand_on(flight)
        else:
            self._discard(flight, reason)

    def _hand_on(self, flight: Flight) -> None:
        """Give the writer a snapshot that has landed and is copied; called by whoever finds that it is so."""
        if flight.over or not flight.landed or flight.copied_s is None:
            return
        flight.over = True
        job, request = flight.job, flight.job.request
        stage_s = flight.copied_s - flight.began_s
        job.stats = replace(job.stats, stage_s=stage_s)
        job.staged_s = time.perf_counter()
        flight.slot.mark_staged(request.step, request.snapshot, *job.description)
        job.windows.put(StagedWindow(0, flight.chunks, flight.slot.memory), flight.slot)
        try:
            job.windows.end()
            self.torn_in_a_row = 0
            job.pending.drive = None
            job.pending.staged()
            notify(self._listener, Event("stage", request.snapshot, job.stats.raw_bytes, stage_s))
            self._writer.submit(job)
        except BaseException:  # Ctrl-C; where the writer has not heard of it the slot goes back from here
            if not job.submitted_s:
                job.windows.release_all(self._pool)
            raise
        self._forget(flight)  # last: who finds no flight may rely on the writer having it

    def _discard(self, flight: Flight, reason: str) -> None:
        """Training changed it: to be taken again."""
        logger.warning(
            "the snapshot of step %s is discarded: training changed it while it was copied (%s); it is taken again, "
            "blocking, at the next step",
            flight.job.request.step,
            reason,
        )
        self.torn_in_a_row += 1
        stats = flight.job.stats
        flight.job.stats = replace(stats, torn_retries=stats.torn_retries + 1)
        self._torn = Torn(flight.job, reason)
        self._release(flight)

    def _drop(self, flight: Flight, error: BaseException) -> None:
        """Something is broken: the snapshot fails, training goes on."""
        failure = error if isinstance(error, CiuicError) else InternalError(f"staging failed: {error!r}")
        if failure is not error:
            failure.__cause__ = error
        if not flight.over:
            self._release(flight)
        self._forget(flight)
        self._failed(flight.job, failure)

    def _release(self, flight: Flight) -> None:
        """Give the slot back, once nothing writes into it any more."""
        flight.over = True
        settle(flight.works)
        self._forget(flight)
        self._pool.release(flight.slot)

    def _forget(self, flight: Flight) -> None:
        flight.works = []
        if self._flight is flight:
            self._flight = None

    def _failed(self, job: Job, error: CiuicError) -> None:
        forget_locals(error)
        logger.error("snapshot of step %s failed: %s", job.request.step, error)
        self._writer.record(job.stats)
        job.pending.drive = None
        job.pending.failed(error)

    # --- the background thread --------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Start the thread where that is possible: without it the copy is made when the flight lands."""
        if self._thread is not None:
            return
        thread = threading.Thread(
            target=_copy_in_background, args=(self._flights, self), name="ciuic-stage", daemon=True
        )
        with suppress(RuntimeError):  # no threads left, or the interpreter ends
            thread.start()
            self._thread = thread

    def copy(self, flight: Flight) -> None:
        """Do the copying of a flight as far as nobody else does. On ``ciuic-stage``."""
        try:
            works = flight.works
            for work in works:
                while not flight.over and work.advance():
                    pass
            for work in works:
                work.wait()
        except BaseException as error:
            with self._mutex:
                flight.error = error
                if flight.landed and not flight.over:
                    self._drop(flight, error)
            return
        with self._mutex:
            if flight.copied_s is None:
                flight.copied_s = time.perf_counter()
            self._hand_on(flight)


def _what_changed(flight: Flight, last_chance: bool) -> str | None:
    if flight.error is not None:
        raise flight.error
    return flight.watch.changed() if last_chance else flight.watch.torn()


def _copy_in_background(flights: queue.SimpleQueue[Flight | None], overlap: Overlap) -> None:
    with suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), WRITE.niceness)
    while (flight := flights.get()) is not None:
        overlap.copy(flight)
        del flight  # while waiting for the next one nothing of this one is kept alive
