"""Ways to checkpoint as their makers ship them, and the process that lets each of them crash.

    python -m harness.crash              # the forge: one request as JSON a line, one answer a line

The forge imports everything once and forks a child for each experiment, which says ``ack N`` through a socket when a
save has returned and its promise, if there is one, has been kept. strace is attached to the child, and to every process
it started: it kills one of them at a chosen system call, or writes down what they do.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from ciuic_async import Checkpointer, SnapshotChain
from harness import power
from harness.contenders import write_and_rename

State = dict[str, Tensor]
SAVES = 2
LAYERS = 12
LIMIT_S = 60.0
"""A child that says nothing for so long is killed, and counts as one that failed."""

KILLED_AT = (
    "write", "writev", "pwrite64", "pwritev", "fsync", "fdatasync", "rename", "renameat", "renameat2", "link", "linkat",
    "open", "openat", "ftruncate", "fallocate", "unlink", "unlinkat", "mkdir", "mkdirat",
)  # fmt: skip
PR_SET_PTRACER = 0x59616D61
"""Yama's: lets a process that is no ancestor of a child attach strace to it."""


def state_at(step: int) -> State:
    """100 KB that depend on the step alone. Tensors only, since safetensors takes nothing else."""
    generator = torch.Generator().manual_seed(step)
    layers = {f"layer{number}": torch.randn(32, 64, generator=generator) for number in range(LAYERS)}
    return {**layers, "frozen": torch.arange(64), "step": torch.tensor(step)}


def step_of(found: Any) -> int | None:
    """Which state this is, to the bit; None if none that was ever saved."""
    for step in range(1, SAVES + 1):
        wanted = state_at(step)
        if isinstance(found, dict) and found.keys() == wanted.keys():
            pairs = [(found[name], tensor) for name, tensor in wanted.items()]
            if all(
                isinstance(one, Tensor) and one.dtype == other.dtype and torch.equal(one, other) for one, other in pairs
            ):
                return step
    return None


# --- contenders -------------------------------------------------------------------------------------------------------


class InPlace:
    """Base of contenders that keep one file, and put each state in place of the one before."""

    name = "checkpoint.pt"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, state: State, number: int) -> None:
        """Return when the contender says that the state is saved."""
        torch.save(state, self.folder / self.name)

    def close(self) -> None:
        """Give everything back."""

    @classmethod
    def read(cls, place: Path) -> State:
        """One state; raises if it is damaged and the contender notices."""
        loaded: State = torch.load(place)
        return loaded

    @classmethod
    def versions(cls, folder: Path) -> list[Callable[[], State]]:
        """Ways to load what is visible, the newest first."""
        return [partial(cls.read, folder / cls.name)] if (folder / cls.name).exists() else []


class SyncAndRename(InPlace):
    """What a careful user makes of ``torch.save``."""

    def save(self, state: State, number: int) -> None:
        write_and_rename(state, self.folder)


class Safetensors(InPlace):
    """``safetensors.torch.save_file``, which by itself writes a temporary file and renames it."""

    name = "checkpoint.safetensors"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._save = importlib.import_module("safetensors.torch").save_file

    def save(self, state: State, number: int) -> None:
        self._save(state, self.folder / self.name)

    @classmethod
    def read(cls, place: Path) -> State:
        loaded: State = importlib.import_module("safetensors.torch").load_file(place)
        return loaded


class Dcp(InPlace):
    """``torch.distributed.checkpoint.save``, every state in a folder of its own; one with ``.metadata`` is visible."""

    marker = ".metadata"

    def save(self, state: State, number: int) -> None:
        save(state, checkpoint_id=self.folder / str(number), no_dist=True)

    @classmethod
    def read(cls, place: Path) -> State:
        found: State = {name: torch.zeros_like(tensor) for name, tensor in state_at(1).items()}
        load(found, checkpoint_id=place, no_dist=True)
        return found

    @classmethod
    def versions(cls, folder: Path) -> list[Callable[[], State]]:
        made = [path for path in folder.iterdir() if path.name.isdigit() and (path / cls.marker).exists()]
        return [partial(cls.read, path) for path in sorted(made, key=lambda path: int(path.name), reverse=True)]


class DcpAsync(Dcp):
    """``torch.distributed.checkpoint.async_save``; acknowledged when its future is done."""

    def save(self, state: State, number: int) -> None:
        saving: Any = async_save(state, checkpoint_id=self.folder / str(number), no_dist=True)
        getattr(saving, "upload_completion", saving).result()


