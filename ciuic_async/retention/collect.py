"""Retention in two steps: a ``prune`` entry is claimed (the decision, in history), then files go (the sweep).

Nothing is deleted that a claimed prune entry does not name, but for orphans: files of snapshots that never became part
of history, once they are a day old by the store's clock. A segment stays as long as the locator of any living snapshot
refers to it, whoever wrote it.

A locator that was replaced (``rebase.py``) counts for as long as a writer at work may lean on what it names: until an
entry is claimed after the new one was seen, for such a writer then looks again before it claims; or for a day.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ciuic_async.errors import CommitConflictError, IntegrityError, StoreError
from ciuic_async.events import logger
from ciuic_async.format import layout, locator
from ciuic_async.format.entry import Common, NoteEntry, PruneEntry, SnapshotEntry
from ciuic_async.options import RETENTION
from ciuic_async.pipeline.commit import CommitTarget, read_locator, read_manifest, resolve
from ciuic_async.pipeline.history import for_retention, live_snapshots, parents
from ciuic_async.retention import rebase as rebasing
from ciuic_async.retention.policy import Policy, kept_by
from ciuic_async.stores.base import Listed, Store
from ciuic_async.transparency.log import Log

SNAPSHOTS_PER_ENTRY = 2000
"""Ids that fit into one log entry of 65535 bytes, with room to spare."""

DESCRIPTION_LIMIT = 2000
"""Characters of a policy that a prune entry quotes."""

LATEST = "it is the latest"
MOVED_NOTE = "segments of pruned snapshots can go: what living ones need of them lies elsewhere now"


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What retention did, or with ``dry_run`` would do.

    Attributes:
        pruned: ids that go, abandoned ones first.
        kept: ids that stay.
        deleted_files: of snapshots, and of writers that died.
        freed_bytes: of these; what was copied for it is ``moved_bytes``.
        freed_by: the same by the snapshot that wrote the files; also snapshots that were pruned long ago.
        reasons: why each of ``kept`` stays: the rules that keep it.
        moved_bytes: records that were copied out of segments that could go then.
    """

    pruned: tuple[str, ...]
    kept: tuple[str, ...]
    deleted_files: int
    freed_bytes: int
    freed_by: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, tuple[str, ...]] = field(default_factory=dict)
    moved_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Decision:
    """What a policy says about a log of ``size`` entries."""

    size: int
    dropped: tuple[str, ...]
    reasons: dict[str, tuple[str, ...]]

    def report(self, garbage: Mapping[str, int], moved_bytes: int) -> PruneReport:
        return PruneReport(
            self.dropped,
            tuple(self.reasons),
            len(garbage),
            sum(garbage.values()),
            _by_owner(garbage),
            self.reasons,
            moved_bytes,
        )


def prune(
    target: CommitTarget, policy: Policy, common: Callable[[], Common], *, dry_run: bool = False, rebase: bool = False
) -> PruneReport:
    """Drop what the policy does not keep: entry first, then the files.

    Args:
        rebase: also move what is needed out of segments that are mostly garbage, and sweep when nothing is dropped.
            Without it, a call that drops nothing costs a look at the log.

    Raises:
        CiuicError: nothing or not all was deleted; calling again goes on where it stopped.
    """
    store, log = target.store, target.log
    log.refresh()
    decision = _decide(store, log, policy)
    if not decision.dropped and not rebase:
        return decision.report({}, 0)
    planned = _plan(store, log, decision) if rebase else rebasing.Plan()
    if dry_run:
        newest = _generations(store.list(layout.LOCATORS))
        garbage = _garbage(store, log, counted_from=newest, also_pruned=decision.dropped, emptied=planned.emptied)
        return decision.report(garbage, planned.moved_bytes)
    moved_bytes = _rebase(store, planned)
    newest = _generations(store.list(layout.LOCATORS))  # seen before the claim: from then on no writer leans on less
    worth_an_entry = not decision.dropped and _frees_more(store, log, newest)
    claimed = False

    def entries(log: Log) -> list[bytes]:
        """Runs again after a lost race: the decision is always made on the history it is appended to."""
        nonlocal decision, claimed
        if len(log) != decision.size:
            decision = _decide(store, log, policy)
        dropped, what = decision.dropped, policy.describe()[:DESCRIPTION_LIMIT]
        groups = [dropped[i : i + SNAPSHOTS_PER_ENTRY] for i in range(0, len(dropped), SNAPSHOTS_PER_ENTRY)]
        claimed = bool(groups) or worth_an_entry
        if claimed and not groups:
            return [NoteEntry(common(), MOVED_NOTE).encode()]
        return [PruneEntry(common(), group, what).encode() for group in groups]

    target.append(entries)
    garbage = _garbage(store, log, counted_from=newest if claimed else {})
    _sweep(store, garbage)
    return decision.report(garbage, moved_bytes)


