"""Checkpointer: the engine tied to one training run.

Threads: everything public is called on the training thread. One writer thread (``ciuic-writer``) makes staged snapshots
durable, one after the other; it never touches a training tensor. Both end with ``close``.
"""

from __future__ import annotations

import atexit
import math
import os
import queue
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ciuic_async.capture import training
from ciuic_async.capture.state_tree import Captured, decode_plain, encode_plain, flatten
from ciuic_async.chain import Snapshot, SnapshotChain
from ciuic_async.codecs.choose import codec_for
from ciuic_async.errors import (
    CiuicError,
    CiuicWarning,
    IntegrityError,
    InternalError,
    SaveFailedError,
    StoreError,
    UsageError,
)
from ciuic_async.events import Event, Listener, SnapshotStats, logger, notify
from ciuic_async.format import layout
from ciuic_async.format.entry import MAX_METRICS, Position
from ciuic_async.format.jsontext import MAX_SAFE_INTEGER
from ciuic_async.format.manifest import Progress as ProgressNodes
from ciuic_async.pending import PendingSnapshot
from ciuic_async.pipeline.capture_stage import STAGED, WindowQueue, slot_plan, stage_windows, table_bytes
from ciuic_async.pipeline.history import Line
from ciuic_async.pipeline.persist import Parent, Persisted, Persister, SaveRequest, lower_priority
from ciuic_async.pipeline.restore import restore_objects
from ciuic_async.ranks import require_single_rank
from ciuic_async.retention.policy import Policy
from ciuic_async.staging.budget import check_bound
from ciuic_async.staging.device import Devices
from ciuic_async.staging.slots import Slot, SlotPool, out_of_memory

STATS_KEPT = 10_000
"""Statistics of the newest snapshots; bounded, for runs are long."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where training stands after a restore.

    Attributes:
        step: steps done; counting goes on from here.
        epoch, batch: verbatim what was given to ``step``; by convention the last finished batch.
        metrics: recorded numbers by name.
        snapshot: what was restored.
        skipped: newer snapshots passed over because they are damaged: (id, reason).
        mismatches: differences that ``strict=False`` let pass.
    """

    step: int
    epoch: Any
    batch: Any
    metrics: dict[str, float]
    snapshot: Snapshot
    skipped: tuple[tuple[str, str], ...] = ()
    mismatches: tuple[str, ...] = ()


@dataclass(slots=True)
class _Job:
    """A snapshot for the writer."""

    request: SaveRequest
    windows: WindowQueue
    pending: PendingSnapshot
    stats: SnapshotStats
    started_s: float


