"""SnapshotChain and Snapshot: a user's view of history. Imports torch only when a snapshot is loaded."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ciuic_async.errors import CommitConflictError, NotFoundError, UsageError
from ciuic_async.events import Listener
from ciuic_async.format import layout
from ciuic_async.format.chain_file import LIMIT_BYTES as CHAIN_FILE_LIMIT_BYTES
from ciuic_async.format.chain_file import ChainFile
from ciuic_async.format.entry import Common, FileReference, KeyEntry, SnapshotEntry, kind_of
from ciuic_async.pipeline.commit import CommitTarget, Resolved, resolve
from ciuic_async.pipeline.history import Line, live_snapshots, newest_first, parents, resolve_ref
from ciuic_async.pipeline.persist import common
from ciuic_async.retention import collect
from ciuic_async.retention.collect import PruneReport
from ciuic_async.retention.policy import Policy
from ciuic_async.stores.base import Store
from ciuic_async.stores.local import LocalStore
from ciuic_async.stores.resolve import resolve as resolve_store
from ciuic_async.transparency import keys
from ciuic_async.transparency.keys import SigningKey
from ciuic_async.transparency.log import Log
from ciuic_async.verify import VerifyReport, verify_store

if TYPE_CHECKING:
    import torch


class SnapshotChain:
    """One chain: iterates over its snapshots, oldest first.

    Args:
        url: a path (or ``file://`` URL).
        create: make the chain if there is none. With False a missing chain is a ``NotFoundError``, and nothing is
            written by any reading method.
        key: the signing key for writing: a path, or the secret itself; default ``CIUIC_KEY``, else the user's own.
        run: id of the training run that entries name; drawn at random if not given.

    Usable from several threads. Close it, or use it as a context manager, to give back its descriptors.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        create: bool = True,
        key: str | os.PathLike[str] | None = None,
        run: str | None = None,
    ) -> None:
        self._store = resolve_store(url)
        self._key_source = key
        self._key: SigningKey | None = None
        self._run = run or layout.new_id()
        self._mutex = threading.RLock()
        data = self._read_chain_file()
        if data is None:
            if not create:
                raise NotFoundError(
                    f"{self._store.url}: no chain here (there is no {layout.CHAIN_FILE})",
                    kind="no_chain",
                    where=self._store.url,
                )
            data = self._create()
        self._file = ChainFile.decode(data)
        self._file_reference = FileReference(layout.CHAIN_FILE, sha256(data).digest(), len(data))
        self._log = Log(self._store, self._file.origin)

    # --- reading ------------------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """The place, as a message names it."""
        return self._store.url

    @property
    def origin(self) -> str:
        """The chain's random name, which its keys sign for."""
        return self._file.origin

    @property
    def run(self) -> str:
        """Id of the training run that writes through this object."""
        return self._run

    def __iter__(self) -> Iterator[Snapshot]:
        self._log.refresh()
        names = parents(self._log)
        return iter([Snapshot(self, line, names) for line in live_snapshots(self._log)])

    def __len__(self) -> int:
        self._log.refresh()
        return sum(1 for _ in newest_first(self._log))

    def latest(self) -> Snapshot | None:
        """The newest snapshot; None when there is none yet."""
        self._log.refresh()
        line = next(newest_first(self._log), None)
        return None if line is None else Snapshot(self, line)

    def newest_first(self) -> Iterator[Snapshot]:
        """Snapshots from the newest on, read from the log only as far as asked for."""
        self._log.refresh()
        return (Snapshot(self, line) for line in newest_first(self._log))

    def get(self, ref: str) -> Snapshot:
        """The snapshot that a ref means (``latest``, ``latest~1``, ``step:1200``, ``best:loss``, a tag, an id prefix).

        Raises:
            NotFoundError: there is no such snapshot.
        """
        self._log.refresh()
        return Snapshot(self, resolve_ref(self._log, ref))

    def verify(self, deep: bool = True, level: str | None = None, *, listener: Listener | None = None) -> VerifyReport:
        """Check the chain. Only reads; works while it is written to.

        Args:
            deep: read all chunk data too.
            level: stop earlier: ``"manifests"`` is what ``deep=False`` does.
        """
        if level not in (None, "manifests", "chunk data"):
            raise UsageError(f"level={level!r}: expected 'manifests' or 'chunk data'")
        return verify_store(self._store, deep=deep and level != "manifests", listener=listener)

    def log(self) -> list[dict[str, Any]]:
        """All entries as plain data, oldest first: what ``ciuic log --json`` prints."""
        self._log.refresh()
        names = parents(self._log)
        living = {line.entry.snapshot for line in live_snapshots(self._log)}
        return [_entry_facts(index, entry, names, living) for index, entry in self._log.entries()]

    def keys(self) -> list[str]:
        """Verifier keys (vkeys) of everybody who signed this chain."""
        self._log.refresh()
        return [str(vkey) for vkey in self._log.known_keys().values()]

    def signing_key(self) -> tuple[str, str | None] | None:
        """vkey and path of the key that would sign here, without making one; path None: it is not in a file."""
        key = self._key or keys.find(self._key_source, chain_folder=self._folder)
        return None if key is None else (key.vkey(self._file.origin), key.path)

    # --- writing ------------------------------------------------------------------------------------------------------

    def prune(self, policy: Policy, dry_run: bool = False) -> PruneReport:
        """Drop the snapshots that a policy does not keep; the decision becomes an entry before a file is deleted."""
        return collect.prune(self.target(), policy, self.common, dry_run=dry_run)

    def gc(self, *, orphan_age_s: float | None = None) -> PruneReport:
        """Sweep files that no snapshot needs: what prune could not delete, and leftovers of crashed writers."""
        if orphan_age_s is None:
            return collect.gc(self._store, self._log)
        return collect.gc(self._store, self._log, orphan_age_s=orphan_age_s)

    def rollback(self, ref: str, reason: str = "") -> Snapshot:
        """Make an earlier snapshot the latest. Not in this version; ``Checkpointer.restore(ref)`` goes on from one."""
        raise _not_available("rollback")

    def tag(self, name: str, ref: str) -> None:
        """Give a snapshot a name. Not in this version; ``Checkpointer.save(tags=...)`` tags when it is taken."""
        raise _not_available("tag")

    def diff(self, a: str, b: str) -> None:
        """Compare two snapshots. Not in this version."""
        raise _not_available("diff")

    def target(self) -> CommitTarget:
        """Where and under whose key this object commits; loads or makes the key. For the engine."""
        return CommitTarget(self._store, self._log, self._signing_key(), self._announcement)

    def common(self) -> Common:
        """Who and when, for an entry made now. For the engine."""
        return common(self._run)

    @property
    def log_size(self) -> int:
        """How many entries of the log this object knows. For the engine."""
        return len(self._log)

    @property
    def secret(self) -> str:
        """The signing key as the single line that ``key=`` takes. For another process of this very user's."""
        return self._signing_key().secret()

    @property
    def file(self) -> ChainFile:
        """The chain's parameters. For the engine."""
        return self._file

    @property
    def store(self) -> Store:
        """The place. For the engine."""
        return self._store

    def close(self) -> None:
        """Give back descriptors. Idempotent."""
        self._store.close()

    def __enter__(self) -> SnapshotChain:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"SnapshotChain({self._store.url!r})"

    @property
    def _folder(self) -> str | None:
        return self._store.url if isinstance(self._store, LocalStore) else None

    def _read_chain_file(self) -> bytes | None:
        try:
            return self._store.read(layout.CHAIN_FILE, CHAIN_FILE_LIMIT_BYTES)
        except NotFoundError:
            return None

    def _create(self) -> bytes:
        self._store.initialize()
        with suppress(CommitConflictError):  # somebody else made it this very moment: theirs counts
            self._store.create(layout.CHAIN_FILE, ChainFile.new().encode())
        return self._store.read(layout.CHAIN_FILE, CHAIN_FILE_LIMIT_BYTES)

    def _signing_key(self) -> SigningKey:
        with self._mutex:
            if self._key is None:
                self._key = keys.load_or_create(self._key_source, chain_folder=self._folder)
            return self._key

    def _announcement(self) -> bytes:
        pin = self._file_reference if len(self._log) == 0 else None
        return KeyEntry(self.common(), self._signing_key().vkey(self._file.origin), pin).encode()


