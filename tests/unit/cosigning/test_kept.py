"""Collecting cosignatures: what is kept, and what a later process makes of it."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable
from pathlib import Path

from ciuic_async.format import layout
from ciuic_async.format.entry import SnapshotEntry
from ciuic_async.retention.policy import KeepLatest
from ciuic_async.transparency import note, proof
from ciuic_async.transparency.cosigning import Pace
from ciuic_async.transparency.keys import SigningKey
from ciuic_async.transparency.receipt import Receipt
from tests.witnesses import (
    WAIT_S,
    Place,
    signers,
    stop,
)


def test_cosignatures_and_receipts_are_kept(place: Place, witness: Callable, cosigner: Callable) -> None:  # type: ignore[type-arg]
    """Head and log/witnessed carry the signatures of all witnesses under the log's own; each snapshot gets a receipt
    that proves its entry under a signed head. Other writers' heads are witnessed just so."""
    addresses = [witness()[0] for _ in range(3)]
    item = cosigner(addresses, 2)
    ids = [place.save(), place.save()]
    log = place.log()
    assert item.wait(len(log), WAIT_S)
    assert item.settle(WAIT_S)
    for found in (place.head(), place.witnessed()):
        assert place.size(found) == len(log)
        assert found.signatures[0].name == place.origin
        assert signers(found, addresses) == 3
    entries = {e.snapshot: index for index, e in log.entries() if isinstance(e, SnapshotEntry)}
    for snapshot in ids:
        data = place.store.read(layout.receipt(snapshot), note.LIMIT_BYTES)
        top, _, signed = data.partition(b"\n\n")
        header, extra, index, *hashes = top.decode().split("\n")
        assert (header, index) == ("c2sp.org/tlog-proof@v1", f"index {entries[snapshot]}")
        assert base64.b64decode(extra.removeprefix("extra ")) == log.entry_bytes(entries[snapshot])
        parsed = note.parse(signed, "receipt")
        size, root = note.parse_head(parsed.text, place.origin, "receipt")
        path = [base64.b64decode(line) for line in hashes]
        proof.check_inclusion(entries[snapshot], size, log.leaf_hash(entries[snapshot]), path, root)
        assert signers(parsed, addresses) >= 2
    statuses = item.status()
    assert [(s.size, s.error, s.forked) for s in statuses] == [(len(log), None, False)] * 3
    assert item.witnessed_size == len(log)


def test_the_bytes_of_a_receipt() -> None:
    """Header, index, hashes one a line, an empty line, the note; also where there is no hash."""
    assert Receipt(7, (bytes(32),), b"note\n").encode() == (
        b"c2sp.org/tlog-proof@v1\nindex 7\n" + b"A" * 43 + b"=\n\nnote\n"
    )
    assert Receipt(0, (), b"note\n").encode() == b"c2sp.org/tlog-proof@v1\nindex 0\n\nnote\n"


def test_nothing_starts_before_the_first_notice(place: Place, witness: Callable, cosigner: Callable) -> None:  # type: ignore[type-arg]
    """No thread and no request until then; closing before or twice is fine; after it nothing starts any more."""
    address, server = witness()
    item = cosigner([address], 1)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ciuic-witness")]
    item.close()
    item.notice()
    assert not item.wait(1, 0.0)
    item.close()
    assert server.asked == 0


def test_a_later_process_goes_on_where_the_first_stopped(place: Place, witness: Callable, cosigner: Callable) -> None:  # type: ignore[type-arg]
    """It knows from log/witnessed what each witness signed last, asks nobody again for the same head, and makes up for
    receipts that were not written; those of pruned snapshots are not."""
    addresses, servers = zip(*(witness() for _ in range(2)), strict=True)
    gone = place.save()
    place.save()
    first = cosigner(list(addresses), 2)
    assert first.wait(len(place.log()), WAIT_S)
    first.close()
    asked = [server.asked for server in servers]
    second = cosigner(list(addresses), 2)
    assert second.wait(len(place.log()), WAIT_S)
    assert second.settle(WAIT_S)
    assert [server.asked for server in servers] == asked
    second.close()
    kept = place.save()
    place.chain.prune(KeepLatest(1))
    for snapshot in (gone, kept):
        place.store.delete(layout.receipt(snapshot))
    third = cosigner(list(addresses), 2)
    assert third.wait(len(place.log()), WAIT_S)
    assert third.settle(WAIT_S)
    assert [server.asked for server in servers] == [count + 1 for count in asked]  # no 409 in between
    assert place.store.size(layout.receipt(kept)) is not None
    assert place.store.size(layout.receipt(gone)) is None


def test_a_restarted_witness_goes_on(place: Place, witness: Callable, cosigner: Callable, tmp_path: Path) -> None:  # type: ignore[type-arg]
    """Its state is kept; a client that knows nothing is told the size and asks once more."""
    key = SigningKey.generate()
    address, server = witness("example.org/w", tmp_path / "kept", key)
    item = cosigner([address], 1)
    assert item.wait(place.add(), WAIT_S)
    item.close()
    stop(server)
    place.store.delete(layout.WITNESSED)
    address, server = witness("example.org/w", tmp_path / "kept", key)
    size = place.add()
    other = cosigner([address], 1)
    assert other.wait(size, WAIT_S)
    assert other.settle(WAIT_S)
    assert server.asked == 2
    assert place.size(place.witnessed()) == size


