"""``CiuicSnapshotChain``: the interfaces of the first documents, on top of ``Checkpointer`` and ``SnapshotChain``."""

from ciuic_async.compat.interface import CiuicSnapshotChain
from ciuic_async.compat.record import SnapshotRecord

__all__ = ["CiuicSnapshotChain", "SnapshotRecord"]
