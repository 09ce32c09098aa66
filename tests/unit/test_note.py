"""Signed notes against the specification's own vectors, and everything that must be refused."""

from __future__ import annotations

import base64
import hashlib

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from ciuic_async.errors import IntegrityError
from ciuic_async.format.entry import Common, KeyEntry
from ciuic_async.transparency import note, slots
from ciuic_async.transparency.keys import SigningKey

COMMON = Common("fedcba9876543210fedc", "2026-11-22T06:31:14.123Z", "node-3", "ciuic_async/1.0.0")
# C2SP signed-note, section "Example".
SPEC_VKEY = "example.com/foo+530d903a+AekyeRrm56hApGFkyQR4ZCbV54Id2LKaANYcrnKv3U2k"
SPEC_NOTE = (
    "This is an example message.\n\n\u2014 example.com/foo Uw2QOkn8srV1yJGh2VYRlL1Tnagv1YEq6TfXppzi2ONncAlTgK7Ztg1E"
    "RYNZXsYjOBH3mFXmRKuwHjG1Yu72IneyaQM=\n"
)
# The Go implementation's own test (golang.org/x/mod/sumdb/note); its secret is type || seed.
PETER_VKEY = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
PETER_SEED = base64.b64encode(base64.b64decode("AYEKFALVFGyNhPJEMzD1QIDr+Y7hfZx09iUvxdXHKDFz")[1:]).decode()
PETER_TEXT = "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n"
PETER_NOTE = (
    PETER_TEXT + "\n\u2014 PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZ"
    "b6KE6RyyBwJnAM=\n"
)


def known(*vkeys: str) -> dict[note.KeyName, note.Vkey]:
    parsed = [note.parse_vkey(vkey) for vkey in vkeys]
    return {(vkey.name, vkey.key_id): vkey for vkey in parsed}


@pytest.mark.parametrize(("vkey", "data"), [(SPEC_VKEY, SPEC_NOTE), (PETER_VKEY, PETER_NOTE)])
def test_published_notes_verify_and_print_as_they_were(vkey: str, data: str) -> None:
    """Notes and keys that other implementations published verify here, and their text forms come back byte for byte."""
    verified = note.verify(data.encode(), known(vkey), "note")
    parsed = note.parse(data.encode(), "note")
    assert [str(signer) for signer in verified.signers] == [vkey]
    assert note.format_note(parsed.text, parsed.signatures) == data


def test_signing_gives_the_bytes_that_go_gives() -> None:
    """Our signer, given the Go test's seed and text, writes exactly the Go test's note."""
    key = SigningKey.from_secret(f"ED25519-SECRET+{PETER_SEED}")
    assert key.vkey("PeterNeumann") == PETER_VKEY
    assert key.sign("PeterNeumann", PETER_TEXT) == PETER_NOTE


def test_every_bit_flip_of_a_note_is_refused() -> None:
    """No bit of a note with one signature can change without its being refused."""
    data = SPEC_NOTE.encode()
    for bit in range(len(data) * 8):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(IntegrityError):
            note.verify(bytes(changed), known(SPEC_VKEY), "note")


def test_an_unknown_signature_is_ignored_and_a_failing_known_one_rejects_all() -> None:
    """Unknown keys do not matter; one good signature does not save a note on which a known key's signature fails."""
    first, second = SigningKey.generate(), SigningKey.generate()
    good, other = first.sign("a", "text\n"), second.sign("b", "text\n")
    wrong = second.sign("b", "another text\n")
    keys = known(first.vkey("a"), second.vkey("b"))
    both = (good + other.split("\n\n")[1]).encode()
    assert len(note.verify(both, keys, "note").signers) == 2
    assert len(note.verify(both, known(first.vkey("a")), "note").signers) == 1
    with pytest.raises(IntegrityError) as caught:
        note.verify((good + wrong.split("\n\n")[1]).encode(), keys, "note")
    assert caught.value.kind == "signature_invalid"
    with pytest.raises(IntegrityError) as caught:
        note.verify(other.encode(), known(first.vkey("a")), "note")
    assert caught.value.kind == "signer_unknown"


def test_sixteen_signatures_are_read_and_too_many_are_not() -> None:
    """64 signature lines are read (the specification asks for 16), 65 are refused."""
    key = SigningKey.generate()
    signed = key.sign("a", "text\n")
    others = "".join(SigningKey.generate().sign(f"w{number}", "text\n").split("\n\n")[1] for number in range(64))
    lines = others.splitlines(keepends=True)
    sixteen = signed + "".join(lines[:15])
    assert len(note.parse(sixteen.encode(), "note").signatures) == 16
    assert len(note.verify((signed + "".join(lines[:63])).encode(), known(key.vkey("a")), "note").signers) == 1
    with pytest.raises(IntegrityError):
        note.parse((signed + others).encode(), "note")


