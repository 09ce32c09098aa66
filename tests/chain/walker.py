"""A verifier of a chain's log that is not the package's: written from the C2SP texts alone, imports nothing of it.

    python tests/chain/walker.py CHAIN VKEY [WITNESS-VKEY...]

Walks what a stranger with a copy of the folder can walk: the log head (tlog-checkpoint in a signed-note), the tiles of
all levels with their partial ones (tlog-tiles), every entry bundle, every leaf, the root; cosignatures; proofs as in
RFC 9162. It is simple where the package is quick: it reads everything and hashes everything again.
"""

from __future__ import annotations

import base64
import binascii
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

LOG_KEY = 1
COSIGNER = 4
WIDTH = 256
HASH_BYTES = 32


class RefusedError(Exception):
    """The log is not what it should be; the text says where."""


@dataclass(frozen=True)
class Key:
    """A verifier key taken apart."""

    name: str
    key_id: bytes
    kind: int
    public: bytes


@dataclass(frozen=True)
class Head:
    """What a verified log head says."""

    origin: str
    size: int
    root: bytes


@dataclass(frozen=True)
class Walk:
    """A log that was walked from the head to the last entry."""

    head: Head
    entries: list[bytes]
    tiles: int
    """Files that were read as hash tiles."""


# --- signed-note ------------------------------------------------------------------------------------------------------


def parse_key(text: str) -> Key:
    """``<name>+<key ID, hex>+<base64 of the type byte and the public key>``."""
    name, key_id, encoded = text.split("+", 2)
    material = _base64(encoded)
    computed = sha256(name.encode() + b"\n" + material).digest()[:4]
    if computed.hex() != key_id or material[0] not in (LOG_KEY, COSIGNER) or len(material) != 33:
        raise RefusedError(f"{text!r} is no key of a log or a witness")
    return Key(name, computed, material[0], material[1:])


def split_note(data: bytes) -> tuple[str, list[tuple[str, bytes, bytes]]]:
    """The text of a note, and (name, key ID, signature) of each line below it."""
    content = data.decode("utf-8")
    if any(ord(char) < 32 and char != "\n" for char in content):
        raise RefusedError("a note with control characters")
    text, separator, rest = content.rpartition("\n\n")
    if not separator or not rest.endswith("\n"):
        raise RefusedError("a note without signatures")
    lines = []
    for line in rest[:-1].split("\n"):
        found = re.fullmatch("\u2014 ([^ +]+) ([^ ]+)", line)
        if found is None:
            raise RefusedError(f"{line!r} is no signature line")
        blob = _base64(found[2])
        lines.append((found[1], blob[:4], blob[4:]))
    return text + "\n", lines


def open_note(data: bytes, key: Key) -> tuple[str, list[bytes]]:
    """The text, and what ``key`` signed under it: at least one signature, all of which hold."""
    text, lines = split_note(data)
    signatures = [signature for name, key_id, signature in lines if (name, key_id) == (key.name, key.key_id)]
    if not signatures:
        raise RefusedError(f"no signature by {key.name}")
    for signature in signatures:
        _check_signature(key, text, signature)
    return text, signatures


def read_head(data: bytes, key: Key) -> Head:
    """A log head: the origin, which is the key's name, the size, the root, and no further lines."""
    text, _ = open_note(data, key)
    lines = text.split("\n")
    if len(lines) != 4 or lines[3] or lines[0] != key.name or not re.fullmatch("0|[1-9][0-9]*", lines[1]):
        raise RefusedError(f"{text!r} is no log head of {key.name}")
    root = _base64(lines[2])
    if len(root) != HASH_BYTES:
        raise RefusedError("a root that is no SHA-256")
    return Head(lines[0], int(lines[1]), root)


def cosigned_s(data: bytes, witness: Key) -> int:
    """When a witness cosigned this log head, POSIX seconds (tlog-cosignature)."""
    _, signatures = open_note(data, witness)
    return int.from_bytes(signatures[0][:8], "big")


def _check_signature(key: Key, text: str, signature: bytes) -> None:
    signed = text
    if key.kind == COSIGNER:
        signed = f"cosignature/v1\ntime {int.from_bytes(signature[:8], 'big')}\n{text}"
        signature = signature[8:]
    try:
        Ed25519PublicKey.from_public_bytes(key.public).verify(signature, signed.encode())
    except InvalidSignature:
        raise RefusedError(f"the signature by {key.name} does not hold") from None


