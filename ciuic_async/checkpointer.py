"""Checkpointer: the engine tied to one training run.

Threads: everything public is called on the training thread. One writer thread (``ciuic-writer``) makes staged snapshots
durable, one after the other; it never touches a training tensor. With ``staging="overlap"`` another one
(``ciuic-stage``) copies what optimizers change, until the optimizer is about to. Both end with ``close``.
"""

from __future__ import annotations

import os
import time
import warnings
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from torch.optim import Optimizer

from ciuic_async.arguments import (
    check_choice,
    check_config,
    check_grace,
    check_number,
    check_patterns,
    check_policy,
    check_state,
    check_tags,
)
from ciuic_async.background import BackgroundWriter
from ciuic_async.capture import training
from ciuic_async.capture.state_tree import encode_plain
from ciuic_async.chain import SnapshotChain
from ciuic_async.codecs.choose import encoder_for
from ciuic_async.config.settings import configured
from ciuic_async.errors import CiuicError, CiuicWarning, IntegrityError, SaveFailedError, UsageError
from ciuic_async.events import Listener, SnapshotStats, logger
from ciuic_async.keeper.client import Keeper, check_available
from ciuic_async.keeper.rescue import Charge
from ciuic_async.mirroring.mirror import Mirror
from ciuic_async.overlap import Overlap
from ciuic_async.pending import DURABLE, FAILED, PendingSnapshot
from ciuic_async.pipeline.persist import Persister
from ciuic_async.preemption import Notice, Preemption
from ciuic_async.ranks import require_single_rank
from ciuic_async.resuming import Progress, Resumer
from ciuic_async.retention.policy import Policy
from ciuic_async.schedule.rules import Schedule
from ciuic_async.staging.budget import check_bound
from ciuic_async.staging.slots import SlotPool
from ciuic_async.taking import Moment, Taker, TakingOptions


