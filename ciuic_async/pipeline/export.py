"""Snapshots in other people's formats."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ciuic_async.errors import CiuicWarning
from ciuic_async.interchange import files, usual


class Described(Protocol):
    """What is recorded about the origin of an export."""

    @property
    def id(self) -> str: ...

    @property
    def step(self) -> int | None: ...

    @property
    def epoch(self) -> int | str | None: ...

    @property
    def batch(self) -> int | str | None: ...

    @property
    def metrics(self) -> Mapping[str, float]: ...

    @property
    def config(self) -> Mapping[str, Any] | None: ...


def export(state: Any, path: Path, snapshot: Described, *, overwrite: bool = True) -> Path:
    """Write ``state`` to ``path``; its suffix chooses the format (docs/moving.md has what each can hold).

    A snapshot that was imported from a file is written as it was in there; of others a ``.pt`` file has the usual keys.
    What the format cannot hold as it is becomes something like it, and is told in a CiuicWarning.

    Args:
        overwrite: False: a file that is there stays.

    Raises:
        UsageError: kind ``unknown_format``, ``file_exists``, ``duplicate_name`` or ``unsupported_type``.
        StoreError: the place refused the file.
    """
    if files.format_of(path) == "torch" and not was_imported(snapshot):
        progress = {
            "epoch": snapshot.epoch,
            "batch": snapshot.batch,
            "step": snapshot.step,
            "loss": snapshot.metrics.get("loss"),
        }
        state = usual.usual(state, progress)
    facts = {"ciuic.snapshot": snapshot.id, "ciuic.step": json.dumps(snapshot.step)}
    changed = files.write(state, path, facts, overwrite=overwrite)
    if changed:
        listed = ", ".join(f"{what} ({count} times)" for what, count in sorted(changed.items()))
        warnings.warn(f"{path}: it cannot hold all as it is: {listed}; .h5 can", CiuicWarning, stacklevel=3)
    return path


def was_imported(snapshot: Described) -> bool:
    """Whether a snapshot is what ``ciuic import`` made of a file."""
    return isinstance((snapshot.config or {}).get(files.IMPORTED), dict)


def check_target(path: Path, *, overwrite: bool) -> None:
    """Refuse a target before gigabytes are read. Raises UsageError and StoreError, as ``export``."""
    files.check_available(files.format_of(path))
    files.check_folder(path)
    if not overwrite:
        files.check_free(path)
