"""Planning with a memory gives what planning from scratch gives, whatever changed in between."""

from __future__ import annotations

import collections
import copy
import enum
import gc
import random
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ciuic_async import UsageError, native
from ciuic_async.capture.plan_cache import CALM_SNAPSHOTS, PlanCache
from ciuic_async.capture.state_tree import MAX_DEPTH, SPILL_BYTES, Captured, flatten
from ciuic_async.capture.values import encode_scalar
from ciuic_async.format import jsontext, manifest
from ciuic_async.format.digest import digest
from ciuic_async.format.jsontext import Hole
from ciuic_async.pipeline import describe as describing
from ciuic_async.pipeline.describe import describe, full_manifest
from ciuic_async.staging.device import Devices
from ciuic_async.staging.stager import stage
from tests.strategies import State, doubles, keys, scalars, trees

CHUNK = 1 << 16
SNAPSHOT = "0123456789abcdef0123"
PROGRESS = manifest.Progress(3, {"float": "3ff0000000000000"}, None)


class Color(enum.Enum):
    RED = 1
    BLUE = 2


class Pair(NamedTuple):
    x: Any
    y: Any


def staged(captured: Captured) -> list[bytes]:
    """What staging puts into every region, over memory that held something else."""
    size = captured.plan.size_bytes
    payload = torch.full((size,), 0x7F, dtype=torch.uint8)
    stage(captured.sources, payload, 0, size, Devices())
    return [payload[r.address :][: r.size_bytes].numpy().tobytes() for r in captured.plan.regions]


def content(captured: Captured) -> dict[str, Any]:
    """Everything that a snapshot would hold."""
    plan, regions = captured.plan, staged(captured)
    digests = [b"".join(digest(data[at : at + CHUNK]) for at in range(0, len(data), CHUNK)) for data in regions]
    described = describe(plan, SNAPSHOT, digests, PROGRESS, {"python": "3"})
    whole = full_manifest(plan, SNAPSHOT, digests, PROGRESS, {"python": "3"})
    assert described.encoded == manifest.encode(whole), "spliced and encoded manifests are the same bytes"
    assert (described.distinct, described.chunks) == (whole.distinct_chunks(), whole.chunk_tree())
    assert described.raw_bytes == whole.raw_bytes
    return {
        "trees": [(tree.section, *map(jsontext.encode, (tree.key, tree.node))) for tree in plan.trees],
        "top": plan.top,
        "tensors": plan.tensors,
        "regions": plan.regions,
        "packs": plan.pack_count,
        "bytes": regions,
        "manifest": described.encoded,
    }


def assert_planned_alike(cache: PlanCache, state: Any, **how: Any) -> Captured:
    """``cache`` plans ``state`` as one without a memory does."""
    captured = cache.flatten(state, chunk_size_bytes=CHUNK, **how)
    assert content(captured) == content(flatten(state, chunk_size_bytes=CHUNK, **how))
    return captured


# --- anything may change ----------------------------------------------------------------------------------------------


def _changes(value: Any) -> list[Callable[[], Any]]:
    """What a value may turn into: things that are nearly the same, and things that are not."""
    made: list[Callable[[], Any]] = [lambda: copy.copy(value), lambda: None, lambda: [value], lambda: {"a": value}]
    if isinstance(value, torch.Tensor):
        plain = value.detach()
        made += [
            lambda: plain,
            lambda: plain.clone(),
            lambda: plain + 1 if plain.dtype is torch.float32 else plain.clone(),
            lambda: torch.nn.Parameter(plain, requires_grad=False),
            lambda: plain.transpose(0, -1) if plain.dim() else plain,
            lambda: plain[:1] if plain.dim() else plain,
            lambda: plain.reshape(-1),
            lambda: plain.unsqueeze(0),
            lambda: plain.to(torch.float64) if plain.dtype is torch.float32 else plain,
            lambda: torch.zeros_like(plain),
            lambda: plain.numpy().copy() if plain.dtype in (torch.float32, torch.uint8) else plain,
        ]
    elif isinstance(value, np.ndarray):
        made += [lambda: value.copy(), lambda: np.asfortranarray(value), lambda: value.reshape(-1)]
    elif isinstance(value, dict):
        made += [
            lambda: collections.OrderedDict(value),
            lambda: dict(value),
            lambda: dict(reversed(list(value.items()))),
            lambda: {(True if key == 1 else key): item for key, item in value.items()},
            lambda: collections.defaultdict(None, value),
        ]
    elif isinstance(value, list | tuple):
        made += [lambda: list(value), lambda: tuple(value), lambda: list(value)[1:], lambda: list(value) * 2]
    elif isinstance(value, bool | int | float):
        made += [lambda: bool(value), lambda: 1, lambda: True, lambda: 1.0, lambda: 0.0, lambda: -0.0]
    elif isinstance(value, str | bytes):
        made += [lambda: value * 2, lambda: value[::-1], lambda: value + value[:1], lambda: "\ud800"]
    return made


