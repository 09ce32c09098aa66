"""What staging needs of a device, behind a small interface.

The order that makes a copy right on an asynchronous device: the copies run on a side stream that waits for an event
recorded on the stream training uses *now*, so they see everything queued before; they are complete when an event
recorded behind them has happened. ``tests/unit/test_staging_order.py`` proves it with a device whose work happens late
and out of order unless events order it; ``tests/gpu`` with real ones.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch

from ciuic_async import native
from ciuic_async.events import logger
from ciuic_async.options import STAGING

Copy = tuple[torch.Tensor, torch.Tensor]
"""(destination in host memory, source on the device): 1-D uint8 of equal length, contiguous."""


class Pending(Protocol):
    """Copies under way."""

    def wait(self) -> None:
        """Return when every copy is complete; the sources may change from then on. May be called again."""


class Device(Protocol):
    """Where tensors live."""

    def copy(self, copies: Sequence[Copy]) -> Pending:
        """Start copying what the sources hold in the order of the current stream. Called on the training thread.

        When it raises, no copy is under way.
        """

    def pin(self, memory: torch.Tensor) -> bool:
        """Page-lock host memory for fast copies, and say whether that worked. Without it copies are right, but slower.

        May be called on any thread.
        """

    def unpin(self, memory: torch.Tensor) -> None:
        """Undo a ``pin`` that worked."""


class _Done:
    def wait(self) -> None:
        pass


class CpuDevice:
    """Host memory: a parallel copy with non-temporal stores, complete on return."""

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads or max(1, min(4, len(os.sched_getaffinity(0))))

    def copy(self, copies: Sequence[Copy]) -> Pending:
        if native.core is not None:
            jobs = [(target.data_ptr(), source.data_ptr(), source.numel()) for target, source in copies]
            native.core.copy_many(jobs, self._threads)
        else:
            for target, source in copies:
                target.copy_(source)
        return _Done()

    def pin(self, memory: torch.Tensor) -> bool:
        return False

    def unpin(self, memory: torch.Tensor) -> None:
        pass


class _CudaPending:
    def __init__(self, event: Any, keep: Sequence[Copy]) -> None:
        self._event = event
        self._keep = keep  # storages stay alive until their copy's event

    def wait(self) -> None:
        self._event.synchronize()
        self._keep = ()


class CudaDevice:
    """A CUDA device with a side stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None

    def copy(self, copies: Sequence[Copy]) -> Pending:
        with torch.cuda.device(self._device):
            if self._stream is None:
                self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            try:
                done = self._queue(copies)
            except BaseException:
                # Copies queued before still write into the slot, which its owner now gives to somebody else.
                with suppress(RuntimeError):  # a broken device copies no more, and the first error says why
                    self._stream.synchronize()
                raise
        return _CudaPending(done, copies)

    def _queue(self, copies: Sequence[Copy]) -> Any:
        """Queue the copies on the side stream, behind what the current stream holds now; the event after the last."""
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record(torch.cuda.current_stream())
        self._stream.wait_event(ready)
        with torch.cuda.stream(self._stream):
            for target, source in copies:
                for part_target, part_source in _within_pinned_ranges(target, source):
                    part_target.copy_(part_source, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._stream)
        return done

    def pin(self, memory: torch.Tensor) -> bool:
        # Background threads start on device 0: registering there would make a context on a GPU that is not ours.
        with torch.cuda.device(self._device):
            runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            for start in range(0, memory.numel(), STAGING.pin_range_bytes):
                size = min(STAGING.pin_range_bytes, memory.numel() - start)
                error = runtime.cudaHostRegister(memory.data_ptr() + start, size, 0)
                if int(error) != 0:
                    for undo in range(0, start, STAGING.pin_range_bytes):
                        runtime.cudaHostUnregister(memory.data_ptr() + undo)
                    self._forget_last_error()
                    logger.warning(
                        "cannot pin %d bytes of host memory (%s): copies from the GPU are slower; "
                        "raise ulimit -l or lower host_memory_bytes",
                        memory.numel(),
                        error,
                    )
                    return False
        return True

    def unpin(self, memory: torch.Tensor) -> None:
        # A device that training broke must not keep us from giving the memory back: the driver forgets it by itself.
        with suppress(RuntimeError), torch.cuda.device(self._device):
            runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            for start in range(0, memory.numel(), STAGING.pin_range_bytes):
                runtime.cudaHostUnregister(memory.data_ptr() + start)

    def _forget_last_error(self) -> None:
        """Clear the error that CUDA remembers of this thread.

        The refusal was handled, yet the next kernel launched on this thread would report it as its own: in the middle
        of training, when the training thread pins. torch has no call for it, but every launch reads and clears it.
        """
        with suppress(RuntimeError):
            torch.zeros(1, device=self._device)


def _within_pinned_ranges(target: torch.Tensor, source: torch.Tensor) -> list[Copy]:
    """Split a copy where the host memory crosses from one registered range into the next.

    Ranges start at the beginning of the slot's payload, which is where the target's storage offset counts from.
    """
    parts = []
    done = 0
    while done < target.numel():
        place = int(target.storage_offset()) + done
        size = min(target.numel() - done, STAGING.pin_range_bytes - place % STAGING.pin_range_bytes)
        parts.append((target[done : done + size], source[done : done + size]))
        done += size
    return parts


class Devices:
    """The devices of one checkpointer, made on first use."""

    def __init__(self) -> None:
        self._by_name: dict[str, Device] = {"cpu": CpuDevice()}

    def of(self, device: torch.device) -> Device:
        name = str(device)
        if name not in self._by_name:
            self._by_name[name] = CudaDevice(device)
        return self._by_name[name]

    def for_pinning(self) -> Device:
        """The device whose driver page-locks host memory: CUDA where it is in use."""
        if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            return self.of(torch.device("cuda", torch.cuda.current_device()))
        return self._by_name["cpu"]
