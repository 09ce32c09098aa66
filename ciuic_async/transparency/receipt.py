"""Receipts (C2SP tlog-proof@v1): a file that proves, without the chain, that an entry is in a signed log.

    c2sp.org/tlog-proof@v1
    [extra <base64>]
    index <n>
    <hash, base64>          leaf side first
                            (an empty line)
    <the log head, with its signatures and cosignatures>

``extra`` proves nothing by itself; here it holds the entry, whose hash the proof is about.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ciuic_async.errors import IntegrityError
from ciuic_async.format import merkle
from ciuic_async.transparency import note, proof
from ciuic_async.transparency.note import Vkey
from ciuic_async.transparency.slots import LogHead

MAGIC = "c2sp.org/tlog-proof@v1"
MAX_EXTRA_BYTES = 65535
"""As long as an entry may be."""
LIMIT_BYTES = note.LIMIT_BYTES + 2 * MAX_EXTRA_BYTES
_MAX_HASHES = 53  # of a tree of note.MAX_SIZE leaves
_INDEX = re.compile(r"index (0|[1-9][0-9]{0,15})")


@dataclass(frozen=True, slots=True)
class Receipt:
    """A parsed receipt. Nothing in it is verified.

    Attributes:
        index: of the entry in the log.
        path: the inclusion proof, leaf side first.
        head: the log head's note.
        extra: what came with it; receipts of ``ciuic`` hold the entry there.
    """

    index: int
    path: tuple[bytes, ...]
    head: bytes
    extra: bytes | None = None

    def encode(self) -> bytes:
        """The file's bytes."""
        lines = [MAGIC]
        if self.extra is not None:
            lines.append(f"extra {base64.b64encode(self.extra).decode()}")
        lines.append(f"index {self.index}")
        lines += [base64.b64encode(one).decode() for one in self.path]
        return ("\n".join(lines) + "\n\n").encode() + self.head

    @classmethod
    def decode(cls, data: bytes, what: str) -> Receipt:
        """Parse a receipt.

        Args:
            what: name of the file, for messages.

        Raises:
            IntegrityError: kind ``receipt_malformed``, or ``note_malformed`` for its last part.
        """
        if len(data) > LIMIT_BYTES:
            raise _malformed(what, f"{len(data)} bytes, at most {LIMIT_BYTES} are read")
        above, separator, head = data.partition(b"\n\n")
        try:
            lines = above.decode("ascii").split("\n")
        except UnicodeDecodeError:
            raise _malformed(what, "its first part is not ASCII") from None
        if not separator or lines.pop(0) != MAGIC:
            raise _malformed(what, f"expected {MAGIC}, a proof, an empty line and a log head")
        extra = None
        if lines and lines[0].startswith("extra "):
            extra = _base64(lines.pop(0).removeprefix("extra "))
            if extra is None or len(extra) > MAX_EXTRA_BYTES:
                raise _malformed(what, f"'extra' is not base64 of at most {MAX_EXTRA_BYTES} bytes")
        match = _INDEX.fullmatch(lines.pop(0)) if lines else None
        if match is None:
            raise _malformed(what, "expected 'index' and a number")
        if len(lines) > _MAX_HASHES:
            raise _malformed(what, f"a proof of {len(lines)} hashes, at most {_MAX_HASHES} are possible")
        path = []
        for line in lines:
            one = _base64(line)
            if one is None or len(one) != 32:
                raise _malformed(what, f"{line[:60]!r} is no hash")
            path.append(one)
        note.parse(head, what)
        return cls(int(match[1]), tuple(path), head, extra)

    def origin(self, what: str) -> str:
        """The log that it says it is of."""
        return note.parse(self.head, what).text.partition("\n")[0]

    def claimed_head(self, origin: str, what: str) -> LogHead:
        """What its head says, unverified. Raises IntegrityError (``head_malformed``, ``origin_mismatch``)."""
        return LogHead(*note.parse_head(note.parse(self.head, what).text, origin, what))


@dataclass(frozen=True, slots=True)
class Checked:
    """A receipt that holds: for which head, and whose signatures are under it."""

    head: LogHead
    signers: tuple[Vkey, ...]


def check(receipt: Receipt, entry: bytes, keys: Mapping[note.KeyName, Vkey], what: str) -> Checked:
    """Check a receipt without the chain.

    Args:
        entry: the bytes of the entry that it is said to be of.
        keys: those that the caller trusts: of the log, and of witnesses. One of the log's must have signed.
        what: name of the file, for messages.

    Raises:
        IntegrityError: kind ``signature_invalid``, ``signer_unknown``, ``head_malformed``, ``origin_mismatch`` or
            ``proof_invalid``.
    """
    origin = receipt.origin(what)
    signers = note.verify(receipt.head, keys, what).signers
    if not any(vkey.kind == note.ED25519 and vkey.name == origin for vkey in signers):
        raise IntegrityError(
            f"{what}: no trusted key of the log {origin[:120]} signed it (cosignatures of witnesses alone do not say "
            "which log they are of)",
            kind="signer_unknown",
            where=what,
        )
    head = receipt.claimed_head(origin, what)
    check_inclusion(receipt, entry, head, what)
    return Checked(head, signers)


def check_inclusion(receipt: Receipt, entry: bytes, head: LogHead, what: str) -> None:
    """Check that the entry is in the tree of a head that was verified. Raises IntegrityError (``proof_invalid``)."""
    check_leaf(receipt, merkle.leaf_hash(entry), head, what)


def check_leaf(receipt: Receipt, leaf_hash: bytes, head: LogHead, what: str) -> None:
    """As ``check_inclusion``, by the leaf hash of the entry."""
    try:
        proof.check_inclusion(receipt.index, head.size, leaf_hash, receipt.path, head.root)
    except IntegrityError as error:
        raise IntegrityError(
            f"{what}: not a receipt of this entry: {error}", kind="proof_invalid", where=what
        ) from error


def _base64(text: str) -> bytes | None:
    """The bytes of canonical base64, or None."""
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        return None
    return data if base64.b64encode(data).decode() == text else None


def _malformed(what: str, message: str) -> IntegrityError:
    return IntegrityError(f"{what}: {message}", kind="receipt_malformed", where=what)