@st.composite
def _mutated(draw: st.DrawFn, value: Any, left: list[int]) -> Any:
    """A copy of a tree in which some values are exchanged; leaves that stay are the same objects."""
    if left[0] > 0 and draw(st.integers(0, 5)) == 0:
        left[0] -= 1
        return draw(st.one_of(st.sampled_from(_changes(value)).map(lambda make: make()), scalars()))
    kind = type(value)
    if kind in (dict, collections.OrderedDict):
        result = kind((key, draw(_mutated(item, left))) for key, item in value.items())
        vars(result).update(vars(value)) if kind is collections.OrderedDict else None
        return result
    if kind in (list, tuple):
        return kind(draw(_mutated(item, left)) for item in value)
    return value


@given(first=trees(), data=st.data())
def test_whatever_changes_in_a_tree_is_planned_as_from_scratch(first: State, data: st.DataObject) -> None:
    """A chain of small changes to any tree: plan, manifest and staged bytes are those without a memory, each time."""
    cache = PlanCache()
    state = {"tree": first.value, "again": first.value, "lr": 0.1}
    for _ in range(3):
        assert_planned_alike(cache, state)
        state = data.draw(_mutated(state, [data.draw(st.integers(0, 2))]))
    assert_planned_alike(cache, state)


def _float(bits: int) -> float:
    return float(struct.unpack("<d", struct.pack("<Q", bits))[0])


