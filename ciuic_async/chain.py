"""SnapshotChain: a user's view of history. Imports no torch."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from typing import Any

from ciuic_async.arguments import check_tag, check_text
from ciuic_async.config.settings import configured
from ciuic_async.errors import CiuicError, CommitConflictError, NotFoundError, UsageError
from ciuic_async.events import Listener, logger
from ciuic_async.format import layout
from ciuic_async.format.chain_file import LIMIT_BYTES as CHAIN_FILE_LIMIT_BYTES
from ciuic_async.format.chain_file import ORDERING_ETCD, ChainFile
from ciuic_async.format.entry import Common, FileReference, KeyEntry, NoteEntry, RollbackEntry, TagEntry
from ciuic_async.listing import list_entries
from ciuic_async.mirroring.home import bring_home
from ciuic_async.mirroring.mirror import Mirror, MirrorStatus, paired
from ciuic_async.options import RETENTION
from ciuic_async.pipeline.commit import CommitTarget, resolve
from ciuic_async.pipeline.diff import Difference, diff
from ciuic_async.pipeline.history import Line, live_snapshots, parents, resolve_ref, tagged, tags, the_line
from ciuic_async.pipeline.persist import common
from ciuic_async.retention import collect
from ciuic_async.retention.collect import PruneReport
from ciuic_async.retention.policy import Policy
from ciuic_async.snapshot import Snapshot
from ciuic_async.stores.base import Store
from ciuic_async.stores.local import LocalStore
from ciuic_async.stores.resolve import resolve as resolve_store
from ciuic_async.stores.resolve import takes_options
from ciuic_async.transparency import keys, note
from ciuic_async.transparency import policy as trust_policy
from ciuic_async.transparency.cosigning import WitnessStatus
from ciuic_async.transparency.keys import SigningKey
from ciuic_async.transparency.log import Log
from ciuic_async.transparency.note import Vkey
from ciuic_async.transparency.ordering import check_writer, is_etcd
from ciuic_async.transparency.ordering import parse as parse_ordering
from ciuic_async.transparency.pins import Pins, extends
from ciuic_async.transparency.receipts import make_receipt, shown_head
from ciuic_async.transparency.witnessing import Trust, Witnessing
from ciuic_async.verify import VerifyReport, verify_store

__all__ = ["Snapshot", "SnapshotChain"]


@dataclass(frozen=True, slots=True)
class Previous:
    """What a new chain goes on from: the last log head of that one, the whole note, and its parameters."""

    head: str
    file: ChainFile


class SnapshotChain:
    """One chain: iterates over its snapshots, oldest first.

    Args:
        url: a path, a ``file://`` URL, or that of an object store: ``s3://bucket/prefix``, ``gs://``, ``az://``.
        create: make the chain if there is none. With False a missing chain is a ``NotFoundError``, and nothing is
            written by any reading method.
        key: the signing key for writing: a path, or the secret itself; default ``CIUIC_KEY``, else the user's own.
        run: id of the training run that entries name; drawn at random if not given.
        ordering: who decides who writes the next entry: ``"local"`` or ``"object-store"``, the place itself by creating
            names once; or ``"etcd://host:port,host:port/prefix"``. Default ``CIUIC_ORDERING``, else the place. A chain
            keeps the one that it began with: who names another cannot write to it (``ordering_differs``), only read.
        trust: ``{"policy": path or text, "witnesses": "async" | "required", "max_age": "1h"}``: the witnesses of the
            policy (C2SP tlog-policy) are asked to cosign what is written here, in the background; ``"required"``: a
            snapshot counts as durable when a quorum has. ``verify`` goes by the same policy. Where it names keys of
            this chain, others may not write, unless ``"writers": "any"`` is there too.
        previous: for a new chain that goes on where another ended.
        mirror: a second place, path or URL, that everything is copied to behind the commits (docs/mirror.md). What is
            damaged here is read from there; a chain that is lost here, or whose newest entries are, is brought home
            from there, unless ``create`` is False.
        storage_options: how to reach an object store, be it the chain's place or the mirror: ``endpoint``,
            ``profile``, ``access_key_id``, ... What is not here comes from the environment and profiles. Never part of
            ``url``, messages or anything stored.

    When the log is first read, and before anything is written, it is compared with the user's pin, if there is one: a
    log that was rolled back or rewritten since is an IntegrityError (kind ``pin_rollback``, ``pin_fork``). What is
    written is pinned.

    What is not given here comes from the environment (docs/configuration.md); ``CIUIC_CONFIG`` and files count only for
    ``Checkpointer`` and the command line.

    Usable from several threads. Close it, or use it as a context manager, to give back its descriptors.
    """

    @configured("SnapshotChain")
    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        create: bool = True,
        key: str | os.PathLike[str] | None = None,
        run: str | None = None,
        ordering: str | None = None,
        trust: Mapping[str, object] | None = None,
        previous: Previous | None = None,
        mirror: str | os.PathLike[str] | None = None,
        storage_options: Mapping[str, str] | None = None,
    ) -> None:
        self._trust = None if trust is None else Trust.parse(trust)
        self.ordering = ordering or "local"
        options = None if storage_options is None else dict(storage_options)
        self._storage_options = options if mirror is None or takes_options(url) else None
        self._local = resolve_store(url, self._storage_options)
        parse_ordering(self.ordering, self._local, "")  # before a chain is made
        pair = None
        if mirror is not None:
            to_mirror = options if takes_options(mirror) or self._storage_options is None else None
            pair = paired(self._local, resolve_store(mirror, to_mirror))
        self._store: Store = pair or self._local
        self._previous = previous
        self._pins = Pins.of_user()
        self._knows_pin = False
        self._key_source = key
        self._key: SigningKey | None = None
        self._run = run or layout.new_id()
        self._mutex = threading.RLock()
        data = self._read_chain_file()
        if pair is not None and create:
            data = bring_home(pair.here, pair.there, data, self._check_pin_of)
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
        self._log = self._open_log()
        self._witnessing: Witnessing | None = None
        self._mirror: Mirror | None = None
        if pair is not None:
            find_key = partial(keys.find, key, chain_folder=self._folder)
            self._mirror = Mirror(pair, data, find_key)
            weakref.finalize(self, self._mirror.stop)

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
        self._refresh()
        names, named = parents(self._log), tags(self._log)
        lines = live_snapshots(self._log)
        return iter([Snapshot(self._store, self._log, line, names, named, self._mirror) for line in lines])

    def __len__(self) -> int:
        self._refresh()
        return len(live_snapshots(self._log))

    def latest(self) -> Snapshot | None:
        """The snapshot that training goes on from: the newest, or what was rolled back to; None when there is none."""
        self._refresh()
        line = next(the_line(self._log), None)
        return None if line is None else self.snapshot(line)

    def newest_first(self) -> Iterator[Snapshot]:
        """Snapshots from the latest on, without those that a rollback abandoned.

        Read from the log only as far as asked for.
        """
        self._refresh()
        return (self.snapshot(line) for line in the_line(self._log))

    def get(self, ref: str) -> Snapshot:
        """The snapshot that a ref means (``latest``, ``latest~1``, ``step:1200``, ``best:loss``, a tag, an id prefix).

        Raises:
            NotFoundError: there is no such snapshot.
        """
        self._refresh()
        return self.snapshot(resolve_ref(self._log, ref))

    def verify(
        self,
        deep: bool = True,
        level: str | None = None,
        *,
        keys: Sequence[str | os.PathLike[str] | Vkey] = (),
        policy: trust_policy.Policy | None = None,
        endorsed: bool = False,
        max_age_s: float | None = None,
        roots: str | os.PathLike[str] | None = None,
        listener: Listener | None = None,
    ) -> VerifyReport:
        """Check the chain. Only reads, and pins what it found good; works while it is written to.

        Args:
            deep: read all chunk data too.
            level: stop earlier: ``"manifests"`` is what ``deep=False`` does.
            keys: verifier keys, or files of them: one of them must have signed the log. Without them, a policy and a
                pin nothing says who wrote it: "integrity only".
            policy: whom else to trust, and which witnesses; default that of ``trust``.
            endorsed: entries of any other key are a problem.
            max_age_s: a chain without a newer sign of life is a problem.
            roots: certificates (PEM) of the authorities whose time stamps count.
        """
        own = self._trust
        return verify_store(
            self._local,
            deep=deep,
            level=level,
            keys=keys,
            policy=policy or (None if own is None else own.policy),
            endorsed=endorsed,
            max_age_s=max_age_s if own is None or max_age_s is not None else own.max_age_s,
            pins=self._pins,
            roots=roots,
            listener=listener,
        )

    def receipt(self, ref: str) -> bytes:
        """A proof for those who do not have the chain: a snapshot's entry is in the log whose head is signed here.

        The head is the newest that witnesses signed, if it holds the entry, else the newest; the entry comes along.

        Raises:
            NotFoundError: there is no such snapshot, or no log head that holds it yet (kind ``no_head``).
            IntegrityError: the log head is damaged.
        """
        made = make_receipt(self._store, self._log, self.get(ref).index)
        if made is None:
            text = f"{self._store.url}: no log head holds {ref} yet; the next writer makes one"
            raise NotFoundError(text, kind="no_head", where=ref)
        return made

    def entry_bytes(self, index: int) -> bytes:
        """One entry as it stands in the log, verified. Errors as ``Log.entry_bytes``."""
        self._refresh()
        return self._log.entry_bytes(index)

    def head_note(self) -> bytes:
        """The log head, a signed note, as the store shows it. Checked to be one of this log.

        Raises:
            NotFoundError: there is none yet.
            IntegrityError: it is damaged, or not of this log.
        """
        self._log.refresh()
        return shown_head(self._store, self._log, layout.LOG_HEAD)[0]

    def log(self) -> list[dict[str, Any]]:
        """All entries as plain data, oldest first: what ``ciuic log --json`` prints."""
        self._refresh()
        return list_entries(self._log)

    def keys(self) -> list[str]:
        """Verifier keys (vkeys) of everybody who signed this chain."""
        self._refresh()
        return [str(vkey) for vkey in self._log.known_keys().values()]

    def signing_key(self) -> tuple[str, str | None] | None:
        """vkey and path of the key that would sign here, without making one; path None: it is not in a file."""
        key = self._key or keys.find(self._key_source, chain_folder=self._folder)
        return None if key is None else (key.vkey(self._file.origin), key.path)

    # --- writing ------------------------------------------------------------------------------------------------------

    def prune(self, policy: Policy, dry_run: bool = False, *, rebase: bool = True) -> PruneReport:
        """Drop the snapshots that a policy does not keep; the decision becomes an entry before a file is deleted.

        Args:
            dry_run: only say what would go, and change nothing.
            rebase: move what living snapshots need out of segments of pruned ones that are mostly garbage, so that
                those can go. Copies at most as many bytes as it frees.
        """
        return collect.prune(self.target(), policy, self.common, dry_run=dry_run, rebase=rebase)

    def gc(self, *, orphan_age_s: float = RETENTION.orphan_age_s, dry_run: bool = False) -> PruneReport:
        """Sweep files that no snapshot needs: what prune could not delete, and leftovers of crashed writers.

        Args:
            orphan_age_s: how old files must be, by the store's clock, of which nobody knows whether a writer is at work
                on them. Shorter than a snapshot takes is dangerous for that snapshot.
            dry_run: only say what would go; unpublished files are not counted.
        """
        # Whoever deletes must see every entry: also those that are in an etcd alone, and those that the pin knows.
        check_writer(self.ordering, self._file.features_required, self._store.url)
        self._refresh()
        return collect.gc(self._store, self._log, orphan_age_s=orphan_age_s, dry_run=dry_run)

    def rollback(self, ref: str, reason: str = "") -> Snapshot:
        """Make a snapshot the latest, by an entry that says so; nothing is deleted or changed.

        Training that is restored goes on from it. What came after it is abandoned: it can still be read, by id for
        example, and rolled back to; retention drops it first. Training that is running meanwhile is not told: its
        next snapshot becomes the latest. Durable on return.

        Raises:
            NotFoundError: there is no such snapshot.
            IntegrityError: its manifest or locator is damaged.
        """
        check_text("reason", reason)
        chosen: list[Line] = []

        def build(log: Log) -> list[bytes]:
            chosen[:] = [resolve_ref(log, ref)]
            resolve(self._store, chosen[0].entry)
            if next(the_line(log)).leaf_hash == chosen[0].leaf_hash:
                return []  # it is the latest
            return [RollbackEntry(self.common(), chosen[0].leaf_hash, reason).encode()]

        self._append(build)
        return self.snapshot(chosen[0])

    def tag(self, name: str, ref: str | None) -> None:
        """Give a snapshot a name, which is a ref from now on; another snapshot that has it loses it.

        Args:
            ref: which snapshot; None takes the name away.

        Raises:
            UsageError: not a name for a tag.
            NotFoundError: there is no such snapshot or, with None, no such tag.
        """
        check_tag(name)

        def build(log: Log) -> list[bytes]:
            bearer = tagged(log, name)
            wanted = None if ref is None else resolve_ref(log, ref).entry.snapshot
            if wanted is None and bearer is None:
                raise NotFoundError(f"{name}: no snapshot has this tag", kind="no_such_tag", where=name)
            if bearer is not None and bearer.entry.snapshot == wanted:
                return []
            return [TagEntry(self.common(), name, wanted).encode()]

        self._append(build)

    def announce(self, key: SigningKey) -> None:
        """Let another key sign from now on too, by an entry under the present one. Durable on return.

        Raises:
            UsageError: kind ``key_unknown``; the present key never signed this chain, so its word counts for nothing.
        """
        present = self._signing_key()

        def build(log: Log) -> list[bytes]:
            known = log.known_keys()
            if present.key_id(self.origin) not in known:
                raise UsageError(
                    f"{self._store.url}: the key here never signed this chain: nothing to hand over", kind="key_unknown"
                )
            if key.key_id(self.origin) in known:
                return []
            return [KeyEntry(self.common(), key.vkey(self.origin)).encode()]

        self._append(build)

    def note(self, text: str) -> None:
        """Add a remark for people to the history."""
        check_text("text", text)
        self._append(lambda log: [NoteEntry(self.common(), text).encode()])

    def diff(self, a: str, b: str) -> Difference:
        """What differs between two snapshots: paths added, removed and changed from ``a`` to ``b``.

        Compared by digests: tensors are not read, but for small ones that share a chunk.
        """
        return diff(self._store, self.get(a).resolve(), self.get(b).resolve())

    def target(self, *, pins: bool = True) -> CommitTarget:
        """Where and under whose key this object commits; loads or makes the key. For the engine.

        Args:
            pins: pin what is appended at once; else the caller calls ``pin`` when nobody waits.
        """
        check_writer(self.ordering, self._file.features_required, self._store.url)
        key = self._signing_key()
        if self._trust is not None:
            self._trust.check_writer(note.parse_vkey(key.vkey(self.origin)))
        if not self._knows_pin and self._pins.read(self.origin) is not None:
            self._refresh()
        appended = self._appended if pins else self._notice
        return CommitTarget(self._store, self._log, key, self._announcement, self._check_pin, appended)

    def pin(self) -> None:
        """Pin the log as it is known here, under the own signature, after an append. Never raises. For the engine."""
        try:
            head = self._log.head
            # Every entry up to here is in a claimed slot: this is the one head that the log can have at this size.
            text = note.head_text(self.origin, head.size, head.root)
            signed = self._signing_key().sign(self.origin, text).encode()
            self._pins.save(self.origin, signed, lambda size, root: extends(self._log, size, root))
        except Exception as error:
            logger.debug("%s: the pin could not be moved: %s", self._store.url, error)

    def await_witnesses(self, size: int) -> None:
        """Where witnesses are required: wait until a quorum has signed the log up to ``size`` entries. For the engine.

        Raises:
            SaveFailedError: kind ``not_witnessed``; the entries stay.
        """
        witnessing = self._witnesses()
        if witnessing is not None and witnessing.required:
            witnessing.committed(size)

    @property
    def policy(self) -> trust_policy.Policy | None:
        """Whose word counts here, from ``trust``, environment or configuration; None: nobody was named."""
        return None if self._trust is None else self._trust.policy

    def witness_status(self) -> tuple[WitnessStatus, ...]:
        """What is known of each witness that is asked for cosignatures; empty without ``trust``."""
        witnessing = self._witnesses()
        return () if witnessing is None else tuple(witnessing.cosigner.status())

    def common(self) -> Common:
        """Who and when, for an entry made now. For the engine."""
        return common(self._run)

    def snapshot(self, line: Line) -> Snapshot:
        """The snapshot at a place in the log. For the engine."""
        return Snapshot(self._store, self._log, line, mirror=self._mirror)

    @property
    def mirror(self) -> Mirror | None:
        """What copies the chain to its mirror. For the engine."""
        return self._mirror

    def mirror_status(self) -> MirrorStatus | None:
        """How far the mirror is; None without one."""
        return None if self._mirror is None else self._mirror.status()

    @property
    def log_size(self) -> int:
        """How many entries of the log this object knows. For the engine."""
        return len(self._log)

    @property
    def secret(self) -> str:
        """The signing key as the single line that ``key=`` takes. For another process of this very user's."""
        return self._signing_key().secret()

    @property
    def storage_options(self) -> dict[str, str] | None:
        """How the place is reached, secrets included. For another process of this very user's."""
        return self._storage_options

    @property
    def file(self) -> ChainFile:
        """The chain's parameters. For the engine."""
        return self._file

    @property
    def store(self) -> Store:
        """The place. For the engine."""
        return self._store

    def close(self) -> None:
        """End what asks witnesses and copies to a mirror, and give back descriptors.

        Idempotent; waits 7 s at most for witnesses, and 30 s for what is not replicated yet.
        """
        with self._mutex:
            witnessing, self._witnessing = self._witnessing, None
        if witnessing is not None:
            witnessing.close()
        if self._mirror is not None:
            self._mirror.close()
        self._store.close()

    def __enter__(self) -> SnapshotChain:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"SnapshotChain({self._store.url!r})"

    def _append(self, build: Callable[[Log], list[bytes]]) -> None:
        self.target().append(build)
        self.await_witnesses(len(self._log))

    def _open_log(self) -> Log:
        return Log(self._store, self._file.origin, parse_ordering(self.ordering, self._store, self._file.origin))

    def _witnesses(self) -> Witnessing | None:
        """Who asks the witnesses; made with the first use."""
        if self._trust is None:
            return None
        with self._mutex:
            if self._witnessing is None:
                self._witnessing = self._trust.witnessing(
                    self._store, self._open_log(), roll_forward=lambda log: log.roll_forward(self._signing_key())
                )
            return self._witnessing

    def _appended(self) -> None:
        self.pin()
        self._notice()

    def _notice(self) -> None:
        """Let witnesses and the mirror know that there is more. Fails at nothing, waits for nobody."""
        if self._mirror is not None:
            self._mirror.notice(len(self._log))
        with suppress(CiuicError):
            witnessing = self._witnesses()
            if witnessing is not None:
                witnessing.cosigner.notice()

    def _refresh(self) -> None:
        """Read what is new; the first time see whether it is the log that the pin knows: from then on it only grows."""
        self._log.refresh()
        if not self._knows_pin:
            self._check_pin()

    def _check_pin(self) -> None:
        self._pins.check(self.origin, self._log, lambda: self._store.read(layout.LOG_HEAD, note.LIMIT_BYTES))
        self._knows_pin = True

    def _check_pin_of(self, log: Log) -> None:
        self._pins.check(log.origin, log)

    @property
    def folder(self) -> str | None:
        """Where a local chain lies; None for other places. For the engine."""
        return self._folder

    @property
    def _folder(self) -> str | None:
        return self._local.url if isinstance(self._local, LocalStore) else None

    def _read_chain_file(self) -> bytes | None:
        try:
            return self._store.read(layout.CHAIN_FILE, CHAIN_FILE_LIMIT_BYTES)
        except NotFoundError:
            return None

    def _create(self) -> bytes:
        self._store.initialize()
        with suppress(CommitConflictError):  # somebody else made it this very moment: theirs counts
            file = ChainFile.new((ORDERING_ETCD,) if is_etcd(self.ordering) else ())
            if self._previous is not None:
                file = self._inherited(self._previous.file, file)
            self._store.create(layout.CHAIN_FILE, file.encode())
        return self._store.read(layout.CHAIN_FILE, CHAIN_FILE_LIMIT_BYTES)

    @staticmethod
    def _inherited(old: ChainFile, new: ChainFile) -> ChainFile:
        """The parameters of the chain before; who orders the writers is the new one's own."""
        required = [name for name in old.features_required if name != ORDERING_ETCD]
        return replace(old, origin=new.origin, features_required=(*required, *new.features_required))

    def _signing_key(self) -> SigningKey:
        with self._mutex:
            if self._key is None:
                self._key = keys.load_or_create(self._key_source, chain_folder=self._folder)
            return self._key

    def _announcement(self) -> bytes:
        pin = self._file_reference if len(self._log) == 0 else None
        previous = self._previous.head if self._previous is not None and pin is not None else None
        return KeyEntry(self.common(), self._signing_key().vkey(self._file.origin), pin, previous).encode()