class Checkpointer:
    """Takes snapshots of a training run while it trains, and brings the newest good one back.

    Args:
        chain: path, URL or ``SnapshotChain``.
        state: mapping of name to anything with ``state_dict``/``load_state_dict``, or a plain state tree.
        every_steps, every_epochs, every_seconds: when ``step`` takes a snapshot; several may be given, any one is
            enough. An epoch counts as over when ``step`` is first called with the next one.
        overhead_budget: as often as costs this share of training time, e.g. 0.01: the interval follows what snapshots
            are measured to cost (docs/interval.md).
        keep: which snapshots stay (``KeepLatest(3)``); None keeps all.
        rng: also capture and restore the random generators of python, numpy and torch.
        staging: ``"blocking"``: the state is copied before ``step`` returns. ``"overlap"``: what torch's optimizers
            change is copied while training goes on, and the next optimizer step waits for the rest (docs/overlap.md
            names what must not be done meanwhile). ``"auto"``: overlap for tensors on a GPU; on CPU blocking, unless
            copies take longer than 0.1 s and training's threads leave a processor idle.
        host_memory_bytes: bound of the memory for staged snapshots; default the smaller of twice the state and 40% of
            what is left. Below the state's size it is staged in windows, which blocks longer.
        when_busy: ``"wait"`` for the writer at most ``busy_timeout_s``, then skip this snapshot; or ``"skip"`` at once.
        codec: ``"auto"``: compressed where that makes snapshots durable sooner; ``"smallest"``: fewest bytes;
            ``"raw"``.
        frozen: patterns (``"model.trunk.*"``) of tensors that do not change: your word for it. They are copied and
            digested once, then only referred to.
        mtbf_s: mean time between failures, seconds: the interval that loses least time to snapshots and failures
            together; beside ``overhead_budget``, which then is a cap.
        preemption: on SIGTERM or SIGUSR1 the next ``step`` takes a snapshot and waits until it is durable, at most this
            many seconds after the signal (True: 25), then gives the signal to whoever handled it before
            (docs/crash.md).
        keeper: a small process that outlives this one also holds the staged memory: what was staged when training is
            killed becomes durable all the same, and a restarted training restores from memory (docs/crash.md).
        on_error: ``"warn"``: background failures never stop training; ``"raise"``: the next ``step`` raises them.
        key: signing key: path or the secret itself; default ``CIUIC_KEY``, else the user's own.
        config: plain values that training was started with (at most 64 KiB), as they are now: recorded with every
            snapshot, bit-exact; ``Snapshot.config`` has them.

    What is not given here comes from the environment (``CIUIC_EVERY_STEPS``, ...), then from ``ciuic.toml`` in the
    working directory, then from the user's own: docs/configuration.md.

    Raises:
        UsageError: an argument, a variable or a file is wrong.
        StoreError: the place cannot be written to.
    """

    @configured("Checkpointer", trains=True)
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
        preemption: bool | float = False,
        keeper: bool = False,
        mtbf_s: float | None = None,
        on_error: str = "warn",
        key: str | os.PathLike[str] | None = None,
        config: Mapping[str, Any] | None = None,
        listener: Listener | None = None,
    ) -> None:
        patterns = check_patterns(frozen)
        grace_s = check_grace(preemption)
        if keeper:
            check_available(chain.url if isinstance(chain, SnapshotChain) else str(chain))
        check_choice("staging", staging, ("auto", "overlap", "blocking"))
        check_choice("when_busy", when_busy, ("wait", "skip"))
        check_choice("on_error", on_error, ("warn", "raise"))
        check_number("host_memory_bytes", host_memory_bytes, whole=True)
        check_number("busy_timeout_s", busy_timeout_s, zero=True)
        check_bound(host_memory_bytes)
        check_policy(keep)
        if key is not None and isinstance(chain, SnapshotChain):
            raise UsageError("key= was given beside an open SnapshotChain, which has its own: give it to the chain")
        require_single_rank()
        encoder = encoder_for(codec)
        self._state = check_state(state)
        self._schedule = Schedule(every_steps, every_epochs, every_seconds, overhead_budget, mtbf_s)
        self._rng = rng
        self._raises = on_error == "raise"
        self._options_skip = when_busy == "skip"
        self._listener = listener
        self._owns_chain = not isinstance(chain, SnapshotChain)
        self._chain = chain if isinstance(chain, SnapshotChain) else SnapshotChain(chain, key=key)
        target = self._chain.target(pins=False)
        self._keeper: Keeper | None = None
        if keeper:
            with suppress(CiuicError):  # what is wrong with the log shows when something is saved or restored
                target.log.refresh()  # what it has by now is no sign that training went on without us
            self._keeper = Keeper(_charge(self._chain, codec))
        self._pool = SlotPool(self._keeper)
        persister = Persister(target, self._chain.file, encoder, self._chain.run)
        self._writer = BackgroundWriter(self._chain, persister, self._pool, keep, listener)
        self._overlap = Overlap(self._writer, self._pool, listener)
        self._preemption: Preemption | None = None
        if grace_s is not None:
            self._preemption = Preemption(grace_s, partial(_report_expired, self._writer))
        # Holds what must be finished, and not this object: a checkpointer that is dropped, or alive when the
        # interpreter ends, still makes durable what it has taken.
        self._owner_pid = os.getpid()
        self._finalizer = weakref.finalize(
            self,
            _end,
            self._owner_pid,
            self._overlap,
            self._writer,
            self._keeper,
            self._preemption,
            self._chain if self._owns_chain else None,
            self._chain.mirror,
        )
        options = TakingOptions(
            rng,
            staging,
            host_memory_bytes,
            busy_timeout_s if when_busy == "wait" else 0.0,
            when_busy == "skip",
            patterns,
            None if config is None else encode_plain(check_config(config), "config"),
        )
        self._taker = Taker(
            self._state,
            self._chain.file.chunk_size_bytes,
            training.environment(),
            self._writer,
            self._pool,
            self._overlap,
            options,
            listener,
            self._keeper,
        )
        self._unfinished: deque[PendingSnapshot] = deque()
        self._step = 0
        self._epoch: Any = None
        self._batch: Any = None
        self._closed = False
        if self._chain.mirror is not None:
            self._chain.mirror.notice(self._chain.log_size)  # what an earlier process left, or what is to come home

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
        due = self._schedule.step_done(self._step, epoch)
        self._epoch, self._batch = epoch, batch
        if due:
            self._overlap.finish()
        else:
            self._overlap.pass_gate()  # no optimizer came since (a skipped step): the state is still what it was
        seen = self._overlap.gate.take_seen()
        self._surface_errors()  # may raise if asked to; the step is counted all the same
        notice = None if self._preemption is None else self._preemption.take()
        if notice is not None:
            return self._leave(notice, metrics, seen, due)
        if due:
            pending = self._take(metrics, (), seen, due=True)
            return None if self._taker.was_skipped(pending) else pending
        if self._overlap.has_torn:
            self._take(metrics, (), seen)
        else:
            self._taker.prepare()
        return None

    def save(
        self,
        *,
        metrics: Mapping[str, Any] | None = None,
        tags: Sequence[str] = (),
        step: int | None = None,
        epoch: Any = None,
        batch: Any = None,
    ) -> PendingSnapshot:
        """Take a snapshot now, whatever the schedule says. On return training may go on.

        Args:
            step, epoch, batch: where training stands, for loops that do not call ``step``; default: what that was told.

        Raises:
            UsageError: called in a forked child, after ``close``, or with a tag that is none.
        """
        if self._inert():
            raise UsageError("save() was called in a forked child process; the checkpointer belongs to its parent")
        checked = check_tags(tags)
        check_number("step", step, whole=True, zero=True)
        self._step = self._step if step is None else step
        if epoch is not None or batch is not None:
            self._epoch, self._batch = epoch, batch
        self._overlap.finish()
        self._surface_errors()
        pending = self._take(metrics, checked, self._overlap.gate.take_seen())
        notice = None if self._preemption is None else self._preemption.take()
        if notice is not None:  # loops that never call step would otherwise be ended in the middle of the next one
            self._pass_on(notice, pending)
        return pending

    def before_update(self) -> None:
        """Tell that something other than a ``torch.optim.Optimizer`` is about to change tensors: finishes their copy.

        Only needed for tensors that such an optimizer changes too: those that no torch optimizer knows, and all with
        blocking staging, are copied already.
        """
        if not self._inert():
            self._overlap.pass_gate()

    def flush(self, timeout_s: float | None = None, *, replicated: bool = False) -> None:
        """Wait until everything taken so far is durable (or failed).

        Args:
            replicated: and then until the chain's mirror has it too.

        Raises:
            TimeoutError: not within ``timeout_s``, or not before the next ``step``; work goes on.
            SaveFailedError: with ``on_error="raise"``, if one failed and nobody has seen it.
            StoreError, IntegrityError: the mirror cannot be written, or holds another history (``replicated``).
            UsageError: ``replicated``, and the chain has no mirror.
        """
        if self._inert():
            return
        mirror = self._chain.mirror
        if replicated and mirror is None:
            raise UsageError("flush(replicated=True): the chain has no mirror", kind="no_mirror")
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        self._wait_unfinished(timeout_s)
        self._surface_errors()
        if replicated and mirror is not None:
            left_s = None if deadline_s is None else max(deadline_s - time.monotonic(), 0.0)
            mirror.wait_all(self._chain.log_size, left_s)

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
        self._surface_mirror()

    def stats(self) -> list[SnapshotStats]:
        """Figures of the snapshots taken (the newest 10,000), in order of their completion."""
        mirror = self._chain.mirror
        if mirror is None:
            return self._writer.stats()
        return [replace(one, replicated_s=mirror.replicated_s(one.snapshot)) for one in self._writer.stats()]

    @property
    def preempted(self) -> bool:
        """Whether SIGTERM or SIGUSR1 came (``preemption``): a loop that wants to end by itself can look at it."""
        return self._preemption is not None and self._preemption.preempted

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
        self._overlap.finish(last_chance=True)
        self._overlap.give_up()
        self._writer.wait_idle()
        self._overlap.gate.forget_loading()
        self._writer.frozen.forget()  # also when it fails half way: tensors may have changed
        resumed = Resumer(self._chain, self._state, self._rng, self._listener, self._warn).resume(ref, strict)
        if resumed is None:
            return None
        progress, self._writer.parent = resumed
        self._step, self._epoch, self._batch = progress.step, progress.epoch, progress.batch
        self._schedule.restored(self._epoch)
        return progress

    # --- taking a snapshot, on the training thread ------------------------------------------------------------------

    def _take(
        self, metrics: Mapping[str, Any] | None, tags: tuple[str, ...], seen: list[Optimizer], *, due: bool = False
    ) -> PendingSnapshot:
        """Capture, stage and hand over; what was discarded before becomes this one. Raises for no state or machine."""
        if self._closed:
            raise UsageError("this Checkpointer is closed")
        if not self._finalizer.alive:  # the interpreter ends, and a daemon thread still saves: no traceback for that
            late = PendingSnapshot(self._step)
            late.failed(SaveFailedError("the interpreter ends: nothing more is taken", kind="closed"), seen=True)
            return late
        self._overlap.gate.forget_loading()
        torn = self._overlap.take_torn()
        self._schedule.taken(scheduled=due, again=torn is not None)
        if torn is None:
            pending, before = PendingSnapshot(self._step), None
            pending.add_done_callback(partial(_report, self._schedule, self._writer, time.perf_counter()))
        else:
            pending, before = torn.job.pending, torn.job.stats
            pending.step = self._step
            request = torn.job.request
            metrics = dict(request.metrics) if metrics is None else metrics
            tags = tuple(dict.fromkeys((*request.tags, *tags)))
        self._taker.take(Moment(self._step, self._epoch, self._batch, metrics, tags), pending, seen, before)
        if not self._taker.was_skipped(pending) or before is not None:
            if pending not in self._unfinished:
                self._unfinished.append(pending)
            if pending.phase == FAILED:
                self._surface_errors()
        return pending

    def _leave(
        self, notice: Notice, metrics: Mapping[str, Any] | None, seen: list[Optimizer], due: bool
    ) -> PendingSnapshot:
        """Make the state of this step durable within the grace time, say what is, and pass the signal on."""
        self._overlap.finish()
        if self._options_skip:
            self._wait_until(notice.deadline_s)  # else there may be no room for this last one
        pending = self._take(metrics, (), seen, due=due)
        self._pass_on(notice, pending)
        return pending

    def _pass_on(self, notice: Notice, pending: PendingSnapshot) -> None:
        assert self._preemption is not None
        self._wait_until(notice.deadline_s)
        _report_leaving(self._writer, notice, pending)
        self._preemption.pass_on(notice)

    def _wait_until(self, deadline_s: float) -> None:
        with suppress(TimeoutError):
            self._wait_unfinished(max(deadline_s - time.monotonic(), 0.0))

    # --- errors and ends --------------------------------------------------------------------------------------------

    def _wait_unfinished(self, timeout_s: float | None) -> None:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._overlap.finish(last_chance=True)
        if timeout_s is None:
            self._overlap.give_up()  # nobody can take it again while we wait here
        torn = self._overlap.torn_pending
        for pending in list(self._unfinished):
            if pending is torn:
                continue  # nothing happens to it until the next step
            left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            with pending._changed:
                if not pending._changed.wait_for(lambda p=pending: p.phase in ("durable", "failed"), left):  # type: ignore[misc]
                    raise TimeoutError(f"snapshot of step {pending.step} is still {pending.phase} after {timeout_s} s")
        if torn is not None:
            raise TimeoutError(
                f"snapshot of step {torn.step} was discarded because training changed it while it was copied; it is "
                "taken again at the next step()"
            )

    def _surface_errors(self) -> None:
        """Report failures that nobody has seen: raise the first (the others are in the log) or warn, each once."""
        problem = self._writer.take_tidy_problem()
        if problem is not None:
            self._warn(problem)
        self._surface_mirror()
        for number, failure in enumerate(self._take_failures()):
            if not self._raises:
                self._warn(str(failure))
            elif number == 0:
                raise failure

    def _surface_mirror(self) -> None:
        """Another history in the mirror is raised if asked to; that it cannot be written for a while is a warning."""
        mirror = self._chain.mirror
        lost = None if mirror is None else mirror.take_problem()
        if lost is None:
            return
        if self._raises and isinstance(lost, IntegrityError):
            raise lost
        self._warn(f"snapshots are durable, and not replicated: {lost}")

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


