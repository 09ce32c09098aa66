"""Reading chunks in parallel and putting their bytes where they belong; every digest is checked before.

A chunk is read into scratch memory, decoded, checked, and only then copied to its targets: bad data never reaches a
tensor. Memory in use is one chunk, encoded and decoded, for each reading thread.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch

from ciuic_async.errors import IntegrityError, NotFoundError
from ciuic_async.events import Event, Listener, notify
from ciuic_async.format.manifest import StoredTensor, dotted, volume
from ciuic_async.options import READ
from ciuic_async.pipeline.chunks import chunk_reader
from ciuic_async.pipeline.commit import Resolved
from ciuic_async.stores.base import Store


@dataclass(frozen=True, slots=True)
class Placement:
    """Part of a chunk and where it goes. ``target`` is 1-D uint8 on any device."""

    tensor: int
    target: torch.Tensor
    target_offset: int
    chunk_offset: int
    size_bytes: int


def read_tensors(
    store: Store,
    resolved: Resolved,
    targets: Mapping[int, torch.Tensor],
    *,
    verify: bool = True,
    listener: Listener | None = None,
) -> None:
    """Fill ``targets`` with stored tensors; reads only the chunks they need, each once.

    Args:
        targets: by index of the stored tensor, 1-D uint8 tensors of its whole size. Owned by the caller; after an error
            their content is a mixture.

    Raises:
        IntegrityError: names the segment and the tensors; kind ``missing`` when a segment is not there.
    """
    jobs = plan_reads(resolved, targets)
    if not jobs:
        return
    sizes = resolved.manifest.distinct_chunks()
    reader = chunk_reader(store, verify=verify)
    stop = threading.Event()
    total = sum(sizes[chunk] for chunk in jobs)
    devices = {target.device for target in targets.values() if target.device.type == "cuda"}

    def work(chunk: bytes, placements: list[Placement]) -> None:
        if stop.is_set():
            return
        try:
            location = resolved.locator.chunks[chunk]
            raw = reader.read_chunk(chunk, sizes[chunk], location)
        except (IntegrityError, NotFoundError) as error:
            stop.set()
            names = sorted({dotted(resolved.manifest.tensors[p.tensor].path) for p in placements})
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            kind = error.kind if isinstance(error, IntegrityError) else "missing"
            raise IntegrityError(
                f"snapshot {resolved.entry.snapshot}: tensor {', '.join(names[:3])}{more}: {error}",
                kind=kind,
                where=location.segment.path,
            ) from error
        except BaseException:
            stop.set()
            raise
        bytes_of_chunk = torch.frombuffer(raw, dtype=torch.uint8)
        for place in placements:
            part = bytes_of_chunk[place.chunk_offset : place.chunk_offset + place.size_bytes]
            place.target[place.target_offset : place.target_offset + place.size_bytes].copy_(part)
        notify(listener, Event("restore", resolved.entry.snapshot, sizes[chunk], total_bytes=total))

    # Training may have queued work on a stream of its own that still reads or writes the targets; the reading threads
    # copy on their own current streams, which wait for none of it.
    _synchronize(devices)
    with ThreadPoolExecutor(min(READ.threads, len(jobs)), "ciuic-read") as pool:
        futures: list[Future[None]] = [pool.submit(work, chunk, places) for chunk, places in jobs.items()]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        failures = [error for future in done if (error := future.exception()) is not None]
        if failures:
            stop.set()
            raise failures[0]
    _synchronize(devices)  # and what training queues next, on whatever stream, sees all that was copied


def _synchronize(devices: Iterable[torch.device]) -> None:
    for device in devices:
        torch.cuda.synchronize(device)


def plan_reads(resolved: Resolved, targets: Mapping[int, torch.Tensor]) -> dict[bytes, list[Placement]]:
    """Which chunks to read for which targets, in the order they lie on disk."""
    jobs: dict[bytes, list[Placement]] = {}
    for number, target in targets.items():
        for chunk, place in _placements(resolved, number, target):
            jobs.setdefault(chunk, []).append(place)
    places = resolved.locator.chunks
    return dict(sorted(jobs.items(), key=lambda job: (places[job[0]].segment.path, places[job[0]].offset_bytes)))


def _placements(resolved: Resolved, number: int, target: torch.Tensor) -> Iterable[tuple[bytes, Placement]]:
    tensor: StoredTensor = resolved.manifest.tensors[number]
    if len(tensor.shards) != 1 or tensor.shards[0].sizes != tensor.shape:
        raise IntegrityError(
            f"tensor {dotted(tensor.path)}: stored by several ranks, which this version cannot put together",
            kind="sharded",
            where=dotted(tensor.path),
        )
    shard = tensor.shards[0]
    if shard.pack is not None:
        pack, offset = shard.pack
        yield resolved.manifest.packs[pack].digest, Placement(number, target, 0, offset, tensor.size_bytes)
        return
    size = volume(shard.sizes) * tensor.item_size_bytes
    for index, chunk in enumerate(shard.chunk_digests()):
        start = index * shard.chunk_size_bytes
        yield chunk, Placement(number, target, start, 0, min(shard.chunk_size_bytes, size - start))
