"""Reading chunks in parallel and putting their bytes where they belong; every digest is checked before.

A chunk is read into scratch memory, decoded, checked, and only then copied to its targets: bad data never reaches a
tensor. All of that happens to one chunk after the other on one thread, while its bytes are in the processor's cache;
several threads keep the disk busy meanwhile. Memory in use is one run of records and a decoded chunk for each of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from ciuic_async import native
from ciuic_async.errors import IntegrityError, InternalError, NotFoundError
from ciuic_async.events import Event, Listener, notify
from ciuic_async.format.digest import digest as blake3_256
from ciuic_async.format.manifest import Manifest, StoredTensor, dotted
from ciuic_async.options import READ
from ciuic_async.pipeline.chunks import chunk_reader
from ciuic_async.pipeline.commit import Resolved
from ciuic_async.pipeline.moved import reread
from ciuic_async.segments.reader import ChunkRequest
from ciuic_async.stores.base import Store

T = TypeVar("T")

Placement = tuple[int, int, int, int]
"""Part of a chunk and where it goes: stored tensor, offset in its target, offset in the chunk, size; in bytes."""


@dataclass(frozen=True, slots=True)
class Job:
    """One chunk and all that comes from it."""

    chunk: ChunkRequest
    places: list[Placement] = field(default_factory=list)


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
        targets: by index of the stored tensor, contiguous tensors of its size in bytes, of any dtype and shape. Owned
            by the caller; after an error their content is a mixture.

    Raises:
        IntegrityError: names the segment and the tensors; kind ``missing`` when a segment is not there.
    """
    try:
        _read_tensors(store, resolved, targets, verify, listener)
    except IntegrityError as error:
        newer = reread(store, resolved) if error.kind == "missing" else None
        if newer is None:
            raise
        read_tensors(store, newer, targets, verify=verify, listener=listener)  # retention moved it meanwhile


def _read_tensors(
    store: Store, resolved: Resolved, targets: Mapping[int, torch.Tensor], verify: bool, listener: Listener | None
) -> None:
    jobs = plan_reads(resolved, targets)
    held = [[job] for job in jobs if job.chunk.digest in resolved.in_memory]
    runs = held + plan_runs(job for job in jobs if job.chunk.digest not in resolved.in_memory)
    if not runs:
        return
    total = sum(job.chunk.raw_size_bytes for job in jobs)
    deltas = any(job.chunk.location.depth for job in jobs)
    sizes = resolved.manifest.distinct_chunks() if deltas else {}
    copy = _copier(targets)
    # Training may have queued work on a stream of its own that still reads or writes the targets; the reading threads
    # copy on their own current streams, which wait for none of it.
    devices = {target.device for target in targets.values() if target.is_cuda}
    _synchronize(devices)
    with chunk_reader(store, verify=verify, where=resolved.locator, sizes=sizes) as reader:

        def work(run: Sequence[Job]) -> None:
            found = _in_memory(resolved, run[0].chunk)
            chunks = reader.read_run([job.chunk for job in run]) if found is None else iter([found])
            for job in run:
                copy(_next(chunks, job, resolved), job.places)
                notify(listener, Event("restore", resolved.entry.snapshot, job.chunk.raw_size_bytes, total_bytes=total))

        _in_parallel(work, runs, min(READ.threads, len(runs)))
    _synchronize(devices)  # and what training queues next, on whatever stream, sees all that was copied


def _in_memory(resolved: Resolved, chunk: ChunkRequest) -> memoryview | None:
    """The bytes of a chunk that is in memory, if they are what they should be: else the store's are taken."""
    raw = resolved.in_memory.get(chunk.digest)
    if raw is None or len(raw) != chunk.raw_size_bytes or blake3_256(raw) != chunk.digest:
        return None
    return raw


def _next(chunks: Iterator[memoryview], job: Job, resolved: Resolved) -> memoryview:
    """The bytes of ``job``'s chunk; errors name the tensors that are lost."""
    try:
        return next(chunks)
    except (IntegrityError, NotFoundError) as error:
        tensors = resolved.manifest.tensors
        names = sorted({dotted(tensors[place[0]].path) for place in job.places})
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise IntegrityError(
            f"snapshot {resolved.entry.snapshot}: tensor {', '.join(names[:3])}{more}: {error}",
            kind=error.kind if isinstance(error, IntegrityError) else "missing",
            where=error.where or job.chunk.location.segment.path,
        ) from error


def _synchronize(devices: Iterable[torch.device]) -> None:
    for device in devices:
        torch.cuda.synchronize(device)


# --- what to read -----------------------------------------------------------------------------------------------------


def plan_reads(resolved: Resolved, targets: Mapping[int, torch.Tensor]) -> list[Job]:
    """Which chunks to read for which targets, in the order they lie on disk.

    Raises:
        IntegrityError: kind ``sharded``; or kind ``bad_manifest``, where a chunk is said to have two sizes.
    """
    manifest, places = resolved.manifest, resolved.locator.chunks
    jobs: dict[bytes, Job] = {}
    for number, target in targets.items():
        tensor = manifest.tensors[number]
        size = tensor.size_bytes
        if target.nbytes != size or not target.is_contiguous():
            raise InternalError(
                f"tensor {dotted(tensor.path)}: a target of {target.nbytes} bytes that are "
                f"{'' if target.is_contiguous() else 'not '}contiguous, expected {size}",
                kind="bad_target",
            )
        for digest, raw_size, place in _placements(manifest, number, tensor, size):
            job = jobs.get(digest)
            if job is None:
                job = jobs[digest] = Job(ChunkRequest(digest, raw_size, places[digest]))
            if job.chunk.raw_size_bytes != raw_size:
                raise IntegrityError(
                    f"snapshot {resolved.entry.snapshot}: chunk {digest.hex()[:16]} has {job.chunk.raw_size_bytes} "
                    f"bytes in one place and {raw_size} in another",
                    kind="bad_manifest",
                    where=resolved.entry.manifest.path,
                )
            job.places.append(place)
    return sorted(jobs.values(), key=lambda job: (job.chunk.location.segment.path, job.chunk.location.offset_bytes))


