"""The writer's side of witnessing: asks witnesses to cosign new log heads, and keeps what they say.

One thread, ``ciuic-witness``, that decides, and one for each witness that talks to it (``ciuic-witness-0``, ...), begun
with the first ``notice``. They never hold the log's lock while they talk and never delay a commit: a witness that is
dead, slow, lies or disagrees costs evidence, never a snapshot.

A commit is an entry in a slot first, and a signed head after that: whoever dies in between leaves a log that is longer
than its head says. Here is looked again then, and what was left behind is signed where there is a key for it.

A head stays the *target* until a quorum has signed it or nobody is left to ask; then the newest is the next. So however
fast heads come and however slow witnesses are, there are heads that enough of them have signed.

What is collected goes to ``log/checkpoint`` (while it is that head), to ``log/witnessed`` (the newest head with a
quorum) and into receipts. All three are derived: losing them loses no history.
"""

from __future__ import annotations

import logging
import os
import queue
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ciuic_async.errors import CiuicError, IntegrityError, NotFoundError, UsageError
from ciuic_async.format import layout
from ciuic_async.stores.base import Store
from ciuic_async.transparency import note, proof
from ciuic_async.transparency.asking import WitnessConnection
from ciuic_async.transparency.dialogue import Dialogue, Head, Outcome
from ciuic_async.transparency.log import Log
from ciuic_async.transparency.note import Vkey
from ciuic_async.transparency.receipts import Receipts
from ciuic_async.transparency.slots import LogHead

_HEADS_KEPT = 8
"""Heads for which cosignatures are still collected when newer ones are asked for."""
_JOIN_S = 2.0
_PATIENCE = 3
"""Looks in a row that find entries without a signed head before anybody is told."""

_logger = logging.getLogger("ciuic_async")
_random = random.SystemRandom()  # not the module's own generator: its state belongs to training

Quorum = Callable[[set[Vkey]], bool]


@dataclass(frozen=True, slots=True)
class Pace:
    """How long and how often."""

    request_s: float = 10.0
    """For one request to one witness."""
    retry_s: float = 1.0
    """After the first failure; doubled by each further one, with jitter."""
    retry_max_s: float = 60.0
    refresh_s: float | None = None
    """Cosignatures of a head that stays are renewed at this age, so that an idle chain stays fresh."""


@dataclass(frozen=True, slots=True)
class WitnessStatus:
    """What is known of one witness. Times are POSIX seconds.

    Attributes:
        size: of the newest head that it cosigned, as far as this process knows.
        error: why the last request came to nothing; None after a success.
        forked: it refused a head as a fork, and is not asked again.
    """

    name: str
    url: str
    size: int | None
    cosigned_s: int | None
    error: str | None
    asked_s: float | None
    forked: bool


class _Witness:
    """One witness. Its fields belong to the deciding thread, but for the connection and the queue."""

    def __init__(self, name: str, vkey: Vkey, url: str, pace: Pace) -> None:
        if vkey.kind != note.COSIGNATURE:
            raise UsageError(f"{vkey}: no key of a witness (signature type {vkey.kind}, expected 4)", kind="vkey_kind")
        self.name = name
        self.vkey = vkey
        self.connection = WitnessConnection(url, pace.request_s)
        self.jobs: queue.SimpleQueue[tuple[Head, int] | None] = queue.SimpleQueue()
        self.busy: Head | None = None
        self.size: int | None = None
        self.cosigned_s: int | None = None
        self.error: str | None = None
        self.asked_s: float | None = None
        self.failures = 0
        self.next_s = 0.0
        self.signed_s: float | None = None
        """When it last signed for this process, by ``time.monotonic``."""
        self.forked = False


