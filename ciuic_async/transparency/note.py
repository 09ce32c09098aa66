"""Signed notes, and the two texts that a log signs: its head and a slot's proposal; cosignatures of heads.

C2SP signed-note v1.0.0, tlog-checkpoint v1.0.0 and tlog-cosignature v1.0.1; the proposal is ours (docs/format.md,
section 6). A proposal's second line is no number, so a signed proposal can never pass for a signed head.

Input is hostile: base64 is canonical, so no byte of a note can change without a signature failing.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from ciuic_async.errors import IntegrityError

ED25519 = 1
COSIGNATURE = 4
LIMIT_BYTES = 1 << 20
"""64 signatures of the largest kind known (ML-DSA-44, 3.3 kB each) and a text fit well."""
MAX_SIGNATURES = 64
MAX_SIZE = 2**53 - 1
PROPOSAL = "ciuic.dev/slot/v1"

_LINE_START = "\u2014 "
_KEY_ID_BYTES = 4
_TIME_BYTES = 8
MAX_TIME_S = 2**63 - 1
"""Of a cosignature, POSIX seconds."""
_DECIMAL = re.compile(r"0|[1-9][0-9]{0,15}")
_KEY_ID = re.compile(r"[0-9a-f]{8}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

KeyName = tuple[str, bytes]
"""The name and key ID that a signature line states."""


@dataclass(frozen=True, slots=True)
class Vkey:
    """A verifier key: whose signature, of which kind, checked with which public key. ``str()`` is its text form."""

    name: str
    public_key: bytes
    kind: int = ED25519

    @property
    def key_id(self) -> bytes:
        material = bytes([self.kind]) + self.public_key
        return sha256(self.name.encode() + b"\n" + material).digest()[:_KEY_ID_BYTES]

    def __str__(self) -> str:
        material = base64.b64encode(bytes([self.kind]) + self.public_key).decode()
        return f"{self.name}+{self.key_id.hex()}+{material}"

    def verifies(self, text: str, signature: bytes) -> bool:
        """Whether ``signature`` is this key's over ``text``; a cosignature holds its time before it."""
        if self.kind == COSIGNATURE:
            if len(signature) != _TIME_BYTES + 64 or cosigned_at(signature) > MAX_TIME_S:
                return False
            text, signature = cosigned_text(text, cosigned_at(signature)), signature[_TIME_BYTES:]
        try:
            Ed25519PublicKey.from_public_bytes(self.public_key).verify(signature, text.encode())
        except (InvalidSignature, ValueError):
            return False
        return True


@dataclass(frozen=True, slots=True)
class Signature:
    """One signature line."""

    name: str
    key_id: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class Note:
    """A parsed note. Nothing in it is verified."""

    text: str
    signatures: tuple[Signature, ...]


@dataclass(frozen=True, slots=True)
class VerifiedNote:
    """A note's text and who of the known keys signed it: at least one."""

    text: str
    signers: tuple[Vkey, ...]


def check_name(name: str) -> bool:
    """Whether ``name`` may be a key's name: not empty, no space, no ``+``, no control character, valid Unicode."""
    return bool(name) and not any(
        char.isspace() or char == "+" or char < " " or "\ud800" <= char <= "\udfff" for char in name
    )


def parse_vkey(text: str) -> Vkey:
    """Parse ``<name>+<key ID, hex>+<base64>``.

    Raises:
        IntegrityError: kind ``vkey_malformed``, or ``vkey_kind_unknown`` for a signature algorithm of a later version.
    """
    parts = text.split("+", 2)
    material = decode_base64(parts[2]) if len(parts) == 3 else None
    if not material or not check_name(parts[0]) or not _KEY_ID.fullmatch(parts[1]):
        raise IntegrityError(f"{text[:120]!r} is no verifier key (name+hash+base64)", kind="vkey_malformed")
    if sha256(parts[0].encode("utf-8", "surrogatepass") + b"\n" + material).hexdigest()[:8] != parts[1]:
        raise IntegrityError(f"verifier key {text[:120]!r}: its key ID is not that of its key", kind="vkey_malformed")
    if material[0] not in (ED25519, COSIGNATURE):
        raise IntegrityError(
            f"verifier key {text[:120]!r}: signature type {material[0]} is unknown here; upgrade ciuic-async",
            kind="vkey_kind_unknown",
        )
    if len(material) != 33:
        raise IntegrityError(
            f"verifier key {text[:120]!r}: {len(material) - 1} bytes of key, expected 32", kind="vkey_malformed"
        )
    return Vkey(parts[0], material[1:], material[0])


def format_note(text: str, signatures: tuple[Signature, ...]) -> str:
    """``text`` and its signature lines; the inverse of ``parse``."""
    lines = [
        f"{_LINE_START}{item.name} {base64.b64encode(item.key_id + item.signature).decode()}\n" for item in signatures
    ]
    return text + "\n" + "".join(lines)


def parse(data: bytes, what: str) -> Note:
    """Split a note into text and signature lines.

    Args:
        data: the note.
        what: name of the file, for messages.

    Raises:
        IntegrityError: kind ``note_malformed``.
    """
    if len(data) > LIMIT_BYTES:
        raise _malformed(what, f"a note of {len(data)} bytes, at most {LIMIT_BYTES} are allowed")
    try:
        content = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _malformed(what, f"a note that is not UTF-8: {error.reason} at byte {error.start}") from None
    if any(char < " " and char != "\n" for char in content):
        raise _malformed(what, "a note with a control character")
    separator = content.rfind("\n\n")
    if separator < 0 or len(content) == separator + 2 or not content.endswith("\n"):
        raise _malformed(what, "a note without an empty line and signatures after it")
    lines = content[separator + 2 : -1].split("\n")
    if len(lines) > MAX_SIGNATURES:
        raise _malformed(what, f"a note with {len(lines)} signatures, at most {MAX_SIGNATURES} are read")
    return Note(content[: separator + 1], tuple(_parse_line(line, what) for line in lines))


