"""What ``ciuic doctor`` says: one finding a line."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. ``ok`` is None for a mere fact."""

    name: str
    ok: bool | None
    text: str