def test_the_last_empty_line_separates() -> None:
    """A text may hold empty lines; only what follows the last one is signatures."""
    key = SigningKey.generate()
    data = key.sign("a", "one\n\n\u2014 looks like AAAA\n\ntwo\n").encode()
    assert note.verify(data, known(key.vkey("a")), "note").text == "one\n\n\u2014 looks like AAAA\n\ntwo\n"


LINE = SPEC_NOTE.split("\n\n")[1]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n",
        b"text\n",
        b"text\n\n",
        f"text\n{LINE}".encode(),
        f"text\n\n{LINE}"[:-1].encode(),
        f"text\r\n\n{LINE}".encode(),
        f"te\0xt\n\n{LINE}".encode(),
        f"te\txt\n\n{LINE}".encode(),
        b"te\xffxt\n\n" + LINE.encode(),
        f"text\n\n{LINE}trailing\n".encode(),
        f"text\n\n-{LINE[1:]}".encode(),
        "text\n\n\u2014 a b AAAAAAAA\n".encode(),
        "text\n\n\u2014  AAAAAAAA\n".encode(),
        "text\n\n\u2014 a+b AAAAAAAA\n".encode(),
        "text\n\n\u2014 a\u00a0b AAAAAAAA\n".encode(),
        "text\n\n\u2014 a AAAA\n".encode(),
        "text\n\n\u2014 a AAAAAAB=\n".encode(),
        "text\n\n\u2014 a AAAAAAA\n".encode(),
        "text\n\n\u2014 a AAA_AAAA\n".encode(),
    ],
)
def test_malformed_notes_are_refused(data: bytes) -> None:
    """Everything that is not exactly a note is an IntegrityError of kind note_malformed, never another exception."""
    with pytest.raises(IntegrityError) as caught:
        note.parse(data, "note")
    assert caught.value.kind == "note_malformed"


def test_every_mangled_vkey_is_refused() -> None:
    """No proper substring of a verifier key, and none with one character raised, is a verifier key."""
    for start in range(len(PETER_VKEY)):
        for end in range(start + 1, len(PETER_VKEY) + 1):
            if (start, end) != (0, len(PETER_VKEY)):
                with pytest.raises(IntegrityError):
                    note.parse_vkey(PETER_VKEY[start:end])
    for place, char in enumerate(PETER_VKEY):
        with pytest.raises(IntegrityError):
            note.parse_vkey(PETER_VKEY[:place] + chr(ord(char) + 1) + PETER_VKEY[place + 1 :])


def test_a_vkey_of_a_later_kind_is_told_apart() -> None:
    """A well-formed key of another algorithm has its own error kind, so that readers can pass over it."""
    material = bytes([6]) + bytes(1312)
    key_id = hashlib.sha256(b"name\n" + material).hexdigest()[:8]
    with pytest.raises(IntegrityError) as caught:
        note.parse_vkey(f"name+{key_id}+{base64.b64encode(material).decode()}")
    assert caught.value.kind == "vkey_kind_unknown"


ROOT = hashlib.sha256(b"").digest()


def test_head_and_proposal_round_trip_and_never_pass_for_each_other() -> None:
    """What is written is read back; a signed proposal is no head and a head no proposal."""
    head = note.head_text("ciuic.dev/chain/x", 7, ROOT)
    proposal = note.proposal_text(7, ROOT, b"bundle")
    assert note.parse_head(head, "ciuic.dev/chain/x", "head") == (7, ROOT)
    assert note.parse_proposal(proposal, "slot") == (7, ROOT, hashlib.sha256(b"bundle").hexdigest())
    with pytest.raises(IntegrityError):
        note.parse_head(proposal, note.PROPOSAL, "head")
    with pytest.raises(IntegrityError):
        note.parse_proposal(head, "slot")


@pytest.mark.parametrize(
    ("size", "root", "extra"),
    [("07", None, ""), ("-1", None, ""), ("+1", None, ""), ("\u0661", None, ""), (str(2**53), None, ""),
     ("7", "AAAA", ""), ("7", "!", ""), ("7", None, "extension\n"), ("", None, "")],
)  # fmt: skip
def test_malformed_heads_are_refused(size: str, root: str | None, extra: str) -> None:
    """A head has a plain decimal size, a 32-byte root, and nothing else."""
    text = f"origin\n{size}\n{root or base64.b64encode(ROOT).decode()}\n{extra}"
    with pytest.raises(IntegrityError) as caught:
        note.parse_head(text, "origin", "head")
    assert caught.value.kind == "head_malformed"


def test_a_head_of_another_log_is_refused() -> None:
    """The first line of a head names its log."""
    with pytest.raises(IntegrityError) as caught:
        note.parse_head(note.head_text("other", 7, ROOT), "origin", "head")
    assert caught.value.kind == "origin_mismatch"


