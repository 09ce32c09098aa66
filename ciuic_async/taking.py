"""Taking a snapshot on the training thread: capture, stage, hand over.

Staging blocks, or goes on while training does: ``Taker`` decides which tensors may be copied later (``staging.gate``),
and ``overlap`` sees those copies through.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.optim import Optimizer

from ciuic_async.arguments import check_metrics, position
from ciuic_async.background import BackgroundWriter, Description, Job, forget_locals
from ciuic_async.capture import training
from ciuic_async.capture.plan_cache import PlanCache
from ciuic_async.capture.state_tree import Captured, encode_plain
from ciuic_async.errors import CiuicError, InternalError, SaveFailedError, StoreError
from ciuic_async.events import Event, Listener, SnapshotStats, logger, notify
from ciuic_async.format import layout
from ciuic_async.format.manifest import Node, Progress
from ciuic_async.handoffs import CapturePlan, PlanMemo
from ciuic_async.keeper.client import Keeper
from ciuic_async.overlap import Flight, Overlap
from ciuic_async.pending import PendingSnapshot
from ciuic_async.pipeline.capture_stage import (
    WindowQueue,
    begin_staging,
    slot_plan,
    stage_windows,
)
from ciuic_async.pipeline.handover import encode_plan, encode_request
from ciuic_async.pipeline.persist import SaveRequest
from ciuic_async.staging.budget import SlotPlan
from ciuic_async.staging.device import Devices
from ciuic_async.staging.gate import Watch
from ciuic_async.staging.slots import Slot, SlotPool, out_of_memory

WINDOW_TIMEOUT_S = 30.0
"""How long staging waits for the writer to free a window when ``when_busy="skip"`` gives no time of its own."""
LONG_COPY_S = 0.1
"""``staging="auto"`` on CPU: a shorter copy is not worth a thread that competes with training."""
REQUEST_ROOM_BYTES = 256 << 10
"""What a snapshot's own description takes in a slot, commonly."""
TORN_IN_A_ROW = 3
"""So many discarded snapshots one after the other, and staging blocks from then on: training changes its tensors
outside of optimizers, and each discarded snapshot is copied twice."""


@dataclass(frozen=True, slots=True)
class Moment:
    """Where training stands, and what is recorded with the snapshot. ``epoch`` and ``batch`` verbatim."""

    step: int
    epoch: Any
    batch: Any
    metrics: Mapping[str, Any] | None
    tags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TakingOptions:
    """The user's options that matter here; see ``Checkpointer``."""

    rng: bool
    staging: str
    host_memory_bytes: int | None
    busy_timeout_s: float
    skips_quietly: bool
    frozen: tuple[str, ...] = ()
    config: Node = None


