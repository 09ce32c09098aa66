"""How fast are the native kernels, each alone on one core? Copy, byte planes, zstd, hash.

    python bench/kernels.py              # about half a minute; writes bench/results/kernels.json

The functions below are pytest-benchmark's: ``python -m pytest bench/kernels.py -o python_files=kernels.py`` shows its
own table. Data: 4 MiB of float32 with the exponents of trained weights.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports this file by its path

from ciuic_async import native
from ciuic_async.codecs.decode import decode
from ciuic_async.codecs.planes import PlanesCodec
from ciuic_async.format.digest import digest
from harness.output import parser, rows, store

SIZE_BYTES = 4 << 20
Benchmark = Any  # pytest-benchmark's fixture has no public type


@pytest.fixture(scope="module")
def weights() -> np.ndarray[Any, np.dtype[np.float32]]:
    """Normally distributed, as trained weights nearly are."""
    return np.random.default_rng(0).normal(0, 0.02, SIZE_BYTES // 4).astype(np.float32)


@pytest.fixture(scope="module")
def core() -> Any:
    if native.core is None:
        pytest.skip(native.describe())
    return native.core


@pytest.mark.parametrize("size_mib", [4, 256])
@pytest.mark.parametrize("threads", [1, 2])
def test_copy(benchmark: Benchmark, core: Any, size_mib: int, threads: int) -> None:
    """copy_many, which bypasses the caches; 256 MiB fit into none."""
    source, target = np.ones(size_mib << 20, np.uint8), np.zeros(size_mib << 20, np.uint8)
    pairs = [(target.ctypes.data, source.ctypes.data, source.nbytes)]
    benchmark.extra_info["size_bytes"] = source.nbytes
    benchmark(core.copy_many, pairs, threads)
    assert target.all()


def test_split_planes(benchmark: Benchmark, core: Any, weights: Any) -> None:
    """Items to byte planes."""
    planes = bytearray(SIZE_BYTES)
    benchmark(core.split_planes, weights.view(np.uint8).data, planes, 4)
    assert any(planes)


def test_merge_planes(benchmark: Benchmark, core: Any, weights: Any) -> None:
    """And back."""
    planes, items = bytearray(SIZE_BYTES), bytearray(SIZE_BYTES)
    core.split_planes(weights.view(np.uint8).data, planes, 4)
    benchmark(core.merge_planes, planes, items, 4)
    assert items == weights.tobytes()


def test_encode(benchmark: Benchmark, core: Any, weights: Any) -> None:
    """Split, and compress the planes that shrink; no hash."""
    raw = weights.view(np.uint8).data.toreadonly()
    encoded = benchmark(PlanesCodec().encode, raw, bytes(32), 4)
    assert encoded.header.stored_size_bytes < SIZE_BYTES


def test_decode(benchmark: Benchmark, core: Any, weights: Any) -> None:
    """The way back."""
    encoded = PlanesCodec().encode(weights.view(np.uint8).data.toreadonly(), bytes(32), 4)
    out = bytearray(SIZE_BYTES)
    benchmark(decode, encoded.header, encoded.payload[0], memoryview(out))
    assert out == weights.tobytes()


def test_zstd_1_for_comparison(benchmark: Benchmark, weights: Any) -> None:
    """What one would do without planes."""
    packer = zstandard.ZstdCompressor(level=1)
    assert benchmark(packer.compress, weights.tobytes())


def test_hash(benchmark: Benchmark, weights: Any) -> None:
    """The digest of every chunk."""
    assert len(benchmark(digest, weights.view(np.uint8).data)) == 32


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of this program."""
    return parser(__doc__).parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Let pytest-benchmark measure, in a process of its own; write and print."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "benchmark.json"
        command = [sys.executable, "-m", "pytest", __file__, "-q", "-o", "python_files=kernels.py", "-o", "addopts="]
        command += [
            "-p",
            "no:cacheprovider",
            "--rootdir",
            folder,
            "--benchmark-warmup=on",
            f"--benchmark-json={report}",
        ]
        if options.quick:
            command += ["--benchmark-max-time=0.01", "--benchmark-min-rounds=1"]
        subprocess.run(command, check=True, stdout=sys.stderr, env={**os.environ, "OMP_NUM_THREADS": "1"})
        measured = json.loads(report.read_text())["benchmarks"]
    table = [["kernel", "least", "median", "GB/s"]]
    kernels = {}
    for one in measured:
        name = one["name"].removeprefix("test_")
        size_bytes = one["extra_info"].get("size_bytes", SIZE_BYTES)
        times = one["stats"]
        kernels[name] = {
            "size_bytes": size_bytes,
            "least_s": times["min"],
            "median_s": times["median"],
            "rounds": times["rounds"],
            "gb_per_s": size_bytes / times["min"] / 1e9,
        }
        table.append(
            [
                name,
                f"{times['min'] * 1e3:.2f} ms",
                f"{times['median'] * 1e3:.2f} ms",
                f"{kernels[name]['gb_per_s']:.2f}",
            ]
        )
    result = {
        "question": "How fast are the native kernels?",
        "method": "pytest-benchmark, the least time counts; copies are counted once, not as read and written",
        "kernels": kernels,
        "table": table,
    }
    store("kernels", result, options)
    rows(table)


if __name__ == "__main__":
    main()
