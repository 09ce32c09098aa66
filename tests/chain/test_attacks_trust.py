"""The rows of the threat table that take more than the folder: keys, policy, pins, witnesses, a bound of age.

Each is an attack that ``test_attacks.py`` shows to go unnoticed by a fresh reader.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from ciuic_async import SnapshotChain
from ciuic_async.errors import IntegrityError, NotFoundError
from ciuic_async.format import layout
from ciuic_async.format.entry import NoteEntry
from ciuic_async.stores.local import LocalStore
from ciuic_async.transparency import note
from ciuic_async.transparency.keys import SigningKey
from ciuic_async.transparency.log import Log, LogHead
from ciuic_async.transparency.pins import Pins
from ciuic_async.transparency.policy import Policy
from ciuic_async.transparency.witness import Answer, Witness, request_body
from ciuic_async.verify import VerifyReport, verify_store
from tests.chain import walker
from tests.chain.logs import COMMON
from tests.chain.test_attacks import replaced, rewritten
from tests.chain.victim import SIZE, STEPS, Victim, away, make_victim, restored

pytestmark = [pytest.mark.damages]

EDGE = layout.tile(0, 0, SIZE)
BUNDLE = layout.entry_bundle(0, SIZE)
HEAD = layout.LOG_HEAD
NOW_S = 1_767_000_000


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Victim:
    folder = tmp_path_factory.mktemp("victim")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))
        return make_victim(folder / "chain")


@pytest.fixture
def victim(original: Victim, tmp_path: Path) -> Victim:
    return original.copy(tmp_path / "chain")


def origin(victim: Victim) -> str:
    return victim.log().origin


def verified(victim: Victim, **reader: Any) -> VerifyReport:
    """What a reader finds who brings something along."""
    with closing(LocalStore(victim.path)) as store:
        return verify_store(store, **reader)


def kinds(report: VerifyReport) -> set[str]:
    return {problem.kind for problem in report.problems}


def level(report: VerifyReport, name: str) -> str:
    return next(found.state for found in report.levels if found.name == name)


def pinned(victim: Victim) -> Pins:
    """The pins of a reader who found the chain good before it was attacked."""
    pins = Pins.of_user()
    assert verified(victim, pins=pins).ok
    assert pins.read(origin(victim)) is not None
    return Pins.of_user()


def put_in_place(victim: Victim, other: Victim) -> None:
    """The attacker's store where the reader looks."""
    shutil.rmtree(victim.path)
    shutil.copytree(other.path, victim.path)


def rolled_back(victim: Victim, to: Path) -> Victim:
    """The store as it was one snapshot earlier."""
    older = victim.copy(to)
    older.delete_snapshot(victim.ids[-1])
    older.delete(layout.slot(SIZE - 1), EDGE, BUNDLE, HEAD)
    older.log().repair(victim.key)
    return older


# --- pins -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attack", "kind"), [(rolled_back, "pin_rollback"), (rewritten, "pin_fork"), (replaced, "pin_fork")]
)
def test_a_pin_tells(victim: Victim, tmp_path: Path, attack: Callable[[Victim, Path], Victim], kind: str) -> None:
    """Verify names it, opening and restoring raise it, a writer writes nothing; the note that was found is kept."""
    pins = pinned(victim)
    put_in_place(victim, attack(victim, tmp_path / "attacked"))
    report = verified(victim, pins=pins)
    assert kinds(report) == {kind}
    assert level(report, "pinned") == "failed"
    before = {path: path.read_bytes() for path in victim.path.rglob("*") if path.is_file()}
    with SnapshotChain(victim.path, key=victim.key.secret()) as chain:
        for use in (chain.latest, lambda: len(chain), lambda: chain.get("latest"), lambda: chain.note("no")):
            with pytest.raises(IntegrityError) as caught:
                use()
            assert caught.value.kind == kind
    assert restored(victim.path, victim.key) == kind, "never passed over, as damage would be"
    assert {path: path.read_bytes() for path in victim.path.rglob("*") if path.is_file()} == before
    evidence = [path.read_bytes() for path in Path(pins.path(origin(victim))).parent.glob("*.evidence")]
    assert (victim.path / HEAD).read_bytes() in evidence


