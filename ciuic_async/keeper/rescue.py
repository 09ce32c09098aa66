"""What the keeper does when the trainer is dead: make the newest staged snapshot durable."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from ciuic_async.chain import SnapshotChain
from ciuic_async.codecs.choose import encoder_for
from ciuic_async.errors import CiuicError, CommitConflictError, IntegrityError
from ciuic_async.format import layout
from ciuic_async.format.entry import RollbackEntry, SnapshotEntry
from ciuic_async.keeper.held import HeldSlot
from ciuic_async.pipeline.bases import Parent
from ciuic_async.pipeline.commit import resolve
from ciuic_async.pipeline.handover import Handover
from ciuic_async.pipeline.history import live_snapshots, parents
from ciuic_async.pipeline.persist import Persister
from ciuic_async.staging.slot_header import STAGED

_SUPERSEDED = "superseded"
_FINAL = frozenset({_SUPERSEDED, "pin_rollback", "pin_fork", "pin_malformed"})
"""Kinds of failures that trying again cannot change: another history is there than the one that was trained on."""


@dataclass(frozen=True, slots=True)
class Charge:
    """The trainer that a keeper looks after: where its snapshots go, under whose key and name."""

    url: str
    origin: str
    secret: str = field(repr=False)
    run: str
    codec: str
    ordering: str = "local"
    storage_options: dict[str, str] | None = field(default=None, repr=False)


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


def rescue(charge: Charge, slot: HeldSlot | None, tried: list[str] | None = None) -> Outcome:
    """Make the snapshot of a slot durable, unless it is. Never raises an ``Exception``.

    Args:
        slot: the newest, of a trainer that is dead.
        tried: ids under which earlier attempts wrote it: one of them may have got through, though it looked like a
            failure. This attempt's is added.
    """
    tried = [] if tried is None else tried
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
        with SnapshotChain(
            charge.url,
            create=False,
            key=charge.secret,
            run=charge.run,
            ordering=charge.ordering,
            storage_options=charge.storage_options,
        ) as chain:
            _check_history(chain, charge, handover)
            wanted = {handover.request.snapshot, *tried}
            snapshot = _finished(chain, handover, wanted) or _persist(chain, charge, slot, handover, tried)
    except CiuicError as error:
        return Outcome(slot, None, header.step, str(error), final=error.kind in _FINAL)
    except Exception as error:
        return Outcome(slot, None, header.step, f"{type(error).__name__}: {error}", final=False)
    return Outcome(slot, snapshot, header.step)


def _check_history(chain: SnapshotChain, charge: Charge, handover: Handover) -> None:
    """Refuse a place that holds another history by now: it was deleted and begun anew, or put back from a copy."""
    if chain.origin != charge.origin:
        raise CommitConflictError(
            f"{chain.url}: the trainer's chain {charge.origin} was here, found {chain.origin}: nothing is added to "
            "another chain",
            kind=_SUPERSEDED,
        )
    log, lineage = chain.target().log, handover.lineage
    log.refresh()
    if len(log) < lineage.since or (lineage.leaf_hash is not None and lineage.leaf_hash not in parents(log)):
        raise CommitConflictError(
            f"{chain.url}: the chain has {len(log)} entries and lacks some that the trainer saw: it was put back from "
            "a copy, and nothing is added to that",
            kind=_SUPERSEDED,
        )


def _finished(chain: SnapshotChain, handover: Handover, wanted: set[str]) -> str | None:
    """The snapshot's id, if the trainer committed it before it died, or an earlier attempt did."""
    for _, entry in chain.target().log.entries(handover.lineage.since):
        if isinstance(entry, SnapshotEntry) and entry.snapshot in wanted:
            return entry.snapshot
    return None


def _persist(chain: SnapshotChain, charge: Charge, slot: HeldSlot, handover: Handover, tried: list[str]) -> str:
    """Under a new id: what the dead writer left under the old one, or still has on its way, is not touched."""
    target = chain.target()
    parent = _parent(chain, charge, handover)
    leaf_hash = parent.leaf_hash if parent else None

    def may_claim() -> None:
        rolled_back: RollbackEntry | None = None
        for _, entry in target.log.entries(handover.lineage.since):
            if isinstance(entry, RollbackEntry):
                rolled_back = entry
            elif isinstance(entry, SnapshotEntry) and parent is not None and entry.snapshot == parent.snapshot:
                rolled_back = None  # it came before what the trainer made durable last
            if isinstance(entry, SnapshotEntry) and entry.common.run != charge.run and entry.parent == leaf_hash:
                raise CommitConflictError(
                    f"training went on without it: snapshot {entry.snapshot} (step {entry.step}) of run "
                    f"{entry.common.run} comes from the same snapshot",
                    kind=_SUPERSEDED,
                )
        if rolled_back is not None:  # it would become the latest, against what somebody decided
            raise CommitConflictError(
                f"the chain was rolled back meanwhile ({rolled_back.reason[:200]!r}, {rolled_back.common.created})",
                kind=_SUPERSEDED,
            )

    may_claim()  # now, too: before all is written in vain
    # deadline_s: nobody is training here, so there is nothing to be patient for.
    request = replace(handover.request, snapshot=layout.new_id(), parent=parent, deadline_s=0.0)
    tried.append(request.snapshot)
    persister = Persister(target, chain.file, encoder_for(charge.codec), charge.run)
    try:
        persister.persist(request, [slot.window(handover)], lambda window: None, True, may_claim=may_claim)
    finally:
        persister.close()
    return request.snapshot


def _parent(chain: SnapshotChain, charge: Charge, handover: Handover) -> Parent | None:
    """What the snapshot came from: the trainer may have finished others after this one was staged."""
    lineage = handover.lineage
    log = chain.target().log
    name, leaf_hash = lineage.parent, lineage.leaf_hash
    for index, entry in log.entries(lineage.since):
        # One after the other: another checkpointer may write to the same chain object, and so to the same run.
        if isinstance(entry, SnapshotEntry) and entry.common.run == charge.run and entry.parent == leaf_hash:
            name, leaf_hash = entry.snapshot, log.leaf_hash(index)
    if name is None or leaf_hash is None:
        return None
    line = next((line for line in live_snapshots(log) if line.leaf_hash == leaf_hash), None)
    if line is None:  # pruned
        return Parent(name, leaf_hash, {})
    try:
        places = resolve(chain.store, line.entry).locator.chunks
    except IntegrityError:  # a damaged parent: all is written anew
        places = {}
    return Parent(line.entry.snapshot, line.leaf_hash, places)