class Cosigner:
    """Collects cosignatures for one chain. Any thread may call; ``close`` ends its threads.

    Args:
        store: where the log lies.
        log: the log; an object of its own, so that proofs made here make no commit wait.
        witnesses: (name, verifier key, URL) of each; those without a URL are not asked and are left out.
        quorum: whether these witnesses are enough.
        evidence: a folder of the user's own where refusals as forks are kept; None keeps none.
        roll_forward: signs the head of entries that a writer who died left without one (``Log.roll_forward``); None:
            they wait for the next writer.
        clock: POSIX seconds.

    Raises:
        UsageError: a key or URL that cannot be a witness's.
    """

    def __init__(
        self,
        store: Store,
        log: Log,
        witnesses: Sequence[tuple[str, Vkey, str]],
        quorum: Quorum,
        *,
        evidence: Path | None = None,
        pace: Pace = Pace(),
        roll_forward: Callable[[Log], None] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._log = log
        self._witnesses = [_Witness(name, vkey, url, pace) for name, vkey, url in witnesses]
        self._known = {(item.vkey.name, item.vkey.key_id): item.vkey for item in self._witnesses}
        self._quorum = quorum
        self._dialogue = Dialogue(log, evidence, clock)
        self._pace = pace
        self._roll_forward = roll_forward
        self._clock = clock
        self._receipts = Receipts(store, log, self._known)
        self._owner_pid = os.getpid()
        self._threads: list[threading.Thread] = []
        self._changed = threading.Condition()
        # Guarded by _changed.
        self._wanted = False
        self._outcomes: list[tuple[_Witness, Outcome]] = []
        self._closing = False
        self._settled = True
        self._witnessed_size = 0
        self._statuses: tuple[WitnessStatus, ...] = ()
        # Of the deciding thread.
        self._heads: OrderedDict[int, Head] = OrderedDict()
        self._newest: Head | None = None
        self._target: Head | None = None
        self._looked = False
        self._failures = 0
        self._behind = 0
        """How often in a row the log was found to be longer than its head says, which was ``_behind_at``."""
        self._behind_at = -1
        self._look_s = float("inf")
        self._said: dict[str, str] = {}
        self._tell_statuses()

    # --- for others ---------------------------------------------------------------------------------------------------

    def notice(self) -> None:
        """There may be a new head. Never waits for anything but a thread's start, and never raises.

        In a process that was forked off nothing happens: the threads, and what they hold, are the other one's.
        """
        if self._is_a_copy():
            return
        with self._changed:
            if self._closing or not self._start():
                return
            self._wanted = True
            self._settled = False
            self._changed.notify_all()

    def wait(self, size: int, timeout_s: float) -> bool:
        """Whether a quorum has signed a head of at least ``size`` entries; so much ``log/witnessed`` holds then."""
        if self._is_a_copy():
            return False
        self.notice()
        with self._changed:
            self._changed.wait_for(lambda: self._witnessed_size >= size or self._closing, timeout_s)
            return self._witnessed_size >= size

    def settle(self, timeout_s: float) -> bool:
        """Wait until all that can be done now is done: each witness signed the newest head or failed to."""
        if self._is_a_copy():
            return True
        with self._changed:
            return self._changed.wait_for(lambda: self._settled or self._closing, timeout_s)

    def status(self) -> tuple[WitnessStatus, ...]:
        """What is known of each witness."""
        return self._statuses

    @property
    def witnessed_size(self) -> int:
        """Of the newest head that has a quorum; 0 if this process knows of none."""
        return self._witnessed_size

    @property
    def problem(self) -> str | None:
        """Why nothing can be collected now, whatever witnesses say; None: nothing is known of."""
        return self._said.get("")

    def close(self, timeout_s: float = 5.0) -> None:
        """Let the newest head be signed if that takes no longer than ``timeout_s``, then end all threads. Idempotent.

        Takes 2 s more at most.

        What is under way after that is cut off; a thread that hangs in a name service ends with the process.
        """
        if self._is_a_copy():
            return
        self.settle(timeout_s)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for witness in self._witnesses:
            witness.jobs.put(None)
        deadline_s = time.monotonic() + _JOIN_S
        for thread in self._threads:
            while thread.is_alive() and time.monotonic() < deadline_s:
                for witness in self._witnesses:
                    witness.connection.close()
                thread.join(0.05)

    def _is_a_copy(self) -> bool:
        return os.getpid() != self._owner_pid

    # --- threads ------------------------------------------------------------------------------------------------------

    def _start(self) -> bool:
        """Start the threads that do not run yet. Whether the deciding one does."""
        targets: list[tuple[str, Callable[[], None]]] = [("ciuic-witness", self._run)]
        targets += [(f"ciuic-witness-{n}", partial(self._talk, item)) for n, item in enumerate(self._witnesses)]
        for name, target in targets[len(self._threads) :]:
            # Daemons: an interpreter that ends waits for other threads before it calls what would close this object.
            thread = threading.Thread(target=target, name=name, daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the next notice tries again; a witness without a thread keeps its job
                if "no thread" not in self._said:
                    self._said["no thread"] = str(error)
                    _logger.warning("%s: not every witness is asked, no thread for it: %s", self._store.url, error)
                break
            self._threads.append(thread)
        return bool(self._threads)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._wanted or self._outcomes, self._pause_s())
                if self._closing:
                    return
                outcomes, self._outcomes = self._outcomes, []
                wanted, self._wanted = self._wanted, False
            try:
                self._turn(outcomes, wanted)
            except Exception as error:  # of the store or the log; whatever it is, training does not feel it
                self._failures += 1
                self._look_s = time.monotonic() + self._backoff_s(self._failures)
                self._say("", f"cosignatures cannot be collected now: {type(error).__name__}: {error}")
                self._tell_statuses(failed=True)

    def _pause_s(self) -> float | None:
        """How long nothing can be due."""
        now_s = time.monotonic()
        due_s = [self._look_s]
        if self._receipts.behind and not self._failures:
            return 0.0
        for witness in self._witnesses:
            if self._wants(witness):
                due_s.append(witness.next_s)
        if self._pace.refresh_s is not None:
            due_s.append(now_s + self._pace.refresh_s / 4)
        first_s = min(due_s)
        return None if first_s == float("inf") else max(0.0, first_s - now_s)

    def _turn(self, outcomes: list[tuple[_Witness, Outcome]], wanted: bool) -> None:
        for witness, outcome in outcomes:
            witness.busy = None
            if outcome.signature is not None:
                outcome.head.cosignatures[witness.vkey] = outcome.signature
        try:
            for head in {id(outcome.head): outcome.head for _, outcome in outcomes}.values():
                self._keep(head)
            looks = wanted or time.monotonic() >= self._look_s or any(outcome.ahead for _, outcome in outcomes)
            if looks:
                self._look_s = float("inf")
                self._look()
        finally:
            for witness, outcome in outcomes:
                self._take(witness, outcome)
        self._choose_target()
        self._ask()
        self._receipts.catch_up()
        if looks:
            self._failures = 0
            if self._behind < _PATIENCE:
                self._said.pop("", None)  # the next time it is news again
        self._tell_statuses()

    def _tell_statuses(self, failed: bool = False) -> None:
        statuses = tuple(
            WitnessStatus(
                item.name, item.connection.url, item.size, item.cosigned_s, item.error, item.asked_s, item.forked
            )
            for item in self._witnesses
        )
        busy = any(item.busy is not None or self._may_ask(item) for item in self._witnesses)
        with self._changed:
            self._statuses = statuses
            later = self._receipts.behind and not failed  # else nobody knows when the place works again
            self._settled = not (busy or self._wanted or self._outcomes or later)
            self._changed.notify_all()

    # --- heads --------------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Find the newest head that the log's keys signed, and who cosigned it already."""
        data = self._read_head()
        if data is None:
            return
        found = self._parse(data)
        known = self._heads.get(found.head.size)
        if known is not None and known.text == found.text:
            known.cosignatures = {**found.cosignatures, **known.cosignatures}
            found = known
        self._heads[found.head.size] = found
        while len(self._heads) > _HEADS_KEPT:
            self._heads.popitem(last=False)
        if not self._looked:
            self._look_back()
            self._looked = True
        for vkey in found.cosignatures:
            self._note_size(vkey, found)
        if self._newest is None or found.head.size >= self._newest.head.size:
            self._newest = found
        self._keep(found)

    def _read_head(self) -> bytes | None:
        """The newest signed head. Where entries are in the log that it does not cover yet, there is another look soon.

        Their writer may be about to sign it. One that is not died, or could not: what nobody signs is signed here.
        """
        size, signed = self._log.refresh().size, self._signed_size()
        if signed < size and self._behind and signed == self._behind_at and self._roll_forward is not None:
            try:
                self._roll_forward(self._log)
            except Exception as error:  # what is signed is worth as much as before
                self._say("", f"entries without a signed head: {type(error).__name__}: {error}")
            size, signed = len(self._log), self._signed_size()
        if signed >= size:
            self._behind = 0
            return self._log.head_note
        self._behind = self._behind + 1 if signed == self._behind_at else 1
        self._behind_at = signed
        self._look_s = time.monotonic() + self._backoff_s(self._behind)
        if self._behind == _PATIENCE:
            self._say("", f"the log has {size} entries and a signed head of {signed}: the next writer signs the rest")
        return self._log.head_note

    def _signed_size(self) -> int:
        data = self._log.head_note
        if data is None:
            return 0
        return note.parse_head(note.parse(data, layout.LOG_HEAD).text, self._log.origin, layout.LOG_HEAD)[0]

    def _look_back(self) -> None:
        """What earlier processes collected: ``log/witnessed``."""
        try:
            data = self._store.read(layout.WITNESSED, note.LIMIT_BYTES)
            last = self._parse(data)
        except (NotFoundError, IntegrityError):
            return
        if not self._is_enough(last):
            return
        whole = self._log.head
        if last.head.size > whole.size:
            _logger.error(
                "%s: witnesses signed %d entries (%s), the log has %d: somebody took the newest away, or restored the "
                "chain from a copy",
                self._store.url,
                last.head.size,
                layout.WITNESSED,
                whole.size,
            )
            return
        try:
            path = self._log.consistency(last.head.size, whole.size)
            proof.check_consistency(last.head.size, whole.size, last.head.root, whole.root, path)
        except IntegrityError:
            _logger.error("%s: %s: signed for another history than this log's", self._store.url, layout.WITNESSED)
            return
        for vkey in last.cosignatures:
            self._note_size(vkey, last)
        self._set_witnessed(last)

    def _parse(self, data: bytes) -> Head:
        """A head with those cosignatures of our witnesses that hold; the log's signatures are not verified here."""
        parsed = note.parse(data, layout.LOG_HEAD)
        head = LogHead(*note.parse_head(parsed.text, self._log.origin, layout.LOG_HEAD))
        by_log = tuple(item for item in parsed.signatures if item.name == self._log.origin)
        result = Head(head, parsed.text, by_log[:8])
        for item in parsed.signatures:
            vkey = self._known.get((item.name, item.key_id))
            if vkey is not None and vkey.verifies(parsed.text, item.signature):
                result.cosignatures[vkey] = item
        return result

    def _is_enough(self, head: Head) -> bool:
        """Whether a quorum signed it. A policy that asks for none does not make an unsigned head a witnessed one."""
        return bool(head.cosignatures) and self._quorum(head.signers)

    def _note_size(self, vkey: Vkey, head: Head) -> None:
        for witness in self._witnesses:
            if witness.vkey == vkey and head.head.size >= (witness.size or 0):
                witness.size = head.head.size
                witness.cosigned_s = note.cosigned_at(head.cosignatures[vkey].signature)

    def _choose_target(self) -> None:
        """The newest head, once the one before has its quorum or nobody is left who may sign it."""
        target = self._target
        if target is None or self._quorum(target.signers) or not any(item.busy is target for item in self._witnesses):
            self._target = self._newest

    def _wants(self, witness: _Witness) -> bool:
        """Whether the target lacks this witness's signature, or a fresh one."""
        target = self._target
        if target is None or target.head.size == 0 or witness.forked or witness.busy is not None:
            return False
        if (witness.size or 0) > target.head.size:
            return False  # it signed a later one, for another writer: it never goes back
        line = target.cosignatures.get(witness.vkey)
        if line is None:
            return True
        refresh_s = self._pace.refresh_s
        if refresh_s is None:
            return False
        if witness.signed_s is not None:  # what this process saw itself counts more than what two clocks say
            since_s = time.monotonic() - witness.signed_s
            if since_s < refresh_s / 4 or since_s >= refresh_s:
                return since_s >= refresh_s
        return self._clock() - note.cosigned_at(line.signature) >= refresh_s

    def _may_ask(self, witness: _Witness) -> bool:
        return self._wants(witness) and time.monotonic() >= witness.next_s

    def _ask(self) -> None:
        for witness in self._witnesses:
            if self._target is not None and self._may_ask(witness):
                witness.busy = self._target
                witness.asked_s = self._clock()
                witness.jobs.put((self._target, min(witness.size or 0, self._target.head.size)))

    # --- outcomes -----------------------------------------------------------------------------------------------------

    def _take(self, witness: _Witness, outcome: Outcome) -> None:
        """Remember what came of asking. Nothing here can fail."""
        if outcome.signature is not None:
            if witness.failures:
                _logger.info("witness %s: cosigns again", witness.name)
            self._said.pop(witness.name, None)
            witness.error, witness.failures, witness.next_s = None, 0, 0.0
            witness.signed_s = time.monotonic()
            self._note_size(witness.vkey, outcome.head)
            return
        if outcome.ahead and self._newest is not None and self._newest.head.size >= outcome.ahead:
            witness.size = outcome.ahead  # for another writer of this log, whose entries are here by now
            return
        witness.error = outcome.error
        witness.failures += 1
        witness.next_s = time.monotonic() + self._backoff_s(witness.failures)
        witness.forked = outcome.forked
        if outcome.forked:
            self._say(witness.name, f"REFUSED AS A FORK: {outcome.error}", logging.ERROR)
        else:
            self._say(witness.name, outcome.error)

    def _keep(self, head: Head) -> None:
        """Write down what was collected for a head."""
        if not head.cosignatures:
            return
        with self._store.lock():
            with suppress(NotFoundError, IntegrityError):  # a damaged one is the next writer's to repair
                self._merge(head)
            if not self._is_enough(head):
                return
            if self._is_news(head):
                self._store.overwrite(layout.WITNESSED, head.cosigned())
        self._set_witnessed(head)

    def _merge(self, head: Head) -> None:
        """Add to ``log/checkpoint``, unless it is another head by now. Under the store's lock."""
        data = self._store.read(layout.LOG_HEAD, note.LIMIT_BYTES)
        parsed = note.parse(data, layout.LOG_HEAD)
        if parsed.text != head.text:
            return
        for vkey, line in self._parse(data).cosignatures.items():  # another process collects too
            if vkey not in head.cosignatures or head.cosignatures[vkey].signature[:8] < line.signature[:8]:
                head.cosignatures[vkey] = line
        ours = {(vkey.name, vkey.key_id): line for vkey, line in head.cosignatures.items()}
        others = [item for item in parsed.signatures if (item.name, item.key_id) not in ours]
        lines = (*others, *ours.values())
        if set(lines) != set(parsed.signatures) and len(lines) <= note.MAX_SIGNATURES:
            self._store.overwrite(layout.LOG_HEAD, note.format_note(parsed.text, lines).encode())

    def _is_news(self, head: Head) -> bool:
        """Whether ``log/witnessed`` would get better: a larger head, or more or newer signatures. Under the lock."""
        try:
            there = self._parse(self._store.read(layout.WITNESSED, note.LIMIT_BYTES))
        except (NotFoundError, IntegrityError):
            return True
        if not self._is_enough(there):
            return True
        if there.head.size != head.head.size:
            return there.head.size < head.head.size
        return there.text != head.text or any(
            vkey not in there.cosignatures or there.cosignatures[vkey].signature[:8] < line.signature[:8]
            for vkey, line in head.cosignatures.items()
        )

    def _set_witnessed(self, head: Head) -> None:
        """A quorum signed this head, and ``log/witnessed`` says so, of this or (by another process) of a later one."""
        self._receipts.cover(head.head.size, head.text, head.cosigned())
        with self._changed:
            self._witnessed_size = max(self._witnessed_size, head.head.size)
            self._changed.notify_all()

    def _backoff_s(self, failures: int) -> float:
        longest_s: float = min(self._pace.retry_max_s, self._pace.retry_s * 2 ** min(failures - 1, 20))
        return _random.uniform(longest_s / 2, longest_s)

    def _say(self, who: str, message: str, level: int = logging.WARNING) -> None:
        """Once, until something else is to be said of this witness."""
        if self._said.get(who) != message:
            self._said[who] = message
            _logger.log(level, "%s: %s%s", self._store.url, f"witness {who}: " if who else "", message)

    # --- talking to one witness, on its own thread --------------------------------------------------------------------

    def _talk(self, witness: _Witness) -> None:
        while (job := witness.jobs.get()) is not None:
            head, old_size = job
            try:
                outcome = self._dialogue.ask(witness.connection, witness.vkey, head, old_size)
            except CiuicError as error:
                outcome = Outcome(head, error=str(error))
            except Exception as error:
                outcome = Outcome(head, error=f"{type(error).__name__}: {error}")
            with self._changed:
                self._outcomes.append((witness, outcome))
                self._changed.notify_all()
