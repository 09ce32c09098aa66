"""What a checkpointer is told about witnesses: the option ``trust``, and what follows from it after each commit."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from ciuic_async.errors import SaveFailedError, UsageError
from ciuic_async.stores.base import Store
from ciuic_async.transparency.asking import WitnessConnection
from ciuic_async.transparency.cosigning import Cosigner, Pace
from ciuic_async.transparency.log import Log
from ciuic_async.transparency.note import Vkey
from ciuic_async.transparency.policy import Policy
from ciuic_async.user_folders import evidence_folder

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
            if self.cosigner.problem is not None:
                problems.insert(0, self.cosigner.problem)
            raise SaveFailedError(
                f"no quorum of witnesses signed the log up to entry {size - 1} within {self._timeout_s:g} s "
                f"({'; '.join(problems) or 'no answer yet'}). The snapshot is in the chain and can be restored; "
                "witnesses='async' does not wait for them",
                kind="not_witnessed",
            )

    def close(self, timeout_s: float = 5.0) -> None:
        """As ``Cosigner.close``."""
        self.cosigner.close(timeout_s)


@dataclass(frozen=True, slots=True)
class Trust:
    """The option ``trust={"policy": path or text, "witnesses": "async" | "required", ...}``, checked.

    Attributes:
        required: what is written counts as durable only when a quorum of the policy's witnesses has signed it.
        max_age_s: cosignatures are renewed before they are that old; ``verify`` asks for none that is older.
        anybody: keys that the policy does not name may write too (``"writers": "any"``; default ``"endorsed"``).
    """

    policy: Policy
    required: bool = False
    max_age_s: float | None = None
    anybody: bool = False

    @classmethod
    def parse(cls, trust: Mapping[str, object]) -> Trust:
        """Check the option. Nothing is contacted.

        Raises:
            UsageError: an unknown setting, a URL that cannot be a witness's, or witnesses are required and no quorum of
                them can be asked.
            IntegrityError: kind ``policy_malformed``.
        """
        policy, mode = trust.get("policy"), trust.get("witnesses", "async")
        writers = trust.get("writers", "endorsed")
        if (
            set(trust) - {"policy", "witnesses", "max_age", "writers"}
            or mode not in ("async", "required")
            or writers not in ("endorsed", "any")
            or policy is None
        ):
            raise UsageError(
                "trust: expected 'policy' (a path or the text itself), 'witnesses' ('async' or 'required'), 'max_age' "
                f"and 'writers' ('endorsed' or 'any'), found {dict(trust)!r:.200}"
            )
        if not isinstance(policy, Policy):
            text = policy if isinstance(policy, str) and "\n" in policy else None
            policy = Policy.load(str(policy)) if text is None else Policy.parse(text.encode())
        for witness in policy.witnesses:
            if witness.url is not None:
                WitnessConnection(witness.url, 1.0)  # connects to nobody; refuses a URL now and not on a thread
        max_age = trust.get("max_age")
        made = cls(policy, mode == "required", None if max_age is None else duration_s(max_age), writers == "any")
        asked = {witness.vkey for witness in policy.witnesses if witness.url is not None}
        if made.required and (policy.quorum is None or not policy.witnessed(asked).met):
            raise UsageError(
                "trust: witnesses are required, but the policy has no quorum, or too few witnesses with a URL for it"
            )
        return made

    def check_writer(self, vkey: Vkey) -> None:
        """Refuse a key that the policy does not name, where it names keys of this log at all.

        Raises:
            UsageError: kind ``key_unendorsed``.
        """
        known = self.policy.log_keys(vkey.name)
        if known and vkey not in known and not self.anybody:
            raise UsageError(
                f"the key that would sign here is not one of the {len(known)} that the policy names for this chain: "
                f"add the line 'log {vkey}' to it, give another key, or allow it with trust={{'writers': 'any', ...}}",
                kind="key_unendorsed",
            )

    def witnessing(
        self, store: Store, log: Log, *, timeout_s: float = 30.0, roll_forward: Callable[[Log], None] | None = None
    ) -> Witnessing | None:
        """Who asks the witnesses; None where none has a URL.

        Args:
            log: an object of its own (see ``Cosigner``).
            timeout_s: for required witnesses.
            roll_forward: as for ``Cosigner``.
        """
        asked = [(w.name, w.vkey, w.url) for w in self.policy.witnesses if w.url is not None]
        if not asked:
            return None
        pace = Pace(refresh_s=None if self.max_age_s is None else self.max_age_s / 2)
        if self.required:  # whoever waits for a witness that is back must not wait longer for its next turn
            pace = replace(pace, retry_max_s=min(pace.retry_max_s, timeout_s / 3))
        cosigner = Cosigner(
            store,
            log,
            asked,
            lambda signed: self.policy.witnessed(signed).met,
            evidence=evidence_folder(),
            pace=pace,
            roll_forward=roll_forward,
        )
        return Witnessing(cosigner, required=self.required, timeout_s=timeout_s)


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
