"""ciuic-async: asynchronous, verified checkpoints for PyTorch. The public names, loaded on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ciuic_async.chain import Snapshot, SnapshotChain
    from ciuic_async.checkpointer import Checkpointer
    from ciuic_async.errors import (
        CiuicError,
        CiuicWarning,
        CommitConflictError,
        FormatVersionError,
        IntegrityError,
        InternalError,
        NotFoundError,
        SaveFailedError,
        StoreError,
        TargetMismatchError,
        UsageError,
    )
    from ciuic_async.events import Event, SnapshotStats
    from ciuic_async.oneoff import load, save
    from ciuic_async.pending import PendingSnapshot
    from ciuic_async.retention.parse import parse_policy
    from ciuic_async.retention.policy import (
        KeepAny,
        KeepBest,
        KeepBytes,
        KeepDaily,
        KeepEvery,
        KeepHourly,
        KeepLatest,
        KeepTagged,
        KeepWeekly,
        KeepWithin,
    )
    from ciuic_async.verify import Problem, VerifyReport
    from ciuic_async.version import __version__

_HOME = {
    "Checkpointer": "checkpointer",
    "CiuicError": "errors",
    "CiuicWarning": "errors",
    "CommitConflictError": "errors",
    "Event": "events",
    "FormatVersionError": "errors",
    "IntegrityError": "errors",
    "InternalError": "errors",
    "KeepAny": "retention.policy",
    "KeepBest": "retention.policy",
    "KeepBytes": "retention.policy",
    "KeepDaily": "retention.policy",
    "KeepEvery": "retention.policy",
    "KeepHourly": "retention.policy",
    "KeepLatest": "retention.policy",
    "KeepTagged": "retention.policy",
    "KeepWeekly": "retention.policy",
    "KeepWithin": "retention.policy",
    "NotFoundError": "errors",
    "PendingSnapshot": "pending",
    "Problem": "verify",
    "Progress": "resuming",
    "SaveFailedError": "errors",
    "Snapshot": "chain",
    "SnapshotChain": "chain",
    "SnapshotStats": "events",
    "StoreError": "errors",
    "TargetMismatchError": "errors",
    "UsageError": "errors",
    "VerifyReport": "verify",
    "__version__": "version",
    "load": "oneoff",
    "parse_policy": "retention.parse",
    "save": "oneoff",
}

__all__ = [
    "Checkpointer",
    "CiuicError",
    "CiuicWarning",
    "CommitConflictError",
    "Event",
    "FormatVersionError",
    "IntegrityError",
    "InternalError",
    "KeepAny",
    "KeepBest",
    "KeepBytes",
    "KeepDaily",
    "KeepEvery",
    "KeepHourly",
    "KeepLatest",
    "KeepTagged",
    "KeepWeekly",
    "KeepWithin",
    "NotFoundError",
    "PendingSnapshot",
    "Problem",
    "Progress",
    "SaveFailedError",
    "Snapshot",
    "SnapshotChain",
    "SnapshotStats",
    "StoreError",
    "TargetMismatchError",
    "UsageError",
    "VerifyReport",
    "__version__",
    "load",
    "parse_policy",
    "save",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"ciuic_async.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
