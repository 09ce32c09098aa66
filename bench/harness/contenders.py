"""Ways to checkpoint: this engine, and what PyTorch itself offers. Other packages are in ``opponents``.

All are measured at equal durability: what is reported durable has been fsynced. ``durability`` says where a contender
cannot be brought to the same.
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import _async_process_executor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save

from ciuic_async import Checkpointer, PendingSnapshot
from ciuic_async.events import Listener, SnapshotStats


class Stateful(Protocol):
    """What a training hands over, by name."""

    def state_dict(self) -> dict[str, Any]: ...


class Contender(Protocol):
    """One way to checkpoint, into a folder of its own that is empty at first and deleted by the caller.

    All calls come from the training thread, but for ``wait``, which any thread may call.
    """

    def step(self) -> None:
        """Called after every training step."""

    def save(self) -> None:
        """Take a snapshot now; may return before it is durable."""

    def is_durable(self) -> bool:
        """Whether every snapshot is durable; does not wait."""

    def wait(self) -> None:
        """Return when every snapshot is durable; raises if one failed."""

    def close(self) -> None:
        """Give everything back."""


State = Mapping[str, Any]
"""Name to anything with ``state_dict``."""
Make = Callable[[Path, State], Contender]


@dataclass(frozen=True, slots=True)
class Entry:
    """A contender by name. ``replaces``: it writes each snapshot in place of the one before."""

    make: Make
    durability: str
    replaces: bool = False
    ours: bool = False


def state_dicts(state: State) -> dict[str, Any]:
    """What the opponents are handed: the same state as this engine's."""
    return {name: part.state_dict() for name, part in state.items()}


def fsync_folder(folder: Path) -> None:
    """Flush a folder: the names in it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Flush every file and folder below ``folder``, and ``folder``'s own name."""
    for path, _, files in os.walk(folder):
        for name in files:
            descriptor = os.open(Path(path) / name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        fsync_folder(Path(path))
    fsync_folder(folder.parent)


def write_and_rename(state: Any, folder: Path) -> None:
    """``torch.save`` done right: a temporary file, fsync, rename, fsync of the folder."""
    temporary = folder / "checkpoint.tmp"
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(folder / "checkpoint.pt")
    fsync_folder(folder)


class NoSnapshots:
    """Training alone, put through the same measuring: what it shows is noise."""

    def __init__(self, folder: Path, state: State) -> None:
        pass

    def step(self) -> None:
        pass

    def save(self) -> None:
        pass

    def is_durable(self) -> bool:
        return True

    def wait(self) -> None:
        pass

    def close(self) -> None:
        pass


class Ciuic:
    """This engine, with every default unless said otherwise."""

    def __init__(self, folder: Path, state: State, listener: Listener | None = None, **options: Any) -> None:
        self._checkpointer = Checkpointer(folder, state, on_error="raise", listener=listener, **options)
        self._saving: PendingSnapshot | None = None

    def step(self) -> None:
        self._checkpointer.step()

    def save(self) -> None:
        self._saving = self._checkpointer.save()

    def is_durable(self) -> bool:
        # Snapshots become durable in their order, so the newest speaks for all.
        return self._saving is None or self._saving.phase in ("durable", "failed")

    def wait(self) -> None:
        if self._saving is not None:
            self._saving.wait_durable()

    def stats(self) -> list[SnapshotStats]:
        return self._checkpointer.stats()

    def close(self) -> None:
        self._checkpointer.close()


class TorchSave(NoSnapshots):
    """The training thread writes."""

    def __init__(self, folder: Path, state: State) -> None:
        self._folder = folder
        self._state = state

    def save(self) -> None:
        write_and_rename(state_dicts(self._state), self._folder)


class InBackground(NoSnapshots):
    """Base of contenders that have one snapshot under way and wait for it before the next."""

    def __init__(self, folder: Path, state: State) -> None:
        self._folder = folder
        self._state = state
        self._saving: Future[Any] | None = None
        self._count = 0
        self._mutex = threading.Lock()

    def start(self, number: int) -> Future[Any]:
        """Begin snapshot ``number``; the future ends when it is durable."""
        raise AssertionError("made by subclasses")

    def save(self) -> None:
        self.wait()
        self._count += 1
        self._saving = self.start(self._count)

    def is_durable(self) -> bool:
        return self._saving is None or self._saving.done()

    def wait(self) -> None:
        if self._saving is not None:
            self._saving.result()

    def close(self) -> None:
        self.wait()


class CloneAndThread(InBackground):
    """The recipe that everybody writes once: copy all tensors, let a thread call ``torch.save``."""

    def __init__(self, folder: Path, state: State) -> None:
        super().__init__(folder, state)
        self._thread = ThreadPoolExecutor(1)

    def start(self, number: int) -> Future[Any]:
        # A deep copy keeps ties and views, as torch.save does; tensors in it are clones.
        copied = copy.deepcopy(state_dicts(self._state))
        return self._thread.submit(write_and_rename, copied, self._folder)

    def close(self) -> None:
        super().close()
        self._thread.shutdown()


class DcpAsyncSave(InBackground):
    """``torch.distributed.checkpoint.async_save`` with its defaults; every save goes into a new folder."""

    stager: DefaultStager | None = None
    options: dict[str, Any] = {"no_dist": True}  # noqa: RUF012 - replaced, never changed

    def start(self, number: int) -> Future[Any]:
        saving = async_save(
            state_dicts(self._state), checkpoint_id=self._folder / str(number), async_stager=self.stager, **self.options
        )
        # With a stager of one's own that stages at once, the answer is still a plain future.
        return cast("Future[Any]", getattr(saving, "upload_completion", saving))

    def close(self) -> None:
        super().close()
        if self.stager is not None:
            self.stager.close()
            self.stager = None


class DcpCachedStager(DcpAsyncSave):
    """The same with a stager that keeps its memory from one snapshot to the next; not pinned, for there is no GPU."""

    def __init__(self, folder: Path, state: State) -> None:
        super().__init__(folder, state)
        self.stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
            )
        )


