"""``ciuic doctor CHAIN`` and ``--forecast``: how much room snapshots will take, and when the disk is full.

From what the newest snapshots stored, at the pace at which they came, under the retention of the configuration. All
figures are estimates, those of retention upper bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import pairwise
from statistics import median

from ciuic_async.chain import Snapshot, SnapshotChain
from ciuic_async.cli.doctor_finding import Finding
from ciuic_async.cli.output import human_bytes
from ciuic_async.retention import words
from ciuic_async.retention.forecast import demand
from ciuic_async.retention.policy import Policy
from ciuic_async.stores.space import room

NEWEST = 20
DAY_S = 86400.0
SOON_DAYS = 2.0
PACE_S = 60.0
"""Snapshots that all came within this time say nothing of a day."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Figures; None where they are not known. ``asked_bytes``: what retention keeps at most."""

    snapshots: int
    snapshot_raw_bytes: int
    snapshot_stored_bytes: int
    interval_s: float | None
    bytes_per_day: float | None
    held_bytes: int
    free_bytes: int | None
    keep: str | None
    asked_bytes: int | None
    full_in_days: float | None

    def as_data(self) -> dict[str, object]:
        """For ``--json``."""
        return asdict(self)


def of_chain(url: str, keep: Policy | None) -> Forecast | None:
    """From a chain's newest snapshots; None where it has none yet. Raises as ``SnapshotChain`` does."""
    with SnapshotChain(url, create=False) as chain:
        snapshots = list(chain)
        if not snapshots:
            return None
        newest = snapshots[-NEWEST:]
        return _forecast(
            chain.folder,
            keep,
            len(snapshots),
            raw_bytes=newest[-1].raw_bytes,
            stored_bytes=int(median(snapshot.stored_bytes for snapshot in newest)),
            interval_s=_interval_s(newest),
            held_bytes=sum(snapshot.stored_bytes for snapshot in snapshots),
        )


def of_size(folder: str | None, keep: Policy | None, size_bytes: int, interval_s: float | None) -> Forecast:
    """Before there is anything: from the size of the state, as if nothing were shared or compressed."""
    return _forecast(
        folder, keep, 0, raw_bytes=size_bytes, stored_bytes=size_bytes, interval_s=interval_s, held_bytes=0
    )


def findings(forecast: Forecast) -> list[Finding]:
    """The same for people."""
    per = f"up to {human_bytes(forecast.snapshot_raw_bytes)} each"
    if forecast.snapshots:
        per = (
            f"{human_bytes(forecast.snapshot_stored_bytes)} stored each, of {human_bytes(forecast.snapshot_raw_bytes)}"
        )
    pace = ""
    if forecast.interval_s is not None and forecast.bytes_per_day is not None:
        pace = (
            f", one every {words.duration(max(round(forecast.interval_s), 1))}: "
            f"{human_bytes(int(forecast.bytes_per_day))} a day before retention"
        )
    result = [Finding("snapshots", None, f"{forecast.snapshots} here, {per}{pace}")]
    rule = "all are kept (keep is not configured)" if forecast.keep is None else f"keep={forecast.keep!r}"
    if forecast.asked_bytes is not None:
        rule += f" asks for {human_bytes(forecast.asked_bytes)} at most, as if snapshots shared nothing"
    elif forecast.keep is not None:
        rule += " has no bound that is known"
    result.append(Finding("retention", None, rule))
    result.append(_verdict(forecast))
    return result


def _verdict(forecast: Forecast) -> Finding:
    if forecast.free_bytes is None:
        return Finding("forecast", None, "this place does not say how much room it has")
    there = f"{human_bytes(forecast.free_bytes)} are free"
    if forecast.held_bytes:
        there += f" beside {human_bytes(forecast.held_bytes)} of this chain"
    if forecast.asked_bytes is not None and forecast.asked_bytes <= forecast.free_bytes + forecast.held_bytes:
        return Finding("forecast", True, f"{there}: what retention asks for fits")
    if forecast.full_in_days is None:
        if forecast.asked_bytes is not None:
            return Finding("forecast", False, f"{there}: that may be too little; keep fewer, or use a larger disk")
        fitting = forecast.free_bytes // max(forecast.snapshot_stored_bytes, 1)
        return Finding("forecast", None if fitting > 1 else False, f"{there}: at least {fitting} more snapshots fit")
    days = f"{there}: full in {forecast.full_in_days:.1f} days at this pace"
    if forecast.asked_bytes is not None:
        return Finding("forecast", False, f"{days}, unless they share as they did; keep fewer, or use a larger disk")
    soon = forecast.full_in_days < SOON_DAYS
    return Finding("forecast", False if soon else None, f"{days}; give a bounded keep= or prune (ciuic prune)")


def _forecast(
    folder: str | None,
    keep: Policy | None,
    count: int,
    *,
    raw_bytes: int,
    stored_bytes: int,
    interval_s: float | None,
    held_bytes: int,
) -> Forecast:
    space = room(folder)
    free = None if space is None else space.free_bytes
    asked = demand(keep, interval_s)
    per_day = None if interval_s is None else stored_bytes * DAY_S / interval_s
    return Forecast(
        snapshots=count,
        snapshot_raw_bytes=raw_bytes,
        snapshot_stored_bytes=stored_bytes,
        interval_s=interval_s,
        bytes_per_day=per_day,
        held_bytes=held_bytes,
        free_bytes=free,
        keep=None if keep is None else keep.describe(),
        asked_bytes=None if asked is None else asked.size_bytes(max(raw_bytes, stored_bytes)),
        full_in_days=None if free is None or not per_day else free / per_day,
    )


def _interval_s(newest: Sequence[Snapshot]) -> float | None:
    """Median time from one to the next, by the writers' clocks: a night without training is no pace, nor is a burst."""
    times = [datetime.fromisoformat(snapshot.created) for snapshot in newest]
    gaps = [(later - sooner).total_seconds() for sooner, later in pairwise(times)]
    return median(gaps) if sum(gaps) >= PACE_S and median(gaps) > 0 else None
