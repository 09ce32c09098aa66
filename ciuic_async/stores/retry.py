"""Trying again at a place that answers over a network: bounded by time, with pauses that grow and differ.

A create whose answer was lost is judged by what the place then holds: the same bytes: it was the own write.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from ciuic_async.errors import CommitConflictError, IntegrityError, NotFoundError, StoreError

TRANSIENT = frozenset({"unreachable", "throttled", "server_error", "bad_answer"})
"""Kinds of a ``StoreError`` that may be gone a moment later."""

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 5.0


class Patience:
    """The time that one call may take with all its tries. Belongs to one thread."""

    def __init__(self, limit_s: float) -> None:
        self._deadline_s = time.monotonic() + limit_s
        self._pause_s = FIRST_PAUSE_S

    def pause(self) -> bool:
        """Wait a while before the next try; False: the time is up, and nothing was waited."""
        wait_s = random.uniform(0.5, 1.0) * self._pause_s  # so that many writers do not come back at once
        if time.monotonic() + wait_s > self._deadline_s:
            return False
        time.sleep(wait_s)
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        return True


def create_once(
    name: str, data: bytes, create: Callable[[], None], read: Callable[[], bytes], patience: Patience
) -> None:
    """Create ``name``; after anything but success the place itself is asked who has it.

    Args:
        create: one try; raises CommitConflictError, which a server may also say when nobody has the name.
        read: what the name holds, at most as many bytes as ``data``; raises as ``Store.read``.

    Raises:
        CommitConflictError: the name holds other bytes.
        StoreError: the place failed; whether it is there is not known where its kind is transient.
    """
    while True:
        try:
            create()
            return
        except CommitConflictError as error:
            failure: CommitConflictError | StoreError = error
        except StoreError as error:
            if error.kind not in TRANSIENT:
                raise
            failure = error
        try:
            if read() == data:
                return
            taken = True
        except NotFoundError:
            taken = False
        except IntegrityError:  # more bytes than these
            taken = True
        except StoreError as error:
            if error.kind not in TRANSIENT or not patience.pause():
                raise
            continue
        if taken:
            raise CommitConflictError(f"{name}: exists already", where=name)
        if not patience.pause():
            break
    if isinstance(failure, StoreError):
        raise failure
    raise StoreError(
        f"{name}: the place says again and again that it exists, and it is not there: try later, with fewer writers",
        kind="throttled",
        where=name,
    )