class DcpProcess(DcpAsyncSave):
    """The same in a process of its own, which reads the staged state from shared memory."""

    options = {"async_checkpointer_type": AsyncCheckpointerType.PROCESS}  # noqa: RUF012 - replaced, never changed

    def __init__(self, folder: Path, state: State) -> None:
        super().__init__(folder, state)
        self._address = os.environ.get("MASTER_ADDR")
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        dist.init_process_group("gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
        self.stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=False, use_shared_memory=True, use_async_staging=False, use_non_blocking_copy=False
            )
        )

    def close(self) -> None:
        try:
            super().close()
        finally:
            # It would live until the interpreter ends, and hold memory beside the next contender.
            _async_process_executor._CHECKPOINT_PROCESS = None
            dist.destroy_process_group()
            if self._address is None:
                del os.environ["MASTER_ADDR"]


def ciuic(**options: Any) -> Make:
    """This engine with options of ``Checkpointer``."""
    return lambda folder, state: Ciuic(folder, state, **options)


_OURS = "segments, manifest and log fsynced, folders too"
_DCP = "files fsynced by DCP (.metadata while still empty), folders not: less than the others"
BUILT_IN: dict[str, Entry] = {
    "none": Entry(NoSnapshots, "nothing is written"),
    "ciuic-async": Entry(ciuic(), _OURS, ours=True),
    "ciuic-async, codec=raw": Entry(ciuic(codec="raw"), _OURS, ours=True),
    "ciuic-async, staging=blocking": Entry(ciuic(staging="blocking"), _OURS, ours=True),
    "ciuic-async, staging=overlap": Entry(ciuic(staging="overlap"), _OURS, ours=True),
    "torch.save + fsync": Entry(TorchSave, "temporary file, fsync, rename, fsync of the folder", replaces=True),
    "clone + thread + torch.save": Entry(
        CloneAndThread, "temporary file, fsync, rename, fsync of the folder", replaces=True
    ),
    "dcp.async_save": Entry(DcpAsyncSave, _DCP),
    "dcp.async_save, cached stager": Entry(DcpCachedStager, _DCP),
    "dcp.async_save, process": Entry(DcpProcess, _DCP),
}
