"""Whose word a report stands on: keys, policies, pins, witnesses, time; and what becomes of those who lie."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

import ciuic_async
from ciuic_async import SnapshotChain
from ciuic_async.errors import UsageError
from ciuic_async.format import layout, merkle
from ciuic_async.stores.local import LocalStore
from ciuic_async.transparency import keys, note
from ciuic_async.transparency.keys import SigningKey
from ciuic_async.transparency.note import Signature, parse_vkey
from ciuic_async.transparency.pins import Pins
from ciuic_async.transparency.policy import Group, Policy, Witness
from ciuic_async.trust import History, parse_keys
from ciuic_async.verify import VerifyReport, verify_store

WITNESSES = [SigningKey.generate() for _ in range(3)]
NOW_S = 2_000_000_000


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """Two snapshots by the user's own key: three entries."""
    path = tmp_path / "chain"
    for value in (1.0, 2.0):
        ciuic_async.save({"w": torch.full((8,), value)}, path)
    return path


def verify(path: Path, **options: Any) -> VerifyReport:
    with closing(LocalStore(path)) as store:
        return verify_store(store, **options)


def states(report: VerifyReport) -> dict[str, str]:
    return {level.name: level.state for level in report.levels}


def keys_of(path: Path) -> list[str]:
    with SnapshotChain(path) as opened:
        return opened.keys()


def policy_for(path: Path, quorum: int | None = 2, logs: list[str] | None = None) -> Policy:
    """The chain's keys, and so many of three witnesses."""
    witnesses = tuple(Witness(f"w{n}", parse_vkey(key.cosigner(f"w{n}.example"))) for n, key in enumerate(WITNESSES))
    groups = () if quorum is None else (Group("most", quorum, ("w0", "w1", "w2")),)
    named = keys_of(path) if logs is None else logs
    return Policy(tuple(map(parse_vkey, named)), witnesses, groups, "most" if groups else None)


def cosign(path: Path, times_s: dict[int, int], name: str = layout.LOG_HEAD, to: str | None = None) -> None:
    """Add cosignatures under a head, as a witness client does."""
    parsed = note.parse((path / name).read_bytes(), name)
    lines = [WITNESSES[n].cosign(f"w{n}.example", parsed.text, at_s) for n, at_s in times_s.items()]
    write(path / (to or name), note.format_note(parsed.text, (*parsed.signatures, *lines)).encode())


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(data)


# --- keys -------------------------------------------------------------------------------------------------------------


def test_levels_in_order_without_anything_brought(chain: Path) -> None:
    """Every level has a state, in the documented order; who wrote the chain is not proven, and the report says so."""
    report = verify(chain)
    assert [level.name for level in report.levels] == [
        "signature", "tiles", "entries", "manifests", "chunk data", "pinned", "witnessed", "fresh", "timestamped",
    ]  # fmt: skip
    assert list(states(report).values()) == ["not asked", "ok", "ok", "ok", "ok", *["not asked"] * 4]
    assert report.level == "chunk data (integrity only)"
    assert verify(chain, level="manifests").level == "manifests (integrity only)"
    assert states(verify(chain, deep=False))["chunk data"] == "not asked"


def test_a_key_of_the_callers(chain: Path, tmp_path: Path) -> None:
    """As text, in a file among others, or in a policy: the signature level is reached; nothing else is trusted."""
    key = keys_of(chain)[0]
    (tmp_path / "keys").write_text(f"# ours\n{SigningKey.generate().vkey('other')}\n\n{key}\n")
    for options in ({"keys": [key]}, {"keys": [tmp_path / "keys"]}, {"policy": policy_for(chain, None)}):
        report = verify(chain, **options)
        assert report.ok
        assert report.level == "chunk data"
        assert states(report)["signature"] == "ok"


def test_a_key_that_did_not_sign(chain: Path) -> None:
    """Another key than the signer's: kind ``signer_untrusted``, which names what was found; never another level."""
    with SnapshotChain(chain) as opened:
        origin = opened.origin
    for options in (
        {"keys": [SigningKey.generate().vkey(origin)]},
        {"keys": [SigningKey.generate().vkey("another/log")]},
        {"policy": policy_for(chain, None, logs=[SigningKey.generate().vkey(origin)])},
    ):
        report = verify(chain, **options)
        assert [problem.kind for problem in report.problems] == ["signer_untrusted"]
        assert keys_of(chain)[0] in report.problems[0].message
        assert report.level == "none (integrity only)"
        assert any("unendorsed key" in text and "wrote 3 entries" in text for text in report.notes)