class Taker:
    """Takes the snapshots of one checkpointer. Everything is called on the training thread.

    Args:
        state: the live objects by name.
        chunk_size_bytes: of the chain.
        environment: recorded with every snapshot.
    """

    def __init__(
        self,
        state: Mapping[str, Any],
        chunk_size_bytes: int,
        environment: dict[str, str],
        writer: BackgroundWriter,
        pool: SlotPool,
        overlap: Overlap,
        options: TakingOptions,
        listener: Listener | None,
        keeper: Keeper | None = None,
    ) -> None:
        self._state = state
        self._chunk_size_bytes = chunk_size_bytes
        self._environment = environment
        self._writer = writer
        self._pool = pool
        self._overlap = overlap
        self._options = options
        self._listener = listener
        self._keeper = keeper
        self._plan_text: tuple[PlanMemo, bytes] | None = None
        self._warned_of_windows = False
        self.devices = Devices()
        self._plans = PlanCache(options.frozen)
        self._prepared = False
        self._blocking_copy_s = 0.0
        self._pays_on_cpu: bool | None = None  # "auto" only; None until it was tried
        self._torn_too_often = False
        if options.staging == "overlap" or (
            options.staging == "auto" and (torch.cuda.is_available() or idle_processors() > 0)
        ):
            overlap.gate.open()

    def prepare(self) -> None:
        """Make and touch the slots in the background, once optimizers have made their state: after the first step."""
        if self._prepared:
            return
        self._prepared = True
        try:
            captured = self._capture()
            plan = slot_plan(captured, self._options.host_memory_bytes, self._pool)
            if self._keeper is not None:
                self._keeper.start()
            self._pool.prepare(plan, self._description_bytes(captured.plan), self.devices.for_pinning())
        except Exception as error:  # no snapshot is due: whatever it is will be reported when one is
            logger.warning("the state cannot be captured as it is now: %s", error)

    def take(
        self, moment: Moment, pending: PendingSnapshot, seen: list[Optimizer], before: SnapshotStats | None = None
    ) -> None:
        """Take a snapshot. What is wrong with the state or the machine makes ``pending`` fail; it is not raised.

        On return training may go on: everything is copied, or protected by the gate. No other is being copied.

        Args:
            seen: the optimizers whose steps the gate saw since the last call of ``step``; others are not protected.
            before: what the attempts cost that were discarded, if there were any; then staging blocks.
        """
        started = time.perf_counter()
        self._prepared = True  # slots are made right now, if there are none yet
        stats = SnapshotStats(moment.step, "")
        if before is not None:
            seen = []
            stats = replace(stats, stall_s=before.stall_s, gate_s=before.gate_s, torn_retries=before.torn_retries)
        try:
            self._take(moment, pending, seen, stats, started)
        except CiuicError as error:
            self._failed(pending, error, stats, started)
        except Exception as error:
            if out_of_memory(error):
                failure: CiuicError = StoreError(
                    f"no host memory left to stage the snapshot: {error}; lower host_memory_bytes", kind="out_of_memory"
                )
            else:
                failure = InternalError(f"capturing the state failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            self._failed(pending, failure, stats, started)
        except BaseException as error:  # Ctrl-C: the loop hears of it, and the snapshot does not hang for ever
            self._failed(pending, SaveFailedError(f"taking it was interrupted: {error!r}"), stats, started)
            raise

    def was_skipped(self, pending: PendingSnapshot) -> bool:
        """Whether nothing was taken because the writer is busy, and the user wants to hear nothing of it."""
        return self._options.skips_quietly and pending.error is not None and pending.error.kind == "busy"

    def _take(
        self, moment: Moment, pending: PendingSnapshot, seen: list[Optimizer], stats: SnapshotStats, started: float
    ) -> None:
        self._writer.start()
        watch = self._watch(seen)
        captured = self._capture()
        remembered = self._writer.frozen.known(captured.plan)
        if remembered:
            captured = captured.without(remembered)
        request = SaveRequest(
            snapshot=layout.new_id(),
            remembered=remembered,
            plan=captured.plan,
            step=moment.step,
            epoch=position(moment.epoch),
            batch=position(moment.batch),
            progress=Progress(
                moment.step,
                encode_plain(moment.epoch, "epoch"),
                encode_plain(moment.batch, "batch"),
                self._options.config,
            ),
            metrics=check_metrics(moment.metrics),
            tags=moment.tags,
            environment=self._environment,
        )
        plan = slot_plan(captured, self._options.host_memory_bytes, self._pool)
        description = self._describe(request, plan)
        slot = self._slot(plan, max(sum(map(len, description)), self._description_bytes(captured.plan)))
        windows = WindowQueue(whole=not plan.windowed)
        raw_bytes = sum(region.size_bytes for region in captured.plan.regions)
        stats = replace(stats, snapshot=request.snapshot, raw_bytes=raw_bytes)
        job = Job(request, windows, pending, stats, description=description)
        if watch is not None and not plan.windowed and plan.count > 1:
            watch.keep(self._storages_later(captured, watch))
            if watch.storages:
                self._take_off(job, captured, slot, watch, started)
                return
        self._stage(job, captured, plan, slot, started)

    def _describe(self, request: SaveRequest, plan: SlotPlan) -> Description:
        """What the keeper needs to finish the snapshot in our place; nothing where there is no keeper."""
        if self._keeper is None:
            return b"", b""
        self._keeper.start()  # if it was killed
        if plan.windowed:
            if not self._warned_of_windows:
                self._warned_of_windows = True
                logger.warning(
                    "the keeper has nothing to keep: the state is staged in windows, so it is never in memory as a "
                    "whole; raise host_memory_bytes"
                )
            return b"", b""
        return self._plan_bytes(request.plan), encode_request(request, self._writer.lineage())

    def _plan_bytes(self, plan: CapturePlan) -> bytes:
        """The part of the description that all snapshots of one structure share; the very same object for each."""
        if self._plan_text is None or self._plan_text[0] is not plan.memo:
            self._plan_text = plan.memo, encode_plan(plan)
        return self._plan_text[1]

    def _description_bytes(self, plan: CapturePlan) -> int:
        """Room for a description in a slot: with a margin, since a slot that must grow is mapped and touched anew."""
        return 0 if self._keeper is None else 2 * len(self._plan_bytes(plan)) + REQUEST_ROOM_BYTES

    def _slot(self, plan: SlotPlan, description_bytes: int) -> Slot:
        slot = self._pool.acquire(plan, description_bytes, self._options.busy_timeout_s)
        if slot is None:
            reason = (
                "(when_busy='skip')"
                if self._options.skips_quietly
                else f"after {self._options.busy_timeout_s} s (busy_timeout_s)"
            )
            raise SaveFailedError(
                f"skipped: earlier snapshots are not durable yet {reason}; take fewer or use a faster disk", kind="busy"
            )
        self._pool.trim(plan)
        return slot

    # --- blocking ---------------------------------------------------------------------------------------------------

    def _stage(self, job: Job, captured: Captured, plan: SlotPlan, slot: Slot, started: float) -> None:
        """Copy everything before training goes on."""
        staging_started = time.perf_counter()
        request, windows = job.request, job.windows

        def mark(filled: Slot) -> None:
            filled.mark_staged(request.step, request.snapshot, *job.description)

        if plan.windowed:  # the writer must empty the first windows while the later ones are filled
            self._writer.submit(job)
        try:
            stage_windows(
                captured,
                plan,
                self._pool,
                self.devices,
                windows,
                first=slot,
                timeout_s=self._options.busy_timeout_s or WINDOW_TIMEOUT_S,
                mark=mark,
                digester=self._writer.digesters if self._digests_at_once(captured) else None,
            )
            now = time.perf_counter()
            self._blocking_copy_s = now - staging_started
            stall_s = job.stats.stall_s + now - started
            job.stats = replace(job.stats, stall_s=stall_s, stage_s=now - staging_started)
            job.staged_s = now
            windows.end()
            job.pending.staged()
            notify(self._listener, Event("stage", request.snapshot, job.stats.raw_bytes, now - staging_started))
            if not plan.windowed:
                self._writer.submit(job)
        except BaseException as error:  # Ctrl-C, too
            windows.abandon(
                error if isinstance(error, CiuicError) else SaveFailedError(f"staging was interrupted: {error!r}")
            )
            if not job.submitted_s:  # no writer knows of it
                windows.release_all(self._pool)
            raise

    def _digests_at_once(self, captured: Captured) -> bool:
        """Whether digesting belongs to staging: where training keeps every processor busy.

        It would cost training its time later all the same, and then on one processor while the others wait for it at
        their next barrier; here all of them digest at once.
        """
        return not len(captured.sources.device_rows) and idle_processors() <= 0

    # --- while training goes on -------------------------------------------------------------------------------------

    def _take_off(self, job: Job, captured: Captured, slot: Slot, watch: Watch, started: float) -> None:
        """Copy what nobody guards; the rest is copied while training goes on, until the gate."""
        began = time.perf_counter()
        try:
            self._overlap.gate.watch_loading([*self._state.values(), *watch.optimizers])
            chunks, works = begin_staging(captured, slot, self.devices, watch.storages)
        except BaseException:
            self._pool.release(slot)
            raise
        job.stats = replace(job.stats, stall_s=job.stats.stall_s + time.perf_counter() - started)
        self._overlap.take_off(Flight(job, slot, chunks, works, watch, began))

    def _watch(self, seen: list[Optimizer]) -> Watch | None:
        """The tensors that may be copied later as far as optimizers tell; None if there is none."""
        if not seen or self._options.staging == "blocking" or self._torn_too_often:
            return None
        if self._overlap.torn_in_a_row >= TORN_IN_A_ROW:
            self._torn_too_often = True
            logger.warning(
                "%d snapshots in a row were discarded because training changes its tensors outside of optimizers: "
                "from now on they are copied before step() returns, as with staging='blocking'",
                TORN_IN_A_ROW,
            )
            return None
        watch = Watch(seen, self._overlaps_on)
        return watch if watch.storages else None

    def _overlaps_on(self, device: torch.device) -> bool:
        """Whether copying later pays on a device."""
        if self._options.staging == "overlap" or device.type == "cuda":
            return True
        if self._pays_on_cpu is None and self._blocking_copy_s > LONG_COPY_S and idle_processors() > 0:
            self._pays_on_cpu = True
        elif self._pays_on_cpu and self._overlap.last_gate_s > self._blocking_copy_s / 2:
            self._pays_on_cpu = False  # the processors are not idle after all
        return bool(self._pays_on_cpu)

    def _storages_later(self, captured: Captured, watch: Watch) -> frozenset[int]:
        """Addresses of the storages that the snapshot holds and only watched tensors look into."""
        held = watch.storages.intersection(captured.sources.storage_addresses().tolist())
        return held - training.storages_of_others(self._state, watch.tensors)

    # --- both -------------------------------------------------------------------------------------------------------

    def _capture(self) -> Captured:
        return self._plans.flatten(
            training.capture_objects(self._state),
            chunk_size_bytes=self._chunk_size_bytes,
            rng=training.capture_rng() if self._options.rng else None,
            trainable=training.trainable_storages(self._state),
        )

    def _failed(self, pending: PendingSnapshot, error: CiuicError, stats: SnapshotStats, started: float) -> None:
        if error.kind == "writer_failed":
            return  # the writer knows the cause, and reports it
        # What was promised before is missed: that is told even to those who let snapshots be skipped.
        quiet = error.kind == "busy" and self._options.skips_quietly and not stats.torn_retries
        if quiet:
            logger.info("snapshot of step %s %s", pending.step, error)
        else:
            logger.error("snapshot of step %s failed: %s", pending.step, error)
        forget_locals(error)
        self._writer.record(replace(stats, stall_s=stats.stall_s + time.perf_counter() - started))
        pending.failed(error, seen=quiet)


def idle_processors() -> int:
    """Processors that training's own threads leave over."""
    return len(os.sched_getaffinity(0)) - torch.get_num_threads()
