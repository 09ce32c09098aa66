"""``SnapshotChain(trust=..., ordering=...)``: what the options mean for those who train and those who verify."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import ciuic_async
from ciuic_async import Checkpointer, SaveFailedError, SnapshotChain, UsageError
from ciuic_async.cli.chain_witness import WitnessServer
from ciuic_async.format import layout
from ciuic_async.transparency import note
from ciuic_async.transparency.keys import SigningKey
from ciuic_async.transparency.policy import Group, Policy
from ciuic_async.transparency.policy import Witness as PolicyWitness
from ciuic_async.transparency.receipt import Receipt
from ciuic_async.transparency.witness import Witness

WAIT_S = 60.0


class Witnesses:
    """Three real witnesses of one chain, of which two are a quorum."""

    def __init__(self, folder: Path, chain: Path) -> None:
        with SnapshotChain(chain) as made:
            made.note("begin")
            logs = tuple(note.parse_vkey(vkey) for vkey in made.keys())  # noqa: SIM118
        self.servers: dict[int, WitnessServer] = {}
        known = []
        for number in range(3):
            name = f"w{number}.example"
            key = SigningKey.generate()
            server = WitnessServer(("127.0.0.1", 0), Witness(folder / name, key, name, logs))
            server.start()
            self.servers[number] = server
            url = f"http://127.0.0.1:{server.server_address[1]}"
            known.append(PolicyWitness(f"w{number}", note.parse_vkey(key.cosigner(name)), url))
        self.policy = Policy(logs, tuple(known), (Group("q", 2, ("w0", "w1", "w2")),), "q")

    def stop(self, number: int) -> None:
        server = self.servers.pop(number)
        server.close()
        server.witness.close()

    def close(self) -> None:
        for number in list(self.servers):
            self.stop(number)


@pytest.fixture
def witnesses(tmp_path: Path) -> Iterator[Witnesses]:
    made = Witnesses(tmp_path / "witnesses", tmp_path / "chain")
    yield made
    made.close()


def test_training_is_witnessed_in_the_background(witnesses: Witnesses, tmp_path: Path) -> None:
    """What a run commits is cosigned by a quorum without its waiting; verify by the same policy says so, and the
    snapshot has a receipt that holds without the chain."""
    trust = {"policy": witnesses.policy, "witnesses": "async"}
    with SnapshotChain(tmp_path / "chain", trust=trust) as chain:
        with Checkpointer(chain, {"t": torch.zeros(4)}) as ckpt:
            snapshot = ckpt.save().wait_durable()
        witnessing = chain._witnesses()
        assert witnessing is not None
        assert witnessing.cosigner.settle(WAIT_S)
        assert {status.error for status in chain.witness_status()} == {None}
        report = chain.verify()
        assert report.ok
        levels = {level.name: (level.state, level.detail) for level in report.levels}
        assert levels["witnessed"][0] == "ok"
        assert levels["witnessed"][1].startswith("3/3")
        assert chain.store.size(layout.receipt(snapshot.id)) is not None
        chain.store.overwrite(layout.LOG_HEAD, (head := chain.head_note())[: head.index(b"\n\n") + 2] + own_line(head))
        shown = note.parse(Receipt.decode(chain.receipt(snapshot.id), "receipt").head, "head")
        assert len(shown.signatures) == 4  # of the head that is witnessed, though the newest shows none of it


def own_line(head: bytes) -> bytes:
    """The log's own signature line of a head."""
    lines = head.decode().splitlines(keepends=True)
    return next(line for line in lines if line.startswith("\u2014 ciuic.dev/chain/")).encode()


def test_required_witnesses_decide_what_is_durable(witnesses: Witnesses, tmp_path: Path) -> None:
    """With two of three a snapshot is durable when both have signed; with one it fails, in bounded time and saying why,
    and is in the chain all the same. Training goes on."""
    trust = {"policy": witnesses.policy, "witnesses": "required"}
    with SnapshotChain(tmp_path / "chain", trust=trust) as chain:
        witnesses.stop(0)
        first = ciuic_async.save({"t": torch.zeros(4)}, chain)
        assert chain.store.size(layout.WITNESSED) is not None
        witnesses.stop(1)
        witnessing = chain._witnesses()
        assert witnessing is not None
        witnessing._timeout_s = 0.2
        with Checkpointer(chain, {"t": torch.zeros(4)}) as ckpt:
            pending = ckpt.save()
            with pytest.raises(SaveFailedError, match="no quorum of witnesses") as caught:
                pending.wait_durable()
            ckpt.step()
        assert caught.value.kind == "not_witnessed"
        assert next(iter(chain)).id == first.id
        assert len(chain) == 2
        assert chain.verify().ok


def test_a_key_that_the_policy_does_not_name_may_not_write(witnesses: Witnesses, tmp_path: Path) -> None:
    """Unless the policy's owner allows it: then it writes, and is shown as unendorsed. A policy that knows nothing of a
    chain forbids nobody."""
    stranger = SigningKey.generate().secret()
    trust = {"policy": witnesses.policy}
    with SnapshotChain(tmp_path / "chain", key=stranger, trust=trust) as chain:
        with pytest.raises(UsageError, match=r"log ciuic\.dev/chain/") as caught:
            Checkpointer(chain, {"t": torch.zeros(4)})
        assert caught.value.kind == "key_unendorsed"
        assert len(chain) == 0
    with SnapshotChain(tmp_path / "chain", key=stranger, trust={**trust, "writers": "any"}) as chain:
        chain.note("a stranger was here")
        assert any("stranger" in one.get("text", "") for one in chain.log())
        assert any("unendorsed" in found for found in chain.verify().notes)
    with SnapshotChain(tmp_path / "other", key=stranger, trust=trust) as chain:
        chain.note("another chain")


def test_orderings_that_cannot_be_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the option or the environment says is checked before anything is written."""
    for wrong in ("paxos", "etcd:"):
        with pytest.raises(UsageError):
            SnapshotChain(tmp_path / "chain", ordering=wrong)
    assert not (tmp_path / "chain").exists()
    monkeypatch.setenv("CIUIC_ORDERING", "etcd:")
    with pytest.raises(UsageError):
        SnapshotChain(tmp_path / "chain")
    with SnapshotChain(tmp_path / "chain", ordering="local") as chain:
        chain.note("fine")
        assert chain.verify().ok


def test_a_chain_says_that_an_etcd_orders_it(tmp_path: Path) -> None:
    """Also before its first entry: who comes without an etcd may not begin it, and nobody writes while etcd is away."""
    url = "etcd://127.0.0.1:1"
    SnapshotChain(tmp_path / "chain", ordering=url).close()
    with SnapshotChain(tmp_path / "chain") as chain:
        with pytest.raises(UsageError) as caught:
            chain.note("past etcd")
        assert chain.verify().ok
    assert caught.value.kind == "ordering_differs"
    assert not list((tmp_path / "chain" / layout.SLOTS).iterdir())
