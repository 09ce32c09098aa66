"""Folders of the user who runs this: keys, configuration, pins and evidence, which never lie inside a chain.

XDG base directories; a relative path there counts as unset, as that specification wants. Nothing is made here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

OURS = "ciuic_async"


def config_folder(*parts: str, environment: Mapping[str, str] | None = None) -> str | None:
    """A path below ``$XDG_CONFIG_HOME`` or ``~/.config``; None without a home."""
    return _below("XDG_CONFIG_HOME", "~/.config", parts, environment)


def state_folder(*parts: str) -> str | None:
    """A path below ``$XDG_STATE_HOME`` or ``~/.local/state``; None without a home."""
    return _below("XDG_STATE_HOME", "~/.local/state", parts, None)


def evidence_folder() -> Path | None:
    """Where notes that contradict each other are kept for people to look at; None without a home."""
    folder = state_folder(OURS, "evidence")
    return None if folder is None else Path(folder)


def _below(variable: str, usual: str, parts: tuple[str, ...], environment: Mapping[str, str] | None) -> str | None:
    base = (os.environ if environment is None else environment).get(variable, "")
    if not os.path.isabs(base):
        base = os.path.expanduser(usual)
    return os.path.join(base, *parts) if os.path.isabs(base) else None
