"""How soon does training go on after a crash? From files that are not in memory into live objects.

    python bench/restore.py              # about 6 minutes; writes bench/results/restore.json

Everyone restores model and optimizer into objects of a fresh process's kind: made, trained for one step, nothing of the
snapshot in them. The clock includes reading every restored byte once, since a memory map returns before it has read
anything. Before each cold run the files' pages are dropped from the page cache, and that they are gone is checked.
After each run the restored tensors are compared to the saved ones, bit for bit.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed

from ciuic_async import Checkpointer, SnapshotChain
from ciuic_async.cli.demo_table import tensor_bytes
from ciuic_async.cli.demo_training import Training
from harness.contenders import State, state_dicts
from harness.intervals import describe
from harness.lost import prepare_training
from harness.opponents import CONTENDERS, flat_tensors, quieten
from harness.output import parser, rows, say, seconds, store, workplace

LoadInto = Callable[[Path, State], None]


def subset(training: Training) -> dict[str, Any]:
    """What is saved and restored here."""
    return {"model": training.model, "optimizer": training.optimizer}


def apply(state: State, loaded: Any) -> None:
    """Hand every part its dictionary."""
    for name, part in state.items():
        part.load_state_dict(loaded[name])


def ciuic(folder: Path, state: State) -> None:
    """In place, every chunk checked."""
    with Checkpointer(folder, state) as checkpointer:
        assert checkpointer.restore() is not None


def ciuic_tree(verify: bool) -> LoadInto:
    """Through a tree in memory."""

    def load(folder: Path, state: State) -> None:
        with SnapshotChain(folder, create=False) as chain:
            apply(state, chain.get("latest").load(only=list(state), verify=verify))

    return load


def torch_load(**options: Any) -> LoadInto:
    def load(folder: Path, state: State) -> None:
        apply(state, torch.load(folder / "checkpoint.pt", weights_only=True, **options))

    return load


def dcp_load(folder: Path, state: State) -> None:
    dictionaries = state_dicts(state)
    newest = max(folder.iterdir(), key=lambda path: int(path.name))
    load_distributed(dictionaries, checkpoint_id=newest, no_dist=True)
    apply(state, dictionaries)


def safetensors_load(folder: Path, state: State) -> None:
    """The recipe its documentation gives for models, here for the moments too: load, then copy into what lives."""
    loaded = load_file(folder / "checkpoint.safetensors")
    live = flat_tensors(state_dicts(state))
    with torch.no_grad():
        for name, tensor in loaded.items():
            live[name].copy_(tensor)


LOADERS: dict[str, tuple[str, LoadInto, bool]] = {
    "ciuic-async, verified": ("ciuic-async", ciuic, True),
    "ciuic-async, tree, verified": ("ciuic-async", ciuic_tree(True), True),
    "ciuic-async, tree, unverified": ("ciuic-async", ciuic_tree(False), False),
    "ciuic-async, codec=raw, verified": ("ciuic-async, codec=raw", ciuic, True),
    "torch.load(mmap=True)": ("torch.save + fsync", torch_load(mmap=True), False),
    "torch.load": ("torch.save + fsync", torch_load(), False),
    "dcp.load": ("dcp.async_save", dcp_load, False),
    "safetensors": ("safetensors + fsync", safetensors_load, False),
}
"""Name to: who saves, how it is restored, whether contents are checked."""


def drop_from_cache(folder: Path) -> float:
    """Drop all files below ``folder`` from the page cache; the share of pages that stayed nevertheless."""
    resident = total = 0
    for path in folder.rglob("*"):
        if not path.is_file() or path.stat().st_size == 0:
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            stay, pages = resident_pages(descriptor, path.stat().st_size)
        finally:
            os.close(descriptor)
        resident, total = resident + stay, total + pages
    return resident / max(1, total)


def resident_pages(descriptor: int, size_bytes: int) -> tuple[int, int]:
    """How many of a file's pages are in memory, and how many it has."""
    pages = -(-size_bytes // mmap.PAGESIZE)
    states = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    address = libc.mmap(None, size_bytes, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "mmap")
    try:
        if libc.mincore(address, size_bytes, states) != 0:
            raise OSError(ctypes.get_errno(), "mincore")
    finally:
        libc.munmap(address, size_bytes)
    return sum(state & 1 for state in states), pages


def tensors(state: State) -> dict[str, Tensor]:
    return flat_tensors(state_dicts(state))


def touch(state: State) -> None:
    """Read every byte of every tensor."""
    for tensor in tensors(state).values():
        if tensor.nbytes:
            tensor.view(-1).view(torch.uint8)[::64].sum()


def restore_once(load: LoadInto, folder: Path, size: str, threads: int, expected: dict[str, Tensor]) -> float:
    """Restore into fresh objects; seconds.

    Raises:
        AssertionError: what came back is not what was saved.
    """
    training = prepare_training(size, threads, steps=1)
    state = subset(training)
    begin_s = time.perf_counter()
    load(folder, state)
    touch(state)
    taken_s = time.perf_counter() - begin_s
    found = tensors(state)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), "restored other bits than saved"
    return taken_s


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of this program."""
    made = parser(__doc__)
    made.add_argument("--size", default="bench", help="of the demo's model")
    made.add_argument("--repeats", type=int, default=12)
    made.add_argument("--threads", type=int, default=os.cpu_count(), help="that torch uses")
    options = made.parse_args(arguments)
    if options.quick:
        options.size, options.repeats = "tiny", 1
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write, and print the table."""
    options = parse(arguments)
    quieten()
    training = prepare_training(options.size, options.threads)
    for _ in range(2):
        training.update()
    expected = {name: tensor.clone() for name, tensor in tensors(subset(training)).items()}
    cold: dict[str, list[float]] = {name: [] for name in LOADERS}
    warm: dict[str, list[float]] = {name: [] for name in LOADERS}
    stayed: dict[str, float] = dict.fromkeys(LOADERS, 0.0)
    with workplace(options) as folder:
        for saver in {saver for saver, _, _ in LOADERS.values()}:
            (folder / saver).mkdir()
            contender = CONTENDERS[saver].make(folder / saver, subset(training))
            contender.step()
            contender.save()
            contender.wait()
            contender.close()
        for number in range(options.repeats):
            for name, (saver, load, _) in LOADERS.items():
                stayed[name] = max(stayed[name], drop_from_cache(folder / saver))
                cold[name].append(restore_once(load, folder / saver, options.size, options.threads, expected))
                if number < max(1, options.repeats // 3):
                    warm[name].append(restore_once(load, folder / saver, options.size, options.threads, expected))
                say(f"{number + 1} of {options.repeats}: {name} {seconds(cold[name][-1])}")
        for saver in {saver for saver, _, _ in LOADERS.values()}:
            shutil.rmtree(folder / saver)
    size_bytes = sum(tensor.nbytes for tensor in expected.values())
    table = [["restore", "checks contents", "cold", "GB/s", "second time"]]
    for name, (_, _, checks) in LOADERS.items():
        median_s = statistics.median(cold[name])
        table.append(
            [
                name,
                "yes" if checks else "no",
                seconds(median_s),
                f"{size_bytes / median_s / 1e9:.2f}",
                seconds(statistics.median(warm[name])),
            ]
        )
    # Their rounds follow each other at once: what the disk does in a minute is in both.
    pairs = zip(cold["ciuic-async, tree, verified"], cold["ciuic-async, tree, unverified"], strict=True)
    result = {
        "question": "How soon does training go on after a crash?",
        "method": "into live objects, every byte read once; files dropped from the page cache before a cold run",
        "state_bytes": tensor_bytes(training),
        "threads": options.threads,
        "restores": {
            name: {
                "saved_by": saver,
                "checks_contents": checks,
                "cold_s": describe(cold[name]),
                "warm_s": describe(warm[name]),
                "cached_share_most": stayed[name],
            }
            for name, (saver, _, checks) in LOADERS.items()
        },
        "speed_of_verified_to_unverified": describe([unverified_s / verified_s for verified_s, unverified_s in pairs]),
        "table": table,
    }
    store("restore", result, options)
    rows(table)


if __name__ == "__main__":
    main()
