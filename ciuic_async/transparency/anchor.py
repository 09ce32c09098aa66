"""Evidence of time from outside: somebody who is no party to the chain says when a log head existed.

An *anchor* stamps the text of a log head, the bytes that signatures under it are made over:

    <origin> LF <size> LF <root in base64> LF

in UTF-8, without the empty line and the signatures of the note. A snapshot's head is that of the log which ends with
its entry (size = index + 1): it follows from the log, so it need not be kept beside the token.

The one anchor so far is a timestamp authority (RFC 3161). Its token is ``receipts/<snapshot>.tsr``, a whole
TimeStampResp in DER: ``openssl ts -verify -in FILE.tsr -data HEAD -CAfile ROOTS`` checks it too. Whom to trust comes
from the caller, as roots. A token stays good after its authority's certificate has expired: what counts is when it was
made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from cryptography import x509

from ciuic_async.errors import (
    CiuicError,
    CommitConflictError,
    IntegrityError,
    NotFoundError,
    StoreError,
    UsageError,
)
from ciuic_async.format import layout
from ciuic_async.format.entry import PruneEntry, SnapshotEntry
from ciuic_async.stores.base import Store
from ciuic_async.transparency import note
from ciuic_async.transparency.log import Log
from ciuic_async.transparency.post import check_url, post

if TYPE_CHECKING:
    from rfc3161_client import TimeStampResponse

TOKEN_LIMIT_BYTES = 1 << 16
"""A token with a chain of certificates takes some 6 kB."""

_ROOTS_LIMIT_BYTES = 4 << 20  # a whole system's bundle fits
_SHA256 = x509.ObjectIdentifier("2.16.840.1.101.3.4.2.1")

Roots = Sequence[x509.Certificate]


class Anchor(Protocol):
    """Somebody who says when a head existed. Any thread may call."""

    def stamp(self, head: bytes) -> bytes:
        """A token for the text of a head, checked.

        Raises:
            StoreError: nothing usable came (kind ``no_answer`` or ``tsa_refused``).
            IntegrityError: what came does not hold.
        """

    def verify(self, head: bytes, token: bytes) -> datetime:
        """The time (UTC) that a token states for the text of a head. Needs no network.

        Raises:
            IntegrityError: kind ``timestamp_malformed``, ``timestamp_mismatch`` (of something else) or
                ``timestamp_invalid``.
        """


class TimestampAuthority:
    """An authority that answers RFC 3161 over HTTP.

    Args:
        url: where it takes queries.
        roots: the certificates that the caller trusts to name authorities.
        timeout_s: how long ``stamp`` waits.

    Raises:
        UsageError: kind ``bad_url``, ``no_roots``, or ``timestamps_missing``: the package rfc3161-client is not there.
    """

    def __init__(self, url: str, roots: Roots, *, timeout_s: float = 20.0) -> None:
        check_url(url)
        _require_package()
        _require_roots(roots)
        self._url = url
        self._roots = roots
        self._timeout_s = timeout_s

    def stamp(self, head: bytes) -> bytes:
        from rfc3161_client import HashAlgorithm, TimestampRequestBuilder

        # The builder draws a nonce and asks for the authority's certificate.
        request = TimestampRequestBuilder().data(head).hash_algorithm(HashAlgorithm.SHA256).build()
        answer = post(
            self._url,
            request.as_bytes(),
            content_type="application/timestamp-query",
            timeout_s=self._timeout_s,
            limit_bytes=TOKEN_LIMIT_BYTES,
        )
        if answer.status != 200:
            raise StoreError(
                f"{self._url}: the timestamp authority answered with status {answer.status}, expected 200",
                kind="tsa_refused",
                where=self._url,
            )
        response = _decode(answer.body, self._url)
        if response.status != 0:
            said = "; ".join(map(str, response.status_string))[:200]
            raise StoreError(
                f"{self._url}: the timestamp authority grants no token: status {response.status} {said!r}",
                kind="tsa_refused",
                where=self._url,
            )
        _verify(response, head, self._roots, self._url, request.nonce)
        return answer.body

    def verify(self, head: bytes, token: bytes) -> datetime:
        return verify_token(head, token, self._roots, "the token")


@dataclass(frozen=True, slots=True)
class Timestamp:
    """A snapshot's token: the log up to entry ``index`` existed at ``time`` (UTC)."""

    index: int
    snapshot: str
    time: datetime
    head: bytes
    """The text that was stamped."""


