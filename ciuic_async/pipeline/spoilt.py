"""What came over a network and does not hold is read again: it may have been spoilt on its way, not where it lies.

Without this one bad answer would look like damage, and ``restore("latest")`` would go back to an older snapshot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ciuic_async.errors import IntegrityError
from ciuic_async.events import logger
from ciuic_async.stores.base import Store
from ciuic_async.stores.fallback import FallbackStore
from ciuic_async.stores.local import LocalStore

T = TypeVar("T")

TRIES = 3
"""Of a snapshot. Damage costs as many reads up to where it lies; an answer that is spoilt each time is damage."""


def read_again(store: Store, what: str, read: Callable[[], T]) -> T:
    """What ``read`` returns; where the store is not a local disk, which would say the same again, tried three times.

    Raises:
        IntegrityError: what the last try found.
    """
    for attempt in range(1, TRIES):
        if _is_local(store):
            break
        try:
            return read()
        except IntegrityError as error:
            logger.warning("%s did not come as it was written (try %d of %d): %s", what, attempt, TRIES, error)
    return read()


def _is_local(store: Store) -> bool:
    if isinstance(store, FallbackStore):
        return _is_local(store.here) and _is_local(store.there)
    return isinstance(store, LocalStore)