def test_a_chain_replaced_by_another_is_found_out_by_its_key(chain: Path, tmp_path: Path) -> None:
    """Whole and signed, but by somebody else under another name: integrity says yes, the caller's key says no."""
    other = tmp_path / "other"
    ciuic_async.save({"w": torch.zeros(8)}, other, key=SigningKey.generate().secret())
    assert verify(other).ok
    assert [problem.kind for problem in verify(other, keys=keys_of(chain)).problems] == ["signer_untrusted"]


def test_unendorsed_writers_are_shown_and_refused_on_demand(chain: Path) -> None:
    """A key that announced itself between two good entries: a note says how much it wrote, ``endorsed`` refuses it."""
    ours = keys_of(chain)
    theirs = SigningKey.generate()
    with SnapshotChain(chain, key=theirs.secret()) as opened:
        opened.note("mine")
    with SnapshotChain(chain) as opened:
        opened.note("ours")
    report = verify(chain, keys=ours)
    assert report.ok
    assert [text for text in report.notes if "unendorsed" in text and "wrote 2 entries" in text]
    report = verify(chain, keys=ours, endorsed=True)
    assert [problem.kind for problem in report.problems] == ["unendorsed"]
    assert states(report)["entries"] == "failed"
    with SnapshotChain(chain) as opened:
        both = [*ours, theirs.vkey(opened.origin)]
    assert verify(chain, keys=both, endorsed=True).ok


@pytest.mark.parametrize("text", ["nonsense", "a+00000000+AAAA", "/nowhere/at/all"])
def test_what_is_no_key(text: str) -> None:
    """Neither a key nor a file of keys: a UsageError before anything is read."""
    with pytest.raises(UsageError) as caught:
        parse_keys([text])
    assert caught.value.kind == "vkey_malformed"


def test_what_is_no_file_of_keys(tmp_path: Path) -> None:
    """Empty files, other text, folders: a UsageError that names the file."""
    for number, content in enumerate((b"", b"# nothing\n", b"not a key\n", b"\xff\xfe", b"a" * 70_000)):
        path = tmp_path / str(number)
        path.write_bytes(content)
        with pytest.raises(UsageError, match=str(path)):
            parse_keys([path])
    with pytest.raises(UsageError, match="not a file"):
        parse_keys([tmp_path])


# --- pins -------------------------------------------------------------------------------------------------------------


def test_the_first_look_pins_and_the_second_stands_on_it(chain: Path, tmp_path: Path) -> None:
    """A reader without keys: integrity only, and pinned; the next time the pin's key signs for it."""
    pins = Pins(str(tmp_path / "reader"))
    first = verify(chain, pins=pins)
    assert first.level == "chunk data (integrity only)"
    assert states(first)["pinned"] == "unknown"
    assert any("could not be noticed" in level.detail for level in first.levels if level.name == "pinned")
    second = verify(chain, pins=pins)
    assert second.level == "chunk data, pinned"
    assert states(second)["signature"] == "ok"


@pytest.mark.damages
def test_nothing_is_pinned_that_has_a_problem(chain: Path, tmp_path: Path) -> None:
    """A damaged manifest, or an untrusted signer: the reader has no pin afterwards."""
    pins = Pins(str(tmp_path / "reader"))
    with SnapshotChain(chain) as opened:
        origin = opened.origin
        name = layout.manifest_root(opened.get("latest").id)
    assert not verify(chain, pins=pins, keys=[SigningKey.generate().vkey(origin)]).ok
    (chain / name).unlink()
    assert not verify(chain, pins=pins).ok
    assert pins.read(origin) is None


def test_a_pin_does_not_pass_to_a_key_that_nobody_trusts(chain: Path, tmp_path: Path) -> None:
    """A head by a key that announced itself: pinned as an extension, but the pin stays with the key that it had."""
    pins = Pins(str(tmp_path / "reader"))
    verify(chain, pins=pins)
    with SnapshotChain(chain, key=SigningKey.generate().secret()) as opened:
        opened.note("from another machine")
        origin = opened.origin
    for _ in range(2):
        report = verify(chain, pins=pins)
        assert report.ok
        assert report.level == "chunk data, pinned (integrity only)"
    pin = pins.read(origin)
    assert pin is not None
    assert pin.size == 3
    assert verify(chain, pins=pins, keys=keys_of(chain)).level == "chunk data, pinned"
    pin = pins.read(origin)
    assert pin is not None
    assert pin.size == 5