def _not_available(name: str) -> UsageError:
    return UsageError(f"SnapshotChain.{name}() is not available in this version", kind="not_available")


class Snapshot:
    """One snapshot of a chain. Facts come from its signed entry; bytes are read when asked for."""

    def __init__(self, chain: SnapshotChain, line: Line, names: dict[bytes, str] | None = None) -> None:
        self._chain = chain
        self._line = line
        self._names = names

    @property
    def id(self) -> str:
        """20 hex digits."""
        return self._line.entry.snapshot

    @property
    def index(self) -> int:
        """Index of its entry in the log."""
        return self._line.index

    @property
    def step(self) -> int | None:
        """Training step; None for one-off saves."""
        return self._line.entry.step

    @property
    def epoch(self) -> int | str | None:
        """As given to ``step``; a value that is neither integer nor text is in ``Progress`` only."""
        return self._line.entry.epoch

    @property
    def batch(self) -> int | str | None:
        """As given to ``step``; see ``epoch``."""
        return self._line.entry.batch

    @property
    def created(self) -> str:
        """UTC time by the writer's clock, e.g. ``2026-11-22T06:31:14.123Z``."""
        return self._line.entry.common.created

    @property
    def metrics(self) -> dict[str, float]:
        """Recorded numbers by name, bit-exact."""
        return {name: float(value) for name, value in self._line.entry.metrics}

    @property
    def tags(self) -> tuple[str, ...]:
        """Tags given when it was saved."""
        return self._line.entry.tags

    @property
    def parent(self) -> str | None:
        """Id of the snapshot this state came from; None for the first."""
        parent = self._line.entry.parent
        if parent is None:
            return None
        if self._names is None:
            self._names = parents(self._chain._log)
        return self._names.get(parent)

    @property
    def raw_bytes(self) -> int:
        """Bytes of all tensors."""
        return self._line.entry.raw_bytes

    @property
    def stored_bytes(self) -> int:
        """Bytes of segments that were written for it."""
        return self._line.entry.stored_bytes

    @property
    def leaf_hash(self) -> bytes:
        """SHA-256 leaf hash of its entry: how children name it."""
        return self._line.leaf_hash

    @property
    def entry(self) -> SnapshotEntry:
        """Its entry. For the engine."""
        return self._line.entry

    def resolve(self) -> Resolved:
        """Manifest and locator, read and checked. For the engine."""
        return resolve(self._chain.store, self._line.entry)

    def load(
        self,
        *,
        only: str | Sequence[str] | None = None,
        map_location: str | torch.device = "cpu",
        verify: bool = True,
        listener: Listener | None = None,
    ) -> Any:
        """The captured state tree.

        Args:
            only: a pattern or several over dotted paths (``"model"``, ``"model.head.*"``): reads only what they need.
            map_location: device of all tensors.
            verify: check the BLAKE3 of every chunk (the log, the manifest and every record's frame always are).

        Raises:
            IntegrityError: damage; names the tensor and the file. Nothing is returned.
        """
        from ciuic_async.pipeline.restore import load_tree

        patterns = [only] if isinstance(only, str) else only
        return load_tree(
            self._chain.store,
            self.resolve(),
            only=patterns,
            map_location=map_location,
            verify=verify,
            listener=listener,
        )

    def export(self, path: str | os.PathLike[str], *, only: str | Sequence[str] | None = None) -> Path:
        """Write the tensors in another format, chosen by suffix (``.safetensors``). The file appears whole or not.

        Tensor names are dotted paths. Plain values go into the file's metadata as far as the format can hold them.

        Raises:
            UsageError: an unknown suffix, or two tensors of one dotted path.
        """
        from ciuic_async.pipeline.export import export

        return export(self.load(only=only), Path(path), self)

    def __repr__(self) -> str:
        return f"<Snapshot {self.id} step={self.step} {self.created}>"


