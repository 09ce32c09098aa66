"""Nodes that lie: the inflater builds only what docs/format.md lists, and refuses the rest with a typed error."""

from __future__ import annotations

import codecs
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ciuic_async.capture.state_tree import Inflater, decode_plain
from ciuic_async.capture.tensors import empty
from ciuic_async.errors import CiuicError, IntegrityError, NotFoundError
from ciuic_async.format import jsontext
from ciuic_async.format.dtypes import ITEM_SIZE_BYTES
from ciuic_async.format.manifest import Shard, StoredTensor

JSON_IN_A_CIRCLE = b'{"json":4}'
CONTENTS = [b"\0" * 24, b"abcd", b"", b"\xff\xfe", JSON_IN_A_CIRCLE]


def _inflater() -> Inflater:
    """Tensor 0 is a float32 of shape 2x3; 1 to 4 are bytes: text, nothing, no UTF-8, JSON that names itself."""
    stored = [
        StoredTensor(
            ("t",), "float32" if not n else "uint8", (2, 3) if not n else (len(data),), "cpu", (Shard((0,), (0,)),)
        )
        for n, data in enumerate(CONTENTS)
    ]

    def load(index: int) -> torch.Tensor:
        tensor = empty(stored[index].shape, getattr(torch, stored[index].dtype), "cpu")
        if CONTENTS[index]:
            flat = torch.frombuffer(bytearray(CONTENTS[index]), dtype=torch.uint8)
            tensor.view(-1).view(torch.uint8).copy_(flat)
        return tensor

    return Inflater(tuple(stored), load)


def _view(**changes: Any) -> dict[str, Any]:
    view = {"dtype": "float32", "shape": [2, 3], "stride": [3, 1], "offset_elements": 0} | changes
    return {"tensor": 0, "view": {key: value for key, value in view.items() if value is not None}}


def _nested(levels: int, wrap: Callable[[Any], Any]) -> Any:
    node: Any = 0
    for _ in range(levels):
        node = wrap(node)
    return node


