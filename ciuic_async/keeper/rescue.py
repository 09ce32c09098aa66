"""What the keeper does when the trainer is dead: make the newest staged snapshot durable."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ciuic_async.chain import SnapshotChain
from ciuic_async.codecs.choose import encoder_for
from ciuic_async.errors import CiuicError, CommitConflictError, IntegrityError
from ciuic_async.format import layout
from ciuic_async.format.entry import SnapshotEntry
from ciuic_async.keeper.held import HeldSlot
from ciuic_async.pipeline.bases import Parent
from ciuic_async.pipeline.commit import resolve
from ciuic_async.pipeline.handover import Handover
from ciuic_async.pipeline.history import live_snapshots
from ciuic_async.pipeline.persist import Persister
from ciuic_async.staging.slot_header import STAGED

_SUPERSEDED = "superseded"


@dataclass(frozen=True, slots=True)
class Charge:
    """The trainer that a keeper looks after: where its snapshots go, under whose key and name."""

    url: str
    secret: str
    run: str
    codec: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the newest snapshot in memory.

    Attributes:
        slot: where it lies; None where there is none.
        snapshot: its id in the chain; None while it is not durable.
        step: its step.
        problem: why it is not durable.
        final: whether trying again is of no use.
    """

    slot: HeldSlot | None = None
    snapshot: str | None = None
    step: int | None = None
    problem: str | None = None
    final: bool = True


def newest(slots: Iterable[HeldSlot]) -> HeldSlot | None:
    """The slot that was filled last."""
    return max(slots, key=lambda slot: slot.header.sequence, default=None)


def rescue(charge: Charge, slot: HeldSlot | None) -> Outcome:
    """Make the snapshot of a slot durable, unless it is. Never raises an ``Exception``.

    Args:
        slot: the newest, of a trainer that is dead.
    """
    if slot is None:
        return Outcome()
    header = slot.header
    if header.state != STAGED:
        return Outcome(slot, header.snapshot, header.step)
    try:
        handover = slot.handover()
    except IntegrityError as error:
        return Outcome(slot, None, header.step, str(error))
    try:
        with SnapshotChain(charge.url, create=False, key=charge.secret, run=charge.run) as chain:
            snapshot = _finished(chain, handover) or _persist(chain, charge, slot, handover)
    except CiuicError as error:
        return Outcome(slot, None, header.step, str(error), final=error.kind == _SUPERSEDED)
    except Exception as error:
        return Outcome(slot, None, header.step, f"{type(error).__name__}: {error}", final=False)
    return Outcome(slot, snapshot, header.step)


def _finished(chain: SnapshotChain, handover: Handover) -> str | None:
    """The snapshot's id, if the trainer committed it before it died."""
    log = chain.target().log
    log.refresh()
    wanted = handover.request.snapshot
    for _, entry in log.entries(handover.lineage.since):
        if isinstance(entry, SnapshotEntry) and entry.snapshot == wanted:
            return wanted
    return None


def _persist(chain: SnapshotChain, charge: Charge, slot: HeldSlot, handover: Handover) -> str:
    """Under a new id: what the dead writer left under the old one, or still has on its way, is not touched."""
    target = chain.target()
    parent = _parent(chain, charge, handover)
    leaf_hash = parent.leaf_hash if parent else None

    def may_claim() -> None:
        for _, entry in target.log.entries(handover.lineage.since):
            if isinstance(entry, SnapshotEntry) and entry.common.run != charge.run and entry.parent == leaf_hash:
                raise CommitConflictError(
                    f"training went on without it: snapshot {entry.snapshot} (step {entry.step}) of run "
                    f"{entry.common.run} comes from the same snapshot",
                    kind=_SUPERSEDED,
                )

    may_claim()  # now, too: before all is written in vain
    # deadline_s: nobody is training here, so there is nothing to be patient for.
    request = replace(handover.request, snapshot=layout.new_id(), parent=parent, deadline_s=0.0)
    persister = Persister(target, chain.file, encoder_for(charge.codec), charge.run)
    try:
        persister.persist(request, [slot.window(handover)], lambda window: None, True, may_claim=may_claim)
    finally:
        persister.close()
    return request.snapshot


def _parent(chain: SnapshotChain, charge: Charge, handover: Handover) -> Parent | None:
    """What the snapshot came from: the trainer may have finished others after this one was staged."""
    lineage = handover.lineage
    lines = live_snapshots(chain.target().log)
    own = [line for line in lines if line.index >= lineage.since and line.entry.common.run == charge.run]
    line = own[-1] if own else next((line for line in lines if line.entry.snapshot == lineage.parent), None)
    if line is None:
        return None if lineage.leaf_hash is None else Parent(str(lineage.parent), lineage.leaf_hash, {})
    try:
        places = resolve(chain.store, line.entry).locator.chunks
    except IntegrityError:  # a damaged parent: all is written anew
        places = {}
    return Parent(line.entry.snapshot, line.leaf_hash, places)
