"""Tensors: what is refused, how leaves on one storage are stored once, and what is packed with what."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ciuic_async
from ciuic_async import UsageError
from ciuic_async.capture.state_tree import flatten
from tests.strategies import DTYPES, bits, fingerprint, sharing


class Subclass(torch.Tensor):
    pass


def _quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)


def _nested() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


def _sparse_csr() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.eye(3).to_sparse_csr()


REFUSED: dict[str, Any] = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse csr": _sparse_csr,
    "quantized": _quantized,
    "meta": lambda: torch.empty(3, device="meta"),
    "nested": _nested,
    "subclass": lambda: torch.ones(2).as_subclass(Subclass),
    "parameter of a lazy module": lambda: torch.nn.LazyLinear(3).weight,
    "too many dimensions": lambda: torch.ones([1] * 65),
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=list(REFUSED))
def test_a_tensor_that_cannot_be_stored_is_refused(make: Any, tmp_path: Path) -> None:
    """The UsageError names path and reason; nothing is written."""
    with pytest.raises(UsageError) as refusal:
        ciuic_async.save({"model": {"w": make()}}, tmp_path / "chain")
    assert refusal.value.kind == "unsupported_tensor"
    assert str(refusal.value).startswith("model.w: ")
    assert refusal.value.where == "model.w"
    assert not (tmp_path / "chain").exists()


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_dtype_comes_back_in_every_layout(name: str, tmp_path: Path) -> None:
    """Contiguous, transposed, with gaps, expanded: bits and dtype are the same."""
    data = bytearray(n * 37 % 256 if name != "bool" else n % 2 for n in range(24 * 16))

    def flat() -> torch.Tensor:
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(DTYPES[name])[:24]

    state = {
        "plain": flat(),
        "transposed": flat().view(4, 6).t(),
        "gaps": flat()[::3],
        "expanded": flat()[0].expand(5),
    }
    ciuic_async.save(state, tmp_path / "chain")
    assert fingerprint(ciuic_async.load(tmp_path / "chain")) == fingerprint(state)


def test_nan_payloads_and_signs_survive(tmp_path: Path) -> None:
    """No conversion touches the bits: signalling nan, -0.0 and subnormals are as they were."""
    words = np.array([0x7FA00001, 0xFFC12345, 0x80000000, 0x00000001], dtype=np.uint32)
    tensor = torch.from_numpy(words.view(np.float32).copy())
    ciuic_async.save([tensor, tensor.double()], tmp_path / "chain")
    loaded = ciuic_async.load(tmp_path / "chain")
    assert loaded[0].view(torch.int32).tolist() == tensor.view(torch.int32).tolist()
    assert bits(loaded[1]) == bits(tensor.double())


def test_conjugated_and_negated_views_are_stored_as_they_read(tmp_path: Path) -> None:
    """Lazy conjugation is resolved, so that the stored bits are the values."""
    tensor = torch.tensor([1 + 2j, -3.5j])
    state = [tensor.conj(), tensor.conj().imag, tensor]
    ciuic_async.save(state, tmp_path / "chain")
    loaded = ciuic_async.load(tmp_path / "chain")
    assert all(torch.equal(one, other) for one, other in zip(loaded, state, strict=True))


def test_tied_tensors_are_stored_once_and_come_back_tied(tmp_path: Path) -> None:
    """Two names of one tensor cost its bytes once; writing through one shows in the other."""
    tensor = torch.randn(100_000)
    snapshot = ciuic_async.save({"a": tensor, "b": {"again": tensor}}, tmp_path / "chain")
    assert snapshot.raw_bytes == 400_000
    loaded = ciuic_async.load(tmp_path / "chain")
    loaded["a"][0] = 7
    assert loaded["b"]["again"][0] == 7


def test_gaps_between_views_are_not_stored(tmp_path: Path) -> None:
    """Of a big storage only what the views see is stored, and they come back in one storage."""
    base = torch.arange(1_000_000, dtype=torch.float32)
    state = {"low": base[:10], "high": base[-10:], "inside": base[2:8].view(2, 3).t()}
    snapshot = ciuic_async.save(state, tmp_path / "chain")
    assert snapshot.raw_bytes < 200
    loaded = ciuic_async.load(tmp_path / "chain")
    assert fingerprint(loaded) == fingerprint(state)
    assert sharing(loaded) == sharing(state)


def test_storages_of_different_length_over_one_array_are_one_storage(tmp_path: Path) -> None:
    """numpy makes storages that begin at one address and differ in length; no byte is read past the shorter one."""
    array = np.arange(1000, dtype=np.float32)
    state = {"short": torch.from_numpy(array[:10]), "long": torch.from_numpy(array)}
    ciuic_async.save(state, tmp_path / "chain")
    assert fingerprint(ciuic_async.load(tmp_path / "chain")) == fingerprint(state)
    assert state["short"].untyped_storage().nbytes() == 40, "the live storage was not grown"


def test_a_non_leaf_comes_back_as_a_leaf(tmp_path: Path) -> None:
    """A tensor with a grad_fn is stored by value; its history is not kept."""
    made = torch.ones(3, requires_grad=True) * 2
    ciuic_async.save([made], tmp_path / "chain")
    loaded = ciuic_async.load(tmp_path / "chain")[0]
    assert loaded.is_leaf
    assert loaded.requires_grad
    assert torch.equal(loaded, made)


def test_frozen_and_trained_small_tensors_lie_in_different_packs() -> None:
    """Tensors are packed by top-level name, item size and whether they are trained."""
    frozen, trained = torch.nn.Parameter(torch.ones(4), requires_grad=False), torch.nn.Parameter(torch.ones(4))
    plan = flatten(
        {"m": [frozen, trained, torch.ones(2, dtype=torch.bfloat16)], "o": [torch.ones(4), torch.ones(3)]},
        chunk_size_bytes=1 << 20,
    ).plan
    assert plan.pack_count == 4
    assert [tensor.region for tensor in plan.tensors] == [0, 1, 2, 3, 3]
    assert [tensor.pack_offset_bytes for tensor in plan.tensors] == [0, 0, 0, 0, 16]


def test_trainable_storages_decide_for_a_state_dict() -> None:
    """A state_dict's tensors no longer say that they are trained: the collector is told."""
    tensors = [torch.ones(4), torch.ones(4)]
    trainable = frozenset({tensors[1].untyped_storage().data_ptr()})
    plan = flatten({"m": tensors}, chunk_size_bytes=1 << 20, trainable=trainable).plan
    assert plan.tensors[0].region != plan.tensors[1].region


