"""What the children of a crew do (``crew.py``). Imported once by the process that they are forked from.

A child says on stdout ``taken STEP`` when ``step`` has returned, and what else its scenario says.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from ciuic_async import Checkpointer, KeepLatest, UsageError
from ciuic_async import chain as chain_module
from ciuic_async.chain import SnapshotChain
from ciuic_async.errors import CiuicError
from ciuic_async.stores.base import Unpublished
from ciuic_async.stores.local import LocalStore
from tests.crash.faults import same, state_at

COMMANDS = open(0, "rb", buffering=0, closefd=False)  # noqa: SIM115 -- unbuffered: nothing is left for a child


def say(*words: object) -> None:
    os.write(1, (" ".join(str(word).replace("\n", " ") for word in words) + "\n").encode())


class Training:
    """A loop that takes a snapshot of a small state at every step."""

    def __init__(self, chain: str, **options: Any) -> None:
        self.state = state_at(0)
        self.checkpointer = Checkpointer(chain, self.state, every_steps=1, rng=False, **options)

    def step(self) -> None:
        step = self.checkpointer._step + 1
        self.state.update(state_at(step))
        self.checkpointer.step()
        say("taken", step)


# --- ways to leave ----------------------------------------------------------------------------------------------------


def in_the_block(chain: str, way: str, **options: Any) -> None:
    """Leaves the ``with`` block by an exception, ``sys.exit`` or ``os._exit``, or is interrupted in it."""
    training = Training(chain, **options)
    with training.checkpointer:
        for _ in range(5):
            training.step()
        if way == "exception":
            raise ValueError("the loop's own")
        if way == "exit":
            sys.exit(3)
        if way == "hard":
            os._exit(7)
        while way == "interrupted":
            training.step()


def without_closing(chain: str, way: str) -> None:
    """Nobody calls ``close``: the interpreter ends, the object is garbage, or a thread still takes snapshots."""
    global kept
    training = Training(chain)
    for _ in range(5):
        training.step()
    if way == "collected":
        training.checkpointer = None  # type: ignore[assignment]
        gc.collect()
        say("threads", sum(thread.name.startswith("ciuic") for thread in threading.enumerate()))
        return
    if way == "cycle":
        training.checkpointer.itself = training.checkpointer  # type: ignore[attr-defined]
        return
    if way == "thread":
        saved = threading.Event()

        def save_for_ever() -> None:
            while True:
                training.checkpointer.save()
                saved.set()

        threading.Thread(target=save_for_ever, daemon=True).start()
        saved.wait(30)
    kept = training  # a global: alive when the interpreter ends


kept: Training | None = None


class Squares(Dataset[torch.Tensor]):
    """What a loader's workers read. It holds the checkpointer's state, as careless code does."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(float(index * index))


def with_loader(chain: str, context: str) -> None:
    """A loader's worker processes come and go while snapshots are taken."""
    training = Training(chain)
    with training.checkpointer:
        training.step()
        loader = DataLoader(Squares(training.state), batch_size=4, num_workers=2, multiprocessing_context=context)
        for _ in range(2 if context == "fork" else 1):
            for batch in loader:
                assert len(batch) == 4
                training.step()


class StuckStore(LocalStore):
    """A local store whose disk hangs at the next publish, until it is freed."""

    free = threading.Event()
    stuck = threading.Event()

    def publish(self, files: Sequence[Unpublished]) -> None:
        self.stuck.set()
        assert self.free.wait(60)
        super().publish(files)


