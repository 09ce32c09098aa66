"""What a snapshot costs training, measured beside what people use today, in one run.

Lost time per snapshot = (wall time of N steps with snapshots - wall time of as many steps without) / snapshots.
Training goes on until every snapshot is on stable storage, and only then the clock stops: N is what it takes. It is not
the return time of ``save()``, which flatters everyone.

Every contender saves the same state: model, AdamW moments, schedule, loader. In each round all of them run one after
the other, in rotating order, and are compared to the round's own run without snapshots, so that a machine that becomes
slower halfway does not favour anyone. Each makes two snapshots before the clock starts: what is allocated once for a
whole training is not charged to the few snapshots of a demo. All of them fsync.

Run as a program it writes one JSON object to standard output and its progress to standard error.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast
from uuid import uuid4

import torch
from torch.distributed.checkpoint.state_dict_saver import async_save

from ciuic_async import Checkpointer, PendingSnapshot
from ciuic_async.cli.demo_training import SIZES, Training
from ciuic_async.stores.resolve import resolve


class Contender(Protocol):
    """One way to checkpoint, on a folder of its own that is empty at first and removed afterwards."""

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


class NoSnapshots:
    """Training alone: what the others are compared to."""

    def __init__(self, folder: Path, training: Training) -> None:
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
    """This engine."""

    def __init__(self, place: Path | str, training: Training, codec: str = "auto") -> None:
        self._checkpointer = Checkpointer(place, training.state(), codec=codec, on_error="raise")
        self._saving: PendingSnapshot | None = None

    def step(self) -> None:
        self._checkpointer.step()

    def save(self) -> None:
        self._saving = self._checkpointer.save()

    def is_durable(self) -> bool:
        # Snapshots become durable in their order, so the newest speaks for all.
        return self._saving is None or self._saving.phase in ("durable", "failed")

    def wait(self) -> None:
        self._checkpointer.flush()

    def close(self) -> None:
        self._checkpointer.close()


class TorchSave:
    """``torch.save`` done right: a temporary file, fsync, rename, fsync of the folder."""

    def __init__(self, folder: Path, training: Training) -> None:
        self._folder = folder
        self._training = training

    def step(self) -> None:
        pass

    def save(self) -> None:
        temporary = self._folder / "checkpoint.tmp"
        with temporary.open("wb") as file:
            torch.save(state_dicts(self._training), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(self._folder / "checkpoint.pt")
        descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def is_durable(self) -> bool:
        return True

    def wait(self) -> None:
        pass

    def close(self) -> None:
        pass


class DcpAsyncSave:
    """``torch.distributed.checkpoint.async_save`` with its defaults, which fsync the files but not the folder.

    It allows one save at a time, so each waits for the one before. Every save goes into a new folder.
    """

    def __init__(self, folder: Path, training: Training) -> None:
        self._folder = folder
        self._training = training
        self._saving: Future[Any] | None = None
        self._count = 0

    def step(self) -> None:
        pass

    def save(self) -> None:
        self.wait()
        self._count += 1
        state = state_dicts(self._training)
        saving = async_save(state, checkpoint_id=self._folder / str(self._count), no_dist=True)
        self._saving = cast("Future[Any]", saving)

    def is_durable(self) -> bool:
        return self._saving is None or self._saving.done()

    def wait(self) -> None:
        if self._saving is not None:
            self._saving.result()
            self._saving = None

    def close(self) -> None:
        self.wait()


CONTENDERS: dict[str, Callable[[Path, Training], Contender]] = {
    "none": NoSnapshots,
    "ciuic-async": Ciuic,
    "torch.save + fsync": TorchSave,
    "dcp.async_save": DcpAsyncSave,
}

REPLACES = ("torch.save + fsync",)
"""Who writes each snapshot in place of the one before; the others keep all of them."""
PATIENCE = 2
"""Training goes on until all is durable, for this many times the planned steps; then it stands still for the rest."""
WARM_UP_SNAPSHOTS = 2
"""Both of this engine's buffers have been used then; one would do for the others."""


def state_dicts(training: Training) -> dict[str, Any]:
    """What the opponents are handed: the same state as this engine's."""
    return {name: part.state_dict() for name, part in training.state().items()}


