"""Verifiers that are not ours accept our log, of every size at which tiles begin or end, and refuse a changed one.

Sizes up to 1,000; up to 70,000 with ``CIUIC_CRASH_LONG=1`` (``make test-chain``). ``walker.py`` always runs; openssl,
pymerkle, sigstore and Go's own packages where they are installed.
"""

from __future__ import annotations

import base64
import importlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import rfc8785
import torch

from ciuic_async import Checkpointer, KeepLatest, SnapshotChain
from ciuic_async.transparency.audit import audit_log
from ciuic_async.transparency.keys import SigningKey
from tests.chain import walker
from tests.chain.logs import ORIGIN, Grown, grow_in_steps
from tests.chain.walker import RefusedError
from tests.crash.faults import LONG

SHORT_SIZES = [1, 2, 255, 256, 257, 300, 511, 512, 513, 1000]
SIZES = [*SHORT_SIZES, *([65_535, 65_536, 65_537, 70_000] if LONG else [])]
PATH_SAMPLES = 40
"""Entries whose inclusion is proven at each size, besides the first and the last."""

GO = shutil.which("go")
GO_SOURCES = Path("/usr/share/gocode")  # Debian's golang-golang-x-mod-dev
OPENSSL = shutil.which("openssl")
WITNESS = "witness.example/w1"

pytestmark = [pytest.mark.timeout(1800 if LONG else 120)]


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Grown]:
    made = grow_in_steps(tmp_path_factory.mktemp("log"), SIZES)
    yield made
    made.store.close()


def some(size: int) -> list[int]:
    """Indices to prove: the ends, those beside tiles' borders, and some of the rest."""
    borders = [number for border in (256, 65_536) for number in (border - 1, border)]
    drawn = random.Random(size).sample(range(size), min(size, PATH_SAMPLES))
    return sorted({0, size - 1, *drawn, *(number for number in borders if number < size)})


# --- the walker -------------------------------------------------------------------------------------------------------


def test_the_walker_is_no_relative() -> None:
    """It imports nothing of the package, so that a mistake would have to be made twice."""
    source = Path(walker.__file__).read_text()
    imported = set(re.findall(r"^(?:from|import) ([\w]+)", source, re.MULTILINE))
    standard = {"__future__", "base64", "binascii", "collections", "dataclasses", "hashlib", "pathlib", "re", "sys"}
    assert imported == {*standard, "cryptography"}


@pytest.mark.parametrize("size", SIZES)
def test_the_walker_accepts_the_log(grown: Grown, size: int) -> None:
    """At every size: head, tiles of all levels, bundles, leaves and root, as a stranger reads them."""
    walked = walker.walk(grown.at(size), grown.vkey)
    assert (walked.head.origin, walked.head.size) == (ORIGIN, size)
    assert walked.entries == grown.entries()[:size]


def test_a_log_of_70000_has_the_tiles_of_the_specification() -> None:
    """The example of tlog-tiles: 273 full and one of 112 at level 0, one full and one of 17 above, one of 1 on top."""
    names = [name for name in files_of(70_000) if "entries" not in name]
    assert len(names) == 274 + 2 + 1
    assert [name for name in names if ".p/" in name] == ["tile/0/273.p/112", "tile/1/001.p/17", "tile/2/000.p/1"]
    assert walker.tile_path("entries", 1_234_067, 256) == "tile/entries/x001/x234/067"


@pytest.mark.parametrize("size", SIZES)
def test_no_superseded_tile_is_left(grown: Grown, size: int) -> None:
    """Every tile that the size implies is there, full ones without their partial ones, and nothing beyond."""
    needed = set(files_of(size))
    found = {path.relative_to(grown.at(size)).as_posix() for path in grown.at(size).glob("tile/**/*") if path.is_file()}
    assert needed <= found
    full = {name for name in found if ".p/" not in name}
    assert full == {name for name in needed if ".p/" not in name}
    assert not {name for name in found if name.partition(".p/")[0] in full} - full


