"""``save`` and ``load`` for one state, without a training loop."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from typing import TYPE_CHECKING, Any

from ciuic_async.arguments import check_config, check_metrics, check_number, check_tags, position
from ciuic_async.chain import Snapshot, SnapshotChain
from ciuic_async.config.settings import configured
from ciuic_async.errors import UsageError
from ciuic_async.events import Listener
from ciuic_async.format import layout
from ciuic_async.format.chain_file import CHUNK_SIZE_BYTES
from ciuic_async.format.manifest import Progress

if TYPE_CHECKING:
    import torch

    from ciuic_async.capture.state_tree import Captured
    from ciuic_async.handoffs import StagedWindow

WINDOW_BYTES = 64 << 20
"""Host memory that ``save`` takes beside the state itself."""


@configured("save")
def save(
    state: Any,
    url: str | os.PathLike[str] | SnapshotChain,
    *,
    tags: Sequence[str] = (),
    metrics: Mapping[str, Any] | None = None,
    codec: str = "auto",
    key: str | os.PathLike[str] | None = None,
    step: int | None = None,
    epoch: Any = None,
    batch: Any = None,
    config: Mapping[str, Any] | None = None,
) -> Snapshot:
    """Store a state tree as the next snapshot of a chain; durable on return.

    Blocks; takes at most 64 MiB of host memory beside the state. Chunks of the chain's newest snapshot are referenced
    instead of written again.

    Args:
        state: any nesting of dicts, lists, tensors and plain values (docs/format.md, section 2). For objects hand over
            their ``state_dict()``.
        url: path, URL or open chain; made if there is none.
        step, epoch, batch, config: to record with it, as a ``Checkpointer`` does.

    Raises:
        UsageError: a value that cannot be stored; names its path. Nothing was written.
        StoreError: the place failed. Earlier snapshots are intact.
    """
    from ciuic_async.capture import training
    from ciuic_async.capture.state_tree import encode_plain, flatten
    from ciuic_async.codecs.choose import encoder_for
    from ciuic_async.pipeline.bases import Parent
    from ciuic_async.pipeline.history import Line
    from ciuic_async.pipeline.persist import Persister, SaveRequest

    check_number("step", step, whole=True, zero=True)
    progress = Progress(
        step,
        encode_plain(epoch, "epoch"),
        encode_plain(batch, "batch"),
        None if config is None else encode_plain(check_config(config), "config"),
    )
    encoder, recorded_metrics, recorded_tags = encoder_for(codec), check_metrics(metrics), check_tags(tags)
    captured = flatten(
        state, chunk_size_bytes=CHUNK_SIZE_BYTES
    )  # what cannot be stored is refused before a chain is made
    with _opened(url, create=True, key=key) as chain:
        if chain.file.chunk_size_bytes != CHUNK_SIZE_BYTES:
            captured = flatten(state, chunk_size_bytes=chain.file.chunk_size_bytes)
        newest = chain.latest()
        request = SaveRequest(
            snapshot=layout.new_id(),
            plan=captured.plan,
            step=step,
            epoch=position(epoch),
            batch=position(batch),
            progress=progress,
            metrics=recorded_metrics,
            tags=recorded_tags,
            environment=training.environment(),
            parent=None if newest is None else Parent(newest.id, newest.leaf_hash, _locations(newest)),
        )
        with closing(Persister(chain.target(), chain.file, encoder, chain.run)) as persister:
            done = persister.persist(request, _windows(captured), lambda window: None, keeps_memory=False)
        chain.await_witnesses(done.index + 1)
        return chain.snapshot(Line(done.index, done.entry, done.leaf_hash))


def load(
    url: str | os.PathLike[str] | SnapshotChain,
    ref: str = "latest",
    *,
    only: str | Sequence[str] | None = None,
    map_location: str | torch.device = "cpu",
    verify: bool = True,
    listener: Listener | None = None,
) -> Any:
    """The state tree of a snapshot; see ``Snapshot.load``.

    Raises:
        NotFoundError: no chain, or no such snapshot.
        IntegrityError: damage. Nothing is returned, and nothing is passed over.
    """
    with _opened(url, create=False) as chain:
        return chain.get(ref).load(only=only, map_location=map_location, verify=verify, listener=listener)


def _opened(url: Any, *, create: bool, key: Any = None) -> AbstractContextManager[SnapshotChain]:
    """A chain for the time of one call; a chain that the caller opened stays open."""
    if isinstance(url, SnapshotChain):
        if key is not None:
            raise UsageError("key= was given beside an open SnapshotChain, which has its own: give it to the chain")
        return nullcontext(url)
    return SnapshotChain(url, create=create, key=key)


def _locations(snapshot: Snapshot) -> Mapping[bytes, Any]:
    """Chunks of the newest snapshot to refer to; none if it is damaged: the new one must not lean on it."""
    from ciuic_async.errors import IntegrityError

    try:
        return snapshot.resolve().locator.chunks
    except IntegrityError:
        return {}


def _windows(captured: Captured) -> Iterator[StagedWindow]:
    """Stage window after window into one buffer, each when the writer is done with the last."""
    import torch

    from ciuic_async.handoffs import StagedWindow
    from ciuic_async.staging.device import Devices
    from ciuic_async.staging.stager import stage, windows

    devices = Devices()
    size = min(WINDOW_BYTES, max(captured.plan.size_bytes, 1))
    buffer = torch.empty(size, dtype=torch.uint8)
    memory = buffer.numpy().data.toreadonly()
    for base, chunks in windows(captured.plan, size):
        stage(captured.sources, buffer, base, chunks[-1].address + chunks[-1].size_bytes, devices)
        yield StagedWindow(base, chunks, memory)