class Checkpointer:
    """Takes snapshots of a training run while it trains, and brings the newest good one back.

    Args:
        chain: path, URL or ``SnapshotChain``.
        state: mapping of name to anything with ``state_dict``/``load_state_dict``, or a plain state tree.
        every_steps, every_epochs, every_seconds: when ``step`` takes a snapshot; several may be given, any one is
            enough. An epoch counts as over when ``step`` is first called with the next one.
        keep: which snapshots stay (``KeepLatest(3)``); None keeps all.
        rng: also capture and restore the random generators of python, numpy and torch.
        staging: ``"auto"`` or ``"blocking"``: the state is copied before ``step`` returns.
        host_memory_bytes: bound of the memory for staged snapshots; default the smaller of twice the state and 40% of
            what is left. Below the state's size it is staged in windows, which blocks longer.
        when_busy: ``"wait"`` for the writer at most ``busy_timeout_s``, then skip this snapshot; or ``"skip"`` at once.
        codec: ``"auto"`` or ``"raw"``.
        on_error: ``"warn"``: background failures never stop training; ``"raise"``: the next ``step`` raises them.
        key: signing key: path or the secret itself; default ``CIUIC_KEY``, else the user's own.

    Raises:
        UsageError: an argument is wrong, or belongs to a part that is not built yet.
        StoreError: the place cannot be written to.
    """

    def __init__(
        self,
        chain: str | os.PathLike[str] | SnapshotChain,
        state: Mapping[str, Any],
        *,
        every_steps: int | None = None,
        every_epochs: int | None = None,
        every_seconds: float | None = None,
        overhead_budget: float | None = None,
        keep: Policy | None = None,
        rng: bool = True,
        staging: str = "auto",
        host_memory_bytes: int | None = None,
        when_busy: str = "wait",
        busy_timeout_s: float = 30.0,
        codec: str = "auto",
        frozen: Sequence[str] = (),
        preemption: bool = False,
        keeper: bool = False,
        mtbf_s: float | None = None,
        on_error: str = "warn",
        key: str | os.PathLike[str] | None = None,
        listener: Listener | None = None,
    ) -> None:
        _refuse_unbuilt(overhead_budget, staging, frozen, preemption, keeper, mtbf_s)
        _check_choice("staging", staging, ("auto", "blocking"))
        _check_choice("when_busy", when_busy, ("wait", "skip"))
        _check_choice("on_error", on_error, ("warn", "raise"))
        for name, value in (("every_steps", every_steps), ("every_epochs", every_epochs), ("every_seconds", every_seconds)):
            if value is not None and not value > 0:
                raise UsageError(f"{name}={value!r}: expected a number above 0, or None")
        check_bound(host_memory_bytes)
        require_single_rank()
        self._codec = codec_for(codec)
        self._state = _check_state(state)
        self._every_steps, self._every_epochs, self._every_seconds = every_steps, every_epochs, every_seconds
        self._keep = keep
        self._rng = rng
        self._host_memory_bytes = host_memory_bytes
        self._busy_timeout_s = busy_timeout_s if when_busy == "wait" else 0.0
        self._skips_quietly = when_busy == "skip"
        self._raises = on_error == "raise"
        self._listener = listener
        self._owns_chain = not isinstance(chain, SnapshotChain)
        self._chain = chain if isinstance(chain, SnapshotChain) else SnapshotChain(chain, key=key)
        target = self._chain.target()
        self._persister = Persister(target, self._chain.file, self._codec, self._chain.run)
        self._environment = training.environment()
        self._pool = SlotPool()
        self._devices = Devices()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._writer: threading.Thread | None = None
        self._unfinished: deque[PendingSnapshot] = deque()
        self._stats: deque[SnapshotStats] = deque(maxlen=STATS_KEPT)
        self._mutex = threading.Lock()
        self._parent: Parent | None = None
        self._step = 0
        self._epoch: Any = None
        self._batch: Any = None
        self._epoch_of_snapshot: Any = None
        self._last_snapshot_s = time.monotonic()
        self._prepared = False
        self._closed = False
        self._owner_pid = os.getpid()
        self._atexit = _close_at_exit(self)

    # --- the training loop ---------------------------------------------------------------------------------------------

    def step(
        self, *, epoch: Any = None, batch: Any = None, metrics: Mapping[str, Any] | None = None
    ) -> PendingSnapshot | None:
        """Count one finished training step, and take a snapshot if one is due.

        Call it after ``optimizer.step()``. On return training may go on and change everything: what a snapshot needs
        is copied. Failures of earlier snapshots surface here (see ``on_error``).

        Args:
            epoch, batch: where training stands; they come back verbatim from ``restore``.
            metrics: numbers to record if a snapshot is taken.

        Returns:
            The snapshot on its way, or None if none was due (or it was skipped because ``when_busy="skip"``).
        """
        if self._inert():
            return None
        self._surface_errors()
        self._step += 1
        if self._epoch_of_snapshot is None:
            self._epoch_of_snapshot = epoch
        due = self._due(epoch)
        self._epoch, self._batch = epoch, batch
        if not due:
            if not self._prepared:
                self._prepare()
            return None
        self._epoch_of_snapshot = epoch
        pending = self._take(metrics, ())
        skipped = pending.error is not None and pending.error.kind == "busy" and self._skips_quietly
        return None if skipped else pending

    def save(self, *, metrics: Mapping[str, Any] | None = None, tags: Sequence[str] = ()) -> PendingSnapshot:
        """Take a snapshot now, whatever the schedule says. On return training may go on.

        Raises:
            UsageError: called in a forked child, after ``close``, or with a tag that is none.
        """
        if self._inert():
            raise UsageError("save() was called in a forked child process; the checkpointer belongs to its parent")
        self._surface_errors()
        return self._take(metrics, check_tags(tags))

    def before_update(self) -> None:
        """Tell that an optimizer which is not a ``torch.optim.Optimizer`` is about to change parameters.

        With blocking staging everything is copied already: nothing happens.
        """

    def flush(self, timeout_s: float | None = None) -> None:
        """Wait until everything taken so far is durable (or failed).

        Raises:
            TimeoutError: not within ``timeout_s``; work goes on.
            SaveFailedError: with ``on_error="raise"``, if one failed and nobody has seen it.
        """
        self._wait_unfinished(timeout_s)
        self._surface_errors()

    def close(self) -> None:
        """Make everything taken durable, then stop the writer and give back memory. Idempotent.

        Raises:
            SaveFailedError: with ``on_error="raise"``, if a snapshot failed and nobody has seen it.
        """
        if self._closed or self._inert():
            return
        self._closed = True
        atexit.unregister(self._atexit)
        try:
            self._jobs.put(None)
            if self._writer is not None:
                self._writer.join()
        finally:
            self._persister.close()
            self._pool.close()
            if self._owns_chain:
                self._chain.close()
        self._surface_errors()

    def stats(self) -> list[SnapshotStats]:
        """Figures of the snapshots taken (the newest 10,000), in order of their completion."""
        with self._mutex:
            return list(self._stats)

    @property
    def chain(self) -> SnapshotChain:
        """Where the snapshots go."""
        return self._chain

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except CiuicError as own:  # the loop's own exception is the news
            logger.error("%s", own)

    # --- restore ------------------------------------------------------------------------------------------------------

    def restore(self, ref: str = "latest", *, strict: bool = True) -> Progress | None:
        """Bring a snapshot back into the live objects, bit for bit: the regret pill.

        With ``"latest"`` damaged snapshots are passed over with a warning until a good one is found.

        Args:
            ref: which one (see ``SnapshotChain.get``).
            strict: every difference between snapshot and objects is an error; else what fits is loaded and the rest is
                reported in ``Progress.mismatches``.

        Returns:
            Where training stands, or None when there is no snapshot yet (``"latest"`` only).

        Raises:
            TargetMismatchError: the snapshot does not fit; lists every difference; nothing was changed.
            IntegrityError: damage (with ``"latest"``: and no older snapshot is good). The objects then hold a mixture:
                do not train on them.
            NotFoundError: no such snapshot.
        """
        if self._inert():
            raise UsageError("restore() was called in a forked child process; the checkpointer belongs to its parent")
        self._wait_unfinished(None)
        if ref != "latest":
            return self._restored(self._chain.get(ref), strict, ())
        skipped: list[tuple[str, str]] = []
        failure: CiuicError | None = None
        for snapshot in self._chain.newest_first():
            try:
                return self._restored(snapshot, strict, tuple(skipped))
            except (IntegrityError, StoreError) as error:
                failure = failure or error
                skipped.append((snapshot.id, str(error)))
                self._warn(f"snapshot {snapshot.id} (step {snapshot.step}) is damaged and was passed over: {error}")
        if failure is None:
            return None
        raise IntegrityError(
            f"{self._chain.url}: none of {len(skipped)} snapshots is good; newest: {failure}. "
            "Run 'ciuic verify' on the chain; the objects may hold a mixture and must not be used",
            kind=failure.kind,
            where=failure.where,
        ) from failure

    def _restored(self, snapshot: Snapshot, strict: bool, skipped: tuple[tuple[str, str], ...]) -> Progress:
        started = time.perf_counter()
        resolved = snapshot.resolve()
        result = restore_objects(
            self._chain.store, resolved, self._state, strict=strict, rng=self._rng, listener=self._listener
        )
        nodes = resolved.manifest.progress
        step = decode_plain(nodes.step)
        self._step = step if isinstance(step, int) else 0
        self._epoch, self._batch = decode_plain(nodes.epoch), decode_plain(nodes.batch)
        self._epoch_of_snapshot = self._epoch
        self._last_snapshot_s = time.monotonic()
        self._parent = Parent(snapshot.id, snapshot.leaf_hash, resolved.locator.chunks)
        differences = training.environment_differences(resolved.manifest.environment, training.environment())
        if differences:
            self._warn(
                f"snapshot {snapshot.id} was taken in another environment, so training may not go on bit for bit: "
                + "; ".join(differences)
            )
        logger.info("restored snapshot %s, step %s, in %.2f s", snapshot.id, step, time.perf_counter() - started)
        return Progress(
            self._step, self._epoch, self._batch, snapshot.metrics, snapshot, skipped, result.mismatches
        )

    # --- taking a snapshot, on the training thread -------------------------------------------------------------------------

    def _due(self, epoch: Any) -> bool:
        if self._every_steps is not None and self._step % self._every_steps == 0:
            return True
        if self._every_seconds is not None and time.monotonic() - self._last_snapshot_s >= self._every_seconds:
            return True
        if self._every_epochs is None or epoch is None or epoch == self._epoch_of_snapshot:
            return False
        try:
            return bool(epoch - self._epoch_of_snapshot >= self._every_epochs)
        except TypeError:
            return True

    def _take(self, metrics: Mapping[str, Any] | None, tags: tuple[str, ...]) -> PendingSnapshot:
        """Capture, stage and hand over. Never raises for what is wrong with the state or the machine."""
        if self._closed:
            raise UsageError("this Checkpointer is closed")
        started = time.perf_counter()
        self._last_snapshot_s = time.monotonic()
        pending = PendingSnapshot(self._step)
        try:
            self._capture_and_stage(pending, metrics, tags, started)
        except CiuicError as error:
            self._failed_to_take(pending, error)
        except Exception as error:
            if out_of_memory(error):
                failure: CiuicError = StoreError(
                    f"no host memory left to stage the snapshot: {error}; lower host_memory_bytes", kind="out_of_memory"
                )
            else:
                failure = InternalError(f"capturing the state failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            self._failed_to_take(pending, failure)
        return pending

    def _capture_and_stage(
        self,
        pending: PendingSnapshot,
        metrics: Mapping[str, Any] | None,
        tags: tuple[str, ...],
        started: float,
    ) -> None:
        recorded = check_metrics(metrics)
        captured = self._capture()
        plan = slot_plan(captured, self._host_memory_bytes, self._pool)
        first = self._pool.acquire(plan, table_bytes(captured), self._busy_timeout_s)
        if first is None:
            raise SaveFailedError(
                "skipped: earlier snapshots are not durable yet "
                + ("(when_busy='skip')" if self._skips_quietly else f"after {self._busy_timeout_s} s (busy_timeout_s)")
                + "; take fewer or use a faster disk",
                kind="busy",
            )
        self._pool.trim(plan)
        request = SaveRequest(
            snapshot=layout.new_id(),
            plan=captured.plan,
            step=self._step,
            epoch=_position(self._epoch),
            batch=_position(self._batch),
            progress=ProgressNodes(
                self._step, encode_plain(self._epoch, "epoch"), encode_plain(self._batch, "batch")
            ),
            metrics=recorded,
            tags=tags,
            environment=self._environment,
        )
        windows = WindowQueue(whole=not plan.windowed)
        stats = SnapshotStats(self._step, request.snapshot, raw_bytes=sum(region.size_bytes for region in captured.plan.regions))
        job = _Job(request, windows, pending, stats, started)
        staging_started = time.perf_counter()

        def mark(slot: Slot) -> None:
            slot.mark(STAGED, step=self._step, snapshot=request.snapshot, regions=captured.plan.regions)

        if plan.windowed:  # the writer must empty the first windows while the later ones are filled
            self._submit(job)
        try:
            stage_windows(
                captured,
                plan,
                self._pool,
                self._devices,
                windows,
                first=first,
                timeout_s=self._busy_timeout_s or 30.0,
                mark=mark,
            )
        except BaseException as error:
            windows.abandon(
                error if isinstance(error, CiuicError) else SaveFailedError(f"staging was interrupted: {error!r}")
            )
            raise
        now = time.perf_counter()
        job.stats = replace(stats, stall_s=now - started, stage_s=now - staging_started)
        pending.staged()
        notify(self._listener, Event("stage", request.snapshot, stats.raw_bytes, now - staging_started))
        if not plan.windowed:
            self._submit(job)

    def _capture(self) -> Captured:
        return flatten(
            training.capture_objects(self._state),
            chunk_size_bytes=self._chain.file.chunk_size_bytes,
            rng=training.capture_rng() if self._rng else None,
            trainable=training.trainable_storages(self._state),
        )

    def _prepare(self) -> None:
        """Make and touch the slots in the background, once optimizers have made their state: after the first step."""
        self._prepared = True
        try:
            captured = self._capture()
            plan = slot_plan(captured, self._host_memory_bytes, self._pool)
            self._pool.prepare(plan, table_bytes(captured), self._devices.for_pinning())
        except CiuicError as error:
            logger.warning("the state cannot be captured as it is now: %s", error)

    def _failed_to_take(self, pending: PendingSnapshot, error: CiuicError) -> None:
        quiet = error.kind == "busy" and self._skips_quietly
        if quiet:
            logger.info("snapshot of step %s %s", pending.step, error)
        else:
            logger.error("snapshot of step %s failed: %s", pending.step, error)
        pending.failed(error, seen=quiet)
        if not quiet:
            self._unfinished.append(pending)
            self._surface_errors()

    def _submit(self, job: _Job) -> None:
        if self._writer is None:
            self._writer = threading.Thread(target=self._write, name="ciuic-writer", daemon=True)
            self._writer.start()
        self._unfinished.append(job.pending)
        self._jobs.put(job)

    # --- the writer thread ---------------------------------------------------------------------------------------------

    def _write(self) -> None:
        lower_priority()
        while (job := self._jobs.get()) is not None:
            try:
                self._write_one(job)
            except CiuicError as error:
                self._failed(job, error)
            except BaseException as error:
                failure = InternalError(f"writing failed: {type(error).__name__}: {error}")
                failure.__cause__ = error
                self._failed(job, failure)
            finally:
                job.windows.release_all(self._pool)

    def _write_one(self, job: _Job) -> None:
        started = time.perf_counter()
        parent = self._parent
        persisted = self._persister.persist(
            replace(job.request, parent=parent),
            job.windows,
            lambda window: job.windows.release(self._pool, window),
            keeps_memory=job.windows.whole,
        )
        job.windows.release_all(self._pool)
        self._parent = persisted.as_parent()
        seconds = time.perf_counter() - started
        self._durable(job, persisted, seconds)
        if self._keep is not None:
            self._prune(self._keep)

    def _durable(self, job: _Job, persisted: Persisted, seconds: float) -> None:
        entry = persisted.entry
        stats = replace(
            job.stats,
            persist_s=seconds,
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
        line = Line(persisted.index, entry, persisted.leaf_hash)
        job.pending.durable(Snapshot(self._chain, line))

    def _failed(self, job: _Job, error: CiuicError) -> None:
        logger.error("snapshot of step %s failed: %s", job.request.step, error)
        with self._mutex:
            self._stats.append(job.stats)
        job.pending.failed(error)

    def _prune(self, policy: Policy) -> None:
        """Retention after a snapshot is durable; its failure is no failure of the snapshot."""
        try:
            self._chain.prune(policy)
        except CiuicError as error:
            logger.error("retention (%s) failed, nothing good was deleted: %s", policy.describe(), error)

    # --- errors and ends -----------------------------------------------------------------------------------------------

    def _wait_unfinished(self, timeout_s: float | None) -> None:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        for pending in list(self._unfinished):
            left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            with pending._changed:
                if not pending._changed.wait_for(lambda p=pending: p.phase in ("durable", "failed"), left):  # type: ignore[misc]
                    raise TimeoutError(f"snapshot of step {pending.step} is still {pending.phase} after {timeout_s} s")

    def _surface_errors(self) -> None:
        """Report failures that nobody has seen: raise or warn, each once."""
        while self._unfinished and self._unfinished[0].phase in ("durable", "failed"):
            failure = self._unfinished.popleft().take_unseen_error()
            if failure is None:
                continue
            if self._raises:
                raise failure
            self._warn(str(failure))

    def _warn(self, message: str) -> None:
        warnings.warn(message, CiuicWarning, stacklevel=3)

    def _inert(self) -> bool:
        """Whether this is a forked child: writer and slots belong to the parent, nothing may be touched."""
        return os.getpid() != self._owner_pid


def _close_at_exit(checkpointer: Checkpointer) -> Any:
    """Flush at interpreter exit for scripts that never call ``close``, without keeping the object alive."""
    reference = weakref.ref(checkpointer)

    def close() -> None:
        alive = reference()
        if alive is not None:
            try:
                alive.close()
            except CiuicError as error:
                logger.error("%s", error)

    atexit.register(close)
    return close


def _refuse_unbuilt(
    overhead_budget: float | None,
    staging: str,
    frozen: Sequence[str],
    preemption: bool,
    keeper: bool,
    mtbf_s: float | None,
) -> None:
    """Options of the stable API whose part is not built yet: better an error than a promise that is not kept."""
    unbuilt = {
        "overhead_budget": overhead_budget is not None,
        "staging='overlap'": staging == "overlap",
        "frozen": bool(frozen),
        "preemption": preemption,
        "keeper": keeper,
        "mtbf_s": mtbf_s is not None,
    }
    for name, asked in unbuilt.items():
        if asked:
            raise UsageError(f"{name} is not available in this version; leave it out", kind="not_available")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{name}={value!r}: expected one of {', '.join(map(repr, choices))}")


def _check_state(state: Mapping[str, Any]) -> MutableMapping[str, Any]:
    if not isinstance(state, Mapping) or not state:
        raise UsageError("state: expected a mapping of names to objects, e.g. {'model': model, 'optimizer': optimizer}")
    for name in state:
        if type(name) is not str or not name:
            raise UsageError(f"state: names are texts, found {name!r}")
    return state if isinstance(state, MutableMapping) else dict(state)


def check_tags(tags: Sequence[str]) -> tuple[str, ...]:
    """Tags as they are recorded. Raises UsageError."""
    if isinstance(tags, str):
        raise UsageError(f"tags={tags!r}: expected a list of tags, found one text")
    for tag in tags:
        if type(tag) is not str or not tag or len(tag) > 200 or not tag.isprintable():
            raise UsageError(f"tag {tag!r}: expected 1 to 200 printable characters")
    return tuple(tags)


def check_metrics(metrics: Mapping[str, Any] | None) -> tuple[tuple[str, str], ...]:
    """Metrics as (name, shortest decimal that reads back to the same number), sorted."""
    if not metrics:
        return ()
    result = []
    for name, value in metrics.items():
        if type(name) is not str or not name or len(name) > 200 or not name.isprintable():
            raise UsageError(f"metric {name!r}: expected a name of 1 to 200 printable characters")
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UsageError(f"metric {name!r}: expected a number, found {type(value).__name__}: {error}") from None
        result.append((name, repr(int(number)) if _is_small_integer(value, number) else repr(number)))
    if len(result) > MAX_METRICS:
        raise UsageError(f"{len(result)} metrics, at most {MAX_METRICS} can be recorded with a snapshot")
    return tuple(sorted(result))


def _is_small_integer(value: Any, number: float) -> bool:
    return isinstance(value, int) and math.isfinite(number) and abs(number) <= MAX_SAFE_INTEGER


def _position(value: Any) -> Position:
    """Epoch or batch for the log entry, where only integers and short texts fit; the manifest has it verbatim."""
    if type(value) is int and abs(value) <= MAX_SAFE_INTEGER:
        return value
    if type(value) is str and len(value) <= 1000 and value.isprintable():
        return value
    return None