def test_gc_sweeps_nothing_of_a_log_that_was_rolled_back(victim: Victim) -> None:
    """The attacker took away the newest entry alone: to gc its snapshot looks as if it had never been committed.

    With the pin nothing goes; bring the entry back, and the snapshot is whole.
    """
    pins = pinned(victim)
    taken = {name: victim.file(name).read_bytes() for name in (layout.slot(SIZE - 1), EDGE, BUNDLE, HEAD)}
    victim.delete(*taken)
    victim.log().repair(victim.key)
    before = {path: path.read_bytes() for path in victim.path.rglob("*") if path.is_file()}
    with SnapshotChain(victim.path, key=victim.key.secret()) as chain:
        for dry_run in (True, False):
            with pytest.raises(IntegrityError) as caught:
                chain.gc(orphan_age_s=0, dry_run=dry_run)
            assert caught.value.kind == "pin_rollback"
    assert {path: path.read_bytes() for path in victim.path.rglob("*") if path.is_file()} == before
    for name, data in taken.items():
        victim.put(name, data)
    assert verified(victim, pins=pins).ok


@pytest.mark.parametrize("attack", [rolled_back, rewritten])
def test_a_writer_pins_what_it_wrote(tmp_path: Path, attack: Callable[[Victim, Path], Victim]) -> None:
    """Slots and head rolled back together do not make it fork its own history, though it never verified anything."""
    victim = make_victim(tmp_path / "chain")
    put_in_place(victim, attack(victim, tmp_path / "attacked"))
    slots = sorted(path.name for path in (victim.path / layout.SLOTS).iterdir())
    with SnapshotChain(victim.path, key=victim.key.secret()) as chain, pytest.raises(IntegrityError) as caught:
        chain.note("in the place of another entry")
    assert caught.value.kind in ("pin_rollback", "pin_fork")
    assert sorted(path.name for path in (victim.path / layout.SLOTS).iterdir()) == slots