def test_a_cosignature_for_a_head_that_is_past_is_still_kept(
    place: Place, witness: Callable, cosigner: Callable
) -> None:  # type: ignore[type-arg]
    """A commit while the witness is asked: the head stays the newer one, without the signature that is not its own,
    log/witnessed gets the older one, and then the newer."""
    address, server = witness()
    item = cosigner([address], 1)
    answer = server.witness.add_checkpoint
    sizes = [len(place.log())]
    seen: list[tuple[int, int]] = []

    def slow(body: bytes) -> object:
        if len(sizes) == 1:
            sizes.append(place.add())
        else:
            item.wait(sizes[0], WAIT_S)
            seen.append((place.size(place.witnessed()), signers(place.head(), [address])))
        return answer(body)

    server.witness.add_checkpoint = slow
    item.notice()
    assert item.wait(sizes[0], WAIT_S)
    assert item.wait(sizes[-1], WAIT_S)
    assert seen == [(sizes[0], 0)]
    assert place.size(place.head()) == place.size(place.witnessed()) == sizes[1]
    assert signers(place.head(), [address]) == 1


def test_two_processes_with_different_witnesses_do_not_undo_each_other(
    place: Place,
    witness: Callable,  # type: ignore[type-arg]
    cosigner: Callable,  # type: ignore[type-arg]
) -> None:
    """Each adds its own to the head and leaves the other's there."""
    addresses = [witness()[0] for _ in range(2)]
    size = len(place.log())
    for address in addresses:
        item = cosigner([address], 1)
        assert item.wait(size, WAIT_S)
        assert item.settle(WAIT_S)
    assert signers(place.head(), addresses) == 2


def test_cosignatures_of_an_idle_chain_are_renewed(place: Place, witness: Callable, cosigner: Callable) -> None:  # type: ignore[type-arg]
    """With ``refresh_s`` the witness is asked again for the same head once its signature is that old."""
    address, server = witness()
    now = [2_000_000_000]
    server.witness._clock = lambda: now[0]
    pace = Pace(retry_s=0.01, refresh_s=0.2)
    item = cosigner([address], 1, clock=lambda: now[0], pace=pace)
    assert item.wait(len(place.log()), WAIT_S)
    assert item.settle(WAIT_S)
    now[0] += 3600
    renewed = threading.Event()
    answer = server.witness.add_checkpoint
    server.witness.add_checkpoint = lambda body: (answer(body), renewed.set())[0]
    assert renewed.wait(WAIT_S)
    item.close()
    for found in (place.head(), place.witnessed()):
        assert len(found.signatures) == 2
        assert note.cosigned_at(found.signatures[1].signature) == 2_000_003_600


def test_a_witness_whose_clock_is_wrong_is_not_asked_without_end(
    place: Place, witness: Callable, cosigner: Callable
) -> None:  # type: ignore[type-arg]
    """Each of its signatures is old as soon as it is there, and so they are when our clock jumps: asked for once."""
    address, server = witness()
    server.witness._clock = lambda: 1000
    item = cosigner([address], 1, pace=Pace(retry_s=0.01, refresh_s=3600.0))
    assert item.wait(len(place.log()), WAIT_S)
    assert item.settle(WAIT_S)
    item.notice()
    assert item.settle(WAIT_S)
    assert server.asked == 1


def test_signatures_are_renewed_though_our_clock_stands_still(
    place: Place, witness: Callable, cosigner: Callable
) -> None:  # type: ignore[type-arg]
    """A clock that is slow or was set back makes the witness's signatures look young for ever: what passed here since
    it signed counts too."""
    address, server = witness()
    asked = threading.Semaphore(0)
    answer = server.witness.add_checkpoint
    server.witness.add_checkpoint = lambda body: (asked.release(), answer(body))[1]
    cosigner([address], 1, clock=lambda: 1000.0, pace=Pace(retry_s=0.01, refresh_s=0.2)).notice()
    for _ in range(3):
        assert asked.acquire(timeout=WAIT_S)


def test_receipts_of_pruned_snapshots_go(place: Place, witness: Callable, cosigner: Callable) -> None:  # type: ignore[type-arg]
    """With the snapshot; and one that was written late, by a process that did not know yet, with the next sweep. Time
    stamps stay, and so do receipts of snapshots that the log does not know: nobody can say what they are worth."""
    address, _ = witness()
    item = cosigner([address], 1)
    gone, kept = place.save(), place.save()
    assert item.wait(len(place.log()), WAIT_S)
    assert item.settle(WAIT_S)
    late = place.store.read(layout.receipt(gone), note.LIMIT_BYTES)
    place.store.overwrite(layout.timestamp(gone), b"stamp")
    place.store.overwrite(layout.receipt(20 * "f"), late)
    planned = place.chain.prune(KeepLatest(1), dry_run=True)
    report = place.chain.prune(KeepLatest(1))
    assert report.deleted_files == planned.deleted_files
    assert report.freed_bytes == planned.freed_bytes
    assert place.store.size(layout.receipt(gone)) is None
    place.store.overwrite(layout.receipt(gone), late)
    assert place.chain.gc(orphan_age_s=0.0).deleted_files == 1
    left = {listed.name for listed in place.store.list(layout.RECEIPTS)}
    assert left == {layout.receipt(kept), layout.receipt(20 * "f"), layout.timestamp(gone)}
