"""Copying what a plan names from live memory into a slot."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import suppress
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from ciuic_async import native
from ciuic_async.format.digest import hasher
from ciuic_async.handoffs import CapturePlan, PlannedChunk
from ciuic_async.staging.device import Copy, CpuDevice, Device, Pending

CACHED_BYTES = 512 << 10
"""What a thread copies before it digests it: measured best where a core has 1 MiB of cache of its own."""


class Source(Protocol):
    """Bytes of the plan's address space and where they are now (``capture.tensors.Source``)."""

    @property
    def address(self) -> int: ...

    @property
    def size_bytes(self) -> int: ...

    @property
    def flat(self) -> torch.Tensor | memoryview | None: ...


Column = np.ndarray[Any, np.dtype[np.int64]]


@runtime_checkable
class SourceColumns(Protocol):
    """Sources as columns (``capture.tensors.Sources``): those in host memory are copied without an object for each."""

    @property
    def addresses(self) -> Column: ...

    @property
    def sizes_bytes(self) -> Column: ...

    @property
    def pointers(self) -> Column: ...

    @property
    def device_rows(self) -> Column: ...


class DeviceMap(Protocol):
    """Finds the device of a tensor."""

    def of(self, device: torch.device) -> Device: ...


def windows(plan: CapturePlan, size_bytes: int) -> Iterator[tuple[int, tuple[PlannedChunk, ...]]]:
    """Cut a plan into runs of chunks that fit into ``size_bytes`` each.

    Yields:
        (base address, chunks): a chunk's place in the slot is its address minus the base.
    """
    base = 0
    run: list[PlannedChunk] = []
    for chunk in plan.chunks():
        if run and chunk.address + chunk.size_bytes - base > size_bytes:
            yield base, tuple(run)
            run = []
        if not run:
            base = chunk.address
        run.append(chunk)
    if run:
        yield base, tuple(run)


def stage(sources: Sequence[Source], payload: torch.Tensor, base: int, end: int, devices: DeviceMap) -> None:
    """Copy everything the sources hold between addresses ``base`` and ``end`` into ``payload``.

    Blocks until all copies are complete: after it returns, training may change its tensors. After it raised, too, and
    nothing writes into ``payload`` any more.

    Args:
        sources: in address order, covering every byte of every chunk.
        payload: 1-D uint8 host memory; address ``base`` is its first byte.
    """
    pending = begin(sources, payload, base, end, devices)
    try:
        for work in pending:
            work.wait()
    except BaseException:
        settle(pending)
        raise


class DigestingCopy:
    """Copies host memory into a slot chunk by chunk, and digests the bytes while they are still in the caches.

    Callable by several threads at once for different chunks. What is digested is what arrived in the slot, whoever
    writes to the source meanwhile.
    """

    def __init__(self, core: ModuleType, sources: SourceColumns, payload: torch.Tensor, base: int, end: int) -> None:
        self._copier = core.TwiceCopier(*(row.data for row in _host_rows(sources, payload, base, end)))
        self._shift = payload.data_ptr() - base
        self._keep = sources, payload
        self._buffers: list[memoryview] = []

    @classmethod
    def of(
        cls, sources: Sequence[Source], payload: torch.Tensor, base: int, end: int, devices: DeviceMap
    ) -> DigestingCopy | None:
        """For the arguments of ``stage``; None where something else than memory is to be copied, or no native core."""
        plain = isinstance(devices.of(torch.device("cpu")), CpuDevice)
        if native.core is None or not plain or not isinstance(sources, SourceColumns) or len(sources.device_rows):
            return None
        return cls(native.core, sources, payload, base, end)

    def __call__(self, chunk: PlannedChunk) -> bytes:
        """Copy a chunk; its digest."""
        try:
            buffer = self._buffers.pop()
        except IndexError:
            buffer = memoryview(bytearray(CACHED_BYTES))
        content = hasher()
        for start in range(0, chunk.size_bytes, CACHED_BYTES):
            twin = buffer[: chunk.size_bytes - start]
            self._copier.copy(self._shift + chunk.address + start, twin)
            content.update(twin)
        self._buffers.append(buffer)
        return content.digest()


def begin(
    sources: Sequence[Source],
    payload: torch.Tensor,
    base: int,
    end: int,
    devices: DeviceMap,
    *,
    in_background: bool = False,
) -> list[Pending]:
    """Like ``stage``, but return as soon as the devices' ``copy`` (``in_background``: their ``begin``) did.

    When it raises, no copy is under way.
    """
    by_device: dict[str, tuple[torch.device, list[Copy]]] = {}
    host = devices.of(torch.device("cpu"))
    columns = sources if isinstance(sources, SourceColumns) and isinstance(host, CpuDevice) else None
    if columns is not None and (in_background or native.core is not None):
        others: Sequence[Source] = [sources[row] for row in columns.device_rows.tolist()]
    else:
        others, columns = sources, None
    for source in others:
        low, high = max(source.address, base), min(source.address + source.size_bytes, end)
        if low >= high:
            continue
        target = payload[low - base : high - base]
        if source.flat is None:
            target.zero_()
            continue
        flat = source.flat if isinstance(source.flat, torch.Tensor) else _as_tensor(source.flat)
        part = flat[low - source.address : high - source.address]
        by_device.setdefault(str(part.device), (part.device, []))[1].append((target, part))
    pending: list[Pending] = []
    try:
        for name, copies in by_device.values():
            device = devices.of(name)
            pending.append(device.begin(copies) if in_background else device.copy(copies))
        if columns is not None and isinstance(host, CpuDevice):
            rows = _host_rows(columns, payload, base, end)
            if in_background:
                ranges = list(zip(*(row.tolist() for row in rows), strict=True))
                for target, pointer, size in ranges:
                    if not pointer:
                        ctypes.memset(target, 0, size)
                pending.append(host.begin_ranges([one for one in ranges if one[1]], sources))
            else:
                host.copy_columns(*(row.data for row in rows))
    except BaseException:
        settle(pending)
        raise
    return pending


def _host_rows(sources: SourceColumns, payload: torch.Tensor, base: int, end: int) -> tuple[Column, Column, Column]:
    """What to copy in host memory: destinations, sources (0: zeros) and sizes."""
    lows = np.maximum(sources.addresses, base)
    highs = np.minimum(sources.addresses + sources.sizes_bytes, end)
    inside = highs > lows
    inside[sources.device_rows] = False
    if highs.max(initial=base, where=inside) - base > payload.numel():
        raise ValueError(f"the bytes from {base} to {end} do not fit into {payload.numel()} bytes of memory")
    pointers = np.where(sources.pointers != 0, sources.pointers + (lows - sources.addresses), 0)
    return (lows + (payload.data_ptr() - base))[inside], pointers[inside], (highs - lows)[inside]


def settle(pending: Sequence[Pending]) -> None:
    """Wait until none of these copies writes any more, whatever else is wrong with them."""
    for work in pending:
        with suppress(BaseException):  # something else failed before and is the news; the others must end all the same
            work.wait()


def _as_tensor(memory: memoryview) -> torch.Tensor:
    """Host memory as a uint8 tensor that is only read. torch warns about read-only memory, so it gets an alias."""
    array = np.frombuffer(memory, dtype=np.uint8)
    if array.flags.writeable:
        return torch.from_numpy(array)
    return torch.from_numpy(array.copy())
