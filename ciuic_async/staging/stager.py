"""Copying what a plan names from live memory into a slot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Protocol

import numpy as np
import torch

from ciuic_async.handoffs import CapturePlan, PlannedChunk
from ciuic_async.staging.device import Copy, Device, Pending


class Source(Protocol):
    """Bytes of the plan's address space and where they are now (``capture.tensors.Source``)."""

    @property
    def address(self) -> int: ...

    @property
    def size_bytes(self) -> int: ...

    @property
    def flat(self) -> torch.Tensor | memoryview | None: ...


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
    by_device: dict[str, tuple[torch.device, list[Copy]]] = {}
    for source in sources:
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
        for device, copies in by_device.values():
            pending.append(devices.of(device).copy(copies))
        for work in pending:
            work.wait()
    except BaseException:
        for work in pending:
            with suppress(BaseException):  # whatever it is, the first error is the cause, and the others must end too
                work.wait()
        raise


def _as_tensor(memory: memoryview) -> torch.Tensor:
    """Host memory as a uint8 tensor that is only read. torch warns about read-only memory, so it gets an alias."""
    array = np.frombuffer(memory, dtype=np.uint8)
    if array.flags.writeable:
        return torch.from_numpy(array)
    return torch.from_numpy(array.copy())
