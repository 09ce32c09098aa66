"""What the stages report, and who listens.

Listeners run on the thread that reports, must be quick, and cannot harm: what they raise is logged and dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

logger = logging.getLogger("ciuic_async")


def _plain(record: logging.LogRecord) -> bool:
    """Errors as text: who keeps a record must not keep the frames of an error, and the staged memory they refer to."""
    if isinstance(record.args, tuple):
        record.args = tuple(str(item) if isinstance(item, BaseException) else item for item in record.args)
    return True


logger.addFilter(_plain)


@dataclass(frozen=True, slots=True)
class SnapshotStats:
    """One snapshot in figures. Times in seconds; None where it did not come to that.

    Attributes:
        step: the captured step.
        snapshot: its id.
        stall_s: the training thread was blocked by us, in ``step``/``save`` and in the gate.
        gate_s: the share of ``stall_s`` spent in the optimizer gate.
        stage_s: copying into host memory.
        persist_s: from staged to durable.
        write_s: the share of ``persist_s`` in which segments were being written.
        raw_bytes: bytes of all tensors.
        stored_bytes: bytes of segments written for it.
        deduplicated_bytes: raw bytes that were referenced instead of written.
        replicated_s: from durable to replicated, where the chain has a mirror.
        torn_retries: how often it was discarded and taken again because training changed it while it was copied.
    """

    step: int | None
    snapshot: str
    stall_s: float = 0.0
    gate_s: float = 0.0
    stage_s: float = 0.0
    persist_s: float | None = None
    write_s: float | None = None
    raw_bytes: int = 0
    stored_bytes: int = 0
    deduplicated_bytes: int = 0
    torn_retries: int = 0
    replicated_s: float | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """A stage finished something. ``stage`` is one of ``capture stage persist commit restore verify``."""

    stage: str
    snapshot: str
    size_bytes: int = 0
    seconds: float = 0.0
    total_bytes: int | None = None


Listener = Callable[[Event], None]


def notify(listener: Listener | None, event: Event) -> None:
    """Tell ``listener``, whatever it does."""
    if listener is None:
        return
    try:
        listener(event)
    except Exception:
        logger.exception("a listener failed on %s", event)