def load_roots(path: str | Path) -> list[x509.Certificate]:
    """Certificates from a PEM file.

    Raises:
        UsageError: kind ``bad_roots``.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(_ROOTS_LIMIT_BYTES + 1)
        roots = x509.load_pem_x509_certificates(data) if len(data) <= _ROOTS_LIMIT_BYTES else []
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: no certificates in PEM: {error}", kind="bad_roots", where=str(path)) from error
    if not roots:
        raise UsageError(f"{path}: no certificates in PEM, or too many", kind="bad_roots", where=str(path))
    return roots


def snapshot_head(log: Log, index: int) -> bytes:
    """The text of the head of the log that ends with entry ``index``: what is stamped for the snapshot there."""
    return note.head_text(log.origin, index + 1, log.root_at(index + 1)).encode()


def verify_token(head: bytes, token: bytes, roots: Roots, what: str) -> datetime:
    """The time that a token states for ``head``; ``what`` names the token in messages. Errors as ``Anchor.verify``.

    Raises:
        UsageError: as ``TimestampAuthority``.
    """
    _require_package()
    _require_roots(roots)
    return _verify(_decode(token, what), head, roots, what, None)


def stamp_newest(store: Store, log: Log, anchor: Anchor, *, replace: bool = False) -> tuple[Timestamp, bool]:
    """Have the newest snapshot's head stamped; its token is durable in the store on return.

    A token that is there and good is left alone: an earlier time says more. One that is there and is refused (perhaps
    made by an authority that other roots name) is an error unless ``replace``.

    Returns:
        The time, and whether a token was made now.

    Raises:
        NotFoundError: kind ``no_snapshot``.
        UsageError: kind ``timestamp_exists``.
    """
    log.refresh()
    index, snapshot = _newest(log)
    head = snapshot_head(log, index)
    name = layout.timestamp(snapshot)
    if (existing := _read(store, name)) is not None:
        try:
            return Timestamp(index, snapshot, anchor.verify(head, existing), head), False
        except IntegrityError as error:
            if not replace:
                raise UsageError(
                    f"{name}: a token is there that these roots do not bear out ({error}); name the roots of its "
                    "authority, or replace it",
                    kind="timestamp_exists",
                    where=name,
                ) from error
    token = anchor.stamp(head)
    made = Timestamp(index, snapshot, anchor.verify(head, token), head)
    if existing is not None:
        store.overwrite(name, token)
        return made, True
    try:
        store.create(name, token)
    except CommitConflictError:  # somebody else had it stamped this very moment
        return Timestamp(index, snapshot, anchor.verify(head, _read(store, name) or b""), head), False
    return made, True


def timestamps(store: Store, log: Log, roots: Roots, refused: list[CiuicError] | None = None) -> list[Timestamp]:
    """All tokens of a log that hold, in the order of their snapshots.

    Args:
        log: as of its last ``refresh``.
        refused: gets the errors of the others: damaged, of another log, or not by an authority that ``roots`` name.

    Raises:
        UsageError: as ``TimestampAuthority``.
    """
    _require_package()
    _require_roots(roots)
    names = {listed.name for listed in store.list(layout.RECEIPTS)}
    found = []
    for index, entry in log.entries() if names else ():
        if not isinstance(entry, SnapshotEntry) or (name := layout.timestamp(entry.snapshot)) not in names:
            continue
        try:
            token = store.read(name, TOKEN_LIMIT_BYTES)
            head = snapshot_head(log, index)
            found.append(Timestamp(index, entry.snapshot, verify_token(head, token, roots, name), head))
        except (IntegrityError, StoreError, NotFoundError) as error:
            if refused is not None:
                refused.append(error)
    return found


def timestamped(
    store: Store, log: Log, roots: Roots, refused: list[CiuicError] | None = None
) -> list[tuple[int, datetime]]:
    """As ``timestamps``: (index, time) each, for verify's level."""
    return [(item.index, item.time) for item in timestamps(store, log, roots, refused)]


# --- inside -----------------------------------------------------------------------------------------------------------


def _newest(log: Log) -> tuple[int, str]:
    """Index and id of the newest snapshot that is not pruned."""
    pruned: set[str] = set()
    for index, entry in log.reversed_entries():
        if isinstance(entry, PruneEntry):
            pruned.update(entry.snapshots)
        elif isinstance(entry, SnapshotEntry) and entry.snapshot not in pruned:
            return index, entry.snapshot
    raise NotFoundError("the chain has no snapshot whose head could be stamped", kind="no_snapshot")


def _read(store: Store, name: str) -> bytes | None:
    try:
        return store.read(name, TOKEN_LIMIT_BYTES)
    except NotFoundError:
        return None
    except IntegrityError:
        return b""  # far too long: a token that is there and does not hold


def _decode(token: bytes, what: str) -> TimeStampResponse:
    from rfc3161_client import decode_timestamp_response

    try:
        if len(token) <= TOKEN_LIMIT_BYTES:
            return decode_timestamp_response(token)
        error: Exception | str = f"{len(token)} bytes"
    except ValueError as problem:
        error = problem
    raise IntegrityError(
        f"{what}: not an RFC 3161 response in DER: {str(error)[:200]}", kind="timestamp_malformed", where=what
    )


def _verify(response: TimeStampResponse, head: bytes, roots: Roots, what: str, nonce: int | None) -> datetime:
    from rfc3161_client import VerificationError, VerifierBuilder

    try:
        info = response.tst_info
        imprint, algorithm = info.message_imprint.message, info.message_imprint.hash_algorithm
        expected = sha256(head).digest()
        if algorithm != _SHA256 or imprint != expected:
            raise IntegrityError(
                f"{what}: a timestamp of something else: expected the SHA-256 {expected.hex()[:16]}, "
                f"found {imprint.hex()[:16]} ({algorithm.dotted_string})",
                kind="timestamp_mismatch",
                where=what,
            )
        VerifierBuilder(roots=list(roots), nonce=nonce).build().verify(response, expected)
        return info.gen_time.astimezone(UTC)
    except (VerificationError, ValueError) as error:
        raise IntegrityError(
            f"{what}: the timestamp does not hold: {str(error)[:300]}", kind="timestamp_invalid", where=what
        ) from error


def _require_package() -> None:
    try:
        import rfc3161_client  # noqa: F401 -- asked for only to say so in time
    except ImportError as error:
        raise UsageError(
            "timestamps need the package rfc3161-client: pip install 'ciuic-async[timestamps]'",
            kind="timestamps_missing",
        ) from error


def _require_roots(roots: Roots) -> None:
    if not roots:
        raise UsageError(
            "timestamps are checked against roots that the caller trusts; none were given", kind="no_roots"
        )