@pytest.mark.damages
def test_removed_newest_snapshots_are_noticed_by_the_pin_alone(chain: Path, tmp_path: Path) -> None:
    """The newest entry is taken away without a trace: nothing else can tell, the pin does, and stays."""
    pins = Pins(str(tmp_path / "reader"))
    older = (chain / "log").rename(tmp_path / "log")
    verify_copy = tmp_path / "copy"
    older.rename(chain / "log")
    with SnapshotChain(chain) as opened:
        latest, origin = opened.get("latest").id, opened.origin
    verify(chain, pins=pins)
    chain.rename(verify_copy)
    for name in (layout.slot(2), "log/tile/0/000.p/3", "log/tile/entries/000.p/3"):
        (verify_copy / name).unlink()
    for folder in ("segments", "manifests"):
        for file in (verify_copy / folder / latest).iterdir():
            file.unlink()
    (verify_copy / layout.locator(latest, 0)).unlink()
    with closing(LocalStore(verify_copy)) as store:
        leaves = [merkle.leaf_hash(entry) for entry in _entries(store, origin, 2)]
    key = SigningKey.from_secret((tmp_path / "home/config/ciuic_async/keys/ed25519.key").read_text())
    head = key.sign(origin, note.head_text(origin, 2, merkle.root(leaves)))
    write(verify_copy / layout.LOG_HEAD, head.encode())
    assert verify(verify_copy, keys=[key.vkey(origin)]).ok, "nothing but a pin or a witness can tell"
    report = verify(verify_copy, pins=pins)
    assert [problem.kind for problem in report.problems] == ["pin_rollback"]
    assert states(report)["pinned"] == "failed"
    pin = pins.read(origin)
    assert pin is not None
    assert pin.size == 3
    assert len(list((tmp_path / "reader").glob("*.evidence"))) == 1


def _entries(store: LocalStore, origin: str, count: int) -> list[bytes]:
    from ciuic_async.transparency.log import Log

    log = Log(store, origin)
    log._replay()
    return [log.entry_bytes(index) for index in range(count)]


# --- witnesses and time -----------------------------------------------------------------------------------------------


def test_a_quorum(chain: Path) -> None:
    """Two of three cosign the head: witnessed 2/3. By none or one what the policy asks for does not hold, and the
    report is not ok: who rewrites history has only to leave the cosignatures away. Nothing is pinned then."""
    policy = policy_for(chain)
    pins = Pins(str(chain.parent / "reader"))
    for count in range(2):
        report = verify(chain, policy=policy, pins=pins)
        assert [problem.kind for problem in report.problems] == ["not_witnessed"]
        assert f"{count}/3, quorum not met" in report.problems[0].message
        assert (states(report)["witnessed"], report.level) == ("failed", "chunk data")
        cosign(chain, {count: NOW_S})
    with SnapshotChain(chain) as opened:
        assert pins.read(opened.origin) is None
    write(chain / layout.LOG_HEAD, (chain / layout.LOG_HEAD).read_bytes().rpartition(b"\xe2\x80\x94")[0])
    cosign(chain, {2: NOW_S})
    report = verify(chain, policy=policy)
    assert report.level == "chunk data, witnessed 2/3"
    assert report.notes == ()


def test_a_quorum_for_an_older_head(chain: Path) -> None:
    """``log/witnessed`` keeps the head that had a quorum while others came after it: the report says how far."""
    cosign(chain, {0: NOW_S, 1: NOW_S}, to=layout.WITNESSED)
    with SnapshotChain(chain) as opened:
        opened.note("later")
    report = verify(chain, policy=policy_for(chain))
    assert report.ok
    found = next(level for level in report.levels if level.name == "witnessed")
    assert (found.state, found.detail) == ("ok", "2/3, at 3 of 4 entries")


class Overtaken(LocalStore):
    """A store in which others go on at the moment when a certain file is read."""

    def __init__(self, path: Path, name: str, meanwhile: Callable[[], None]) -> None:
        super().__init__(path)
        self._awaited, self._meanwhile = name, meanwhile

    def read(self, name: str, limit_bytes: int) -> bytes:
        if name == self._awaited:
            self._awaited = ""
            self._meanwhile()
        return super().read(name, limit_bytes)