def _views(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    base = torch.arange(24, dtype=torch.float32)
    return [base[: int(np.prod(shape))].view(shape) for shape in shapes]


def _tied(*same: int) -> list[torch.Tensor]:
    """Tensors of one shape; those of the same number are one."""
    made = [torch.full((8,), float(number)) for number in range(max(same) + 1)]
    return [made[number].view(8) for number in same]


def _ordered(metadata: Any, **items: Any) -> Any:
    result = collections.OrderedDict(items)
    if metadata is not None:
        result._metadata = metadata  # type: ignore[attr-defined]
    return result


T = torch.ones(6)
LONG = "x" * (SPILL_BYTES + 5)
NEARLY_THE_SAME: dict[str, tuple[Any, Any]] = {
    "int and bool": ({"a": 1, "t": T}, {"a": True, "t": T}),
    "int and float": ({"a": 1, "t": T}, {"a": 1.0, "t": T}),
    "keys int and bool": ({1: T}, {True: T}),
    "keys int and str": ({1: T}, {"1": T}),
    "inner keys": ({"a": {0: T}}, {"a": {False: T}}),
    "order of keys": ({"a": {"x": 1, "y": 2}}, {"a": {"y": 2, "x": 1}}),
    "zeros": ({"a": 0.0}, {"a": -0.0}),
    "nan payloads": ({"a": _float(0x7FF8000000000000)}, {"a": _float(0x7FF8000000000001)}),
    "complex zeros": ([0j], [-0j]),
    "bytes and bytearray": ([b"ab"], [bytearray(b"ab")]),
    "bytearray in place": ([bytearray(b"ab"), T], [bytearray(b"xy"), T]),
    "enum": ([Color.RED, T], [Color.BLUE, T]),
    "enum and number": ([Color.RED, T], [1, T]),
    "longer text": (["ab", T], ["abc", T]),
    "surrogate": (["ab", T], ["a\ud800", T]),
    "big number": ([1, T], [2**60, T]),
    "list and tuple": ([[T]], [(T,)]),
    "dict and ordered": ({"a": {"t": T}}, {"a": _ordered(None, t=T)}),
    "metadata": ([_ordered({"": {"version": 1}}, t=T)], [_ordered({"": {"version": 2}}, t=T)]),
    "metadata gone": ([_ordered({"": 1}, t=T)], [_ordered(None, t=T)]),
    "metadata moves": ([_ordered(1, t=T), _ordered(None, t=T)], [_ordered(None, t=T), _ordered(1, t=T)]),
    "texts become long": ([["x" * 60] * 1000, T], [["x" * 70] * 1000, T]),
    "sets become long": ([[{"x" * 60}] * 1000, T], [[{"x" * 70}] * 1000, T]),
    "where a list ends": ([[1, 2], [3]], [[1], [2, 3]]),
    "where a dict ends": ([{"a": 1, "b": 2}, {"c": 3}], [{"a": 1}, {"b": 2, "c": 3}]),
    "one item fewer": ([T, 1, []], [T, 1]),
    "empty to full": ([T, []], [T, [2]]),
    "set": ([{1, 2}, T], [{1, 3}, T]),
    "deque": ([collections.deque([1], 4), T], [collections.deque([1], 5), T]),
    "named tuple": ([Pair(1, 2), T], [Pair(1, 3), T]),
    "named tuple of tensors": ([Pair(T, 2)], [Pair(T, 3)]),
    "text becomes long": (["x", T], [LONG, T]),
    "long text changes": ([LONG, T], [LONG.replace("x", "y"), T]),
    "long text grows": ([LONG, T], [LONG + "x", T]),
    "long text becomes bytes": ([LONG, T], [LONG.encode(), T]),
    "long list changes": ([[1] * 9000, T], [[1] * 8999 + [2], T]),
    "long list beside a number": ([[1] * 9000, 5, T], [[1] * 8999 + [2], 5, T]),
    "long floats beside a number": ([[0.0] * 9000, 5, T], [[0.0] * 8999 + [-0.0], 5, T]),
    "bytes become long": ([b"x", T], [LONG.encode(), T]),
    "long list of true": ([[1] * 9000, T], [[1] * 8999 + [True], T]),
    "long list grows": ([[1] * 9000, T], [[1] * 9001, T]),
    "list becomes long": ([[1] * 9, T], [[1] * 9000, T]),
    "long set in a list": ([[{1}, *[0] * 9000], T], [[{2}, *[0] * 9000], T]),
    "long list shrinks": ([[0.5] * 2731, T], [[0.5] * 2730, T]),
    "long list is emptied": ([[0.5] * 2731, T], [[], T]),
    "long list of its own": ([[0.5] * 2731, [0.5] * 2730, T], [[0.5] * 2730, [0.5] * 2731, T]),
    "long list inside a plain dict": ([{"a": [[1], [2] * 2730]}, T], [{"a": [[1], [2] * 2731]}, T]),
    "long together": ([{"a": [1] * 2000, "b": [1] * 700}, T], [{"a": [1] * 2000, "b": [1] * 800}, T]),
    "long list rotates": ([[*range(3000)], T], [[*range(1, 3000), 0], T]),
    "long set": ([{*range(3000)}, T], [{*range(1, 3001)}, T]),
    "long text in a plain list": ([["x"], T], [[LONG], T]),
    "first tensor of a list": ([[1, 2], T], [[1, T * 2], T]),
    "first tensor of an empty list": ([[], T], [[T * 2], T]),
    "first tensor of a dict": ([{"a": {}}, T], [{"a": {"b": T * 2}}, T]),
    "first array of a tuple": ([((1, 2),), T], [((1, np.ones(2)),), T]),
    "first tensor of a deque": ([collections.deque([1]), T], [collections.deque([T * 2]), T]),
    "key of a plain dict": ([{"a": {"b": 1}}, T], [{"a": {"b": 1, (2, "c"): 3}}, T]),
    "int and bool inside": ([[[1], {"a": 0}], T], [[[True], {"a": False}], T]),
    "keys int and bool inside": ([[{1: 2}], T], [[{True: 2}], T]),
    "nested tuples": ([((1, (2, ())),), T], [((1, (2, (3,))),), T]),
    "plain to other": ([None, T], [{"best": [0.5]}, T]),
    "zeros inside": ([[{"a": 0.0}], T], [[{"a": -0.0}], T]),
    "nan payloads inside": ([[_float(0x7FF8000000000000)], T], [[_float(0x7FF0000000000001)], T]),
    "big number inside": ([[1, 2], T], [[1, 2**53], T]),
    "all plain": ([[1], {"a": 2}], [[1, 2], {}]),
    "array": ([np.arange(4), T], [np.arange(4) + 1, T]),
    "array dtype": ([np.arange(4, dtype="<i4"), T], [np.arange(4, dtype="<u4"), T]),
    "array order": ([np.ones((2, 3)), T], [np.asfortranarray(np.ones((2, 3))), T]),
    "array shape": ([np.ones((2, 3)), T], [np.ones((3, 2)), T]),
    "array and scalar": ([np.float32(1), T], [np.float64(1), T]),
    "dtype": ([torch.ones(4)], [torch.ones(4, dtype=torch.int32)]),
    "shape": ([torch.ones(2, 3)], [torch.ones(3, 2)]),
    "stride": ([torch.ones(2, 3)], [torch.ones(3, 2).t()]),
    "offset": ([torch.arange(9.0)[1:5], T], [torch.arange(9.0)[2:6], T]),
    "storage size": ([torch.arange(9.0)[:4]], [torch.arange(5.0)[:4]]),
    "gaps": ([torch.arange(9.0)[::2]], [torch.arange(9.0)[:5]]),
    "gaps move": ([torch.arange(9.0)[::2]], [torch.arange(9.0).neg()[::2]]),
    "parameter": ([torch.ones(3)], [torch.nn.Parameter(torch.ones(3), requires_grad=False)]),
    "requires grad": ([torch.ones(3)], [torch.ones(3, requires_grad=True)]),
    "negated": ([torch.ones(3)], [torch.view_as_complex(torch.ones(3, 2)).conj().imag]),
    "conjugated": ([torch.ones(3) * 1j], [(torch.ones(3) * 1j).conj()]),
    "empty": ([torch.ones(3), torch.ones(0)], [torch.ones(0), torch.ones(3)]),
    "tied": (_tied(0, 1, 2), _tied(0, 1, 1)),
    "tied otherwise": (_tied(0, 0, 1), _tied(0, 1, 1)),
    "untied": (_tied(0, 0), _tied(0, 1)),
    "views": (_views((2, 3), (6,)), [torch.ones(2, 3), torch.ones(6)]),
    "tensor and number": ([torch.ones(())], [1.0]),
    "tensor and array": ([torch.ones(3)], [np.ones(3, dtype=np.float32)]),
    "top": ([T], {"a": T}),
    "top key": ({"a": T}, {"b": T}),
    "top type": ({"a": T}, _ordered(None, a=T)),
}  # fmt: skip


@pytest.mark.parametrize("name", NEARLY_THE_SAME)
def test_what_is_nearly_the_same_is_not_taken_for_the_same(name: str) -> None:
    """There and back again: each of the two states is planned as from scratch after the other."""
    cache = PlanCache()
    one, other = NEARLY_THE_SAME[name]
    for state in (one, other, other, one):
        assert_planned_alike(cache, state)


def plain_trees() -> st.SearchStrategy[Any]:
    """Values without tensors or arrays, of every kind that docs/format.md lists, all of them small."""

    def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        items, dicts = st.lists(inner, max_size=4), st.dictionaries(keys(), inner, max_size=4)
        return st.one_of(
            items,
            items.map(tuple),
            items.map(collections.deque),
            dicts,
            dicts.map(collections.OrderedDict),
            dicts.map(lambda pairs: collections.defaultdict(list, pairs)),
            st.sets(keys(), max_size=4),
            st.builds(Pair, inner, inner),
            st.lists(doubles(), max_size=9),
            st.lists(st.integers(-(2**53), 2**53), max_size=9),
        )

    return st.recursive(scalars() | st.binary(max_size=3).map(bytearray), containers, max_leaves=9)


@given(data=st.data())
def test_plain_values_may_become_any_others(data: st.DataObject) -> None:
    """Whatever stands where there is no tensor, alone or deep inside: one plan serves, and each snapshot is right."""
    cache = PlanCache()
    memos = []
    pool = data.draw(st.lists(plain_trees(), min_size=1, max_size=4))
    for _ in range(data.draw(st.integers(2, 5))):
        one, two, three = (data.draw(st.sampled_from(pool)) for _ in range(3))
        state = {"one": one, "in": {"t": T, "two": two, "deep": [(np.ones(2), three), _ordered({"v": one}, t=T)]}}
        memos.append(assert_planned_alike(cache, state).plan.memo)
    assert all(memo is memos[0] for memo in memos)


def test_a_history_grows_without_another_plan() -> None:
    """Up to what the manifest holds itself, a list may grow, shrink, be emptied; at the limit the plan is another."""
    cache = PlanCache()
    groups = [{"lr": 0.5, "betas": (0.9, 0.99), "params": [0, 1]}]
    memos = []
    limit = (SPILL_BYTES - 24 - len("losses") - len("best") - 6) // 24
    for length in (0, 1, 2, 700, 3, 0, limit, limit - 1, limit + 1, limit + 2, limit + 3, limit, 5):
        curve: dict[str, Any] = {
            "losses": [1 / (number + 1) for number in range(length)],
            "best": None if length < 3 else (length, {}),
        }
        groups[0]["lr"] = 0.1 * length
        groups[0]["params"] = list(range(length % 5))
        memos.append(assert_planned_alike(cache, {"m": [T], "curve": curve, "opt": {0: T, "groups": groups}}).plan.memo)
    numbers = [memos.index(memo) for memo in memos]
    assert numbers[:8] == [0] * 8, "one plan below the limit"
    assert numbers[8:11] == [8, 9, 10], "a plan for each size above it"
    assert numbers[11:] == [11, 11]


def test_values_come_to_rest_and_change_again() -> None:
    """A value is right in each snapshot, however long it stayed the same before it changed."""
    cache = PlanCache()
    memos = []
    for step in range(4 * CALM_SNAPSHOTS):
        slow = step // (CALM_SNAPSHOTS + 2)
        state = {"t": T, "slow": [slow], "very": {"slow": slow // 2}, "fast": step, "kind": Color.RED, "seen": {slow}}
        memos.append(assert_planned_alike(cache, state).plan.memo)
    assert all(memo is memos[0] for memo in memos)


@given(items=st.lists(doubles()) | st.lists(st.integers(-(2**53) - 1, 2**53 + 1)) | st.lists(st.booleans()))
def test_numbers_in_bulk_are_encoded_as_one_by_one(items: list[Any]) -> None:
    """Lists of one type have the nodes that their items have, bit for bit; so have tuples."""
    expected = [encode_scalar(item) for item in items]
    nodes = [tree.node for tree in flatten({"list": items, "tuple": tuple(items)}, chunk_size_bytes=CHUNK).plan.trees]
    assert jsontext.encode(nodes) == jsontext.encode([expected, {"tuple": expected}])


@pytest.mark.parametrize("odd", [0.5, 1, True, None])
def test_bulk_counts_as_much_as_one_by_one(odd: Any) -> None:
    """Where a list becomes too long for the manifest does not depend on how it was encoded."""
    for length, spilled in ((2730, False), (2731, True)):
        for items in ([0.5] * (length - 1) + [odd], [1] * (length - 1) + [odd]):
            node = flatten([items], chunk_size_bytes=CHUNK).plan.trees[0].node[0]
            assert (type(node) is dict and "json" in node) is spilled


def test_trained_storages_are_looked_at_again() -> None:
    """When a parameter is frozen or thawed, small tensors are packed anew."""
    tensors = [torch.ones(4), torch.ones(4)]
    cache = PlanCache()
    for trained in (frozenset[int](), frozenset({tensors[1].untyped_storage().data_ptr()}), frozenset[int]()):
        assert_planned_alike(cache, {"m": tensors}, trainable=trained)


def test_random_states_come_and_go() -> None:
    """With and without generator states, and another chunk size: none is taken for another."""
    cache, rng = PlanCache(), {"torch": torch.get_rng_state(), "python": (3, (1, 2), None)}
    for how in ({"rng": rng}, {}, {"rng": rng}, {"rng": {**rng, "python": (3, (1, 3), None)}}):
        assert_planned_alike(cache, {"t": T}, **how)
    other = cache.flatten({"t": torch.ones(90_000)}, chunk_size_bytes=CHUNK)
    bigger = cache.flatten({"t": torch.ones(90_000)}, chunk_size_bytes=2 * CHUNK)
    assert (other.plan.chunk_size_bytes, bigger.plan.chunk_size_bytes) == (CHUNK, 2 * CHUNK)


# --- training ---------------------------------------------------------------------------------------------------------


def _training() -> tuple[torch.nn.Module, torch.optim.Optimizer, Any]:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    return model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


def test_a_training_run_is_planned_once() -> None:
    """Steps change numbers, learning rates, histories and memory: one plan serves them all, and each is right."""
    model, optimizer, scheduler = _training()
    cache = PlanCache()
    memos = []
    losses: list[float] = []
    for step in range(6):
        losses.append(random.random())
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        scheduler.step()
        if step == 3:  # a storage of another place
            model[0].weight.data = model[0].weight.data.clone()
        state = {"model": model.state_dict(), "opt": optimizer.state_dict(), "sched": scheduler.state_dict()}
        state["curve"] = {"losses": losses}
        rng = {"python": random.getstate(), "torch": torch.get_rng_state(), "numpy": np.random.get_state(legacy=False)}
        memos.append(assert_planned_alike(cache, state, rng=rng).plan.memo)
    assert all(memo is memos[0] for memo in memos)


def test_a_plan_is_the_same_object_while_no_value_changes() -> None:
    """What is worked out of a plan can be kept with it."""
    cache = PlanCache()
    first, second = ({"t": torch.full((9,), value), "n": 3} for value in (1.0, 2.0))
    plan = cache.flatten(first, chunk_size_bytes=CHUNK).plan
    assert cache.flatten(second, chunk_size_bytes=CHUNK).plan is plan
    changed = cache.flatten({**second, "n": 4}, chunk_size_bytes=CHUNK).plan
    assert changed.values != plan.values
    assert changed.memo is plan.memo
    assert [tree.node for tree in plan.trees][1] == 3, "an earlier plan keeps its own values"


def test_nothing_of_the_state_is_kept_alive() -> None:
    """The memory holds no tensor and no storage, after the first capture and after the next."""
    cache = PlanCache()
    for _ in range(2):
        tensor = torch.ones(1000)
        captured = cache.flatten({"a": tensor, "gaps": tensor[::2].t()}, chunk_size_bytes=CHUNK)
        storage = tensor.untyped_storage()._weak_ref()
        assert len(captured.sources) == 1
        del captured, tensor
        gc.collect()
        assert torch.UntypedStorage._expired(storage)
        torch.UntypedStorage._free_weak_ref(storage)  # type: ignore[no-untyped-call]


def test_sources_keep_storages_alive() -> None:
    """Until the sources are dropped, memory that they point to is not given back, whatever training does."""
    cache = PlanCache()
    for _ in range(2):
        tensor = torch.full((1000,), 5.0)
        captured = cache.flatten([tensor], chunk_size_bytes=CHUNK)
        tensor.set_(torch.zeros(1000).untyped_storage())
        assert staged(captured) == [torch.full((1000,), 5.0).numpy().tobytes()]


def test_errors_are_those_of_planning_from_scratch() -> None:
    """What cannot be stored is refused by name after a good capture, and the next good one is right."""
    cache = PlanCache()
    cycle: list[Any] = [1, torch.ones(3)]
    cycle[0] = cycle
    freed = torch.ones(3)
    freed.untyped_storage().resize_(0)
    shrunk = torch.ones(3)
    shrunk.untyped_storage().resize_(8)
    deep: Any = 1
    for _ in range(200):
        deep = [deep]
    for bad in (
        object(),
        torch.eye(3).to_sparse(),
        torch.ones(3, device="meta"),
        cycle,
        freed,
        shrunk,
        {"x": {object()}},
        deep,
    ):
        assert_planned_alike(cache, {"m": [torch.ones(3), 1]})
        with pytest.raises(UsageError) as with_memory:
            cache.flatten({"m": [bad, 1]}, chunk_size_bytes=CHUNK)
        with pytest.raises(UsageError) as without:
            flatten({"m": [bad, 1]}, chunk_size_bytes=CHUNK)
        assert str(with_memory.value) == str(without.value)


def test_containers_may_be_shared_but_not_hold_themselves() -> None:
    """A plain list in two places is stored twice; one that gets itself, or what it is in, is refused as ever."""
    cache = PlanCache()
    for closes in (False, True):
        shared: list[Any] = [1, 2]
        outer: dict[str, Any] = {"t": T, "one": shared, "two": [shared, (shared,)]}
        assert_planned_alike(cache, {"m": outer})
        shared.append(3)
        assert_planned_alike(cache, {"m": outer})
        shared.append(outer if closes else shared)
        with pytest.raises(UsageError) as with_memory:
            cache.flatten({"m": outer}, chunk_size_bytes=CHUNK)
        with pytest.raises(UsageError) as without:
            flatten({"m": outer}, chunk_size_bytes=CHUNK)
        assert with_memory.value.kind == without.value.kind == "cycle"
        assert str(with_memory.value) == str(without.value)


def test_plain_values_are_as_deep_as_from_scratch() -> None:
    """The limit of depth counts the containers around a value that changed."""
    cache = PlanCache()
    deep: Any = []
    for _ in range(MAX_DEPTH - 2):
        deep = [deep]
    assert_planned_alike(cache, {"m": [T, 1]})
    assert_planned_alike(cache, {"m": [T, deep]})
    with pytest.raises(UsageError) as error:
        cache.flatten({"m": [T, [deep]]}, chunk_size_bytes=CHUNK)
    assert error.value.kind == "too_deep"


def test_collection_of_garbage_goes_on_as_it_was() -> None:
    """Capturing pauses Python's collector and leaves it as it found it, also when it raises."""
    for enabled in (True, False):
        (gc.enable if enabled else gc.disable)()
        try:
            PlanCache().flatten([T], chunk_size_bytes=CHUNK)
            with pytest.raises(UsageError):
                PlanCache().flatten([object()], chunk_size_bytes=CHUNK)
            assert gc.isenabled() is enabled
        finally:
            gc.enable()


# --- sources ----------------------------------------------------------------------------------------------------------


def _mixed() -> list[Any]:
    base = torch.arange(50_000, dtype=torch.float32)
    return [base, torch.ones(3, dtype=torch.uint8), np.arange(7), LONG, base[::2].clone()[::3], *_tied(0, 1, 0)]


@pytest.mark.parametrize("window", [1 << 16, 3 << 16, 1 << 20])
def test_windows_hold_what_the_whole_holds(window: int) -> None:
    """Columns are cut at any border: window after window stages the same bytes."""
    cache = PlanCache()
    for _ in range(2):
        captured = cache.flatten(_mixed(), chunk_size_bytes=CHUNK)
        size = captured.plan.size_bytes
        whole = torch.zeros(size, dtype=torch.uint8)
        stage(captured.sources, whole, 0, size, Devices())
        for base in range(0, size, window):
            end = min(base + window, size)
            part = torch.zeros(window, dtype=torch.uint8)
            stage(captured.sources, part, base, end, Devices())
            assert torch.equal(part[: end - base], whole[base:end])


def test_sources_one_by_one_are_those_of_the_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the compiled core, and for a part of the rows, the same bytes are staged."""
    captured = PlanCache().flatten(_mixed(), chunk_size_bytes=CHUNK)
    sources, expected = captured.sources, staged(captured)
    owned = sources.storage_addresses() != 0
    assert [source.flat is not None and isinstance(source.flat, torch.Tensor) for source in sources] == owned.tolist()
    payload = torch.full((captured.plan.size_bytes,), 0x7F, dtype=torch.uint8)
    for part in (sources.select(~owned), sources.select(np.flatnonzero(owned)), sources[:0]):
        stage(part, payload, 0, captured.plan.size_bytes, Devices())
    assert [payload[r.address :][: r.size_bytes].numpy().tobytes() for r in captured.plan.regions] == expected
    monkeypatch.setattr(native, "core", None)
    assert staged(captured) == expected


@pytest.mark.skipif(native.core is None, reason="the native core is not in use")
def test_memory_that_is_too_small_is_not_written_past() -> None:
    """Addresses are checked before the compiled core, which trusts them, gets any."""
    captured = flatten([torch.ones(5000)], chunk_size_bytes=CHUNK)
    with pytest.raises(ValueError, match="do not fit"):
        stage(captured.sources, torch.zeros(100, dtype=torch.uint8), 0, captured.plan.size_bytes, Devices())


# --- manifests --------------------------------------------------------------------------------------------------------

WORDS = st.text(st.characters(codec="utf-8"), max_size=6)
NODES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | WORDS
    | st.sampled_from(["\0hole 0", '"\0hole 1"', "\0hole  2", '\\"\0hole 0']),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner),
    max_leaves=12,
)  # fmt: skip


@given(before=NODES, after=NODES, fillings=st.lists(NODES, min_size=3, max_size=3))
def test_a_filled_template_is_the_text_of_the_filled_value(before: Any, after: Any, fillings: list[Any]) -> None:
    """Holes anywhere, once or several times, beside text that looks like the marks in between."""

    def around(one: Any, two: Any, three: Any) -> Any:
        return {"a": [before, one, {"b": two}], "c": three, "d": after, "e": [two]}

    template = jsontext.encode_template(around(Hole(0), Hole(1), Hole(2)))
    texts = [jsontext.encode(item) for item in fillings]
    assert template.fill(texts) == jsontext.encode(around(*fillings))


@given(
    items=st.lists(NODES | st.integers(0, 2).map(Hole), max_size=9), fillings=st.lists(NODES, min_size=3, max_size=3)
)
def test_a_list_in_batches_is_the_list(items: list[Any], fillings: list[Any]) -> None:
    """A list is encoded batch by batch, and put into a text, as if at once."""
    texts = [jsontext.encode(item) for item in fillings]
    filled = [fillings[item.number] if isinstance(item, Hole) else item for item in items]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsontext, "_BATCH_ITEMS", 2)
        listed = jsontext.encode_list_template(iter(items))
    assert listed.fill(texts) == jsontext.encode(filled)
    outer = jsontext.encode_template({"a": Hole(1), "b": Hole(7), "c": Hole(0)}).insert(7, listed)
    assert outer.fill(texts) == jsontext.encode({"a": fillings[1], "b": filled, "c": fillings[0]})


def test_a_template_refuses_what_a_text_refuses() -> None:
    """Floats, huge numbers, lone surrogates, depth and objects are errors, hole or no hole."""
    deep: Any = Hole(0)
    for _ in range(jsontext.MAX_DEPTH + 1):
        deep = [deep]
    for value in (1.5, 2**53, "\ud800", deep, object()):
        with pytest.raises(ValueError, match=r"."):
            jsontext.encode_template([Hole(0), value])


def test_a_manifest_of_several_parts_is_split_where_it_always_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond one part's size the manifest is encoded from values, with the same cuts."""
    captured = flatten(
        {"m": [torch.ones(3, dtype=torch.uint8) for _ in range(50)], "n": [1, 2]}, chunk_size_bytes=CHUNK
    )
    digests = [digest(data) for data in staged(captured)]
    for target in (1 << 20, 3000, 100):
        monkeypatch.setattr(describing, "PART_TARGET_BYTES", target)
        described = describe(captured.plan, SNAPSHOT, digests, PROGRESS, {})
        whole = full_manifest(captured.plan, SNAPSHOT, digests, PROGRESS, {})
        assert described.encoded == manifest.encode(whole, part_target_bytes=target)
        assert described.raw_bytes == whole.raw_bytes == 150
