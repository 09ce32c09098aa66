"""Two ways to read the line of a history, forwards once and backwards, agree: also on histories that are not valid."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ciuic_async.format import entry as entries
from ciuic_async.format.entry import PruneEntry, RollbackEntry
from ciuic_async.format.merkle import leaf_hash
from ciuic_async.pipeline.history import for_retention, the_line
from ciuic_async.stores.memory import MemoryStore
from ciuic_async.transparency.keys import SigningKey
from ciuic_async.transparency.log import Log
from tests.chain.logs import COMMON, ORIGIN

HASH = bytes(32)


def snapshot(name: int) -> bytes:
    text = f"{name:020x}"
    manifest = entries.FileReference(f"manifests/{text}/root.json", HASH, 1)
    return entries.SnapshotEntry(
        COMMON, text, None, name, None, None, (), (), manifest, entries.ChunkTree(HASH, 0), 0, 0
    ).encode()


def entry_of(kind: str, name: int) -> bytes:
    if kind == "snapshot":
        return snapshot(name)
    if kind == "prune":
        return PruneEntry(COMMON, (f"{name:020x}",), "any").encode()
    return RollbackEntry(COMMON, leaf_hash(snapshot(name)), "why").encode()


KINDS = st.sampled_from(["snapshot", "snapshot", "prune", "rollback"])


@given(st.lists(st.lists(st.tuples(KINDS, st.integers(0, 4)), min_size=1, max_size=4), min_size=1, max_size=6))
def test_reading_forwards_and_backwards_agree(batches: list[list[tuple[str, int]]]) -> None:
    """However the log grows between two looks: retention's view ends with the line, abandoned ones come before it.

    Ids that come twice, even in the very same entry, are no valid history; whoever reads one comes to an end, and
    then the last bearer of an id counts.
    """
    key, log = SigningKey.generate(), Log(MemoryStore(), ORIGIN)
    announcement = entries.KeyEntry(COMMON, key.vkey(ORIGIN)).encode()
    written: list[tuple[str, int]] = []
    for batch in batches:
        data = [entry_of(kind, name) for kind, name in batch]
        log.append(lambda _, data=data: data, key, announce=lambda: announcement)  # type: ignore[misc]
        written += batch
        found = [entry.snapshot for entry in for_retention(log)]
        assert len(found) == len(set(found))
        saved = [name for kind, name in written if kind == "snapshot"]
        if len(saved) == len(set(saved)):
            line = [line.entry.snapshot for line in the_line(log)][::-1]
            assert found[len(found) - len(line) :] == line
