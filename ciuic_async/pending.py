"""A snapshot on its way, as the training loop sees it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ciuic_async.errors import CiuicError, SaveFailedError
from ciuic_async.events import logger

if TYPE_CHECKING:
    from ciuic_async.chain import Snapshot

STAGING, STAGED, DURABLE, FAILED = "staging", "staged", "durable", "failed"


class PendingSnapshot:
    """One snapshot between ``save`` and durable. Any thread may ask and wait.

    Attributes:
        step: the captured step. It changes when training changed the state while it was copied in the background: the
            snapshot is then taken again at the next step.
        phase: ``"staging"``, ``"staged"`` (training may change its tensors), ``"durable"`` or ``"failed"``.
    """

    def __init__(self, step: int | None) -> None:
        self.step = step
        self.phase = STAGING
        self._changed = threading.Condition()
        self._snapshot: Snapshot | None = None
        self._error: CiuicError | None = None
        self._callbacks: list[Callable[[PendingSnapshot], None]] = []
        self._error_seen = False
        self.drive: Callable[[bool], None] | None = None
        """Set by the engine as long as the snapshot may need the training thread to get on. Called by whoever waits,
        with whether it waits for ever."""

    def wait_staged(self, timeout_s: float | None = None) -> None:
        """Wait until training may change the captured tensors.

        With ``staging="overlap"`` the optimizer waits by itself; on the training thread this finishes the copy. Another
        thread waits until training comes to its next optimizer step or its next call of the checkpointer.

        Raises:
            SaveFailedError: it failed; ``__cause__`` says why.
            TimeoutError: not staged within ``timeout_s`` seconds.
        """
        self._wait((STAGED, DURABLE, FAILED), timeout_s)

    def wait_durable(self, timeout_s: float | None = None) -> Snapshot:
        """Wait until the snapshot survives the loss of power.

        Raises:
            SaveFailedError: it failed; ``__cause__`` says why. Earlier snapshots are intact.
            TimeoutError: not durable within ``timeout_s`` seconds; it goes on.
        """
        self._wait((DURABLE, FAILED), timeout_s)
        assert self._snapshot is not None
        return self._snapshot

    def wait_replicated(self, timeout_s: float | None = None) -> Snapshot:
        """Wait until the snapshot is durable, and then until it is in the chain's mirror too.

        Raises:
            As ``wait_durable`` and ``Snapshot.wait_replicated``; ``timeout_s`` is for both together.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        snapshot = self.wait_durable(timeout_s)
        snapshot.wait_replicated(None if deadline_s is None else max(deadline_s - time.monotonic(), 0.0))
        return snapshot

    def add_done_callback(self, callback: Callable[[PendingSnapshot], None]) -> None:
        """Call ``callback(self)`` when it is durable or failed: at once if it is, else on the writer thread.

        What a callback raises is logged and dropped.
        """
        with self._changed:
            if self.phase not in (DURABLE, FAILED):
                self._callbacks.append(callback)
                return
        _call(callback, self)

    def _wait(self, phases: tuple[str, ...], timeout_s: float | None) -> None:
        drive = self.drive
        if drive is not None:
            drive(timeout_s is None)
        with self._changed:
            if not self._changed.wait_for(lambda: self.phase in phases, timeout_s):
                raise TimeoutError(f"snapshot of step {self.step} is still {self.phase} after {timeout_s} s")
            if self.phase == FAILED:
                self._error_seen = True
                raise self._failure()

    # --- for the engine -----------------------------------------------------------------------------------------------

    @property
    def error(self) -> CiuicError | None:
        """Why it failed; None if it did not."""
        return self._error

    def take_unseen_error(self) -> SaveFailedError | None:
        """The failure, if nobody has seen it yet; it counts as seen from then on."""
        with self._changed:
            if self.phase != FAILED or self._error_seen:
                return None
            self._error_seen = True
            return self._failure()

    def staged(self) -> None:
        with self._changed:
            if self.phase == STAGING:
                self.phase = STAGED
                self._changed.notify_all()

    def durable(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._finish(DURABLE)

    def failed(self, error: CiuicError, *, seen: bool = False) -> None:
        """The first failure counts: what follows from it is no news."""
        with self._changed:
            if self._error is None and self.phase != DURABLE:
                self._error = error
                self._error_seen = seen
        self._finish(FAILED)

    def _finish(self, phase: str) -> None:
        with self._changed:
            if self.phase in (DURABLE, FAILED):
                return
            self.phase = phase
            callbacks, self._callbacks = self._callbacks, []
            self._changed.notify_all()
        for callback in callbacks:
            _call(callback, self)

    def _failure(self) -> SaveFailedError:
        assert self._error is not None
        failure = SaveFailedError(
            f"the snapshot of step {self.step} did not become durable: {self._error}",
            kind=self._error.kind,
            where=self._error.where,
        )
        failure.__cause__ = self._error
        return failure

    def __repr__(self) -> str:
        return f"<PendingSnapshot step={self.step} {self.phase}>"


def _call(callback: Callable[[PendingSnapshot], None], pending: PendingSnapshot) -> None:
    try:
        callback(pending)
    except BaseException:  # also SystemExit: it would end the writer thread, and no one else
        logger.exception("a done callback failed for %r", pending)