MALFORMED: dict[str, Any] = {
    "float in the JSON": 1.5,
    "no tag": {},
    "unknown tag": {"object": "os:system"},
    "two tags": {"tuple": [], "set": []},
    "a field too many": {"tuple": [], "maxlen": 1},
    "a scalar with a field too many": {"int": "0x20000000000000", "x": 1},
    "items that are no list": {"tuple": {}},
    "dict of no pairs": {"dict": [1]},
    "dict of triples": {"dict": [[1, 2, 3]]},
    "dict with a key twice": {"dict": [["a", 1], ["a", 2]]},
    "dict with a list as key": {"dict": [[[], 1]]},
    "dict with a dict as key": {"dict": [[{"dict": []}, 1]]},
    "set of lists": {"set": [[]]},
    "metadata on a dict": {"dict": [], "metadata": 1},
    "small int as hex": {"int": "0x1"},
    "int with leading zeros": {"int": "0x0020000000000000"},
    "int in words": {"int": "twelve"},
    "int of a list": {"int": []},
    "float too short": {"float": "3ff8"},
    "float in capitals": {"float": "3FF8000000000000"},
    "float of a number": {"float": 1},
    "complex of three": {"complex": ["3ff8000000000000"] * 3},
    "complex of a number": {"complex": 7},
    "str_hex of no hex": {"str_hex": "xy"},
    "str_hex of no text": {"str_hex": "ff"},
    "bytes of no base64": {"bytes": "?"},
    "bytes of a list": {"bytes": []},
    "bytes of a tensor that is not bytes": {"bytes": 0},
    "str of a tensor that is no text": {"str": 3},
    "str of a text": {"str": "a"},
    "json of no JSON": {"json": 1},
    "json that contains itself": {"json": 4},
    "json of nothing": {"json": 2},
    "deque of negative length": {"deque": [], "maxlen": -1},
    "deque longer than its maxlen": {"deque": [1, 2], "maxlen": 1},
    "deque without maxlen": {"deque": []},
    "deque with a truth as maxlen": {"deque": [], "maxlen": True},
    "slice of two": {"slice": [1, 2]},
    "slice of nothing": {"slice": []},
    "range with step 0": {"range": [0, 1, 0]},
    "range of two": {"range": [0, 1]},
    "range of texts": {"range": ["a", "b", "c"]},
    "size of texts": {"torch.Size": ["a"]},
    "size of a small int as hex": {"torch.Size": [{"int": "0x1"}]},
    "dtype that is a function": {"torch.dtype": "load"},
    "dtype that is a module": {"torch.dtype": "nn"},
    "dtype of a list": {"torch.dtype": []},
    "layout that is a dtype": {"torch.layout": "float32"},
    "device of no kind": {"torch.device": "toaster"},
    "device number too large": {"torch.device": "cuda:99999999999999999999"},
    "device of a number": {"torch.device": 1},
    "numpy dtype object": {"numpy.dtype": "|O"},
    "numpy dtype record": {"numpy.dtype": "i4,i4"},
    "numpy dtype sub-array": {"numpy.dtype": "(2,)i4"},
    "numpy dtype not in its own form": {"numpy.dtype": "float32"},
    "numpy dtype of brackets": {"numpy.dtype": "(((("},
    "numpy scalar too short": {"numpy.scalar": "00", "dtype": "<f4"},
    "numpy scalar that is an object": {"numpy.scalar": "00" * 8, "dtype": "|O"},
    "numpy text that is none": {"numpy.scalar": "ffffffff", "dtype": "<U1"},
    "array of no tensor": {"numpy.array": 9, "dtype": "<f4", "shape": [1], "order": "C"},
    "array of objects": {"numpy.array": 1, "dtype": "|O", "shape": [1], "order": "C"},
    "array of another size": {"numpy.array": 1, "dtype": "<f4", "shape": [7], "order": "C"},
    "array of negative size": {"numpy.array": 1, "dtype": "|u1", "shape": [-1], "order": "C"},
    "array of nothing with a shape": {"numpy.array": 2, "dtype": "<f4", "shape": [3], "order": "C"},
    "array in an unknown order": {"numpy.array": 1, "dtype": "<f4", "shape": [1], "order": "K"},
    "array in an order that is a list": {"numpy.array": 1, "dtype": "<f4", "shape": [1], "order": []},
    "array beyond memory": {"numpy.array": 2, "dtype": "<f4", "shape": [0, 2**52, 2**52], "order": "C"},
    "array with half an item": {"numpy.array": 1, "dtype": "<f8", "shape": [1], "order": "C"},
    "tensor index too large": {"tensor": 5},
    "tensor index negative": {"tensor": -1},
    "tensor index a truth": {"tensor": True},
    "tensor index a text": {"tensor": "0"},
    "tensor with a field too many": {"tensor": 0, "device": "cuda"},
    "tensor flag a number": {"tensor": 0, "requires_grad": 1},
    "bytes that require a gradient": {"tensor": 1, "requires_grad": True},
    "parameter of bytes with gradient": {"tensor": 1, "requires_grad": True, "parameter": True},
    "view that is a list": {"tensor": 0, "view": []},
    "view of an unknown dtype": _view(dtype="object"),
    "view of a dtype that is a list": _view(dtype=[]),
    "view without a stride": _view(stride=None),
    "view with a field too many": _view(device="cpu"),
    "view past the end": _view(offset_elements=1),
    "view past the end by its stride": _view(stride=[4, 1]),
    "view past the end by its dtype": _view(dtype="float64"),
    "view of negative offset": _view(offset_elements=-1),
    "view of negative stride": _view(stride=[-3, 1]),
    "view of negative size": _view(shape=[-2, 3]),
    "view of two ranks": _view(stride=[1]),
    "view of 65 dimensions": _view(shape=[1] * 65, stride=[1] * 65),
    "view of too many elements": _view(shape=[2**40, 2**40], stride=[0, 0]),
    "view of overflowing strides": _view(shape=[2, 2**52], stride=[2**52, 2**52]),
    "namedtuple that is no name": {"namedtuple": [], "type": 5, "fields": []},
    "namedtuple with dunder fields": {"namedtuple": [1], "type": "a:B", "fields": ["__class__"]},
    "namedtuple with a keyword": {"namedtuple": [1], "type": "a:B", "fields": ["class"]},
    "namedtuple with code as a field": {"namedtuple": [1], "type": "a:B", "fields": ["x=print()"]},
    "namedtuple with code as a name": {"namedtuple": [1], "type": "a:B(x):\n import os", "fields": ["x"]},
    "namedtuple with a field twice": {"namedtuple": [1, 2], "type": "a:B", "fields": ["x", "x"]},
    "namedtuple with a field twice once normalized": {"namedtuple": [1, 2], "type": "a:B", "fields": ["fi", "\ufb01"]},
    "namedtuple with fields that are numbers": {"namedtuple": [1], "type": "a:B", "fields": [1]},
    "namedtuple with too few values": {"namedtuple": [], "type": "a:B", "fields": ["x"]},
    "namedtuple without a type": {"namedtuple": [], "fields": []},
    "enum that is a function": {"enum": "os:system", "name": "x"},
    "enum without that name": {"enum": "enum:FlagBoundary", "name": "__class__"},
    "enum with a name that is a list": {"enum": "enum:FlagBoundary", "name": []},
    "flag with a name that is a number": {"enum": "re:RegexFlag", "name": 3},
    "flag with unknown names": {"enum": "re:RegexFlag", "name": "IGNORECASE|ROOT"},
    "enum of a list": {"enum": [], "name": "x"},
    "factory that is no type": {"default_dict": [], "factory": "eval"},
    "factory that is a list": {"default_dict": [], "factory": []},
    "factory with a module": {"default_dict": [], "factory": "os.system"},
    "lists inside lists": _nested(390, lambda node: [node]),
    "tuples inside tuples": _nested(300, lambda node: {"tuple": [node]}),
}


