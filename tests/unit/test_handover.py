"""A staged snapshot as bytes: another process makes of it what its trainer would have made, and believes no lie."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from ciuic_async import CommitConflictError, IntegrityError, SnapshotChain
from ciuic_async.capture.plan_cache import PlanCache
from ciuic_async.capture.state_tree import Captured, flatten
from ciuic_async.codecs.choose import encoder_for
from ciuic_async.format import jsontext, layout
from ciuic_async.format.manifest import Progress
from ciuic_async.handoffs import StagedWindow
from ciuic_async.pipeline.handover import Lineage, decode, encode_plan, encode_request
from ciuic_async.pipeline.persist import Persister, SaveRequest
from ciuic_async.staging.device import Devices
from ciuic_async.staging.stager import stage
from tests.strategies import State, fingerprint, trees

SNAPSHOT = "0123456789abcdef0123"
PARENT = Lineage("f" * 20, bytes(range(32)), 3)


def planned(state: object, chunk_size_bytes: int = 1 << 16) -> Captured:
    """As in a training run: the second snapshot of one structure, whose plan has holes."""
    cache = PlanCache()
    cache.flatten(state, chunk_size_bytes=chunk_size_bytes)
    return cache.flatten(state, chunk_size_bytes=chunk_size_bytes)


def request_of(captured: Captured, **changes: Any) -> SaveRequest:
    about: dict[str, Any] = {
        "snapshot": SNAPSHOT,
        "plan": captured.plan,
        "step": 7,
        "epoch": -1,
        "batch": "shard-3",
        "progress": Progress(7, -1, {"tuple": [1, "x"]}),
        "metrics": (("loss", "0.5"),),
        "tags": ("best",),
        "environment": {"python": "3"},
    }
    return SaveRequest(**(about | changes))


@settings(max_examples=40)
@given(state=trees())
def test_what_is_handed_over_is_what_was_planned(state: State) -> None:
    """Plan, values, progress and lineage of any state come back as they were, first snapshots and later ones."""
    for captured in (flatten([state.value], chunk_size_bytes=1 << 16), planned([state.value])):
        for lineage in (PARENT, Lineage(None, None, 0)):
            request = request_of(captured)
            found = decode(encode_plan(captured.plan), encode_request(request, lineage))
            assert found.request == request
            assert found.request.plan.trees == captured.plan.trees
            assert found.lineage == lineage


def test_where_training_stands_may_be_unknown() -> None:
    """A snapshot without step, epoch and batch, and one with remembered regions, come back too."""
    captured = planned({"w": torch.zeros(100_000)})
    request = request_of(captured, step=None, epoch=None, batch=None, remembered={0: bytes(64)})
    assert decode(encode_plan(captured.plan), encode_request(request, PARENT)).request == request


@pytest.mark.parametrize("allowed", [True, False])
def test_another_process_makes_it_durable_as_it_was(allowed: bool, tmp_path: Path) -> None:
    """From nothing but the bytes and the staged memory the very state becomes durable, unless the claim is refused."""
    state = {"w": torch.randn(50_000), "small": [torch.ones(3), 1.5, "x"], "n": list(range(9))}
    captured = planned(state)
    payload = torch.zeros(captured.plan.size_bytes, dtype=torch.uint8)
    stage(captured.sources, payload, 0, captured.plan.size_bytes, Devices())
    request = request_of(captured, snapshot=layout.new_id())
    found = decode(encode_plan(captured.plan), encode_request(request, Lineage(None, None, 0)))
    window = StagedWindow(0, tuple(found.request.plan.chunks()), memoryview(bytearray(payload.numpy())))

    def may_claim() -> None:
        if not allowed:
            raise CommitConflictError("training went on without it")

    with SnapshotChain(tmp_path / "chain") as chain:
        persister = Persister(chain.target(), chain.file, encoder_for("auto"), chain.run)
        try:
            if allowed:
                done = persister.persist(found.request, [window], lambda window: None, True, may_claim=may_claim)
                assert done.entry.snapshot == request.snapshot
            else:
                with pytest.raises(CommitConflictError, match="went on"):
                    persister.persist(found.request, [window], lambda window: None, True, may_claim=may_claim)
        finally:
            persister.close()
        loaded = [(line.step, line.epoch, fingerprint(line.load())) for line in chain]
        assert loaded == ([(7, -1, fingerprint(state))] if allowed else [])
        left = {path.name for path in (tmp_path / "chain" / "segments").glob("*")}
        assert left == ({request.snapshot} if allowed else set()), "a refused claim leaves no file"


# --- lies -------------------------------------------------------------------------------------------------------------


def put(*path: str | int, value: Any) -> Callable[[Any], None]:
    def edit(root: Any) -> None:
        for step in path[:-1]:
            root = root[step]
        root[path[-1]] = value

    return edit


PLAN_LIES = [
    put("top", value=1),
    put("chunk_size_bytes", value=16),
    put("pack_count", value=99),
    put("regions", 0, 2, value=3),
    put("regions", 0, 2, value=True),
    put("regions", 0, 4, value=1),
    put("regions", 0, 0, value=-1),
    put("regions", 0, value=[1, 2]),
    put("tensors", 0, 4, value=1 << 20),
    put("tensors", 0, 4, value=-2),
    put("tensors", 0, 0, value=[None]),
    put("tensors", 0, 1, value=None),
    put("tensors", 0, 2, value=[-1]),
    put("tensors", 0, value=7),
    put("trees", 0, 2, value={"hole": 1 << 20}),
    put("trees", 0, 2, value=[[{"hole": -1}]]),
    put("trees", 0, 2, value={"hole": "0"}),
    put("trees", 0, 0, value=None),
    put("extra", value=1),
]
REQUEST_LIES = [
    put("snapshot", value="../x"),
    put("step", value=-1),
    put("epoch", value=[1]),
    put("batch", value=True),
    put("progress", value=[1]),
    put("metrics", value=[["a"]]),
    put("metrics", value=[["a", 1]]),
    put("tags", value=[1]),
    put("environment", value=[]),
    put("environment", value={"a": 1}),
    put("values", value=None),
    put("remembered", value=[[99, ""]]),
    put("remembered", value=[[0, "xy"]]),
    put("parent", value=1),
    put("leaf_hash", value="00"),
    put("since", value=-1),
    put("extra", value=1),
]


def _texts() -> tuple[bytes, bytes]:
    captured = planned({"w": torch.zeros(20_000), "x": [1, 2.5]})
    return encode_plan(captured.plan), encode_request(request_of(captured), PARENT)


@pytest.mark.parametrize("lie", range(len(PLAN_LIES) + len(REQUEST_LIES)))
def test_lies_are_refused(lie: int) -> None:
    """Every field is checked: what its writer cannot have meant is an IntegrityError, never another exception."""
    plan, request = map(json.loads, _texts())
    if lie < len(PLAN_LIES):
        PLAN_LIES[lie](plan)
    else:
        REQUEST_LIES[lie - len(PLAN_LIES)](request)
    with pytest.raises(IntegrityError) as caught:
        decode(jsontext.encode(plan), jsontext.encode(request))
    assert caught.value.kind == "malformed"


def test_another_version_is_told_apart() -> None:
    """What a trainer of another version staged has its own kind: its keeper is gone with it, and nothing is damaged."""
    plan, request = _texts()
    other = json.loads(plan) | {"engine": "ciuic-async 0.0.0"}
    with pytest.raises(IntegrityError, match=r"written by ciuic-async 0\.0\.0") as caught:
        decode(jsontext.encode(other), request)
    assert caught.value.kind == "other_version"
