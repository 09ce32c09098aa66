"""Objects of unusual kinds: each is restored exactly, or refused by name before anything changes."""

from __future__ import annotations

import collections
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from ciuic_async import Checkpointer, IntegrityError, SnapshotChain, TargetMismatchError
from ciuic_async.format.manifest import Node
from ciuic_async.pipeline.commit import Resolved
from ciuic_async.pipeline.restore import restore_objects
from tests.strategies import fingerprint


def save(folder: Path, **state: Any) -> None:
    with Checkpointer(folder, state, rng=False) as ckpt:
        ckpt.save().wait_durable(60)


def restore(folder: Path, *, strict: bool = True, **state: Any) -> tuple[str, ...]:
    with Checkpointer(folder, state, rng=False) as ckpt:
        progress = ckpt.restore(strict=strict)
    assert progress is not None
    return progress.mismatches


# --- modules ----------------------------------------------------------------------------------------------------------


class Buffers(nn.Module):
    """Buffers as they are given, tied or not."""

    def __init__(self, **buffers: torch.Tensor) -> None:
        super().__init__()
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)


def test_a_plain_dict_of_tensors_fits_a_module(tmp_path: Path) -> None:
    """What was saved as a dict of the right names is loaded by the module itself."""
    model = nn.Linear(4, 4)
    save(tmp_path / "chain", model=dict(model.state_dict()))
    other = nn.Linear(4, 4)
    assert restore(tmp_path / "chain", model=other) == ()
    assert fingerprint(other.state_dict()) == fingerprint(model.state_dict())


def test_a_dict_with_other_keys_than_names_does_not_fit_a_module(tmp_path: Path) -> None:
    """Entries that have numbers for names are no module's: refused, and the module is as it was."""
    save(tmp_path / "chain", model=collections.OrderedDict({1: torch.ones(4, 4)}))
    model = nn.Linear(4, 4)
    before = fingerprint(model.state_dict())
    with pytest.raises(TargetMismatchError, match="model"):
        restore(tmp_path / "chain", model=model)
    assert fingerprint(model.state_dict()) == before


def test_an_object_that_refuses_its_state_is_reported_without_strict(tmp_path: Path) -> None:
    """With strict=False the refusal is a mismatch with its reason, and the other objects are restored."""

    class Picky:
        def state_dict(self) -> dict[str, int]:
            return {"version": 1}

        def load_state_dict(self, state: dict[str, int]) -> None:
            raise KeyError("too old")

    saved, model = nn.Linear(2, 2), nn.Linear(2, 2)
    save(tmp_path / "chain", picky=Picky(), model=saved)
    (found,) = restore(tmp_path / "chain", strict=False, picky=Picky(), model=model)
    assert "picky" in found
    assert "too old" in found
    assert fingerprint(model.state_dict()) == fingerprint(saved.state_dict())


def test_buffers_without_elements_come_back(tmp_path: Path) -> None:
    """An entry that has no memory shares it with none, and is restored beside those that have."""
    save(tmp_path / "chain", model=Buffers(none=torch.empty(0), other=torch.empty(2, 0), some=torch.ones(3)))
    model = Buffers(none=torch.empty(0), other=torch.empty(2, 0), some=torch.zeros(3))
    assert restore(tmp_path / "chain", model=model) == ()
    assert torch.equal(model.some, torch.ones(3))  # type: ignore[arg-type]