def test_a_chain_that_is_witnessed_while_it_is_verified(chain: Path) -> None:
    """After the audit of the log a writer commits, witnesses sign its head, and a receipt under it appears: all of it
    is of this log, and no fork."""

    def go_on() -> None:
        with SnapshotChain(chain) as opened:
            opened.note("meanwhile")
            cosign(chain, {0: NOW_S, 1: NOW_S}, to=layout.WITNESSED)
            snapshot = opened.get("latest").id
            write(chain / layout.receipt(snapshot), opened.receipt(snapshot))

    with closing(Overtaken(chain, layout.WITNESSED, go_on)) as store:
        report = verify_store(store, policy=policy_for(chain))
    assert report.problems == ()
    assert states(report)["witnessed"] == "ok"


@pytest.mark.damages
def test_a_later_head_that_the_log_does_not_reach_is_a_fork(chain: Path) -> None:
    """Signed with the chain's own key for more entries than there are, or for others: evidence of a rollback."""
    key = keys.find(None, chain_folder=None)
    assert key is not None
    with SnapshotChain(chain) as opened:
        origin, size = opened.origin, opened.log_size

    def another() -> None:
        with SnapshotChain(chain) as opened:
            opened.note("meanwhile")

    for meanwhile in (lambda: None, another):
        write(chain / layout.WITNESSED, key.sign(origin, note.head_text(origin, size + 1, b"x" * 32)).encode())
        with closing(Overtaken(chain, layout.WITNESSED, meanwhile)) as store:
            assert [problem.kind for problem in verify_store(store).problems] == ["fork"]


def test_a_policy_that_asks_for_nobody(chain: Path) -> None:
    """``quorum none``: without cosignatures it is not asked, with one it is reported."""
    policy = policy_for(chain, None)
    assert states(verify(chain, policy=policy))["witnessed"] == "not asked"
    cosign(chain, {1: NOW_S})
    assert verify(chain, policy=policy).level == "chunk data, witnessed 1/3"


def test_a_quorum_of_nothing(tmp_path: Path) -> None:
    """A chain without an entry, as one whose whole log was taken away: not ok for whom the policy asks for witnesses;
    and of no level is said that all of nothing is good."""
    SnapshotChain(tmp_path / "empty").close()
    report = verify(tmp_path / "empty")
    assert (report.ok, report.level) == (True, "none (integrity only)")
    assert {states(report)[name] for name in ("tiles", "entries", "manifests", "chunk data")} == {"unknown"}
    with SnapshotChain(tmp_path / "empty") as opened:
        opened.note("no snapshot yet")
    assert verify(tmp_path / "empty").level == "entries (integrity only)"
    SnapshotChain(tmp_path / "other").close()
    report = verify(tmp_path / "other", policy=policy_for(tmp_path / "empty"))
    assert [problem.kind for problem in report.problems] == ["not_witnessed"]


def test_endorsed_needs_somebody_to_endorse(chain: Path) -> None:
    """Without keys, or with a policy of witnesses alone, it would check nothing: a UsageError."""
    for options in ({}, {"policy": policy_for(chain, logs=[])}):
        with pytest.raises(UsageError, match="endorse"):
            verify(chain, endorsed=True, **options)


@pytest.mark.damages
def test_a_cosignature_that_does_not_hold(chain: Path) -> None:
    """A known witness's line with a changed time is a problem, and does not count."""
    cosign(chain, {0: NOW_S, 1: NOW_S})
    parsed = note.parse((chain / layout.LOG_HEAD).read_bytes(), "")
    lines = list(parsed.signatures)
    lines[-1] = Signature(lines[-1].name, lines[-1].key_id, (NOW_S + 1).to_bytes(8, "big") + lines[-1].signature[8:])
    write(chain / layout.LOG_HEAD, note.format_note(parsed.text, tuple(lines)).encode())
    report = verify(chain, policy=policy_for(chain))
    assert [problem.kind for problem in report.problems] == ["signature_invalid", "not_witnessed"]
    assert states(report)["witnessed"] == "failed"