def _placements(
    manifest: Manifest, number: int, tensor: StoredTensor, size: int
) -> Iterator[tuple[bytes, int, Placement]]:
    """Digest and raw size of every chunk of a tensor, with what of it the tensor is."""
    if len(tensor.shards) != 1 or tensor.shards[0].sizes != tensor.shape:
        raise IntegrityError(
            f"tensor {dotted(tensor.path)}: stored by several ranks, which this version cannot put together",
            kind="sharded",
            where=dotted(tensor.path),
        )
    shard = tensor.shards[0]
    if shard.pack is not None:
        pack, offset = manifest.packs[shard.pack[0]], shard.pack[1]
        if offset + size > pack.size_bytes:  # the manifest was checked; what is copied by address is checked twice
            raise IntegrityError(f"tensor {dotted(tensor.path)}: lies outside its pack", kind="bad_manifest")
        yield pack.digest, pack.size_bytes, (number, 0, offset, size)
        return
    for index, chunk in enumerate(shard.chunk_digests()):
        start = index * shard.chunk_size_bytes
        raw_size = min(shard.chunk_size_bytes, size - start)
        if raw_size <= 0:
            raise IntegrityError(f"tensor {dotted(tensor.path)}: has more chunks than bytes", kind="bad_manifest")
        yield chunk, raw_size, (number, start, 0, raw_size)


def plan_runs(jobs: Iterable[Job]) -> list[list[Job]]:
    """Jobs that are read in one go: records in one segment, near each other, not too large together."""
    runs: list[list[Job]] = []
    start = end = 0
    path = ""
    for job in jobs:
        location = job.chunk.location
        near = location.segment.path == path and 0 <= location.offset_bytes - end <= READ.run_gap_bytes
        if near and job.chunk.end_bytes - start <= READ.run_size_bytes:
            runs[-1].append(job)
        else:
            runs.append([job])
            path, start = location.segment.path, location.offset_bytes
        end = job.chunk.end_bytes
    return runs


# --- where it goes ----------------------------------------------------------------------------------------------------


def _copier(targets: Mapping[int, torch.Tensor]) -> Callable[[memoryview, Sequence[Placement]], None]:
    """Puts parts of a chunk's bytes into targets, without the GIL where it pays."""
    core = native.core
    if core is not None and all(target.is_cpu for target in targets.values()):
        # By address: a pack holds thousands of small tensors, and slicing two tensors for each takes longer than
        # reading them. That every part lies inside its chunk and its target was checked when reading was planned.
        addresses = {number: target.data_ptr() for number, target in targets.items()}

        def copy_by_address(raw: memoryview, places: Sequence[Placement]) -> None:
            source = torch.frombuffer(raw, dtype=torch.uint8).data_ptr()
            core.copy_many(
                [(addresses[number] + to, source + at, size) for number, to, at, size in places],
                1,
            )

        return copy_by_address

    flat = {number: _flat(target) for number, target in targets.items()}

    def copy(raw: memoryview, places: Sequence[Placement]) -> None:
        source = torch.frombuffer(raw, dtype=torch.uint8)
        for number, to, at, size in places:
            flat[number][to : to + size].copy_(source[at : at + size])

    return copy


def _flat(target: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor, 1-D uint8, in the same memory."""
    start = int(target.storage_offset()) * target.element_size()
    with torch.no_grad():
        flat = torch.empty(0, dtype=torch.uint8, device=target.device)
        return flat.set_(target.untyped_storage(), start, (target.nbytes,), (1,))


# --- threads ----------------------------------------------------------------------------------------------------------


def _in_parallel(work: Callable[[T], None], items: Sequence[T], threads: int) -> None:
    """Call ``work`` for every item, in about this order, on up to ``threads`` threads, the caller among them.

    The first error ends the work, and is raised when no thread is at work any more.
    """
    waiting = iter(items)
    taking = threading.Lock()
    failures: list[BaseException] = []

    def take_part() -> None:
        try:
            while not failures:
                with taking:
                    item = next(waiting, None)
                if item is None:
                    return
                work(item)
        except BaseException as error:
            failures.append(error)

    helpers: list[threading.Thread] = []
    for number in range(1, threads):
        helper = threading.Thread(target=take_part, name=f"ciuic-read-{number}", daemon=True)
        try:
            helper.start()
        except RuntimeError:  # a limit of the machine: fewer will do
            break
        helpers.append(helper)
    take_part()
    for helper in helpers:
        while helper.is_alive():
            try:
                helper.join()
            except BaseException as error:  # Ctrl-C: targets and descriptors are the threads' until they end
                failures.append(error)
    if failures:
        raise failures[0]
