"""Receipts: what a chain gives out can be checked without it, and nothing else passes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ciuic_async.errors import IntegrityError
from ciuic_async.format import merkle
from ciuic_async.transparency import note, proof, receipt
from ciuic_async.transparency.keys import SigningKey
from ciuic_async.transparency.note import parse_vkey
from ciuic_async.transparency.receipt import Receipt

ORIGIN = "ciuic.dev/chain/" + "0" * 32
KEY = SigningKey.generate()
WITNESS = SigningKey.generate()
ENTRIES = [bytes([number]) * 3 for number in range(21)]
LEAVES = [merkle.leaf_hash(entry) for entry in ENTRIES]
TEXT = note.head_text(ORIGIN, 21, merkle.root(LEAVES))


def keys(*vkeys: str) -> dict[note.KeyName, note.Vkey]:
    return {(vkey.name, vkey.key_id): vkey for vkey in map(parse_vkey, vkeys)}


TRUSTED = keys(KEY.vkey(ORIGIN))


def subtree(height: int, index: int) -> bytes:
    return merkle.root(LEAVES[index << height : (index + 1) << height])


def made(index: int, extra: bytes | None = None) -> Receipt:
    path = tuple(proof.make_inclusion(index, 21, subtree))
    return Receipt(index, path, KEY.sign(ORIGIN, TEXT).encode(), extra)


def test_every_entry_has_a_receipt_that_holds() -> None:
    """Encoding and decoding give the same receipt, it holds for its entry, and for no other."""
    for index, entry in enumerate(ENTRIES):
        found = Receipt.decode(made(index, entry).encode(), "r")
        assert found == made(index, entry)
        checked = receipt.check(found, entry, TRUSTED, "r")
        assert (checked.head.size, [str(vkey) for vkey in checked.signers]) == (21, [KEY.vkey(ORIGIN)])
        with pytest.raises(IntegrityError) as caught:
            receipt.check(found, ENTRIES[index - 1], TRUSTED, "r")
        assert caught.value.kind == "proof_invalid"


def test_the_bytes_of_the_format() -> None:
    """Magic, extra, index, hashes, an empty line, the note verbatim: what other implementations read."""
    data = Receipt(0, (b"\1" * 32,), b"NOTE", b"xyz").encode()
    assert data == b"c2sp.org/tlog-proof@v1\nextra eHl6\nindex 0\nAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=\n\nNOTE"


def test_one_entry_alone_needs_no_hash() -> None:
    """The proof in a tree of one entry is empty: an index, an empty line, the head."""
    head = KEY.sign(ORIGIN, note.head_text(ORIGIN, 1, LEAVES[0])).encode()
    data = b"c2sp.org/tlog-proof@v1\nindex 0\n\n" + head
    assert receipt.check(Receipt.decode(data, "r"), ENTRIES[0], TRUSTED, "r").head.size == 1


def test_whose_signature_counts() -> None:
    """A stranger's key, or a witness's alone, is not enough; both together name both; a broken one rejects all."""
    found = made(4)
    with pytest.raises(IntegrityError) as caught:
        receipt.check(found, ENTRIES[4], keys(SigningKey.generate().vkey(ORIGIN)), "r")
    assert caught.value.kind == "signer_unknown"
    signatures = (*note.parse(found.head, "").signatures, WITNESS.cosign("w.example", TEXT, 1000))
    cosigned = Receipt(4, found.path, note.format_note(TEXT, signatures).encode())
    witness = keys(WITNESS.cosigner("w.example"))
    with pytest.raises(IntegrityError) as caught:
        receipt.check(cosigned, ENTRIES[4], witness, "r")
    assert caught.value.kind == "signer_unknown"
    assert len(receipt.check(cosigned, ENTRIES[4], TRUSTED | witness, "r").signers) == 2
    bad = (*note.parse(found.head, "").signatures, WITNESS.cosign("w.example", TEXT.replace("21", "22"), 1000))
    broken = Receipt(4, found.path, note.format_note(TEXT, bad).encode())
    with pytest.raises(IntegrityError) as caught:
        receipt.check(broken, ENTRIES[4], TRUSTED | witness, "r")
    assert caught.value.kind == "signature_invalid"


GOOD = made(6).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n\n",
        GOOD.replace(b"@v1", b"@v2"),
        GOOD.replace(b"index 6", b"index 06"),
        GOOD.replace(b"index 6", b"index -1"),
        GOOD.replace(b"index 6\n", b""),
        GOOD.replace(b"index 6", b"extra \nindex 6 "),
        GOOD.replace(b"index 6", b"extra !\nindex 6"),
        GOOD.replace(b"index 6", b"extra YWI\nindex 6"),
        GOOD.replace(b"index 6", b"index 6\nQUJD"),
        GOOD.replace(b"index 6", b"index 6\n" + b"A" * 43 + b"="),
        GOOD.replace(b"index 6", b"index 6" + b"\n" + b"\n".join([b"AAAA"] * 60)),
        GOOD.replace(b"\n\n", b"\n", 1),
        GOOD[:-1],
        GOOD + b"x" * receipt.LIMIT_BYTES,
        b"c2sp.org/tlog-proof@v1\nindex \xff\n\n",
    ],
    ids=range(16),
)
def test_what_is_no_receipt(data: bytes) -> None:
    """Each breach of the format is a typed error that names the file; nothing is read beyond the limit."""
    with pytest.raises(IntegrityError) as caught:
        receipt.check(Receipt.decode(data, "the-file"), ENTRIES[6], TRUSTED, "the-file")
    assert caught.value.kind in ("receipt_malformed", "note_malformed", "proof_invalid")
    assert "the-file" in str(caught.value)


@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
def test_no_byte_can_change(position: int, flip: int) -> None:
    """A receipt with one changed byte is refused, or says the same."""
    data = bytearray(GOOD)
    data[position] ^= flip
    try:
        found = Receipt.decode(bytes(data), "r")
        receipt.check(found, ENTRIES[6], TRUSTED, "r")
    except IntegrityError:
        found = made(6)
    assert (found.index, found.path) == (6, made(6).path)


def test_a_chain_gives_receipts(tmp_path: Path) -> None:
    """Of every snapshot, under the newest head, with the entry; they hold with the chain's key and outlive it."""
    import ciuic_async

    for value in range(3):
        ciuic_async.save({"v": value}, tmp_path / "chain")
    with ciuic_async.SnapshotChain(tmp_path / "chain") as chain:
        trusted = keys(*chain.keys())
        given = {snapshot.index: chain.receipt(snapshot.id) for snapshot in chain}
        entries = {index: chain.entry_bytes(index) for index in given}
    for index, data in given.items():
        found = Receipt.decode(data, "r")
        assert (found.index, found.extra) == (index, entries[index])
        assert receipt.check(found, entries[index], trusted, "r").head.size == 4
