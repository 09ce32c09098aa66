"""Entries as plain data: what ``ciuic log --json`` prints."""

from __future__ import annotations

import json
from typing import Any

from ciuic_async.format.entry import (
    Entry,
    KeyEntry,
    NoteEntry,
    PruneEntry,
    RollbackEntry,
    SnapshotEntry,
    TagEntry,
    kind_of,
)
from ciuic_async.pipeline.history import live_snapshots, parents, tags, the_line
from ciuic_async.transparency.log import Log


def list_entries(log: Log) -> list[dict[str, Any]]:
    """All entries, oldest first."""
    with log.lock:
        names = parents(log)
        named = tags(log)
        living = {line.entry.snapshot for line in live_snapshots(log)}
        line = {line.entry.snapshot for line in the_line(log)}
        return [_facts(index, entry, names, named, living, line) for index, entry in log.entries()]


def _facts(
    index: int,
    entry: Entry,
    names: dict[bytes, str],
    named: dict[str, tuple[str, ...]],
    living: set[str],
    line: set[str],
) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "id": None,
        "index": index,
        "kind": kind_of(entry),
        "step": None,
        "epoch": None,
        "batch": None,
        "created": entry.common.created,
        "parent": None,
        "raw_bytes": None,
        "stored_bytes": None,
        "metrics": {},
        "tags": [],
    }
    match entry:
        case SnapshotEntry():
            pruned = entry.snapshot not in living
            facts |= {
                "id": entry.snapshot,
                "step": entry.step,
                "epoch": entry.epoch,
                "batch": entry.batch,
                "parent": None if entry.parent is None else names.get(entry.parent),
                "raw_bytes": entry.raw_bytes,
                "stored_bytes": entry.stored_bytes,
                "metrics": {name: _number(value) for name, value in entry.metrics},
                "tags": list(named.get(entry.snapshot, ())),
                "pruned": pruned,
                "abandoned": not pruned and entry.snapshot not in line,
            }
        case PruneEntry():
            facts |= {"snapshots": list(entry.snapshots), "policy": entry.policy}
        case KeyEntry():
            facts["vkey"] = entry.vkey
        case RollbackEntry():
            facts |= {"target": names.get(entry.target), "reason": entry.reason}
        case TagEntry():
            facts |= {"name": entry.name, "target": entry.snapshot}
        case NoteEntry():
            facts["text"] = entry.text
        case _:
            pass
    return facts


def _number(text: str) -> float | int | str:
    """A metric for JSON output, which knows neither NaN nor infinity: those stay text."""
    value = float(text)
    return text if value != value or value in (float("inf"), float("-inf")) else json.loads(text)
