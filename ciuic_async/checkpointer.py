"""Checkpointer: the engine tied to one training run.

Threads: everything public is called on the training thread. One writer thread (``ciuic-writer``) makes staged snapshots
durable, one after the other; it never touches a training tensor. Both end with ``close``.
"""

from __future__ import annotations

import os
import time
import warnings
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ciuic_async.arguments import (
    check_choice,
    check_metrics,
    check_number,
    check_policy,
    check_state,
    check_tags,
    position,
    refuse_unbuilt,
)
from ciuic_async.background import BackgroundWriter, Job, forget_locals
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
from ciuic_async.format.manifest import Progress as ProgressNodes
from ciuic_async.pending import PendingSnapshot
from ciuic_async.pipeline.capture_stage import STAGED, WindowQueue, slot_plan, stage_windows, table_bytes
from ciuic_async.pipeline.persist import Parent, Persister, SaveRequest
from ciuic_async.pipeline.restore import restore_objects
from ciuic_async.ranks import require_single_rank
from ciuic_async.retention.policy import Policy
from ciuic_async.staging.budget import check_bound
from ciuic_async.staging.device import Devices
from ciuic_async.staging.slots import Slot, SlotPool, out_of_memory

WINDOW_TIMEOUT_S = 30.0
"""How long staging waits for the writer to free a window when ``when_busy="skip"`` gives no time of its own."""


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
        refuse_unbuilt(overhead_budget, staging, frozen, preemption, keeper, mtbf_s)
        check_choice("staging", staging, ("auto", "blocking"))
        check_choice("when_busy", when_busy, ("wait", "skip"))
        check_choice("on_error", on_error, ("warn", "raise"))
        check_number("every_steps", every_steps, whole=True)
        check_number("every_epochs", every_epochs)
        check_number("every_seconds", every_seconds)
        check_number("host_memory_bytes", host_memory_bytes, whole=True)
        check_number("busy_timeout_s", busy_timeout_s, zero=True)
        check_bound(host_memory_bytes)
        check_policy(keep)
        if key is not None and isinstance(chain, SnapshotChain):
            raise UsageError("key= was given beside an open SnapshotChain, which has its own: give it to the chain")
        require_single_rank()
        encoder = codec_for(codec)
        self._state = check_state(state)
        self._every_steps, self._every_epochs, self._every_seconds = every_steps, every_epochs, every_seconds
        self._rng = rng
        self._host_memory_bytes = host_memory_bytes
        self._busy_timeout_s = busy_timeout_s if when_busy == "wait" else 0.0
        self._skips_quietly = when_busy == "skip"
        self._raises = on_error == "raise"
        self._listener = listener
        self._owns_chain = not isinstance(chain, SnapshotChain)
        self._chain = chain if isinstance(chain, SnapshotChain) else SnapshotChain(chain, key=key)
        target = self._chain.target()
        self._environment = training.environment()
        self._pool = SlotPool()
        self._devices = Devices()
        persister = Persister(target, self._chain.file, encoder, self._chain.run)
        self._writer = BackgroundWriter(self._chain, persister, self._pool, keep, listener)
        self._unfinished: deque[PendingSnapshot] = deque()
        self._step = 0
        self._epoch: Any = None
        self._batch: Any = None
        self._epoch_of_snapshot: Any = None
        self._last_snapshot_s = time.monotonic()
        self._prepared = False
        self._closed = False
        self._owner_pid = os.getpid()
        # Holds what must be finished, and not this object: a checkpointer that is dropped, or alive when the
        # interpreter ends, still makes durable what it has taken.
        self._finalizer = weakref.finalize(
            self, _end, self._owner_pid, self._writer, self._chain if self._owns_chain else None
        )

    # --- the training loop ------------------------------------------------------------------------------------------

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
        self._step += 1
        if self._epoch_of_snapshot is None:
            self._epoch_of_snapshot = epoch
        due = self._due(epoch)
        self._epoch, self._batch = epoch, batch
        self._surface_errors()  # may raise if asked to; the step is counted all the same
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
        self._finalizer()
        failures = self._take_failures()
        if failures and self._raises:
            raise failures[0]  # the others are in the log
        for failure in failures:
            self._warn(str(failure))

    def stats(self) -> list[SnapshotStats]:
        """Figures of the snapshots taken (the newest 10,000), in order of their completion."""
        return self._writer.stats()

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

    # --- restore ----------------------------------------------------------------------------------------------------

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
            TargetMismatchError: the snapshot does not fit; lists every difference; nothing was changed, unless it is
                an object's own ``load_state_dict`` that refuses: that shows only when models are restored already.
            IntegrityError: damage (with ``"latest"``: and no older snapshot is good). The objects then hold a mixture:
                do not train on them.
            NotFoundError: no such snapshot.
        """
        if self._inert():
            raise UsageError("restore() was called in a forked child process; the checkpointer belongs to its parent")
        self._writer.wait_idle()
        if ref != "latest":
            return self._restored(self._chain.get(ref), strict, ())
        skipped: list[tuple[str, str]] = []
        failure: CiuicError | None = None
        for snapshot in self._chain.newest_first():
            try:
                return self._restored(snapshot, strict, tuple(skipped))
            except (IntegrityError, StoreError) as error:
                if isinstance(error, StoreError) and error.kind != "eio":
                    raise  # no permission, too many files, ...: the newest state is not lost, only out of reach
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
        self._writer.parent = Parent(snapshot.id, snapshot.leaf_hash, resolved.locator.chunks)
        differences = training.environment_differences(resolved.manifest.environment, training.environment())
        if differences:
            self._warn(
                f"snapshot {snapshot.id} was taken in another environment, so training may not go on bit for bit: "
                + "; ".join(differences)
            )
        logger.info("restored snapshot %s, step %s, in %.2f s", snapshot.id, step, time.perf_counter() - started)
        return Progress(self._step, self._epoch, self._batch, snapshot.metrics, snapshot, skipped, result.mismatches)

    # --- taking a snapshot, on the training thread ------------------------------------------------------------------

    def _due(self, epoch: Any) -> bool:
        if self._every_steps is not None and self._step % self._every_steps == 0:
            return True
        if self._every_seconds is not None and time.monotonic() - self._last_snapshot_s >= self._every_seconds:
            return True
        if self._every_epochs is None or epoch is None:
            return False
        try:
            if epoch == self._epoch_of_snapshot:
                return False
            return bool(epoch - self._epoch_of_snapshot >= self._every_epochs)
        except Exception:  # no number (a text, an array, ...): every change counts
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
            self._failed_to_take(pending, error, started)
        except Exception as error:
            if out_of_memory(error):
                failure: CiuicError = StoreError(
                    f"no host memory left to stage the snapshot: {error}; lower host_memory_bytes", kind="out_of_memory"
                )
            else:
                failure = InternalError(f"capturing the state failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            self._failed_to_take(pending, failure, started)
        return pending

    def _capture_and_stage(
        self,
        pending: PendingSnapshot,
        metrics: Mapping[str, Any] | None,
        tags: tuple[str, ...],
        started: float,
    ) -> None:
        self._prepared = True  # slots are made right now, if there are none yet
        self._writer.start()
        captured = self._capture()
        request = SaveRequest(
            snapshot=layout.new_id(),
            plan=captured.plan,
            step=self._step,
            epoch=position(self._epoch),
            batch=position(self._batch),
            progress=ProgressNodes(self._step, encode_plain(self._epoch, "epoch"), encode_plain(self._batch, "batch")),
            metrics=check_metrics(metrics),
            tags=tags,
            environment=self._environment,
        )
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
        windows = WindowQueue(whole=not plan.windowed)
        raw_bytes = sum(region.size_bytes for region in captured.plan.regions)
        job = Job(request, windows, pending, SnapshotStats(self._step, request.snapshot, raw_bytes=raw_bytes))
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
                timeout_s=self._busy_timeout_s or WINDOW_TIMEOUT_S,
                mark=mark,
            )
        except BaseException as error:
            windows.abandon(
                error if isinstance(error, CiuicError) else SaveFailedError(f"staging was interrupted: {error!r}")
            )
            raise
        now = time.perf_counter()
        job.stats = replace(job.stats, stall_s=now - started, stage_s=now - staging_started)
        job.staged_s = now
        windows.end()
        pending.staged()
        notify(self._listener, Event("stage", request.snapshot, raw_bytes, now - staging_started))
        if not plan.windowed:
            self._submit(job)

    def _submit(self, job: Job) -> None:
        self._unfinished.append(job.pending)
        self._writer.submit(job)

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
        except Exception as error:  # no snapshot is due: whatever it is will be reported when one is
            logger.warning("the state cannot be captured as it is now: %s", error)

    def _failed_to_take(self, pending: PendingSnapshot, error: CiuicError, started: float) -> None:
        if error.kind == "writer_failed":
            return  # the writer knows the cause, and reports it
        quiet = error.kind == "busy" and self._skips_quietly
        if quiet:
            logger.info("snapshot of step %s %s", pending.step, error)
        else:
            logger.error("snapshot of step %s failed: %s", pending.step, error)
        forget_locals(error)
        self._writer.record(SnapshotStats(pending.step, "", stall_s=time.perf_counter() - started))
        pending.failed(error, seen=quiet)
        if not quiet:
            self._unfinished.append(pending)
            self._surface_errors()

    # --- errors and ends --------------------------------------------------------------------------------------------

    def _wait_unfinished(self, timeout_s: float | None) -> None:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        for pending in list(self._unfinished):
            left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            with pending._changed:
                if not pending._changed.wait_for(lambda p=pending: p.phase in ("durable", "failed"), left):  # type: ignore[misc]
                    raise TimeoutError(f"snapshot of step {pending.step} is still {pending.phase} after {timeout_s} s")

    def _surface_errors(self) -> None:
        """Report failures that nobody has seen: raise the first (the others are in the log) or warn, each once."""
        problem = self._writer.take_tidy_problem()
        if problem is not None:
            self._warn(problem)
        for number, failure in enumerate(self._take_failures()):
            if not self._raises:
                self._warn(str(failure))
            elif number == 0:
                raise failure

    def _take_failures(self) -> list[SaveFailedError]:
        """Failures that nobody has seen, oldest first; what is finished is forgotten."""
        if not self._unfinished:
            return []
        finished = [pending for pending in self._unfinished if pending.phase in ("durable", "failed")]
        self._unfinished = deque(pending for pending in self._unfinished if pending not in finished)
        return [failure for pending in finished if (failure := pending.take_unseen_error()) is not None]

    def _warn(self, message: str) -> None:
        warnings.warn(message, CiuicWarning, stacklevel=3)

    def _inert(self) -> bool:
        """Whether this is a forked child: writer and slots belong to the parent, nothing may be touched."""
        return os.getpid() != self._owner_pid


def _end(owner_pid: int, writer: BackgroundWriter, chain: SnapshotChain | None) -> None:
    """Finish what was taken. Knows nothing of the checkpointer, which may be gone."""
    if os.getpid() != owner_pid:
        return  # a forked child: everything belongs to its parent
    try:
        writer.close()
    finally:
        if chain is not None:
            chain.close()