def verify(data: bytes, known: Mapping[KeyName, Vkey], what: str) -> VerifiedNote:
    """Check a note against the keys that are known.

    Signatures by unknown keys are ignored; a known key whose signature fails rejects the whole note; at least one
    known key must verify.

    Raises:
        IntegrityError: kind ``note_malformed``, ``signature_invalid`` or ``signer_unknown``.
    """
    return verify_note(parse(data, what), known, what)


def verify_note(note: Note, known: Mapping[KeyName, Vkey], what: str) -> VerifiedNote:
    """As ``verify``, for a note that is parsed already."""
    signers: dict[Vkey, None] = {}
    for item in note.signatures:
        key = known.get((item.name, item.key_id))
        if key is None:
            continue
        if not key.verifies(note.text, item.signature):
            raise IntegrityError(
                f"{what}: the signature by {item.name}+{item.key_id.hex()} does not hold; the file was changed",
                kind="signature_invalid",
                where=what,
            )
        signers[key] = None
    if not signers:
        found = ", ".join(f"{item.name}+{item.key_id.hex()}" for item in note.signatures[:4])
        raise IntegrityError(
            f"{what}: signed by no key that is known (expected one of {len(known)}, found {found})",
            kind="signer_unknown",
            where=what,
        )
    return VerifiedNote(note.text, tuple(signers))


# --- cosignatures -----------------------------------------------------------------------------------------------------


def cosigned_text(text: str, at_s: int) -> str:
    """What a witness signs: it saw the head ``text`` at this time, and none before that contradicts it."""
    return f"cosignature/v1\ntime {at_s}\n{text}"


def cosigned_at(signature: bytes) -> int:
    """The time, POSIX seconds, that a cosignature states."""
    return int.from_bytes(signature[:_TIME_BYTES], "big")


# --- what a log signs -------------------------------------------------------------------------------------------------


def head_text(origin: str, size: int, root: bytes) -> str:
    """The text of a log head (C2SP tlog-checkpoint) without extension lines."""
    return f"{origin}\n{size}\n{base64.b64encode(root).decode()}\n"


def parse_head(text: str, origin: str, what: str) -> tuple[int, bytes]:
    """Size and root that a head's text states.

    Raises:
        IntegrityError: kind ``head_malformed``, or ``origin_mismatch`` for the head of another log.
    """
    lines = text.split("\n")
    root = decode_base64(lines[2]) if len(lines) == 4 else None
    if root is None or len(root) != 32 or lines[3] or not _is_size(lines[1]):
        raise IntegrityError(
            f"{what}: not a log head (origin, size, root, nothing else)", kind="head_malformed", where=what
        )
    if lines[0] != origin:
        raise IntegrityError(
            f"{what}: the head of the log {lines[0][:120]!r}, expected {origin!r}", kind="origin_mismatch", where=what
        )
    return int(lines[1]), root


def proposal_text(old_size: int, old_root: bytes, bundle: bytes) -> str:
    """What a writer signs before it claims a slot."""
    root = base64.b64encode(old_root).decode()
    return f"{PROPOSAL}\nafter {old_size} {root}\nsha256 {sha256(bundle).hexdigest()}\n"


def parse_proposal(text: str, what: str) -> tuple[int, bytes, str]:
    """Old size, old root and the SHA-256 (hex) of the bundle that a proposal states.

    Raises:
        IntegrityError: kind ``slot_malformed``.
    """
    lines = text.split("\n")
    if len(lines) == 4 and lines[0] == PROPOSAL and not lines[3]:
        after = lines[1].split(" ")
        content = lines[2].split(" ")
        if len(after) == 3 and after[0] == "after" and len(content) == 2 and content[0] == "sha256":
            root = decode_base64(after[2])
            if root is not None and len(root) == 32 and _is_size(after[1]) and _SHA256.fullmatch(content[1]):
                return int(after[1]), root, content[1]
    raise IntegrityError(f"{what}: not a slot's proposal", kind="slot_malformed", where=what)


# --- inside -----------------------------------------------------------------------------------------------------------


def _parse_line(line: str, what: str) -> Signature:
    if not line.startswith(_LINE_START):
        raise _malformed(what, f"{line[:80]!r} is no signature line")
    name, _, encoded = line[len(_LINE_START) :].partition(" ")
    blob = decode_base64(encoded)
    if not check_name(name) or blob is None or len(blob) <= _KEY_ID_BYTES:
        raise _malformed(what, f"{line[:80]!r} is no signature line")
    return Signature(name, blob[:_KEY_ID_BYTES], blob[_KEY_ID_BYTES:])


def decode_base64(text: str) -> bytes | None:
    """The bytes of canonical standard base64; None for anything else, also for stray bits in the last digit."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return data if base64.b64encode(data).decode() == text else None


def _is_size(text: str) -> bool:
    return _DECIMAL.fullmatch(text) is not None and int(text) <= MAX_SIZE


def _malformed(what: str, message: str) -> IntegrityError:
    return IntegrityError(f"{what}: {message}", kind="note_malformed", where=what)
