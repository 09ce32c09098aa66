"""Plain values: what is kept to the last bit, what is refused by name, and that refusing writes nothing."""

from __future__ import annotations

import collections
import enum
import functools
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ciuic_async
from ciuic_async import CiuicWarning, NotFoundError, UsageError
from ciuic_async.capture.state_tree import MAX_DEPTH, flatten
from ciuic_async.capture.values import NOT_PLAIN, encode_scalar
from tests.strategies import fingerprint


class Custom:
    pass


class MyDict(dict[str, int]):
    pass


class MyList(list[int]):
    pass


class MyStr(str):
    __slots__ = ()


class MyInt(int):
    pass


class MyTuple(tuple[int, ...]):
    __slots__ = ()


class Loose(enum.IntFlag, boundary=enum.KEEP):
    A = 1


class HostileText:
    """A key that cannot even be printed."""

    def __str__(self) -> str:
        raise RuntimeError("no")


def _with_attribute() -> collections.OrderedDict[str, int]:
    value: collections.OrderedDict[str, int] = collections.OrderedDict()
    value.note = 1  # type: ignore[attr-defined]
    return value


def _cycle() -> list[Any]:
    inner: list[Any] = []
    inner.append({"again": inner})
    return inner


def _deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


REFUSED: list[tuple[str, Any, str, str]] = [
    ("object", Custom(), "unsupported_type", "Custom"),
    ("lambda", lambda: 0, "unsupported_type", "function"),
    ("class", Custom, "unsupported_type", "type"),
    ("module", sys, "unsupported_type", "module"),
    ("partial", functools.partial(int), "unsupported_type", "partial"),
    ("generator", (n for n in range(2)), "unsupported_type", "generator"),
    ("torch generator", torch.Generator(), "unsupported_type", "Generator"),
    ("object array", np.array([object()], dtype=object), "unsupported_type", "object"),
    ("record array", np.zeros(2, dtype=[("a", "i4")]), "unsupported_type", "ndarray"),
    ("array subclass", np.ma.masked_array([1]), "unsupported_type", "MaskedArray"),
    ("dict subclass", MyDict(), "unsupported_type", "MyDict"),
    ("counter", collections.Counter("aab"), "unsupported_type", "Counter"),
    ("list subclass", MyList(), "unsupported_type", "MyList"),
    ("str subclass", MyStr("a"), "unsupported_type", "MyStr"),
    ("int subclass", MyInt(1), "unsupported_type", "MyInt"),
    ("tuple subclass", MyTuple(), "unsupported_type", "MyTuple"),
    ("enum without a name", Loose(6), "unsupported_type", "Loose"),
    ("own factory", collections.defaultdict(lambda: 0), "unsupported_type", "defaultdict"),
    ("ordered dict with attributes", _with_attribute(), "unsupported_type", "OrderedDict"),
    ("mapping proxy", types.MappingProxyType({}), "unsupported_type", "mappingproxy"),
    ("cycle", _cycle(), "cycle", "cycle"),
    ("too deep", _deep(1000), "too_deep", str(MAX_DEPTH)),
    ("object as a key", {Custom(): 1}, "unsupported_type", "Custom"),
    ("unprintable key", {HostileText(): 1}, "unsupported_type", "HostileText"),
    ("tensor as a key", {torch.ones(1): 1}, "unsupported_type", "key"),
]