class TorchCheckpointing(Dcp):
    """Meta's ``torch_checkpointing``: a process of its own writes. Without direct I/O, which fails on ext4."""

    marker = "state_0.pt"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        manager = importlib.import_module("torch_checkpointing").CheckpointManager
        config = importlib.import_module("torch_checkpointing.config")
        staging = importlib.import_module("torch_checkpointing.staging")
        storage = importlib.import_module("torch_checkpointing.storage.filesystem")
        self._manager = manager(
            manager.Config(
                save=config.AsyncCheckpointSaverConfig(
                    staging_config=staging.CheckpointStagerConfig(
                        use_pinned_memory=False, use_async_staging=False, use_non_blocking_copy=False
                    )
                ),
                storage_config=storage.LocalFileSystemStorageConfig(use_direct_io=False),
            )
        )

    def save(self, state: State, number: int) -> None:
        self._manager.save(str(self.folder / str(number)), {"state": state}).result()

    def close(self) -> None:
        self._manager.close()

    @classmethod
    def read(cls, place: Path) -> State:
        manager = importlib.import_module("torch_checkpointing").CheckpointManager
        config = importlib.import_module("torch_checkpointing.config")
        # One that saves in the background would start a process for each load.
        loader = manager(manager.Config(save=config.SyncCheckpointSaverConfig()))
        try:
            into = {"state": {name: torch.zeros_like(tensor) for name, tensor in state_at(1).items()}}
            loaded: State = loader.load(str(place), into=into)["state"]
            return loaded
        finally:
            loader.close()


class Ciuic(InPlace):
    """This engine, with every default."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._state: dict[str, Any] = {"model": {}}
        self._checkpointer = Checkpointer(folder / "chain", self._state, rng=False, on_error="raise")

    def save(self, state: State, number: int) -> None:
        self._state["model"] = state
        self._checkpointer.save().wait_durable()

    def close(self) -> None:
        self._checkpointer.close()

    @classmethod
    def versions(cls, folder: Path) -> list[Callable[[], State]]:
        """As ``latest`` says, without the fallback to an older one that ``restore()`` has."""
        if not (folder / "chain").exists():
            return []
        # The pin is of the end of a run; what is read here is the place as it was in the middle of it.
        shutil.rmtree(os.environ["XDG_STATE_HOME"], ignore_errors=True)

        def load(back: int) -> State:
            with SnapshotChain(folder / "chain", create=False) as chain:
                loaded: State = chain.get(f"latest~{back}" if back else "latest").load()["model"]
                return loaded

        return [partial(load, back) for back in range(SAVES)]


CONTENDERS: dict[str, type[InPlace]] = {
    "ciuic-async": Ciuic,
    "torch.save": InPlace,
    "torch.save + fsync + rename": SyncAndRename,
    "dcp.save": Dcp,
    "dcp.async_save": DcpAsync,
    "safetensors.save_file": Safetensors,
    "torch_checkpointing": TorchCheckpointing,
}


# --- verdicts ---------------------------------------------------------------------------------------------------------


def verdict(contender: type[InPlace], folder: Path, acknowledged: int) -> str:
    """What a crash left, given the newest save that was acknowledged.

    ``good``: what is visible as newest loads, and is no older than that. ``torn``: it does not load, but by going back
    by hand what was acknowledged does. ``lost``: what was acknowledged loads no more. ``wrong``: the newest loads
    without an error, and was never saved.
    """
    newest_loads = False
    for number, read in enumerate(contender.versions(folder)):
        try:
            step = step_of(read())
        except Exception:
            continue
        if number == 0 and step is None:
            return "wrong"
        newest_loads = newest_loads or number == 0
        if step is not None and step >= acknowledged:
            return "good" if newest_loads else "torn"
    return "lost"


def flip_and_load(contender: type[InPlace], path: Path, folder: Path, offset: int, bit: int) -> str:
    """``refused``, ``right`` or ``wrong``: what loading does when one bit is flipped. The file is put right again."""
    data = path.read_bytes()
    damaged = bytearray(data)
    damaged[offset] ^= 1 << bit
    path.write_bytes(damaged)
    try:
        return "right" if step_of(contender.versions(folder)[0]()) == 1 else "wrong"
    except Exception:
        return "refused"
    finally:
        path.write_bytes(data)


# --- children ---------------------------------------------------------------------------------------------------------


def run_in_child(work: Callable[[socket.socket], None]) -> tuple[int, socket.socket]:
    """Fork a child in a process group of its own; its id, and the socket that it speaks through."""
    here, there = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        here.close()
        status = 1
        try:
            os.setpgid(0, 0)
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
            work(there)
            status = 0
        except BaseException as error:
            with suppress(OSError):
                there.send(f"failed {type(error).__name__}: {error}".replace("\n", " ").encode()[:500] + b"\n")
        finally:
            os._exit(status)
    there.close()
    with suppress(OSError):  # the child may have done so, or be gone
        os.setpgid(pid, pid)
    return pid, here


def end(pid: int, speaker: socket.socket) -> None:
    """Nothing of the child lives on."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    speaker.close()


