"""What follows from a mirror's slots: tiles and log head; and what witnesses and authorities signed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress

from ciuic_async.errors import CommitConflictError, IntegrityError, NotFoundError
from ciuic_async.format import layout
from ciuic_async.stores.base import Store
from ciuic_async.transparency import note, policy
from ciuic_async.transparency.keys import SigningKey
from ciuic_async.transparency.log import Log
from ciuic_async.transparency.receipt import LIMIT_BYTES as RECEIPT_LIMIT_BYTES


def publish_derived(here: Log, there: Log, local: Store, mirror: Store, key: Callable[[], SigningKey | None]) -> None:
    """Give the mirror tiles and the log head; or, with the two places exchanged, the chain what comes home.

    The head is the chain's own file, cosignatures included, where it is of the size that the mirror has. For a copy
    that is under way the key here signs one, if the log knows it: the one head that the log can have at that size. Else
    the head stays behind, as it does when a writer dies.
    """
    data = here.head_note
    if data is not None and _size(data, here.origin) == len(there):
        there.publish_derived(data)
        if there.head_note != data:
            mirror.overwrite(layout.LOG_HEAD, data)
    else:
        signer = key()
        if signer is not None and signer.key_id(here.origin) in there.known_keys():
            there.publish_derived(signer)
    if len(there) == len(here):
        for name, limit_bytes in _evidence(local, mirror):
            _send_evidence(local, mirror, name, limit_bytes)


def _size(data: bytes, origin: str) -> int:
    return note.parse_head(note.parse(data, layout.LOG_HEAD).text, origin, layout.LOG_HEAD)[0]


def _evidence(local: Store, mirror: Store) -> Iterator[tuple[str, int]]:
    """Names and limits of what others signed, as far as the mirror has it not, or older than here."""
    yield layout.POLICY, policy.LIMIT_BYTES
    yield layout.WITNESSED, note.LIMIT_BYTES
    receipts = list(local.list(layout.RECEIPTS))
    there = {file.name: file.size_bytes for file in mirror.list(layout.RECEIPTS)} if receipts else {}
    for file in receipts:
        if layout.is_known(file.name) and there.get(file.name) != file.size_bytes:
            yield file.name, RECEIPT_LIMIT_BYTES


def _send_evidence(local: Store, mirror: Store, name: str, limit_bytes: int) -> None:
    """One file that can be made again; what is damaged or too large here is no loss, and is left out."""
    try:
        data = local.read(name, limit_bytes)
    except (NotFoundError, IntegrityError):
        return
    with suppress(CommitConflictError):
        try:
            if mirror.read(name, limit_bytes) != data:
                mirror.overwrite(name, data)
        except NotFoundError:
            mirror.create(name, data)
        except IntegrityError:
            mirror.overwrite(name, data)
