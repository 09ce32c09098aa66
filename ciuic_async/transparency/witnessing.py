"""What a checkpointer is told about witnesses: the option ``trust``, and what follows from it after each commit."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ciuic_async.errors import SaveFailedError, UsageError
from ciuic_async.stores.base import Store
from ciuic_async.transparency.cosigning import Cosigner, Pace, Quorum
from ciuic_async.transparency.log import Log
from ciuic_async.transparency.note import Vkey

_DURATION = re.compile(r"([1-9][0-9]{0,8})([smhd])")
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Witnessing:
    """What a chain's writer does about witnesses after each commit.

    Args:
        required: a snapshot is reported durable only when a quorum has signed a head that holds it.
        timeout_s: how long that may take.
    """

    def __init__(self, cosigner: Cosigner, *, required: bool, timeout_s: float) -> None:
        self.cosigner = cosigner
        self.required = required
        self._timeout_s = timeout_s

    def committed(self, size: int) -> None:
        """Entries up to ``size`` are in the log. On the thread that commits; waits only where witnesses are required.

        Raises:
            SaveFailedError: kind ``not_witnessed``; the entry stays, and may be witnessed later.
        """
        if not self.required:
            self.cosigner.notice()
            return
        if not self.cosigner.wait(size, self._timeout_s):
            problems = [f"{item.name}: {item.error}" for item in self.cosigner.status() if item.error is not None]
            raise SaveFailedError(
                f"no quorum of witnesses signed the log up to entry {size - 1} within {self._timeout_s:g} s "
                f"({'; '.join(problems) or 'no answer yet'}). The snapshot is in the chain and can be restored; "
                "witnesses='async' does not wait for them",
                kind="not_witnessed",
            )

    def close(self, timeout_s: float = 5.0) -> None:
        """As ``Cosigner.close``."""
        self.cosigner.close(timeout_s)


def from_trust(
    trust: Mapping[str, object],
    store: Store,
    log: Log,
    *,
    witnesses: Sequence[tuple[str, Vkey, str | None]],
    quorum: Quorum,
    timeout_s: float = 30.0,
) -> Witnessing | None:
    """What the option ``trust={"policy": ..., "witnesses": "async"|"required", "max_age": "1h"}`` asks for.

    Args:
        log: an object of its own (see ``Cosigner``).
        witnesses, quorum: of the policy. None is asked that has no URL.
        timeout_s: for ``"required"``.

    Returns:
        None where the policy has no witness that can be asked.

    Raises:
        UsageError: an unknown setting, or witnesses are required and no quorum of them can be asked.
    """
    unknown = set(trust) - {"policy", "witnesses", "max_age"}
    mode = trust.get("witnesses", "async")
    if unknown or mode not in ("async", "required"):
        raise UsageError(
            f"trust: expected 'policy', 'witnesses' ('async' or 'required') and 'max_age', found {dict(trust)!r:.200}"
        )
    asked = [(name, vkey, url) for name, vkey, url in witnesses if url is not None]
    required = mode == "required"
    if required and (quorum(set()) or not quorum({vkey for _, vkey, _ in asked})):
        raise UsageError(
            "trust: witnesses are required, but the policy has no quorum, or too few witnesses with a URL to meet it"
        )
    if not asked:
        return None
    max_age = trust.get("max_age")
    refresh_s = None if max_age is None else duration_s(max_age) / 2
    pace = Pace(refresh_s=refresh_s)
    return Witnessing(
        Cosigner(store, log, asked, quorum, evidence=_evidence_folder(), pace=pace),
        required=required,
        timeout_s=timeout_s,
    )


def duration_s(value: object) -> float:
    """Seconds: a positive number, or text such as ``90s``, ``30m``, ``1h``, ``2d``.

    Raises:
        UsageError: it is neither.
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf"):
        return float(value)
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise UsageError(f"{value!r:.80}: expected seconds, or a text such as '90s', '30m', '1h', '2d'")
    return int(match[1]) * _SECONDS[match[2]]


def _evidence_folder() -> Path | None:
    """``$XDG_STATE_HOME`` or ``~/.local/state``, then ours; None without a home."""
    base = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(base):
        base = os.path.expanduser("~/.local/state")
    return Path(base, "ciuic_async", "evidence") if os.path.isabs(base) else None
