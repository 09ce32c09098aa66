"""HDF5 read as hostile input, in a process of its own.

libhdf5 is a large C library: a file with a few changed bytes can make it crash, or work for ever. So it never runs
here: another process opens the file (``hdf5_child``), within bounds of time and memory, and hands back plain bytes
and a description, which are checked as those of a stranger are. What becomes of that process is a typed error.
"""

from __future__ import annotations

import json
import mmap
import os
import resource
import signal
import subprocess
import sys
from typing import Any

import torch

from ciuic_async import errors
from ciuic_async.capture.state_tree import Inflater, decode_plain
from ciuic_async.capture.tensors import DTYPES, empty
from ciuic_async.format.manifest import MAX_DIMENSIONS, TOP_DICT, StoredTensor
from ciuic_async.interchange import limits
from ciuic_async.interchange.tensors import measure

_PATIENCE_S = 20.0
_SLOWEST_BYTES_PER_S = 10e6
_PROCESS_BYTES = 4 << 30
"""Address space that a Python with numpy and h5py takes, many times over."""
_PASSED_ON = frozenset({"PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR", "OPENBLAS_NUM_THREADS"})
"""What the other process sees of this one's environment: no credentials, should the library be made to do more."""
_ERRORS = {"IntegrityError": errors.IntegrityError, "UsageError": errors.UsageError}


def read_hdf5(path: str, where: str, size_bytes: int, load_data: bool = True) -> Any:
    """The state in an HDF5 file: the very tree of one that was exported, else nested dicts by its groups.

    Args:
        load_data: False: tensors are on the meta device, no data of theirs is read.

    Raises:
        IntegrityError: kind ``file_malformed``, ``file_refused`` or ``file_bomb``.
        UsageError: kind ``file_unsupported``.
    """
    data, answer = os.memfd_create("ciuic-hdf5-data"), os.memfd_create("ciuic-hdf5-answer")
    try:
        _run_child(path, where, size_bytes, load_data, data, answer)
        described = _answer(answer, where)
        state = _Inflating(described, data, where, limits.Allowance.of_file(where, size_bytes)).state()
    finally:
        os.close(data)
        os.close(answer)
    measure(state, where)
    return state


def _run_child(path: str, where: str, size_bytes: int, load_data: bool, data: int, answer: int) -> None:
    """Wait for the other process, at most so long; however it ends, nothing of it is left."""
    timeout_s = _PATIENCE_S + size_bytes / _SLOWEST_BYTES_PER_S
    command = [sys.executable, "-P", "-m", "ciuic_async.interchange.hdf5_child", os.path.abspath(path), where]
    most_bytes = limits.Allowance.of_file(where, size_bytes).left_bytes
    child = subprocess.Popen(
        [*command, str(size_bytes), "01"[load_data], str(data), str(answer)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(data, answer),
        env={
            **{name: value for name, value in os.environ.items() if name in _PASSED_ON},
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "HDF5_PLUGIN_PATH": os.devnull,
        },
    )
    try:
        # Set before the file can matter: the interpreter takes longer to start than this line.
        resource.prlimit(child.pid, resource.RLIMIT_AS, (_PROCESS_BYTES + 2 * most_bytes,) * 2)
        resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (most_bytes + limits.STRUCTURE_BYTES,) * 2)
        resource.prlimit(child.pid, resource.RLIMIT_CORE, (0, 0))
        cpu_s = int(timeout_s) + 2 * (os.cpu_count() or 1)  # the wait below ends it sooner, unless this process dies
        resource.prlimit(child.pid, resource.RLIMIT_CPU, (cpu_s, cpu_s))
        child.wait(timeout_s)
    except subprocess.TimeoutExpired:
        raise limits.malformed(where, f"not read within {timeout_s:.0f} s: damaged, or made to take for ever") from None
    except ProcessLookupError:  # it ended already: its exit code says how
        child.wait()
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
    if child.returncode:
        name = signal.Signals(-child.returncode).name if child.returncode < 0 else f"exit code {child.returncode}"
        raise limits.malformed(
            where, f"libhdf5 ended with {name} over it, in a process of its own: no HDF5 file, or damaged"
        )