@pytest.mark.damages
@pytest.mark.parametrize("what", ["another log", "another root", "garbage", "stranger"])
def test_a_witnessed_file_that_is_no_head_of_this_log(chain: Path, what: str) -> None:
    """``log/witnessed`` is checked with or without a policy: another log's head or a fork's is a problem."""
    with SnapshotChain(chain) as opened:
        origin, key = opened.origin, opened._signing_key()
    text = note.head_text(origin, 2, b"\1" * 32)
    data = {
        "another log": key.sign("other", note.head_text("other", 2, b"\1" * 32)).encode(),
        "another root": key.sign(origin, text).encode(),
        "garbage": b"garbage",
        "stranger": SigningKey.generate().sign(origin, text).encode(),
    }[what]
    write(chain / layout.WITNESSED, data)
    report = verify(chain)
    assert [problem.where for problem in report.problems] == [layout.WITNESSED]
    expected = {"another log": "signer_unknown", "another root": "fork", "garbage": "note_malformed"}
    assert report.problems[0].kind == expected.get(what, "signer_unknown")


def test_fresh_by_witnesses(chain: Path) -> None:
    """As old as the oldest cosignature that the newest quorum needs; too old is a problem, the future counts not."""
    policy = policy_for(chain)
    cosign(chain, {0: NOW_S - 10, 1: NOW_S - 100, 2: NOW_S - 1000})
    for max_age_s, ok in ((100, True), (99, False)):
        report = verify(chain, policy=policy, max_age_s=max_age_s, now_s=NOW_S)
        assert report.ok == ok
        assert states(report)["fresh"] == ("ok" if ok else "failed")
        assert [problem.kind for problem in report.problems] == ([] if ok else ["not_fresh"])
    assert not verify(chain, policy=policy, max_age_s=3600, now_s=NOW_S - 1000).ok, "two of three lie in the future"


def test_fresh_without_witnesses_is_the_writers_word(chain: Path) -> None:
    """The newest entry's own time, and the report says whose clock that is."""
    report = verify(chain, max_age_s=3600)
    found = next(level for level in report.levels if level.name == "fresh")
    assert (found.state, "writer's own clock" in found.detail) == ("ok", True)
    report = verify(chain, max_age_s=60, now_s=NOW_S * 2)
    assert [problem.kind for problem in report.problems] == ["not_fresh"]


# --- receipts and the policy's copy -----------------------------------------------------------------------------------


def test_receipts_and_a_policy_copy_that_are_right(chain: Path) -> None:
    """Receipts of each snapshot under an older and the newest head pass; the copy is a note, never trust."""
    with SnapshotChain(chain) as opened:
        for snapshot in opened:
            write(chain / layout.receipt(snapshot.id), opened.receipt(snapshot.id))
        opened.note("later")
    write(chain / layout.POLICY, policy_for(chain).format().encode())
    report = verify(chain)
    assert report.ok, report.problems
    assert report.level == "chunk data (integrity only)"
    assert any(layout.POLICY in text for text in report.notes)


@pytest.mark.damages
def test_receipts_and_a_policy_copy_that_are_wrong(chain: Path) -> None:
    """Another snapshot's receipt, a changed one, garbage, and a policy that is none: each is named alone."""
    with SnapshotChain(chain) as opened:
        first, second = (snapshot.id for snapshot in opened)
        good = opened.receipt(first)
    for data in (opened_bytes(chain, second), good.replace(b"index 1", b"index 2"), b"garbage", good[:-5], b""):
        write(chain / layout.receipt(first), data)
        report = verify(chain)
        assert [problem.where for problem in report.problems] == [layout.receipt(first)], data
        assert states(report)["chunk data"] == "ok"
    write(chain / layout.receipt(first), good)
    assert verify(chain).ok
    write(chain / layout.POLICY, b"quorum nobody\n")
    assert [problem.kind for problem in verify(chain).problems] == ["policy_malformed"]


def opened_bytes(path: Path, ref: str) -> bytes:
    with SnapshotChain(path) as opened:
        return opened.receipt(ref)


def test_roots_of_every_size() -> None:
    """One pass finds the roots that hashing each prefix finds; sizes beyond the log had none."""
    leaves = [merkle.leaf_hash(bytes([n % 256, n // 256])) for n in range(600)]
    history = History(leaves)
    history.prepare([1, 255, 256, 257, 600, 601, -1])
    for size in (0, 1, 2, 255, 256, 257, 511, 512, 600):
        assert history.had(size, merkle.root(leaves[:size]))
        assert not history.had(size, b"\0" * 32)
    assert not history.had(601, b"\0" * 32)
    assert not history.had(-1, merkle.EMPTY_ROOT)