def test_the_walker_accepts_all_proofs(grown: Grown) -> None:
    """Inclusion of entries in every head and consistency of any two heads, by the definition and not by our check."""
    heads = {size: walker.read_head(data, walker.parse_key(grown.vkey)) for size, data in grown.heads.items()}
    for size, head in heads.items():
        for index in some(size):
            proof = grown.log.inclusion(index, size)
            leaf = walker.leaf(grown.log.entry_bytes(index))
            assert walker.inclusion_root(index, size, leaf, proof) == head.root
    newest = heads[max(SIZES)]
    for old, head in heads.items():
        proof = grown.log.consistency(old)
        assert walker.consistency_roots(old, newest.size, head.root, proof) == (head.root, newest.root)


def files_of(size: int) -> list[str]:
    """The tiles and bundles that a head of this size needs."""
    names = []
    level = 0
    while count := size >> (8 * level):
        for index in range(-(-count // 256)):
            width = min(256, count - 256 * index)
            names += [walker.tile_path(kind, index, width) for kind in ((level, "entries") if not level else (level,))]
        level += 1
    return names


def changed(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_the_walker_is_not_credulous(grown: Grown, tmp_path: Path) -> None:
    """A changed byte in the head, a tile or a bundle, a shorter or a missing file: each is refused."""
    log = tmp_path / "log"
    refused = 0
    for name in ("checkpoint", *files_of(513)):
        data = (grown.at(513) / name).read_bytes()
        for damaged in (changed(data, 0), changed(data, len(data) // 2), data[:-1], None):
            shutil.copytree(grown.at(513), log)
            (log / name).unlink()
            if damaged is not None:
                (log / name).write_bytes(damaged)
            with pytest.raises((RefusedError, UnicodeDecodeError, FileNotFoundError)):
                walker.walk(log, grown.vkey)
            refused += 1
            shutil.rmtree(log)
    assert refused == 4 * (1 + 2 * 3 + 1), "the head; two full tiles and one of 1, with bundles; level 1"


def test_the_walker_takes_no_other_key_and_no_wrong_proof(grown: Grown) -> None:
    """A head by somebody else, a proof of another entry, of another size, too short or too long."""
    with pytest.raises(RefusedError):
        walker.walk(grown.at(300), SigningKey.generate().vkey(ORIGIN))
    root = walker.walk(grown.at(300), grown.vkey).head.root
    leaf, proof = walker.leaf(grown.log.entry_bytes(7)), grown.log.inclusion(7, 300)
    assert walker.inclusion_root(7, 300, leaf, proof) == root
    assert walker.inclusion_root(8, 300, leaf, proof) != root
    assert walker.inclusion_root(7, 300, walker.leaf(b"another"), proof) != root
    for wrong in (proof[:-1], [*proof, root]):
        with pytest.raises(RefusedError):
            walker.inclusion_root(7, 300, leaf, wrong)


# --- openssl ----------------------------------------------------------------------------------------------------------


def openssl_accepts(folder: Path, vkey: str, text: bytes, signature: bytes) -> bool:
    """Whether ``openssl`` finds that the key of ``vkey`` signed ``text``."""
    public = base64.b64decode(vkey.split("+", 2)[2])[1:]
    # SubjectPublicKeyInfo of an Ed25519 key (RFC 8410): twelve fixed bytes, then the key.
    der = bytes.fromhex("302a300506032b6570032100") + public
    pem = b"-----BEGIN PUBLIC KEY-----\n" + base64.b64encode(der) + b"\n-----END PUBLIC KEY-----\n"
    for name, data in (("key.pem", pem), ("text", text), ("signature", signature)):
        (folder / name).write_bytes(data)
    done = subprocess.run(
        [
            "openssl",
            "pkeyutl",
            "-verify",
            "-pubin",
            "-inkey",
            "key.pem",
            "-rawin",
            "-in",
            "text",
            "-sigfile",
            "signature",
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ("Verified Successfully" in done.stdout) == (done.returncode == 0), done.stderr
    return done.returncode == 0


@pytest.mark.skipif(OPENSSL is None, reason="openssl is not installed")
def test_openssl_accepts_every_signature(grown: Grown, tmp_path: Path) -> None:
    """Head, slot and cosignature are plain Ed25519 over the bytes that the specifications name."""
    for size in SIZES:
        text, lines = walker.split_note(grown.heads[size])
        assert openssl_accepts(tmp_path, grown.vkey, text.encode(), lines[0][2])
        assert not openssl_accepts(tmp_path, grown.vkey, text.replace("\n", "\n1", 1).encode(), lines[0][2])
    slot = sorted((grown.at(300) / "commit").iterdir())[-1].read_bytes()
    header, _, rest = slot.partition(b"\n")
    text, lines = walker.split_note(rest[: int(header.split()[1])])
    assert openssl_accepts(tmp_path, grown.vkey, text.encode(), lines[0][2])
    witness = SigningKey.generate()
    text, _ = walker.split_note(grown.heads[300])
    line = witness.cosign(WITNESS, text, 1_767_000_000)
    signed = f"cosignature/v1\ntime 1767000000\n{text}".encode()
    assert openssl_accepts(tmp_path, witness.cosigner(WITNESS), signed, line.signature[8:])


# --- pymerkle ---------------------------------------------------------------------------------------------------------


def test_pymerkle_finds_the_same_tree(grown: Grown) -> None:
    """Its tree of our entries has our roots at every size; its proofs are ours, and its check takes our heads."""
    pymerkle = pytest.importorskip("pymerkle", reason="pymerkle is not installed")
    tree = pymerkle.InmemoryTree(algorithm="sha256")
    for data in grown.entries():
        tree.append_entry(data)
    heads = {size: walker.read_head(data, walker.parse_key(grown.vkey)) for size, data in grown.heads.items()}
    for size, head in heads.items():
        assert tree.get_root(size) == head.root
        for index in some(size)[:: 4 if size > 1000 else 1]:
            proof = tree.prove_inclusion(index + 1, size)
            assert proof.path == [walker.leaf(grown.log.entry_bytes(index)), *grown.log.inclusion(index, size)]
            pymerkle.verify_inclusion(proof.path[0], head.root, proof, index=index + 1, size=size)
        for old, earlier in heads.items():
            if old <= size:
                proof = tree.prove_consistency(old, size)
                pymerkle.verify_consistency(earlier.root, head.root, proof, prior_size=old, later_size=size)
    with pytest.raises(pymerkle.InvalidProof):
        pymerkle.verify_consistency(heads[255].root, heads[300].root, tree.prove_consistency(256, 300))


# --- sigstore ---------------------------------------------------------------------------------------------------------


def test_sigstore_accepts_heads_and_inclusion(grown: Grown) -> None:
    """The code with which sigstore's Python client checks a Rekor log takes our heads, notes and proofs."""
    pytest.importorskip("sigstore", reason="sigstore is not installed")
    checkpoint: Any = importlib.import_module("sigstore._internal.rekor.checkpoint")
    merkle: Any = importlib.import_module("sigstore._internal.merkle")
    errors: Any = importlib.import_module("sigstore.errors")
    key = walker.parse_key(grown.vkey)

    def verify(key_id: bytes, signature: bytes, data: bytes) -> None:
        if not SigningVkey(key.public).verifies(data, signature):
            raise errors.VerificationError("refused")

    keyring = SimpleNamespace(verify=verify)
    for size in SIZES:
        for index in some(size)[::8]:
            note = grown.heads[size].decode()
            root = walker.read_head(grown.heads[size], key).root
            proof = SimpleNamespace(
                log_index=index,
                tree_size=size,
                hashes=grown.log.inclusion(index, size),
                root_hash=root,
                checkpoint=SimpleNamespace(envelope=note),
            )
            body = grown.log.entry_bytes(index)
            inner = SimpleNamespace(
                inclusion_proof=proof, canonicalized_body=body, log_id=SimpleNamespace(key_id=key.key_id)
            )
            merkle.verify_merkle_inclusion(SimpleNamespace(_inner=inner))
            checkpoint.verify_checkpoint(keyring, SimpleNamespace(_inner=inner))
            parsed = checkpoint.SignedCheckpoint.from_text(note).checkpoint
            assert (parsed.origin, parsed.log_size, parsed.other_content) == (ORIGIN, size, [])
            inner.canonicalized_body = body + b" "
            with pytest.raises(errors.VerificationError):
                merkle.verify_merkle_inclusion(SimpleNamespace(_inner=inner))


class SigningVkey:
    """An Ed25519 public key for sigstore's keyring: that one is made for keys of Rekor's own kind of file."""

    def __init__(self, public: bytes) -> None:
        self._key = walker.Ed25519PublicKey.from_public_bytes(public)

    def verifies(self, data: bytes, signature: bytes) -> bool:
        try:
            self._key.verify(signature, data)
        except walker.InvalidSignature:
            return False
        return True


# --- Go ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def go_walker(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], subprocess.CompletedProcess[str]]:
    if GO is None or not (GO_SOURCES / "src/golang.org/x/mod/sumdb/tlog").is_dir():
        pytest.skip("needs go and golang.org/x/mod (Debian: golang-go, golang-golang-x-mod-dev)")
    program = tmp_path_factory.mktemp("go") / "walk"
    environment = {**os.environ, "GO111MODULE": "off", "GOPATH": str(GO_SOURCES), "GOFLAGS": "", "CGO_ENABLED": "0"}
    source = Path(__file__).with_name("go") / "main.go"
    subprocess.run([GO, "build", "-o", str(program), str(source)], env=environment, check=True, timeout=110)

    def walk(task: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [program], input=json.dumps(task), capture_output=True, text=True, timeout=600, check=False
        )

    return walk


GoWalker = Callable[[dict[str, Any]], "subprocess.CompletedProcess[str]"]


def encoded(proof: list[bytes]) -> list[str]:
    return [base64.b64encode(item).decode() for item in proof]


def test_go_accepts_the_log_and_all_proofs(grown: Grown, go_walker: GoWalker, tmp_path: Path) -> None:
    """x/mod's note and tlog: signatures, cosignature, every tile and entry, its own proofs and ours."""
    newest = max(SIZES)
    witness = SigningKey.generate()
    log = tmp_path / "log"
    shutil.copytree(grown.at(newest), log)
    text, _ = walker.split_note(grown.heads[newest])
    line = witness.cosign(WITNESS, text, 1_767_000_000)
    cosignature = base64.b64encode(line.key_id + line.signature).decode()
    (log / "checkpoint").unlink()
    (log / "checkpoint").write_bytes(grown.heads[newest] + f"\u2014 {WITNESS} {cosignature}\n".encode())
    task: dict[str, Any] = {
        "Log": str(log),
        "Vkey": grown.vkey,
        "Witnesses": [witness.cosigner(WITNESS)],
        "Heads": [data.decode() for data in grown.heads.values()],
        "Inclusion": [
            {"Index": index, "Size": size, "Path": encoded(grown.log.inclusion(index, size))}
            for size in SIZES
            for index in some(size)
        ],
        "Consistency": [{"Old": size, "Size": newest, "Path": encoded(grown.log.consistency(size))} for size in SIZES],
    }
    done = go_walker(task)
    proofs = len(task["Inclusion"]) + len(task["Consistency"])
    assert done.stdout == f"ok {newest} entries {len(SIZES)} heads {proofs} proofs\n", done.stderr
    # It is not credulous either.
    task["Consistency"][0]["Path"][0] = base64.b64encode(bytes(32)).decode()
    assert go_walker(task).returncode == 1
    tile = log / "tile/0/000"
    data = tile.read_bytes()
    tile.unlink()
    tile.write_bytes(changed(data, 100))
    done = go_walker({**task, "Inclusion": [], "Consistency": []})
    assert done.returncode == 1
    assert "refused" in done.stdout


# --- a chain with everything ------------------------------------------------------------------------------------------


@pytest.fixture
def lived(tmp_path: Path) -> Path:
    """A chain with entries of every kind, by two writers."""
    weight = torch.zeros(3000)
    path = tmp_path / "chain"
    for value in range(2):
        with Checkpointer(path, {"w": weight}, rng=False, key=SigningKey.generate().secret()) as ckpt:
            for turn in range(3):
                weight.fill_(10 * value + turn)
                # Metrics and tags with all that JSON can be written in several ways for.
                ckpt.save(metrics={"loss": 1 / (turn + 3), "große": 1e-300}, tags=(f"t-{value}-{turn}",)).wait_durable(
                    30
                )
    with SnapshotChain(path) as chain:
        chain.tag("lasting", "latest")
        chain.rollback("latest~1", 'zurück \U0001f600 \u2028 </script> \\ "')
        chain.note("a remark\twith \u007f and \ud7ff")
        chain.prune(KeepLatest(2))
        assert {item["kind"] for item in chain.log()} == {"key", "snapshot", "tag", "rollback", "note", "prune"}
    return path


def test_a_chain_that_was_lived_in_is_walked(lived: Path) -> None:
    """Two writers, every kind of entry: the walker takes it with the last signer's key, as a program of its own too."""
    with SnapshotChain(lived, create=False) as chain:
        chain._log.refresh()
        signers = chain._log.head_signers
        count = len(chain.log())
    walked = walker.walk(lived / "log", signers[0])
    assert len(walked.entries) == count
    done = subprocess.run(
        [sys.executable, walker.__file__, str(lived), signers[0]], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"ok: {count} entries, ")


def test_entries_are_canonical_for_rfc8785(lived: Path) -> None:
    """Parsed by the standard library and written by another canonicaliser, each entry gives the same bytes."""
    with SnapshotChain(lived, create=False) as chain:
        vkey = chain.keys()[-1]
        chain._log.refresh()
        vkey = chain._log.head_signers[0]
    entries = walker.walk(lived / "log", vkey).entries
    assert len(entries) >= 12
    for data in entries:
        assert rfc8785.dumps(json.loads(data)) == data


def test_receipts_are_checked_by_the_walker(grown: Grown) -> None:
    """Index, proof and head as tlog-proof puts them together; each part of it counts."""
    key, entry = walker.parse_key(grown.vkey), grown.log.entry_bytes(7)
    hashes = "".join(f"{item}\n" for item in encoded(grown.log.inclusion(7, 300)))
    receipt = f"c2sp.org/tlog-proof@v1\nindex 7\n{hashes}\n".encode() + grown.heads[300]
    assert walker.check_receipt(receipt, entry, key).size == 300
    assert walker.check_receipt(receipt.replace(b"index", b"extra AAAA\nindex", 1), entry, key).size == 300
    other_head = receipt.replace(grown.heads[300], grown.heads[257])
    for wrong in (receipt.replace(b"index 7", b"index 8"), receipt.replace(b"index 7", b"index 700"), other_head):
        with pytest.raises(RefusedError):
            walker.check_receipt(wrong, entry, key)
    with pytest.raises(RefusedError):
        walker.check_receipt(receipt, entry + b" ", key)


def test_cosignatures_are_checked_by_the_walker(grown: Grown) -> None:
    """A witness's line under a head holds for that head alone, and says when it was made."""
    witness = SigningKey.generate()
    key = walker.parse_key(witness.cosigner(WITNESS))
    text, _ = walker.split_note(grown.heads[300])
    line = witness.cosign(WITNESS, text, 1_767_000_000)
    cosignature = f"\u2014 {WITNESS} {base64.b64encode(line.key_id + line.signature).decode()}\n".encode()
    assert walker.cosigned_s(grown.heads[300] + cosignature, key) == 1_767_000_000
    assert walker.read_head(grown.heads[300] + cosignature, walker.parse_key(grown.vkey)).size == 300
    with pytest.raises(RefusedError):
        walker.cosigned_s(grown.heads[257] + cosignature, key)


def test_the_audit_agrees(grown: Grown) -> None:
    """Our own full audit has no problem with what the others accept: every file under ``log/`` is looked at."""
    result = audit_log(grown.store, ORIGIN)
    assert not result.problems
    assert result.head is not None
    assert result.head.size == max(SIZES)
