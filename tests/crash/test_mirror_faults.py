"""A mirror that fails at any call, loses answers, forgets, or is interrupted: it is always a prefix, and gets there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ciuic_async
from ciuic_async import KeepLatest, SnapshotChain
from ciuic_async.errors import CiuicError
from ciuic_async.format import layout
from ciuic_async.mirroring import copier as copier_module
from ciuic_async.mirroring.copier import Copier, read_chain_file
from ciuic_async.mirroring.home import Homing, bring_home
from ciuic_async.stores.fallback import FallbackStore
from ciuic_async.stores.local import LocalStore
from ciuic_async.stores.memory import MemoryStore
from ciuic_async.transparency import keys
from ciuic_async.transparency.log import Log
from ciuic_async.verify import verify_store
from tests.crash.faults import LONG, spread, state_at
from tests.crash.test_store_faults import FaultyStore

pytestmark = [pytest.mark.timeout(1800 if LONG else 120)]

TURNS = 6
"""More than a copy needs that fails once."""


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """Three snapshots, the first pruned, what lived of its segments moved; a tag."""
    place = tmp_path / "chain"
    fixed = torch.arange(2_000)
    with SnapshotChain(place) as opened:
        for step in (1, 2, 3):
            ciuic_async.save({"fixed": fixed, "moving": torch.full((9_000,), float(step))}, opened)
        opened.prune(KeepLatest(2))
        opened.tag("good", "latest")
    return place


def copier_to(chain: Path, mirror: FaultyStore | MemoryStore) -> Copier:
    """A copier as the thread has it, with the key of this user."""
    local = LocalStore(chain)
    data = read_chain_file(local)
    assert data is not None
    return Copier(local, mirror, data, key=lambda: keys.find(None, chain_folder=str(chain)))


def kind_of_failure(action: Callable[[], None]) -> str | None:
    """What an attempt failed of; None: it did not."""
    try:
        action()
    except CiuicError as error:
        return error.kind
    return None


def names(store: MemoryStore) -> dict[str, int]:
    """What is there, without partial tiles of sizes that were never shown."""
    return {file.name: file.size_bytes for file in store.list() if ".p/" not in file.name}


def check_prefix(chain: Path, mirror: MemoryStore) -> int:
    """The mirror's slots are the chain's first ones, byte for byte, and no entry is there whose data is not.

    Returns:
        How many slots there are.
    """
    slots = [file.name for file in mirror.list(layout.SLOTS)]
    here = sorted(path.name for path in (chain / layout.SLOTS).iterdir())
    assert [name.rpartition("/")[2] for name in slots] == here[: len(slots)]
    for name in slots:
        assert mirror.read(name, 1 << 24) == (chain / name).read_bytes()
    if mirror.size(layout.CHAIN_FILE) is not None:
        data = [problem for problem in verify_store(mirror).problems if not problem.where.startswith("log/")]
        pruned = {problem.snapshot for problem in data if problem.kind == "missing"}
        # One group may be under way: entries of snapshots that were pruned here before, and not yet their prune entry.
        assert len(pruned) <= 1, data
        assert {problem.snapshot for problem in data} == pruned, data
    return len(slots)


@pytest.mark.parametrize("after", [False, True], ids=["refused", "answer lost"])
def test_one_failed_call_costs_nothing_but_a_turn(chain: Path, after: bool) -> None:
    """Whichever call to the mirror fails, before or after it took effect: it stays a prefix, and the next turn by the
    same process or by another one ends with the whole chain."""
    whole = MemoryStore()
    counting = FaultyStore(whole)
    copier_to(chain, counting).turn()
    count = len(counting.calls)
    expected = names(whole)
    for position in spread(count, 40):
        inner = MemoryStore()
        faulty = FaultyStore(inner, position, after=after)
        copier = copier_to(chain, faulty)
        kind = kind_of_failure(copier.turn)
        assert kind == "unavailable" or (after and kind is None), faulty.calls[position - 1]
        check_prefix(chain, inner)
        if position % 2:
            copier = copier_to(chain, faulty)
        copier.turn()
        assert names(inner) == expected, faulty.calls[position - 1]
        assert verify_store(inner).problems == ()


def test_a_process_that_dies_between_any_two_slots_is_followed_by_another(chain: Path) -> None:
    """Interrupted at any moment, by ``close`` or for good: what is there is a prefix, and others go on from it."""

    class DiedError(Exception):
        pass

    inner = MemoryStore()
    seen = set()
    for allowed in range(40):
        left = [allowed]

        def pause(left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise DiedError

        copier = copier_to(chain, inner)
        copier._pause = copier._sender._pause = pause
        try:
            copier.turn()
        except DiedError:
            seen.add(check_prefix(chain, inner))
            continue
        break
    assert len(seen) > 1
    assert verify_store(inner).problems == ()


class ForgetfulStore(MemoryStore):
    """Says that it has everything and keeps none of some files."""

    def __init__(self, forgets: Callable[[str], bool]) -> None:
        super().__init__()
        self.forgets = forgets

    def create(self, name: str, data: object) -> None:
        super().create(name, data)  # type: ignore[arg-type]
        if self.forgets(name):
            self.delete(name)


@pytest.mark.parametrize("folder", ["segments", "manifests", "locators", "log/commit"])
def test_a_store_that_forgets_is_not_believed(chain: Path, folder: str) -> None:
    """What was taken and is not there is an error at once; no later file is written, so it is no hole either."""
    mirror = ForgetfulStore(lambda name: name.startswith(folder))
    copier = copier_to(chain, mirror)
    with pytest.raises(CiuicError) as lost:
        copier.turn()
    assert lost.value.kind == "copy_lost"
    assert check_prefix(chain, mirror) == 0
    mirror.forgets = lambda name: False
    copier.turn()
    assert verify_store(mirror).problems == ()


def test_two_nodes_with_one_mirror_are_no_conflict(chain: Path) -> None:
    """Two copiers that take turns at every call end with one copy, and neither calls the other a fork."""
    inner = MemoryStore()
    second = copier_to(chain, inner)
    turns = [0]

    def meanwhile() -> None:
        turns[0] += 1
        if turns[0] % 3 == 0:
            second.turn()

    first = copier_to(chain, inner)
    first._pause = first._sender._pause = meanwhile
    first.turn()
    assert turns[0] >= 3
    second.turn()
    assert verify_store(inner).problems == ()
    assert first.replicated_size == second.replicated_size == first.log_size


def test_retention_may_take_away_what_is_being_copied(chain: Path) -> None:
    """Snapshots that are pruned while they are sent are left out; the copy ends whole and nothing is called damaged."""
    mirror = MemoryStore()
    copier = copier_to(chain, mirror)
    left = [3]

    def prune() -> None:
        left[0] -= 1
        if left[0] == 0:
            with SnapshotChain(chain) as opened:
                ciuic_async.save({"new": torch.ones(3_000)}, opened)
                opened.prune(KeepLatest(1))

    copier._pause = copier._sender._pause = prune
    copier.turn()
    assert left[0] < 0
    assert copier.lacking == {}
    assert verify_store(mirror).problems == ()
    assert {name for name in names(mirror) if layout.owner(name)} == {
        name for name in (str(path.relative_to(chain)) for path in chain.rglob("*")) if layout.owner(name)
    }


def test_memory_is_bounded(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A segment is sent in parts: no piece that is handed to the mirror is larger than one."""
    from ciuic_async.mirroring import sending

    monkeypatch.setattr(sending, "PART_BYTES", 4096)
    largest = [0]

    class Measured(MemoryStore):
        def begin(self, name: str):  # type: ignore[no-untyped-def]
            file = super().begin(name)
            write = file.write

            def measured(data: object) -> None:
                largest[0] = max(largest[0], len(memoryview(data).cast("B")))  # type: ignore[arg-type]
                write(data)  # type: ignore[arg-type]

            if name.startswith(layout.SEGMENTS):
                file.write = measured  # type: ignore[method-assign]
            return file

    mirror = Measured()
    copier_to(chain, mirror).turn()
    assert largest[0] == 4096
    assert verify_store(mirror).problems == ()


