"""The writer thread of a checkpointer: staged snapshots become durable, one after the other, in order.

It never touches a training tensor and never raises into anybody's loop: failures go to the pending snapshot and the
log.
"""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

from ciuic_async.chain import Snapshot, SnapshotChain
from ciuic_async.errors import CiuicError, InternalError, SaveFailedError
from ciuic_async.events import Event, Listener, SnapshotStats, logger, notify
from ciuic_async.options import WRITE
from ciuic_async.pending import PendingSnapshot
from ciuic_async.pipeline.bases import InMemory, Parent
from ciuic_async.pipeline.capture_stage import WindowQueue
from ciuic_async.pipeline.frozen import FrozenDigests
from ciuic_async.pipeline.handover import Lineage
from ciuic_async.pipeline.history import Line
from ciuic_async.pipeline.persist import Persisted, Persister, SaveRequest
from ciuic_async.pipeline.workers import OrderedWorkers
from ciuic_async.retention.forecast import too_small
from ciuic_async.retention.policy import Policy
from ciuic_async.staging.slots import SlotPool

STATS_KEPT = 10_000
"""Statistics of the newest snapshots; bounded, for runs are long."""
_LOOK_AGAIN_S = 1.0

Description = tuple[bytes, bytes]
"""Plan and request as ``pipeline.handover`` encodes them, for the slot; empty where nobody else is to read them."""


@dataclass(slots=True)
class Job:
    """A snapshot for the writer. ``stats`` and ``staged_s`` (``perf_counter``) are set when its windows end.

    ``submitted_s`` (``monotonic``): from then on the writer has it; 0: not yet.
    """

    request: SaveRequest
    windows: WindowQueue
    pending: PendingSnapshot
    stats: SnapshotStats
    staged_s: float = 0.0
    submitted_s: float = 0.0
    deadline_s: float | None = None
    description: Description = (b"", b"")