def _answer(descriptor: int, where: str) -> dict[str, Any]:
    size_bytes = os.fstat(descriptor).st_size
    if size_bytes > 4 * limits.STRUCTURE_BYTES:
        raise limits.malformed(where, f"its tree is described in {size_bytes} bytes")
    try:
        found = json.loads(os.pread(descriptor, size_bytes, 0))
    except (ValueError, RecursionError) as error:
        raise limits.malformed(where, "no tree came of it") from error
    if not isinstance(found, dict):
        raise limits.malformed(where, "no tree came of it")
    if "error" in found:
        kind = _ERRORS.get(str(found["error"]), errors.IntegrityError)
        raise kind(str(found["message"]), kind=str(found["kind"]), where=where)
    return found


class _Inflating:
    """From the other process's answer to values. Nothing in it is trusted."""

    def __init__(self, described: dict[str, Any], descriptor: int, where: str, allowance: limits.Allowance) -> None:
        self._described = described
        self._where = where
        self._allowance = allowance
        self._size_bytes = os.fstat(descriptor).st_size
        # Private: tensors may be changed, and the file is nobody's from here on.
        self._memory = mmap.mmap(descriptor, self._size_bytes, mmap.MAP_PRIVATE) if self._size_bytes else None
        self._loaded: dict[int, torch.Tensor] = {}

    def state(self) -> Any:
        """The value of the whole tree."""
        try:
            blobs, trees = self._described["blobs"], self._described["trees"]
            stored = tuple(self._stored(blob) for blob in blobs)
            inflater = Inflater(stored, lambda index: self._tensor(index, stored[index], blobs[index]))
            values = [inflater.value(tree["node"], self._where) for tree in trees]
            if self._described["top"] != TOP_DICT:
                return values[0]
            keys = [decode_plain(tree["key"]) for tree in trees]
            if len(set(keys)) != len(keys):
                raise limits.malformed(self._where, "two items of the state have one key")
            return dict(zip(keys, values, strict=True))
        except (KeyError, IndexError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise limits.malformed(self._where, f"its tree is none: {error!s:.200}") from error

    def _stored(self, blob: Any) -> StoredTensor:
        shape, dtype = tuple(blob["shape"]), blob["dtype"]
        if len(shape) > MAX_DIMENSIONS or not all(type(size) is int and 0 <= size < 2**62 for size in shape):
            raise limits.malformed(self._where, "a tensor of a shape that is none")
        if dtype not in DTYPES:
            raise limits.unsupported(self._where, f"element type {str(dtype)[:40]!r}, which this torch does not have")
        return StoredTensor((), dtype, shape, "cpu", ())

    def _tensor(self, index: int, stored: StoredTensor, blob: Any) -> torch.Tensor:
        """The content of a dataset. Each reference to bytes makes a copy of them, and counts."""
        if stored.dtype == "uint8" and len(stored.shape) == 1:
            self._allowance.take(stored.size_bytes, "its tree")
        known = self._loaded.get(index)
        if known is None:
            known = self._loaded[index] = self._content(stored, blob.get("offset"))
        return known

    def _content(self, stored: StoredTensor, offset: Any) -> torch.Tensor:
        if offset is None:
            return torch.empty(stored.shape, dtype=DTYPES[stored.dtype], device="meta")
        if not stored.size_bytes:
            return empty(stored.shape, DTYPES[stored.dtype], "cpu")
        if type(offset) is not int or not 0 <= offset <= self._size_bytes - stored.size_bytes or self._memory is None:
            raise limits.malformed(self._where, "a tensor whose elements are not there")
        flat = torch.frombuffer(self._memory, dtype=torch.uint8, count=stored.size_bytes, offset=offset)
        return flat.view(DTYPES[stored.dtype]).view(stored.shape)