def _charge(chain: SnapshotChain, codec: str) -> Charge:
    options = chain.storage_options
    return Charge(chain.store.url, chain.origin, chain.secret, chain.run, codec, chain.ordering, options)


def _report(schedule: Schedule, writer: BackgroundWriter, began_s: float, pending: PendingSnapshot) -> None:
    """Tell the schedule what a snapshot cost. Knows nothing of the checkpointer, which may be gone."""
    stats = writer.newest_stats(pending.step)
    stall_s, gate_s = (stats.stall_s, stats.gate_s) if stats is not None else (0.0, 0.0)
    to_durable_s, ok = time.perf_counter() - began_s, pending.phase == DURABLE

    def finished() -> None:  # retention competes with training as much as writing does
        tidy_s = time.perf_counter() - began_s - to_durable_s
        schedule.finished(stall_s, gate_s, to_durable_s, ok, tidy_s)

    writer.when_tidied(finished)


def _report_leaving(writer: BackgroundWriter, notice: Notice, pending: PendingSnapshot) -> None:
    """What a signal's sender can rely on: one line."""
    seconds = time.monotonic() - notice.came_s
    if pending.phase == DURABLE:
        logger.warning("%s: %s is durable, %.1f s after it came", notice.name, _newest(writer), seconds)
    else:
        message = "%s: step %s is %s, %.1f s after it came; the newest durable snapshot is %s"
        logger.error(message, notice.name, pending.step, pending.phase, seconds, _newest(writer))


def _report_expired(writer: BackgroundWriter, notice: Notice) -> None:
    message = "%s: its grace time is over; the newest durable snapshot is %s"
    logger.error(message, notice.name, _newest(writer))


def _newest(writer: BackgroundWriter) -> str:
    newest = writer.newest
    return "none of this run" if newest is None else f"step {newest.step} (snapshot {newest.id})"


def _end(
    owner_pid: int,
    overlap: Overlap,
    writer: BackgroundWriter,
    keeper: Keeper | None,
    preemption: Preemption | None,
    chain: SnapshotChain | None,
    mirror: Mirror | None,
) -> None:
    """Finish what was taken. Knows nothing of the checkpointer, which may be gone."""
    if os.getpid() != owner_pid:
        return  # a forked child: everything belongs to its parent

    def afterwards() -> None:
        # Not before all is durable, nor where waiting for that was interrupted: then the keeper finishes it.
        if keeper is not None:
            keeper.close()
        if chain is not None:
            chain.close()
        elif mirror is not None:
            mirror.flush()

    try:
        try:
            overlap.close()
        finally:
            writer.close(afterwards)
    finally:
        if preemption is not None:
            preemption.close()  # last: a signal that nobody acted on may end the process here