class BackgroundWriter:
    """Owns the thread ``ciuic-writer``, which begins with ``start`` and ends with ``close``; and ``ciuic-late``, which
    says so when the other one is stuck.

    Args:
        chain: where snapshots go.
        persister: closed with this object.
        pool: whose slots the jobs' windows lie in; slots go back to it.
        keep: retention after every snapshot, or None.
    """

    def __init__(
        self,
        chain: SnapshotChain,
        persister: Persister,
        pool: SlotPool,
        keep: Policy | None,
        listener: Listener | None,
    ) -> None:
        self._chain = chain
        self._persister = persister
        self._pool = pool
        self._keep = keep
        self._listener = listener
        self._jobs: queue.SimpleQueue[Job | threading.Event | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.digesters = OrderedWorkers(WRITE.digest_threads, "ciuic-digest", lambda: None)
        """Threads that help the training thread where it digests what it staged; started when it first does."""
        self._stats: deque[SnapshotStats] = deque(maxlen=STATS_KEPT)
        self._mutex = threading.Lock()
        self._swept = False
        self._looked_for_room = False
        self._tidy_problem: str | None = None
        self._last_tidy_problem = ""
        self._ends_itself = False
        self._closing = False
        self._afterwards: Callable[[], None] | None = None
        self._under_way: Job | None = None  # the writer's; others that wait come after it
        self._when_tidied: list[Callable[[], None]] = []
        self._late = threading.Thread(target=self._watch, name="ciuic-late", daemon=True)
        self._ended = threading.Event()
        self._usual_s = 0.0
        self._told_late_s = float("-inf")
        self._submitted_s = float("-inf")
        self._kept: InMemory | None = None  # the bytes of the newest durable snapshot, for the writer thread alone
        self._began_at = chain.log_size
        self.newest: Snapshot | None = None
        """The newest snapshot that this object made durable."""
        self.parent: Parent | None = None
        """What the next snapshot comes from. Set by a restore, while nothing is on its way; else by the writer."""

    @property
    def frozen(self) -> FrozenDigests:
        """What needs no copy any more."""
        return self._persister.frozen

    def lineage(self) -> Lineage:
        """What the next snapshot comes from, in words that another process can find it by."""
        parent = self.parent
        if parent is None:
            return Lineage(None, None, self._began_at)
        return Lineage(parent.snapshot, parent.leaf_hash, parent.since)

    def start(self) -> None:
        """Start the threads, if they do not run yet. Called before anything is taken that a job would own.

        Raises:
            SaveFailedError: the system gives no thread; or it is being closed, by an interpreter that ends while
                another thread still saves.
        """
        if self._closing:
            raise SaveFailedError("the writer is closed: nothing more is taken", kind="closed")
        if self._thread is not None:
            return
        thread = threading.Thread(target=self._run, name="ciuic-writer", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise SaveFailedError(
                f"the system gives no thread for the writer: {error} (ulimit -u, or the container's pids limit)",
                kind="no_thread",
            ) from error
        self._thread = thread
        with suppress(RuntimeError):  # no thread left for it: then nobody tells of a disk that hangs
            self._late.start()
        self._persister.start()

    def submit(self, job: Job) -> None:
        """Queue a job, after ``start``; the number of slots bounds the queue."""
        now_s = time.monotonic()
        interval_s = now_s - self._submitted_s
        self._submitted_s = now_s
        job.deadline_s = now_s + min(WRITE.patience_s, WRITE.patience_fraction * interval_s)
        # No interrupt comes between these two: whoever is interrupted sees by the first whose the slot is.
        job.submitted_s = now_s
        self._jobs.put(job)

    def wait_idle(self) -> None:
        """Wait until nothing is under way, retention included."""
        thread = self._thread
        if thread is None:
            return
        reached = threading.Event()
        self._jobs.put(reached)
        while not reached.wait(_LOOK_AGAIN_S) and thread.is_alive():  # closed meanwhile: it comes to no event any more
            pass

    def stats(self) -> list[SnapshotStats]:
        """Figures of finished snapshots, in order of their completion."""
        with self._mutex:
            return list(self._stats)

    def newest_stats(self, step: int | None) -> SnapshotStats | None:
        """Figures of the newest finished snapshot of a step."""
        with self._mutex:
            return next((stats for stats in reversed(self._stats) if stats.step == step), None)

    def when_tidied(self, call: Callable[[], None]) -> None:
        """From a done callback: ``call`` when nothing of that snapshot is under way any more, retention included.

        On the writer thread, or at once where the writer never had the snapshot. It must not raise.
        """
        if self._under_way is not None and threading.current_thread() is self._thread:
            self._when_tidied.append(call)
        else:
            call()

    def record(self, stats: SnapshotStats) -> None:
        """Figures of a snapshot that came to nothing before it was submitted."""
        with self._mutex:
            self._stats.append(stats)

    def take_tidy_problem(self) -> str | None:
        """Why retention fails, told once for each reason."""
        problem, self._tidy_problem = self._tidy_problem, None
        return problem

    def close(self, afterwards: Callable[[], None] | None = None) -> None:
        """Finish all jobs, then end the threads and give the slots back. Idempotent.

        Garbage collection may call this on the writer thread itself: then it ends when its jobs are done.

        Args:
            afterwards: called when nothing is under way any more; not where waiting for that was interrupted.
        """
        self._closing = True  # first: a thread that saves meanwhile must not start another writer
        self._afterwards = afterwards or self._afterwards
        thread, self._thread = self._thread, None
        if thread is not None:
            self._ends_itself = thread is threading.current_thread()
            self._jobs.put(None)
            if self._ends_itself:
                return
            thread.join()
        self._end()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            if isinstance(job, threading.Event):
                job.set()
                continue
            self._under_way = job
            try:
                self._write(job)
            except CiuicError as error:
                self._failed(job, error)
            except BaseException as error:
                failure = InternalError(f"writing failed: {type(error).__name__}: {error}")
                failure.__cause__ = error
                self._failed(job, failure)
            finally:
                self._under_way = None
                tidied, self._when_tidied = self._when_tidied, []
            for call in tidied:
                call()
            del job  # while waiting for the next one nothing of this one is kept alive
        if self._ends_itself:
            self._end()

    def _end(self) -> None:
        self._ended.set()
        if self._late.ident is not None and self._late is not threading.current_thread():
            self._late.join()
        self.digesters.close()
        self._persister.close()
        self._pool.close()
        afterwards, self._afterwards = self._afterwards, None
        if afterwards is not None:
            afterwards()

    def _write(self, job: Job) -> None:
        self._look_for_room(job.stats.raw_bytes)
        try:
            persisted = self._persister.persist(
                replace(job.request, parent=self.parent, deadline_s=job.deadline_s),
                job.windows,
                lambda window: job.windows.release(self._pool, window),
                keeps_memory=job.windows.whole,
                kept=self._kept,
            )
        except BaseException:
            job.windows.release_all(self._pool)
            raise
        retained = job.windows.release_all(self._pool, retain=True)
        self._kept = None
        if retained is not None:
            # What was not copied is not in the slot, which still holds what an earlier snapshot left there.
            remembered = job.request.remembered
            digests = tuple(b"" if number in remembered else own for number, own in enumerate(persisted.digests))
            self._kept = InMemory(job.request.snapshot, job.request.plan, digests, retained)
        self.parent = persisted.as_parent()
        self._chain.await_witnesses(persisted.index + 1)
        self._durable(job, persisted, time.perf_counter() - job.staged_s)
        self._tidy()
        self._chain.pin()  # last: nobody waits for it

    def _look_for_room(self, raw_bytes: int) -> None:
        """Once, before the first snapshot is written: say so if the disk cannot hold what retention asks for."""
        if self._looked_for_room:
            return
        self._looked_for_room = True
        try:
            problem = too_small(
                self._chain.folder, self._keep, raw_bytes, lambda: sum(own.stored_bytes for own in self._chain)
            )
            if problem is not None:
                logger.warning("%s", problem)
        except Exception as error:
            logger.debug("%s: no forecast: %s", self._chain.url, error)

    def _durable(self, job: Job, persisted: Persisted, seconds: float) -> None:
        entry = persisted.entry
        stats = replace(
            job.stats,
            persist_s=seconds,
            write_s=persisted.write_s,
            raw_bytes=entry.raw_bytes,
            stored_bytes=entry.stored_bytes,
            deduplicated_bytes=persisted.deduplicated_bytes,
        )
        with self._mutex:
            self._stats.append(stats)
        logger.info(
            "snapshot %s durable: step %s, %.1f MB (%.1f MB stored), %.2f s after it was staged",
            entry.snapshot,
            entry.step,
            entry.raw_bytes / 1e6,
            entry.stored_bytes / 1e6,
            seconds,
        )
        notify(self._listener, Event("commit", entry.snapshot, entry.stored_bytes, seconds))
        self._usual_s = seconds
        self.newest = self._chain.snapshot(Line(persisted.index, entry, persisted.leaf_hash))
        job.pending.durable(self.newest)

    def _failed(self, job: Job, error: CiuicError) -> None:
        forget_locals(error)
        logger.error("snapshot of step %s failed: %s", job.request.step, error)
        with self._mutex:
            self._stats.append(job.stats)
        job.pending.failed(error)

    def _watch(self) -> None:
        """On ``ciuic-late``: the writer cannot say that it hangs, and training may be waiting for it in ``close``."""
        while not self._ended.wait(WRITE.late_s / 4):
            self._tell_if_late()

    def _tell_if_late(self) -> None:
        now_s = time.monotonic()
        job = self._under_way
        if job is None or now_s - self._told_late_s < WRITE.late_again_s:
            return
        waited_s = now_s - job.submitted_s
        if waited_s < max(WRITE.late_s, WRITE.late_factor * self._usual_s):
            return
        self._told_late_s = now_s
        newest = self.newest
        logger.warning(
            "snapshot %s of step %s is not durable %.0f s after it was staged%s: %s is slow or hangs; training goes on "
            "as long as memory is free for snapshots; newest durable: %s. Look at the disk (dmesg, iostat -x)",
            job.request.snapshot,
            job.request.step,
            waited_s,
            f" (the one before: {self._usual_s:.1f} s)" if self._usual_s else "",
            self._chain.url,
            "none of this run" if newest is None else f"step {newest.step} (snapshot {newest.id})",
        )

    def _tidy(self) -> None:
        """Retention after a snapshot is durable, and once a sweep of what crashed writers left.

        Failing at it is no failure of the snapshot.
        """
        try:
            if self._keep is not None:
                self._chain.prune(self._keep, rebase=False)  # copying bytes would compete with training for the disk
            if not self._swept:
                self._swept = True
                self._chain.gc()
        except CiuicError as error:
            logger.error("tidying up failed, nothing good was deleted: %s", error)
            self._remember(f"tidying up failed, nothing good was deleted: {error}")
        except Exception as error:
            logger.exception("tidying up failed, nothing good was deleted")
            self._remember(f"tidying up failed, nothing good was deleted: {type(error).__name__}: {error}")

    def _remember(self, problem: str) -> None:
        if problem != self._last_tidy_problem:
            self._tidy_problem = self._last_tidy_problem = problem


def forget_locals(error: BaseException | None) -> None:
    """Empty the frames of a failure: whoever keeps the error must not keep the staged memory that they refer to."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