def gc(store: Store, log: Log, *, orphan_age_s: float = RETENTION.orphan_age_s, dry_run: bool = False) -> PruneReport:
    """Sweep what is left: files that prune entries freed, orphans, and unpublished files of dead writers.

    Args:
        dry_run: only say what would go; unpublished files are not counted then.
    """
    log.refresh()
    garbage = _garbage(store, log, orphan_age_s=orphan_age_s)
    unpublished = 0
    if not dry_run:
        _sweep(store, garbage)
        unpublished = store.sweep_unpublished(orphan_age_s)
    kept = tuple(line.entry.snapshot for line in live_snapshots(log))
    return PruneReport((), kept, len(garbage) + unpublished, sum(garbage.values()), _by_owner(garbage))


def sweep_copy(store: Store, log: Log) -> int:
    """Delete from a copy of a chain what the prune entries in its log freed; how many files.

    Nobody writes to a copy but those who copy, so of locators only the newest counts. What never became part of its log
    stays.
    """
    garbage = _garbage(store, log, counted_from=_generations(store.list(layout.LOCATORS)))
    _sweep(store, garbage)
    return len(garbage)


# --- deciding ---------------------------------------------------------------------------------------------------------


def _decide(store: Store, log: Log, policy: Policy) -> _Decision:
    size = len(log)
    entries = for_retention(log)
    by_id = {entry.snapshot: entry for entry in entries}
    footprints: dict[str, dict[str, int]] = {}

    def footprint(snapshot: str) -> Mapping[str, int]:
        if snapshot not in footprints:
            footprints[snapshot] = _footprint(store, by_id[snapshot])
        return footprints[snapshot]

    reasons: dict[str, list[str]] = {}
    for rule, kept in kept_by(policy, entries, footprint):
        for snapshot in kept:
            reasons.setdefault(snapshot, []).append(rule)
    for entry in entries[-1:]:  # whatever the policy says
        reasons.setdefault(entry.snapshot, []).append(LATEST)
    kept_in_order = {snapshot: tuple(reasons[snapshot]) for snapshot in by_id if snapshot in reasons}
    return _Decision(size, tuple(snapshot for snapshot in by_id if snapshot not in reasons), kept_in_order)


def _footprint(store: Store, entry: SnapshotEntry) -> dict[str, int]:
    """The files that reading a snapshot needs. Of a damaged one those that it says it wrote: it can be dropped."""
    try:
        resolved = resolve(store, entry)
    except IntegrityError:
        return {layout.segment(entry.snapshot, 0, 0): entry.stored_bytes}
    return {
        entry.manifest.path: entry.manifest.size_bytes,
        **{segment.path: segment.size_bytes for segment in resolved.segments},
    }


# --- moving -----------------------------------------------------------------------------------------------------------


def _plan(store: Store, log: Log, decision: _Decision) -> rebasing.Plan:
    dropped = set(decision.dropped)
    living = [line.entry for line in live_snapshots(log) if line.entry.snapshot not in dropped]
    try:
        return rebasing.plan(store, living)
    except IntegrityError:  # the sweep will say so, once the decision is on record
        return rebasing.Plan()


def _rebase(store: Store, planned: rebasing.Plan) -> int:
    """A full disk or another pruner is no reason not to free what can be freed without."""
    try:
        return rebasing.carry_out(store, planned)
    except (StoreError, CommitConflictError, IntegrityError) as error:
        logger.warning("segments that are mostly garbage stay for now, moving the rest out of them failed: %s", error)
        return 0


def _generations(files: Iterable[Listed]) -> dict[str, int]:
    """The newest locator generation of every snapshot that has one among these files."""
    newest: dict[str, int] = {}
    for file in files:
        owner, generation = layout.owner(file.name), layout.locator_generation(file.name)
        if owner is not None and generation is not None:
            newest[owner] = max(generation, newest.get(owner, 0))
    return newest


def _frees_more(store: Store, log: Log, newest: Mapping[str, int]) -> bool:
    """Whether segments stay only because of locators that were replaced: claiming an entry would let them go."""
    if not any(newest.values()):
        return False
    return len(_garbage(store, log, counted_from=newest)) > len(_garbage(store, log))


