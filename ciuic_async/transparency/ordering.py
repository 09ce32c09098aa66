"""Where slots are claimed: who writes the next entry. Order only; whom to trust is another question (policy, pins).

The primitive is one: ``claim`` a name that nobody has, or learn who has it. After any error the slot itself is looked
at.

A *store* that creates a name once orders writers by itself. *etcd* orders them for stores that cannot: a slot is
claimed there first and then copied into the store, and only then acknowledged, so that readers need no etcd. A writer
that dies in between leaves a slot that is in etcd alone: other writers meet it, copy it and go on behind it. What the
store holds is the truth from then on: a lost etcd loses nothing that was acknowledged.
"""

from __future__ import annotations

import logging
import os
import ssl
import threading
import time
from typing import Protocol
from urllib.parse import parse_qsl, unquote, urlsplit

from ciuic_async.errors import CommitConflictError, IntegrityError, NotFoundError, StoreError, UsageError
from ciuic_async.stores.base import Store
from ciuic_async.transparency import slots
from ciuic_async.transparency.etcd import VALUE_LIMIT_BYTES, Etcd

PASSWORD_ENVIRONMENT = "CIUIC_ETCD_PASSWORD"
_READ_AGAIN_S = 10.0
"""How long readers leave an etcd alone that did not answer."""

_logger = logging.getLogger("ciuic_async")


class Ordering(Protocol):
    """Decides who has a slot. Any thread may call."""

    @property
    def orders_writers(self) -> bool:
        """Whether ``claim`` fails for the second of two racing writers; without this a chain has one writer.

        Asked by writers only: a store may have to try it.
        """

    def read(self, name: str) -> bytes | None:
        """What the slot holds, unverified; None where nobody is known to have it. Writes nothing."""

    def claim(self, name: str, content: bytes) -> bytes:
        """Take the slot if nobody has it.

        Returns:
            What the slot holds now: ``content`` itself means won, and durable in the store. Empty where another has it
            and it cannot be read yet.

        Raises:
            StoreError: the outcome is unknown unless the place refused at once; ``read`` tells later.
            UsageError: kind ``slot_too_large``; nothing was claimed.
        """

    def settle(self, name: str, content: bytes) -> None:
        """Make a slot that ``read`` gave, verified since, durable in the store. Writers do so before they build on it.

        Raises:
            StoreError: the place failed.
        """


