"""``ciuic show``: what one snapshot holds."""

from __future__ import annotations

import argparse
import math
from typing import Any

from ciuic_async.chain import Snapshot, SnapshotChain
from ciuic_async.cli.output import Subparsers, add_command, human_bytes, print_json, print_table, text
from ciuic_async.format.manifest import SECTION_STATE, dotted
from ciuic_async.format.segment import CODEC_NAMES
from ciuic_async.pipeline.commit import Resolved


def add_parser(commands: Subparsers) -> None:
    parser = add_command(commands, "show", run, "Show what a snapshot holds: facts, environment, tensors.")
    parser.add_argument("ref", nargs="?", default="latest", metavar="REF", help="default: latest")
    parser.add_argument("--tensors", action="store_true", help="list every stored tensor")


def run(args: argparse.Namespace) -> int:
    with SnapshotChain(args.chain, create=False) as chain:
        snapshot = chain.get(args.ref)
        resolved = snapshot.resolve()
        facts = _facts(snapshot, resolved)
    if args.json:
        print_json(facts)
        return 0
    for name, value in facts.items():
        if name == "tensors":
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{text(k)}={text(v)}" for k, v in value.items()) or "-"
        elif isinstance(value, list):
            value = ", ".join(map(text, value)) or "-"
        elif name.endswith("_bytes"):
            value = human_bytes(value)
        print(f"{name:<14}{text(value)}")
    if args.tensors:
        print()
        rows = [
            [text(t["path"]), t["dtype"], "x".join(map(str, t["shape"])) or "scalar", human_bytes(t["raw_bytes"])]
            for t in facts["tensors"]
        ]
        print_table(["tensor", "dtype", "shape", "raw"], rows, right=(3,))
    return 0


def _facts(snapshot: Snapshot, resolved: Resolved) -> dict[str, Any]:
    codecs: dict[str, int] = {}
    for place in resolved.locator.chunks.values():
        codecs[CODEC_NAMES.get(place.codec, str(place.codec))] = (
            codecs.get(CODEC_NAMES.get(place.codec, str(place.codec)), 0) + 1
        )
    return {
        "id": snapshot.id,
        "index": snapshot.index,
        "step": snapshot.step,
        "epoch": snapshot.epoch,
        "batch": snapshot.batch,
        "created": snapshot.created,
        "parent": snapshot.parent,
        "raw_bytes": snapshot.raw_bytes,
        "stored_bytes": snapshot.stored_bytes,
        "metrics": dict(snapshot.entry.metrics),
        "tags": list(snapshot.tags),
        "names": [str(tree.key) for tree in resolved.manifest.trees if tree.section == SECTION_STATE],
        "chunks": codecs,
        "segments": len(resolved.segments),
        "environment": resolved.manifest.environment,
        "config": _plain(snapshot.config),
        "tensors": [
            {"path": dotted(t.path), "dtype": t.dtype, "shape": list(t.shape), "raw_bytes": t.size_bytes}
            for t in resolved.manifest.tensors
        ],
    }


def _plain(value: object) -> Any:
    """A configuration as JSON has it; what JSON does not know as Python prints it."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    finite = isinstance(value, float) and math.isfinite(value)
    return value if value is None or finite or type(value) in (str, int, bool) else repr(value)