# --- sweeping ---------------------------------------------------------------------------------------------------------


def _garbage(
    store: Store,
    log: Log,
    *,
    counted_from: Mapping[str, int] | None = None,
    also_pruned: Collection[str] = (),
    emptied: Collection[str] = (),
    orphan_age_s: float | None = None,
) -> dict[str, int]:
    """Name and size of every file that may go; orphans only if an age is given.

    Args:
        counted_from: from which generation on a snapshot's locators count; 0 where it says nothing. With an age: the
            newest that is so old.
        also_pruned: treated as pruned.
        emptied: segments that will not be needed.

    Raises:
        IntegrityError: a living snapshot's locator cannot be read: then nobody knows what it needs, and nothing goes.
    """
    # Listed before the log is read: a snapshot that is committed in between is then known as claimed, not as an orphan.
    files = [file for folder in (layout.SEGMENTS, layout.MANIFESTS, layout.LOCATORS) for file in store.list(folder)]
    old: set[str] = set()
    if orphan_age_s is not None:
        now = store.now_s()
        old = {file.name for file in files if now - file.modified_s >= orphan_age_s}
        counted_from = _generations(file for file in files if file.name in old)
    log.refresh()
    claimed = set(parents(log).values())
    dropped = set(also_pruned)
    living = {line.entry.snapshot: line.entry for line in live_snapshots(log) if line.entry.snapshot not in dropped}
    strays = _strays(files, living) & old
    candidates = {}
    for file in files:
        owner = layout.owner(file.name)
        if owner is None or (owner in living and file.name not in strays):
            continue
        if owner in claimed or file.name in old:
            candidates[file.name] = file.size_bytes
    for file in store.list(layout.RECEIPTS):  # time stamps stay: they say something of all that was there before, too
        owner = layout.owner(file.name)
        if owner in claimed and owner not in living and file.name == layout.receipt(str(owner)):
            candidates[file.name] = file.size_bytes
    needed = _needed_segments(store, living.values(), counted_from or {}) - set(emptied) if candidates else set()
    return {name: size for name, size in candidates.items() if name not in needed}


def _strays(files: Sequence[Listed], living: Mapping[str, SnapshotEntry]) -> set[str]:
    """Segments of snapshots that have more than their entries say: copies of a pruner, who may have died with them."""
    segments: dict[str, dict[str, int]] = {}
    for file in files:
        owner = layout.owner(file.name)
        if owner in living and file.name.startswith(f"{layout.SEGMENTS}/"):
            segments.setdefault(str(owner), {})[file.name] = file.size_bytes
    more = [names for owner, names in segments.items() if sum(names.values()) != living[owner].stored_bytes]
    return {name for names in more for name in names}


def _needed_segments(store: Store, living: Iterable[SnapshotEntry], counted_from: Mapping[str, int]) -> set[str]:
    """Segments that locators of living snapshots refer to, whoever wrote them."""
    needed: set[str] = set()
    for entry in living:
        try:
            needed.update(_needed_by(store, entry, counted_from.get(entry.snapshot, 0)))
        except IntegrityError as error:
            raise IntegrityError(
                f"snapshot {entry.snapshot} is damaged, so it is unknown which segments it needs: nothing was deleted "
                f"({error}); run 'ciuic verify', then prune the damaged snapshot itself",
                kind=error.kind,
                where=error.where,
            ) from error
    return needed


def _needed_by(store: Store, entry: SnapshotEntry, first: int) -> set[str]:
    content = read_manifest(store, entry)
    newest = read_locator(store, content)
    found = [newest]
    if newest.generation > first:
        distinct = content.distinct_chunks()
        for generation in range(first, newest.generation):
            data = store.read(layout.locator(entry.snapshot, generation), locator.limit_bytes(len(distinct)))
            found.append(locator.decode(data, entry.snapshot, generation, distinct))
    return {segment.path for one in found for segment in one.segments()}


def _sweep(store: Store, garbage: Mapping[str, int]) -> None:
    """Delete; locators first, so that no locator outlives what it names."""
    order = sorted(garbage, key=lambda name: (not name.startswith(layout.LOCATORS), name))
    for name in order:
        store.delete(name)
    if order:
        logger.debug("deleted %d files, %d bytes", len(order), sum(garbage.values()))


def _by_owner(garbage: Mapping[str, int]) -> dict[str, int]:
    freed: dict[str, int] = {}
    for name, size in sorted(garbage.items()):
        owner = layout.owner(name) or ""
        freed[owner] = freed.get(owner, 0) + size
    return freed