@pytest.mark.parametrize("after", [False, True], ids=["refused", "answer lost"])
def test_coming_home_survives_any_failed_call(chain: Path, after: bool) -> None:
    """Whichever call to the local place fails while a lost chain is brought home: the next attempt ends with all."""
    mirror = MemoryStore()
    copier_to(chain, mirror).turn()

    def attempt(store: FaultyStore) -> None:
        data = bring_home(store, mirror, read_chain_file(store), lambda log: None)
        assert data is not None
        homing = Homing(FallbackStore(store, mirror), Log(store, copier_module.ChainFile.decode(data).origin))
        homing.turn()

    counting = FaultyStore(MemoryStore())
    attempt(counting)
    count = len(counting.calls)
    assert verify_store(counting.inner).problems == ()
    expected = names(counting.inner)
    for position in spread(count, 40):
        place = FaultyStore(MemoryStore(), position, after=after)
        for _ in range(TURNS):
            kind = kind_of_failure(lambda place=place: attempt(place))  # type: ignore[misc]
            if kind is None:
                break
            assert kind == "unavailable", place.calls[position - 1]
        assert verify_store(place.inner).problems == ()
        assert names(place.inner) == expected, place.calls[position - 1]


@pytest.mark.damages
def test_what_is_damaged_here_is_not_spread(tmp_path: Path) -> None:
    """A segment that rots before it was copied is told of and left out; newer snapshots are copied all the same."""
    place = tmp_path / "chain"
    with SnapshotChain(place) as opened:
        ids = [ciuic_async.save(state_at(1), opened).id, ciuic_async.save({"other": torch.ones(5_000)}, opened).id]
    rotten = place / layout.segment(ids[0], 0, 0)
    rotten.chmod(0o644)
    data = bytearray(rotten.read_bytes())
    data[len(data) // 2] ^= 1
    rotten.write_bytes(data)
    mirror = MemoryStore()
    copier = copier_to(place, mirror)
    copier.turn()
    assert set(copier.lacking) == {ids[0]}
    assert mirror.size(layout.segment(ids[0], 0, 0)) is None
    assert {problem.snapshot for problem in verify_store(mirror).problems} == {ids[0]}
    good = Log(mirror, copier.origin)
    good.refresh()
    assert len(good) == copier.log_size
