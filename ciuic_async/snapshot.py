"""Snapshot: one state of a training run, as its user sees it. Imports torch only when it is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ciuic_async.errors import UsageError
from ciuic_async.events import Listener
from ciuic_async.format.entry import SnapshotEntry
from ciuic_async.pipeline.commit import Resolved, read_root, resolve
from ciuic_async.pipeline.history import Line, parents, tags
from ciuic_async.stores.base import Store
from ciuic_async.transparency.log import Log

if TYPE_CHECKING:
    import torch


class Replication(Protocol):
    """What a snapshot asks of its chain's mirror (``mirroring.mirror.Mirror``)."""

    def holds(self, index: int, entry: SnapshotEntry) -> bool:
        """Whether entry and data are there."""

    def require(self, index: int, entry: SnapshotEntry, timeout_s: float | None = None) -> None:
        """Wait for them; raises where they do not come."""


class Snapshot:
    """One snapshot of a chain. Facts come from its signed entry; bytes are read when asked for.

    Args:
        names, named: ids by leaf hash and tags by id, if they are known already.
        mirror: the chain's, if it has one.
    """

    def __init__(
        self,
        store: Store,
        log: Log,
        line: Line,
        names: dict[bytes, str] | None = None,
        named: dict[str, tuple[str, ...]] | None = None,
        mirror: Replication | None = None,
    ) -> None:
        self._store = store
        self._log = log
        self._line = line
        self._names = names
        self._named = named
        self._mirror = mirror

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
    def config(self) -> dict[str, Any] | None:
        """What training was started with, as given to ``Checkpointer(config=...)``. Reads the manifest's root.

        Raises:
            IntegrityError: the manifest is damaged.
        """
        node = read_root(self._store, self._line.entry).progress.config
        if node is None:
            return None
        from ciuic_async.capture.state_tree import decode_plain

        value = decode_plain(node)
        return value if isinstance(value, dict) else {"config": value}

    @property
    def tags(self) -> tuple[str, ...]:
        """Names that it has: given when it was saved or later, and not given to another since."""
        if self._named is None:
            self._named = tags(self._log)
        return self._named.get(self.id, ())

    @property
    def parent(self) -> str | None:
        """Id of the snapshot this state came from; None for the first."""
        parent = self._line.entry.parent
        if parent is None:
            return None
        if self._names is None:
            self._names = parents(self._log)
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

    @property
    def replicated(self) -> bool:
        """Whether its entry and every byte that it needs are in the chain's mirror.

        The mirror is asked, but for what this process copied. False also where it does not answer, or there is none.
        """
        return self._mirror is not None and self._mirror.holds(self.index, self.entry)

    def wait_replicated(self, timeout_s: float | None = None) -> None:
        """Wait until it is ``replicated``.

        Args:
            timeout_s: None: as long as copying works.

        Raises:
            TimeoutError: not within ``timeout_s`` seconds; copying goes on.
            StoreError: the mirror cannot be written now; it is tried again behind.
            SaveFailedError: kind ``not_replicated``; data of it was lost before it was copied.
            IntegrityError: the mirror holds another history; nothing is copied any more.
            UsageError: the chain has no mirror.
        """
        if self._mirror is None:
            raise UsageError("this chain has no mirror: open it with SnapshotChain(..., mirror=url)", kind="no_mirror")
        self._mirror.require(self.index, self.entry, timeout_s)

    def resolve(self) -> Resolved:
        """Manifest and locator, read and checked. For the engine."""
        return resolve(self._store, self._line.entry)

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
        from ciuic_async.pipeline.spoilt import read_again

        patterns = [only] if isinstance(only, str) else only

        def read() -> Any:
            return load_tree(
                self._store,
                self.resolve(),
                only=patterns,
                map_location=map_location,
                verify=verify,
                listener=listener,
            )

        return read_again(self._store, f"snapshot {self.id}", read)

    def export(
        self, path: str | os.PathLike[str], *, only: str | Sequence[str] | None = None, overwrite: bool = True
    ) -> Path:
        """Write the state in another format, chosen by suffix: ``.safetensors``, ``.pt``, ``.pth``, ``.h5``, ``.hdf5``.

        The file appears whole or not, and is on stable storage on return. docs/moving.md has what each format holds.

        Args:
            only: as for ``load``.
            overwrite: False: a file that is there is a UsageError.

        Raises:
            UsageError: an unknown suffix, or two tensors of one dotted path where the format has no other names.
            StoreError: the place refused the file.
        """
        from ciuic_async.pipeline.export import check_target, export

        check_target(Path(path), overwrite=overwrite)  # before the state is read
        return export(self.load(only=only), Path(path), self, overwrite=overwrite)

    def __repr__(self) -> str:
        return f"<Snapshot {self.id} step={self.step} {self.created}>"