def family(pid: int) -> list[int]:
    """A process and all that it started."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in task.read_text().split():
                found += family(int(child))
    return found


def lines(speaker: socket.socket, watched: list[int]) -> Iterator[str]:
    """What the child says, until it or another of the ``watched`` processes is dead, or nothing was said for long."""
    handles = []
    for pid in watched:
        with suppress(ProcessLookupError):
            handles.append(os.pidfd_open(pid))
    try:
        rest = b""
        while True:
            ready, _, _ = select.select([speaker.fileno(), *handles], [], [], LIMIT_S)
            data = speaker.recv(65536) if speaker.fileno() in ready else b""
            rest += data
            *whole, rest = rest.split(b"\n")
            yield from (line.decode() for line in whole)
            if not data:
                return
    finally:
        for handle in handles:
            os.close(handle)


def save_twice(contender: type[InPlace], folder: Path, trace_from: int, saves: int, speaker: socket.socket) -> None:
    """In the child: save and acknowledge; before save ``trace_from`` wait for strace and whatever else is planned."""
    ctypes.CDLL(None).prctl(PR_SET_PTRACER, ctypes.c_ulong(-1), 0, 0, 0)

    def wait_for_tracer() -> None:
        speaker.send(b"ready\n")
        assert speaker.recv(3) == b"go\n"

    if trace_from == 0:
        wait_for_tracer()
    made = contender(folder)
    for number in range(1, saves + 1):
        state = state_at(number)
        if number == trace_from:
            wait_for_tracer()
        made.save(state, number)
        speaker.send(f"ack {number}\n".encode())
    speaker.send(b"saved\n")
    made.close()


def experiment(request: dict[str, Any]) -> dict[str, Any]:
    """Save once, then again with what is planned; says what was acknowledged, and what the folder then loads as."""
    contender, folder = CONTENDERS[request["contender"]], Path(request["folder"])
    folder.mkdir()
    trace_from, saves = request.get("trace_from", SAVES), request.get("saves", SAVES)
    pid, speaker = run_in_child(partial(save_twice, contender, folder, trace_from, saves))
    tracer: Tracer | None = None
    acknowledged, failure, watched, saved = 0, "", [pid], False
    try:
        going = True
        while going:  # once until strace is attached, once more with everybody watched
            going = False
            for line in lines(speaker, watched):
                word, _, rest = line.partition(" ")
                if word == "ready":
                    watched = family(pid)
                    tracer = Tracer(request["trace"], watched) if "trace" in request else None
                    for member in watched if "limit_bytes" in request else ():
                        resource.prlimit(member, resource.RLIMIT_FSIZE, (request["limit_bytes"],) * 2)
                    speaker.send(b"go\n")
                    going = True
                    break
                if word == "ack":
                    acknowledged = int(rest)
                elif word == "failed":
                    failure = rest
                elif word == "saved":
                    saved = True  # what follows is closing, which need not be waited for, but is recorded
                    if request.get("judged", True):
                        break
    finally:
        end(pid, speaker)
        if tracer is not None:
            tracer.wait()
    answer: dict[str, Any] = {"acknowledged": acknowledged, "failure": failure, "saved": saved}
    if request.get("judged", True):
        answer["verdict"] = judge({**request, "acknowledged": acknowledged})["verdict"]
    return answer


class Tracer:
    """strace, attached to all threads of all processes when this is made.

    Raises:
        PermissionError: it may not attach here.
    """

    def __init__(self, arguments: list[str], pids: list[int]) -> None:
        command = ["strace", "-f", *arguments]
        for pid in pids:
            command += ["-p", str(pid)]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE)
        said = self._process.stderr
        assert said is not None
        missing = set(pids)
        while missing:
            line = said.readline()
            if not line:
                said.close()
                raise PermissionError(f"strace ended with {self._process.wait()}: it may not attach here")
            found = re.search(rb"Process (\d+) attached", line)
            missing -= {int(found[1])} if found else set()
        # It names every new thread: a full pipe would stop it, and all that it traces.
        self._drain = threading.Thread(target=said.read, daemon=True)
        self._drain.start()

    def wait(self) -> None:
        """Return when all that was traced is dead."""
        self._process.wait(timeout=LIMIT_S)
        self._drain.join()
        assert self._process.stderr is not None
        self._process.stderr.close()


def judge(request: dict[str, Any]) -> dict[str, Any]:
    """Load a folder in a child of its own: loaders of damaged files may do anything."""
    contender, folder = CONTENDERS[request["contender"]], Path(request["folder"])

    def work(speaker: socket.socket) -> None:
        speaker.send(f"verdict {verdict(contender, folder, request['acknowledged'])}\n".encode())

    pid, speaker = run_in_child(work)
    try:
        said = [line for line in lines(speaker, [pid]) if line.startswith("verdict ")]
    finally:
        end(pid, speaker)
    return {"verdict": said[0].split()[1] if said else "lost"}


def flips(request: dict[str, Any]) -> dict[str, Any]:
    """Flip one bit of each of a sample of bytes and load; how often which happened."""
    contender, folder = CONTENDERS[request["contender"]], Path(request["folder"])
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    whole = [(path, offset) for path in files for offset in range(path.stat().st_size)]
    dice = random.Random(0)
    chosen = [(*place, dice.randrange(8)) for place in dice.sample(whole, min(request["samples"], len(whole)))]
    seen: Counter[str] = Counter()
    done = 0
    while done < len(chosen):

        def work(speaker: socket.socket, first: int = done) -> None:
            for path, offset, bit in chosen[first:]:
                speaker.send(f"flip {flip_and_load(contender, path, folder, offset, bit)}\n".encode())

        before = {path: path.read_bytes() for path in files}
        pid, speaker = run_in_child(work)
        try:
            for line in lines(speaker, [pid]):
                if line.startswith("flip "):
                    seen[line.split()[1]] += 1
                    done += 1
        finally:
            end(pid, speaker)
        if done < len(chosen):  # the loader took the process with it: nobody could take that for a state
            seen["refused"] += 1
            done += 1
            for path, data in before.items():
                path.write_bytes(data)
    return {"cases": done, "bytes": len(whole), **{word: seen[word] for word in ("refused", "right", "wrong")}}


def kill_points(request: dict[str, Any]) -> dict[str, Any]:
    """System calls of an undisturbed second save that concern the folder: name, and its number in its thread."""
    log, folder = Path(request["log"]), Path(request["folder"])
    answer = experiment({**request, "trace": ["-o", str(log), "-y", "-e", "trace=" + ",".join(KILLED_AT)]})
    counts: Counter[tuple[str, str]] = Counter()
    points: dict[tuple[str, int], None] = {}
    for line in log.read_text(errors="replace").splitlines():
        begun = re.match(r"(\d+) +(\w+)\(", line)
        if begun is None:
            continue
        counts[begun[1], begun[2]] += 1
        if str(folder) in line:
            points[begun[2], counts[begun[1], begun[2]]] = None
    return {**answer, "points": list(points)}


def power_cuts(request: dict[str, Any]) -> dict[str, Any]:
    """Record two saves; what each moment since the first acknowledgement would have left, by model."""
    log, folder, state = Path(request["log"]), Path(request["folder"]), Path(request["state"])
    experiment({**request, "trace": ["-o", str(log), *power.STRACE], "trace_from": 0, "judged": False})
    disk = power.Disk(str(folder))
    moments: list[tuple[dict[str, power.Tree], int]] = []
    for call in power.calls(log):
        if disk.apply(call) and disk.acknowledged:
            moments.append(({model: disk.after_power_loss(model) for model in power.MODELS}, disk.acknowledged))
    if disk.now() != power.read_tree(folder):
        raise power.UnknownChangeError("the recorded calls do not give the files that are there")
    chosen = moments[:: -max(1, len(moments) // request["samples"])]  # the last one always
    known: dict[str, str] = {}
    answer: dict[str, Any] = {"acknowledged": disk.acknowledged}
    for model in power.MODELS:
        seen: Counter[str] = Counter()
        for trees, acknowledged in chosen:
            key = repr((trees[model], acknowledged))
            if key not in known:
                power.lay_out(trees[model], state)
                known[key] = judge({**request, "folder": str(state), "acknowledged": acknowledged})["verdict"]
                shutil.rmtree(state)
            seen[known[key]] += 1
        answer[model] = {"cases": len(chosen), **seen}
    return answer


ACTIONS = {"experiment": experiment, "kill_points": kill_points, "power_cuts": power_cuts, "flips": flips}


def main() -> None:
    """Answer requests until there are no more."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for request in map(json.loads, sys.stdin):
        try:
            answer = ACTIONS[request["action"]](request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
