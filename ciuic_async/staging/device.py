"""What staging needs of a device, behind a small interface.

The order that makes a copy right on an asynchronous device: the copies run on a side stream that waits for an event
recorded on the stream training uses *now*, so they see everything queued before; they are complete when an event
recorded behind them has happened. ``tests/unit/test_staging_order.py`` proves it with a device whose work happens late
and out of order unless events order it; ``tests/gpu`` with real ones.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch

from ciuic_async import native
from ciuic_async.events import logger
from ciuic_async.format.digest import Buffer
from ciuic_async.options import STAGING

Copy = tuple[torch.Tensor, torch.Tensor]
"""(destination in host memory, source on the device): 1-D uint8 of equal length, contiguous."""

Range = tuple[int, int, int]
"""(address of the destination, address of the source, size in bytes), in host memory."""


BACKGROUND_PIECE_BYTES = 4 << 20
"""What a background thread copies at a time on the CPU: all that the optimizer gate may have to wait for it."""


class Pending(Protocol):
    """Copies under way."""

    def wait(self) -> None:
        """Return when every copy is complete; the sources may change from then on. May be called again, by any thread.

        Where the host does the copying the calling thread helps.
        """

    def order(self) -> bool:
        """Let what the calling thread queues from now on happen after the copies: the sources may change from then on.

        A device with streams makes the current one wait, and the host goes on at once; elsewhere this is ``wait``.

        Returns:
            Whether the copies are complete already.
        """

    def advance(self) -> bool:
        """Do a piece of the copying, or wait for it, on a thread that has nothing better to do.

        Returns:
            False when nothing is left to do here; what another thread does may still be under way.
        """


class Device(Protocol):
    """Where tensors live."""

    def copy(self, copies: Sequence[Copy]) -> Pending:
        """Start copying what the sources hold in the order of the current stream. Called on the training thread.

        When it raises, no copy is under way.
        """

    def begin(self, copies: Sequence[Copy]) -> Pending:
        """Like ``copy``, for sources that stay as they are until ``order`` or ``wait``; returns without copying."""

    def pin(self, memory: torch.Tensor) -> bool:
        """Page-lock host memory for fast copies, and say whether that worked. Without it copies are right, but slower.

        May be called on any thread.
        """

    def unpin(self, memory: torch.Tensor) -> None:
        """Undo a ``pin`` that worked."""


class _Done:
    def wait(self) -> None:
        pass

    def order(self) -> bool:
        return True

    def advance(self) -> bool:
        return False


class _Pieces:
    """Copies in host memory, made piece by piece by a background thread until somebody waits for them.

    Who waits copies all that is left with all threads, rather than wait for a thread that gets no processor; so at most
    one piece of another thread is under way then.
    """

    def __init__(self, device: CpuDevice, ranges: Sequence[Range], keep: object) -> None:
        self._device = device
        self._left = deque(ranges)
        self._keep = keep
        self._under_way = 0
        self._changed = threading.Condition()
        self._error: BaseException | None = None

    def wait(self) -> None:
        with self._changed:
            rest, self._left = list(self._left), deque()
            self._under_way += 1
        self._copy(lambda: self._device.copy_ranges(rest))
        with self._changed:
            self._changed.wait_for(lambda: self._under_way == 0)
            self._keep = None
            if self._error is not None:
                raise self._error

    def order(self) -> bool:
        self.wait()
        return True

    def advance(self) -> bool:
        with self._changed:
            if not self._left:
                return False
            target, source, left = self._left.popleft()
            size = min(left, BACKGROUND_PIECE_BYTES)
            if left > size:
                self._left.appendleft((target + size, source + size, left - size))
            self._under_way += 1
        self._copy(lambda: self._device.copy_ranges([(target, source, size)], threads=1))
        return True

    def _copy(self, copy: Callable[[], object]) -> None:
        """One share of the work, counted in ``_under_way`` already."""
        error: BaseException | None = None
        try:
            copy()
        except BaseException as problem:
            error = problem
        with self._changed:
            self._error = self._error or error
            self._under_way -= 1
            self._changed.notify_all()


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

    def copy_columns(self, destinations: Buffer, sources: Buffer, sizes_bytes: Buffer) -> None:
        """Copy between addresses of host memory, arrays of 64-bit numbers, with the compiled core; complete on return.

        A source of 0 fills with zeros.
        """
        assert native.core is not None
        native.core.copy_columns(destinations, sources, sizes_bytes, self._threads)

    def begin(self, copies: Sequence[Copy]) -> Pending:
        return self.begin_ranges(
            [(target.data_ptr(), source.data_ptr(), source.numel()) for target, source in copies], copies
        )

    def begin_ranges(self, ranges: Sequence[Range], keep: object) -> Pending:
        """``begin`` by address; ``keep`` keeps the sources alive until all is copied, the caller the destinations."""
        return _Pieces(self, ranges, keep)

    def copy_ranges(self, ranges: Sequence[Range], threads: int | None = None) -> None:
        """``copy`` by address; with ``threads`` on no more than these."""
        if native.core is not None:
            native.core.copy_many(list(ranges), threads or self._threads)
        else:
            for target, source, size in ranges:
                ctypes.memmove(target, source, size)

    def pin(self, memory: torch.Tensor) -> bool:
        return False

    def unpin(self, memory: torch.Tensor) -> None:
        pass


class _CudaPending:
    def __init__(self, device: torch.device, event: Any, keep: Sequence[Copy]) -> None:
        self._device = device
        self._event = event
        self._keep = keep  # storages stay alive until their copy's event

    def wait(self) -> None:
        # Background threads start on device 0: waiting there would make a context on a GPU that is not ours.
        with torch.cuda.device(self._device):
            self._event.synchronize()
        self._keep = ()

    def order(self) -> bool:
        with torch.cuda.device(self._device):
            if torch.cuda.is_current_stream_capturing():
                self._event.synchronize()  # a graph that is recorded cannot wait for an event from outside of it
                return True
            torch.cuda.current_stream().wait_event(self._event)
            return bool(self._event.query())

    def advance(self) -> bool:
        self.wait()
        return False


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
        return _CudaPending(self._device, done, copies)

    def begin(self, copies: Sequence[Copy]) -> Pending:
        return self.copy(copies)

    def _queue(self, copies: Sequence[Copy]) -> Any:
        """Queue the copies on the side stream, behind what the current stream holds now; the event after the last."""
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record(torch.cuda.current_stream())
        self._stream.wait_event(ready)
        with torch.cuda.stream(self._stream):
            for target, source in copies:
                for part_target, part_source in _within_pinned_ranges(target, source):
                    part_target.copy_(part_source, non_blocking=True)
            # Blocking: a thread that waits for it sleeps, and leaves the processor to training.
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
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
