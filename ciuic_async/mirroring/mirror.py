"""A mirror at work: the thread ``ciuic-mirror`` copies behind the commits. Nothing here ever reaches a training loop.

"Durable" is said of the chain, "replicated" of the mirror; neither word stands for the other.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

from ciuic_async.errors import CiuicError, InternalError, SaveFailedError, StoreError, UsageError
from ciuic_async.events import logger
from ciuic_async.format.chain_file import ChainFile
from ciuic_async.format.entry import SnapshotEntry
from ciuic_async.mirroring.copier import Copier
from ciuic_async.mirroring.home import Homing
from ciuic_async.mirroring.presence import Presence
from ciuic_async.pipeline.persist import lower_priority
from ciuic_async.stores.base import Store
from ciuic_async.stores.fallback import FallbackStore
from ciuic_async.stores.local import LocalStore
from ciuic_async.transparency.keys import SigningKey
from ciuic_async.transparency.log import Log

CLOSE_S = 30.0
"""How long ``close`` waits for what is not replicated yet; then it says what that is."""
RETRY_S = 1.0
"""After the first failure; doubled by each further one, with jitter."""
RETRY_MAX_S = 60.0
LOOK_AGAIN_S = 60.0
"""Cosignatures come when no entry does, and other processes write to the chain."""
_JOIN_S = 1.0
_KEPT = 10_000
"""Snapshots of which it is remembered when they were replicated; runs are long."""
_FINAL = ("mirror_fork", "mirror_ahead", "mirror_of_another")

_random = random.SystemRandom()  # not the module's own generator: its state belongs to training


@dataclass(frozen=True, slots=True)
class MirrorStatus:
    """How far a mirror is.

    Attributes:
        url: where it is.
        log_size: entries of the chain.
        replicated_size: of these, how many are in the mirror; None: it was not asked yet.
        error: why the last attempt came to nothing; None after a success.
        stopped: nothing more is copied: the mirror holds another history, or another chain.
        lacking: living snapshots whose data is damaged here and not in the mirror, and why.
    """

    url: str
    log_size: int
    replicated_size: int | None
    error: str | None
    stopped: bool
    lacking: dict[str, str]


class _ClosedError(Exception):
    """The time that ``close`` gives is over."""


class _WantedError(Exception):
    """There is something more urgent to do."""


def paired(local: Store, mirror: Store) -> FallbackStore:
    """A chain's place and its mirror's as one store.

    Raises:
        UsageError: kind ``mirror_is_chain``; they are one place.
    """
    places = [os.path.realpath(one.url) if isinstance(one, LocalStore) else one.url for one in (local, mirror)]
    if places[0] == places[1]:
        raise UsageError(f"{mirror.url}: is the chain itself, and no mirror of it", kind="mirror_is_chain")
    return FallbackStore(local, mirror)


class Mirror:
    """The mirror of one chain. Any thread may call; ``close`` ends the thread, which begins with the first ``notice``.

    Args:
        pair: the chain's store and the mirror's.
        chain_file: the bytes of ``ciuic.json``.
        key: as for ``Copier``; called on the thread.
    """

    def __init__(self, pair: FallbackStore, chain_file: bytes, key: Callable[[], SigningKey | None]) -> None:
        self._url = pair.there.url
        self._copier = Copier(
            pair.here, pair.there, chain_file, key=key, pause=self._check_open, arrived=self._snapshot_arrived
        )
        origin = ChainFile.decode(chain_file).origin
        self._homing = Homing(
            pair, Log(pair.here, origin, quiet=True), pause=self._check_open, between=self._check_idle
        )
        self._presence = Presence(pair, origin)
        self._owner_pid = os.getpid()
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()
        # Guarded by _changed.
        self._wanted = False
        self._closing_s: float | None = None
        self._ended = False
        self._last_turn = False
        self._turn = 0
        self._home = 0
        """The last turn after which everything was here."""
        self._failures = 0
        self._failed_turn = 0
        self._error: CiuicError | None = None
        self._unseen: CiuicError | None = None
        self._said = ""
        self._stopped = False
        self._log_size = 0
        self._size: int | None = None
        self._lacking: dict[str, str] = {}
        self._noticed: deque[tuple[int, float]] = deque(maxlen=_KEPT)
        self._seconds: OrderedDict[str, float | None] = OrderedDict()
        """Snapshots that are replicated, and how long after they were durable; None: it is not known."""

    # --- for the engine -----------------------------------------------------------------------------------------------

    def notice(self, size: int) -> None:
        """The chain has ``size`` entries now. Waits for nothing but a thread's start, and never raises."""
        if os.getpid() != self._owner_pid:
            return  # a forked child: the mirror belongs to its parent
        with self._changed:
            if self._closing_s is not None:
                return
            if size > self._log_size:
                self._log_size = size
                self._noticed.append((size, time.monotonic()))
            self._wanted = True
            self._start()
            self._changed.notify_all()

    def wait_all(self, size: int, timeout_s: float | None = None) -> None:
        """Wait until ``size`` entries are in the mirror, and all data of the living snapshots among them.

        Raises:
            SaveFailedError: kind ``not_replicated``; data of some was damaged here before it was copied.
            As ``wait``.
        """
        self.wait(size, timeout_s)
        with self._changed:
            lacking = dict(self._lacking)
        for snapshot, why in lacking.items():
            raise SaveFailedError(
                f"{len(lacking)} snapshots are not replicated to {self._url}; {snapshot}: {why}",
                kind="not_replicated",
                where=self._url,
            )

    def flush(self, timeout_s: float = CLOSE_S) -> None:
        """Let the mirror have what there is, if copying works and takes no longer; else the log says what it lacks."""
        if os.getpid() != self._owner_pid:
            return
        try:
            self.wait(self._log_size, timeout_s, patient=False)
        except (CiuicError, TimeoutError) as error:
            self._say_behind(error)

    def wait(self, size: int, timeout_s: float | None = None, *, patient: bool | None = None) -> None:
        """Wait until ``size`` entries are in the mirror.

        Args:
            timeout_s: None: as long as copying works.
            patient: go on waiting when an attempt fails; default: where there is a ``timeout_s``.

        Raises:
            TimeoutError: not within ``timeout_s`` seconds; copying goes on.
            StoreError: the mirror cannot be written now (without ``timeout_s``); it is tried again behind.
            IntegrityError, UsageError: nothing more is copied (see ``Copier.turn``).
        """
        patient = timeout_s is not None if patient is None else patient
        with self._changed:
            turn = self._turn + 1  # what fails before it may be over by now
        self.notice(size)

        def settled() -> bool:
            if (self._size or 0) >= size or self._stopped or self._ended or self._thread is None:
                return True
            return not patient and self._error is not None and self._failed_turn >= turn

        with self._changed:
            in_time = self._changed.wait_for(settled, timeout_s)
            if (self._size or 0) >= size:
                return
            if in_time and self._error is not None:
                self._unseen = None
                raise type(self._error)(str(self._error), kind=self._error.kind, where=self._error.where)
            why = f": {self._error}" if self._error is not None else ""
            if in_time:
                raise StoreError(f"{self._url}: the mirror was closed{why}", kind="closed", where=self._url)
            raise TimeoutError(
                f"{self._url}: {self._size or 0} of {size} entries are replicated after {timeout_s} s{why}"
            )

    def wait_home(self, timeout_s: float | None = None) -> None:
        """Wait until every segment that a living snapshot needs is in the chain itself, as far as the mirror has it.

        Raises:
            TimeoutError: not within ``timeout_s`` seconds.
            StoreError: the mirror was closed, or stopped.
        """
        with self._changed:
            turn = self._turn + 1
            self._wanted = True
            self._start()
            self._changed.notify_all()
            over = self._changed.wait_for(lambda: self._home >= turn or self._stopped or self._ended, timeout_s)
            if not over:
                raise TimeoutError(f"{self._url}: not all segments are home after {timeout_s} s")
            if self._home < turn:
                raise StoreError(f"{self._url}: not all segments came home: {self._error}", kind="closed")

    def require(self, index: int, entry: SnapshotEntry, timeout_s: float | None = None) -> None:
        """Wait until a snapshot is replicated: its entry, and every byte that it needs.

        Raises:
            SaveFailedError: kind ``not_replicated``; the entry is there, and data of it is not.
            As ``wait``.
        """
        self.wait(index + 1, timeout_s)
        if not self.holds(index, entry):
            with self._changed:
                why = self._lacking.get(entry.snapshot, "it was pruned before, or the mirror lost it")
            raise SaveFailedError(
                f"snapshot {entry.snapshot} is not replicated to {self._url}: {why}",
                kind="not_replicated",
                where=self._url,
            )

    def holds(self, index: int, entry: SnapshotEntry) -> bool:
        """Whether a snapshot is replicated. Unless it was in this process, the mirror is asked; False: or cannot be."""
        if os.getpid() != self._owner_pid:
            return False  # a lock may have been held when this process was forked
        with self._changed:
            if entry.snapshot in self._seconds:
                return True
        try:
            found = self._presence.holds(index, entry)
        except CiuicError as error:
            logger.debug("%s: whether snapshot %s is there is not known: %s", self._url, entry.snapshot, error)
            return False
        if found:
            with self._changed:
                self._remember(entry.snapshot, None)
        return found

    def replicated_s(self, snapshot: str) -> float | None:
        """Seconds from durable to replicated, for a snapshot of this process; else None."""
        with self._changed:
            return self._seconds.get(snapshot)

    def take_problem(self) -> CiuicError | None:
        """What went wrong since it was last asked; the same reason is told once, until copying works again."""
        with self._changed:
            problem, self._unseen = self._unseen, None
            return problem

    def status(self) -> MirrorStatus:
        """How far it is, as this process knows."""
        with self._changed:
            error = None if self._error is None else str(self._error)
            return MirrorStatus(self._url, self._log_size, self._size, error, self._stopped, dict(self._lacking))

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Copy what there is, and bring home what is not here, if that takes no longer than ``timeout_s``; then end the
        thread. Idempotent.

        What is not replicated by then is said in the log, and copied when the chain is opened again.
        """
        if os.getpid() != self._owner_pid:
            return
        thread = self._thread
        self.stop(timeout_s)
        if thread is None or thread is threading.current_thread():
            return
        thread.join(timeout_s + _JOIN_S)
        self._thread = None
        if self._behind():
            self._say_behind(self._error)

    def stop(self, timeout_s: float = 0.0) -> None:
        """As ``close``, without waiting: the thread ends by itself."""
        if os.getpid() != self._owner_pid:
            return
        with self._changed:
            if self._closing_s is None:
                self._closing_s = time.monotonic() + timeout_s
            self._changed.notify_all()

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._thread is not None or self._stopped:
            return
        # A daemon: an interpreter that ends waits for other threads before it calls what would close this one.
        thread = threading.Thread(target=self._run, name="ciuic-mirror", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            self._failed(StoreError(f"{self._url}: the system gives no thread: {error}", kind="no_thread"))
            return
        self._thread = thread

    def _run(self) -> None:
        lower_priority()
        try:
            while self._next():
                try:
                    self._copier.turn()
                    self._succeeded()
                    self._homing.turn()
                    self._came_home()
                except _ClosedError:
                    return
                except _WantedError:
                    pass  # new entries come before old segments
                except CiuicError as error:
                    self._failed(error)
                except Exception as error:  # whatever it is, training does not feel it
                    failure = InternalError(f"{self._url}: copying failed: {type(error).__name__}: {error}")
                    failure.__cause__ = error
                    self._failed(failure)
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _next(self) -> bool:
        """Wait for the next turn; False: it was the last one."""
        with self._changed:
            if self._stopped or self._last_turn:
                return False
            idle = not self._behind() and self._home == self._turn
            if self._closing_s is not None and self._turn and (self._failures or idle):
                return False
            pause_s = LOOK_AGAIN_S
            if self._failures:
                limit_s = min(RETRY_MAX_S, RETRY_S * 2.0 ** min(self._failures - 1, 10))
                pause_s = _random.uniform(limit_s / 2, limit_s)
                self._changed.wait_for(lambda: self._closing_s is not None, pause_s)
            else:
                self._changed.wait_for(lambda: self._wanted or self._closing_s is not None, pause_s)
            self._wanted = False
            self._turn += 1
            self._last_turn = self._closing_s is not None
            return True

    def _say_behind(self, error: Exception | None) -> None:
        why = "" if error is None else f": {error}"
        message = "%s: %d of %d entries are replicated; the others are durable in the chain alone%s"
        logger.warning(message, self._url, self._size or 0, self._log_size, why)

    def _behind(self) -> bool:
        return (self._size or 0) < self._log_size

    def _came_home(self) -> None:
        with self._changed:
            self._home = self._turn
            self._changed.notify_all()

    def _check_open(self) -> None:
        closing_s = self._closing_s
        if closing_s is not None and time.monotonic() >= closing_s:
            raise _ClosedError

    def _check_idle(self) -> None:
        self._check_open()
        if self._wanted and self._closing_s is None:
            raise _WantedError

    def _succeeded(self) -> None:
        self._tell(None)

    def _failed(self, error: CiuicError) -> None:
        if str(error) != self._said:
            logger.error("%s: what is durable in the chain is not replicated now: %s", self._url, error)
        self._tell(error)

    def _tell(self, error: CiuicError | None) -> None:
        with self._changed:
            self._error = error
            self._failed_turn = self._turn if error is not None else 0
            self._failures = self._failures + 1 if error is not None else 0
            self._stopped = error is not None and error.kind in _FINAL
            if error is None:
                self._said = ""
                self._size = self._copier.replicated_size
            elif str(error) != self._said:
                self._said = str(error)
                self._unseen = error
            self._lacking = dict(self._copier.lacking)
            self._changed.notify_all()

    def _snapshot_arrived(self, index: int, entry: SnapshotEntry) -> None:
        with self._changed:
            durable_s = next((at_s for size, at_s in self._noticed if size > index), None)
            while self._noticed and self._noticed[0][0] <= index:
                self._noticed.popleft()
            seconds = None if durable_s is None else time.monotonic() - durable_s
            self._remember(entry.snapshot, seconds)
            self._size = max(self._size or 0, index + 1)
            self._lacking = dict(self._copier.lacking)
            self._changed.notify_all()
        logger.info(
            "snapshot %s replicated to %s: step %s%s",
            entry.snapshot,
            self._url,
            entry.step,
            "" if seconds is None else f", {seconds:.2f} s after it was durable",
        )

    def _remember(self, snapshot: str, seconds: float | None) -> None:
        self._seconds[snapshot] = seconds
        while len(self._seconds) > _KEPT:
            self._seconds.popitem(last=False)
