"""Whatever docs/format.md can hold comes back as it was: types, order, bits, strides and shared storages."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ciuic_async
from ciuic_async import native
from ciuic_async.format import layout
from tests.strategies import State, bits, families, fingerprint, lone_tensors, sharing, trees

own_folder = settings(
    max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def _round_trip(state: Any, folder: Path, codec: str = "auto") -> Any:
    chain = folder / layout.new_id()
    ciuic_async.save(state, chain, codec=codec)
    return ciuic_async.load(chain)


def _assert_same(actual: Any, expected: Any) -> None:
    assert fingerprint(actual) == fingerprint(expected)
    assert sharing(actual) == sharing(expected)


def _strides(tensor: torch.Tensor) -> list[int]:
    """Strides that mean something: not those of a dimension of size 1."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


@settings(own_folder, max_examples=50)
@given(state=trees())
def test_a_saved_tree_is_loaded_bit_for_bit(state: State, tmp_path: Path) -> None:
    """load(save(tree)) has the tree's types, order, bits and shared storages."""
    _assert_same(_round_trip(state.value, tmp_path), state.value)


@settings(own_folder, max_examples=12)
@given(state=st.dictionaries(st.text(max_size=3), trees(), min_size=1, max_size=3))
def test_a_dict_of_trees_shares_storages_across_its_items(state: dict[str, State], tmp_path: Path) -> None:
    """Items of the outermost dict are separate trees in the manifest; what they share is shared still."""
    values = {name: tree.value for name, tree in state.items()}
    values["again"] = list(values.values())
    _assert_same(_round_trip(values, tmp_path), values)


@settings(own_folder, max_examples=12)
@given(state=trees())
def test_raw_chunks_hold_the_same_tree(state: State, tmp_path: Path) -> None:
    """The codec has no influence on what comes back."""
    _assert_same(_round_trip(state.value, tmp_path, codec="raw"), state.value)


@settings(own_folder, max_examples=12)
@given(state=trees(), saved_natively=st.booleans())
def test_the_native_core_has_no_influence(state: State, saved_natively: bool, tmp_path: Path) -> None:
    """What is saved with or without the compiled core loads the other way."""
    chain = tmp_path / layout.new_id()
    with pytest.MonkeyPatch.context() as patch:
        if not saved_natively:
            patch.setattr(native, "core", None)
        ciuic_async.save(state.value, chain)
    with pytest.MonkeyPatch.context() as patch:
        if saved_natively:
            patch.setattr(native, "core", None)
        _assert_same(ciuic_async.load(chain), state.value)


@own_folder
@given(lone=lone_tensors())
def test_strides_of_a_lone_tensor_come_back_when_it_is_dense(lone: State, tmp_path: Path) -> None:
    """Docs/format.md section 3: alone on its storage, a tensor keeps its strides when no byte lies in a gap."""
    tensor = lone.value
    loaded = _round_trip([tensor], tmp_path)[0]
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.numel() and extent <= tensor.numel():
        assert _strides(loaded) == _strides(tensor)
    else:
        assert loaded.is_contiguous()


@own_folder
@given(family=families())
def test_views_of_one_storage_keep_their_strides(family: State, tmp_path: Path) -> None:
    """Several different views of a storage come back with their own strides, each byte stored once."""
    members = family.value
    state = dict(enumerate(members))
    chain = tmp_path / layout.new_id()
    snapshot = ciuic_async.save(state, chain)
    loaded = ciuic_async.load(chain)
    views = {(m.dtype, tuple(m.shape), m.stride(), m.storage_offset()) for m in members}
    if len(views) > 1:
        assert [_strides(view) for view in loaded.values()] == [_strides(view) for view in members]
    storage_bytes = members[0].untyped_storage().nbytes()
    assert snapshot.raw_bytes <= storage_bytes + 16 * len(members), "each gap closed, each byte once"


@settings(own_folder, max_examples=5)
@given(seed=st.integers(0, 2**32), size=st.integers(1, 3 * (4 << 20)), dtype=st.sampled_from(["uint8", "bfloat16"]))
def test_tensors_of_several_chunks_come_back(seed: int, size: int, dtype: str, tmp_path: Path) -> None:
    """Lengths around chunk borders make no difference."""
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randint(0, 255, (size,), generator=generator).to(getattr(torch, dtype))
    loaded = _round_trip({"a": tensor, "b": tensor[: size // 2].clone()}, tmp_path)
    assert bits(loaded["a"]) == bits(tensor)
    assert bits(loaded["b"]) == bits(tensor[: size // 2])


def test_the_smallest_states_are_states(tmp_path: Path) -> None:
    """An empty dict, None, a single number and a single tensor can be saved."""
    states: list[Any] = [{}, None, math.pi, torch.tensor(1.5), [], {"": {}}]
    for state in states:
        _assert_same(_round_trip(state, tmp_path), state)