def test_a_pack_never_exceeds_a_chunk() -> None:
    """20,000 small tensors fill packs of at most one chunk."""
    plan = flatten({"m": [torch.ones(100) for _ in range(20_000)]}, chunk_size_bytes=1 << 20).plan
    assert plan.pack_count == len(plan.regions) == 8
    assert max(region.size_bytes for region in plan.regions) <= 1 << 20


def test_padding_is_zero(tmp_path: Path) -> None:
    """Bytes between packed tensors do not repeat what an earlier snapshot left in the buffer."""
    chain = ciuic_async.SnapshotChain(tmp_path / "chain")
    first = ciuic_async.save({"m": [torch.full((33,), 255, dtype=torch.uint8)] * 1 + [torch.ones(3)]}, chain)
    state = {"m": [torch.zeros(1, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8)]}
    digests = {ciuic_async.save(state, chain).resolve().manifest.packs[0].digest for _ in range(2)}
    assert len(digests) == 1
    assert first.resolve().manifest.packs[0].digest not in digests


def test_capturing_keeps_nothing_alive() -> None:
    """When the plan is dropped, so are the tensors."""
    tensor = torch.ones(1000)
    captured = flatten({"a": tensor}, chunk_size_bytes=1 << 20)
    assert captured.plan.size_bytes == 4000
    storage = tensor.untyped_storage()._weak_ref()
    del captured, tensor
    gc.collect()
    assert torch.UntypedStorage._expired(storage)
    torch.UntypedStorage._free_weak_ref(storage)  # type: ignore[no-untyped-call]