@dataclass(frozen=True, slots=True)
class Schedule:
    """One timed run of at least ``steps``. Snapshots fall in the middle of each ``every_steps`` steps."""

    steps: int
    every_steps: int

    @property
    def due(self) -> frozenset[int]:
        """The steps, counted from 1, after which a snapshot is taken."""
        return frozenset(range(max(1, self.every_steps // 2), self.steps + 1, self.every_steps))


@dataclass(slots=True)
class Measured:
    """What one contender showed: wall time and steps a round, a stall a snapshot, and the bytes of one snapshot."""

    wall_s: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    stall_s: list[float] = field(default_factory=list)
    stored_bytes: int = 0


def run_once(
    name: str, training: Training, folder: Path, schedule: Schedule, measured: Measured, chain: str | None = None
) -> None:
    """One contender's turn in one round; adds to ``measured``.

    Args:
        folder: where it writes; gone afterwards.
        chain: where this engine writes instead; what is there is deleted afterwards.
    """
    folder.mkdir()
    place: Path | str = folder
    if chain is not None and name == "ciuic-async":
        place = chain
        contender: Contender = Ciuic(chain, training)
    else:
        contender = CONTENDERS[name](folder, training)
    try:
        for number in range(1, WARM_UP_SNAPSHOTS + 1):
            training.update()
            contender.step()
            contender.save()
            contender.wait()
            measured.stored_bytes = folder_bytes(place) // (1 if name in REPLACES else number)
        gc.collect()
        begin_s = time.perf_counter()
        step = 0
        while step < schedule.steps or (not contender.is_durable() and step < PATIENCE * schedule.steps):
            step += 1
            training.update()
            called_s = time.perf_counter()
            contender.step()
            if step in schedule.due:
                contender.save()
                measured.stall_s.append(time.perf_counter() - called_s)
        contender.wait()
        measured.wall_s.append(time.perf_counter() - begin_s)
        measured.steps.append(step)
    finally:
        contender.close()
        shutil.rmtree(folder)
        if place is not folder:
            empty(place)


def folder_bytes(place: Path | str) -> int:
    """Length of everything below a folder or URL."""
    if isinstance(place, Path):
        return sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    with closing(resolve(place)) as store:
        return sum(item.size_bytes for item in store.list())


def beside(chain: str) -> str:
    """A new name beside a chain's own, in its bucket."""
    scheme, _, path = chain.rstrip("/").rpartition("://")
    bucket, _, prefix = path.partition("/")
    return f"{scheme}://{bucket}/{prefix}-{uuid4().hex}" if scheme else f"{path}-{uuid4().hex}"


def empty(place: Path | str) -> None:
    """Delete everything below a URL that only this program used."""
    with closing(resolve(place)) as store:
        for item in list(store.list()):
            store.delete(item.name)


def step_time_s(training: Training, threads: int) -> float:
    """The mean of three steps with this many threads, after one that starts them."""
    torch.set_num_threads(threads)
    training.update()
    begin_s = time.perf_counter()
    for _ in range(3):
        training.update()
    return (time.perf_counter() - begin_s) / 3


def measure(
    names: Sequence[str],
    size_name: str,
    schedule: Schedule,
    rounds: int,
    limit_s: float,
    folder: Path,
    chain: str | None = None,
) -> dict[str, Any]:
    """All contenders in ``rounds`` rounds, or fewer (at least one) once ``limit_s`` seconds are over.

    A round trains with one or two threads, whichever is faster at its beginning: two leave no core to background work,
    which is the hardest case for it, but on a machine that is busy otherwise they would mostly wait for each other.
    Beside ``chain`` this engine writes; all others, and without it this one too, below ``folder``.
    """
    begin_s = time.perf_counter()
    measured = {name: Measured() for name in names}
    training = Training(SIZES[size_name], steps=100_000)
    threads = set()
    done = 0
    while done < rounds and (done < 1 or time.perf_counter() - begin_s < limit_s):
        fastest = min((1, 2), key=lambda number: step_time_s(training, number))
        torch.set_num_threads(fastest)
        threads.add(fastest)
        turn = done % len(names)
        for name in [*names[turn:], *names[:turn]]:
            place = None if chain is None else beside(chain)
            run_once(name, training, folder / f"{done}-{names.index(name)}", schedule, measured[name], place)
        done += 1
        print(f"  round {done} of {rounds}", file=sys.stderr, flush=True)
    return {"state_bytes": tensor_bytes(training), "threads": sorted(threads), **summarize(measured, schedule)}


def tensor_bytes(training: Training) -> int:
    """Raw size of model and optimizer state."""
    moments = [value for state in training.optimizer.state.values() for value in state.values()]
    return sum(tensor.nbytes for tensor in [*training.model.parameters(), *moments])


def summarize(measured: dict[str, Measured], schedule: Schedule) -> dict[str, Any]:
    """Medians and extremes; ``lost_s`` compares each round with the step time of "none" in the same round."""
    base_s = [wall_s / steps for wall_s, steps in zip(measured["none"].wall_s, measured["none"].steps, strict=True)]
    contenders = {}
    for name, one in measured.items():
        if name == "none":
            continue
        rounds = zip(one.wall_s, one.steps, base_s, strict=True)
        lost_s = [(wall_s - steps * step_s) / len(schedule.due) for wall_s, steps, step_s in rounds]
        contenders[name] = {
            "stall_s": statistics.median(one.stall_s),
            "lost_s_per_snapshot": statistics.median(lost_s),
            "lost_s_min": min(lost_s),
            "lost_s_max": max(lost_s),
            "stored_bytes": one.stored_bytes,
        }
    return {
        "step_s": statistics.median(base_s),
        "step_s_min": min(base_s),
        "step_s_max": max(base_s),
        "steps": schedule.steps,
        "every_steps": schedule.every_steps,
        "rounds": len(base_s),
        "contenders": contenders,
    }


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of this program."""
    parser = argparse.ArgumentParser(prog="python -m ciuic_async.cli.demo_table", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="an existing folder for what the contenders write")
    parser.add_argument("--chain", metavar="URL", help="this engine writes beside it, and deletes that at the end")
    parser.add_argument("--size", choices=sorted(SIZES), default="large")
    parser.add_argument("--steps", type=int, default=8, help="of one contender in one round")
    parser.add_argument("--every", type=int, default=4, metavar="STEPS")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--limit", type=float, default=60.0, metavar="SECONDS", help="start no round later than this")
    parser.add_argument("--alone", action="store_true", help="this engine only, without opponents")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure, and print the result as JSON."""
    options = parse_arguments()
    # Opponents warn about their own deprecations and about running without a process group.
    warnings.filterwarnings("ignore", module=r"torch\..*")
    names = ["none", "ciuic-async"] if options.alone else list(CONTENDERS)
    schedule = Schedule(options.steps, options.every)
    result = measure(names, options.size, schedule, options.rounds, options.limit, options.folder, options.chain)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