@pytest.mark.parametrize("node", MALFORMED.values(), ids=list(MALFORMED))
def test_a_malformed_node_is_refused(node: Any) -> None:
    """Every lie is an IntegrityError of a stable kind (an enum that is not loaded: NotFoundError), never a guess."""
    for name in ("utf-32-le", "utf-32-be"):
        codecs.lookup(name)  # Python loads codecs when they are first used: not what this test looks for
    modules = set(sys.modules)
    with pytest.raises((IntegrityError, NotFoundError)) as refusal:
        _inflater().value(node, "state")
    assert refusal.value.kind in ("malformed_node", "malformed", "enum_not_loaded", "json_syntax", "json_not_canonical")
    assert len(str(refusal.value)) < 1000
    assert set(sys.modules) == modules, "nothing is imported"


def test_the_right_nodes_beside_the_wrong_ones_work() -> None:
    """The table above refuses lies and not the form: the same nodes, told right, give values."""
    inflater = _inflater()
    assert inflater.value({"deque": [1], "maxlen": 1}, "").maxlen == 1
    assert inflater.value({"str": 1}, "") == "abcd"
    assert inflater.value(_view(shape=[3, 2], stride=[1, 3]), "").shape == (3, 2)
    assert inflater.value({"tensor": 0, "parameter": True, "requires_grad": True}, "").requires_grad
    assert inflater.value({"enum": "re:RegexFlag", "name": "IGNORECASE|MULTILINE"}, "") == 10
    assert inflater.value({"range": [0, {"int": "0xde0b6b3a7640000"}, 1]}, "") == range(10**18)
    assert inflater.value({"torch.Size": [2**50, 2**50]}, "") == (2**50, 2**50)
    assert inflater.value({"tensor": 2}, "").shape == (0,)


def test_a_plain_value_cannot_reach_a_tensor() -> None:
    """Epoch, batch and what lies in a JSON chunk hold no tensors, whatever the file says."""
    for node in (
        {"tensor": 0},
        {"str": 0},
        {"json": 0},
        [{"bytes": 0}],
        {"numpy.array": 0, "dtype": "<f4", "shape": [], "order": "C"},
    ):
        with pytest.raises(IntegrityError):
            decode_plain(node)