def test_a_cosignature_states_its_time() -> None:
    """The line of a witness holds the time and an Ed25519 signature over cosignature/v1, the time and the head; another
    time, another head or a note's own signature by the same key does not pass for it."""
    key = SigningKey.generate()
    vkey = note.parse_vkey(key.cosigner("witness.example/w1"))
    assert vkey.kind == note.COSIGNATURE
    assert str(vkey) == key.cosigner("witness.example/w1")
    text = note.head_text("origin.example", 7, bytes(32))
    line = key.cosign("witness.example/w1", text, 1_700_000_000)
    assert (line.name, line.key_id) == ("witness.example/w1", vkey.key_id)
    assert note.cosigned_at(line.signature) == 1_700_000_000
    signed = f"cosignature/v1\ntime 1700000000\n{text}".encode()
    Ed25519PublicKey.from_public_bytes(vkey.public_key).verify(line.signature[8:], signed)
    data = note.format_note(text, (line,)).encode()
    assert note.verify(data, {(line.name, line.key_id): vkey}, "head").signers == (vkey,)
    assert not vkey.verifies(text, (1_700_000_001).to_bytes(8, "big") + line.signature[8:])
    assert not vkey.verifies(note.head_text("origin.example", 8, bytes(32)), line.signature)
    assert not vkey.verifies(text, line.signature[8:])
    assert not vkey.verifies(text, b"\xff" * 8 + line.signature[8:])
    assert note.parse_vkey(key.vkey("witness.example/w1")).key_id != vkey.key_id
    with pytest.raises(ValueError, match="time"):
        key.cosign("witness.example/w1", text, -1)


def test_a_witness_key_cannot_sign_for_a_log() -> None:
    """A key entry that announces a key for cosignatures gives nobody the right to write."""
    origin = "ciuic.dev/chain/" + "0f" * 16
    announcement = KeyEntry(COMMON, SigningKey.generate().cosigner(origin)).encode()
    assert slots.announced_keys(origin, [announcement]) == {}


def test_a_vkey_of_another_length_is_refused() -> None:
    """An Ed25519 key has 32 bytes, however right the key ID over fewer or more of them is."""
    for size in (0, 31, 33):
        material = bytes([note.ED25519]) + bytes(size)
        key_id = hashlib.sha256(b"name\n" + material).hexdigest()[:8]
        with pytest.raises(IntegrityError) as caught:
            note.parse_vkey(f"name+{key_id}+{base64.b64encode(material).decode()}")
        assert caught.value.kind == "vkey_malformed"
        assert "expected 32" in str(caught.value)


def test_a_note_beyond_the_limit_is_refused_unparsed() -> None:
    """One byte more than the limit, and a good note is none."""
    key = SigningKey.generate()
    room = note.LIMIT_BYTES - len(key.sign("a", "\n").encode())
    largest = key.sign("a", "x" * room + "\n").encode()
    assert len(note.verify(largest, known(key.vkey("a")), "note").text) == room + 1
    with pytest.raises(IntegrityError, match="at most") as caught:
        note.parse(key.sign("a", "x" * (room + 1) + "\n").encode(), "note")
    assert caught.value.kind == "note_malformed"


GOOD_ROOT = base64.b64encode(ROOT).decode()


@pytest.mark.parametrize(
    ("after", "content"),
    [
        ("before 7 " + GOOD_ROOT, "sha256 " + "0" * 64),
        ("after 7", "sha256 " + "0" * 64),
        ("after 7 " + GOOD_ROOT + " more", "sha256 " + "0" * 64),
        ("after 07 " + GOOD_ROOT, "sha256 " + "0" * 64),
        ("after 7 AAAA", "sha256 " + "0" * 64),
        ("after 7 !", "sha256 " + "0" * 64),
        ("after 7 " + GOOD_ROOT, "sha512 " + "0" * 64),
        ("after 7 " + GOOD_ROOT, "sha256 " + "0" * 63),
        ("after 7 " + GOOD_ROOT, "sha256 " + "A" * 64),
        ("after 7 " + GOOD_ROOT, "sha256"),
    ],
)
def test_malformed_proposals_are_refused(after: str, content: str) -> None:
    """Each of a proposal's words is looked at: nothing but exactly a proposal is one."""
    assert note.parse_proposal(f"{note.PROPOSAL}\nafter 7 {GOOD_ROOT}\nsha256 {'0' * 64}\n", "slot")[0] == 7
    with pytest.raises(IntegrityError) as caught:
        note.parse_proposal(f"{note.PROPOSAL}\n{after}\n{content}\n", "slot")
    assert caught.value.kind == "slot_malformed"