def _base64(text: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise RefusedError(f"{text!r} is no base64") from error
    if base64.b64encode(data).decode() != text:
        raise RefusedError(f"{text!r} is not the canonical base64 of what it holds")
    return data


# --- RFC 6962 and RFC 9162 --------------------------------------------------------------------------------------------


def leaf(data: bytes) -> bytes:
    """The hash of an entry."""
    return sha256(b"\x00" + data).digest()


def node(left: bytes, right: bytes) -> bytes:
    """The hash over two hashes."""
    return sha256(b"\x01" + left + right).digest()


def tree(hashes: Sequence[bytes]) -> bytes:
    """The Merkle tree hash as RFC 6962, section 2.1, defines it: by recursion."""
    if not hashes:
        return sha256(b"").digest()
    if len(hashes) == 1:
        return hashes[0]
    split = _split(len(hashes))
    return node(tree(hashes[:split]), tree(hashes[split:]))


def inclusion_root(index: int, size: int, hashed: bytes, proof: Sequence[bytes]) -> bytes:
    """The root to which a proof leads from leaf ``index``; the definition read backwards."""
    if size == 1:
        if proof:
            raise RefusedError("an inclusion proof that is too long")
        return hashed
    if not proof:
        raise RefusedError("an inclusion proof that is too short")
    split = _split(size)
    if index < split:
        return node(inclusion_root(index, split, hashed, proof[:-1]), proof[-1])
    return node(proof[-1], inclusion_root(index - split, size - split, hashed, proof[:-1]))


def consistency_roots(old: int, new: int, old_root: bytes, proof: Sequence[bytes]) -> tuple[bytes, bytes]:
    """The old and the new root to which a consistency proof leads."""

    def roots(old: int, new: int, proof: Sequence[bytes], whole: bool) -> tuple[bytes, bytes]:
        if old == new:
            if len(proof) != (0 if whole else 1):
                raise RefusedError("a consistency proof of another length")
            known = old_root if whole else proof[0]
            return known, known
        if not proof:
            raise RefusedError("a consistency proof that is too short")
        split = _split(new)
        if old <= split:
            before, after = roots(old, split, proof[:-1], whole)
            return before, node(after, proof[-1])
        before, after = roots(old - split, new - split, proof[:-1], False)
        return node(proof[-1], before), node(proof[-1], after)

    return roots(old, new, proof, True)


def _split(count: int) -> int:
    """The largest power of two below ``count``."""
    power = 1
    while power * 2 < count:
        power *= 2
    return power


# --- tlog-tiles -------------------------------------------------------------------------------------------------------


def tile_path(level: int | str, index: int, width: int) -> str:
    """Where a tile (or, with the level ``entries``, a bundle) lies."""
    digits = str(index)
    digits = digits.zfill(-(-len(digits) // 3) * 3)
    groups = [digits[start : start + 3] for start in range(0, len(digits), 3)]
    path = "/".join([f"x{group}" for group in groups[:-1]] + [groups[-1]])
    return f"tile/{level}/{path}" + (f".p/{width}" if width < WIDTH else "")


def read_hashes(log: Path, level: int, index: int, width: int) -> list[bytes]:
    """The first ``width`` hashes of a tile; where the partial file was deleted, those of the full one."""
    data, held = _read(log, level, index, width)
    if len(data) != held * HASH_BYTES:
        raise RefusedError(f"{tile_path(level, index, held)} has {len(data)} bytes")
    return [data[start : start + HASH_BYTES] for start in range(0, width * HASH_BYTES, HASH_BYTES)]


def read_entries(log: Path, index: int, width: int) -> list[bytes]:
    """The first ``width`` entries of a bundle."""
    data, held = _read(log, "entries", index, width)
    entries = []
    while data:
        end = 2 + int.from_bytes(data[:2], "big")
        if len(data) < end:
            raise RefusedError(f"{tile_path('entries', index, held)} is cut off")
        entries.append(data[2:end])
        data = data[end:]
    if len(entries) != held:
        raise RefusedError(f"{tile_path('entries', index, held)} holds {len(entries)} entries")
    return entries[:width]


def _read(log: Path, level: int | str, index: int, width: int) -> tuple[bytes, int]:
    for held in dict.fromkeys((width, WIDTH)):
        path = log / tile_path(level, index, held)
        if path.is_file():
            return path.read_bytes(), held
    raise RefusedError(f"{tile_path(level, index, width)} is missing")


def walk(log: Path, vkey: str) -> Walk:
    """Walk a whole log.

    Args:
        log: the folder that holds ``checkpoint`` and ``tile``.
        vkey: a key that must have signed the head.

    Raises:
        RefusedError: something is not as the head says.
    """
    head = read_head((log / "checkpoint").read_bytes(), parse_key(vkey))
    entries: list[bytes] = []
    tiles = 0
    expected: list[bytes] = []  # the hashes that the next level must hold
    edge: list[list[bytes]] = []  # of each level the hashes of its partial tile
    level = 0
    while head.size >> (8 * level):
        count = head.size >> (8 * level)
        found: list[bytes] = []
        full: list[bytes] = []
        partial: list[bytes] = []
        for index in range(-(-count // WIDTH)):
            width = min(WIDTH, count - index * WIDTH)
            hashes = read_hashes(log, level, index, width)
            tiles += 1
            if level == 0:
                bundle = read_entries(log, index, width)
                if [leaf(entry) for entry in bundle] != hashes:
                    raise RefusedError(f"{tile_path('entries', index, width)} does not hold what its tile says")
                entries += bundle
            found += hashes
            if width == WIDTH:
                full.append(tree(hashes))
            else:
                partial = hashes
        if level and found != expected:
            raise RefusedError(f"the tiles of level {level} do not follow from those below")
        expected = full
        edge.append(partial)
        level += 1
    if tree([leaf(entry) for entry in entries]) != head.root:
        raise RefusedError("the entries do not give the root that was signed")
    if head.size and _edge_root(edge) != head.root:
        raise RefusedError("the tiles do not give the root that was signed")
    return Walk(head, entries, tiles)


def _edge_root(edge: list[list[bytes]]) -> bytes:
    """The root by the partial tiles alone: what a client computes that reads no entry."""
    parts: list[tuple[int, bytes]] = []  # (leaves, hash), from the left
    for level in reversed(range(len(edge))):
        left = edge[level]
        while left:
            power = 1
            while power * 2 <= len(left):
                power *= 2
            parts.append((power << (8 * level), tree(left[:power])))
            left = left[power:]
    root = parts[-1][1]
    for _, part in reversed(parts[:-1]):
        root = node(part, root)
    return root


# --- tlog-proof -------------------------------------------------------------------------------------------------------


def check_receipt(data: bytes, entry: bytes, key: Key) -> Head:
    """The head that a receipt proves ``entry`` to be in."""
    proof, separator, checkpoint = data.partition(b"\n\n")
    lines = proof.decode("ascii").split("\n")
    if not separator or lines.pop(0) != "c2sp.org/tlog-proof@v1":
        raise RefusedError("no receipt")
    if lines[0].startswith("extra "):
        _base64(lines.pop(0).removeprefix("extra "))
    index = re.fullmatch("index (0|[1-9][0-9]*)", lines.pop(0))
    if index is None:
        raise RefusedError("a receipt without an index")
    head = read_head(checkpoint, key)
    if int(index[1]) >= head.size:
        raise RefusedError("a receipt of an entry beyond its head")
    if inclusion_root(int(index[1]), head.size, leaf(entry), [_base64(line) for line in lines]) != head.root:
        raise RefusedError("a receipt that leads to another root")
    return head


def main(arguments: Sequence[str]) -> int:
    """Walk the chain at ``arguments[0]``; print what was found. 1: it is refused."""
    chain, vkey, *witnesses = arguments
    try:
        walked = walk(Path(chain) / "log", vkey)
        data = (Path(chain) / "log" / "checkpoint").read_bytes()
        times = {parse_key(witness).name: cosigned_s(data, parse_key(witness)) for witness in witnesses}
    except RefusedError as error:
        print(f"refused: {error}")
        return 1
    print(f"ok: {walked.head.size} entries, {walked.tiles} tiles, root {walked.head.root.hex()}")
    for name, at_s in times.items():
        print(f"cosigned by {name} at {at_s}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