@pytest.mark.parametrize(("value", "kind", "says"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_is_unknown_is_refused_by_path_and_type(value: Any, kind: str, says: str, tmp_path: Path) -> None:
    """A UsageError names where it is and what it is; not a byte is written, not even a folder."""
    with pytest.raises(UsageError) as refusal:
        ciuic_async.save({"good": torch.ones(3), "run": {"bad": [0, value]}}, tmp_path / "chain")
    assert refusal.value.kind == kind
    assert str(refusal.value).startswith("run.bad.1")
    assert says in str(refusal.value)
    assert not (tmp_path / "chain").exists()


def test_a_refusal_leaves_an_existing_chain_alone(tmp_path: Path) -> None:
    """The folder has the same files with the same bytes as before the refused call."""
    chain = tmp_path / "chain"
    ciuic_async.save({"a": 1}, chain)
    before = {path: path.read_bytes() for path in chain.rglob("*") if path.is_file()}
    for bad in (Custom(), _cycle(), _deep(1000)):
        with pytest.raises(UsageError):
            ciuic_async.save({"a": bad}, chain)
    with pytest.raises(UsageError):
        ciuic_async.save({"a": 1}, chain, tags="one")
    with pytest.raises(UsageError):
        ciuic_async.save({"a": 1}, chain, metrics={"loss": "low"})
    assert {path: path.read_bytes() for path in chain.rglob("*") if path.is_file()} == before


def test_training_goes_on_after_a_refusal_and_the_next_snapshot_works(tmp_path: Path) -> None:
    """on_error="warn": a warning names the path; once the object is gone the next snapshot is durable."""
    state: dict[str, Any] = {"run": {"bad": Custom()}, "w": torch.ones(4)}
    with ciuic_async.Checkpointer(tmp_path / "chain", state, every_steps=1) as ckpt:
        for _ in range(4):  # more often than there are slots: none is lost by a refusal
            with pytest.warns(CiuicWarning, match=r"run\.bad: .*Custom"):
                pending = ckpt.step()
            assert pending is not None
            assert pending.phase == "failed"
        del state["run"]["bad"]
        pending = ckpt.step()
        assert pending is not None
        assert pending.wait_durable(30).step == 5
    assert len(ciuic_async.SnapshotChain(tmp_path / "chain")) == 1


def test_depth_is_bounded_at_a_known_number(tmp_path: Path) -> None:
    """MAX_DEPTH containers inside each other come back; one more is refused."""
    deepest = _deep(MAX_DEPTH)
    ciuic_async.save(deepest, tmp_path / "chain")
    assert ciuic_async.load(tmp_path / "chain") == deepest
    with pytest.raises(UsageError, match="deeper"):
        flatten(_deep(MAX_DEPTH + 1), chunk_size_bytes=1 << 20)


LONG = 70_000
KEPT: list[tuple[str, Any]] = [
    ("long str", "ä" * LONG),
    ("long str with surrogates", "\ud800" * LONG),
    ("long bytes", bytes(range(256)) * 400),
    ("long bytearray", bytearray(LONG)),
    ("long list", list(range(LONG))),
    ("long dict", {n: str(n) for n in range(LONG // 4)}),
    ("long set", set(range(LONG))),
    ("long list beside a tensor", [torch.ones(2), list(range(LONG))]),
    ("huge int", -(10**6000)),
    ("huge int as a key", {10**6000: 1}),
    ("keys of one value and several types", {1: "int", "1": "str", (1,): "tuple", 1.5: "float", None: 0}),
    ("nan as a key", {float("nan"): 1}),
    ("numpy text with zeros at its end", [np.str_("a\0"), np.bytes_(b"a\0\0")]),
    ("numpy big-endian array", np.arange(5, dtype=">i4")),
    ("numpy 0-dim", np.array(3.5)),
    ("numpy empty", np.empty((0, 3), dtype="<f4")),
    ("numpy not a time", np.datetime64("NaT")),
    ("read-only array", np.frombuffer(b"\1\2\3\4", dtype=np.uint16)),
    ("negative zero", [-0.0, complex(-0.0, 0.0), np.float32(-0.0)]),
    ("bool is no int", [True, 1, False, 0]),
    ("sizes", [torch.Size([]), torch.Size([2, 3]), torch.Size([2**60])]),
    ("numpy times", [np.datetime64("2026-01-01", ("s", 25)), np.timedelta64(7, "D"), np.dtype("M8")]),
    ("ranges", [range(0), range(10**20, 10**21, 10**19)]),
]


@pytest.mark.parametrize("value", [row[1] for row in KEPT], ids=[row[0] for row in KEPT])
def test_a_plain_value_comes_back_exactly(value: Any, tmp_path: Path) -> None:
    """Long, huge and odd values keep type and bits."""
    ciuic_async.save({"v": value}, tmp_path / "chain")
    assert fingerprint(ciuic_async.load(tmp_path / "chain")["v"]) == fingerprint(value)


def test_long_plain_values_do_not_fill_the_manifest(tmp_path: Path) -> None:
    """A list of 10^6 numbers and a text of 10 MB lie in chunks; the manifest stays small enough to read."""
    ciuic_async.save({"seen": list(range(10**6)), "text": "x" * 10**7}, tmp_path / "chain")
    parts = list((tmp_path / "chain" / "manifests").glob("*/*.json"))
    assert sum(path.stat().st_size for path in parts) < 10_000


def test_an_enum_is_not_imported(tmp_path: Path) -> None:
    """An enum whose module is gone is a NotFoundError that says what to import; a named tuple becomes a new type."""
    module = types.ModuleType("ciuic_test_colors")
    vars(module)["Color"] = enum.Enum("Color", {"RED": 1}, module=module.__name__)
    vars(module)["Pair"] = collections.namedtuple("Pair", ["a", "b"], module=module.__name__)
    sys.modules[module.__name__] = module
    try:
        ciuic_async.save({"enum": module.Color.RED, "pair": module.Pair(1, 2)}, tmp_path / "chain")
        assert ciuic_async.load(tmp_path / "chain")["enum"] is module.Color.RED
        assert type(ciuic_async.load(tmp_path / "chain")["pair"]) is module.Pair
    finally:
        del sys.modules[module.__name__]
    with pytest.raises(NotFoundError, match="ciuic_test_colors") as missing:
        ciuic_async.load(tmp_path / "chain")
    assert missing.value.kind == "enum_not_loaded"
    pair = ciuic_async.load(tmp_path / "chain", only="pair")["pair"]
    assert (type(pair).__name__, pair._fields, tuple(pair)) == ("Pair", ("a", "b"), (1, 2))
    assert module.__name__ not in sys.modules


def test_containers_are_not_scalars() -> None:
    """encode_scalar leaves what holds other values to the walk over containers."""
    containers: list[Any] = [[], {}, (), set(), torch.ones(1), np.ones(1), slice(1)]
    for value in containers:
        assert encode_scalar(value) is NOT_PLAIN


def test_two_references_to_one_list_become_two_lists(tmp_path: Path) -> None:
    """Sharing is kept for storages of tensors only: plain containers come back by value."""
    inner = [1, 2]
    ciuic_async.save([inner, inner], tmp_path / "chain")
    loaded = ciuic_async.load(tmp_path / "chain")
    assert loaded == [inner, inner]
    assert loaded[0] is not loaded[1]