def test_a_virtual_view_takes_no_memory() -> None:
    """A view with stride 0 may say it has 2^50 elements; nothing is allocated for them."""
    tensor = _inflater().value(_view(shape=[2**50], stride=[0]), "state")
    assert tensor.shape == (2**50,)
    assert tensor.untyped_storage().nbytes() == 24


TAGS = [
    "int float complex str_hex range enum torch.Size torch.dtype torch.layout torch.memory_format torch.device",
    "numpy.dtype numpy.scalar dict tuple set frozenset deque slice ordered_dict default_dict namedtuple numpy.array",
    "str bytes bytearray json tensor name dtype maxlen metadata factory type fields shape order view requires_grad",
    "parameter stride offset_elements",
]
WORDS = st.sampled_from(
    [
        *" ".join(TAGS).split(),
        *ITEM_SIZE_BYTES,
        "<f4",
        "|u1",
        "<M8[ns]",
        "re:RegexFlag",
        "IGNORECASE",
        "a:B",
        "C",
        "F",
        "00",
    ]
)
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 9), st.integers(-(2**53) + 1, 2**53 - 1), WORDS, st.text(max_size=6)
)


def _json() -> st.SearchStrategy[Any]:
    return st.recursive(
        LEAVES,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4),
            st.dictionaries(st.one_of(WORDS, st.text(max_size=4)), inner, max_size=3),
        ),
        max_leaves=12,
    )


def _nodes() -> st.SearchStrategy[Any]:
    """Nodes that have the right fields and anything in them."""
    inner = _json()
    tensor = st.fixed_dictionaries(
        {"tensor": st.integers(-1, 5)}, optional={"requires_grad": inner, "parameter": inner}
    )
    view = st.fixed_dictionaries(
        {
            "tensor": st.integers(0, 4),
            "view": st.fixed_dictionaries(
                {
                    "dtype": st.sampled_from([*ITEM_SIZE_BYTES, "x"]),
                    "shape": st.lists(st.integers(0, 4), max_size=3),
                    "stride": st.lists(st.integers(0, 4), max_size=3),
                    "offset_elements": st.integers(0, 8),
                }
            ),
        },
        optional={"requires_grad": st.booleans(), "parameter": st.booleans()},
    )
    return st.one_of(
        inner,
        tensor,
        view,
        st.builds(lambda tag, value: {tag: value}, WORDS, inner),
        st.fixed_dictionaries({"numpy.array": st.integers(0, 4), "dtype": WORDS, "shape": inner, "order": WORDS}),
        st.fixed_dictionaries(
            {"numpy.scalar": st.text("0123456789abcdef"), "dtype": st.text("<>|=SUVMmfic?0189[]s", max_size=6)}
        ),
        st.fixed_dictionaries({"namedtuple": st.lists(inner), "type": inner, "fields": st.lists(st.text(max_size=3))}),
        st.fixed_dictionaries(
            {"enum": st.sampled_from(["re:RegexFlag", "enum:EnumCheck", "enum:Flag"]), "name": inner}
        ),
    )


@settings(max_examples=400)
@given(node=_nodes())
@example(node={"numpy.dtype": "a"})
@example(node={"numpy.dtype": "<U99999999999999"})
@example(node={"tensor": 0, "view": {"dtype": "bool", "shape": [24], "stride": [1], "offset_elements": 0}})
def test_any_json_gives_a_value_or_a_typed_error(node: Any) -> None:
    """Whatever a file holds, nothing but CiuicError comes out; and no warning of another package."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with suppress(CiuicError):
            assert not isinstance(_inflater().value(node, "state"), type)


@settings(max_examples=100)
@given(node=_json())
def test_any_canonical_json_in_a_chunk_gives_a_value_or_a_typed_error(node: Any) -> None:
    """The same for JSON that lies in a chunk of its own."""
    data = jsontext.encode(node)
    stored = StoredTensor(("t",), "uint8", (len(data),), "cpu", (Shard((0,), (0,)),))
    tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    with suppress(CiuicError):
        value = Inflater((stored,), lambda index: tensor).value({"json": 0}, "state")
        assert not isinstance(value, torch.Tensor)
