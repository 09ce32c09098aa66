"""A slot's content: who signed which entries to follow which tree (docs/format.md, section 6)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256

from ciuic_async.errors import FormatVersionError, IntegrityError, UsageError
from ciuic_async.format import entry as entries_format
from ciuic_async.format import layout
from ciuic_async.format.entry import KeyEntry
from ciuic_async.transparency import note, tiles
from ciuic_async.transparency.keys import SigningKey
from ciuic_async.transparency.note import Vkey

LIMIT_BYTES = 16 << 20
"""Some 20,000 entries of the usual size: more than any writer has to say at once."""

_SLOT_FILE = "ciuic.dev/slot-file/v1"
_SLOT_HEADER = re.compile(rb"ciuic\.dev/slot-file/v1 (0|[1-9][0-9]{0,8}) (0|[1-9][0-9]{0,8})\n")
_SLOT_VERSION = re.compile(rb"ciuic\.dev/slot-file/v(?:[2-9]|[1-9][0-9]{1,3}) ")


@dataclass(frozen=True, slots=True)
class LogHead:
    """Size and root of the log."""

    size: int
    root: bytes


@dataclass(frozen=True, slots=True)
class Slot:
    """A slot's content: who signed which entries. Verified."""

    entries: tuple[bytes, ...]
    signer: Vkey


def check_entry(data: bytes) -> None:
    """Refuse to write what no reader would accept. Raises UsageError, kind ``bad_entry``."""
    try:
        entries_format.decode(data, 0)
    except IntegrityError as error:
        raise UsageError(f"not an entry of a log: {error}", kind="bad_entry") from error


def encode_slot(old: LogHead, entries: Sequence[bytes], key: SigningKey, origin: str) -> bytes:
    """The content of the slot after ``old`` (docs/format.md, section 6).

    Raises:
        UsageError: kind ``slot_too_large``.
    """
    bundle = tiles.encode_bundle(entries)
    proposal = key.sign(origin, note.proposal_text(old.size, old.root, bundle)).encode()
    data = f"{_SLOT_FILE} {len(proposal)} {len(bundle)}\n".encode() + proposal + bundle
    if len(data) > LIMIT_BYTES:
        raise UsageError(
            f"{len(entries)} entries of {len(bundle)} bytes do not fit into one slot of {LIMIT_BYTES}; "
            "append fewer at once",
            kind="slot_too_large",
        )
    return data


def check_slot(data: bytes, old: LogHead, origin: str, find_key: Callable[[bytes], Vkey | None]) -> Slot:
    """Check the content of the slot after ``old``.

    Args:
        data: the slot's file.
        old: the log before this slot.
        origin: the name of the log.
        find_key: the key of a key ID, if an entry before this slot announced it.

    Raises:
        IntegrityError: kind ``slot_malformed``, ``slot_mismatch`` (it belongs elsewhere: replayed, or history differs),
            ``note_malformed``, ``signature_invalid`` or ``signer_unknown``.
        FormatVersionError: a later version wrote it.
    """
    name = layout.slot(old.size)
    proposal, bundle = _split_slot(data, name)
    parsed = note.parse(proposal, name)
    if len(parsed.signatures) != 1 or parsed.signatures[0].name != origin:
        raise _bad_slot(name, f"expected one signature, by {origin}")
    entries = tiles.decode_bundle(bundle, None, name)
    if not entries:
        raise _bad_slot(name, "no entries")
    key_id = parsed.signatures[0].key_id
    signer = find_key(key_id) or announced_keys(origin, entries).get(key_id)
    note.verify_note(parsed, {} if signer is None else {(origin, key_id): signer}, name)
    assert signer is not None
    old_size, old_root, content = note.parse_proposal(parsed.text, name)
    if (old_size, old_root) != (old.size, old.root):
        raise IntegrityError(
            f"{name}: signed to follow size {old_size} and root {old_root.hex()[:16]}, expected {old.size} and "
            f"{old.root.hex()[:16]}; the slot was moved or the history before it changed",
            kind="slot_mismatch",
            where=name,
        )
    if sha256(bundle).hexdigest() != content:
        raise IntegrityError(f"{name}: its entries are not the signed ones", kind="slot_mismatch", where=name)
    return Slot(entries, signer)


def announced_keys(origin: str, entries: Iterable[bytes]) -> dict[bytes, Vkey]:
    """The keys that ``key`` entries announce for the log ``origin``, by key ID; the first of one ID counts.

    A key entry that cannot be read announces nothing: what it wanted to announce cannot sign.
    """
    keys: dict[bytes, Vkey] = {}
    for data in entries:
        if b'"kind":"key"' not in data:  # canonical JSON: every key entry has exactly these bytes
            continue
        try:
            entry = entries_format.decode(data, 0)
            vkey = note.parse_vkey(entry.vkey) if isinstance(entry, KeyEntry) else None
        except (IntegrityError, FormatVersionError):
            continue
        if vkey is not None and vkey.name == origin and vkey.kind == note.ED25519:
            keys.setdefault(vkey.key_id, vkey)
    return keys


def _split_slot(data: bytes, name: str) -> tuple[bytes, bytes]:
    """The note and the bundle of a slot's file."""
    header = _SLOT_HEADER.match(data)
    if header is None:
        if _SLOT_VERSION.match(data):
            raise FormatVersionError(
                f"{name}: a slot of a later version, this version reads {_SLOT_FILE}; upgrade ciuic-async", where=name
            )
        raise _bad_slot(name, "no slot header")
    middle = header.end() + int(header[1])
    if middle + int(header[2]) != len(data):
        raise _bad_slot(name, f"its header does not add up to {len(data)} bytes")
    return data[header.end() : middle], data[middle:]


def _bad_slot(name: str, message: str) -> IntegrityError:
    return IntegrityError(f"{name}: {message}; the file was changed", kind="slot_malformed", where=name)
