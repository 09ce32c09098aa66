"""How small, and at what cost? Ratios and speeds on trained weights, optimizer state and a training's own trajectory.

    python bench/codec.py                # about 3 minutes; writes bench/results/codec.json

Two views. *Chunks*: 4 MiB at a time, one thread, the best of several repeats; for a delta to the previous snapshot
those who know none compress the XOR with it, whose time counts. *Engine*: what a chain really stores for a snapshot,
and how much processor time the whole save takes (copy, hash, compress, write), with and without a previous snapshot to
lean on.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ciuic_async import Checkpointer, UsageError
from harness.compressors import CHUNK_BYTES, COMPRESSORS
from harness.opponents import quieten
from harness.output import parser, rows, say, store, workplace
from harness.weights import PACKAGE, trained_elsewhere, trajectory

ENGINE_CODECS = ("auto", "smallest", "raw")


def data_of(tensor: Tensor) -> bytes:
    """The bytes of a tensor."""
    return bytes(tensor.view(torch.uint8).numpy().data)


def chunks(data: bytes) -> Iterator[bytearray]:
    """Pieces that a compressor may keep or change."""
    for start in range(0, len(data), CHUNK_BYTES):
        yield bytearray(data[start : start + CHUNK_BYTES])


def measure(name: str, data: bytes, base: bytes | None, item_bytes: int, repeats: int) -> dict[str, Any]:
    """One compressor on one piece of data: stored/raw, GB/s of both ways; the least time of several repeats counts.

    Raises:
        AssertionError: it does not give back what it got.
    """
    compressor = COMPRESSORS[name](item_bytes)
    encode_s, decode_s, stored = float("inf"), float("inf"), 0
    for _ in range(repeats):
        spent_s, back_s, stored = 0.0, 0.0, 0
        bases = iter(chunks(base)) if base is not None else None
        for chunk in chunks(data):
            original = bytes(chunk)
            lean_on = next(bases) if bases is not None else None
            begin_s = time.perf_counter()
            packed = compressor.compress(chunk, lean_on)
            spent_s += time.perf_counter() - begin_s
            stored += compressor.size(packed)
            begin_s = time.perf_counter()
            unpacked = compressor.decompress(packed, lean_on)
            back_s += time.perf_counter() - begin_s
            assert bytes(unpacked) == original, f"{name} does not give back what it got"
        encode_s, decode_s = min(encode_s, spent_s), min(decode_s, back_s)
    return {
        "stored_over_raw": stored / len(data),
        "encode_gb_per_s": len(data) / encode_s / 1e9,
        "decode_gb_per_s": len(data) / decode_s / 1e9,
    }


def engine(folder: Path, codec: str, versions: Sequence[Tensor]) -> dict[str, Any]:
    """Save these versions of one tensor one after the other; what the last one took."""
    live = versions[0].clone()
    with Checkpointer(folder, {"part": {"tensor": live}}, codec=codec, rng=False, on_error="raise") as checkpointer:
        checkpointer.step()
        cpu_s = 0.0
        for version in versions:
            live.copy_(version)
            begin_s = time.process_time()
            checkpointer.save().wait_durable()
            cpu_s = time.process_time() - begin_s
        stats = checkpointer.stats()[-1]
    shutil.rmtree(folder)
    return {
        "stored_over_raw": stats.stored_bytes / stats.raw_bytes,
        "persist_s": stats.persist_s,
        "gb_per_cpu_second": stats.raw_bytes / cpu_s / 1e9,
    }


def engines(folder: Path, versions: Sequence[Tensor]) -> dict[str, Any]:
    """``engine`` for every codec that this version has."""
    found: dict[str, Any] = {}
    for codec in ENGINE_CODECS:
        try:
            found[f"engine, codec={codec}"] = engine(folder / "chain", codec, versions)
        except UsageError as error:
            found[f"engine, codec={codec}"] = {"missing": str(error)}
    return found


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of this program."""
    made = parser(__doc__)
    made.add_argument("--size", default="large", help="of the demo's model")
    made.add_argument("--steps", type=int, nargs="+", default=[300, 301, 310, 400], help="compared to the first")
    made.add_argument("--megabytes", type=int, default=16, help="of each piece of data")
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--threads", type=int, default=os.cpu_count(), help="that training uses")
    options = made.parse_args(arguments)
    if options.quick:
        options.size, options.steps, options.megabytes, options.repeats = "tiny", [8, 9], 1, 1
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write, and print the table."""
    options = parse(arguments)
    quieten()
    limit = options.megabytes << 20
    pieces: list[tuple[str, str, Tensor, Tensor | None]] = [
        (PACKAGE, name, tensor, None) for name, tensor in trained_elsewhere(limit).items()
    ]
    course = trajectory(options.size, options.steps, options.threads, limit)
    first = min(course)
    pieces += [("training", name, tensor, None) for name, tensor in course[first].items()]
    pieces += [
        (f"delta over {step - first} steps", name, tensor, course[first][name])
        for step in sorted(course)[1:]
        for name, tensor in course[step].items()
    ]
    results = []
    table = [["data", "compressor", "stored / raw", "encode GB/s", "decode GB/s"]]
    with workplace(options) as folder:
        for kind, name, tensor, base in pieces:
            data, base_data = data_of(tensor), None if base is None else data_of(base)
            figures: dict[str, Any] = {}
            for compressor in COMPRESSORS:
                try:
                    one = measure(compressor, data, base_data, tensor.element_size(), options.repeats)
                except (ImportError, TypeError, ValueError) as error:
                    figures[compressor] = {"missing": f"{type(error).__name__}: {error}"}
                    continue
                figures[compressor] = one
                table.append(
                    [
                        f"{kind}: {name}",
                        compressor,
                        f"{one['stored_over_raw']:.3f}",
                        f"{one['encode_gb_per_s']:.2f}",
                        f"{one['decode_gb_per_s']:.2f}",
                    ]
                )
            figures |= engines(folder, [tensor] if base is None else [base, tensor])
            results.append({"kind": kind, "name": name, "raw_bytes": len(data), "compressors": figures})
            for engine_name in (key for key in figures if key.startswith("engine")):
                if "stored_over_raw" in figures[engine_name]:
                    share = f"{figures[engine_name]['stored_over_raw']:.3f}"
                    table.append([f"{kind}: {name}", engine_name, share, "", ""])
            say(f"{kind}: {name}")
    result = {
        "question": "How small, and at what cost?",
        "method": f"chunks of {CHUNK_BYTES >> 20} MiB, one thread, least time of {options.repeats} repeats",
        "model": options.size,
        "pieces": results,
        "table": table,
    }
    store("codec", result, options)
    rows(table)


if __name__ == "__main__":
    main()
