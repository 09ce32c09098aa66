"""Retention in two steps: a ``prune`` entry is claimed (the decision, in history), then files go (the sweep).

Nothing is deleted that a claimed prune entry does not name, but for orphans: files of snapshots that never became part
of history, once they are a day old by the store's clock. A segment stays as long as the locator of any living snapshot
refers to it, whoever wrote it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ciuic_async.errors import IntegrityError
from ciuic_async.events import logger
from ciuic_async.format import layout
from ciuic_async.format.entry import Common, PruneEntry, SnapshotEntry
from ciuic_async.options import RETENTION
from ciuic_async.pipeline.commit import CommitTarget, resolve
from ciuic_async.pipeline.history import for_retention, live_snapshots, parents
from ciuic_async.retention.policy import Policy
from ciuic_async.stores.base import Store
from ciuic_async.transparency.log import Log

SNAPSHOTS_PER_ENTRY = 2000
"""Ids that fit into one log entry of 65535 bytes, with room to spare."""


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What retention did, or with ``dry_run`` would do."""

    pruned: tuple[str, ...]
    kept: tuple[str, ...]
    deleted_files: int
    freed_bytes: int


def prune(target: CommitTarget, policy: Policy, common: Callable[[], Common], *, dry_run: bool = False) -> PruneReport:
    """Drop what the policy does not keep: entry first, then the files.

    Raises:
        CiuicError: nothing or not all was deleted; calling again goes on where it stopped.
    """
    target.log.refresh()
    decided: list[str] = []
    kept: list[str] = []

    def decide(log: Log) -> list[bytes]:
        """Runs again after a lost race: the decision is always made on the history it is appended to."""
        entries = for_retention(log)
        keep = policy.keep(entries) | {entry.snapshot for entry in entries[-1:]}  # whatever it says: the latest
        decided[:] = [entry.snapshot for entry in entries if entry.snapshot not in keep]
        kept[:] = [entry.snapshot for entry in entries if entry.snapshot in keep]
        groups = [decided[i : i + SNAPSHOTS_PER_ENTRY] for i in range(0, len(decided), SNAPSHOTS_PER_ENTRY)]
        return [PruneEntry(common(), tuple(group), policy.describe()).encode() for group in groups]

    if dry_run:
        decide(target.log)
        sizes = _garbage(target.store, target.log, also_pruned=frozenset(decided))
        return PruneReport(tuple(decided), tuple(kept), len(sizes), sum(sizes.values()))
    target.append(decide)
    files, freed = _sweep(target.store, _garbage(target.store, target.log)) if decided else (0, 0)
    return PruneReport(tuple(decided), tuple(kept), files, freed)


def gc(store: Store, log: Log, *, orphan_age_s: float = RETENTION.orphan_age_s) -> PruneReport:
    """Sweep what is left: files that prune entries freed, orphans, and unpublished files of dead writers."""
    log.refresh()
    files, freed = _sweep(store, _garbage(store, log, orphan_age_s=orphan_age_s))
    files += store.sweep_unpublished(orphan_age_s)
    return PruneReport((), tuple(line.entry.snapshot for line in live_snapshots(log)), files, freed)


def _garbage(
    store: Store, log: Log, *, also_pruned: frozenset[str] = frozenset(), orphan_age_s: float | None = None
) -> dict[str, int]:
    """Name and size of every file that may go; orphans only if an age is given.

    Raises:
        IntegrityError: a living snapshot's locator cannot be read: then nobody knows what it needs, and nothing goes.
    """
    # Listed before the log is read: a snapshot that is committed in between is then known as claimed, not as an orphan.
    files = [file for folder in (layout.SEGMENTS, layout.MANIFESTS, layout.LOCATORS) for file in store.list(folder)]
    now = None if orphan_age_s is None else store.now_s()
    log.refresh()
    claimed = set(parents(log).values())
    living = [line.entry for line in live_snapshots(log) if line.entry.snapshot not in also_pruned]
    living_ids = {entry.snapshot for entry in living}
    candidates = {}
    for file in files:
        owner = layout.owner(file.name)
        if owner is None or owner in living_ids:
            continue
        old = now is not None and orphan_age_s is not None and now - file.modified_s >= orphan_age_s
        if owner in claimed or old:
            candidates[file.name] = file.size_bytes
    needed = _needed_segments(store, living) if candidates else set()
    return {name: size for name, size in candidates.items() if name not in needed}


def _needed_segments(store: Store, living: list[SnapshotEntry]) -> set[str]:
    """Segments that locators of living snapshots refer to, whoever wrote them."""
    needed: set[str] = set()
    for entry in living:
        try:
            resolved = resolve(store, entry)
        except IntegrityError as error:
            raise IntegrityError(
                f"snapshot {entry.snapshot} is damaged, so it is unknown which segments it needs: nothing was deleted "
                f"({error}); run 'ciuic verify', then prune the damaged snapshot itself",
                kind=error.kind,
                where=error.where,
            ) from error
        needed.update(segment.path for segment in resolved.segments)
    return needed


def _sweep(store: Store, garbage: dict[str, int]) -> tuple[int, int]:
    """Delete; locators first, so that no locator outlives what it names. Returns files and bytes."""
    order = sorted(garbage, key=lambda name: (not name.startswith(layout.LOCATORS), name))
    for name in order:
        store.delete(name)
    if order:
        logger.debug("deleted %d files, %d bytes", len(order), sum(garbage.values()))
    return len(order), sum(garbage.values())
