"""A snapshot as the mapping that programs of the first documents expect."""

from __future__ import annotations

import base64
import glob
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from ciuic_async.capture.state_tree import decode_plain
from ciuic_async.chain import Snapshot, SnapshotChain
from ciuic_async.errors import IntegrityError, NotFoundError
from ciuic_async.format import layout
from ciuic_async.format.manifest import SECTION_STATE, TOP_DICT
from ciuic_async.transparency import note
from ciuic_async.transparency.policy import Policy, Witnessed
from ciuic_async.transparency.receipt import Receipt

STATES = {"model_state": "model", "optimizer_state": "optimizer"}
"""What the documents call the parts of a state, and what a ``Checkpointer`` calls them: each restores the other's."""
_CALLED = {name: key for key, name in STATES.items()}
FACTS = ("id", "timestamp", "epoch", "batch_idx", "step", "loss", "metrics", "hash", "signature", "cosigned")
WHOLE = "state"


class SnapshotRecord(Mapping[str, Any]):
    """Read-only view of a snapshot: the facts (``FACTS``) and its state.

    ``model_state``, ``optimizer_state`` and what else was saved are read from the store, and checked, whenever they are
    asked for; a part that is called as a fact is stays out of sight, ``record.snapshot.load()`` has it. ``loss`` is the
    metric of this name or None. ``hash`` is the hash of its entry in the log (SHA-256,
    RFC 6962). ``signature`` is the log's own over a head that holds the entry, base64, None until there is one;
    ``SnapshotChain.receipt`` has the proof. ``cosigned`` is e.g. ``"1 of 3"``: witnesses whose signatures cover it.

    Raises:
        IntegrityError: on access: what is stored is damaged; names the tensor.
    """

    def __init__(self, chain: SnapshotChain, snapshot: Snapshot, policy: Policy | None) -> None:
        self._chain = chain
        self.snapshot = snapshot
        self._policy = policy
        self._names: dict[str, str | None] | None = None

    def __getitem__(self, key: str) -> Any:
        fact = _FACTS.get(key)
        if fact is not None:
            return fact(self)
        name = self._parts()[key]
        if name is None:
            return self.snapshot.load()
        return self.snapshot.load(only=glob.escape(name))[name]

    def __iter__(self) -> Iterator[str]:
        return iter((*FACTS, *self._parts()))

    def __len__(self) -> int:
        return len(FACTS) + len(self._parts())

    def __contains__(self, key: object) -> bool:
        return key in FACTS or key in self._parts()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SnapshotRecord) and self.snapshot.id == other.snapshot.id

    def __hash__(self) -> int:
        return hash(self.snapshot.id)

    def __repr__(self) -> str:
        return f"<SnapshotRecord {self.snapshot.id} epoch={self.snapshot.epoch} batch_idx={self.snapshot.batch}>"

    @property
    def id(self) -> str:
        """20 hex digits."""
        return self.snapshot.id

    def _parts(self) -> dict[str, str | None]:
        """The state's parts by what the documents call them; None: the state is one tree without names."""
        if self._names is None:
            manifest = self.snapshot.resolve().manifest
            if manifest.top != TOP_DICT:
                self._names = {WHOLE: None}
            else:
                names = [decode_plain(tree.key) for tree in manifest.trees if tree.section == SECTION_STATE]
                texts = [name for name in names if isinstance(name, str)]
                self._names = {key: name for name in texts if (key := called(name, texts)) not in FACTS}
        return self._names

    def _signature(self) -> str | None:
        try:
            receipt = Receipt.decode(self._chain.receipt(self.snapshot.id), "receipt")
        except NotFoundError:
            return None
        known = {note.parse_vkey(key).key_id for key in self._chain.keys()}  # noqa: SIM118 - no dict
        for item in note.parse(receipt.head, "receipt").signatures:
            if item.name == self._chain.origin and item.key_id in known:
                return base64.b64encode(item.signature).decode()
        return None

    def witnessed(self) -> Witnessed:
        """Which of the policy's witnesses signed a head that holds this snapshot, as the store shows it."""
        return cosigned_at(self._chain, self._policy, self.snapshot.index)


_FACTS: dict[str, Callable[[SnapshotRecord], Any]] = {
    "id": lambda record: record.snapshot.id,
    "timestamp": lambda record: record.snapshot.created,
    "epoch": lambda record: record.snapshot.epoch,
    "batch_idx": lambda record: record.snapshot.batch,
    "step": lambda record: record.snapshot.step,
    "loss": lambda record: record.snapshot.metrics.get("loss"),
    "metrics": lambda record: dict(record.snapshot.metrics),
    "hash": lambda record: record.snapshot.leaf_hash.hex(),
    "signature": lambda record: record._signature(),
    "cosigned": lambda record: (lambda found: f"{found.have} of {found.count}")(record.witnessed()),
}


def called(name: str, names: list[str]) -> str:
    """What the documents call a part of a state, where that is no other part's own name."""
    other = _CALLED.get(name)
    return name if other is None or other in names or other in FACTS else other


def cosigned_at(chain: SnapshotChain, policy: Policy | None, index: int) -> Witnessed:
    """Whose cosignatures cover the entry at ``index``."""
    if policy is None:
        return Witnessed(0, 0, False)
    best = policy.witnessed(set())
    for name in (layout.WITNESSED, layout.LOG_HEAD):
        with suppress(NotFoundError, IntegrityError):  # derived files: what is damaged counts for nothing
            parsed = note.parse(chain.store.read(name, note.LIMIT_BYTES), name)
            size, _ = note.parse_head(parsed.text, chain.origin, name)
            keys = policy.witness_keys()
            signers = {
                vkey
                for item in parsed.signatures
                if (vkey := keys.get((item.name, item.key_id))) and vkey.verifies(parsed.text, item.signature)
            }
            found = policy.witnessed(signers)
            if index < size and (found.met, found.have) > (best.met, best.have):
                best = found
    return best