def forked_while_saving(chain: str) -> None:
    """Forks while its writer is in the middle of a save. The child touches everything and ends like any program."""
    SnapshotChain(chain).close()
    setattr(chain_module, "resolve_store", lambda url, _options: StuckStore(url))  # noqa: B010 -- not a name that the module exports
    training = Training(chain)
    training.step()
    assert StuckStore.stuck.wait(30)
    pid = os.fork()
    if pid == 0:
        assert training.checkpointer.step() is None
        for call in (training.checkpointer.save, training.checkpointer.restore):
            try:
                call()
            except UsageError:
                continue
            os._exit(4)
        training.checkpointer.flush()
        training.checkpointer.close()
        training.checkpointer = None  # type: ignore[assignment]
        gc.collect()
        sys.exit(0)
    say("child", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    StuckStore.free.set()
    training.step()
    training.checkpointer.close()


def stuck_in_close(chain: str) -> None:
    """The disk hangs for ever, and ``close`` waits for it. An interrupt counts once it does."""
    SnapshotChain(chain).close()
    setattr(chain_module, "resolve_store", lambda url, _options: StuckStore(url))  # noqa: B010 -- not a name that the module exports
    training = Training(chain)
    training.step()
    assert StuckStore.stuck.wait(30)

    def interrupted(number: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code is threading.Thread.join.__code__:
                raise KeyboardInterrupt
            frame = frame.f_back

    signal.signal(signal.SIGINT, interrupted)
    say("closing")
    training.checkpointer.close()


# --- several at once, and little room ---------------------------------------------------------------------------------


def train(chain: str, first: int, count: int, keep: int | None) -> None:
    """Snapshots of the steps from ``first`` on; says which became durable under which id."""
    training = Training(chain, keep=None if keep is None else KeepLatest(keep))
    with training.checkpointer:
        training.checkpointer._step = first - 1
        for step in range(first, first + count):
            training.state.update(state_at(step))
            pending = training.checkpointer.step()
            assert pending is not None
            say("durable", step, pending.wait_durable(60).id)


def read(chain: str, pruned: bool) -> None:
    """Loads the newest snapshot again and again until it is step 1000. Says what it was, and what it could not read."""
    while True:
        try:
            with SnapshotChain(chain, create=False) as opened:
                snapshot = opened.latest()
                if snapshot is None:
                    continue
                assert snapshot.step is not None
                found = snapshot.load()
        except CiuicError as error:
            if not pruned:
                raise
            say("gone", error.kind)
            continue
        say("read" if same(found, state_at(snapshot.step)) else "wrong", snapshot.step)
        if snapshot.step == 1000:
            return


def sweep(chain: str) -> None:
    """gc and prune again and again until step 1000 is there. Says how often."""
    rounds = 0
    with SnapshotChain(chain) as opened:
        while True:
            opened.prune(KeepLatest(3))
            opened.gc()
            rounds += 1
            newest = opened.latest()
            if newest is not None and newest.step == 1000:
                break
    say("rounds", rounds)


def few_descriptors(chain: str, limit: int) -> None:
    """Saves with so few descriptors allowed, then with as many as before."""
    training = Training(chain)
    with training.checkpointer as checkpointer:
        before, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        for soft in (before, before, before, limit, limit, before):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            training.state.update(state_at(checkpointer._step + 1))
            pending = checkpointer.step()
            assert pending is not None
            try:
                say("durable", pending.step, pending.wait_durable(60).id)
            except CiuicError as error:
                say("failed", pending.step, error.kind, error)
            checkpointer._writer.wait_idle()
            say("descriptors", len(os.listdir("/proc/self/fd")) if soft == before else 0)


def many_saves(chain: str, count: int) -> None:
    """Saves and saves; says what the process holds every so often."""
    training = Training(chain, keep=KeepLatest(2), codec="raw")
    with training.checkpointer as checkpointer:
        for number in range(1, count + 1):
            training.state["model"]["weights"] += 1
            checkpointer.save().wait_durable(60)
            if number in (count // 3, count):
                checkpointer._writer.wait_idle()
                say("held", json.dumps(held()))


def held() -> dict[str, int]:
    """What this process holds of the system: threads, descriptors, shared memory and pages that are in use."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for later is no leak, and comes and goes
    names = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        except FileNotFoundError:  # the descriptor of this very listing
            continue
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "threads": len(os.listdir("/proc/self/task")),
        "descriptors": len(names),
        "memfds": sum(name.startswith("/memfd:") for name in names),
        "resident_bytes": pages * os.sysconf("SC_PAGE_SIZE"),
    }


SCENARIOS: dict[str, Callable[..., None]] = {
    scenario.__name__: scenario
    for scenario in (
        in_the_block,
        without_closing,
        with_loader,
        forked_while_saving,
        stuck_in_close,
        train,
        read,
        sweep,
        few_descriptors,
        many_saves,
    )
}


def become(request: dict[str, Any]) -> None:
    """From here on this is a process of its own, with its own standard streams."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["said"], os.O_WRONLY),
        (2, request["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        descriptor = os.open(path, flags)
        os.dup2(descriptor, number)
        os.close(descriptor)


def main() -> None:
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # what is imported stays out of each child's last collection
    while line := COMMANDS.readline():
        request = json.loads(line)
        if "wait" in request:
            say(os.waitpid(request["wait"], 0)[1])
            continue
        pid = os.fork()
        if pid == 0:
            become(request)
            SCENARIOS[request["scenario"]](request["chain"], **request["options"])
            return
        say(pid)


if __name__ == "__main__":
    main()
