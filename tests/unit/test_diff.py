"""``SnapshotChain.diff`` and ``ciuic diff``: exactly what changed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ciuic_async
from ciuic_async import SnapshotChain
from ciuic_async.cli.main import main
from ciuic_async.pipeline.diff import diff


def state() -> dict[str, Any]:
    return {
        "model": {"large": torch.zeros(100_000), "small": torch.ones(3), "other": torch.ones(5), "tied": None},
        "lr": 0.1,
        "steps": [1, 2, 3],
        "array": np.arange(4),
    }


def test_every_kind_of_change_is_named(tmp_path: Path) -> None:
    """Bytes of large and of packed tensors, dtype, shape, plain values, containers; and nothing that stayed."""
    place = tmp_path / "chain"
    old = state()
    ciuic_async.save(old, place)
    new = state()
    new["model"]["large"][7] = 1.0
    new["model"]["small"][0] = 2.0
    new["model"]["extra"] = torch.zeros(2)
    del new["model"]["tied"]
    new["lr"] = 0.2
    new["steps"] = [1, 5, 3, 4]
    new["array"] = np.arange(4).astype(np.int16)
    ciuic_async.save(new, place)
    with SnapshotChain(place) as chain:
        found = chain.diff("latest~1", "latest")
        assert found.added == ("model.extra", "steps.3")
        assert found.removed == ("model.tied",)
        changes = {change.path: (change.before, change.after) for change in found.changed}
        assert changes == {
            "model.large": ("float32 [100000]", "other bytes"),
            "model.small": ("float32 [3]", "other bytes"),
            "lr": ("0.1", "0.2"),
            "steps.1": ("2", "5"),
            "array": ("uint8 [32]", "uint8 [8]"),
        }
        assert found.same == 3  # model.other, steps.0, steps.2
        nothing = chain.diff("latest", "latest")
        assert (nothing.added, nothing.removed, nothing.changed) == ((), (), ())
        backwards = chain.diff("latest", "latest~1")
        assert (backwards.added, backwards.removed) == (found.removed, found.added)


@settings(max_examples=15)
@given(st.lists(st.integers(0, 19), max_size=4), st.lists(st.integers(0, 19), max_size=4))
def test_exactly_the_tensors_that_differ_are_named(first: list[int], second: list[int]) -> None:
    """Of twenty small tensors in one chunk those are changed whose bytes are."""
    with tempfile.TemporaryDirectory() as place, SnapshotChain(place) as chain:
        for touched in (first, second):
            tensors = {f"t{number}": torch.zeros(5) for number in range(20)}
            for number in touched:
                tensors[f"t{number}"][3] = 1.0
            ciuic_async.save(tensors, chain)
        found = chain.diff("latest~1", "latest")
        expected = {f"t{number}" for number in set(first) ^ set(second)}
        assert {change.path for change in found.changed} == expected
        assert found.same == 20 - len(expected)


def test_hardly_a_byte_is_read(tmp_path: Path) -> None:
    """Segments may be gone: tensors that are chunks of their own are compared without them."""
    place = tmp_path / "chain"
    for value in (0.0, 1.0):
        ciuic_async.save({"a": torch.full((100_000,), value), "b": torch.zeros(100_000)}, place)
    shutil.move(place / "segments", tmp_path / "elsewhere")
    with SnapshotChain(place) as chain:
        found = chain.diff("latest~1", "latest")
    shutil.move(tmp_path / "elsewhere", place / "segments")
    assert [change.path for change in found.changed] == ["a"]
    assert found.shared_bytes == 400_000


def test_the_command_prints_it_for_people_and_scripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line a path; ``--json`` has the same; without a second ref the latest is meant; torch is not needed."""
    place = str(tmp_path / "chain")
    ciuic_async.save({"a": torch.zeros(3), "gone\x1b[2J": 1, "lr": 1.0}, place)
    ciuic_async.save({"a": torch.ones(3), "new": "x", "lr": 1.0}, place)
    assert main(["diff", place, "latest~1"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "- gone?[2J",
        "+ new",
        "~ a  float32 [3] -> other bytes",
        "1 changed, 1 added, 1 removed, 1 the same; 0 B in chunks that both have",
    ]
    assert main(["diff", place, "latest~1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["changed"] == [
        {"path": "a", "before": "float32 [3]", "after": "other bytes"}
    ]
    code = "import sys; from ciuic_async.cli.main import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, "diff", place, "latest~1"], check=False).returncode == 0
    assert main(["diff", place, "nothing"]) == 3


@pytest.mark.parametrize("value", ["zz", "00", "", "3ff000000000000000"])
def test_a_node_that_nobody_would_write_is_compared_as_it_stands(value: str, tmp_path: Path) -> None:
    """A manifest is its writer's word: a float that is none is a value like any other, and no end of the command."""
    ciuic_async.save({"lr": 0.5}, tmp_path / "chain")
    with SnapshotChain(tmp_path / "chain") as chain:
        good = chain.get("latest").resolve()
        tree = replace(good.manifest.trees[0], node={"float": value})
        bad = replace(good, manifest=replace(good.manifest, trees=(tree, *good.manifest.trees[1:])))
        found = diff(chain.store, good, bad)
        assert [(change.path, change.before) for change in found.changed] == [("lr", "0.5")]
        assert diff(chain.store, bad, bad).changed == ()


def test_a_tensor_that_is_named_very_often_is_kept_once(tmp_path: Path) -> None:
    """Its digests are not repeated for each of three thousand names: memory stays far below their product."""
    ciuic_async.save({"t": torch.arange(40_000, dtype=torch.float32)}, tmp_path / "chain")
    with SnapshotChain(tmp_path / "chain") as chain:
        good = chain.get("latest").resolve()
        manifest = good.manifest
        shard = replace(manifest.tensors[0].shards[0], digests=manifest.tensors[0].shards[0].digests * 2000)
        tensors = (replace(manifest.tensors[0], shards=(shard,)), *manifest.tensors[1:])
        tree = replace(manifest.trees[0], node=[{"tensor": 0}] * 3000)
        hostile = replace(good, manifest=replace(manifest, trees=(tree,), tensors=tensors))
        tracemalloc.start()
        try:
            found = diff(chain.store, hostile, hostile)
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert found.same == 3000
    assert peak_bytes < 50 << 20  # 3000 times 64 kB would be 192 MB
