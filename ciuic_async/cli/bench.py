"""``ciuic bench``: what a snapshot costs on this machine and in this place."""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from ciuic_async import native
from ciuic_async.cli.output import Subparsers, add_command, human_bytes, leaving_in_order, print_json, print_table
from ciuic_async.config.settings import bare_environment
from ciuic_async.errors import UsageError
from ciuic_async.retention.words import read_size
from ciuic_async.staging.budget import available_bytes
from ciuic_async.stores.local import LocalStore
from ciuic_async.stores.resolve import resolve
from ciuic_async.stores.space import existing, room

_COPIES = 3
"""Of the state in memory: itself, and two staged."""
_WARM_UP = 2
"""The first snapshots make the staging memory."""


def add_parser(commands: Subparsers) -> None:
    summary = "Save and restore a made-up state in a place: what does a snapshot cost here?"
    parser = add_command(commands, "bench", run, summary, chain=False)
    parser.add_argument(
        "place", metavar="PLACE", help="folder or URL; what is written is removed (in HDFS empty folders stay)"
    )
    parser.add_argument("--size", default="256MB", metavar="SIZE", help="of the state, e.g. 2GB (256MB)")
    parser.add_argument("--tensors", type=int, default=100, metavar="N", help="it has so many (100)")
    parser.add_argument("--snapshots", type=int, default=5, metavar="N", help="save so many, after two to warm up (5)")


def run(args: argparse.Namespace) -> int:
    size_bytes = read_size(args.size, f"--size {args.size}")
    for name in ("tensors", "snapshots"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} {getattr(args, name)}: expected at least 1")
    if size_bytes < 4 * args.tensors:
        raise UsageError(f"--size {args.size}: {args.tensors} tensors need at least {4 * args.tensors} bytes")
    if _COPIES * size_bytes > (free_bytes := available_bytes()):
        raise UsageError(
            f"--size {args.size}: takes {_COPIES} times that, {human_bytes(free_bytes)} of memory are free"
        )
    with leaving_in_order(), _trial(args.place, (args.snapshots + _WARM_UP) * size_bytes) as place:
        measured = _measure(place, size_bytes, args.tensors, args.snapshots)
    if args.json:
        print_json(measured)
        return 0
    print(f"{native.describe()}; {args.tensors} tensors, {human_bytes(measured['raw_bytes'])} of random weights")
    rows = [
        [what, f"{measured[key]['median']:.3f} s", f"{measured[key]['least']:.3f} to {measured[key]['most']:.3f} s"]
        for key, what in _MEASURED.items()
    ]
    print_table(["", "median", ""], rows, right=(1,))
    print(f"stored for each: {human_bytes(measured['stored_bytes'])}")
    return 0


_MEASURED = {
    "save_s": "save() returns (training may go on)",
    "durable_s": "the snapshot is durable",
    "restore_s": "restore(), verified",
}


def _measure(place: str, size_bytes: int, tensors: int, snapshots: int) -> dict[str, Any]:
    """Times in seconds. Nothing else trains meanwhile: beside a training that uses all cores they are longer."""
    import torch

    from ciuic_async import Checkpointer

    state = {f"t{number}": torch.randn(size_bytes // tensors // 4) for number in range(tensors)}
    times: dict[str, list[float]] = {key: [] for key in _MEASURED}
    with Checkpointer(place, {"state": state}, rng=False, on_error="raise", codec="auto") as ckpt:
        for number in range(1 - _WARM_UP, snapshots + 1):
            for tensor in state.values():
                tensor.mul_(0.999)  # no chunk is as it was
            began_s = time.perf_counter()
            pending = ckpt.save()
            saved_s = time.perf_counter()
            snapshot = pending.wait_durable()
            if number > 0:
                times["save_s"].append(saved_s - began_s)
                times["durable_s"].append(time.perf_counter() - began_s)
            if sys.stderr.isatty():
                print(f"\rsnapshot {max(number, 0)} of {snapshots} ", end="", file=sys.stderr, flush=True)
        for _ in range(min(snapshots, 3)):
            began_s = time.perf_counter()
            ckpt.restore()
            times["restore_s"].append(time.perf_counter() - began_s)
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)
    facts: dict[str, Any] = {
        key: {"median": statistics.median(found), "least": min(found), "most": max(found)}
        for key, found in times.items()
    }
    return facts | {"raw_bytes": snapshot.raw_bytes, "stored_bytes": snapshot.stored_bytes, "snapshots": snapshots}


@contextmanager
def _trial(url: str, takes_bytes: int) -> Iterator[str]:
    """A place below ``url`` for this trial alone, and a home: neither a key nor a pin of the user's is made or used."""
    with tempfile.TemporaryDirectory(prefix="ciuic-bench-") as home, _home(home), closing(resolve(url)) as store:
        if not isinstance(store, LocalStore):
            place = f"{url.rstrip('/')}/ciuic-bench-{uuid4().hex[:12]}"
            try:
                yield place
            finally:
                with closing(resolve(place)) as own:
                    for item in list(own.list()):
                        own.delete(item.name)
            return
        parent = existing(Path(store.url))
        free = room(str(parent))
        if free is not None and takes_bytes > free.free_bytes:
            raise UsageError(
                f"{parent}: {human_bytes(free.free_bytes)} are free, this takes {human_bytes(takes_bytes)}; "
                "choose a smaller --size or fewer --snapshots"
            )
        folder = tempfile.mkdtemp(prefix=".ciuic-bench-", dir=parent)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _home(folder: str) -> Iterator[None]:
    # No option of the user's counts: an ordering or a policy would tell others of this trial.
    before, bare = dict(os.environ), bare_environment()
    os.environ.clear()
    os.environ |= bare | {"XDG_CONFIG_HOME": folder, "XDG_STATE_HOME": folder, "CIUIC_KEY": ""}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before