class StoreOrdering:
    """By the create-once of the store that holds the chain: a local folder, an object store with conditional puts.

    A store without it is good for one writer; the log refuses a second.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    @property
    def orders_writers(self) -> bool:
        return self._store.capabilities.orders_writers

    def read(self, name: str) -> bytes | None:
        try:
            return self._store.read(name, slots.LIMIT_BYTES)
        except NotFoundError:
            return None

    def claim(self, name: str, content: bytes) -> bytes:
        """A create whose answer was lost is judged by what the slot holds.

        Not so one whose fsync failed: what is read back may be gone after a loss of power.
        """
        failure: StoreError | None = None
        try:
            self._store.create(name, content)
            return content
        except CommitConflictError:
            pass
        except StoreError as error:
            if error.kind == "fsync_failed":
                raise
            failure = error
        try:
            return self._store.read(name, slots.LIMIT_BYTES)
        except (NotFoundError, StoreError):
            if failure is not None:
                raise failure from None
            return b""  # taken, yet not there: another writer's create is under way
        except IntegrityError:
            return b""  # not ours; refresh will say what it is

    def settle(self, name: str, content: bytes) -> None:
        """Nothing to do: it was read from the store."""


class EtcdOrdering:
    """By an etcd cluster, for stores that cannot create a name once; for all writers of a chain, or for none.

    Args:
        store: holds the chain, and the copies of the slots.
        etcd: the cluster.
        prefix: of the keys: ``<prefix>/<slot's name>``; the chain's own, so it ends in its origin.
        read_timeout_s: how long reading waits for etcd.
    """

    orders_writers = True

    def __init__(self, store: Store, etcd: Etcd, prefix: str, *, read_timeout_s: float = 3.0) -> None:
        self._copies = StoreOrdering(store)
        self._etcd = etcd
        self._prefix = prefix
        self._read_timeout_s = read_timeout_s
        self._mutex = threading.Lock()
        self._silent_until_s = 0.0

    def read(self, name: str) -> bytes | None:
        """The store's copy or, where there is none, what etcd holds.

        An etcd that does not answer is no error: what it alone knows was never acknowledged.
        """
        found = self._copies.read(name)
        if found is not None or self._is_silent():
            return found
        try:
            return self._etcd.get(self._key(name), timeout_s=self._read_timeout_s)
        except StoreError as error:
            with self._mutex:
                self._silent_until_s = time.monotonic() + _READ_AGAIN_S
            _logger.warning("slots that are not in the store yet cannot be seen: %s", error)
            return None

    def claim(self, name: str, content: bytes) -> bytes:
        if len(content) > VALUE_LIMIT_BYTES:
            raise UsageError(
                f"{name}: entries of {len(content)} bytes, at most {VALUE_LIMIT_BYTES} fit into one value of etcd; "
                "append fewer at once",
                kind="slot_too_large",
                where=name,
            )
        holds = self._etcd.create(self._key(name), content)
        with self._mutex:
            self._silent_until_s = 0.0
        return self._copy(name, content) if holds == content else holds

    def settle(self, name: str, content: bytes) -> None:
        self._copy(name, content)

    def _copy(self, name: str, content: bytes) -> bytes:
        """Bring a slot that etcd gave away into the store; what the store then holds."""
        try:
            found = self._copies.claim(name, content)
        except StoreError as error:
            # Not the error's own kind: a full disk would say that nothing was claimed.
            raise StoreError(
                f"{name}: claimed in etcd, but its copy could not be written: {error}. The entries are not "
                "acknowledged; they become part of the chain as soon as a writer can write the copy",
                kind="slot_not_copied",
                where=name,
            ) from error
        if not found:
            raise StoreError(f"{name}: is in the store and cannot be read there", kind="slot_not_copied", where=name)
        if found != content:
            _logger.warning(
                "%s: the store holds another slot than etcd: a writer goes past etcd, or etcd lost its data. "
                "The store's counts; let all writers of the chain use one ordering",
                name,
            )
        return found

    def _is_silent(self) -> bool:
        with self._mutex:
            return time.monotonic() < self._silent_until_s

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}"


def parse(text: str, store: Store, origin: str) -> Ordering:
    """What ``ordering=`` says.

    Args:
        text: ``local``, ``object-store``, or ``etcd://[user[:password]@]host:port,host:port/prefix``; a password that
            is not there is taken from ``CIUIC_ETCD_PASSWORD``. ``etcds://`` is the same over TLS; ``?cacert=FILE``
            names the roots, ``cert=FILE&key=FILE`` a client's certificate.
        origin: the chain's, which keeps the keys of several chains apart.

    Raises:
        UsageError: kind ``bad_ordering``; nothing is contacted.
    """
    if text in ("local", "object-store"):
        return StoreOrdering(store)
    try:
        parts = urlsplit(text)
        options = dict(parse_qsl(parts.query, strict_parsing=True)) if parts.query else {}
    except ValueError:
        raise _bad_ordering() from None
    user_part, _, hosts = parts.netloc.rpartition("@")
    if parts.scheme not in ("etcd", "etcds") or not hosts or options.keys() - {"cacert", "cert", "key"}:
        raise _bad_ordering()
    if options and parts.scheme == "etcd":
        raise UsageError("certificates need etcds://, the ordering says etcd://", kind="bad_ordering")
    user, _, password = user_part.partition(":")
    scheme = "https" if parts.scheme == "etcds" else "http"
    tls = _tls(options) if scheme == "https" else None
    try:
        etcd = Etcd(
            [f"{scheme}://{host}" for host in hosts.split(",")],
            user=unquote(user) or None,
            password=unquote(password) or os.environ.get(PASSWORD_ENVIRONMENT),
            tls=tls,
        )
    except UsageError:
        raise _bad_ordering() from None
    folder = unquote(parts.path).strip("/") or "ciuic"
    return EtcdOrdering(store, etcd, f"{folder}/{origin}")


def _tls(options: dict[str, str]) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=options.get("cacert"))
        if "cert" in options:
            context.load_cert_chain(options["cert"], options.get("key"))
    except OSError as error:  # also what is no certificate
        raise UsageError(f"the certificates for etcd cannot be used: {error}", kind="bad_ordering") from error
    return context


def _bad_ordering() -> UsageError:
    # Not repeated: it may hold a password.
    return UsageError(
        "ordering: expected 'local', 'object-store' or 'etcd://host:port,host:port/prefix' "
        "(in a password, '/', '?', '#' and '@' are written as %2F, %3F, %23 and %40)",
        kind="bad_ordering",
    )