def _entry_facts(index: int, entry: Any, names: dict[bytes, str], living: set[str]) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "id": None,
        "index": index,
        "kind": kind_of(entry),
        "step": None,
        "epoch": None,
        "batch": None,
        "created": entry.common.created,
        "parent": None,
        "raw_bytes": None,
        "stored_bytes": None,
        "metrics": {},
        "tags": [],
    }
    if isinstance(entry, SnapshotEntry):
        facts |= {
            "id": entry.snapshot,
            "step": entry.step,
            "epoch": entry.epoch,
            "batch": entry.batch,
            "parent": None if entry.parent is None else names.get(entry.parent),
            "raw_bytes": entry.raw_bytes,
            "stored_bytes": entry.stored_bytes,
            "metrics": {name: _json_number(value) for name, value in entry.metrics},
            "tags": list(entry.tags),
            "pruned": entry.snapshot not in living,
        }
    elif kind_of(entry) == "prune":
        facts["snapshots"] = list(entry.snapshots)
    elif kind_of(entry) == "key":
        facts["vkey"] = entry.vkey
    return facts


def _json_number(text: str) -> float | int | str:
    """A metric for JSON output, which knows neither NaN nor infinity: those stay text."""
    value = float(text)
    return text if value != value or value in (float("inf"), float("-inf")) else json.loads(text)