def test_a_reader_that_a_writer_overtakes_is_told_of_no_attack(victim: Victim, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pin moves on between a reader's look at the log and its look at the pin: no reason to doubt the log."""
    refresh = Log.refresh
    overtaken: list[bool] = []

    def overtake(log: Log) -> LogHead:
        head = refresh(log)
        if not overtaken:
            overtaken.append(True)
            with SnapshotChain(victim.path, key=victim.key.secret()) as other:
                other.note("meanwhile")
        return head

    monkeypatch.setattr(Log, "refresh", overtake)
    with SnapshotChain(victim.path, create=False) as chain:
        latest = chain.latest()
    assert overtaken
    assert latest is not None
    assert latest.step == STEPS


def test_a_verifier_that_a_writer_overtakes_is_told_of_no_attack(victim: Victim) -> None:
    """The same of verify, whose look at the log takes longest."""

    class Overtaken(LocalStore):
        """Another process appends and pins as soon as it was seen that no slot is left to read."""

        done = False

        def read(self, name: str, limit_bytes: int) -> bytes:
            try:
                return super().read(name, limit_bytes)
            except NotFoundError:
                if name == layout.slot(SIZE) and not self.done:
                    self.done = True
                    with SnapshotChain(victim.path, key=victim.key.secret()) as other:
                        other.note("meanwhile")
                raise

    with closing(Overtaken(victim.path)) as store:
        report = verify_store(store, pins=Pins.of_user())
        assert store.done
    assert kinds(report) == set()


# --- keys and policy --------------------------------------------------------------------------------------------------


def test_a_key_from_elsewhere_tells_a_replaced_store(victim: Victim, tmp_path: Path) -> None:
    """The writer's key in the reader's hand: the same for a key that was given, a policy, and the pin's."""
    vkey = victim.key.vkey(origin(victim))
    policy = Policy.parse(f"log {vkey}\nquorum none\n".encode())
    for reader in ({"keys": [vkey]}, {"policy": policy}):
        report = verified(victim, **reader)
        assert report.ok
        assert level(report, "signature") == "ok"
        assert "integrity only" not in report.level
    other = replaced(victim, tmp_path / "replaced")
    for reader in ({"keys": [vkey]}, {"policy": policy}):
        report = verified(other, **reader)
        assert kinds(report) == {"signer_untrusted"}
        assert level(report, "signature") == "failed"


def test_the_key_is_never_taken_from_the_store(victim: Victim, tmp_path: Path) -> None:
    """A policy that lies in the replaced store names its own key, and proves nothing."""
    other = replaced(victim, tmp_path / "replaced")
    with SnapshotChain(other.path, create=False) as chain:
        (vkey,) = chain.keys()
    other.put("log/policy.txt", f"log {vkey}\nquorum none\n".encode())
    report = verified(other)
    assert "integrity only" in report.level
    assert level(report, "signature") == "not asked"


def test_a_strangers_key_is_unendorsed(victim: Victim) -> None:
    """It is named, with how much it wrote, and a problem where the reader says so."""
    stranger = SigningKey.generate()
    with away(victim.path.with_suffix(".home")), SnapshotChain(victim.path, key=stranger.secret()) as chain:
        chain.note("by somebody")
    with SnapshotChain(victim.path, key=victim.key.secret()) as chain:
        chain.note("by the writer, whose head it is again")
    vkey = victim.key.vkey(origin(victim))
    report = verified(victim, keys=[vkey])
    assert report.ok
    assert any(stranger.vkey(origin(victim)) in text and "unendorsed" in text for text in report.notes)
    assert kinds(verified(victim, keys=[vkey], endorsed=True)) == {"unendorsed"}
    assert verified(victim, keys=[vkey, stranger.vkey(origin(victim))], endorsed=True).ok


def test_a_stolen_key_is_the_writers_to_every_check(victim: Victim, tmp_path: Path) -> None:
    """Neither key nor policy tells rewritten history from the first one; only what saw that one does."""
    other = rewritten(victim, tmp_path / "rewritten")
    vkey = victim.key.vkey(origin(victim))
    assert verified(other, keys=[vkey], endorsed=True).ok


# --- witnesses and time -----------------------------------------------------------------------------------------------


class Watched:
    """A chain with one witness, as a writer's machine would ask it."""

    def __init__(self, victim: Victim, folder: Path) -> None:
        self.origin = origin(victim)
        self.witness = Witness(
            folder,
            SigningKey.generate(),
            "witness.example/w1",
            [note.parse_vkey(victim.key.vkey(self.origin))],
            clock=lambda: NOW_S,
        )
        self.size = 0
        writer = victim.key.vkey(self.origin)
        lines = f"log {writer}\nwitness w1 {self.witness.vkey}\nquorum w1\n"
        self.policy = Policy.parse(lines.encode())

    def ask(self, victim: Victim, old_size: int | None = None) -> Answer:
        """Show it the head of a store; a cosignature is put under the head, as a writer does."""
        log = victim.log()
        head = log.refresh()
        data = victim.file(HEAD).read_bytes()
        size = self.size if old_size is None else old_size
        path = log.consistency(size) if 0 < size <= head.size else []
        answer = self.witness.add_checkpoint(request_body(size, path, data))
        if answer.status == 200:
            victim.put(HEAD, data + answer.body)
            self.size = head.size
        return answer

    def evidence(self, folder: Path) -> list[Path]:
        return [path for path in (folder / "evidence").iterdir() if path.is_file()]


@pytest.fixture
def watched(victim: Victim, tmp_path: Path) -> Any:
    made = Watched(victim, tmp_path / "witness")
    yield made
    made.witness.close()


def test_a_cosigned_head_is_witnessed(victim: Victim, watched: Watched) -> None:
    """The reader who has the policy learns how many signed; the one who has not learns nothing from the line."""
    assert watched.ask(victim).status == 200
    report = verified(victim, policy=watched.policy)
    assert report.ok
    assert level(report, "witnessed") == "ok"
    assert "witnessed 1/1" in report.level
    assert level(verified(victim), "witnessed") == "not asked"


def test_the_walker_accepts_receipts(victim: Victim, watched: Watched) -> None:
    """What ``receipt`` makes is a tlog-proof to a program that knows nothing of us, cosignature included."""
    assert watched.ask(victim).status == 200
    with SnapshotChain(victim.path, create=False) as chain:
        data = chain.receipt("step:2")
    key = walker.parse_key(victim.key.vkey(watched.origin))
    head = walker.check_receipt(data, victim.entries()[2], key)
    assert head.size == SIZE
    note_of_receipt = data.partition(b"\n\n")[2]
    assert walker.cosigned_s(note_of_receipt, walker.parse_key(str(watched.witness.vkey))) == NOW_S
    with pytest.raises(walker.RefusedError):
        walker.check_receipt(data, victim.entries()[3], key)


def test_a_witness_refuses_a_second_history(victim: Victim, watched: Watched, tmp_path: Path) -> None:
    """Rewritten with the stolen key: the witness has signed the first one, and keeps both as evidence."""
    assert watched.ask(victim).status == 200
    other = rewritten(victim, tmp_path / "rewritten")
    assert watched.ask(other).status == 422
    with away(tmp_path), SnapshotChain(other.path, key=victim.key.secret()) as chain:
        chain.note("longer than the first")
    assert watched.ask(other).status == 422
    assert watched.evidence(tmp_path / "witness")
    report = verified(other, policy=watched.policy)
    assert kinds(report) == {"not_witnessed"}, "and so the reader with the policy sees that nobody signed it"


def test_a_witness_refuses_a_rollback(victim: Victim, watched: Watched, tmp_path: Path) -> None:
    """The store one snapshot earlier, and what a writer made of it: 409 with the size that was signed, or 422."""
    older = rolled_back(victim, tmp_path / "older")
    assert watched.ask(victim).status == 200
    answer = watched.ask(older, old_size=SIZE - 2)
    assert (answer.status, answer.body) == (409, f"{SIZE}\n".encode())
    older.log().append(lambda _: [NoteEntry(COMMON, "x").encode()], victim.key, announce=lambda: b"")
    assert watched.ask(older).status == 422


def test_split_views_do_not_get_the_same_witness(victim: Victim, watched: Watched, tmp_path: Path) -> None:
    """Of two histories that part, one is witnessed; the readers of the other one see that it is not."""
    left, right = victim.copy(tmp_path / "left"), victim.copy(tmp_path / "right")
    for side, text in ((left, "to you"), (right, "to them")):
        with away(side.path.with_suffix(".home")), SnapshotChain(side.path, key=victim.key.secret()) as chain:
            chain.note(text)
    assert watched.ask(left).status == 200
    assert watched.ask(right).status == 422
    assert level(verified(left, policy=watched.policy), "witnessed") == "ok"
    assert kinds(verified(right, policy=watched.policy)) == {"not_witnessed"}


def test_removed_newest_snapshots_are_not_fresh(victim: Victim, watched: Watched, tmp_path: Path) -> None:
    """Without a pin: the witness's time is as old as the head it signed; the reader says how old is too old.

    A log that is not written to gets old too: who sets a bound lets its witnesses sign again and again.
    """
    older = rolled_back(victim, tmp_path / "older")
    assert watched.ask(older).status == 200
    report = verified(older, policy=watched.policy, max_age_s=3600.0, now_s=NOW_S + 60)
    assert report.ok
    assert level(report, "fresh") == "ok"
    report = verified(older, policy=watched.policy, max_age_s=3600.0, now_s=NOW_S + 7200)
    assert kinds(report) == {"not_fresh"}
    # Without witnesses the writer's own clock has to do, and says so.
    late_s = time.time() + 7200
    assert kinds(verified(older, max_age_s=3600.0, now_s=late_s)) == {"not_fresh"}


def test_a_forged_cosignature_is_no_witness(victim: Victim, watched: Watched) -> None:
    """By another key, of another head, or with a bit of it changed: a line under the head convinces nobody."""
    head = victim.file(HEAD).read_bytes()
    text = head.decode().rpartition("\n\n")[0] + "\n"
    impostor = SigningKey.generate()
    for line in (
        impostor.cosign("witness.example/w1", text, NOW_S),
        impostor.cosign("witness.example/w1", text.replace(f"\n{SIZE}\n", "\n9\n"), NOW_S),
    ):
        victim.put(HEAD, head + note.format_note("", (line,)).encode()[1:])
        report = verified(victim, policy=watched.policy)
        assert kinds(report) == {"not_witnessed"}, "nobody knows the key of that line"
        assert level(report, "witnessed") != "ok"
    victim.put(HEAD, head)
    assert watched.ask(victim).status == 200
    victim.change(HEAD, lambda data: data[:-10] + bytes([data[-10] ^ 1]) + data[-9:])
    report = verified(victim, policy=watched.policy)
    assert level(report, "witnessed") != "ok"
