"""Who says that a log is the right one: keys, pin, witnesses, time. ``verify`` says whether it is whole.

Trust never comes from the store. It comes from the call, from the policy file that the reader keeps, and from the
reader's pin, in this order. What is found about it are *levels*, each with its state:

    ok          it holds
    failed      it was looked at and does not hold
    not asked   the reader brought nothing to hold it against
    unknown     there is not enough here to say
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from ciuic_async.errors import CiuicError, CiuicWarning, IntegrityError, NotFoundError, UsageError
from ciuic_async.format import layout, merkle
from ciuic_async.stores.base import Store
from ciuic_async.transparency import note
from ciuic_async.transparency.audit import LogAudit, Problem
from ciuic_async.transparency.log import Log
from ciuic_async.transparency.note import Vkey
from ciuic_async.transparency.pins import Pin, Pins
from ciuic_async.transparency.policy import Policy, read_text_file
from ciuic_async.transparency.slots import LogHead
from ciuic_async.transparency.tiles import RightEdge

OK, FAILED, NOT_ASKED, UNKNOWN = "ok", "failed", "not asked", "unknown"

CLOCK_TOLERANCE_S = 300.0
"""A cosignature from further in the future says nothing about how fresh a head is."""

_NO_PIN = "no pin of this chain here yet: it could not be noticed if the newest snapshots were taken away"
_KEY_FILE_LIMIT_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Level:
    """One level of verification: its state is one of those above."""

    name: str
    state: str
    detail: str = ""


Timestamps = Callable[[Store, LogAudit], Level]
"""Judges the time stamps of a chain: the level ``timestamped``."""


@dataclass(frozen=True, slots=True)
class Reader:
    """What the reader brings.

    Attributes:
        keys: writers' keys.
        policy: more of them, and witnesses.
        endorsed: entries of any other key are a problem.
        max_age_s: how old the newest sign of life may be; None: it is not asked.
        pins: where the reader's pins are; None: not to be looked at.
        now_s: POSIX seconds; None: the clock's.
        timestamps: who judges time stamps; None: nobody.
    """

    keys: tuple[Vkey, ...] = ()
    policy: Policy | None = None
    endorsed: bool = False
    max_age_s: float | None = None
    pins: Pins | None = None
    now_s: float | None = None
    timestamps: Timestamps | None = None


@dataclass(slots=True)
class Verdict:
    """What ``judge`` found."""

    signature: Level = Level("signature", UNKNOWN)
    further: list[Level] = field(default_factory=list)
    """pinned, witnessed, fresh, timestamped."""
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    entries: int = 0
    """How many the log has that were verified."""
    may_pin: bool = False
    """Whether the head may become the pin, if nothing else is wrong."""


class History:
    """The roots that a verified log had. Not thread-safe.

    Args:
        leaf_hashes: of all its entries.
        log: the same log, to look at again: what writers added since is asked of it. None: nothing was added.
    """

    def __init__(self, leaf_hashes: Sequence[bytes], log: Log | None = None) -> None:
        self._hashes = leaf_hashes
        self._log = log
        self._roots = {0: merkle.EMPTY_ROOT}

    def __len__(self) -> int:
        return len(self._hashes)

    def leaf_hash(self, index: int) -> bytes:
        """The leaf hash of an entry that is there."""
        return self._hashes[index]

    def prepare(self, sizes: Iterable[int]) -> None:
        """Find the roots at many sizes in one pass over the log."""
        wanted = {size for size in sizes if 0 <= size <= len(self)} - set(self._roots)
        edge = RightEdge()
        for leaf in self._hashes[: max(wanted, default=0)]:
            edge.append(leaf)
            if edge.size in wanted:
                self._roots[edge.size] = edge.root()

    def had(self, size: int, root: bytes) -> bool:
        """Whether the log had this root when it had ``size`` entries."""
        if not 0 <= size <= len(self):
            return size > len(self) and self._has_since(size, root)
        self.prepare((size,))
        return self._roots[size] == root

    def _has_since(self, size: int, root: bytes) -> bool:
        """The same of a size that was reached since: a chain is verified while it is written to and witnessed."""
        if self._log is None:
            return False
        self.prepare((len(self),))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CiuicWarning)  # of damage that the audit has named
                if len(self._log) < size and self._log.refresh().size < size:
                    return False
                return self._log.root_at(len(self)) == self._roots[len(self)] and self._log.root_at(size) == root
        except CiuicError:
            return False


def parse_keys(keys: Iterable[str | os.PathLike[str] | Vkey]) -> tuple[Vkey, ...]:
    """The keys that a caller names: as such, as text, or a file with one a line (``#`` begins a comment line).

    Raises:
        UsageError: kind ``vkey_malformed`` or ``keys_unreadable``.
    """
    found: list[Vkey] = []
    for key in keys:
        if isinstance(key, Vkey):
            found.append(key)
            continue
        text = os.fspath(key)
        try:
            found.append(note.parse_vkey(text.strip()))
            continue
        except IntegrityError as error:
            if not os.path.exists(text):
                raise UsageError(f"{error}, and there is no file of this name", kind="vkey_malformed") from error
        found += _read_keys(text)
    return tuple(dict.fromkeys(found))


def _read_keys(path: str) -> list[Vkey]:
    data = read_text_file(path, _KEY_FILE_LIMIT_BYTES, "keys")
    lines = [line.strip() for line in data.decode("utf-8", "replace").splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines or len(data) > _KEY_FILE_LIMIT_BYTES:
        raise UsageError(f"{path}: expected verifier keys, one a line", kind="vkey_malformed", where=path)
    try:
        return [note.parse_vkey(line) for line in lines]
    except IntegrityError as error:
        raise UsageError(f"{path}: {error}", kind="vkey_malformed", where=path) from error


@dataclass(frozen=True, slots=True)
class FoundPin:
    """The reader's pin of a log, or why it cannot be used; neither: there is none."""

    pin: Pin | None = None
    problem: Problem | None = None


def find_pin(reader: Reader, origin: str) -> FoundPin:
    """Read the pin. Before the log is read: later it may know of entries that were added meanwhile."""
    try:
        return FoundPin(None if reader.pins is None else reader.pins.read(origin))
    except IntegrityError as error:
        return FoundPin(problem=Problem(error.kind, error.where or layout.LOG_HEAD, str(error)))


def judge(store: Store, origin: str, audit: LogAudit, history: History, reader: Reader, found: FoundPin) -> Verdict:
    """Hold an audited log against what the reader brings. ``found`` was found before the audit."""
    verdict = Verdict(entries=len(history))
    pin, pinned = _pinned(store, audit, history, reader, found, verdict)
    verdict.signature = _signature(origin, audit, reader, pin, verdict)
    heads = _heads(store, origin, audit, history, verdict)
    witnessed = _witnessed(heads, len(history), reader.policy, verdict)
    fresh = _fresh(heads, audit, reader, verdict)
    stamped = Level("timestamped", NOT_ASKED) if reader.timestamps is None else reader.timestamps(store, audit)
    if stamped.state == FAILED:
        text = f"{layout.RECEIPTS}: no time stamp holds by the roots that you gave: {stamped.detail}"
        verdict.problems.append(Problem("not_timestamped", layout.RECEIPTS, text))
    verdict.further = [pinned, witnessed, fresh, stamped]
    brought = reader.policy is not None or reader.keys
    if brought and pinned.state != OK and witnessed.state != OK:
        verdict.notes.append(
            "nobody but the store says which entry is the newest: without a pin or witnesses it cannot be noticed when "
            "the newest snapshots were taken away"
        )
    # A pin that is there moves only under a trusted signature: else any key that announces itself would become trusted.
    verdict.may_pin = audit.head is not None and (pin is None or verdict.signature.state == OK)
    return verdict


# --- signature --------------------------------------------------------------------------------------------------------


def _signature(origin: str, audit: LogAudit, reader: Reader, pin: Pin | None, verdict: Verdict) -> Level:
    given = bool(reader.keys) or (reader.policy is not None and bool(reader.policy.logs))
    trusted = {vkey for vkey in reader.keys if vkey.name == origin}
    if reader.policy is not None:
        trusted.update(reader.policy.log_keys(origin))
    source = "a key you gave"
    if given:
        _unendorsed(audit, trusted, reader, verdict)
    elif pin is not None:
        trusted = {vkey for vkey in audit.keys.values() if pin.signed_by(vkey)}
        source = "the key of your pin"
    if not given and not trusted:
        return Level("signature", NOT_ASKED, "give --key or --policy to say whose signature counts")
    signers = _head_signers(origin, audit)
    if signers & trusted:
        return Level("signature", OK, f"by {source}")
    if not signers:
        if not audit.entries:
            return Level("signature", UNKNOWN, "nothing is signed yet")
        if set(audit.written) <= trusted and sum(audit.written.values()) == len(audit.leaf_hashes):
            return Level("signature", OK, f"of every slot, by {source}; there is no log head yet")
    found = ", ".join(map(str, sorted(signers, key=str)[:4])) or "no good log head"
    if not given:
        return Level("signature", UNKNOWN, f"signed by another key than that of your pin: {found}")
    verdict.problems.append(
        Problem(
            "signer_untrusted",
            layout.LOG_HEAD,
            f"{layout.LOG_HEAD}: expected a signature by one of {len(trusted)} keys that you trust for {origin}, "
            f"found {found}; if that is a writer of yours, add its key to the policy",
        )
    )
    return Level("signature", FAILED, f"signed by {found}")


def _head_signers(origin: str, audit: LogAudit) -> set[Vkey]:
    if audit.head is None:
        return set()
    known = {(origin, key_id): vkey for key_id, vkey in audit.keys.items()}
    return set(note.verify(audit.head_file, known, layout.LOG_HEAD).signers)


def _unendorsed(audit: LogAudit, trusted: set[Vkey], reader: Reader, verdict: Verdict) -> None:
    for vkey in audit.keys.values():
        if vkey in trusted:
            continue
        count = audit.written[vkey]
        text = f"unendorsed key {vkey}: the log announces it, and you do not trust it; it wrote {count} entries"
        if reader.endorsed and count:
            verdict.problems.append(Problem("unendorsed", layout.SLOTS, text))
        else:
            verdict.notes.append(text)


# --- pinned -----------------------------------------------------------------------------------------------------------


def _pinned(
    store: Store, audit: LogAudit, history: History, reader: Reader, found: FoundPin, verdict: Verdict
) -> tuple[Pin | None, Level]:
    if reader.pins is None:
        return None, Level("pinned", NOT_ASKED)
    pin = found.pin
    if found.problem is not None:
        verdict.problems.append(found.problem)
        return None, Level("pinned", FAILED, found.problem.kind)
    if pin is None:
        return None, Level("pinned", UNKNOWN, _NO_PIN)
    if len(history) < pin.size and audit.problems:
        return pin, Level("pinned", UNKNOWN, f"of {pin.size} entries only {len(history)} could be verified")
    try:
        reader.pins.compare(pin, len(history), history.had, lambda: store.read(layout.LOG_HEAD, note.LIMIT_BYTES))
    except IntegrityError as contradiction:
        kind, where = contradiction.kind, contradiction.where or layout.LOG_HEAD
        verdict.problems.append(Problem(kind, where, str(contradiction)))
        return pin, Level("pinned", FAILED, kind)
    return pin, Level("pinned", OK, f"extends your pin of {pin.size} entries")


# --- witnessed, fresh -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Head:
    """A good head of this log, and the file it is in."""

    name: str
    head: LogHead
    note: note.Note


def _heads(store: Store, origin: str, audit: LogAudit, history: History, verdict: Verdict) -> list[_Head]:
    """The heads that may carry cosignatures. ``log/witnessed`` is checked here; the audit knows ``log/checkpoint``."""
    heads = []
    if audit.head is not None:
        heads.append(_Head(layout.LOG_HEAD, audit.head, note.parse(audit.head_file, layout.LOG_HEAD)))
    try:
        data = store.read(layout.WITNESSED, note.LIMIT_BYTES)
        heads.append(check_head(data, origin, audit, history, layout.WITNESSED))
    except NotFoundError:
        pass
    except CiuicError as error:
        verdict.problems.append(Problem(error.kind, layout.WITNESSED, str(error)))
    return heads


def check_head(data: bytes, origin: str, audit: LogAudit, history: History, what: str) -> _Head:
    """Check that a note is a head that this log had, signed by one of its keys.

    Raises:
        IntegrityError: those of ``note.verify`` and ``note.parse_head``, or kind ``fork``.
    """
    parsed = note.parse(data, what)
    note.verify_note(parsed, {(origin, key_id): vkey for key_id, vkey in audit.keys.items()}, what)
    head = LogHead(*note.parse_head(parsed.text, origin, what))
    if not history.had(head.size, head.root):
        raise IntegrityError(
            f"{what}: a signed head of {head.size} entries that is none of this log's, which has {len(history)}",
            kind="fork",
            where=what,
        )
    return _Head(what, head, parsed)


def _cosigners(head: _Head, policy: Policy, verdict: Verdict | None = None) -> dict[Vkey, int]:
    """The policy's witnesses whose cosignatures hold, and when they made them (POSIX seconds)."""
    keys = policy.witness_keys()
    found: dict[Vkey, int] = {}
    for item in head.note.signatures:
        vkey = keys.get((item.name, item.key_id))
        if vkey is None:
            continue
        if vkey.verifies(head.note.text, item.signature):
            found[vkey] = max(found.get(vkey, 0), note.cosigned_at(item.signature))
        elif verdict is not None:
            text = f"{head.name}: the cosignature by {item.name} does not hold; the file was changed"
            verdict.problems.append(Problem("signature_invalid", head.name, text))
    return found


def _witnessed(heads: list[_Head], size: int, policy: Policy | None, verdict: Verdict) -> Level:
    if policy is None or not policy.witnesses:
        return Level("witnessed", NOT_ASKED, "" if policy is None else "the policy names no witness")
    results = [(policy.witnessed(_cosigners(head, policy, verdict).keys()), head.head.size) for head in heads]
    best, at = max(results, key=lambda result: (result[0].met, result[0].have, result[1]), default=(None, 0))
    if policy.quorum is None and (best is None or not best.have):
        return Level("witnessed", NOT_ASKED, "the policy asks for no quorum, and no witness signed")
    if best is None:
        detail = f"{policy.witnessed(set())}, there is no good log head"
    else:
        detail = str(best) + (f", at {at} of {size} entries" if best.have and at < size else "")
        if best.met:
            return Level("witnessed", OK, detail)
    verdict.problems.append(
        Problem(
            "not_witnessed",
            layout.WITNESSED,
            f"{layout.WITNESSED}: witnessed by {detail}: the policy asks for {policy.quorum}. Either the witnesses "
            "were not asked yet, or they have seen another history and somebody keeps what they signed from you",
        )
    )
    return Level("witnessed", FAILED, detail)


def _fresh(heads: list[_Head], audit: LogAudit, reader: Reader, verdict: Verdict) -> Level:
    if reader.max_age_s is None:
        return Level("fresh", NOT_ASKED)
    now_s = time.time() if reader.now_s is None else reader.now_s
    policy = reader.policy
    by_witnesses = policy is not None and bool(policy.witnesses)
    if policy is not None and by_witnesses:
        age_s, whose = _quorum_age_s(heads, policy, now_s), "by its witnesses' clocks"
    else:
        age_s, whose = _entry_age_s(audit, now_s), "by the writer's own clock: no witness says so"
    if age_s is not None and age_s <= reader.max_age_s:
        return Level("fresh", OK, f"{max(age_s, 0.0):.0f} s old {whose}")
    found = "nothing that says when" if age_s is None else f"{age_s:.0f} s {whose}"
    verdict.problems.append(
        Problem(
            "not_fresh",
            layout.LOG_HEAD,
            f"{layout.LOG_HEAD}: expected to be at most {reader.max_age_s:.0f} s old, found {found}; nobody writes, or "
            "somebody keeps the newest entries from you",
        )
    )
    return Level("fresh", FAILED, found)


def _quorum_age_s(heads: list[_Head], policy: Policy, now_s: float) -> float | None:
    """How long ago the newest quorum was complete; None if there is none, or its time lies in the future."""
    ages = []
    for head in heads:
        times = {vkey: at for vkey, at in _cosigners(head, policy).items() if at <= now_s + CLOCK_TOLERANCE_S}
        # The quorum that the newest cosignatures make is as old as the oldest that it needs.
        for at in sorted(set(times.values()), reverse=True):
            if policy.witnessed({vkey for vkey in times if times[vkey] >= at}).met:
                ages.append(now_s - at)
                break
    return min(ages, default=None)


def _entry_age_s(audit: LogAudit, now_s: float) -> float | None:
    if not audit.entries:
        return None
    age_s = now_s - datetime.fromisoformat(audit.entries[-1].common.created).timestamp()
    return None if age_s < -CLOCK_TOLERANCE_S else age_s