def test_entries_that_are_copies_go_through_the_module(tmp_path: Path) -> None:
    """What a module adds to its state_dict and is none of its tensors is handed to its load_state_dict."""

    class Scaled(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.scale = 0.0

        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination[prefix + "scale"] = torch.tensor([self.scale])

        def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
            self.scale = state.pop(prefix + "scale").item()
            super()._load_from_state_dict(state, prefix, *rest)

    saved, model = Scaled(), Scaled()
    saved.scale = 2.5
    save(tmp_path / "chain", model=saved)
    assert restore(tmp_path / "chain", model=model) == ()
    assert model.scale == 2.5
    assert fingerprint(model.state_dict()) == fingerprint(saved.state_dict())


def test_a_lazy_module_takes_the_saved_shape(tmp_path: Path) -> None:
    """Parameters that have no shape yet fit any: after the restore they are the saved ones."""
    saved = nn.LazyLinear(3)
    saved(torch.zeros(1, 5))
    save(tmp_path / "chain", model=saved)
    model = nn.LazyLinear(3)
    assert restore(tmp_path / "chain", model=model) == ()
    assert fingerprint(model.state_dict()) == fingerprint(saved.state_dict())


@pytest.mark.parametrize("live_tied", [True, False])
def test_tied_entries_fill_whatever_they_are_now(live_tied: bool, tmp_path: Path) -> None:
    """One saved memory under two names fills both, whether they are still tied or each on its own."""
    tied = torch.arange(6.0)
    save(tmp_path / "chain", model=Buffers(a=tied, b=tied))
    one = torch.zeros(6)
    model = Buffers(a=one, b=one if live_tied else torch.zeros(6))
    assert restore(tmp_path / "chain", model=model) == ()
    assert torch.equal(model.a, tied)  # type: ignore[arg-type]
    assert torch.equal(model.b, tied)  # type: ignore[arg-type]


def test_memory_that_two_dtypes_share_is_refused(tmp_path: Path) -> None:
    """Live entries of two dtypes in each other's range are refused rather than looked into, with none changed."""
    save(tmp_path / "chain", model=Buffers(a=torch.ones(8), b=torch.ones(8, dtype=torch.int16)))
    memory = torch.zeros(16)
    model = Buffers(a=memory[::2], b=memory.view(torch.int16)[2::4])
    with pytest.raises(TargetMismatchError, match=r"model\.b: shares its memory"):
        restore(tmp_path / "chain", model=model)
    assert not memory.any()


# --- plain trees ------------------------------------------------------------------------------------------------------


class Point(NamedTuple):
    x: Any
    y: Any


class Size(NamedTuple):
    width: Any
    height: Any


def test_a_named_tuple_of_other_fields_does_not_fit(tmp_path: Path) -> None:
    """Tensors in a named tuple are paired by its fields: another one's are a mismatch, the same one's are filled."""
    save(tmp_path / "chain", plain=Point(torch.ones(2), 1))
    with pytest.raises(TargetMismatchError, match=r"plain\.0: no tensor in the snapshot"):
        restore(tmp_path / "chain", plain=Size(torch.zeros(2), 1))
    live = Point(torch.zeros(2), 0)
    assert restore(tmp_path / "chain", plain=live) == ()
    assert torch.equal(live.x, torch.ones(2))


def test_a_live_value_that_contains_itself_ends_no_restore(tmp_path: Path) -> None:
    """Such a value was never saved; the restore replaces it by what was, and ends."""
    save(tmp_path / "chain", plain={"log": [1, 2]})
    live: dict[str, Any] = {"log": [0]}
    live["log"].append(live["log"])
    assert restore(tmp_path / "chain", plain=live) == ()
    assert live == {"log": [1, 2]}


def _lying(chain: SnapshotChain, node: Node) -> Resolved:
    """The newest snapshot with another node for its only tree."""
    resolved = chain.get("latest").resolve()
    (tree,) = resolved.manifest.trees
    return replace(resolved, manifest=replace(resolved.manifest, trees=(replace(tree, node=node),)))


@pytest.mark.parametrize(
    ("items", "refusal"),
    [
        ([1], IntegrityError),
        ([[1]], IntegrityError),
        ([[1, 2, 3]], IntegrityError),
        ([[[], 1]], IntegrityError),
        ("ab", TargetMismatchError),  # no dict at all, so no tensor for the live one
    ],
)
def test_a_dict_whose_items_are_no_pairs_is_refused(items: Any, refusal: type[Exception], tmp_path: Path) -> None:
    """A node that lies is refused before a live value is touched."""
    save(tmp_path / "chain", plain={"w": torch.ones(2)})
    live = torch.zeros(2)
    with SnapshotChain(tmp_path / "chain") as chain:
        lying = _lying(chain, {"dict": items})
        with pytest.raises(refusal):
            restore_objects(chain.store, lying, {"plain": {"w": live}}, strict=True, rng=False)
    assert not live.any()


# --- optimizers -------------------------------------------------------------------------------------------------------


class OwnLayout(torch.optim.SGD):
    """An optimizer whose state_dict is its own affair."""

    def state_dict(self) -> dict[str, Any]:
        return {"param_groups": "none", "state": "none", "lr": self.param_groups[0]["lr"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert state_dict["state"] == "none"
        self.param_groups[0]["lr"] = state_dict["lr"]


def test_an_optimizer_of_its_own_layout_is_left_to_itself(tmp_path: Path) -> None:
    """Nothing is concluded from groups and state that are none: the optimizer gets what it gave."""
    save(tmp_path / "chain", optimizer=OwnLayout([torch.zeros(3)], lr=0.25))
    other = OwnLayout([torch.zeros(3)], lr=0.5)
    assert restore(tmp_path / "chain", optimizer=other) == ()
    assert other.param_groups[0]["lr"] == 0.25


def _adam(make: Callable[[], torch.Tensor]) -> torch.optim.Optimizer:
    parameter = nn.Parameter(make())
    optimizer = torch.optim.Adam([parameter])
    parameter.sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return optimizer


def test_moments_of_another_shape_get_memory_of_their_own(tmp_path: Path) -> None:
    """Live moments that do not fit are not written to; the optimizer holds the saved ones, whole."""
    saved = _adam(lambda: torch.ones(200, 100))
    save(tmp_path / "chain", optimizer=saved)
    other = _adam(lambda: torch.ones(100, 200))
    (state,) = other.state.values()
    before, kept = state["exp_avg"], state["exp_avg"].clone()
    assert restore(tmp_path / "chain", optimizer=other) == ()
    assert fingerprint(other.state_dict()["state"]) == fingerprint(saved.state_dict()["state"])
    assert torch.equal(before, kept)
